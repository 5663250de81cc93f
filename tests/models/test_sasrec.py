"""SASRecFast is RecBole's SASRec; SASRecMM adds the features and nothing else."""

import torch
from torch.testing import assert_close

from recbole_mm.compat import import_model


def stock(world):
    torch.manual_seed(0)
    config = world.config
    config["loss_type"] = "CE"
    return import_model("SASRec")(config, world.train._dataset).eval()


def test_the_same_seed_draws_recboles_weights(build):
    world = build("SASRecFast", train_objective="last")
    theirs, ours = stock(world).state_dict(), world.model.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_scores_loss_and_gradients_are_recboles(build):
    world = build("SASRecFast", train_objective="last")
    theirs = stock(world)
    batch = next(iter(world.train))
    assert_close(
        world.model.full_sort_predict(batch), theirs.full_sort_predict(batch), rtol=1e-4, atol=1e-5
    )
    (ours_loss,), their_loss = world.model.calculate_loss(batch), theirs.calculate_loss(batch)
    assert_close(ours_loss, their_loss)
    ours_loss.backward()
    their_loss.backward()
    for (name, p), (_, q) in zip(
        world.model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_loss_at_all_positions_is_the_mean_over_their_prefixes(build):
    world = build("SASRecFast", train_objective="all")
    windows = next(iter(world.train))
    (of_windows,) = world.model.calculate_loss(windows)
    seq, length, targets = (
        windows["item_id_list"],
        windows["item_length"],
        windows["item_id_target_list"],
    )
    losses = []
    items = world.model.item_table()
    for row in range(8):
        for n in range(1, int(length[row]) + 1):
            user = world.model(seq[row : row + 1, :n], torch.tensor([n]), items)
            logits = user @ items.T
            losses.append(torch.nn.functional.cross_entropy(logits, targets[row, n - 1 : n]))
    few = windows[torch.arange(8)]
    assert_close(
        world.model.calculate_loss(few)[0], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5
    )
    assert of_windows.isfinite()


def test_without_its_features_an_item_of_sasrecmm_is_its_id(build):
    world = build("SASRecMM")
    table, ids = world.model.item_table(), world.model.item_embedding.weight
    bare = ~world.dataset.item_features.present.any(1)
    assert bare[0]
    assert_close(table[bare], ids[bare])
    assert not torch.isclose(table[~bare], ids[~bare]).all()
