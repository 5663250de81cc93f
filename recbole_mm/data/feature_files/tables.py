"""Readers of tables, whose columns have names: csv, RecBole's atomic side files, parquet."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from recbole.utils.enum_type import FeatureType

from recbole_mm.data.atomic import AtomicFormat, read_header
from recbole_mm.data.feature_files.common import (
    FeatureFile,
    as_matrix,
    as_tokens,
    first_names,
    reading,
)
from recbole_mm.errors import EnvironmentFault, InputError, nearest


def read_csv(path: Path, id_col: str | None, column: str | None) -> FeatureFile:
    """An id column, and either F columns of numbers or one column of lists."""
    table = csv_table(path)
    _, header = next(table)
    at = column_position(path, header, id_col)
    chosen = [place for place in range(len(header)) if place != at]
    if column is None:
        _refuse_index_columns(path, [name for name in header if name != id_col])
    else:
        chosen = [column_position(path, header, column, "column")]
    if not chosen:
        raise InputError(f"{path}: only the column {header[at]!r}; there are no numbers")
    rows = _TextRows(path)
    for line, cells in table:
        numbers = [cells[place] for place in chosen]
        if len(numbers) == 1:
            numbers = numbers[0].strip().strip("[]()").replace(",", " ").split()
        else:  # pandas writes a NaN as an empty cell; a row of nothing else is no vector
            numbers = [cell or "nan" for cell in numbers] if any(numbers) else []
        rows.add(cells[at], numbers, line)
    return rows.file()


def read_atomic_file(
    path: Path, id_col: str | None, column: str | None, atomic: AtomicFormat
) -> FeatureFile:
    """RecBole's side file; an empty ``float_seq`` is an item without a vector.

    Read line by line: the text of the numbers takes more room than the numbers.
    """
    separator, encoding = atomic.field_separator, atomic.encoding
    within = None if atomic.seq_separator.isspace() else atomic.seq_separator  # None: any space
    header = read_header(path, atomic)
    sequences = [name for name, kind in header.items() if kind is FeatureType.FLOAT_SEQ]
    if column is None and len(sequences) == 1:
        column = sequences[0]
    if column not in sequences:
        raise InputError(
            f"{path}: float_seq columns are {sequences}, `column` is {column!r}; "
            "set `column` to the one that holds the vectors"
        )
    names = list(header)
    at, vector_at = column_position(path, names, id_col), names.index(column)
    rows = _TextRows(path)
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding
    with reading(path, "text"), path.open(encoding=encoding, newline="\n") as stream:
        next(stream)
        for line, text in enumerate(stream, start=2):
            cells = text.rstrip("\r\n").split(separator)
            if cells == [""]:
                continue
            if len(cells) != len(names):
                raise InputError(
                    f"{path}, line {line}: {len(cells)} columns, the header has {len(names)}; "
                    "mend the line"
                )
            rows.add(cells[at], cells[vector_at].split(within) if cells[vector_at] else [], line)
    return rows.file()


def read_parquet(path: Path, id_col: str | None, column: str | None) -> FeatureFile:
    """An id column, and either one column of lists or F columns of numbers."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentFault(
            f"{path}: reading parquet needs pyarrow; pip install 'recbole-mm[parquet]'"
        ) from error

    with reading(path, "parquet"), pq.ParquetFile(path) as file:
        id_name, chosen, kinds, is_list = _parquet_columns(path, file.schema_arrow, id_col, column)
        is_half = all(pa.types.is_float16(kind) for kind in kinds)
        tokens: list[str] = []
        values: np.ndarray[Any, Any] | None = None
        done, row = 0, 0
        for batch in file.iter_batches(columns=[id_name, *chosen]):
            ids = batch.column(id_name)
            if is_list:
                lengths = pc.list_value_length(batch.column(chosen[0]))
                kept = pc.fill_null(pc.greater(lengths, 0), False)
                ids, vectors = ids.filter(kept), batch.column(chosen[0]).filter(kept)
                lengths = lengths.filter(kept).to_numpy(zero_copy_only=False)
                width = int(lengths[0]) if len(lengths) else None
                width = values.shape[1] if values is not None else width
                if (lengths != width).any():
                    first = int((lengths != width).nonzero()[0][0])
                    raise InputError(
                        f"{path}, row {row + first}: {int(lengths[first])} numbers for item "
                        f"{ids[first].as_py()!r}, {width} in the rows before; "
                        "every vector must have the same width"
                    )
                flat = vectors.flatten().to_numpy(zero_copy_only=False)
                numbers = flat.reshape(len(ids), -1) if len(ids) else None
            else:
                columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in chosen]
                numbers = np.stack(columns, axis=1)
            row += batch.num_rows
            if numbers is None:
                continue
            if values is None:
                shape = (file.metadata.num_rows, numbers.shape[1])
                values = np.empty(shape, np.float16 if is_half else np.float32)
            tokens += as_tokens(ids.to_pylist(), path)
            with np.errstate(over="ignore"):
                values[done : len(tokens)] = numbers
            done = len(tokens)
    if values is None:
        raise InputError(f"{path}: no vector inside; give a file with at least one row")
    dtype = ", ".join(dict.fromkeys(map(str, kinds)))
    return FeatureFile(as_matrix(values[:done], path), dtype, tokens)


