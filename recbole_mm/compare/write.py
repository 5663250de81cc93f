"""The files of a table: Markdown, LaTeX, CSV and parquet."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tabulate import tabulate

from recbole_mm.compare import significance
from recbole_mm.compare.cells import Outcome
from recbole_mm.compare.tables import RowResult, Table, caption, mark
from recbole_mm.compare.users import lists_frame
from recbole_mm.evaluation import PerUser
from recbole_mm.files import replacing, write_text, writing

_MARKDOWN = {"*": "\\*", "-": "▽", "+": "†"}
_LATEX = {"*": "$^{*}$", "-": "$^{\\triangledown}$", "+": "$^{\\dagger}$"}
_TEX_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
)

_MEND = "free space or choose another --out, and start the same command again"
_OF_TABLES = (
    *("table.md", "table.tex", "table.csv", "significance.csv", "cost.csv", "cost.md"),
    *("missing.csv", "users.parquet", "topk.parquet", "report.html"),
)


def write_all(tables: Sequence[Table], outcomes: Sequence[Outcome], out: Path) -> None:
    """Write every file of the tables into ``out``; without any, what became of the cells.

    Args:
        tables: One for each data set.
        outcomes: Of all cells.
        out: The folder.

    Raises:
        EnvironmentFault: If the folder cannot be written.
    """
    with writing(out, _MEND):
        write_text(out / "cells.csv", _frame_of_cells(outcomes, out).to_csv(index=False))
        if not tables:
            for name in _OF_TABLES:  # of another call
                (out / name).unlink(missing_ok=True)
            return
        write_text(out / "table.md", "\n".join(_markdown_lines(tables)) + "\n")
        write_text(out / "table.tex", "\n\n".join(_latex(table) for table in tables) + "\n")
        write_text(out / "table.csv", _frame_of_means(tables).to_csv(index=False))
        write_text(out / "significance.csv", _frame_of_tests(tables).to_csv(index=False))
        costs = frame_of_costs(tables)
        write_text(out / "cost.csv", costs.to_csv(index=False))
        short = costs.drop(columns=["seeds", "processor"])
        where = "; ".join(dict.fromkeys(costs["processor"]))
        write_text(out / "cost.md", f"{_github(short)}\n\nMeasured on {where}.\n")
        missing = _frame_of_missing(tables)
        if len(missing):
            write_text(out / "missing.csv", missing.to_csv(index=False))
        else:
            (out / "missing.csv").unlink(missing_ok=True)  # of another call
        _write_parquet(tables, out)


def write_page(page: str, out: Path) -> None:
    """Write the report.

    Raises:
        EnvironmentFault: If the folder cannot be written.
    """
    with writing(out, _MEND):
        write_text(out / "report.html", page)


# ------------------------------------------------------------------------------ values


def spread(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and sample standard deviation; the second is NaN for one value."""
    sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return float(values.mean()), sd


def _with_spread(values: NDArray[np.float64]) -> str:
    mean, sd = spread(values)
    if np.isnan(mean):
        return ""
    return f"{mean:.4f}" if np.isnan(sd) else f"{mean:.4f} ± {sd:.4f}"


def is_cold(users: pd.DataFrame) -> Any:
    """Which test rows have a target that never occurs in training."""
    return users["target_count"] == 0


def _cold_header(table: Table, metric: str) -> str:
    n = int(is_cold(table.rows[0].users[0]).sum())
    return f"cold {metric} ({n} targets)"


def _epochs(row: RowResult) -> str:
    """Mean of the best epoch, counted from 1, and of how many were run."""
    best = statistics.mean(result["best_epoch"] + 1 for result in row.results)
    run = statistics.mean(result["epochs"] for result in row.results)
    return f"{best:.0f} of {run:.0f}" if run else "0"


# ------------------------------------------------------------------------------ text


def _markdown_lines(tables: Sequence[Table]) -> Iterator[str]:
    for number, table in enumerate(tables):
        if number:
            yield ""
        yield f"### {table.dataset}"
        yield ""
        yield _github(_frame_for_reading(table, _MARKDOWN, "**{}**", "<u>{}</u>"))
        yield ""
        for line in caption(table, _MARKDOWN):
            yield f"- {line}"
        yield from _missing_lines(table)
        for failure in table.failures:
            yield f"- failed: {failure.cell.name}: {' '.join(str(failure.error).split())}"


