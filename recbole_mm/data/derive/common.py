"""What the kinds of :mod:`recbole_mm.data.derive` share: what to compute, from what, into what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfTransformer

from recbole_mm.data.atomic import AtomicFormat, read_atomic
from recbole_mm.errors import InputError

Announce = Callable[[str], None]
"""Says which step of a derivation begins."""


@dataclass(frozen=True)
class Source:
    """Where the atomic files of a data set are and how they are written."""

    name: str
    folder: Path
    item_id_field: str
    knowledge_fields: tuple[str, ...]  # entity, head, relation, tail
    atomic: AtomicFormat

    def read(self, path: Path, *names: str) -> pd.DataFrame:
        """The columns ``names`` of an atomic file, each cell as it is written."""
        return read_atomic(path, self.atomic, columns=names, as_text=names).frame[list(names)]


@dataclass(frozen=True)
class Job:
    """One modality to compute."""

    modality: str
    options: dict[str, Any]
    source: Source
    files: dict[str, Path]  # by suffix
    tokens: Sequence[str]
    progress: bool

    def read_items(self, *fields: str) -> tuple[list[str], pd.DataFrame]:
        """Ids and the columns ``fields`` of ``.item``."""
        path = self.files["item"]
        items = self.source.read(path, self.source.item_id_field, *fields)
        ids = items[self.source.item_id_field]
        if ids.duplicated().any():
            raise InputError(
                f"{path}: item {ids[ids.duplicated()].iloc[0]!r} stands twice; keep one row of it"
            )
        self.check_ids(ids, path)
        return ids.tolist(), items[list(fields)]

    def check_ids(self, ids: Iterable[str], path: Path) -> None:
        """Refuse a source that knows no item of the run, before anything dear is computed."""
        known = set(ids)
        catalogue = self.tokens[1:]
        if catalogue and known.isdisjoint(catalogue):
            raise InputError(
                f"{path} holds none of the {len(catalogue)} items of the run; its ids look like "
                f"{sorted(known)[:3]}, those of the run like {list(catalogue[:3])}; write them the "
                "same way"
            )


@dataclass(frozen=True)
class Derived:
    """Vectors of the items ``ids``; rows of ``values`` that are not ``present`` are zero."""

    ids: list[str]
    values: npt.NDArray[np.float32]  # (n, K)
    present: npt.NDArray[np.bool_]  # (n,)
    explained_variance: float
    metadata: dict[str, str]


def weighted(counts: sp.csr_matrix, min_items: int) -> sp.csr_matrix:
    """Weigh what occurs in few items more, leave out what occurs in fewer than ``min_items``.

    Args:
        counts: ``(n, V)``; any number of occurrences counts as one.
        min_items: Fewest items of a column that stays.

    Returns:
        ``(n, V')``, rows of length 1, or all zero.
    """
    counts.sum_duplicates()
    counts.data[:] = 1
    frequent = counts.getnnz(axis=0) >= min_items
    kept = counts[:, frequent]
    return TfidfTransformer().fit_transform(kept) if kept.nnz else kept


def svd_encoder(name: str) -> dict[str, str]:
    """Metadata of vectors that scikit-learn made."""
    return {"encoder": f"{name} (scikit-learn {major_minor('scikit-learn')})"}


def major_minor(package: str) -> str:
    """The installed version of a package, but for its last number."""
    return ".".join(version(package).split(".")[:2])


def placed(
    ids: list[str],
    values: npt.NDArray[np.float32],
    explained: float,
    metadata: dict[str, str],
    rows: npt.NDArray[np.bool_] | None = None,
) -> Derived:
    """Place ``values`` at the items where ``rows`` is True; a zero row is an absent item."""
    if rows is not None:
        everywhere = np.zeros((len(ids), values.shape[1]), dtype=np.float32)
        everywhere[rows] = values
        values = everywhere
    return Derived(ids, values, (values != 0).any(axis=1), explained, metadata)
