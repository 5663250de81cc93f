"""A class of the user's own by its name, ``module:Class``, in every command."""

import json
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

import recbole_mm
from recbole_mm import registry, tuning
from recbole_mm.cli import main, run_main
from recbole_mm.compare.cells import _check_data
from recbole_mm.compare.plan import plan
from recbole_mm.config import Config
from recbole_mm.data.create import create_dataset
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.models.sasrec import SASRecMM
from recbole_mm.registry import get_model, sources_of

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
    for name in ("last_item", "plain", "broken", "mine", "mine.models", "packed", "again"):
        sys.modules.pop(name, None)


def test_a_run_of_it_is_trained_resumed_and_read_back(here, capsys):
    given = ["--model=last_item:LastItem", "--dataset=tiny", *ARGUMENTS]
    assert run_main(given) == 0
    (folder,) = here.glob("saved/tiny/LastItem/*")
    result = json.loads((folder / "result.json").read_text())
    assert "last_item" not in (folder / "config.yaml").read_text()  # a folder names no code
    resume = ["run", f"--resume={folder}", "--model=last_item:LastItem"]
    assert main([*resume, "--epochs=3"]) == 0
    assert "another state of things" not in (folder / "run.log").read_text()
    assert json.loads((folder / "result.json").read_text())["epochs"] == result["epochs"] + 1
    capsys.readouterr()
    for model in ("last_item:LastItem", get_model("last_item:LastItem")):
        assert len(recbole_mm.load(folder, model=model).recommend([["i001"]], k=3).items[0]) == 3
        assert recbole_mm.open_run(folder, model=model).config["model"] == "LastItem"
    assert main(["explain", str(folder), "--model=last_item:LastItem", "--items", "i005"]) == 0
    with (here / "last_item.py").open("a") as source:
        source.write("# changed\n")
    assert main([*resume, "--epochs=4"]) == 0
    assert "things (the code of LastItem)" in (folder / "run.log").read_text()
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
        with pytest.raises(
            InputError, match="names, and classes of models at the top level of a module"
        ):
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
        "from last_item import LastItem as First\n\n\nclass LastItem(First):\n    pass\n"
    )
    with pytest.raises(InputError, match=r"_item:LastItem and mine\.models:LastItem would both be"):
        plan(["last_item:LastItem", "mine.models:LastItem"], ["tiny"], 1)


@pytest.mark.parametrize("name", ["SASRecMM", "SASRec", "GRU4RecKG", "S3Rec"])
def test_the_name_of_another_model_is_taken(here, name):
    """Properties, data sets, run folders and tables go by it."""
    (here / "mine.py").write_text(
        f"import last_item\n\n\nclass {name}(last_item.LastItem):\n    x = 1\n"
    )
    with pytest.raises(
        InputError, match=f"mine:{name} has the name of a model of .*call the class"
    ):
        recbole_mm.run(f"mine:{name}", "tiny", config_dict=QUICK)


def test_a_class_without_a_file_is_no_row(here, monkeypatch):
    main_module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    for file in (None, "<stdin>"):
        main_module.__file__ = file
        mine = type("Mine", (get_model("last_item:LastItem"),), {"__module__": "__main__"})
        with pytest.raises(InputError, match="Mine stands in no file"):
            plan([mine], ["tiny"], 1)


def test_a_class_in_an_archive_has_the_key_of_the_archive(here):
    with zipfile.ZipFile(here / "packed.zip", "w") as archive:
        archive.writestr("packed.py", (here / "last_item.py").read_text())
    sys.path.insert(0, str(here / "packed.zip"))
    (cell,) = plan(["packed:LastItem"], ["tiny"], 1)
    assert sources_of(get_model("packed:LastItem")) == [here / "packed.zip"]
    assert cell.code


def test_what_the_file_of_a_class_imports_from_beside_it_is_its_code(here):
    files = {
        "mine/__init__.py": "",
        "mine/part/__init__.py": "",
        "mine/part/base.py": "import json, torch\nfrom ..layers import Layer\n"
        "import mine.part.base\n",
        "mine/layers.py": "class Layer:\n    def late(self):\n        from . import lazy, Layer\n",
        "mine/lazy.py": "this is no Python",
        "mine/unused.py": "",
        "mine/text.txt": "",
        "tools.py": "from recbole_mm.models.sasrec import SASRecMM\n",
        "torch.py": "",
        "mine/model.py": "import mine.part.base as base\nfrom tools import SASRecMM\n"
        "class Mine(SASRecMM):\n    pass\n",
    }
    for name, text in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    found = [path.relative_to(here).as_posix() for path in sources_of(get_model("mine.model:Mine"))]
    expected = set(files) - {"mine/unused.py", "mine/text.txt", "torch.py"}
    assert found == sorted(expected, key=lambda name: Path(name).parts)


