"""A class of the user's own by its name, ``module:Class``, in every command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import recbole_mm
from recbole_mm import tuning
from recbole_mm.cli import main, run_main
from recbole_mm.compare.plan import plan
from recbole_mm.config import Config
from recbole_mm.errors import InputError
from recbole_mm.registry import get_model

QUICK = {"epochs": 2, "MAX_ITEM_LIST_LENGTH": 10, "show_progress": False, "hidden_size": 16}
ARGUMENTS = [f"--{key}={value}" for key, value in QUICK.items()]
EXPLAIN = """
    explains_items = True

    def explain(self, given):
        import pandas as pd
        from recbole_mm.explain import Table
        return {"shown": Table(pd.DataFrame({"item": list(given.items)}), "Items")}
"""


FOR_RECBOLE = """
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn


class Plain(SequentialRecommender):
    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, config["hidden_size"], padding_idx=0)
        self.gru = nn.GRU(config["hidden_size"], config["hidden_size"], config["n_layers"])
        self.scale = config["scale"]

    def forward(self, items, lengths):
        states, _ = self.gru(self.item_embedding(items).transpose(0, 1))
        return self.scale * self.gather_indexes(states.transpose(0, 1), lengths - 1)

    def full_sort_predict(self, interaction):
        user = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return user @ self.item_embedding.weight.T

    def calculate_loss(self, interaction):
        scores = self.full_sort_predict(interaction)
        return nn.functional.cross_entropy(scores, interaction[self.POS_ITEM_ID])
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the module of the README, which it calls a whole model."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (source,) = (p for p in re.findall(r"```python\n(.*?)```", readme, re.S) if "LastItem" in p)
    (tmp_path / "last_item.py").write_text(source + EXPLAIN)
    (tmp_path / "plain.py").write_text(FOR_RECBOLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in ("last_item", "plain", "broken", "mine", "mine.models"):
        sys.modules.pop(name, None)


def test_a_run_of_it_is_trained_resumed_and_read_back(here, capsys):
    given = ["--model=last_item:LastItem", "--dataset=tiny", *ARGUMENTS]
    assert run_main(given) == 0
    (folder,) = here.glob("saved/tiny/LastItem/*")
    result = json.loads((folder / "result.json").read_text())
    assert "last_item" not in (folder / "config.yaml").read_text()  # a folder names no code
    assert main(["run", f"--resume={folder}", "--model=last_item:LastItem", "--epochs=3"]) == 0
    assert json.loads((folder / "result.json").read_text())["epochs"] == result["epochs"] + 1
    capsys.readouterr()
    for model in ("last_item:LastItem", get_model("last_item:LastItem")):
        assert len(recbole_mm.load(folder, model=model).recommend([["i001"]], k=3).items[0]) == 3
        assert recbole_mm.open_run(folder, model=model).config["model"] == "LastItem"
    assert main(["explain", str(folder), "--model=last_item:LastItem", "--items", "i005"]) == 0
    assert len((folder / "explain" / "shown.csv").read_text().splitlines()) == 2


def test_what_a_folder_says_is_never_imported(here):
    result = recbole_mm.run("last_item:LastItem", "tiny", config_dict=QUICK)
    for name, mend in (
        ("LastItem", "--model=module:LastItem"),
        ("last_item:LastItem", "its class"),
    ):
        file = Path(result["run"]) / "config.yaml"
        file.write_text(re.sub(r"(?m)^model: .*$", f"model: {name}", file.read_text()))
        sys.modules.pop("last_item", None)
        for reader in (recbole_mm.load, recbole_mm.open_run):
            with pytest.raises(InputError, match=mend):
                reader(result["run"])
        assert "last_item" not in sys.modules


def test_it_stands_beside_the_baselines_of_a_table(here):
    arguments = ["compare", "--models=last_item:LastItem,SASRecMM,last_item:LastItem+short"]
    (here / "variants.yaml").write_text("short: {MAX_ITEM_LIST_LENGTH: 5}\n")
    arguments += ["--datasets=tiny", "--variants=variants.yaml", "--missing_modality=text:50"]
    assert main([*arguments, *(a for a in ARGUMENTS if "progress" not in a)]) == 0
    table = pd.read_csv("compare/table.csv")
    assert table["model"].drop_duplicates().tolist() == ["LastItem", "SASRecMM", "LastItem+short"]
    assert "relative to the best baseline, by mean test value in each metric (SASRecMM)" in (
        Path("compare/table.md").read_text()
    )
    missing = pd.read_csv("compare/missing.csv")
    assert missing["model"].tolist().count("LastItem") == 1
    assert missing["error"].isna().all()
    assert list(Path("compare/cells/tiny/LastItem").glob("*/run/*/*/*/explain/shown.csv"))


def test_another_source_is_another_cell(here):
    def key(*models):
        return [cell.key for cell in plan(models, ["tiny"], 1)]

    model = "last_item:LastItem"
    first = key(model)
    assert key(model) == first
    built_in = key("SASRecMM")
    file = here / "last_item.py"
    file.write_text(file.read_text() + "# another line\n")
    assert key(model) != first
    assert key("SASRecMM") == built_in


def test_a_class_stands_for_its_name(here):
    rows = [get_model("last_item:LastItem"), get_model("MUFASA"), get_model("SASRec")]
    models = [cell.row.model for cell in plan(rows, ["tiny"], 1)]
    assert models == ["last_item:LastItem", "MUFASA", "SASRec"]

    class Local(rows[0]):
        pass

    for given in (Local, dict, 3):
        with pytest.raises(InputError, match="names and classes of models that stand in a module"):
            plan([given], ["tiny"], 1)


def test_a_script_compares_a_class_of_its_own(here):
    own = {key: value for key, value in QUICK.items() if key != "show_progress"}
    (here / "script.py").write_text(
        "from last_item import LastItem\n"
        "from recbole_mm.compare import compare\n\n\n"
        "class Mine(LastItem):\n    pass\n\n\n"
        "if __name__ == '__main__':\n"
        f"    (table,) = compare([Mine, 'Pop'], ['tiny'], 1, config_dict={own!r})\n"
        "    print([row.label for row in table.rows])\n"
    )
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['Mine', 'Pop']"


def test_two_models_of_one_name_do_not_share_a_table(here):
    (here / "mine").mkdir()
    (here / "mine" / "models.py").write_text(
        "from last_item import LastItem\n\n\nclass SASRecMM(LastItem):\n    pass\n"
    )
    with pytest.raises(
        InputError, match=r"SASRecMM and mine\.models:SASRecMM would both be called"
    ):
        plan(["SASRecMM", "mine.models:SASRecMM"], ["tiny"], 1)


def test_it_is_tuned_and_the_command_that_scores_it_names_it(here, capsys):
    pytest.importorskip("optuna")
    (here / "hyper.test").write_text("learning_rate choice [0.001,0.01]\n")
    search = ["tune", "--model=last_item:LastItem", "--dataset=tiny", "--algo=exhaustive"]
    assert main([*search, "--params_file=hyper.test", *ARGUMENTS]) == 0
    said = capsys.readouterr().out
    assert "run --config_files tuned/tiny/LastItem.yaml --model=last_item:LastItem" in said
    config = Config("last_item:LastItem", None, ["tuned/tiny/LastItem.yaml"])
    assert config["learning_rate"] in (0.001, 0.01)
    found = tuning.tune(
        get_model("last_item:LastItem"),
        "tiny",
        config_dict=QUICK,
        params_file="hyper.test",
        trials=1,
        out="again",
    )
    assert found["trials"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last_item:LostItem", "no class 'LostItem' derived from .*; did you mean 'LastItem'"),
        ("last_item:F", "last_item has no class 'F' derived from a model"),
        ("nowhere:Model", "there is no module 'nowhere' in .* or on Python's path"),
        ("last_item.parts:Model", "there is no module 'last_item.parts'"),
        ("last item:Model", "is not of the form module:Class"),
        ("last_item:", "is not of the form module:Class"),
        ("last_item.LastItem", "unknown model .*; a class of your own is named module:Class"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(here, name, message):
    with pytest.raises(InputError, match=message):
        get_model(name)


def test_a_fault_of_the_module_itself_keeps_its_traceback(here):
    (here / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        get_model("broken:Model")


def test_a_module_of_a_package_is_found(here):
    (here / "mine").mkdir()
    (here / "mine" / "models.py").write_text("from last_item import LastItem\n")
    assert get_model("mine.models:LastItem").__name__ == "LastItem"


def test_a_config_file_names_no_code(here):
    (here / "a.yaml").write_text("model: last_item:LastItem\ndataset: tiny\n")
    with pytest.raises(InputError, match="in a config file: code of your own is named in the call"):
        Config(None, None, ["a.yaml"])
    assert "last_item" not in sys.modules
    config = Config(None, None, None, {"model": "last_item:LastItem", "dataset": "tiny"})
    assert config["model"] == "LastItem"


def test_a_class_written_for_recbole_runs_with_its_own_yaml(here, caplog):
    """Its keys are in no property file: what it shares with other models is handed to it."""
    (here / "plain.yaml").write_text("n_layers: 2\nhidden_size: 16\nscale: 0.5\nloss_type: CE\n")
    quick = {key: value for key, value in QUICK.items() if key != "hidden_size"}
    with pytest.raises(InputError, match=r"'scale'.*[Ii]f Plain reads it, declare it there: def"):
        recbole_mm.run("plain:Plain", "tiny", ["plain.yaml"], quick)
    file = here / "plain.py"
    declared = 'default_config = {"scale": 1.0}\n\n    def __init__'
    file.write_text(FOR_RECBOLE.replace("def __init__", declared, 1))
    sys.modules.pop("plain")
    result = recbole_mm.run("plain:Plain", "tiny", ["plain.yaml"], quick)
    assert result["epochs"] == 2
    opened = recbole_mm.open_run(result["run"], model="plain:Plain")
    assert (opened.model.gru.num_layers, opened.model.scale) == (2, 0.5)
    assert "ignores it" not in caplog.text
