from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recbole_mm.losses.contrastive import (
    cosine_similarity,
    in_batch_info_nce,
    multi_positive_info_nce,
)
from tests.reference import losses as reference

B, C, D = 9, 7, 5
examples = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**16)
scales = st.floats(1e-3, 1e3)


def rows(n=B, generator=None):
    return torch.randn(n, D, dtype=torch.float64, generator=generator).requires_grad_()


def some(*shape, share=0.5, generator=None):
    return torch.rand(*shape, generator=generator) < share


def assert_same_loss(ours, theirs, inputs):
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))


def assert_zero_without_gradient(loss, *inputs):
    assert loss.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, inputs))


def test_cosine_of_a_zero_row_is_zero_even_in_float16():
    left = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float16)
    expected = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    ours = cosine_similarity(left, left, temperature=0.5)
    assert_close(ours, expected, atol=4e-3, rtol=0)  # float16 on the way


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("n_groups", [1, 3, 100])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_in_batch_equals_loop_reference(temperature, n_groups, share):
    anchor, positive = rows(), rows()
    group, present = torch.randint(n_groups, (B,)), some(B, share=share)
    ours = in_batch_info_nce(
        anchor, positive, temperature=temperature, group=group, present=present
    )
    theirs = reference.info_nce(anchor, positive, temperature, group, present)
    assert_same_loss(ours, theirs, (anchor, positive))


def test_in_batch_without_masks_uses_every_row():
    anchor, positive = rows(), rows()
    ours = in_batch_info_nce(anchor, positive, temperature=0.5)
    theirs = reference.info_nce(anchor, positive, 0.5, range(B), [True] * B)
    assert_same_loss(ours, theirs, (anchor, positive))


def test_uniform_similarity_gives_log_batch_size():
    anchor = torch.ones(7, 4)
    assert in_batch_info_nce(anchor, anchor, temperature=0.3).item() == pytest.approx(math.log(7))


