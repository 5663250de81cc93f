from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from recbole_mm.modules.sparse_alignment import (
    BlockCompression,
    SparseAlignmentAttention,
    SparseAlignmentEncoder,
)
from tests.reference import sparse_attention as reference

L, D, H = 19, 8, 2
# few enough keys for L that `auto` takes the sparse form, see the first test
SIZES = {"window_size": 3, "block_size": 3, "n_selected_blocks": 2}
LENGTH = torch.tensor([19, 1, 0, 12])
OFFSET = [2.0, -1.0, -1.0]  # of the gates, as documented

both_selections = pytest.mark.parametrize("selection", ["query", "query_block"])
branch_sets = pytest.mark.parametrize(
    "switches",
    [
        {},
        {"use_window": False},
        {"use_block": False},
        {"use_selected": False},
        {"use_block": False, "use_selected": False},
        {"use_window": False, "use_block": False},
        {"use_window": False, "use_selected": False},
    ],
)


def attention(dropout=0.0, **changes):
    sizes = {"hidden_dropout_prob": dropout, "attn_dropout_prob": dropout, "layer_norm_eps": 1e-12}
    return SparseAlignmentAttention(D, H, **(sizes | SIZES | changes)).double()


def encoder(dropout=0.0, **changes):
    sizes = {"n_heads": H, "inner_size": 8}
    sizes |= {"hidden_dropout_prob": dropout, "attn_dropout_prob": dropout}
    return SparseAlignmentEncoder(D, **(sizes | SIZES | changes)).double()


def sequences(B=4):
    return torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)


def last_real(states, length=LENGTH):
    at_last = states[torch.arange(len(length)), (length - 1).clamp(min=0)]
    return torch.where(length[:, None] > 0, at_last, 0.0)


@both_selections
def test_these_sizes_take_the_sparse_form(selection, forms):
    attention(selection=selection)(sequences(), LENGTH)
    assert forms
    assert not any(forms)


