"""MMRec's layout, which many multimodal recommenders share.

===================== =====================================================================
``<name>.inter``      tab separated, ``userID itemID rating timestamp x_label``, both numbered
``i_id_mapping.csv``  ``asin itemID``; ``u_id_mapping.csv``: ``user_id userID``. May be missing
``image_feat.npy``    row ``r`` is that of ``itemID`` r; so is ``text_feat.npy``'s. Items without
                      an image have the mean of the others, and stand in
                      ``missed_img_itemIDs.csv``, which may be missing
===================== =====================================================================

Source of the facts: github.com/enoche/MMRec (``src/utils/dataset.py``, ``preprocessing/``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from recbole_mm.data.feature_files.common import reading, row_chunks
from recbole_mm.data.layouts.common import (
    Matrix,
    Source,
    columns,
    files,
    header_of,
    numbered,
    one_to_one,
    the_file,
    whole_number,
)
from recbole_mm.errors import InputError


def read(folder: Path) -> Source:
    """Interactions by time, and every ``*_feat.npy``.

    Raises:
        InputError: If a file or column is missing, there is no time, or an item has no row.
    """
    inter = the_file(folder, "*.inter", "the interactions")
    header = header_of(inter)
    if "timestamp" not in header:
        raise InputError(
            f"{inter}: has no column timestamp among {', '.join(header)}; a sequential model needs "
            "an order, and the rows of this file have none"
        )
    wanted = ["userID", "itemID", "timestamp", *(["rating"] if "rating" in header else [])]
    held = columns(inter, wanted)
    users = _names(folder / "u_id_mapping.csv", "userID")
    items = _names(folder / "i_id_mapping.csv", "itemID")
    interactions = {
        "user_id": _named(held["userID"], users, inter, "userID"),
        "item_id": _named(held["itemID"], items, inter, "itemID"),
        **{name: held[name] for name in wanted[2:]},
    }
    features: dict[str, Matrix] = {}
    largest = max(whole_number(item, inter, "itemID") for item in set(held["itemID"]))
    for path in files(folder, "*_feat.npy"):
        matrix = numbered(path, first=0, names=items)
        if largest >= len(matrix.values):
            raise InputError(
                f"{path}: {len(matrix.values)} rows, but {inter.name} has an itemID {largest}; "
                "the two files belong to different states of the data set"
            )
        modality = re.sub(r"\W+", "_", path.stem.removesuffix("_feat"))
        if modality in features:
            raise InputError(
                f"{path}: {features[modality].source.name} is the modality {modality}, too; give "
                "one of them another name"
            )
        features[modality] = replace(matrix, without=_without(matrix, folder))
    notes = []
    if "x_label" in header:
        notes.append("x_label, MMRec's split, is left out: the split here goes by time")
    return Source(inter.stem, interactions, features=features, notes=notes)


def _without(matrix: Matrix, folder: Path) -> list[int]:
    """Rows that are the mean of all, up to rounding, and those that the list of MMRec names."""
    parts = list(row_chunks(*matrix.values.shape))
    # rows that are the mean of the others do not move it
    sums = torch.stack([matrix.values[part].double().sum(dim=0) for part in parts])
    mean = sums.sum(dim=0) / len(matrix.values)
    distance = torch.cat([(matrix.values[part].double() - mean).norm(dim=1) for part in parts])
    # float32 rounds far below it, the next real vector is far above
    rows = set((distance < 1e-3 * distance.mean()).nonzero().flatten().tolist())
    listed = folder / "missed_img_itemIDs.csv"
    if matrix.source.stem == "image_feat" and listed.is_file():
        with reading(listed, "text"):
            numbers = listed.read_text(encoding="utf-8-sig").split()
        rows |= {whole_number(number, listed, "itemID") for number in numbers}
        if max(rows, default=0) >= len(matrix.values):
            raise InputError(
                f"{listed}: has an itemID {max(rows)}, and {matrix.source.name} only "
                f"{len(matrix.values)} rows; the files belong to different states of the data set"
            )
    return sorted(rows)


def _names(path: Path, number: str) -> dict[int, str] | None:
    """Token of each number in a file of two columns; ``None`` without the file."""
    if not path.is_file():
        return None
    others = [name for name in header_of(path) if name != number]
    if len(others) != 1:
        raise InputError(f"{path}: needs the column {number} and one of names, has {others} beside")
    held = columns(path, [number, others[0]])
    numbers = [whole_number(text, path, number) for text in held[number]]
    return one_to_one(numbers, held[others[0]], path, f"a name or a {number}")


def _named(numbers: list[str], names: dict[int, str] | None, inter: Path, column: str) -> list[str]:
    if names is None:
        return numbers
    token = {text: names.get(whole_number(text, inter, column)) for text in set(numbers)}
    for text, found in token.items():
        if found is None:
            raise InputError(
                f"{inter}: {column} {text} has no name in the mapping of {len(names)}; the two "
                "files belong to different states of the data set"
            )
    return [str(token[text]) for text in numbers]
