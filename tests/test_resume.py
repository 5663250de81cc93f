"""Interrupted runs end as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recbole_mm
from recbole_mm import trainer
from recbole_mm.checkpoint import read, write
from recbole_mm.cli import main
from recbole_mm.config import DATASETS
from recbole_mm.errors import InputError
from recbole_mm.models.mufasa import MUFASA
from recbole_mm.run_folder import RunFolder
from recbole_mm.training import TrainingLoop

QUICK = {
    "epochs": 3,
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 512,
    "show_progress": False,
    "checkpoint_minutes": 0,
    "hidden_size": 16,
    "inner_size": 32,
}
OF_MODEL = {
    "MUFASA": {"mfl_pretrain_epochs": 2, "freeze_mfl": True},
    "SASRecFast": {"train_objective": "last"},
    "MultiVAE": {"train_batch_size": 64},
}
SECONDS = ("train_seconds", "train_cpu_seconds", "valid_seconds", "valid_cpu_seconds")


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


def train(model, where, **values):
    values = {**QUICK, **OF_MODEL.get(model, {}), "checkpoint_dir": str(where), **values}
    return recbole_mm.run(model, "tiny", config_dict=values)


def only_folder(where):
    (path,) = Path(where).glob("*/*/*")
    return path


def contents(folder):
    """All that two equal runs share, weights excepted."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for key in ("seconds", "run"):
        del result[key]
    return {
        "metrics": [{k: v for k, v in line.items() if k not in SECONDS} for line in lines],
        "result": result,
    }


def differing_tensors(first, second, name):
    one, two = load_file(first / name), load_file(second / name)
    assert list(one) == list(two)
    return [key for key in one if not torch.equal(one[key], two[key])]


def assert_equal_runs(first, second):
    assert contents(first) == contents(second)
    for name in ("model.safetensors", "last.safetensors"):
        assert differing_tensors(first, second, name) == []


@pytest.fixture
def killed_at(monkeypatch):
    """Kill a run in its n-th optimizer step, or call of another method, before it does anything."""

    def arm(n, owner=TrainingLoop, name="_step"):
        original, count = getattr(owner, name), [0]

        def counted(self, *args, **kwargs):
            if count[0] == n:
                monkeypatch.undo()  # the next process is not killed
                raise Killed
            count[0] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    return arm


