import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from recbole_mm.modules.category_experts import CategoryGuidance, CategoryGuidedExperts
from recbole_mm.ops.packing import Packing
from tests.experts import double, gradients, vectors
from tests.reference import cammsr as reference

M, D, E, C = 3, 4, 2, 5
LENGTH = torch.tensor([4, 1, 3])
ROWS = [slice(0, 4), slice(4, 5), slice(5, 8)]
T = int(LENGTH.sum())
PACKING = Packing(LENGTH, 4)

PRESENT = torch.ones(T, M, dtype=torch.bool)
PRESENT[0, 1] = PRESENT[2, 2] = PRESENT[4, 1] = PRESENT[4, 2] = False
LABELS = torch.zeros(T, C, dtype=torch.bool)
LABELS[0, 1] = LABELS[2, [0, 3]] = LABELS[4, 2] = LABELS[5, [0, 1, 4]] = LABELS[7, :] = True
UNKNOWN = ~LABELS.any(-1)

every_guidance = pytest.mark.parametrize(
    ("sign", "reduction", "pool"),
    list(itertools.product((1, -1), ("sum", "mean"), ("multihot", "max"))),
)


def stack(rows):
    return torch.stack([torch.stack(row) for row in rows])


# ------------------------------------------------------------------ category guidance


@pytest.mark.parametrize("pool", ["multihot", "max"])
def test_hundreds_of_categories_keep_their_errors_apart_in_bfloat16(pool):
    """Sums of some 400 have steps of 2 there, and a softmax makes the most of them."""
    torch.manual_seed(2)
    n_categories = 551
    guide = CategoryGuidance(M, 64, n_categories, pool=pool)
    e, labels = torch.randn(50, M, 64), torch.rand(50, n_categories) < 0.01
    present = torch.ones(50, M, dtype=torch.bool)
    with torch.no_grad():
        exact = guide(e, present, labels).weights
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = guide(e, present, labels).weights
    assert_close(rounded, exact, atol=0.02, rtol=0)


@every_guidance
def test_weights_and_loss_equal_loops_in_value_and_gradient(sign, reduction, pool):
    guide, e = double(CategoryGuidance(M, D, C, sign, reduction, pool)), vectors(T, M, D)
    weights, errors = reference.guidance(
        guide.weight, guide.bias, e, PRESENT.tolist(), LABELS.tolist(), sign, reduction, pool
    )
    expected, expected_loss = stack(weights), sum(errors) / len(errors)
    found, loss = guide(e, PRESENT, LABELS)
    assert_close(found, expected)
    assert_close(loss, expected_loss)
    inputs = [e, guide.weight, guide.bias]
    assert_close(gradients(found, inputs), gradients(expected, inputs))
    assert_close(gradients(loss, inputs), gradients(expected_loss, inputs))


@every_guidance
def test_gradients_of_the_guidance_are_right(sign, reduction, pool):
    guide, e = double(CategoryGuidance(M, D, C, sign, reduction, pool)), vectors(T, M, D)
    assert torch.autograd.gradcheck(lambda e: tuple(guide(e, PRESENT, LABELS)), e)


def test_as_printed_the_worse_predictor_of_the_category_weighs_more():
    e = torch.eye(3)[None] * 4  # modality m says: category m
    labels = torch.tensor([[True, False, False]])
    weights = {}
    for sign in (1, -1):
        guide = CategoryGuidance(3, 3, 3, sign)
        guide.weight.data = torch.eye(3).expand(3, 3, 3).clone()
        weights[sign] = guide(e, torch.ones(1, 3, dtype=torch.bool), labels).weights[0]
    assert weights[1][0] < weights[1][1]
    assert weights[-1][0] > weights[-1][1]
    assert weights[1][1] == weights[1][2]


def test_weights_sum_to_one_over_what_is_present():
    weights = double(CategoryGuidance(M, D, C))(vectors(T, M, D), PRESENT, LABELS).weights
    assert_close(weights.sum(-1), torch.ones(T, dtype=weights.dtype))
    assert (weights[~PRESENT] == 0).all()


def test_an_item_without_a_category_weighs_its_modalities_equally():
    weights = double(CategoryGuidance(M, D, C))(vectors(T, M, D), PRESENT, LABELS).weights
    equal = PRESENT / PRESENT.sum(-1, keepdim=True)
    assert_close(weights[UNKNOWN], equal[UNKNOWN].to(weights.dtype))
    assert not torch.isclose(weights, equal.to(weights.dtype))[5].any()


def test_the_loss_counts_no_item_without_a_category_and_no_missing_modality():
    guide, e = double(CategoryGuidance(M, D, C)), vectors(T, M, D)
    loss = guide(e, PRESENT, LABELS).loss
    counted = PRESENT & ~UNKNOWN[:, None]
    disturbed = torch.where(counted[..., None], e, 3.0)
    assert_close(guide(disturbed, PRESENT, LABELS).loss, loss)


