"""Processes killed at random instants of their training, and what becomes of their runs.

    python benchmarks/kill_and_resume.py > benchmarks/results/kill_and_resume.md

For each model: one run of the generated data set that nobody disturbs; then, ``--kills`` times, the
same run in a process of its own that gets SIGKILL at a random instant, is resumed, killed once more
in every third case, resumed again to its end, and compared with the undisturbed one: every weight,
the state of optimizer, random numbers and loader at the end, every number of ``metrics.jsonl`` and
``result.json`` but seconds. In half of the cases a checkpoint is written after every batch, in the
others before every epoch only, so that up to an epoch is done again.

With ``--tables``, so many times: ``recbole-mm compare`` of six rows and two seeds is killed at
random instants, and begun again until it is done; its files are compared with those of a compare
that nobody disturbed, byte for byte (what clocks decide stands in other files).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm import checkpoint, quick_start
from tests.compare.test_compare import SAME, epochs_done
from tests.compare.test_compare import contents as compared

VALUES = {
    "epochs": 4,
    "MAX_ITEM_LIST_LENGTH": 12,
    "hidden_size": 16,
    "inner_size": 32,
    "show_progress": False,
    "state": "ERROR",
    "use_gpu": False,  # on a GPU nothing is equal to the bit
}
OF_MODEL = {
    "MUFASA": {"train_batch_size": 256, "mfl_batch_items": 64},
    "CAMMSR": {"train_batch_size": 256},
    "MDSRec": {"train_batch_size": 256},
}
TABLE = [
    *("compare", "--models=SASRecFast,MUFASA,CAMMSR+causal,MDSRec,BPR,Pop", "--datasets=tiny"),
    *("--seeds=2", "--jobs=2", "--epochs=3", "--MAX_ITEM_LIST_LENGTH=10"),
]
SECONDS = ("train_seconds", "train_cpu_seconds", "valid_seconds", "valid_cpu_seconds")
# the parent has imported everything: a child starts at once
FORK = multiprocessing.get_context("fork")


def child(*arguments: object, **values: object) -> multiprocessing.Process:
    """``recbole_mm.run`` in a process of its own."""
    process = FORK.Process(target=quick_start.run, args=arguments, kwargs=values)
    process.start()
    return process


def start(model: str, where: Path, **values: object) -> multiprocessing.Process:
    config = {**VALUES, **OF_MODEL[model], "checkpoint_dir": str(where), **values}
    return child(model, "tiny", config_dict=config)


def folder_of(where: Path) -> Path | None:
    return next(iter(where.glob("*/*/*")), None)


def training_began(where: Path, process: multiprocessing.Process) -> Path:
    while process.is_alive():
        folder = folder_of(where)
        if folder is not None and (folder / "last.safetensors").is_file():
            return folder
        time.sleep(0.002)
    raise SystemExit(f"a run ended before its training began, exit code {process.exitcode}")


def kill(process: multiprocessing.Process, after: float) -> bool:
    """SIGKILL after so many seconds; whether the process was still there."""
    process.join(after)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive and process.exitcode == -signal.SIGKILL


def contents(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"], result["run"]
    return {
        "metrics": [{k: v for k, v in line.items() if k not in SECONDS} for line in lines],
        "result": result,
    }


def differing(first: Path, second: Path) -> list[str]:
    found = [k for k, v in contents(first).items() if v != contents(second)[k]]
    for name in ("model.safetensors", "last.safetensors"):
        one, two = load_file(first / name), load_file(second / name)
        found += sorted(set(one) ^ set(two))
        found += [k for k in one.keys() & two.keys() if not torch.equal(one[k], two[k])]
    return found


def undisturbed(model: str, where: Path) -> tuple[Path, float]:
    """A whole run, and how long its training took."""
    process = start(model, where)
    folder = training_began(where, process)
    began = time.perf_counter()
    process.join()
    return folder, time.perf_counter() - began


def disturbed(
    model: str, where: Path, case: int, longest: float, seen: Counter, instants: np.random.Generator
) -> Path:
    """A run that is killed, resumed, and by turns killed again."""
    every_batch = {"checkpoint_minutes": 0.0 if case % 2 else 10.0}
    process = start(model, where, **every_batch)
    folder = training_began(where, process)
    if not kill(process, instants.uniform(0, longest)):
        return folder  # it was faster than the undisturbed one
    position = checkpoint.read(folder / "last.safetensors").about["position"]
    seen["kills"] += 1
    seen["pre-training"] += position["stage"] != "training"
    seen["while writing"] += bool(list(folder.glob("*.tmp")))
    if case % 3 == 0:
        seen["kills"] += kill(child(resume=folder), instants.uniform(0, longest))
    process = child(resume=folder)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{model}: resuming {folder} gave exit code {process.exitcode}")
    return folder


def row(model: str, kills: int, instants: np.random.Generator) -> list:
    seen: Counter = Counter()
    with TemporaryDirectory() as scratch:
        reference, longest = undisturbed(model, Path(scratch) / "whole")
        case = 0
        while seen["runs"] < kills:
            case += 1
            before = seen["kills"]
            folder = disturbed(model, Path(scratch) / str(case), case, longest, seen, instants)
            if seen["kills"] == before:
                continue
            seen["runs"] += 1
            different = differing(reference, folder)
            seen["identical"] += not different
            print(f"{model} {seen['runs']} of {kills}: {different or 'identical'}", file=sys.stderr)
    return [
        model,
        *(seen[k] for k in ("runs", "kills", "pre-training", "while writing")),
        seen["identical"],
    ]


def compare_process(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "recbole_mm.cli", *TABLE, f"--out={out}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def killed_table(out: Path, instants: np.random.Generator) -> int:
    """A compare that is killed again and again until it is done before it; how often."""
    kills = 0
    while True:
        process = compare_process(out)
        goal = epochs_done(out) + int(instants.integers(0, 8))
        while process.poll() is None and epochs_done(out) < goal:
            time.sleep(0.02)
        time.sleep(float(instants.uniform(0, 3)))
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"compare in {out} gave exit code {process.returncode}")
            return kills
        process.kill()
        process.wait()
        kills += 1


def tables(n: int, instants: np.random.Generator) -> bool:
    """Print what became of ``n`` tables; whether all are those of an undisturbed compare."""
    rows = []
    with TemporaryDirectory() as scratch:
        quiet = Path(scratch) / "quiet"
        if compare_process(quiet).wait():
            raise SystemExit("the undisturbed compare failed")
        for number in range(1, n + 1):
            out = Path(scratch) / str(number)
            kills = killed_table(out, instants)
            found, expected = compared(out), compared(quiet)
            same = sum(found[file] == content for file, content in expected.items())
            rows.append([number, kills, f"{same} of {len(SAME)}"])
            print(f"table {number} of {n}: {kills} kills, {same} files equal", file=sys.stderr)
    print("\n# `compare` killed at random instants\n")
    print(
        tabulate(rows, headers=["table", "kills", "files equal byte for byte"], tablefmt="github")
    )
    return all(row[-1] == f"{len(SAME)} of {len(SAME)}" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="runs killed, of each model (20)")
    parser.add_argument("--tables", type=int, default=0, help="tables of compare killed (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    options = parser.parse_args()
    instants = np.random.default_rng(options.seed)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.tables and not tables(options.tables, instants):
        raise SystemExit(1)
    if not options.kills:
        return
    rows = [row(model, options.kills, instants) for model in OF_MODEL]
    headers = ["model", "runs killed", "kills in all", "of the first kills: in pre-training"]
    headers += ["while a file was being written", "runs that ended bit-identical"]
    print("# Runs killed at random instants\n")
    print(f"`python benchmarks/kill_and_resume.py --kills {options.kills}`\n")
    print(tabulate(rows, headers=headers, tablefmt="github"))
    print(
        f"\ntorch {torch.__version__}, Python {platform.python_version()}, CPU, one thread. "
        "A run counts as identical if every weight, the state of optimizer, random numbers and "
        "loader at its end, and every number of `metrics.jsonl` and `result.json` but seconds, "
        "equal those of a run that nobody disturbed."
    )
    if any(r[-1] != r[1] for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
