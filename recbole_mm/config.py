"""RecBole's ``Config`` that also knows this package."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.utils import ModelType, argument_list

from recbole_mm import compat, config_rules, distributed, plain_yaml
from recbole_mm.data.derive.text import text_method
from recbole_mm.data.digest import sha256_of
from recbole_mm.data.download import published
from recbole_mm.errors import EnvironmentFault, InputError, RecboleMMError, nearest
from recbole_mm.plain_yaml import read_yaml, typed_value
from recbole_mm.registry import (
    MODELS,
    RECBOLE_PROPERTIES,
    get_model,
    is_model,
    is_own,
    is_users,
    model_of_run,
    ready,
)

_LOG = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """A folder of the checkout that an installed wheel carries inside the package."""
    return next(p for p in (_HERE / name, _HERE.parent / name) if p.is_dir())


PROPERTIES = _shipped("properties")
DATASETS = _shipped("dataset_atomic")


# keys of `resolved` that follow from others, or from the machine
_COMPUTED = frozenset(
    {
        *("MODEL_TYPE", "MODEL_INPUT_TYPE", "device", "eval_type", "local_rank", "single_spec"),
        *("valid_metric_bigger", "valid_neg_sample_args", "test_neg_sample_args"),
    }
)

NO_NUMBERS = frozenset(
    {
        *("checkpoint_dir", "data_path", "feature_cache_dir", "dataset_save_path"),
        *("dataloaders_save_path", "device", "gpu_id", "use_gpu", "local_rank", "single_spec"),
        *("nproc", "world_size", "ip", "port", "offset", "worker", "show_progress", "state"),
        *("log_wandb", "wandb_project", "save_per_user", "explain", "loss_decimal_place"),
        *("checkpoint_minutes", "eval_memory_mb", "config_file", "config_files"),
    }
)
"""Keys that change no number of a run: where things are, what is shown, which device."""


_F = TypeVar("_F")


class Config(RecBoleConfig):
    """RecBole's ``Config`` that also knows our models, property files and rules.

    Precedence, weakest first: RecBole's defaults, ``properties/overall.yaml``,
    ``properties/model/<Model>.yaml``, ``properties/dataset/<dataset>.yaml``, config files,
    ``config_dict``, command line. A model given as a class takes the property files of the models
    it derives from; a mapping ``default_config`` in its body adds keys and their defaults.

    Differences from RecBole: values are never evaluated as Python; YAML is read by a safe loader;
    unknown keys, wrong types and impossible values are refused before any data is read; the
    command line is an argument and not the ``sys.argv`` of whatever program imports us.

    Args:
        model: Name of a model of this package or of RecBole, or a class, of which ``module:Class``
            is the name.
        dataset: Name of the data set.
        config_file_list: YAML files, or one, later ones stronger; a mapping stands for a file's
            contents.
        config_dict: Values by key.
        command_line: Arguments of the form ``--key=value``.
        shared: The values serve several models; no warning of keys that belong to others than this
            one.

    Raises:
        InputError: On anything above, naming key, value, source and mend.
    """

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Sequence[str | Path | Mapping[str, Any]] | str | Path | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Sequence[str] = (),
        *,
        shared: bool = False,
    ) -> None:
        compat.check_versions()
        self._command_line = list(command_line)
        self._shared = shared
        try:
            super().__init__(model, dataset, listed(config_file_list), config_dict)
        except RecboleMMError:
            raise
        except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise InputError(f"configuration: {reason}") from error

    # RecBole's steps, in the order in which its constructor takes them

    def compatibility_settings(self) -> None:
        """Numpy's old names, in today's spelling."""
        compat.set_numpy_names()

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return plain_yaml.Loader

    def _load_config_files(
        self, file_list: Sequence[str | Path | Mapping[str, Any]]
    ) -> dict[str, Any]:
        self._files = [
            file if isinstance(file, Mapping) else read_yaml(Path(file)) for file in file_list
        ]
        return {key: value for file in self._files for key, value in file.items()}

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(config_dict or {})

    def _load_cmd_line(self) -> dict[str, str]:
        values: dict[str, str] = {}
        for argument in self._command_line:
            key, equals, value = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or not equals or not key:
                mend = f"; write {argument}=VALUE" if argument[:2] == "--" and not equals else ""
                raise InputError(f"command line: {argument!r} is not of the form --key=value{mend}")
            if values.get(key, value) != value:
                raise InputError(
                    f"command line: {key!r} is given twice, as {values[key]!r} and {value!r}"
                )
            values[key] = value
        return values

    def _get_model_and_dataset(
        self, model: str | type | None, dataset: str | None
    ) -> tuple[str, type, str]:
        values = self.external_config_dict
        given = model if model is not None else values.get("model")
        if given is None and "model" in values:
            raise InputError("model: none is named; name one in the call or with --model=...")
        if given is not None and model is None and is_own(str(given)):
            # a file that somebody hands on shall not say what code is run
            for file in self._files:
                if file.get("model") == given:
                    raise InputError(
                        f"model: {given!r} in a config file: code of your own is named in the call "
                        f"or on the command line, --model={given}"
                    )
        if isinstance(given, str):
            given = get_model(given)
        elif given is not None and not is_model(given):
            raise InputError(
                "model must be a name (recbole-mm models lists them) or a class derived from a "
                f"model of RecBole or of this package, got {given!r}"
            )
        if given is not None:
            given = ready(given)
        name, model_class, data = super()._get_model_and_dataset(given, dataset)
        if not isinstance(data, str) or Path(data).name != data or data in ("", ".", ".."):
            raise InputError(f"dataset must be a plain folder name below data_path, got {data!r}")
        return name, model_class, data

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self._of_recbole = [c.__name__ for c in model_class.__mro__ if compat.is_recboles(c)]
        files = (RECBOLE_PROPERTIES / f"model/{name}.yaml" for name in self._of_recbole)
        self._recbole_model_keys: set[str] = set()
        if model not in MODELS:
            self._recbole_model_keys.update(*(read_yaml(path) for path in files if path.is_file()))
        self.internal_config_dict.update(getattr(model_class, "common_config", {}))
        load_col = self.internal_config_dict.get("load_col") or {}
        # a model given as a class has the properties of those it derives from, and its own
        lineage = model_class.__mro__[::-1]
        parents = [cls for cls in lineage if cls is not model_class]
        for path in (
            *(
                RECBOLE_PROPERTIES / f"model/{cls.__name__}.yaml"
                for cls in parents
                if compat.is_recboles(cls)
            ),
            PROPERTIES / "overall.yaml",
            *(
                PROPERTIES / f"model/{cls.__name__}.yaml"
                for cls in parents
                if cls in MODELS.values()
            ),
            PROPERTIES / f"model/{model}.yaml",
        ):
            if path.is_file():
                self._update_internal_config_dict(path)
        for cls in lineage:
            self.internal_config_dict.update(vars(cls).get("default_config", {}))
        if (PROPERTIES / f"dataset/{dataset}.yaml").is_file():
            self._update_internal_config_dict(PROPERTIES / f"dataset/{dataset}.yaml")
        # RecBole's quick-start files name the .kg, .link and .item columns that some models need
        self.internal_config_dict["load_col"] = {
            **load_col,
            **(self.internal_config_dict.get("load_col") or {}),
        }

    def _get_final_config_dict(self) -> dict[str, Any]:
        final = dict(self.internal_config_dict)
        transforms = (values.get("transform") for values in (final, self.external_config_dict))
        known = set(final) | _recbole_keys() | config_rules.unwritten(self._of_recbole, transforms)
        declared: dict[str, Any] = dict(final.get("modalities") or {})
        chosen: Any = None
        # what a user's class reads, n_layers for one, only its author knows
        is_own_code = is_users(self.model_class)
        for source, values in (
            *(("a config file", file) for file in self._files),
            ("config_dict", self.variable_config_dict),
            ("the command line", self.cmd_config_dict),
        ):
            for key, given in values.items():
                if key not in known:
                    config_rules.check_known(
                        key, source, known | _other_models_keys(), self.model if is_own_code else ""
                    )
                    if not is_own_code:
                        if not self._shared:
                            _LOG.warning(
                                "%s in %s is a key of other models: %s ignores it",
                                key,
                                source,
                                self.model,
                            )
                        continue  # where several models share their values
                default = self.internal_config_dict.get(key)
                value = given
                if isinstance(given, str) and source != "a config file":
                    value = typed_value(given, default)
                config_rules.check_type(
                    key, value, default, source, lenient_int=key in self._recbole_model_keys
                )
                if key == "eval_args" and value is not None:
                    config_rules.check_eval_args(value, source)
                    value = {**(final[key] or {}), **value}  # RecBole's would be a random split
                final[key] = value
                if key == "modalities":
                    if isinstance(value, Mapping):
                        declared, chosen = dict(value), None
                    else:
                        chosen = list(value or [])
        final["modalities"] = choose(declared, chosen)
        for name in final.get("hidden_features") or {}:
            if name not in final["modalities"]:
                raise InputError(
                    f"hidden_features: {name!r} is no modality here"
                    f"{nearest(str(name), final['modalities'])}; declared: "
                    f"{', '.join(final['modalities']) or 'none'}"
                )
        return final

    def _set_default_parameters(self) -> None:
        final = self.final_config_dict
        if "data_path" not in self.external_config_dict and (DATASETS / self.dataset).is_dir():
            own = Path(final["data_path"], self.dataset, f"{self.dataset}.inter")
            if not own.is_file():  # a user's own data set of that name goes first
                final["data_path"] = str(DATASETS)
        for key in ("checkpoint_dir", "data_path"):  # in a YAML file no shell reads the ~
            if isinstance(final[key], str):
                # where nobody has that name pathlib raises
                final[key] = os.path.expanduser(final[key])  # noqa: PTH111
        metrics = final["metrics"]
        final["metrics"] = [metrics] if isinstance(metrics, str) else list(metrics)
        config_rules.check_values(final, model=self.model_class)
        if final["explain"] and not hasattr(self.model_class, "explain"):
            able = ", ".join(name for name, model in MODELS.items() if hasattr(model, "explain"))
            raise InputError(
                f"explain: {self.model} tells nothing of itself; models that do: {able}"
            )

        if final["log_wandb"] and importlib.util.find_spec("wandb") is None:
            raise EnvironmentFault("log_wandb: True needs wandb: run `pip install wandb`")

        sequential = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        if "repeatable" not in self.external_config_dict:
            final["repeatable"] = sequential
        config_rules.check_modes(final)
        order = final["eval_args"]["order"]
        is_sequential = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        if is_sequential and order != "TO" and final["benchmark_filename"] is None:
            raise InputError(
                f"eval_args: order {order!r} is not possible for the sequential model "
                f"{self.model}; use order: TO"
            )
        if (
            sequential
            and final.get("loss_type") == "CE"
            and "train_neg_sample_args" not in self.external_config_dict
        ):
            # RecBole makes every user of a cross-entropy model say so
            final["train_neg_sample_args"] = None
        columns = final.get("selected_features")
        if not columns and reads_columns(self.model):
            raise InputError(
                f"selected_features: {self.model} reads columns of .item, name one at least; "
                f"got {columns!r}"
            )
        if columns and final["load_col"] is not None and "item" not in final["load_col"]:
            final["load_col"] = {**final["load_col"], "item": [final["ITEM_ID_FIELD"], *columns]}
        given, asked = final["data_path"], final["valid_metric_bigger"]
        super()._set_default_parameters()
        is_asked = "valid_metric_bigger" in self.external_config_dict
        if is_asked and asked != final["valid_metric_bigger"]:
            raise InputError(
                f"valid_metric_bigger: {asked}, but {final['valid_metric']} is better when it is "
                f"{'bigger' if final['valid_metric_bigger'] else 'smaller'}; remove the key"
            )
        # RecBole's data_preparation unpickles loaders of an earlier run that it finds
        final["dataloaders_save_path"] = f"{os.devnull}/none"
        if "data_path" in self.external_config_dict:
            # RecBole reads its own copy of ml-100k, wherever data_path points
            final["data_path"] = str(Path(given) / self.dataset)
        self._check_dataset_exists()

    def _check_dataset_exists(self) -> None:
        folder = Path(self.final_config_dict["data_path"])
        names = [f"{self.dataset}.inter"]
        if parts := self.final_config_dict.get("benchmark_filename"):
            names = [f"{self.dataset}.{part}.inter" for part in parts]
        for name in names:
            if not (folder / name).is_file():
                if parts and folder.is_dir():
                    held = sorted(path.name for path in folder.glob("*.inter"))
                    raise InputError(
                        f"benchmark_filename: {parts!r}: {folder / name} does not exist; there are "
                        f"{', '.join(held) or 'no .inter files'}{nearest(name, held)}"
                    )
                above = folder.parent
                found = (
                    sorted(p.name for p in above.glob("*") if (p / f"{p.name}.inter").is_file())
                    if above.is_dir()
                    else []
                )
                fetch = (
                    f", or run `recbole-mm download {self.dataset}`"
                    if self.dataset in published()
                    else ""
                )
                raise InputError(
                    f"no data set {self.dataset!r}: looked for {folder / name}; "
                    f"data sets below {above}: {', '.join(found) or 'none'}"
                    f"{nearest(self.dataset, found)}; set data_path to the "
                    f"folder that holds {self.dataset}/{fetch}"
                )

    def _init_device(self) -> None:
        final = self.final_config_dict
        # RecBole writes gpu_id, 0 if nobody asks for another, over the user's choice of GPUs
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        asked = {**self.variable_config_dict, **self.cmd_config_dict}
        keep = visible is not None and "gpu_id" not in asked and str(final["gpu_id"]) == "0"
        if keep:
            final["gpu_id"] = visible
        super()._init_device()
        if keep:
            final["gpu_id"] = "0"  # the first of them
        self._check_device()
        if self.final_config_dict["single_spec"]:
            device = compat.config_device(self.final_config_dict)
            if device.type == "cuda" and distributed.n_processes() > 1:
                device = torch.device("cuda", distributed.rank())
            self.final_config_dict["device"] = device

    def _check_device(self) -> None:
        """Refuse what would be ignored, and say so where a GPU was asked for and none is there."""
        final = self.final_config_dict
        if "device" in self.external_config_dict:
            raise InputError("device is no key to set: use_gpu: False is the CPU, gpu_id a GPU")
        numbers = final["gpu_id"]
        numbers = [numbers] if isinstance(numbers, (str, int)) else list(numbers)
        if not re.fullmatch(r"(\d+(,\d+)*)?", ",".join(map(str, numbers)).replace(" ", "")):
            raise InputError(
                f"gpu_id must be numbers of GPUs such as 0 or '0,1', got {final['gpu_id']!r}"
            )
        asked = {**self.variable_config_dict, **self.cmd_config_dict}
        wanted = ("gpu_id" in asked and final["gpu_id"] != "") or final["use_gpu"] is True
        if {"gpu_id", "use_gpu"} & asked.keys() and wanted and not torch.cuda.is_available():
            _LOG.warning("no GPU is found here, so that this runs on the CPU")

    def resolved(self) -> dict[str, Any]:
        """All values as plain data, ready for YAML or JSON, and for :meth:`reopened`."""
        values = {key: _plain(value) for key, value in sorted(self.final_config_dict.items())}
        # it must be found from another working directory too, and under the name of the data set,
        # be that a link to a folder of another name
        folder = Path(values["data_path"])
        return {
            **values,
            "data_path": str(folder.parent.resolve() / folder.name),
            "dataloaders_save_path": None,
        }

    @classmethod
    def reopened(
        cls,
        file: str | Path,
        model: str | type | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Sequence[str] = (),
    ) -> Config:
        """The configuration that a file with :meth:`resolved` values describes, on this machine.

        Args:
            file: ``config.yaml`` of a run folder.
            model: Class of the model, or ``module:Class``, if the package does not know its name.
            config_dict: Values by key, stronger than the file.
            command_line: Arguments of the form ``--key=value``, strongest of all.

        Raises:
            InputError: as the constructor
        """
        values = reusable(read_yaml(Path(file)))
        model_of_run(str(values.get("model")), Path(file).parent, model)
        return cls(model, None, [values], config_dict, command_line)


def key_of(argument: str) -> str:
    """The key of a command-line argument ``--key=value``."""
    return argument.removeprefix("--").partition("=")[0]


def listed(files: Sequence[_F] | str | Path | None) -> list[_F | str | Path]:
    """Config files as a list, also of a single one.

    Raises:
        InputError: If values stand in the place of files.
    """
    if isinstance(files, Mapping):
        raise InputError("config_file_list takes YAML files; give values by key as config_dict")
    return [files] if isinstance(files, (str, Path)) else list(files or ())


def reusable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Values of :meth:`Config.resolved` that another `Config` takes as the contents of a file."""
    values = {key: value for key, value in resolved.items() if key not in _COMPUTED}
    if "data_path" in values:  # RecBole appends the name of the data set
        folder = Path(values["data_path"]).parent
        if folder.name == "dataset_example":  # RecBole's copy of ml-100k, wherever RecBole is now
            del values["data_path"]
        else:
            values["data_path"] = str(folder)
    if (values.get("train_neg_sample_args") or {}).get("distribution") == "none":
        values["train_neg_sample_args"] = None
    return values


