"""The three engines: each takes a search to its number of trials, from wherever it stands."""

from __future__ import annotations

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm import compat
from recbole_mm.checkpoint import fingerprint
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.tuning.search import Record, Search, check_same
from recbole_mm.tuning.space import Parameter, grid

HEARTBEAT_SECONDS = 10
"""How often a running trial says in an optuna database that it lives."""
GRACE_SECONDS = 60
"""After how long a silence it counts as killed, and is run again."""


class _Failed(Exception):  # noqa: N818  (no error of the search)
    """Tells an engine that a trial has failed; the reason is in its record."""


# ------------------------------------------------------------------------- RecBole's HyperTuning


def by_recbole(search: Search, hyperopt: Any, storage: None) -> list[Record]:
    """Search with RecBole's ``HyperTuning``, without its traps.

    - Its early stop counts trials without progress, which cuts a grid short and fails on a failed
      trial; here there is none.
    - Its exhaustive search draws until no new point turns up, from a ``RandomState`` without the
      method that hyperopt >= 0.2.6 calls; here the points of the grid are handed out in order.
    - It is not seeded and forgets everything at its end. Here hyperopt has the search's seed, so
      that a search that continues draws the same trials again, and finds them on record.
    """
    from recbole.trainer import HyperTuning

    path = search.folder / "trials.jsonl"
    recorded = _read_records(path)
    records: list[Record] = []

    def objective(drawn: Mapping[str, Any], _files: Any) -> dict[str, Any]:
        values = search.configuration(drawn)
        record = recorded.get(len(records))
        if record is None or record["values"] != values:
            record = search.trial(values, records)
            _append_record(path, len(records), record)
        records.append(record)
        if record["error"] is not None:
            raise _Failed
        return {
            "model": search.settings["model"],
            "best_valid_score": record["score"],
            "valid_score_bigger": search.bigger,
            "best_valid_result": record["valid"],
            "test_result": {},
        }

    class Tuning(HyperTuning):
        def trial(self, params: dict[str, Any]) -> dict[str, Any]:
            try:
                with redirect_stdout(StringIO()):  # RecBole prints the test result of a trial
                    outcome: dict[str, Any] = super().trial(params)
            except _Failed:
                outcome = {"status": hyperopt.STATUS_FAIL}
            if records[-1] is not recorded.get(len(records) - 1):
                search.report(records[-1], records)
            return outcome

        def run(self) -> None:
            with suppress(hyperopt.exceptions.AllTrialsFailed):
                hyperopt.fmin(
                    self.trial,
                    self.space,
                    algo=self.algo,
                    max_evals=self.max_evals,
                    rstate=np.random.default_rng(search.seed),
                    show_progressbar=False,
                )

    algo: Any = search.algo
    if algo == "exhaustive":
        algo = functools.partial(_next_point, _hyperopt_grid(search))
    space = {name: _hyperopt_node(hyperopt.hp, p) for name, p in search.space.items()}
    Tuning(objective, space=space, algo=algo, max_evals=search.n_trials).run()
    return records


