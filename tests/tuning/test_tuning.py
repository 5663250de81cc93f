"""The search: selection by validation, failures, traps of RecBole's tuning, continuation."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType

import recbole_mm
from recbole_mm import registry, tuning
from recbole_mm.cli import main
from recbole_mm.config import DATASETS
from recbole_mm.errors import EnvironmentFault, InputError, NumericalError, OutOfMemory
from recbole_mm.trainer import TrainerMixin
from recbole_mm.tuning import engines
from recbole_mm.tuning import search as search_module
from tests.tuning.fake import GRID, PROTOCOL, SMALL, SPACE, Runs, diverged, result, score, wrong

ENGINES = ("recbole", "optuna")
ROOT = Path(__file__).parents[2]
QUICK = {"epochs": 1, "MAX_ITEM_LIST_LENGTH": 10, "show_progress": False, "train_batch_size": 256}


@pytest.fixture
def tmp_path():
    """In memory where there is such a folder: a database waits for the disk at every step."""
    memory = Path("/dev/shm")  # noqa: S108
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """A search whose runs cost nothing."""

    def call(runs, space=SPACE, engine="optuna", out=tmp_path / "out", **options):
        path = tmp_path / "hyper.test"
        path.write_text(space)
        monkeypatch.setattr(search_module, "run", runs)
        options = {"trials": 6, "algo": "random", **options}
        model = options.pop("model", "SASRecFast")
        return tuning.tune(model, "tiny", params_file=path, engine=engine, out=out, **options)

    return call


def trials_of(found):
    return pd.read_csv(Path(found["folder"]) / "trials.csv", float_precision="round_trip")


# ------------------------------------------------------------------------- real runs


def planted(where):
    """Every user's validation item is v and test item t, after a random past."""
    folder = where / "planted"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [
        f"u{user}\t{item}\t{time}"
        for user in range(20)
        for time, item in enumerate([*(f"i{i}" for i in rng.permutation(12)[:6]), "v", "t"])
    ]
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "planted.inter").write_text(head + "\n".join(rows) + "\n")
    return str(where)


class SASRecFast(SequentialRecommender):
    """Ranks item v first with one layer, and item t first with two."""

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.first = dataset.token2id("item_id", "v" if config["n_layers"] == 1 else "t")
        self.n = dataset.item_num

    def calculate_loss(self, interaction):
        return self.weight**2

    def full_sort_predict(self, interaction):
        scores = torch.zeros(len(interaction), self.n)
        scores[:, self.first] = 1.0
        return scores


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_configuration_is_that_of_validation_and_test_is_never_scored(
    tmp_path, monkeypatch, engine
):
    """The configuration that is perfect on validation has nothing right on test."""
    monkeypatch.setitem(registry.MODELS, "SASRecFast", SASRecFast)
    (tmp_path / "hyper.test").write_text("n_layers choice [1,2]\n")
    values = {
        **QUICK,
        "data_path": planted(tmp_path),
        "metrics": ["Hit"],
        "topk": [1],
        "valid_metric": "Hit@1",
        "train_objective": "last",
    }
    scored = []
    evaluate = TrainerMixin.evaluate

    def noted(self, data, *args, **kwargs):
        scored.append(data._dataset.inter_feat["item_id"].unique().tolist())
        return evaluate(self, data, *args, **kwargs)

    monkeypatch.setattr(TrainerMixin, "evaluate", noted)
    found = tuning.tune(
        "SASRecFast",
        "planted",
        config_dict=values,
        params_file=tmp_path / "hyper.test",
        engine=engine,
        algo="exhaustive",
        out=tmp_path / "out",
    )
    assert found["best"] == {"n_layers": 1}
    assert found["best_valid_score"] == 1.0
    assert len(scored) == 2  # once a trial, on validation
    assert scored[0] == scored[1]
    assert len(scored[0]) == 1
    tests = [
        recbole_mm.run("SASRecFast", "planted", config_dict={**values, "n_layers": n}, saved=False)[
            "test_result"
        ]["hit@1"]
        for n in (1, 2)
    ]
    assert tests == [0.0, 1.0]


