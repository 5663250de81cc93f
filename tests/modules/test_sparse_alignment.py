"""The SAL layer against a loop, its invariants, and its settings that fall back to known things."""

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.layers.encoder import MultiHeadAttention
from recbole_mm.modules.sparse_alignment import SparseAlignmentAttention, SparseAlignmentEncoder
from tests.reference import sparse_attention as reference

D, H = 8, 2
SIZES = {"window_size": 4, "block_size": 3, "n_selected_blocks": 2}


def layer(**values):
    arguments = {
        "hidden_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "selection": "query",
        "compression": "mlp",
        "block_evolution": True,
        "use_window": True,
        "use_block": True,
        "use_selected": True,
        **SIZES,
        **values,
    }
    return SparseAlignmentAttention(D, H, **arguments).double().eval()


def encoder(**values):
    arguments = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "inner_size": 16, **SIZES}
    return SparseAlignmentEncoder(D, n_heads=H, **{**arguments, **values}).double().eval()


def rows(L=11, lengths=(11, 7, 1)):
    x = torch.randn(len(lengths), L, D, dtype=torch.float64)
    return x, torch.tensor(lengths)


@pytest.mark.parametrize("selection", ["query", "query_block"])
@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("block_evolution", [True, False])
def test_equals_a_loop_in_value_and_gradient(selection, compression, block_evolution):
    settings = {"selection": selection, "compression": compression}
    settings["block_evolution"] = block_evolution
    module = layer(**settings)
    x, length = rows()
    x.requires_grad_(True)
    out = module(x, length)
    state = dict(module.named_parameters())
    offset = module.gate_offset.tolist()
    loops = [
        reference.layer(state, x[i], int(n), n_heads=H, offset=offset, **SIZES, **settings)
        for i, n in enumerate(length)
    ]
    for i, (n, loop) in enumerate(zip(length, loops, strict=True)):
        assert_close(out[i, :n], loop, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(out)
    fast = sum((out[i, :n] * probe[i, :n]).sum() for i, n in enumerate(length))
    naive = sum((loop * probe[i, : len(loop)]).sum() for i, loop in enumerate(loops))
    wanted = [x, *state.values()]
    for ours, theirs in zip(
        torch.autograd.grad(fast, wanted), torch.autograd.grad(naive, wanted), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_window_over_everything_alone_is_dense_causal_attention():
    module = layer(window_size=11, use_block=False, use_selected=False)
    dense = MultiHeadAttention(D, H, 0.0, 0.0, 1e-12).double().eval()
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("gate")}
    dense.load_state_dict({**state, "key.bias": torch.zeros(D, dtype=torch.float64)})
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.fill_(40.0)  # the gate is open
    x, length = rows(lengths=(11,))
    assert_close(module(x, length), dense(x, x, causal=True), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("selection", ["query", "query_block"])
def test_the_last_position_alone_equals_the_full_pass(selection):
    module = encoder(selection=selection)
    x, length = rows()
    full = module(x, length)[torch.arange(3), length - 1]
    assert_close(module.last(x, length), full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("selection", ["query", "query_block"])
@pytest.mark.parametrize("cut", [1, 3, 6, 10])
def test_the_future_is_not_seen(selection, cut):
    module = encoder(selection=selection)
    x, length = rows(lengths=(11,))
    changed = x.clone()
    changed[:, cut:] += 5.0
    before, after = module(x, length), module(changed, length)
    assert_close(after[:, :cut], before[:, :cut], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, cut:], before[:, cut:])


def test_padding_may_hold_anything_and_batch_mates_do_not_matter():
    module = encoder()
    x, length = rows()
    spoilt = x.clone()
    for i, n in enumerate(length):
        spoilt[i, n:] = float("nan")
    for i, n in enumerate(length):
        alone = module(x[i : i + 1, :n], length[i : i + 1])[0]
        assert_close(module(spoilt, length)[i, :n], alone, rtol=1e-10, atol=1e-10)


def test_the_gate_favours_the_window_and_initialisation_cannot_undo_it():
    module = layer()
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.zero_()
    gates = module._gates(torch.randn(1, 1, D, dtype=torch.float64))[0, :, 0]  # (H, G)
    assert (gates[:, 0] > gates[:, 1]).all()
    assert (gates[:, 0] > gates[:, 2]).all()


def test_a_branch_that_is_off_has_no_parameters():
    def count(**values):
        return sum(p.numel() for p in layer(**values).parameters())

    assert count(use_block=False) < count()
    assert count(use_selected=False) < count()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"window_size": 0}, "window_size"),
        ({"selection": "best"}, "selection: 'best' is unknown"),
        ({"compression": "sum"}, "compression: 'sum' is unknown"),
        ({"use_window": False, "use_block": False, "use_selected": False}, "no branch is on"),
    ],
)
def test_impossible_settings_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        layer(**values)