def test_without_any_category_the_loss_is_zero():
    loss = double(CategoryGuidance(M, D, C))(vectors(T, M, D), PRESENT, LABELS & False).loss
    assert loss == 0
    assert loss.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_label_alone_is_the_same_in_both_pools(reduction):
    e, one = vectors(T, M, D), F.one_hot(torch.arange(T) % C, C).bool()
    guides = [double(CategoryGuidance(M, D, C, 1, reduction, p)) for p in ("multihot", "max")]
    guides[1].load_state_dict(guides[0].state_dict())
    assert_close(guides[0](e, PRESENT, one), guides[1](e, PRESENT, one))


def test_huge_errors_give_finite_weights_and_gradients():
    guide, e = double(CategoryGuidance(M, D, C)), (vectors(T, M, D) * 1e4).detach()
    weights = guide(e.requires_grad_(), PRESENT, LABELS).weights
    assert weights.isfinite().all()
    assert torch.autograd.grad(weights.square().sum(), e)[0].isfinite().all()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"n_categories": 0}, "no category"),
        ({"sign": 0}, "category_weight_sign: 0 is unknown; use one of 1, -1"),
        ({"reduction": "max"}, "category_reduction: 'max' is unknown; use one of sum, mean"),
        ({"pool": "sum"}, "category_pool: 'sum' is unknown; use one of multihot, max"),
    ],
)
def test_an_impossible_guidance_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        CategoryGuidance(**{"n_modalities": M, "hidden_size": D, "n_categories": C, **choice})


# ------------------------------------------------------------------ the whole module


def camoe(**choices):
    return double(CategoryGuidedExperts(M, D, E, **{"n_categories": C, **choices}))


WHOLE = {
    "default": {},
    "causal": {"gate_causal": True},
    "linear gate": {"gate": "linear"},
    "shared experts": {"share_experts": True},
    "other sign, mean, max": {
        "category_weight_sign": -1,
        "category_reduction": "mean",
        "category_pool": "max",
    },
    "no guidance": {"n_categories": 0},
}


@pytest.mark.parametrize("choices", WHOLE.values(), ids=WHOLE)
def test_the_module_equals_loops_in_value_and_gradient(choices):
    fuse, e = camoe(**choices), vectors(T, M, D)
    state = dict(fuse.named_parameters())
    options = {
        "gate": "attentive",
        "gate_causal": False,
        "category_weight_sign": 1,
        "category_reduction": "sum",
        "category_pool": "multihot",
        **choices,
    }
    expected, weights, errors = [], [], []
    for row in ROWS:
        states, w, d = reference.fuse(
            state, e[row], PRESENT[row].tolist(), LABELS[row].tolist(), options
        )
        expected += states
        weights += [torch.stack([torch.as_tensor(v, dtype=e.dtype) for v in w_j]) for w_j in w]
        errors += d
    fused = fuse(e, PRESENT, LABELS, PACKING)
    assert_close(fused.states, stack(expected))
    assert_close(fused.weights, torch.stack(weights))
    expected_loss = sum(errors, e.new_zeros(())) / max(1, len(errors))
    assert_close(fused.category_loss, expected_loss)
    inputs = [e, *state.values()]
    assert_close(gradients(fused.states, inputs), gradients(stack(expected), inputs))


@pytest.mark.parametrize("choices", WHOLE.values(), ids=WHOLE)
def test_gradients_of_the_module_are_right(choices):
    fuse = camoe(**choices)
    assert torch.autograd.gradcheck(
        lambda e: fuse(e, PRESENT, LABELS, PACKING).states, vectors(T, M, D), fast_mode=True
    )


@pytest.mark.parametrize("choices", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("rubbish", [50.0, float("nan")])
def test_a_missing_modality_has_no_influence_on_the_others(choices, rubbish):
    fuse, e = camoe(**choices), vectors(T, M, D)
    disturbed = torch.where(PRESENT[..., None], e, rubbish)
    before, after = fuse(e, PRESENT, LABELS, PACKING), fuse(disturbed, PRESENT, LABELS, PACKING)
    assert torch.equal(after.states[PRESENT], before.states[PRESENT])
    assert torch.equal(after.weights, before.weights)


def test_a_missing_modality_keeps_what_came_in():
    e = vectors(T, M, D)
    assert torch.equal(camoe()(e, PRESENT, LABELS, PACKING).states[~PRESENT], e[~PRESENT])


def test_without_guidance_the_weights_are_those_of_unknown_categories():
    guided, unguided = camoe(), camoe(n_categories=0)
    unguided.load_state_dict(guided.state_dict(), strict=False)
    e, nothing = vectors(T, M, D), torch.zeros(T, C, dtype=torch.bool)
    assert_close(
        unguided(e, PRESENT, LABELS, PACKING).states, guided(e, PRESENT, nothing, PACKING).states
    )


def test_a_single_modality_has_weight_one():
    fuse = double(CategoryGuidedExperts(1, D, E, C))
    e = vectors(T, 1, D)
    there = torch.ones(T, 1, dtype=torch.bool)
    fused = fuse(e, there, LABELS, PACKING)
    assert (fused.weights == 1).all()
    gates = fuse.gate(e, there, PACKING)
    assert_close(fused.states, e + fuse.experts(e.flatten(1), gates))


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="gate: 'hard' is unknown; use one of attentive, linear"):
        camoe(gate="hard")
