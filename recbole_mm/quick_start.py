"""From a configuration to a result: data, model, training, evaluation, run folder.

RecBole's own ``recbole.quick_start`` is never imported: it imports ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recbole.data import data_preparation
from recbole.utils import ModelType, init_seed

from recbole_mm import compat, protocol
from recbole_mm.config import Config
from recbole_mm.data.dataset import create_dataset
from recbole_mm.errors import InputError, RecboleMMError
from recbole_mm.run_folder import RunFolder, environment
from recbole_mm.trainer import trainer_class

_LOG = logging.getLogger(__name__)


def run(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str | Path] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    *,
    saved: bool = True,
    command_line: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a model, select its best epoch on validation, and score that epoch once on test.

    Args:
        model: Name or class of a model of this package or of RecBole.
        dataset: Name of the data set.
        config_file_list: YAML files, later ones stronger.
        config_dict: Values by key, stronger than files.
        saved: Write a run folder below ``checkpoint_dir``. Without one the best weights are kept
            in memory.
        command_line: ``--key=value`` arguments, strongest of all.

    Returns:
        ``model``, ``dataset``, ``best_epoch``, ``epochs``, ``best_valid_score``,
        ``valid_score_bigger``, ``best_valid_result``, ``test_result``, ``protocol``, ``data``,
        ``parameters`` (trainable), ``seconds`` and ``run`` (the folder, or ``None``).

    Raises:
        InputError: Bad input or configuration.
        EnvironmentFault: A package or the disk says no.
        NumericalError: A loss or score is not finite.
    """
    config = Config(model, dataset, config_file_list, config_dict, command_line)
    with compat.without_recboles_warnings():
        return _run(config, saved=saved)


def objective_function(
    config_dict: Mapping[str, Any] | None = None,
    config_file_list: Sequence[str | Path] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """What RecBole's ``HyperTuning`` calls for each trial; ranks trials by validation.

    Raises:
        as :func:`run`
    """
    values = {"show_progress": False, **(config_dict or {})}
    return run(config_file_list=config_file_list, config_dict=values, saved=saved)


def _run(config: Config, *, saved: bool) -> dict[str, Any]:
    started = time.perf_counter()
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    _check_topk(config, dataset.item_num - 1)
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        # RecBole counts users x items here for these models; the key means users for every model
        config["eval_batch_size"] *= dataset.item_num
    train_data, valid_data, test_data = data_preparation(config, dataset)
    parts = (train_data._dataset, valid_data._dataset, test_data._dataset)
    rules = protocol.describe(config, parts)
    if not rules.test_users:
        raise InputError(
            f"no user of {config['dataset']} is long enough for a test row: a user needs at least "
            "3 interactions for leave-one-out"
        )

    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    try:
        net = config.model_class(config, train_data._dataset).to(config["device"])
    except RecboleMMError:
        raise
    except ValueError as error:
        # the parts of a model check their sizes and choices where they use them
        raise InputError(f"{config['model']}: {error}") from error
    data = _data_summary(config, dataset)
    folder = (
        RunFolder(config["checkpoint_dir"], config["dataset"], config["model"]) if saved else None
    )
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.logging_to_file(config["state"]))
            _write_start(folder, config, dataset, data, rules)
        for line in (*data["lines"], rules.line()):
            _LOG.info(line)
            if config["show_progress"]:
                print(line)  # noqa: T201  (the report of a run belongs on the terminal)
        _LOG.info(net)
        trainer = trainer_class(config["MODEL_TYPE"], config["model"])(config, net, folder)
        best_score, best_result = trainer.fit(
            train_data,
            valid_data if rules.valid_users else None,
            saved=True,
            show_progress=config["show_progress"],
        )
        test_result = trainer.evaluate(test_data, show_progress=False)
        result = {
            "model": config["model"],
            "dataset": config["dataset"],
            "best_epoch": trainer.best_epoch,
            "epochs": len(trainer.history),
            "best_valid_score": float(best_score),
            "valid_score_bigger": config["valid_metric_bigger"],
            "best_valid_result": dict(best_result) if best_result else None,
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
    return result


def _check_topk(config: Config, n_items: int) -> None:
    if max(config["topk"]) > n_items:
        raise InputError(
            f"topk {config['topk']} asks for more than the {n_items} items of {config['dataset']}: "
            f"set topk to at most {n_items}"
        )


def _data_summary(config: Config, dataset: Any) -> dict[str, Any]:
    """Counts and feature reports; features are loaded for the models that consume them."""
    report = dataset.report
    lines = list(report.lines())
    features: list[dict[str, Any]] = []
    if getattr(config.model_class, "consumes_features", False):
        for modality in dataset.item_features.reports:
            features.append(modality.as_dict())
            lines.append(modality.line())
    elif config["modalities"]:
        lines.append(
            f"modalities {', '.join(config['modalities'])}: not loaded, "
            f"{config['model']} does not read them"
        )
    return {"interactions": report.as_dict(), "modalities": features, "lines": lines}


def _write_start(
    folder: RunFolder, config: Config, dataset: Any, data: dict[str, Any], rules: protocol.Protocol
) -> None:
    folder.write_yaml("config.yaml", config.resolved())
    folder.write_json("environment.json", environment())
    folder.write_json("data.json", data)
    folder.write_json("protocol.json", rules.as_dict())
    folder.write_json(
        "ids.json",
        {
            field: [str(token) for token in dataset.field2id_token[field]]
            for field in (dataset.uid_field, dataset.iid_field)
        },
    )
