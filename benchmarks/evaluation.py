"""CPU time and peak memory of a full-ranking evaluation: RecBole's trainer against ours.

One target and twenty masked items a user, scores from vectors of 64, default metrics (NDCG, MRR,
Hit at 5, 10, 20). Users and items are generated and the model has no encoder, so that what is
timed is scoring, masking, ranking and metrics. Each measurement runs in a fresh process with one
thread; the sides take turns::

    python benchmarks/evaluation.py                                     # all cells, some minutes
    python benchmarks/evaluation.py --users 1000 --items 2000 20000     # some of them

Sides, all of the same vectors, those of RecBole's BPR: RecBole's trainer; our trainer with a model
in the form of RecBole's sequential ones, whose scores are a product of users x items; in the form
of RecBole's general ones, which return it flat; in the form of our own models, whose scores come in
chunks. Nothing is reported before all have given the same metrics.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction

SIDES = ("RecBole", "ours, sequential model", "ours, general model", "ours, vectors")
MASKED = 20


class Users(FullSortEvalDataLoader):
    """Generated users in RecBole's form; RecBole's own loader would build 50,000 sets first."""

    def __init__(self, config: Any, dataset: Any, n_users: int, batch: int) -> None:
        self.config, self._dataset, self.n_users, self.batch = config, dataset, n_users, batch

    def __len__(self) -> int:
        return -(-self.n_users // self.batch)

    def __iter__(self) -> Any:
        for start in range(1, self.n_users + 1, self.batch):
            users = torch.arange(start, min(start + self.batch, self.n_users + 1))
            rows = torch.arange(len(users))
            # multiples of a prime are distinct items
            known = (users[:, None] * 31 + torch.arange(MASKED + 1) * 7919) % (
                self._dataset.item_num - 1
            ) + 1
            history = (rows.repeat_interleave(MASKED), known[:, 1:].flatten())
            yield Interaction({"user_id": users}), history, rows, known[:, 0]


def make(side: str, n_users: int, n_items: int, batch: int) -> tuple[Any, Users]:
    """A trainer of a side, and the users that it evaluates."""
    from recbole.model.general_recommender import BPR
    from recbole.trainer import Trainer

    from recbole_mm.config import Config
    from recbole_mm.models.base import MultimodalSequentialRecommender
    from recbole_mm.trainer import trainer_class

    class Sequential(BPR):  # type: ignore[misc]
        def full_sort_predict(self, interaction: Interaction) -> Any:
            users = self.user_embedding(interaction["user_id"])
            return torch.matmul(users, self.item_embedding.weight.transpose(0, 1))

    class Vectors(MultimodalSequentialRecommender):  # type: ignore[misc]
        def __init__(self, bpr: Any) -> None:
            torch.nn.Module.__init__(self)
            self.bpr, self._scoring_table = bpr, None

        def item_table(self) -> Any:
            return self.bpr.item_embedding.weight

        def user_vectors(self, interaction: Interaction) -> Any:
            return self.bpr.user_embedding(interaction["user_id"])

    values = {"mask_history": True, "show_progress": False, "metric_decimal_place": 9}
    config = Config("BPR", "tiny", config_dict={**values, "gpu_id": ""})
    sizes = {"user_id": n_users + 1, "item_id": n_items + 1}
    dataset = SimpleNamespace(
        num=sizes.get,
        item_num=n_items + 1,
        get_item_feature=lambda: Interaction({"item_id": torch.arange(n_items + 1)}),
    )
    torch.manual_seed(0)
    model = (BPR if side == SIDES[2] else Sequential)(config, dataset)
    if side == SIDES[0]:
        trainer = Trainer(config, model)
    else:
        net = Vectors(model) if side == SIDES[3] else model
        trainer = trainer_class(config["MODEL_TYPE"], BPR)(config, net, None)
    return trainer, Users(config, dataset, n_users, batch)


def measure(side: str, n_users: int, n_items: int, batch: int) -> dict[str, float]:
    """CPU seconds of one evaluation after a short one, and what it added to the peak of memory."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    trainer, users = make(side, n_users, n_items, batch)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    users.n_users = 16
    trainer.evaluate(users, load_best_model=False)
    users.n_users = n_users
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    started = time.process_time()
    result = trainer.evaluate(users, load_best_model=False)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"seconds": seconds, "MB": peak - before, "ndcg@10": float(result["ndcg@10"])}


def in_fresh_process(side: str, n_users: int, n_items: int, batch: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", side]
    command += ["--users", str(n_users), "--items", str(n_items), "--batch", str(batch)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:  # killed for memory, or refused it
        return {"seconds": float("nan"), "MB": float("nan")}
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def assert_same_metrics() -> None:
    found = []
    for side in SIDES:
        trainer, users = make(side, 300, 3_000, 128)
        found.append(dict(trainer.evaluate(users, load_best_model=False)))
    for other in found[1:]:
        assert all(abs(other[key] - value) < 1e-6 for key, value in found[0].items()), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--users", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--items", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--batch", type=int, default=4_096, help="users of a batch, for all sides")
    parser.add_argument("--repeats", type=int, default=2, help="of cells up to 10^9 scores, else 1")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:  # RecBole's trainer writes where it runs
        here = Path(__file__).resolve()
        os.chdir(scratch)
        sys.argv[0] = globals()["__file__"] = str(here)
        if options.measure:
            print(
                json.dumps(
                    measure(options.measure, options.users[0], options.items[0], options.batch)
                )
            )
            return
        assert_same_metrics()
        print("| users | items | " + " | ".join(f"{s}: CPU s | MB" for s in SIDES) + " | ratio |")
        print("|---" * (2 * len(SIDES) + 3) + "|")
        for n_items in options.items:
            for n_users in options.users:
                row(n_users, n_items, options)


def row(n_users: int, n_items: int, options: argparse.Namespace) -> None:
    repeats = options.repeats if n_users * n_items <= 10**9 else 1
    runs = [
        [in_fresh_process(side, n_users, n_items, options.batch) for side in SIDES]
        for _ in range(repeats)
    ]
    best = [
        {k: min(run[i][k] for run in runs) for k in ("seconds", "MB")} for i in range(len(SIDES))
    ]
    cells = [f"{side['seconds']:.2f} | {side['MB']:.0f}" for side in best]
    ratios = " / ".join(f"{best[0]['seconds'] / side['seconds']:.1f}" for side in best[1:])
    print(f"| {n_users:,} | {n_items:,} | " + " | ".join(cells) + f" | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
