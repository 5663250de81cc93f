"""Time and memory of the item graphs of MDSRec, by number of items.

    PYTHONPATH=. python benchmarks/item_graph.py [--items 10000 30000 100000] [--threads 2]

Random features in clusters and random histories; every size runs in a process of its own, and one
markdown table is printed. Measured is what a run does, ``item_graphs`` with an empty cache: the
behaviour graph, the modal graph ``smooth`` of one modality, hashes and cache files. A size is
refused unless the neighbours of 200 items equal those of a search in float64 over the smoothed
features, and the counts of 200 items those of a loop over the histories.

Seconds are of the wall and of the processor (all threads), imports excluded; on a busy machine
threads wait for each other, and those of one thread say more. Memory is the largest
resident set of the process, and how much of it was there before (the imports, the features).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

K = 10
WINDOW = 3
HISTORY = 8  # items of a history on average, as in Amazon's 5-core sets
USERS_PER_ITEM = 2
CHECKED = 200


def features(n_items: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    cluster = rng.standard_normal((n_items // 50 + 1, width), dtype=np.float32)
    vectors = rng.standard_normal((n_items, width), dtype=np.float32)
    vectors += cluster[rng.integers(0, len(cluster), n_items)]
    vectors[0] = 0
    return vectors


def interactions(n_items: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    length = rng.integers(2, 2 * HISTORY - 1, n_items * USERS_PER_ITEM)
    users = np.repeat(np.arange(len(length)), length)
    popular = (n_items - 1) * rng.random(len(users)) ** 2
    return users, 1 + popular.astype(np.int64)


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def smoothed(vectors: np.ndarray, behaviour) -> np.ndarray:
    """Vectors of length one, plus those of the items that each is consumed with, in float64."""
    length = np.sqrt(np.einsum("nf,nf->n", vectors, vectors, dtype=np.float64))[:, None]
    unit = np.divide(vectors, length, out=np.zeros(vectors.shape), where=length > 0)
    return unit + behaviour @ unit


def check_neighbours(graph, vectors: np.ndarray) -> None:
    """Cosines of a sample equal the best of a search in float64, up to float32."""
    sample = np.random.default_rng(2).integers(1, len(vectors), CHECKED)
    length = np.sqrt(np.einsum("nf,nf->n", vectors, vectors, dtype=np.float64))
    length[0] = 1
    for start in range(0, CHECKED, 20):
        part = sample[start : start + 20]
        cosine = vectors[part] @ vectors.T
        cosine /= length[part, None] * length
        cosine[np.arange(len(part)), part] = -np.inf
        best = -np.sort(-cosine, axis=1)[:, :K]
        for row, item in zip(best, part, strict=True):
            found = -np.sort(-graph[item].data)
            np.testing.assert_allclose(found, row, atol=1e-5)


def check_counts(graph, users: np.ndarray, items: np.ndarray) -> None:
    """Neighbours of a sample have the largest numbers of users."""
    histories = defaultdict(list)
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        histories[user].append(item)
    sample = set(np.random.default_rng(3).integers(1, graph.shape[0], CHECKED).tolist())
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for history in histories.values():
        pairs = set()
        for i, item in enumerate(history):
            if item in sample:
                near = history[max(0, i - WINDOW) : i + WINDOW + 1]
                pairs |= {(item, other) for other in near if other != item}
        for item, other in pairs:
            counts[item][other] += 1
    for item in sample:
        best = np.array([n for _, n in counts[item].most_common(K)], np.float64)
        found = -np.sort(-graph[item].data)
        np.testing.assert_allclose(found, best / best.sum(), rtol=1e-5)


def measure(n_items: int, width: int) -> dict[str, float]:
    from recbole_mm.data.features import FeatureTable, ModalityFeatures
    from recbole_mm.data.item_graph import item_graphs

    users, items = interactions(n_items)
    vectors = features(n_items, width)
    present = torch.arange(n_items) > 0
    rows = torch.arange(n_items)
    look = ModalityFeatures("look", torch.from_numpy(vectors), rows, present, SimpleNamespace())
    start_mb = peak_mb()
    with tempfile.TemporaryDirectory() as cache:
        wall, cpu = time.perf_counter(), time.process_time()
        graphs = item_graphs(
            FeatureTable([look], n_items),
            users,
            items,
            behaviour_window=WINDOW,
            behaviour_k=K,
            relation_graph="smooth",
            knn_k=K,
            mix_beta=0.5,
            cache_dir=cache,
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_mb()
    check_counts(graphs.behaviour, users, items)
    check_neighbours(graphs.modal["look"], smoothed(vectors, graphs.behaviour))
    return {
        "interactions": len(users),
        "wall": wall,
        "cpu": cpu,
        "edges": graphs.modal["look"].nnz,
        "start_mb": start_mb,
        "peak_mb": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.items[0], args.width)))
        return
    print(
        "| items | interactions | s | CPU s | edges | peak MB | before |\n"
        "|---|---|---|---|---|---|---|"
    )
    for n_items in args.items:
        command = [sys.executable, Path(__file__), "--worker", "--items", str(n_items)]
        worker = subprocess.run(
            [*command, "--width", str(args.width)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        )
        row = json.loads(worker.stdout)
        print(
            f"| {n_items:,} | {row['interactions']:,} | {row['wall']:.1f} | "
            f"{row['cpu']:.1f} | {row['edges']:,} | {row['peak_mb']:,} | "
            f"{row['start_mb']:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
