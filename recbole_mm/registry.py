"""Names of models: ours, then RecBole's."""

from __future__ import annotations

import ast
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import recbole
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_mm import compat
from recbole_mm.data.digest import sha256_of
from recbole_mm.errors import EnvironmentFault, InputError, nearest
from recbole_mm.models.cammsr import CAMMSR
from recbole_mm.models.mdsrec import MDSRec
from recbole_mm.models.mufasa import MUFASA
from recbole_mm.models.sasrec import SASRecFast, SASRecMM

MODELS: dict[str, type] = {
    cls.__name__: cls for cls in (MUFASA, CAMMSR, MDSRec, SASRecFast, SASRecMM)
}

RECBOLE_PROPERTIES = Path(recbole.__file__).parent / "properties"

# what of RecBole cannot run on this path, and why
_UNSUPPORTED = {
    # classes, and what RecBole calls their property files
    **dict.fromkeys(("XGBoost", "xgboost"), "it needs the xgboost package and its own trainer"),
    **dict.fromkeys(("LightGBM", "lightgbm"), "it needs the lightgbm package and its own trainer"),
    "S3Rec": "its pre-training reads and writes pickled checkpoints",
}


_NOT_THE_USERS = ("recbole", "recbole_mm", "torch", "builtins")
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}


def model_names() -> list[str]:
    """All names that :func:`get_model` knows: ours first, then RecBole's in alphabetical order."""
    builtin = {path.stem for path in (RECBOLE_PROPERTIES / "model").glob("*.yaml")}
    return [*MODELS, *sorted(builtin - set(_UNSUPPORTED) - set(MODELS))]


def get_model(name: str) -> type:
    """The model class of that name.

    Args:
        name: Of a model of this package or of RecBole, or ``module:Class`` for one of the user's
            own; Python looks for the module in the working directory first.

    Raises:
        InputError: If there is no such model, or the module of a class has a fault.
        EnvironmentFault: If that module imports a package that is not installed.
    """
    if not isinstance(name, str):
        raise InputError(f"model: get_model takes a name, got {name!r}")
    if is_own(name):
        return _own_model(name)
    if name in MODELS:
        return MODELS[name]
    if name in _UNSUPPORTED:
        raise InputError(f"model {name!r} does not run here: {_UNSUPPORTED[name]}")
    # a name with dots, my_module.Model, would make Python look for a package of RecBole's
    model = compat.import_model(name) if name.isidentifier() else None
    if model is None:
        names = model_names()
        own = "; a class of your own is named module:Class"
        raise InputError(
            f"unknown model {name!r}{nearest(name, names)}{own}; known models: {', '.join(names)}"
        )
    return model


def is_own(name: str) -> bool:
    """Whether a name is that of a class of the user's own, ``module:Class``."""
    return ":" in name


def is_users(model: type) -> bool:
    """Whether a class is the user's own: neither of this package nor of RecBole."""
    return MODELS.get(model.__name__) is not model and not compat.is_recboles(model)


def name_of(model: Any) -> str:
    """The name by which :func:`get_model` finds a class again, also in another process.

    Raises:
        InputError: If it is no model's class, or one that no module holds at its top level.
    """
    if not is_model(model) or "." in model.__qualname__:
        raise InputError(
            "models: takes names, and classes of models at the top level of a module, got "
            f"{model!r}"
        )
    if not is_users(model):
        return model.__name__
    file = getattr(sys.modules.get(model.__module__), "__file__", None)
    if model.__module__ == "__main__" and not (file and Path(file).is_file()):
        raise InputError(
            f"models: {model.__name__} stands in no file, so that other processes cannot import "
            "it; write it into a module, and give module:Class or the class"
        )
    return f"{model.__module__}:{model.__qualname__}"


def class_name(name: str) -> str:
    """What the class of a model is called: ``Class`` for ``module:Class``."""
    return name.rpartition(":")[2]


def _own_model(name: str) -> type:
    place, _, wanted = name.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), wanted)):
        raise InputError(f"model {name!r} is not of the form module:Class, package.module:Class")
    if place.endswith(".py"):
        raise InputError(f"model {name!r}: name the module without .py, {place[:-3]}:{wanted}")
    if (here := str(Path.cwd())) not in sys.path:  # as for `python -m`
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise EnvironmentFault(
                f"model {name!r}: {place} imports {error.name}, which is not installed "
                f"({_place_of(error)})"
            ) from error
        raise InputError(
            f"model {name!r}: there is no module {error.name!r} in {here} or on Python's path"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"model {name!r}: {place} cannot be imported: {type(error).__name__}: {error} "
            f"({_place_of(error)})"
        ) from error
    model = getattr(module, wanted, None)
    if not is_model(model):
        there = [key for key, value in vars(module).items() if is_model(value)]
        raise InputError(
            f"model {name!r}: {place} ({getattr(module, '__file__', 'built in')}) has no class "
            f"{wanted!r} derived from a model of RecBole or of this package{nearest(wanted, there)}"
        )
    if model.__name__ != wanted:
        raise InputError(
            f"model {name!r}: {wanted} is another name of {model.__name__}; write {name_of(model)}"
        )
    return model


