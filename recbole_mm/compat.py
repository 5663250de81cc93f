"""Gaps between RecBole 1.2 and today's packages, each with the bound at which it can go.

Nothing here runs at import, and nothing writes into RecBole's modules or classes: a gap is
closed where our own code passes it. What has to be set process-wide is what RecBole sets
process-wide itself (numpy's old names), or what it should not have set (anomaly detection).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recbole_mm.errors import EnvironmentFault

# Folders of RecBole's models, without `exlib_recommender`: importing that package needs lightgbm
# and xgboost even to find out that a model is not there. Can go with a RecBole whose get_model
# does not import it.
_MODEL_PACKAGES = (
    "general_recommender",
    "context_aware_recommender",
    "sequential_recommender",
    "knowledge_aware_recommender",
)


def check_versions() -> None:
    """Refuse the package versions with which RecBole fails silently.

    Bound: RecBole fills missing values in place on a column, which pandas 3 ignores (the padding
    row of token fields becomes -9223372036854775808). Can go with a RecBole that requires pandas 3.

    Raises:
        EnvironmentFault: With pandas 3 or newer.
    """
    pandas = version("pandas")
    if int(pandas.split(".")[0]) >= 3:
        raise EnvironmentFault(
            f"pandas {pandas} is installed, but RecBole {version('recbole')} silently corrupts "
            "padding values with pandas 3: run `pip install 'pandas<3'`"
        )


def set_numpy_names() -> None:
    """Give numpy the names of its 1.x scalars that RecBole still uses.

    RecBole's ``Config`` sets the same names, but through ``np.float_`` and friends, which numpy 2
    dropped; its metrics then read ``np.float``. Bound: RecBole > 1.2.1 without ``np.float``.
    """
    names = {
        "bool": np.bool_,
        "int": np.int_,
        "float": np.float64,
        "complex": np.complex128,
        "object": np.object_,
        "str": np.str_,
        "long": np.int_,
        "unicode": np.str_,
    }
    for name, scalar in names.items():
        setattr(np, name, scalar)


def import_model(name: str) -> type | None:
    """RecBole's model class of that name, or ``None``.

    Importing RecBole's sequential models switches autograd anomaly detection on for the whole
    process (``sine.py``, line 25), which costs 14-39 % of a training step; it is switched off
    again. Bound: RecBole > 1.2.1 without that line.
    """
    try:
        for package in _MODEL_PACKAGES:
            module = f"recbole.model.{package}.{name.lower()}"
            if importlib.util.find_spec(module) is not None:
                model = getattr(importlib.import_module(module), name, None)
                if not isinstance(model, type):
                    return None
                return with_true_counts(model) if name == "Pop" else with_public_dok(model)
        return None
    finally:
        forget_anomaly_detection()


def forget_anomaly_detection() -> None:
    """Switch off what importing RecBole's sequential models has switched on.

    Bound: as of :func:`import_model`.
    """
    if "recbole.model.sequential_recommender.sine" in sys.modules:
        torch.autograd.set_detect_anomaly(False)


def is_recboles(model: type) -> bool:
    """Whether a class is a model of RecBole, and not one that derives from it or has its name."""
    return model.__module__.startswith("recbole.model.")


class _DokMatrix(sp.dok_matrix):
    """``dok_matrix`` with the private ``_update`` that scipy 1.13 removed."""

    def _update(self, entries: Mapping[tuple[int, int], float]) -> None:
        for key, value in entries.items():
            self[key] = value


@functools.cache
def with_public_dok(model: type) -> type:
    """The model itself, or a subclass of it that builds its graph on today's scipy.

    LightGCN, NGCF, SpectralCF, GCMC, NCL, KGIN and MCCLK fill a ``dok_matrix`` through its private
    ``_update``. The methods that do are run with a scipy namespace whose ``dok_matrix`` has it; the
    class, those it derives from and their modules stay as they are. Bound: scipy < 1.13, or
    RecBole > 1.2.1.
    """
    if hasattr(sp.dok_matrix, "_update"):
        return model
    namespace = types.SimpleNamespace(**{**vars(sp), "dok_matrix": _DokMatrix})
    methods = {
        name: types.FunctionType(
            method.__code__,
            {**method.__globals__, "sp": namespace},
            name,
            method.__defaults__,
            method.__closure__,
        )
        for name, method in vars(model).items()
        if inspect.isfunction(method)
        and "_update" in method.__code__.co_names
        and "dok_matrix" in method.__code__.co_names
    }
    # behind the model in the order of its parents, so that its super() finds them
    parents = [parent for base in model.__bases__ if (parent := with_public_dok(base)) is not base]
    if not methods and not parents:
        return model
    names = {"__module__": model.__module__, "__qualname__": model.__qualname__}
    return type(model.__name__, (model, *parents), {**methods, **names})


@functools.cache
def with_true_counts(pop: type) -> type:
    """RecBole's Pop, with the counts of the training interactions.

    Pop adds one to the items of a batch, so that an item which is there ten times counts once, and
    takes the negatives that are drawn for it by default for interactions: on
    amazon-scientific-clip that costs it 42 % of its NDCG@10, and makes it depend on the seed.
    Bound: RecBole > 1.2.1 whose Pop does neither.
    """

    def calculate_loss(self: Any, interaction: Any) -> torch.Tensor:
        items = interaction[self.ITEM_ID]
        if self.label_of_drawn is not None:
            items = items[interaction[self.label_of_drawn] > 0]
        self.item_cnt += torch.bincount(items, minlength=len(self.item_cnt)).unsqueeze(1)
        self.max_cnt = self.item_cnt.amax(0)
        return torch.zeros(1, device=self.device, requires_grad=True)

    def __init__(self: Any, config: Any, dataset: Any) -> None:  # noqa: N807  (of the class below)
        super(counting, self).__init__(config, dataset)  # type: ignore[arg-type]
        drawing = (config["train_neg_sample_args"] or {}).get("distribution", "none")
        self.label_of_drawn = None if drawing == "none" else config["LABEL_FIELD"]

    names = {"__module__": pop.__module__, "__qualname__": pop.__qualname__}
    counting = type(
        "Pop", (pop,), {**names, "calculate_loss": calculate_loss, "__init__": __init__}
    )
    return counting


@contextlib.contextmanager
def without_recboles_warnings() -> Iterator[None]:
    """Run a block without the deprecation warnings that RecBole's own lines raise.

    They name pandas 2 and torch 2 habits inside RecBole, which no user of ours can mend. Bound:
    RecBole > 1.2.1.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"recbole\.")
        warnings.filterwarnings("ignore", message=r"__array_wrap__ must accept context")
        yield


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Run a block inside ``path``.

    RecBole's trainer opens a TensorBoard writer under ``./log_tensorboard``, whatever
    ``checkpoint_dir`` says; it is built in a scratch folder and given another writer. Bound: a
    RecBole whose trainer takes the folder as an argument.
    """
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def config_device(values: Mapping[str, Any]) -> torch.device:
    """The device of a single-process run.

    RecBole ignores ``use_gpu: False`` when CUDA is there. Bound: RecBole > 1.2.1.
    """
    if values["use_gpu"] and values["gpu_id"] != "" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def grad_scaler(device_type: str, *, enabled: bool) -> Any:
    """A gradient scaler; torch 2.3 moved it and let it serve a CPU.

    Bound: torch >= 2.3.
    """
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def distributed_data_parallel(module: nn.Module) -> nn.Module:
    """The module with averaged gradients; its buffers, features and graphs, stay as they are.

    torch 2.13 renamed the option. Bound: torch >= 2.13.
    """
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    # a step may leave parameters out: of experts, of the other part of a knowledge-based model
    chosen: dict[str, Any] = {"find_unused_parameters": True, name: False}
    return DistributedDataParallel(module, **chosen)


@contextlib.contextmanager
def quiet_torch_of_children() -> Iterator[None]:
    """Start processes inside the block whose torch keeps warnings of its C++ part to itself.

    DistributedDataParallel that looks for unused parameters warns when there are none, with no
    other switch than that of all such warnings, which is read when torch is imported. Bound: none.
    """
    name, before = "TORCH_CPP_LOG_LEVEL", os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
