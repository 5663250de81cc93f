"""Running the cells of a table: each in a process of its own, none twice.

A cell that was killed half-way goes on from its last checkpoint, or starts again.

The folder of a cell holds a run folder below ``run/``, with ``per_user.npz`` in it, and

==================  =====================================================================
``cell.json``       written last: the cell is finished, and will not run again
``error.json``      why it failed; it starts anew in the next compare
``missing.json``    test results with a modality missing, if they were asked for
``output.log``      what its process printed
==================  =====================================================================
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from recbole_mm import __version__
from recbole_mm.compare import missing
from recbole_mm.compare.plan import Cell
from recbole_mm.distributed import end_with_parent
from recbole_mm.errors import EnvironmentFault, InputError, RecboleMMError
from recbole_mm.files import alone, read_json, write_text
from recbole_mm.run_folder import STATE, code_digest, processor

_LOG = logging.getLogger(__name__)

RECORD = "cell.json"
ERROR = "error.json"
_OF_A_RUN = ("per_user.npz", "environment.json")  # what tables and report read of it
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: The cell.
        folder: Its folder, absolute.
        record: Contents of ``cell.json``; ``None`` if it failed.
        error: Why it failed.
        is_new: Whether it ran just now.
    """

    cell: Cell
    folder: Path
    record: Mapping[str, Any] | None
    error: str | None = None
    is_new: bool = False

    def has(self, missing_modality: missing.Wanted) -> bool:
        """Whether nothing is left to do: the cell is finished, and so is all else that is wanted.

        Args:
            missing_modality: What else is to be measured.
        """
        if self.record is None or not self.counts.is_file():
            return False
        return not any(missing.still_to_do(self.folder, self.record, missing_modality))

    @property
    def counts(self) -> Path:
        """Where the interactions of each user and item are counted, for all cells of a split."""
        if self.record is None:
            raise InputError(f"{self.cell.name} has no counts: {self.error}")
        return _counts_file(self.folder.parents[3], self.record["result"]["protocol"])

    @property
    def run(self) -> Path:
        """The run folder of a finished cell."""
        if self.record is None:
            raise InputError(f"{self.cell.name} has no run: {self.error}")
        return self.folder / str(self.record["run"])


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other compares out of the folder; the system frees it when the process ends.

    Raises:
        EnvironmentFault: If another compare is at work there, or it cannot be written.
    """
    busy = f"{out}: another compare is at work there; wait for it or choose another --out"
    with alone(out / ".lock", "choose another --out", EnvironmentFault(busy)):
        yield


def execute(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int,
    threads: int,
    missing_modality: missing.Wanted,
    notify: Callable[[Outcome], None],
    tick: Callable[[Sequence[tuple[Cell, Path]]], None],
) -> list[Outcome]:
    """Run every cell that is not finished, ``jobs`` at a time; a failed one stops no other.

    Args:
        cells: The plan.
        out: Output folder, held by :func:`alone_in`; cells live in its subfolder ``cells``.
        jobs: Processes at a time. The memory of a cell ends with its process.
        threads: Torch and BLAS threads of each process.
        missing_modality: What else to measure of each cell, see :mod:`recbole_mm.compare.missing`.
        notify: Called with each outcome, as it is known.
        tick: Called every few seconds with the cells that run, and their folders.

    Returns:
        One outcome for each cell, in the order of the plan.
    """
    outcomes: dict[Cell, Outcome] = {}
    waiting: list[Cell] = []
    for cell in cells:
        found = read_outcome(cell, out)
        if found is not None and found.has(missing_modality):
            outcomes[cell] = found
            notify(found)
        else:
            waiting.append(cell)
    options = (out, threads, missing_modality)
    for outcome in _run_all(waiting, options, jobs=jobs, tick=tick):
        outcomes[outcome.cell] = outcome
        notify(outcome)
    return [outcomes[cell] for cell in cells]


def read_outcome(cell: Cell, out: Path, *, is_new: bool = False) -> Outcome | None:
    """What the folder of a cell says, or ``None`` if it is neither finished nor failed."""
    folder = out / "cells" / cell.folder
    if (folder / RECORD).is_file():
        try:
            outcome = Outcome(cell, folder, read_json(folder / RECORD), is_new=is_new)
            missing_files = [n for n in _OF_A_RUN if not (outcome.run / n).is_file()]
        except (ValueError, KeyError) as fault:
            missing_files = [f"{RECORD} that can be read ({fault})"]
        if not missing_files:
            return outcome
        _LOG.warning("%s: run again, since its folder lacks %s", cell.name, missing_files[0])
        shutil.rmtree(folder)
        return None
    if (folder / ERROR).is_file():
        error = read_json(folder / ERROR)["message"]
        return Outcome(cell, folder, None, error, is_new=is_new)
    return None


def _run_all(
    waiting: list[Cell],
    options: tuple[Path, int, missing.Wanted],
    *,
    jobs: int,
    tick: Callable[[Sequence[tuple[Cell, Path]]], None],
) -> Iterator[Outcome]:
    context, out = _context(), options[0]
    queue = list(waiting)
    running: dict[Any, tuple[Cell, Any]] = {}
    try:
        while queue or running:
            while queue and len(running) < jobs:
                cell = queue.pop(0)
                process = context.Process(target=work, args=(cell, *options), name=cell.name)
                process.start()
                running[process.sentinel] = (cell, process)
            for sentinel in wait(list(running), timeout=_POLL_SECONDS):
                cell, process = running.pop(sentinel)
                process.join()
                yield _outcome_of(cell, out, process.exitcode)
            tick([(cell, out / "cells" / cell.folder) for cell, _ in running.values()])
    finally:
        for _, process in running.values():
            process.kill()
        for _, process in running.values():
            process.join()


def _outcome_of(cell: Cell, out: Path, code: int) -> Outcome:
    found = read_outcome(cell, out, is_new=True)
    if found is not None:
        return found
    reason = f"its process ended with exit code {code}"
    if code < 0:
        reason = f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
        if -code == signal.SIGKILL:
            reason += "; if nobody did, the machine ran out of memory: use fewer --jobs"
    return Outcome(cell, out / "cells" / cell.folder, None, reason, is_new=True)


def _context() -> Any:
    """Processes that come with torch and RecBole imported, where the system can do so."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["recbole_mm.compare.users", "recbole_mm.compare.cells"])
    return context


