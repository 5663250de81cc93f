from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.modules.multimodal_fusion import FusionLosses, MultimodalFusion
from tests.reference import fusion as reference
from tests.reference import losses as reference_losses

N, M, D, H, F, ANCHOR = 9, 3, 4, 2, 6, 1
PRESENT = torch.tensor(
    [
        [1, 1, 1],
        [1, 1, 0],
        [1, 0, 1],  # anchor missing
        [0, 1, 0],  # anchor alone
        [0, 0, 1],  # one modality, not the anchor
        [0, 0, 0],  # nothing
        [1, 1, 1],
        [0, 1, 1],
        [1, 1, 0],
    ]
).bool()
# genres of the items above; -1 pads
GENRES = [{0}, {0}, {0, 1}, {1}, {2}, {0}, {2}, set(), {0, 1}]
CATEGORIES = torch.tensor([[c in g for c in range(3)] for g in GENRES])
ALL_WEIGHTS = {
    "semantic_weight": 0.5,
    "collaborative_weight": 2.0,
    "structure_weight": 1.5,
    "distribution_weight": 0.25,
}
TERMS = ["semantic", "collaborative", "structure", "distribution"]


def modalities(requires_grad=True):
    return torch.randn(N, M, D, dtype=torch.float64).requires_grad_(requires_grad)


def fusion(**changes):
    return MultimodalFusion(D, ANCHOR, n_heads=H, inner_size=7, **changes).double()


def fusion_losses(**changes):
    return FusionLosses(D, ANCHOR, **(ALL_WEIGHTS | changes)).double()


def only(term, **changes):
    """The losses with weight one on one term."""
    weights = {f"{name}_weight": float(name == term) for name in TERMS}
    return fusion_losses(**weights, **changes)


def batch():
    """Titles in three directions with a little noise, so that some are alike and some not."""
    titles = torch.eye(3, F, dtype=torch.float64)[torch.arange(N) % 3]
    neighbours = torch.rand(N, N) < 0.3
    return {
        "z": torch.randn(N, D, dtype=torch.float64, requires_grad=True),
        "h": (0.5 * modalities(requires_grad=False)).requires_grad_(),
        "present": PRESENT,
        "anchor_features": titles + 0.1 * torch.randn(N, F, dtype=torch.float64),
        "ids": torch.randn(N, D, dtype=torch.float64, requires_grad=True),
        "categories": CATEGORIES,
        "neighbours": neighbours | neighbours.T,
    }


def assert_same(ours, theirs, inputs):
    assert_close(ours, theirs)
    weight = torch.linspace(-1, 1, max(1, ours.numel()), dtype=ours.dtype).view_as(ours)
    ours, theirs = (
        torch.autograd.grad((weight * out).sum(), inputs, retain_graph=True, allow_unused=True)
        for out in (ours, theirs)
    )
    zero = [torch.zeros_like(x) for x in inputs]
    ours = [z if g is None else g for g, z in zip(ours, zero, strict=True)]
    theirs = [z if g is None else g for g, z in zip(theirs, zero, strict=True)]
    assert_close(ours, theirs)


# the layer


@pytest.mark.parametrize("use_anchor", [True, False])
def test_fusion_equals_loop_reference(use_anchor):
    layer, h = fusion(use_anchor=use_anchor), modalities()
    state = dict(layer.named_parameters())
    expected = torch.stack(
        [reference.fuse(state, h[i], PRESENT[i], ANCHOR, H, use_anchor) for i in range(N)]
    )
    assert_same(layer(h, PRESENT), expected, [h, *layer.parameters()])


