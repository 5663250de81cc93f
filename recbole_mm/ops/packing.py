"""Ways to do no work for padding: real positions side by side, rows of like length together.

Shapes: B batch, L sequence length, T real positions of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.ops.masking import padding_mask


class Packing:
    """The way from right-padded rows ``(B, L)`` to their ``T`` real positions, and back.

    Sizes that depend on the data make a GPU wait once, when the packing is built.

    Args:
        length: ``(B,)`` integer, real positions of each row, 0 to ``size``.
        size: Padded length ``L``.

    Attributes:
        real: ``(B, L)`` bool, ``True`` at real positions.
        index: ``(T,)`` int64, places of the real positions in the flattened ``(B * L)``.
        position: ``(T,)`` int64, place of each within its row.
    """

    def __init__(self, length: Tensor, size: int) -> None:
        self.real = padding_mask(length, size)
        self.index = self.real.flatten().nonzero().squeeze(1)
        self.position = self.index % size

    def pack(self, x: Tensor) -> Tensor:
        """Real positions of ``x`` ``(B, L, ...)``: ``(T, ...)``. Padding has no influence."""
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, x: Tensor, dim: int = 0) -> Tensor:
        """Rows of ``x`` ``(..., T, ...)`` in their places: ``(..., B, L, ...)``, else zero.

        Args:
            x: Holds the ``T`` real positions in dimension ``dim``.
            dim: Not negative; it becomes two dimensions.
        """
        B, L = self.real.shape
        padded = x.new_zeros(*x.shape[:dim], B * L, *x.shape[dim + 1 :])
        padded = padded.index_copy(dim, self.index, x)
        return padded.view(*x.shape[:dim], B, L, *x.shape[dim + 1 :])


# A group of rows starts anew where rows are shorter than this share of its longest, ...
_SHORTER = 0.75
# ... unless it would hold fewer positions: a call costs as much as some hundred of them (measured)
_MIN_POSITIONS = 512
# Positions of a call without a gradient: 16 MiB for each tensor of 64 floats a position.
_MOST_POSITIONS = 1 << 16


def by_length(encode: Callable[[Tensor, Tensor], Tensor], x: Tensor, length: Tensor) -> Tensor:
    """``encode(x, length)``, computed for rows of like length at a time.

    Equal, but for rounding and the draws of dropout, for an ``encode`` that treats every row by
    itself. Without a gradient a call holds at most 65,536 positions, or one row. Not done on a
    GPU, where small calls cost more than padding.

    Args:
        encode: Takes ``(b, l, ...)`` and ``(b,)``, rows cut to the longest of them; gives
            ``(b, l, ...)`` or a vector for each row, ``(b, D)``.
        x: ``(B, L, D)``, padded on the right.
        length: ``(B,)`` integer, real positions of each row, 0 to ``L``.

    Returns:
        What ``encode`` gives, ``(B, L, ...)``, zero at the padding cut away, or ``(B, D)``.
    """
    if x.device.type != "cpu" or len(length) == 0:
        return encode(x, length)
    longest_first = length.argsort(descending=True, stable=True)
    # what an encoder keeps for its gradient it keeps whatever the groups; without one, few
    # positions at a time bound its memory
    most = None if torch.is_grad_enabled() else _MOST_POSITIONS
    groups = _groups(length[longest_first].tolist(), most)
    if len(groups) == 1:
        return encode(x, length)
    parts = []
    sizes = [size for size, _ in groups]
    for rows, (_, longest) in zip(torch.split(longest_first, sizes), groups, strict=True):
        part = encode(x.index_select(0, rows)[:, :longest], length[rows])
        if part.dim() == x.dim():
            part = F.pad(part, (0, 0, 0, x.size(1) - longest))
        parts.append(part)
    return torch.cat(parts).index_select(0, longest_first.argsort())


def _groups(lengths: list[int], most: int | None) -> list[tuple[int, int]]:
    """Number of rows and longest row of each group, for ``lengths`` in descending order.

    A group of more than one row has at most ``most`` positions, padding included.
    """
    groups = []
    start = 0
    for end in range(1, len(lengths) + 1):
        longest, left = max(1, lengths[start]), len(lengths) - end
        full = most is not None and (end - start + 1) * longest > most
        if (
            left == 0
            or full
            or (
                lengths[end] < _SHORTER * longest
                and (end - start) * longest >= _MIN_POSITIONS
                and left * lengths[end] >= _MIN_POSITIONS
            )
        ):
            groups.append((end - start, longest))
            start = end
    return groups
