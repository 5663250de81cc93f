"""What the readers share: the outcome of one, and how damage, numbers and tokens are taken."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mm.errors import EnvironmentFault, InputError

HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)  # kept as they are on disk
CHUNK_NUMBERS = 1 << 22  # numbers converted, checked or written at a time: 16 MiB of float32


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


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
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


def copy_on_write(mapped: Callable[[str], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
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


def as_tensor(numbers: np.ndarray[Any, Any]) -> Tensor:
    """The same memory as a tensor, mapped read-only or not."""
    if numbers.flags.writeable:
        return torch.from_numpy(numbers)
    with warnings.catch_warnings():  # a read-only mapping; features are frozen, nobody writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(numbers)


def as_matrix(numbers: np.ndarray[Any, Any], path: Path | str) -> Tensor:
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
        return as_tensor(numbers)
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


def as_tokens(items: Iterable[Any], path: Path) -> list[str]:
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


def check_one_token_a_row(n_tokens: int, n_rows: int, path: Path) -> None:
    """Refuse ids that are more or fewer than the rows."""
    if n_tokens != n_rows:
        raise InputError(
            f"{path}: {n_tokens} ids for {n_rows} rows of features; write one id for each row"
        )


def neighbours(path: Path) -> str:
    """A hint for a path that does not exist, or is a folder where a file should be."""
    if path.is_symlink() and not path.exists():
        return f"it is a link to {path.readlink()}"
    if path.exists():
        return "it is no file"
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = get_close_matches(path.name, names, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the folder holds {', '.join(names[:5]) or 'nothing'}"


def first_names(names: Sequence[str]) -> str:
    """Names for a message: a file may hold one for each item."""
    shown = ", ".join(map(repr, names[:8])) or "nothing"
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)} in all)"
