"""A search: what one trial is, what is recorded of it, and what may continue an earlier search."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm import files
from recbole_mm.config import NO_NUMBERS, Config, digest_of_data, key_of
from recbole_mm.errors import InputError, NumericalError, OutOfMemory
from recbole_mm.protocol import Protocol, assert_comparable
from recbole_mm.quick_start import run
from recbole_mm.registry import code_of, is_users
from recbole_mm.run_folder import code_digest
from recbole_mm.tuning.space import Parameter

_LOG = logging.getLogger(__name__)


class _ImpossibleError(Exception):
    """Values of a trial that no configuration may have together."""


# a trial that ends with one of these is recorded, and the search goes on
_FAILURES = (NumericalError, OutOfMemory, _ImpossibleError)

Record = dict[str, Any]
"""A trial as plain data: ``values``, ``scores`` (of each seed), ``score`` and ``valid`` (means over
the seeds; all three ``None`` if it failed), ``error`` (``None`` if it did not), ``best_epoch`` and
``epochs`` (means), ``seconds`` (in all), ``protocol`` (of the first seed); of a failed one
``out_of_memory`` and ``impossible``, too: whether that was why, or values that do not go
together."""


@dataclass(frozen=True)
class Search:
    """What every engine needs, as plain data, so that it can travel to another process.

    Attributes:
        model: Name or class of the model.
        files: Configuration files, absolute.
        values: Configuration by key.
        command_line: ``--key=value`` arguments.
        space: The parameters, by key.
        algo: ``exhaustive``, ``random`` or ``bayes``.
        n_trials: How many trials count.
        out: Folder of the results.
        seed: Of the search, and the first of every trial.
        n_seeds: How many runs a trial is, with the seed and those that follow it.
        metric: The validation metric that ranks trials.
        bigger: Whether more of it is better.
        show: Print a line for each trial.
        use_gpu: Whether trials run on a GPU.
        settings: What an earlier search must share to be continued; ``model`` and ``dataset`` too.
    """

    model: str | type
    files: tuple[Path, ...]
    values: Mapping[str, Any]
    command_line: tuple[str, ...]
    space: Mapping[str, Parameter]
    algo: str
    n_trials: int
    out: Path
    seed: int
    n_seeds: int
    metric: str
    bigger: bool
    show: bool
    use_gpu: bool
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything but the best configuration goes."""
        return self.out.joinpath(self.settings["dataset"], self.settings["model"])

    def begin(self) -> None:
        """Make the folder, or refuse one that another search has begun.

        Raises:
            InputError: as :func:`check_same`
        """
        path = self.folder / "search.json"
        source = code_digest()
        if not path.is_file() or [*self.folder.iterdir()] == [path]:  # refused before any trial
            begun = {**self.settings, "source of recbole_mm": source}
            write_text(path, json.dumps(begun, indent=1) + "\n")
        # also after writing: another process may have begun a search here at the same time
        before = files.read_json(path)
        source_then = before.pop("source of recbole_mm", source)
        check_same(before, self.settings, self.folder)
        if source_then != source:
            _LOG.warning(
                "%s: the search was begun by another source of recbole_mm, whose trials may differ",
                self.folder,
            )

    def configuration(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Values for the configuration, from the labels and numbers that an engine has drawn."""
        return {name: parameter.value(drawn[name]) for name, parameter in self.space.items()}

    def trial(
        self,
        values: Mapping[str, Any],
        earlier: Sequence[Record] = (),
        machine: Mapping[str, Any] | None = None,
    ) -> Record:
        """Train with these values and each seed, and score the best epochs on validation.

        Args:
            values: Configuration by key.
            earlier: Records that must have been evaluated alike; with any, what the data warn of
                is not said again.
            machine: Keys of :data:`~recbole_mm.config.NO_NUMBERS` to set.

        Raises:
            InputError: Also if the trial was evaluated in another way than an earlier one.
        """
        started = time.perf_counter()
        keys = ("scores", "score", "valid", "error", "best_epoch", "epochs", "seconds", "protocol")
        record: Record = {"values": dict(values), **dict.fromkeys(keys)}
        results: list[dict[str, Any]] = []
        log = logging.getLogger("recbole_mm")
        level = log.level
        try:
            for seed in range(self.seed, self.seed + self.n_seeds):
                if earlier or results:
                    log.setLevel(logging.ERROR)
                forced = {"show_progress": False, "seed": seed, **(machine or {})}
                if not results:
                    try:
                        Config(*self._settings(values, forced), command_line=self._free(forced))
                    except InputError as error:
                        # the search itself is well configured: these values do not go together
                        raise _ImpossibleError(str(error)) from error
                results.append(self._run(values, forced))
                if len(results) == 1:
                    _check_alike(results[0], earlier)
        except _FAILURES as error:
            seconds = round(time.perf_counter() - started, 2)
            return {
                **record,
                "error": str(error),
                "out_of_memory": isinstance(error, OutOfMemory),
                "impossible": isinstance(error, _ImpossibleError),
                "seconds": seconds,
            }
        finally:
            log.setLevel(level)
        valid = [result["best_valid_result"] for result in results]
        scores = [result["best_valid_score"] for result in results]
        return {
            **record,
            "scores": scores,
            "score": _mean(scores),
            "valid": {name: _mean([float(part[name]) for part in valid]) for name in valid[0]},
            "best_epoch": _mean([result["best_epoch"] for result in results]),
            "epochs": _mean([result["epochs"] for result in results]),
            "seconds": round(sum(result["seconds"] for result in results), 2),
            "protocol": results[0]["protocol"],
        }

    def _run(self, values: Mapping[str, Any], forced: Mapping[str, Any]) -> dict[str, Any]:
        """One run of a trial: the result of :func:`recbole_mm.run`, without a test score."""
        return run(
            *self._settings(values, forced),
            saved=False,
            score_test=False,
            command_line=self._free(forced),
        )

    def _settings(
        self, values: Mapping[str, Any], forced: Mapping[str, Any]
    ) -> tuple[str | type, str, Sequence[Path], dict[str, Any]]:
        """Model, data set, files and values of a run."""
        own = {**self.values, **values, **forced}
        return self.model, self.settings["dataset"], self.files, own

    def _free(self, forced: Mapping[str, Any]) -> list[str]:
        """The command line without what is forced, which must not lose to it."""
        return [a for a in self.command_line if key_of(a) not in forced]

    def best(self, records: Sequence[Record]) -> int | None:
        """Index of the record with the best validation score, the first of equal ones."""
        scores = {i: r["score"] for i, r in enumerate(records) if r["error"] is None}
        return (max if self.bigger else min)(scores, key=scores.__getitem__) if scores else None

    def report(self, record: Record, records: Sequence[Record]) -> None:
        """Print one line for ``record``, the last to come in of ``records``."""
        if not self.show:
            return
        outcome = f"failed: {record['error']}"
        if record["error"] is None:
            outcome = f"valid {self.metric} {record['score']:.4f}"
            if self.n_seeds > 1:
                outcome += f" ± {np.std(record['scores'], ddof=1):.4f}"
        best = self.best(records)
        if best is not None:
            outcome += f"  best {records[best]['score']:.4f}"
        print(  # noqa: T201  (the progress of a search belongs on the terminal)
            f"trial {len(records):>3} of {self.n_trials}  {outcome}  {record['seconds']:.1f} s  "
            + spelled(record["values"]),
            flush=True,
        )


def settings_of(
    config: Config,
    space: Mapping[str, Parameter],
    engine: str,
    algo: str,
    n_trials: int,
    n_seeds: int,
) -> dict[str, Any]:
    """Whatever changes the trials of a search, as plain data for JSON."""
    values = config.resolved()
    settings = {
        "model": values.pop("model"),
        "dataset": values.pop("dataset"),
        "engine": engine,
        "algo": algo,
        "contents of the data": digest_of_data(config),
        "space": [f"{p.name} {p.kind} {list(p.values)}" for p in space.values()],
        "config": {k: v for k, v in values.items() if k not in NO_NUMBERS and k not in space},
    }
    if n_seeds > 1:
        settings["seeds"] = n_seeds
    if is_users(config.model_class):
        cls = config.model_class
        settings["code of the model"] = f"{cls.__module__}:{cls.__qualname__} {code_of(cls)}"
    # ray keeps the number of trials with the state that it continues from
    return {**settings, "trials": n_trials} if engine == "ray" else settings


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str | Path) -> None:
    """Refuse to continue a search whose settings have changed.

    Raises:
        InputError: Naming what differs, with both values.
    """
    one, two = ({**s, **s["config"], "config": None} for s in (before, now))
    differing = [
        f"{key} ({one.get(key)!r} then, {two.get(key)!r} now)"
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key)
    ]
    if differing:
        raise InputError(
            f"{where} holds a search with other settings: {'; '.join(differing)}; "
            "choose another --out and --storage, or delete it"
        )


def spelled(values: Mapping[str, Any]) -> str:
    """Values of a trial for people."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; processes that share a search may write the same one.

    Raises:
        EnvironmentFault: If it cannot be written.
    """
    with files.writing(path, "free space or point --out at a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text, shared=True)


def _check_alike(result: Mapping[str, Any], earlier: Sequence[Record]) -> None:
    """Refuse a run without a validation score, and one of other data than an earlier trial's."""
    if not result["best_valid_result"]:
        raise InputError(
            f"a trial of {result['model']} on {result['dataset']} was not validated: no user "
            "is long enough for a validation row, or epochs is 0"
        )
    for other in earlier:
        if other["protocol"] is not None:
            protocols = (other["protocol"], result["protocol"])
            assert_comparable(*(Protocol.from_dict(values) for values in protocols))
            break


def _mean(numbers: Sequence[float]) -> float:
    """The number itself, if it is one."""
    return numbers[0] if len(numbers) == 1 else float(np.mean(numbers))
