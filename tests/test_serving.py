"""A run folder answers alone: no data set, and nothing executed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import recbole_mm
from recbole_mm import serving
from recbole_mm.checkpoint import read, write
from recbole_mm.config import DATASETS
from recbole_mm.errors import InputError, NumericalError
from recbole_mm.registry import get_model

QUICK = {
    "epochs": 1,
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 512,
    "show_progress": False,
    "hidden_size": 16,
    "inner_size": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folders whose data set is gone."""
    made = {}

    def make(model, **values):
        key = (model, *sorted(values.items()))
        if key not in made:
            base = tmp_path_factory.mktemp("run")
            shutil.copytree(DATASETS / "tiny", base / "data" / "tiny")
            where = {"checkpoint_dir": str(base / "saved"), "data_path": str(base / "data")}
            result = recbole_mm.run(model, "tiny", config_dict={**QUICK, **where, **values})
            live = recbole_mm.open_run(result["run"])
            batch = next(iter(live.loaders[2]))[0]
            with torch.no_grad():
                scores = live.model.full_sort_predict(batch)
            shutil.rmtree(base / "data")
            made[key] = Path(result["run"]), batch, scores
        return made[key]

    return make


def histories_of(served, batch):
    rows = zip(batch["item_id_list"].tolist(), batch["item_length"].tolist(), strict=True)
    return [[served.items[item] for item in row[:n]] for row, n in rows]


@pytest.mark.parametrize(
    "model", ["MUFASA", "CAMMSR", "MDSRec", "SASRecMM", "SASRecFast", "SASRec"]
)
def test_a_loaded_model_ranks_as_the_live_one_did(model, folder):
    path, batch, scores = folder(model)
    served = recbole_mm.load(path)
    assert not served.model.training
    histories = histories_of(served, batch)
    found = served.recommend(histories, k=7, mask_history=False)
    scores[:, 0] = -torch.inf
    expected = torch.topk(scores, 7)
    tokens = [[served.items[item] for item in row] for row in expected.indices.tolist()]
    torch.testing.assert_close(torch.tensor(found.scores), expected.values, rtol=1e-5, atol=1e-6)
    assert sum(a != b for a, b in zip(found.items, tokens, strict=True)) <= 1  # near ties


@pytest.mark.parametrize("model", ["MUFASA", "CAMMSR", "MDSRec", "SASRecMM", "SASRecFast"])
def test_products_of_vectors_are_the_scores(model, folder):
    served = recbole_mm.load(folder(model)[0])
    histories = [["i003", "i005"], ["i004"], [f"i{n:03}" for n in range(12)]]
    tokens, items = served.item_vectors()
    users = served.user_vectors(histories)
    found = served.recommend(histories, k=5, mask_history=False)
    for user, best, scores in zip(users, *found, strict=True):
        products = dict(zip(tokens, (items @ user).tolist(), strict=True))
        assert [products[token] for token in best] == pytest.approx(scores, abs=1e-4)
        assert max(products.values()) == pytest.approx(scores[0], abs=1e-4)
    assert served.user_vectors([]).shape == (0, items.shape[1])
    items[:] = 0  # as an index does that normalises in place
    assert served.recommend(histories, k=5, mask_history=False) == found
    with pytest.raises(InputError, match="histories must be a list of lists of item tokens, got 5"):
        served.user_vectors(5)


def test_vectors_that_take_more_than_items_are_refused(folder, monkeypatch):
    served = recbole_mm.load(folder("SASRecMM")[0])
    monkeypatch.setattr(served.model, "user_vectors", lambda batch: batch["timestamp_list"])
    with pytest.raises(InputError, match="SASRecMM reads 'timestamp_list' of a history besides"):
        served.user_vectors([["i003"]])