def _place_of(error: BaseException) -> str:
    """Where a fault of the user's code is."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def ready(model: type) -> type:
    """A class that can run here: the user's own is looked at, RecBole's gaps in it are closed.

    Raises:
        InputError: If it is the user's own and has the name of another model, derives from one
            that does not run here, or has a ``default_config`` that no file could hold.
    """
    if not is_users(model):
        return model
    if model.__name__ in {*model_names(), *_UNSUPPORTED}:
        whose = "this package" if model.__name__ in MODELS else "RecBole"
        raise InputError(
            f"model: {model.__module__}:{model.__name__} has the name of a model of {whose}, for "
            "which properties, run folders and tables would take it; call the class otherwise"
        )
    for cls in model.__mro__:
        if compat.is_recboles(cls) and cls.__name__ in _UNSUPPORTED:
            raise InputError(
                f"model {model.__name__} derives from {cls.__name__}, which does not run here: "
                f"{_UNSUPPORTED[cls.__name__]}"
            )
        _check_defaults(cls)
    compat.forget_anomaly_detection()
    return compat.with_public_dok(model)


def _check_defaults(cls: type) -> None:
    """``default_config`` must come back from a file as it was."""
    values = vars(cls).get("default_config", {})
    if not isinstance(values, Mapping):
        raise InputError(
            f"{cls.__name__}.default_config must be a mapping of keys to values, got {values!r}"
        )
    for key, value in values.items():
        if type(key) is not str or not _is_plain(value):
            raise InputError(
                f"{cls.__name__}.default_config: {key!r}: {value!r} is no plain data, which a run "
                "folder can hold: text for a key; numbers, texts, lists and mappings for a value"
            )


def _is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(held) for key, held in value.items())
    return value is None or type(value) in (bool, int, float, str)


def sources_of(model: type) -> list[Path]:
    """Files with the code of a user's class.

    They are those of the class, of the user's classes that it derives from, and of all that these
    files import, wherever in them, from the folder that holds their module or package; of an
    installed package, from that package alone. Of a class in an archive the archive.
    """
    found: set[Path] = set()
    for cls in model.__mro__:
        name = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if name is None or cls.__module__.partition(".")[0] in _NOT_THE_USERS:
            continue
        file = Path(name)
        root = file.parents[cls.__module__.count(".") + (file.name == "__init__.py")]
        file = next((place for place in (file, *file.parents) if place.is_file()), file)
        within = root / cls.__module__.partition(".")[0] if root in _INSTALLED else root
        waiting = [file]
        while waiting:
            file = waiting.pop()
            if file not in found and file.is_file():
                found.add(file)
                waiting += [other for other in _imported(file, root) if within in other.parents]
    return sorted(found)


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """Files of the modules below ``root`` that a file imports, and of the packages around them."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # an archive, an extension module
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            names, place = [alias.name for alias in node.names], root
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            place = file.parents[node.level - 1] if node.level else root
        else:
            continue
        for name in names:
            if place == root and name.partition(".")[0] in _NOT_THE_USERS:
                continue
            folder = place
            for part in name.split("."):  # the last one may be a class or a function
                yield folder / f"{part}.py"
                folder /= part
                yield folder / "__init__.py"


def code_of(model: type) -> str:
    """What changes with the code of a user's class: hashes of its files; empty for other models."""
    return " ".join(map(sha256_of, sources_of(model))) if is_users(model) else ""


def is_model(given: Any) -> TypeGuard[type]:
    """Whether this is the class of a model as RecBole knows them."""
    return isinstance(given, type) and issubclass(given, AbstractRecommender)


def model_of_run(name: str, folder: Path, given: str | type | None = None) -> type:
    """The model class of a run folder: the one that is given, or else the one that it names.

    No folder says where a class of the user's own is, and nothing is imported because of one.

    Raises:
        InputError: If the name is that of a user's class, which no folder holds, or if what is
            given is no model's class, or that of another model.
    """
    if isinstance(given, str):
        given = get_model(given)
    if given is not None:
        if not is_model(given):
            raise InputError(
                f"model: takes the class of the model, or module:Class, got {given!r}; leave it "
                "out for a model of this package or of RecBole"
            )
        if given.__name__ != name:
            raise InputError(
                f"{folder} is a run of {name}, not of {given.__name__}; give the class of that name"
            )
        return given
    if name not in model_names():
        raise InputError(
            f"{folder}: {name!r} is no model of this package or of RecBole; give its class, "
            f"model={name}, or on the command line --model=module:{name}"
        )
    return get_model(name)