@pytest.mark.parametrize("use_anchor", [True, False])
def test_attention_weights_are_the_mean_over_heads_of_the_loop(use_anchor):
    layer, h = fusion(use_anchor=use_anchor), modalities()
    weights = layer.attention_weights(h, PRESENT)
    h, state = h.detach(), layer.state_dict()
    for i in range(N):
        if PRESENT[i].any():
            heads = reference.weights(state, h[i], PRESENT[i], ANCHOR, H, use_anchor)
            assert_close(weights[i], torch.tensor(heads, dtype=torch.float64).mean(0))
    assert weights[~PRESENT].eq(0).all()
    assert_close(weights.sum(1), PRESENT.any(1).double())


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_fusion_ignores_what_stands_at_an_absent_modality(junk):
    layer, h = fusion(), modalities()
    disturbed = torch.where(PRESENT[..., None], h, junk)
    assert_same(layer(disturbed, PRESENT), layer(h, PRESENT), [h, *layer.parameters()])
    undisturbed = layer.attention_weights(h, PRESENT)
    assert_same(layer.attention_weights(disturbed, PRESENT), undisturbed, [h, layer.key.weight])


def test_item_without_any_modality_is_zero_and_has_no_gradient():
    layer, h = fusion(), modalities()
    z = layer(h, PRESENT)
    nothing = ~PRESENT.any(1)
    assert z[nothing].eq(0).all()
    assert z[~nothing].ne(0).any(1).all()
    grads = torch.autograd.grad(z[nothing].sum(), [h, *layer.parameters()])
    assert all(g.eq(0).all() for g in grads)


def test_missing_anchor_falls_back_to_the_mean_of_the_present():
    h, alone = modalities(), torch.tensor([[True, False, True]])
    plain, mean = fusion(), fusion(use_anchor=False)
    mean.load_state_dict(plain.state_dict())
    assert_close(plain(h[:1], alone), mean(h[:1], alone))
    whole = torch.ones(1, M, dtype=torch.bool)
    assert (plain(h[:1], whole) - mean(h[:1], whole)).abs().max() > 1e-3


def test_items_do_not_see_each_other():
    layer, h = fusion(), modalities()
    apart = torch.cat([layer(h[i : i + 1], PRESENT[i : i + 1]) for i in range(N)])
    assert_close(layer(h, PRESENT), apart)
    assert layer(h[:0], PRESENT[:0]).shape == (0, D)


def test_order_of_the_other_modalities_does_not_matter():
    layer, h = fusion(), modalities()
    swapped = [2, ANCHOR, 0]
    assert_close(layer(h[:, swapped], PRESENT[:, swapped]), layer(h, PRESENT))


def test_fusion_gradient_is_right():
    layer, h = fusion(), modalities()
    assert torch.autograd.gradcheck(lambda x: layer(x, PRESENT), (h,))


def test_every_parameter_of_the_layer_gets_a_gradient():
    layer, h = fusion(), modalities()
    (layer(h, PRESENT) * torch.randn(N, D)).sum().backward()
    silent = [n for n, p in layer.named_parameters() if p.grad.abs().max() < 1e-9]
    assert silent == []


def test_fusion_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="hidden_size 4 is not a multiple of n_heads 3"):
        MultimodalFusion(D, ANCHOR, n_heads=3)
    with pytest.raises(ValueError, match=r"must be \(N, M, D\) and \(N, M\)"):
        fusion()(modalities(), PRESENT[:, :2])
    with pytest.raises(ValueError, match="anchor 1 is none of the 1 modalities; use 0 to 0"):
        fusion()(modalities()[:, :1], PRESENT[:, :1])


# the losses


def test_losses_come_weighted_and_in_a_fixed_order():
    given = batch()
    layer = fusion_losses()
    losses = layer(**given)
    assert list(losses) == TERMS
    for term in TERMS:
        alone = only(term)
        alone.load_state_dict(layer.state_dict(), strict=False)
        assert_close(losses[term], ALL_WEIGHTS[f"{term}_weight"] * alone(**given)[term])


@pytest.mark.parametrize("term", TERMS)
def test_term_of_weight_zero_is_left_out_with_its_head(term):
    layer = fusion_losses(**{f"{term}_weight": 0.0})
    assert list(layer(**batch())) == [t for t in TERMS if t != term]
    assert not any(name.startswith(term) for name, _ in layer.named_parameters())


def test_semantic_equals_loop_reference():
    given, layer = batch(), only("semantic", temperature=0.2, cross_genre_threshold=0.6)
    ours = layer(**given)["semantic"]
    head = dict(layer.named_parameters())
    theirs = reference.semantic(
        head,
        *(given[k] for k in ("z", "h", "present")),
        ANCHOR,
        given["anchor_features"],
        CATEGORIES,
        0.2,
        0.6,
    )
    assert_same(ours, theirs, [given["z"], given["h"], *head.values()])