@examples
@given(scale=scales, seed=seeds)
def test_in_batch_is_invariant_to_scale_and_row_order(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    anchor, positive = rows(generator=generator), rows(generator=generator)
    group = torch.randint(4, (B,), generator=generator)
    order = torch.randperm(B, generator=generator)
    loss = in_batch_info_nce(anchor, positive, temperature=0.2, group=group)
    moved = in_batch_info_nce(
        scale * anchor[order], positive[order], temperature=0.2, group=group[order]
    )
    assert_close(moved, loss)


def test_in_batch_gradient_is_right():
    group, present = torch.randint(4, (B,)), some(B)
    assert torch.autograd.gradcheck(
        lambda a, p: in_batch_info_nce(a, p, temperature=0.3, group=group, present=present),
        (rows(), rows()),
    )


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_in_batch_absent_row_influences_nothing(junk):
    anchor, positive = rows(), rows()
    present = torch.arange(B) != 3
    there = present[:, None]

    def loss(a, p):
        return in_batch_info_nce(
            torch.where(there, a, junk),
            torch.where(there, p, junk),
            temperature=0.2,
            present=present,
        )

    alone = in_batch_info_nce(anchor[present], positive[present], temperature=0.2)
    assert_same_loss(loss(anchor, positive), alone, (anchor, positive))


@pytest.mark.parametrize("n_present", [0, 1])
def test_in_batch_of_fewer_than_two_rows_is_zero(n_present):
    anchor, positive = rows(), rows()
    present = torch.arange(B) < n_present
    loss = in_batch_info_nce(anchor, positive, temperature=0.2, present=present)
    assert_zero_without_gradient(loss, anchor, positive)


def test_in_batch_of_no_row_is_zero():
    empty = rows(0)
    assert_zero_without_gradient(in_batch_info_nce(empty, empty, temperature=1.0), empty)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_multi_positive_equals_loop_reference(symmetric, temperature, share):
    anchor, candidates = rows(B), rows(C)
    positive, ignored = some(B, C, share=0.3), some(B, C, share=share)
    ours = multi_positive_info_nce(
        anchor,
        candidates,
        positive,
        temperature=temperature,
        ignore_mask=ignored,
        symmetric=symmetric,
    )
    theirs = reference.multi_positive_info_nce(anchor, candidates, positive, ignored, temperature)
    if symmetric:
        swapped = reference.multi_positive_info_nce(
            candidates, anchor, positive.T, ignored.T, temperature
        )
        theirs = (theirs + swapped) / 2
    assert_same_loss(ours, theirs, (anchor, candidates))


def test_one_positive_each_is_in_batch_info_nce():
    anchor, positive = rows(), rows()
    multi = multi_positive_info_nce(
        anchor, positive, torch.eye(B, dtype=torch.bool), temperature=0.2
    )
    assert_same_loss(
        multi, in_batch_info_nce(anchor, positive, temperature=0.2), (anchor, positive)
    )


@examples
@given(scale=scales, seed=seeds)
def test_multi_positive_is_invariant_to_scale_and_order(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    anchor, candidates = rows(B, generator), rows(C, generator)
    positive = some(B, C, share=0.3, generator=generator)
    ignored = some(B, C, share=0.2, generator=generator)
    a, c = torch.randperm(B, generator=generator), torch.randperm(C, generator=generator)

    loss = multi_positive_info_nce(
        anchor, candidates, positive, temperature=0.2, ignore_mask=ignored, symmetric=True
    )
    moved = multi_positive_info_nce(
        scale * anchor[a],
        candidates[c],
        positive[a][:, c],
        temperature=0.2,
        ignore_mask=ignored[a][:, c],
        symmetric=True,
    )
    assert_close(moved, loss)


def test_multi_positive_gradient_is_right():
    positive, ignored = some(B, C, share=0.3), some(B, C, share=0.3)
    assert torch.autograd.gradcheck(
        lambda a, c: multi_positive_info_nce(
            a, c, positive, temperature=0.3, ignore_mask=ignored, symmetric=True
        ),
        (rows(B), rows(C)),
    )


@pytest.mark.parametrize("junk", [1e6, float("nan")])
def test_multi_positive_ignored_row_and_column_influence_nothing(junk):
    anchor, candidates = rows(B), rows(C)
    positive, ignored = some(B, C, share=0.3), torch.zeros(B, C, dtype=torch.bool)
    ignored[2], ignored[:, 4] = True, True
    a, c = torch.arange(B) != 2, torch.arange(C) != 4
    loss = multi_positive_info_nce(
        torch.where(a[:, None], anchor, junk),
        torch.where(c[:, None], candidates, junk),
        positive,
        temperature=0.2,
        ignore_mask=ignored,
        symmetric=True,
    )
    alone = multi_positive_info_nce(
        anchor[a], candidates[c], positive[a][:, c], temperature=0.2, symmetric=True
    )
    assert_same_loss(loss, alone, (anchor, candidates))


@pytest.mark.parametrize("kept", [0, 1])
def test_multi_positive_with_fewer_than_two_rows_is_zero(kept):
    anchor, candidates = rows(), rows()
    use = torch.arange(B) < kept
    loss = multi_positive_info_nce(
        anchor,
        candidates,
        torch.eye(B, dtype=torch.bool),
        temperature=0.2,
        ignore_mask=~(use[:, None] & use),
        symmetric=True,
    )
    assert_zero_without_gradient(loss, anchor, candidates)


def test_multi_positive_without_a_positive_is_zero():
    anchor, candidates = rows(B), rows(C)
    loss = multi_positive_info_nce(
        anchor, candidates, torch.zeros(B, C, dtype=torch.bool), temperature=0.2
    )
    assert_zero_without_gradient(loss, anchor, candidates)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        in_batch_info_nce(rows(), rows(), temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        multi_positive_info_nce(rows(), rows(C), some(B, C), temperature=temperature)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"anchor \(9, 5\) != positive \(7, 5\)"):
        in_batch_info_nce(rows(), rows(C), temperature=1.0)
    with pytest.raises(ValueError, match=r"group must have the shape \(9,\), got \(7,\)"):
        in_batch_info_nce(rows(), rows(), temperature=1.0, group=torch.arange(C))
    with pytest.raises(ValueError, match=r"present must have the shape \(9,\), got \(1,\)"):
        in_batch_info_nce(rows(), rows(), temperature=1.0, present=some(1))
    with pytest.raises(ValueError, match=r"positive_mask must have the shape \(9, 7\), got"):
        multi_positive_info_nce(rows(), rows(C), some(C, B), temperature=1.0)
    with pytest.raises(ValueError, match=r"ignore_mask must have the shape \(9, 7\), got"):
        multi_positive_info_nce(
            rows(), rows(C), some(B, C), temperature=1.0, ignore_mask=some(C, B)
        )
    with pytest.raises(ValueError, match="must have the same width"):
        multi_positive_info_nce(rows(), rows(C)[:, :2], some(B, C), temperature=1.0)
