"""Search spaces in RecBole's ``hyper.test`` syntax, read without ``eval``.

One line for each parameter, ``name kind value``; blank lines and lines that begin with ``#`` say
nothing::

    n_layers choice [1,2,3]
    hidden_dropout_prob uniform 0.1,0.6
    learning_rate loguniform -8,-5
    k_interests quniform 2,10,2

As in RecBole (and hyperopt), ``loguniform`` takes natural logarithms: ``-8,-5`` are the bounds
e^-8 = 0.00034 and e^-5 = 0.0067. ``quniform low,high,q`` draws multiples of ``q``.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole.utils import argument_list

from recbole_mm.config import PROPERTIES, Config, key_of
from recbole_mm.config_rules import check_type
from recbole_mm.errors import InputError, nearest
from recbole_mm.plain_yaml import parse_value
from recbole_mm.registry import is_users

_KINDS = {
    "choice": "a list such as [64,128]",
    "uniform": "two numbers, low,high",
    "loguniform": "two natural logarithms, low,high, such as -8,-5",
    "quniform": "three numbers, low,high,step",
}

# with another value of one of these, two validation scores cannot be compared, or it was luck
_NOT_TUNED = frozenset(
    {
        *(argument_list.general_arguments + argument_list.evaluation_arguments),
        *(argument_list.dataset_arguments),
        *("model", "dataset", "mask_history", "on_bad_time", "min_coverage", "feature_cache_dir"),
        "cold_items",
    }
) - {"MAX_ITEM_LIST_LENGTH"}


@dataclass(frozen=True)
class Parameter:
    """One line of a search space.

    Attributes:
        name: Key of the configuration.
        kind: ``choice``, ``uniform``, ``loguniform`` or ``quniform``.
        values: The choices; or low and high, as written (``loguniform``: logarithms), and for
            ``quniform`` the step.
        where: File and line.
        is_int: Values of a ``quniform`` are ints.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    where: str
    is_int: bool = False

    @property
    def labels(self) -> list[Any]:
        """The choices as scalars, which every engine can store: lists become text."""
        return [_label(value) for value in self.values]

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value, of everything but a choice."""
        low, high = self.values[:2]
        if self.kind == "loguniform":
            return math.exp(low), math.exp(high)
        if self.kind == "quniform":
            steps = self.steps()
            return steps[0], steps[-1]
        return low, high

    def points(self) -> list[Any]:
        """Every label or number that can be drawn.

        Raises:
            InputError: If there are infinitely many.
        """
        if self.kind == "choice":
            return self.labels
        if self.kind == "quniform":
            return self.steps()
        raise InputError(
            f"{self.where}: an exhaustive search needs choice or quniform, and {self.name} is "
            f"{self.kind}; use another algo, or list its values"
        )

    def steps(self) -> list[float]:
        """The values of a ``quniform``, as hyperopt rounds them."""
        low, high, step = self.values
        return [
            float(f"{number * step:.12g}")
            for number in range(round(low / step), round(high / step) + 1)
        ]

    def value(self, drawn: Any) -> Any:
        """What the configuration gets for a label or number that an engine has drawn."""
        if self.kind == "choice":
            return self.values[self.labels.index(drawn)]
        number = float(f"{drawn:.12g}") if self.kind == "quniform" else float(drawn)
        return int(number) if self.is_int else number


def read_space(path: str | Path) -> dict[str, Parameter]:
    """The parameters of a file, by name.

    Raises:
        InputError: With the number of the first bad line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"search space {path}: cannot be read ({error})") from error
    space: dict[str, Parameter] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parameter = _parameter(line, f"{path}, line {number}")
        if parameter.name in space:
            raise InputError(
                f"{parameter.where}: {parameter.name} stands in line "
                f"{space[parameter.name].where.rpartition(' ')[2]} already"
            )
        space[parameter.name] = parameter
    if not space:
        raise InputError(f"search space {path}: holds no parameter")
    return space


