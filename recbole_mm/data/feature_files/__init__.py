"""Files that hold item features: one reader for each format, and the writer of the canonical one.

No reader executes anything: ``allow_pickle=False``, ``weights_only=True``, object arrays refused.
npy, safetensors and headerless matrices are memory-mapped; nothing here knows which items exist.

Shapes: R rows of a file, F feature width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from recbole_mm.data.atomic import RECBOLES_FORMAT, AtomicFormat, read_header
from recbole_mm.data.feature_files.arrays import (
    read_folder,
    read_headerless,
    read_npy,
    read_npz,
    read_pt,
)
from recbole_mm.data.feature_files.canonical import read_safetensors, save_features
from recbole_mm.data.feature_files.common import FeatureFile, neighbours, row_chunks
from recbole_mm.data.feature_files.ids import read_ids
from recbole_mm.data.feature_files.tables import read_atomic_file, read_csv, read_parquet
from recbole_mm.errors import InputError

__all__ = [
    "TABLE_KINDS",
    "FeatureFile",
    "kind_of",
    "read_features",
    "read_ids",
    "row_chunks",
    "save_features",
]

HEADERLESS = re.compile(r"\.feat\d+CLS")
TABLE_KINDS = ("parquet", "csv", "atomic")  # formats with named columns


def kind_of(path: Path, atomic: AtomicFormat = RECBOLES_FORMAT) -> str:
    """Format of a feature file, by its name (a folder is one ``.npy`` for each item).

    Any other name is that of an atomic file, if it has a header as ``atomic`` says.

    Raises:
        InputError: If there is no such file, or its name belongs to no format, or to pickle.
    """
    suffix = path.suffix
    if not path.exists():
        raise InputError(f"feature file {path} does not exist; {neighbours(path)}")
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
        read_header(path, atomic)
    except InputError as error:
        raise InputError(
            f"{path}: unknown feature format {suffix!r}; use .safetensors, .npz, .npy, .pt, "
            ".parquet, .csv, .feat<N>CLS, a folder of <item token>.npy, or a RecBole atomic file, "
            f"which this is not: {error}"
        ) from error
    return "atomic"


def read_features(
    path: Path,
    *,
    dim: int | None = None,
    id_col: str | None = None,
    column: str | None = None,
    atomic: AtomicFormat = RECBOLES_FORMAT,
) -> FeatureFile:
    """Read a feature file of any known format.

    Args:
        path: File or folder.
        dim: Width F; needed for the headerless ``.feat<N>CLS``, checked for all others.
        id_col: Column of the item tokens in a table; default ``item_id``, else the first.
        column: Column of the vectors in a table that has several.
        atomic: How an atomic file is written.

    Raises:
        InputError: If the file is damaged, holds Python objects, is ragged, empty or of
            another width than ``dim``; the message names the file and the line or row.
        EnvironmentFault: If a package is missing or the machine refuses to read.
    """
    kind = kind_of(path, atomic)
    if kind == "headerless":
        return read_headerless(path, dim)
    if kind in TABLE_KINDS:
        tables: dict[str, Callable[[Path, str | None, str | None], FeatureFile]] = {
            "parquet": read_parquet,
            "csv": read_csv,
            "atomic": partial(read_atomic_file, atomic=atomic),
        }
        file = tables[kind](path, id_col, column)
    else:
        matrices = {
            "safetensors": read_safetensors,
            "npz": read_npz,
            "npy": read_npy,
            "pt": read_pt,
            "folder": read_folder,
        }
        file = matrices[kind](path)
    if dim is not None and file.values.shape[1] != dim:
        raise InputError(
            f"{path}: rows are {file.values.shape[1]} wide, `dim` says {dim}; "
            f"set `dim: {file.values.shape[1]}` or give the file that was meant"
        )
    return file
