"""The charts of a report, as plotly figures.

Colours are those of Okabe and Ito, told apart by readers of every colour vision; a second and third
round of them has dashed and dotted lines, open marks and hatched bars. A row has one look in all
charts of its table.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from recbole_mm.compare.tables import RowResult, Table, sign_of
from recbole_mm.compare.write import frame_of_costs, spread

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
_HATCHES = ("", "/", ".", "x")
_HISTORY = (1, 3, 6, 11, 21, 51, 101, 201, 501, 1001)
_POPULARITY = (0, 1, 6, 21, 51, 101, 201, 501, 1001)
_MOST_CATEGORIES = 15


@dataclass(frozen=True)
class Chart:
    """A figure and what it says.

    Attributes:
        name: Plain name, unique within a table.
        title: Heading.
        text: What is drawn, in a sentence or two.
        figure: The figure.
    """

    name: str
    title: str
    text: str
    figure: go.Figure


def charts_of(table: Table) -> Iterator[Chart]:
    """All charts that the runs of a table have data for."""
    metric = table.metrics[0]
    if any(epochs for row in table.rows for epochs in row.epochs):
        yield Chart(
            "learning",
            "Learning curves",
            f"Validation {metric} after each epoch; a line for each seed, a dot where the weights "
            "were chosen.",
            _learning(table, metric),
        )
    yield Chart(
        "cost",
        "Training cost against quality",
        f"Processor seconds until the chosen epoch (logarithmic) and test {metric}, mean and "
        "standard deviation over seeds. The grey line is the Pareto front: no row is better and "
        "cheaper.",
        _pareto(table, metric),
    )
    if table.rows[0].of_users(metric) is not None:
        yield from _slices(table, metric)
    if any(len(row.missing) for row in table.rows):
        yield from _missing(table, metric)
    yield from _explained(table)


def _figure(x: str, y: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 12, "t": 12, "b": 50},
        height=420,
        xaxis={"title": {"text": x, "font": {"size": 13}}, "automargin": True},
        yaxis={"title": {"text": y, "font": {"size": 13}}, "automargin": True},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        showlegend=True,
        hovermode="closest",
    )
    return figure


def _style(number: int) -> tuple[str, str, str]:
    turn, place = divmod(number, len(_COLOURS))
    symbol = _SYMBOLS[place] + ("-open" if turn % 2 else "")
    return _COLOURS[place], _DASHES[turn % len(_DASHES)], symbol


def _learning(table: Table, metric: str) -> go.Figure:
    figure = _figure("epoch", f"validation {metric}")
    longest = [max(map(len, row.epochs)) for row in table.rows if any(row.epochs)]
    if max(longest) > 5 * statistics.median_low(longest):  # else a few rows press the others flat
        figure.update_xaxes(type="log", dtick=1, title={"text": "epoch (logarithmic)"})
    for number, row in enumerate(table.rows):
        colour, dash, _ = _style(number)
        drawn = False
        for outcome, epochs, result in zip(row.outcomes, row.epochs, row.results, strict=True):
            notes = [note for note in epochs if "valid" in note]
            if not notes:
                continue
            x = [note["epoch"] + 1 for note in notes]
            y = [note["valid"][metric] for note in notes]
            best = [note["epoch"] == result["best_epoch"] for note in notes]
            figure.add_scatter(
                x=x,
                y=y,
                name=row.label,
                legendgroup=row.label,
                showlegend=not drawn,
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 1.6},
                marker={"color": colour, "size": [9 if b else 0 for b in best]},
                hovertemplate=f"{row.label}, seed {outcome.cell.seed}<br>epoch %{{x}}: %{{y:.4f}}"
                "<extra></extra>",
            )
            drawn = True
    return figure


def _pareto(table: Table, metric: str) -> go.Figure:
    frame = frame_of_costs([table]).filter(like=" s to the best epoch")
    clock = frame.columns[0].partition(" ")[0]
    figure = _figure(f"{clock} seconds until the chosen epoch", f"test {metric}")
    costs = frame.iloc[:, 0].clip(lower=0.01)
    means, sds = zip(*(spread(row.test(metric)) for row in table.rows), strict=True)
    good = sign_of(metric) * np.array(means)
    order = np.lexsort((-good, costs.to_numpy()))
    front: list[int] = []
    for place in order:
        if not front or good[place] > good[front[-1]]:
            front.append(int(place))
    figure.add_scatter(
        x=[costs[place] for place in front],
        y=[means[place] for place in front],
        mode="lines",
        line={"color": "#bbbbbb", "width": 5},
        name="Pareto front",
        hoverinfo="skip",
    )
    for number, row in enumerate(table.rows):
        colour, _, symbol = _style(number)
        figure.add_scatter(
            x=[costs[number]],
            y=[means[number]],
            error_y={"type": "data", "array": [np.nan_to_num(sds[number])], "thickness": 1.2},
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11},
            name=row.label,
            hovertemplate=f"{row.label}<br>%{{x:.3g}} s: %{{y:.4f}}<extra></extra>",
        )
    wide = costs.max() / costs.min() > 100
    figure.update_xaxes(type="log", dtick=1 if wide else "D2")
    return figure


# ------------------------------------------------------------------------------ slices of users


def _slices(table: Table, metric: str) -> Iterator[Chart]:
    bars = "Bars are standard errors over users; seeds are averaged first."
    yield Chart(
        "history",
        "By length of the history",
        f"Test {metric} of users by the number of their interactions before the test row. {bars}",
        _by_group(table, metric, "history", _HISTORY, "interactions before the test row"),
    )
    frame = table.rows[0].users[0]
    if frame["target_count"].isna().all():
        return
    yield Chart(
        "popularity",
        "By popularity of the item",
        f"Test {metric} by how often the target occurs in training. {bars}",
        _by_group(
            table, metric, "target_count", _POPULARITY, "training interactions of the target"
        ),
    )
    n_cold = int((frame["target_count"] == 0).sum())
    if n_cold:
        yield Chart(
            "cold",
            "Warm and cold items",
            f"Test {metric} of the {n_cold} rows whose target never occurs in training, beside the "
            f"others. {bars}",
            _by_group(table, metric, "target_count", (0, 1), "", names=("cold", "warm")),
        )


def _by_group(
    table: Table,
    metric: str,
    column: str,
    edges: Sequence[int],
    title: str,
    names: Sequence[str] = (),
) -> go.Figure:
    figure = _figure(title, f"test {metric}")
    few = bool(names)
    values = table.rows[0].users[0][column].to_numpy(np.float64)
    group = np.searchsorted(np.array(edges), values, side="right") - 1
    shown = [number for number in range(len(edges)) if (group == number).any()]
    labels = [
        f"{names[n] if few else _range_label(edges, n)}<br>n={int((group == n).sum())}"
        for n in shown
    ]
    for number, row in enumerate(table.rows):
        mean = np.mean([users[metric].to_numpy(np.float64) for users in row.users], axis=0)
        colour, dash, symbol = _style(number)
        parts = [mean[group == n] for n in shown]
        error = {"type": "data", "array": [_standard_error(p) for p in parts], "thickness": 1}
        y = [float(part.mean()) for part in parts]
        hover = f"{row.label}<br>%{{x}}: %{{y:.4f}}<extra></extra>"
        if few:
            figure.add_bar(
                x=labels,
                y=y,
                error_y=error,
                name=row.label,
                marker_color=colour,
                marker_pattern_shape=_HATCHES[number // len(_COLOURS) % len(_HATCHES)],
                hovertemplate=hover,
            )
        else:
            figure.add_scatter(
                x=labels,
                y=y,
                error_y=error,
                name=row.label,
                line={"color": colour, "dash": dash, "width": 1.6},
                marker={"color": colour, "symbol": symbol, "size": 7},
                mode="lines+markers",
                hovertemplate=hover,
            )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _range_label(edges: Sequence[int], number: int) -> str:
    low = edges[number]
    if number + 1 == len(edges):
        return f"{low}+"
    high = edges[number + 1] - 1
    return f"{low}" if low == high else f"{low}-{high}"


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


# ------------------------------------------------------------------------------ modalities


def _missing(table: Table, metric: str) -> Iterator[Chart]:
    modalities = pd.concat([row.missing["modality"] for row in table.rows]).unique()
    for modality in sorted(modalities):
        figure = _figure(f"% of the items whose {modality} is missing", f"test {metric}")
        for number, row in enumerate(table.rows):
            part = row.missing.query("modality == @modality and error == ''")
            if not len(part):
                continue
            of_percent = part.groupby("percent")[metric]
            sd = of_percent.std(ddof=1).fillna(0)
            colour, dash, symbol = _style(number)
            figure.add_scatter(
                x=list(of_percent.groups),
                y=of_percent.mean().tolist(),
                error_y={"type": "data", "array": sd.tolist(), "thickness": 1},
                name=row.label,
                line={"color": colour, "dash": dash, "width": 1.6},
                marker={"color": colour, "symbol": symbol, "size": 7},
                hovertemplate=f"{row.label}<br>%{{x}} %: %{{y:.4f}}<extra></extra>",
            )
        figure.update_yaxes(rangemode="tozero")
        yield Chart(
            f"missing-{modality}",
            f"Missing {modality} at test",
            f"Test {metric} when the {modality} of some items is hidden from the trained model; "
            "bars are standard deviations over seeds.",
            figure,
        )


def _explained(table: Table) -> Iterator[Chart]:
    """Weights and gates that a model's ``explain`` wrote, of its first row and seed."""
    of_models = {row.row.model: row for row in reversed(table.rows)}
    for row in (row for row in table.rows if of_models[row.row.model] is row):
        folder = row.outcomes[0].run / "explain"
        for file in sorted(folder.glob("*_by_*.csv")):
            # a category may be called None
            frame = pd.read_csv(file, keep_default_na=False, na_values={"layer": [""]})
            kind = file.stem.rpartition("_by_")[2]
            if kind in ("activity", "category"):
                yield _weights(row, file.stem, frame, kind)


