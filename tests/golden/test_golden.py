"""The first twenty losses of every model on the generated data set, against committed ones.

A refactoring leaves them as they are. A change that is meant to change numbers renews them with
`python -m tests.golden.test_golden` and says why in CHANGELOG.md.
"""

import itertools
from pathlib import Path

import pytest
import torch

from recbole_mm.ops import sparse_attention
from recbole_mm.registry import MODELS
from tests.conftest import DENSE_UP_TO
from tests.models.conftest import build

FOLDER = Path(__file__).parent
N_STEPS = 20


def losses(name):
    """Sums of the loss terms of the first steps, as RecBole's trainer takes them."""
    world = build(name)
    world.model.train()
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(world.model.parameters(), lr=1e-3)
    batches = itertools.chain.from_iterable(itertools.repeat(world.train))
    for batch in itertools.islice(batches, N_STEPS):
        optimizer.zero_grad()
        loss = sum(world.model.calculate_loss(batch))
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.golden
@pytest.mark.parametrize("name", list(MODELS))
def test_first_losses_are_the_committed_ones(name):
    torch.set_num_threads(1)
    _, *lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    # other processors round differently; twenty steps do not make more of it than this
    assert list(losses(name)) == pytest.approx([float(line) for line in lines], rel=1e-4)


def renew():
    torch.set_num_threads(1)
    sparse_attention._DENSE_UP_TO = dict.fromkeys(DENSE_UP_TO, 0)  # as in the tests
    for name in MODELS:
        lines = ["# python -m tests.golden.test_golden", *(f"{x:.6f}" for x in losses(name))]
        (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    renew()