def interrupted(model, where, **values):
    with pytest.raises(Killed):
        train(model, where, **values)
    folder = only_folder(where)
    assert not (folder / "result.json").exists()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were not interrupted, each trained once."""
    made = {}

    def make(model, **values):
        key = (model, *sorted(values.items()))
        if key not in made:
            where = tmp_path_factory.mktemp("whole")
            train(model, where, **values)
            made[key] = only_folder(where)
        return made[key]

    return make


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        *(("MUFASA", 0), ("MUFASA", 4), ("MUFASA", 11), ("SASRecFast", 2), ("CAMMSR", 5)),
        *(("MDSRec", 5), ("SASRecMM", 7), ("SASRec", 5), ("BERT4Rec", 5)),
        *(("BPR", 7), ("LightGCN", 7), ("MultiVAE", 9), ("Pop", 2)),
    ],
)
def test_a_run_killed_in_an_epoch_ends_as_if_it_had_not_been(
    model, steps, whole, killed_at, tmp_path
):
    reference = whole(model)
    killed_at(steps)
    folder = interrupted(model, tmp_path)
    n_batches = read(reference / "last.safetensors").about["of_epoch"]["batches"]
    assert read(folder / "last.safetensors").about["position"] == {
        "stage": "training",
        "epoch": steps // n_batches,
        "batch": steps % n_batches,
    }
    result = recbole_mm.run(resume=folder)
    assert_equal_runs(reference, folder)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    # those of the process that was killed count, too
    assert result["seconds"] > sum(
        line[key] for line in lines for key in line.keys() & SECONDS[::2]
    )


@pytest.mark.parametrize("steps", [None, 7, 12])
def test_every_epoch_has_a_line_whether_it_was_validated_or_not(steps, killed_at, tmp_path):
    if steps is None:
        train("SASRecFast", tmp_path, eval_step=2)
    else:
        killed_at(steps)
        recbole_mm.run(resume=interrupted("SASRecFast", tmp_path, eval_step=2))
    lines = contents(only_folder(tmp_path))["metrics"]
    assert [(line["epoch"], "valid" in line) for line in lines] == [
        (0, False),
        (1, True),
        (2, False),
    ]


@pytest.mark.parametrize(
    ("owner", "name", "n"),
    [
        (MUFASA, "fusion_terms", 1),  # in the first pass of the pre-training
        (MUFASA, "fusion_terms", 3),
        (trainer.TrainerMixin, "evaluate", 1),  # before validation
        (trainer.TrainerMixin, "_save_checkpoint", 1),  # after validation
        (trainer.TrainerMixin, "evaluate", 3),  # before the test
    ],
)
def test_a_run_killed_between_epochs_ends_as_if_it_had_not_been(
    owner, name, n, whole, killed_at, tmp_path
):
    values = {"mfl_batch_items": 64, "checkpoint_minutes": 10.0}
    reference = whole("MUFASA", **values)
    killed_at(n, owner, name)
    folder = interrupted("MUFASA", tmp_path, **values)
    recbole_mm.run(resume=folder)
    assert_equal_runs(reference, folder)


def test_a_run_can_be_killed_again_and_again(whole, killed_at, tmp_path):
    killed_at(2)
    folder = interrupted("MUFASA", tmp_path)
    for _ in range(2):
        killed_at(3)
        with pytest.raises(Killed):
            recbole_mm.run(resume=folder)
    recbole_mm.run(resume=folder)
    assert_equal_runs(whole("MUFASA"), folder)


def test_early_stopping_remembers(whole, killed_at, tmp_path):
    values = {"epochs": 30, "stopping_step": 1, "learning_rate": 0.1}
    reference = whole("SASRecFast", **values)
    result = json.loads((reference / "result.json").read_text())
    assert result["epochs"] < 30
    killed_at(result["epochs"], trainer.TrainerMixin, "evaluate")  # it has stopped
    folder = interrupted("SASRecFast", tmp_path, **values)
    recbole_mm.run(resume=folder)
    assert_equal_runs(reference, folder)


# ------------------------------------------------------------------------- what may be resumed


def test_a_finished_run_says_so(whole, capsys):
    folder = whole("SASRecFast")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    result = recbole_mm.run(resume=folder, config_dict={"show_progress": True})
    assert "this run is finished" in capsys.readouterr().out
    assert result == json.loads((folder / "result.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def test_a_finished_run_that_was_moved_names_its_new_folder(whole, tmp_path):
    folder = shutil.copytree(whole("SASRecFast"), tmp_path / "moved")
    result = recbole_mm.run(resume=folder, config_dict={"show_progress": False})
    assert result["run"] == str(folder)
    assert result["test_result"] == json.loads((folder / "result.json").read_text())["test_result"]


def test_a_finished_run_can_be_given_more_epochs(whole, tmp_path):
    folder = shutil.copytree(whole("SASRecFast"), tmp_path / "run")
    result = recbole_mm.run(resume=folder, config_dict={"epochs": 5})
    longer = json.loads((whole("SASRecFast", epochs=5) / "result.json").read_text())
    assert result["test_result"] == longer["test_result"]
    assert result["epochs"] == 5


def test_fewer_epochs_than_are_done_are_said(whole, tmp_path, capsys):
    folder = shutil.copytree(whole("SASRecFast"), tmp_path / "run")
    before = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()  # killed before its end
    result = recbole_mm.run(resume=folder, config_dict={"epochs": 2, "show_progress": True})
    assert result["epochs"] == before["epochs"] == 3
    assert "3 epochs are done, more than epochs: 2" in capsys.readouterr().out


def test_more_epochs_are_refused_where_recbole_would_have_validated_others(whole, tmp_path):
    """RecBole validates after min(eval_step, epochs) epochs: 3 here, 4 in a run of 8."""
    folder = shutil.copytree(whole("SASRecFast", eval_step=4), tmp_path / "run")
    with pytest.raises(InputError, match=r"epochs \(3 then, 8 now: with an eval_step of 4"):
        recbole_mm.run(resume=folder, config_dict={"epochs": 8})


def test_a_run_that_is_killed_in_its_further_epochs_is_not_finished(whole, tmp_path, killed_at):
    folder = shutil.copytree(whole("SASRecFast"), tmp_path / "run")
    killed_at(2)
    with pytest.raises(Killed):
        recbole_mm.run(resume=folder, config_dict={"epochs": 5})
    assert not (folder / "result.json").exists()  # its weights may be of a later epoch by now
    result = recbole_mm.run(resume=folder)
    longer = json.loads((whole("SASRecFast", epochs=5) / "result.json").read_text())
    assert result["test_result"] == longer["test_result"]


@pytest.fixture
def cut(killed_at, tmp_path):
    killed_at(2)
    return interrupted("SASRecFast", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate \(0.001 then, 0.5 now\)"),
        ({"seed": 3, "hidden_size": 32}, r"hidden_size \(16 then, 32 now\), seed"),
    ],
)
def test_other_values_are_refused_by_name(values, message, cut):
    with pytest.raises(InputError, match=message):
        recbole_mm.run(resume=cut, config_dict=values)


def test_another_model_or_data_set_is_refused(cut, tmp_path):
    with pytest.raises(InputError, match=r"\('SASRecFast' then, 'SASRec' now\)"):
        recbole_mm.run("SASRec", resume=cut)
    shutil.copytree(DATASETS / "tiny", tmp_path / "data/other")
    (tmp_path / "data/other/tiny.inter").rename(tmp_path / "data/other/other.inter")
    with pytest.raises(InputError, match=r"dataset \('tiny' then, 'other' now\)"):
        recbole_mm.run(
            dataset="other", resume=cut, config_dict={"data_path": str(tmp_path / "data")}
        )


def test_changed_data_are_refused(cut, tmp_path):
    data = shutil.copytree(DATASETS / "tiny", tmp_path / "data" / "tiny")
    file = data / "tiny.inter"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match="the data have changed since this run"):
        recbole_mm.run(resume=cut, config_dict={"data_path": str(data.parent)})


def test_a_run_that_is_still_going_on_is_left_alone(cut):
    with RunFolder.at(cut).held(), pytest.raises(InputError, match="still going on in another"):
        recbole_mm.run(resume=cut)
    assert not (cut / ".lock").exists()
    assert recbole_mm.run(resume=cut)["epochs"] > 0
    assert not (cut / ".lock").exists()


def test_weights_of_another_shape_are_refused_by_name(cut):
    state = read(cut / "last.safetensors")
    tensors = {n: t for n, t in state.tensors.items() if n != "model.LayerNorm.bias"}
    write(cut / "last.safetensors", tensors, state.about)
    with pytest.raises(InputError, match=r"those of another model: LayerNorm.bias \(absent there"):
        recbole_mm.run(resume=cut)


def test_histories_in_another_order_are_refused(cut, tmp_path):
    """The same pairs in every part of the split, so that only the order tells."""
    data = shutil.copytree(DATASETS / "tiny", tmp_path / "data" / "tiny")
    file = data / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    at = header.split("\t").index("timestamp:float")
    by_user = {}
    for row in rows:
        by_user.setdefault(row[0], []).append(row)
    for history in by_user.values():
        history.sort(key=lambda row: float(row[at]))
        times = [row[at] for row in history[:-2]]
        for row, earlier in zip(history[:-2], reversed(times), strict=True):
            row[at] = earlier
    file.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")
    with pytest.raises(InputError, match=r"have changed since this run: order of the histories \("):
        recbole_mm.run(resume=cut, config_dict={"data_path": str(data.parent)})


def test_a_run_of_a_version_that_did_not_note_the_order_goes_on(cut):
    data = json.loads((cut / "data.json").read_text())
    del data["interactions"]["histories"]
    (cut / "data.json").write_text(json.dumps(data))
    assert recbole_mm.run(resume=cut)["epochs"] > 0


def test_another_state_of_things_is_said(cut, capsys):
    began = json.loads((cut / "environment.json").read_text())
    began["packages"]["torch"], began["code"] = "1.13.0", "another"
    (cut / "environment.json").write_text(json.dumps(began))
    assert main(["run", f"--resume={cut}", "--show_progress=True"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (said,) = (line for line in printed if "began with another state of things" in line)
    assert "(the source of recbole_mm, 0.1.0 then; torch, 1.13.0 then)" in said
    assert "began with another" in (cut / "run.log").read_text()


def test_a_folder_without_a_checkpoint_is_refused(cut):
    (cut / "last.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no last\.safetensors"):
        recbole_mm.run(resume=cut)
    with pytest.raises(InputError, match="not a run folder"):
        recbole_mm.run(resume=cut.parent)


def test_a_damaged_checkpoint_is_refused(cut):
    file = cut / "last.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"last\.safetensors: cannot be read"):
        recbole_mm.run(resume=cut)


def test_a_trainer_with_a_state_of_its_own_is_refused(tmp_path):
    train("RecVAE", tmp_path, epochs=1)
    folder = only_folder(tmp_path)
    assert not (folder / "last.safetensors").exists()
    (folder / "result.json").unlink()
    with pytest.raises(InputError, match="RecVAE cannot be resumed"):
        recbole_mm.run(resume=folder)


def test_a_model_that_changes_what_cannot_be_saved_is_refused(tmp_path):
    train("SGL", tmp_path, epochs=1)
    folder = only_folder(tmp_path)
    (folder / "result.json").unlink()
    with pytest.raises(InputError, match=r"it changes sub_graph1 \(Tensor\), sub_graph2"):
        recbole_mm.run(resume=folder)


# ------------------------------------------------------------------------- workers


@pytest.mark.parametrize("model", ["MUFASA", "BERT4Rec", "BPR"])
def test_the_number_of_workers_changes_nothing(model, whole):
    """BERT4Rec draws masks and BPR draws negatives while a batch is made."""
    alone, helped = whole(model, epochs=2), whole(model, epochs=2, worker=2)
    assert contents(alone) == contents(helped)
    assert differing_tensors(alone, helped, "last.safetensors") == []


# ------------------------------------------------------------------------- a real kill


@pytest.mark.slow
def test_a_process_killed_by_the_system_can_be_resumed(whole, tmp_path):
    values = {**QUICK, **OF_MODEL["MUFASA"], "checkpoint_dir": str(tmp_path), "epochs": 40}
    arguments = [f"--{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "recbole_mm.cli", "run", "--model=MUFASA", "--dataset=tiny"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *arguments], env=one_thread)
    while not list(tmp_path.glob("tiny/MUFASA/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = only_folder(tmp_path)
    assert not (folder / "result.json").exists()
    resume = [sys.executable, "-m", "recbole_mm.cli", "run", f"--resume={folder}"]
    three_threads = os.environ | {"OMP_NUM_THREADS": "3"}  # it goes on with one, as it began
    assert subprocess.run(resume, check=False, env=three_threads).returncode == 0
    assert_equal_runs(whole("MUFASA", epochs=40), folder)


@pytest.mark.parametrize(
    ("model", "values", "match"),
    [
        ("SASRecF", {"selected_features": ["categories"]}, r"other columns \("),
        ("CAMMSR", {}, r"categories \("),
    ],
)
def test_other_columns_of_items_are_refused(model, values, match, tmp_path, killed_at):
    data = shutil.copytree(DATASETS / "tiny", tmp_path / "data/tiny")
    values = {**values, "data_path": str(data.parent)}
    killed_at(2)
    folder = interrupted(model, tmp_path / "runs", **values)
    file = data / "tiny.item"
    header, *lines = file.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    at = [name.split(":")[0] for name in header.split("\t")].index("categories")
    cells = [row[at] for row in rows]
    for row, cell in zip(rows, cells[60:] + cells[:60], strict=True):
        row[at] = cell
    text = "\n".join([header, *("\t".join(row) for row in rows)]) + "\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="have changed since this run: " + match):
        recbole_mm.run(resume=folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("data.json", text) for text in ("{}", '{"interactions": 1}', '{"modalities": [1]}')),
        *(("ids.json", text) for text in ("", "[]", "{")),
        ("config.yaml", "model: SASRecFast\n"),
    ],
)
def test_a_damaged_folder_is_refused(name, text, cut):
    (cut / name).write_text(text)
    with pytest.raises(InputError, match=name):
        recbole_mm.run(resume=cut)