def _parquet_columns(
    path: Path, schema: Any, id_col: str | None, column: str | None
) -> tuple[str, list[str], list[Any], bool]:
    """The column of the ids, those of the numbers, their types, and whether it is one of lists."""
    from pyarrow import types

    kept = [i for i, name in enumerate(schema.names) if name == id_col or not _is_index(name)]
    if not kept:
        raise InputError(f"{path}: no column but row numbers; write ids and vectors")
    names = [schema.names[i] for i in kept]
    kind_of = {name: schema.types[i] for name, i in zip(names, kept, strict=True)}
    id_name = names[column_position(path, names, id_col)]
    list_types = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    is_list = {name: any(is_(kind) for is_ in list_types) for name, kind in kind_of.items()}
    lists = [name for name in names if is_list[name] and name != id_name]
    if column is not None:
        chosen = [names[column_position(path, names, column, "column")]]
    elif len(lists) > 1:
        raise InputError(f"{path}: several columns of lists, {lists}; set `column` to one")
    else:
        chosen = lists or [name for name in names if name != id_name]
    if not chosen:
        raise InputError(f"{path}: only the column {id_name!r}; there are no numbers")
    kinds: list[Any] = []
    for name in chosen:
        kind = schema.field(name).type
        kind = kind.value_type if is_list[name] else kind
        if not (types.is_integer(kind) or types.is_floating(kind)):
            raise InputError(
                f"{path}: column {name!r} holds {kind}, not numbers; set `column` to the "
                "column of the vectors"
            )
        kinds.append(kind)
    return id_name, chosen, kinds, is_list[chosen[0]]


class _TextRows:
    """Vectors read from text, kept as float32 while the file is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: list[str] = []
        self.numbers = array("f")
        self.width: int | None = None

    def add(self, token: str, cells: Sequence[str], line: int) -> None:
        """Append one vector; a row without any number is an item without a vector."""
        if not cells:
            return
        if self.width is None:
            self.width = len(cells)
        if len(cells) != self.width:
            raise InputError(
                f"{self.path}, line {line}: {len(cells)} numbers for item {token!r}, "
                f"{self.width} in the rows before; every vector must have the same width"
            )
        try:
            self.numbers.extend(map(float, cells))
        except ValueError as error:
            raise InputError(
                f"{self.path}, line {line}: item {token!r}: {error}; write numbers only"
            ) from error
        self.tokens.append(token)

    def file(self) -> FeatureFile:
        if self.width is None:
            raise InputError(f"{self.path}: no vector inside; give a file with at least one row")
        values = torch.frombuffer(self.numbers, dtype=torch.float32).view(-1, self.width)
        return FeatureFile(values, "text", self.tokens)


def column_position(
    path: Path, columns: Sequence[str], wanted: str | None, key: str = "id_col"
) -> int:
    """Place of a column; without a wish, of ``item_id``, else the first."""
    if wanted is None:
        if "item_id" in columns:
            return columns.index("item_id")
        _refuse_index_columns(path, columns[:1])
        return 0
    if wanted not in columns:
        raise InputError(
            f"{path}: no column {wanted!r}; set `{key}` to one of "
            f"{first_names(columns)}{nearest(wanted, columns)}"
        )
    return columns.index(wanted)


def _is_index(column: str) -> bool:
    """Whether pandas has written row numbers under this name."""
    return column == "" or column.startswith(("Unnamed: ", "__index_level_"))


def _refuse_index_columns(path: Path, columns: Sequence[str]) -> None:
    for column in filter(_is_index, columns):
        raise InputError(
            f"{path}: the column {column!r} looks like the row numbers that pandas writes; write "
            "the file with index=False, or name the columns, `id_col` and `column`"
        )


def csv_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of :func:`_csv_rows`, header first; every row has as many cells as the header."""
    with (
        reading(path, "csv"),
        _long_cells(),
        path.open(encoding="utf-8-sig", newline="") as stream,
    ):
        n_columns = None
        for line, cells in _csv_rows(stream):
            n_columns = n_columns or len(cells)
            if len(cells) != n_columns:
                raise InputError(
                    f"{path}, line {line}: {len(cells)} columns, the header has {n_columns}; "
                    "mend the line"
                )
            yield line, cells
        if n_columns is None:
            raise InputError(f"{path}: empty; give a file with a header and a row for each item")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let a cell be longer than 128 KiB, which a list of 8,192 numbers is."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_rows(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a csv, or of a tab separated file if its header has a tab."""
    header = stream.readline()
    stream.seek(0)
    if "\t" in header:
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(stream)
    for cells in reader:
        if cells:
            yield reader.line_num, cells
