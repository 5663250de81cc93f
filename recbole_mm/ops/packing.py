"""Real positions of padded sequences side by side, so that no work is done for padding.

Shapes: B batch, L sequence length, T real positions of the whole batch.
"""

from __future__ import annotations

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
