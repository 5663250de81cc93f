"""What every registered model keeps; each test stands for a bug seen in published code."""

import copy

import pytest
import torch
import yaml
from recbole.data.interaction import Interaction
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mm.config import PROPERTIES
from recbole_mm.losses.ranking import gbce_loss
from recbole_mm.registry import MODELS

every_model = pytest.mark.parametrize("name", list(MODELS))
every_objective = pytest.mark.parametrize("objective", ["all", "last"])

# keys that wiring above the models reads: RecBole's base class and loaders, our trainer and config
BASE = {"USER_ID_FIELD", "ITEM_ID_FIELD", "LIST_SUFFIX", "ITEM_LIST_LENGTH_FIELD", "NEG_PREFIX"}
BASE |= {"MAX_ITEM_LIST_LENGTH", "device", "train_objective", "category_field"}
BASE |= {"feature_cache_dir"}
WIRING = {"train_batch_size", "train_neg_sample_args", "MAX_ITEM_LIST_LENGTH", "train_objective"}
WIRING |= {"mfl_pretrain_epochs", "freeze_mfl", "category_field"}


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add(tuple(out.shape))
        return out


class Recording:
    """A config that notes every key read and raises where RecBole's answers ``None``."""

    def __init__(self, config):
        self._values = config.final_config_dict
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return self._values[key]


def offered(name, objective):
    values = yaml.safe_load((PROPERTIES / f"model/{name}.yaml").read_text())
    return objective in MODELS[name].offered_objectives(values)


def batch_of(world, part="train"):
    return next(iter(getattr(world, part)))


def evaluation_batch(world):
    return batch_of(world, "valid")[0]


@every_model
def test_a_table_of_autocast_does_not_outlive_it(name, build):
    model = build(name).model
    with torch.no_grad():
        before = model.scoring_table()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.scoring_table()
        assert torch.equal(model.scoring_table(), before)


@every_model
def test_a_changed_buffer_renews_the_scoring_table(name, build):
    world = build(name)
    for module in world.model.modules():  # features are those of the data set, of other tests too
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.clone()
    batch = evaluation_batch(world)
    with torch.no_grad():
        world.model.full_sort_predict(batch)
        for buffer in world.model.buffers():
            if buffer.is_floating_point() and buffer.numel():
                buffer.mul_(3)
        kept = world.model.full_sort_predict(batch)
        fresh = world.model.train().eval().full_sort_predict(batch)
    assert torch.equal(kept, fresh)


@every_model
def test_trains_in_the_number_type_of_torch(name, build):
    torch.set_default_dtype(torch.float64)
    try:
        world = build(name, MAX_ITEM_LIST_LENGTH=11)  # a data set of its own
        losses = world.model.calculate_loss(batch_of(world))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {loss.dtype for loss in losses} == {torch.float64}


@every_model
def test_reads_exactly_its_properties_file(name, build):
    world = build(name)
    config = Recording(world.config)
    type(world.model)(config, world.train._dataset)
    written = set(yaml.safe_load((PROPERTIES / f"model/{name}.yaml").read_text()))
    assert config.seen - BASE <= written
    assert written - WIRING <= config.seen


@every_model
def test_options_of_the_transformers_arrive_where_their_names_say(name, build):
    """Their defaults are the same numbers: one in the place of the other would not be seen."""
    values = {"n_layers": 3, "n_heads": 4, "hidden_dropout_prob": 0.3, "attn_dropout_prob": 0.1}
    modules = list(build(name, **values).model.modules())
    # MUFASA's fusion has a feed-forward layer without dropout
    assert {m.p for m in modules if isinstance(m, nn.Dropout)} - {0.0} == {0.3}
    rates = ("attn_dropout", "attn_dropout_prob")
    assert {vars(m)[key] for m in modules for key in rates if key in vars(m)} == {0.1}
    assert {m.n_heads for m in modules if hasattr(m, "n_heads")} == {4}
    assert {len(m) for m in modules if isinstance(m, nn.ModuleList)} == {3}


@every_model
def test_every_line_of_the_properties_file_says_its_type_and_source(name):
    for line in (PROPERTIES / f"model/{name}.yaml").read_text().splitlines():
        if line and not line.startswith("#"):
            assert "# (" in line, line
            assert "[" in line.split("#")[1] or "None: the loss" in line, line


