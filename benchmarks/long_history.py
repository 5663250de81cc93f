"""MUFASA with histories of up to 8,192 items: time and memory, batch of one.

    python benchmarks/long_history.py [--lengths 1024 2048 4096 8192] [--max_gb 8]

Random users with 8,200 interactions each, 5,000 items with random text and image vectors. Every
length runs in a process of its own and passes through the whole product: atomic files, loader,
RecBole's loaders, one training epoch at all positions, evaluation of the last position. The script
exits with 1 where a process exceeds ``--max_gb``.

Seconds are of the processor, one thread; memory is the largest resident set of the process, and how
much of it was there before the first step (imports, data, features).
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

N_USERS, N_ITEMS, HISTORY, WIDTH = 8, 5_000, 8_200, 64


def write_data(folder: Path) -> None:
    """A data set ``long`` in RecBole's atomic form, with two feature matrices."""
    rng = np.random.default_rng(0)
    (folder / "long").mkdir()
    with (folder / "long" / "long.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user in range(N_USERS):
            for step, item in enumerate(rng.integers(0, N_ITEMS, HISTORY)):
                file.write(f"u{user}\ti{item}\t{step}\n")
    with (folder / "long" / "long.item").open("w") as file:
        file.write("item_id:token\n" + "".join(f"i{item}\n" for item in range(N_ITEMS)))
    for name in ("text", "image"):
        np.save(folder / "long" / f"{name}.npy", rng.standard_normal((N_ITEMS, WIDTH), np.float32))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(folder: str, length: int) -> None:
    from recbole.data import data_preparation
    from recbole.utils import init_seed

    from recbole_mm.config import Config
    from recbole_mm.data.create import create_dataset

    torch.set_num_threads(1)
    modalities = {
        name: {"path": f"{name}.npy", "ids": "{dataset}.item"} for name in ("text", "image")
    }
    values = {
        "data_path": folder,
        "MAX_ITEM_LIST_LENGTH": length,
        "train_batch_size": 1,
        "eval_batch_size": 1,
        "block_size": 64,  # near the square root of the longest history
        "modalities": modalities,
        "show_progress": False,
        "use_gpu": False,  # CPU seconds are what it prints
    }
    config = Config("MUFASA", "long", None, values, [])
    init_seed(1, True)
    train, _, test = data_preparation(config, create_dataset(config))
    model = config.model_class(config, train._dataset)
    optimizer = torch.optim.Adam(model.parameters())
    before = peak_mb()

    model.train()
    positions, started = 0, time.process_time()
    for batch in train:
        optimizer.zero_grad()
        torch.stack(model.calculate_loss(batch)).sum().backward()
        optimizer.step()
        positions += int(batch["item_length"].sum())
    trained = time.process_time() - started
    model.eval()
    with torch.no_grad():
        model.scoring_table()
        started = time.process_time()
        for batch, *_ in test:
            scores = model.full_sort_predict(batch)
        evaluated = time.process_time() - started
    if not torch.isfinite(scores[:, 1:]).all():
        raise SystemExit(f"scores at length {length} are not finite")
    print(
        json.dumps(
            {
                "steps": len(train),
                "step": trained / len(train),
                "microseconds": 1e6 * trained / positions,
                "user": evaluated / len(test),
                "before": before,
                "peak": peak_mb(),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--max_gb", type=float, default=8.0)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]))
        return
    print(f"# MUFASA with long histories, batch of one\n\n{datetime.date.today()}, one thread, ")
    print(f"torch {torch.__version__}; `python benchmarks/long_history.py`\n")
    print(
        "| L | steps | CPU s a training step | CPU µs a position | CPU ms to score a user | "
        "peak MB | before the first step, MB |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    too_large = []
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for length in args.lengths:
            command = [sys.executable, __file__, "--worker", folder, str(length)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {length} | {row['steps']} | {row['step']:.2f} | {row['microseconds']:.0f} | "
                f"{1000 * row['user']:.1f} | {row['peak']:.0f} | {row['before']:.0f} |",
                flush=True,
            )
            if row["peak"] > 1024 * args.max_gb:
                too_large.append(length)
    if too_large:
        sys.exit(f"over {args.max_gb} GB at length {too_large}")


if __name__ == "__main__":
    main()