def test_a_model_without_vectors_is_named(folder):
    served = recbole_mm.load(folder("SASRec")[0])
    with pytest.raises(InputError, match="SASRec does not say which vectors"):
        served.item_vectors()


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "is none that torch knows"), ("cuda", "no GPU is found here")]
)
def test_a_device_that_is_not_there_is_refused(folder, device, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        recbole_mm.load(folder("SASRecMM")[0], device=device)


def test_masked_items_are_not_recommended(folder):
    path, batch, _ = folder("MUFASA")
    served = recbole_mm.load(path)
    histories = histories_of(served, batch)[:20]
    found = served.recommend(histories, k=120, mask_history=True)
    for history, items, scores in zip(histories, found.items, found.scores, strict=True):
        assert set(items) == set(served.items[1:]) - set(history)
        assert len(items) == len(scores)


def test_a_long_history_is_cut_and_still_masked(folder):
    path, _, _ = folder("SASRecFast")
    served = recbole_mm.load(path)
    long = served.items[1:31]
    assert served.recommend([long], 5).scores == served.recommend([long[-10:]], 5).scores
    assert not set(served.recommend([long], 90, mask_history=True).items[0]) & set(long)


def test_histories_are_answered_in_pieces_that_fit_the_memory(folder, monkeypatch):
    path, batch, _ = folder("SASRecFast")
    served = recbole_mm.load(path)
    histories = histories_of(served, batch)[:9]
    at_once = served.recommend(histories, 5)
    monkeypatch.setitem(served.config, "eval_batch_size", 4)
    pieces = served.recommend(histories, 5)
    assert pieces.items == at_once.items


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([["i001", "nope"]],), "history 0: 'nope' is no item of this run"),
        (([[]],), "history 0 has no item"),
        ((["i001"],), "is a text, not a list"),
        (([["i001"]], 0), "k must lie between 1 and 120, got 0"),
        (([["i001"]], 121), "k must lie between 1 and 120, got 121"),
        *(
            (([["i001"]], k), f"k must be a whole number, got {k!r}")
            for k in (2.0, "3", True, None)
        ),
        (([1, 2],), "history 0 is int, not a list of item tokens: 1"),
        (([b"i001"],), "is a text, not a list"),
        (([iter(["i001"])],), "history 0 is list_iterator, not a list"),
        *((((given),), "histories must be a list of lists") for given in (None, "i001", 3)),
    ],
)
def test_impossible_questions_are_refused(arguments, message, folder):
    served = recbole_mm.load(folder("SASRecFast")[0])
    with pytest.raises(InputError, match=message):
        served.recommend(*arguments)


def test_a_score_that_is_not_finite_is_no_recommendation(folder):
    served = recbole_mm.load(folder("SASRecFast")[0])
    with torch.no_grad():
        served.model.item_embedding.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="SASRecFast: a score is not finite"):
        served.recommend([served.items[5:8]])


def test_unknown_items_can_be_passed_over(folder):
    served = recbole_mm.load(folder("SASRecFast")[0])
    known = served.items[3:6]
    mixed = [known[0], "new", *known[1:]]
    assert served.recommend([mixed], skip_unknown=True) == served.recommend([known])


def test_general_models_and_models_of_the_data_set_are_refused(folder):
    with pytest.raises(InputError, match="recommends to users"):
        recbole_mm.load(folder("BPR")[0]).recommend([["x"]])
    with pytest.raises(InputError, match="LightGCN asks its data set for inter_matrix"):
        recbole_mm.load(folder("LightGCN")[0])


# ------------------------------------------------------------------------- what does not belong


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder("SASRecMM")[0], tmp_path / "run")


def about_changed(file, **values):
    saved = read(file)
    write(file, saved.tensors, {**saved.about, **values})


def test_weights_of_another_model_are_refused(copied, folder):
    shutil.copy(folder("SASRecFast")[0] / "model.safetensors", copied)
    with pytest.raises(InputError, match=r"differ in model \('SASRecFast'.*features \(\{\}"):
        recbole_mm.load(copied)