def test_the_command_searches_and_run_takes_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hyper.test").write_text(
        "n_layers choice [1,2]\nlearning_rate loguniform -8,-4\ntrain_batch_size choice [128,256]\n"
    )
    (tmp_path / "short.yaml").write_text("epochs: 1\nMAX_ITEM_LIST_LENGTH: 10\n")
    command = ["tune", "--model=SASRecMM", "--dataset=tiny", "--config_files=short.yaml"]
    command += ["--params_file=hyper.test", "--trials=3", "--algo=random", "--modalities=[text]"]
    assert main(command) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("trial")]
    assert len(lines) == 3
    assert lines[0].startswith("trial   1 of 3  valid NDCG@10 0.")
    assert "run --config_files" in out
    assert {p.name for p in (tmp_path / "tuned/tiny/SASRecMM").iterdir()} == {
        *("search.json", "trials.csv", "trials.html", "study.db"),
    }
    path = tmp_path / "tuned/tiny/SASRecMM.yaml"
    best = yaml.safe_load(path.read_text())
    table = trials_of({"folder": tmp_path / "tuned/tiny/SASRecMM"})
    row = table.loc[table["score"].idxmax()]
    for key in ("n_layers", "learning_rate", "train_batch_size"):
        assert best[key] == row[key]
    assert best["epochs"] == 1
    assert list(best["modalities"]) == ["text"]
    assert {"show_progress", "seed", "data_path"}.isdisjoint(best)

    again = recbole_mm.run(config_file_list=[path], saved=False)
    assert again["best_valid_score"] == row["score"]
    assert again["test_result"]

    assert main(command) == 0  # nothing is left to do
    assert "trial   " not in capsys.readouterr().out


def test_recboles_own_tuning_takes_the_objective_function(tmp_path, capsys):
    pytest.importorskip("hyperopt")
    from recbole.trainer import HyperTuning

    (tmp_path / "hyper.test").write_text("n_layers choice [1,2]\n")
    (tmp_path / "fixed.yaml").write_text(
        yaml.safe_dump({**QUICK, "model": "SASRecFast", "dataset": "tiny"})
    )
    theirs = HyperTuning(
        recbole_mm.objective_function,
        params_file=tmp_path / "hyper.test",
        fixed_config_file_list=[tmp_path / "fixed.yaml"],
        algo="random",
        max_evals=2,
    )
    theirs.run()
    assert len(theirs.score_list) == 2
    theirs.export_result(tmp_path / "result")
    assert "ndcg@10" in (tmp_path / "result").read_text()


# ------------------------------------------------------------------------- the search itself


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("algo", ["exhaustive", "random", "bayes"])
def test_every_engine_runs_every_algorithm_and_finds_the_best_of_its_trials(tune, engine, algo):
    runs = Runs()
    found = tune(runs, SMALL, engine, algo=algo, trials=99 if algo == "exhaustive" else 6)
    assert len(runs.calls) == found["trials"] == 6
    assert found["best_valid_score"] == max(score(values) for values in runs.calls)
    if algo == "exhaustive":
        assert len({tuple(values.values()) for values in runs.calls}) == 6
        assert found["best"] == {"n_layers": 2, "n_heads": 1}
    assert trials_of(found)["score"].tolist() == [score(values) for values in runs.calls]


