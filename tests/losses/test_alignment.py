from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recbole_mm.losses.alignment import (
    gaussian_moments,
    similarity_structure,
    uniformity,
    variance_hinge,
)
from tests.reference import losses as reference

B, D, EPS = 8, 5, 1e-4
TITLES = torch.randn(B, B, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tanh()
seeds = st.integers(0, 2**16)
examples = settings(deadline=None, max_examples=25, derandomize=True)

# for each loss ours and the loop
LOSSES = {
    "similarity_structure": (
        lambda x, present: similarity_structure(TITLES, x, temperature=0.3, present=present),
        lambda x, present: reference.similarity_structure(TITLES, x, 0.3, present),
    ),
    "variance_hinge": (
        lambda x, present: variance_hinge(x, present=present),
        lambda x, present: reference.variance_hinge(x, present, EPS),
    ),
    "gaussian_moments": (
        lambda x, present: gaussian_moments(x, present=present),
        lambda x, present: reference.gaussian_moments(x, present, EPS),
    ),
    "uniformity": (
        lambda x, present: uniformity(x, present=present),
        lambda x, present: reference.uniformity(x, present, 2.0),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def rows(generator=None):
    return (0.7 * torch.randn(B, D, dtype=torch.float64, generator=generator)).requires_grad_()


def assert_same_loss(ours, theirs, x):
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


@every_loss
@pytest.mark.parametrize("n_present", [2, 3, B])
def test_equals_loop_reference(name, n_present):
    ours, loop = LOSSES[name]
    x, present = rows(), torch.arange(B).roll(3) < n_present
    assert_same_loss(ours(x, present), loop(x, present), x)


@every_loss
def test_no_mask_means_every_row(name):
    ours, loop = LOSSES[name]
    x = rows()
    assert_same_loss(ours(x, None), loop(x, [True] * B), x)


@every_loss
def test_gradient_is_right(name):
    present = torch.arange(B) != 2
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, present), (rows(),))


@every_loss
@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_absent_row_influences_nothing(name, junk):
    ours, loop = LOSSES[name]
    x, present = rows(), torch.arange(B) != 2
    disturbed = torch.where(present[:, None], x, junk)
    assert_same_loss(ours(disturbed, present), loop(x, present), x)


@every_loss
@pytest.mark.parametrize("n_present", [0, 1])
@pytest.mark.parametrize("junk", [0.0, float("nan")])
def test_fewer_than_two_rows_give_zero_and_no_gradient(name, n_present, junk):
    x, present = rows(), torch.arange(B) < n_present
    disturbed = torch.where(present[:, None], x, junk)
    loss = LOSSES[name][0](disturbed, present)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


@every_loss
def test_identical_rows_give_a_finite_gradient(name):
    x = torch.ones(B, D, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name][0](x, None)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@every_loss
def test_leading_dimensions_are_separate_batches(name):
    ours, _ = LOSSES[name]
    x = torch.stack([rows(), rows(), rows()])
    present = torch.rand(3, B) < 0.6
    present[0] = False
    apart = torch.stack([ours(x[m], present[m]) for m in range(3)])
    assert_close(ours(x, present), apart)
    assert_close(ours(x, present[1]), torch.stack([ours(v, present[1]) for v in x]))


@examples
@given(seed=seeds)
@every_loss
def test_invariant_to_row_order(name, seed):
    generator = torch.Generator().manual_seed(seed)
    x, order = rows(generator), torch.randperm(B, generator=generator)
    present = torch.rand(B, generator=generator) < 0.7
    if name == "similarity_structure":
        moved = similarity_structure(
            TITLES[order][:, order], x[order], temperature=0.3, present=present[order]
        )
    else:
        moved = LOSSES[name][0](x[order], present[order])
    assert_close(moved, LOSSES[name][0](x, present))


@examples
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("name", ["similarity_structure", "uniformity"])
def test_losses_on_the_sphere_ignore_scale(name, seed, scale):
    x = rows(torch.Generator().manual_seed(seed))
    assert_close(LOSSES[name][0](scale * x, None), LOSSES[name][0](x, None))


@examples
@given(seed=seeds, shift=st.floats(-100, 100))
def test_variance_hinge_ignores_a_shift(seed, shift):
    x = rows(torch.Generator().manual_seed(seed))
    assert_close(variance_hinge(x + shift), variance_hinge(x))


@examples
@given(seed=seeds)
def test_structure_is_zero_for_its_own_similarities_and_positive_otherwise(seed):
    x = rows(torch.Generator().manual_seed(seed))
    own = torch.cosine_similarity(x[:, None], x[None], dim=-1)
    assert similarity_structure(own, x, temperature=0.1).item() == pytest.approx(0, abs=1e-9)
    assert similarity_structure(TITLES, x, temperature=0.1).item() > 1e-3


def test_structure_ignores_the_diagonal():
    x = rows()
    loss = similarity_structure(TITLES, x, temperature=0.1)
    assert_close(similarity_structure(TITLES + 50 * torch.eye(B), x, temperature=0.1), loss)


def test_structure_has_a_gradient_for_the_similarities_too():
    x = rows().detach()
    titles = TITLES.clone().requires_grad_()
    present = torch.arange(B) != 2
    assert torch.autograd.gradcheck(
        lambda s: similarity_structure(s, x, temperature=0.3, present=present), (titles,)
    )


def test_absent_similarities_may_be_nan():
    x, present = rows(), torch.arange(B) != 2
    pair = present[:, None] & present
    holes = torch.where(pair, TITLES, float("nan"))
    assert_same_loss(
        similarity_structure(holes, x, temperature=0.3, present=present),
        similarity_structure(TITLES, x, temperature=0.3, present=present),
        x,
    )


def test_spread_rows_have_no_hinge_and_collapsed_rows_nearly_one():
    assert variance_hinge(10 * rows()).item() == 0
    assert variance_hinge(torch.ones(B, D)).item() == pytest.approx(1 - EPS**0.5)


def test_gaussian_is_smallest_at_mean_zero_and_variance_one():
    x = torch.randn(500, D, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0)
    assert gaussian_moments(x).item() == pytest.approx(0, abs=1e-8)
    assert gaussian_moments(x + 1).item() == pytest.approx(0.5, abs=1e-3)
    assert gaussian_moments(2 * x).item() == pytest.approx((3 - math.log(4)) / 2, abs=1e-3)


def test_uniformity_is_zero_for_one_point_and_lowest_for_opposite_points():
    point = torch.ones(4, D)
    assert uniformity(point).item() == pytest.approx(0, abs=1e-6)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(poles, t=3.0).item() == pytest.approx(-12.0)


def test_settings_and_shapes_that_do_not_fit_are_refused():
    x = rows()
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        similarity_structure(TITLES, x, temperature=0)
    with pytest.raises(ValueError, match=r"similarity must end in \(8, 8\), got \(8, 5\)"):
        similarity_structure(x, x, temperature=1.0)
    with pytest.raises(ValueError, match="t must be positive, got -1"):
        uniformity(x, t=-1)
    with pytest.raises(ValueError, match=r"present \(5,\) does not fit the rows \(8,\)"):
        variance_hinge(x, present=torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("loss", [gaussian_moments, variance_hinge])
def test_moments_of_half_precision_are_summed_in_single(loss):
    """Autocast hands the rows over in bfloat16, whose three digits a variance does not survive."""
    x = torch.randn(256, 8).bfloat16()
    assert_close(loss(x), loss(x.float()))
