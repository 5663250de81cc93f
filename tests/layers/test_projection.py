"""Frozen features keep their storage and never leak; projections follow the papers' formulas."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recbole_mm.layers.projection import FrozenFeatures, ModalityProjection

NAN = float("nan")
ROWS = torch.tensor([0, 2, 0, 1])  # item 0 is padding, item 2 has no vector
PRESENT = torch.tensor([False, True, False, True])


def frozen(dtype=torch.float32):
    values = torch.tensor([[NAN, NAN], [1.0, 2.0], [3.0, -4.0]])
    return FrozenFeatures(values.to(dtype), ROWS, PRESENT)


def two_modalities():
    other = FrozenFeatures(torch.randn(4, 5), torch.arange(4), torch.tensor([False] + 3 * [True]))
    return {"text": frozen(), "image": other}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_vectors_of_any_shape_of_items_come_in_float32(dtype):
    vectors = frozen(dtype)(torch.tensor([[1, 2], [3, 0]]))
    assert vectors.dtype == torch.float32
    assert vectors.tolist() == [[[3, -4], [0, 0]], [[1, 2], [0, 0]]]


def test_nothing_is_trained_nor_saved():
    features = frozen()
    assert list(features.parameters()) == []
    assert features.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_number_type_of_the_module_reaches_the_output_but_not_the_storage(dtype):
    features = frozen().to(dtype)
    assert features.values.dtype == torch.float32
    assert features(torch.tensor([1])).dtype == dtype


def test_memory_map_survives_casts_moves_and_copies(tmp_path):
    np.save(tmp_path / "f.npy", np.ones((3, 2), np.float16))
    values = torch.from_numpy(np.load(tmp_path / "f.npy", mmap_mode="c"))
    model = nn.Sequential(FrozenFeatures(values, ROWS, PRESENT))
    model.double().float().cpu().to("cpu")
    twin = deepcopy(model)
    assert model[0].values.data_ptr() == values.data_ptr()
    assert twin[0].values.data_ptr() == values.data_ptr()
    assert twin[0].rows.data_ptr() != model[0].rows.data_ptr()
    assert_close(twin(torch.tensor([1, 2])), model(torch.tensor([1, 2])))


def test_cast_never_makes_a_copy_of_the_vectors():
    features = frozen()
    reached = []
    features._apply(lambda tensor: (reached.append(tensor.data_ptr()), tensor)[1])
    assert features.rows.data_ptr() in reached
    assert features.values.data_ptr() not in reached


def test_features_follow_the_model_to_another_device():
    features = frozen().to("meta")
    assert {features.values.device.type, features.rows.device.type} == {"meta"}
    assert features.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(3)}, "values must be"),
        ({"values": torch.ones(3, 2, dtype=torch.int64)}, "values must be"),
        ({"rows": ROWS[:3]}, "must both be"),
        ({"rows": ROWS.int()}, "rows must be int64"),
        ({"present": PRESENT.float()}, "present bool"),
        ({"rows": ROWS + 1}, r"lie in \[0, 3\)"),
        ({"rows": ROWS - 1}, r"lie in \[0, 3\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    arguments = {"values": torch.ones(3, 2), "rows": ROWS, "present": PRESENT} | change
    with pytest.raises(ValueError, match=message):
        FrozenFeatures(**arguments)


@pytest.mark.parametrize("layers", [1, 2])
def test_shapes_and_presence_of_the_projection(layers):
    model = ModalityProjection(two_modalities(), 6, layers)
    items = torch.tensor([[1, 2, 3], [0, 3, 3]])
    hidden, present = model(items)
    assert hidden.shape == (2, 3, 2, 6)
    assert present.tolist() == [
        [[True, True], [False, True], [True, True]],
        [[False, False], [True, True], [True, True]],
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_absent_features_are_exactly_zero_and_present_ones_are_not(layers):
    hidden, present = ModalityProjection(two_modalities(), 6, layers)(torch.arange(4))
    assert (hidden[~present] == 0).all()
    assert (hidden[present] != 0).any(dim=-1).all()


def test_one_layer_is_a_linear_map():
    model = ModalityProjection(two_modalities(), 6, 1).double()
    linear = model.project["text"]
    expected = torch.tensor([3.0, -4.0], dtype=torch.float64) @ linear.weight.T + linear.bias
    assert_close(model(torch.tensor(1))[0][0], expected)


def test_two_layers_are_a_perceptron_and_layer_norm():
    model = ModalityProjection(two_modalities(), 6, 2).double()
    first, _, second, norm = model.project["text"]
    f = torch.tensor([1.0, 2.0], dtype=torch.float64)  # item 3
    a = first.weight @ f + first.bias
    a = a * 0.5 * (1 + torch.erf(a / 2**0.5))
    a = second.weight @ a + second.bias
    a = (a - a.mean()) / (a.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    assert_close(model(torch.tensor(3))[0][0], a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_vector_is_given_the_length_that_is_asked_for(dtype):
    values = torch.tensor([[3.0, -4.0], [300.0, -400.0], [0.0, 0.0]], dtype=dtype)
    features = FrozenFeatures(values, torch.arange(3), torch.ones(3, dtype=torch.bool), norm=10.0)
    assert_close(features(torch.arange(3)), torch.tensor([[6.0, -8.0], [6.0, -8.0], [0.0, 0.0]]))
    assert features.values.tolist() == values.tolist()  # they stay as they are stored


def test_a_projection_with_a_length_does_not_see_the_scale_of_its_features():
    plain = two_modalities()
    scaled = {
        name: FrozenFeatures(50 * part.values, part.rows, part.present)
        for name, part in plain.items()
    }
    found = []
    for features in (plain, scaled):
        torch.manual_seed(0)
        found.append(ModalityProjection(features, 6, norm=1.0)(torch.arange(4))[0])
    assert_close(found[0], found[1])


@pytest.mark.parametrize("norm", [None, 3.0])
@pytest.mark.parametrize("layers", [1, 2])
def test_products_of_all_rows_are_those_of_looked_up_vectors(norm, layers):
    """Values and gradients, of as many items as rows and of fewer."""
    vectors = two_modalities()["image"]
    model = ModalityProjection({"image": vectors}, 6, layers, norm).double()
    features, (first, *others) = model.features["image"], model.project["image"].modules()
    first = others[0] if layers == 2 else first
    for items in (torch.tensor([[3, 0], [1, 3], [2, 2]]), torch.tensor([2, 0])):
        fast = features.times(first.weight, items)
        naive = features(items) @ first.weight.T
        assert_close(fast, naive, rtol=0, atol=1e-12)
        weight = torch.randn_like(fast)
        ours, theirs = (torch.autograd.grad(x, first.weight, weight)[0] for x in (fast, naive))
        assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1e-8, 1.0, 1e6])
def test_half_precision_holds_vectors_of_any_length(length):
    values = torch.nn.functional.normalize(torch.randn(40, 16, dtype=torch.float64), dim=1)
    found = []
    for of_length in (1.0, length):
        part = FrozenFeatures(
            (of_length * values).float(), torch.arange(40), torch.ones(40, dtype=torch.bool)
        )
        torch.manual_seed(0)
        model = ModalityProjection({"text": part}, 6, norm=8.0)
        with torch.autocast("cpu", dtype=torch.float16):
            found.append(model(torch.arange(40))[0])
    assert_close(*found, rtol=0.01, atol=0.02)


def test_a_length_is_positive():
    with pytest.raises(ValueError, match="norm must be positive, got 0"):
        ModalityProjection(two_modalities(), 4, norm=0.0)


@pytest.mark.parametrize("layers", [1, 2])
def test_gradient_is_right_and_absent_features_give_none(layers):
    model = ModalityProjection({"text": frozen()}, 3, layers).double()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def hidden(*replaced):
        items = torch.tensor([1, 2, 3, 0])
        state = dict(zip(names, replaced, strict=True))
        return torch.func.functional_call(model, state, (items,))[0]

    assert torch.autograd.gradcheck(hidden, parameters)
    model(torch.tensor([0, 2]))[0].sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_state_dict_is_the_projections_alone():
    keys = ModalityProjection(two_modalities(), 6).state_dict().keys()
    assert set(keys) == {f"project.{m}.{p}" for m in ("text", "image") for p in ("weight", "bias")}


@pytest.mark.parametrize(
    ("features", "layers", "message"), [({}, 1, "no modality"), ({"t": frozen()}, 3, "1 or 2")]
)
def test_wrong_arguments_are_refused(features, layers, message):
    with pytest.raises(ValueError, match=message):
        ModalityProjection(features, 4, layers)