@pytest.mark.parametrize("algo", ["exhaustive", "random", "bayes"])
def test_no_early_stop_cuts_a_search_whose_first_trial_is_the_best(tune, algo):
    """RecBole stops after ten trials without progress, grids included."""
    runs = Runs(outcome=lambda values: result(values, 0.5))
    assert tune(runs, GRID, "recbole", algo=algo, trials=None)["trials"] == len(runs.calls)
    assert len(runs.calls) == (15 if algo == "exhaustive" else 20)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_score_of_zero_is_a_score(tune, engine):
    """RecBole takes a best score of 0.0 for none."""
    runs = Runs(outcome=lambda values: result(values, 0.0 if values["n_layers"] == 1 else -0.5))
    found = tune(runs, "n_layers choice [1,2,3]\n", engine, algo="exhaustive", trials=None)
    assert found["best"] == {"n_layers": 1}
    assert found["best_valid_score"] == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_of_a_metric_that_falls_the_lowest_is_the_best(tune, engine):
    values = {"metrics": ["AveragePopularity"], "valid_metric": "AveragePopularity@10"}
    runs = Runs(outcome=lambda values: result(values, values["n_layers"] / 10))
    space = "n_layers choice [3,1,2]\n"
    found = tune(runs, space, engine, algo="exhaustive", config_dict=values)
    assert found["best"] == {"n_layers": 1}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_fixes_the_search(tune, tmp_path, engine):
    searches = []
    for number, seed in enumerate((1, 1, 2)):
        runs = Runs()
        tune(runs, engine=engine, algo="bayes", trials=3, seed=seed, out=tmp_path / str(number))
        searches.append(runs.calls)
    assert searches[0] == searches[1]
    assert searches[0] != searches[2]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trial_of_several_seeds_is_scored_by_their_mean(tune, capsys, engine):
    """With seed 5 alone, three layers would be the best; on the average they are the worst."""
    by_layers = {1: (0.5, 0.6, 0.7), 2: (0.2, 0.8, 0.5), 3: (0.9, 0.1, 0.2)}
    runs = Runs(
        outcome=lambda values: result(values, by_layers[values["n_layers"]][values["seed"] - 5])
    )
    options = {"algo": "exhaustive", "seed": 5, "seeds": 3, "command_line": ["--seed=5"]}
    options["config_dict"] = {"show_progress": True}
    found = tune(runs, "n_layers choice [1,2,3]\n", engine, **options)
    assert runs.seeds == [5, 6, 7] * 3
    assert found["best"] == {"n_layers": 1}
    assert found["best_valid_score"] == pytest.approx(0.6)
    assert found["best_valid_result"] == {"ndcg@10": pytest.approx(0.6)}
    table = trials_of(found).set_index("n_layers")
    assert table["score"].tolist() == pytest.approx([0.6, 0.5, 0.4])
    assert tuple(table.loc[3, [f"score of seed {seed}" for seed in (5, 6, 7)]]) == by_layers[3]
    assert "valid NDCG@10 0.4000 ± 0.4359" in capsys.readouterr().out
    assert "seeds 5 to 7" in Path(found["config"]).read_text()

    with pytest.raises(InputError, match=r"seeds \(3 then, None now\)"):
        tune(runs, "n_layers choice [1,2,3]\n", engine, **{**options, "seeds": 1})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trial_fails_with_any_of_its_seeds(tune, engine):
    found = tune(Runs({1: diverged()}), engine=engine, seeds=2, trials=2)
    assert (found["trials"], found["failed"]) == (2, 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tune, engine):
    runs = Runs({0: diverged(), 3: OutOfMemory("lower train_batch_size (now 2048)")})
    found = tune(runs, engine=engine, algo="bayes")
    assert (found["trials"], found["failed"], len(runs.calls)) == (6, 2, 6)
    table = trials_of(found)
    assert table["state"].tolist() == ["failed", *["complete"] * 2, "failed", *["complete"] * 2]
    assert "is nan" in table["error"][0]
    assert "lower train_batch_size" in table["error"][3]
    again = Runs()
    assert tune(again, engine=engine, algo="bayes")["failed"] == 2
    assert not again.calls  # a failure counts


