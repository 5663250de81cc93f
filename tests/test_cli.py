"""The command line, end to end: runs, exit codes, and what is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recbole_mm.cli import main, run_main

QUICK = ["--dataset=tiny", "--epochs=2", "--MAX_ITEM_LIST_LENGTH=10", "--show_progress=False"]
SCRIPT = Path(__file__).parent.parent / "run_recbole_mm.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run of MUFASA through the script, from a foreign working directory."""
    where = tmp_path_factory.mktemp("run")
    arguments = ["--model=MUFASA", "--dataset=tiny", "--epochs=2", "--MAX_ITEM_LIST_LENGTH=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (where / "saved" / "tiny" / "MUFASA").iterdir()
    return path, done


def test_the_terminal_shows_report_protocol_epochs_and_table(folder):
    path, done = folder
    out = done.stdout
    assert "tiny: 300 users, 120 items, 3328 interactions" in out
    assert "text: 120 rows x 16" in out
    assert "protocol: split LS valid_and_test" in out
    assert "epoch   1" in out
    assert "semantic" in out  # each term under its name
    assert "ndcg@10" in out
    assert str(path) in out


def test_the_run_folder_holds_everything_and_no_pickle(folder):
    path, _ = folder
    names = {p.name for p in path.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "data.json", "protocol.json", "ids.json", "run.log"),
        *("metrics.jsonl", "model.safetensors", "items.safetensors", "last.safetensors"),
        "result.json",
        "log_tensorboard",
    }
    assert list((path / "log_tensorboard").iterdir())
    assert not [p for p in path.rglob("*") if p.suffix in (".pth", ".pt", ".pkl")]


def test_tensorboard_has_every_epoch_as_soon_as_the_run_is_over(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, _ = folder
    events = EventAccumulator(str(path / "log_tensorboard")).Reload()
    epochs = (path / "metrics.jsonl").read_text().splitlines()
    assert [event.step for event in events.Scalars("Loss/Train/next_item")] == list(
        range(len(epochs))
    )
    assert len(events.Scalars("Vaild_score")) == len(epochs)


def test_nothing_is_written_beside_the_run_folder(folder):
    path, _ = folder
    assert {p.name for p in path.parents[2].parent.iterdir()} == {"saved"}


def test_the_result_is_that_of_the_best_epoch(folder):
    path, _ = folder
    result = json.loads((path / "result.json").read_text())
    epochs = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    best = max(epochs, key=lambda note: note["valid"]["ndcg@10"])
    assert result["best_epoch"] == best["epoch"]
    assert result["best_valid_result"] == best["valid"]
    assert result["protocol"] == json.loads((path / "protocol.json").read_text())


def test_the_saved_config_repeats_the_run(folder, tmp_path):
    path, _ = folder
    saved = yaml.safe_load((path / "config.yaml").read_text())
    result = json.loads((path / "result.json").read_text())
    from recbole_mm import run

    keys = ("epochs", "MAX_ITEM_LIST_LENGTH", "seed", "train_batch_size", "learning_rate")
    again = run(
        "MUFASA",
        "tiny",
        config_dict={k: saved[k] for k in keys} | {"show_progress": False},
        saved=False,
    )
    assert again["run"] is None
    assert again["test_result"] == pytest.approx(result["test_result"], abs=1e-6)


def test_built_in_models_report_the_same_users_items_and_interactions(folder, tmp_path, capsys):
    path, _ = folder
    ours = json.loads((path / "protocol.json").read_text())
    for model in ("SASRec", "BPR"):
        code = run_main([f"--model={model}", *QUICK, f"--checkpoint_dir={tmp_path}"])
        assert code == 0, capsys.readouterr().err
        (theirs,) = (tmp_path / "tiny" / model).iterdir()
        assert json.loads((theirs / "protocol.json").read_text()) == ours
        data = json.loads((theirs / "data.json").read_text())["interactions"]
        mine = json.loads((path / "data.json").read_text())["interactions"]
        for key in ("users", "items", "interactions"):
            assert data[key] == mine[key]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--mode=uni100", "--model=Pop", "--dataset=tiny"], "unknown key 'mode'"),
        (["run", "--dat=tiny"], "unknown key 'dat'"),
        (["models", "--foo=1"], "models: unknown arguments --foo=1"),
        (["tune", "--resume=saved/x", "--model=Pop"], "'resume'"),
        (["run", "--config_files='a"], "No closing quotation"),
        (["compare", "--models=Pop", "--datasets=tiny", "--seeds=²"], "neither a number of seeds"),
    ],
)
def test_options_are_written_out_and_known(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_config_file_may_have_a_blank_in_its_name(tmp_path):
    file = tmp_path / "my own.yaml"
    file.write_text("model: Pop\ndataset: tiny\n")
    for given in (f"'{file}'", str(file)):
        assert run_main([f"--config_files={given}", f"--checkpoint_dir={tmp_path}"]) == 0


def test_what_a_run_does_and_does_not_do_is_said(tmp_path, capsys):
    arguments = ["--model=SASRecMM", "--dataset=tiny", "--modalities={}", "--stopping_step=0"]
    arguments += ["--epochs=30", "--learning_rate=0.5", f"--checkpoint_dir={tmp_path}"]
    assert run_main(arguments) == 0
    captured = capsys.readouterr()
    assert "no modalities are declared: SASRecMM learns from ids alone" in captured.out
    assert "no better validation in 1 evaluations (stopping_step 0)" in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selected_features=[nosuch]"], "no column 'nosuch' (selected_features); name some of"),
        (["--load_col={inter: [item_id, timestamp]}"], "no column 'user_id' (USER_ID_FIELD)"),
    ],
)
def test_columns_that_are_not_there_are_named(arguments, message, capsys):
    assert run_main(["--model=SASRecF", "--dataset=tiny", "--epochs=1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "did you mean 'user_id'" not in error


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m recbole_mm.cli models | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model=NoSuchModel"], 2, "unknown model 'NoSuchModel'"),
        (["--model=my_module.Model"], 2, "unknown model 'my_module.Model'"),
        (["--model="], 2, "unknown model ''"),
        (["--dataset="], 2, "dataset must be a plain folder name below data_path, got ''"),
        (["--epochs=ten"], 2, "epochs must be of type int, got 'ten'"),
        (["--learning_rat=0.1"], 2, "did you mean 'learning_rate'"),
        (["--topk=[5,500]", "--valid_metric=NDCG@5"], 2, "more than the 120 items of tiny"),
        (["--modalities={'x': {'path': 'no.npy'}}"], 2, "no.npy"),
        (["--min_coverage=1.0"], 2, "min_coverage"),
        (["--user_inter_num_interval=[1000,inf)"], 2, "user_inter_num_interval"),
        (["--anchor_modality=3"], 0, ""),
        (["--block_size=0"], 2, "block_size"),
        (["--selection=best"], 2, "selection"),
        (["--config_files=missing.yaml"], 2, "missing.yaml"),
    ],
)
def test_bad_input_gives_its_exit_code_and_message_and_writes_nothing(
    arguments, code, message, tmp_path, capsys
):
    given = [a for a in QUICK if a.split("=")[0] not in {b.split("=")[0] for b in arguments}]
    model = [] if any(a.startswith("--model") for a in arguments) else ["--model=MUFASA"]
    assert run_main([*model, *given, *arguments, f"--checkpoint_dir={tmp_path / 'saved'}"]) == code
    captured = capsys.readouterr()
    if code:
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert not (tmp_path / "saved").exists()


