"""Propagation over a sparse symmetric graph.

A graph is three tensors, those of a CSR matrix: ``crow`` (N + 1,) and ``col`` (E,), int64, and
``weight`` (E,). They are plain tensors, so that they can be buffers of a module, be moved and be
copied as any other; the CSR tensor is put round them for the time of a product.

Shapes: N nodes, E edges (both directions counted), D width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def propagate(crow: Tensor, col: Tensor, weight: Tensor, x: Tensor, n_layers: int) -> Tensor:
    r"""Multiply by a symmetric adjacency matrix, several times.

    .. math::
        y = A^{n} x, \qquad \partial \ell / \partial x = A^{n} \, \partial \ell / \partial y

    No weights and no activation between the layers. Because :math:`A` is symmetric, the backward
    pass is the same product: no transpose is kept, and none is formed. The caller vouches for the
    symmetry. The edge weights receive no gradient.

    Source: He et al., *LightGCN*, SIGIR 2020, without its mean over the layers; so Zhang et al.,
    *Mining Latent Structures for Multimedia Recommendation* (LATTICE), MM 2021.

    Args:
        crow: ``(N + 1,)`` int64.
        col: ``(E,)`` int64.
        weight: ``(E,)`` float32 or float64.
        x: ``(N, D)``; computed with in the type of ``weight``, under autocast too.
        n_layers: Number of products ``n``; 0 gives ``x`` back.

    Returns:
        ``(N, D)`` in the type of ``weight``. Can be differentiated once.

    Raises:
        ValueError: If ``x`` is not ``(N, D)`` or ``n_layers`` is negative.
    """
    if x.dim() != 2 or len(x) != len(crow) - 1:
        raise ValueError(f"x must be ({len(crow) - 1}, D), got {tuple(x.shape)}")
    if n_layers < 0:
        raise ValueError(f"n_layers must be at least 0, got {n_layers}")
    y: Tensor = x.to(weight.dtype)
    for _ in range(n_layers):
        y = _SymmetricProduct.apply(crow, col, weight, y)  # type: ignore[no-untyped-call]
    return y


class _SymmetricProduct(torch.autograd.Function):
    """``A x``, whose backward pass is the same product again."""

    @staticmethod
    def forward(ctx: Any, crow: Tensor, col: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(crow, col, weight)
        return _product(crow, col, weight, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        crow, col, weight = ctx.saved_tensors
        return None, None, None, _product(crow, col, weight, grad)


def _product(crow: Tensor, col: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    # autocast would make of float32 what a CPU has no sparse product for
    with torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
        # that CSR tensors are in beta; said once for a process, and of no use to our callers
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        adjacency = torch.sparse_csr_tensor(
            crow, col, weight, size=(len(crow) - 1, len(crow) - 1), check_invariants=False
        )
        y: Tensor = adjacency @ x.contiguous()
    return y