def _missing_lines(table: Table) -> Iterator[str]:
    """A table of the metric that selects the epoch, if anything was measured."""
    metric = table.metrics[0]
    lines = []
    for row in table.rows:
        for modality, part in row.missing.groupby("modality"):
            line = {"model": row.label, "missing at test": modality}
            for percent, values in part.groupby("percent"):
                failed = values["error"].any()
                value = "failed" if failed else _with_spread(values[metric].to_numpy())
                line[f"{percent:g} %"] = value
            lines.append(line)
    if lines:
        yield ""
        yield f"Test {metric} with a modality missing for some of the items that have it:"
        yield ""
        yield _github(pd.DataFrame(lines).fillna(""))


def _github(frame: pd.DataFrame) -> str:
    return str(
        tabulate(
            frame.astype(str).to_numpy().tolist(),
            headers=list(frame.columns),
            tablefmt="github",
            disable_numparse=True,
        )
    )


def _frame_for_reading(table: Table, marks: dict[str, str], bold: str, under: str) -> pd.DataFrame:
    main = table.metrics[0]
    lines = []
    for row in table.rows:
        line = {"model": row.label, "reads": row.reads}
        line[f"valid {main}"] = _with_spread(row.valid(main))
        for metric in table.metrics:
            line[f"test {metric}"] = _value(table, row, metric, marks, bold, under)
        if table.has_cold_targets:
            line[_cold_header(table, main)] = _with_spread(row.on(is_cold, main))
        gain = table.gain(row, main)
        line["gain"] = "" if gain is None else f"{gain:+.1f} %"
        line["best epoch"] = _epochs(row)
        line["parameters"] = f"{row.parameters:,}"
        lines.append(line)
    return pd.DataFrame(lines)


def _value(
    table: Table, row: RowResult, metric: str, marks: dict[str, str], bold: str, under: str
) -> str:
    text = _with_spread(row.test(metric))
    best, second = table.order(metric)
    if row in best:
        text = bold.format(text)
    elif row in second:
        text = under.format(text)
    signs = mark(table.comparison(row, metric), fixed=table.fixed_reference)
    return text + "".join(marks[sign] for sign in signs if sign)


def _latex(table: Table) -> str:
    frame = _frame_for_reading(table, _LATEX, r"\textbf{{{}}}", r"\underline{{{}}}")
    frame = frame.drop(columns=["best epoch", "parameters", "reads"])
    frame["model"] = [name.translate(_TEX_SPECIAL) for name in frame["model"]]
    frame["gain"] = [gain.replace("%", r"\%") for gain in frame["gain"]]
    body = [
        " & ".join(str(cell).replace("±", r"$\pm$") for cell in line) + r" \\"
        for line in frame.to_numpy()
    ]
    head = " & ".join(name.translate(_TEX_SPECIAL) for name in frame.columns) + r" \\"
    # the marks of the caption are LaTeX already
    said = " ".join(
        line.translate(_TEX_SPECIAL) for line in caption(table, {s: f"[[{s}]]" for s in _LATEX})
    )
    for sign, written in _LATEX.items():
        said = said.replace(f"[[{sign}]]", written)
    return "\n".join(
        [
            r"% \usepackage{booktabs,amssymb}",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{table.dataset.translate(_TEX_SPECIAL)}. {said}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(frame.columns) - 1)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
        ]
    )


# ------------------------------------------------------------------------------ data


def _frame_of_means(tables: Iterable[Table]) -> pd.DataFrame:
    """One line for each row, part and metric."""
    lines = []
    for table in tables:
        for row in table.rows:
            common = {"dataset": table.dataset, "model": row.label, "reads": row.reads}
            for metric in row.results[0]["test_result"]:
                parts = {"valid": row.valid(metric), "test": row.test(metric)}
                if table.has_cold_targets and metric in row.users[0]:
                    parts["test, cold targets"] = row.on(is_cold, metric)
                for part, values in parts.items():
                    mean, sd = spread(values)
                    shown = part == "test" and metric in table.metrics
                    gain = table.gain(row, metric) if shown else None
                    lines.append(
                        {
                            **common,
                            "part": part,
                            "metric": metric,
                            "mean": round(mean, 6),
                            "sd": round(sd, 6),
                            "seeds": len(values),
                            "gain_percent": None if gain is None else round(gain, 3),
                            "reference": table.references[metric].label if shown else None,
                            "best_epoch": _mean_of(row, "best_epoch") + 1,
                            "epochs": _mean_of(row, "epochs"),
                            "parameters": row.parameters,
                        }
                    )
    return pd.DataFrame(lines)


def _mean_of(row: RowResult, key: str) -> float:
    return round(float(statistics.mean(result[key] for result in row.results)), 2)


def _frame_of_tests(tables: Iterable[Table]) -> pd.DataFrame:
    lines = [
        {"dataset": table.dataset, **asdict(comparison)}
        for table in tables
        for comparison in table.comparisons
    ]
    return pd.DataFrame(lines, columns=["dataset", *significance.COLUMNS])


