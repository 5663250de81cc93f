"""Runs read back from their folder, and what models tell of themselves."""

import itertools
import json
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pandas.testing import assert_frame_equal

import recbole_mm
from recbole_mm import explain
from recbole_mm.cli import main, run_main
from recbole_mm.config import DATASETS, Config
from recbole_mm.data.categories import CategoryTable
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.explain import Table, by_activity, by_category, gather, write
from recbole_mm.models.sasrec import SASRecMM
from recbole_mm.quick_start import explain_run, open_run
from recbole_mm.registry import MODELS
from recbole_mm.trainer import trainer_class
from tests.models.conftest import build as build_model

TELLING = ("MUFASA", "CAMMSR", "MDSRec")
QUICK = {"epochs": 2, "MAX_ITEM_LIST_LENGTH": 12, "show_progress": False, "train_batch_size": 256}


@pytest.fixture(name="build")
def _build():
    return build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folders by model, each trained once."""
    made = {}

    def make(model):
        if model not in made:
            where = {"checkpoint_dir": str(tmp_path_factory.mktemp("run"))}
            values = {**QUICK, **where, "explain": model in TELLING}
            made[model] = recbole_mm.run(model, "tiny", config_dict=values)
        return Path(made[model]["run"])

    return make


# ------------------------------------------------------------------------- reading a run back


@pytest.mark.parametrize(
    "model", ["MUFASA", "CAMMSR", "MDSRec", "SASRecMM", "SASRec", "BERT4Rec", "Pop", "LightGCN"]
)
def test_a_run_that_is_read_back_scores_as_it_did(model, folder):
    path = folder(model)
    config, dataset, (_, _, test), net = open_run(path)
    assert not net.training
    assert dataset.item_num == 121
    trainer = trainer_class(config["MODEL_TYPE"], config.model_class)(config, net, None)
    found = trainer.evaluate(test, load_best_model=False)
    saved = json.loads((path / "result.json").read_text())["test_result"]
    assert dict(found) == saved


def test_a_run_that_is_read_back_has_the_batches_of_its_training(folder):
    config, _, (train, *_), _ = open_run(folder("MDSRec"))
    rows = train._dataset.inter_feat
    assert train.step == round(config["train_batch_size"] * len(rows) / len(rows.targets()))


def test_a_pickle_of_recboles_is_not_scored(build_trainer):
    trainer, _ = build_trainer("SASRecFast")
    with pytest.raises(InputError, match=r"model_file: 'model\.pth' is not read; .*open_run"):
        trainer.evaluate(None, model_file="model.pth")


@pytest.mark.parametrize("model", [*MODELS, "SASRec", "BERT4Rec", "BPR", "FM", "KGAT", "SASRecF"])
def test_a_resolved_configuration_resolves_to_itself(model, tmp_path):
    values = {"selected_features": ["categories"]} if model == "SASRecF" else {}
    resolved = Config(model, "tiny", config_dict={**QUICK, **values}).resolved()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(resolved))
    assert Config.reopened(file).resolved() == resolved


def test_stronger_values_replace_those_of_the_folder(folder):
    path = folder("Pop")
    assert open_run(path, {"topk": [7], "valid_metric": "NDCG@7"}).config["topk"] == [7]
    assert open_run(path, command_line=["--eval_batch_size=3"]).config["eval_batch_size"] == 3 * 121


@pytest.fixture
def copied(folder, tmp_path):
    """A MUFASA run and a copy of its data set, to be spoilt."""
    data = shutil.copytree(DATASETS / "tiny", tmp_path / "data" / "tiny")
    run = shutil.copytree(folder("MUFASA"), tmp_path / "run")
    return run, data, {"data_path": str(tmp_path / "data")}


def test_data_that_have_moved_are_found_with_data_path(copied):
    run, _, values = copied
    assert open_run(run, values).config["data_path"] == values["data_path"] + "/tiny"


def test_changed_interactions_are_refused_by_name(copied):
    run, data, values = copied
    file = data / "tiny.inter"
    lines = file.read_text().splitlines()
    user, _, time = lines[1].split("\t")
    replaced = next(line.split("\t")[1] for line in lines[2:] if line.split("\t")[0] != user)
    file.write_text("\n".join([lines[0], f"{user}\t{replaced}\t{time}", *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=r"changed since this run: (train|valid|test) \(\w+ then"):
        open_run(run, values)


def test_another_order_of_the_ids_is_refused(copied):
    run, data, values = copied
    file = data / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    file.write_text("\n".join([header, *reversed(lines)]) + "\n")
    with pytest.raises(InputError, match=r"order of (user|item)_id"):
        open_run(run, values)


def test_changed_feature_files_are_refused_by_name(copied):
    run, data, values = copied
    content = bytearray((data / "text.npy").read_bytes())
    content[-1] ^= 1
    (data / "text.npy").write_bytes(bytes(content))
    with pytest.raises(InputError, match="text sha256") as error:
        open_run(run, values)
    assert "train" not in str(error.value).split(";")[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.yaml", "not a run folder"),
        ("model.safetensors", "saved no epoch"),
        ("protocol.json", "protocol.json: cannot be read"),
    ],
)
def test_an_incomplete_folder_is_refused(name, message, copied):
    run, _, _ = copied
    (run / name).unlink()
    with pytest.raises(InputError, match=message):
        open_run(run)


def test_damaged_or_foreign_weights_are_refused(copied, folder):
    run, _, _ = copied
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        open_run(run)
    shutil.copy(folder("SASRecMM") / "model.safetensors", file)
    with pytest.raises(InputError, match="weights are those of another model"):
        open_run(run)


# ------------------------------------------------------------------------- means


def test_means_by_activity_count_each_history_once():
    users = pd.DataFrame(
        {"history_length": [5, 1, 6, 200, 201, 999], "text": [0.1, 0.3, 0.5, 0.2, 0.4, 0.8]}
    )
    table = by_activity(users, ["text"])
    assert table["history_length"].tolist() == ["1 to 5", "6 to 10", "101 to 200", "over 200"]
    assert table["histories"].tolist() == [2, 1, 1, 2]
    assert table["text"].tolist() == pytest.approx([0.2, 0.5, 0.2, 0.6])


def test_means_by_activity_can_be_kept_apart():
    users = pd.DataFrame({"history_length": [1, 9, 1], "layer": [1, 1, 2], "a": [1.0, 2.0, 4.0]})
    table = by_activity(users, ["a"], panel="layer")
    assert table.to_numpy().tolist() == [
        ["1 to 5", 1, 1.0, 1],
        ["6 to 10", 1, 2.0, 1],
        ["1 to 5", 1, 4.0, 2],
    ]


def test_means_by_category_count_an_item_in_each_of_its_categories():
    categories = CategoryTable.from_lists([(), ("b", "a"), ("b",), (), ("c",), ("a",)])
    counts = np.array([0, 2, 3, 1, 0, 1])
    totals = np.array([[0, 0], [2.0, 0], [0, 3.0], [0.5, 0.5], [0, 0], [0.25, 0.75]])
    table = by_category(totals, counts, ["x", "y"], categories, "positions")
    assert table["category"].tolist() == ["(all)", "b", "a", "(none)"]
    assert table["positions"].tolist() == [7, 5, 3, 1]
    assert table["x"].tolist() == pytest.approx([2.75 / 7, 2 / 5, 2.25 / 3, 0.5])
    assert table["y"].tolist() == pytest.approx([4.25 / 7, 3 / 5, 0.75 / 3, 0.5])


def test_means_without_categories_are_one_row():
    table = by_category(np.ones((3, 1)), np.array([0, 2, 2]), ["x"], None, "items")
    assert table.to_numpy().tolist() == [["(all)", 4, 0.75]]


# ------------------------------------------------------------------------- what is given


def material(world, items=None):
    return gather(world.model, world.dataset, (world.train, world.valid, world.test), items)


def rows(world):
    """The test histories one by one, as the loader of the evaluation gives them."""
    for interaction, *_ in world.test:
        for row in range(len(interaction)):
            yield interaction[torch.tensor([row])]


def group(length):
    return "1 to 5" if length <= 5 else "6 to 10" if length <= 10 else "11 to 20"


def test_the_material_holds_every_test_history_once_and_the_popular_items(build, monkeypatch):
    monkeypatch.setattr(explain, "_BATCH", 7)
    world = build("CAMMSR")
    given = material(world)
    found = [tuple(h) for batch in given.batches() for h in batch["item_id_list"].tolist()]
    assert found == [tuple(row["item_id_list"][0].tolist()) for row in rows(world)]
    users = [user for batch in given.batches() for user in given.users(batch)]
    assert len(set(users)) == len(users) == 300

    lines = (DATASETS / "tiny" / "tiny.inter").read_text().splitlines()[1:]
    history = defaultdict(list)
    for line in lines:
        user, item, time = line.split("\t")
        history[user].append((float(time), item))
    counts = Counter(item for seen in history.values() for _, item in sorted(seen)[:-2])
    shown = [given.item_tokens[item] for item in given.items]
    assert len(shown) == explain.N_ITEMS
    assert [counts[item] for item in shown] == sorted(counts.values(), reverse=True)[:20]


def test_items_are_named_by_token(build):
    world = build("CAMMSR")
    given = material(world, ["i007", "i001", "i007"])
    assert [given.item_tokens[item] for item in given.items] == ["i007", "i001"]
    with pytest.raises(InputError, match="items: 'i0001' is no item"):
        material(world, ["i0001"])
    with pytest.raises(InputError, match="PAD"):
        material(world, ["[PAD]"])


# ------------------------------------------------------------------------- the models


@pytest.mark.parametrize("model", TELLING)
def test_a_modality_may_be_called_as_a_column(model, build):
    called = (
        "{category: {path: text.npy, ids: '{dataset}.item', zero: mask}, "
        "user: {path: image.npy, ids: image_ids.txt}}"
    )
    world, twin = build(model, modalities=called), build(model)
    tables = world.model.explain(material(world))
    for name, expected in twin.model.explain(material(twin)).items():
        if "_by_" in name:
            names = {"text": "category_weight", "image": "user_weight"}
            assert_frame_equal(tables[name].frame, expected.frame.rename(columns=names))
            assert tables[name].values == tuple(names.get(key, key) for key in expected.values)


def test_cammsr_gives_the_means_of_its_weights(build):
    world = build("CAMMSR", category_reduction="mean")
    with torch.no_grad():  # as drawn, all weights are nearly equal
        for parameter in world.model.parameters():
            parameter.mul_(8)
    tables = world.model.explain(material(world))
    names = world.model.modality_names
    hot = world.dataset.item_categories
    by_name, groups = defaultdict(list), defaultdict(list)
    for row in rows(world):
        weights, real = world.model.modality_weights(row)
        length = int(row["item_length"])
        assert real.sum() == length
        for item, weight in zip(row["item_id_list"][0].tolist(), weights[0], strict=False):
            if item == 0:
                continue
            own = [name for name, has in zip(hot.names, hot.multi_hot[item], strict=True) if has]
            for name in ["(all)", *(own or ["(none)"])]:
                by_name[name].append(weight.double())
        groups[group(length)].append(weights[0, :length].double().mean(0))

    table = tables["modality_by_category"].frame.set_index("category")
    assert set(table.index) == set(by_name)
    for name, weights in by_name.items():
        assert table.loc[name, "positions"] == len(weights)
        mean = torch.stack(weights).mean(0).tolist()
        assert table.loc[name, list(names)].tolist() == pytest.approx(mean, abs=1e-6)
    assert np.ptp(table["text"]) > 0.01
    table = tables["modality_by_activity"].frame.set_index("history_length")
    assert table["histories"].to_dict() == {name: len(users) for name, users in groups.items()}
    for name, users in groups.items():
        mean = torch.stack(users).mean(0).tolist()
        assert table.loc[name, list(names)].tolist() == pytest.approx(mean, abs=1e-6)


def test_mdsrec_gives_neighbours_by_token_in_every_graph(build):
    world = build("MDSRec")
    chosen = ["i010", "i003", "i079"]
    table = world.model.explain(material(world, chosen))["neighbours"].frame
    graphs = {"behaviour": world.model.graphs.behaviour, **world.model.graphs.modal}
    tokens = world.dataset.item_tokens
    for item, (name, graph) in itertools.product(chosen, graphs.items()):
        dense = graph.toarray()[tokens.index(item)]
        best = sorted(np.flatnonzero(dense), key=lambda other: (-dense[other], other))[:10]
        found = table[(table["item"] == item) & (table["graph"] == name)]
        assert found["neighbour"].tolist() == [tokens[other] for other in best]
        assert found["weight"].tolist() == pytest.approx(dense[best].tolist())
        assert found["rank"].tolist() == list(range(1, len(best) + 1))
    assert table["item"].drop_duplicates().tolist() == chosen
    assert not ((table["item"] == "i003") & (table["graph"] == "image")).any()  # has no picture


def test_mdsrec_gives_the_overlap_of_its_graphs(build):
    world = build("MDSRec")
    table = world.model.explain(material(world))["graph_overlap"].frame.set_index("k")
    graphs = {"behaviour": world.model.graphs.behaviour, **world.model.graphs.modal}
    dense = {name: graph.toarray() for name, graph in graphs.items()}
    assert table.index.tolist() == list(range(1, 11))
    # at equal weights an item may have other neighbours: compare where there is no choice
    for k, (a, b) in itertools.product((3, 10), itertools.combinations(graphs, 2)):
        found = []
        for item in range(1, 121):
            sets = []
            for name in (a, b):
                weights = dense[name][item]
                best = sorted(np.flatnonzero(weights), key=lambda j: (-weights[j], j))[:k]
                sets.append(set(best))
            if all(sets):
                found.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        assert table.loc[k, f"{a} and {b}"] == pytest.approx(np.mean(found), abs=1e-6)


def test_mdsrec_gives_the_weights_of_every_user(build):
    world = build("MDSRec")
    tables = world.model.explain(material(world))
    names, users = list(world.model.modality_names), world.dataset.field2id_token["user_id"]
    groups = defaultdict(list)
    expected = []
    for row in rows(world):
        weights = world.model.modality_weights(row)[0].tolist()
        expected.append([users[int(row["user_id"])], int(row["item_length"]), weights])
        groups[group(int(row["item_length"]))].append(weights)
    table = tables["modality_by_user"].frame
    assert table["user"].tolist() == [user for user, _, _ in expected]
    assert table["history_length"].tolist() == [length for _, length, _ in expected]
    np.testing.assert_allclose(table[names], [weights for *_, weights in expected], atol=1e-6)
    table = tables["modality_by_activity"].frame.set_index("history_length")
    for name, weights in groups.items():
        assert table.loc[name, "histories"] == len(weights)
        np.testing.assert_allclose(table.loc[name, names].tolist(), np.mean(weights, 0), atol=1e-6)


def test_mdsrec_leaves_out_what_it_does_not_have(build):
    world = build("MDSRec", fusion="concat")
    assert set(world.model.explain(material(world))) == {"neighbours", "graph_overlap"}
    world = build("MDSRec", modalities="[]")
    found = world.model.explain(material(world))
    assert set(found) == {"neighbours", "modality_by_user", "modality_by_activity"}
    assert set(found["neighbours"].frame["graph"]) == {"behaviour"}


def test_mufasa_gives_the_gates_of_the_last_position(build):
    """The reference listens to the gate maps while single users are scored."""
    world = build("MUFASA")
    with torch.no_grad():
        for attention in world.model.encoder.attention:
            attention.gate.weight.mul_(30)
    table = world.model.explain(material(world))["gates_by_activity"].frame
    heard = []
    for attention in world.model.encoder.attention:
        attention.gate.register_forward_hook(lambda module, given, out: heard.append(out[0, -1]))
    offset = world.model.encoder.attention[0].gate_offset
    groups = defaultdict(list)
    with torch.no_grad():
        for row in rows(world):
            heard.clear()
            world.model.full_sort_predict(row)
            for layer, logits in enumerate(heard, 1):
                gates = torch.sigmoid(logits.view(2, 3) + offset).mean(0)
                groups[layer, group(int(row["item_length"]))].append(gates)
    assert {(row.layer, row.history_length) for row in table.itertuples()} == set(groups)
    for row in table.itertuples():
        gates = torch.stack(groups[row.layer, row.history_length])
        assert row.histories == len(gates)
        found = [row.window, row.block, row.selected]
        assert found == pytest.approx(gates.mean(0).tolist(), abs=1e-5)
    assert np.ptp(table["block"]) > 1e-3


def test_mufasa_gives_the_attention_of_its_fusion_over_all_items(build):
    world = build("MUFASA")
    with torch.no_grad():
        world.model.fusion.query.weight.mul_(30)
        h, present = world.model.project(torch.arange(121))
        weights = world.model.fusion.attention_weights(h, present)
    table = world.model.explain(material(world))["fusion_by_category"].frame.set_index("category")
    hot = world.dataset.item_categories
    for number, name in enumerate(hot.names):
        members = [i for i in range(1, 121) if hot.multi_hot[i, number] and present[i].any()]
        assert table.loc[name, "items"] == len(members)
        mean = weights[members].mean(0).tolist()
        assert table.loc[name, ["text", "image"]].tolist() == pytest.approx(mean, abs=1e-6)
    assert table.loc["(all)", "items"] == int(present.any(1).sum())


def test_mufasa_without_modalities_or_branches_gives_what_is_left(build):
    world = build("MUFASA", modalities="[]", use_block=False)
    tables = world.model.explain(material(world))
    assert set(tables) == {"gates_by_activity"}
    assert tables["gates_by_activity"].values == ("window", "selected")


# ------------------------------------------------------------------------- files


def table(name="a"):
    frame = pd.DataFrame({"category": [name, "b"], "items": [3, 1], "text": [0.25, 1 / 3]})
    return Table(frame, "Title", ("text",), "weight")


def test_tables_are_written_as_csv_and_plot_and_replace_earlier_ones(tmp_path):
    write({"old": table()}, tmp_path)
    files = write({"one": table("costs $1 to $2"), "two": Table(table().frame, "t")}, tmp_path)
    assert [file.name for file in files] == ["one.csv", "one.png", "two.csv"]
    assert (tmp_path / "explain" / "two.csv").read_text() == (
        "category,items,text\na,3,0.25\nb,1,0.333333\n"
    )
    assert (tmp_path / "explain" / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["explain"]


@pytest.mark.parametrize("kind", ["groups", "lines", "spread"])
@pytest.mark.parametrize("panel", [None, "layer"])
def test_every_kind_of_plot_is_drawn_with_labels(kind, panel, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    frame = pd.DataFrame(
        {"k": range(40), "items": 1, "a": 0.5, "b": np.linspace(0, 1, 40), "layer": 1}
    )
    write({"x": Table(frame, "Title", ("a", "b"), "weight", kind, panel)}, tmp_path)
    (axis,) = figures[0].axes
    assert axis.get_xlabel()
    assert axis.get_ylabel()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    if kind == "groups":
        assert "10 more in the CSV" in axis.get_ylabel()
        assert len(axis.get_yticklabels()) == 30


def test_without_matplotlib_the_csv_files_are_written_and_the_mend_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'recbole-mm\[plots\]'"):
        write({"one": table(), "two": table()}, tmp_path)
    assert sorted(p.name for p in (tmp_path / "explain").iterdir()) == ["one.csv", "two.csv"]


def test_an_error_leaves_what_was_there(tmp_path):
    write({"one": table()}, tmp_path)
    broken = Table(table().frame, "t", ("missing",), "weight")
    with pytest.raises(KeyError):
        write({"new": table(), "broken": broken}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["explain"]
    assert {path.name for path in (tmp_path / "explain").iterdir()} == {"one.csv", "one.png"}
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        write({"one": table()}, tmp_path / "missing")


# ------------------------------------------------------------------------- a run


@pytest.mark.parametrize("model", TELLING)
def test_the_key_and_the_command_write_the_same_tables(model, folder, capsys):
    written = folder(model) / "explain"
    during = {path.name: path.read_bytes() for path in written.glob("*.csv")}
    assert during
    shutil.rmtree(written)
    assert main(["explain", str(written.parent)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [str(path) for path in sorted(written.iterdir())]
    assert {path.name: path.read_bytes() for path in written.glob("*.csv")} == during
    assert any(name.endswith(".png") for name in listed)


def test_the_command_shows_the_items_that_are_named(folder, tmp_path):
    path = shutil.copytree(folder("MDSRec"), tmp_path / "run")
    assert main(["explain", str(path), "--items", "i005", "i009"]) == 0
    shown = pd.read_csv(path / "explain" / "neighbours.csv")["item"]
    assert shown.drop_duplicates().tolist() == ["i005", "i009"]


def test_what_cannot_be_explained_is_refused_and_nothing_is_written(folder, tmp_path, capsys):
    for model in ("SASRecMM", "SASRec"):
        path = folder(model)
        before = sorted(path.rglob("*"))
        assert main(["explain", str(path)]) == 2
        message = capsys.readouterr().err
        assert f"{model} tells nothing of itself" in message
        assert "MUFASA, CAMMSR, MDSRec" in message
        assert sorted(path.rglob("*")) == before
    path = folder("MDSRec")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert main(["explain", str(path), "--items", "nobody"]) == 2
    assert "'nobody' is no item" in capsys.readouterr().err
    assert main(["explain", str(folder("MUFASA")), "--items", "i005"]) == 2
    assert "what MUFASA tells of itself is not of single items" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    arguments = ["--dataset=tiny", "--explain=True", f"--checkpoint_dir={tmp_path / 'saved'}"]
    assert run_main(["--model=SASRecMM", *arguments]) == 2
    assert not (tmp_path / "saved").exists()


def test_a_run_without_matplotlib_keeps_its_result(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    values = {**QUICK, "epochs": 1, "explain": True, "checkpoint_dir": str(tmp_path)}
    result = recbole_mm.run("MUFASA", "tiny", config_dict=values)
    assert result["test_result"]
    names = {path.suffix for path in (Path(result["run"]) / "explain").iterdir()}
    assert names == {".csv"}
    assert "recbole-mm[plots]" in (Path(result["run"]) / "run.log").read_text()


class Telling(SASRecMM):
    """A model of a user: one method is all it takes."""

    def explain(self, given):
        lengths = [n for batch in given.batches() for n in batch["item_length"].tolist()]
        return {"lengths": Table(pd.DataFrame({"length": lengths}), "Lengths")}


def test_a_model_of_ones_own_explains_itself_with_one_method(tmp_path):
    values = {**QUICK, "explain": True, "checkpoint_dir": str(tmp_path), "epochs": 1}
    result = recbole_mm.run(Telling, "tiny", config_dict=values)
    file = Path(result["run"]) / "explain" / "lengths.csv"
    assert len(file.read_text().splitlines()) == 301
    file.unlink()
    assert explain_run(result["run"], model=Telling) == [file]