def test_semantic_without_categories_has_one_positive_and_every_negative():
    given, layer = batch() | {"categories": None}, only("semantic")
    head = dict(layer.named_parameters())
    no_genre = torch.zeros(N, 1, dtype=torch.bool)
    theirs = reference.semantic(
        head, given["z"], given["h"], PRESENT, ANCHOR, given["anchor_features"], no_genre, 0.1, 2.0
    )
    assert_same(layer(**given)["semantic"], theirs, [given["z"], given["h"], *head.values()])


@pytest.mark.parametrize(
    ("threshold", "genres", "expected"),
    [
        (0.9, [{0}, {1}], "positives"),  # another genre, the same title
        (1.1, [{0}, {1}], "negatives"),  # nothing is alike enough
        (0.9, [{0}, {0}], "ignored"),  # one group
        (0.9, [{0}, {0, 1}], "negatives"),  # a shared genre, not one group
        (0.9, [{0}, set()], "negatives"),  # unknown is not another genre
        (0.9, [set(), set()], "negatives"),  # nor a group
    ],
)
def test_role_of_a_pair_follows_from_genre_and_title(threshold, genres, expected):
    # z_0, z_1 at right angles, P = identity on h = z: cosine 1 with itself, 0 with the other
    layer = only("semantic", temperature=1.0, cross_genre_threshold=threshold)
    with torch.no_grad():
        layer.semantic_head.weight.copy_(torch.eye(D))
        layer.semantic_head.bias.zero_()
    z = torch.eye(2, D, dtype=torch.float64)
    h = z[:, None].expand(2, M, D)
    categories = torch.tensor([[c in g for c in range(2)] for g in genres])
    loss = layer(
        z,
        h,
        torch.ones(2, M, dtype=torch.bool),
        torch.ones(2, F, dtype=torch.float64),
        categories=categories,
    )["semantic"]
    e = torch.tensor(1.0).exp()
    log_total = (e + 1).log()
    values = {"positives": log_total - 0.5, "negatives": log_total - 1, "ignored": 0.0}
    assert loss.item() == pytest.approx(float(values[expected]), abs=1e-6)


def test_collaborative_with_ids_equals_loop_reference():
    given, layer = batch(), only("collaborative", temperature=0.3)
    head = dict(layer.named_parameters())
    theirs = reference.collaborative_id(head, given["z"], PRESENT, given["ids"], 0.3)
    inputs = [given["z"], given["ids"], *head.values()]
    assert_same(layer(**given)["collaborative"], theirs, inputs)


def test_collaborative_with_cooccurrence_equals_loop_reference():
    given = batch()
    layer = only("collaborative", collaborative_target="cooccurrence", temperature=0.3)
    head = dict(layer.named_parameters())
    theirs = reference.collaborative_cooccurrence(
        head, given["z"], PRESENT, given["neighbours"], 0.3
    )
    assert_same(layer(**given)["collaborative"], theirs, [given["z"], *head.values()])
    itself = given | {"neighbours": given["neighbours"] | torch.eye(N).bool()}
    assert_close(layer(**itself)["collaborative"], theirs)


def test_structure_equals_loop_reference():
    given, layer = batch(), only("structure", structure_temperature=0.4)
    theirs = reference.structure(
        given["z"], given["h"], PRESENT, ANCHOR, given["anchor_features"], 0.4
    )
    assert_same(layer(**given)["structure"], theirs, [given["z"], given["h"]])


@pytest.mark.parametrize("distribution", ["gaussian", "uniformity"])
def test_distribution_equals_loop_reference(distribution):
    given, layer = batch(), only("distribution", distribution=distribution)
    some = PRESENT.any(1)
    if distribution == "gaussian":
        theirs = reference_losses.gaussian_moments(given["z"], some, 1e-4)
    else:
        theirs = reference_losses.uniformity(given["z"], some, 2.0)
    assert_same(layer(**given)["distribution"], theirs, [given["z"]])


