"""What a training step costs with and without ``recbole_mm.allocator.keeping_freed_memory``.

    python benchmarks/freed_memory.py --dataset=ml-100k-mm --models SASRec SASRecF GRU4Rec MUFASA

Each measurement is a process of its own with one thread; those with it and those without take
turns. A step is one of ``epoch_time.py``. A run of a model of RecBole has it, others do not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.epoch_time import Contender
from recbole_mm.allocator import keeping_freed_memory


def measure(args: argparse.Namespace, keys: list[str]) -> None:
    """Print what the steps of this process have cost, as JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    contender = Contender(args, args.length, args.models[0], keys)
    with keeping_freed_memory() if args.kept else nullcontext():
        for _ in range(3):
            contender.step()
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(args.steps):
            contender.step()
        after = resource.getrusage(resource.RUSAGE_SELF)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            {
                "ms": 1000 * took / args.steps,
                "kernel_ms": 1000 * (after.ru_stime - before.ru_stime) / args.steps,
                "peak": after.ru_maxrss / 2**10,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k-mm")
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--models", nargs="+", default=["SASRec", "GRU4Rec", "MUFASA"])
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2048, help="of a batch of prefixes")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kept", type=int, help=argparse.SUPPRESS)  # of one measurement
    args, keys = parser.parse_known_args()
    if args.kept is not None:
        measure(args, keys)
        return
    print(f"### {args.dataset}\n\n{datetime.date.today()}, torch {torch.__version__}, one thread,")
    print(f"load average at the start {os.getloadavg()[0]:.1f}; {' '.join(keys)}\n")
    print("| model | CPU ms a step | of them the kernel | peak, MiB | kept: CPU ms | ", end="")
    print("of them the kernel | peak, MiB | ratio |\n|---|---|---|---|---|---|---|---|", flush=True)
    for model in args.models:
        found: tuple[list[dict[str, float]], ...] = ([], [])
        for _ in range(args.rounds):
            for kept in (0, 1):
                command = [sys.executable, *sys.argv, f"--kept={kept}", "--models", model]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[kept].append(json.loads(done.stdout.splitlines()[-1]))
        (ms, *rest), (kept_ms, *kept_rest) = (
            [statistics.median(one[key] for one in side) for key in ("ms", "kernel_ms", "peak")]
            for side in found
        )
        values = [ms, *rest, kept_ms, *kept_rest]
        print(f"| {model} | {' | '.join(f'{v:,.0f}' for v in values)} | {kept_ms / ms:.2f} |")


if __name__ == "__main__":
    main()