def test_a_folder_that_cannot_be_written_exits_with_3(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run_main(["--model=Pop", *QUICK, f"--checkpoint_dir={blocked}"]) == 3
    assert "point checkpoint_dir at a folder" in capsys.readouterr().err


def test_a_diverging_run_exits_with_4_and_names_the_term(tmp_path, capsys):
    arguments = ["--learning_rate=1e30", "--mfl_pretrain_epochs=0", f"--checkpoint_dir={tmp_path}"]
    assert run_main(["--model=MUFASA", *QUICK, *arguments]) == 4
    assert "loss term" in capsys.readouterr().err


def test_the_models_command_lists_ours_and_recboles(capsys):
    assert main(["models"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"MUFASA", "SASRecMM", "SASRec", "GRU4Rec", "LightGCN"} <= set(listed)
    assert "S3Rec" not in listed


def test_model_and_data_set_may_stand_in_a_config_file(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("model: Pop\ndataset: tiny\nshow_progress: False\n")
    assert run_main([f"--config_files={file}", f"--checkpoint_dir={tmp_path}"]) == 0
    assert (tmp_path / "tiny" / "Pop").is_dir()


def test_a_seed_is_not_taken_for_a_number_of_seeds(capsys):
    assert main(["compare", "--models=Pop", "--datasets=tiny", "--seeds=2020"]) == 2
    assert "asks for 2020 seeds; for that one seed write --seeds 2020," in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--dataset=" + "x" * 300],
        ["run", "--config_files=" + "x" * 300],
        ["explain", "x" * 300],
        ["run", "--resume=" + "x" * 300],
    ],
)
def test_a_name_that_is_too_long_is_bad_input(arguments, capsys):
    assert main(arguments) == 2
    assert "too long" in capsys.readouterr().err


def test_a_file_for_runs_serves_extract(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("train_objective: all\nexplain: True\nmodalities: [text]\nn_negatives: 5\n")
    images = tmp_path / "none"
    arguments = ["extract", "tiny", "--images", str(images), "--config_files", str(file)]
    assert main([*arguments, "--out", str(tmp_path / "i.safetensors")]) == 2
    assert str(images) in capsys.readouterr().err  # what is wrong is the folder, not the file


@pytest.mark.parametrize("dataset", ["tiny", "ml-100k"])
def test_extract_writes_nothing_into_a_package(dataset, tmp_path, capsys):
    assert main(["extract", dataset, "--images", str(tmp_path)]) == 2
    assert "comes with a package, and nothing is written there" in capsys.readouterr().err


def test_a_run_without_epochs_says_that_nothing_was_trained(tmp_path, capsys):
    given = [f"--checkpoint_dir={tmp_path}", "--dataset=tiny", "--epochs=0"]
    assert run_main(["--model=SASRecFast", *given]) == 0
    assert "SASRecFast on tiny: not trained, " in capsys.readouterr().out