@pytest.mark.parametrize("target", ["id", "cooccurrence"])
@pytest.mark.parametrize("distribution", ["gaussian", "uniformity"])
@pytest.mark.parametrize("junk", [1e6, float("nan")])
def test_what_is_absent_influences_no_loss(target, distribution, junk):
    given = batch()
    layer = fusion_losses(collaborative_target=target, distribution=distribution)
    some, titled = PRESENT.any(1, keepdim=True), PRESENT[:, ANCHOR, None]
    disturbed = given | {
        "z": torch.where(some, given["z"], junk),
        "h": torch.where(PRESENT[..., None], given["h"], junk),
        "anchor_features": torch.where(titled, given["anchor_features"], junk),
        "ids": torch.where(some, given["ids"], junk),
    }
    inputs = [given["z"], given["h"], given["ids"], *layer.parameters()]
    ours, theirs = layer(**disturbed), layer(**given)
    for term in TERMS:
        assert_same(ours[term], theirs[term], inputs)


@pytest.mark.parametrize("usable", [0, 1])
@pytest.mark.parametrize("target", ["id", "cooccurrence"])
@pytest.mark.parametrize("distribution", ["gaussian", "uniformity"])
def test_batch_of_fewer_than_two_usable_items_has_no_loss(usable, target, distribution):
    given = batch()
    given["present"] = (torch.arange(N) < usable)[:, None].expand(N, M)
    layer = fusion_losses(collaborative_target=target, distribution=distribution)
    losses = layer(**given)
    assert [loss.item() for loss in losses.values()] == [0.0] * 4
    grads = torch.autograd.grad(
        sum(losses.values()), [given["z"], given["h"], *layer.parameters()], allow_unused=True
    )
    assert all(g is None or g.eq(0).all() for g in grads)


def test_order_of_items_does_not_matter():
    given, layer = batch(), fusion_losses()
    order = torch.randperm(N)
    moved = {k: v[order] for k, v in given.items()}
    moved["neighbours"] = moved["neighbours"][:, order]
    assert_close(layer(**moved), layer(**given))


def test_gradient_of_all_losses_is_right():
    given = batch()
    layer = fusion_losses(distribution="uniformity", collaborative_target="id")
    names = ("z", "h", "ids")

    def total(*tensors):
        return sum(layer(**(given | dict(zip(names, tensors, strict=True)))).values())

    assert torch.autograd.gradcheck(total, tuple(given[k] for k in names))


@pytest.mark.parametrize("target", ["id", "cooccurrence"])
def test_every_parameter_gets_a_gradient_through_layer_and_losses(target):
    given, layer = batch(), fusion()
    losses = fusion_losses(collaborative_target=target)
    given["z"] = layer(given["h"], PRESENT)
    sum(losses(**given).values()).backward()
    parameters = [*layer.named_parameters(), *losses.named_parameters()]
    assert [n for n, p in parameters if p.grad is None or not p.grad.any()] == []
    assert given["anchor_features"].grad is None


def test_titles_are_a_fixed_target():
    given = batch()
    given["anchor_features"].requires_grad_()
    sum(fusion_losses()(**given).values()).backward()
    assert given["anchor_features"].grad is None


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="semantic_weight must be at least 0, got -1"):
        fusion_losses(semantic_weight=-1)
    with pytest.raises(ValueError, match="structure_temperature must be positive, got 0"):
        fusion_losses(structure_temperature=0)
    with pytest.raises(ValueError, match="'ids' is unknown; use one of id, cooccurrence"):
        fusion_losses(collaborative_target="ids")
    with pytest.raises(ValueError, match="'normal' is unknown; use one of gaussian, uniformity"):
        fusion_losses(distribution="normal")


def test_missing_collaborative_target_is_refused():
    given = batch()
    with pytest.raises(ValueError, match="needs ids"):
        fusion_losses()(**(given | {"ids": None}))
    with pytest.raises(ValueError, match="needs neighbours"):
        fusion_losses(collaborative_target="cooccurrence")(**(given | {"neighbours": None}))