def _hyperopt_node(hp: Any, parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return hp.choice(parameter.name, parameter.labels)
    return getattr(hp, parameter.kind)(parameter.name, *parameter.values)


def _hyperopt_grid(search: Search) -> list[dict[str, Any]]:
    """The grid as hyperopt stores it: a choice is the index of its value."""
    return [
        {
            name: parameter.labels.index(point[name]) if parameter.kind == "choice" else point[name]
            for name, parameter in search.space.items()
        }
        for point in grid(search.space)
    ]


def _next_point(
    points: Sequence[Mapping[str, Any]], new_ids: list[int], domain: Any, trials: Any, seed: int
) -> list[Any]:
    """A suggest function of hyperopt: trial ``n`` gets point ``n``."""
    documents: list[Any] = []
    for number in new_ids:
        if number < len(points):
            misc = {
                "tid": number,
                "cmd": domain.cmd,
                "workdir": domain.workdir,
                "idxs": {name: [number] for name in points[number]},
                "vals": {name: [value] for name, value in points[number].items()},
            }
            documents += trials.new_trial_docs([number], [None], [domain.new_result()], [misc])
    return documents


def _read_records(path: Path) -> dict[int, Record]:
    """Records by number; the last line may be half written."""
    records: dict[int, Record] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[record.pop("number")] = record
    return records


def _append_record(path: Path, number: int, record: Record) -> None:
    try:
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            # after a line that a kill has cut, a new one
            file.write("\n" + json.dumps({"number": number, **record}) + "\n")
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written ({error.strerror or error})") from error


# ------------------------------------------------------------------------- Optuna


def by_optuna(search: Search, optuna: Any, storage: str | None) -> list[Record]:
    """Search with Optuna; several processes with the same storage share the trials.

    A trial counts if it is complete or has failed for a recorded reason. One whose process has
    died, or was interrupted, is queued again with its values, by the first to notice.
    """
    states = optuna.trial.TrialState

    def counts(trial: Any) -> bool:
        return trial.state in (states.COMPLETE, states.RUNNING, states.WAITING) or (
            trial.state == states.FAIL and "record" in trial.user_attrs
        )

    def recorded() -> list[Record]:
        return [
            trial.user_attrs["record"]
            for trial in study.get_trials(deepcopy=False)
            if trial.state in (states.COMPLETE, states.FAIL) and "record" in trial.user_attrs
        ]

    with _quiet(optuna):
        study, queue_again = _study(search, optuna, storage)
        running: list[int] = []

        def objective(trial: Any) -> float:
            running[:] = [trial.number]
            trials = study.get_trials(deepcopy=False)
            before = trials[: trial.number]
            if sum(map(counts, before)) >= search.n_trials:
                raise optuna.TrialPruned("another process has begun the last trial")
            # what is drawn depends on the place of a trial, whoever runs it and how often
            first = trials[trial.number].system_attrs.get("failed_trial", trial.number)
            # one that was given up at once, because others had the last, took no place
            place = sum(
                "failed_trial" not in t.system_attrs and t.state != states.PRUNED
                for t in trials[:first]
            )
            study.sampler = _sampler(optuna, search, place)
            values = search.configuration(
                {p.name: _suggest(trial, p) for p in search.space.values()}
            )
            record = search.trial(values, recorded())
            trial.set_user_attr("record", record)
            if record["error"] is not None:
                raise _Failed
            return float(record["score"])

        while True:
            optuna.storages.fail_stale_trials(study)
            trials = study.get_trials(deepcopy=False)
            begun = sum(map(counts, trials))
            if begun < search.n_trials or any(t.state == states.WAITING for t in trials):
                try:
                    study.optimize(objective, n_trials=1, catch=(_Failed,))
                except BaseException:
                    for number in running:
                        queue_again(study, study.trials[number])
                    raise
                records = recorded()
                mine = study.trials[running[0]].user_attrs.get("record")
                if mine is not None:
                    search.report(mine, records)
            elif any(t.state == states.RUNNING for t in trials):
                time.sleep(min(HEARTBEAT_SECONDS, 2))  # another process has them, or had
            else:
                return recorded()


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's own lines, and its notes on parts that may still change."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(level)


def _study(
    search: Search, optuna: Any, storage: str | None
) -> tuple[Any, Callable[[Any, Any], None]]:
    """The study in its database, and what queues an interrupted trial of it again."""
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    url = storage or f"sqlite:///{search.folder / 'study.db'}"
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()

    def queue_again(study: Any, trial: Any) -> None:
        # one that was killed after its record was kept counts as it is
        if trial.state == optuna.trial.TrialState.FAIL and "record" not in trial.user_attrs:
            retry(study, trial)

    name = f"{search.settings['model']} {search.settings['dataset']}"
    try:
        study = optuna.create_study(
            storage=_storage(optuna, url, queue_again),
            study_name=name,
            direction="maximize" if search.bigger else "minimize",
            sampler=_sampler(optuna, search, 0),
            load_if_exists=True,
        )
        before = study.user_attrs.get("settings")
        if before is None:
            study.set_user_attr("settings", dict(search.settings))
        else:
            check_same(before, search.settings, f"study {name!r} of {url}")
    except ArgumentError as error:
        raise InputError(
            f"storage {url!r} is no database URL ({error}); for example sqlite:///study.db"
        ) from error
    except (ImportError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        # without the statement that SQLAlchemy appends
        raise EnvironmentFault(f"storage {url!r}: {getattr(error, 'orig', error)}") from error
    return study, queue_again


def _storage(optuna: Any, url: str, retry: Callable[..., None], attempts: int = 3) -> Any:
    """The database; its tables are made if there are none."""
    from sqlalchemy.exc import DBAPIError

    try:
        return optuna.storages.RDBStorage(
            url,
            # several processes write: wait for each other
            engine_kwargs={"connect_args": {"timeout": 60}} if "sqlite" in url else None,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=retry,
        )
    except DBAPIError:  # for one, another process was making the tables
        if attempts == 1:
            raise
        time.sleep(1)
        return _storage(optuna, url, retry, attempts - 1)


def _sampler(optuna: Any, search: Search, place: int) -> Any:
    """The sampler of the trial in this place of the search."""
    seed = int(np.random.SeedSequence((search.seed, place)).generate_state(1)[0])
    if search.algo != "bayes":
        drawn_at_random = optuna.samplers.RandomSampler(seed=seed)
        if search.algo == "random":
            return drawn_at_random
        # Optuna's GridSampler goes by the number of a trial, which a trial run again shifts
        return optuna.samplers.PartialFixedSampler(grid(search.space)[place], drawn_at_random)
    # constant_liar: what other processes are trying counts as tried
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _suggest(trial: Any, parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return trial.suggest_categorical(parameter.name, parameter.labels)
    low, high = parameter.bounds
    step = parameter.values[2] if parameter.kind == "quniform" else None
    return trial.suggest_float(
        parameter.name, low, high, step=step, log=parameter.kind == "loguniform"
    )


# ------------------------------------------------------------------------- Ray Tune


def by_ray(search: Search, ray: Any, storage: str | None) -> list[Record]:
    """Search with Ray Tune, on this machine or, with ``RAY_ADDRESS`` set, on a cluster.

    Each trial gets one core, and a GPU if there are any. An interrupted search continues from what
    Ray has stored; trials that had not finished begin anew.
    """
    from ray import tune

    place = storage or str(search.folder / "ray")
    if "://" not in place:
        place = str(Path(place).resolve())
    name = _ray_name(search.settings)
    here = Path.cwd()

    def trainable(drawn: dict[str, Any]) -> dict[str, Any]:
        # RecBole would undo the choice of GPU that Ray made for this process
        machine = {"gpu_id": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
        with compat.working_directory(here), compat.without_recboles_warnings():
            record = search.trial(search.configuration(drawn), machine=machine)
        failed = record["error"] is not None
        worst = -math.inf if search.bigger else math.inf
        return {"score": worst if failed else record["score"], "record": json.dumps(record)}

    class Report(tune.Callback):
        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            search.report(_ray_record(trial), [_ray_record(t) for t in trials if _is_done(t)])

    resources = {"cpu": 1, "gpu": int(search.use_gpu)}
    with _ray_cluster(ray):
        if tune.Tuner.can_restore(f"{place}/{name}"):
            tuner = tune.Tuner.restore(
                f"{place}/{name}",
                tune.with_resources(trainable, resources),
                restart_errored=True,
            )
        else:
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                param_space={n: _ray_domain(search, tune, p) for n, p in search.space.items()},
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max" if search.bigger else "min",
                    num_samples=1 if search.algo == "exhaustive" else search.n_trials,
                    search_alg=_ray_search(search),
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=place,
                    failure_config=tune.FailureConfig(fail_fast=True),
                    callbacks=[Report()],
                    verbose=0,
                ),
            )
        results = tuner.fit()
        for error in results.errors:
            # what the trial raised, without the traceback of the other process
            raise getattr(error, "cause", None) or error
        # what Ray reads back comes in any order
        found = sorted((r.metrics for r in results), key=lambda m: (m["timestamp"], m["trial_id"]))
        return [json.loads(metrics["record"]) for metrics in found]


def _ray_name(settings: Mapping[str, Any]) -> str:
    """Of the folder in the storage; a search with other settings is another one."""
    of_settings = fingerprint([json.dumps(settings, sort_keys=True)])
    return f"{settings['dataset']}-{settings['model']}-{of_settings}"


@contextmanager
def _ray_cluster(ray: Any) -> Iterator[None]:
    """Ray, started if nobody has, and stopped again."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def _ray_domain(search: Search, tune: Any, parameter: Parameter) -> Any:
    if search.algo == "exhaustive":
        return tune.grid_search(parameter.points())
    if parameter.kind == "choice":
        return tune.choice(parameter.labels)
    step = parameter.values[2:] if parameter.kind == "quniform" else ()
    return getattr(tune, parameter.kind)(*parameter.bounds, *step)


def _ray_search(search: Search) -> Any:
    if search.algo != "bayes":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=search.seed)
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=search.seed)
    except (ImportError, AssertionError) as error:
        raise EnvironmentFault(
            "ray searches with optuna for bayes: pip install 'recbole-mm[optuna]', or use random"
        ) from error


def _is_done(trial: Any) -> bool:
    return "record" in (trial.last_result or {})


def _ray_record(trial: Any) -> Record:
    record: Record = json.loads(trial.last_result["record"])
    return record