def test_of_an_installed_package_only_its_own_files_are_its_code(here, monkeypatch):
    monkeypatch.setattr(registry, "_INSTALLED", {here})
    (here / "pack").mkdir()
    (here / "other.py").write_text("")
    (here / "pack" / "base.py").write_text("")
    (here / "pack" / "model.py").write_text(
        "import other, pack.base\nfrom recbole_mm.models.sasrec import SASRecMM\n"
        "class Mine(SASRecMM):\n    pass\n"
    )
    found = sources_of(get_model("pack.model:Mine"))
    assert found == [here / "pack" / "base.py", here / "pack" / "model.py"]


def test_code_that_changes_while_compare_is_at_work_is_noticed(here):
    (cell,) = plan(["last_item:LastItem"], ["tiny"], 1)
    _check_data(cell)
    file = here / "last_item.py"
    file.write_text(file.read_text() + "# another line\n")
    with pytest.raises(InputError, match="the code of last_item:LastItem has changed since"):
        _check_data(cell)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{'size': float}", "'size': <class 'float'> is no plain data"),
        ("{'size': (1, 2)}", r"'size': \(1, 2\) is no plain data"),
        ("{'size': {1: 2}}", "is no plain data"),
        ("{'size': [__import__('numpy').float64(1)]}", "is no plain data"),
        ("{1: 2}", "1: 2 is no plain data"),
        ("property(len)", "default_config must be a mapping of keys to values"),
        ("None", "Mine.default_config must be a mapping"),
    ],
)
def test_defaults_that_a_run_folder_cannot_hold_are_refused(here, config, message):
    (here / "mine.py").write_text(
        "from last_item import LastItem\n\n\n"
        f"class Mine(LastItem):\n    default_config = {config}\n"
    )
    with pytest.raises(InputError, match=message):
        Config("mine:Mine", "tiny")


def test_a_fault_in_its_constructor_keeps_its_traceback(here):
    init = "    def __init__(self, config, dataset):\n        a, b = [1]\n"
    (here / "mine.py").write_text(
        f"from last_item import LastItem\n\n\nclass Mine(LastItem):\n{init}"
    )
    with pytest.raises(ValueError, match="not enough values") as raised:
        recbole_mm.run("mine:Mine", "tiny", config_dict=QUICK)
    assert not isinstance(raised.value, InputError)


def test_no_model_is_no_model():
    with pytest.raises(InputError, match="model: none is named"):
        Config(None, "tiny", None, {"model": None})


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


def test_the_search_of_another_class_does_not_go_on(here):
    pytest.importorskip("optuna")
    (here / "hyper.test").write_text("learning_rate choice [0.001]\n")
    (here / "mine.py").write_text(
        "from last_item import LastItem as First\n\n\nclass LastItem(First):\n    pass\n"
    )

    def search(given, **values):
        values = {**QUICK, "epochs": 1, **values}
        return tuning.tune(given, "tiny", None, values, params_file="hyper.test", trials=1)

    first = search("last_item:LastItem")
    # named in the values, as run takes it
    assert search(None, model="last_item:LastItem")["best_valid_score"] == first["best_valid_score"]
    with pytest.raises(
        InputError, match=r"code of the model \('last_item:LastItem .*mine:LastItem"
    ):
        search("mine:LastItem")
    file = here / "last_item.py"
    file.write_text(file.read_text() + "# another line\n")
    with pytest.raises(InputError, match="code of the model"):
        search("last_item:LastItem")