# ------------------------------------------------------------------------ in the process of a cell


def work(cell: Cell, out: Path, threads: int, missing_modality: missing.Wanted) -> None:
    """Run a cell, in a process of its own; leaves ``cell.json`` or ``error.json``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    end_with_parent()
    folder = out / "cells" / cell.folder
    if (folder / ERROR).is_file() and not (folder / RECORD).is_file():
        shutil.rmtree(folder)  # it starts anew
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    try:
        _limit_threads(threads)
        if not (folder / RECORD).is_file():
            _check_data(cell)
            trained = _train(cell, out, threads)
            _check_data(cell)
            write_json(folder / RECORD, trained)
            # not before: a kill in between would cost the whole training
            (folder / trained["run"] / STATE).unlink(missing_ok=True)
        record = read_json(folder / RECORD)
        _count(cell, out, record)
        _measure_missing(cell, folder, record, missing_modality)
        (folder / ERROR).unlink(missing_ok=True)  # of what came after an earlier training
    except RecboleMMError as error:
        write_json(folder / ERROR, {"message": str(error)})
    except Exception as error:
        traceback.print_exc()
        write_json(
            folder / ERROR,
            {"message": f"{type(error).__name__}: {error}; see {folder / 'output.log'}"},
        )


def _check_data(cell: Cell) -> None:
    """The files that are read must be those that the key of the cell tells of."""
    from recbole_mm.config import Config, digest_of_data
    from recbole_mm.registry import code_of, get_model

    if code_of(get_model(cell.row.model)) != cell.code:
        raise InputError(
            f"the code of {cell.row.model} has changed since compare began; give the command again"
        )
    if digest_of_data(Config(cell.row.model, cell.dataset, [cell.values])) != cell.data:
        raise InputError(
            f"the files of {cell.dataset} have changed since compare began; give the command again"
        )


def _train(cell: Cell, out: Path, threads: int) -> dict[str, Any]:
    folder = out / "cells" / cell.folder
    started, cpu = time.perf_counter(), time.process_time()
    result, earlier_wall, earlier_cpu = _start_or_continue(cell, folder)
    cost = {
        "wall_seconds": round(time.perf_counter() - started + earlier_wall, 2),
        "cpu_seconds": round(time.process_time() - cpu + earlier_cpu, 2),
        "peak_memory_mb": peak_memory_mb(),
        "gpu_memory_mb": _gpu_memory_mb(),
        "threads": threads,
        "processor": processor(),
    }
    run_folder = Path(result.pop("run"))
    _explain(cell, run_folder)
    return {
        "label": cell.row.label,
        "model": cell.row.model,
        "dataset": cell.dataset,
        "seed": cell.seed,
        "key": cell.key,
        "version": __version__,
        "code": code_digest(),
        "run": str(run_folder.relative_to(folder)),
        "result": result,
        "cost": cost,
    }


def _start_or_continue(cell: Cell, folder: Path) -> tuple[dict[str, Any], float, float]:
    """The result of the cell's run; one that was killed goes on, if the code is the same.

    Returns:
        The result, and the wall and CPU seconds of the epochs before this process.
    """
    from recbole_mm.quick_start import run

    for state in sorted((folder / "run").glob(f"*/*/*/{STATE}")):
        made = read_json(state.parent / "environment.json")
        if made.get("code") == code_digest():
            try:
                earlier = _seconds(state.parent / "metrics.jsonl")
                return run(_own(cell), resume=state.parent), *earlier
            except InputError as error:
                print(error)  # noqa: T201  (into output.log)
    shutil.rmtree(folder / "run", ignore_errors=True)
    values = {"checkpoint_dir": str(folder / "run")}
    return run(cell.row.model, cell.dataset, [cell.values], values), 0.0, 0.0


def _seconds(epochs: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the epochs in a file."""
    text = epochs.read_text(encoding="utf-8") if epochs.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    notes = [json.loads(line) for line in whole.splitlines()]
    wall, cpu = (
        sum(note.get(f"{part}_{clock}", 0.0) for note in notes for part in ("train", "valid"))
        for clock in ("seconds", "cpu_seconds")
    )
    return wall, cpu


