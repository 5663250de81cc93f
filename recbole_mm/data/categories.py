"""Categories of the catalogue.

Shapes: N items (row 0 is padding), C categories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CategoryTable:
    """Which item belongs to which categories.

    Attributes:
        names: ``(C,)`` in alphabetical order, whatever the order of the items.
        multi_hot: ``(N, C)`` bool; the row of padding, and of an item without a category, is all
            ``False``.
    """

    names: tuple[str, ...]
    multi_hot: Tensor

    @classmethod
    def from_lists(cls, categories: Sequence[Collection[str]]) -> CategoryTable:
        """The table of a catalogue.

        Args:
            categories: ``(N,)`` the categories of each internal item id; repeats count once.
        """
        names = sorted({name for row in categories for name in row})
        column = {name: i for i, name in enumerate(names)}
        multi_hot = torch.zeros(len(categories), len(names), dtype=torch.bool)
        pairs = [(i, column[name]) for i, row in enumerate(categories) for name in row]
        if pairs:
            items, columns = torch.tensor(pairs).T
            multi_hot[items, columns] = True
        return cls(tuple(names), multi_hot)

    def fingerprint(self) -> str:
        """A hash of who belongs to what, whatever the names."""
        return hashlib.sha256(self.multi_hot.numpy().tobytes()).hexdigest()[:12]
