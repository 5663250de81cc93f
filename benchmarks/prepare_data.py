"""CPU time and peak memory of data preparation: RecBole's against ours.

Each measurement runs in a fresh process, which reads a generated ``.inter`` file, builds a data set
and its leave-one-out split, and walks through training batches::

    python benchmarks/prepare_data.py                  # 1 million rows
    python benchmarks/prepare_data.py --rows 10000000 --users 200000 --items 100000 --batches 50

Before anything is timed, both must give the same batches on a small file; otherwise nothing is
reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS = ("read and filter", "rows and split", "batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=6_040)
    parser.add_argument("--items", type=int, default=3_700)
    parser.add_argument("--length", type=int, default=50, help="MAX_ITEM_LIST_LENGTH")
    parser.add_argument("--batches", type=int, default=100, help="training batches of 2048 rows")
    parser.add_argument("--skip-recbole", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        who, folder = options.measure
        print(json.dumps(measure(who, Path(folder), options)))
        return

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "small", rows=3_000, users=60, items=200)
        assert_same_batches(Path(folder) / "small", options.length)
        write(Path(folder) / "big", rows=options.rows, users=options.users, items=options.items)
        sides = ["ours"] if options.skip_recbole else ["recbole", "ours"]
        found = {who: in_fresh_process(who, Path(folder) / "big", options) for who in sides}
    print(f"{options.rows} rows, {options.users} users, {options.items} items, L {options.length}")
    heads = [*found, "ratio"] if len(found) > 1 else list(found)
    print(f"{'':24}" + "".join(f"{head:>12}" for head in heads))
    for row in (*STEPS, "CPU seconds", "peak MB", "CPU ms per batch"):
        values = [result[row] for result in found.values()]
        ratio = f"{values[0] / values[-1]:12.1f}" if len(values) > 1 else ""
        print(f"{row:24}" + "".join(f"{value:12.2f}" for value in values) + ratio)


def write(folder: Path, *, rows: int, users: int, items: int) -> None:
    """A ``bench.inter`` with popular items and unix seconds that float32 keeps apart."""
    (folder / "bench").mkdir(parents=True)
    rng = np.random.default_rng(0)
    columns = (
        rng.integers(users, size=rows),
        rng.zipf(1.2, size=rows) % items,
        rng.permutation(rows) % (1 << 24),
    )
    with (folder / "bench" / "bench.inter").open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for start in range(0, rows, 100_000):
            part = zip(
                *(column[start : start + 100_000].tolist() for column in columns), strict=True
            )
            file.writelines(f"{user}\t{item}\t{second}\n" for user, item, second in part)


def config_of(folder: Path, length: int) -> Any:
    from recbole.config import Config as RecBoleConfig

    from recbole_mm import compat

    class Config(RecBoleConfig):  # type: ignore[misc]
        def compatibility_settings(self) -> None:
            compat.set_numpy_names()

        def _load_cmd_line(self) -> dict[str, Any]:
            return {}

    values = {
        "data_path": str(folder),
        "use_gpu": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": length,
        "loss_type": "CE",
        "train_neg_sample_args": None,
    }
    return Config("SASRec", "bench", config_dict=values)


def creator(who: str) -> Any:
    from recbole.data.utils import create_dataset as recboles

    from recbole_mm.data.create import create_dataset as ours

    return {"recbole": recboles, "ours": ours}[who]


def assert_same_batches(folder: Path, length: int) -> None:
    from recbole.data import data_preparation

    loaders = []
    for who in ("recbole", "ours"):
        config = config_of(folder, length)
        loaders.append(data_preparation(config, creator(who)(config)))
    for theirs, ours in zip(*loaders, strict=True):
        assert len(theirs) == len(ours)
        for one, other in zip(theirs, ours, strict=True):
            one, other = (x if hasattr(x, "interaction") else x[0] for x in (one, other))
            for field in one.columns:
                assert torch.equal(one[field].double(), other[field].double()), field


def in_fresh_process(who: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", who, str(folder)]
    for key in ("length", "batches"):
        command += [f"--{key}", str(getattr(options, key))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(who: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from recbole.data import data_preparation

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    create = creator(who)
    config = config_of(folder, options.length)
    clock = [time.process_time()]
    dataset = create(config)
    clock.append(time.process_time())
    train = data_preparation(config, dataset)[0]
    clock.append(time.process_time())
    for n_batches, _ in enumerate(train, start=1):
        if n_batches == options.batches:
            break
    clock.append(time.process_time())
    times = dict(zip(STEPS, np.diff(clock).tolist(), strict=True))
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return {
        **times,
        "CPU seconds": times[STEPS[0]] + times[STEPS[1]],
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "CPU ms per batch": 1000 * times["batches"] / n_batches,
    }


if __name__ == "__main__":
    main()
