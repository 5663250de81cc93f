"""On a GPU as on a CPU: losses, gradients, evaluation, number types, resuming, compilation."""

import copy
import itertools
import json

import pytest
import torch
from torch.testing import assert_close

import recbole_mm
from recbole_mm import training
from recbole_mm.errors import InputError
from recbole_mm.evaluation import per_user
from recbole_mm.registry import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


# no numbers are drawn: each device has its own
FIXED = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
LONG = {"MAX_ITEM_LIST_LENGTH": 50, "window_size": 4, "block_size": 4, "n_selected_blocks": 2}
CASES = [
    ("MUFASA", {**LONG, "selection": "query"}),
    ("MUFASA", LONG),
    ("MUFASA", {"train_objective": "last", "position": "learned", "distribution": "uniformity"}),
    ("MUFASA", {"collaborative_target": "cooccurrence", "n_negatives": 5}),
    ("CAMMSR", {"category_loss_weight": 1.0, "category_pool": "max", "mask_same_target": True}),
    ("CAMMSR", {"gate_causal": True, "train_objective": "all"}),
    ("CAMMSR", {"gate": "linear", "input_norm": "layernorm"}),
    ("MDSRec", {}),
    ("MDSRec", {"interest_attention": "centres", "train_objective": "last"}),
    ("MDSRec", {"interest_attention": "global", "train_objective": "last", "fusion": "sum"}),
    ("MDSRec", {"interest_attention": "self", "relation_graph": "mix", "fusion": "concat"}),
    ("SASRecFast", {"n_negatives": 5}),
    ("SASRecMM", {"train_objective": "last"}),
]
OF_MODEL = {
    "CAMMSR": {**FIXED, "swap_pairs": "[]"},
    "GRU4Rec": {"dropout_prob": 0.0},
    "BPR": {},
}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}  # of float32 sums in another order


def fixed(build_trainer, name, **values):
    return build_trainer(name, **{**OF_MODEL.get(name, FIXED), **values})


def batches_of(world, n=2):
    world.train.generator.manual_seed(7)
    return list(itertools.islice(world.train, n))


def losses(trainer, world, batches):
    """Losses of some steps, each after the optimizer's step before it."""
    found = []
    trainer._note = lambda terms, *_: found.append([term.item() for term in terms])
    for batch in batches:
        torch.manual_seed(3)
        batch = copy.deepcopy(batch).to(trainer.device)
        trainer._step(batch, world.model.calculate_loss, "a batch")
    return torch.tensor(found)


@pytest.fixture
def on_device(build_trainer):
    """The same model on the CPU and on the device."""

    def make(name, **values):
        here, world = fixed(build_trainer, name, use_gpu=False, **values)
        there, other = fixed(build_trainer, name, **values)
        other.model.to(DEVICE)
        other.model.load_state_dict(world.model.state_dict())
        return (here, world), (there, other)

    return make


@pytest.mark.parametrize("name", [*MODELS, "SASRec", "GRU4Rec", "BPR"])
def test_losses_and_steps_are_those_of_the_cpu(name, on_device):
    (here, world), (there, other) = on_device(name)
    batches = batches_of(world)
    assert_close(losses(there, other, batches), losses(here, world, batches), **TOLERANCE)


@pytest.mark.parametrize("name", [*MODELS, "SASRec", "BPR"])
def test_evaluation_is_that_of_the_cpu(name, on_device):
    (_, world), (_, other) = on_device(name)
    here, there = per_user(world.model, world.test), per_user(other.model, other.test)
    assert (here.topk != there.topk).mean() <= 0.01  # near ties change places
    assert here.metric("ndcg@10").mean() == pytest.approx(there.metric("ndcg@10").mean(), abs=1e-3)


