"""What each user of the test set got from a run, as frames of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.register import metrics_dict

from recbole_mm import compat
from recbole_mm.config import Config
from recbole_mm.data.create import create_dataset
from recbole_mm.evaluation import PerUser
from recbole_mm.protocol import Protocol


def users_frame(got: PerUser, protocol: Protocol) -> pd.DataFrame:
    """One line for each test row, by user token.

    Returns:
        ``user``; ``target`` and ``rank`` (1 is best), empty for a row with several targets; a
        column for each metric that a single user has.
    """
    single = len(got.rows) == len(got.users)  # leave-one-out: rows counts from 0
    frame = pd.DataFrame({"user": got.users})
    frame["target"] = got.items[got.targets] if single else None
    frame["rank"] = got.ranks if single else 0
    for name in protocol.metrics:
        if issubclass(metrics_dict[name.lower()], TopkMetric):
            for k in protocol.topk:
                metric = f"{name.lower()}@{k}"
                frame[metric] = got.metric(metric)
    return frame.sort_values("user", kind="stable", ignore_index=True)


def lists_frame(got: PerUser) -> pd.DataFrame:
    """The top-k list of each test row: ``user``, ``place`` from 1, ``item``."""
    rows, k = got.topk.shape
    frame = pd.DataFrame(
        {
            "user": np.repeat(got.users, k),
            "place": np.tile(np.arange(1, k + 1), rows),
            "item": got.items[got.topk].ravel(),
        }
    )
    frame = frame[got.topk.ravel() > 0]
    return frame.sort_values(["user", "place"], kind="stable", ignore_index=True)


def counts_of(model: str, dataset: str, values: Any) -> pd.DataFrame:
    """What the training and validation parts hold of each user and item.

    Returns:
        ``kind`` (``user`` or ``item``), ``token`` and ``count``: interactions of a user in training
        and validation, which precede the test row; of an item in training.
    """
    with compat.without_recboles_warnings():
        whole = create_dataset(Config(model, dataset, [values]))
        train, valid, test = whole.build()
    matrix = train.inter_matrix(form="csr")
    of_users = np.asarray(matrix.sum(axis=1)).ravel().astype(int)
    of_users += np.bincount(valid.inter_feat[whole.uid_field].numpy(), minlength=len(of_users))
    if values.get("cold_items"):  # training lacks them, the histories of the test rows do not
        of_users = np.asarray(whole.inter_matrix(form="csr").sum(axis=1)).ravel().astype(int)
        of_users -= np.bincount(test.inter_feat[whole.uid_field].numpy(), minlength=len(of_users))
    parts = []
    for kind, field, counts in (
        ("user", whole.uid_field, of_users),
        ("item", whole.iid_field, np.asarray(matrix.sum(axis=0)).ravel().astype(int)),
    ):
        tokens = [str(token) for token in whole.field2id_token[field][1:]]
        parts.append(pd.DataFrame({"kind": kind, "token": tokens, "count": counts[1:]}))
    return pd.concat(parts, ignore_index=True)
