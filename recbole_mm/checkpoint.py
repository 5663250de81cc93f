"""One file for tensors and what they belong to, replaced whole; what a training's state is made of.

A checkpoint is a safetensors file whose header holds a JSON text beside the tensors: a file that is
renamed into place has both or neither, whenever the process is killed. Nothing is pickled, so that
reading a file executes nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recbole_mm.errors import InputError
from recbole_mm.files import replacing, writing

_KEY = "recbole_mm"
FORMAT = 2
"""Of the file. Raise it when a change here or in what trainers save makes old files misread.

2: the item graphs of a run are kept before they are normalised.
"""
MEND = "free space or point checkpoint_dir at a folder that can be written"
"""What to do where the files of a run cannot be written."""


class Checkpoint(NamedTuple):
    """Contents of a file: tensors by name, and plain data."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix.``, without it."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def outside(self, prefix: str) -> dict[str, Tensor]:
        """The other tensors."""
        return {k: v for k, v in self.tensors.items() if not k.startswith(f"{prefix}.")}


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a checkpoint; until it is whole, an earlier one stays as it was.

    Raises:
        EnvironmentFault: If the disk is full or the folder cannot be written.
    """
    # a copy of each: safetensors refuses tensors that share memory, as tied weights do
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps(about), "format": str(FORMAT)}
    with writing(path, MEND), replacing(path) as temporary:
        try:
            save_file(held, temporary, metadata=metadata)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error


def read(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: If it is missing or damaged, or not one of this package, or of another format.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata[_KEY])
            made = int(metadata.get("format", 1))  # the first ones do not say
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError:
        raise InputError(f"{path}: not a checkpoint of recbole_mm; give one it wrote") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run it anew") from error
    if made != FORMAT:
        writer = (
            f"recbole_mm {about['recbole_mm']}" if "recbole_mm" in about else "an early version"
        )
        raise InputError(
            f"{path}: has format {made}, written by {writer}, and this version reads "
            f"format {FORMAT}; read it with that version, or run it anew"
        )
    return Checkpoint(tensors, about)


def load_weights(model: nn.Module, saved: Mapping[str, Tensor], where: Path) -> None:
    """Give a model its weights.

    Raises:
        InputError: If they are not those of this model, naming up to three that differ.
    """
    here = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: list(tensor.shape) for name, tensor in saved.items()}
    differing = [
        f"{name} ({there.get(name, 'absent')} there, {here.get(name, 'absent')} in the model)"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{where}: its weights are those of another model: {', '.join(differing[:3])}{more}"
        )
    model.load_state_dict(saved)


def fingerprint(tokens: Iterable[object]) -> str:
    """A hash over tokens in their order."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(str(token).encode() + b"\n")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------- random numbers


def random_states() -> Checkpoint:
    """States of the generators of Python, numpy, torch and every CUDA device."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (RecBole draws from it)
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking would open every GPU, for a run on the CPU too
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy_state = [kind, np.asarray(keys).tolist(), int(place), int(has_gauss), float(gauss)]
    return Checkpoint(tensors, {"python": random.getstate(), "numpy": numpy_state})


def set_random_states(states: Checkpoint) -> None:
    """Continue where :func:`random_states` was called; CUDA devices not there are left out."""
    version, numbers, gauss = states.about["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states.about["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states.tensors["torch"].cpu())
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in states.tensors:
            torch.cuda.set_rng_state(states.tensors[f"cuda{i}"].cpu(), i)


# ------------------------------------------------------------------------- optimizers


def optimizer_state(optimizer: torch.optim.Optimizer) -> Checkpoint:
    """A state dict as tensors, named ``<parameter>.<name>``, and plain data."""
    whole = optimizer.state_dict()
    entries = {f"{n}.{k}": v for n, held in whole["state"].items() for k, v in held.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in entries.items() if key not in tensors}
    return Checkpoint(tensors, {"plain": plain, "groups": whole["param_groups"]})


def set_optimizer_state(optimizer: torch.optim.Optimizer, saved: Checkpoint) -> None:
    """Undo :func:`optimizer_state`; ``optimizer`` is over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**saved.tensors, **saved.about["plain"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved.about["groups"]})


# ------------------------------------------------------------------------- loose attributes


class LooseState:
    """What a model changes while it trains, beside its parameters and buffers.

    RecBole's models keep counters (annealing of MultiVAE), caches (LightGCN) and tables (Pop) as
    plain attributes. Numbers, text, flat lists of them, arrays and dense tensors can be saved; of
    anything else it is only known whether it was replaced. Names that begin with ``_`` are left
    out: they are torch's, and our caches.

    Args:
        model: As its constructor made it, which is what the rest is compared with.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # the objects are kept, so that no other can get their address
        self._before = {path: (value, _version(value)) for path, value in _attributes(model)}

    def changed(self) -> tuple[Checkpoint, list[str]]:
        """What differs from the beginning, and the names of what cannot be saved."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        unsaved = []
        for path, value in _attributes(self._model):
            old, version = self._before.get(path, (None, None))
            if path in self._before and _is_same(value, old, version):
                continue
            if isinstance(value, Tensor) and value.layout is torch.strided:
                tensors[path] = value
            elif _is_plain(value):
                plain[path] = value
            else:
                unsaved.append(f"{path} ({type(value).__name__})")
        return Checkpoint(tensors, plain), sorted(unsaved)

    def restore(self, saved: Checkpoint) -> None:
        """Give the model what :meth:`changed` returned."""
        for path, value in {**saved.tensors, **saved.about}.items():
            owner, _, name = path.rpartition(".")
            setattr(self._model.get_submodule(owner), name, value)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for owner, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and not callable(value):
                yield (f"{owner}.{name}" if owner else name), value


def _version(value: Any) -> Any:
    """Something that differs once ``value`` was changed in place, as far as that can be told."""
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, np.ndarray):
        return hash(value.tobytes())
    return json.dumps(value) if _is_plain(value) else None


def _is_same(value: Any, old: Any, version: Any) -> bool:
    if _is_plain(value):
        return bool(_version(value) == version)
    return value is old and _version(value) == version


def _is_plain(value: Any) -> bool:
    scalars = (bool, int, float, str, type(None))
    if isinstance(value, (list, tuple)):
        return len(value) <= 10_000 and all(isinstance(entry, scalars) for entry in value)
    return isinstance(value, scalars)
