from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mm.losses.ranking import gbce_loss, next_item_cross_entropy
from tests.reference import losses as reference

T, N, D = 11, 23, 4
TWO_ROWS = 2 * N * 8 / 2**20  # MiB that hold the float64 logits of two targets
seeds = st.integers(0, 2**16)
examples = settings(deadline=None, max_examples=25, derandomize=True)


def batch(n_targets=T, n_items=N, dtype=torch.float64, generator=None):
    states = torch.randn(n_targets, D, dtype=torch.float64, generator=generator)
    table = torch.randn(n_items, D, dtype=torch.float64, generator=generator)
    target = torch.randint(1, n_items, (n_targets,), generator=generator)
    return states.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), target


def assert_same_loss(ours, theirs, inputs, **tolerance):
    assert_close(ours, theirs, **tolerance)
    ours = torch.autograd.grad(3 * ours, inputs)
    assert_close(ours, torch.autograd.grad(3 * theirs, inputs), **tolerance)


class StoragesMade(TorchDispatchMode):
    """Note the size in bytes of every storage that an operation makes; views make none."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    @property
    def largest(self):
        return max(self.sizes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in (*args, *kwargs.values())
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self.sizes.append(storage.nbytes())
        return out


@pytest.mark.parametrize("memory_mb", [1e-9, TWO_ROWS, 1000])
@pytest.mark.parametrize("padding_excluded", [False, True])
def test_cross_entropy_equals_loop_reference(memory_mb, padding_excluded):
    states, table, target = batch()
    ours = next_item_cross_entropy(
        states, table, target, memory_mb=memory_mb, padding_excluded=padding_excluded
    )
    theirs = reference.next_item_cross_entropy(states, table, target, int(padding_excluded))
    assert_same_loss(ours, theirs, (states, table))


@pytest.mark.parametrize("memory_mb", [1e-9, 0.05, 1000])
def test_cross_entropy_equals_torchs_in_float32(memory_mb):
    states, table, target = batch(100, 300, torch.float32)
    ours = next_item_cross_entropy(states, table, target, memory_mb=memory_mb)
    assert_same_loss(ours, F.cross_entropy(states @ table.T, target), (states, table))


@pytest.mark.parametrize("memory_mb", [1e-9, 0.05, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_narrow_types_is_normalised_in_float32(memory_mb, dtype):
    states, table, target = batch(100, 300, dtype)
    ours = next_item_cross_entropy(states, table, target, memory_mb=memory_mb)
    exact = F.cross_entropy(states.double() @ table.double().T, target)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=2e-3)  # logits rounded to 8 bits
    got = torch.autograd.grad(ours, (states, table))
    for mine, theirs in zip(got, torch.autograd.grad(exact, (states, table)), strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 1e-2


def test_cross_entropy_takes_its_products_in_the_type_of_autocast():
    states, table, target = batch(100, 300, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = next_item_cross_entropy(states, table, target)
    rounded = next_item_cross_entropy(states.bfloat16(), table.bfloat16(), target)
    assert_close(ours, rounded, rtol=0, atol=0)
    grads = torch.autograd.grad(ours, (states, table))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    assert_close(grads, torch.autograd.grad(rounded, (states, table)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_logits_exceeds_the_limit(dtype):
    n_targets, n_items, memory_mb = 400, 500, 0.05
    states, table, target = batch(n_targets, n_items, dtype)
    with StoragesMade() as seen:
        next_item_cross_entropy(states, table, target, memory_mb=memory_mb).backward()
    # all that is larger than the gradient of the table, taken together
    blocks = [size for size in seen.sizes if size > 2 * n_items * D * 4]
    assert 0.9 * memory_mb * 2**20 < sum(blocks) <= memory_mb * 2**20
    with StoragesMade() as plain:  # the counter can fail
        F.cross_entropy(states @ table.T, target).backward()
    assert plain.largest >= n_targets * n_items * states.element_size()


@pytest.mark.parametrize("learned", [0, 1])
def test_only_one_side_may_need_a_gradient(learned):
    states, table, target = batch()
    inputs = [states.detach(), table.detach()]
    inputs[learned].requires_grad_()
    ours = next_item_cross_entropy(*inputs, target, memory_mb=TWO_ROWS)
    theirs = F.cross_entropy(inputs[0] @ inputs[1].T, target)
    assert_same_loss(ours, theirs, (inputs[learned],))


def test_without_gradients_only_the_value_is_computed():
    states, table, target = batch()
    expected = F.cross_entropy(states @ table.T, target)
    with torch.no_grad(), StoragesMade() as seen:
        loss = next_item_cross_entropy(states, table, target, memory_mb=1e-9)
    assert_close(loss, expected.detach())
    assert not loss.requires_grad
    assert seen.largest <= 64 * 8  # one aligned row of logits, no gradient of the table


def test_cross_entropy_gradient_is_right():
    states, table, target = batch(5, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: next_item_cross_entropy(h, w, target, memory_mb=1e-9), (states, table)
    )


def test_a_second_derivative_is_refused_rather_than_wrong():
    states, table, target = batch()
    loss = next_item_cross_entropy(states, table, target)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, states, create_graph=True)


def test_backward_can_be_called_twice():
    states, table, target = batch()
    loss = next_item_cross_entropy(states, table, target)
    first = torch.autograd.grad(loss, (states, table), retain_graph=True)
    assert_close(torch.autograd.grad(loss, (states, table)), first)


def test_large_logits_do_not_overflow():
    states, table, target = batch(dtype=torch.float32)
    loss = next_item_cross_entropy(1e4 * states, table, target)
    assert_close(loss, F.cross_entropy(1e4 * states @ table.T, target))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (states, table)))


@examples
@given(seed=seeds, rows=st.integers(1, T + 2))
def test_cross_entropy_ignores_order_and_block_size(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    states, table, target = batch(generator=generator)
    order = torch.randperm(T, generator=generator)
    loss = next_item_cross_entropy(states, table, target)
    moved = next_item_cross_entropy(
        states[order], table, target[order], memory_mb=rows * N * 8 / 2**20
    )
    assert_same_loss(moved, loss, (states, table))


def test_no_target_gives_zero():
    states, table, target = batch(0)
    loss = next_item_cross_entropy(states, table, target)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, table)[0].eq(0).all()


@pytest.mark.parametrize(("padding_excluded", "item"), [(True, 0), (False, N), (False, -1)])
def test_target_outside_the_softmax_is_refused(padding_excluded, item):
    states, table, target = batch()
    target[3] = item
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        next_item_cross_entropy(states, table, target, padding_excluded=padding_excluded)


def test_shapes_that_do_not_fit_are_refused():
    states, table, target = batch()
    with pytest.raises(ValueError, match=r"\(T, D\) and \(N, D\)"):
        next_item_cross_entropy(states[:, :2], table, target)
    with pytest.raises(ValueError, match=r"target must be \(11,\), got \(3,\)"):
        next_item_cross_entropy(states, table, target[:3])
    with pytest.raises(ValueError, match="memory_mb must be positive, got 0"):
        next_item_cross_entropy(states, table, target, memory_mb=0)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("n_negatives", [1, 6])
def test_gbce_equals_loop_reference(t, n_negatives):
    positive, negatives = torch.randn(T).double(), torch.randn(T, n_negatives).double()
    ours = gbce_loss(positive, negatives, n_items=N, t=t)
    assert ours.item() == pytest.approx(reference.gbce(positive, negatives, N, t))


def test_gbce_without_calibration_is_binary_cross_entropy():
    positive, negatives = torch.randn(T), torch.randn(T, 6)
    logits = torch.cat([positive[:, None], negatives], dim=1)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    assert_close(
        gbce_loss(positive, negatives, n_items=N, t=0.0),
        F.binary_cross_entropy_with_logits(logits, labels),
    )


def test_gbce_with_every_negative_is_binary_cross_entropy_for_any_t():
    positive, negatives = torch.randn(T), torch.randn(T, N - 1)
    plain = gbce_loss(positive, negatives, n_items=N, t=0.0)
    assert_close(gbce_loss(positive, negatives, n_items=N, t=1.0), plain)


def test_fully_calibrated_gbce_is_smallest_at_the_true_probability():
    # one target among N items, K of N - 1 drawn: the best constant score is log-odds 1 / (N - 1)
    scores = torch.linspace(-8, 2, 2001)
    losses = torch.stack([gbce_loss(s.view(1), s.expand(1, 6), n_items=N, t=1.0) for s in scores])
    assert scores[losses.argmin()].item() == pytest.approx(-math.log(N - 1), abs=0.01)


@examples
@given(seed=seeds, t=st.floats(0, 1))
def test_gbce_ignores_the_order_of_targets_and_negatives(seed, t):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.randn(T, generator=generator)
    negatives = torch.randn(T, 6, generator=generator)
    rows, columns = torch.randperm(T, generator=generator), torch.randperm(6, generator=generator)
    assert_close(
        gbce_loss(positive[rows], negatives[rows][:, columns], n_items=N, t=t),
        gbce_loss(positive, negatives, n_items=N, t=t),
    )


def test_gbce_gradient_is_right_and_finite_for_extreme_scores():
    positive = torch.randn(T, dtype=torch.float64, requires_grad=True)
    negatives = torch.randn(T, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, n: gbce_loss(p, n, n_items=N), (positive, negatives))
    loss = gbce_loss(-1e6 * positive.abs(), 1e6 * negatives.abs(), n_items=N)
    assert torch.isfinite(torch.autograd.grad(loss, negatives)[0]).all()


def test_gbce_of_no_target_is_zero():
    assert gbce_loss(torch.zeros(0), torch.zeros(0, 3), n_items=N).item() == 0


def test_gbce_refuses_what_does_not_fit():
    positive, negatives = torch.randn(T), torch.randn(T, 6)
    with pytest.raises(ValueError, match=r"must be \(T,\) and \(T, K\)"):
        gbce_loss(positive, negatives[:3], n_items=N)
    with pytest.raises(ValueError, match="6 negatives of 6 items; use 1 to 5"):
        gbce_loss(positive, negatives, n_items=6)
    with pytest.raises(ValueError, match=r"t must be between 0 and 1, got 1\.5"):
        gbce_loss(positive, negatives, n_items=N, t=1.5)
