"""What graphs and statistics may see: each training interaction once, in the order of time."""

from collections import defaultdict

import pytest

from recbole_mm.config import DATASETS
from tests.models.conftest import build


def histories():
    rows = defaultdict(list)
    for line in (DATASETS / "tiny" / "tiny.inter").read_text().splitlines()[1:]:
        user, item, time = line.split("\t")
        rows[user].append((int(time), item))
    return {user: [item for _, item in sorted(row)] for user, row in rows.items()}


@pytest.mark.parametrize("objective", ["all", "last"])
def test_they_are_the_histories_without_their_last_two(objective):
    train = build("SASRecFast", train_objective=objective).train._dataset
    users, items = train.training_interactions()
    names = {f: train.field2id_token[f] for f in ("user_id", "item_id")}
    found = defaultdict(list)
    for user, item in zip(users, items, strict=True):
        found[names["user_id"][user]].append(names["item_id"][item])
    assert found == {user: row[:-2] for user, row in histories().items()}
