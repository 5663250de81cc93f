"""Runs read back from their folder, and the tables that models give of themselves."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import recbole_mm
from recbole_mm.config import DATASETS, Config
from recbole_mm.errors import InputError
from recbole_mm.quick_start import open_run
from recbole_mm.registry import MODELS
from recbole_mm.trainer import trainer_class

QUICK = {"epochs": 2, "MAX_ITEM_LIST_LENGTH": 12, "show_progress": False, "train_batch_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folders by model and values, each trained once."""
    made = {}

    def make(model, **values):
        key = (model, *sorted(values.items()))
        if key not in made:
            where = {"checkpoint_dir": str(tmp_path_factory.mktemp("runs"))}
            made[key] = recbole_mm.run(model, "tiny", config_dict={**QUICK, **where, **values})
        return made[key]["run"]

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
    trainer = trainer_class(config["MODEL_TYPE"], config["model"])(config, net, None)
    found = trainer.evaluate(test, load_best_model=False)
    saved = json.loads((Path(path) / "result.json").read_text())["test_result"]
    assert dict(found) == saved


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
    shutil.copy(Path(folder("SASRecMM")) / "model.safetensors", file)
    with pytest.raises(InputError, match="weights are those of another model"):
        open_run(run)