@every_model
def test_scores_have_the_shapes_that_recbole_expects(name, build):
    world = build(name)
    batch = evaluation_batch(world)
    everything, chosen = world.model.full_sort_predict(batch), world.model.predict(batch)
    assert everything.shape == (len(batch), world.dataset.item_num)
    assert_close(chosen, everything[torch.arange(len(batch)), batch["item_id"]])


@every_model
def test_padding_and_batch_mates_do_not_matter(name, build):
    world = build(name)
    batch = evaluation_batch(world)[:16]
    together = world.model.full_sort_predict(batch)
    for row, n in enumerate(batch["item_length"].tolist()):
        alone = Interaction({k: v[row : row + 1] for k, v in batch.interaction.items()})
        alone.update(Interaction({"item_id_list": alone["item_id_list"][:, :n]}))
        assert_close(world.model.full_sort_predict(alone)[0], together[row], rtol=1e-4, atol=1e-5)


@every_model
@every_objective
def test_what_stands_in_padding_does_not_matter(name, objective, build):
    if not offered(name, objective):
        pytest.skip("not offered")
    world = build(name, train_objective=objective)
    batch = batch_of(world)
    changed = copy.deepcopy(batch)
    seq = changed["item_id_list"]
    padding = torch.arange(seq.size(1)) >= changed["item_length"][:, None]
    assert padding.any()
    seq[padding] = 7
    torch.manual_seed(3)
    loss = world.model.calculate_loss(batch)
    torch.manual_seed(3)
    assert_close(world.model.calculate_loss(changed)[0], loss[0])


@every_model
@every_objective
def test_loss_terms_are_finite_scalars_with_names(name, objective, build):
    if not offered(name, objective):
        pytest.skip("not offered")
    world = build(name, train_objective=objective)
    losses = world.model.calculate_loss(batch_of(world))
    assert len(losses) == len(world.model.loss_names)
    assert all(loss.shape == () and loss.isfinite() for loss in losses)


