"""The ways that code takes on a GPU, on a machine without one: devices do not mix, numbers hold."""

import copy

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from torch.testing import assert_close

from recbole_mm.evaluation import per_user
from recbole_mm.models import mdsrec, mufasa  # noqa: F401  (so that their operations are known)
from recbole_mm.registry import MODELS
from tests.models.conftest import build
from tests.pretend_gpu import CUDA, PretendGPU
from tests.test_device import CASES, FIXED
from tests.test_explain import material


@pytest.fixture
def gpu(monkeypatch):
    mode = PretendGPU()
    # torch leaves the mode before it calls a backward pass that is written in Python
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith("recbole_mm."):

            def entered(*args, backward=function.backward):
                with mode:
                    return backward(*args)

            monkeypatch.setattr(function, "backward", staticmethod(entered))
    return mode


def put(world, gpu):
    """The model, and what is told where it is, on the pretended GPU."""
    gpu.move(world.model)
    world.model.device = CUDA
    world.config["device"] = CUDA


def test_what_is_made_from_a_tensor_there_is_there(gpu):
    weight = nn.Parameter(torch.randn(3, 3))
    gpu.on_gpu[weight] = True
    with gpu:
        for there in (weight, weight @ weight, weight[0], weight.new_zeros(2), weight.detach().t()):
            assert there.device == CUDA
            assert there.is_cuda
        assert (weight * torch.tensor(2.0)).device == CUDA
        assert weight[torch.tensor([1])].device == CUDA
        assert torch.ones(3, device=weight.device).device == CUDA
        assert torch.ones(3).to(weight.device).device == CUDA
        for here in (torch.ones(3), weight.detach().cpu(), torch.arange(2) + 1):
            assert here.device.type == "cpu"


@pytest.mark.parametrize(
    "mix",
    [
        lambda there: there + torch.ones(3, 3),
        lambda there: torch.cat([there, torch.zeros(3, 3)]),
        lambda there: torch.where(there > 0, there, torch.zeros(3, 3)),
        lambda there: nn.functional.embedding(torch.tensor([1]), there),
        lambda there: torch.ones(3)[there[0].long()],
    ],
)
def test_a_mix_of_devices_is_refused(mix, gpu):
    there = torch.randn(3, 3)
    gpu.on_gpu[there] = True
    with gpu, pytest.raises(RuntimeError, match=r"tensors on cuda .* and on cpu"):
        mix(there)
    with gpu, pytest.raises(TypeError, match="numpy"):
        there.numpy()


def gradients(world, batch):
    """Loss terms, gradients."""
    world.model.zero_grad()
    torch.manual_seed(3)
    terms = world.model.calculate_loss(batch)
    sum(terms).backward()
    found = {name: x.grad for name, x in world.model.named_parameters() if x.grad is not None}
    return [term.detach().clone() for term in terms], copy.deepcopy(found)


@pytest.mark.parametrize(("name", "values"), CASES)
def test_losses_gradients_and_scores_are_those_of_the_cpu(name, values, gpu):
    world = build(name, use_gpu=False, **FIXED, **values)
    batch = next(iter(world.train))
    here = gradients(world, copy.deepcopy(batch))
    ranked = per_user(world.model, world.test)
    put(world, gpu)
    world.model.train()
    with gpu:
        there = gradients(world, copy.deepcopy(batch).to(CUDA))
        assert all(term.device == CUDA for term in there[0])
        ranked_there = per_user(world.model, world.test)
    assert_close(there, here, rtol=1e-3, atol=1e-6)
    assert (ranked_there.topk != ranked.topk).mean() <= 0.01  # near ties change places
    assert ranked_there.metric("ndcg@10") == pytest.approx(ranked.metric("ndcg@10"), abs=1e-3)


@pytest.mark.parametrize("name", [*MODELS, "SASRec", "BPR"])
def test_an_epoch_is_trained_there(name, gpu, build_trainer):
    trainer, world = build_trainer(name, use_gpu=False, epochs=1)
    put(world, gpu)
    trainer.device = CUDA
    with gpu:
        trainer.fit(world.train, world.valid, saved=False, show_progress=False)
    assert all(gpu.on_gpu.get(x) for x in world.model.parameters())


@pytest.mark.parametrize("name", ["MUFASA", "CAMMSR", "MDSRec"])
def test_explanations_are_those_of_the_cpu(name, gpu):
    world = build(name, use_gpu=False)
    here = world.model.explain(material(world))
    put(world, gpu)
    with gpu:
        there = world.model.explain(material(world))
    for table, other in zip(here.values(), there.values(), strict=True):
        assert_frame_equal(table.frame, other.frame, rtol=1e-3, atol=1e-6)
