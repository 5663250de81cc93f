"""The override files of properties/ablation: each runs, and each changes its model."""

import pytest
import torch
import yaml

from recbole_mm.config import PROPERTIES, Config
from recbole_mm.registry import MODELS

FILES = sorted(path for path in (PROPERTIES / "ablation").glob("*/*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")


@every_file
def test_an_ablation_is_a_few_known_keys_that_differ_from_the_default(path):
    model = path.parent.name
    if model not in MODELS:
        pytest.skip("not registered")
    assert path.read_text().startswith("# ")
    override = yaml.safe_load(path.read_text())
    full = Config(model, "tiny")
    part = Config(model, "tiny", [path])
    # a paper's own values are as many as they are
    assert 1 <= len(override) <= 4 or path.stem == "paper_values"
    assert any(full[key] != part[key] for key in override)


@every_file
def test_what_is_left_out_or_swapped_is_what_the_name_says(path):
    override, (first, *rest) = yaml.safe_load(path.read_text()), path.stem.split("_")
    if first == "swap":
        assert override == {"swap_pairs": [rest]}
    elif first == "without":
        ((key, value),) = override.items()
        assert any(word[:5] in key for word in rest)
        assert value in (0, False, "linear")


@every_file
def test_an_ablation_trains(path, build):
    model = path.parent.name
    if model not in MODELS:
        pytest.skip("not registered")
    override = yaml.safe_load(path.read_text())
    # a value that cannot be a key of the cache of worlds is given as text, as on the command line
    values = {
        k: v if isinstance(v, (str, int, float, bool)) else str(v) for k, v in override.items()
    }
    world = build(model, **values)
    losses = world.model.calculate_loss(next(iter(world.train)))
    assert len(losses) == len(world.model.loss_names)
    total = torch.stack(list(losses)).sum()
    assert total.isfinite()
    total.backward()
