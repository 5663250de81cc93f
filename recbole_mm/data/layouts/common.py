"""What every layout gives, and how its tables are read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from recbole_mm.data.feature_files import FeatureFile, read_features
from recbole_mm.data.feature_files.common import first_names, reading, row_chunks
from recbole_mm.data.feature_files.tables import csv_table
from recbole_mm.errors import InputError, nearest

_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True)
class Matrix:
    """The vectors of one modality.

    Attributes:
        values: ``(R, F)``, possibly memory-mapped.
        tokens: Item of each row, none twice.
        source: Where they stood.
        without: Rows of items that have no vector, beside those of zeros.
    """

    values: Tensor
    tokens: Sequence[str]
    source: Path
    without: Sequence[int] = ()

    @property
    def present(self) -> Tensor:
        """``(R,)`` bool: a vector of zeros is that of an item without one in all these layouts."""
        found = torch.empty(len(self.values), dtype=torch.bool)
        for part in row_chunks(*self.values.shape):
            found[part] = self.values[part].ne(0).any(dim=1)
        found[list(self.without)] = False
        return found


@dataclass(frozen=True)
class Source:
    """A data set, read from a layout; all cells are text.

    Attributes:
        name: Its name there.
        interactions: Columns ``user_id``, ``item_id``, ``timestamp`` and perhaps ``rating``; empty
            if the layout has features only.
        items: Columns of ``.item`` beside ``item_id``, each ``{item: text}``.
        features: Vectors by modality.
        notes: What was left out, and why.
    """

    name: str
    interactions: Mapping[str, Sequence[str]]
    items: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    features: Mapping[str, Matrix] = field(default_factory=dict)
    notes: Sequence[str] = ()


def the_file(folder: Path, pattern: str, what: str) -> Path:
    """The one file of a name.

    Raises:
        InputError: If there is none, or more than one.
    """
    found = files(folder, pattern)
    if len(found) != 1:
        held = f"{len(found)} of them" if found else f"none among {first_names(_names(folder))}"
        raise InputError(f"{folder}: needs one {pattern}, {what}; there is {held}")
    return found[0]


def files(folder: Path, pattern: str) -> list[Path]:
    """Files whose names match a pattern, sorted."""
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def columns(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a csv or tab separated file with a header, by name.

    Raises:
        InputError: If one is missing, or a row has another number of cells.
    """
    table = csv_table(path)
    _, header = next(table)
    for name in wanted:
        if name not in header:
            raise InputError(
                f"{path}: no column {name!r} among {first_names(header)}{nearest(name, header)}; "
                "is this the layout that was named?"
            )
    places = [header.index(name) for name in wanted]
    rows = [[cells[place] for place in places] for _, cells in table]
    if not rows:
        raise InputError(f"{path}: has no row beside its header")
    return dict(zip(wanted, map(list, zip(*rows, strict=True)), strict=True))


def header_of(path: Path) -> list[str]:
    """Names of the columns of a csv or tab separated file."""
    return next(csv_table(path))[1]


def pairs(path: Path, header: Sequence[str] = ()) -> dict[str, list[str]]:
    """Texts of each item in a csv of two columns, item and text, whose first row may be ``header``.

    Further commas of a row that was written without quotes belong to the text.

    Raises:
        InputError: If there is no row, or a text goes on in a next line.
    """
    held: dict[str, list[str]] = {}
    with reading(path, "csv"), path.open(encoding="utf-8-sig", newline="") as stream:
        for cells in csv.reader(stream):
            if any("\n" in cell for cell in cells):
                raise InputError(
                    f"{path}: the text of {cells[0]!r} goes on in the next line, as with a quote "
                    "that nothing closes; mend that row"
                )
            if len(cells) > 1 and tuple(cells[:2]) != tuple(header):
                held.setdefault(cells[0], []).append(",".join(cells[1:]))
    if not held:
        raise InputError(f"{path}: no row of item and text, separated by a comma")
    return held


def numbered(path: Path, *, first: int, names: Mapping[int, str] | None = None) -> Matrix:
    """A matrix whose row ``r`` is that of item ``r + first``.

    Args:
        path: Of the matrix.
        first: Number of the item in row 0.
        names: Token of each number; default: the number.

    Raises:
        InputError: If a row has no name, or the file is damaged.
    """
    values = read_features(path).values
    numbers = range(first, first + len(values))
    if names is None:
        return Matrix(values, [str(number) for number in numbers], path)
    for number in numbers:
        if number not in names:
            raise InputError(
                f"{path}: {len(values)} rows, but item {number} has no name among {len(names)}; "
                "the two files belong to different states of the data set"
            )
    return Matrix(values, [names[number] for number in numbers], path)


def headerless(path: Path, n_rows: int) -> FeatureFile:
    """Bare float32 numbers, as many in a row as the number of rows says."""
    numbers, rest = divmod(path.stat().st_size, 4)
    if rest or n_rows == 0 or numbers % n_rows or numbers == 0:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes are no float32 numbers in {n_rows} rows of one "
            "width, a row for each item; copy it again"
        )
    return read_features(path, dim=numbers // n_rows)


def one_to_one(
    keys: Sequence[_Key], names: Sequence[str], path: Path, what: str
) -> dict[_Key, str]:
    """The name of each key.

    Raises:
        InputError: If a key or a name stands twice.
    """
    held = dict(zip(keys, names, strict=True))
    if len(held) != len(keys) or len(set(names)) != len(keys):
        raise InputError(f"{path}: {what} stands twice; write each once")
    return held


def whole_number(text: str, path: Path, what: str) -> int:
    """A number that an id must be in this layout, from 0; written as Python would write it.

    Raises:
        InputError: If it is not; ``03`` and `` 3`` would be names of items beside ``3``.
    """
    if not (text.isascii() and text.isdigit() and str(int(text)) == text):
        raise InputError(f"{path}: {what} {text!r} is not a whole number from 0, in plain digits")
    return int(text)


def positions(histories: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Interactions of users whose items are known in order, but not in time."""
    users = np.repeat(list(histories), [len(items) for items in histories.values()])
    return {
        "user_id": users.tolist(),
        "item_id": [item for items in histories.values() for item in items],
        "timestamp": [str(at) for items in histories.values() for at in range(len(items))],
    }
