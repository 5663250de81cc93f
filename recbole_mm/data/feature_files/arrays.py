"""Readers of matrices without names of columns: npy, npz, pt, bare float32, folders of npy."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mm.data.feature_files.common import (
    HALF_OR_SINGLE,
    FeatureFile,
    as_matrix,
    as_tokens,
    check_one_token_a_row,
    copy_on_write,
    first_names,
    reading,
)
from recbole_mm.errors import EnvironmentFault, InputError


def read_npy(path: Path) -> FeatureFile:
    """A bare matrix, mapped."""
    with reading(path, "npy"):
        numbers = copy_on_write(lambda mode: np.lib.format.open_memmap(path, mode=mode))
    return FeatureFile(as_matrix(numbers, path), str(numbers.dtype))


def read_npz(path: Path) -> FeatureFile:
    """Arrays ``features`` (R, F) and, if the rows have names, ``ids`` (R,)."""
    with reading(path, "npz"):
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
                    f"{path}: no array `features`, only {first_names(arrays.files)}; "
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
        with reading(path, "npz"):
            tokens = as_tokens(ids.tolist(), path)
    values = as_matrix(numbers, path)
    if tokens is not None:
        check_one_token_a_row(len(tokens), len(values), path)
    return FeatureFile(values, str(numbers.dtype), tokens)


def read_pt(path: Path) -> FeatureFile:
    """One tensor of ``torch.save``; anything else would be a pickle."""
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


def read_headerless(path: Path, dim: int | None) -> FeatureFile:
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
    with reading(path, "headerless float32"):
        numbers = copy_on_write(
            lambda mode: np.memmap(path, np.dtype("<f4"), mode, shape=(size // (4 * dim), dim))  # type: ignore[call-overload]
        )
    return FeatureFile(as_matrix(numbers, path), "float32")


def read_folder(folder: Path) -> FeatureFile:
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
        with reading(path, "npy"), path.open("rb") as stream:
            numbers = np.lib.format.read_array(stream, allow_pickle=False)
        if numbers.size == 0 or numbers.shape[-1:] != (numbers.size,):
            raise InputError(f"{path}: shape {numbers.shape}; one vector a file, (F,) or (1, F)")
        return numbers.reshape(1, -1)

    first = vector(files[0])
    values = as_matrix(first, files[0]).repeat(len(files), 1)
    for row, path in enumerate(files[1:], start=1):
        numbers = vector(path)
        if numbers.shape != first.shape or numbers.dtype != first.dtype:
            raise InputError(
                f"{path}: {numbers.size} numbers of {numbers.dtype}, but {files[0].name} has "
                f"{first.size} of {first.dtype}; extract all items with one encoder"
            )
        values[row] = as_matrix(numbers, path)[0]
    return FeatureFile(values, str(first.dtype), [path.stem for path in files])