def default_space(model: str) -> Path:
    """The file of the package for a model.

    Raises:
        InputError: If there is none.
    """
    path = PROPERTIES / f"hyper/{model}.test"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.test")))
        raise InputError(
            f"no search space for {model} in the package (there are: {there}); "
            "write one in RecBole's hyper.test syntax and pass --params_file"
        )
    return path


def check_space(
    space: Mapping[str, Parameter], config: Config, command_line: Sequence[str]
) -> dict[str, Parameter]:
    """The space as this model takes it: known keys, of the type of their defaults.

    Raises:
        InputError: If a key is none of the model's, changes how trials are compared, or is also
            on the command line, where it would silently win over every trial.
    """
    given = set(map(key_of, command_line))
    known = set(config.internal_config_dict) | set(argument_list.training_arguments)
    checked = {}
    for name, parameter in space.items():
        where = parameter.where
        if name in _NOT_TUNED:
            raise InputError(f"{where}: {name} is no hyper-parameter: trials must share it")
        if name not in known:
            own = ""
            if is_users(config.model_class):
                own = f"; if it does, declare it there: default_config = {{{name!r}: ...}}"
            raise InputError(
                f"{where}: {config['model']} does not read {name!r}{nearest(name, known)}{own}"
            )
        if name in given:
            raise InputError(
                f"{where}: {name} is also on the command line, which is stronger than the trials: "
                "remove it from one of the two"
            )
        default = config.internal_config_dict.get(name)
        whole = isinstance(default, int) and not isinstance(default, bool)
        if parameter.kind == "quniform" and whole:
            if any(not number.is_integer() for number in parameter.steps()):
                raise InputError(f"{where}: {name} takes integers; choose a whole step")
            parameter = dataclasses.replace(parameter, is_int=True)
        for value in parameter.values if parameter.kind == "choice" else parameter.bounds:
            typed = value
            if isinstance(value, str) and not isinstance(default, str):
                typed = parse_value(value)  # '[64,64]', as RecBole's files write lists
            elif parameter.is_int:
                typed = int(value)
            is_lenient = name in config._recbole_model_keys
            check_type(name, typed, default, where, lenient_int=is_lenient)
        checked[name] = parameter
    return checked


def grid(space: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Every combination of :meth:`Parameter.points`, the last key of the file fastest.

    Raises:
        InputError: If a parameter has infinitely many values.
    """
    axes = [parameter.points() for parameter in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]


def _parameter(line: str, where: str) -> Parameter:
    name, kind, text = [*line.split(maxsplit=2), "", ""][:3]
    if kind not in _KINDS:
        raise InputError(
            f"{where}: expected `name kind value`, got {line.strip()!r}: "
            f"{kind or 'no kind, which'} is {'none' if kind else 'one'} of {', '.join(_KINDS)}"
        )
    try:
        values = _choices(text) if kind == "choice" else _numbers(text, kind)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        reason = "a literal" if isinstance(error, SyntaxError) else error
        raise InputError(
            f"{where}: {kind} needs {_KINDS[kind]}, got {text.strip()!r} ({reason})"
        ) from error
    return Parameter(name, kind, values, where)


def _choices(text: str) -> tuple[Any, ...]:
    values = ast.literal_eval(text.strip())
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError("not a list with an entry")
    labels: list[Any] = []
    for value in values:
        if _label(value) in labels:
            raise ValueError(f"{value!r} stands in it twice")
        labels.append(_label(value))
    return tuple(values)


def _numbers(text: str, kind: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != (3 if kind == "quniform" else 2):
        raise ValueError(f"{len(numbers)} numbers")
    if not all(math.isfinite(number) for number in numbers) or numbers[0] >= numbers[1]:
        raise ValueError("low must be below high, both finite")
    if kind == "quniform" and numbers[2] <= 0:
        raise ValueError("the step must be positive")
    if kind == "loguniform" and max(map(abs, numbers)) > 700:
        raise ValueError("these are logarithms: e^700 is out of range")
    return numbers


def _label(value: Any) -> Any:
    is_scalar = value is None or isinstance(value, (bool, int, float, str))
    return value if is_scalar else repr(value)