@pytest.mark.parametrize("number_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["MUFASA", "SASRecFast"])
def test_half_precision_gives_about_the_losses_of_float32(name, number_type, build_trainer):
    half = {"enable_amp": True, "amp_dtype": number_type, "enable_scaler": number_type == "float16"}
    results = []
    for values in ({}, half):
        trainer, world = fixed(build_trainer, name, **values)
        world.model.to(DEVICE)
        results.append(losses(trainer, world, batches_of(world, 6)))
    assert torch.isfinite(results[1]).all()
    # of the first step: the scaler leaves out some steps until it has found its scale
    assert_close(results[1][0], results[0][0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("name", "values"), CASES)
def test_losses_and_steps_of_every_option_are_those_of_the_cpu(name, values, on_device):
    (here, world), (there, other) = on_device(name, **values)
    batches = batches_of(world)
    of_there, of_here = losses(there, other, batches), losses(here, world, batches)
    if "n_negatives" in values:  # each device draws its own
        assert_close(of_there, of_here, rtol=0.2, atol=0.2)
    else:
        assert_close(of_there, of_here, **TOLERANCE)


@pytest.mark.parametrize("number_type", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "values"), CASES)
def test_every_option_trains_with_dropout(name, values, number_type, build_trainer):
    half = number_type != "float32"
    of_type = {"enable_amp": half, "enable_scaler": number_type == "float16"}
    of_type |= {"amp_dtype": number_type} if half else {}
    trainer, world = build_trainer(name, **values, **of_type)
    world.model.to(DEVICE).train()
    assert torch.isfinite(losses(trainer, world, batches_of(world, 6))).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MUFASA", "SASRecFast"])
def test_a_compiled_loss_is_the_loss(name, build_trainer):
    results = []
    for compiled in (False, True):
        trainer, world = fixed(build_trainer, name, torch_compile=compiled)
        world.model.to(DEVICE)
        results.append(losses(trainer, world, batches_of(world)))
    assert_close(results[1], results[0], **TOLERANCE)


def loss_terms(run):
    """Mean loss terms of each epoch of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([list(json.loads(line)["loss"].values()) for line in lines])


@pytest.mark.parametrize("name", ["MUFASA", "CAMMSR", "MDSRec", "GRU4Rec"])
def test_a_run_that_is_resumed_ends_near_one_that_was_not(name, tmp_path, monkeypatch):
    """The tolerance that the README states: losses within 1 %, metrics within .02, three epochs."""
    values = {
        "epochs": 3,
        "MAX_ITEM_LIST_LENGTH": 10,
        "train_batch_size": 256,
        "hidden_size": 16,
        "inner_size": 32,
        "show_progress": False,
        "checkpoint_minutes": 0,
    }
    whole = recbole_mm.run(
        name, "tiny", config_dict={**values, "checkpoint_dir": str(tmp_path / "whole")}
    )
    step, count = training.TrainingLoop._step, [0]

    def counted(self, *args):
        count[0] += 1
        if count[0] == 4:
            raise Killed
        return step(self, *args)

    values["checkpoint_dir"] = str(tmp_path / "cut")
    monkeypatch.setattr(training.TrainingLoop, "_step", counted)
    with pytest.raises(Killed):
        recbole_mm.run(name, "tiny", config_dict=values)
    monkeypatch.undo()
    (folder,) = (tmp_path / "cut").glob("*/*/*")
    resumed = recbole_mm.run(resume=folder)
    assert resumed["epochs"] == whole["epochs"]
    terms = [loss_terms(run) for run in (folder, *(tmp_path / "whole").glob("*/*/*"))]
    assert_close(*terms, rtol=1e-2, atol=1e-3)
    for metric, value in whole["test_result"].items():
        assert resumed["test_result"][metric] == pytest.approx(value, abs=0.02)


def test_a_run_of_a_gpu_serves_on_a_cpu(tmp_path):
    values = {"epochs": 1, "show_progress": False, "checkpoint_dir": str(tmp_path)}
    recbole_mm.run("MUFASA", "tiny", config_dict=values)
    (folder,) = tmp_path.glob("*/*/*")
    served = recbole_mm.load(folder)
    assert len(served.recommend([["i001", "i002"]], k=5).items[0]) == 5
    with pytest.raises(InputError):
        served.recommend([["no such item"]], k=5)
