"""Item features of a dataset: declared in the config, matched by item token, checked, reported.

Feature files never add an item and never drop an interaction; what is missing is said by a mask.

Shapes: N items (row 0 is padding), M modalities, R rows of a file, F feature width.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mm.data.atomic import RECBOLES_FORMAT, AtomicFormat
from recbole_mm.data.digest import sha256_of, stamp_of
from recbole_mm.data.feature_files import (
    TABLE_KINDS,
    FeatureFile,
    kind_of,
    read_features,
    read_ids,
    row_chunks,
)
from recbole_mm.errors import EnvironmentFault, InputError, nearest, printable

_LOG = logging.getLogger(__name__)

CHOICES = {
    "index": ("token", "token-1", "recbole_internal"),
    "nan": ("error", "mask"),
    "zero": ("keep", "mask"),
}
ABSENT = -1
PADDING = "[PAD]"  # RecBole's token of internal id 0


@dataclass(frozen=True)
class Declaration:
    """One entry of ``modalities``, as the user wrote it.

    Attributes:
        path: Feature file or folder, relative to the dataset's folder, or absolute;
            ``{dataset}`` stands for the dataset's name.
        dim: Width F, needed for headerless files.
        ids: Id file of a matrix, inside the dataset's folder.
        id_col: Column of the item tokens, in a table or in the id file.
        index: How a bare matrix is numbered: ``token``, ``token-1``, or ``recbole_internal``
            (beside ``ids``, which map a token to its row).
        column: Column of the vectors in a table with several.
        nan: ``error``, or ``mask``: a vector with NaN or Inf counts as missing.
        zero: ``keep`` (with a warning), or ``mask``: an all-zero vector counts as missing [ours].
        min_coverage: Least share of the items, in [0, 1], that must have a vector of this
            modality; ``None`` for the ``min_coverage`` of all modalities [ours].
    """

    path: str
    dim: int | None = None
    ids: str | None = None
    id_col: str | None = None
    index: str | None = None
    column: str | None = None
    nan: str = "error"
    zero: str = "keep"
    min_coverage: float | None = None


@dataclass(frozen=True)
class ModalityReport:
    """What became of one feature file.

    Attributes:
        name: Name of the modality.
        rows: Rows R of the file.
        width: Numbers in a row, F.
        dtype: Number type on disk.
        items: Items of the dataset, without padding.
        matched: Items with a usable vector.
        missing: Items without one: no row, a row marked as not present, or masked by
            ``nan: mask`` or ``zero: mask``. ``matched + missing == items``.
        unknown: Tokens (rows, where the file has none) of the file that are no item here.
        duplicate: Rows whose token had come before, with the same numbers.
        nonfinite: Items whose vector holds NaN or Inf.
        zero: Items whose vector is all zero.
        source: Feature file.
        ids: Id file, if there is one.
        stamp: Size and last change of ``source`` when it was read.
    """

    name: str
    rows: int
    width: int
    dtype: str
    items: int
    matched: int
    missing: int
    unknown: int
    duplicate: int
    nonfinite: int
    zero: int
    source: Path
    ids: Path | None
    stamp: tuple[int, int]

    @property
    def coverage(self) -> float:
        """Share of the items that have a vector."""
        return self.matched / self.items

    @property
    def sha256(self) -> str:
        """SHA-256 of the source, computed when first asked for.

        Raises:
            InputError: If the file changed after it was read.
        """
        if stamp_of(self.source) != self.stamp:
            raise InputError(f"{self.source}: changed since it was read; start the run again")
        return sha256_of(self.source)

    def line(self) -> str:
        """The report in one printable line."""
        return printable(
            f"{self.name}: {self.rows} rows x {self.width} {self.dtype}, "
            f"matched {self.matched} of {self.items} items, missing {self.missing}, "
            f"unknown {self.unknown}, duplicate {self.duplicate}, NaN or Inf {self.nonfinite}, "
            f"all-zero {self.zero}, {self.source}, sha256 {self.sha256[:12]}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it, with the full sha256 of the source and of the ids."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        del held["stamp"]
        return held | {
            "source": str(self.source),
            "sha256": self.sha256,
            "ids": None if self.ids is None else str(self.ids),
            "ids_sha256": None if self.ids is None else sha256_of(self.ids),
        }


@dataclass(frozen=True, eq=False)
class ModalityFeatures:
    """The vectors of one modality and the row that each item has among them.

    Attributes:
        name: Name of the modality.
        values: ``(R, F)`` float16, bfloat16 or float32, as on disk, possibly memory-mapped.
        rows: ``(N,)`` int64, row of each internal item id; 0 where the item is absent.
        present: ``(N,)`` bool; False for padding and for items without a vector.
        report: Counts, source and hash.
    """

    name: str
    values: Tensor
    rows: Tensor
    present: Tensor
    report: ModalityReport

    @property
    def width(self) -> int:
        """Feature width F."""
        return self.values.shape[1]


class FeatureTable(Mapping[str, ModalityFeatures]):
    """All modalities of a dataset, in the order of the config; immutable.

    Args:
        modalities: One for each name, all over the same items.
        n_items: Items N, padding included.

    Raises:
        ValueError: If two modalities share a name or one is over another number of items.
    """

    def __init__(self, modalities: Sequence[ModalityFeatures], n_items: int) -> None:
        self._modalities = {features.name: features for features in modalities}
        if len(self._modalities) != len(modalities):
            raise ValueError(f"a modality stands twice: {[m.name for m in modalities]}")
        for features in modalities:
            if features.present.shape != (n_items,):
                raise ValueError(
                    f"{features.name} is over {len(features.present)} items, not {n_items}"
                )
        self._n_items = n_items

    def __getitem__(self, name: str) -> ModalityFeatures:
        return self._modalities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modalities)

    def __len__(self) -> int:
        return len(self._modalities)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the config."""
        return tuple(self._modalities)

    @property
    def widths(self) -> dict[str, int]:
        """Feature width F of each modality."""
        return {name: features.width for name, features in self.items()}

    @property
    def n_items(self) -> int:
        """Items N, padding included."""
        return self._n_items

    @property
    def present(self) -> Tensor:
        """``(N, M)`` bool: which item has which modality; row 0 (padding) is False."""
        if not self._modalities:
            return torch.zeros(self._n_items, 0, dtype=torch.bool)
        return torch.stack([features.present for features in self.values()], dim=1)

    def hiding(self, percent: Mapping[str, float], tokens: Sequence[str]) -> FeatureTable:
        """The table with some vectors counted as missing.

        Which items lose theirs depends on their token and the modality's name alone: they are the
        same in every run, and those of 25 % are among those of 50 %. [ours]

        Args:
            percent: By modality, how many of the items that have a vector lose it, in [0, 100].
            tokens: ``(N,)`` item tokens.

        Raises:
            InputError: If a modality is not declared or a number is out of range.
        """
        for name, share in percent.items():
            if name not in self:
                raise InputError(
                    f"hidden_features: {name!r} is not among the modalities that are loaded: "
                    f"{', '.join(self) or 'none'}"
                )
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise InputError(f"hidden_features: {share!r} of {name} is not a number")
            if not 0 <= share <= 100:
                raise InputError(f"hidden_features: {share} % of {name} is outside [0, 100]")
        shown = [
            _hide(features, percent[name], tokens) if percent.get(name) else features
            for name, features in self.items()
        ]
        return FeatureTable(shown, self._n_items)

    @property
    def reports(self) -> tuple[ModalityReport, ...]:
        """One report for each modality."""
        return tuple(features.report for features in self.values())


