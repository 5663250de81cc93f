"""From a command to tables: cells that finish, fail, are killed, and are found again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recbole_mm import compare as module
from recbole_mm.cli import main
from recbole_mm.compare import IncompleteTables, cells, compare
from recbole_mm.compare.cells import _check_data
from recbole_mm.compare.plan import plan
from recbole_mm.compare.tables import tabulate
from recbole_mm.config import DATASETS
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.protocol import Protocol
from recbole_mm.run_folder import code_digest, processor
from tests.compare.conftest import QUICK

ROOT = Path(__file__).parents[2]
SAME = ("table.md", "table.tex", "table.csv", "significance.csv", "users.parquet", "topk.parquet")


def contents(out):
    return {name: (out / name).read_bytes() for name in SAME}


def test_the_table_stands_in_every_form(done):
    out, _ = done
    files = contents(out)
    text = files["table.md"].decode()
    assert "| Pop " in text
    assert "**" in text
    assert "ranking full over 120 items, history not masked" in text
    tex = files["table.tex"].decode()
    assert r"\toprule" in tex
    assert r"\textbf{" in tex
    assert "fingerprints items" in tex
    assert "p $<$ 0.05" in tex or "0.05" not in tex
    assert " < " not in tex
    frame = pd.read_csv(out / "table.csv")
    cell = frame.query("model == 'SASRecMM' and part == 'test' and metric == 'ndcg@10'")
    (record,) = (out / "cells/tiny/SASRecMM").glob("*/cell.json")
    result = json.loads(record.read_text())["result"]
    assert cell["mean"].item() == pytest.approx(result["test_result"]["ndcg@10"])
    cost = pd.read_csv(out / "cost.csv").set_index("model")
    assert cost.loc["SASRecMM", "CPU s an epoch"] > 0
    assert cost.loc["SASRecMM", "peak memory, MiB"] > 100
    assert set(cost["processor"]) == {processor()}
    assert (out / "cost.md").read_text().endswith(f"\n\nMeasured on {processor()}.\n")


def test_what_each_user_got_adds_up_to_the_table(done):
    out, _ = done
    users = pd.read_parquet(out / "users.parquet")
    means = pd.read_csv(out / "table.csv").query("part == 'test'").set_index(["model", "metric"])
    for model, part in users.groupby("model"):
        assert len(part) == 300
        for metric in ("ndcg@10", "hit@20", "mrr@5"):
            assert part[metric].mean() == pytest.approx(
                means.loc[(model, metric), "mean"], abs=1e-6
            )
        inside = part["rank"] <= 10
        assert (part["hit@10"] == inside).all()
    lists = pd.read_parquet(out / "topk.parquet")
    assert (lists.groupby(["model", "user"])["place"].max() == 20).all()
    joined = lists.merge(users, on=["dataset", "model", "seed", "user"])
    found = joined[joined["item"] == joined["target"]]
    assert (found["place"] == found["rank"]).all()
    assert len(found) == (users["rank"] <= 20).sum()


def test_histories_and_counts_are_those_of_the_file(done):
    out, _ = done
    users = pd.read_parquet(out / "users.parquet").query("model == 'Pop'").set_index("user")
    inter = pd.read_csv(ROOT / "dataset_atomic/tiny/tiny.inter", sep="\t")
    inter.columns = ["user", "item", "time"]
    inter = inter.sort_values("time", kind="stable")
    of_user = inter.groupby("user")
    assert (users["history"] == of_user.size() - 1).all()
    assert (users["target"] == of_user["item"].last()).all()
    train = inter[inter.groupby("user").cumcount(ascending=False) > 1]
    counts = train["item"].value_counts()
    assert (users["target_count"] == users["target"].map(counts).fillna(0)).all()


def test_a_failed_cell_is_reported_with_its_reason_and_stops_no_other(done):
    out, _ = done
    files = contents(out)
    assert "failed: MUFASA+greedy on tiny, seed 2020" in files["table.md"].decode()
    cells = pd.read_csv(out / "cells.csv").set_index("model")
    assert cells["state"].to_dict() == {
        "Pop": "finished",
        "SASRecMM": "finished",
        "MUFASA+greedy": "failed",
    }
    assert "min_coverage" in cells.loc["MUFASA+greedy", "error"]


def test_finished_cells_are_not_run_again_and_the_table_is_the_same(done, capsys):
    out, arguments = done
    files = contents(out)
    records = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/*/cell.json")}
    assert main(arguments) == 1
    assert capsys.readouterr().out.count("(already finished)") == 2
    assert records == {path: path.stat().st_mtime_ns for path in records}
    assert contents(out) == files


def copy_of(done, folder):
    """A finished compare in another folder, and the arguments that go on there."""
    out, arguments = done
    mine = folder / "copy"
    shutil.copytree(out, mine)
    return mine, [f"--out={mine}" if part == f"--out={out}" else part for part in arguments]


def test_lost_counts_are_made_again_without_training(done, tmp_path):
    out, _ = done
    mine, again = copy_of(done, tmp_path)
    (counts,) = (mine / "data").iterdir()
    before = counts.read_bytes()
    records = {path: path.stat().st_mtime_ns for path in mine.glob("cells/*/*/*/cell.json")}
    shutil.rmtree(mine / "data")
    assert main(again) == 1
    assert counts.read_bytes() == before
    assert records == {path: path.stat().st_mtime_ns for path in records}
    assert {name: (mine / name).read_bytes() for name in SAME} == contents(out)


@pytest.mark.parametrize("damage", ["per_user.npz", "cell.json"])
def test_a_damaged_cell_runs_again(done, tmp_path, capsys, caplog, damage):
    out, _ = done
    mine, again = copy_of(done, tmp_path)
    if damage == "cell.json":
        next(mine.glob("cells/tiny/Pop/*/cell.json")).write_text("{")
    else:
        next(mine.glob("cells/tiny/Pop/*/run/*/*/*/per_user.npz")).unlink()
    assert main(again) == 1
    assert capsys.readouterr().out.count("(already finished)") == 1
    assert f"run again, since its folder lacks {damage}" in caplog.text
    assert (mine / "table.csv").read_bytes() == (out / "table.csv").read_bytes()


def test_another_source_of_the_package_is_told(done, tmp_path, capsys):
    mine, again = copy_of(done, tmp_path)
    record = next(mine.glob("cells/tiny/Pop/*/cell.json"))
    record.write_text(record.read_text().replace(code_digest(), "another"))
    main(again)
    assert "(already finished, by another source of recbole_mm)" in capsys.readouterr().out


def test_counts_that_cannot_be_made_again_are_told(done, tmp_path, capsys):
    mine, again = copy_of(done, tmp_path)
    shutil.rmtree(mine / "data")
    (mine / "data").write_text("in the way")
    assert main(again) == 1
    assert "is gone and could not be counted again" in capsys.readouterr().err


def test_two_compares_do_not_share_a_folder(done, tmp_path):
    out, _ = done
    code = (
        f"import fcntl, time; f = open({str(out / '.lock')!r}, 'a'); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(EnvironmentFault, match="another compare is at work"):
            compare(["Pop"], ["tiny"], out=out)
        other.kill()


def test_the_folder_is_held_until_the_last_table_is_written(tmp_path, monkeypatch):
    write, begun = module.write_page, []

    def write_while_another_begins(page, out):
        monkeypatch.setattr(module, "write_page", write)
        with pytest.raises(EnvironmentFault, match="another compare is at work"):
            compare(["Pop"], ["tiny"], out=out)
        begun.append(out)
        write(page, out)

    monkeypatch.setattr(module, "write_page", write_while_another_begins)
    compare(["Pop"], ["tiny"], out=tmp_path)
    assert begun == [tmp_path]


def test_runs_of_other_items_or_splits_do_not_share_a_table(done):
    out, _ = done
    tables = finished(out)
    for field, value in (("items", "0" * 12), ("test", "1" * 12), ("mask_history", True)):
        changed = [tables[0], altered(tables[1], field, value)]
        none, (error,) = tabulate(changed)
        assert not none
        assert f"cannot share a table, they differ in {field}" in str(error)


def test_a_data_set_without_a_finished_cell_leaves_the_tables_of_the_others(done, tmp_path, capsys):
    out, _ = done
    pop, mm = finished(out)
    failed = replace(pop, cell=replace(pop.cell, dataset="other"), record=None, error="no time")
    (table,), (error,) = tabulate([pop, failed, mm])
    assert [row.label for row in table.rows] == ["Pop", "SASRecMM"]
    assert "other: no cell is finished" in str(error)
    assert "no time" in str(error)
    (tmp_path / "bad").mkdir()
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (tmp_path / "bad" / "bad.inter").write_text(f"{header}u\ti\tsoon\n")
    arguments = ["compare", "--models=Pop", f"--data_path={tmp_path}", f"--out={tmp_path / 'o'}"]
    capsys.readouterr()
    assert main([*arguments, "--datasets=tiny,bad"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"error: bad: no cell is finished.*'soon'", printed.err)
    assert "### tiny" in printed.out
    assert "### tiny" in (tmp_path / "o/table.md").read_text()
    states = pd.read_csv(tmp_path / "o/cells.csv").set_index("dataset")["state"]
    assert states.to_dict() == {"tiny": "finished", "bad": "failed"}
    assert (tmp_path / "o/report.html").is_file()
    with pytest.raises(IncompleteTables, match="bad: no cell is finished") as caught:
        compare(["Pop"], ["bad"], out=tmp_path / "o", command_line=[f"--data_path={tmp_path}"])
    assert not caught.value.tables
    # of the earlier call nothing is left that could be taken for this one's
    assert {p.name for p in (tmp_path / "o").iterdir()} == {".lock", "cells", "cells.csv", "data"}


def test_less_of_some_metrics_is_better(tmp_path):
    metrics = ["NDCG", "GiniIndex"]
    (table,) = compare(
        ["Pop", "BPR", "ItemKNN"],
        ["tiny"],
        out=tmp_path,
        config_dict={"metrics": metrics, "epochs": 1},
        show=["GiniIndex@10"],
    )
    values = {row.label: float(row.test("giniindex@10").mean()) for row in table.rows}
    ordered = sorted(values, key=values.get)
    (best,), (second,) = table.order("giniindex@10")
    assert [best.label, second.label] == ordered[:2]
    # all three are baselines: the first row is what others are measured against
    for row in table.rows[1:]:
        gain = table.gain(row, "giniindex@10")
        assert gain == pytest.approx(100 * (1 - values[row.label] / values["Pop"]))


def test_a_metric_without_a_cut_off_has_a_column(tmp_path):
    values = {"metrics": ["NDCG", "GAUC"], "valid_metric": "GAUC", "epochs": 1, "topk": [5, 10]}
    (table,) = compare(["Pop", "BPR"], ["tiny"], out=tmp_path / "o", config_dict=values)
    assert table.metrics == ("gauc", "ndcg@10")
    assert "test gauc" in (tmp_path / "o/table.md").read_text()
    assert (tmp_path / "o/report.html").is_file()
    (table,) = compare(
        ["Pop", "BPR"], ["tiny"], out=tmp_path / "o", config_dict=values, show=["NDCG@5"]
    )
    assert table.metrics == ("gauc", "ndcg@5")


def test_files_that_change_in_the_meantime_are_no_result(tmp_path, monkeypatch):
    data = shutil.copytree(DATASETS / "tiny", tmp_path / "data/tiny")
    (cell,) = plan(["Pop"], ["tiny"], 1, config_dict={"data_path": str(data.parent)})
    with (data / "tiny.inter").open("a") as file:
        file.write("new\t1\t1.0\n")
    with pytest.raises(InputError, match="the files of tiny have changed since compare began"):
        _check_data(cell)
    again = plan(["Pop"], ["tiny"], 1, config_dict={"data_path": str(data.parent)})
    (data / "tiny.inter").write_bytes((DATASETS / "tiny/tiny.inter").read_bytes())
    monkeypatch.setattr(module, "plan", lambda *_, **__: again)
    with pytest.raises(IncompleteTables, match="have changed since compare began"):
        compare(["Pop"], ["tiny"], out=tmp_path / "o")
    assert not list((tmp_path / "o").glob("cells/*/*/*/cell.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": ["NDGC@10"]}, "--show: unknown metric 'ndgc@10'; did you mean 'ndcg@10'"),
        ({"missing_modality": {"txt": (50,)}}, "no row reads 'txt'; did you mean 'text'"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_trained(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        compare(["Pop", "SASRecMM"], ["tiny"], out=tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_what_fails_with_a_modality_missing_is_told_and_keeps_the_run(done, monkeypatch):
    from recbole_mm.compare import missing
    from recbole_mm.compare.cells import _measure_missing

    out, _ = done
    _, mm = finished(out)

    def torn(*_, **__):
        raise MemoryError("can't allocate memory")

    before = (mm.folder / missing.FILE).read_text()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("recbole_mm.quick_start.open_run", torn)
            _measure_missing(mm.cell, mm.folder, mm.record, {"image": (50.0,)})
        assert missing.read(mm.folder)["image"]["50"] == {
            "error": "MemoryError: can't allocate memory"
        }
        wanted = {"image": (50.0,)}
        assert [*missing.still_to_do(mm.folder, mm.record, wanted)] == [("image", 50.0)]
    finally:
        (mm.folder / missing.FILE).write_text(before)


def finished(out):
    """Outcomes of the two finished cells."""
    planned = plan(["Pop", "SASRecMM"], ["tiny"], 1, command_line=QUICK)
    return [cells.read_outcome(cell, out) for cell in planned]


def altered(outcome, field, value):
    record = json.loads(json.dumps(outcome.record))
    record["result"]["protocol"][field] = value
    assert Protocol.from_dict(record["result"]["protocol"])
    return replace(outcome, record=record)


def test_a_modality_can_be_missing_at_test(done):
    """Nothing hidden is the test result; the planted answer is in the features."""
    out, _ = done
    files = contents(out)
    curve = pd.read_csv(out / "missing.csv")
    assert set(curve["model"]) == {"SASRecMM"}
    of_table = pd.read_csv(out / "table.csv").query("part == 'test' and metric == 'ndcg@10'")
    whole = of_table.set_index("model").loc["SASRecMM", "mean"]
    by_percent = curve.set_index("percent")["ndcg@10"]
    assert by_percent[0] == pytest.approx(whole, abs=1e-6)
    assert by_percent[100] < 0.8 * whole
    assert "missing for some of the items" in files["table.md"].decode()


def test_cold_items_get_a_column_of_their_own(tmp_path):
    (table,) = compare(
        ["Pop"], ["tiny"], out=tmp_path, cold_start=30, config_dict={"valid_metric": "MRR@20"}
    )
    assert "newest 30 % of the items cold" in table.protocol.split
    users = pd.read_parquet(tmp_path / "users.parquet")
    cold = users[users["target_count"] == 0]
    assert 0 < len(cold) < len(users)
    text = (tmp_path / "table.md").read_text()
    assert f"cold mrr@20 ({len(cold)} targets)" in text
    assert "Cold targets: those that occur in no training row" in text
    assert f"{cold['mrr@20'].mean():.4f}" in text
    of_cold = pd.read_csv(tmp_path / "table.csv").query("part == 'test, cold targets'")
    means = of_cold.set_index("metric")["mean"]
    assert means["mrr@20"] == pytest.approx(cold["mrr@20"].mean(), abs=1e-6)
    assert "hit@10" in means
    # the cold items of a history are no training rows, and are seen by the model all the same
    rows = pd.read_csv(DATASETS / "tiny/tiny.inter", sep="\t", dtype=str)
    of_user = rows["user_id:token"].value_counts()
    assert (users["history"] == users["user"].map(of_user) - 1).all()


@pytest.mark.parametrize("text", ["text:a", "text:101", ":5", "text:-1,2"])
def test_percentages_of_a_missing_modality_are_checked(text):
    from recbole_mm.compare.missing import parse

    assert parse(["text:50,0", "image"]) == {"text": (0.0, 50.0), "image": (0, 25, 50, 75, 100)}
    assert parse(["text:0", "text:50"]) == {"text": (0.0, 50.0)}
    assert parse(["text:33.33333333"]) == {"text": (33.3333,)}  # as the record spells it
    with pytest.raises(InputError, match="not of the form"):
        parse([text])


def test_a_kill_after_the_training_does_not_cost_it(done, tmp_path, monkeypatch):
    """What comes after the last epoch fails once; explain may fail for good."""
    from recbole_mm import quick_start

    def dies(*_, **__):
        raise KeyboardInterrupt

    def wrong(*_, **__):
        raise IndexError("no such row")

    (cell,) = plan(["MUFASA"], ["tiny"], 1, command_line=QUICK)
    folder = tmp_path / "cells" / cell.folder
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(quick_start, "explain_run", dies)
        with pytest.raises(KeyboardInterrupt):
            cells._train(cell, tmp_path, 1)
    (weights,) = folder.glob("run/*/*/*/model.safetensors")
    written = weights.stat().st_mtime_ns
    monkeypatch.setattr(quick_start, "explain_run", wrong)
    record = cells._train(cell, tmp_path, 1)
    assert folder / record["run"] == weights.parent
    assert weights.stat().st_mtime_ns == written
    assert record["result"]["epochs"] == 1


@pytest.mark.slow
def test_killing_compare_at_random_changes_no_byte_of_the_table(tmp_path):
    """SIGKILL at random instants, again and again, against one run that nobody disturbed."""
    arguments = [
        *("compare", "--models=MUFASA,BPR,Pop", "--datasets=tiny", "--seeds=2"),
        *("--jobs=2", "--epochs=2", "--MAX_ITEM_LIST_LENGTH=10"),
    ]
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    assert main([*arguments, f"--out={quiet}"]) == 0
    generator = np.random.default_rng(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "recbole_mm.cli", *arguments, f"--out={disturbed}"]
    killed = 0
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        goal = epochs_done(disturbed) + int(generator.integers(2, 5))
        while process.poll() is None and epochs_done(disturbed) < goal:
            time.sleep(0.05)
        time.sleep(float(generator.uniform(0, 0.5)))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed > 1
    assert contents(disturbed) == contents(quiet)


def epochs_done(out):
    return sum(
        file.read_bytes().count(b"\n") for file in out.glob("cells/*/*/*/run/*/*/*/metrics.jsonl")
    )


@pytest.mark.slow
def test_nothing_goes_on_in_the_folder_of_a_killed_compare(tmp_path):
    command = [
        *(sys.executable, "-m", "recbole_mm.cli", "compare", "--models=SASRecFast"),
        *("--datasets=tiny", "--epochs=10000", "--stopping_step=10000", f"--out={tmp_path}"),
    ]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.time() + 120
    while not list(tmp_path.glob("cells/*/*/*/run/*/*/*/metrics.jsonl")):
        assert time.time() < deadline
        time.sleep(0.5)
    process.kill()
    process.wait()
    time.sleep(5)
    (lines,) = tmp_path.glob("cells/*/*/*/run/*/*/*/metrics.jsonl")
    size = lines.stat().st_size
    time.sleep(5)
    assert lines.stat().st_size == size