@both_selections
@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("block_evolution", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_layer_equals_loop_reference(selection, compression, block_evolution, rotary):
    choices = {
        "selection": selection,
        "compression": compression,
        "block_evolution": block_evolution,
        "rotary": rotary,
    }
    model, x = attention(**choices), sequences()
    parameters = dict(model.named_parameters())
    ours, theirs, weight = [], [], torch.randn(L, D, dtype=torch.float64)
    for row, n in enumerate(LENGTH.tolist()):
        if n > 0:
            ours.append(model(x, LENGTH)[row, :n])
            theirs.append(
                reference.layer(
                    parameters, x[row], n, n_heads=H, offset=OFFSET, **(SIZES | choices)
                )
            )
    assert_close(ours, theirs, rtol=0, atol=1e-10)
    targets = [x, *parameters.values()]
    grads = [
        torch.autograd.grad(sum((s * weight[: len(s)]).sum() for s in states), targets)
        for states in (ours, theirs)
    ]
    assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


@both_selections
@branch_sets
@pytest.mark.parametrize("rotary", [True, False])
def test_last_equals_the_last_real_position_of_the_full_pass(switches, selection, rotary):
    model, x = encoder(selection=selection, rotary=rotary, **switches), sequences()
    full, last = last_real(model(x, LENGTH)), model.last(x, LENGTH)
    assert_close(last, full, rtol=0, atol=1e-12)
    weight = torch.randn_like(last)
    targets = [x, *model.parameters()]
    grads = [torch.autograd.grad((s * weight).sum(), targets) for s in (last, full)]
    assert_close(grads[0], grads[1], rtol=0, atol=1e-11)


def test_last_of_an_empty_row_is_exactly_zero_with_a_zero_gradient():
    model, x = encoder(), sequences()
    last = model.last(x, LENGTH)
    last.sum().backward()
    assert not last[2].any()
    assert not x.grad[2].any()


@both_selections
@branch_sets
def test_every_parameter_gets_a_gradient(switches, selection):
    model, x = encoder(selection=selection, **switches), sequences()
    (model(x, LENGTH) * torch.randn(L, D)).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_branch_switched_off_has_no_parameters():
    def names(**switches):
        model = attention(**switches)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    everything = names()
    assert everything["gate.weight"] == (H * 3, D)
    assert names(use_window=False)["gate.weight"] == (H * 2, D)
    without_block = names(use_block=False)
    assert not any(name.startswith(("compress", "evolve")) for name in without_block)
    assert not any(name.startswith("evolve") for name in names(block_evolution=False))
    assert "compress.dense_1.weight" not in names(compression="mean")


@both_selections
def test_future_does_not_leak(selection):
    model, x = encoder(selection=selection), sequences(1).detach()
    length = torch.tensor([L])
    states = model(x, length)
    for now in range(L - 1):
        disturbed = x.clone()
        disturbed[:, now + 1 :] += 3.0
        again = model(disturbed, length)[:, : now + 1]
        assert_close(again, states[:, : now + 1], rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    length=st.lists(st.integers(1, L), min_size=1, max_size=4),
    poison=st.sampled_from([float("nan"), float("inf"), 1e200, -3.0]),
    selection=st.sampled_from(["query", "query_block"]),
)
def test_padding_and_rows_beside_it_do_not_matter(seed, length, poison, selection):
    torch.manual_seed(seed)
    model, x = encoder(selection=selection), sequences(len(length)).detach()
    lengths = torch.tensor(length)
    is_padding = (torch.arange(L) >= lengths[:, None])[..., None]
    poisoned = x.masked_fill(is_padding, poison).requires_grad_()
    states = model(poisoned, lengths)
    for row, n in enumerate(length):
        alone = model(x[row : row + 1, :n], lengths[row : row + 1])
        assert_close(states[row : row + 1, :n], alone, rtol=0, atol=1e-12)
    last_real(states, lengths).sum().backward()
    assert not poisoned.grad.masked_select(is_padding).any()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("n", [1, 3, 4])
def test_sequence_not_longer_than_a_block_works(n):
    model, x = encoder(), sequences(2)[:, :n]
    length = torch.tensor([n, 1])
    assert_close(model.last(x, length), last_real(model(x, length), length), rtol=0, atol=1e-12)


def test_gates_favour_the_window_after_any_initialisation():
    model = attention()
    x = torch.zeros(1, L, D, dtype=torch.float64)  # only biases are left

    def initialise(module):  # as RecBole's models do
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    model.apply(initialise)
    gates = torch.sigmoid(model._heads(model.gate(x)) + model.gate_offset)[0, :, 0]
    assert_close(gates, torch.sigmoid(torch.tensor(OFFSET).double()).expand(H, -1))
    assert "gate_offset" not in model.state_dict()


def test_hidden_and_attention_dropout_are_honoured_in_training_only():
    for name in ("hidden_dropout_prob", "attn_dropout_prob"):
        # what evolves the blocks has a dropout of its own
        model, x = attention(**{name: 0.5}, block_evolution=False), sequences()
        assert not torch.equal(model(x, LENGTH), model(x, LENGTH))
        assert not torch.equal(model.last(x, LENGTH), model.last(x, LENGTH))
        model.eval()
        assert torch.equal(model(x, LENGTH), model(x, LENGTH))
        assert torch.equal(model.last(x, LENGTH), model.last(x, LENGTH))


def test_seed_decides_what_is_dropped():
    model, x = encoder(dropout=0.5), sequences()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(model(x, LENGTH))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_without_the_block_level_selection_goes_by_the_mean_key_of_a_block():
    model, x = attention(use_block=False), sequences()
    key = model._heads(model.key(x))
    block_key, block_value = model._blocks(x, key)
    assert block_value is None
    assert_close(
        block_key, torch.stack([key[:, :, c * 3 : c * 3 + 3].mean(2) for c in range(6)], 2)
    )


def test_mean_compression_is_the_mean_of_finished_blocks():
    x = torch.randn(2, 11, D)
    blocks = BlockCompression(D, 4, "mean")(x)
    assert_close(blocks, torch.stack([x[:, :4].mean(1), x[:, 4:8].mean(1)], dim=1))


def test_compression_knows_the_order_inside_a_block():
    x = torch.randn(1, 4, D)
    compress = BlockCompression(D, 4, "mlp")
    assert not torch.allclose(compress(x), compress(x.flip(1)))


@both_selections
def test_runs_under_autocast(selection):
    model, x = encoder(selection=selection, dropout=0.1).float(), sequences().detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, last = model(x, LENGTH), model.last(x, LENGTH)
    (states.float().sum() + last.float().sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"n_selected_blocks": 0}, "n_selected_blocks must be at least 1, got 0"),
        ({"n_heads": 3}, "hidden_size 8 is not a multiple of n_heads 3"),
        ({"n_heads": 8}, "rotary positions need heads of even width, got 8 / 8 = 1"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"selection": "head"}, "selection: 'head' is unknown; use one of query, query_block"),
        ({"compression": "max"}, "compression: 'max' is unknown; use one of mlp, mean"),
        (
            {"use_window": False, "use_block": False, "use_selected": False},
            "no branch is on; set use_window, use_block or use_selected",
        ),
    ],
)
def test_wrong_argument_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encoder(**change)
