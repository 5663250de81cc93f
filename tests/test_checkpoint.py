"""Checkpoints: whole or not at all, and nothing of them executed."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from recbole_mm import checkpoint, files
from recbole_mm.checkpoint import (
    FORMAT,
    LooseState,
    optimizer_state,
    random_states,
    read,
    set_optimizer_state,
    set_random_states,
    write,
)
from recbole_mm.errors import EnvironmentFault, InputError


def test_tensors_and_plain_data_come_back_equal(tmp_path):
    tensors = {
        "half": torch.randn(2, 3).half(),
        "brain": torch.randn(4).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "strided": torch.arange(6).view(2, 3).T,
    }
    about = {"score": -float("inf"), "names": ["é", None], "nested": {"a": [1.1, 2]}}
    write(tmp_path / "x", tensors, about)
    back = read(tmp_path / "x")
    assert back.about == about
    assert all(torch.equal(tensors[name], back.tensors[name]) for name in tensors)
    assert all(tensors[name].dtype == back.tensors[name].dtype for name in tensors)


class Stop(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("where", ["save_file", "_sync", "replace"])
def test_whatever_the_moment_of_a_crash_one_whole_state_is_read(where, tmp_path, monkeypatch):
    """Tensors and plain data of one generation, never of two."""
    path = tmp_path / "last.safetensors"
    write(path, {"n": torch.tensor(1)}, {"n": 1})

    def crash(*args, **kwargs):
        if where == "save_file":
            args[1].write_bytes(b"half a file")
        raise Stop

    owner = {"save_file": checkpoint, "_sync": files, "replace": type(path)}[where]
    monkeypatch.setattr(owner, where, crash)
    # what a killed process leaves: nothing tidies up
    monkeypatch.setattr(type(path), "unlink", lambda *_, **__: None)
    with pytest.raises(Stop):
        write(path, {"n": torch.tensor(2)}, {"n": 2})
    monkeypatch.undo()
    back = read(path)
    assert (int(back.tensors["n"]), back.about["n"]) == (1, 1)
    write(path, {"n": torch.tensor(3)}, {"n": 3})
    assert read(path).about["n"] == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_remains(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write(path, {}, {"n": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"No space left on device.*free space") as error:
        write(path, {}, {"n": 2})
    assert error.value.exit_code == 3
    assert read(path).about == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_is_gone_is_an_environment_fault(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        write(tmp_path / "none" / "x", {"a": torch.zeros(1)}, {})


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read|not a checkpoint"):
        read(tmp_path / "x")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none")


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1])
def test_a_file_of_another_format_is_refused(other, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", other)
    write(tmp_path / "x", {"a": torch.zeros(1)}, {"recbole_mm": "9.8"})
    monkeypatch.undo()
    expected = rf"has format {other}, written by recbole_mm 9\.8.* format {FORMAT}"
    with pytest.raises(InputError, match=expected):
        read(tmp_path / "x")


def test_a_file_that_says_no_format_has_the_first(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x", metadata={"recbole_mm": "{}"})
    with pytest.raises(InputError, match="has format 1, written by an early version"):
        read(tmp_path / "x")


def test_random_numbers_go_on_where_they_were(tmp_path):
    random.gauss(0, 1)  # leaves a second number behind, as numpy does
    np.random.normal()  # noqa: NPY002  (what RecBole draws from)
    states = random_states()
    write(tmp_path / "x", states.tensors, states.about)

    def drawn():
        return random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()  # noqa: NPY002

    expected = [drawn() for _ in range(3)]
    set_random_states(read(tmp_path / "x"))
    assert [drawn() for _ in range(3)] == expected


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop"])
def test_optimizers_go_on_where_they_were(kind, tmp_path):
    def made():
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, getattr(torch.optim, kind)(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = made()
    for _ in range(3):
        step(layer, optimizer)
    state = optimizer_state(optimizer)
    write(tmp_path / "x", state.tensors, state.about)
    weights = {name: t.clone() for name, t in layer.state_dict().items()}
    step(layer, optimizer)

    twin, other = made()
    twin.load_state_dict(weights)
    set_optimizer_state(other, read(tmp_path / "x"))
    step(twin, other)
    assert torch.equal(layer.weight, twin.weight)


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.layer.count = 0
        self.cache = None
        self.table = torch.zeros(2)
        self.steps = [1, 2]
        self.constant = np.ones(3)
        self.graph = torch.eye(2).to_sparse()
        self._hidden = {}


def test_what_a_model_changes_beside_its_weights_is_found():
    model = Loose()
    loose = LooseState(model)
    assert loose.changed() == (({}, {}), [])
    model.layer.count += 3
    model.cache = torch.ones(2)
    model.table[0] = 5
    model.steps.append(3)
    model._hidden = {"a": 1}
    saved, unsaved = loose.changed()
    assert set(saved.tensors) == {"cache", "table"}
    assert saved.about == {"layer.count": 3, "steps": [1, 2, 3]}
    assert unsaved == []

    twin = Loose()
    LooseState(twin).restore(saved)
    assert (twin.layer.count, twin.steps) == (3, [1, 2, 3])
    assert torch.equal(twin.table, model.table)


def test_what_cannot_be_saved_is_named():
    model = Loose()
    loose = LooseState(model)
    model.graph = torch.eye(2).to_sparse()
    model.constant[0] = 2
    assert loose.changed()[1] == ["constant (ndarray)", "graph (Tensor)"]
