"""The cells of a table: which models, data sets and seeds, and what identifies each of them.

A row of a table is a model, perhaps with variants: ``MUFASA``, ``MUFASA+without_anchor``,
``MUFASA+*`` (every ablation file of the package), ``MUFASA[text]`` (what ``modality_ablation``
adds), ``module:Class`` for a class of the user's own. A cell is a row, a data set and a seed. It is
known by a hash of its resolved configuration, of the data files and of the code of a user's class,
so that a finished one is found again and a changed one is not mistaken for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_mm.config import (
    NO_NUMBERS,
    PROPERTIES,
    Config,
    choose,
    digest_of_data,
    key_of,
    reads_features,
    reusable,
)
from recbole_mm.config_rules import drawing_mode
from recbole_mm.errors import InputError, nearest
from recbole_mm.plain_yaml import parse_value, read_yaml
from recbole_mm.registry import MODELS, class_name, code_of, is_own, name_of

BASELINES_OF_OURS = ("SASRecFast", "SASRecMM")
"""Models of this package that are baselines in any table."""

# what rows of one table have alike, whatever model they are of
_SHARED = (
    *("mask_history", "metrics", "topk", "valid_metric", "metric_decimal_place", "eval_args"),
    *("val_interval", "filter_inter_by_user_or_item", "cold_items", "benchmark_filename"),
    *("user_inter_num_interval", "item_inter_num_interval", "rm_dup_inter"),
)

_RESERVED = {
    "model": "name models in --models",
    "dataset": "name data sets in --datasets",
    "seed": "use --seeds, a number of seeds or a list such as 2020,2021,2022",
    "checkpoint_dir": "use --out",
    "save_per_user": "compare always saves what each user got",
    "show_progress": "compare shows the progress over all cells",
}
_FIXED = {"show_progress": False, "save_per_user": True}
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table.

    Attributes:
        label: As it stands in the table.
        model: Name of the model; ``module:Class`` for one of the user's own.
        values: Configuration of its variants.
        expanded: Whether it comes from a wildcard; then it gives way to a row that equals it.
    """

    label: str
    model: str
    values: Mapping[str, Any] = field(default_factory=dict)
    expanded: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether others are measured against it: RecBole's models and the plain ones of ours."""
        is_recboles = self.model not in MODELS and not is_own(self.model)
        return is_recboles or self.model in BASELINES_OF_OURS


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a table.

    Attributes:
        row: Row of the table.
        dataset: Name of the data set.
        seed: Seed of the run.
        values: The resolved configuration, as another ``Config`` takes it: a file that changes
            while compare is at work changes nothing.
        key: Hash of the configuration and of the data files.
        data: Hash of the data files alone.
        code: Hashes of the files of a user's class.
        tuned: Whether a file of ``--tuned`` is part of the configuration.
    """

    row: Row
    dataset: str
    seed: int
    values: Mapping[str, Any]
    key: str
    data: str
    code: str = ""
    tuned: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.row.label} on {self.dataset}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the cell is kept, relative to ``cells`` of the output folder."""
        return Path(self.dataset) / self.row.label / f"{self.seed}-{self.key}"


def plan(
    models: Sequence[str | type],
    datasets: Sequence[str],
    seeds: Sequence[int] | int,
    *,
    config_files: Sequence[str | Path] = (),
    config_dict: Mapping[str, Any] | None = None,
    command_line: Sequence[str] = (),
    tuned: str | Path | None = None,
    variants: str | Path | None = None,
    modality_ablation: bool = False,
) -> list[Cell]:
    """All cells of the tables, those of the first seed first.

    Args:
        models: Rows, see the module; a class of the user's own stands for its name.
        datasets: Names.
        seeds: The seeds, or how many: that of the configuration and those that follow it.
        config_files: YAML files for every cell.
        config_dict: Values for every cell; weaker than a row's variants.
        command_line: ``--key=value`` arguments for every cell; weaker than a row's variants, which
            are what sets the row apart, and stronger than all else.
        tuned: Folder of tuned configurations, ``<dataset>/<model>.yaml`` or ``<model>.yaml``;
            weaker than ``config_dict``. A model without a file keeps its defaults.
        variants: YAML file of named variants, ``name: {key: value}``, that ``MODEL+name`` finds
            before those of the package.
        modality_ablation: Add a row for every other subset of modalities of each row that reads
            any.

    Raises:
        InputError: If a name, key or value is wrong, or two rows are the same.
    """
    _check_command_line(command_line)
    for option, names in (("models", models), ("datasets", datasets)):
        if not names:
            raise InputError(f"--{option}: name at least one")
    if len(set(datasets)) < len(datasets):
        raise InputError(f"--datasets: {', '.join(datasets)}; name each data set once")
    named = _read_variants(variants)
    specs = [spec if isinstance(spec, str) else name_of(spec) for spec in models]
    rows = [row for spec in specs for row in _rows(spec, named)]
    _check_labels(rows)
    by_seed: dict[int, list[Cell]] = {}
    for dataset in datasets:
        taken: dict[str, tuple[Row, Config]] = {}
        common = _Common(
            dataset,
            config_files,
            config_dict or {},
            _with_data_path_that_holds(dataset, datasets, command_line),
            None if tuned is None else Path(tuned),
        )
        for row in rows:
            for variant, config in common.resolve_all(row, modality_ablation=modality_ablation):
                _enter(variant, config, taken)
        for row, config in taken.values():
            is_tuned = bool(_tuned_file(common.tuned, row, dataset))
            for number, cell in enumerate(_cells(row, config, seeds, is_tuned=is_tuned)):
                by_seed.setdefault(number, []).append(cell)
    cells = [cell for number in sorted(by_seed) for cell in by_seed[number]]
    _check_drawn_candidates(cells)
    _check_one_protocol(cells)
    if tuned is not None and not any(
        _tuned_file(Path(tuned), row, dataset) for row in rows for dataset in datasets
    ):
        raise InputError(
            f"--tuned: {tuned} has no file for any row; it should hold <dataset>/<model>.yaml"
        )
    for key in map(key_of, command_line):
        if not any(key in cell.values for cell in cells):
            raise InputError(f"command line: --{key}: no row of the table reads it; leave it out")
    return cells


