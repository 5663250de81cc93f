"""Files that hold item features: one reader for each format, and the writer of the canonical one.

No reader executes anything: ``allow_pickle=False``, ``weights_only=True``, object arrays refused.
npy, safetensors and headerless matrices are memory-mapped; nothing here knows which items exist.

Shapes: R rows of a file, F feature width.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import re
import time
import warnings
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

import numpy as np
import torch
from recbole.utils.enum_type import FeatureType
from torch import Tensor

from recbole_mm.data.atomic import read_atomic, read_header
from recbole_mm.errors import EnvironmentFault, InputError, nearest

HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)  # kept as they are on disk
CHUNK_NUMBERS = 1 << 22  # numbers converted, checked or written at a time: 16 MiB of float32
CHUNK_BYTES = 1 << 22
FRESH_NS = 2_000_000_000  # coarser than the time stamps of common file systems

HEADERLESS = re.compile(r"\.feat\d+CLS")
TABLE_KINDS = ("parquet", "csv", "atomic")  # formats with named columns
ROW_COLUMNS = ("row", "row_index")

# https://github.com/huggingface/safetensors#format: name of the type -> numpy's
SAFETENSORS_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<i2",  # numpy has no bfloat16; the bits are viewed as such afterwards
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SAFETENSORS_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True)
class FeatureFile:
    """What one feature file says, before it meets a dataset.

    Attributes:
        values: ``(R, F)`` float16, bfloat16 or float32; a view of the file where it is mapped.
        dtype: Number type on disk, for example ``"float64"``.
        tokens: Item token of each row, or ``None`` when the file names no items.
        present: ``(R,)`` bool, False where the row says that it holds nothing; ``None`` means all.
        metadata: Free text of the canonical form (encoder, revision, ...), without the ids.
    """

    values: Tensor
    dtype: str
    tokens: list[str] | None = None
    present: Tensor | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def kind_of(path: Path) -> str:
    """Format of a feature file, by its name (a folder is one ``.npy`` for each item).

    Raises:
        InputError: If there is no such file, or its name belongs to no format, or to pickle.
    """
    suffix = path.suffix
    if not path.exists():
        raise InputError(f"feature file {path} does not exist; {_neighbours(path)}")
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise InputError(f"{path}: neither a file nor a folder; give a plain file")
    if HEADERLESS.fullmatch(suffix):
        return "headerless"
    kinds = {".pth": "pt", ".tsv": "csv"}
    kind = kinds.get(suffix.lower(), suffix.lower().lstrip("."))
    if kind in ("safetensors", "npz", "npy", "pt", "parquet", "csv"):
        return kind
    if kind in ("pkl", "pickle", "joblib"):
        raise InputError(
            f"{path}: a pickle can run code when it is read and is never read here; "
            "save the matrix with numpy.save"
        )
    try:
        read_header(path)
    except InputError as error:
        raise InputError(
            f"{path}: unknown feature format {suffix!r}; use .safetensors, .npz, .npy, .pt, "
            ".parquet, .csv, .feat<N>CLS, a folder of <item token>.npy, or a RecBole atomic file, "
            f"which this is not: {error}"
        ) from error
    return "atomic"


def read_features(
    path: Path, *, dim: int | None = None, id_col: str | None = None, column: str | None = None
) -> FeatureFile:
    """Read a feature file of any known format.

    Args:
        path: File or folder.
        dim: Width F; needed for the headerless ``.feat<N>CLS``, checked for all others.
        id_col: Column of the item tokens in a table; default ``item_id``, else the first.
        column: Column of the vectors in a table that has several.

    Raises:
        InputError: If the file is damaged, holds Python objects, is ragged, empty or of
            another width than ``dim``; the message names the file and the line or row.
        EnvironmentFault: If a package is missing or the machine refuses to read.
    """
    kind = kind_of(path)
    if kind == "headerless":
        return _read_headerless(path, dim)
    if kind in TABLE_KINDS:
        tables = {"parquet": _read_parquet, "csv": _read_csv, "atomic": _read_atomic}
        file = tables[kind](path, id_col, column)
    else:
        matrices = {
            "safetensors": _read_safetensors,
            "npz": _read_npz,
            "npy": _read_npy,
            "pt": _read_pt,
            "folder": _read_folder,
        }
        file = matrices[kind](path)
    if dim is not None and file.values.shape[1] != dim:
        raise InputError(
            f"{path}: rows are {file.values.shape[1]} wide, `dim` says {dim}; "
            f"set `dim: {file.values.shape[1]}` or give the file that was meant"
        )
    return file


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a parser raise into an error that names the file."""
    try:
        yield
    except (InputError, EnvironmentFault):
        raise
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a parser's own, or a seek to a nonsense offset
            raise _damaged(path, kind, error) from error
        raise EnvironmentFault(
            f"cannot read {path}: {error.strerror}; check the disk and the file's permissions"
        ) from error
    except Exception as error:
        raise _damaged(path, kind, error) from error