@pytest.mark.parametrize("engine", ENGINES)
def test_if_every_trial_fails_the_table_is_written_and_no_configuration(tune, tmp_path, engine):
    with pytest.raises(NumericalError, match="all 6 trials failed, the first with: epoch 0"):
        tune(Runs({n: diverged() for n in range(6)}), engine=engine)
    assert (tmp_path / "out/tiny/SASRecFast/trials.csv").is_file()
    assert not (tmp_path / "out/tiny/SASRecFast.yaml").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_if_no_trial_has_the_memory_the_search_ends_with_that(tune, engine):
    runs = Runs({n: OutOfMemory("lower train_batch_size (now 2048)") for n in range(6)})
    with pytest.raises(OutOfMemory, match=r"all 6 trials failed, .*lower train_batch_size"):
        tune(runs, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_values_that_do_not_go_together_fail_their_trial_alone(tune, engine):
    runs = Runs()
    space = "n_layers choice [1]\nhidden_size choice [64, 66]\nn_heads choice [2, 4]\n"
    found = tune(runs, engine=engine, algo="exhaustive", trials=4, space=space)
    assert (found["trials"], found["failed"], len(runs.calls)) == (4, 1, 3)
    table = trials_of(found).set_index("state")
    assert "n_heads must divide hidden_size: 66" in table.loc["failed", "error"]


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_input_stops_the_search(tune, engine):
    runs = Runs({2: wrong()})
    with pytest.raises(InputError, match="hidden_size must divide"):
        tune(runs, engine=engine)
    assert len(runs.calls) == 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("algo", "trials", "event"),
    [
        ("exhaustive", 4, KeyboardInterrupt()),
        ("random", 4, EnvironmentFault("no space left")),
        pytest.param("bayes", 24, KeyboardInterrupt(), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_search_ends_as_if_it_had_not_been(
    tune, tmp_path, engine, algo, trials, event
):
    whole, first, second = Runs(), Runs({trials - 2: event}), Runs()
    options = {"engine": engine, "algo": algo, "trials": trials, "space": GRID}
    expected = tune(whole, **options, out=tmp_path / "whole")
    with pytest.raises(type(event)):
        tune(first, **options)
    found = tune(second, **options)
    assert second.calls[0] == first.calls[-1]  # the interrupted trial, again
    assert first.calls[:-1] + second.calls == whole.calls
    assert found == {**expected, **{key: found[key] for key in ("config", "folder")}}


@pytest.mark.parametrize("engine", ENGINES)
def test_more_trials_go_on_where_the_search_stands(tune, engine):
    first, second = Runs(), Runs()
    tune(first, engine=engine, trials=4)
    assert tune(second, engine=engine, trials=6)["trials"] == 6
    assert len(second.calls) == 2
    assert not any(values in first.calls for values in second.calls)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": GRID}, "space"),
        ({"config_dict": {"epochs": 5}}, "epochs \\(300 then, 5 now\\)"),
        ({"seed": 3}, "seed \\(2020 then, 3 now\\)"),
        ({"algo": "bayes"}, "algo \\('random' then, 'bayes' now\\)"),
    ],
)
def test_a_search_with_other_settings_is_not_continued(tune, engine, change, message):
    tune(Runs(), engine=engine, trials=2)
    with pytest.raises(InputError, match=message):
        tune(Runs(), **{"engine": engine, "trials": 2, **change})
    tune(Runs(), engine=engine, trials=2, config_dict={"show_progress": False, "state": "DEBUG"})


def test_a_search_that_another_source_began_says_so(tune, caplog, monkeypatch):
    tune(Runs(), trials=2)
    tune(Runs(), trials=3)
    assert "another source" not in caplog.text
    monkeypatch.setattr(search_module, "code_digest", lambda: "edited")
    assert tune(Runs(), trials=4)["trials"] == 4
    assert "the search was begun by another source of recbole_mm" in caplog.text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_over_other_features_is_not_continued(tune, tmp_path, engine):
    shutil.copytree(DATASETS / "tiny", tmp_path / "data" / "tiny")
    options = {"engine": engine, "trials": 2, "model": "SASRecMM"}
    options["config_dict"] = {"data_path": str(tmp_path / "data")}
    tune(Runs(), **options)
    file = tmp_path / "data" / "tiny" / "text.npy"
    np.save(file, np.load(file) + 1)
    with pytest.raises(InputError, match="contents of the data"):
        tune(Runs(), **options)


def test_a_relative_database_is_that_of_the_working_directory(tune, tmp_path, monkeypatch):
    """Also for the heartbeat, a thread, while the process is in another directory for a moment."""
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def away(values):
        monkeypatch.chdir(elsewhere)
        time.sleep(0.1)
        monkeypatch.chdir(tmp_path)
        return result(values)

    monkeypatch.setattr(engines, "HEARTBEAT_SECONDS", 0.01)
    assert tune(Runs(outcome=away), trials=2, storage="sqlite:///here.db")["trials"] == 2
    assert (tmp_path / "here.db").is_file()
    assert not list(elsewhere.iterdir())


def test_a_study_in_a_shared_database_has_one_setting(tune, tmp_path):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    runs = Runs()
    tune(runs, trials=2, storage=storage, out=tmp_path / "one")
    assert tune(runs, trials=2, storage=storage, out=tmp_path / "two")["trials"] == 2
    assert len(runs.calls) == 2
    with pytest.raises(InputError, match=r"shared\.db holds a search with other settings"):
        tune(runs, GRID, trials=2, storage=storage, out=tmp_path / "three")


@pytest.mark.parametrize("engine", ENGINES)
def test_trials_of_changed_data_do_not_meet(tune, engine):
    tune(Runs(), engine=engine, trials=2)
    other = replace(PROTOCOL, valid="e")
    with pytest.raises(InputError, match="valid: 'c' and 'e'"):
        tune(Runs(outcome=lambda values: result(values, protocol=other)), engine=engine, trials=3)


def test_a_half_written_record_is_run_again(tune, tmp_path):
    runs, again = Runs(), Runs()
    found = tune(runs, engine="recbole", trials=3)
    path = tmp_path / "out/tiny/SASRecFast/trials.jsonl"
    path.write_text(path.read_text()[:-100])
    assert tune(again, engine="recbole", trials=3) == found
    assert again.calls == runs.calls[2:]


def test_a_run_without_validation_selects_nothing(tune):
    nothing = Runs(outcome=lambda values: {**result(values), "best_valid_result": None})
    with pytest.raises(InputError, match="was not validated"):
        tune(nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "grid"}, "engine must be one of recbole, optuna, ray"),
        ({"algo": "tpe"}, "algo must be one of exhaustive, random, bayes"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"engine": "recbole", "storage": "sqlite:///x.db"}, "storage is for optuna and ray"),
        ({"storage": "x.db"}, "no database URL"),
        ({"algo": "exhaustive"}, "line 3: an exhaustive search needs choice or quniform"),
        ({"command_line": ["--seed=3"], "seed": 4}, "the seed is 4 and, on the command line, 3"),
    ],
)
def test_wrong_options_are_refused_before_the_first_trial(tune, options, message):
    runs = Runs()
    with pytest.raises(InputError, match=message):
        tune(runs, **options)
    assert not runs.calls


