"""A run that costs nothing: a score known by its values, for tests of the search itself."""

import os
import time
from pathlib import Path

from recbole_mm.errors import InputError, NumericalError
from recbole_mm.protocol import Protocol
from recbole_mm.tuning import engines, search, tune

PROTOCOL = Protocol(
    split="LS valid_and_test",
    order="TO",
    mode="full",
    mask_history=False,
    metrics=("NDCG",),
    topk=(10,),
    valid_metric="NDCG@10",
    decimal_places=6,
    candidates=120,
    items="a",
    train="b",
    valid="c",
    test="d",
    valid_users=300,
    test_users=300,
    valid_rankings=300,
    test_rankings=300,
)
SPACE = "n_layers choice [1,2,3]\nn_heads choice [1,2,4]\nhidden_dropout_prob uniform 0.1,0.6\n"
SMALL = "n_layers choice [1,2,3]\nn_heads choice [1,2]\n"
GRID = "n_layers choice [1,2,3,4,5]\nn_heads choice [1,2,4]\n"


def score(values):
    """Best with two layers, one head and no dropout."""
    layers = abs(values["n_layers"] - 2) / 10
    return 0.9 - layers - values["n_heads"] / 100 - values.get("hidden_dropout_prob", 0) / 7


def result(values, valid=None, protocol=PROTOCOL):
    valid = score(values) if valid is None else valid
    return {
        "model": "SASRecFast",
        "dataset": "tiny",
        "best_valid_score": valid,
        "best_valid_result": {"ndcg@10": valid},
        "best_epoch": 0,
        "epochs": 1,
        "seconds": 0.0,
        "protocol": protocol.as_dict(),
    }


class Runs:
    """Stands in for :func:`recbole_mm.run`; keeps the values and seeds of its calls.

    Args:
        events: Call number, from 0, -> what is raised there.
    """

    def __init__(self, events=None, outcome=result):
        self.events = events or {}
        self.outcome = outcome
        self.calls = []
        self.seeds = []

    def __call__(self, model, dataset, files, values, *, saved, score_test, command_line):
        assert not saved
        assert not score_test
        self.calls.append({k: v for k, v in values.items() if k in SPACE})
        self.seeds.append(values["seed"])
        event = self.events.get(len(self.calls) - 1)
        if event is not None:
            raise event
        return self.outcome(values)


def diverged():
    return NumericalError("epoch 0, batch 1: loss term 'loss' is nan")


def wrong():
    return InputError("hidden_size must divide")


def search_in_process(folder, *options):
    """What a process of its own runs: slow trials, each noted at its start, then one search."""
    engine, algo, trials, processes = options
    search.run = _slow(Path(folder) / "begun", int(processes))
    # a trial without a heartbeat: of a killed process, or of one that a busy machine holds up
    engines.HEARTBEAT_SECONDS, engines.GRACE_SECONDS = 1, 3 if int(processes) == 1 else 60
    (Path(folder) / "hyper.test").write_text(SPACE)
    tune(
        "SASRecFast",
        "tiny",
        params_file=Path(folder) / "hyper.test",
        engine=engine,
        algo=algo,
        trials=int(trials),
        out=Path(folder) / "out",
    )


def search_that_ends_before_a_trial_is_told(folder, *options):
    """The process ends when Optuna has the second record, but does not know that it is finished."""
    import optuna

    kept = optuna.trial.Trial.set_user_attr

    def keep(trial, key, value):
        kept(trial, key, value)
        if key == "record" and trial.number == 1:
            os._exit(9)

    optuna.trial.Trial.set_user_attr = keep
    search_in_process(folder, *options)


def _slow(begun, processes):
    """Trials that take a while; the first waits until each of the processes has begun one."""

    def run(model, dataset, files, values, **options):
        drawn = [values[key] for key in ("n_layers", "n_heads", "hidden_dropout_prob")]
        with begun.open("a") as file:
            file.write(f"{os.getpid()} {drawn}\n")
        time.sleep(0.7)
        end = time.monotonic() + 60
        while len({line.split()[0] for line in begun.read_text().splitlines()}) < processes:
            assert time.monotonic() < end, "the other process draws no trial"
            time.sleep(0.05)
        return result(values)

    return run