@pytest.mark.parametrize("reader", [recbole_mm.load, recbole_mm.open_run])
def test_another_class_than_that_of_the_run_is_refused(reader, copied, caplog):
    with pytest.raises(InputError, match="is a run of SASRecMM, not of SASRecFast"):
        reader(copied, model=get_model("SASRecFast"))
    with pytest.raises(InputError, match=r"takes the class of the model, .*got <class 'dict'>"):
        reader(copied, model=dict)
    assert not caplog.text


def test_another_item_set_is_refused(copied):
    ids = json.loads((copied / "ids.json").read_text())
    ids["item_id"][5], ids["item_id"][6] = ids["item_id"][6], ids["item_id"][5]
    (copied / "ids.json").write_text(json.dumps(ids))
    with pytest.raises(InputError, match=r"differ in items \('\w{16}' in model\.safetensors"):
        recbole_mm.load(copied)
    ids["item_id"].pop()
    (copied / "ids.json").write_text(json.dumps(ids))
    with pytest.raises(InputError, match=r"n_items \(120 in model\.safetensors, 119 beside it"):
        recbole_mm.load(copied)


def test_another_feature_width_is_refused(copied):
    file = copied / "items.safetensors"
    kept = read(file)
    kept.tensors["feature.text.values"] = kept.tensors["feature.text.values"][:, :5]
    write(file, kept.tensors, {**kept.about, "features": {"text": 5, "image": 16}})
    with pytest.raises(InputError, match=r"features \(\{.*'text': 16.*\{'text': 5"):
        recbole_mm.load(copied)


def test_another_hidden_size_is_refused(copied):
    values = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**values, "hidden_size": 32}))
    with pytest.raises(
        InputError, match=r"another model: item_embedding.weight \(\[121, 16\] there, \[121, 32\]"
    ):
        recbole_mm.load(copied)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "ids.json"])
def test_an_incomplete_folder_is_refused(name, copied):
    (copied / name).unlink()
    with pytest.raises(InputError, match=name if name != "config.yaml" else "not a run folder"):
        recbole_mm.load(copied)


CONFIGS = ["", "a: [", "- 1\n", "\x00", "data_path: x\nepochs: 1\n"]
IDS = ["", "[]", "{}", '{"user_id": []}', "{"]


@pytest.mark.parametrize(
    ("name", "text"),
    [*(("config.yaml", text) for text in CONFIGS), *(("ids.json", text) for text in IDS)],
)
def test_a_damaged_folder_is_refused(name, text, copied):
    (copied / name).write_text(text)
    with pytest.raises(InputError, match=name):
        recbole_mm.load(copied)
    if name == "config.yaml":
        with pytest.raises(InputError, match=name):
            recbole_mm.open_run(copied)


def test_a_pickle_in_the_place_of_weights_is_refused_and_not_executed(copied, tmp_path):
    canary = tmp_path / "canary"

    class Bad:
        def __reduce__(self):
            return (Path.touch, (canary,))

    torch.save({"weights": Bad()}, copied / "model.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        recbole_mm.load(copied)
    assert not canary.exists()


def test_only_rows_of_items_are_kept(folder):
    path, _, _ = folder("SASRecMM")
    kept = load_file(path / "items.safetensors")
    present = int(kept["feature.text.present"].sum())
    assert len(kept["feature.text.values"]) == present
    assert kept["feature.text.rows"].max() == present - 1


def test_nothing_else_of_a_data_set_is_at_hand(folder):
    path, _, _ = folder("SASRecFast")
    served = recbole_mm.load(path)
    ids = json.loads((path / "ids.json").read_text())
    kept = serving.Checkpoint({}, {"features": {}, "categories": None, "graphs": None})
    stub = serving.StoredItems(served.config, ids, kept)
    assert getattr(stub, "inter_feat", None) is None
    with pytest.raises(InputError, match="inter_feat, which a run folder does not hold"):
        _ = stub.inter_feat
