"""From a configuration to a result: data, model, training, evaluation, run folder.

RecBole's own ``recbole.quick_start`` is never imported: it imports ray.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import recbole
import torch
from recbole.data import data_preparation
from recbole.utils import ModelType, init_seed

from recbole_mm import compat, distributed, explain, protocol, serving
from recbole_mm.allocator import keeping_freed_memory
from recbole_mm.checkpoint import Checkpoint
from recbole_mm.config import Config, reads_columns, reads_features
from recbole_mm.data.batches import count_targets
from recbole_mm.data.cold_start import keep_histories
from recbole_mm.data.create import create_dataset
from recbole_mm.errors import EnvironmentFault, InputError, OutOfMemory, RecboleMMError
from recbole_mm.registry import is_own, is_users
from recbole_mm.run_folder import DAMAGED, RunFolder, changed_since, environment
from recbole_mm.trainer import trainer_class

_LOG = logging.getLogger(__name__)


def run(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str | Path | Mapping[str, Any]] | str | Path | None = None,
    config_dict: Mapping[str, Any] | None = None,
    *,
    saved: bool = True,
    score_test: bool = True,
    resume: str | Path | None = None,
    nproc: int = 1,
    command_line: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a model, select its best epoch on validation, and score that epoch once on test.

    Args:
        model: Name of a model of this package or of RecBole, or a class, of which ``module:Class``
            is the name.
        dataset: Name of the data set.
        config_file_list: YAML files, or one, later ones stronger; a mapping stands for a file's
            contents.
        config_dict: Values by key, stronger than files.
        saved: Write a run folder below ``checkpoint_dir``. Without one the best weights are kept
            in memory.
        score_test: Score the test set; without it ``test_result`` is empty. Trials of a search
            leave it alone.
        resume: Folder of an interrupted run, which is continued: on a CPU its weights, metrics and
            result become what they would have been without the interruption. Nothing else of the
            configuration may be given but :data:`MAY_CHANGE`; a finished run is returned as it is.
        nproc: Number of processes that share every batch, each with a GPU of ``gpu_id``, or all on
            the CPU. A program that calls this needs ``if __name__ == "__main__"``, since the
            processes import it.
        command_line: ``--key=value`` arguments, strongest of all.

    Returns:
        ``model``, ``dataset``, ``best_epoch``, ``epochs``, ``best_valid_score``,
        ``valid_score_bigger``, ``best_valid_result``, ``test_result``, ``protocol``, ``data``,
        ``parameters`` (trainable), ``seconds`` and ``run`` (the folder, or ``None``). Without
        validation ``best_valid_score`` and ``best_valid_result`` are ``None``.

    Raises:
        InputError: Bad input or configuration.
        EnvironmentFault: A package or the disk says no.
        OutOfMemory: The device has no memory for it.
        NumericalError: A loss or score is not finite.
    """
    with compat.without_recboles_warnings():
        if nproc != 1:
            if resume is not None:
                raise InputError("resume: only one process can, leave nproc out")
            config = Config(model, dataset, config_file_list, config_dict, command_line)
            one = functools.partial(
                run,
                *(model, dataset, config_file_list, config_dict),
                saved=saved,
                score_test=score_test,
                command_line=command_line,
            )
            return distributed.launch(nproc, _check_processes(config, nproc), one)
        if resume is None:
            config = Config(model, dataset, config_file_list, config_dict, command_line)
            with _memory_mends(config):
                return _run(config, saved=saved, score_test=score_test)
        # a class is given, a name only compared
        is_class = isinstance(model, type) or (model is not None and is_own(model))
        named = {"model": None if is_class else model, "dataset": dataset}
        values = {k: v for k, v in named.items() if v is not None} | dict(config_dict or {})
        if config_file_list or not saved:
            raise InputError("resume: the configuration is that of the run folder, give no file")
        given = model if is_class else None
        return _resume(Path(resume), given, values, command_line, score_test=score_test)


_MEMORY_KEYS = ("train_batch_size", "MAX_ITEM_LIST_LENGTH", "loss_memory_mb", "eval_memory_mb")


