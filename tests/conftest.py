"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest
import torch

from recbole_mm.ops import sparse_attention
from recbole_mm.ops.token_attention import token_attention
from recbole_mm.trainer import trainer_class
from tests.models.conftest import build

DENSE_UP_TO = sparse_attention._DENSE_UP_TO


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """No test reads or writes the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECBOLE_MM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors of a test are small, and the suite has its own processes
    # an earlier test may have imported RecBole's SINE, which turns it on: ten times the time
    torch.autograd.set_detect_anomaly(False)


@pytest.fixture(autouse=True)
def _small_histories_take_the_sparse_form(monkeypatch):
    """The form that long histories take is to be seen by tests of short ones, too."""
    monkeypatch.setattr(sparse_attention, "_DENSE_UP_TO", dict.fromkeys(DENSE_UP_TO, 0))


@pytest.fixture
def build_trainer():
    """A trainer without a run folder, and its world."""

    def make(name, **values):
        world = build(name, **values)
        return trainer_class(world.config["MODEL_TYPE"], world.config.model_class)(
            world.config, world.model, None
        ), world

    return make


@pytest.fixture
def forms(monkeypatch):
    """Whether attention over tokens was dense, call by call."""
    dense = []

    def noted(*args, is_dense, **kwargs):
        dense.append(is_dense)
        return token_attention(*args, is_dense=is_dense, **kwargs)

    monkeypatch.setattr(sparse_attention, "token_attention", noted)
    return dense
