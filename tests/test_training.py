"""The pass over the batches: RecBole's in its numbers, and what it checks besides."""

import copy
import itertools
import re
import shutil

import pytest
import torch
from recbole.trainer import Trainer

from recbole_mm.config import Config
from recbole_mm.errors import EnvironmentFault, InputError, NumericalError
from recbole_mm.registry import MODELS


def seeded(world):
    torch.manual_seed(7)
    world.train.generator.manual_seed(7)


def weights_after(trainer, world, train_epoch):
    seeded(world)
    losses = train_epoch(trainer, world.train, 0)
    return losses, copy.deepcopy(world.model.state_dict())


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.05}])
@pytest.mark.parametrize("model", ["MUFASA", "BERT4Rec", "BPR"])
def test_a_pass_gives_the_weights_of_recboles_own(model, clip, build_trainer):
    ours, world = build_trainer(model)
    ours.clip_grad_norm = clip
    state = copy.deepcopy(world.model.state_dict())
    losses, weights = weights_after(ours, world, lambda t, *a: super(type(t), t)._train_epoch(*a))
    again, _ = build_trainer(model)
    again.model.load_state_dict(state)
    again.clip_grad_norm = clip
    world.model = again.model
    expected_losses, expected = weights_after(again, world, Trainer._train_epoch)
    assert losses == expected_losses
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    assert not torch.equal(next(iter(state.values())), next(iter(weights.values())))


# ------------------------------------------------------------------------- numbers not finite


def train_once(trainer, world):
    seeded(world)
    trainer._started = (0.0, 0.0)
    trainer._train_epoch(world.train, 0)


FEATURES = r" \(features of the batch: text of \d+ of \d+ items, norms .* 0 not finite; image of"


def test_a_gradient_that_is_not_finite_names_its_term_batch_and_features(build_trainer):
    """The root of zero is finite, its slope is not."""
    trainer, world = build_trainer("MUFASA")
    loss, weight = world.model.calculate_loss, world.model.norm.bias
    batches = []

    def steep(interaction):
        batches.append(len(interaction))
        terms = loss(interaction)
        if len(batches) < 2:
            return terms
        return (terms[0], terms[1] + (weight * 0).sqrt().sum(), *terms[2:])

    world.model.calculate_loss = steep
    before = None

    def note(*_):
        nonlocal before
        before = copy.deepcopy(world.model.state_dict())

    trainer._after_batch = note
    message = r"epoch 0, batch 2: the gradient of loss term 'semantic' is not finite at norm\.bias"
    with pytest.raises(NumericalError, match=message + ".*" + FEATURES):
        train_once(trainer, world)
    after = world.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_names_its_term_batch_and_features(build_trainer):
    trainer, world = build_trainer("MUFASA")
    loss = world.model.calculate_loss

    def broken(interaction):
        first, *rest = loss(interaction)
        return (first, rest[0] / 0, *rest[1:])

    world.model.calculate_loss = broken
    message = "epoch 0, batch 1: loss term 'semantic' is inf"
    with pytest.raises(NumericalError, match=message + FEATURES):
        train_once(trainer, world)


def test_a_pretraining_loss_that_is_not_finite_names_its_terms_and_batch(build_trainer):
    trainer, world = build_trainer("MUFASA", mfl_pretrain_epochs=1, mfl_batch_items=64, epochs=1)
    terms, batches = world.model.fusion_terms, []

    def broken(items):
        batches.append(items)
        return {name: t / (2 - len(batches)) for name, t in terms(items).items()}

    world.model.fusion_terms = broken
    with pytest.raises(NumericalError, match=r"pre-training epoch 0, batch 2: .*: inf"):
        trainer.fit(world.train)


def test_pretraining_clips_and_takes_the_number_type_of_the_rest(build_trainer):
    values = {"mfl_pretrain_epochs": 2, "enable_amp": True, "learning_rate": 1.0, "learner": "sgd"}
    trainer, world = build_trainer("MUFASA", **values)
    trainer.clip_grad_norm = {"max_norm": 1e-6}
    fusion, seen = world.model.fusion.forward, set()

    def noted(*arguments):
        seen.add(torch.is_autocast_enabled("cpu"))
        return fusion(*arguments)

    world.model.fusion.forward = noted
    before = copy.deepcopy(world.model.state_dict())
    trainer._pretrain()
    after = world.model.state_dict()
    largest = max(float((after[name] - before[name]).abs().max()) for name in before)
    n_steps = 2 * len(world.model.catalogue_batches())
    assert 0 < largest <= n_steps * 1e-6
    assert seen == {True}


