"""Scores of a whole catalogue in rows that begin at a cache line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LINE = 64  # numbers: four cache lines of float32
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def aligned_rows(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """Uninitialized ``(n_rows, n_columns)`` of the kind of ``like``.

    Each row begins at a cache line: MKL's products take twice as long where they do not.
    """
    return like.new_empty(n_rows, -(-n_columns // _LINE) * _LINE)[:, :n_columns]


class AlignedProducts(TorchFunctionMode):
    """A context in which products with the vectors of all items come in aligned rows.

    RecBole's models score the catalogue by one product ``(B, D) x (D, N)`` inside
    ``full_sort_predict``. N counts the padding item and fits no cache line but by chance. Here such
    a product is the same numbers in :func:`aligned_rows`. A model that then asks for a view of
    another shape, which such rows may not have, gets a copy.

    Args:
        n_items: N. Other products, sparse ones, other devices and autocast are left alone.
    """

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, one of torch's; see torch.overrides."""
        if func in _PRODUCTS and not kwargs and self._scores(*args):
            left, right = args
            return torch.mm(left, right, out=aligned_rows(left, len(left), self.n_items))
        if func is Tensor.view and not kwargs and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape  # a view still where there is one
        return func(*args, **(kwargs or {}))

    def _scores(self, left: Tensor, right: Tensor) -> bool:
        return (
            left.layout == right.layout == torch.strided
            and left.dim() == right.dim() == 2
            and right.size(1) == self.n_items
            and left.device.type == "cpu"
            and left.dtype == right.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.is_grad_enabled()
        )