def _hide(features: ModalityFeatures, percent: float, tokens: Sequence[str]) -> ModalityFeatures:
    def draw(item: int) -> bytes:
        return hashlib.sha256(f"{features.name}\t{tokens[item]}".encode()).digest()

    owners = sorted(features.present.nonzero().squeeze(1).tolist(), key=draw)
    hidden = owners[: round(len(owners) * percent / 100)]
    present = features.present.clone()
    present[hidden] = False
    report = replace(
        features.report,
        matched=features.report.matched - len(hidden),
        missing=features.report.missing + len(hidden),
    )
    return replace(features, present=present, report=report)


def load_features(
    declarations: Mapping[str, Mapping[str, Any]],
    tokens: Sequence[str],
    *,
    dataset_name: str,
    dataset_path: Path | str,
    min_coverage: float,
    atomic: AtomicFormat = RECBOLES_FORMAT,
) -> FeatureTable:
    """Read the declared feature files and match their rows to the items of a dataset by token.

    Args:
        declarations: For each modality the keys of :class:`Declaration`.
        tokens: ``(N,)``; ``tokens[i]`` is the token of internal id ``i``, ``tokens[0]`` is padding.
        dataset_name: Replaces ``{dataset}`` in paths.
        dataset_path: Folder of the dataset; relative paths start here and must stay inside.
        min_coverage: Least share of the items, in [0, 1], that must have a vector, for each
            modality whose declaration sets none of its own.
        atomic: How the atomic files among them are written.

    Raises:
        InputError: For whatever is wrong with a declaration or a file; the message names the
            modality, the file, the row or token, and the mend.
        EnvironmentFault: If a file cannot be read or a package is missing.
    """
    _check_share(min_coverage)
    tokens = [str(token) for token in tokens]
    if declarations and len(tokens) < 2:
        raise InputError(f"dataset {dataset_name} has no item to match features with")
    modalities = []
    for name, raw in declarations.items():
        try:
            declaration = _declaration(name, raw)
            modalities.append(
                _load(
                    name,
                    declaration,
                    tokens,
                    dataset_name,
                    Path(dataset_path),
                    min_coverage,
                    atomic,
                )
            )
        except InputError as error:
            raise InputError(f"modalities.{name}: {error}") from error
    return FeatureTable(modalities, len(tokens))


