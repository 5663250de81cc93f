"""Masks, and softmax and mean over what a mask leaves.

A mask is bool and ``True`` means "take part". Sequences are padded on the right.

Shapes: ... any leading dimensions, B batch, L sequence length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the entries where ``mask`` is ``True``.

    A slice without a single ``True`` entry becomes all zeros, in value and in gradient, so that
    a query that may attend to nothing, or an item without any modality, cannot poison the batch.
    What stands at ``False`` entries, NaN included, does not matter.

    Args:
        scores: Unnormalised scores, any shape.
        mask: Boolean, broadcastable to ``scores``.
        dim: Dimension to normalise over.

    Returns:
        Weights of the shape of ``scores``; each slice sums to one, or to zero.
    """
    lowest = torch.finfo(scores.dtype).min  # not -inf: softmax of an all -inf row is NaN
    return scores.masked_fill(~mask, lowest).softmax(dim).masked_fill(~mask, 0.0)


def masked_mean(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Mean over the entries where ``mask`` is ``True``; zero where there is none.

    Args:
        values: Any shape.
        mask: Boolean, broadcastable to ``values``.
        dim: Dimension to average over; it disappears.

    Returns:
        ``values`` without dimension ``dim``. ``False`` entries have no influence, NaN included,
        and receive a zero gradient.
    """
    kept = mask.expand_as(values)
    total = torch.where(kept, values, 0.0).sum(dim)
    return total / kept.sum(dim).clamp(min=1)


def padding_mask(length: Tensor, size: int) -> Tensor:
    """Real positions of right-padded rows.

    Args:
        length: ``(...)`` integer, real positions of each row.
        size: Padded length ``L``.

    Returns:
        ``(..., L)`` bool, ``True`` at the first ``length`` positions.
    """
    return torch.arange(size, device=length.device) < length[..., None]


def causal_mask(size: int, device: torch.device | None = None) -> Tensor:
    """Keys that a query may see: itself and earlier ones.

    Args:
        size: Sequence length ``L``.
        device: Where the mask lives.

    Returns:
        ``(L, L)`` bool, rows are queries.
    """
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()