def _explain(cell: Cell, run_folder: Path) -> None:
    """Let a model that can tell something of itself do so; the cell does not depend on it."""
    from recbole_mm.quick_start import explain_run
    from recbole_mm.registry import get_model

    if hasattr(get_model(cell.row.model), "explain"):
        try:
            explain_run(run_folder, model=_own(cell))
        except Exception:
            traceback.print_exc()  # into output.log


def _count(cell: Cell, out: Path, record: Mapping[str, Any]) -> None:
    """Write what the split of a cell holds of each user and item, if nobody has."""
    from recbole_mm.compare.users import counts_of

    file = _counts_file(out, record["result"]["protocol"])
    if not file.is_file():
        frame = counts_of(cell.row.model, cell.dataset, cell.values)
        file.parent.mkdir(exist_ok=True)
        write_text(file, frame.to_csv(index=False), shared=True)  # cells of other models too


def _own(cell: Cell) -> str | None:
    """The name of a class of the user's own, which a run folder does not hold."""
    from recbole_mm.registry import is_own

    return cell.row.model if is_own(cell.row.model) else None


def _measure_missing(
    cell: Cell, folder: Path, record: Mapping[str, Any], wanted: missing.Wanted
) -> None:
    found = missing.read(folder)
    for name, percent in missing.still_to_do(folder, record, wanted):
        result = missing.measure(folder / record["run"], name, percent, model=_own(cell))
        found.setdefault(name, {})[f"{percent:g}"] = result
        write_json(folder / missing.FILE, found)


def _counts_file(out: Path, protocol: Mapping[str, Any]) -> Path:
    """A file for each way that interactions are split."""
    split = "-".join(str(protocol[part]) for part in ("train", "valid", "test"))
    return out / "data" / f"{split}.csv"


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process in MiB, where the system tells it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024), 1)


def _gpu_memory_mb() -> float | None:
    """Most memory of a GPU that torch held at a time, in MiB; ``None`` if it used none."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _limit_threads(threads: int) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