@every_model
@every_objective
def test_every_parameter_gets_a_gradient(name, objective, build):
    if not offered(name, objective):
        pytest.skip("not offered")
    world = build(name, train_objective=objective)
    sum(world.model.calculate_loss(batch_of(world))).backward()
    silent = [n for n, p in world.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@every_model
@every_objective
def test_sampled_negatives_train_every_parameter_too(name, objective, build):
    if not MODELS[name].samples_negatives or not offered(name, objective):
        pytest.skip("not offered")
    world = build(name, train_objective=objective, n_negatives=20)
    losses = world.model.calculate_loss(batch_of(world))
    assert all(loss.isfinite() for loss in losses)
    sum(losses).backward()
    silent = [n for n, p in world.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@every_model
@every_objective
def test_sampled_negatives_are_scored_in_pieces_within_the_memory(name, objective, build):
    if not MODELS[name].samples_negatives or not offered(name, objective):
        pytest.skip("not offered")
    batch = batch_of(build(name, train_objective=objective, n_negatives=20))
    found = []
    for rows in (10_000, 17):  # more than the width of the vectors, whose product has a (D, K)
        world = build(name, train_objective=objective, n_negatives=20)
        world.model.loss_memory_mb = rows * 4 * 4 * 20 / 2**20
        torch.manual_seed(4)
        with Shapes() as shapes:
            loss = world.model.calculate_loss(batch)[0]
            loss.backward()
        largest = max(shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == 20)
        assert largest == 17 if rows == 17 else largest > 17
        grads = [p.grad for p in world.model.parameters() if p.grad is not None]
        found.append((loss, grads))
    assert_close(*(loss for loss, _ in found))
    assert_close(*(grads for _, grads in found), rtol=1e-4, atol=1e-6)


@every_model
@every_objective
def test_sampled_negatives_are_scored_against_the_full_table(name, objective, build):
    """The loss over the few items of a step equals gBCE read off the whole score matrix."""
    if not MODELS[name].samples_negatives or not offered(name, objective):
        pytest.skip("not offered")
    world = build(name, train_objective=objective, n_negatives=20, gbce_t=0.5)
    model, batch = world.model, batch_of(world)[:3]  # so few that most items are not of the step
    torch.manual_seed(4)
    step = model.step_items(batch)
    assert len(step.items) < model.n_items - 20
    torch.manual_seed(4)
    loss = model.calculate_loss(batch)[0]
    histories, items = model.histories(batch), model.item_table()
    if objective == "all":
        target = batch["item_id_target_list"][:, : histories[0].size(1)]
        state, target = model.states(*histories, items)[target > 0], target[target > 0]
    else:
        state, target = model(*histories, items), batch["item_id"]
    scores = state @ items.T
    negatives = step.items[step.negatives]
    logits = scores[:, negatives].masked_fill(target[:, None] == negatives, float("-inf"))
    positive = scores.gather(1, target[:, None])[:, 0]
    # a padding item that counted among the 120 would move it by 2e-5
    assert_close(loss, gbce_loss(positive, logits, n_items=120, t=0.5), rtol=1e-5, atol=1e-6)


@every_model
def test_negatives_are_drawn_from_all_items_but_padding(name, build):
    if not MODELS[name].samples_negatives:
        pytest.skip("not offered")
    world = build(name, n_negatives=20)
    batch = batch_of(world)[:1]
    drawn = set()
    for _ in range(200):  # so many that no item is missing by chance
        step = world.model.step_items(batch)
        drawn.update(step.items[step.negatives].tolist())
    assert drawn == set(range(1, world.model.n_items))


@every_model
def test_state_dict_is_the_whole_model(name, build):
    world, twin = build(name), build(name, seed=5)
    batch = evaluation_batch(world)
    assert not torch.equal(
        world.model.full_sort_predict(batch), twin.model.full_sort_predict(batch)
    )
    twin.model.load_state_dict(world.model.state_dict())
    assert_close(twin.model.full_sort_predict(batch), world.model.full_sort_predict(batch))


@every_model
def test_frozen_features_are_neither_saved_nor_trained(name, build):
    world = build(name)
    if not world.model.consumes_features:
        pytest.skip("reads no features")
    shapes = {
        tuple(world.dataset.item_features[m].values.shape) for m in world.model.features.names
    }
    assert not shapes & {tuple(t.shape) for t in world.model.state_dict().values()}


@every_model
def test_the_kept_item_table_is_dropped_when_weights_change(name, build):
    world = build(name)
    batch = evaluation_batch(world)
    with torch.no_grad():
        before = world.model.full_sort_predict(batch)
        assert torch.equal(world.model.full_sort_predict(batch), before)
        for parameter in world.model.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(world.model.full_sort_predict(batch), before)


@every_model
def test_can_memorise_one_batch(name, build):
    world = build(name)  # in evaluation mode: dropout would forbid memorising
    batch = evaluation_batch(world)[:16]
    objective, world.model.train_objective = world.model.train_objective, "last"
    optimizer = torch.optim.Adam(world.model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sum(world.model.calculate_loss(batch)).backward()
        optimizer.step()
    world.model.train_objective = objective
    hit = world.model.full_sort_predict(batch)[:, 1:].argmax(dim=-1) + 1 == batch["item_id"]
    assert hit.float().mean() > 0.9


@every_model
def test_an_earlier_state_does_not_see_a_later_item(name, build):
    if not offered(name, "all"):
        pytest.skip("not causal")
    world = build(name, train_objective="all")
    seq, length = world.model.histories(evaluation_batch(world)[:8])
    items = world.model.item_table()
    before = world.model.states(seq, length, items)
    changed = seq.clone()
    cut = seq.size(1) // 2
    changed[:, cut:] = torch.where(seq[:, cut:] > 0, seq[:, cut:] % 50 + 1, 0)
    after = world.model.states(changed, length, items)
    assert_close(after[:, :cut], before[:, :cut])
    assert not torch.equal(after[:, cut:], before[:, cut:])


@every_model
def test_the_last_state_is_the_user_vector(name, build):
    if not offered(name, "all"):
        pytest.skip("not causal")
    world = build(name, train_objective="all")
    seq, length = world.model.histories(evaluation_batch(world))
    items = world.model.item_table()
    states = world.model.states(seq, length, items)
    assert_close(
        world.model(seq, length, items),
        states[torch.arange(len(seq)), length - 1],
        rtol=1e-4,
        atol=1e-5,
    )
