"""What a training epoch costs, model against model, by length of the history.

    python benchmarks/epoch_time.py --dataset=ml-100k-mm --lengths 50 200 1024 2048
    python benchmarks/epoch_time.py --dataset=amazon-scientific-clip --lengths 50 \
        --contenders stock:SASRec CAMMSR CAMMSR:all --gate_causal=True

A contender is a model, its objective behind a colon if it offers a choice (``MUFASA:last``). The
contenders take their steps in turns, in one process with one thread; an epoch is the mean of a step
in processor seconds times the steps of an epoch, so where a contender is too slow to finish it is
an extrapolation, and the table says on how many steps it rests. A step gathers the batch and takes
the loss, its gradient and a step of Adam. Ratios are to the first contender.

``stock:`` trains as RecBole does: every row padded to L, autograd's anomaly detection on. Without
it a built-in model is the same, through this package's trainer. Where the (B, H, L, L) scores of
RecBole's batch of 2,048 rows would not fit in memory, fewer rows make a batch; the steps of an
epoch grow accordingly, and what an epoch costs hardly changes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from recbole.data import data_preparation
from recbole.utils import init_seed

from recbole_mm.config import Config
from recbole_mm.data.batches import count_targets
from recbole_mm.data.create import create_dataset
from recbole_mm.trainer import trainer_class

SEED = 2020
SCORES = 2**25  # rows x L x L of a padded batch of prefixes, at most: 2,048 rows up to L = 128
CONTENDERS = ["stock:SASRec", "SASRec", "SASRecFast:last", "SASRecFast:all"]
CONTENDERS += ["MUFASA:last", "MUFASA:all"]


class Contender:
    """A model, its optimizer and its batches; ``step`` takes one training step."""

    def __init__(self, args: argparse.Namespace, length: int, name: str, keys: Sequence[str]):
        self.name = name
        self.as_recbole = name.startswith("stock:")
        model, _, objective = name.removeprefix("stock:").partition(":")
        values: dict[str, Any] = {
            "data_path": args.data_path,
            "MAX_ITEM_LIST_LENGTH": length,
            "seed": SEED,
            "show_progress": False,
            "use_gpu": False,  # CPU seconds are what it prints
        }
        if objective != "all":  # whose batches are the default's
            values["train_batch_size"] = min(args.rows, max(8, SCORES // length**2))
        if objective:
            values["train_objective"] = objective
        config = Config(model, args.dataset, None, values, keys)
        init_seed(SEED, True)
        dataset = create_dataset(config)
        self.data = data_preparation(config, dataset)[0]
        count_targets(self.data, config["train_batch_size"])
        self.rows = self.data.step
        self.model = config.model_class(config, self.data._dataset).train()
        trainer = trainer_class(config["MODEL_TYPE"], config.model_class)
        self.trainer = trainer(config, self.model, None)
        self.batches = self._endless()
        self.seconds: list[float] = []

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.data

    def step(self) -> None:
        """Take a training step and note its processor seconds."""
        with torch.autograd.set_detect_anomaly(self.as_recbole):
            started = time.process_time()
            batch = next(self.batches)
            if not self.as_recbole:
                batch = self.trainer.without_padding(batch)
            self.trainer.optimizer.zero_grad()
            losses = self.model.calculate_loss(batch)
            loss = sum(losses) if isinstance(losses, tuple) else losses
            loss.backward()
            self.trainer.optimizer.step()
            self.seconds.append(time.process_time() - started)

    @property
    def epoch(self) -> float:
        """Processor seconds of an epoch; the first step only warms up."""
        taken = self.seconds[1:]
        return sum(taken) / len(taken) * len(self.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k-mm")
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1024, 2048])
    parser.add_argument("--rows", type=int, default=2048, help="of a batch of prefixes, at most")
    parser.add_argument("--steps", type=int, default=100, help="of each contender, at most")
    parser.add_argument("--seconds", type=float, default=30, help="of each contender, at most")
    args, keys = parser.parse_known_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    print(f"### {args.dataset}\n\n{datetime.date.today()}, torch {torch.__version__}, one thread,")
    print(f"load average at the start {os.getloadavg()[0]:.1f}; {' '.join(keys)}\n")
    print("| L | contender | rows of a batch | CPU s an epoch | steps an epoch | steps measured |")
    print("|---|---|---|---|---|---|", flush=True)
    for length in args.lengths:
        field = [Contender(args, length, name, keys) for name in args.contenders]
        for _ in range(args.steps + 1):
            for one in field:
                if len(one.seconds) < 3 or sum(one.seconds) < args.seconds:
                    one.step()
        first = field[0].epoch
        for one in field:
            print(
                f"| {length} | {one.name} | {one.rows} | {one.epoch:,.1f} "
                f"({one.epoch / first:.3g} x) | {len(one.data)} | {len(one.seconds) - 1} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
