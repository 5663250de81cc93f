"""CAMMSR against loops, and what must hold for its parts together."""

import ast
import copy
from functools import cache

import pytest
import torch
import yaml
from recbole.data.interaction import Interaction
from torch.testing import assert_close

import recbole_mm
from recbole_mm.config import PROPERTIES, Config
from recbole_mm.errors import InputError
from recbole_mm.layers.encoder import TransformerEncoder
from recbole_mm.models.cammsr import CAMMSR
from tests.models.conftest import SMALL, build
from tests.reference import cammsr as reference

ABLATIONS = sorted((PROPERTIES / "ablation/CAMMSR").glob("*.yaml"))
CAUSAL = {"gate_causal": True, "train_objective": "all"}


def configuration(files=(), **values):
    return _configuration(tuple(files), repr(values))


@cache
def _configuration(files, values):
    return Config(CAMMSR, "tiny", list(map(str, files)), {**SMALL, **ast.literal_eval(values)})


def world(objective="last"):
    return build(CAMMSR, gate_causal=objective == "all", train_objective=objective)


def cammsr(seed=0, files=(), **values):
    """A model in evaluation mode, so without dropout."""
    config = configuration(files, **values)
    torch.manual_seed(seed)
    return CAMMSR(config, world(config["train_objective"]).train._dataset).eval()


def training_batch(objective="last"):
    return next(iter(world(objective).train))


def test_rows():
    return next(iter(world().test))[0]


test_rows.__test__ = False


def loss(model, batch, seed=7):
    torch.manual_seed(seed)  # of the swaps
    return model.calculate_loss(batch)


# ------------------------------------------------------------------ against the reference


def incomplete_items():
    """Items without text, without image, without category, and two with everything."""
    dataset = world().dataset
    text, image = dataset.item_features.present[1:].T
    category = dataset.item_categories.multi_hot[1:].any(-1)
    complete = text & image & category
    groups = (~text, ~image & category, text & image & ~category, complete, complete.flip(0))
    items = [int(group.nonzero()[0]) + 1 for group in groups[:4]]
    return [*items, len(complete) - int(groups[4].nonzero()[0])]


def handmade(targets_everywhere):
    no_text, no_image, no_category, whole, other = incomplete_items()
    histories = [
        [whole, no_text, no_image, other],
        [no_category],
        [no_image, no_category],
        [no_image, no_image],  # takes no part in the contrast of images
    ]
    following = [[5, 6, 7, 8], [8], [9, 10], [6, 11]]  # two rows have the same last target
    padded = torch.zeros(4, 6, dtype=torch.int64)
    next_items = torch.zeros(4, 6, dtype=torch.int64)
    for row, (history, targets) in enumerate(zip(histories, following, strict=True)):
        padded[row, : len(history)] = torch.tensor(history)
        next_items[row, : len(history)] = torch.tensor(targets)
    columns = {
        "item_id_list": padded,
        "item_length": torch.tensor([len(history) for history in histories]),
        "item_id": torch.tensor([targets[-1] for targets in following]),
    }
    if targets_everywhere:
        columns["item_id_target_list"] = next_items
        return histories, following, Interaction(columns)
    return histories, [targets[-1] for targets in following], Interaction(columns)


def lengthened(vector, length):
    return vector if length is None else length * vector / vector.norm()


TINY = {"hidden_size": 4, "inner_size": 6, "n_layers": 1, "n_heads": 2, "n_experts": 2}
PRINTED = yaml.safe_load((PROPERTIES / "ablation/CAMMSR/paper_values.yaml").read_text())
WHOLE = {
    "default": {},
    "as printed": {key: value for key, value in PRINTED.items() if key not in TINY},
    "all positions": CAUSAL,
    "every switch": {
        "share_experts": True,
        "category_weight_sign": -1,
        "category_reduction": "mean",
        "category_pool": "max",
        "input_norm": "layernorm",
        "dyt_in_encoder": True,
        "contrast_temperature": 0.2,
        "swap_ratio": 0.8,
        "swap_pairs": [["image", "id"]],
        "mask_same_target": True,
    },
    "one expert": {"n_experts": 1},
    "linear gate, no guidance": {
        "gate": "linear",
        "category_guided": False,
        "category_loss_weight": 0.0,
    },
}


