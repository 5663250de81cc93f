"""Data sets in the layouts of other projects, turned into atomic files and canonical features.

``recbole-mm import LAYOUT FOLDER``. Each layout is a module that reads a folder into a
:class:`Source`; what is written from it is the same for all. Items keep their own tokens where the
layout knows them. No pickle is opened.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recbole_mm.data.digest import sha256_of
from recbole_mm.data.feature_files import save_features
from recbole_mm.data.feature_files.common import first_names, row_chunks
from recbole_mm.data.features import check_name
from recbole_mm.data.images import item_tokens
from recbole_mm.data.layouts import ducho, hm4sr, microlens, mmrec, unisrec
from recbole_mm.data.layouts.common import Matrix, Source
from recbole_mm.errors import InputError, check_choice
from recbole_mm.files import write_text, writing

_READERS: Mapping[str, Callable[[Path], Source]] = {
    "mmrec": mmrec.read,
    "unisrec": unisrec.read,
    "missrec": unisrec.read,
    "hm4sr": hm4sr.read,
    "ducho": ducho.read,
    "microlens": microlens.read,
}
LAYOUTS = tuple(_READERS)

_TYPES = {"user_id": "token", "item_id": "token", "timestamp": "float", "rating": "float"}
_MIN_COVERAGE = 0.9  # the default of the key
_MEND = "free space, or name another place with --data_path"


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        folder: Of the data set.
        config: YAML file that declares its columns and features.
        users: Number of users, 0 where only features were written.
        items: Items with an interaction.
        interactions: Number of interactions.
        features: For each modality: rows with a vector, width, and how many items have one.
        notes: What was left out, and why.
    """

    folder: Path
    config: Path
    users: int
    items: int
    interactions: int
    features: Mapping[str, tuple[int, int, int]]
    notes: Sequence[str]

    def lines(self) -> list[str]:
        """The report, printable."""
        counts = f"{self.items} items"
        if self.interactions:
            counts = f"{self.users} users, {counts}, {self.interactions} interactions"
        lines = [f"{self.folder}: {counts}"]
        for name, (rows, width, covered) in self.features.items():
            lines.append(
                f"{name}: {rows} vectors of {width} numbers, for {covered} of {self.items} items"
            )
        lines += self.notes
        # what the data set's own file declares, Ducho's features come on top
        own = self.folder / f"{self.folder.name}.yaml"
        configs = [own, self.config] if own != self.config and own.is_file() else [self.config]
        command = [
            *("recbole-mm", "run", "--model=SASRecMM", f"--dataset={self.folder.name}"),
            f"--data_path={self.folder.parent}",
            f"--config_files={' '.join(map(str, configs))}",
        ]
        return [*lines, f"use it: {shlex.join(command)}"]


def import_dataset(
    layout: str, folder: Path | str, data_path: Path | str, *, name: str | None = None
) -> Imported:
    """Write ``data_path/name`` from a folder in the layout of another project.

    The new folder holds ``<name>.inter``, ``<name>.item`` if there are texts or categories, a
    feature file for each modality, and ``<name>.yaml``, which declares them; it appears whole or
    not at all. Ducho's layout has features only: they are added to a data set that is there.
    Splits of the layout are not taken over: here every data set has the same.

    Args:
        layout: One of :data:`LAYOUTS`.
        folder: Of that layout; nothing is written there.
        data_path: Made if it is not there.
        name: Of the data set; default: that of the files.

    Raises:
        InputError: If the layout is unknown, a file is missing or does not fit to the others, or
            the data set is there already (for Ducho: is not, or has the features).
        EnvironmentFault: If the disk says no.
    """
    check_choice("layout", layout, LAYOUTS)
    folder, data_path = Path(folder), Path(data_path)
    if not folder.is_dir():
        raise InputError(f"import: {folder} is no folder; give the one that holds the data set")
    source = _READERS[layout](folder)
    for modality, matrix in source.features.items():
        _check_matrix(modality, matrix)
    name = source.name if name is None else name
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"import: {name!r} is no plain folder name; give another with --name")
    target = data_path / name
    if not source.interactions:
        return _add_features(source, target, layout, folder)
    if target.exists():
        raise InputError(
            f"{target} is there already; move it away, or give another --name or --data_path"
        )
    for column in ("timestamp", "rating"):
        _check_numbers(column, source.interactions.get(column, ()), folder)
    items = dict.fromkeys(source.interactions["item_id"])
    with writing(target, _MEND), _beside(target) as made:
        write_text(made / f"{name}.inter", _atomic(source.interactions, _TYPES))
        columns = _columns_of_items(source, items)
        if columns:
            types = dict.fromkeys(columns, "token_seq") | {"item_id": "token"}
            text = _atomic({"item_id": list(items), **columns}, types)
            write_text(made / f"{name}.item", text)
        features = _write_features(source.features, made, items, layout)
        write_text(made / f"{name}.yaml", _config(layout, folder, columns, features, items))
        made.rename(target)
    return Imported(
        folder=target,
        config=target / f"{name}.yaml",
        users=len(set(source.interactions["user_id"])),
        items=len(items),
        interactions=len(source.interactions["item_id"]),
        features=features,
        notes=source.notes,
    )


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A hidden folder on the same disk, in which all is written before anything is named."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        (temporary / target.name).mkdir()
        yield temporary / target.name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _add_features(source: Source, target: Path, layout: str, folder: Path) -> Imported:
    """Write the features of a layout without interactions into a data set that is there."""
    name = target.name
    if not (target / f"{name}.inter").is_file():
        raise InputError(
            f"{target / name}.inter does not exist; {layout} holds features only: give the --name "
            "and --data_path of atomic files of yours"
        )
    items = dict.fromkeys(item_tokens(target, name))
    config = target / f"{layout}.yaml"
    for path in (config, *(target / f"{modality}.safetensors" for modality in source.features)):
        if path.exists():
            raise InputError(f"{path} is there already; move it away")
    with writing(target, _MEND), _beside(target) as made:
        features = _write_features(source.features, made, items, layout)
        write_text(made / config.name, _config(layout, folder, {}, features, items))
        declaration = made / config.name  # last: it says that the others are there
        _move_all([*sorted(set(made.iterdir()) - {declaration}), declaration], target)
    return Imported(target, config, 0, len(items), 0, features, source.notes)


