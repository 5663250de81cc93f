"""Side-by-side tables: many models, data sets and seeds under one protocol."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recbole_mm.compare import missing
from recbole_mm.compare.cells import Outcome, alone_in, execute
from recbole_mm.compare.plan import Cell, plan
from recbole_mm.compare.report import render
from recbole_mm.compare.tables import Table, protocol_of, shown, tabulate
from recbole_mm.compare.write import write_all, write_page
from recbole_mm.errors import EnvironmentFault, InputError, RecboleMMError
from recbole_mm.protocol import assert_comparable
from recbole_mm.run_folder import code_digest

__all__ = ["IncompleteTables", "Table", "compare"]


def compare(
    models: Sequence[str | type],
    datasets: Sequence[str],
    seeds: Sequence[int] | int = 1,
    *,
    out: str | Path = "compare",
    config_files: Sequence[str | Path] = (),
    config_dict: Mapping[str, Any] | None = None,
    command_line: Sequence[str] = (),
    tuned: str | Path | None = None,
    variants: str | Path | None = None,
    modality_ablation: bool = False,
    missing_modality: Mapping[str, Sequence[float]] | None = None,
    cold_start: float = 0.0,
    show: Sequence[str] = (),
    jobs: int = 1,
    threads: int = 1,
) -> list[Table]:
    """Train and score every model on every data set with every seed, and write the tables.

    Runs are kept below ``out/cells``: those that are finished, with the same configuration and
    data, are not run again, so that a call that was interrupted goes on where it was. A program
    that calls this needs ``if __name__ == "__main__"``, since the processes of the cells import it.

    Args:
        models: Names of models, with variants: ``MUFASA``, ``MUFASA+without_anchor``, ``MUFASA+*``,
            ``module:Class`` for one of the user's own; or classes that stand in a module.
        datasets: Names of data sets.
        seeds: The seeds, or how many of them, from that of the configuration on.
        out: Folder of runs and tables.
        config_files: YAML files for every run.
        config_dict: Values for every run; a variant is stronger.
        command_line: ``--key=value`` arguments for every run; a variant is stronger.
        tuned: Folder with ``<dataset>/<model>.yaml`` or ``<model>.yaml``, tuned configurations.
        variants: YAML file of named variants, ``name: {key: value}``.
        modality_ablation: Add a row for every other subset of the modalities of a row.
        missing_modality: By modality, percentages of the items for which it is hidden at test; a
            curve for each row that reads it.
        cold_start: Percentage of the items, the newest, that are left out of training; the tables
            get a column of them alone.
        show: Metrics of the tables; by default all at the cut-off that selects the epoch.
        jobs: Processes at a time.
        threads: Threads of each process.

    Returns:
        A table for each data set; the files are listed in :mod:`recbole_mm.compare.write`.

    Raises:
        InputError: A name, key or value is wrong.
        IncompleteTables: After the files of all other data sets are written: the runs of one do
            not share a protocol, or none of them is finished.
        EnvironmentFault: ``out`` is in use or cannot be written, or pyarrow is missing.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise EnvironmentFault(
            "compare keeps what each user got as parquet, which needs pyarrow: "
            "run `pip install recbole-mm[parquet]`"
        )
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    cells = plan(
        models,
        datasets,
        seeds,
        config_files=config_files,
        config_dict={**(config_dict or {}), **({"cold_items": cold_start} if cold_start else {})},
        command_line=command_line,
        tuned=tuned,
        variants=variants,
        modality_ablation=modality_ablation,
    )
    for cell in cells:  # before anything is trained for a table that cannot be made
        values = cell.values
        shown(values["metrics"], values["topk"], values["valid_metric"], show)
    missing.check(missing_modality or {}, cells)
    folder = Path(out).resolve()
    with alone_in(folder):
        with _Progress(cells) as progress:
            outcomes = execute(
                cells,
                folder,
                jobs=jobs,
                threads=threads,
                missing_modality=missing_modality or {},
                notify=progress.note,
                tick=progress.show_running,
            )
        tables, errors = tabulate(outcomes, show, missing_modality)
        write_all(tables, outcomes, folder)
        if tables:
            write_page(render(tables), folder)  # last: a chart cannot lose the tables
    if errors:
        raise IncompleteTables("; ".join(map(str, errors)), tables)
    return tables


class IncompleteTables(RecboleMMError):  # noqa: N818  (an outcome, with its tables)
    """Some data sets have no table.

    Attributes:
        tables: Those of the others, which are written.
    """

    def __init__(self, message: str, tables: list[Table]) -> None:
        super().__init__(message)
        self.tables = tables


class _Progress:
    """A bar over all cells on a terminal, and a line for each cell that ends."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._bar = tqdm(total=len(cells), unit="cell", disable=None, dynamic_ncols=True)
        self._done = 0
        self._total = len(cells)
        self._first: dict[str, Outcome] = {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def note(self, outcome: Outcome) -> None:
        """Say what became of a cell."""
        self._done += 1
        self._bar.update()
        cell = outcome.cell
        tqdm.write(f"[{self._done}/{self._total}] {cell.name}: {_said(outcome)}", sys.stdout)
        if outcome.record is None:
            return
        first = self._first.setdefault(cell.dataset, outcome)
        try:
            assert_comparable(protocol_of(first), protocol_of(outcome))
        except InputError as error:
            tqdm.write(f"    will not go into a table with {first.cell.name}: {error}", sys.stdout)
        sys.stdout.flush()

    def show_running(self, running: Sequence[tuple[Cell, Path]]) -> None:
        """Show the epoch of each cell that runs."""
        if self._bar.disable:
            return
        parts = []
        for cell, folder in running:
            lines = [
                file.read_bytes().count(b"\n") for file in folder.glob("run/*/*/*/metrics.jsonl")
            ]
            parts.append(f"{cell.row.label} {cell.seed}: epoch {sum(lines)}")
        self._bar.set_postfix_str(", ".join(parts))


def _said(outcome: Outcome) -> str:
    if outcome.record is None:
        return f"failed: {outcome.error}"
    result, cost = outcome.record["result"], outcome.record["cost"]
    metric = result["protocol"]["valid_metric"].lower()
    valid = (result["best_valid_result"] or {}).get(metric, float("nan"))
    text = (
        f"{metric} valid {valid:.4f}, test {result['test_result'][metric]:.4f}, best epoch "
        f"{result['best_epoch'] + 1} of {result['epochs']}, {cost['cpu_seconds']:.0f} CPU s"
    )
    if outcome.is_new:
        return text
    other = outcome.record.get("code") != code_digest()
    return f"{text} (already finished{', by another source of recbole_mm' if other else ''})"
