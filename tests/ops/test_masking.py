from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recbole_mm.ops.masking import (
    causal_mask,
    masked_mean,
    masked_softmax,
    padding_mask,
)

MASK = torch.tensor([[True, False, True, True], [False, False, False, False]])


def test_softmax_runs_over_kept_entries_only():
    scores = torch.randn(2, 4, dtype=torch.float64)
    weights = masked_softmax(scores, MASK)
    assert_close(weights[0, [0, 2, 3]], scores[0, [0, 2, 3]].softmax(0))
    assert weights[0, 1] == 0


def test_softmax_over_nothing_is_zero_in_value_and_gradient():
    scores = torch.randn(2, 4, requires_grad=True)
    weights = masked_softmax(scores, MASK)
    weights.pow(2).sum().backward()
    assert not weights[1].any()
    assert not scores.grad[1].any()
    assert scores.grad[0].isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_softmax_and_mean_ignore_what_is_masked(poison):
    values = torch.randn(2, 4)
    disturbed = torch.where(MASK, values, poison)
    assert_close(masked_softmax(disturbed, MASK), masked_softmax(values, MASK))
    assert_close(masked_mean(disturbed, MASK, -1), masked_mean(values, MASK, -1))


def test_softmax_works_along_another_dimension():
    scores = torch.randn(2, 4)
    assert_close(masked_softmax(scores.T, MASK.T, dim=0), masked_softmax(scores, MASK).T)


def test_softmax_and_mean_have_the_right_gradient():
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: masked_softmax(s, MASK), scores)
    assert torch.autograd.gradcheck(lambda s: masked_mean(s, MASK, 1), scores)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e4))
def test_softmax_sums_to_one_or_to_zero(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(5, 7, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.3
    total = masked_softmax(scores, mask).sum(-1)
    assert_close(total, mask.any(-1).float())


def test_mean_over_nothing_is_zero():
    values = torch.randn(2, 4)
    mean = masked_mean(values, MASK, dim=1)
    assert_close(mean, torch.stack([values[0, [0, 2, 3]].mean(), torch.tensor(0.0)]))


def test_mean_takes_a_mask_that_broadcasts():
    values = torch.randn(3, 4, 5)
    mask = torch.tensor([True, True, False, False])[:, None]
    assert_close(masked_mean(values, mask, dim=1), values[:, :2].mean(1))


def test_masks_equal_their_definition():
    size = 6
    causal = causal_mask(size)
    real = padding_mask(torch.tensor([0, 4, 6]), size)
    for j in range(size):
        assert real[:, j].tolist() == [False, j < 4, True]
        for i in range(size):
            assert causal[j, i] == (i <= j)