@contextmanager
def _memory_mends(config: Config) -> Iterator[None]:
    """Say what to do when memory or disk are used up, instead of a traceback."""
    try:
        yield
    except RecboleMMError:
        raise
    except OSError as error:  # at files of others: the log, TensorBoard's events, scratch
        reason = error.strerror or str(error)
        is_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not is_disk and "temporary directory" not in reason:
            raise
        raise EnvironmentFault(
            f"{config['model']} on {config['dataset']}: a file cannot be written ({reason}); free "
            "space, or point checkpoint_dir, and TMPDIR for scratch, at folders that can be written"
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for GPUs only
        refused = ("allocate memory", "not enough memory", "out of memory")
        is_memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not is_memory and not any(words in str(error) for words in refused):
            raise
        said = str(error).splitlines() or [type(error).__name__]
        device = config["device"].type
        mends = [f"{key} (now {config[key]})" for key in _MEMORY_KEYS if config[key] is not None]
        if device == "cuda" and not config["enable_amp"]:
            mends.append("or set enable_amp: True")
        raise OutOfMemory(
            f"{config['model']} on {config['dataset']}: out of memory on {device} "
            f"({said[0]}); lower {', '.join(mends)}"
        ) from error


def _not_installed(config: Config, error: ModuleNotFoundError) -> EnvironmentFault:
    return EnvironmentFault(
        f"{config['model']} needs the package {error.name}, which is not installed"
    )


@contextmanager
def _recboles_refusals(config: Config) -> Iterator[None]:
    """Say as bad input what RecBole's data sets refuse with an exception of Python.

    An exception that our own code raises is a fault of ours and keeps its traceback.
    """
    try:
        yield
    except RecboleMMError:
        raise
    except ModuleNotFoundError as error:  # KGAT's graph imports dgl
        raise _not_installed(config, error) from error
    except (AssertionError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        modules = [
            frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        known = [name for name in modules if name.startswith(("recbole.", "recbole_mm."))]
        if not known[-1].startswith("recbole."):
            raise
        raise InputError(
            f"{config['model']} on {config['dataset']}: RecBole refuses the data or a key "
            f"({type(error).__name__}: {error}); check the keys that this names, load_col and the "
            "keys that name columns"
        ) from error


def _check_processes(config: Config, nproc: int) -> str:
    """Refuse what several processes cannot do; the type of their device."""
    if nproc < 1:
        raise InputError(f"nproc must be at least 1, got {nproc}")
    trainer: Any = trainer_class(config["MODEL_TYPE"], config.model_class)
    if not trainer.shareable:
        raise InputError(
            f"{config['model']} cannot be trained by {nproc} processes: RecBole's "
            f"{trainer.__name__} does more than steps along a gradient; leave nproc out"
        )
    if config["train_batch_size"] < nproc:
        raise InputError(
            f"train_batch_size {config['train_batch_size']} is what {nproc} processes share: "
            "each needs a row"
        )
    device: str = config["device"].type
    n_gpus = torch.cuda.device_count()
    if device == "cuda" and n_gpus < nproc:
        raise InputError(
            f"nproc {nproc}, but gpu_id {config['gpu_id']!r} gives {n_gpus} GPUs: name one for "
            f"each process, gpu_id: '{','.join(map(str, range(nproc)))}', or set use_gpu: False"
        )
    return device


def objective_function(
    config_dict: Mapping[str, Any] | None = None,
    config_file_list: Sequence[str | Path] | None = None,
    saved: bool = False,
    score_test: bool = False,
) -> dict[str, Any]:
    """What RecBole's ``HyperTuning`` calls for each trial, with the first two arguments.

    [ours]: by default a trial leaves no run folder and does not score the test set; RecBole's own
    objective writes a checkpoint for every trial and shows its test result.

    Raises:
        as :func:`run`
    """
    values = {"show_progress": False, **(config_dict or {})}
    return run(
        config_file_list=config_file_list,
        config_dict=values,
        saved=saved,
        score_test=score_test,
    )


def open_run(
    folder: str | Path,
    config_dict: Mapping[str, Any] | None = None,
    *,
    model: str | type | None = None,
    command_line: Sequence[str] = (),
) -> OpenRun:
    """Read a run folder back: its configuration, its data, and its model with the best weights.

    What the weights depend on is compared with what the folder says: items, interactions of each
    part, order of the ids, feature files.

    Args:
        folder: A folder that :func:`run` wrote.
        config_dict: Values stronger than those of the folder, for example ``data_path`` (the
            folder above that of the data set) if the data have moved.
        model: Class of the model, or ``module:Class``, if the package does not know its name.
        command_line: ``--key=value`` arguments, strongest of all.

    Returns:
        ``(config, dataset, (train_data, valid_data, test_data), model)``; the model is in
        evaluation mode, on the device that this machine offers.

    Raises:
        InputError: If the folder holds no weights, or its data are others by now. Of a run that
            is not finished the best weights so far are read, with a warning.
    """
    path = Path(folder)
    with compat.without_recboles_warnings():
        saved = _saved_model(path)
        config = Config.reopened(path / "config.yaml", model, config_dict, command_line)
        made = _make(config)
        _check_data(path, made)
        serving.load_best(made.model, saved, path)
    serving.warn_of_unfinished(path)
    return OpenRun(config, made.dataset, made.loaders, made.model)


class OpenRun(NamedTuple):
    """A run read back from its folder; see :func:`open_run`."""

    config: Config
    dataset: Any  # of the whole, before the split
    loaders: tuple[Any, Any, Any]  # train, valid, test
    model: Any  # RecBole's AbstractRecommender, untyped


class _Made(NamedTuple):
    """What a configuration and its files make, before anything is trained or loaded."""

    dataset: Any
    loaders: tuple[Any, Any, Any]
    rules: protocol.Protocol
    model: Any
    data: dict[str, Any]


def _make(config: Config) -> _Made:
    init_seed(config["seed"], config["reproducibility"])
    with _recboles_refusals(config):
        dataset = create_dataset(config)
    if dataset.uid_field is None:
        raise InputError(
            "USER_ID_FIELD and ITEM_ID_FIELD: a run knows its users and items by them, name both"
        )
    _check_topk(config, dataset.item_num - 1)
    _check_label(config, dataset)
    _check_columns(config, dataset)
    if distributed.n_processes() > 1 and set(config["eval_args"]["mode"].values()) == {"full"}:
        # enough batches for everyone; sampled candidates depend on what is in a batch
        share = math.ceil(dataset.user_num / distributed.n_processes())
        config["eval_batch_size"] = min(config["eval_batch_size"], share)
    config["eval_batch_size"] *= _eval_batch_unit(config, dataset.item_num)
    with _recboles_refusals(config):
        loaders = data_preparation(config, dataset)
    count_targets(loaders[0], config["train_batch_size"])
    processes = distributed.n_processes()
    if (rows := getattr(loaders[0], "step", processes)) < processes:
        raise InputError(
            f"train_batch_size {config['train_batch_size']} makes batches of {rows} rows, which "
            f"{processes} processes share: each needs one; raise it"
        )
    keep_histories(loaders)
    rules = protocol.describe(config, tuple(loader._dataset for loader in loaders))
    if not rules.test_users:
        split = config["eval_args"]["split"]
        reason = (
            "is long enough for a test row: a user needs at least 3 interactions for leave-one-out"
        )
        if "LS" not in split and config["benchmark_filename"] is None:
            reason = (
                f"has a row in the test part of the split {split}: too few, or late, interactions"
            )
        raise InputError(f"no user of {config['dataset']} {reason}")
    init_seed(config["seed"], config["reproducibility"])
    try:
        with _recboles_refusals(config):
            net = config.model_class(config, loaders[0]._dataset).to(config["device"])
    except RecboleMMError:
        raise
    except ValueError as error:
        # the parts of a model check their sizes and choices where they use them; of a fault in the
        # user's own code the traceback says more
        if is_users(config.model_class) and not _raised_in_packages(error):
            raise
        raise InputError(f"{config['model']}: {error}") from error
    return _Made(dataset, loaders, rules, net, _data_summary(config, dataset))


def _raised_in_packages(error: Exception) -> bool:
    """Whether RecBole or this package has raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    homes = (Path(__file__).parent, Path(recbole.__file__).parent)
    return any(Path(frame.filename).is_relative_to(home) for home in homes)


def _eval_batch_unit(config: Config, n_items: int) -> int:
    """What RecBole counts for one user in ``eval_batch_size``, which here means users."""
    modes = set(config["eval_args"]["mode"].values())
    if "full" in modes:
        return 1 if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else n_items
    # pairs of a user and a candidate; interactions that have labels count as they are
    return max((1 + int(mode[3:]) for mode in modes if mode != "labeled"), default=1)


def _run(
    config: Config, *, saved: bool, score_test: bool, interrupted: RunFolder | None = None
) -> dict[str, Any]:
    started = time.perf_counter()
    if distributed.rank():  # the first process does the talking and the writing
        config["show_progress"], saved = False, False
    resolved = config.resolved()  # before RecBole's steps write into it
    made = _make(config)
    dataset, (train_data, valid_data, test_data), rules, net, data = made
    folder = interrupted
    if interrupted is not None:
        _check_data(interrupted.path, made)
    elif saved:
        folder = RunFolder(config["checkpoint_dir"], config["dataset"], config["model"])
    with ExitStack() as stack:
        if compat.is_recboles(config.model_class) and config["device"].type == "cpu":
            # our models take large blocks apart, and of sizes that differ: less time, more memory
            stack.enter_context(keeping_freed_memory())
        if folder is not None:
            stack.enter_context(folder.held())
            stack.enter_context(folder.logging_to_file(config["state"]))
        if interrupted is not None:
            began = interrupted.read_json("environment.json")
            if changed := changed_since(began, config.model_class):
                data["lines"].append(
                    f"warning: this run began with another state of things ({'; '.join(changed)}): "
                    "it goes on, but does not end as if nothing had happened"
                )
            # a finished run that gets more epochs is unfinished until it has a result again
            interrupted.remove("result.json")
            interrupted.write_yaml("config.yaml", resolved)
        elif folder is not None:
            _write_start(folder, config, resolved, dataset, data, rules)
            kept = serving.item_constants(net, train_data._dataset)
            if kept is not None:
                folder.write_items(*kept)
        for line in (*data["lines"], rules.line()):
            _LOG.info(line)
            if config["show_progress"]:
                print(line)  # noqa: T201  (the report of a run belongs on the terminal)
        if folder is not None and config["show_progress"]:
            print(f"run folder: {os.path.relpath(folder.path)}")  # noqa: T201  (for --resume)
        _LOG.info(net)
        trainer = trainer_class(config["MODEL_TYPE"], config.model_class)(config, net, folder)
        if interrupted is not None:
            state = interrupted.read_state()
            trainer.resume(state)
            started -= _seconds_before(state)
        try:
            best_score, best_result = trainer.fit(
                train_data,
                valid_data if rules.valid_users else None,
                saved=True,
                show_progress=config["show_progress"],
            )
        except ModuleNotFoundError as error:  # RecBole imports faiss, for one, in the middle
            raise _not_installed(config, error) from error
        except KeyError as error:
            drawn = (f"{config['NEG_PREFIX']}{config['ITEM_ID_FIELD']}", config["LABEL_FIELD"])
            has_drawn = config["train_neg_sample_args"]["distribution"] != "none"
            if has_drawn or error.args[0] not in drawn:
                raise
            raise InputError(
                f"train_neg_sample_args: {config['model']} learns from drawn items and finds none; "
                "leave the key out, or set {distribution: uniform, sample_num: 1}"
            ) from error
        test_result = trainer.evaluate(test_data, show_progress=False) if score_test else {}
        result = {
            "model": config["model"],
            "dataset": config["dataset"],
            "best_epoch": trainer.best_epoch,
            "epochs": len(trainer.history),
            # RecBole's -inf of a run that was not validated is no JSON
            "best_valid_score": float(best_score) if best_result else None,
            "valid_score_bigger": config["valid_metric_bigger"],
            "best_valid_result": (
                {key: float(value) for key, value in best_result.items()} if best_result else None
            ),
            "test_result": {key: float(value) for key, value in test_result.items()},
            "protocol": rules.as_dict(),
            "data": data,
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
            "seconds": round(time.perf_counter() - started, 2),
            "run": str(folder.path) if folder is not None else None,
        }
        if folder is not None:
            folder.write_json("result.json", result)
        _LOG.info("test: %s", result["test_result"])
        if folder is not None and config["explain"] and score_test:  # scored: best weights loaded
            try:
                _explain(folder.path, net, dataset, (train_data, valid_data, test_data))
            except EnvironmentFault as error:  # the run itself is done
                _LOG.warning("%s", error)
    return result


def explain_run(
    folder: str | Path,
    items: Sequence[str] | None = None,
    *,
    model: str | type | None = None,
    command_line: Sequence[str] = (),
) -> list[Path]:
    """Write what the model of a run tells of itself to ``<folder>/explain``, CSV files and plots.

    Args:
        folder: A folder that :func:`run` wrote.
        items: Tokens of the items to show, where items are shown; ``None`` for the most popular.
        model: As in :func:`open_run`.
        command_line: Likewise.

    Returns:
        The files.

    Raises:
        InputError: as :func:`open_run`, or if the model has no ``explain``, shows no single items
            although some are named, or there is no such item
        EnvironmentFault: If the disk says no, or, after the CSV files are written, if matplotlib
            is missing.
    """
    _, dataset, loaders, net = open_run(
        folder, {"explain": True}, model=model, command_line=command_line
    )
    return _explain(Path(folder), net, dataset, loaders, items)


def _explain(
    folder: Path,
    net: Any,
    dataset: Any,
    loaders: Sequence[Any],
    items: Sequence[str] | None = None,
) -> list[Path]:
    if items is not None and not getattr(net, "explains_items", False):
        raise InputError(
            f"items: what {type(net).__name__} tells of itself is not of single items; leave it out"
        )
    material = explain.gather(net, dataset, loaders, items)
    files = explain.write(net.explain(material), folder)
    _LOG.info("explained in %s: %s", folder / "explain", ", ".join(file.name for file in files))
    return files


# keys that may differ when a run is resumed: none of them changes what an epoch computes
MAY_CHANGE = frozenset(
    {
        *("epochs", "data_path", "checkpoint_dir", "feature_cache_dir", "checkpoint_minutes"),
        *("use_gpu", "gpu_id", "device", "worker", "show_progress", "state"),
    }
)


def _resume(
    folder: Path,
    model: str | type | None,
    values: Mapping[str, Any],
    command_line: Sequence[str],
    *,
    score_test: bool,
) -> dict[str, Any]:
    run = RunFolder.at(folder)
    before = run.read_config()
    config = Config.reopened(folder / "config.yaml", model, values, command_line)
    now = config.resolved()
    differing = [
        f"{key} ({before[key]!r} then, {now[key]!r} now)"
        for key in before.keys() & now.keys() - MAY_CHANGE
        if before[key] != now[key]
    ]
    # RecBole validates after the last epoch at the latest, wherever that was
    if min(before["eval_step"], before["epochs"]) != min(now["eval_step"], now["epochs"]):
        differing.append(
            f"epochs ({before['epochs']} then, {now['epochs']} now: with an eval_step of "
            f"{now['eval_step']} epochs that were validated would not have been)"
        )
    if differing:
        raise InputError(
            f"{folder}: a resumed run goes on as it began, but these keys differ: "
            f"{', '.join(sorted(differing))}; leave them out, or start a new run"
        )
    if (folder / "result.json").is_file() and now["epochs"] <= before["epochs"]:
        if config["show_progress"]:
            print(f"{folder}: this run is finished, nothing is left to do")  # noqa: T201
        return {**run.read_json("result.json"), "run": str(run.path)}  # it may have been moved
    if not (folder / "last.safetensors").is_file():
        raise InputError(
            f"{folder}: has no last.safetensors: its run was interrupted before its training, or "
            f"had several processes, or {config['model']} cannot be resumed; start it again"
        )
    # as many threads as before: sums in another order have other last digits
    threads = torch.get_num_threads()
    torch.set_num_threads(run.read_json("environment.json").get("threads", threads))
    try:
        with _memory_mends(config):
            return _run(config, saved=True, score_test=score_test, interrupted=run)
    finally:
        torch.set_num_threads(threads)


def _seconds_before(state: Checkpoint) -> float:
    """By the clock, of the epochs that an interrupted run had trained and validated."""
    spent = [n["train_seconds"] + n.get("valid_seconds", 0.0) for n in state.about["history"]]
    if state.about["position"]["batch"]:  # in the midst of one more
        spent.append(state.about["of_epoch"]["seconds"][0])
    return math.fsum(spent)


def _check_topk(config: Config, n_items: int) -> None:
    if max(config["topk"]) > n_items:
        raise InputError(
            f"topk {config['topk']} asks for more than the {n_items} items of {config['dataset']}: "
            f"set topk to at most {n_items}"
        )


def _check_label(config: Config, dataset: Any) -> None:
    """RecBole fails in the first batch of a model that learns from labels, and finds none."""
    label = config["LABEL_FIELD"]
    drawn = (config["train_neg_sample_args"] or {}).get("distribution", "none") != "none"
    learns = config["MODEL_TYPE"] == ModelType.CONTEXT
    if learns and not drawn and label not in dataset.inter_feat:
        raise InputError(
            f"{config['model']} learns from labels, but the interactions of {config['dataset']} "
            f"have no column {label!r} (LABEL_FIELD): make it of another one, for example "
            "threshold: {rating: 4} with rating in load_col.inter, or draw negatives, "
            "train_neg_sample_args: {distribution: uniform, sample_num: 1}"
        )


def _check_columns(config: Config, dataset: Any) -> None:
    """RecBole's models for columns of ``.item`` fail at one of numbers that is not embedded."""
    columns = config["selected_features"] if reads_columns(config["model"]) else ()
    for field in columns:
        if field not in dataset.field2type:
            raise InputError(
                f"selected_features: {field} is not loaded; add it to load_col.item, or leave "
                "load_col.item out"
            )
        kind = dataset.field2type[field].value
        if "float" in kind and field not in (config["numerical_features"] or ()):
            raise InputError(
                f"selected_features: {field} is of type {kind}, and {config['model']} embeds "
                f"numbers only with numerical_features: [{field}]; add that, or leave {field} out"
            )


def _data_summary(config: Config, dataset: Any) -> dict[str, Any]:
    """Counts and feature reports; features are loaded for the models that consume them."""
    report = dataset.report
    lines = list(report.lines())
    features: list[dict[str, Any]] = []
    if reads_features(config):
        for modality in dataset.item_features.reports:
            features.append(modality.as_dict())
            lines.append(modality.line())
        if not features:
            lines.append(
                f"no modalities are declared: {config['model']} learns from ids alone; declare "
                "them in a config file (modalities)"
            )
    elif config["modalities"]:
        lines.append(
            f"modalities {', '.join(config['modalities'])}: not loaded, "
            f"{config['model']} does not read them"
        )
    categories = dataset.categories_read
    return {
        "interactions": report.as_dict(),
        "modalities": features,
        "categories": None if categories is None else categories.fingerprint(),
        "lines": lines,
    }


def _write_start(
    folder: RunFolder,
    config: Config,
    resolved: dict[str, Any],
    dataset: Any,
    data: dict[str, Any],
    rules: protocol.Protocol,
) -> None:
    folder.write_yaml("config.yaml", resolved)
    folder.write_json("environment.json", environment(config.model_class))
    folder.write_json("data.json", data)
    folder.write_json("protocol.json", rules.as_dict())
    folder.write_json("ids.json", _ids(dataset))


def _ids(dataset: Any) -> dict[str, list[str]]:
    """Tokens of users and items in the order of their internal ids."""
    return {
        field: [str(token) for token in dataset.field2id_token[field]]
        for field in (dataset.uid_field, dataset.iid_field)
    }


# ------------------------------------------------------------------------- reading a run back


def _saved_model(folder: Path) -> Checkpoint:
    """Weights of a run, and what stands beside them."""
    run = RunFolder.at(folder)
    run.read_config()  # refused where it is damaged
    if not run.has_weights:
        raise InputError(f"{folder}: has no model.safetensors, its run saved no epoch; run it anew")
    return run.read_weights()


_NOTED_LATER = ("order of the histories", "other columns", "categories")


def _check_data(folder: Path, made: _Made) -> None:
    """What the weights belong to must be what the data are now, field by field."""
    run = RunFolder.at(folder)
    try:
        saved = _identity(*(run.read_json(f"{name}.json") for name in ("protocol", "ids", "data")))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: protocol.json, ids.json or data.json is not whole ({error!r}); {DAMAGED}"
        ) from error
    now = _identity(made.rules.as_dict(), _ids(made.dataset), made.data)
    for key in _NOTED_LATER:
        if not saved[key]:  # written by a version that did not note it
            now[key] = saved[key]
    differing = [
        key if isinstance(now.get(key), list) else f"{key} ({saved.get(key)} then, {now.get(key)})"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]
    if differing:
        raise InputError(
            f"{folder}: the data have changed since this run: {', '.join(differing)}; "
            "restore its files, point data_path at them, or train again"
        )


def _identity(
    rules: Mapping[str, Any], ids: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Fingerprints of interactions, histories and feature files, and the order of the ids."""
    prints = {key: rules.get(key) for key in ("items", "train", "valid", "test")}
    files = {
        f"{modality['name']} {key}": modality[key]
        for modality in data["modalities"]
        for key in ("sha256", "ids_sha256")
        if key in modality
    }
    prints["order of the histories"] = data["interactions"].get("histories")
    prints["other columns"] = data["interactions"].get("columns")
    prints["categories"] = data.get("categories")
    return {**prints, **{f"order of {field}": tokens for field, tokens in ids.items()}, **files}
