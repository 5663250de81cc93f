"""From finished cells to tables: means over seeds, gains, marks of significance.

Nothing that a clock or the machine decides goes into ``table.*`` and ``significance.csv``: the same
cells give the same bytes. What a run cost is in ``cost.*``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from recbole.evaluator.register import metrics_dict
from recbole.utils import ModelType

from recbole_mm.compare import missing, significance
from recbole_mm.compare.cells import ERROR, Outcome
from recbole_mm.compare.plan import Row
from recbole_mm.compare.significance import Comparison
from recbole_mm.compare.users import users_frame
from recbole_mm.config import reads_columns
from recbole_mm.config_rules import has_cuts
from recbole_mm.errors import InputError, nearest
from recbole_mm.evaluation import PerUser
from recbole_mm.protocol import Protocol, assert_comparable
from recbole_mm.registry import get_model


@dataclass(frozen=True, eq=False)
class RowResult:
    """A row of a table and its finished cells.

    Attributes:
        row: The row.
        outcomes: Finished cells, by seed.
        planned: Number of seeds that were asked for.
        counts: Interactions by token, of ``user`` and of ``item``.
        wanted: What of a modality was asked to be missing; a folder may hold more.
    """

    row: Row
    outcomes: tuple[Outcome, ...]
    planned: int
    counts: Mapping[str, pd.Series]
    wanted: missing.Wanted = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As it stands in the table."""
        return self.row.label

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """The result of each seed."""
        return [outcome.record["result"] for outcome in self.outcomes if outcome.record]

    @cached_property
    def users(self) -> list[pd.DataFrame]:
        """What each test row got, for each seed, in the same order; see `users_frame`.

        With ``history``, the interactions of the user before it, and ``target_count``, those of the
        target in training: 0 for a cold one.
        """
        frames = [
            users_frame(PerUser.load(outcome.run / "per_user.npz"), protocol_of(outcome))
            for outcome in self.outcomes
        ]
        for frame in frames:
            # texts are half of what is held, and the same ones in every cell of a data set
            for tokens in ("user", "target"):
                frame[tokens] = frame[tokens].map(sys.intern, na_action="ignore")
            frame.insert(1, "history", frame["user"].map(self.counts["user"]))
            frame.insert(3, "target_count", frame["target"].map(self.counts["item"]))
        return frames

    @cached_property
    def epochs(self) -> list[list[dict[str, Any]]]:
        """Lines of ``metrics.jsonl``, for each seed; empty for a model that is not trained."""
        files = [outcome.run / "metrics.jsonl" for outcome in self.outcomes]
        return [
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            if file.is_file()
            else []
            for file in files
        ]

    def test(self, metric: str) -> NDArray[np.float64]:
        """Test value of each seed."""
        return np.array([result["test_result"][metric] for result in self.results])

    def valid(self, metric: str) -> NDArray[np.float64]:
        """Validation value of each seed, at the chosen epoch; NaN without validation."""
        parts = [result["best_valid_result"] or {} for result in self.results]
        return np.array([part.get(metric, np.nan) for part in parts])

    def of_users(self, metric: str) -> NDArray[np.float64] | None:
        """``(seeds, users)``, users by token; ``None`` if single users have no such metric."""
        if any(metric not in users for users in self.users):
            return None
        means = [users.groupby("user")[metric].mean() for users in self.users]
        return np.stack([mean.to_numpy(np.float64) for mean in means])

    def on(self, chosen: Callable[[pd.DataFrame], Any], metric: str) -> NDArray[np.float64]:
        """Mean test value of each seed over some of the test rows; NaN for none."""
        parts = [users.loc[chosen(users), metric] for users in self.users]
        return np.array([part.mean() if len(part) else np.nan for part in parts])

    @cached_property
    def missing(self) -> pd.DataFrame:
        """Test results with a modality missing.

        Returns:
            ``modality``, ``percent``, ``seed``, ``error`` (empty where it went well) and a column
            for each metric.
        """
        lines = [
            {"modality": name, "percent": float(percent), "seed": outcome.cell.seed, **result}
            for outcome in self.outcomes
            for name, results in missing.read(outcome.folder).items()
            for percent, result in results.items()
            if float(percent) in self.wanted.get(name, ())
        ]
        frame = pd.DataFrame(lines, columns=None if lines else ["modality", "percent", "seed"])
        frame["error"] = frame.get("error", pd.Series("", index=frame.index)).fillna("")
        return frame.sort_values(["modality", "percent", "seed"], ignore_index=True)

    @cached_property
    def kind(self) -> ModelType | None:
        """What RecBole calls the type of the model."""
        return getattr(get_model(self.row.model), "type", None)

    @cached_property
    def reads(self) -> str:
        """Modalities, columns of ``.item`` and ``.user``, or the graph, that the model reads."""
        values = self.outcomes[0].cell.values
        names = [modality["name"] for modality in self.results[0]["data"]["modalities"]]
        if reads_columns(self.row.model):
            names += values["selected_features"]
        elif self.kind in (ModelType.CONTEXT, ModelType.DECISIONTREE):
            columns = values["load_col"] or {"user": ["all columns"], "item": ["all columns"]}
            names += [name for of in ("user", "item") for name in columns.get(of, ())]
            ids = {values["USER_ID_FIELD"], values["ITEM_ID_FIELD"]}
            names = [name for name in dict.fromkeys(names) if name not in ids]
        elif self.kind == ModelType.KNOWLEDGE:
            names.append("knowledge graph")
        return ", ".join(names) or "ids"

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return int(self.results[0]["parameters"])


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one data set under one protocol.

    Attributes:
        dataset: Name.
        protocol: What all rows share.
        rows: In the order of ``--models``.
        metrics: What is shown, such as ``ndcg@10``; the first is what selects the epoch.
        references: For each metric, the row that others are measured against.
        fixed_reference: Whether that is the first row, and not the best baseline.
        comparisons: Of the rows that are measured against a reference.
        failures: Failed cells.
    """

    dataset: str
    protocol: Protocol
    rows: tuple[RowResult, ...]
    metrics: tuple[str, ...]
    references: dict[str, RowResult]
    fixed_reference: bool
    comparisons: tuple[Comparison, ...]
    failures: tuple[Outcome, ...] = field(default=())

    def comparison(self, row: RowResult, metric: str) -> Comparison | None:
        """How the row compares with the reference, if it is compared."""
        found = (c for c in self.comparisons if c.row == row.label and c.metric == metric)
        return next(found, None)

    def gain(self, row: RowResult, metric: str) -> float | None:
        """Relative gain over the reference, in percent; ``None`` where nothing is compared.

        Positive is better, be that more or less of the metric.
        """
        reference = self.references[metric]
        base = sign_of(metric) * float(reference.test(metric).mean())
        if row is reference or (row.row.is_baseline and not self.fixed_reference) or base == 0:
            return None
        return 100 * (sign_of(metric) * float(row.test(metric).mean()) - base) / abs(base)

    def order(self, metric: str) -> tuple[list[RowResult], list[RowResult]]:
        """The best rows by mean test value and the second ones; several in a tie.

        None is the best of equal ones, and none the second if there are two.
        """
        sign = sign_of(metric)
        means = {row: sign * round(float(row.test(metric).mean()), 6) for row in self.rows}
        values = sorted(set(means.values()), reverse=True)
        best = [row for row in self.rows if len(values) > 1 and means[row] == values[0]]
        second = [row for row in self.rows if len(values) > 1 and means[row] == values[1]]
        return best, second if len(self.rows) > 2 else []

    @property
    def has_cold_targets(self) -> bool:
        """Whether the split was made for cold items."""
        return "cold" in self.protocol.split


def sign_of(metric: str) -> int:
    """1, or -1 for a metric of which less is better, as RecBole says."""
    return -1 if metrics_dict[metric.partition("@")[0].lower()].smaller else 1


def tabulate(
    outcomes: Sequence[Outcome],
    show: Sequence[str] = (),
    missing_modality: missing.Wanted | None = None,
) -> tuple[list[Table], list[InputError]]:
    """One table for each data set, and why there is none for the others.

    Args:
        outcomes: Of all cells, in the order of the plan.
        show: Metrics, such as ``NDCG@10``; by default every metric at the cut-off of the one that
            selects the epoch.
        missing_modality: What of the measurements with a modality missing goes into the tables.

    Returns:
        The tables, and for each of the other data sets an error: that no cell is finished, or that
        two runs differ in items, interactions, split or rules.
    """
    tables, errors = [], []
    for dataset in dict.fromkeys(outcome.cell.dataset for outcome in outcomes):
        group = [outcome for outcome in outcomes if outcome.cell.dataset == dataset]
        try:
            tables.append(_table(dataset, group, show, missing_modality or {}))
        except InputError as error:
            errors.append(error)
    return tables, errors


def _table(
    dataset: str, group: Sequence[Outcome], show: Sequence[str], wanted: missing.Wanted
) -> Table:
    finished = [outcome for outcome in group if outcome.record is not None]
    failures = tuple(outcome for outcome in group if outcome.record is None)
    if not finished:
        reasons = "; ".join(f"{failure.cell.name}: {failure.error}" for failure in failures)
        raise InputError(f"{dataset}: no cell is finished, so there is no table: {reasons}")
    protocol = _one_protocol(finished)
    rows = tuple(_rows_of(group, _counts(finished[0]), wanted))
    metrics = shown(protocol.metrics, protocol.topk, protocol.valid_metric, show)
    references, fixed = _references(rows, metrics)
    return Table(
        dataset,
        protocol,
        rows,
        metrics,
        references,
        fixed,
        _comparisons(rows, metrics, references, fixed=fixed),
        failures,
    )


def protocol_of(outcome: Outcome) -> Protocol:
    """The protocol of a finished cell."""
    if outcome.record is None:
        raise InputError(f"{outcome.cell.name} has no protocol: {outcome.error}")
    return Protocol.from_dict(outcome.record["result"]["protocol"])


def _one_protocol(finished: Sequence[Outcome]) -> Protocol:
    first = finished[0]
    for other in finished[1:]:
        try:
            assert_comparable(protocol_of(first), protocol_of(other))
        except InputError as error:
            raise InputError(f"{first.cell.name} and {other.cell.name}: {error}") from error
    return protocol_of(first)


def _counts(outcome: Outcome) -> dict[str, pd.Series]:
    if not outcome.counts.is_file():
        raise InputError(
            f"{outcome.counts} is gone and could not be counted again, which is said in "
            f"{outcome.folder / ERROR}"
        )
    frame = pd.read_csv(outcome.counts, dtype={"token": str}, keep_default_na=False)
    return {str(kind): part.set_index("token")["count"] for kind, part in frame.groupby("kind")}


def _rows_of(
    group: Sequence[Outcome], counts: Mapping[str, pd.Series], wanted: missing.Wanted
) -> list[RowResult]:
    by_row: dict[Row, list[Outcome]] = {}
    for outcome in group:
        by_row.setdefault(outcome.cell.row, []).append(outcome)
    results = []
    for row, outcomes in by_row.items():
        done = [outcome for outcome in outcomes if outcome.record is not None]
        if done:
            ordered = sorted(done, key=lambda outcome: outcome.cell.seed)
            results.append(RowResult(row, tuple(ordered), len(outcomes), counts, wanted))
    return results


def shown(
    metrics: Sequence[str], topk: Sequence[int], valid_metric: str, show: Sequence[str]
) -> tuple[str, ...]:
    """The metrics of a table, the one that selects the epoch first.

    Args:
        metrics: Names that are computed.
        topk: Their cut-offs.
        valid_metric: What selects the epoch.
        show: What is asked for; by default all of them at the cut-off of ``valid_metric``.

    Raises:
        InputError: If ``show`` names another one.
    """
    known = [name for metric in metrics for name in columns_of(metric.lower(), topk)]
    main = valid_metric.lower()
    chosen = [name.lower() for name in show]
    for name in chosen:
        if name not in known:
            raise InputError(f"--show: unknown metric {name!r}{nearest(name, known)}")
    if not chosen:
        cut = main.partition("@")[2] or str(max(topk))
        chosen = [name for name in known if name.partition("@")[2] in (cut, "")]
    return tuple(dict.fromkeys([main, *chosen]))


def columns_of(metric: str, topk: Sequence[int]) -> list[str]:
    """The values that a metric has: one for each cut-off, or a single one."""
    return [f"{metric}@{k}" for k in topk] if has_cuts(metric) else [metric]


def _references(
    rows: Sequence[RowResult], metrics: Sequence[str]
) -> tuple[dict[str, RowResult], bool]:
    baselines = [row for row in rows if row.row.is_baseline]
    if not baselines or len(baselines) == len(rows):
        return dict.fromkeys(metrics, rows[0]), True
    best = {}
    for m in metrics:
        sign = sign_of(m)
        best[m] = max(baselines, key=lambda row: sign * float(row.test(m).mean()))
    return best, False


def _comparisons(
    rows: Sequence[RowResult],
    metrics: Sequence[str],
    references: dict[str, RowResult],
    *,
    fixed: bool,
) -> tuple[Comparison, ...]:
    found = []
    for row in rows:
        for metric in metrics:
            reference = references[metric]
            if row is reference or (row.row.is_baseline and not fixed):
                continue
            values, of_reference = row.of_users(metric), reference.of_users(metric)
            if values is None or of_reference is None:
                continue
            found.append(
                significance.compare(metric, row.label, reference.label, values, of_reference)
            )
    return tuple(significance.corrected(found))


# ------------------------------------------------------------------------------ what a table says


def mark(comparison: Comparison | None, *, fixed: bool) -> tuple[str, str]:
    """The marks of a value: of the tests over users, and of the test over seeds.

    Against the best baseline only a better row is marked: the best of several is chosen by the
    very values that are compared, which makes worse rows look worse than they are.
    """
    gain = 0.0 if comparison is None else sign_of(comparison.metric) * comparison.difference
    if comparison is None or (gain < 0 and not fixed):
        return "", ""
    better = gain > 0
    users = ("*" if better else "-") if comparison.differs else ""
    return users, "+" if comparison.differs_over_seeds else ""


def caption(table: Table, marks: dict[str, str]) -> list[str]:
    """Sentences below a table: protocol, what the numbers are, every mark with its test.

    Args:
        table: The table.
        marks: How the marks ``*``, ``-`` and ``+`` are written.
    """
    seeds = sorted({outcome.cell.seed for row in table.rows for outcome in row.outcomes})
    spread = "mean ± sample standard deviation over " if len(seeds) > 1 else ""
    chosen = "the epoch is chosen on validation" if table.protocol.valid_users else "no validation"
    lines = [
        f"{table.protocol.line().removeprefix('protocol: ')}.",
        f"Test values, {spread}seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"{chosen} and the test set scored once. Best in bold, second underlined.",
        *_tuned_lines(table),
        *_budget_lines(table),
    ]
    if table.has_cold_targets:
        lines.append("Cold targets: those that occur in no training row, the newest items mostly.")
    names = {m: reference.label for m, reference in table.references.items()}
    if len(table.rows) > 1:
        if table.fixed_reference:
            against = next(iter(names.values()))
            lines.append(f"Gain: relative to {against}, the first row.")
        else:
            against = "the best baseline"
            which = ", ".join(f"{name} in {metric}" for metric, name in names.items())
            if len(set(names.values())) == 1:
                which = next(iter(names.values()))
            lines.append(
                f"Gain: relative to the best baseline, by mean test value in each metric ({which})."
            )
    used = {
        sign for c in table.comparisons for sign in mark(c, fixed=table.fixed_reference) if sign
    }
    if table.comparisons:
        lines.append(_tests_line(table, against, marks, used))
        untested = set(table.metrics) - {c.metric for c in table.comparisons}
        if untested:
            lines.append(
                f"Not tested, since a single user has no such value: {', '.join(sorted(untested))}."
            )
        n_rankings = table.protocol.test_rankings
        if n_rankings != table.comparisons[0].users:
            lines.append(
                f"Columns are means over {n_rankings} rankings, tests are of the means of users, "
                "some of whom have more of them than others."
            )
    for row in table.rows:
        if len(row.outcomes) < row.planned:
            lines.append(f"{row.label}: {len(row.outcomes)} of {row.planned} seeds finished.")
    versions = {
        row.label: {_version(o.record) for o in row.outcomes if o.record} for row in table.rows
    }
    if len(set().union(*versions.values())) > 1:
        said = "; ".join(f"{row} by {', '.join(sorted(found))}" for row, found in versions.items())
        lines.append(f"Rows were computed by several versions of recbole_mm: {said}.")
    return lines


def _version(record: Mapping[str, Any]) -> str:
    code = record.get("code")
    return str(record["version"]) if code is None else f"{record['version']} (source {code})"


def _tuned_lines(table: Table) -> Iterator[str]:
    """Which rows had a file of ``--tuned``, if any had."""
    tuned = [row.label for row in table.rows if row.outcomes[0].cell.tuned]
    if tuned:
        rest = [row.label for row in table.rows if row.label not in tuned]
        others = f"; with their defaults: {', '.join(rest)}" if rest else ""
        yield f"With a tuned configuration: {', '.join(tuned)}{others}."


def _budget_lines(table: Table) -> Iterator[str]:
    """What sets how long rows were trained and what they read, where they differ in it."""
    for key in ("MAX_ITEM_LIST_LENGTH", "epochs", "eval_step", "stopping_step", "train_batch_size"):
        by_value: dict[str, list[str]] = {}
        for row in table.rows:
            values = row.outcomes[0].cell.values
            # RecBole's Pop and its like go through the data once, whatever epochs says
            is_trained = row.results[0]["epochs"] > 1 or values["epochs"] <= 1
            if key == "MAX_ITEM_LIST_LENGTH":  # every model has the key; some read histories
                is_trained &= row.kind == ModelType.SEQUENTIAL
            if is_trained and (value := values.get(key)) is not None:
                by_value.setdefault(str(value), []).append(row.label)
        if len(by_value) > 1:
            said = "; ".join(f"{value} for {', '.join(of)}" for value, of in by_value.items())
            yield f"Rows differ in {key}: {said}."


def _tests_line(table: Table, against: str, marks: dict[str, str], used: set[str]) -> str:
    n = table.comparisons[0].users
    count = len(table.comparisons)
    users = (
        f"Wilcoxon's signed-rank test and the paired t test over {n} users, both two-sided with "
        f"p < {significance.ALPHA} after Holm's correction for {count} comparisons"
    )
    parts = []
    if "*" in used:
        parts.append(f"{marks['*']} better than {against} by {users}")
    if "-" in used:
        parts.append(f"{marks['-']} worse than {against} by {users}")
    if not used & {"*", "-"}:
        parts.append(f"no row is significantly better than {against} by {users}")
    tested = [c for c in table.comparisons if not np.isnan(c.seeds)]
    if "+" in used:
        parts.append(
            f"{marks['+']} differs from {against} by Welch's t test over seeds, two-sided, "
            f"p < {significance.ALPHA} after Holm's correction for {len(tested)} comparisons"
        )
    elif tested:
        parts.append(
            "no difference is significant over seeds (Welch's t test, two-sided, Holm's "
            f"correction for {len(tested)} comparisons)"
        )
    return "; ".join(parts)[0].upper() + "; ".join(parts)[1:] + "."