def _check_share(min_coverage: object) -> None:
    if isinstance(min_coverage, bool) or not isinstance(min_coverage, (int, float)):
        raise InputError(f"min_coverage: {min_coverage!r} is not a number; set one in [0, 1]")
    if not 0 <= min_coverage <= 1:
        raise InputError(f"min_coverage: {min_coverage} is outside [0, 1]")


def check_name(name: object) -> None:
    """Refuse what cannot name a modality.

    Raises:
        InputError: If it cannot.
    """
    # a modality names parts of the model (no dots, no method of a ModuleDict) and files (no slash)
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[\w -]+", name)
        or hasattr(nn.ModuleDict(), name)
    ):
        raise InputError(
            f"{name!r} cannot name a modality: it names a part of the model and files; "
            "use a plain word such as text or image"
        )
    if name == "id":
        raise InputError("'id' is the trained item embedding; give the feature another name")


def _declaration(name: str, raw: Mapping[str, Any]) -> Declaration:
    check_name(name)
    if not isinstance(raw, Mapping):
        raise InputError(f"{raw!r} is not a mapping; write {{path: <feature file>}}")
    given = {key: value for key, value in raw.items() if value is not None}
    keys = [field.name for field in fields(Declaration)]
    for key, value in given.items():
        if key not in keys:
            raise InputError(
                f"unknown key {key!r}{nearest(str(key), keys)}; use one of {', '.join(keys)}"
            )
        if key in CHOICES and value not in CHOICES[key]:
            raise InputError(f"{key}: {value!r}; set one of {', '.join(CHOICES[key])}")
        if key == "dim":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"dim: {value!r}; set a positive whole number")
        elif key == "min_coverage":
            _check_share(value)
        elif not isinstance(value, str) or not value:
            raise InputError(f"{key}: {value!r} is not text; put it in quotes")
    if "path" not in given:
        raise InputError("no `path`; set the feature file of this modality")
    return Declaration(**given)


def _locate(declared: str, key: str, dataset_name: str, folder: Path) -> Path:
    """A declared path; one that leaves the dataset's folder is refused.

    Only ``path``, when the user wrote it as absolute, may point elsewhere. Links are followed
    before the check.
    """
    path = Path(declared.replace("{dataset}", dataset_name))
    located = folder / path
    try:
        located.exists()
        is_inside = located.resolve().is_relative_to(folder.resolve())
    except PermissionError as error:
        raise EnvironmentFault(f"{key}: {located}: {error.strerror}; change its mode") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise InputError(f"{key}: {declared!r} is no usable path ({error}); correct it") from error
    if not is_inside and not (path.is_absolute() and key == "path"):
        mend = "write it as an absolute path" if key == "path" else "copy the file into it"
        raise InputError(f"{key}: {declared!r} leads out of the dataset's folder {folder}; {mend}")
    return located


