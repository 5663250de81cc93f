"""One reader of RecBole's atomic files, for every model and every kind of file.

An atomic file is a table of text: a header of ``name:type`` fields, then one row in each line.
RecBole reads it through pandas' Python engine with the quoting rules of csv, so that a stray quote
in a title swallows the rows up to the next one, items called ``NA`` or ``null`` disappear, and a
missing timestamp becomes the mean of the column. Here

- a quote is a character, and so is a carriage return inside a line;
- only an empty cell is missing;
- the number of fields of every row is checked before anything is parsed;
- a number is finite, or the cell is empty; a time is always there, and exact.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from recbole.utils.enum_type import FeatureType

from recbole_mm.errors import EnvironmentFault, InputError, nearest

_BLOCK = 1 << 23  # bytes that are scanned at a time
_TYPES = {kind.value: kind for kind in FeatureType}
# encodings in which a line end and a separator are the bytes that they are in ASCII
_ASCII_BASED = {"ascii", "utf-8", "iso8859-1", "cp1252"}


@dataclass(frozen=True)
class AtomicTable:
    """The rows of an atomic file.

    Attributes:
        path: The file.
        frame: Columns by plain name, in the order of the file. A token is ``str``, or NaN where
            the cell is empty; a float is float64, or NaN where the cell is empty; a time is int64
            if all its values are integers; a sequence is an array for each row.
        types: Type of each column of ``frame``.
        dropped: Number of rows left out for their time.
    """

    path: Path
    frame: pd.DataFrame
    types: dict[str, FeatureType]
    dropped: int = 0


@dataclass(frozen=True)
class AtomicFormat:
    """How the atomic files of a data set are written; RecBole's keys of these names.

    Attributes:
        field_separator: One ASCII character between fields.
        seq_separator: What separates the entries of a sequence; empty entries are left out.
        encoding: Of the file; a byte order mark is skipped.
    """

    field_separator: str = "\t"
    seq_separator: str = " "
    encoding: str = "utf-8"


RECBOLES_FORMAT = AtomicFormat()


def format_of(config: Any) -> AtomicFormat:
    """How a configuration says that the files are written."""
    return AtomicFormat(
        config["field_separator"], config["seq_separator"], config["encoding"] or "utf-8"
    )


def read_header(path: str | Path, atomic: AtomicFormat = RECBOLES_FORMAT) -> dict[str, FeatureType]:
    """Types by field name, in the order of the file.

    Raises:
        InputError: If the file is missing or empty, or a field of its header is not ``name:type``.
    """
    path = Path(path)
    with _open(path, atomic.encoding) as (file, codec):
        return _header(path, file, atomic.field_separator, codec)


def read_atomic(
    path: str | Path,
    atomic: AtomicFormat = RECBOLES_FORMAT,
    *,
    columns: Collection[str] | None = None,
    as_text: Collection[str] = (),
    time_field: str | None = None,
    on_bad_time: str = "error",
) -> AtomicTable:
    """Read an atomic file without losing a row.

    Args:
        path: The file.
        atomic: How it is written.
        columns: Names to read; ``None`` for all.
        as_text: Columns whose whole cell stays one ``str``, whatever their type; empty if missing.
        time_field: Column, if read, that must hold a finite number in every row.
        on_bad_time: ``error``, or ``drop`` to leave out and count the rows without one.

    Raises:
        InputError: Naming file, line, field and value, if the file is missing, empty or badly
            formed, a row has too few or too many fields, or a number is none.
    """
    path = Path(path)
    if on_bad_time not in ("error", "drop"):
        raise InputError(f"on_bad_time must be 'error' or 'drop', got {on_bad_time!r}")
    with _open(path, atomic.encoding) as (file, codec):
        header = _header(path, file, atomic.field_separator, codec)
        for name in [*(columns or ()), *as_text]:
            if name not in header:
                raise InputError(
                    f"{path}: no column {name!r}; name one of its columns "
                    f"{', '.join(header)}{nearest(name, header)}"
                )
        reader = _Reader(path, file, header, atomic, codec)
        chosen = [name for name in header if columns is None or name in columns or name in as_text]
        texts = [n for n in chosen if n in as_text or header[n] is not FeatureType.FLOAT]
        frame = reader.columns(chosen, texts=texts)

        bad_time = np.zeros(len(frame), dtype=bool)
        for name in chosen:
            if name in as_text:
                frame[name] = frame[name].fillna("")
            elif header[name] is FeatureType.FLOAT:
                values, bad = reader.numbers(
                    name, frame[name].to_numpy(), required=name == time_field
                )
                if name == time_field and on_bad_time == "drop":
                    bad_time = bad
                elif bad.any():
                    reader.bad_number(name, int(bad.argmax()), is_time=name == time_field)
                frame[name] = values
            elif header[name] is not FeatureType.TOKEN:
                frame[name] = reader.sequences(frame[name], header[name])

    dropped = int(bad_time.sum())
    if dropped == len(frame):
        raise InputError(
            f"{path}: none of the {dropped} rows holds a number in {time_field}; "
            "give every row a time, or name another column in TIME_FIELD"
        )
    if dropped:
        frame = frame[~bad_time].reset_index(drop=True)
    return AtomicTable(path, frame, {name: header[name] for name in chosen}, dropped)


@contextmanager
def _open(path: Path, encoding: str) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a file and their codec; a file in a wide encoding comes as UTF-8."""
    try:
        codec = codecs.lookup(encoding).name.removesuffix("-sig")
        io.TextIOWrapper(io.BytesIO(), encoding=codec)  # refuses a codec that is not of text
    except (LookupError, ValueError):
        raise InputError(
            f"encoding: unknown encoding {encoding!r}; use for example utf-8"
        ) from None
    try:
        if codec in _ASCII_BASED:
            with path.open("rb") as file:
                yield file, codec
        else:
            yield io.BytesIO(path.read_bytes().decode(codec).encode()), "utf-8"
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_files_beside(path)}") from None
    except UnicodeError as error:
        raise InputError(
            f"{path}{_undecodable_line(path, codec)}: not {encoding} "
            f"({getattr(error, 'reason', error)}); "
            "set encoding to that of the file, or convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read ({error}); check its permissions") from None


