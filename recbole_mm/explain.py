"""What a trained model tells of itself: tables and plots below its run folder.

A model takes part by one method, ``explain(material) -> {name: Table}``; everything else is here.
One that shows the items of its material says so, ``explains_items = True``; for others naming
items is an error.

=======================  ==========================================================
what a model is given    :class:`Material`, :func:`gather`
what it gives            :class:`Table`
means of weights         :func:`weight_columns`, :func:`by_activity`, :func:`by_category`
files                    :func:`write`: ``<name>.csv``, and ``<name>.png`` if it can be drawn
=======================  ==========================================================

Shapes: I chosen items, N items (row 0 is padding), M modalities, C categories.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import torch

from recbole_mm.errors import EnvironmentFault, InputError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from recbole.data.interaction import Interaction

    from recbole_mm.data.categories import CategoryTable

N_ITEMS = 20
"""Items that are shown if none are named: the most popular ones of training."""

ACTIVITY = (5, 10, 20, 50, 100, 200)
"""Longest history of each group of users but the last, in items that the model reads."""

_FOLDER = "explain"
_BATCH = 1024  # histories at once
_MOST_ROWS = 30  # of a plot; the CSV has all
_NARROWEST = 0.1  # range of an axis without zero
# Okabe and Ito's colours: told apart by readers of every colour vision; shapes and dashes besides
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")

_TAKEN = ("category", "history_length", "histories", "items", "layer", "positions", "user")

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Material:
    """What a model is explained with.

    Attributes:
        test: The histories of the test rows.
        device: Where the model is.
        user_field: Column of the users in a batch.
        user_tokens: Token of each internal user id.
        item_tokens: ``(N,)`` token of each internal item id.
        categories: Categories of the items, ``None`` if the data set declares none.
        items: ``(I,)`` internal ids of the items to show.
    """

    test: Any  # a part of RecBole's split
    device: torch.device
    user_field: str
    user_tokens: Sequence[str]
    item_tokens: Sequence[str]
    categories: CategoryTable | None
    items: Sequence[int]

    def batches(self) -> Iterator[Interaction]:
        """Every test history once, in the order of the data set."""
        for start in range(0, len(self.test), _BATCH):
            stop = min(start + _BATCH, len(self.test))
            yield self.test[np.arange(start, stop)].to(self.device)

    def users(self, batch: Interaction) -> list[str]:
        """Token of the user of each row of a batch."""
        return [self.user_tokens[number] for number in batch[self.user_field].tolist()]


@dataclass(frozen=True, eq=False)
class Table:
    """A table of an explanation, and how it is drawn.

    Attributes:
        frame: What the CSV holds.
        title: What the numbers are.
        values: Columns to draw, one series each; empty: nothing is drawn.
        axis: What the drawn numbers measure.
        kind: ``groups``: a row for each line, the first column names it and the second one counts;
            ``lines``: over the first column; ``spread``: the distribution of each series.
        panel: Column that divides the rows into panels, the same lines in each.
    """

    frame: pd.DataFrame
    title: str
    values: tuple[str, ...] = ()
    axis: str = ""
    kind: str = "groups"
    panel: str | None = None


def gather(
    model: Any, dataset: Any, loaders: Sequence[Any], items: Sequence[str] | None = None
) -> Material:
    """What the model is explained with, from the data of its run.

    Args:
        model: The model, on its device.
        dataset: The whole data set.
        loaders: Train, validation and test.
        items: Tokens of the items to show; ``None`` for the :data:`N_ITEMS` that occur most often
            in training (among equals the lower id).

    Raises:
        InputError: If an item is not in the data set.
    """
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    if items is None:
        counts = np.bincount(
            loaders[0]._dataset.inter_matrix(form="coo").col, minlength=len(tokens)
        )
        chosen = [int(i) for i in np.argsort(-counts, kind="stable")[:N_ITEMS] if counts[i]]
    else:
        place = {token: i for i, token in enumerate(tokens) if i}
        for item in items:
            if item not in place:
                raise InputError(f"items: {item!r} is no item of this data{nearest(item, place)}")
        chosen = [place[item] for item in dict.fromkeys(items)]
    return Material(
        test=loaders[2]._dataset,
        device=next(model.parameters()).device,
        user_field=dataset.uid_field,
        user_tokens=[str(token) for token in dataset.field2id_token[dataset.uid_field]],
        item_tokens=tokens,
        categories=dataset.item_categories,
        items=chosen,
    )


# ------------------------------------------------------------------------------- means


def weight_columns(modalities: Sequence[str]) -> tuple[str, ...]:
    """Columns for a number of each modality: its name, with ``_weight`` if tables use it already.

    Modalities may be called ``category``, as that of amazon-beauty-attr, and so is the column that
    names the groups of :func:`by_category`.
    """
    return tuple(f"{name}_weight" if name in _TAKEN else name for name in modalities)


def by_activity(users: pd.DataFrame, names: Sequence[str], panel: str | None = None) -> Any:
    """Means of users by the length of their history, each history counted once.

    Args:
        users: A row for each test history, with ``history_length`` and ``names``.
        names: Columns to average.
        panel: Column whose values are kept apart.

    Returns:
        ``history_length`` (such as ``6 to 10``), ``histories`` (their number), the means, and
        ``panel``; groups without a history have no row.
    """
    edges = [0, *ACTIVITY, np.inf]
    labels = [f"{low + 1} to {high}" for low, high in zip(edges, ACTIVITY, strict=False)]
    labels.append(f"over {ACTIVITY[-1]}")
    group = pd.cut(users["history_length"], edges, labels=labels)
    keys = [group] if panel is None else [users[panel], group]
    grouped = users.groupby(keys, observed=True, sort=True)
    means = grouped[list(names)].mean()
    means.insert(0, "histories", grouped.size())
    means = means.reset_index()
    means["history_length"] = means["history_length"].astype(str)
    return means[["history_length", "histories", *names, *([panel] if panel else [])]]


def by_category(
    totals: _Array,
    counts: _Array,
    names: Sequence[str],
    categories: CategoryTable | None,
    counted: str,
) -> pd.DataFrame:
    """Means by the categories of the items; an item of several counts in each of them.

    Args:
        totals: ``(N, M)`` sum over what is counted of each item.
        counts: ``(N,)`` how often each item counts; 0 for padding.
        names: ``(M,)`` columns of the means.
        categories: ``None`` leaves the mean over all items alone.
        counted: Name of the column with the counts, such as ``positions``.

    Returns:
        ``category``, ``counted``, the means: first ``(all)``, then the categories by their count,
        last ``(none)``, the items without one. What counts nothing has no row.
    """
    labels = ["(all)"]
    member: list[_Array] = [np.ones((len(counts), 1), bool)]
    if categories is not None:
        hot: _Array = categories.multi_hot.numpy()
        labels += [*categories.names, "(none)"]
        member += [hot, hot.sum(axis=1, keepdims=True) == 0]
    belongs = sp.csr_matrix(np.concatenate(member, axis=1), dtype=np.float64).T  # (C, N)
    rows = (belongs @ counts).astype(np.int64)
    seen = np.flatnonzero(rows)
    place = {0: -1, len(labels) - 1: 1} if categories is not None else {}
    order = sorted(seen.tolist(), key=lambda c: (place.get(c, 0), -rows[c], labels[c]))
    means = (belongs @ totals)[order] / rows[order, None]
    values = {name: means[:, m] for m, name in enumerate(names)}
    return pd.DataFrame({"category": [labels[c] for c in order], counted: rows[order], **values})


# ------------------------------------------------------------------------------- files


def write(tables: Mapping[str, Table], run_folder: str | Path) -> list[Path]:
    """Write the tables, and their plots, to ``<run_folder>/explain``, whole or not at all.

    What an earlier call wrote there is replaced.

    Returns:
        The files.

    Raises:
        EnvironmentFault: If the disk says no; or, after the CSV files are written, if matplotlib
            is missing.
    """
    parent = Path(run_folder)
    target = parent / _FOLDER
    missing: EnvironmentFault | None = None
    scratch = None
    try:
        scratch = Path(mkdtemp(prefix=f"{_FOLDER}.", suffix=".part", dir=parent))
        scratch.chmod(0o755)
        for name, table in tables.items():
            table.frame.to_csv(scratch / f"{name}.csv", index=False, float_format="%.6g")
            if table.values and missing is None:
                try:
                    _draw(table, scratch / f"{name}.png")
                except ImportError:
                    missing = EnvironmentFault(
                        f"{target}: the CSV files are written, but plots need matplotlib: "
                        "run `pip install 'recbole-mm[plots]'`"
                    )
        if target.exists():
            shutil.rmtree(target)
        scratch.replace(target)
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: cannot be written ({error.strerror or error}); free space or make the run "
            "folder writable"
        ) from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)
    if missing is not None:
        raise missing
    return sorted(target.iterdir())


def _draw(table: Table, path: Path) -> None:
    from matplotlib.figure import Figure  # an extra; without pyplot, no display and no state

    frame = table.frame
    panels: list[tuple[str | None, pd.DataFrame]] = [(None, frame)]
    if table.panel is not None:
        panels = [(str(key), part) for key, part in frame.groupby(table.panel, sort=True)]
    rows = max(len(part) for _, part in panels)
    height = 1.7 + 0.28 * min(rows, _MOST_ROWS) if table.kind == "groups" else 4.0
    figure = Figure(figsize=(3.6 + 3.6 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (key, part) in zip(axes, panels, strict=True):
        {"groups": _draw_groups, "lines": _draw_lines, "spread": _draw_spread}[table.kind](
            axis, part, table
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.label_outer()
        if key is not None:
            axis.set_title(f"{table.panel} {key}", fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(table.title, fontsize="large")
    figure.savefig(path, dpi=150)


def _draw_groups(axis: Axes, frame: pd.DataFrame, table: Table) -> None:
    """A line for each row, a mark for each series."""
    label, count = frame.columns[:2]
    shown = frame.head(_MOST_ROWS)
    place = np.arange(len(shown))
    for index, name in enumerate(table.values):
        axis.plot(
            shown[name],
            place,
            marker=_MARKERS[index % len(_MARKERS)],
            markeredgecolor=_COLOURS[index % len(_COLOURS)],
            markerfacecolor="none",  # what lies beneath stays visible
            markeredgewidth=2,
            markersize=8,
            linestyle="none",
            label=name,
        )
    names = [f"{_short(row[0])}  ({row[1]:,})" for row in shown[[label, count]].to_numpy()]
    axis.set_yticks(place, names, parse_math=False)  # a dollar sign is one
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlim(*_range((shown if table.panel is None else table.frame)[list(table.values)]))
    axis.grid(axis="x", color="0.9")
    axis.grid(axis="y", color="0.93")
    axis.set_axisbelow(True)
    left_out = len(frame) - len(shown)
    axis.set_ylabel(
        f"{label.replace('_', ' ')}  ({count})"
        + (f", {left_out} more in the CSV" if left_out else "")
    )
    axis.set_xlabel(table.axis)


def _range(values: pd.DataFrame) -> tuple[float, float]:
    """From zero if that leaves the differences visible; never so narrow that it exaggerates."""
    low, high = float(values.min().min()), float(values.max().max())
    if 2 * low < high:
        return 0.0, 1.05 * high
    margin = max(0.05 * (high - low), (_NARROWEST - high + low) / 2)
    return low - margin, high + margin


def _draw_lines(axis: Axes, frame: pd.DataFrame, table: Table) -> None:
    """Series over the first column."""
    over = frame.columns[0]
    for index, name in enumerate(table.values):
        axis.plot(
            frame[over],
            frame[name],
            marker=_MARKERS[index % len(_MARKERS)],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index % len(_DASHES)],
            label=name,
        )
    axis.set_ylim(bottom=0)
    axis.grid(color="0.9")
    axis.set_xlabel(over)
    axis.set_ylabel(table.axis)


def _draw_spread(axis: Axes, frame: pd.DataFrame, table: Table) -> None:
    """The distribution of each series."""
    for index, name in enumerate(table.values):
        values = np.sort(frame[name].to_numpy())
        axis.step(
            values,
            np.arange(1, len(values) + 1) / len(values),
            where="post",
            linewidth=1.8,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index % len(_DASHES)],
            label=name,
        )
    axis.set_ylim(0, 1.02)
    axis.grid(color="0.9")
    axis.set_xlabel(table.axis)
    axis.set_ylabel("share of histories with at most this")


def _short(text: object) -> str:
    text = str(text)
    return text if len(text) <= 32 else text[:31] + "…"
