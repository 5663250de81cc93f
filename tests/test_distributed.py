"""Several processes give what one gives, and end together.

What runs in the processes is imported there by name; the heavy imports are inside the functions.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from recbole_mm import cli, distributed
from recbole_mm.config import Config
from recbole_mm.errors import EnvironmentFault, InputError, NumericalError
from recbole_mm.quick_start import _make

RANKS = ["NDCG", "MRR", "Hit", "GAUC", "ItemCoverage", "GiniIndex"]
QUICK = {
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 550,  # 88 of 389 windows: the last batch is smaller
    "show_progress": False,
    "hidden_size": 16,
    "inner_size": 32,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
}
SAMPLED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni20"}
# before any training, all processes have the weights that one has
UNTRAINED = {"epochs": 0, "metrics": RANKS, "topk": [5, 10], "save_per_user": True}
EVALUATED = {
    "SASRecMM": ("SASRecMM", UNTRAINED),
    "MUFASA, small batches": ("MUFASA", {**UNTRAINED, "eval_batch_size": 7}),
    "SASRec": ("SASRec", UNTRAINED),
    "BPR": ("BPR", UNTRAINED),
    "SASRecMM, sampled": ("SASRecMM", {**UNTRAINED, "eval_args": SAMPLED, "eval_batch_size": 50}),
    "BPR, sampled": ("BPR", {**UNTRAINED, "eval_args": SAMPLED, "eval_batch_size": 50}),
}
NO_FUSION_LOSS = dict.fromkeys(
    ("semantic_weight", "collaborative_weight", "structure_weight", "distribution_weight"), 0.0
)
# model, values, largest relative difference of a loss. What looks at other rows of the batch, or
# draws negatives for them, differs in more than the order of summation.
TRAINED = {
    "SASRecMM": ("SASRecMM", {"epochs": 3}, 1e-6),
    "SASRecMM, prefixes": ("SASRecMM", {"epochs": 2, "train_objective": "last"}, 1e-6),
    "SASRec": ("SASRec", {"epochs": 2}, 1e-6),
    "MUFASA, next item": ("MUFASA", {"epochs": 3, **NO_FUSION_LOSS}, 1e-6),
    "MUFASA": ("MUFASA", {"epochs": 2, "mfl_pretrain_epochs": 2, "freeze_mfl": True}, 1e-2),
    "BPR": ("BPR", {"epochs": 3}, 1e-2),
}


def run_all(cases, where):
    """Results of some runs, each below a folder of its own."""
    import recbole_mm

    if distributed.n_processes() > 1:
        torch.set_num_threads(1)
    return {
        name: recbole_mm.run(
            model,
            "tiny",
            config_dict={**QUICK, **values, "checkpoint_dir": str(Path(where, name))},
        )
        for name, (model, values, *_) in cases.items()
    }


def by_one_and_two(cases, where):
    two = distributed.launch(2, "cpu", partial(run_all, cases, where / "two"))
    return run_all(cases, where / "one"), two


def epochs(result):
    lines = Path(result["run"], "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_evaluate_as_one_and_no_user_twice(tmp_path):
    from recbole_mm.evaluation import PerUser

    one, two = by_one_and_two(EVALUATED, tmp_path)
    for name in EVALUATED:
        assert two[name]["test_result"] == pytest.approx(one[name]["test_result"], abs=1e-6), name
        users = [PerUser.load(Path(r[name]["run"], "per_user.npz")) for r in (one, two)]
        assert len(set(users[1].users)) == len(users[1].users) == 300
        for field, expected in users[0].arrays().items():
            assert np.array_equal(users[1].arrays()[field], expected), (name, field)
        assert len(list((tmp_path / "two" / name).glob("*/*/*"))) == 1  # the first one's folder


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    from safetensors.torch import load_file

    one, two = by_one_and_two(TRAINED, tmp_path)
    for name, (_, _, tolerance) in TRAINED.items():
        alike = tolerance < 1e-3
        for expected, found in zip(*(epochs(r[name]) for r in (one, two)), strict=True):
            terms = expected["loss"].keys() & ({"next_item", "loss"})
            assert terms
            for term in expected["loss"].keys() if alike else terms:
                wanted = pytest.approx(expected["loss"][term], rel=tolerance)
                assert found["loss"][term] == wanted, (name, found, expected)
            if alike:
                assert found["valid"] == pytest.approx(expected["valid"], abs=1e-4), name
        if alike:
            assert two[name]["test_result"] == pytest.approx(one[name]["test_result"], abs=1e-4)
        assert not Path(two[name]["run"], "last.safetensors").exists()
    # every process pre-trains the whole catalogue
    weights = [load_file(Path(r["MUFASA"]["run"], "model.safetensors")) for r in (one, two)]
    frozen = [key for key in weights[0] if key.startswith(("project.", "fusion."))]
    assert frozen
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in frozen)


def rows_of_an_epoch():
    """Users of each step, by process."""
    import recbole_mm
    from recbole_mm.training import TrainingLoop

    seen, step = [], TrainingLoop._step

    def noting(self, interaction, *args):
        seen.append(interaction["user_id"].tolist())
        step(self, interaction, *args)

    TrainingLoop._step = noting
    # one window a user, 299 of 300 in a batch: the last batch has one row
    values = {**QUICK, "epochs": 1, "train_batch_size": 2420, "MAX_ITEM_LIST_LENGTH": 50}
    recbole_mm.run("SASRecFast", "tiny", config_dict=values, saved=False)
    return {"steps": distributed.gathered(seen)}


@pytest.mark.slow
def test_every_row_is_trained_by_one_process_and_a_last_row_by_both():
    first, second = distributed.launch(2, "cpu", rows_of_an_epoch)["steps"]
    assert [len(users) for users in first] == [150, 1]
    assert [len(users) for users in second] == [149, 1]
    assert first[1] == second[1]
    assert sorted([*first[0], *second[0], *first[1]]) == list(range(1, 301))


# ------------------------------------------------------------------------- ends


def failing(kind):
    """The second process fails while the first waits for it."""
    if distributed.rank() == 1:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"ours": NumericalError("epoch 3, batch 2: loss is nan"), "bug": KeyError("k")}[kind]
    dist.barrier()
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("ours", NumericalError, "^epoch 3, batch 2: loss is nan$"),
        ("killed", EnvironmentFault, "process 1 of 2 was ended by SIGKILL"),
        ("bug", RuntimeError, r"process 1 of 2 failed:\nTraceback [^$]*KeyError: 'k'"),
    ],
)
def test_a_failure_of_one_process_ends_all_and_says_why(kind, error, message):
    before = psutil.Process().children()
    with pytest.raises(error, match=message):
        distributed.launch(2, "cpu", partial(failing, kind))
    left = [p for p in psutil.Process().children() if p not in before]
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]


def command(*arguments):
    script = "import sys; from recbole_mm.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", script, "run", "--nproc", "2", "--dataset=tiny", *arguments]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_exit_code_4(tmp_path):
    values = ("--learning_rate=1e30", "--epochs=3", "--show_progress=False")
    done = subprocess.run(
        command("--model=SASRecMM", *values), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_or_a_kill_of_the_first_ends_all(sent, tmp_path):
    with subprocess.Popen(
        command("--model=SASRecFast", "--epochs=100000", "--stopping_step=100000"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores interrupts, and so do its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as running:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("saved/*/*/*/metrics.jsonl")) and time.monotonic() < until:
            time.sleep(0.2)
        processes = psutil.Process(running.pid).children(recursive=True)
        assert len(processes) >= 2
        running.send_signal(sent)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
        assert ("interrupted" in said) == (sent == signal.SIGINT)
        assert psutil.wait_procs(processes, timeout=20)[1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=Pop"], "Pop cannot be trained by 2 processes"),
        (["--model=NCL"], "NCL cannot be trained by 2 processes: RecBole's NCLTrainer"),
        (["--train_batch_size=1"], "train_batch_size 1 is what 2 processes share"),
        (["--nproc=0"], "nproc must be at least 1, got 0"),
        (["--resume=somewhere"], "resume: only one process can"),
        (["--local_rank=1"], "'local_rank' in the command line: the number of processes"),
        (["--learning_rat=1"], "unknown key 'learning_rat'"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_start(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(distributed, "launch", lambda *_: pytest.fail("started"))
    assert cli.main(["run", "--nproc", "2", "--dataset=tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_each_process_needs_a_window(monkeypatch):
    """Ten targets are one window of `tiny`: nothing to share, though ten are more than two."""
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    values = {"train_objective": "all", "train_batch_size": 10}
    with pytest.raises(InputError, match="train_batch_size 10 makes batches of 1 rows, which 2"):
        _make(Config("SASRecFast", "tiny", config_dict=values))


def test_what_cannot_be_sent_to_other_processes_is_refused():
    with pytest.raises(InputError, match="at the top level of a module"):
        distributed.launch(2, "cpu", lambda: {"a": 1})


def done_and_no_interpreter_after_it():
    import atexit

    atexit.register(os.abort)
    return {"rank": distributed.rank(), "of": distributed.n_processes()}


def test_a_process_that_has_done_its_work_runs_nothing_of_the_interpreters_end():
    found = distributed.launch(2, "cpu", done_and_no_interpreter_after_it)
    assert found == {"rank": 0, "of": 2}


def test_processes_that_never_began_are_told_by_their_cause(tmp_path):
    error = distributed._error(1, 1, tmp_path, 2)
    assert isinstance(error, InputError)
    assert "process 1 of 2 could not start" in str(error)
    assert '__name__ == "__main__"' in str(error)


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    from recbole_mm import quick_start

    config = quick_start.Config("SASRecFast", "tiny")
    config["device"] = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"gpu_id '0' gives 1 GPUs: .* gpu_id: '0,1,2'"):
        quick_start._check_processes(config, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert quick_start._check_processes(config, 3) == "cuda"
