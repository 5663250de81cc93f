"""``report.html``: one page that needs nothing beside it: tables, charts, protocol, machine."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from recbole_mm import __version__
from recbole_mm.compare.charts import charts_of
from recbole_mm.compare.tables import RowResult, Table, caption, mark
from recbole_mm.compare.write import frame_of_costs, is_cold, spread
from recbole_mm.files import read_json

_MARKS = {"*": "*", "-": "▽", "+": "†"}


@dataclass(frozen=True)
class Column:
    """Head of a column; numbers stand on the right."""

    name: str
    text: bool = False


@dataclass(frozen=True)
class Cell:
    """What a cell of a table shows, and what it is sorted by."""

    text: str
    value: str | float = ""
    sd: str = ""
    marks: str = ""
    style: str = ""


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html.j2")


def render(tables: Sequence[Table]) -> str:
    """The page."""
    figures: dict[str, Any] = {}
    sections = [_section(table, number, figures) for number, table in enumerate(tables)]
    names = ", ".join(table.dataset for table in tables)
    return _template().render(
        title=f"{len(tables[0].rows)} models on {names}",
        version=__version__,
        command=_command(),
        tables=sections,
        environment=list(_environment(tables)),
        figures=_json_for_html(figures),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


def _command() -> str:
    program = Path(sys.argv[0]).name
    if not program.startswith("recbole-mm"):
        return ""
    return " ".join(map(_quoted, [program, *sys.argv[1:]]))


def _quoted(word: str) -> str:
    """For a shell; in double quotes where single ones would have to be pieced together."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def _json_for_html(figures: dict[str, Any]) -> str:
    text = json.dumps(figures)
    for character in "<>&":  # nothing of it can end the element that it stands in
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _section(table: Table, number: int, figures: dict[str, Any]) -> dict[str, Any]:
    charts = []
    for place, chart in enumerate(charts_of(table)):
        key = f"chart-{number}-{place}"
        figures[key] = json.loads(chart.figure.to_json())
        charts.append({"id": key, "title": chart.title, "text": chart.text})
    columns, lines = _results(table)
    costs, cost_lines = _costs(table)
    return {
        "id": f"data-{number}",
        "dataset": table.dataset,
        "columns": columns,
        "lines": lines,
        "costs": {"columns": costs, "lines": cost_lines},
        "notes": caption(table, _MARKS),
        "failures": [f"{failure.cell.name}: {failure.error}" for failure in table.failures],
        "charts": charts,
        "tests": _tests(table),
        "protocol": [
            (
                key.replace("_", " "),
                ", ".join(map(str, value)) if isinstance(value, list) else value,
            )
            for key, value in table.protocol.as_dict().items()
        ],
    }


def _results(table: Table) -> tuple[list[Column], list[list[Cell]]]:
    main = table.metrics[0]
    columns = [Column("model", text=True), *(Column(metric) for metric in table.metrics)]
    if table.has_cold_targets:
        columns.append(Column(f"cold {main}"))
    columns += [Column("gain"), Column(f"valid {main}"), Column("reads", text=True)]
    lines = []
    for row in table.rows:
        gain = table.gain(row, main)
        line = [Cell(row.label, row.label), *(_value(table, row, m) for m in table.metrics)]
        if table.has_cold_targets:
            line.append(_spread_cell(row.on(is_cold, main)))
        line += [
            Cell("" if gain is None else f"{gain:+.1f} %", "" if gain is None else gain),
            _spread_cell(row.valid(main)),
            Cell(row.reads, row.reads),
        ]
        lines.append(line)
    return columns, lines


def _costs(table: Table) -> tuple[list[Column], list[list[Cell]]]:
    frame = frame_of_costs([table]).drop(columns=["dataset", "seeds", "threads", "wall s in all"])
    columns = [Column(name, text=name == "model") for name in frame.columns]
    lines = [[_plain_cell(value) for value in line] for line in frame.to_numpy(dtype=object)]
    return columns, lines


def _plain_cell(value: Any) -> Cell:
    if value is None or value != value:
        return Cell("")
    text = value if isinstance(value, str) else f"{value:,.3f}".rstrip("0").rstrip(".")
    return Cell(text, value)


def _value(table: Table, row: RowResult, metric: str) -> Cell:
    best, second = table.order(metric)
    signs = mark(table.comparison(row, metric), fixed=table.fixed_reference)
    style = "best" if row in best else "second" if row in second else ""
    marks = "".join(_MARKS[sign] for sign in signs if sign)
    return _spread_cell(row.test(metric), style, marks)


def _spread_cell(values: NDArray[np.float64], style: str = "", marks: str = "") -> Cell:
    mean, sd = spread(values)
    if math.isnan(mean):
        return Cell("")
    return Cell(f"{mean:.4f}", mean, "" if math.isnan(sd) else f"{sd:.4f}", marks, style)


def _tests(table: Table) -> dict[str, Any]:
    names = ["row", "metric", "against", "difference", "95 % interval", "Cohen's d"]
    names += [
        "rank-biserial",
        "Wilcoxon p",
        "corrected",
        "t p",
        "corrected",
        "seeds p",
        "corrected",
    ]
    lines = [
        [
            Cell(c.row, c.row),
            Cell(c.metric, c.metric),
            Cell(c.reference, c.reference),
            Cell(f"{c.difference:+.4f}", c.difference),
            Cell(f"{c.low:+.4f} to {c.high:+.4f}", c.low),
            Cell(f"{c.effect:+.3f}", c.effect),
            Cell(f"{c.rank_biserial:+.3f}", c.rank_biserial),
            *(
                Cell("" if math.isnan(p) else f"{p:.2g}", "" if math.isnan(p) else p)
                for p in (c.wilcoxon, c.wilcoxon_holm, c.t, c.t_holm, c.seeds, c.seeds_holm)
            ),
        ]
        for c in table.comparisons
    ]
    return {"columns": [Column(name, text=i < 3) for i, name in enumerate(names)], "lines": lines}


def _environment(tables: Sequence[Table]) -> Iterator[tuple[str, str]]:
    """The machine and the versions of all runs; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for table in tables:
        for row in table.rows:
            for outcome in row.outcomes:
                values = read_json(outcome.run / "environment.json")
                packages = values.pop("packages")
                values.pop("command")
                for key, value in {**values, **packages}.items():
                    found.setdefault(key, {})["none" if value is None else str(value)] = None
    for key, several in found.items():
        yield key, ", ".join(several)
