from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.data import data_preparation
from recbole.data.interaction import Interaction
from torch.testing import assert_close

from recbole_mm.config import DATASETS, PROPERTIES, Config
from recbole_mm.data.create import create_dataset
from recbole_mm.errors import InputError
from recbole_mm.models.mdsrec import MDSRec
from recbole_mm.modules.modality_interest import CAUSAL
from tests.models.conftest import SMALL
from tests.reference import mdsrec as reference


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where graphs are kept, shared by the tests of this file."""
    folder = tmp_path_factory.getbasetemp() / "mdsrec_cache"
    monkeypatch.setenv("RECBOLE_MM_CACHE", str(folder))
    return folder


@pytest.fixture
def world(build):
    def make(**options):
        return build(MDSRec, **options)

    return make


def train_batch(world):
    return next(iter(world.train))


def test_batch(world):
    return next(iter(world.test))[0]


test_batch.__test__ = False


def by_modality(model, table):
    """The blocks of an item table, (N, M, D)."""
    return table.view(model.n_items, len(model.modality_names), -1)


def graphs_of(model):
    return {"behaviour": model.graphs.behaviour, **model.graphs.modal}


def untrained(world):
    """Items that occur in no training history."""
    _, items = world.train._dataset.training_interactions()
    return sorted(set(range(1, world.model.n_items)) - set(items.tolist()))


# ------------------------------------------------------------------------------- items


@pytest.mark.parametrize(("use_id", "n_graph_layers"), [(True, 1), (False, 0), (False, 2)])
def test_item_table_equals_loop_reference_in_value_and_gradient(world, use_id, n_graph_layers):
    w = world(use_id=use_id, n_graph_layers=n_graph_layers, hidden_size=4)
    model = w.model.double()
    E = model.item_embedding.weight
    graphs = {
        name: reference.symmetric_normalise(torch.from_numpy(g.toarray()).double())
        for name, g in graphs_of(model).items()
    }
    graphs["id"] = graphs["behaviour"]

    blocks = []
    cold = untrained(w)
    kept = torch.ones_like(E)
    kept[cold] = 0
    E = kept * E
    for name in model.modality_names:
        carried = reference.propagate(graphs[name], E, n_graph_layers)
        vectors = [torch.zeros_like(E[0])]
        for i in range(1, model.n_items):
            if name == "id":
                content, present = E[i], i not in cold
            else:
                look = w.dataset.item_features[name]
                linear = model.project.project[name]
                f = look.values[look.rows[i]].double()
                content = linear.weight @ (8 * f / f.norm()) + linear.bias
                present = look.present[i]
            vectors.append(content + carried[i] if present else torch.zeros_like(E[i]))
        blocks.append(torch.stack(vectors))
    expected = torch.cat(blocks, dim=1)

    table = model.item_table()
    assert_close(table, expected, atol=1e-6, rtol=1e-6)  # the graphs are float32
    weight = torch.randn_like(table)
    inputs = [model.item_embedding.weight, *model.project.parameters()]
    assert_close(
        torch.autograd.grad((weight * table).sum(), inputs),
        torch.autograd.grad((weight * expected).sum(), inputs),
        atol=1e-5,
        rtol=1e-5,
    )


def test_padding_has_no_vector_and_no_score(world):
    w = world()
    assert w.model.item_table()[0].eq(0).all()
    assert w.model.full_sort_predict(test_batch(w))[:, 0].eq(0).all()


def test_id_that_training_does_not_know_has_no_vector(world):
    w = world()
    ids = by_modality(w.model, w.model.item_table())[:, 0]
    cold = untrained(w)
    assert cold
    assert ids[cold].eq(0).all()
    known = sorted(set(range(1, w.model.n_items)) - set(cold))
    assert ids[known].any(-1).all()


@pytest.mark.parametrize("use_id", [True, False])
@pytest.mark.parametrize("n_graph_layers", [0, 1, 2])
def test_cold_item_is_scored_by_its_features_and_not_by_its_own_embedding(
    world, n_graph_layers, use_id
):
    w = world(n_graph_layers=n_graph_layers, use_id=use_id)
    model, batch = w.model, test_batch(w)
    cold = next(i for i in untrained(w) if w.dataset.item_features.present[i].all())
    with torch.no_grad():
        before = model.full_sort_predict(batch)[:, cold]
        assert before.any()
        table = model.item_table()
        vectors = table[cold]
        model.item_embedding.weight[cold] += 1
        assert_close(model.item_table(), table, rtol=0, atol=0)

        image = model.project.features["image"]
        image.values = image.values.clone()
        image.values[image.rows[cold]] += 1
        model.eval()  # drops the table kept for evaluation
        assert not torch.isclose(model.item_table()[cold], vectors).all()
        assert not torch.isclose(model.full_sort_predict(batch)[:, cold], before).any()


# ------------------------------------------------------------------------------- scores


def test_score_is_the_weighted_sum_of_the_modalities_scores(world):
    w = world(initializer_range=0.3)
    model, batch = w.model, test_batch(w)
    with torch.no_grad():
        table = model.item_table()
        users, heard = model._interests(*model.histories(batch), table)
        weights = model.modality_weights(batch)
        single = torch.einsum("bmd,nmd->bmn", users, by_modality(model, table))
        assert_close(model.full_sort_predict(batch), torch.einsum("bm,bmn->bn", weights, single))
    assert_close(weights.sum(1), torch.ones(len(batch)))
    assert weights.std(0).min() > 0
    assert weights.masked_select(~heard).eq(0).all()


WHOLE = {"train_objective": "last"}  # centres of a whole history are trained at its last position


@pytest.mark.parametrize(
    "options",
    [
        {"interest_attention": "global", **WHOLE},
        {"interest_attention": "centres", **WHOLE},
        {"fusion": "concat"},
    ],
    ids=str,
)
def test_padding_and_batch_mates_do_not_matter_for_options_either(world, options):
    w = world(**options)
    batch = test_batch(w)[:6]
    with torch.no_grad():
        together = w.model.full_sort_predict(batch)
        for i, n in enumerate(batch["item_length"].tolist()):
            alone = Interaction({k: v[i : i + 1] for k, v in batch.interaction.items()})
            alone.update(Interaction({"item_id_list": alone["item_id_list"][:, :n]}))
            assert_close(w.model.full_sort_predict(alone)[0], together[i], atol=1e-5, rtol=1e-4)


def test_modality_that_the_history_lacks_gets_no_weight(world):
    w = world()
    no_picture = (~w.model.present[1:, 2]).nonzero()[0] + 1
    batch = test_batch(w)[:1]
    batch["item_id_list"][0, : int(batch["item_length"])] = no_picture
    weights = w.model.modality_weights(batch)
    assert weights[0, 2] == 0
    assert_close(weights.sum(), torch.tensor(1.0))
    assert w.model.full_sort_predict(batch).isfinite().all()


# ------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "options",
    [
        {"relation_graph": "mix", "n_graph_layers": 2},
        {"n_graph_layers": 0, "fusion": "sum"},
        {"interest_attention": "global", **WHOLE},
        {"interest_attention": "centres", **WHOLE},
        {"interest_attention": "running", "train_objective": "last"},
        {"interest_attention": "self"},
        {"fusion": "concat"},
        {"use_id": False, "n_layers": 1},
        {"modalities": "[]"},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient_with_every_option(world, options):
    w = world(**options)
    sum(w.model.calculate_loss(train_batch(w))).backward()
    silent = [n for n, p in w.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_loss_is_the_cross_entropy_of_the_scores_without_padding(world):
    w = world(initializer_range=0.3, train_objective="last")
    batch = train_batch(w)
    (loss,) = w.model.calculate_loss(batch)
    scores = w.model.full_sort_predict(batch)[:, 1:]
    assert_close(loss, F.cross_entropy(scores, batch["item_id"] - 1))


@pytest.mark.parametrize("attention", CAUSAL)
def test_all_positions_have_the_losses_of_their_prefixes(world, attention):
    # as drawn by default, scores are so small that weights of the modalities leave no trace
    options = {"interest_attention": attention, "MAX_ITEM_LIST_LENGTH": 20}
    options["initializer_range"] = 0.3
    prefixes, windows = world(**options, train_objective="last"), world(**options)
    windows.model.load_state_dict(prefixes.model.state_dict())
    with torch.no_grad():
        one_by_one = sum(prefixes.model.calculate_loss(b)[0] * len(b) for b in prefixes.train)
        at_once = sum(
            windows.model.calculate_loss(b)[0] * (b["item_id_target_list"] > 0).sum()
            for b in windows.train
        )
    assert_close(at_once, one_by_one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["centres", "global"])
def test_attention_that_sees_later_items_refuses_all_positions(attention):
    options = {"interest_attention": attention, "train_objective": "all"}
    with pytest.raises(InputError, match="interest centres see the whole history"):
        Config(MDSRec, "tiny", config_dict=options)


def test_graphs_are_not_saved(world):
    model = world().model
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# ------------------------------------------------------------------------------- graphs


def interactions():
    """Rows (user, item, second) of ``tiny`` as they stand in the file."""
    header, *lines = (DATASETS / "tiny/tiny.inter").read_text().splitlines()
    return header, np.array([line.split("\t") for line in lines])


def later_ones(rows):
    """How many interactions of the same user come later, by row."""
    order = np.lexsort((-rows[:, 2].astype(int), rows[:, 0]))
    users = rows[order, 0]
    begins = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    later = np.empty(len(rows), int)
    later[order] = np.arange(len(rows)) - np.repeat(begins, np.diff(np.append(begins, len(rows))))
    return later


@pytest.fixture
def moved(tmp_path):
    """``tiny`` with other items where ``wanted(later_ones)``: config and the three loaders.

    Only in the second half of the file: ids are given in the order of first occurrence.
    """

    def make(wanted):
        folder = tmp_path / "tiny"
        folder.mkdir()
        for path in (DATASETS / "tiny").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        header, rows = interactions()
        chosen = np.flatnonzero(wanted(later_ones(rows)))
        chosen = chosen[chosen > len(rows) // 2]
        rows[chosen, 1] = np.roll(rows[chosen, 1], 1)
        text = "\n".join([header, *("\t".join(row) for row in rows)]) + "\n"
        (folder / "tiny.inter").write_text(text)
        config = Config(MDSRec, "tiny", config_dict=SMALL | {"data_path": str(tmp_path)})
        return config, data_preparation(config, create_dataset(config))

    return make


def test_moving_validation_and_test_interactions_changes_no_edge(world, moved, cache):
    w = world()
    kept = {path.name for path in cache.glob("*.npz")}
    config, (train, valid, test) = moved(lambda later: later < 2)
    for before, after in ((w.valid, valid), (w.test, test)):
        items = [loader._dataset.inter_feat["item_id"] for loader in (before, after)]
        assert (items[0] != items[1]).sum() > 50
    assert (w.dataset.field2id_token["item_id"] == train._dataset.field2id_token["item_id"]).all()

    other = MDSRec(config, train._dataset)
    for name, graph in graphs_of(w.model).items():
        assert (graph != graphs_of(other)[name]).nnz == 0
    assert {path.name for path in cache.glob("*.npz")} == kept


def test_moving_training_interactions_changes_edges_and_reuses_no_file(world, moved, cache):
    w = world()
    kept = {path.name for path in cache.glob("*.npz")}
    config, (train, _, _) = moved(lambda later: later == 2)
    other = MDSRec(config, train._dataset)
    for name, graph in graphs_of(w.model).items():
        assert (graph != graphs_of(other)[name]).nnz > 0
    assert len({path.name for path in cache.glob("*.npz")} - kept) == 3


def test_behaviour_graph_counts_histories_without_the_held_out_items(world):
    w = world(behaviour_k=1000)
    _, rows = interactions()
    rows = rows[later_ones(rows) >= 2]
    rows = rows[np.lexsort((rows[:, 2].astype(int), rows[:, 0]))]
    items = [w.dataset.token2id("item_id", item) for item in rows[:, 1]]
    users = np.unique(rows[:, 0], return_inverse=True)[1]
    expected = reference.behaviour_graph(users, items, w.model.n_items, 3, 1000)
    graph = torch.from_numpy(w.model.graphs.behaviour.toarray()).double()
    assert_close(graph, expected, atol=1e-6, rtol=0)  # the graph is float32


def test_without_behaviour_the_graphs_know_the_features_alone(world):
    w = world(behaviour_k=0)
    assert w.model.graphs.behaviour.nnz == 0
    look = w.dataset.item_features["text"]
    who = look.present.nonzero().flatten()
    alone = reference.knn_graph(look.values[look.rows[who]].double(), 10)
    graph = torch.from_numpy(w.model.graphs.modal["text"].toarray()).double()
    assert_close(graph[who][:, who], alone, atol=1e-6, rtol=0)
    with torch.no_grad():
        carried = w.model.relations(w.model.item_embedding.weight)
    assert carried[0].eq(0).all()  # nothing is carried to the id
    assert w.model.full_sort_predict(test_batch(w)).isfinite().all()


@pytest.mark.parametrize("relation_graph", ["smooth", "mix"])
def test_items_without_a_modality_stand_apart_in_its_graph(world, relation_graph):
    w = world(relation_graph=relation_graph)
    for name, graph in w.model.graphs.modal.items():
        dense = graph.toarray()
        absent = ~w.dataset.item_features[name].present.numpy()
        assert absent.sum() > 1
        assert not dense[absent].any()
        assert not dense[:, absent].any()


# ------------------------------------------------------------------------------- reading


def test_nearest_neighbours_by_text_are_the_twins(world):
    w = world(relation_graph="mix", mix_beta=1.0)
    lines = (DATASETS / "tiny/tiny.item").read_text().splitlines()[1:]
    title = dict(line.split("\t")[:2] for line in lines)
    item = w.dataset.token2id("item_id", "i000")
    found = w.model.neighbours(item, "text", 2)
    names = [title[w.dataset.id2token("item_id", i)] for i, _ in found]
    assert names == [title["i000"]] * 2
    assert found[0][1] >= found[1][1] > 0


def test_neighbours_by_behaviour_are_the_heaviest_of_their_row(world):
    model = world().model
    item = int(model.graphs.behaviour.getnnz(axis=1).argmax())
    weights = [weight for _, weight in model.neighbours(item, "behaviour", 3)]
    assert weights == sorted(model.graphs.behaviour[item].data.tolist(), reverse=True)[:3]


def test_graph_or_item_that_does_not_exist_is_refused(world):
    model = world().model
    with pytest.raises(InputError, match="no graph 'audio'; choose one of behaviour, text, image"):
        model.neighbours(1, "audio", 3)
    with pytest.raises(InputError, match="item must lie in"):
        model.neighbours(0, "text", 3)


def test_overlap_is_given_for_every_pair_of_graphs(world):
    found = world().model.graph_overlap(5)
    assert set(found) == {("behaviour", "text"), ("behaviour", "image"), ("text", "image")}
    assert found["text", "image"] > found["behaviour", "image"] > 0


def test_concat_has_no_modality_weights(world):
    w = world(fusion="concat")
    with pytest.raises(InputError, match="use attention or sum"):
        w.model.modality_weights(test_batch(w))


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_id": False, "modalities": "[]"}, "nothing describes an item"),
    ],
)
def test_impossible_options_are_refused(world, options, message):
    with pytest.raises(InputError, match=message):
        world(**options)


def test_without_modalities_the_id_is_the_only_one(world):
    w = world(modalities="[]")
    assert w.model.modality_names == ("id",)
    batch = test_batch(w)
    assert w.model.full_sort_predict(batch).shape == (len(batch), w.model.n_items)


@pytest.mark.parametrize(
    "path", sorted((PROPERTIES / "ablation/MDSRec").glob("*.yaml")), ids=lambda path: path.stem
)
def test_ablation_file_runs(path):
    config = Config(MDSRec, "tiny", [path], {"show_progress": False, "hidden_size": 8})
    train = data_preparation(config, create_dataset(config))[0]
    model = MDSRec(config, train._dataset)
    assert sum(model.calculate_loss(next(iter(train)))).isfinite()
