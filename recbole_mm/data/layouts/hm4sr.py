"""HM4SR's layout.

==================== ========================================================================
``<name>.inter``     RecBole's atomic file, ``user_id item_id timestamp``
``item2id``          a pickle of RecBole's ids, which is not opened: write it as ``item2id.json``
``txt_emb.pt``       row = RecBole's id, row 0 padding; ``img_emb.pt`` likewise, zero where the
                     image could not be read
``cat.pt``           the same rows: how often an item has each category (numbered)
``content.txt``      ``item<TAB>text``
==================== ========================================================================

Source of the facts: the data preparation of HM4SR (WWW 2025), ``dataprocess/``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from recbole_mm.data.atomic import RECBOLES_FORMAT, read_atomic, read_header
from recbole_mm.data.feature_files import read_features, read_ids
from recbole_mm.data.feature_files.common import reading
from recbole_mm.data.layouts.common import Matrix, Source, the_file
from recbole_mm.errors import InputError

_COLUMNS = ("user_id", "item_id", "timestamp", "rating")
_MATRICES = {"txt_emb.pt": "text", "img_emb.pt": "image"}
_TO_JSON = (
    'python -c "import json, pickle; json.dump({str(k): int(v) for k, v in '
    "pickle.load(open('item2id', 'rb')).items()}, open('item2id.json', 'w'))\""
)


def read(folder: Path) -> Source:
    """Interactions as they are, texts, categories, and the vectors of text and image.

    Raises:
        InputError: If a file is missing, or a matrix has another number of rows than the ids say.
    """
    inter = the_file(folder, "*.inter", "the interactions")
    known = read_header(inter)
    names: list[str] = [name for name in _COLUMNS if name in known]
    table = read_atomic(inter, RECBOLES_FORMAT, columns=names, as_text=names)
    if names[:3] != list(_COLUMNS[:3]):
        raise InputError(f"{inter}: needs user_id, item_id and timestamp, has {', '.join(names)}")
    interactions: dict[str, list[str]] = {name: table.frame[name].tolist() for name in names}

    columns: dict[str, dict[str, str]] = {}
    features, held = {}, [name for name in (*_MATRICES, "cat.pt") if (folder / name).is_file()]
    if held:
        tokens = _tokens(folder, held)
        for name in held:
            values = read_features(folder / name).values
            if len(values) != len(tokens) + 1:
                raise InputError(
                    f"{folder / name}: {len(values)} rows, but item2id.json has {len(tokens)} items"
                    " and the padding; the two files belong to different runs"
                )
            if name in _MATRICES:
                features[_MATRICES[name]] = Matrix(values[1:], tokens, folder / name)
            else:
                if not (values >= 0).all():  # nor NaN
                    raise InputError(f"{folder / name}: holds a count that is negative or NaN")
                columns["categories"] = _categories(values[1:], tokens)
    if (folder / "content.txt").is_file():
        columns["text"] = _texts(folder / "content.txt")
    notes = ["categories are numbered: cat.pt has no names"] if "categories" in columns else []
    return Source(inter.stem, interactions, columns, features, notes)


def _tokens(folder: Path, held: list[str]) -> list[str]:
    """Items in the order of RecBole's ids, without the padding."""
    path = folder / "item2id.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: rows of {', '.join(held)} follow RecBole's ids of the run that made them, "
            f"which item2id holds as a pickle: a pickle can run code, and is not opened here. If "
            f"you trust it, write it as JSON, in that folder: {_TO_JSON}"
        )
    tokens, rows = read_ids(path)
    rows = list(range(len(tokens))) if rows is None else rows
    in_order = [token for _, token in sorted(zip(rows, tokens, strict=True))]
    if sorted(rows) != list(range(len(rows))) or in_order[:1] != ["[PAD]"]:
        raise InputError(f"{path}: ids must be 0 to {len(rows) - 1}, each once, 0 of [PAD]")
    if len(set(in_order)) != len(in_order):
        raise InputError(f"{path}: an item stands twice; write each once")
    return in_order[1:]


def _categories(counts: torch.Tensor, tokens: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {token: [] for token in tokens}
    for row, column in counts.nonzero().tolist():
        found[tokens[row]].append(f"c{column}")
    return {token: " ".join(names) for token, names in found.items()}


def _texts(path: Path) -> dict[str, str]:
    with reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        rows = [text.rstrip("\r\n").partition("\t") for text in stream]
    return {token: text for token, tab, text in rows if tab}
