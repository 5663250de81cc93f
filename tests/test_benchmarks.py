"""The scripts of `benchmarks/` that call the package's parts, not its commands, still can."""

import logging
import platform
import runpy
import subprocess
import sys

import pytest
import torch

from benchmarks import guards
from benchmarks.evaluation import SIDES, measure
from recbole_mm.config import DATASETS


@pytest.fixture(autouse=True)
def _as_before():
    """They are scripts: what they set holds for the process."""
    threads = torch.get_num_threads()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def test_an_evaluation_is_measured_alike_on_every_side():
    found = [measure(side, 40, 600, 16) for side in SIDES]
    assert all(side["seconds"] > 0 for side in found)
    assert [side["ndcg@10"] for side in found] == pytest.approx([found[0]["ndcg@10"]] * len(SIDES))


def test_an_epoch_is_measured(monkeypatch, capsys):
    given = ["--dataset=tiny", f"--data_path={DATASETS}", "--lengths", "20", "--steps", "2"]
    given += ["--contenders", "stock:SASRec", "SASRecMM:all"]
    monkeypatch.setattr(sys, "argv", ["epoch_time.py", *given])
    runpy.run_module("benchmarks.epoch_time", run_name="__main__")
    assert "| 20 | SASRecMM:all |" in capsys.readouterr().out


def test_every_guard_stands_where_it_is_removed():
    guards.check_texts(guards.GUARDS)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_steps_are_measured_with_and_without_freed_memory():
    given = ["--dataset=tiny", f"--data_path={DATASETS}", "--models", "SASRecMM:all"]
    done = subprocess.run(
        [sys.executable, "benchmarks/freed_memory.py", *given, "--rounds=1", "--steps=1"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "| SASRecMM:all |" in done.stdout
