from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.ops.sparse_attention import sparse_attention
from tests.reference import sparse_attention as reference

H, D = 2, 3


def inputs(L, b, length, n_branches=3, dtype=torch.float64):
    B = len(length)
    tensors = {
        "query": torch.randn(B, H, L, D, dtype=dtype),
        "key": torch.randn(B, H, L, D, dtype=dtype),
        "value": torch.randn(B, H, L, D, dtype=dtype),
        "gate": torch.rand(B, H, L, n_branches, dtype=dtype),
        "block_key": torch.randn(B, H, L // b, D, dtype=dtype),
        "block_value": torch.randn(B, H, L // b, D, dtype=dtype),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def naive(tensors, length, **options):
    q, k, v, gate, block_key, block_value = tensors.values()
    return torch.stack(
        [
            reference.sparse_attention(
                q[i],
                k[i],
                v[i],
                gate[i],
                n,
                block_key=block_key[i],
                block_value=block_value[i],
                **options,
            )
            for i, n in enumerate(length)
        ]
    )


@pytest.mark.parametrize("selection", ["query", "query_block"])
@pytest.mark.parametrize(("L", "b", "w", "n"), [(1, 4, 3, 2), (7, 2, 3, 2), (31, 4, 5, 3)])
def test_equals_loop_reference(L, b, w, n, selection):
    length = [L, max(1, L // 2), L - 1]
    tensors = inputs(L, b, length)
    options = {
        "block_size": b,
        "window_size": w,
        "n_selected_blocks": n,
        "selection": selection,
    }
    ours = sparse_attention(**tensors, length=torch.tensor(length), **options)
    theirs = naive(tensors, length, **options)
    assert_close(ours, theirs, rtol=0, atol=1e-10)
    weight = torch.randn_like(ours)
    for a, e in zip(
        torch.autograd.grad((ours * weight).sum(), list(tensors.values()), materialize_grads=True),
        torch.autograd.grad(
            (theirs * weight).sum(), list(tensors.values()), materialize_grads=True
        ),
        strict=True,
    ):
        assert_close(a, e, rtol=0, atol=1e-10)