def _files_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either: check data_path"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    return f"; {path.parent} holds {', '.join(names[:20]) or 'no files'}"


def _undecodable_line(path: Path, codec: str) -> str:
    if codec in _ASCII_BASED:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode(codec)
                except UnicodeDecodeError as error:
                    return f", line {number}, byte {error.start + 1}"
    return ""


def _header(path: Path, file: BinaryIO, separator: str, codec: str) -> dict[str, FeatureType]:
    """Read the first line; leaves ``file`` behind it."""
    if len(separator) != 1 or not separator.isascii() or separator in "\r\n\0":
        raise InputError(f"field_separator must be one ASCII character, got {separator!r}")
    line = file.readline().decode(codec).removeprefix("\ufeff").rstrip("\r\n")
    if not line.strip():
        raise InputError(
            f"{path}: {'the header is empty' if file.read(1) else 'the file is empty'}; the first "
            "line names the fields and their types, for example user_id:token"
        )
    quoted = _quote(line)
    header: dict[str, FeatureType] = {}
    for field in line.split(separator):
        name, _, kind = field.partition(":")
        if field.count(":") != 1 or not name:
            raise InputError(
                f"{path}, line 1: field {_quote(field)} of the header {quoted} is not name:type; "
                f"types: {', '.join(_TYPES)}; fields are separated by {separator!r} "
                "(field_separator)"
            )
        if kind not in _TYPES:
            raise InputError(
                f"{path}, line 1: field {name!r} of the header {quoted} has the unknown type "
                f"{kind!r}; types: {', '.join(_TYPES)}"
            )
        if name in header:
            raise InputError(
                f"{path}, line 1: the header {quoted} names {name!r} twice; rename one of the two"
            )
        header[name] = _TYPES[kind]
    return header


