"""Readers of the files that say which item stands in which row of a matrix."""

from __future__ import annotations

import json
from pathlib import Path

from recbole_mm.data.atomic import RECBOLES_FORMAT, AtomicFormat, read_atomic, read_header
from recbole_mm.data.feature_files.common import as_tokens, neighbours, reading
from recbole_mm.data.feature_files.tables import column_position, csv_table
from recbole_mm.errors import InputError

ROW_COLUMNS = ("row", "row_index")


def read_ids(
    path: Path, *, id_col: str | None = None, atomic: AtomicFormat = RECBOLES_FORMAT
) -> tuple[list[str], list[int] | None]:
    """Item tokens of a matrix that stands in another file.

    ============================  ===================================================
    ``.txt``, ``.ids``            one token a line, in the order of the rows
    ``.json``                     a list in that order, or ``{token: row}``
    ``.item2index``               ``token<TAB>row``
    ``.csv``, ``.tsv``            column ``id_col`` (default ``item_id``, else the first)
    any other name                a RecBole atomic file, column ``id_col``, in that order
    ============================  ===================================================

    In a csv a column called ``row`` or ``row_index`` names the row; without one, a row is a
    position in the file. Integer ids that are exactly 0..n-1 in another order are refused: they
    may be rows themselves (MMRec numbers items that way), and the file does not say.

    Returns:
        The tokens, and the row of each or ``None`` for 0, 1, 2, ...

    Raises:
        InputError: If the file is missing, damaged, of an unknown form or ambiguous.
    """
    if not path.is_file():
        wrong = "cannot be used" if path.exists() else "does not exist"
        raise InputError(f"id file {path} {wrong}; {neighbours(path)}")
    suffix = path.suffix.lower()
    if id_col is not None and suffix in (".txt", ".ids", ".json", ".item2index"):
        raise InputError(f"{path}: has no columns; remove `id_col: {id_col}`")
    if suffix in (".txt", ".ids"):
        with reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
            tokens = [line.rstrip("\r\n") for line in stream]
        if "" in tokens:
            raise InputError(f"{path}, line {tokens.index('') + 1}: empty; write a token a line")
        return tokens, None
    if suffix == ".json":
        return _json_ids(path)
    if suffix == ".item2index":
        return _item2index(path)
    if suffix in (".csv", ".tsv"):
        return _csv_ids(path, id_col)
    names = list(read_header(path, atomic))
    name = names[column_position(path, names, id_col)]
    table = read_atomic(path, atomic, columns=[name], as_text=[name])
    return table.frame[name].tolist(), None


def _json_ids(path: Path) -> tuple[list[str], list[int] | None]:
    with reading(path, "JSON"):
        # pairs, not a dict: a dict would swallow a token that stands twice
        held = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    if isinstance(held, list):
        return as_tokens(held, path), None
    if not isinstance(held, tuple):
        raise InputError(f"{path}: write a list of item tokens or a mapping of token to row")
    tokens, rows = [token for token, _ in held], [row for _, row in held]
    for token, row in held:
        if isinstance(row, bool) or not isinstance(row, int):
            raise InputError(f"{path}: row {row!r} of item {token!r} is not a whole number")
    return tokens, rows


def _item2index(path: Path) -> tuple[list[str], list[int] | None]:
    tokens, rows = [], []
    with reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        for line, text in enumerate(stream, start=1):
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise InputError(f"{path}, line {line}: {text.rstrip()!r} is not token<TAB>row")
            tokens.append(cells[0])
            rows.append(_row_number(cells[1], path, line))
    return tokens, rows


def _csv_ids(path: Path, id_col: str | None) -> tuple[list[str], list[int] | None]:
    table = csv_table(path)
    _, header = next(table)
    at = column_position(path, header, id_col)
    row_at = [
        place for place, name in enumerate(header) if name.lower() in ROW_COLUMNS and place != at
    ]
    if row_at:
        pairs = [(cells[at], _row_number(cells[row_at[0]], path, line)) for line, cells in table]
        return [token for token, _ in pairs], [row for _, row in pairs]
    tokens = [cells[at] for _, cells in table]
    in_order = [str(row) for row in range(len(tokens))]
    if tokens != in_order and set(tokens) == set(in_order):
        line = next(row for row, token in enumerate(tokens) if token != in_order[row])
        raise InputError(
            f"{path}: the ids are 0..{len(tokens) - 1} out of order (position {line} holds "
            f"{tokens[line]!r}): row = position or row = id? Add a column `row` with the row of "
            "each item, or, if the id is the row, remove `ids` and set `index: token`"
        )
    return tokens, None


def _row_number(text: str, path: Path, line: int) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{path}, line {line}: row {text!r} is not a whole number") from error