def _load(
    name: str,
    declared: Declaration,
    tokens: list[str],
    dataset_name: str,
    folder: Path,
    min_coverage: float,
    atomic: AtomicFormat,
) -> ModalityFeatures:
    source = _locate(declared.path, "path", dataset_name, folder)
    ids = None if declared.ids is None else _locate(declared.ids, "ids", dataset_name, folder)
    _refuse_idle_keys(declared, kind_of(source, atomic))
    stamp = stamp_of(source)
    file = read_features(
        source,
        dim=declared.dim,
        id_col=declared.id_col if ids is None else None,
        column=declared.column,
        atomic=atomic,
    )
    kept = str(file.values.dtype).removeprefix("torch.")
    if file.dtype not in (kept, "text"):
        _LOG.info("%s: %s converted from %s to %s", name, source, file.dtype, kept)
    rows, unknown, duplicate = _align(file, declared, tokens, source, ids, atomic)

    present = rows != ABSENT  # (N,)
    rows = rows.clamp(min=0)
    if file.present is not None:
        present &= file.present[rows]
    row_is_bad, row_is_zero, all_equal = _check(file.values, rows[present])
    is_bad, is_zero = present & row_is_bad[rows], present & row_is_zero[rows]  # (N,)
    where = f"{name}: %d of {len(tokens) - 1} items have %s in {source} (first: %s); %s"
    if is_bad.any():
        if declared.nan == "error":
            raise InputError(
                f"{source}: the vectors of {int(is_bad.sum())} items hold {_NON_FINITE} (first: "
                f"{_first(tokens, is_bad)}); extract them again, or set `nan: mask` to count "
                "them as missing"
            )
        present &= ~is_bad
        _LOG.warning(where, is_bad.sum(), _NON_FINITE, _first(tokens, is_bad), "masked")
    if is_zero.any():
        if declared.zero == "mask":
            present &= ~is_zero
        mend = "masked" if declared.zero == "mask" else "kept, `zero: mask` would mask them"
        _LOG.warning(where, is_zero.sum(), "all-zero vectors", _first(tokens, is_zero), mend)
    if all_equal:
        _LOG.warning("%s: all vectors in %s are equal; they tell no items apart", name, source)
    report = ModalityReport(
        name=name,
        rows=len(file.values),
        width=file.values.shape[1],
        dtype=file.dtype,
        items=len(tokens) - 1,
        matched=int(present.sum()),
        missing=len(tokens) - 1 - int(present.sum()),
        unknown=unknown,
        duplicate=duplicate,
        nonfinite=int(is_bad.sum()),
        zero=int(is_zero.sum()),
        source=source,
        ids=ids,
        stamp=stamp,
    )
    required = min_coverage if declared.min_coverage is None else declared.min_coverage
    _check_coverage(report, tokens, present, required)
    rows = torch.where(present, rows, 0)
    return ModalityFeatures(name, file.values, rows, present, report)


def _refuse_idle_keys(declared: Declaration, kind: str) -> None:
    """A key that changes nothing is a misunderstanding."""
    if declared.column is not None and kind not in TABLE_KINDS:
        raise InputError(f"column: {declared.column!r}, but a {kind} file has none; remove it")
    if declared.id_col is not None and kind not in TABLE_KINDS and declared.ids is None:
        raise InputError(
            f"id_col: {declared.id_col!r}, but a {kind} file has no columns; "
            "set `ids` to the file that has this column, or remove it"
        )
    if declared.index == "recbole_internal" and declared.ids is None:
        raise InputError(
            "index: recbole_internal numbers items as one RecBole run did; "
            "set `ids` to the mapping of token to row that this run wrote (JSON or item2index)"
        )
    if declared.ids is not None and declared.index in ("token", "token-1"):
        raise InputError(
            f"`ids` and `index: {declared.index}` both say which row is whose; remove one"
        )


_NON_FINITE = "NaN, Inf or numbers too large for float32"


def _first(tokens: Sequence[str], mask: Tensor) -> str:
    """Up to three tokens of the items that ``mask`` marks."""
    return ", ".join(repr(tokens[item]) for item in mask.nonzero()[:3, 0].tolist())