@pytest.mark.parametrize("values", WHOLE.values(), ids=WHOLE)
def test_every_term_and_gradient_equals_loops(values):
    values = {**TINY, "category_loss_weight": 0.7, **values}
    model = cammsr(**values).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    config = configuration(**values)
    dataset = world().dataset
    histories, targets, batch = handmade(model.train_objective == "all")

    terms = loss(model, batch)

    pairs = model.pairs.T.tolist()
    has = torch.cat([torch.ones(120 + 1, 1).bool(), dataset.item_features.present], 1)
    torch.manual_seed(7)
    drawn = torch.rand(len(pairs), sum(map(len, histories))) < config["swap_ratio"]
    lengths = list(map(len, histories))
    swapped = []
    for (a, b), row in zip(pairs, drawn, strict=True):
        rows = row.split(lengths)
        swapped.append(
            [
                [bool(d and has[i, a] and has[i, b]) for d, i in zip(r, history, strict=True)]
                for r, history in zip(rows, histories, strict=True)
            ]
        )
    features = {
        name: [
            lengthened(f.values[row].double(), config["feature_norm"]) if present else None
            for row, present in zip(f.rows, f.present, strict=True)
        ]
        for name, f in dataset.item_features.items()
    }
    state = dict(model.named_parameters())
    options = {**config.final_config_dict, "pairs": pairs}
    labels = dataset.item_categories.multi_hot
    expected = reference.losses(state, features, labels, histories, targets, swapped, options)

    for found, wanted in zip(terms, expected, strict=True):
        assert_close(found, torch.as_tensor(wanted, dtype=found.dtype))
    sum(terms).backward()
    theirs = torch.autograd.grad(sum(expected), list(state.values()))
    for (name, parameter), gradient in zip(state.items(), theirs, strict=True):
        assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_history_without_a_modality_is_no_negative_of_others():
    """Two histories without a picture, of equal length, would have the same state there."""
    no_image = incomplete_items()[1]
    _, _, batch = handmade(False)
    with_both = loss(cammsr(swap_pairs=[["id", "image"]]), batch)[1]
    others = batch[torch.tensor([0, 1, 2])]
    assert (batch["item_id_list"][3, :2] == no_image).all()
    assert_close(with_both, loss(cammsr(swap_pairs=[["id", "image"]]), others)[1])


# ------------------------------------------------------------------ reductions


def test_without_contrast_weight_the_other_terms_stay():
    batch = training_batch()
    with_contrast = loss(cammsr(category_loss_weight=1.0), batch)
    for none in ({"contrast_weight": 0.0}, {"swap_pairs": []}):
        without = loss(cammsr(category_loss_weight=1.0, **none), batch)
        assert_close((without[0], without[2]), (with_contrast[0], with_contrast[2]))
        assert without[1] == 0
    assert with_contrast[1] > 0


def test_the_category_loss_is_off_by_default_and_scales_with_its_weight():
    batch = training_batch()
    terms = {w: loss(cammsr(category_loss_weight=w), batch) for w in (0.0, 1.0, 2.0)}
    assert terms[0.0][2] == 0
    assert_close(terms[2.0][2], 2 * terms[1.0][2])
    assert terms[1.0][2] > 0
    assert_close(terms[0.0][:2], terms[1.0][:2])


def test_the_contrast_of_all_pairs_is_the_sum_over_single_pairs_when_everything_is_swapped():
    batch = training_batch()
    pairs = [["id", "text"], ["id", "image"], ["text", "image"]]
    singles = [loss(cammsr(swap_ratio=1.0, swap_pairs=[pair]), batch)[1] for pair in pairs]
    assert_close(loss(cammsr(swap_ratio=1.0), batch)[1], sum(singles))


def test_the_id_alone_is_one_transformer_on_one_table():
    model = build(CAMMSR, modalities=()).model
    batch = test_rows()
    assert model.modality_names == ("id",)
    assert model.item_table() is model.item_embedding.weight
    assert model.fuse.guidance is None
    weights, real = model.modality_weights(batch)
    assert (weights[real] == 1).all()
    assert loss(model, training_batch())[1:] == (0, 0)


def test_the_score_is_the_sum_over_modalities():
    model, batch = cammsr(), test_rows()
    seq, length = model.histories(batch)
    items = model.item_table()
    user = model(seq, length, items).view(len(batch), 3, -1)
    each = torch.einsum("bmd,nmd->bmn", user, items.view(len(items), 3, -1))
    assert_close(model.full_sort_predict(batch), each.sum(1))


def test_guidance_by_unknown_categories_is_no_guidance():
    # as drawn by default, weights are equal up to rounding
    guided = cammsr(initializer_range=0.3)
    unguided = cammsr(initializer_range=0.3, category_guided=False)
    unguided.load_state_dict(guided.state_dict(), strict=False)
    assert not torch.equal(
        guided.full_sort_predict(test_rows()), unguided.full_sort_predict(test_rows())
    )
    guided.categories = torch.zeros_like(guided.categories)  # not those of the cached data set
    assert_close(guided.full_sort_predict(test_rows()), unguided.full_sort_predict(test_rows()))


