"""Newest items, and training without them."""

import numpy as np
import pandas as pd
import pytest
from recbole.data import data_preparation

from recbole_mm.config import Config
from recbole_mm.data.cold_start import keep_histories, newest_items
from recbole_mm.data.create import create_dataset
from recbole_mm.errors import InputError
from recbole_mm.protocol import describe

USERS = np.array([1, 1, 1, 2, 2, 2])
ITEMS = np.array([1, 2, 3, 2, 4, 5])
TIMES = np.array([10.0, 20.0, 90.0, 15.0, 30.0, 90.0])
TOKENS = ["[PAD]", "a", "b", "z", "d", "c"]


def cold(percent):
    return newest_items(USERS, ITEMS, TIMES, TOKENS, percent).nonzero()[0].tolist()


def test_the_newest_items_by_hand():
    """First seen: a 10, b 15, d 30, c and z 90; of the two at 90 the later token is newer."""
    assert cold(20) == [3]
    assert cold(40) == [3, 5]
    assert cold(60) == [3, 4, 5]


@pytest.mark.parametrize(
    "times", [[1, 2, 3, 1, 2, 3], [0, 1, 2, 0, 1, 2], [1, 2, 4, 1, 3, 4], [2, 3, 4, 1, 2, 3]]
)
def test_positions_are_no_times_whatever_a_filter_left_of_them(times):
    with pytest.raises(InputError, match="positions in each user's history"):
        newest_items(USERS, ITEMS, np.array(times, dtype=float), TOKENS, 20)


@pytest.mark.parametrize(
    "times",
    [[1, 2, 3, 1, 2.5, 3], [1, 1, 2, 1, 2, 3], [1, 2, 3, 1, 2, 400], [5, 6, 7, 8, 9, 10]],
    ids=["fractions", "ties", "years", "late beginnings"],
)
def test_small_numbers_may_be_times(times):
    assert newest_items(USERS, ITEMS, np.array(times, dtype=float), TOKENS, 20).sum() == 1


@pytest.fixture
def parts(tmp_path):
    """The generated set, with items that appear one after the other in time."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"user_id:token": generator.integers(0, 150, 900)}).astype(str)
    frame["item_id:token"] = [
        f"i{item}" for item in generator.integers(0, np.linspace(15, 60, 900).astype(int))
    ]
    frame["timestamp:float"] = np.arange(900) * 60.0
    (tmp_path / "grow").mkdir()
    frame.to_csv(tmp_path / "grow/grow.inter", sep="\t", index=False)

    def make(model, **values):
        config = Config(
            model, "grow", config_dict={"data_path": str(tmp_path), "cold_items": 20, **values}
        )
        dataset = create_dataset(config)
        return config, dataset, dataset.build()

    frame.columns = ["user", "item", "time"]
    return make, frame


def by_hand(frame):
    """Training pairs of leave-one-out, without those of the newest 20 %."""
    first = frame.groupby("item")["time"].min().sort_values()
    newest = set(first.index[len(first) - round(len(first) * 0.2) :])
    size = frame.groupby("user")["item"].transform("size")
    held = (size - 2).clip(0, 2)  # of two interactions none, of three the last, of more two
    train = frame[frame.groupby("user").cumcount(ascending=False) >= held]
    return newest, train[~train["item"].isin(newest)]


@pytest.mark.parametrize("model", ["Pop", "SASRec", "SASRecFast"])
def test_training_is_that_of_the_warm_items_and_evaluation_is_unchanged(parts, model):
    make, frame = parts
    _, train = by_hand(frame)
    config, dataset, made = make(model)
    matrix = made[0].inter_matrix(form="coo")
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    got = sorted(zip(users[matrix.row], items[matrix.col], strict=True))
    # one warm interaction is no target for a sequential model, so it is left out for all
    expected = train[train.groupby("user")["item"].transform("size") > 1]
    assert got == sorted(zip(expected["user"], expected["item"], strict=True))
    _, _, whole = make(model, cold_items=0)
    for part, other in zip(made[1:], whole[1:], strict=True):
        assert part.inter_feat["item_id"].tolist() == other.inter_feat["item_id"].tolist()
    assert "newest 20 % of the items cold" in describe(config, made).split


def test_all_kinds_of_models_share_the_split(parts):
    make, _ = parts
    prints = []
    for model in ("Pop", "SASRec", "SASRecFast"):
        config, _, made = make(model)
        prints.append(describe(config, made))
    assert prints[0] == prints[1] == prints[2]


def test_cold_items_are_in_no_training_row_but_in_test_histories(parts):
    make, frame = parts
    newest, _ = by_hand(frame)
    _, dataset, (train, _, test) = make("SASRec")
    tokens = dataset.field2id_token["item_id"]
    assert not newest & set(tokens[train[np.arange(len(train))]["item_id_list"].numpy()].ravel())
    assert newest & set(tokens[test[np.arange(len(test))]["item_id_list"].numpy()].ravel())
    _, _, (windows, _, _) = make("SASRecFast", train_objective="all")
    rows = windows[np.arange(len(windows))]
    for field in ("item_id_list", "item_id_target_list", "item_id"):
        assert not newest & set(tokens[rows[field].numpy()].ravel())


@pytest.mark.parametrize("mode", ["full", "uni20"])
def test_what_a_user_had_seen_of_cold_items_is_no_candidate_of_a_general_model(parts, mode):
    make, frame = parts
    newest, _ = by_hand(frame)
    config, _, _ = make("BPR", eval_args={"mode": mode}, mask_history=mode == "full")
    dataset = create_dataset(config)
    loaders = data_preparation(config, dataset)
    keep_histories(loaders)
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    n_cold = 0
    for back, loader in ((2, loaders[1]), (1, loaders[2])):
        for user, rows in frame.groupby("user", sort=False):
            if len(rows) < back + 2:  # the last of three is tested, that before of four validated
                continue
            past, target = set(rows["item"][:-back]), rows["item"].iloc[-back]
            number = list(users).index(user)
            if mode == "full":
                assert set(items[loader.uid2history_item[number].tolist()]) == past - {target}
            else:
                assert past <= set(items[list(loader._sampler.used_ids[number])])
            n_cold += len(newest & past)
    assert n_cold > 20
