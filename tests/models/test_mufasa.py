"""MUFASA as a whole; its parts are tested in tests/modules and tests/ops."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.models.mufasa import FUSION_TERMS, _telling


def batch_of(world):
    return next(iter(world.train))


def world_of(build):
    """A world whose model has no ids and every fourth item neither text nor image."""
    world = build("MUFASA", use_id=False, collaborative_target="cooccurrence")
    blank = torch.zeros(world.model.n_items, dtype=torch.bool)
    blank[1::4] = True
    for features in world.model.project.features.values():
        features.present = features.present & ~blank  # the data set keeps its own
    return world, blank


def test_an_item_that_nothing_describes_does_not_blow_up_the_gradient(build):
    """Its vector is zero, and a layer norm of zeros multiplies gradients by a million."""
    world, blank = world_of(build)
    batch = batch_of(world)
    assert blank[batch["item_id_list"]].any()
    sum(world.model.train().calculate_loss(batch)).backward()
    norms = [p.grad.norm() for p in world.model.parameters() if p.grad is not None]
    assert max(norms) < 1e3


def test_an_item_that_nothing_describes_is_known_in_a_history_and_scores_nothing(build):
    world, blank = world_of(build)
    model, batch = world.model, batch_of(world)
    table = model.item_table()
    assert (table[blank] == 0).all()
    item_seq, length = model.histories(batch)
    one, other = blank.nonzero()[1:3, 0]
    seen = model(torch.full_like(item_seq, one), length, table)
    assert torch.equal(seen, model(torch.full_like(item_seq, other), length, table))
    assert seen.isfinite().all()
    assert (model.full_sort_predict(batch)[:, blank] == 0).all()


def test_a_category_of_nearly_all_items_is_no_genre():
    """Else no two items would be of different genres: shops put everything below one root."""
    multi_hot = torch.zeros(9, 4, dtype=torch.bool)
    multi_hot[1:8, 0] = True  # of all 7 items that have a category
    multi_hot[1:5, 1] = True  # of 4
    multi_hot[4:7, 2] = True  # of 3
    told = _telling(multi_hot)
    assert told[:, [1, 2]].equal(multi_hot[:, [1, 2]])
    assert not told[:, [0, 3]].any()
    assert not _telling(torch.zeros(3, 2, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    "values",
    [
        {"mfl_pretrain_epochs": 0},
        {f"{term}_weight": 0.0 for term in FUSION_TERMS},
    ],
    ids=["no epochs", "no losses"],
)
def test_a_fusion_layer_that_was_never_trained_is_not_frozen(build, values):
    with pytest.raises(ValueError, match="there is no pre-training; set mfl_pretrain_epochs"):
        build("MUFASA", freeze_mfl=True, **values)


def test_frozen_fusion_is_not_paired_with_neighbours_that_pre_training_lacks(build):
    with pytest.raises(ValueError, match="use collaborative_target: id"):
        build("MUFASA", freeze_mfl=True, collaborative_target="cooccurrence")


@pytest.mark.parametrize(
    ("values", "left"),
    [({}, ("collaborative",)), ({"collaborative_weight": 0.0}, ())],
    ids=["ids are aligned", "nothing to train"],
)
def test_a_frozen_fusion_computes_only_losses_that_train_something(build, values, left):
    model = (world := build("MUFASA", freeze_mfl=True, **values)).model
    for parameter in model.fusion_parameters():
        parameter.requires_grad_(False)  # as the trainer does after pre-training
    losses = model.calculate_loss(batch_of(world))
    assert model.loss_names == ("next_item", *left)
    assert len(losses) == 1 + len(left)
    for loss in losses:
        loss.backward(retain_graph=True)
    assert all(p.grad is None for p in model.fusion_parameters())
    if left:
        model.zero_grad()
        losses[1].backward()
        assert model.item_embedding.weight.grad.any()


@pytest.mark.parametrize("objective", ["all", "last"])
def test_neighbours_are_those_who_follow_each_other_the_target_among_them(build, objective):
    world = build("MUFASA", collaborative_target="cooccurrence", train_objective=objective)
    batch = batch_of(world)
    items = torch.unique(torch.cat([batch["item_id_list"].flatten(), batch["item_id"]]))[1:]
    expected = torch.zeros(len(items), len(items), dtype=torch.bool)
    place = {int(item): i for i, item in enumerate(items)}
    for history, length, target in zip(
        batch["item_id_list"].tolist(),
        batch["item_length"].tolist(),
        batch["item_id"].tolist(),
        strict=True,
    ):
        row = [*history[:length], target]
        for one, other in itertools.pairwise(row):
            expected[place[one], place[other]] = expected[place[other], place[one]] = True
    assert torch.equal(world.model._neighbours(batch, items), expected)


def test_an_anchor_that_is_no_modality_is_told(build, caplog):
    with pytest.raises(ValueError, match="'txet' is no modality here; did you mean 'text'"):
        build("MUFASA", anchor_modality="txet")
    model = build("MUFASA", anchor_modality="audio").model  # left out of this run, perhaps
    assert "anchor_modality: 'audio' is none of the modalities text, image; text anchors" in (
        caplog.text
    )
    assert model.anchor == 0
    caplog.clear()
    build("MUFASA", modalities="[image]")  # without the default anchor: no slip of anyone's
    assert "anchor_modality" not in caplog.text


def test_the_anchor_may_be_any_modality_and_its_features_are_what_is_compared_with(build):
    model, items, seen = build("MUFASA", anchor_modality="image").model, torch.arange(1, 9), []
    assert (model.anchor, model.fusion.anchor, model.fusion_losses.anchor) == (1, 1, 1)
    model.fusion_losses.register_forward_pre_hook(lambda _, given: seen.append(given[3]))
    model.fusion_terms(items)
    assert torch.equal(seen[0], model.project.features["image"](items))


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_position_is_an_angle_or_a_vector(build, position):
    model = build("MUFASA", position=position).model
    assert {layer.rotary for layer in model.encoder.attention} == {position == "rotary"}
    table, seq = model.item_table(), torch.full((1, 3), 5)
    x = table[seq]
    if position == "learned":
        x = x + model.position_embedding.weight[:3]
    assert_close(model._inputs(seq, table), model.norm(x))


def test_options_arrive_where_their_names_say(build):
    values = {"window_size": 3, "block_size": 4, "n_selected_blocks": 6}
    losses = {"temperature": 0.2, "structure_temperature": 0.3, "cross_genre_threshold": 0.4}
    model = build("MUFASA", **values, **losses).model
    for owner, given in ((model.encoder.attention[0], values), (model.fusion_losses, losses)):
        assert {key: getattr(owner, key) for key in given} == given


@pytest.mark.parametrize("branch", ["window", "block", "selected"])
def test_the_switch_of_a_branch_is_that_of_the_branch(build, branch):
    branches = build("MUFASA", **{f"use_{branch}": False}).model.encoder.branches
    assert set(branches) == {"window", "block", "selected"} - {branch}


def test_the_fusion_losses_see_items_of_histories_and_targets_at_most_so_many(build):
    world = build("MUFASA", train_objective="last")
    model, batch = world.model, batch_of(world)[:3]
    rows = zip(batch["item_id_list"], batch["item_length"], batch["item_id"], strict=True)
    items = {int(i) for seq, n, target in rows for i in (*seq[:n], target)}
    assert sorted(model._distinct_items(batch).tolist()) == sorted(items)
    model.mfl_batch_items = 4
    draws = [set(model._distinct_items(batch).tolist()) for _ in range(60)]
    assert {len(draw) for draw in draws} == {4}
    assert set.union(*draws) == items


def test_pre_training_has_the_losses_that_joint_training_of_a_frozen_fusion_lacks(build):
    model = build("MUFASA", freeze_mfl=True).model
    assert model.joint_terms == ("collaborative",)
    assert tuple(model.fusion_terms(torch.arange(1, 9))) == FUSION_TERMS


def test_small_models_of_the_tests_take_the_sparse_form(build, forms):
    """The contract, the golden losses and the compiled loss are to see the form that ships."""
    # named, the objective gives a loader that the golden losses do not draw from
    world = build("MUFASA", train_objective="all")
    world.model.train().calculate_loss(batch_of(world))
    assert forms
    assert not any(forms)


def test_weights_read_histories_longer_than_any_in_training(build):
    """Positions are distances: nothing in the weights knows MAX_ITEM_LIST_LENGTH."""
    short, long = build("MUFASA"), build("MUFASA", MAX_ITEM_LIST_LENGTH=50, seed=1)
    long.model.load_state_dict(short.model.state_dict())
    batch = next(iter(short.test))[0]
    with torch.no_grad():
        assert_close(long.model.full_sort_predict(batch), short.model.full_sort_predict(batch))
        items = torch.randint(1, short.model.n_items, (3, 45))
        length = torch.tensor([45, 30, 13])
        table = long.model.item_table()
        states = long.model(items, length, table)
        alone = long.model(items[1:2, :30], length[1:2], table)
    assert states.isfinite().all()
    assert_close(states[1:2], alone)