def test_a_search_that_was_refused_does_not_stand_in_the_way_of_another(tune):
    with pytest.raises(InputError, match="no database URL"):
        tune(Runs(), storage="x.db")
    assert tune(Runs(), SMALL, trials=2)["trials"] == 2
    with pytest.raises(InputError, match="holds a search with other settings"):
        tune(Runs(), trials=2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_space_without_a_possible_configuration_is_bad_input(tune, engine):
    with pytest.raises(InputError, match=r"all 2 trials failed.*n_heads must divide hidden_size"):
        tune(Runs(), "n_heads choice [3,7]\n", engine, trials=2)


@pytest.mark.parametrize(("engine", "package"), tuning.ENGINES.items())
def test_a_missing_package_names_its_extra(tune, monkeypatch, engine, package):
    monkeypatch.setattr(tuning, "version", lambda name: "99.0")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFault, match=rf"pip install 'recbole-mm\[{package}\]'"):
        tune(Runs(), engine=engine)


def test_the_ray_of_recbole_is_refused(tune, monkeypatch):
    monkeypatch.setattr(tuning, "version", lambda name: "2.6.3")
    with pytest.raises(EnvironmentFault, match=r"ray 2\.6\.3 is too old.*RecBole 1\.2\.1 requires"):
        tune(Runs(), engine="ray")


