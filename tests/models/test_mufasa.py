"""MUFASA as a whole; its parts are tested in tests/modules and tests/ops."""

import torch


def batch_of(world):
    return next(iter(world.train))


def world_of(build):
    """A world whose model has no ids and every fourth item neither text nor image."""
    world = build("MUFASA", use_id=False)
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