def test_pretraining_sees_every_item_once_a_pass_and_moves_the_ids(build_trainer):
    trainer, world = build_trainer("MUFASA", mfl_pretrain_epochs=1, mfl_batch_items=16)
    batches = world.model.catalogue_batches()
    assert max(map(len, batches)) == 16
    assert sorted(torch.cat(batches).tolist()) == list(range(1, world.model.n_items))
    ids = world.model.item_embedding.weight
    before = ids.detach().clone()
    trainer._pretrain()
    assert (ids.detach() != before)[1:].any(1).all()


def test_pretraining_moves_fusion_losses_and_ids_alone_by_gradients_of_one_batch(build_trainer):
    trainer, world = build_trainer("MUFASA", mfl_pretrain_epochs=2, mfl_batch_items=64)
    before, step, left = copy.deepcopy(world.model.state_dict()), trainer._apply_gradient, []

    def noted(*arguments):
        left.append(any(p.grad is not None for p in world.model.parameters()))
        step(*arguments)

    trainer._apply_gradient = noted
    trainer._pretrain()
    assert left == [False] * (2 * len(world.model.catalogue_batches()))
    after = world.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("project.", "fusion.", "fusion_losses.", "item_embedding.")
    assert moved == {name for name in before if name.startswith(parts)}


def test_batches_of_a_namesake_of_a_recbole_model_are_not_cut(build_trainer):
    trainer, world = build_trainer("GRU4Rec")
    widths = []
    for model in (world.model, Namesake(world.model)):
        trainer.model = model
        batch = next(iter(world.train))
        short = batch[world.config["ITEM_LIST_LENGTH_FIELD"]] < 4
        batch = trainer.without_padding(batch[short.nonzero().squeeze(1)])
        widths.append(batch["item_id_list"].shape[1])
    assert widths[0] < widths[1] == world.config["MAX_ITEM_LIST_LENGTH"]


class Namesake(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def test_a_pretraining_gradient_that_is_not_finite_names_its_parameters(build_trainer):
    trainer, world = build_trainer("MUFASA", mfl_pretrain_epochs=1, epochs=1)
    terms, weight = world.model.fusion_terms, next(world.model.fusion.parameters())
    world.model.fusion_terms = lambda items: {**terms(items), "more": (weight * 0).sqrt().sum()}
    with pytest.raises(NumericalError, match="pre-training epoch 0, batch 1: the gradient is not"):
        trainer.fit(world.train)


def test_a_large_gradient_is_no_error(build_trainer):
    """The squares of its numbers overflow, the numbers do not."""
    trainer, world = build_trainer("SASRecFast")
    loss = world.model.calculate_loss
    world.model.calculate_loss = lambda batch: (loss(batch)[0] * 1e25,)
    train_once(trainer, world)


def test_the_last_good_checkpoint_survives_a_gradient_that_is_not_finite(tmp_path, monkeypatch):
    import recbole_mm
    from recbole_mm.checkpoint import read
    from recbole_mm.models.sasrec import SASRecFast

    loss, count = SASRecFast.calculate_loss, [0]

    def broken(self, interaction):
        count[0] += 1
        terms = loss(self, interaction)
        if count[0] < 30:
            return terms
        return (terms[0] + (self.LayerNorm.bias * 0).sqrt().sum(),)

    values = {"checkpoint_dir": str(tmp_path), "show_progress": False, "epochs": 20}
    values |= {"train_batch_size": 512, "checkpoint_minutes": 0, "MAX_ITEM_LIST_LENGTH": 10}
    monkeypatch.setattr(SASRecFast, "calculate_loss", broken)
    with pytest.raises(NumericalError, match=r"'next_item' is not finite at .*LayerNorm\.bias"):
        recbole_mm.run("SASRecFast", "tiny", config_dict=values)
    monkeypatch.undo()
    (folder,) = tmp_path.glob("*/*/*")
    assert all(t.isfinite().all() for t in read(folder / "last.safetensors").tensors.values())
    assert all(t.isfinite().all() for t in read(folder / "model.safetensors").tensors.values())
    assert recbole_mm.run(resume=folder)["epochs"] == 20


# ------------------------------------------------------------------------- number types


@pytest.mark.parametrize("model", list(MODELS))
def test_bfloat16_trains_with_losses_near_those_of_float32(model, build_trainer):
    trainer, world = build_trainer(model, enable_amp=True)
    whole, same = build_trainer(model)
    same.model.load_state_dict(world.model.state_dict())
    for one, its_world in ((trainer, world), (whole, same)):
        train_once(one, its_world)
    assert trainer._term_sums == pytest.approx(whole._term_sums, rel=0.05, abs=0.05)
    assert trainer._term_sums != whole._term_sums
    assert all(p.dtype == torch.float32 for p in world.model.parameters())


HALF = {"enable_amp": True, "amp_dtype": "float16", "enable_scaler": True}


def test_gradients_of_float16_are_clipped_after_they_are_unscaled(build_trainer):
    trainer, world = build_trainer("SASRecFast", **HALF)
    trainer.clip_grad_norm = {"max_norm": 0.05}
    norms = []

    def note(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))

    trainer.optimizer.register_step_pre_hook(note)
    train_once(trainer, world)
    assert trainer.scaler.get_scale() > 1
    # clipped while scaled, they would be 65,536 times smaller
    assert all(0.049 < float(norm) < 0.0501 for norm in norms)


