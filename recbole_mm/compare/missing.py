"""A trained model when a modality is missing for a share of the items at test.

The best weights of a run are read back, the vectors of some items are hidden (`hidden_features`),
and the test set is scored again: nothing is trained or chosen, so this is no second look at it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_mm.compare.plan import Cell
from recbole_mm.errors import InputError, RecboleMMError, nearest
from recbole_mm.files import read_json
from recbole_mm.registry import get_model

FILE = "missing.json"
PERCENTS = (0.0, 25.0, 50.0, 75.0, 100.0)

Wanted = Mapping[str, Sequence[float]]
"""By modality, for how many percent of the items that have it, it is to be missing."""


def parse(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """What ``text:0,50,100`` and the like ask for; without numbers, 0, 25, 50, 75 and 100.

    Raises:
        InputError: If a number is none, or outside [0, 100].
    """
    wanted: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, numbers = text.partition(":")
        try:
            # as many digits as the record of a measurement has
            percents = tuple(float(f"{float(n):g}") for n in numbers.split(",") if numbers)
        except ValueError:
            percents = (-1.0,)
        if not name or any(not 0 <= percent <= 100 for percent in percents):
            raise InputError(
                f"--missing_modality: {text!r} is not of the form text:0,25,50,75,100, a modality "
                "and percentages"
            )
        wanted[name] = tuple(sorted({*(percents or PERCENTS), *wanted.get(name, ())}))
    return wanted


def check(wanted: Wanted, cells: Sequence[Cell]) -> None:
    """Refuse a modality that no row reads, before anything is trained.

    Raises:
        InputError: Naming it.
    """
    read_by_some = {
        name
        for cell in cells
        if getattr(get_model(cell.row.model), "consumes_features", False)
        for name in cell.values["modalities"]
    }
    for name in wanted:
        if name not in read_by_some:
            raise InputError(
                f"--missing_modality: no row reads {name!r}{nearest(name, read_by_some)}; they "
                f"read {', '.join(sorted(read_by_some)) or 'no features'}"
            )


def read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What a cell's folder has: by modality and percent, the test result or an ``error``."""
    file = folder / FILE
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if file.is_file():
        found = read_json(file)
    return found


def still_to_do(
    folder: Path, record: Mapping[str, Any], wanted: Wanted
) -> Iterator[tuple[str, float]]:
    """What is wanted of a finished cell, can be had of its model, and is not there yet."""
    done = read(folder)
    reads = {modality["name"] for modality in record["result"]["data"]["modalities"]}
    for name, percents in wanted.items():
        for percent in percents if name in reads else ():
            if "error" in done.get(name, {}).get(f"{percent:g}", {"error": ""}):
                yield name, percent


def measure(
    run: Path, modality: str, percent: float, *, model: str | None = None
) -> dict[str, Any]:
    """Test result of a run's best weights with a modality missing; ``error`` where there is none.

    Args:
        run: A run folder.
        modality: Name.
        percent: Of the items that have it.
        model: As in :func:`recbole_mm.open_run`.
    """
    from recbole_mm.quick_start import open_run
    from recbole_mm.trainer import trainer_class

    try:
        hidden = {"hidden_features": {modality: percent}}
        config, _, loaders, net = open_run(run, hidden, model=model)
        trainer = trainer_class(config["MODEL_TYPE"], config.model_class)(config, net, None)
        trainer.eval_collector.data_collect(loaders[0])
        result = trainer.evaluate(loaders[2], load_best_model=False)
    except RecboleMMError as error:
        return {"error": str(error)}
    except Exception as error:  # the run itself is finished, whatever this was
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {metric: float(value) for metric, value in result.items()}