def frame_of_costs(tables: Iterable[Table]) -> pd.DataFrame:
    """What the runs of each row cost, as a mean over seeds.

    Epochs are counted in CPU seconds, or, where a GPU was used, in seconds of the clock.
    """
    lines = []
    on_gpu = any(
        (outcome.record or {})["cost"].get("gpu_memory_mb")
        for table in tables
        for row in table.rows
        for outcome in row.outcomes
    )
    clock, key = ("wall", "train_seconds") if on_gpu else ("CPU", "train_cpu_seconds")
    for table in tables:
        for row in table.rows:
            costs = [outcome.record["cost"] for outcome in row.outcomes if outcome.record]
            epochs = [note[key] for run in row.epochs for note in run]
            to_best = [
                sum(note[key] for note in run if note["epoch"] <= result["best_epoch"])
                for run, result in zip(row.epochs, row.results, strict=True)
            ]
            lines.append(
                {
                    "dataset": table.dataset,
                    "model": row.label,
                    "seeds": len(costs),
                    "epochs": _mean_of(row, "epochs"),
                    f"{clock} s an epoch": round(statistics.mean(epochs), 3) if epochs else 0.0,
                    f"{clock} s to the best epoch": round(statistics.mean(to_best), 1),
                    "CPU s in all": round(statistics.mean(c["cpu_seconds"] for c in costs), 1),
                    "wall s in all": round(statistics.mean(c["wall_seconds"] for c in costs), 1),
                    # without which the seconds say little
                    "processor": "; ".join(
                        dict.fromkeys(cost.get("processor", "unknown") for cost in costs)
                    ),
                    "threads": max(cost["threads"] for cost in costs),
                    "peak memory, MiB": _most(costs, "peak_memory_mb"),
                    **({"peak GPU memory, MiB": _most(costs, "gpu_memory_mb")} if on_gpu else {}),
                    "parameters": row.parameters,
                }
            )
    return pd.DataFrame(lines)


def _most(costs: Sequence[Mapping[str, Any]], key: str) -> int | None:
    known = [cost[key] for cost in costs if cost.get(key)]
    return round(max(known)) if known else None


def _frame_of_missing(tables: Iterable[Table]) -> pd.DataFrame:
    parts = [
        row.missing.assign(dataset=table.dataset, model=row.label)
        for table in tables
        for row in table.rows
        if len(row.missing)
    ]
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    first = ["dataset", "model", "modality", "percent", "seed"]
    return whole[[*first, *whole.columns.difference(first, sort=False)]]


def _frame_of_cells(outcomes: Sequence[Outcome], out: Path) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "dataset": outcome.cell.dataset,
                "model": outcome.cell.row.label,
                "seed": outcome.cell.seed,
                "key": outcome.cell.key,
                "state": "failed" if outcome.record is None else "finished",
                "error": outcome.error,
                "folder": outcome.folder.relative_to(out).as_posix(),
                "run": outcome.run.relative_to(out).as_posix() if outcome.record else None,
            }
            for outcome in outcomes
        ]
    )


def _write_parquet(tables: Sequence[Table], out: Path) -> None:
    """What each user got, a row group for each cell: all of them together may not fit memory."""
    # data sets may differ in their metrics
    columns = list(dict.fromkeys(name for t in tables for name in t.rows[0].users[0].columns))
    with ExitStack() as stack:
        users, lists = (_Parquet(out / f"{n}.parquet", stack) for n in ("users", "topk"))
        for table in tables:
            for row in table.rows:
                for outcome, frame in zip(row.outcomes, row.users, strict=True):
                    of_run = {
                        "dataset": table.dataset,
                        "model": row.label,
                        "seed": outcome.cell.seed,
                    }
                    # no number where a row has several targets
                    frame = frame.astype({"target_count": "Int64"})
                    users.write(of_run, frame.reindex(columns=columns))
                    lists.write(of_run, lists_frame(PerUser.load(outcome.run / "per_user.npz")))


class _Parquet:
    """A parquet file that takes its place when the block ends well."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._writer: Any = None

    def write(self, first: Mapping[str, Any], frame: pd.DataFrame) -> None:
        """Append a frame, with columns of one value before its own."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = frame.assign(**first)[[*first, *frame.columns]]
        part = pa.Table.from_pandas(whole, preserve_index=False)
        if self._writer is None:
            texts = [
                f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in part.schema
            ]
            schema = pa.schema(texts, part.schema.metadata)
            temporary = self._stack.enter_context(replacing(self._path))
            self._writer = self._stack.enter_context(pq.ParquetWriter(temporary, schema))
        self._writer.write_table(part.cast(self._writer.schema))
