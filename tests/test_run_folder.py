"""The run folder: unique, whole, without a pickle."""

import logging
from pathlib import Path

import pytest
import torch
from recbole.model.sequential_recommender import SASRec
from recbole.utils import set_color

from recbole_mm.errors import EnvironmentFault
from recbole_mm.run_folder import RunFolder, environment


def folder(tmp_path):
    return RunFolder(tmp_path, "tiny", "MUFASA")


def test_two_runs_of_the_same_second_get_two_folders(tmp_path):
    paths = {folder(tmp_path).path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.parent == tmp_path / "tiny" / "MUFASA" for path in paths)


def test_weights_come_back_equal(tmp_path):
    run = folder(tmp_path)
    weights = {"a": torch.randn(3, 2), "b": torch.arange(4).view(2, 2).T}
    run.write_weights(weights, {"epoch": 3})
    back = run.read_weights()
    assert all(torch.equal(weights[name], back.tensors[name]) for name in weights)
    assert back.about == {"epoch": 3}
    assert not list(run.path.glob("*.tmp"))


def test_tied_weights_can_be_saved(tmp_path):
    run = folder(tmp_path)
    shared = torch.randn(2)
    run.write_weights({"a": shared, "b": shared}, {})
    assert set(run.read_weights().tensors) == {"a", "b"}


def test_a_folder_that_cannot_be_written_is_an_environment_fault(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(EnvironmentFault, match="point checkpoint_dir at a folder"):
        RunFolder(blocked, "tiny", "MUFASA")


def test_the_log_has_no_colours_and_the_root_logger_is_left_as_it_was(tmp_path):
    run = folder(tmp_path)
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with run.logging_to_file("info"):
        logging.getLogger("x").info(set_color("hello", "pink") + " world")
    assert (run.path / "run.log").read_text().endswith("INFO hello world\n")
    assert (root.level, list(root.handlers)) == before


def test_environment_names_the_processor_and_the_versions_that_matter():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "model name" in cpuinfo.read_text():
        name, instructions = environment(SASRec)["processor"].rsplit(", ", 1)
        assert f": {name}\n" in cpuinfo.read_text()
        assert instructions == torch.backends.cpu.get_cpu_capability()
    assert {"recbole", "torch", "numpy", "pandas"} <= set(environment(SASRec)["packages"])
