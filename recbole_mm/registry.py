"""Names of models: ours, then RecBole's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

    Raises:
        InputError: If neither this package nor RecBole has a model of that name.
    """
    if name in MODELS:
        return MODELS[name]
    if name in _UNSUPPORTED:
        raise InputError(f"model {name!r} does not run here: {_UNSUPPORTED[name]}")
    # a name with dots, my_module.Model, would make Python look for a package of RecBole's
    model = compat.import_model(name) if name.isidentifier() else None
    if model is None:
        names = model_names()
        raise InputError(
            f"unknown model {name!r}{nearest(name, names)}; known models: {', '.join(names)}"
        )
    return model


def is_model(given: Any) -> bool:
    """Whether this is the class of a model as RecBole knows them."""
    return isinstance(given, type) and issubclass(given, AbstractRecommender)


def model_of_run(name: str, folder: Path, given: type | None = None) -> type:
    """The model class of a run folder: the one that is given, or else the one that it names.

    Raises:
        InputError: If the name is that of a user's class, which no folder holds, or if what is
            given is no model's class, or that of another model.
    """
    if given is not None:
        if not is_model(given):
            raise InputError(
                f"model: takes the class of the model, got {given!r}; leave it out for a model of "
                "this package or of RecBole"
            )
        if given.__name__ != name:
            raise InputError(
                f"{folder} is a run of {name}, not of {given.__name__}; give the class of that name"
            )
        return given
    if name not in model_names():
        raise InputError(
            f"{folder}: {name!r} is no model of this package or of RecBole; give its class, "
            f"model={name}"
        )
    return get_model(name)
