"""The same metrics on every Python: one short run of several models under each interpreter.

    python benchmarks/pythons.py .venv-3.10/bin/python .venv-3.11/bin/python ...

Each interpreter has the package's requirements installed; the checkout itself is put on its path.
Exits with 1 if two interpreters disagree in the fourth decimal of any test metric.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

MODELS = ("MUFASA", "SASRecMM", "SASRec", "GRU4Rec", "LightGCN", "Pop")
CODE = """
import importlib.metadata as m, json, platform, sys
import recbole_mm
values = {"epochs": 3, "MAX_ITEM_LIST_LENGTH": 12, "show_progress": False}
out = {name: recbole_mm.run(name, "tiny", config_dict=values, saved=False)["test_result"]
       for name in sys.argv[1:]}
versions = [m.version(p) for p in ("recbole", "torch", "numpy", "scipy", "pandas")]
print(json.dumps([platform.python_version(), versions, out]))
"""


def main() -> None:
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    found = []
    for python in sys.argv[1:]:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", CODE, *MODELS],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{python}: {done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    header = ["Python", "recbole", "torch", "numpy", "scipy", "pandas"]
    header += [f"{name} NDCG@10" for name in MODELS]
    rows = [
        [python, *versions, *(f"{out[name]['ndcg@10']:.6f}" for name in MODELS)]
        for python, versions, out in found
    ]
    print(tabulate(rows, headers=header, tablefmt="github", disable_numparse=True))
    first = found[0][2]
    for python, _, out in found[1:]:
        for name, metrics in out.items():
            for metric, value in metrics.items():
                if abs(value - first[name][metric]) > 5e-5:
                    sys.exit(
                        f"{python}: {name} {metric} {value} differs from {first[name][metric]}"
                    )


if __name__ == "__main__":
    main()