def _check_labels(rows: Sequence[Row]) -> None:
    """Refuse two models whose rows would be called the same."""
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row.label, row).model
        if other != row.model:
            raise InputError(
                f"--models: {other} and {row.model} would both be called {row.label} in the table; "
                "give the class of your own another name"
            )


def _check_drawn_candidates(cells: Sequence[Cell]) -> None:
    """Refuse rows that RecBole would rank among other candidates, before they are trained."""
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        drawn: dict[bool, Cell] = {}
        for cell in cells:
            if cell.dataset == dataset and drawing_mode(cell.values) is not None:
                drawn.setdefault(bool(cell.values["repeatable"]), cell)
        if len(drawn) == 2:
            raise InputError(
                f"{drawn[True].row.label} and {drawn[False].row.label} cannot share a table of "
                f"{dataset}: RecBole draws items of a user's past as candidates for the one and "
                "not for the other; rank the whole catalogue, eval_args: {mode: full}"
            )


def _check_one_protocol(cells: Sequence[Cell]) -> None:
    """Refuse rows of which a variant, or a file of ``--tuned``, sets how they are evaluated."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.dataset, cell)
        for key in _SHARED:
            one, two = other.values.get(key), cell.values.get(key)
            if one != two:
                raise InputError(
                    f"{other.row.label} and {cell.row.label} cannot share a table of "
                    f"{cell.dataset}: {key} is {one!r} for the one and {two!r} for the other; set "
                    f"it for all rows, --{key}=..., or give them a compare each"
                )


def _cells(
    row: Row, config: Config, seeds: Sequence[int] | int, *, is_tuned: bool
) -> Iterator[Cell]:
    """The cells of a row."""
    first = int(config["seed"])
    chosen = list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"--seeds: {seeds!r}; name each seed once, or how many (at least 1)")
    for seed in chosen:
        if not 0 <= seed < 2**32:
            raise InputError(f"--seeds: a seed must lie in [0, 2 ** 32), got {seed}")
    if "labeled" in config["eval_args"]["mode"].values():
        raise InputError(
            f"{row.label}: eval_args: mode labeled has no ranking, and a table is about what each "
            "user got in one; compare such models with recbole-mm run"
        )
    values, data = reusable(config.resolved()), digest_of_data(config)
    # of the package's own code a table says below which one computed its rows
    code = code_of(config.model_class)
    for seed in chosen:
        key = _hash(_settings(config, seed) + data + code)
        yield Cell(
            row, config["dataset"], seed, {**values, "seed": seed}, key, data, code, is_tuned
        )


@dataclass(frozen=True)
class _Common:
    """What all rows of a data set share."""

    dataset: str
    config_files: Sequence[str | Path]
    config_dict: Mapping[str, Any]
    command_line: Sequence[str]
    tuned: Path | None

    def resolve_all(self, row: Row, *, modality_ablation: bool) -> Iterator[tuple[Row, Config]]:
        """The row, and those of its other modalities if they are asked for."""
        config = self.resolve(row)
        yield row, config
        if modality_ablation and reads_features(config):
            for subset in _subsets(row, config):
                yield subset, self.resolve(subset)

    def resolve(self, row: Row) -> Config:
        files = (*self.config_files, *_tuned_file(self.tuned, row, self.dataset))
        own = dict(row.values)
        try:
            if isinstance(own.get("eval_args"), Mapping):  # a part of them leaves the rest
                given = {key_of(a): a.partition("=")[2] for a in self.command_line}
                for_all = parse_value(given.get("eval_args", "{}"))
                own["eval_args"] = {
                    **(for_all if isinstance(for_all, Mapping) else {}),
                    **own["eval_args"],
                }
            if isinstance(own.get("modalities"), list):  # which of those that are declared
                declared = self._config(row, files, {**own, "modalities": None})["modalities"]
                own["modalities"] = choose(declared, own["modalities"])
            return self._config(row, files, own)
        except InputError as error:
            raise InputError(f"{row.label} on {self.dataset}: {error}") from error

    def _config(self, row: Row, files: Sequence[str | Path], own: Mapping[str, Any]) -> Config:
        """The configuration of a row; what it has of its own is stronger than all else."""
        own = {key: value for key, value in own.items() if value is not None or key != "modalities"}
        values = {**self.config_dict, **own, **_FIXED}
        for_all = [argument for argument in self.command_line if key_of(argument) not in own]
        return Config(row.model, self.dataset, files, values, for_all, shared=True)


def _check_command_line(command_line: Sequence[str]) -> None:
    for key in map(key_of, command_line):
        if key in _RESERVED:
            raise InputError(f"command line: --{key} is not for compare: {_RESERVED[key]}")


def _with_data_path_that_holds(
    dataset: str, datasets: Sequence[str], command_line: Sequence[str]
) -> list[str]:
    """The command line; without ``data_path`` for a shipped data set beside others that are there.

    A ``data_path`` that holds none of the data sets is a mistake, and stays.
    """
    kept = []
    for argument in command_line:
        key, _, value = argument.removeprefix("--").partition("=")
        holds_another = any((Path(value) / other).is_dir() for other in datasets)
        if key != "data_path" or (Path(value) / dataset).is_dir() or not holds_another:
            kept.append(argument)
            continue
        try:
            Config("Pop", dataset)
        except InputError:
            kept.append(argument)  # the message will name the folder that was given
    return kept


# ------------------------------------------------------------------------------ rows


def _read_variants(file: str | Path | None) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    named = read_yaml(Path(file))
    for name, values in named.items():
        if not isinstance(values, dict) or not _NAME.fullmatch(name):
            raise InputError(
                f"{file}: {name!r} must be a plain name and hold a mapping of keys to values"
            )
        for key in values:
            if key in _RESERVED:
                raise InputError(f"{file}: {name}: {key} is not for one row: {_RESERVED[key]}")
    return named


def _rows(spec: str, named: Mapping[str, dict[str, Any]]) -> Iterator[Row]:
    """Rows of one entry of ``--models``."""
    model, *variants = spec.split("+")
    name = class_name(model)
    folder = PROPERTIES / "ablation" / name
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if variants == ["*"]:
        if not shipped and not named:
            raise InputError(f"--models: {spec}: the package has no ablations of {model}")
        yield Row(name, model, expanded=True)
        for variant in (*named, *(variant for variant in shipped if variant not in named)):
            found = named[variant] if variant in named else read_yaml(shipped[variant])
            yield Row(f"{name}+{variant}", model, found, expanded=True)
        return
    values: dict[str, Any] = {}
    for variant in variants:
        known = {*named, *shipped}
        if variant not in known:
            raise InputError(
                f"--models: {spec}: no variant {variant!r}{nearest(variant, known)}; known: "
                f"{', '.join(sorted(known)) or 'none'}; name others in a file for --variants"
            )
        values.update(named[variant] if variant in named else read_yaml(shipped[variant]))
    yield Row("+".join([name, *variants]), model, values)


def _subsets(row: Row, config: Config) -> Iterator[Row]:
    """The row with every other subset of its modalities, the largest first."""
    names = list(config["modalities"])
    for size in range(len(names) - 1, -1, -1):
        for subset in itertools.combinations(names, size):
            values = {**row.values, "modalities": list(subset)}
            yield Row(f"{row.label}[{','.join(subset)}]", row.model, values, expanded=True)


def _enter(row: Row, config: Config, taken: dict[str, tuple[Row, Config]]) -> None:
    """Enter a row by its configuration; of equal ones the one that was asked for by its name.

    Raises:
        InputError: If both were.
    """
    key = _settings(config, 0)
    first, _ = taken.setdefault(key, (row, config))
    if first is row or row.expanded:
        return
    if not first.expanded:
        raise InputError(
            f"--models: {row.label} is the same as {first.label} on {config['dataset']}: its "
            "variant sets nothing new; remove one of them"
        )
    taken[key] = (row, config)


def _tuned_file(tuned: Path | None, row: Row, dataset: str) -> tuple[str, ...]:
    if tuned is None:
        return ()
    if not tuned.is_dir():
        raise InputError(f"--tuned: {tuned} is no folder")
    file = f"{class_name(row.model)}.yaml"
    places = (tuned / dataset / file, tuned / file)
    for path in places:
        if path.is_file():
            for key in read_yaml(path):
                if key in _RESERVED and key not in ("model", "dataset"):
                    raise InputError(f"{path}: {key} is not for one row: {_RESERVED[key]}")
            return (str(path),)
    return ()


# ------------------------------------------------------------------------------ keys


def _settings(config: Config, seed: int) -> str:
    values = {k: v for k, v in config.resolved().items() if k not in NO_NUMBERS}
    values["seed"] = seed
    if not reads_features(config):
        del values["modalities"]
    return _hash(json.dumps(values, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
