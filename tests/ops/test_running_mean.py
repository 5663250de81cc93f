from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.ops import running_mean
from recbole_mm.ops.running_mean import running_softmax_mean

B, K, D = 3, 2, 4


def loop(scores, values):
    """One position and one mean at a time."""
    rows = []
    for s, v in zip(scores, values, strict=True):
        for j in range(len(s)):
            weights = s[: j + 1].softmax(0)  # (j + 1, K)
            rows.append(torch.stack([(w[:, None] * v[: j + 1]).sum(0) for w in weights.T]))
    return torch.stack(rows).view(*scores.shape, values.size(-1))


def inputs(length, dtype=torch.float64, scale=1.0):
    scores = scale * torch.randn(B, length, K, dtype=dtype)
    return scores.requires_grad_(), torch.randn(B, length, D, dtype=dtype, requires_grad=True)


@pytest.fixture(params=[4, running_mean.BLOCK], ids="block{}".format)
def block(request, monkeypatch):
    monkeypatch.setattr(running_mean, "BLOCK", request.param)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 32, 50, 97])
@pytest.mark.usefixtures("block")
def test_equals_the_loop_in_value_and_gradient(length):
    scores, values = inputs(length)
    ours, theirs = running_softmax_mean(scores, values), loop(scores, values)
    assert ours.shape == (B, length, K, D)
    assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(ours)
    assert_close(
        torch.autograd.grad((weight * ours).sum(), (scores, values)),
        torch.autograd.grad((weight * theirs).sum(), (scores, values)),
        atol=1e-10,
        rtol=1e-10,
    )


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_float32_keeps_every_prefix_whatever_comes_later(scale):
    """exp(300) is beyond float32, and a sum relative to the row's largest score would be zero."""
    scores, values = inputs(70, torch.float32, scale)
    ours = running_softmax_mean(scores, values)
    assert_close(ours, loop(scores, values), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(ours.square().sum(), (scores, values))
    expected = torch.autograd.grad(loop(scores, values).square().sum(), (scores, values))
    # gradients of up to 70 positions cancel at one score
    assert_close(gradients, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near_single_precision(autocast):
    scores, values = inputs(90, torch.float32, 3.0)
    expected = running_softmax_mean(scores, values)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = running_softmax_mean(scores.bfloat16(), values.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), expected, atol=0.05, rtol=0.05)
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours.sum(), (scores, values)))


@pytest.mark.usefixtures("block")
def test_no_position_sees_a_later_one():
    scores, values = inputs(21)
    before = running_softmax_mean(scores, values)
    with torch.no_grad():
        scores[:, 13:] += 50
        values[:, 13:] *= -3
    after = running_softmax_mean(scores, values)
    assert_close(after[:, :13], before[:, :13], rtol=0, atol=0)
    assert not torch.isclose(after[:, 13:], before[:, 13:]).all()


def test_nothing_of_length_squared_is_held():
    """What autograd keeps grows with the length, at most with its 3/2-th power here."""
    sizes = []
    for length in (256, 1024):
        kept = []
        scores, values = inputs(length, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            running_softmax_mean(scores, values)
        sizes.append(max(kept))
    assert sizes[1] < 8 * sizes[0]


def test_sums_are_taken_in_float32_under_autocast_too():
    scores = torch.zeros(1, 200, 2, dtype=torch.bfloat16)
    ones = torch.ones(1, 200, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (running_softmax_mean(scores, ones) == 1).all()