def test_a_space_with_a_key_of_its_yaml_names_the_mend(here):
    pytest.importorskip("optuna")
    (here / "hyper.test").write_text("warmth choice [0.1,0.2]\n")
    with pytest.raises(InputError, match=r"declare it there: default_config = \{'warmth': ...\}"):
        tuning.tune("last_item:LastItem", "tiny", params_file="hyper.test", trials=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last_item:LostItem", "no class 'LostItem' derived from .*; did you mean 'LastItem'"),
        ("last_item:F", r"last_item \(.*last_item.py\) has no class 'F' derived from a"),
        ("nowhere:Model", "there is no module 'nowhere' in .* or on Python's path"),
        ("last_item.parts:Model", "there is no module 'last_item.parts'"),
        ("last item:Model", "is not of the form module:Class"),
        ("last_item:", "is not of the form module:Class"),
        ("last_item.py:LastItem", "name the module without .py, last_item:LastItem"),
        ("again:Alias", "Alias is another name of LastItem; write last_item:LastItem"),
        ("raises:Model", r"raises cannot be imported: ValueError: boom \(.*raises.py, line 2\)"),
        ("leaves:Model", r"leaves cannot be imported: SystemExit: 0 \(.*leaves.py, line 2\)"),
        ("halves:Model", r"halves cannot be imported: SyntaxError: .* \(.*halves.py, line 1\)"),
        ("last_item.LastItem", "unknown model .*; a class of your own is named module:Class"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(here, name, message):
    (here / "again.py").write_text("from last_item import LastItem\n\nAlias = LastItem\n")
    (here / "raises.py").write_text("x = 1\nraise ValueError('boom')\n")
    (here / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (here / "halves.py").write_text("class Model(\n")
    with pytest.raises(InputError, match=message):
        get_model(name)


def test_a_package_that_the_module_wants_is_named(here, capsys):
    (here / "broken.py").write_text("import no_such_package\n")
    assert run_main(["--model=broken:Model", "--dataset=tiny"]) == EnvironmentFault.exit_code
    said = "broken imports no_such_package, which is not installed ("
    assert f"{said}{here / 'broken.py'}, line 1)" in capsys.readouterr().err


def test_no_class_is_asked_by_name():
    with pytest.raises(InputError, match="get_model takes a name, got <class"):
        get_model(SASRecMM)


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


# ------------------------------------------------------------- classes derived from RecBole's

DERIVED = """
from recbole.model.general_recommender import LightGCN, SimpleX
from recbole.model.sequential_recommender import DIEN, FEARec, S3Rec


class MyLightGCN(LightGCN):
    def get_norm_adj_mat(self):
        return super().get_norm_adj_mat()


class MyDIEN(DIEN):
    pass


class MyS3Rec(S3Rec):
    pass


class MySimpleX(SimpleX):
    pass


class MyFEARec(FEARec):
    pass
"""


def test_a_derived_class_runs_where_the_model_does(here):
    (here / "mine.py").write_text(DERIVED)
    quick = {"epochs": 1, "show_progress": False}
    own = recbole_mm.run("mine:MyLightGCN", "tiny", config_dict=quick, saved=False)
    theirs = recbole_mm.run("LightGCN", "tiny", config_dict=quick, saved=False)
    assert own["test_result"] == theirs["test_result"]


def test_a_derived_class_has_the_data_set_of_the_model(here):
    (here / "mine.py").write_text(DERIVED)
    config = Config("mine:MyDIEN", "tiny")
    assert type(create_dataset(config)) is type(create_dataset(Config("DIEN", "tiny")))
    # RecBole's sequential models switch it on when they are imported
    assert not torch.is_anomaly_enabled()


def test_a_derived_class_has_the_keys_of_the_model(here):
    (here / "mine.py").write_text(DERIVED)
    assert (
        Config("mine:MySimpleX", "tiny", None, {"negative_weight": 0.5})["negative_weight"] == 0.5
    )
    assert Config("mine:MyFEARec", "tiny", None, {"contrast": "us_x"})["contrast"] == "us_x"
    with pytest.raises(InputError, match="MyS3Rec derives from S3Rec, which does not run here"):
        Config("mine:MyS3Rec", "tiny")


WITH_FEATURES = """
import torch
from torch import nn
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from recbole_mm.layers.projection import ModalityProjection


class Summed:
    consumes_features = True

    def scores(self):
        vectors, _ = self.project(torch.arange(self.n_items))
        return vectors.sum(-2) @ self.taste

    def build(self, dataset):
        self.project = ModalityProjection(dataset.item_features, 4)
        self.taste = nn.Parameter(torch.ones(4))


class BySequence(Summed, SequentialRecommender):
    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.build(dataset)

    def full_sort_predict(self, interaction):
        return self.scores().repeat(len(interaction), 1)

    def calculate_loss(self, interaction):
        scores = self.full_sort_predict(interaction)
        return nn.functional.cross_entropy(scores, interaction[self.POS_ITEM_ID])
"""


def test_features_of_any_class_that_reads_them_are_kept(here):
    (here / "mine.py").write_text(WITH_FEATURES)
    done = recbole_mm.run("mine:BySequence", "tiny", config_dict=QUICK)
    served = recbole_mm.load(done["run"], model="mine:BySequence")
    opened = recbole_mm.open_run(done["run"], model="mine:BySequence")
    scores = served.model.scores()
    assert scores.abs().max() > 0
    assert torch.equal(scores, opened.model.scores())