def test_a_folder_that_cannot_be_written_is_an_environment_fault(tune, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="point --out at a folder"):
        tune(Runs(), out=tmp_path / "file")


def test_the_page_shows_every_trial_and_loads_nothing(tune):
    found = tune(Runs({1: diverged()}))
    page = (Path(found["folder"]) / "trials.html").read_text()
    assert "<script src=" not in page
    assert "validation NDCG@10" in page
    for name in ("n_layers", "n_heads", "hidden_dropout_prob"):
        assert name in page
    assert "is nan" in page


def test_settings_are_plain_and_leave_out_the_machine(tune):
    found = tune(Runs())
    settings = json.loads((Path(found["folder"]) / "search.json").read_text())
    assert settings["space"][0] == "n_layers choice [1, 2, 3]"
    assert settings["config"]["learning_rate"] == 0.001
    assert {"data_path", "device", "show_progress", "n_layers"}.isdisjoint(settings["config"])


# ------------------------------------------------------------------------- processes


def process(folder, engine, trials, processes=1, what="search_in_process"):
    code = f"from tests.tuning.fake import {what} as go; import sys; go(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), engine, "random", str(trials), str(processes)],
        cwd=ROOT,
    )


def begun(folder):
    path = folder / "begun"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_kill_the_search_continues(tmp_path, engine):
    killed = process(tmp_path, engine, 6)
    while len(begun(tmp_path)) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    drawn = [line.split(maxsplit=1)[1] for line in begun(tmp_path)]
    assert process(tmp_path, engine, 6).wait() == 0
    after = [line.split(maxsplit=1)[1] for line in begun(tmp_path)][len(drawn) :]
    table = pd.read_csv(tmp_path / "out/tiny/SASRecFast/trials.csv")
    assert table["state"].tolist() == ["complete"] * 6
    assert drawn[2] in after  # the killed trial
    assert not set(drawn[:2]) & set(after)  # the counted ones
    whole = tmp_path / "whole"
    whole.mkdir()
    assert process(whole, engine, 6).wait() == 0
    assert sorted(drawn[:2] + after) == sorted(line.split(maxsplit=1)[1] for line in begun(whole))


@pytest.mark.slow
def test_a_trial_that_is_recorded_but_not_told_counts_once(tmp_path):
    pytest.importorskip("optuna")
    ended = process(tmp_path, "optuna", 5, what="search_that_ends_before_a_trial_is_told")
    assert ended.wait() == 9
    assert process(tmp_path, "optuna", 5).wait() == 0
    drawn = [line.split(maxsplit=1)[1] for line in begun(tmp_path)]
    assert len(drawn) == len(set(drawn)) == 5
    table = pd.read_csv(tmp_path / "out/tiny/SASRecFast/trials.csv")
    assert table["score"].nunique() == len(table) == 5


def test_a_trial_that_was_given_up_takes_no_point_of_the_grid(tune, tmp_path):
    optuna = pytest.importorskip("optuna")
    tune(Runs(), SMALL, algo="exhaustive", trials=3)
    database = tmp_path / "out/tiny/SASRecFast/study.db"
    study = optuna.load_study(study_name="SASRecFast tiny", storage=f"sqlite:///{database}")
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED))
    runs = Runs()
    assert tune(runs, SMALL, algo="exhaustive", trials=6)["trials"] == 6
    table = trials_of(tune(runs, SMALL, algo="exhaustive", trials=6))
    assert len(table[["n_layers", "n_heads"]].drop_duplicates()) == 6


def test_searches_with_other_settings_have_other_folders_in_a_storage_of_ray():
    settings = {"dataset": "tiny", "model": "MUFASA", "config": {"epochs": 1}}
    name = engines._ray_name(settings)
    assert name == engines._ray_name(json.loads(json.dumps(settings)))
    assert name.startswith("tiny-MUFASA-")
    assert name != engines._ray_name({**settings, "config": {"epochs": 3}})