def _check_coverage(
    report: ModalityReport, tokens: list[str], present: Tensor, min_coverage: float
) -> None:
    if not report.missing:
        return
    absent = ~present
    absent[0] = False
    found = (
        f"{report.source}: {report.matched} of {report.items} items have a vector "
        f"({report.coverage:.1%}); first without one: {_first(tokens, absent)}"
    )
    if report.coverage < min_coverage or not report.matched:
        raise InputError(
            f"{found}. Give the missing vectors (if they are derived: rows of .item or .kg), or "
            f"set `min_coverage` (now {min_coverage}) to the share you accept"
        )
    _LOG.warning("%s: %s; the rest is masked", report.name, found)


def _check(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Look at the used rows of a matrix, a chunk at a time.

    Args:
        values: ``(R, F)``, possibly larger than memory.
        rows: Rows that items use.

    Returns:
        ``(R,)`` bool, the row holds NaN, Inf, or numbers so large that its length may overflow;
        ``(R,)`` bool, it is all zero; and whether all used rows are equal. The first two say
        nothing of a row that nobody uses.
    """
    n_rows, width = values.shape
    bound = math.sqrt(torch.finfo(torch.float32).max / width)
    used = torch.zeros(n_rows, dtype=torch.bool)
    used[rows] = True
    non_finite, zero = torch.zeros_like(used), torch.zeros_like(used)
    all_equal = int(used.sum()) > 1
    model = values[rows[:1]].float()  # (1, F)
    for part in row_chunks(n_rows, width):
        if not used[part].any():
            continue
        numbers = values[part].float()  # a view where they are float32 already
        low, high = numbers.amin(dim=1), numbers.amax(dim=1)  # both are NaN if a number is
        non_finite[part] = ~((low >= -bound) & (high <= bound))
        zero[part] = (low == 0) & (high == 0)
        if all_equal:
            all_equal = bool(torch.eq(numbers[used[part]], model).all())
    return non_finite, zero, all_equal


def _align(
    file: FeatureFile,
    declared: Declaration,
    tokens: list[str],
    source: Path,
    ids: Path | None,
    atomic: AtomicFormat,
) -> tuple[Tensor, int, int]:
    """Row of each item, ``(N,)`` int64 with ``ABSENT``; counts of unknown and duplicate tokens."""
    n_rows = len(file.values)
    if file.tokens is not None:
        if ids is not None or declared.index is not None:
            extra = "ids" if ids is not None else "index"
            raise InputError(f"{source} names its items itself; remove `{extra}`")
        return _align_by_token(file, file.tokens, range(n_rows), tokens, source)
    if ids is None:
        return _align_by_number(n_rows, declared, tokens, source)

    file_tokens, file_rows = read_ids(ids, id_col=declared.id_col, atomic=atomic)
    if declared.index == "recbole_internal":
        if file_rows is None:
            raise InputError(
                f"{ids}: index: recbole_internal needs a mapping of token to row; "
                "a bare list of tokens does not say where padding stands"
            )
        file_tokens, file_rows = _without_padding(file_tokens, file_rows, ids)
    if file_rows is None:
        if len(file_tokens) != n_rows:
            raise InputError(
                f"{ids} names {len(file_tokens)} items, {source} has {n_rows} rows"
                f"{_off_by_one(n_rows - len(file_tokens))}; "
                "write one id for each row, or a mapping of token to row as JSON"
            )
        file_rows = list(range(n_rows))
    for token, row in zip(file_tokens, file_rows, strict=True):
        if not 0 <= row < n_rows:
            raise InputError(
                f"{ids}: item {token!r} has row {row}, {source} has rows 0..{n_rows - 1}; "
                "rows count from 0; give the ids that belong to this matrix"
            )
    return _align_by_token(file, file_tokens, file_rows, tokens, ids)


def _off_by_one(extra: int) -> str:
    if extra == 1:
        return " (one more: does the matrix begin with a row for padding?)"
    if extra == -1:
        return " (one less: do the ids begin with padding or a header line?)"
    return ""


def _without_padding(tokens: list[str], rows: list[int], ids: Path) -> tuple[list[str], list[int]]:
    """Row 0 of a RecBole matrix is padding and belongs to no item."""
    kept = [(token, row) for token, row in zip(tokens, rows, strict=True) if token != PADDING]
    for token, row in kept:
        if row == 0:
            raise InputError(
                f"{ids}: item {token!r} has row 0, which is padding under index: "
                "recbole_internal; remove `index` if row 0 is an item"
            )
    return [token for token, _ in kept], [row for _, row in kept]


def _align_by_token(
    file: FeatureFile,
    file_tokens: Sequence[str],
    file_rows: Sequence[int],
    tokens: list[str],
    named_by: Path,
) -> tuple[Tensor, int, int]:
    row_of = dict(zip(file_tokens, file_rows, strict=True))
    duplicate = len(file_tokens) - len(row_of)
    if duplicate:
        _refuse_unequal_duplicates(file, file_tokens, file_rows, named_by)
    found = np.fromiter((row_of.get(token, ABSENT) for token in tokens), np.int64, len(tokens))
    found[0] = ABSENT  # padding is no item, whatever a file calls it
    n_found = int((found != ABSENT).sum())
    if not n_found:
        # archives hold their ids under a fixed name
        mend = "" if named_by.suffix in (".npz", ".safetensors") else "set `id_col`, or "
        raise InputError(
            f"{named_by}: none of its {len(row_of)} ids is an item of this dataset. "
            f"Ids there: {', '.join(map(repr, list(row_of)[:3]))}; "
            f"items here: {', '.join(map(repr, tokens[1:4]))}. Both must be the same text "
            f"('3.0' is not '3'); {mend}write the ids as the .inter file has them"
        )
    return torch.from_numpy(found), len(row_of) - n_found, duplicate


def _refuse_unequal_duplicates(
    file: FeatureFile, file_tokens: Sequence[str], file_rows: Sequence[int], named_by: Path
) -> None:
    first: dict[str, int] = {}
    for token, row in zip(file_tokens, file_rows, strict=True):
        before = first.setdefault(token, row)
        a, b = file.values[before], file.values[row]
        is_same = bool(((a == b) | (a.isnan() & b.isnan())).all())
        if file.present is not None:
            is_same &= bool(file.present[before] == file.present[row])
        if not is_same:
            raise InputError(
                f"{named_by}: item {token!r} stands twice, at rows {before} and {row}, with "
                "different vectors; keep one of them"
            )


def _align_by_number(
    n_rows: int, declared: Declaration, tokens: list[str], source: Path
) -> tuple[Tensor, int, int]:
    """Rows of a bare matrix, whose items can only be numbered.

    Without a stated ``index`` two counts are unambiguous, the ones that leave the other
    numbering a row short: tokens 0..n-1 and n rows (``token``), tokens 1..n and n rows
    (``token-1``), where n counts to the largest token. Every other count is refused.
    """
    for token in tokens[1:]:
        is_number = token.isascii() and token.isdecimal() and len(token) < 19  # fits in int64
        if not (is_number and str(int(token)) == token):
            raise InputError(
                f"{source} names no items, and item {token!r} is not a whole number that could "
                "be its row; set `ids` to a file with the token of each row"
            )
    numbers = np.array([int(token) for token in tokens[1:]], np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    index = declared.index
    hypotheses = (
        f"{source} has {n_rows} rows, the item tokens run from {low} to {high}: "
        f"`index: token` (row = token) needs {high + 1} rows; "
        f"`index: token-1` (row = token - 1, no token 0) needs {high}; "
        f"a first row for padding (row = token + 1) needs {high + 2}"
    )
    if index is None:
        if low == 0 and n_rows == high + 1:
            index = "token"
        elif low >= 1 and n_rows == high:
            index = "token-1"
        else:
            raise InputError(f"{hypotheses}. Set `index`, or `ids` to a file with the tokens")
    rows = numbers if index == "token" else numbers - 1
    needed = int(rows.max()) + 1
    if rows.min() < 0 or needed > n_rows:
        raise InputError(
            f"{hypotheses}, so `index: {index}` does not fit; set the other, give the matrix that "
            "belongs to this dataset, or set `ids`" + (", or check `dim`" if declared.dim else "")
        )
    is_multiple = n_rows != needed and n_rows % needed == 0
    if declared.dim and is_multiple and kind_of(source) == "headerless":
        raise InputError(
            f"{hypotheses}: {n_rows // needed} times as many as needed. Is the width "
            f"{declared.dim * (n_rows // needed)}, not `dim: {declared.dim}`? Set `dim`, or "
            "`ids` to a file with the token of each row"
        )
    found = torch.from_numpy(np.concatenate([[ABSENT], rows]))
    return found, n_rows - len(rows), 0