def _damaged(path: Path, kind: str, error: Exception) -> InputError:
    said = (str(error).splitlines() or [""])[0][:200]
    if any(word in said.lower() for word in ("python objects", "object arrays", "pickled")):
        return InputError(
            f"{path}: holds Python objects (object dtype), which are pickles and are never "
            "read; save plain numbers, for example numpy.save(path, matrix.astype('float32'))"
        )
    return InputError(
        f"{path}: not a readable {kind} file, truncated or damaged "
        f"({type(error).__name__}: {said}); make or copy it again"
    )


def _copy_on_write(mapped: Callable[[str], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Map a file copy-on-write, which torch takes for writable memory.

    Linux counts such a mapping against RAM + swap and refuses one that is larger; there the
    file is mapped read-only.
    """
    try:
        return mapped("c")
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return mapped("r")


def _tensor(numbers: np.ndarray[Any, Any]) -> Tensor:
    if numbers.flags.writeable:
        return torch.from_numpy(numbers)
    with warnings.catch_warnings():  # a read-only mapping; features are frozen, nobody writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(numbers)


def _matrix(numbers: np.ndarray[Any, Any], path: Path | str) -> Tensor:
    """A (R, F) tensor of a matrix: a view where torch can use the numbers as they are."""
    if numbers.ndim != 2 or 0 in numbers.shape:
        raise InputError(
            f"{path}: shape {numbers.shape}; a feature matrix is (rows, width), both positive"
        )
    dtype = numbers.dtype
    if dtype.kind not in "fiub":
        raise InputError(
            f"{path}: dtype {dtype}; features are real numbers, save them as float32 or float16"
        )
    is_half = dtype.kind == "f" and dtype.itemsize == 2
    wanted = np.dtype(np.float16 if is_half else np.float32)
    if dtype == wanted and numbers.flags.aligned:
        return _tensor(numbers)
    converted = np.empty(numbers.shape, wanted)
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the caller reports
        for part in row_chunks(*numbers.shape):
            converted[part] = numbers[part]
    return torch.from_numpy(converted)


def row_chunks(n_rows: int, width: int) -> Iterator[slice]:
    """Slices that cover ``n_rows`` rows, each of at most ``CHUNK_NUMBERS`` numbers."""
    step = max(1, CHUNK_NUMBERS // width)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _tokens(items: Iterable[Any], path: Path) -> list[str]:
    """Item tokens as text; integers keep their decimal form, anything else is refused."""
    tokens = []
    for row, item in enumerate(items):
        if isinstance(item, bytes):
            item = item.decode("utf-8")
        if not isinstance(item, str) and (isinstance(item, bool) or not isinstance(item, int)):
            raise InputError(
                f"{path}, row {row}: item id {item!r} is {type(item).__name__}; "
                "save ids as strings or integers"
            )
        tokens.append(str(item))
    return tokens


def _one_token_a_row(n_tokens: int, n_rows: int, path: Path) -> None:
    if n_tokens != n_rows:
        raise InputError(
            f"{path}: {n_tokens} ids for {n_rows} rows of features; write one id for each row"
        )


def _read_npy(path: Path) -> FeatureFile:
    with _reading(path, "npy"):
        numbers = _copy_on_write(lambda mode: np.lib.format.open_memmap(path, mode=mode))
    return FeatureFile(_matrix(numbers, path), str(numbers.dtype))


def _read_npz(path: Path) -> FeatureFile:
    with _reading(path, "npz"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if "/" in member or "\\" in member:
                    raise InputError(
                        f"{path}: member {member!r} is a path, not an array; "
                        "save with numpy.savez(path, ids=..., features=...)"
                    )
        with np.load(path, allow_pickle=False) as arrays:
            if "features" not in arrays.files:
                raise InputError(
                    f"{path}: no array `features`, only {arrays.files}; "
                    "save with numpy.savez(path, ids=..., features=...)"
                )
            numbers = arrays["features"]
            ids = arrays["ids"] if "ids" in arrays.files else None
        if not isinstance(numbers, np.ndarray):
            raise InputError(f"{path}: `features` is not a numpy array; save it with numpy.savez")
    tokens = None
    if ids is not None:
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "USiu":
            found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "raw bytes"
            raise InputError(
                f"{path}: `ids` is {found}; save a one-dimensional array of strings or integers"
            )
        with _reading(path, "npz"):
            tokens = _tokens(ids.tolist(), path)
    values = _matrix(numbers, path)
    if tokens is not None:
        _one_token_a_row(len(tokens), len(values), path)
    return FeatureFile(values, str(numbers.dtype), tokens)


def _read_pt(path: Path) -> FeatureFile:
    try:
        mappable = zipfile.is_zipfile(path)  # torch maps only its zip form
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except PermissionError as error:
        raise EnvironmentFault(f"cannot read {path}: check the file's permissions") from error
    except Exception as error:
        raise InputError(
            f"{path}: damaged, or holds something other than plain tensors ({type(error).__name__})"
            ", which is a pickle and is never executed; save the matrix alone, "
            "torch.save(matrix, path), or numpy.save"
        ) from error
    if not isinstance(held, Tensor):
        inside = f" with keys {list(held)[:5]}" if isinstance(held, Mapping) else ""
        raise InputError(
            f"{path}: holds a {type(held).__name__}{inside}, not a matrix; "
            "save the (rows, width) tensor alone, torch.save(matrix, path)"
        )
    dtype = str(held.dtype).removeprefix("torch.")
    is_dense = held.layout is torch.strided and not held.is_nested and held.device.type == "cpu"
    if not is_dense or held.is_quantized or held.is_complex():
        raise InputError(f"{path}: {held.layout} tensor of {dtype}; save dense real numbers")
    if held.ndim != 2 or held.numel() == 0:
        raise InputError(
            f"{path}: shape {tuple(held.shape)}; a feature matrix is (rows, width), both positive"
        )
    held = held.detach()
    if held.numel() * held.element_size() > held.untyped_storage().nbytes():
        raise InputError(
            f"{path}: shape {tuple(held.shape)}, but the file holds only a part of the numbers (an "
            "expanded tensor); save matrix.contiguous()"
        )
    try:
        return FeatureFile(held if held.dtype in HALF_OR_SINGLE else held.float(), dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"{path}: tensor of {dtype}; save float32 or float16") from error


def _read_headerless(path: Path, dim: int | None) -> FeatureFile:
    """UniSRec's and MISSRec's float32 numbers without a header."""
    size = path.stat().st_size
    if dim is None:
        raise InputError(
            f"{path}: has no header, so its width must be stated; set `dim`, "
            "768 for the base size of BERT"
        )
    if size == 0 or size % (4 * dim):
        raise InputError(
            f"{path}: {size} bytes are not a whole number of float32 rows of `dim: {dim}` "
            f"({4 * dim} bytes each); set the encoder's width as `dim`, or copy the file again"
        )
    with _reading(path, "headerless float32"):
        numbers = _copy_on_write(
            lambda mode: np.memmap(path, np.dtype("<f4"), mode, shape=(size // (4 * dim), dim))  # type: ignore[call-overload]
        )
    return FeatureFile(_matrix(numbers, path), "float32")


def _read_folder(folder: Path) -> FeatureFile:
    """Ducho's form: one ``<item token>.npy`` for each item, shape (F,) or (1, F)."""
    root = folder.resolve()
    files = sorted(path for path in folder.iterdir() if path.suffix == ".npy")
    if not files:
        raise InputError(f"{folder}: no <item token>.npy inside; give the folder of the vectors")

    def vector(path: Path) -> np.ndarray[Any, Any]:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise InputError(f"{path}: link out of its folder; copy the file into {folder}")
        if not path.is_file():
            raise InputError(f"{path}: not a file; remove it from {folder}")
        with _reading(path, "npy"), path.open("rb") as stream:
            numbers = np.lib.format.read_array(stream, allow_pickle=False)
        if numbers.size == 0 or numbers.shape[-1:] != (numbers.size,):
            raise InputError(f"{path}: shape {numbers.shape}; one vector a file, (F,) or (1, F)")
        return numbers.reshape(1, -1)

    first = vector(files[0])
    values = _matrix(first, files[0]).repeat(len(files), 1)
    for row, path in enumerate(files[1:], start=1):
        numbers = vector(path)
        if numbers.shape != first.shape or numbers.dtype != first.dtype:
            raise InputError(
                f"{path}: {numbers.size} numbers of {numbers.dtype}, but {files[0].name} has "
                f"{first.size} of {first.dtype}; extract all items with one encoder"
            )
        values[row] = _matrix(numbers, path)[0]
    return FeatureFile(values, str(first.dtype), [path.stem for path in files])


def _read_safetensors(path: Path) -> FeatureFile:
    """Canonical form: ``features`` (R, F), ``present`` (R,), and the ids as JSON in the metadata.

    The tensor is mapped here rather than by the safetensors library, whose mapping Linux
    refuses when the file is larger than RAM + swap.
    """
    with _reading(path, "safetensors"):
        header, start = _safetensors_header(path)
        metadata = header.pop("__metadata__", {})
        if "features" not in header:
            raise InputError(
                f"{path}: no tensor `features`, only {sorted(header)}; "
                "write it with recbole_mm.data.feature_files.save_features"
            )
        values, dtype = _safetensors_matrix(path, header["features"], start)
        present = None
        if "present" in header:
            present = _safetensors_array(path, header["present"], start)
            if present.shape != (len(values),) or not np.isin(present, (0, 1)).all():
                raise InputError(
                    f"{path}: `present` has shape {present.shape}; it must be one 0 or 1 for each "
                    f"of the {len(values)} rows of `features`"
                )
        tokens = None
        if "ids" in metadata:
            ids = json.loads(metadata.pop("ids"))
            if not isinstance(ids, list):
                raise InputError(f"{path}: metadata `ids` is not a JSON list of item tokens")
            tokens = _tokens(ids, path)
            _one_token_a_row(len(tokens), len(values), path)
    mask = None if present is None else torch.from_numpy(present.astype(bool))
    return FeatureFile(values, dtype, tokens, mask, metadata)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header and the position of the first tensor's bytes."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(SAFETENSORS_MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, 8 + length


def _safetensors_array(path: Path, entry: dict[str, Any], start: int) -> np.ndarray[Any, Any]:
    dtype = np.dtype(SAFETENSORS_TYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0 or min(shape, default=0) < 0:
        raise ValueError(f"{entry} contradicts itself")
    if begin == end:
        return np.empty(shape, dtype)
    return _copy_on_write(
        lambda mode: np.memmap(path, dtype, mode, offset=start + begin, shape=shape)  # type: ignore[call-overload]
    )


def _safetensors_matrix(path: Path, entry: dict[str, Any], start: int) -> tuple[Tensor, str]:
    numbers = _safetensors_array(path, entry, start)
    if entry["dtype"] != "BF16":
        return _matrix(numbers, path), str(numbers.dtype)
    if numbers.ndim != 2 or 0 in numbers.shape:
        raise InputError(f"{path}: shape {numbers.shape}; a feature matrix is (rows, width)")
    return _tensor(numbers).view(torch.bfloat16), "bfloat16"


def save_features(
    path: Path | str,
    values: Tensor,
    tokens: Sequence[str],
    present: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the canonical safetensors form, whole or not at all.

    The rows are written in chunks, so a mapped matrix is never held twice; the file gets its
    name only after it is complete on disk.

    Args:
        path: Ends in ``.safetensors``.
        values: ``(R, F)``; float16, bfloat16 and float32 are kept, other types become float32.
        tokens: Item token of each row, no token twice.
        present: ``(R,)`` bool, False where a row holds nothing; default: every row holds a vector.
        metadata: Text to keep with the file: encoder, revision, pooling, normalised, sha256 of
            the source.

    Raises:
        InputError: If the arguments contradict each other or a present row is not finite.
        EnvironmentFault: If the disk is full or the folder cannot be written.
    """
    path = Path(path)
    tokens = [str(token) for token in tokens]
    metadata = dict(metadata or {})
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the canonical form ends in .safetensors")
    if values.ndim != 2 or values.numel() == 0 or values.is_complex():
        raise InputError(
            f"{path}: shape {tuple(values.shape)} of {values.dtype}; (rows, width) of real numbers"
        )
    n_rows, width = values.shape
    _one_token_a_row(len(tokens), n_rows, path)
    if len(set(tokens)) != n_rows:
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise InputError(f"{path}: item token {twice!r} stands twice; write each item once")
    present = torch.ones(n_rows, dtype=torch.bool) if present is None else present.bool()
    if present.shape != (n_rows,):
        raise InputError(f"{path}: present has shape {tuple(present.shape)}, not ({n_rows},)")
    if "ids" in metadata or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError(f"{path}: metadata maps names to text, and `ids` is taken by the tokens")

    dtype = values.dtype if values.dtype in HALF_OR_SINGLE else torch.float32
    metadata["ids"] = json.dumps(tokens, ensure_ascii=False)
    n_bytes = n_rows * width * dtype.itemsize
    header = {
        "__metadata__": metadata,
        "features": _entry(SAFETENSORS_NAMES[dtype], (n_rows, width), 0, n_bytes),
        "present": _entry("U8", (n_rows,), n_bytes, n_bytes + n_rows),
    }
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8 bytes
    if len(text) > SAFETENSORS_MAX_HEADER:
        raise InputError(
            f"{path}: the ids take {len(text)} bytes, safetensors headers end at "
            f"{SAFETENSORS_MAX_HEADER}; save an .npy matrix and name its id file under `ids`"
        )

    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for part in row_chunks(n_rows, width):
                rows = values[part].detach().to("cpu", dtype)
                _refuse_non_finite(path, rows, tokens[part], present[part])
                stream.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
            stream.write(present.cpu().to(torch.uint8).numpy().tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _refuse_non_finite(path: Path, rows: Tensor, tokens: Sequence[str], present: Tensor) -> None:
    bad = present.cpu() & ~rows.isfinite().all(dim=1)
    if bad.any():
        raise InputError(
            f"{path}: the vector of item {tokens[int(bad.nonzero()[0])]!r} holds NaN or Inf; "
            "mark the item as not present"
        )


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; a no-op where folders cannot be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _position(path: Path, columns: Sequence[str], wanted: str | None, key: str = "id_col") -> int:
    """Place of a column; without a wish, of ``item_id``, else the first."""
    if wanted is None:
        return columns.index("item_id") if "item_id" in columns else 0
    if wanted not in columns:
        shown = ", ".join(map(repr, columns[:8])) + (", ..." if len(columns) > 8 else "")
        raise InputError(
            f"{path}: no column {wanted!r}; set `{key}` to one of {shown}{nearest(wanted, columns)}"
        )
    return columns.index(wanted)


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


def _csv_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of :func:`_csv_rows`, header first; every row has as many cells as the header."""
    with _reading(path, "csv"), path.open(encoding="utf-8-sig", newline="") as stream:
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


def _read_csv(path: Path, id_col: str | None, column: str | None) -> FeatureFile:
    """An id column, and either F columns of numbers or one column of lists."""
    table = _csv_table(path)
    _, header = next(table)
    at = _position(path, header, id_col)
    chosen = [place for place in range(len(header)) if place != at]
    if column is not None:
        chosen = [_position(path, header, column, "column")]
    if not chosen:
        raise InputError(f"{path}: only the column {header[at]!r}; there are no numbers")
    rows = _TextRows(path)
    for line, cells in table:
        numbers = [cells[place] for place in chosen]
        if len(numbers) == 1:
            numbers = numbers[0].strip().strip("[]()").replace(",", " ").split()
        rows.add(cells[at], numbers, line)
    return rows.file()


def _read_atomic(path: Path, id_col: str | None, column: str | None) -> FeatureFile:
    """RecBole's side file; an empty ``float_seq`` is an item without a vector.

    Read line by line: the text of the numbers takes more room than the numbers.
    """
    header = read_header(path)
    sequences = [name for name, kind in header.items() if kind is FeatureType.FLOAT_SEQ]
    if column is None and len(sequences) == 1:
        column = sequences[0]
    if column not in sequences:
        raise InputError(
            f"{path}: float_seq columns are {sequences}, `column` is {column!r}; "
            "set `column` to the one that holds the vectors"
        )
    names = list(header)
    at, vector_at = _position(path, names, id_col), names.index(column)
    rows = _TextRows(path)
    with _reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        next(stream)
        for line, text in enumerate(stream, start=2):
            cells = text.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            if len(cells) != len(names):
                raise InputError(
                    f"{path}, line {line}: {len(cells)} columns, the header has {len(names)}; "
                    "mend the line"
                )
            rows.add(cells[at], cells[vector_at].split(), line)
    return rows.file()


def _read_parquet(path: Path, id_col: str | None, column: str | None) -> FeatureFile:
    """An id column, and either one column of lists or F columns of numbers."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentFault(
            f"{path}: reading parquet needs pyarrow; pip install 'recbole-mm[parquet]'"
        ) from error

    with _reading(path, "parquet"), pq.ParquetFile(path) as file:
        names, types = file.schema_arrow.names, file.schema_arrow.types
        id_name = names[_position(path, names, id_col)]
        list_types = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        is_list = {
            name: any(is_(kind) for is_ in list_types)
            for name, kind in zip(names, types, strict=True)
        }
        lists = [name for name in names if is_list[name] and name != id_name]
        if column is not None:
            chosen = [names[_position(path, names, column, "column")]]
        elif len(lists) > 1:
            raise InputError(f"{path}: several columns of lists, {lists}; set `column` to one")
        else:
            chosen = lists or [name for name in names if name != id_name]
        if not chosen:
            raise InputError(f"{path}: only the column {id_name!r}; there are no numbers")
        for name in chosen:
            kind = file.schema_arrow.field(name).type
            kind = kind.value_type if is_list[name] else kind
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise InputError(
                    f"{path}: column {name!r} holds {kind}, not numbers; set `column` to the "
                    "column of the vectors"
                )
        is_half = pa.types.is_float16(kind)

        tokens: list[str] = []
        values: np.ndarray[Any, Any] | None = None
        done, row = 0, 0
        for batch in file.iter_batches(columns=[id_name, *chosen]):
            ids = batch.column(id_name)
            if is_list[chosen[0]]:
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
            tokens += _tokens(ids.to_pylist(), path)
            with np.errstate(over="ignore"):
                values[done : len(tokens)] = numbers
            done = len(tokens)
    if values is None:
        raise InputError(f"{path}: no vector inside; give a file with at least one row")
    return FeatureFile(_matrix(values[:done], path), str(kind), tokens)


def read_ids(path: Path, *, id_col: str | None = None) -> tuple[list[str], list[int] | None]:
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
        raise InputError(f"id file {path} does not exist; {_neighbours(path)}")
    suffix = path.suffix.lower()
    if id_col is not None and suffix in (".txt", ".ids", ".json", ".item2index"):
        raise InputError(f"{path}: has no columns; remove `id_col: {id_col}`")
    if suffix in (".txt", ".ids"):
        with _reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
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
    names = list(read_header(path))
    name = names[_position(path, names, id_col)]
    return read_atomic(path, columns=[name], as_text=[name]).frame[name].tolist(), None


def _json_ids(path: Path) -> tuple[list[str], list[int] | None]:
    with _reading(path, "JSON"):
        # pairs, not a dict: a dict would swallow a token that stands twice
        held = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    if isinstance(held, list):
        return _tokens(held, path), None
    if not isinstance(held, tuple):
        raise InputError(f"{path}: write a list of item tokens or a mapping of token to row")
    tokens, rows = [token for token, _ in held], [row for _, row in held]
    for token, row in held:
        if isinstance(row, bool) or not isinstance(row, int):
            raise InputError(f"{path}: row {row!r} of item {token!r} is not a whole number")
    return tokens, rows


def _item2index(path: Path) -> tuple[list[str], list[int] | None]:
    tokens, rows = [], []
    with _reading(path, "text"), path.open(encoding="utf-8-sig", newline="\n") as stream:
        for line, text in enumerate(stream, start=1):
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise InputError(f"{path}, line {line}: {text.rstrip()!r} is not token<TAB>row")
            tokens.append(cells[0])
            rows.append(_row_number(cells[1], path, line))
    return tokens, rows


def _csv_ids(path: Path, id_col: str | None) -> tuple[list[str], list[int] | None]:
    table = _csv_table(path)
    _, header = next(table)
    at = _position(path, header, id_col)
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


def _neighbours(path: Path) -> str:
    """A hint for a path that does not exist."""
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = get_close_matches(path.name, names, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the folder holds {', '.join(names[:5]) or 'nothing'}"


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and last change in ns of a file; summed and latest over a folder and its files."""
    stats = [path.stat(), *(file.stat() for file in path.glob("*.npy"))]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of its ``.npy`` files.

    Read in chunks, and once for the same path, size and time of change in a process.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        listing = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    size, changed = stamp_of(path)
    if time.time_ns() - changed < FRESH_NS:  # the next change may bear the same time
        return _sha256(path)
    return _remembered_sha256(path.resolve(), size, changed)


@lru_cache(maxsize=256)
def _remembered_sha256(path: Path, _size: int, _changed: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
