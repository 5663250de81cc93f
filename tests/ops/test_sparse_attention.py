from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mm.ops import attention_tools
from recbole_mm.ops import sparse_attention as sparse_attention_module
from recbole_mm.ops.attention_tools import LOG2_E, Dropout, best_blocks
from recbole_mm.ops.sparse_attention import (
    select_blocks,
    sparse_attention,
    sparse_attention_last,
)
from tests.conftest import DENSE_UP_TO
from tests.reference import sparse_attention as reference

H, D = 2, 3
NAMES = ("query", "key", "value", "gate", "block_key", "block_value")
SIZES = {"block_size": 4, "window_size": 5, "n_selected_blocks": 3}

both_selections = pytest.mark.parametrize("selection", ["query", "query_block"])
both_forms = pytest.mark.parametrize("form", ["dense", "sparse"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles so small that even short inputs need several of each kind."""
    monkeypatch.setattr(attention_tools, "tile_scores", lambda _: 200)


def inputs(L, B=1, b=SIZES["block_size"], n_branches=3, dtype=torch.float64, width=D):
    shapes = [(B, H, L, width)] * 3 + [(B, H, L, n_branches)] + [(B, H, L // b, width)] * 2
    tensors = {n: torch.randn(s, dtype=dtype) for n, s in zip(NAMES, shapes, strict=True)}
    tensors["gate"] = tensors["gate"].sigmoid()
    return {name: x.requires_grad_() for name, x in tensors.items()}


def attend(tensors, length=None, **options):
    if length is None:
        length = [tensors["query"].shape[2]] * len(tensors["query"])
    return sparse_attention(**tensors, length=torch.tensor(length), **(SIZES | options))


def naive(tensors, length, **options):
    rows = zip(*tensors.values(), length, strict=True)
    return torch.stack(
        [
            reference.sparse_attention(
                q, k, v, gate, n, block_key=block_key, block_value=block_value, **options
            )
            for q, k, v, gate, block_key, block_value, n in rows
        ]
    )


def gradients(output, tensors, weight):
    return torch.autograd.grad(
        output, list(tensors.values()), weight, retain_graph=True, materialize_grads=True
    )


def assert_equal_to_naive(L, length, b, w, n, selection, dtype=torch.float64, tolerance=1e-10):
    """Value and every gradient, in both forms."""
    options = {
        "block_size": b,
        "window_size": w,
        "n_selected_blocks": n,
        "selection": selection,
    }
    tensors = inputs(L, len(length), b, dtype=dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    theirs = naive(exact, length, **options)
    # a choice that rounding decides may go either way: leave such a query out
    is_sure = torch.tensor(
        [
            [
                tolerance <= 1e-10 or reference.choice_margin(j, q, k, b, n, selection) > 1e-6
                for j in range(L)
            ]
            for q, k in zip(exact["query"], exact["block_key"], strict=True)
        ]
    )[:, None, :, None]
    weight = torch.randn_like(theirs) * is_sure
    theirs_grad = gradients(theirs, exact, weight)
    for form in ("dense", "sparse"):
        ours = attend(tensors, length, form=form, **options)
        assert_close((ours * is_sure).double(), theirs * is_sure, rtol=0, atol=tolerance)
        ours_grad = gradients(ours, tensors, weight.to(dtype))
        for a, e in zip(ours_grad, theirs_grad, strict=True):
            assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


GRID = [  # L, lengths, b, w, n
    (1, [1, 1], 4, 3, 2),
    (7, [7, 1, 4], 16, 4, 2),
    (7, [7, 6], 2, 3, 2),
    (16, [16, 5], 4, 16, 2),
    (31, [31, 30, 8], 4, 5, 3),
    (31, [31], 5, 1, 1),
    (50, [50, 33], 16, 64, 4),
    (50, [50, 17], 8, 12, 3),
    (63, [63, 62], 16, 20, 3),
    (63, [63], 3, 7, 50),
]


@both_selections
@pytest.mark.parametrize(("L", "length", "b", "w", "n"), GRID)
def test_equals_loop_reference(L, length, b, w, n, selection):
    assert_equal_to_naive(L, length, b, w, n, selection)


@both_selections
@pytest.mark.parametrize(("L", "length", "b", "w", "n"), GRID)
def test_equals_loop_reference_in_single_precision(L, length, b, w, n, selection):
    assert_equal_to_naive(L, length, b, w, n, selection, torch.float32, 1e-5)


@pytest.mark.slow
@both_selections
@pytest.mark.parametrize("L", [1, 7, 16, 31, 50, 63])
@pytest.mark.parametrize("b", [3, 8])
@pytest.mark.parametrize("w", [2, 20])
@pytest.mark.parametrize("n", [1, 3])
def test_equals_loop_reference_at_every_combination(L, b, w, n, selection):
    assert_equal_to_naive(L, [L, L // 2 + 1], b, w, n, selection)


@pytest.mark.slow
@both_selections
@pytest.mark.parametrize(
    ("L", "length", "b", "w", "n"),
    [
        (200, [200, 77], 16, 64, 5),
        (777, [777], 32, 64, 5),
        (777, [777, 500], 20, 33, 4),
        (2048, [2048], 32, 64, 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_loop_reference_on_long_sequences(L, length, b, w, n, selection, dtype, monkeypatch):
    monkeypatch.setattr(attention_tools, "tile_scores", lambda _: 1 << 15)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_equal_to_naive(L, length, b, w, n, selection, dtype, tolerance)


@both_selections
@both_forms
@pytest.mark.parametrize("branch", ["window", "block", "selected"])
def test_a_branch_alone_equals_loop_reference(branch, form, selection):
    L, length, options = 19, [19, 11], {"selection": selection}
    tensors = inputs(L, 2, n_branches=1)
    options |= {
        "window": {"window_size": 5},
        "block": {},
        "selected": {"n_selected_blocks": 3},
    }[branch]
    used = dict(tensors)
    if branch != "block":
        used["block_value"] = None
    ours = sparse_attention(**used, length=torch.tensor(length), block_size=4, form=form, **options)
    theirs = torch.stack(
        [
            reference.sparse_attention(
                *(x[i] for x in list(tensors.values())[:4]),
                n,
                block_size=4,
                block_key=tensors["block_key"][i],
                block_value=tensors["block_value"][i] if branch == "block" else None,
                **options,
            )
            for i, n in enumerate(length)
        ]
    )
    assert_close(ours, theirs, rtol=0, atol=1e-12)


@both_selections
@both_forms
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_is_right(form, selection, dropout):
    tensors = inputs(11, 2)

    def function(*values):
        draws = torch.Generator().manual_seed(1)  # the same weights dropped in every call
        named = dict(zip(NAMES, values, strict=True))
        return attend(
            named, [11, 6], form=form, selection=selection, dropout=dropout, generator=draws
        )

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@both_forms
def test_gradient_may_come_from_a_plain_sum(form):
    tensors = inputs(23)  # the gradient of a sum is one number, expanded
    a = torch.autograd.grad(attend(tensors, form=form).sum(), list(tensors.values()))
    b = gradients(attend(tensors, form=form), tensors, torch.ones(1, H, 23, D).double())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@both_forms
def test_gate_of_zero_passes_nothing_but_its_own_gradient(form):
    tensors = inputs(23)
    tensors["gate"] = torch.zeros_like(tensors["gate"]).requires_grad_()
    output = attend(tensors, form=form)
    grads = dict(zip(NAMES, gradients(output, tensors, torch.ones_like(output)), strict=True))
    assert not output.any()
    assert grads.pop("gate").abs().gt(0).any()
    assert not any(grad.any() for grad in grads.values())


def test_block_level_trains_the_scores_and_selection_does_not():
    tensors = inputs(23, n_branches=1)
    shared = {"length": torch.tensor([23]), "block_size": 4}
    block_value = tensors.pop("block_value")
    block_level = sparse_attention(**tensors, block_value=block_value, **shared)
    selection = sparse_attention(**tensors, n_selected_blocks=3, **shared)
    weight = torch.randn_like(selection)
    trained = dict(zip(tensors, gradients(block_level, tensors, weight), strict=True))
    untrained = dict(zip(tensors, gradients(selection, tensors, weight), strict=True))
    assert trained["block_key"].any()
    assert trained["query"].any()
    assert untrained["query"].any()
    assert not untrained["block_key"].any()


@both_selections
@both_forms
def test_future_does_not_leak(form, selection):
    L, b = 26, SIZES["block_size"]
    tensors = inputs(L)
    output = attend(tensors, form=form, selection=selection)
    for now in range(L):
        disturbed = {name: x.detach().clone() for name, x in tensors.items()}
        for name, x in disturbed.items():
            # a block is of the future until its last token is there
            x[:, :, (now + 1) // b if name.startswith("block") else now + 1 :] += 9.0
        assert_close(
            attend(disturbed, form=form, selection=selection)[:, :, : now + 1],
            output[:, :, : now + 1],
            rtol=0,
            atol=1e-12,
        )


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    length=st.lists(st.integers(0, 21), min_size=1, max_size=4),
    poison=st.sampled_from([float("nan"), float("inf"), 1e300, -7.0]),
    form=st.sampled_from(["dense", "sparse"]),
    selection=st.sampled_from(["query", "query_block"]),
)
def test_padding_and_rows_beside_it_do_not_matter(seed, length, poison, form, selection):
    torch.manual_seed(seed)
    L, b = 21, SIZES["block_size"]
    tensors = inputs(L, len(length))
    poisoned = {}
    for name, x in tensors.items():
        real = torch.tensor(length) // (b if name.startswith("block") else 1)
        is_real = torch.arange(x.shape[2]) < real[:, None]
        poisoned[name] = x.detach().masked_fill(~is_real[:, None, :, None], poison)
        poisoned[name].requires_grad_()
    output = attend(poisoned, length, form=form, selection=selection)
    grads = gradients(output, poisoned, torch.ones_like(output))
    for row, n in enumerate(length):
        assert not output[row, :, n:].any()
        if n == 0:
            continue
        alone = {
            name: x[row : row + 1, :, : n // b if name.startswith("block") else n]
            for name, x in tensors.items()
        }
        expected = attend(alone, [n], form=form, selection=selection)
        assert_close(output[row : row + 1, :, :n], expected, rtol=0, atol=1e-12)
        expected_grads = gradients(expected, alone, torch.ones_like(expected))
        for name, grad, e in zip(NAMES, grads, expected_grads, strict=True):
            real = e.shape[2]
            assert_close(grad[row : row + 1, :, :real], e, rtol=0, atol=1e-11)
            assert not grad[row, :, real:].any(), name


@both_forms
@pytest.mark.parametrize("wide", [{"window_size": 99}, {"n_selected_blocks": 6}])
def test_wide_branch_is_plain_causal_attention(wide, form):
    tensors = inputs(23, n_branches=1)
    branch = {"window_size": None, "n_selected_blocks": None} | wide
    used = tensors | {"block_value": None}
    ours = attend(used, form=form, **branch)
    plain = F.scaled_dot_product_attention(
        tensors["query"], tensors["key"], tensors["value"], is_causal=True
    )
    assert_close(ours, tensors["gate"] * plain, rtol=0, atol=1e-12)


@both_forms
def test_window_of_one_returns_the_value(form):
    tensors = inputs(23, n_branches=1)
    branch = {"window_size": 1, "n_selected_blocks": None}
    ours = attend(tensors | {"block_value": None}, form=form, **branch)
    assert_close(ours, tensors["gate"] * tensors["value"])


def test_query_without_a_finished_block_gets_exactly_nothing_from_the_block_level():
    tensors = inputs(11, n_branches=1)
    output = attend(tensors, window_size=None, n_selected_blocks=None)
    assert not output[:, :, :3].any()
    assert output[:, :, 3:].abs().gt(0).all()


def test_equal_merits_choose_the_lower_block():
    for dtype in (torch.float32, torch.float64):
        query, block_key = torch.ones(1, H, 21, D, dtype=dtype), torch.ones(1, H, 5, D, dtype=dtype)
        chosen = select_blocks(query, block_key, 4, 2, "query")
        assert chosen[0, 20].tolist() == [0, 1]
        assert chosen[0, 5].tolist() == [0, -1]
        assert chosen[0, 3].tolist() == [-1, -1]


@pytest.mark.parametrize("C", [1, 2, 7, 8, 256])
def test_best_blocks_orders_like_a_stable_sort(C):
    merit = torch.rand(50, C).mul(20).round().div(20)  # full of ties, and of zeros
    merit[0], merit[1, -1] = 0.0, 1e-45
    expected = merit.sort(dim=-1, descending=True, stable=True).indices[..., : min(C, 5)]
    assert torch.equal(best_blocks(merit, min(C, 5)), expected)


def test_blocks_of_a_nan_exist():
    """Whose sign is set, as x86 makes that of inf - inf: a gather must not go astray."""
    merit = torch.full((3, 6), -math.nan)
    chosen = best_blocks(torch.cat([merit, -merit]), 3)
    assert 0 <= chosen.min() <= chosen.max() < 6


def test_selection_follows_the_block_level_probability_summed_over_heads():
    tensors = inputs(31)
    for selection in ("query", "query_block"):
        scaled = tensors["query"] * (LOG2_E * D**-0.5)
        chosen = select_blocks(scaled, tensors["block_key"], 4, 3, selection)
        for j in range(31):
            expected = reference.choose(
                j, tensors["query"][0], tensors["block_key"][0], 4, 4, selection
            )
            row = chosen[0, j if selection == "query" else j // 4]
            assert [c for c in row.tolist() if c >= 0] == expected


def test_first_query_of_a_block_selects_for_all_of_it():
    tensors = inputs(31)
    query, block_key = tensors["query"].detach(), tensors["block_key"].detach()
    chosen = select_blocks(query, block_key, 4, 2, "query_block")
    later = query.clone()
    later[:, :, torch.arange(31) % 4 != 0] += 5.0
    assert torch.equal(select_blocks(later, block_key, 4, 2, "query_block"), chosen)


@both_selections
@both_forms
@pytest.mark.parametrize("branch", ["window", "block", "selected"])
def test_dropout_drops_weights_and_scales_up_the_others(branch, form, selection, monkeypatch):
    monkeypatch.setattr(attention_tools, "tile_scores", lambda _: 1 << 12)
    rate, L, b = 0.3, 24, 2
    width = L if branch != "block" else L // b
    tensors = inputs(L, 40, b, n_branches=1, width=width)
    tensors["gate"] = torch.ones_like(tensors["gate"])
    # values are unit vectors: the output lists the weights
    tensors["value"] = torch.eye(L, dtype=torch.float64)[..., :width].expand(40, H, -1, -1)
    tensors["block_value"] = torch.eye(L // b, width, dtype=torch.float64).expand(40, H, -1, -1)
    options = {"block_size": b, "window_size": None, "n_selected_blocks": None}
    options |= {
        "window": {"window_size": 9},
        "block": {},
        "selected": {"n_selected_blocks": 4},
    }[branch]
    used = tensors if branch == "block" else tensors | {"block_value": None}
    whole = attend(used, form=form, selection=selection, **options)
    dropped = attend(used, form=form, selection=selection, dropout=rate, **options)
    is_kept = dropped != 0
    assert_close(dropped, torch.where(is_kept, whole / (1 - rate), 0.0), rtol=1e-4, atol=0)
    share = is_kept.sum() / (whole > 0).sum()
    assert share.item() == pytest.approx(1 - rate, abs=0.02)


@both_selections
@both_forms
def test_dropout_has_the_right_mean(form, selection, monkeypatch):
    monkeypatch.setattr(attention_tools, "tile_scores", lambda _: 1 << 16)
    tensors = {name: x.detach() for name, x in inputs(17).items()}
    many = {name: x.expand(3000, -1, -1, -1) for name, x in tensors.items()}
    mean = attend(many, form=form, selection=selection, dropout=0.5).mean(0, keepdim=True)
    assert_close(mean, attend(tensors, form=form, selection=selection), rtol=0, atol=0.15)


@both_selections
@both_forms
def test_result_is_the_same_bit_for_bit_with_the_same_seed(form, selection):
    tensors = inputs(40, 2)

    def run(seed):
        draws = torch.Generator().manual_seed(seed)
        output = attend(
            tensors, [40, 13], form=form, selection=selection, dropout=0.5, generator=draws
        )
        return [output, *gradients(output, tensors, torch.ones_like(output))]

    assert all(torch.equal(a, b) for a, b in zip(run(3), run(3), strict=True))
    assert not torch.equal(run(3)[0], run(4)[0])


def test_dropout_rate_is_exact_to_16_bits():
    drop = Dropout(0.1, torch.Generator().manual_seed(0))
    kept = drop.draw(torch.zeros(1000, 1003)).double().mean().item()
    assert 1 / drop.scale == pytest.approx(0.9, abs=1e-5)
    assert kept == pytest.approx(0.9, abs=2e-3)
    assert kept * drop.scale == pytest.approx(1.0, abs=2e-3)


@both_selections
@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize(("w", "n"), [(6, 3), (31, 31), (31, 3), (6, 31)])
def test_last_position_equals_the_full_pass(w, n, b, selection):
    length = [0, 1, 4, 5, 8, 30, 31]
    tensors = inputs(31, len(length), b)
    options = {"block_size": b, "window_size": w, "n_selected_blocks": n}
    full = attend(tensors, length, selection=selection, **options)
    row, last = torch.arange(len(length)), (torch.tensor(length) - 1).clamp(min=0)
    expected = torch.where(torch.tensor(length)[:, None, None] > 0, full[row, :, last], 0.0)
    at_last = {name: tensors[name][row, :, last] for name in ("query", "gate")}
    first = last // b * b
    ours = sparse_attention_last(
        **(tensors | at_last),
        length=torch.tensor(length),
        block_query=tensors["query"][row, :, first] if selection == "query_block" else None,
        **options,
    )
    assert_close(ours, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    for a, e in zip(
        gradients(ours, tensors, weight), gradients(expected, tensors, weight), strict=True
    ):
        assert_close(a, e, rtol=0, atol=1e-12)


def test_last_position_honours_dropout():
    tensors = {name: x.detach() for name, x in inputs(31).items()}
    at_last = {name: tensors[name][:, :, -1] for name in ("query", "gate")}
    many = {name: x.expand(4000, *x.shape[1:]) for name, x in (tensors | at_last).items()}
    options = SIZES | {"length": torch.tensor([31])}
    once = sparse_attention_last(**(tensors | at_last), **options)
    options["length"] = options["length"].expand(4000)
    dropped = sparse_attention_last(**many, **options, dropout=0.5)
    assert_close(dropped.mean(0, keepdim=True), once, rtol=0, atol=0.15)
    assert dropped.std(0).gt(0.05).all()


@pytest.mark.parametrize("last", [False, True])
def test_window_and_selection_of_the_whole_row_are_dropped_once(last):
    tensors = {name: x.detach() for name, x in inputs(31, 8).items()}
    options = {"block_size": 4, "window_size": 31, "n_selected_blocks": 8, "dropout": 0.5}

    def run(window_gate, selection_gate):
        values = dict(tensors, gate=tensors["gate"].clone())
        values["gate"][..., 0], values["gate"][..., 2] = window_gate, selection_gate
        draws = torch.Generator().manual_seed(1)
        if not last:
            return attend(values, **options, generator=draws)
        values |= {name: values[name][:, :, -1] for name in ("query", "gate")}
        length = torch.full((8,), 31)
        return sparse_attention_last(**values, length=length, **options, generator=draws)

    assert_close(run(0.25, 0.75), run(0.75, 0.25), rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            # an expanded view holds less than it shows
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.numel = max(self.numel, x.numel())
        return out


@both_selections
@both_forms
def test_no_tensor_grows_with_the_square_of_the_length(form, selection, monkeypatch):
    monkeypatch.setattr(attention_tools, "tile_scores", lambda _: 1 << 14)
    largest = {}
    for L in (512, 2048):
        tensors = inputs(L, b=16, dtype=torch.float32)
        with LargestTensor() as seen:
            output = attend(
                tensors, form=form, selection=selection, block_size=16, window_size=32, dropout=0.1
            )
            output.sum().backward()
        largest[L] = seen.numel
    assert largest[2048] < 2048 * 2048 / 8
    assert largest[2048] <= 4.1 * largest[512]


@both_selections
@both_forms
def test_half_precision_stays_near_single_precision(form, selection):
    tensors = inputs(40, dtype=torch.bfloat16)
    single = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    # one choice for both: rounding would make another one
    monkey = {"n_selected_blocks": 1, "form": form, "selection": selection}
    ours, theirs = attend(tensors, **monkey), attend(single, **monkey)
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), theirs, rtol=0, atol=0.05)
    weight = torch.randn_like(ours)
    for a, e in zip(
        gradients(ours, tensors, weight), gradients(theirs, single, weight.float()), strict=True
    ):
        assert_close(a.float(), e, rtol=0, atol=0.1)


def test_half_precision_selects():
    tensors = inputs(40, dtype=torch.bfloat16)
    for selection in ("query", "query_block"):
        for form in ("dense", "sparse"):
            assert attend(tensors, selection=selection, form=form).isfinite().all()


@pytest.mark.parametrize(
    ("L", "b", "selection", "is_dense"),
    [
        *((300, 16, "query", True), (600, 16, "query", False)),
        *((200, 16, "query_block", True), (400, 16, "query_block", False)),
        *((640, 64, "query", True), (512, 64, "query_block", True), (768, 64, "query", False)),
    ],
)
def test_crossover_is_where_it_was_measured(L, b, selection, is_dense, forms, monkeypatch):
    monkeypatch.setattr(sparse_attention_module, "_DENSE_UP_TO", DENSE_UP_TO)
    monkeypatch.setattr(attention_tools, "tile_scores", lambda _: 1 << 18)
    tensors = inputs(L, b=b, dtype=torch.float32)
    options = {"block_size": b, "window_size": 64, "n_selected_blocks": 5}
    attend(tensors, selection=selection, **options)
    assert forms == [is_dense]


@both_selections
def test_auto_takes_the_dense_form_for_short_and_the_sparse_one_for_long(selection):
    for L, form in ((20, "dense"), (60, "sparse")):
        tensors = inputs(L)
        auto, other = (
            attend(tensors, form=f, selection=selection)
            for f in ("auto", {"dense": "sparse", "sparse": "dense"}[form])
        )
        assert torch.equal(auto, attend(tensors, form=form, selection=selection))
        assert not torch.equal(auto, other)  # they differ in rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both_selections
@both_forms
def test_device_does_not_matter(form, selection):
    tensors = inputs(300, 2, b=16)
    options = {"form": form, "selection": selection, "block_size": 16}
    on_device = {name: x.detach().cuda().requires_grad_() for name, x in tensors.items()}
    ours = sparse_attention(
        **on_device, length=torch.tensor([300, 120]).cuda(), **(SIZES | options)
    )
    theirs = attend(tensors, [300, 120], **options)
    assert_close(ours.cpu(), theirs, rtol=0, atol=1e-10)
    weight = torch.randn_like(theirs)
    for a, e in zip(
        gradients(ours, on_device, weight.cuda()), gradients(theirs, tensors, weight), strict=True
    ):
        assert_close(a.cpu(), e, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"n_selected_blocks": 0}, "n_selected_blocks must be at least 1, got 0"),
        ({"selection": "head"}, "selection: 'head' is unknown; use one of query, query_block"),
        ({"form": "fast"}, "form: 'fast' is unknown; use one of auto, dense, sparse"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"block_size": 5}, r"block_key \(1, 2, 5, 3\) must be \(1, 2, 4, 3\)"),
        ({"block_key": None}, "block_value without block_key"),
        ({"block_key": None, "block_value": None}, "n_selected_blocks 3 needs block_key"),
        ({"window_size": None}, r"gate \(1, 2, 20, 3\) must be \(1, 2, 20, 2\)"),
        ({"length": torch.tensor([1.0])}, r"length must be \(1,\) integers"),
        ({"value": torch.zeros(1, 2, 20, 4)}, r"must both be \(B, H, L, d\)"),
        (
            {"window_size": None, "block_value": None, "n_selected_blocks": None},
            "no branch: give window_size, block_value or n_selected_blocks",
        ),
    ],
)
def test_wrong_argument_is_refused(change, message):
    arguments = inputs(20) | SIZES | {"length": torch.tensor([20])} | change
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)


def test_windowed_branch_equals_masked_attention():
    tensors = inputs(23, n_branches=1)
    branch = {"window_size": 6, "n_selected_blocks": None}
    ours = attend(tensors | {"block_value": None}, **branch)
    seen = torch.ones(23, 23, dtype=torch.bool).tril().triu(-5)
    masked = F.scaled_dot_product_attention(
        tensors["query"], tensors["key"], tensors["value"], attn_mask=seen
    )
    assert_close(ours, tensors["gate"] * masked, rtol=0, atol=1e-12)
