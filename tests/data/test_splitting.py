"""Splits against loops over groups."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_mm.data import splitting

GROUPS = st.lists(st.integers(0, 5), max_size=40).map(np.array)


def rows_of(groups):
    """Row numbers of each group."""
    return {
        group: [i for i, g in enumerate(groups) if g == group] for group in dict.fromkeys(groups)
    }


def as_sets(parts):
    return [set(part.tolist()) for part in parts]


@pytest.mark.parametrize("held", [(1, 2), (1,), (2,)])
@pytest.mark.parametrize("spare", [1, 2])
@given(groups=GROUPS)
def test_the_last_rows_are_held_out(held, spare, groups):
    parts = [set(), set(), set()]
    for rows in rows_of(groups).values():
        rest = list(rows)
        for part in held[::-1]:
            if len(rest) > spare:
                parts[part].add(rest.pop())
        if len(rows) >= spare:
            parts[0].update(rest)
    assert as_sets(splitting.last_rows(groups.astype(int), held, spare)) == parts


@given(groups=GROUPS)
def test_groups_are_cut_at_their_bounds(groups):
    def bounds(size):
        return [size // 2, size - size // 4]

    parts = [set(), set(), set()]
    for rows in rows_of(groups).values():
        first, second = bounds(len(rows))
        for part, some in enumerate((rows[:first], rows[first:second], rows[second:])):
            parts[part].update(some)
    if len(groups):
        assert as_sets(splitting.shares(groups, bounds, 3)) == parts


@pytest.mark.parametrize("n_before", [0, 1])
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), min_size=1, max_size=40),
    moment=st.integers(0, 20),
    share=st.sampled_from([0.25, 0.5, 0.8, 1.0]),
)
def test_what_comes_after_a_moment_is_tested(n_before, rows, moment, share):
    rows = sorted(rows, key=lambda row: row[1])
    groups, times = (np.array(column) for column in zip(*rows, strict=True))
    parts = [set(), set(), set()]
    for group, members in rows_of(groups).items():
        early = [i for i in members if times[i] <= moment]
        n_train = max(1, math.floor((len(early) + n_before) * share + 1e-9))
        train = []
        for place, i in enumerate(members, start=n_before):
            if times[i] > moment and place > 0:
                parts[2].add(i)
            elif place < n_train:
                train.append(i)
            else:
                parts[1].add(i)
        if len(train) + n_before > 1:
            parts[0].update(train)
        assert group == groups[members[0]]
    found = splitting.before_and_after(
        groups, times.astype(float), moment=moment, train_share=share, n_before=n_before
    )
    assert as_sets(found) == parts


def test_parts_keep_the_order_of_their_rows():
    groups = np.array([7, 3, 7, 3, 7, 7])
    train, valid, test = splitting.last_rows(groups, (1, 2), 1)
    assert (train.tolist(), valid.tolist(), test.tolist()) == ([0, 2, 1], [4], [5, 3])
