"""Tables of made-up cells: references, gains, marks, what the caption says."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from recbole_mm.compare import charts
from recbole_mm.compare.cells import Outcome
from recbole_mm.compare.plan import Cell, Row
from recbole_mm.compare.tables import caption, tabulate
from recbole_mm.compare.write import _latex, frame_of_costs, write_all
from recbole_mm.evaluation import PerUser
from tests.tuning import fake

USERS = 400
MARKS = {"*": "*", "-": "v", "+": "+"}
PROTOCOL = replace(
    fake.PROTOCOL,
    metrics=("NDCG", "MRR"),
    candidates=50,
    valid_users=USERS,
    test_users=USERS,
    valid_rankings=USERS,
    test_rankings=USERS,
)


class World:
    """A folder of cells whose ranks are given.

    A row hits with a probability that it shares with the others, user by user, and a shift.
    """

    def __init__(self, out, protocol=PROTOCOL):
        self.out, self.protocol = out, protocol
        self.strength = np.random.default_rng(0).uniform(0.3, 0.6, USERS)
        tokens = [str(number) for number in range(USERS)]
        counts = [("user", token, 9) for token in tokens] + [("item", str(i), 3) for i in range(51)]
        self.counts = pd.DataFrame(counts, columns=["kind", "token", "count"])

    def row(self, model, shift, seeds=3, place=1, label=None, values=(), run=6, **change):
        """Outcomes of a row: those that hit have the target at ``place``, others at 40."""
        row, values = Row(label or model, model), {"epochs": 6, **dict(values)}
        return [self.cell(row, shift, seed, place, values, run, change) for seed in range(seeds)]

    def cell(self, row, shift, seed, place, values, run, change):
        # not hash(): that of a text differs from process to process
        draw = np.random.default_rng([seed, *row.label.encode()])
        ranks = np.where(draw.random(USERS) < self.strength + shift, place, 40)
        got = PerUser(
            users=np.array([str(number) for number in range(USERS)]),
            rows=np.arange(USERS),
            targets=np.full(USERS, 7),
            ranks=ranks,
            topk=np.tile(np.arange(1, 11), (USERS, 1)),
            items=np.array([str(number) for number in range(51)]),
        )
        cell = Cell(row, "made-up", seed, values, "key", "data", **change)
        folder = self.out / "cells" / cell.folder
        (folder / "run").mkdir(parents=True)
        got.save(folder / "run" / "per_user.npz")
        epochs = [{"epoch": e, "train_cpu_seconds": 2.0, "train_seconds": 5.0} for e in range(6)]
        lines = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
        (folder / "run" / "metrics.jsonl").write_text(lines)
        result = {
            "protocol": self.protocol.as_dict(),
            "test_result": {m: float(got.metric(m).mean()) for m in ("ndcg@10", "mrr@10")},
            "best_valid_result": None,
            "best_epoch": 3,
            "epochs": run,
            "parameters": 5,
            "data": {"modalities": []},
        }
        cost = {"cpu_seconds": 1.0, "wall_seconds": 1.0, "peak_memory_mb": 1.0, "threads": 1}
        record = {"result": result, "run": "run", "version": "0", "code": "c", "cost": cost}
        outcome = Outcome(cell, folder, record)
        outcome.counts.parent.mkdir(exist_ok=True)
        self.counts.to_csv(outcome.counts, index=False)
        return outcome


def table_of(*rows, **options):
    (table,), errors = tabulate([outcome for row in rows for outcome in row], **options)
    assert not errors
    return table


@pytest.fixture
def judged(tmp_path):
    """Two baselines, each the best in one metric; one of ours far better, one far worse."""
    world = World(tmp_path)
    return table_of(
        world.row("SASRec", 0.2, place=3),
        world.row("GRU4Rec", 0.0, place=2),
        world.row("MUFASA", 0.3, place=1),
        world.row("CAMMSR", -0.25, place=3),
    )


def test_the_texts_of_tokens_are_held_once_for_all_cells(judged):
    one, *others = [users for row in judged.rows for users in row.users]
    for other in others:
        for column in ("user", "target"):
            pairs = zip(one[column], other[column], strict=True)
            assert all(mine is theirs for mine, theirs in pairs)


def test_a_row_says_what_its_model_reads(tmp_path):
    world = World(tmp_path)
    columns = {"selected_features": ["genres", "year"]}  # known to every model, read by some
    rows = [world.row(model, 0.0, values=columns) for model in ("SASRec", "SASRecF", "MUFASA")]
    assert [row.reads for row in table_of(*rows).rows] == ["ids", "genres, year", "ids"]


@pytest.mark.parametrize(
    ("model", "load_col", "reads"),
    [
        ("FM", {"inter": ["u", "i"], "item": ["i", "year"], "user": ["u", "age"]}, "age, year"),
        ("DIN", {"inter": ["u", "i"]}, "ids"),
        ("FM", None, "all columns"),
        ("CKE", {"inter": ["u", "i"]}, "knowledge graph"),
        ("BPR", {"inter": ["u", "i"], "item": ["i", "year"]}, "ids"),
    ],
)
def test_models_of_columns_and_graphs_say_so(tmp_path, model, load_col, reads):
    values = {"load_col": load_col, "USER_ID_FIELD": "u", "ITEM_ID_FIELD": "i"}
    (row,) = table_of(World(tmp_path).row(model, 0.0, values=values)).rows
    assert row.reads == reads


def line_about(table, words):
    (line,) = (line for line in caption(table, MARKS) if words in line)
    return line


@pytest.mark.parametrize(("other", "is_told"), [("GRU4Rec", True), ("BPR", False)])
def test_the_length_of_histories_is_that_of_models_that_read_them(tmp_path, other, is_told):
    world = World(tmp_path)
    lengths = {"SASRec": 50, other: 20}
    rows = [world.row(m, 0.0, values={"MAX_ITEM_LIST_LENGTH": n}) for m, n in lengths.items()]
    lines = caption(table_of(*rows), MARKS)
    assert any("differ in MAX_ITEM_LIST_LENGTH" in line for line in lines) == is_told


def test_what_the_tests_do_not_see_is_told(judged):
    words = ("Not tested", "tests are of the means of users")
    assert not any(word in line for line in caption(judged, MARKS) for word in words)
    protocol = replace(judged.protocol, test_rankings=2 * USERS)
    table = replace(judged, protocol=protocol, metrics=(*judged.metrics, "gauc"))
    assert line_about(table, words[0]).endswith("no such value: gauc.")
    assert f"means over {2 * USERS} rankings" in line_about(table, words[1])


def test_the_reference_of_each_metric_is_the_best_baseline_in_it(judged):
    means = {row.label: {m: row.test(m).mean() for m in judged.metrics} for row in judged.rows}
    assert means["SASRec"]["ndcg@10"] > means["GRU4Rec"]["ndcg@10"]
    assert means["SASRec"]["mrr@10"] < means["GRU4Rec"]["mrr@10"]
    assert {m: row.label for m, row in judged.references.items()} == {
        "ndcg@10": "SASRec",
        "mrr@10": "GRU4Rec",
    }
    assert not judged.fixed_reference
    assert line_about(judged, "Gain:") == (
        "Gain: relative to the best baseline, by mean test value in each metric "
        "(SASRec in ndcg@10, GRU4Rec in mrr@10)."
    )
    mufasa = judged.rows[2]
    expected = 100 * (means["MUFASA"]["mrr@10"] / means["GRU4Rec"]["mrr@10"] - 1)
    assert judged.gain(mufasa, "mrr@10") == pytest.approx(expected)
    assert [judged.gain(row, "ndcg@10") is None for row in judged.rows] == [
        True,
        True,
        False,
        False,
    ]


def test_only_a_better_row_is_marked_and_every_mark_names_its_test(judged, tmp_path):
    write_all([judged], [o for row in judged.rows for o in row.outcomes], tmp_path)
    of_row = {
        line.split("|")[1].strip(): line.split("|")[4:6]
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| ")
    }
    assert [cell.strip()[-3:] for cell in of_row["MUFASA"]] == ["\\*†"] * 2
    for other in ("SASRec", "GRU4Rec", "CAMMSR"):
        assert not any(sign in cell for cell in of_row[other] for sign in "*†▽" if "**" not in cell)
    assert all(cell.strip().startswith("**") for cell in of_row["MUFASA"])
    assert ["<u>" in cell for cell in of_row["SASRec"]] == [True, False]
    assert ["<u>" in cell for cell in of_row["GRU4Rec"]] == [False, True]
    assert line_about(judged, "Wilcoxon") == (
        "* better than the best baseline by Wilcoxon's signed-rank test and the paired t test over "
        "400 users, both two-sided with p < 0.05 after Holm's correction for 4 comparisons; + "
        "differs from the best baseline by Welch's t test over seeds, two-sided, p < 0.05 after "
        "Holm's correction for 4 comparisons."
    )
    assert r"\textbf{" in _latex(judged)


def test_against_the_first_row_worse_ones_are_marked_too(tmp_path):
    world = World(tmp_path)
    rows = ("MUFASA", 0.0), ("CAMMSR", -0.25), ("MDSRec", 0.3)
    table = table_of(*(world.row(model, shift) for model, shift in rows))
    assert table.fixed_reference
    assert line_about(table, "Gain:") == "Gain: relative to MUFASA, the first row."
    said = line_about(table, "Wilcoxon")
    assert said.startswith("* better than MUFASA by Wilcoxon")
    assert "; v worse than MUFASA by Wilcoxon" in said


def test_without_a_difference_there_is_no_mark_and_the_caption_says_so(tmp_path):
    world = World(tmp_path)
    table = table_of(world.row("SASRec", 0.0, seeds=1), world.row("MUFASA", 0.0, seeds=1))
    said = line_about(table, "Wilcoxon")
    assert said.startswith("No row is significantly better than the best baseline by Wilcoxon")
    assert "over seeds" not in said  # one seed has no such test


def test_in_a_tie_all_are_best(tmp_path):
    world = World(tmp_path)
    best = world.row("SASRec", 0.4)
    same = [replace(o, cell=replace(o.cell, row=Row("GRU4Rec", "GRU4Rec"))) for o in best]
    same = [replace(o, cell=replace(o.cell, row=same[0].cell.row)) for o in same]
    table = table_of(best, same, world.row("MUFASA", 0.0))
    first, second = table.order("ndcg@10")
    assert [row.label for row in first] == ["SASRec", "GRU4Rec"]
    assert [row.label for row in second] == ["MUFASA"]
    assert table_of(best, same).order("ndcg@10") == ([], [])  # nobody is better


def test_a_table_without_validation_says_that_the_last_epoch_counts(tmp_path):
    world = World(tmp_path, replace(PROTOCOL, valid_users=0, valid_rankings=0))
    said = " ".join(caption(table_of(world.row("SASRec", 0.0)), MARKS))
    assert "0 validation and 400 test users; the last epoch;" in said
    assert "no validation and the test set scored once" in said
    assert "chosen" not in said


def test_the_caption_says_which_rows_are_tuned_and_where_budgets_differ(tmp_path):
    world = World(tmp_path)
    long, short = {"epochs": 60, "stopping_step": 3}, {"epochs": 40, "stopping_step": 3}
    table = table_of(
        world.row("SASRec", 0.0, values=short, tuned=True),
        world.row("GRU4Rec", 0.0, values=long),
        world.row("MUFASA", 0.0, values=short, tuned=True),
    )
    tuned = "With a tuned configuration: SASRec, MUFASA; with their defaults: GRU4Rec."
    assert line_about(table, "tuned") == tuned
    assert (
        line_about(table, "differ in")
        == "Rows differ in epochs: 40 for SASRec, MUFASA; 60 for GRU4Rec."
    )
    once, world = {"epochs": 1, "train_batch_size": 64}, World(tmp_path / "once")
    table = table_of(
        world.row("Pop", 0.0, values={"epochs": 60, "train_batch_size": 8}, run=1),
        world.row("SASRec", 0.0, values={"epochs": 60, "train_batch_size": 64}),
        world.row("MUFASA", 0.0, values=once, run=1),
    )
    lines = [line for line in caption(table, MARKS) if "differ in" in line]
    assert lines == ["Rows differ in epochs: 60 for SASRec; 1 for MUFASA."]
    plain = World(tmp_path / "plain")
    lines = caption(table_of(plain.row("SASRec", 0.0), plain.row("MUFASA", 0.0)), MARKS)
    assert not any("tuned" in line or "differ in" in line for line in lines)


def test_what_an_earlier_call_measured_is_not_in_the_table(tmp_path):
    rows = World(tmp_path).row("SASRecMM", 0.0, seeds=2)
    for outcome in rows:
        results = {"0": {"ndcg@10": 0.5}, "50": {"ndcg@10": 0.4}}
        (outcome.folder / "missing.json").write_text(json.dumps({"text": results}))
    assert table_of(rows).rows[0].missing.empty
    asked = table_of(rows, missing_modality={"text": (50.0,)}).rows[0].missing
    assert asked["percent"].tolist() == [50.0, 50.0]


def test_epochs_that_were_not_validated_cost_too(tmp_path):
    """Six epochs of 2 CPU seconds, the fourth the best, whichever of them were validated."""
    (line,) = frame_of_costs([table_of(World(tmp_path).row("SASRec", 0.0))]).to_dict("records")
    assert (line["CPU s an epoch"], line["CPU s to the best epoch"]) == (2.0, 8.0)
    assert "peak GPU memory, MiB" not in line


def test_on_a_gpu_the_clock_counts(tmp_path):
    rows = World(tmp_path).row("SASRec", 0.0)
    rows[0].record["cost"]["gpu_memory_mb"] = 321.5
    table = table_of(rows)
    (line,) = frame_of_costs([table]).to_dict("records")
    assert (line["wall s an epoch"], line["wall s to the best epoch"]) == (5.0, 20.0)
    assert line["peak GPU memory, MiB"] == 322
    figure = charts._pareto(table, "ndcg@10")
    assert figure.layout.xaxis.title.text == "wall seconds until the chosen epoch"


def test_parquets_hold_data_sets_with_different_metrics(tmp_path):
    (one,) = World(tmp_path / "one").row("SASRec", 0.0, seeds=1)
    wide = replace(PROTOCOL, topk=(5, 10))
    (two,) = World(tmp_path / "two", wide).row("SASRec", 0.0, seeds=1)
    for first, second in ((one, two), (two, one)):
        write_all([table_of([first]), table_of([second])], [], tmp_path)
        users = pd.read_parquet(tmp_path / "users.parquet")
        assert users["ndcg@5"].isna().sum() == USERS
        assert users["ndcg@10"].notna().all()


def test_parquets_hold_rows_with_one_and_with_several_targets(tmp_path):
    """The second set has two targets a row: no single target, no count of it."""
    world = World(tmp_path / "one")
    (one,) = world.row("SASRec", 0.0, seeds=1)
    (two,) = World(tmp_path / "two").row("SASRec", 0.0, seeds=1)
    file = two.run / "per_user.npz"
    got = PerUser.load(file)
    twice = {n: np.repeat(getattr(got, n), 2) for n in ("rows", "targets", "ranks")}
    replace(got, **twice).save(file)
    for first, second in ((one, two), (two, one)):
        tables = [table_of([first]), table_of([second])]
        write_all(tables, [], tmp_path)
        users = pd.read_parquet(tmp_path / "users.parquet")
        assert len(users) == 2 * USERS
        assert users["target_count"].isna().sum() == users["target"].isna().sum() == USERS
        assert users["target_count"].dropna().eq(3).all()
        assert len(pd.read_parquet(tmp_path / "topk.parquet")) == 2 * USERS * 10
    assert not list(tmp_path.glob("*.tmp"))
