"""What a configuration may say: known keys, types, values.

Every rule raises :class:`~recbole_mm.errors.InputError` with the key, the offending value, where
it was set and the mend, and none reads data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from recbole.evaluator.register import metric_types, metrics_dict
from recbole.utils import EvaluatorType

from recbole_mm import compat
from recbole_mm.errors import InputError, check_choice, nearest
from recbole_mm.layers.encoder import ACTIVATIONS

OPTIMIZERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")

# read by RecBole's code, written in none of its property files
RECBOLE_UNWRITTEN = frozenset(
    {
        *("additional_feat_suffix", "benchmark_filename", "discretization", "encoding"),
        *("numerical_features", "selected_features", "config_files", "model", "dataset", "device"),
        *("single_spec", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "tail_ratio"),
    }
)

# likewise, read for one model
_UNWRITTEN_OF = {
    "FEARec": ("contrast", "sim", "tau", "use_filter"),
    "AutoInt": ("has_residual",),
    "DiffRec": ("norm",),
    "LDiffRec": ("norm",),
    "KD_DAGFM": ("cin",),
}

# what each transform of RecBole's batches reads, and fails without
_OF_TRANSFORM = {
    "crop_itemseq": ("eta",),
    "reorder_itemseq": ("beta",),
    "mask_itemseq": ("mask_ratio",),
    "inverse_itemseq": (),
    "user_defined": (),
}

# what RecBole's `run` writes into the configuration of each process
_OF_PROCESSES = frozenset({"nproc", "local_rank", "world_size", "ip", "port", "offset"})

# keys that RecBole lets have several types, whatever the type of their default
_FLEXIBLE: dict[str, tuple[type, ...]] = {
    "gpu_id": (str, int, tuple, list),
    "metrics": (list, tuple, str),
    "topk": (list, tuple, int),
    "modalities": (dict, list, tuple, type(None)),
    "normalize_all": (bool, type(None)),
    "load_col": (dict, type(None)),
    "train_neg_sample_args": (dict, type(None)),
    "additional_feat_suffix": (list, tuple, str),
    "benchmark_filename": (list, tuple, type(None)),
    "category_field": (str, type(None)),
    "encoding": (str, type(None)),
    "feature_cache_dir": (str, type(None)),
    "feature_norm": (float, int, type(None)),
    "swap_pairs": (list, tuple, type(None)),
    "threshold": (dict, type(None)),
    "unload_col": (dict, type(None)),
    "val_interval": (dict, type(None)),
    **{
        f"alias_of_{name}_id": (list, tuple, type(None))
        for name in ("user", "item", "entity", "relation")
    },
}

_TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict"}


def unwritten(models: Iterable[str], transforms: Iterable[Any]) -> set[str]:
    """Keys that RecBole reads for models, or for transforms, and writes in no file for them."""
    named = [_OF_TRANSFORM.get(str(transform), ()) for transform in transforms]
    named += [_UNWRITTEN_OF.get(model, ()) for model in models]
    return {key for keys in named for key in keys}


def check_known(key: str, source: str, known: Iterable[str], own: str = "") -> None:
    """Refuse a key that no code reads.

    Args:
        key: Its name.
        source: Where it stands.
        known: All that are known.
        own: Name of the user's class for which it is meant, if it is one.
    """
    known = set(known)
    if key in _OF_PROCESSES:
        raise InputError(
            f"{key!r} in {source}: the number of processes is no key of the configuration; "
            "give --nproc N on the command line, or run(..., nproc=N)"
        )
    if key not in known:
        hint = nearest(key, known)
        if own:
            hint += f"{' If' if hint else '; if'} {own} reads it, declare it there: "
            hint += f"default_config = {{{key!r}: ...}}"
        raise InputError(f"unknown key {key!r} in {source}{hint}")


def check_eval_args(value: Mapping[str, Any], source: str) -> None:
    """Refuse a key of ``eval_args`` that RecBole does not read."""
    _check_names("eval_args", value, ("split", "order", "group_by", "mode"), f" in {source}")
    if isinstance(value.get("mode"), Mapping):
        _check_names("eval_args: mode", value["mode"], ("valid", "test"), f" in {source}")


def _check_names(
    key: str, value: Mapping[str, Any], known: tuple[str, ...], where: str = ""
) -> None:
    """Refuse a name that a mapping of the configuration does not have."""
    for name in value:
        if name not in known:
            raise InputError(
                f"{key}: unknown key {name!r}{where}{nearest(str(name), known)}; "
                f"known: {', '.join(known)}"
            )


def check_type(key: str, value: Any, default: Any, source: str, *, lenient_int: bool) -> None:
    """Refuse a value whose type differs from that of the key's default.

    Args:
        key: Name of the key.
        value: What was set.
        default: What the property files say; ``None`` tells nothing about the type.
        source: Where the value comes from, for the message.
        lenient_int: Let a float replace an int: RecBole's model files write some weights as ints.
    """
    if value is None and default is None:
        return
    if key in _FLEXIBLE:
        allowed: tuple[type, ...] = _FLEXIBLE[key]
    elif isinstance(default, bool):
        allowed = (bool,)
    elif isinstance(default, int):
        allowed = (int, float) if lenient_int else (int,)
    elif isinstance(default, float):
        allowed = (float, int)
    elif isinstance(default, str):
        # RecBole switches a field or an option off with None
        allowed = (str, type(None))
    elif isinstance(default, (list, tuple)):
        allowed = (list, tuple, type(None))
    elif isinstance(default, dict):
        allowed = (dict, type(None))
    else:
        return
    wrong_bool = isinstance(value, bool) and bool not in allowed
    if wrong_bool or not isinstance(value, allowed):
        names = " or ".join(
            dict.fromkeys(_TYPE_NAMES.get(t, "None") for t in allowed if t is not tuple)
        )
        raise InputError(
            f"{key} must be of type {names}, got {value!r} ({type(value).__name__}) in {source}"
        )


def at_least(values: Mapping[str, Any], low: float, *keys: str) -> None:
    """Refuse a number below ``low``; a key that is not there, or holds no number, passes."""
    for key in keys:
        if _is_number(values.get(key)) and not values[key] >= low:
            raise InputError(f"{key} must be at least {low}, got {values[key]!r}")


def positive(values: Mapping[str, Any], *keys: str) -> None:
    """Refuse a number that is not above 0 and finite, as in :func:`at_least`."""
    for key in keys:
        if _is_number(values.get(key)) and not 0 < values[key] < math.inf:
            raise InputError(f"{key} must be positive, got {values[key]!r}")


def share(values: Mapping[str, Any], *keys: str) -> None:
    """Refuse a number outside [0, 1], as in :func:`at_least`."""
    for key in keys:
        if _is_number(values.get(key)) and not 0 <= values[key] <= 1:
            raise InputError(f"{key} must lie in [0, 1], got {values[key]!r}")


def one_of(values: Mapping[str, Any], key: str, choices: Iterable[Any]) -> None:
    """Refuse what is none of the choices of a key."""
    if key in values:
        check_choice(key, values[key], choices)


def check_values(config: Mapping[str, Any], *, model: type) -> None:
    """Refuse values that would fail, or be ignored, somewhere inside a run."""
    _check_ranges(config)
    _check_data(config)
    _check_metrics(config)
    _check_training(config, model)
    for option in ("save_dataset", "save_dataloaders"):
        if config.get(option):
            raise InputError(
                f"{option}: True writes a pickle that ignores the contents of its sources; "
                f"remove {option}"
            )
    for option in ("dataset_save_path", "dataloaders_save_path"):
        if config.get(option):
            raise InputError(f"{option} names a pickle, and none is read here; remove {option}")


# whole numbers from 1 on that a model is built with
_SIZES = (
    "hidden_size",
    "inner_size",
    "embedding_size",
    "n_layers",
    "num_layers",
    "n_heads",
    "num_heads",
)
_LEVELS = ("debug", "info", "warning", "error", "critical")


def _check_ranges(config: Mapping[str, Any]) -> None:
    at_least(config, 1, "train_batch_size", "eval_batch_size", "eval_memory_mb", "eval_step")
    at_least(config, 1, "metric_decimal_place", "MAX_ITEM_LIST_LENGTH", *_SIZES)
    at_least(config, 0, "epochs", "stopping_step", "worker", "seed", "weight_decay")
    at_least(config, 0, "loss_decimal_place")
    for key in _SIZES:
        if isinstance(config.get(key), float):
            raise InputError(f"{key} must be a whole number, got {config[key]!r}")
    if config["seed"] >= 2**32:
        raise InputError(f"seed must be below 2 ** 32, got {config['seed']!r}")
    positive(config, "learning_rate", "initializer_range", "layer_norm_eps", "feature_norm")
    share(config, "min_coverage")
    cold = config.get("cold_items")
    if cold and not 0 < cold < 100:
        raise InputError(f"cold_items must be a percentage above 0 and below 100, got {cold!r}")
    if str(config["state"]).lower() not in _LEVELS:
        raise InputError(
            f"state must be a level of logging, {', '.join(_LEVELS)}, got {config['state']!r}"
        )
    if config["data_path"] is None:
        raise InputError(
            "data_path must name the folder that holds the data set's folder, got None"
        )
    if not config["checkpoint_dir"]:
        raise InputError("checkpoint_dir must name a folder, got nothing; '.' is the present one")
    for key, value in config.items():
        if key.endswith("dropout_prob") and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise InputError(f"{key} must lie in [0, 1), got {value!r}")
    if config["checkpoint_minutes"] < 0:
        raise InputError(
            f"checkpoint_minutes must not be negative, got {config['checkpoint_minutes']!r}"
        )
    if config["on_bad_time"] not in ("error", "drop"):
        raise InputError(f"on_bad_time must be 'error' or 'drop', got {config['on_bad_time']!r}")


# what these keys say when they filter nothing
_NO_FILTER = {
    "user_inter_num_interval": (None, "[0,inf)"),
    "item_inter_num_interval": (None, "[0,inf)"),
    "val_interval": (None, {}),
    "rm_dup_inter": (None,),
}


ATOMIC_FILES = ("inter", "user", "item", "kg", "link", "net", "ent", "rel")  # of RecBole's formats


def _check_data(config: Mapping[str, Any]) -> None:
    if config.get("transform") is not None:
        one_of(config, "transform", _OF_TRANSFORM)
        for key in _OF_TRANSFORM[config["transform"]]:
            if not _is_number(config.get(key)):
                raise InputError(
                    f"transform: {config['transform']} needs a number {key}, "
                    f"got {config.get(key)!r}"
                )
    for key in ("load_col", "unload_col"):
        _check_names(
            key,
            config.get(key) or {},
            (*ATOMIC_FILES, *(config.get("additional_feat_suffix") or ())),
        )
    if not config["LIST_SUFFIX"]:
        raise InputError("LIST_SUFFIX must name what a list of items is called by, got nothing")
    if config.get("rm_dup_inter") not in (None, "first", "last"):
        raise InputError(
            f"rm_dup_inter must be 'first', 'last' or None, got {config['rm_dup_inter']!r}"
        )
    parts = config.get("benchmark_filename")
    if parts is None:
        _check_split(config["eval_args"] or {})
        return
    if len(parts) != 3 or not all(isinstance(part, str) for part in parts):
        raise InputError(
            f"benchmark_filename must name three parts, for example [train, valid, test], "
            f"got {parts!r}"
        )
    for key, idle in _NO_FILTER.items():
        value = config.get(key)
        if (value.replace(" ", "") if isinstance(value, str) else value) not in idle:
            raise InputError(
                f"{key}: {config[key]!r} has no effect on a data set that comes split "
                "(benchmark_filename); filter its files, and remove the key"
            )


def _check_split(eval_args: Mapping[str, Any]) -> None:
    """What RecBole would refuse in the middle of a run, or without a test row."""
    if eval_args.get("order") not in ("TO", "RO"):
        raise InputError(f"eval_args: order must be TO or RO, got {eval_args.get('order')!r}")
    if eval_args.get("group_by") not in (None, "user", "none", "None"):
        raise InputError(
            f"eval_args: group_by must be user or none, got {eval_args.get('group_by')!r}"
        )
    split = eval_args.get("split")
    if not isinstance(split, Mapping) or len(split) != 1:
        raise InputError(f"eval_args: split must be one of RS, LS and TS, got {split!r}")
    ((kind, how),) = split.items()
    if kind == "LS":
        known = ("valid_and_test", "test_only")
        if how not in known:
            reason = "has no test part, which a run scores" if how == "valid_only" else "is unknown"
            raise InputError(f"eval_args: split LS: {how!r} {reason}; use {' or '.join(known)}")
        return
    if kind not in ("RS", "TS"):
        raise InputError(f"eval_args: split must be one of RS, LS and TS, got {split!r}")
    is_list = isinstance(how, (list, tuple)) and len(how) == 3
    if not is_list or not all(_is_number(share) and share >= 0 for share in how):
        raise InputError(
            f"eval_args: split {kind} takes three shares, for example [0.8, 0.1, 0.1], got {how!r}"
        )
    if how[0] <= 0 or how[2] <= 0:
        raise InputError(f"eval_args: split {kind}: {how!r} leaves no row to train on, or to test")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_metrics(config: Mapping[str, Any]) -> None:
    metrics = config["metrics"]
    for metric in metrics:
        if not isinstance(metric, str) or metric.lower() not in metric_types:
            raise InputError(
                f"metrics: unknown metric {metric!r}{nearest(str(metric), metric_types)} "
                f"known metrics: {', '.join(sorted(metric_types))}"
            )
    topk = config["topk"]
    topk = [topk] if isinstance(topk, int) else list(topk)
    for k in topk:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InputError(f"topk must hold positive integers, got {k!r}")

    if not topk:
        raise InputError("topk must hold at least one positive integer, got []")
    if config.get("tail_ratio") is not None and "tailpercentage" not in map(str.lower, metrics):
        raise InputError(
            f"tail_ratio: {config['tail_ratio']!r} is for the metric TailPercentage, which is not "
            "among metrics; add it there, or remove the key"
        )
    name, _, cut = str(config["valid_metric"]).partition("@")
    if name.lower() not in {metric.lower() for metric in metrics}:
        raise InputError(
            f"valid_metric {config['valid_metric']!r} is not among metrics {metrics}: "
            f"add {name!r} to metrics or choose one of them"
        )
    if not cut and has_cuts(name):
        raise InputError(
            f"valid_metric {config['valid_metric']!r} has a value for each of topk {topk}: "
            f"write for example {name}@{topk[-1]}"
        )
    if cut and not has_cuts(name):
        raise InputError(
            f"valid_metric {config['valid_metric']!r}: {name} has one value, write {name}"
        )
    if cut and (not cut.isdigit() or int(cut) not in topk):
        raise InputError(
            f"valid_metric {config['valid_metric']!r} is outside topk {topk}: "
            f"add {cut} to topk or use for example {name}@{topk[-1]}"
        )


def has_cuts(metric: str) -> bool:
    """Whether a metric of RecBole has a value for each k."""
    lists = ("rec.topk", "rec.items")  # what such metrics are computed from
    needs = metrics_dict[metric.lower()].metric_need
    return any(need in lists for need in needs)


def _modes(config: Mapping[str, Any]) -> list[str]:
    """Evaluation modes of validation and test; RecBole makes two of one."""
    modes = (config["eval_args"] or {}).get("mode")
    return [str(mode) for mode in (modes.values() if isinstance(modes, Mapping) else [modes])]


def drawing_mode(config: Mapping[str, Any]) -> str | None:
    """The evaluation mode that ranks drawn candidates, ``uniN`` or ``popN``, if there is one."""
    return next((mode for mode in _modes(config) if mode.startswith(("uni", "pop"))), None)


def check_modes(config: Mapping[str, Any]) -> None:
    """Refuse evaluation modes in which metrics or ``mask_history`` would not do what they say."""
    for mode in _modes(config):
        if not re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d*", mode):
            raise InputError(
                f"eval_args: mode must be full, labeled, uniN or popN with a number N of drawn "
                f"candidates, for example uni100, got {mode!r}"
            )
    drawn = drawing_mode(config)
    if drawn is not None and config["mask_history"] and config["repeatable"]:
        raise InputError(
            f"mask_history: True has no effect on the candidates that mode {drawn} draws for "
            "this model; rank the whole catalogue, eval_args: {mode: full}, or leave it out"
        )
    metrics = config["metrics"]
    if "labeled" in _modes(config) and any(
        metric_types[metric.lower()] is EvaluatorType.RANKING for metric in metrics
    ):
        raise InputError(
            f"eval_args: mode labeled has no ranking, which metrics {metrics} need; use mode full, "
            "or metrics of labels such as AUC and LogLoss"
        )


def _check_number_type(config: Mapping[str, Any]) -> None:
    if config["amp_dtype"] not in ("bfloat16", "float16"):
        raise InputError(f"amp_dtype must be 'bfloat16' or 'float16', got {config['amp_dtype']!r}")
    if config["enable_amp"] and config["amp_dtype"] == "float16" and not config["enable_scaler"]:
        raise InputError(
            "amp_dtype: float16 loses small gradients unless the loss is scaled; "
            "set enable_scaler: True, or amp_dtype: bfloat16"
        )


def _check_keys(config: Mapping[str, Any], key: str, known: tuple[str, ...]) -> None:
    """Refuse what is no mapping, or has a name that RecBole does not read."""
    value = config.get(key)
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be a mapping with {', '.join(known)}, got {value!r}")
    _check_names(key, value, known)


def _check_ours(config: Mapping[str, Any], model: Any) -> None:
    """What the models of this package, whose loss is a softmax over the catalogue, cannot do."""
    if not hasattr(model, "offered_objectives"):
        return
    name = model.__name__
    samples = getattr(model, "samples_negatives", False)
    negatives = config.get("train_neg_sample_args") or {}
    if negatives.get("distribution", "none") != "none":
        raise InputError(
            f"train_neg_sample_args: {name} would take the drawn items for targets; leave it out"
            + (", and set n_negatives for a loss on sampled negatives" if samples else "")
        )
    if config.get("n_negatives") and not samples:
        raise InputError(
            f"n_negatives: {name} has no loss on sampled negatives; leave it out, or give it to "
            "the models that have one (compare: --variants)"
        )
    if config.get("feature_norm") and not model.consumes_features:
        raise InputError(
            f"feature_norm: {name} reads no features; leave it out, or give it to the models "
            "that do (compare: --variants)"
        )
    model.check_options(config)


def _check_training(config: Mapping[str, Any], model: type) -> None:
    _check_number_type(config)
    learner = str(config["learner"])
    if learner.lower() not in OPTIMIZERS:
        raise InputError(
            f"learner: unknown optimizer {learner!r}{nearest(learner, OPTIMIZERS)} "
            f"known: {', '.join(OPTIMIZERS)}"
        )
    _check_keys(
        config, "clip_grad_norm", ("max_norm", "norm_type", "error_if_nonfinite", "foreach")
    )
    for key, value in (config.get("clip_grad_norm") or {}).items():
        if key in ("max_norm", "norm_type") and not (_is_number(value) and value > 0):
            raise InputError(f"clip_grad_norm: {key} must be a positive number, got {value!r}")
    drawn = ("distribution", "sample_num", "alpha", "dynamic", "candidate_num")
    _check_keys(config, "train_neg_sample_args", drawn)
    negatives = config.get("train_neg_sample_args") or {}
    if negatives.get("distribution", "uniform") != "none" and negatives.get("sample_num", 1) < 1:
        raise InputError(f"train_neg_sample_args: sample_num must be at least 1, got {negatives!r}")
    if negatives.get("dynamic") and not negatives.get("candidate_num", 0) >= 1:
        raise InputError(
            "train_neg_sample_args: dynamic: True takes the best of candidate_num drawn items, "
            f"which must be at least 1, got {negatives.get('candidate_num', 0)!r}"
        )
    one_of(config, "hidden_act", ACTIVATIONS)
    one_of(config, "loss_type", ("CE", "BPR", "BCE", "MSE"))  # all that RecBole's models have
    known = hasattr(model, "offered_objectives") or compat.is_recboles(model)
    if learner.lower() == "sparse_adam" and known:
        name = model.__name__
        raise InputError(f"learner: sparse_adam needs sparse gradients, which {name} does not have")
    _check_ours(config, model)
    heads = config.get("n_heads")
    for width in ("hidden_size", "embedding_size"):
        size = config.get(width)
        if isinstance(heads, int) and isinstance(size, int) and size % heads:
            raise InputError(
                f"n_heads must divide {width}: {size} is not a multiple of {heads}; "
                f"set {width} to {heads * max(1, round(size / heads))}, or change n_heads"
            )
    offered = getattr(model, "offered_objectives", None)
    objectives: tuple[str, ...] = offered(config) if offered else ("last",)
    objective = config["train_objective"]
    if objective not in ("last", "all"):
        raise InputError(f"train_objective must be 'last' or 'all', got {objective!r}")
    if objective not in objectives:
        reason = getattr(
            model,
            "no_all_positions_reason",
            f"RecBole's {model.__name__} reads one position of a row",
        )
        raise InputError(
            f"train_objective {objective!r} is not possible for {model.__name__}: {reason}; "
            f"use train_objective: {objectives[0]}"
        )
