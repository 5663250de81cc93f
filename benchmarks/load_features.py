"""Time and memory of loading item features, beside RecBole's own text route.

    PYTHONPATH=. python benchmarks/load_features.py [--items N] [--recbole-items N] [--folder DIR]

Writes a random matrix of width 768 into a temporary folder, loads each form of it in a process of
its own, aligned to shuffled tokens, and prints one markdown table. A row is refused unless every
thousandth item has the very numbers that were written for it.

Seconds are of the load alone, imports excluded: the first time with the file dropped from the page
cache, then the median of several with the file in it. sha256 is computed when the report is asked
for it, not while loading. Memory: the largest resident set of the process, the largest anonymous
part of it (the rest is mainly the mapped file, which the kernel may drop at any time), and both
without what had been taken before the load (the imports, the list of tokens).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WIDTH = 768
CHECKED_EVERY = 1000
POLL_SECONDS = 0.005


def rows_of(part: range) -> np.ndarray:
    """Numbers that a reader can recompute: row i of every form of the matrix."""
    rows = np.arange(part.start + 1, part.stop + 1, dtype=np.float32)[:, None]
    return np.sin(rows * np.arange(1, WIDTH + 1, dtype=np.float32) / 1000)


def parts_of(n_items: int, size: int = 20_000) -> Iterator[range]:
    for start in range(0, n_items, size):
        yield range(start, min(start + size, n_items))


def write_npy(folder: Path, n_items: int) -> None:
    matrix = np.lib.format.open_memmap(
        folder / "f.npy", mode="w+", dtype=np.float32, shape=(n_items, WIDTH)
    )
    for part in parts_of(n_items):
        matrix[part.start : part.stop] = rows_of(part)
    matrix.flush()
    (folder / "f.ids").write_text("".join(f"i{row}\n" for row in range(n_items)))


def write_safetensors(folder: Path, n_items: int, half: bool = False) -> None:
    import torch

    from recbole_mm.data.feature_files import save_features

    values = torch.from_numpy(np.lib.format.open_memmap(folder / "f.npy", mode="c"))
    name = "half.safetensors" if half else "f.safetensors"
    tokens = [f"i{row}" for row in range(n_items)]
    save_features(folder / name, values.half() if half else values, tokens)


def write_recbole(folder: Path, n_items: int) -> None:
    folder = folder / "toy"
    folder.mkdir()
    with (folder / "toy.inter").open("w") as stream:
        stream.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for place, row in enumerate(shuffled(n_items)):
            stream.write(f"u{place // 10}\ti{row}\t{place % 10}\n")
    with (folder / "toy.itememb").open("w") as stream:
        stream.write("iid:token\titem_emb:float_seq\n")
        for part in parts_of(n_items, 2_000):
            for row, numbers in zip(part, rows_of(part).tolist(), strict=True):
                stream.write(f"i{row}\t{' '.join(f'{number:.8g}' for number in numbers)}\n")


def shuffled(n_items: int) -> list[int]:
    return np.random.default_rng(0).permutation(n_items).tolist()


def load_ours(folder: Path, n_items: int, declaration: dict[str, str]) -> dict[str, object]:
    import torch

    from recbole_mm.data.features import load_features

    torch.set_num_threads(1)
    tokens = ["[PAD]", *(f"i{row}" for row in shuffled(n_items))]
    report_start()
    start, cpu = time.perf_counter(), time.process_time()
    table = load_features(
        {"text": declaration},
        tokens,
        dataset_name="toy",
        dataset_path=folder,
        min_coverage=1.0,
    )
    took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    report_end()
    features = table["text"]
    items = torch.arange(1, n_items + 1, CHECKED_EVERY)
    check(features.values[features.rows[items]].numpy(), [tokens[i] for i in items])
    start = time.perf_counter()
    _ = features.report.sha256
    return took | {"hash_seconds": time.perf_counter() - start}


def load_recbole(folder: Path, n_items: int) -> dict[str, object]:
    import torch
    from recbole.config import Config
    from recbole.data.dataset import SequentialDataset

    from recbole_mm.compat import set_numpy_names

    class RunnableConfig(Config):
        def compatibility_settings(self) -> None:  # RecBole's own fails with numpy 2
            set_numpy_names()

    torch.set_num_threads(1)
    sys.argv = sys.argv[:1]  # Config reads it
    config = RunnableConfig(
        model="SASRec",
        dataset="toy",
        config_dict={
            "data_path": str(folder),
            "USER_ID_FIELD": "user_id",
            "ITEM_ID_FIELD": "item_id",
            "TIME_FIELD": "timestamp",
            "load_col": {
                "inter": ["user_id", "item_id", "timestamp"],
                "itememb": ["iid", "item_emb"],
            },
            "additional_feat_suffix": ["itememb"],
            "alias_of_item_id": ["iid"],
            "preload_weight": {"iid": "item_emb"},
            "train_neg_sample_args": None,
        },
    )
    report_start()
    start, cpu = time.perf_counter(), time.process_time()
    dataset = SequentialDataset(config)
    matrix = dataset.get_preload_weight("iid")
    took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    report_end()
    tokens = dataset.field2id_token["item_id"]
    items = np.arange(1, n_items + 1, CHECKED_EVERY)
    check(matrix[items], tokens[items].tolist())
    return took


def check(found: np.ndarray, tokens: list[str]) -> None:
    expected = np.concatenate([rows_of(range(int(t[1:]), int(t[1:]) + 1)) for t in tokens])
    np.testing.assert_allclose(found, expected, atol=5e-4 if found.dtype == np.float16 else 1e-6)


LOADERS = {
    "f.npy": lambda folder, n: load_ours(folder, n, {"path": "f.npy", "ids": "f.ids"}),
    "f.safetensors": lambda folder, n: load_ours(folder, n, {"path": "f.safetensors"}),
    "half.safetensors": lambda folder, n: load_ours(folder, n, {"path": "half.safetensors"}),
    "toy/toy.itememb": lambda folder, n: load_ours(
        folder, n, {"path": "toy/toy.itememb", "id_col": "iid"}
    ),
    "recbole": load_recbole,
}
FILES = {name: name for name in LOADERS} | {"recbole": "toy/toy.itememb"}


def report_start() -> None:
    """Tell the parent that the imports are over, and wait until it has looked."""
    sys.stdout.write("\nstart\n")
    sys.stdout.flush()
    time.sleep(20 * POLL_SECONDS)


def report_end() -> None:
    time.sleep(20 * POLL_SECONDS)
    sys.stdout.write("\nend\n")
    sys.stdout.flush()
    time.sleep(20 * POLL_SECONDS)


def memory_of(pid: int) -> tuple[int, int]:
    """Resident and anonymous memory of a process now, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return tuple(int(fields[key].split()[0]) // 1024 for key in ("VmRSS", "RssAnon"))


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(loader: str, folder: Path, n_items: int) -> dict[str, float]:
    """One load in a fresh process, watched from outside."""
    command = [sys.executable, __file__, "--worker", loader, "--folder", str(folder)]
    process = subprocess.Popen(
        [*command, "--items", str(n_items)],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    said, before, peaks = b"", None, (0, 0)
    while process.poll() is None and b"\nend\n" not in said:
        with contextlib.suppress(BlockingIOError):
            said += os.read(pipe, 1 << 16)
        with contextlib.suppress(OSError, KeyError):  # the process is just ending
            now = memory_of(process.pid)
            if b"\nstart\n" in said:
                before = before or now
                peaks = tuple(map(max, peaks, now))
        time.sleep(POLL_SECONDS)
    os.set_blocking(pipe, True)
    said += process.stdout.read()
    if process.wait():
        raise SystemExit(f"{loader} failed: {command}")
    result = json.loads(said.splitlines()[-1])
    return result | {
        "peak": peaks[0],
        "anonymous": peaks[1],
        "peak_gain": peaks[0] - before[0],
        "anonymous_gain": peaks[1] - before[1],
    }


def table_row(name: str, n_items: int, size: int, runs: list[dict[str, float]]) -> str:
    hashed = f"{runs[-1]['hash_seconds']:.1f}" if "hash_seconds" in runs[-1] else "-"
    cells = [name, f"{n_items:,}", f"{size / 1e6:,.0f}", f"{runs[0]['seconds']:.2f}"]
    cells += [
        f"{statistics.median(run[key] for run in runs[1:]):.2f}" for key in ("seconds", "cpu")
    ]
    cells += [hashed]
    for key in ("peak", "anonymous", "peak_gain", "anonymous_gain"):
        cells.append(f"{max(run[key] for run in runs):,}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--recbole-items", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3, help="loads with the file in the cache")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = LOADERS[options.worker](options.folder, options.items)
        print("\n" + json.dumps(result))
        return

    columns = ["route", "items", "file, MB", "s, from disk", "s, from cache", "CPU s", "s, sha256"]
    columns += ["peak RSS, MB", "of it anonymous", "RSS gained", "anonymous gained"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    names = {
        "f.npy": "ours: npy + id file, float32",
        "f.safetensors": "ours: safetensors, float32",
        "half.safetensors": "ours: safetensors, float16",
        "toy/toy.itememb": "ours: RecBole's own text file",
        "recbole": "RecBole: text file, preload_weight",
    }
    binary = ["f.npy", "f.safetensors", "half.safetensors"]
    for n_items, loaders in (
        (options.recbole_items, [*binary, "toy/toy.itememb", "recbole"]),
        (options.items, binary),
    ):
        folder = Path(tempfile.mkdtemp(prefix="load_features_", dir=options.folder))
        try:
            write_npy(folder, n_items)
            write_safetensors(folder, n_items)
            write_safetensors(folder, n_items, half=True)
            if "recbole" in loaders:
                write_recbole(folder, n_items)
            for loader in loaders:
                path = folder / FILES[loader]
                drop_from_cache(path)
                repeat = options.repeat if path.suffix != ".itememb" else 1
                runs = [measure(loader, folder, n_items) for _ in range(1 + repeat)]
                print(table_row(names[loader], n_items, path.stat().st_size, runs), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
