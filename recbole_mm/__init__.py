"""Multimodal sequential recommendation for RecBole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_mm.models.mufasa import MUFASA
    from recbole_mm.quick_start import explain_run, objective_function, open_run, run
    from recbole_mm.registry import get_model
    from recbole_mm.serving import load
    from recbole_mm.trainer import trainer_class as get_trainer

__version__ = "0.1.0"

__all__ = [
    "MUFASA",
    "explain_run",
    "get_model",
    "get_trainer",
    "load",
    "objective_function",
    "open_run",
    "run",
]


def __getattr__(name: str) -> Any:
    # on first use: importing RecBole takes seconds, which `--help` and the build need not wait for
    if name in ("run", "open_run", "explain_run", "objective_function"):
        from recbole_mm import quick_start

        return getattr(quick_start, name)
    if name == "get_model":
        from recbole_mm.registry import get_model

        return get_model
    if name == "get_trainer":
        from recbole_mm.trainer import trainer_class

        return trainer_class
    if name == "load":
        from recbole_mm.serving import load

        return load
    if name == "MUFASA":
        from recbole_mm.models.mufasa import MUFASA

        return MUFASA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