def _weights(row: RowResult, name: str, frame: pd.DataFrame, kind: str) -> Chart:
    group, count = frame.columns[:2]
    panels = frame.pop("layer") if "layer" in frame else pd.Series("", index=frame.index)
    weights = frame.columns[2:]
    by = "length of the history" if kind == "activity" else "category"
    figure = _figure("", "mean gate" if name.startswith("gates") else "mean weight")
    if kind == "category":
        frame = frame.nlargest(_MOST_CATEGORIES, count)
        labels = [f"{text[:28]} ({n})" for text, n in zip(frame[group], frame[count], strict=True)]
        for number, weight in enumerate(weights):
            figure.add_bar(
                y=labels[::-1],
                x=frame[weight].tolist()[::-1],
                name=weight,
                orientation="h",
                marker_color=_style(number)[0],
                hovertemplate=f"{weight}: %{{x:.3f}}<extra></extra>",
            )
        figure.update_layout(barmode="stack", height=180 + 24 * len(labels))
        figure.update_layout(legend_traceorder="normal")
        figure.update_layout(xaxis_title_text="mean weight", yaxis_title_text="")
    else:
        for turn, (panel, part) in enumerate(frame.groupby(panels, sort=False)):
            for number, weight in enumerate(weights):
                colour, _, symbol = _style(number)
                figure.add_scatter(
                    x=[f"{g}<br>n={n}" for g, n in zip(part[group], part[count], strict=True)],
                    y=part[weight].tolist(),
                    name=weight + (f", layer {panel}" if panel != "" else ""),
                    line={"color": colour, "dash": _DASHES[turn % len(_DASHES)]},
                    marker={"color": colour, "symbol": symbol, "size": 7},
                    mode="lines+markers",
                    hovertemplate=f"{weight}: %{{y:.3f}}<extra></extra>",
                )
        figure.update_xaxes(type="category", title_text="interactions that the model reads")
        figure.update_yaxes(rangemode="tozero")
    what = name.rpartition("_by_")[0]
    what = what if what == "gates" else f"{what} weights"
    return Chart(
        f"explain-{row.label}-{name}",
        f"{row.label}: {what} by {by}",
        f"What {row.label} says of itself (seed {row.outcomes[0].cell.seed}), from "
        f"explain/{name}.csv of its run folder.",
        figure,
    )
