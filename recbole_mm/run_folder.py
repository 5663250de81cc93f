"""The folder of a run: what is needed to read, repeat and reload it, without a pickle.

=====================  ==========================================================
``config.yaml``        every resolved value
``environment.json``   versions, a hash of our source, machine, command
``data.json``          counts of the data, the report of each modality
``protocol.json``      how the run was evaluated, and the fingerprints of its data
``ids.json``           item and user tokens in the order of their internal ids
``run.log``            what RecBole and we log
``metrics.jsonl``      one line an epoch: seconds, each loss term, validation if there was one
``model.safetensors``  weights of the best epoch, and what they belong to
``items.safetensors``  features, categories and graphs of the items, for models that read them
``last.safetensors``   where the training stands, for ``--resume``
``.lock``              there while a process is at work
``result.json``        the result dict of :func:`recbole_mm.run`
``per_user.npz``       what each test user got, if asked for: ``recbole_mm.evaluation.PerUser``
``log_tensorboard/``   RecBole's TensorBoard events
=====================  ==========================================================
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm import __version__, distributed
from recbole_mm.checkpoint import MEND, Checkpoint, fingerprint, read, write
from recbole_mm.data.digest import sha256_of
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.files import alone, replacing, writing
from recbole_mm.registry import code_of

MODEL = "model.safetensors"
STATE = "last.safetensors"
ITEMS = "items.safetensors"

_PACKAGES = ("recbole", "torch", "numpy", "scipy", "pandas", "scikit-learn", "safetensors")
_DECIDE = ("recbole", "torch", "numpy")  # what an epoch computes with
DAMAGED = "restore the folder, or run it anew"
_COLOUR = re.compile(r"\x1b\[[^m]*m?")


class RunFolder:
    """A new folder ``<checkpoint_dir>/<dataset>/<model>/<time>``, never one that exists.

    Raises:
        EnvironmentFault: If it cannot be created or written.
    """

    def __init__(self, checkpoint_dir: str | Path, dataset: str, model: str) -> None:
        parent = Path(checkpoint_dir).resolve() / dataset / model
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        with writing(parent, MEND):
            parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(1, 10_000):
                # two runs may start in the same second
                path = parent / (stamp if attempt == 1 else f"{stamp}_{attempt}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                self.path = path
                return
        raise EnvironmentFault(f"{parent}: no free name for a run folder; set checkpoint_dir")

    @classmethod
    def at(cls, path: str | Path) -> RunFolder:
        """A folder that is there already.

        Raises:
            InputError: If it is not that of a run.
        """
        if not Path(path, "config.yaml").is_file():
            below = sorted(Path(path).glob("**/config.yaml")) if Path(path).is_dir() else []
            hint = f"; there is one below it, {below[-1].parent}" if below else ""
            raise InputError(f"{path}: not a run folder, it has no config.yaml{hint}")
        folder = cls.__new__(cls)
        folder.path = Path(path).resolve()
        return folder

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` under ``name``, whole or not at all."""
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=True)
        self._write(name, (text + "\n").encode())

    def write_yaml(self, name: str, content: Mapping[str, Any]) -> None:
        """Write ``content`` under ``name``, whole or not at all."""
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
        self._write(name, text.encode())

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        path = self.path / name
        with writing(path, MEND):
            path.unlink(missing_ok=True)

    def append_line(self, name: str, content: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        path = self.path / name
        with writing(path, MEND), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The resolved values in ``config.yaml``."""
        file = self.path / "config.yaml"
        try:
            values: Any = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{file}: cannot be read ({error}); {DAMAGED}") from error
        # the keys are sorted: with the last of RecBole's the file is whole
        if not isinstance(values, dict) or "worker" not in values:
            raise InputError(f"{file}: is not whole; {DAMAGED}")
        return values

    def read_json(self, name: str) -> dict[str, Any]:
        """What :meth:`write_json` wrote of a mapping.

        Raises:
            InputError: If it cannot be read, or holds anything else.
        """
        file = self.path / name
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({error}); {DAMAGED}") from error
        if not isinstance(content, dict) or not content:
            raise InputError(f"{file}: holds no mapping; {DAMAGED}")
        return content

    def write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace a file of JSON lines, whole or not at all."""
        self._write(name, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write arrays as a compressed ``.npz``, whole or not at all."""
        content = io.BytesIO()
        np.savez_compressed(content, **dict[str, Any](arrays))
        self._write(name, content.getvalue())

    def write_weights(self, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write the weights of the best epoch and what they belong to, whole or not at all."""
        write(self.path / MODEL, weights, about)

    def read_weights(self, device: torch.device | str = "cpu") -> Checkpoint:
        """The weights of the best epoch, and what they belong to."""
        return read(self.path / MODEL, device)

    def write_items(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write what the model reads of the items."""
        write(self.path / ITEMS, tensors, about)

    @property
    def has_weights(self) -> bool:
        """Whether an epoch has been saved."""
        return (self.path / MODEL).is_file()

    def write_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write where the training stands, whole or not at all."""
        write(self.path / STATE, tensors, about)

    def read_state(self) -> Checkpoint:
        """Where the training stands, on the CPU."""
        return read(self.path / STATE)

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        with writing(path, MEND), replacing(path) as temporary:
            temporary.write_bytes(content)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from going on with this run; the system frees it if this one dies.

        Raises:
            InputError: If another process is at work here.
        """
        place = self.path / ".lock"
        busy = f"{self.path}: this run is still going on in another process; wait for its end"
        with alone(place, MEND, InputError(busy)):
            try:
                yield
            finally:
                place.unlink(missing_ok=True)

    @contextlib.contextmanager
    def logging_to_file(self, level: str) -> Iterator[None]:
        """Send what is logged to ``run.log`` for the length of the block."""
        root = logging.getLogger()
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        before = root.level
        root.addHandler(handler)
        root.setLevel(level.upper())
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(before)
            handler.close()


class _PlainFormatter(logging.Formatter):
    """Without the colours that RecBole writes into its messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


@functools.cache
def code_digest() -> str:
    """A hash of the package's source files: what tells two states of one version apart."""
    package = Path(__file__).parent
    files = sorted(package.rglob("*.py"))
    return fingerprint(
        f"{file.relative_to(package).as_posix()} {sha256_of(file)}" for file in files
    )


def processor() -> str:
    """Name of the processor and of the instructions that torch uses there.

    CPU seconds mean little without it. Where the system names none: the architecture.
    """
    name = platform.processor() or platform.machine()  # on Linux mostly the architecture
    with contextlib.suppress(OSError):
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*: *(.*\S)", known, re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def changed_since(began: Mapping[str, Any], model: type) -> list[str]:
    """What decides the last digits of a run, and is another now than its environment.json says."""
    now, packages = environment(model), began.get("packages", {})
    names = {
        "code": f"the source of recbole_mm, {packages.get('recbole_mm')} then",
        "code of the model": f"the code of {model.__name__}",
        "processor": f"the processor, {began.get('processor')} then",
    }
    changed = [what for key, what in names.items() if key in began and began[key] != now[key]]
    for package, version_then in packages.items():
        if package in _DECIDE and version_then != now["packages"][package]:
            changed.append(f"{package}, {version_then} then")
    return changed


def environment(model: type) -> dict[str, Any]:
    """Versions and machine of a run of this model, for the run folder."""
    versions = {"recbole_mm": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "code": code_digest(),
        "code of the model": code_of(model),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": distributed.n_processes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
        "command": sys.argv,
    }
