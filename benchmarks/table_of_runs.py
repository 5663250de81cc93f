"""One table of finished runs, refused if their protocols differ.

    python benchmarks/table_of_runs.py saved/ml-100k-mm/*/* > benchmarks/results/table.md

Each argument is a run folder. Runs of one data set must share items, interactions, split and
evaluation rules; processor seconds come from ``metrics.jsonl`` of the run, whatever else the
machine did meanwhile.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import yaml
from tabulate import tabulate

from recbole_mm.protocol import Protocol, assert_comparable

METRICS = ("ndcg@10", "mrr@10", "hit@10")


def read(folder: Path) -> dict:
    result = json.loads((folder / "result.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"result": result, "config": config, "epochs": epochs}


def protocol(run: dict) -> Protocol:
    values = run["result"]["protocol"]
    return Protocol(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def row(run: dict) -> list:
    result, config, epochs = run["result"], run["config"], run["epochs"]
    seconds = [note["train_cpu_seconds"] for note in epochs]
    to_best = sum(seconds[: result["best_epoch"] + 1])
    return [
        result["model"],
        config["MAX_ITEM_LIST_LENGTH"],
        f"{config['train_objective']}, {config['train_batch_size']}",
        ", ".join(m["name"] for m in result["data"]["modalities"]) or "ids",
        config["seed"],
        f"{result['best_epoch'] + 1} of {result['epochs']}",
        f"{sum(seconds) / max(1, len(seconds)):.1f}",
        f"{to_best:.0f}",
        *(f"{(result['best_valid_result'] or {}).get(m, float('nan')):.4f}" for m in METRICS),
        *(f"{result['test_result'][m]:.4f}" for m in METRICS),
    ]


def main() -> None:
    runs = [read(Path(folder)) for folder in sys.argv[1:]]
    if not runs:
        sys.exit(__doc__)
    by_dataset = defaultdict(list)
    for run in runs:
        by_dataset[run["result"]["dataset"]].append(run)
    header = [
        "model",
        "L",
        "objective, batch",
        "reads",
        "seed",
        "best epoch",
        "CPU s/epoch",
        "CPU s to best",
    ]
    header += [f"{part} {m}" for part in ("valid", "test") for m in METRICS]
    for dataset, group in by_dataset.items():
        for other in group[1:]:
            assert_comparable(protocol(group[0]), protocol(other))
        print(f"\n### {dataset}\n\n{protocol(group[0]).line()}\n")
        print(
            tabulate(
                [row(run) for run in group],
                headers=header,
                tablefmt="github",
                disable_numparse=True,
            )
        )


if __name__ == "__main__":
    main()
