from __future__ import annotations

import pytest
import torch
from recbole.model.layers import FeedForward as RecBoleFeedForward
from recbole.model.layers import TransformerEncoder as RecBoleEncoder
from torch.testing import assert_close

from recbole_mm.layers.encoder import DynamicTanh, FeedForward, TransformerEncoder, activation
from tests.reference import encoder as reference

L, D, H = 7, 8, 2
LENGTH = torch.tensor([7, 1, 4, 5])
SIZES = {"n_layers": 2, "n_heads": H, "hidden_size": D, "inner_size": 12}


def encoder(seed=0, dropout=0.0, **changes):
    torch.manual_seed(seed)
    sizes = SIZES | {"hidden_dropout_prob": dropout, "attn_dropout_prob": dropout} | changes
    return TransformerEncoder(**sizes)


def sequences(dtype=torch.float32):
    return torch.randn(len(LENGTH), L, D, dtype=dtype, requires_grad=True)


def is_real(length=LENGTH):
    return torch.arange(L) < length[:, None]


def recbole_mask():
    """What SequentialRecommender.get_attention_mask builds, on the border to RecBole."""
    visible = is_real()[:, None, None, :].expand(-1, -1, L, -1).tril()
    return torch.where(visible, 0.0, -10000.0)


def gradients(model, x, real_states):
    weight = torch.linspace(-1, 1, real_states.numel(), dtype=x.dtype).view_as(real_states)
    named = dict(model.named_parameters())
    found = torch.autograd.grad((weight * real_states).sum(), [x, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize("act", ["gelu", "relu", "swish", "tanh", "sigmoid"])
def test_loads_recbole_weights_and_gives_its_states_and_gradients(act):
    theirs = RecBoleEncoder(**SIZES, hidden_dropout_prob=0.0, attn_dropout_prob=0.0, hidden_act=act)
    for parameter in theirs.parameters():  # its layers start as copies, its biases as they come
        parameter.data.normal_(std=0.3)
    ours = encoder(seed=1, hidden_act=act)
    ours.load_state_dict(theirs.state_dict())
    x = sequences()

    expected = theirs(x, recbole_mask(), output_all_encoded_layers=False)[-1][is_real()]
    states = ours(x, LENGTH)[is_real()]

    assert_close(states, expected, atol=1e-5, rtol=1e-5)
    assert_close(
        gradients(ours, x, states), gradients(theirs, x, expected), atol=2e-5, rtol=1e-4
    )  # float32, sums in another order


def test_recbole_loads_our_weights():
    theirs = RecBoleEncoder(**SIZES)
    theirs.load_state_dict(encoder().state_dict())


def test_feed_forward_equals_recboles():
    theirs = RecBoleFeedForward(D, 12, 0.0, "gelu", 1e-12)
    ours = FeedForward(D, 12, "gelu", 0.0, 1e-12)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, L, D)
    assert_close(ours(x), theirs(x))


def test_equals_loop_reference_in_value_and_gradient():
    model = encoder().double()
    x = sequences(torch.float64)
    state = dict(model.named_parameters())
    expected = torch.stack(
        [
            row
            for i, n in enumerate(LENGTH)
            for row in reference.transformer(state, x[i], int(n), 2, H)
        ]
    )
    states = model(x, LENGTH)[is_real()]
    assert_close(states, expected)
    assert_close(gradients(model, x, states), gradients(model, x, expected))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_last_equals_the_full_pass_in_value_and_gradient(n_layers):
    model = encoder(n_layers=n_layers).double()
    x = sequences(torch.float64)
    full = model(x, LENGTH)[torch.arange(len(LENGTH)), LENGTH - 1]
    last = model.last(x, LENGTH)
    assert_close(last, full)
    assert_close(gradients(model, x, last), gradients(model, x, full))


def test_content_of_padding_does_not_matter():
    model = encoder()
    x = sequences()
    disturbed = torch.where(is_real()[..., None], x, 100.0)
    real = is_real()
    assert_close(model(disturbed, LENGTH)[real], model(x, LENGTH)[real])
    assert_close(model.last(disturbed, LENGTH), model.last(x, LENGTH))


def test_a_later_position_does_not_change_an_earlier_state():
    model = encoder()
    x = sequences()
    changed = torch.cat([x[:, :4], x[:, 4:] + 1], dim=1)
    assert_close(model(changed, LENGTH)[:, :4], model(x, LENGTH)[:, :4])


def test_an_empty_row_gives_no_nan_and_a_zero_last_state():
    model = encoder()
    x = sequences()
    length = torch.tensor([7, 0, 4, 0])
    last = model.last(x, length)
    (gradient,) = torch.autograd.grad(last.sum() + model(x, length).sum(), x)
    assert last[length == 0].eq(0).all()
    assert torch.isfinite(last).all()
    assert torch.isfinite(gradient).all()
    assert torch.autograd.grad(model.last(x, length).sum(), x)[0][1].eq(0).all()


def test_attention_dropout_falls_on_probabilities():
    # Values all one, so that a head's output is the sum of its dropped probabilities: without
    # dropout exactly 1, with dropout 1 in the mean and not in a single case.
    model = encoder(n_layers=1, attn_dropout_prob=0.5)
    attention = model.layer[0].multi_head_attention
    with torch.no_grad():
        attention.value.weight.zero_()
        attention.value.bias.fill_(1.0)
        attention.query.weight.zero_()  # equal scores
        attention.query.bias.zero_()
    seen = []
    attention.dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(500, L, D)
    model(x, torch.full((500,), L))
    first, final = seen[0][:, 0], seen[0][:, -1]  # 1 and 7 visible keys
    assert set(first.unique().tolist()) == {0.0, 2.0}
    counts = final * L / 2
    assert_close(counts, counts.round(), atol=1e-5, rtol=0)
    assert final.mean().item() == pytest.approx(1.0, abs=0.05)
    model.eval()
    model(x, torch.full((500,), L))
    assert_close(seen[1], torch.ones_like(seen[1]))


def test_hidden_dropout_falls_on_both_branches_before_the_residual_sum():
    # everything dropped: what is left of a layer are its two norms
    model = encoder(n_layers=1, hidden_dropout_prob=1.0)
    norms = model.layer[0].multi_head_attention.LayerNorm, model.layer[0].feed_forward.LayerNorm
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    x = sequences()
    assert_close(model(x, LENGTH), norms[1](norms[0](x)))


def test_dropout_is_off_in_evaluation():
    model = encoder(dropout=0.5).eval()
    x = sequences()
    assert_close(model(x, LENGTH), model(x, LENGTH), atol=0, rtol=0)


def test_unknown_activation_names_the_choices():
    with pytest.raises(ValueError, match=r"'gleu'.*gelu, relu, swish, tanh, sigmoid"):
        activation("gleu")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size 8 is not a multiple of n_heads 3"):
        encoder(n_heads=3)


def test_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="n_layers must be at least 1, got 0"):
        encoder(n_layers=0)


def test_dynamic_tanh_is_tanh_of_a_trained_scalar_times_x():
    layer = DynamicTanh()
    x = torch.randn(3, 4)
    assert_close(layer(x), torch.tanh(0.5 * x))
    assert layer.alpha.shape == ()
    layer.double()
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, _: layer(v), (inputs, layer.alpha))
