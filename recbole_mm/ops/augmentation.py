"""Augmentations of sequences.

Shapes: ... any leading dimensions, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def swap_mask(swappable: Tensor, ratio: float) -> Tensor:
    """Draw each place where a swap is allowed with the same probability.

    Source: CAMMSR, arXiv 2603.04320, Eq. (16).

    Args:
        swappable: ``(...)`` bool.
        ratio: Probability, 0 to 1.

    Returns:
        ``(...)`` bool, ``True`` only where ``swappable`` is.

    Raises:
        ValueError: If ``ratio`` is outside 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"swap_ratio must lie in [0, 1], got {ratio!r}")
    drawn = torch.rand(swappable.shape, device=swappable.device) < ratio
    return drawn & swappable


def swap(first: Tensor, second: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange two sequences of vectors at the places that ``mask`` names.

    Source: CAMMSR, arXiv 2603.04320, Eq. (16).

    Args:
        first: ``(..., D)``.
        second: ``(..., D)``.
        mask: ``(...)`` bool.

    Returns:
        ``first`` with the vectors of ``second`` where ``mask`` is ``True``, and the reverse.
    """
    exchanged = mask.unsqueeze(-1)
    return torch.where(exchanged, second, first), torch.where(exchanged, first, second)
