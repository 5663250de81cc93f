import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recbole_mm.layers.experts import AttentiveGate, GatedExperts, LinearGate
from recbole_mm.ops.packing import Packing
from tests.experts import double, gradients, vectors
from tests.reference import cammsr as reference

M, D, E, K, H = 3, 4, 2, 5, 6
LENGTH = torch.tensor([4, 1, 6])
L = 6
STARTS = [0, 4, 5, 11]
ROWS = [slice(a, b) for a, b in itertools.pairwise(STARTS)]
PACKING = Packing(LENGTH, L)
T = int(LENGTH.sum())

PRESENT = torch.ones(T, M, dtype=torch.bool)
PRESENT[0, 1] = PRESENT[2, 2] = PRESENT[7, 1] = False
PRESENT[4, 1] = False  # the only position of its row: no key is left


@pytest.mark.parametrize("causal", [False, True])
def test_the_attentive_gate_equals_loops_in_value_and_gradient(causal):
    gate, x = double(AttentiveGate(M, D, E, causal)), vectors(T, M, D)
    expected = torch.cat(
        [
            torch.stack(
                [
                    torch.stack(g_j)
                    for g_j in reference.attentive_gate(
                        gate.weight, x[row], PRESENT[row].tolist(), causal
                    )
                ]
            )
            for row in ROWS
        ]
    )
    gates = gate(x, PRESENT, PACKING)
    assert_close(gates, expected)
    assert_close(gradients(gates, [x, gate.weight]), gradients(expected, [x, gate.weight]))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_attentive_gate_are_right(causal):
    gate, x = double(AttentiveGate(M, D, E, causal)), vectors(T, M, D)
    assert torch.autograd.gradcheck(lambda x, _: gate(x, PRESENT, PACKING), (x, gate.weight))


def test_a_causal_gate_does_not_see_later_items():
    gate, x = double(AttentiveGate(M, D, E, causal=True)), vectors(T, M, D)
    changed = x.detach().clone()
    changed[8:11] += 1.0  # the last three of six
    before, after = gate(x, PRESENT, PACKING), gate(changed, PRESENT, PACKING)
    assert torch.equal(after[:8], before[:8])
    assert not torch.isclose(after[8:], before[8:]).any()


def test_without_causal_a_gate_sees_later_items():
    gate, x = double(AttentiveGate(M, D, E)), vectors(T, M, D)
    changed = x.detach().clone()
    changed[10] += 1.0
    moved = ~torch.isclose(gate(changed, PRESENT, PACKING), gate(x, PRESENT, PACKING))
    assert moved[ROWS[2]].all()
    assert not moved[: ROWS[2].start].any()


@pytest.mark.parametrize("causal", [False, True])
def test_gate_values_do_not_depend_on_the_rest_of_the_batch(causal):
    gate, x = double(AttentiveGate(M, D, E, causal)), vectors(T, M, D)
    together = gate(x, PRESENT, PACKING)
    for row, n in zip(ROWS, LENGTH, strict=True):
        alone = gate(x[row], PRESENT[row], Packing(n[None], int(n)))
        assert_close(alone, together[row])


@pytest.mark.parametrize("causal", [False, True])
def test_a_missing_modality_is_no_key(causal):
    gate, x = double(AttentiveGate(M, D, E, causal)), vectors(T, M, D)
    disturbed = torch.where(PRESENT[..., None], x, 50.0)
    gates, same = gate(x, PRESENT, PACKING), gate(disturbed, PRESENT, PACKING)
    assert_close(same[PRESENT], gates[PRESENT])


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_key_gate_values_and_gradients_are_zero(causal):
    gate, x = double(AttentiveGate(M, D, E, causal)), vectors(T, M, D)
    gates = gate(x, PRESENT, PACKING)
    assert (gates[4, 1] == 0).all()
    (grad,) = torch.autograd.grad(gates.sum(), x)
    assert grad.isfinite().all()
    assert (grad[4, 1] == 0).all()


def test_gate_values_are_signed_and_not_normalised():
    gates = double(AttentiveGate(M, D, E))(vectors(T, M, D), PRESENT, PACKING)
    assert (gates < 0).any()
    assert not torch.isclose(gates.sum(-1), torch.ones((), dtype=gates.dtype)).any()


def test_the_linear_gate_equals_loops_in_value_and_gradient():
    gate, x = double(LinearGate(M, D, E)), vectors(T, M, D)
    expected = torch.stack(
        [torch.stack(g) for g in reference.linear_gate(gate.weight, gate.bias, x)]
    )
    gates = gate(x, PRESENT, PACKING)
    assert_close(gates, expected)
    inputs = [x, gate.weight, gate.bias]
    assert_close(gradients(gates, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("n_sets", [M, 1])
def test_the_mixture_equals_loops_in_value_and_gradient(n_sets):
    experts = double(GatedExperts(n_sets, E, K, H, D))
    x, gates = vectors(T, K), vectors(T, M, E)
    expected = torch.stack(
        [torch.stack(reference.mixture(*experts.parameters(), x[t], gates[t])) for t in range(T)]
    )
    mixed = experts(x, gates)
    assert_close(mixed, expected)
    inputs = [x, gates, *experts.parameters()]
    assert_close(gradients(mixed, inputs), gradients(expected, inputs))


def test_gradients_of_the_mixture_are_right():
    experts = double(GatedExperts(M, E, K, H, D))
    assert torch.autograd.gradcheck(experts, (vectors(3, K), vectors(3, M, E)))


def test_a_shared_set_equals_equal_sets():
    shared, own = double(GatedExperts(1, E, K, H, D)), GatedExperts(M, E, K, H, D).double()
    for one, each in zip(shared.parameters(), own.parameters(), strict=True):
        each.data.copy_(one.expand_as(each))
    x, gates = vectors(T, K), vectors(T, M, E)
    assert_close(shared(x, gates), own(x, gates))


def test_one_expert_with_gate_one_is_a_feed_forward_network():
    experts = double(GatedExperts(1, 1, K, H, D))
    network = nn.Sequential(nn.Linear(K, H), nn.GELU(), nn.Linear(H, D)).double()
    for ours, theirs in zip(experts.parameters(), network.parameters(), strict=True):
        theirs.data.copy_(ours[0, 0])
    x = vectors(T, K)
    assert_close(experts(x, torch.ones(T, 1, 1, dtype=x.dtype)).squeeze(1), network(x))


def test_gates_of_zero_give_exactly_zero():
    experts = double(GatedExperts(M, E, K, H, D))
    assert (experts(vectors(T, K), torch.zeros(T, M, E, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize(
    "layer", [AttentiveGate(M, 64, 8), LinearGate(M, 64, 8), GatedExperts(M, 4, 64, 64, 64)]
)
def test_weights_are_drawn_with_the_given_deviation_and_biases_are_zero(layer):
    layer.reset_parameters(0.3)
    for name, parameter in layer.named_parameters():
        if name.startswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=0.1)


def test_no_expert_at_all_is_refused():
    with pytest.raises(ValueError, match="n_experts must be at least 1, got 0"):
        GatedExperts(M, 0, K, H, D)