def _move_all(paths: Sequence[Path], target: Path) -> None:
    """Move files into a folder that has none of their names: all, or none."""
    moved: list[Path] = []
    try:
        for path in paths:
            moved.append(target / path.name)
            path.rename(moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _check_matrix(modality: str, matrix: Matrix) -> None:
    """Refuse what no feature file of ours could hold, by the name of the file it came from."""
    check_name(modality)
    twice = [token for token, count in Counter(matrix.tokens).items() if count > 1]
    if twice:
        raise InputError(f"{matrix.source}: item {twice[0]!r} has two vectors; leave one")
    for part in row_chunks(*matrix.values.shape):
        # as the file would be written, in float32
        bad = (~matrix.values[part].float().isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise InputError(
                f"{matrix.source}: the vector of item {matrix.tokens[part.start + int(bad[0])]!r} "
                "holds NaN, Inf or what float32 cannot hold; write zeros there, which stand for an "
                "item without a vector"
            )


def _check_numbers(column: str, cells: Sequence[str], folder: Path) -> None:
    for cell in cells:
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        # Python reads 1_400 and ' 1', and readers of atomic files do not
        if not math.isfinite(number) or "_" in cell or cell != cell.strip():
            raise InputError(f"{folder}: {column} {cell!r} is not a number; mend the interactions")


def _columns_of_items(source: Source, items: Mapping[str, None]) -> dict[str, list[str]]:
    """Columns of ``.item``; an underscore stands for an empty cell."""
    return {
        column: [" ".join(held.get(item, "").split()) or "_" for item in items]
        for column, held in source.items.items()
    }


def _atomic(columns: Mapping[str, Sequence[str]], types: Mapping[str, str]) -> str:
    """Text of an atomic file."""

    def lines() -> Iterator[str]:
        yield "\t".join(f"{name}:{types[name]}" for name in columns)
        for cells in zip(*columns.values(), strict=True):
            for name, cell in zip(columns, cells, strict=True):
                if "\t" in cell or "\n" in cell or "\r" in cell or not cell:
                    raise InputError(f"import: {name} {cell!r} cannot stand in an atomic file")
            yield "\t".join(cells)

    return "\n".join(lines()) + "\n"


def _write_features(
    matrices: Mapping[str, Matrix], folder: Path, items: Mapping[str, None], layout: str
) -> dict[str, tuple[int, int, int]]:
    """Feature files of the canonical form; vectors, width and items with a vector of each."""
    written = {}
    for modality, matrix in matrices.items():
        present = matrix.present
        having = [matrix.tokens[row] for row in present.nonzero().flatten().tolist()]
        if not having:
            raise InputError(f"{matrix.source}: every vector is zero; extract them again")
        covered = sum(token in items for token in having)
        if covered == 0:
            raise InputError(
                f"{matrix.source}: no vector is that of an item. Names there: "
                f"{first_names(list(matrix.tokens)[:3])}; items: {first_names(list(items)[:3])}"
            )
        about = {"source": matrix.source.name, "source_sha256": sha256_of(matrix.source)}
        save_features(
            folder / f"{modality}.safetensors",
            matrix.values,
            matrix.tokens,
            present,
            {"layout": layout, **about},
        )
        written[modality] = len(having), matrix.values.shape[1], covered
    return written


def _config(
    layout: str,
    folder: Path,
    columns: Mapping[str, Sequence[str]],
    features: Mapping[str, tuple[int, int, int]],
    items: Mapping[str, None],
) -> str:
    """YAML that declares what was written."""
    lines = [f"# Written by `recbole-mm import {layout}` from {json.dumps(folder.resolve().name)}."]
    if "categories" in columns:
        lines += [
            "load_col:",
            "  inter: [user_id, item_id, timestamp]",
            "  item: [item_id, categories]",
            "category_field: categories",
        ]
    lines.append("modalities:")
    for modality, (_, _, covered) in features.items():
        share = int(100 * covered / len(items)) / 100
        low = f", min_coverage: {share}" if share < _MIN_COVERAGE else ""
        # quoted: YAML takes on and 1 for other things than names
        lines.append(f'  "{modality}": {{path: "{modality}.safetensors"{low}}}')
    texts = [column for column in columns if column != "categories"]
    if texts and "text" not in features:
        lines.append(f"  text: {{derive: text, fields: [{', '.join(texts)}]}}")
    if lines[-1] == "modalities:":
        lines[-1] = "modalities: {}  # there were none"
    return "\n".join(lines) + "\n"
