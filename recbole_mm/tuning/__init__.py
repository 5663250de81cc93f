"""Search for hyper-parameters, by validation only: RecBole's ``HyperTuning``, Optuna or Ray Tune.

Every trial is one :func:`recbole_mm.run`, or with ``seeds`` several, scored by their mean. All have
the same data, seeds and protocol, and the test set is never scored. A search leaves, below its
output folder::

    <dataset>/<Model>.yaml             the best configuration, for `run --config_files` and
                                       `compare --tuned`
    <dataset>/<Model>/search.json      what was searched, and how
    <dataset>/<Model>/trials.csv       every trial, failed ones included
    <dataset>/<Model>/trials.html      score by trial and by parameter, one page
    <dataset>/<Model>/trials.jsonl     what an interrupted search continues from; with optuna
                                       `study.db`, with ray the folder `ray`
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recbole_mm import compat
from recbole_mm.config import Config, listed
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.registry import is_users, name_of
from recbole_mm.tuning import engines
from recbole_mm.tuning.outputs import write_outputs
from recbole_mm.tuning.search import Search, settings_of
from recbole_mm.tuning.space import check_space, default_space, grid, read_space

ENGINES = {"recbole": "hyperopt", "optuna": "optuna", "ray": "ray"}
"""Engine -> the package that it needs, and the extra of that name."""
ALGORITHMS = ("exhaustive", "random", "bayes")

_OLDEST = {"hyperopt": (0, 2, 6), "optuna": (4, 9), "ray": (2, 31)}


def tune(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str | Path] | str | Path | None = None,
    config_dict: Mapping[str, Any] | None = None,
    *,
    params_file: str | Path | None = None,
    engine: str = "optuna",
    algo: str = "bayes",
    trials: int | None = None,
    storage: str | None = None,
    seed: int | None = None,
    seeds: int = 1,
    out: str | Path = "tuned",
    command_line: Sequence[str] = (),
) -> dict[str, Any]:
    """Search for the configuration with the best validation score.

    The same call continues an interrupted search: finished trials are read back, one that was
    killed is run again, and with more ``trials`` it goes on (not with ray).

    Args:
        model: Name of the model, or a class, of which ``module:Class`` is the name; a name may
            stand in a configuration file.
        dataset: Name of the data set; it may stand there too.
        config_file_list: as :func:`recbole_mm.run`
        config_dict: as :func:`recbole_mm.run`; the values of a trial are stronger.
        params_file: Search space in RecBole's ``hyper.test`` syntax
            (:mod:`recbole_mm.tuning.space`); by default that of the package for the model.
        engine: ``recbole`` (its ``HyperTuning``, extra ``hyperopt``), ``optuna`` or ``ray`` (extras
            of the same name).
        algo: ``exhaustive`` (every combination; choices and ``quniform`` only), ``random``, or
            ``bayes`` (tree-structured Parzen estimator).
        trials: How many; by default 20, or every combination with ``exhaustive``.
        storage: optuna: URL of a database that several processes or machines may share, by default
            a sqlite file in the output folder. ray: a folder that all machines see; ray keeps
            pickles there, so give it none that others can write.
        seed: Of the search and of every trial; by default the configuration's.
        seeds: How many runs a trial is, with ``seed`` and the seeds that follow it. Its score is
            their mean: the best of many trials with one seed is in part that seed's luck.
        out: Folder of the results.
        command_line: ``--key=value`` arguments, for every trial.

    Returns:
        ``best`` (values of the best trial), ``best_valid_score``, ``best_valid_result``,
        ``valid_metric``, ``trials`` and ``failed`` (counts), ``config`` (path of the best
        configuration), ``folder`` (of everything else) and ``data_path`` (if it was set).

    Raises:
        InputError: Bad input, before the first trial or in one.
        EnvironmentFault: The engine is not installed, or the disk says no.
        NumericalError: If every trial failed.
        OutOfMemory: If every trial failed for lack of memory.
    """
    for name, value, known in (("engine", engine, [*ENGINES]), ("algo", algo, ALGORITHMS)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if trials is not None and trials < 1:
        raise InputError(f"trials must be at least 1, got {trials}")
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    if engine == "recbole" and storage is not None:
        raise InputError("storage is for optuna and ray; recbole continues from the output folder")
    files = [Path(file).resolve() for file in listed(config_file_list)]
    values = dict(config_dict or {}) if seed is None else {**(config_dict or {}), "seed": seed}
    with compat.without_recboles_warnings():
        config = Config(model, dataset, files, values, command_line)
    if seed is not None and config["seed"] != seed:
        raise InputError(f"the seed is {seed} and, on the command line, {config['seed']}")
    file = default_space(config["model"]) if params_file is None else params_file
    space = check_space(read_space(file), config, command_line)
    default = len(grid(space)) if algo == "exhaustive" else 20
    n_trials = default if trials is None else trials
    if algo == "exhaustive":
        n_trials = min(n_trials, default)
    # that of a class of the user's own says where it is, which the configuration does not
    own = model is None and is_users(config.model_class)
    name = name_of(config.model_class) if own else config["model"]
    search = Search(
        model=model if model is not None else name,
        files=tuple(files),
        values=values,
        command_line=tuple(command_line),
        space=space,
        algo=algo,
        n_trials=n_trials,
        out=Path(out).resolve(),
        seed=config["seed"],
        n_seeds=seeds,
        metric=config["valid_metric"],
        bigger=config["valid_metric_bigger"],
        show=config["show_progress"],
        use_gpu=config["device"].type == "cuda",
        settings=settings_of(config, space, engine, algo, n_trials, seeds),
    )
    package = _engine(engine)
    search.begin()
    records = getattr(engines, f"by_{engine}")(search, package, storage)
    return write_outputs(search, config, records)


def _engine(engine: str) -> Any:
    """The package of an engine, imported; old and missing ones are refused."""
    package = ENGINES[engine]
    mend = f"pip install 'recbole-mm[{package}]'"
    try:
        found = version(package)
        numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
        if numbers < _OLDEST[package]:
            reason = "; it is what RecBole 1.2.1 requires" if package == "ray" else ""
            raise EnvironmentFault(
                f"{package} {found} is too old for the engine {engine}{reason}: {mend}"
            )
        # ray without its extra [tune] fails only there
        importlib.import_module("ray.tune" if package == "ray" else package)
        return importlib.import_module(package)
    except ImportError as error:
        raise EnvironmentFault(f"the engine {engine} needs {package} ({error}): {mend}") from error
