"""Which rows of a data set are trained on, validated and tested.

Rows stand in the order of time within a group (a user); what is held out is the end of a group.
Every function gives the row numbers of each part.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Rows = NDArray[np.int64]
N_PARTS = 3  # training, validation, test


def last_rows(groups: NDArray[Any], held: Sequence[int], spare: int) -> list[Rows]:
    """Hold out the last rows of every group.

    A group that has fewer rows than are spared is in no part: with one interaction, a user would
    be no target for a sequential model, in whose rows it does not occur.

    Args:
        groups: ``(R,)`` group of each row.
        held: Parts that take a row each of a group, in the order of time: 1 validation, 2 test.
        spare: Rows of a group that are never held out.
    """
    rows = _Grouped(groups)
    parts = np.array([0, *held])
    n_held = np.clip(rows.sizes - spare, 0, len(held))[rows.group]
    from_end = rows.sizes[rows.group] - 1 - rows.rank
    part = np.where(from_end < n_held, parts[np.maximum(len(held) - from_end, 0)], 0)
    part[rows.sizes[rows.group] < spare] = -1
    return rows.of_parts(part, N_PARTS)


def shares(groups: NDArray[Any], bounds: Callable[[int], list[int]], n_parts: int) -> list[Rows]:
    """Cut every group at places that depend on its size.

    Args:
        groups: ``(R,)`` group of each row.
        bounds: Where a group of so many rows is cut.
        n_parts: One more than it has bounds.
    """
    rows = _Grouped(groups)
    sizes, which = np.unique(rows.sizes, return_inverse=True)
    cuts = np.array([bounds(int(size)) for size in sizes])
    part = (rows.rank[:, None] >= cuts[which][rows.group]).sum(axis=1)
    return rows.of_parts(part, n_parts)


def before_and_after(
    groups: NDArray[Any],
    times: NDArray[np.float64],
    *,
    moment: float,
    train_share: float,
    n_before: int,
) -> list[Rows]:
    """Test on what comes after a moment, train on the first share of what came before it.

    The first interaction of a group is never held out. Alone in training it is in no part: it would
    be no target for a sequential model.

    Args:
        groups: ``(R,)`` group of each row.
        times: ``(R,)`` exact times.
        moment: Later rows are tested on.
        train_share: Of a group's interactions up to the moment; at least one.
        n_before: Interactions of each group that stand before its first row.
    """
    rows = _Grouped(groups)
    is_late = times[rows.order] > moment
    n_early = np.bincount(rows.group[~is_late], minlength=len(rows.sizes)) + n_before
    n_train = np.maximum(np.floor(n_early * train_share + 1e-9).astype(int), 1)
    place = rows.rank + n_before
    part = np.where(place < n_train[rows.group], 0, 1)
    part[is_late & (place > 0)] = 2
    n_in_train = np.bincount(rows.group[part == 0], minlength=len(rows.sizes)) + n_before
    part[(part == 0) & (n_in_train < 2)[rows.group]] = -1
    return rows.of_parts(part, N_PARTS)


class _Grouped:
    """Rows sorted by group; groups in the order of their first row, rows in their own.

    Attributes:
        order: Row numbers.
        group: Number of the group of each row of ``order``.
        rank: Place of each row of ``order`` within its group.
        sizes: Number of rows of each group.
    """

    def __init__(self, keys: NDArray[Any]) -> None:
        codes = pd.factorize(keys)[0]
        self.order: Rows = np.argsort(codes, kind="stable")
        self.group: NDArray[np.int64] = codes[self.order]
        self.sizes: NDArray[np.int64] = np.bincount(codes)
        before = np.cumsum(self.sizes) - self.sizes
        self.rank: NDArray[np.int64] = np.arange(len(codes)) - before[self.group]

    def of_parts(self, part: NDArray[np.int64], n_parts: int) -> list[Rows]:
        """Row numbers of each part; ``part`` is that of each row of ``order``."""
        return [self.order[part == number] for number in range(n_parts)]
