"""Item cold start: the newest items, by the time at which they were first seen.

Interactions with them are left out of training, so that a model meets them for the first time in
the histories and targets of validation and test, where nothing but their content tells what they
are. [ours]

Shapes: T interactions, N items (row 0 is padding).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataset import SequentialDataset

from recbole_mm.errors import InputError


def newest_items(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.float64],
    tokens: Sequence[str],
    percent: float,
) -> NDArray[np.bool_]:
    """Which items are among the newest ``percent`` % by first interaction.

    Args:
        users: ``(T,)`` internal ids.
        items: ``(T,)`` internal ids.
        times: ``(T,)`` exact times.
        tokens: ``(N,)``; items that were first seen at the same time go by token.
        percent: Above 0, below 100.

    Returns:
        ``(N,)``; padding is False.

    Raises:
        InputError: If the times are positions in each user's history, which do not say which item
            is newer.
    """
    frame = pd.DataFrame({"user": users, "item": items, "time": times})
    of_user = frame.sort_values(["user", "time"], kind="stable").groupby("user")["time"]
    if _are_positions(times, of_user):
        raise InputError(
            "cold_items: the times are positions in each user's history, 1, 2, 3, ..., and do not "
            "tell which item is newer; it needs a data set with real times"
        )
    first = frame.groupby("item")["time"].min()
    order = sorted(first.index, key=lambda item: (first[item], tokens[item]))
    n_cold = round(len(order) * percent / 100)
    cold = np.zeros(len(tokens), dtype=bool)
    cold[order[len(order) - n_cold :]] = True
    return cold


def _are_positions(times: NDArray[np.float64], of_user: Any) -> bool:
    """Whether times are 1, 2, 3, ... in each history, or what filters have left of that.

    Then they are whole numbers, no two in a history are equal, none is far above the longest
    history, and histories begin early; times of a clock fail in one of these at least.
    """
    longest = of_user.size().max()
    return bool(
        (times == np.floor(times)).all()
        and (of_user.diff().dropna() >= 1).all()
        and times.max() <= 10 * longest
        and of_user.first().median() <= max(1, longest / 2)
    )


def keep_histories(loaders: Sequence[Any]) -> None:
    """Let what was left out of training stay among what a user has seen, in evaluation.

    RecBole's loaders of general models know histories from the parts of the split alone: a user's
    own earlier cold items would be candidates, which they are not for sequential models.

    Args:
        loaders: Of training, validation and test.
    """
    train = loaders[0]._dataset
    if train.left_out is None or isinstance(train, SequentialDataset):
        return
    seen: dict[int, set[int]] = {}
    for user, item in zip(*(ids.tolist() for ids in train.left_out), strict=True):
        seen.setdefault(user, set()).add(item)
    for loader in loaders[1:]:
        if hasattr(loader, "uid2history_item"):
            _lengthen(loader, seen)
        elif loader._sampler is not None:  # candidates are drawn
            for user, items in seen.items():
                loader._sampler.used_ids[user] = loader._sampler.used_ids[user] | items


def _lengthen(loader: Any, seen: Mapping[int, set[int]]) -> None:
    """Add to the histories of a full-ranking loader, whose users are not all, what is no target."""
    histories = loader.uid2history_item
    for user, items in seen.items():
        if histories[user] is not None:
            targets = set(loader.uid2positive_item[user].tolist())
            whole = set(histories[user].tolist()) | (items - targets)
            histories[user] = torch.tensor(sorted(whole), dtype=torch.int64)