# ------------------------------------------------------------------ every position of a window


def test_the_loss_at_all_positions_is_the_mean_over_their_prefixes():
    model = cammsr(**CAUSAL, contrast_weight=0.0)
    windows = training_batch("all")[:8]
    losses = []
    items = model.item_table()
    for row in range(8):
        for n in range(1, int(windows["item_length"][row]) + 1):
            user = model(windows["item_id_list"][row : row + 1, :n], torch.tensor([n]), items)
            scores = user @ items[1:].T
            target = windows["item_id_target_list"][row, n - 1 : n] - 1
            losses.append(torch.nn.functional.cross_entropy(scores, target))
    assert_close(loss(model, windows)[0], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_the_contrast_of_windows_uses_their_last_position():
    windows = training_batch("all")
    everywhere, last = cammsr(**CAUSAL), cammsr(gate_causal=True)
    assert_close(loss(everywhere, windows)[1], loss(last, windows)[1])


def earlier_states_move(model):
    seq, length = model.histories(test_rows())
    full = length == seq.size(1)
    seq, length = seq[full], length[full]
    changed = seq.clone()
    changed[:, -1] = changed[:, -1] % 100 + 1
    items = model.item_table()
    before, after = model.states(seq, length, items), model.states(changed, length, items)
    assert not torch.isclose(after[:, -1], before[:, -1]).all()
    return not torch.equal(after[:, :-1], before[:, :-1])


def test_a_causal_or_linear_gate_keeps_later_items_out_of_earlier_states():
    assert not earlier_states_move(cammsr(gate_causal=True))
    assert not earlier_states_move(cammsr(gate="linear"))


def test_the_printed_gate_lets_later_items_into_earlier_states():
    assert earlier_states_move(cammsr())


def test_all_positions_are_refused_without_a_causal_gate():
    with pytest.raises(InputError, match=r"its gate sees the whole history.*gate_causal: True"):
        configuration(train_objective="all")
    configuration(train_objective="all", gate="linear")
    configuration(**CAUSAL)


# ------------------------------------------------------------------ missing and padding


def test_a_missing_modality_adds_nothing_to_the_score_of_an_item():
    model = cammsr()
    present = world().dataset.item_features.present
    tables = model.item_table().view(model.n_items, 3, -1)
    assert (tables[:, 1:][~present] == 0).all()
    assert (tables[:, 1:][present] != 0).any(-1).all()


def test_the_rows_of_missing_features_have_no_influence():
    model, batch = cammsr(), training_batch()
    disturbed = cammsr()
    for features in disturbed.project.features.values():
        assert not features.present.all()
        twin = torch.full_like(features.values[:1], torch.nan)
        features.rows = torch.where(features.present, features.rows, len(features.values))
        features.values = torch.cat([features.values, twin])
    for terms in zip(loss(model, batch), loss(disturbed, batch), strict=True):
        assert torch.equal(*terms)


@pytest.mark.parametrize("objective", ["last", "all"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_what_stands_in_padding_and_the_padded_length_do_not_matter(objective, by_hand):
    model = cammsr(gate_causal=objective == "all", train_objective=objective)
    batch = handmade(objective == "all")[2] if by_hand else training_batch(objective)[:20]
    expected = loss(model, batch)
    changed = copy.deepcopy(batch)
    history = changed["item_id_list"]
    padding = torch.arange(history.size(1)) >= changed["item_length"][:, None]
    history[padding] = incomplete_items()[3]  # one that has what others of its row lack
    assert_close(loss(model, changed), expected)
    wider = Interaction(
        {
            name: torch.nn.functional.pad(column, (0, 3)) if column.dim() == 2 else column
            for name, column in batch.interaction.items()
        }
    )
    assert_close(loss(model, wider), expected)


def test_batch_mates_do_not_matter():
    model, batch = cammsr(), test_rows()[:12]
    together = model.full_sort_predict(batch)
    for row in range(12):
        alone = model.full_sort_predict(batch[[row]])
        assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ interpretation


def test_modality_weights_are_those_of_the_real_positions():
    model, batch = cammsr(), test_rows()
    weights, real = model.modality_weights(batch)
    seq, length = model.histories(batch)
    assert weights.shape == (*seq.shape, 3)
    assert torch.equal(real.sum(1), length)
    assert_close(weights.sum(-1), real.float())
    missing = ~world().dataset.item_features.present[seq]
    assert (weights[..., 1:][missing] == 0).all()
    assert not weights.requires_grad


# ------------------------------------------------------------------ parameters and cost


@pytest.mark.parametrize(
    "values",
    [{}, CAUSAL, {"share_experts": True, "category_pool": "max"}, {"modalities": ()}],
)
def test_every_parameter_gets_a_gradient(values):
    model = build(CAMMSR, **values).model
    sum(loss(model, training_batch(model.train_objective))).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_nothing_but_parameters_is_saved():
    model = cammsr()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_the_padding_row_stays_zero_in_training():
    model = cammsr()
    sum(loss(model, training_batch())).backward()
    assert (model.item_embedding.weight[0] == 0).all()
    assert (model.item_embedding.weight.grad[0] == 0).all()


def test_history_and_views_of_a_modality_are_encoded_in_one_pass(monkeypatch):
    model, sizes = cammsr(), []
    last = TransformerEncoder.last
    monkeypatch.setattr(
        TransformerEncoder,
        "last",
        lambda encoder, x, length: sizes.append(len(x)) or last(encoder, x, length),
    )
    batch = training_batch()
    loss(model, batch)
    assert sizes == [3 * len(batch)] * 3  # id, text, image


def test_evaluation_encodes_no_view():
    model, sizes = cammsr(), []
    model.encoder["id"].layer[0].register_forward_hook(
        lambda _, inputs, __: sizes.append(len(inputs[0]))
    )
    model.full_sort_predict(test_rows())
    assert sum(sizes) == len(test_rows())  # in groups of like length


def test_initial_weights_have_the_configured_deviation():
    model = cammsr(initializer_range=0.3)
    for parameter in (
        model.fuse.experts.weight_1,
        model.fuse.guidance.weight,
        model.fuse.gate.weight,
        model.item_embedding.weight[1:],
    ):
        assert parameter.std().item() == pytest.approx(0.3, rel=0.1)


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_runs_and_changes_the_loss(file):
    changed = yaml.safe_load(file.read_text())
    assert set(changed) <= set(yaml.safe_load((PROPERTIES / "model/CAMMSR.yaml").read_text()))
    large = {"initializer_range": 0.3}  # smaller ones round alike
    model = cammsr(files=[file], **large)
    batch = training_batch(model.train_objective)
    terms = loss(model, batch)
    assert all(term.isfinite() for term in terms)
    whole = large if model.train_objective == "last" else {**large, "gate_causal": True}
    assert abs(sum(terms) - sum(loss(cammsr(**whole), batch))) > 1e-3


def test_the_ablations_of_the_paper_are_there():
    assert {path.stem for path in ABLATIONS} == {
        "causal",
        "layernorm",
        "no_swap",
        "paper_values",
        "swap_id_image",
        "swap_id_text",
        "swap_text_image",
        "without_attentive_gate",
        "without_category_guidance",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"swap_pairs": [["id", "sound"]]}, r"\['id', 'sound'\] is not a pair.*id, text, image"),
        ({"swap_pairs": [["id", "id"]]}, "not a pair of different modalities"),
        ({"swap_pairs": ["id"]}, "'id' is not a pair"),
        ({"swap_pairs": [["id", "text"], ["text", "id"]]}, "names a pair twice"),
        ({"category_field": None}, "needs categories; set category_field"),
        (
            {"category_guided": False, "category_loss_weight": 1.0},
            "category_guided: False switches off",
        ),
    ],
)
def test_an_impossible_value_is_refused_by_name(values, message):
    config = configuration(**values)
    dataset = copy.copy(world().train._dataset)
    if "category_field" in values:
        dataset = build(CAMMSR, category_guided=False, category_field=None).train._dataset
    with pytest.raises(InputError, match=message):
        CAMMSR(config, dataset)


def test_without_category_guidance_no_category_is_read():
    unguided = build(CAMMSR, category_guided=False, category_field="no_such_column")
    assert unguided.dataset.categories_read is None


# ------------------------------------------------------------------ a world with a known answer


def hit3(**values):
    training = {
        **CAUSAL,
        "learning_rate": 0.003,
        "epochs": 40,
        "stopping_step": 10,
        "hidden_size": 32,
        "inner_size": 64,
        "attn_dropout_prob": 0.2,
        "topk": [3, 10],
    }
    values = {**SMALL, **training, "train_batch_size": 256, **values}
    return recbole_mm.run(CAMMSR, "tiny", config_dict=values, saved=False)["test_result"]["hit@3"]


@pytest.mark.slow
def test_features_connect_items_that_differ_in_id_only():
    with_features = hit3()
    assert with_features > 0.55
    assert with_features > hit3(modalities=[]) + 0.1
