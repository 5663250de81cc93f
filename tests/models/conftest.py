"""Models built on the generated data set."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from recbole.data import data_preparation
from recbole.utils import init_seed

from recbole_mm.config import Config
from recbole_mm.data.create import create_dataset

SMALL = {
    "MAX_ITEM_LIST_LENGTH": 12,
    "hidden_size": 16,
    "inner_size": 32,
    "train_batch_size": 64,
    "show_progress": False,
}
# histories of a dozen items must fill several blocks, and be long enough for the sparse form
OF_MODEL = {"MUFASA": {"window_size": 2, "block_size": 2, "n_selected_blocks": 2}}


@cache
def _world(name, values):
    config = Config(name, "tiny", config_dict={**SMALL, **OF_MODEL.get(name, {}), **dict(values)})
    init_seed(1, True)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    loaders = {"train": train, "valid": valid, "test": test}
    return SimpleNamespace(config=config, dataset=dataset, rows=train.step, **loaders)


def build(name, seed=0, **values):
    """A fresh model in evaluation mode, with its config and loaders."""
    world = _world(name, tuple(sorted(values.items())))
    # batches as if it were just made; a trainer may have counted their targets
    world.train.generator.manual_seed(world.config["seed"])
    world.train.step = world.train.batch_sampler.batch_size = world.rows
    torch.manual_seed(seed)
    model = world.config.model_class(world.config, world.train._dataset)
    return SimpleNamespace(model=model.eval(), **vars(world))


@pytest.fixture(name="build")
def _build():
    return build