def test_a_ray_without_its_extra_is_told(tune, monkeypatch):
    monkeypatch.setattr(tuning, "version", lambda name: "99.0")
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'recbole-mm\[ray\]'"):
        tune(Runs(), engine="ray")


def a_current_ray():
    """RecBole 1.2.1 brings ray 2.6.3, which is no engine here."""
    try:
        return int(version("ray").split(".")[1]) >= 31
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not a_current_ray(), reason="needs the extra ray")
def test_ray_searches_records_failures_stops_at_bad_input_and_continues(tmp_path):
    def tune(space, name):
        (tmp_path / "hyper.test").write_text(space)
        options = {"params_file": tmp_path / "hyper.test", "engine": "ray", "algo": "exhaustive"}
        return tuning.tune("SASRecFast", "tiny", None, QUICK, out=tmp_path / name, **options)

    found = tune("learning_rate choice [0.002,1e30]\n", "out")
    assert (found["trials"], found["failed"]) == (2, 1)
    assert found["best"] == {"learning_rate": 0.002}
    alone = recbole_mm.run(
        "SASRecFast", "tiny", config_dict={**QUICK, "learning_rate": 0.002}, saved=False
    )
    assert found["best_valid_score"] == pytest.approx(alone["best_valid_score"], abs=1e-6)
    seconds = trials_of(found)["seconds"].tolist()
    again = tune("learning_rate choice [0.002,1e30]\n", "out")
    assert trials_of(again)["seconds"].tolist() == seconds  # read back
    found = tune("hidden_size choice [64,65]\n", "impossible")
    assert (found["trials"], found["failed"]) == (2, 1)
    with pytest.raises(InputError, match="n_negatives must lie between"):  # only the data tell
        tune("n_negatives choice [0,5000]\n", "bad")


def test_searched_epochs_stand_beside_those_that_were_run(tune):
    space = "n_layers choice [1]\nn_heads choice [1]\nepochs choice [7]\n"
    found = tune(Runs(), algo="exhaustive", trials=1, space=space)
    assert trials_of(found).loc[0, ["epochs", "epochs run"]].tolist() == [7, 1]


def test_processes_may_write_one_file_at_the_same_time(tmp_path, monkeypatch):
    replace = Path.replace

    def after_another(temporary, path):
        monkeypatch.setattr(Path, "replace", replace)
        search_module.write_text(path, "theirs")
        return replace(temporary, path)

    monkeypatch.setattr(Path, "replace", after_another)
    search_module.write_text(tmp_path / "search.json", "ours")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"search.json": "ours"}


def test_a_search_begun_at_the_same_time_with_other_settings_is_refused(tune, monkeypatch):
    write_text = search_module.write_text

    def overtaken(path, text):
        write_text(path, text.replace('"engine": "optuna"', '"engine": "recbole"'))

    monkeypatch.setattr(search_module, "write_text", overtaken)
    runs = Runs()
    with pytest.raises(InputError, match=r"engine .'recbole' then, 'optuna' now"):
        tune(runs, engine="optuna")
    assert not runs.calls


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path):
    both = [process(tmp_path, "optuna", 12, processes=2) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    workers, drawn = zip(*(line.split(maxsplit=1) for line in begun(tmp_path)), strict=True)
    assert len(set(workers)) == 2
    assert len(drawn) == len(set(drawn)) == 12
    assert len(pd.read_csv(tmp_path / "out/tiny/SASRecFast/trials.csv")) == 12


def test_the_tables_of_a_study_may_be_made_by_another_process_meanwhile(tune, monkeypatch):
    optuna = pytest.importorskip("optuna")
    from sqlalchemy.exc import OperationalError

    refusals = [OperationalError("CREATE TABLE studies", {}, Exception("already exists"))]
    begin = optuna.storages.RDBStorage.__init__

    def racing(self, *args, **options):
        if refusals:
            raise refusals.pop()
        begin(self, *args, **options)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", racing)
    assert tune(Runs())["trials"] == 6
    assert not refusals