def reads_features(config: RecBoleConfig) -> bool:
    """Whether the model of a configuration reads features."""
    return bool(getattr(config.model_class, "consumes_features", False))


def reads_columns(model: str) -> bool:
    """Whether a model of RecBole reads the columns of ``.item`` in ``selected_features``."""
    file = RECBOLE_PROPERTIES / "model" / f"{model}.yaml"
    return file.is_file() and "selected_features" in read_yaml(file)


def digest_of_data(config: Config) -> str:
    """Hash of the contents of the atomic files and, for a model that reads them, of features.

    Of derived text the encoder counts, which ``method: auto`` leaves to what is installed.
    """
    folder, dataset = Path(config["data_path"]), config["dataset"]
    suffixes = {*config_rules.ATOMIC_FILES, *(config["additional_feat_suffix"] or ())}
    suffixes |= {f"{part}.inter" for part in config["benchmark_filename"] or ()}
    named = (folder / f"{dataset}.{suffix}" for suffix in suffixes)
    files = {path for path in named if path.is_file()}
    modalities = config["modalities"].values() if reads_features(config) else ()
    for declared in modalities:
        names = [str(declared[key]) for key in ("path", "ids") if key in declared]
        paths = [folder / name.replace("{dataset}", dataset) for name in names]
        files |= {path for path in paths if path.exists()}  # the run says what is missing
    try:
        lines = sorted(f"{path.name} {sha256_of(path)}" for path in files)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot read {error.filename}: {error.strerror}; check the file's permissions"
        ) from error
    if any(d.get("derive") == "text" and d.get("method", "auto") == "auto" for d in modalities):
        lines.append(f"text by {text_method('auto')}")
    text = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:12]


def choose(declared: Mapping[str, Any], chosen: list[str] | None) -> dict[str, Any]:
    """The declared modalities that a list names, or all without one.

    Raises:
        InputError: If it names another.
    """
    for name in chosen or ():
        if name not in declared:
            raise InputError(
                f"modalities: {name!r} is not declared; declared: {', '.join(declared) or 'none'}. "
                "Declare it as a mapping, for example modalities: {"
                + f"{name}: {{path: ...}}"
                + "}"
            )
    return {name: declared[name] for name in (declared if chosen is None else chosen)}


def _recbole_keys() -> set[str]:
    """Keys that RecBole knows for every model."""
    lists = (
        argument_list.general_arguments,
        argument_list.training_arguments,
        argument_list.evaluation_arguments,
        argument_list.dataset_arguments,
    )
    return {key for arguments in lists for key in arguments} | config_rules.RECBOLE_UNWRITTEN


def _other_models_keys() -> set[str]:
    files = [*(RECBOLE_PROPERTIES / "model").glob("*.yaml"), *(PROPERTIES / "model").glob("*.yaml")]
    return {key for file in files for key in read_yaml(file)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)  # a device