def _quote(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


class _Reader:
    """The rows behind a header.

    The constructor counts the separators of every line: pandas fills short rows and, when only some
    columns are asked for, cuts long ones, both without a word.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        header: dict[str, FeatureType],
        atomic: AtomicFormat,
        codec: str,
    ) -> None:
        self.path, self.file, self.separator = path, file, atomic.field_separator
        self.atomic, self.codec = atomic, codec
        self.names = list(header)
        self.start = file.tell()
        self.blank_lines, self.rewritten = False, False
        self._scan()

    def _scan(self) -> None:
        separator = self.separator.encode()
        row = separator * (len(self.names) - 1) + b"\n"  # a line without its text
        text = bytes(set(range(256)) - set(separator + b"\n"))
        lines = returns = returns_at_end = 0
        while block := self.file.read(_BLOCK) + self.file.readline():
            if not block.endswith(b"\n"):
                block += b"\n"
            if b"\0" in block:
                line = lines + 2 + block[: block.index(b"\0")].count(b"\n")
                raise InputError(
                    f"{self.path}, line {line}: holds a NUL byte; remove it, or set encoding "
                    "(for example utf-16) if this is a text file"
                )
            returns += block.count(b"\r")
            returns_at_end += block.count(b"\r\n")
            if block.startswith((b"\n", b"\r\n")) or b"\n\n" in block or b"\n\r\n" in block:
                self.blank_lines = True
            shape = block.translate(None, delete=text)
            if shape != row * (len(shape) // len(row)):
                self._check_lines(block.split(b"\n")[:-1], first=lines + 2)
            lines += block.count(b"\n")
        if returns != returns_at_end or (self.blank_lines and len(row) == 1):
            self._rewrite()

    def _check_lines(self, lines: list[bytes], first: int) -> None:
        for number, line in enumerate(lines, start=first):
            n_fields = line.count(self.separator.encode()) + 1
            if n_fields != len(self.names) and line not in (b"", b"\r"):
                text = line.decode(self.codec, errors="replace").rstrip("\r")
                raise InputError(
                    f"{self.path}, line {number}: {n_fields} fields where the header has "
                    f"{len(self.names)} ({', '.join(self.names)}): {_quote(text)}; repair or "
                    f"remove the line (fields are separated by {self.separator!r}: "
                    "field_separator)"
                )

    def _rewrite(self) -> None:
        """Bring odd lines into a form that pandas takes literally."""
        self.file.seek(self.start)
        lines = self.file.read().replace(b"\r\n", b"\n").split(b"\n")
        self.file, self.start = io.BytesIO(b"\n".join(line for line in lines if line)), 0
        self.blank_lines, self.rewritten = False, True

    def columns(
        self, names: list[str], *, texts: Collection[str], exact: bool = False
    ) -> pd.DataFrame:
        """Columns by name; those in ``texts`` as they stand, the others as pandas infers them."""
        self.file.seek(self.start)
        try:
            frame = pd.read_csv(
                self.file,
                sep=self.separator,
                header=None,
                names=range(len(self.names)),
                usecols=[self.names.index(name) for name in names],
                index_col=False,
                dtype={self.names.index(name): object for name in texts},
                keep_default_na=False,
                na_values=[""],
                quoting=csv.QUOTE_NONE,
                # by default a lone carriage return ends a line too
                lineterminator="\n" if self.rewritten else None,
                skip_blank_lines=self.blank_lines,
                encoding=self.codec,
                engine="c",
                low_memory=False,  # one string object for each token, one type for each column
                float_precision="round_trip" if exact else None,
            )
        except pd.errors.EmptyDataError:
            frame = pd.DataFrame()
        if frame.empty:
            raise InputError(f"{self.path}: has a header but no row")
        frame.columns = names
        return frame

    def numbers(
        self, name: str, values: NDArray[Any], *, required: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Values of a float column, and which of its cells spell no number.

        In a required column an empty cell is such a cell too, integers stay integers, and decimals
        are read to the last bit.
        """
        if values.dtype == np.int64:
            return values if required else values.astype(np.float64), np.zeros(len(values), bool)
        if values.dtype == np.float64 and np.isfinite(values).all():
            if required:
                values = self.columns([name], texts=(), exact=True)[name].to_numpy()
            return values.astype(np.float64, copy=False), np.zeros(len(values), bool)
        cells = self.columns([name], texts=[name])[name]
        numbers = [_number(cell) for cell in cells]
        bad = np.array([not math.isfinite(number) for number in numbers])
        if not required:
            return np.array(numbers, dtype=np.float64), bad & cells.notna().to_numpy()
        good = [number for number in numbers if math.isfinite(number)]
        integers = all(isinstance(number, int) for number in good)
        exact = np.zeros(len(numbers), dtype=np.int64 if integers else np.float64)
        exact[~bad] = good
        return exact, bad

    def bad_number(self, name: str, row: int, *, is_time: bool) -> NoReturn:
        """Refuse the cell of a float column."""
        value = self.columns([name], texts=[name])[name].iloc[row]
        found = "is empty" if isinstance(value, float) else f"is {_quote(value)}, not a number"
        mend = "give a finite number, or leave the cell empty if it is missing"
        if is_time:
            mend = (
                "give the row a time (none is ever made up), or set on_bad_time: drop to leave "
                "out and count such rows"
            )
        raise InputError(f"{self.path}, line {self.line(row)}: {name} {found}; {mend}")

    def sequences(self, column: pd.Series, kind: FeatureType) -> pd.Series:
        """An array for each cell of a sequence column."""
        separator = self.atomic.seq_separator
        rows = np.empty(len(column), dtype=object)
        for row, cell in enumerate(column):
            entries = [] if isinstance(cell, float) else [e for e in cell.split(separator) if e]
            if kind is FeatureType.TOKEN_SEQ:
                rows[row] = np.array(entries, dtype=object)
                continue
            values = np.array([_number(entry) for entry in entries], dtype=np.float64)
            if not np.isfinite(values).all():
                place = int((~np.isfinite(values)).argmax())
                raise InputError(
                    f"{self.path}, line {self.line(row)}: entry {place + 1} of {column.name} is "
                    f"{_quote(entries[place])}, not a number; give finite numbers separated by "
                    f"{separator!r} (seq_separator)"
                )
            rows[row] = values
        return pd.Series(rows, index=column.index)

    def line(self, row: int) -> int:
        """Number, in the file, of the line that holds a row."""
        with _open(self.path, self.atomic.encoding) as (file, _):
            lines = enumerate(file, start=1)
            next(lines)
            filled = (number for number, line in lines if line not in (b"\n", b"\r\n"))
            return next(number for i, number in enumerate(filled) if i == row)


def _number(cell: str | float) -> int | float:
    """The number that a cell spells, NaN if none; an empty cell is a float already."""
    if isinstance(cell, float) or "_" in cell:  # Python would read 1_000
        return math.nan
    try:
        number = int(cell)
    except ValueError:
        pass
    else:
        if -(2**63) <= number < 2**63:
            return number
    try:
        return float(cell)
    except ValueError:
        return math.nan
