"""UniSRec's layout of downstream data sets, and MISSRec's, which adds images.

=============================== ===========================================================
``<name>.train.inter``          ``user_id item_id_list item_id``, a row for every prefix of a
                                history, its last 50 items; ``.valid.inter``, ``.test.inter``: the
                                next item and the one after it
``<name>.item2index``           ``token<TAB>index``; ``.user2index`` likewise. May be missing
``<name>.text``                 ``token<TAB>text``, with or without a header. May be missing
``<name>.feat1CLS``             float32 without a header, a row for each index: text
``<name>.feat3CLS``             the same: images, zero where there is none (MISSRec)
=============================== ===========================================================

Histories are put together again from the prefixes, and every row is checked against them.

Source of the facts: github.com/RUCAIBox/UniSRec (``dataset/preprocessing``, ``data/dataset.py``),
github.com/gimpong/MM23-MISSRec (README, ``data/dataset.py``).
"""

from __future__ import annotations

import glob
from pathlib import Path

from recbole_mm.data.feature_files.common import reading
from recbole_mm.data.layouts.common import (
    Matrix,
    Source,
    files,
    headerless,
    one_to_one,
    positions,
    the_file,
    whole_number,
)
from recbole_mm.errors import InputError

_MODALITIES = {".feat1CLS": "text", ".feat3CLS": "image"}
_Row = tuple[list[str], str]  # items before, next item


def read(folder: Path) -> Source:
    """Whole histories in order, texts, and the vectors of text and image.

    Raises:
        InputError: If a file is missing, rows are no prefixes of one history, or a matrix has
            another number of rows than there are items.
    """
    train = the_file(folder, "*.train.inter", "the prefixes to train on")
    name = train.name.removesuffix(".train.inter")
    histories = _histories(folder, name)
    known = {item for items in histories.values() for item in items}
    items = _names(folder / f"{name}.item2index", known)
    users = _names(folder / f"{name}.user2index", set(histories))
    interactions = positions(
        {users[user]: [items[item] for item in held] for user, held in histories.items()}
    )
    features = {}
    notes = ["timestamp is the position in the history: users cannot be compared in time"]
    for path in files(folder, f"{glob.escape(name)}.feat*CLS"):
        if path.suffix in _MODALITIES:
            features[_MODALITIES[path.suffix]] = _matrix(path, items, folder / f"{name}.item2index")
        else:
            notes.append(f"{path.name} is left out: text with words dropped, for pre-training")
    texts = {}
    if (folder / f"{name}.item2index").is_file():
        texts = _texts(folder / f"{name}.text", set(items.values()))
    elif (folder / f"{name}.text").is_file():
        notes.append(f"{name}.text is left out: {name}.item2index, which has its names, is missing")
    return Source(name, interactions, {"text": texts} if texts else {}, features, notes)


def _matrix(path: Path, items: dict[str, str], index: Path) -> Matrix:
    """Vectors by index; those of items that no history has included."""
    if not index.is_file():
        raise InputError(
            f"{path}: has no header, and {index.name}, which says how many rows it has, is missing"
        )
    token = {whole_number(number, index, "index"): name for number, name in items.items()}
    if sorted(token) != list(range(len(token))):
        raise InputError(f"{index}: the indices must be 0 to {len(token) - 1}, each once")
    values = headerless(path, len(token)).values
    return Matrix(values, [token[row] for row in range(len(token))], path)


def _histories(folder: Path, name: str) -> dict[str, list[str]]:
    """Items of each user in order."""
    train, valid, test = (
        _rows(the_file(folder, f"{glob.escape(name)}.{part}.inter", f"the rows of {part}"))
        for part in ("train", "valid", "test")
    )
    longest = max(len(before) for part in (train, valid, test) for _, before, _ in part)
    prefixes: dict[str, list[_Row]] = {user: [] for user, _, _ in [*train, *valid, *test]}
    for user, before, item in train:
        prefixes[user].append((before, item))
    ends: dict[str, list[_Row]] = {user: [] for user in prefixes}
    for user, before, item in [*valid, *test]:
        ends[user].append((before, item))
    histories = {}
    for user, rows in prefixes.items():
        # UniSRec writes the longest prefix first
        items = _history([*reversed(rows), *ends[user]], longest) or _history(
            [*rows, *ends[user]], longest
        )
        if items is None:
            raise InputError(
                f"{folder}: the rows of user {user!r} are not all prefixes of one history; only "
                "UniSRec's own form is understood, a row for each prefix"
            )
        histories[user] = items
    return histories


def _history(rows: list[_Row], longest: int) -> list[str] | None:
    """The history whose prefixes these rows are, from the shortest to the longest."""
    items = [rows[0][0][0], *(item for _, item in rows)]
    for place, (before, _) in enumerate(rows, start=1):
        if before != items[max(0, place - longest) : place]:
            return None
    return items


def _rows(path: Path) -> list[tuple[str, list[str], str]]:
    """User, items before and next item of each row."""
    names = ("user_id", "item_id_list", "item_id")
    rows = []
    with reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        header = [name.split(":")[0] for name in stream.readline().rstrip("\r\n").split("\t")]
        if sorted(header) != sorted(names):
            raise InputError(f"{path}: columns {header}, not {', '.join(names)}")
        at = [header.index(name) for name in names]
        for line, text in enumerate(stream, start=2):
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) != len(names) or "" in cells:
                raise InputError(f"{path}, line {line}: needs {len(names)} cells, none empty")
            user, before, item = (cells[place] for place in at)
            rows.append((user, before.split(" "), item))
    if not rows:
        raise InputError(f"{path}: has no row beside its header")
    return rows


def _names(path: Path, known: set[str]) -> dict[str, str]:
    """Token of each index; the index itself without the file."""
    if not path.is_file():
        return {index: index for index in known}
    with reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        held = [text.rstrip("\r\n").split("\t") for text in stream.read().rstrip().split("\n")]
    for line, cells in enumerate(held, start=1):
        if len(cells) != 2:
            raise InputError(f"{path}, line {line}: {cells!r} is not token<TAB>index")
    tokens, indices = zip(*held, strict=True)
    names = one_to_one(indices, tokens, path, "a token or an index")
    unknown = sorted(known - set(names))
    if unknown:
        raise InputError(
            f"{path}: has no index {unknown[0]}, which the histories have; the files belong to "
            "different states of the data set"
        )
    return names


def _texts(path: Path, items: set[str]) -> dict[str, str]:
    """Text of each item, empty without the file."""
    if not path.is_file():
        return {}
    texts = {}
    with reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        for text in stream:
            token, _, said = text.rstrip("\r\n").partition("\t")
            if token in items:  # not a header
                texts[token] = said
    if not texts:
        raise InputError(f"{path}: no line is that of an item; each is token<TAB>text")
    return texts
