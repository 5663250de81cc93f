"""Rows of a sequential data set that point at their history instead of holding it.

RecBole stores the past of every interaction as a list of length L, for every field, twice. Here all
interactions are kept once, sorted by user and time; a row is the position of its target and the
length of its input, and the lists of a batch are gathered when the batch is made.

Shapes: R rows, L sequence length, T sorted interactions, U users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Histories:
    """All interactions, sorted by user, then by time.

    Attributes:
        columns: By field, ``(T, ...)``.
        first: ``(U,)`` position of the first interaction of each user, ascending.
        lists: Name of the list field by the field it lists.
        targets: ``(field, name of the list of its next values)``, for windows.
        length_field: Name of the field with the length of a row's input.
        max_length: ``L``.
    """

    columns: Mapping[str, Tensor]
    first: Tensor
    lists: Mapping[str, str]
    targets: tuple[str, str]
    length_field: str
    max_length: int

    def first_of(self, position: Tensor) -> Tensor:
        """Position of the first interaction of the user whose interaction is at ``position``."""
        return self.first[torch.searchsorted(self.first, position, right=True) - 1]

    def prefixes(self) -> SequenceRows:
        """A row for every interaction but the first of a user: its past predicts it.

        RecBole's augmentation, ``<i1> | i2``, ``<i1, i2> | i3``, ..., with the last L of the past.
        """
        is_target = torch.ones(len(next(iter(self.columns.values()))), dtype=torch.bool)
        is_target[self.first] = False
        target = is_target.nonzero().squeeze(1)
        length = (target - self.first_of(target)).clamp(max=self.max_length)
        return SequenceRows.at(target, length, self)


class SequenceRows(Interaction):
    """RecBole's ``Interaction`` whose list fields are gathered when they are asked for.

    Indexing with a name gives a column, a list field included (the whole of it, ``(R, L)``, for
    RecBole models that want it; it is then kept). Any other index gives fewer rows, still without
    lists; :meth:`gather` adds those.

    Args:
        columns: The fields of each target, and the length of its input; ``(R, ...)``.
        target: ``(R,)`` position of each target in ``source``.
        source: Where the lists come from.
        windows: Rows that predict an item at every position, see :meth:`windows`.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        target: Tensor,
        source: Histories,
        *,
        windows: bool = False,
    ) -> None:
        super().__init__(dict(columns))
        self.target = target
        self.source = source
        self.is_windows = windows
        self.lists = dict(source.lists)
        self._gathered: dict[str, Tensor] = {}

    @classmethod
    def at(
        cls, target: Tensor, length: Tensor, source: Histories, *, windows: bool = False
    ) -> SequenceRows:
        """Rows with these targets and input lengths."""
        columns = {field: column[target] for field, column in source.columns.items()}
        columns[source.length_field] = length
        return cls(columns, target, source, windows=windows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            if index in self.interaction or index not in self.lists.values():
                return self.interaction[index]
            if index not in self._gathered:
                field = next(field for field, name in self.lists.items() if name == index)
                self._gathered[index] = self._list(field)
            return self._gathered[index]
        if isinstance(index, np.ndarray):
            index = torch.from_numpy(index)
        columns = {field: column[index] for field, column in self.interaction.items()}
        rows = SequenceRows(columns, self.target[index], self.source, windows=self.is_windows)
        rows.lists = self.lists
        return rows

    def __contains__(self, field: str) -> bool:
        return field in self.interaction or field in self.lists.values()

    def drop(self, column: str) -> None:
        """Drop a column or a list field."""
        if column in self.interaction:
            super().drop(column)
        else:
            self.lists = {field: name for field, name in self.lists.items() if name != column}

    def _reindex(self, index: Tensor) -> None:
        super()._reindex(index)
        self.target = self.target[index]
        self._gathered = {}

    def gather(self) -> Interaction:
        """The rows with their lists, as RecBole would hold them: padded with 0 on the right.

        Windows come with the list of what follows each position, too.
        """
        rows = Interaction(self.interaction)
        for field, name in self.lists.items():
            rows[name] = self._list(field)
        if self.is_windows:
            field, name = self.source.targets
            rows[name] = self._list(field, shift=1)
        return rows

    def _list(self, field: str, shift: int = 0) -> Tensor:
        length = self.interaction[self.source.length_field].unsqueeze(-1)  # (R, 1)
        steps = torch.arange(self.source.max_length)
        is_padding = steps >= length  # (R, L)
        position = self.target.unsqueeze(-1) - length + steps + shift
        values = self.source.columns[field][position.masked_fill_(is_padding, 0)]  # (R, L, ...)
        inner = (None,) * (values.dim() - is_padding.dim())  # of a sequence field
        return values.masked_fill_(is_padding[(..., *inner)], 0)

    def targets(self) -> Tensor:
        """Positions of all interactions that the rows predict; those of windows row by row."""
        if not self.is_windows:
            return self.target
        length = self.interaction[self.source.length_field]
        return ranges(self.target - length + 1, length)[1]

    def interactions(self) -> Tensor:
        """Positions of what the rows predict, then of the first interactions that lead to it."""
        targets = self.targets()
        first = self.source.first_of(targets)
        return torch.cat([targets, first[targets - first == 1]])

    def without(self, excluded: Tensor) -> SequenceRows:
        """Prefix rows of the same interactions, as if some of them had never been.

        Args:
            excluded: ``(T,)`` bool, over the interactions of ``source``.
        """
        kept = torch.unique(self.interactions())  # ascending: by user, then by time
        kept = kept[~excluded[kept]]
        user = self.source.first_of(kept)  # one number for each user
        starts = torch.ones(len(kept), dtype=torch.bool)
        starts[1:] = user[1:] != user[:-1]
        source = replace(
            self.source,
            columns={field: column[kept] for field, column in self.source.columns.items()},
            first=starts.nonzero().squeeze(1),
        )
        rows = source.prefixes()
        rows.interaction = {field: rows.interaction[field] for field in self.interaction}
        rows.lists = self.lists
        return rows

    def windows(self) -> SequenceRows:
        """The same targets in windows of L inputs, each position of which predicts the next item.

        The targets of a user are cut into pieces of L from the end; what is left over makes up the
        first, shorter window. Every target occurs once.
        """
        target = self.target.sort().values
        starts_run = torch.ones(len(target), dtype=torch.bool)
        # the first interaction of a user is no target, so a run never crosses users
        starts_run[1:] = target[1:] != target[:-1] + 1
        first = starts_run.nonzero().squeeze(1)
        size = torch.diff(first, append=torch.tensor([len(target)]))
        last = target[first + size - 1]

        longest = self.source.max_length
        n_windows = (size + longest - 1) // longest
        run, number = ranges(torch.zeros_like(size), n_windows)
        backwards = n_windows[run] - 1 - number
        length = (size[run] - backwards * longest).clamp(max=longest)
        rows = SequenceRows.at(last[run] - backwards * longest, length, self.source, windows=True)
        rows.interaction = {field: rows.interaction[field] for field in self.interaction}
        rows.lists = self.lists
        return rows


def ranges(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of several ranges one behind the other: the number of their range, and they.

    Args:
        start: ``(R,)`` first integer of each range.
        size: ``(R,)`` how many integers it has.
    """
    number = torch.repeat_interleave(size)
    before = size.cumsum(0) - size
    return number, start[number] + torch.arange(len(number)) - before[number]


def take(feat: Interaction, rows: Tensor) -> Interaction:
    """Rows of an interaction; RecBole would turn the index into a list first."""
    if isinstance(feat, SequenceRows):
        return feat[rows]
    return Interaction({field: feat[field][rows] for field in feat})