def test_one_scaler_serves_the_whole_training(build_trainer):
    trainer, world = build_trainer("SASRecFast", **HALF)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1024.0})
    train_once(trainer, world)
    assert trainer.scaler.state_dict()["scale"] == 1024.0
    assert trainer.scaler.state_dict()["_growth_tracker"] == len(world.train)


def test_a_step_that_overflows_float16_is_left_out_until_nothing_helps(build_trainer):
    trainer, world = build_trainer("SASRecFast", **HALF)
    loss, weight = world.model.calculate_loss, world.model.LayerNorm.bias
    world.model.calculate_loss = lambda b: (loss(b)[0] + (weight * 0).sqrt().sum(),)
    before = copy.deepcopy(world.model.state_dict())

    def forty_passes():
        for _ in range(40):
            train_once(trainer, world)

    with pytest.raises(NumericalError, match="not finite in float16 however little"):
        forty_passes()
    after = world.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enable_amp": True, "amp_dtype": "float16"}, "set enable_scaler: True"),
        ({"amp_dtype": "float8"}, "must be 'bfloat16' or 'float16', got 'float8'"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes must not be negative"),
    ],
)
def test_impossible_number_types_are_refused(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Config("SASRecFast", "tiny", config_dict=values)


# ------------------------------------------------------------------------- threads


@pytest.mark.slow  # two threads wait for each other on a busy machine
@pytest.mark.parametrize("model", ["MUFASA", "SASRecFast"])
def test_gradients_are_the_same_every_time_with_two_threads(model, build_trainer):
    """Advanced indexing sums its gradient in whatever order the threads come."""
    values = {"hidden_size": 64, "train_batch_size": 256, "MAX_ITEM_LIST_LENGTH": 20}
    _, world = build_trainer(model, train_objective="last", **values)
    batch = next(iter(world.train))
    torch.set_num_threads(2)

    def gradient():
        torch.manual_seed(1)
        world.model.zero_grad()
        sum(world.model.calculate_loss(batch)).backward()
        return world.model.item_embedding.weight.grad.clone()

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))


# ------------------------------------------------------------------------- torch.compile


def losses_of_a_pass(trainer, world, n_batches):
    """Losses of the first batches, each after the optimizer's step before it."""
    seeded(world)
    found = []
    trainer._note = lambda terms, *_: found.append([term.item() for term in terms])
    batches = itertools.islice(world.train, n_batches)
    for number, batch in enumerate(batches):
        trainer._step(batch, world.model.calculate_loss, f"batch {number}")
    return torch.tensor(found)


@pytest.mark.slow  # some seconds to half a minute each
@pytest.mark.parametrize("model", [*MODELS, "GRU4Rec"])
def test_a_compiled_loss_is_the_loss_with_its_dropout(model, build_trainer, monkeypatch):
    """Traced and differentiated; that the code made of it is right is torch's own to test."""
    compiled = []

    def traced(function, **_):
        compiled.append(function)
        return whole(function, backend="aot_eager")

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    expected = losses_of_a_pass(*build_trainer(model), 2)
    assert not compiled
    actual = losses_of_a_pass(*build_trainer(model, torch_compile=True), 2)
    assert len(compiled) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert expected[0, 0] != expected[1, 0]


@pytest.mark.slow  # a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_loss_compiled_to_code_is_the_loss_with_its_dropout(build_trainer):
    expected = losses_of_a_pass(*build_trainer("SASRecFast"), 2)
    actual = losses_of_a_pass(*build_trainer("SASRecFast", torch_compile=True), 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_what_the_compiler_cannot_do_is_no_traceback(build_trainer, monkeypatch):
    trainer, world = build_trainer("SASRecFast", torch_compile=True)
    exceptions = pytest.importorskip("torch._dynamo.exc")

    def refused(function, **_):
        def call(_):
            raise exceptions.TorchDynamoException("No working C++ compiler found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", refused)
    with pytest.raises(EnvironmentFault, match=r"\(No working C\+\+ compiler found\); install a C"):
        train_once(trainer, world)
