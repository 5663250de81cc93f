"""The canonical form, a safetensors file with its ids inside: reader and writer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mm.data.feature_files.common import (
    HALF_OR_SINGLE,
    FeatureFile,
    as_matrix,
    as_tensor,
    as_tokens,
    check_one_token_a_row,
    copy_on_write,
    first_names,
    reading,
    row_chunks,
)
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.files import replacing

# https://github.com/huggingface/safetensors#format: name of the type -> numpy's
TYPES = {
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
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


def read_safetensors(path: Path) -> FeatureFile:
    """Canonical form: ``features`` (R, F), ``present`` (R,), and the ids as JSON in the metadata.

    The tensor is mapped here rather than by the safetensors library, whose mapping Linux
    refuses when the file is larger than RAM + swap.
    """
    with reading(path, "safetensors"):
        header, start = _header(path)
        metadata = header.pop("__metadata__", {})
        if "features" not in header:
            raise InputError(
                f"{path}: no tensor `features`, only {first_names(sorted(header))}; "
                "write it with recbole_mm.data.feature_files.save_features"
            )
        values, dtype = _features(path, header["features"], start)
        present = None
        if "present" in header:
            present = _array(path, header["present"], start)
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
            tokens = as_tokens(ids, path)
            check_one_token_a_row(len(tokens), len(values), path)
    mask = None if present is None else torch.from_numpy(present.astype(bool))
    return FeatureFile(values, dtype, tokens, mask, metadata)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Header and the position of the first tensor's bytes."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, 8 + length


def _array(path: Path, entry: dict[str, Any], start: int) -> np.ndarray[Any, Any]:
    dtype = np.dtype(TYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0 or min(shape, default=0) < 0:
        raise ValueError(f"{entry} contradicts itself")
    if begin == end:
        return np.empty(shape, dtype)
    return copy_on_write(
        lambda mode: np.memmap(path, dtype, mode, offset=start + begin, shape=shape)  # type: ignore[call-overload]
    )


def _features(path: Path, entry: dict[str, Any], start: int) -> tuple[Tensor, str]:
    numbers = _array(path, entry, start)
    if entry["dtype"] != "BF16":
        return as_matrix(numbers, path), str(numbers.dtype)
    if numbers.ndim != 2 or 0 in numbers.shape:
        raise InputError(f"{path}: shape {numbers.shape}; a feature matrix is (rows, width)")
    return as_tensor(numbers).view(torch.bfloat16), "bfloat16"


def save_features(
    path: Path | str,
    values: Tensor | np.ndarray[Any, Any],
    tokens: Sequence[str],
    present: Tensor | np.ndarray[Any, Any] | None = None,
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
    if not isinstance(values, Tensor):
        values = as_matrix(np.ascontiguousarray(values), path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the canonical form ends in .safetensors")
    if values.ndim != 2 or values.numel() == 0 or values.is_complex():
        raise InputError(
            f"{path}: shape {tuple(values.shape)} of {values.dtype}; (rows, width) of real numbers"
        )
    n_rows, width = values.shape
    check_one_token_a_row(len(tokens), n_rows, path)
    if len(set(tokens)) != n_rows:
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise InputError(f"{path}: item token {twice!r} stands twice; write each item once")
    present = (
        torch.ones(n_rows, dtype=torch.bool) if present is None else torch.as_tensor(present).bool()
    )
    if present.shape != (n_rows,):
        raise InputError(f"{path}: present has shape {tuple(present.shape)}, not ({n_rows},)")
    if "ids" in metadata or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError(f"{path}: metadata maps names to text, and `ids` is taken by the tokens")

    dtype = values.dtype if values.dtype in HALF_OR_SINGLE else torch.float32
    metadata["ids"] = json.dumps(tokens, ensure_ascii=False)
    n_bytes = n_rows * width * dtype.itemsize
    header = {
        "__metadata__": metadata,
        "features": _entry(NAMES[dtype], (n_rows, width), 0, n_bytes),
        "present": _entry("U8", (n_rows,), n_bytes, n_bytes + n_rows),
    }
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8 bytes
    if len(text) > MAX_HEADER:
        raise InputError(
            f"{path}: the ids take {len(text)} bytes, safetensors headers end at "
            f"{MAX_HEADER}; save an .npy matrix and name its id file under `ids`"
        )

    try:
        with replacing(path, shared=True) as unfinished, unfinished.open("xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for part in row_chunks(n_rows, width):
                rows = values[part].detach().to("cpu", dtype)
                _refuse_non_finite(path, rows, tokens[part], present[part])
                stream.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
            stream.write(present.cpu().to(torch.uint8).numpy().tobytes())
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _refuse_non_finite(path: Path, rows: Tensor, tokens: Sequence[str], present: Tensor) -> None:
    bad = present.cpu() & ~rows.isfinite().all(dim=1)
    if bad.any():
        raise InputError(
            f"{path}: the vector of item {tokens[int(bad.nonzero()[0])]!r} holds NaN or Inf; "
            "mark the item as not present"
        )
