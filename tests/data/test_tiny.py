"""The committed data set ``tiny``: what make_tiny.py writes, and the answer planted in it."""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "dataset_atomic"
TINY = FOLDER / "tiny"


def read(name):
    lines = (TINY / name).read_bytes().decode().removesuffix("\n").split("\n")
    return [line.split("\t") for line in lines[1:]]


@pytest.fixture(scope="module")
def make_tiny():
    spec = importlib.util.spec_from_file_location("make_tiny", FOLDER / "make_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def histories():
    """Items of each user in the order of time."""
    rows = defaultdict(list)
    for user, item, second in read("tiny.inter"):
        rows[user].append((int(second), item))
    return {user: [item for _, item in sorted(steps)] for user, steps in rows.items()}


@pytest.fixture(scope="module")
def design():
    """Design of each item, read off the text vectors; items without text by their picture."""
    text, image = np.load(TINY / "text.npy"), np.load(TINY / "image.npy").astype(float)
    pictured = (TINY / "image_ids.txt").read_text().split()
    items = [row[0] for row in read("tiny.item")]
    found = {
        item: vector.tobytes() for item, vector in zip(items, text, strict=True) if vector.any()
    }
    for item in set(items) - set(found):
        distance = np.abs(image - image[pictured.index(item)]).max(axis=1)
        found[item] = found[pictured[np.argsort(distance)[1]]]
    return found


def test_regenerating_gives_the_committed_bytes(make_tiny, tmp_path):
    make_tiny.main(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in TINY.iterdir()}


def test_folder_stays_below_300_kilobytes():
    sizes = [Path(at, name).stat().st_size for at, _, names in os.walk(TINY) for name in names]
    assert sum(sizes) < 300_000


def test_every_item_of_the_table_is_used_and_the_reverse():
    assert {row[1] for row in read("tiny.inter")} == {row[0] for row in read("tiny.item")}


def test_rows_of_the_matrices_match_their_id_files():
    text, image = (np.load(TINY / f"{name}.npy", allow_pickle=False) for name in ("text", "image"))
    pictured = (TINY / "image_ids.txt").read_text().split()
    items = [row[0] for row in read("tiny.item")]
    assert text.shape == (len(items), 16)
    assert image.shape == (len(pictured), 16)
    assert len(set(pictured)) == len(pictured)
    assert set(pictured) < set(items)


def test_text_vector_is_zero_exactly_where_the_title_is_missing():
    without = [row[1] in ("", "_") for row in read("tiny.item")]
    assert sum(without) == 2
    assert (~np.load(TINY / "text.npy").any(axis=1)).tolist() == without


def test_float32_seconds_would_lose_the_order():
    by_user = defaultdict(list)
    for user, _, second in read("tiny.inter"):
        by_user[user].append(int(second))
    assert all(len(set(seconds)) == len(seconds) for seconds in by_user.values())
    tied = [len(set(np.float32(seconds))) < len(seconds) for seconds in by_user.values()]
    assert np.mean(tied) == 1


def training_uses(histories):
    uses = defaultdict(int)
    for items in histories.values():
        for item in items[:-2]:
            uses[item] += 1
    return uses


def test_three_items_share_each_design_and_one_of_them_is_common(histories, design):
    uses, groups = training_uses(histories), defaultdict(list)
    for item, which in design.items():
        groups[which].append(uses[item])
    assert len(groups) == 40
    for counts in map(sorted, groups.values()):
        assert len(counts) == 3
        assert counts[1] < 10 < 30 < counts[2]


def hit_at_3(histories, key, *, rare=False):
    """Rank all items by counted transitions ``key(last) -> key(item)`` of the training part.

    Ties go to the item used more often, where the key is the item itself; what ties even then
    is ranked before the item sought.

    Args:
        histories: Items of each user in the order of time.
        key: What the ranker sees of an item.
        rare: Count only the targets with fewer than ten uses in training.
    """
    uses, follows = training_uses(histories), defaultdict(int)
    for items in histories.values():
        for last, item in pairwise(items[:-2]):
            follows[key(last), key(item)] += 1
    catalogue = sorted({item for items in histories.values() for item in items})
    hits = []
    for *_, last, target in histories.values():
        score = {
            item: (follows[key(last), key(item)], uses[item] if key(item) == item else 0)
            for item in catalogue
        }
        if not rare or uses[target] < 10:
            hits.append(sum(score[item] >= score[target] for item in catalogue) <= 3)
    return float(np.mean(hits))


def test_designs_tell_the_next_item_where_ids_do_not(histories, design):
    """The table of dataset_atomic/README.md."""

    def item_itself(item):
        return item

    assert hit_at_3(histories, item_itself) == pytest.approx(0.42, abs=0.005)
    assert hit_at_3(histories, item_itself, rare=True) == pytest.approx(0.15, abs=0.005)
    assert hit_at_3(histories, design.get) == pytest.approx(0.91, abs=0.005)
    assert hit_at_3(histories, design.get, rare=True) == pytest.approx(0.91, abs=0.005)
