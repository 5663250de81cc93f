"""Names of models: ours, then RecBole's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, TypeGuard

import recbole
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_mm import compat
from recbole_mm.errors import InputError, nearest
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
        InputError: If there is no such model.
    """
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


def name_of(model: Any) -> str:
    """The name by which :func:`get_model` finds a class again, also in another process.

    Raises:
        InputError: If it is no model's class, or one that no module holds.
    """
    if not is_model(model) or "." in model.__qualname__:
        raise InputError(
            f"models: takes names and classes of models that stand in a module, got {model!r}"
        )
    if MODELS.get(model.__name__) is model or compat.is_recboles(model):
        return model.__name__
    return f"{model.__module__}:{model.__qualname__}"


def class_name(name: str) -> str:
    """What the class of a model is called: ``Class`` for ``module:Class``."""
    return name.rpartition(":")[2]


def _own_model(name: str) -> type:
    place, _, wanted = name.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), wanted)):
        raise InputError(f"model {name!r} is not of the form module:Class, package.module:Class")
    if (here := str(Path.cwd())) not in sys.path:  # as for `python -m`
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # of something that the module imports
        raise InputError(
            f"model {name!r}: there is no module {error.name!r} in {here} or on Python's path"
        ) from error
    model = getattr(module, wanted, None)
    if not is_model(model):
        there = [key for key, value in vars(module).items() if is_model(value)]
        raise InputError(
            f"model {name!r}: {place} has no class {wanted!r} derived from a model of RecBole or "
            f"of this package{nearest(wanted, there)}"
        )
    return model


def sources_of(model: type) -> list[Path]:
    """Files with the code of a user's class, and of those of the user that it derives from."""
    packages = ("recbole", "recbole_mm", "torch", "builtins")
    own = (cls for cls in model.__mro__ if cls.__module__.partition(".")[0] not in packages)
    files = (getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in own)
    return sorted({Path(file) for file in files if file})


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
