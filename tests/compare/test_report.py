"""The report: what stands in it, and that a browser draws it, sorts it and fits it on a phone."""

import json
import re
import shlex
import shutil
import time

import pandas as pd
import pytest

from recbole_mm import __version__
from recbole_mm.compare.cells import read_outcome
from recbole_mm.compare.charts import _learning, _style, charts_of
from recbole_mm.compare.plan import plan
from recbole_mm.compare.report import Cell, Column, _json_for_html, _quoted, _template
from recbole_mm.compare.tables import caption, tabulate
from recbole_mm.run_folder import code_digest
from tests.compare.conftest import QUICK

BLANK = dict.fromkeys(("title", "version", "command", "plotly", "figures"), "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


def table(out):
    cells = plan(["Pop", "SASRecMM"], ["tiny"], 1, command_line=QUICK)
    outcomes = [read_outcome(cell, out) for cell in cells]
    (found,), _ = tabulate(outcomes, missing_modality={"text": (0.0, 100.0)})
    return found


def test_the_page_needs_nothing_beside_it(done):
    page = (done[0] / "report.html").read_text()
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in markup
    assert not re.search(r"<(script|img|iframe)[^>]* src=", page)
    for said in ("SASRecMM", "fingerprints items", "failed: MUFASA+greedy", "test users", "torch"):
        assert said in markup


def test_a_table_says_that_its_rows_are_of_several_versions(done):
    marks = {"*": "*", "-": "-", "+": "+"}
    found = table(done[0])
    assert not any("several versions" in line for line in caption(found, marks))
    found.rows[0].outcomes[0].record["version"] = "0.0.9"
    note, source = caption(found, marks)[-1], f"(source {code_digest()})"
    assert note.endswith(f"Pop by 0.0.9 {source}; SASRecMM by {__version__} {source}.")
    # neither does the number of the version change with every change of what it stands for
    found.rows[0].outcomes[0].record.update(version=__version__, code="0" * 12)
    note = caption(found, marks)[-1]
    assert f"Pop by {__version__} (source 000000000000); SASRecMM by {__version__} {source}" in note
    del found.rows[0].outcomes[0].record["code"]  # of before there was one
    assert f"Pop by {__version__}; SASRecMM" in caption(found, marks)[-1]


def test_charts_show_what_the_tables_say(done):
    out, _ = done
    charts = {chart.name: chart.figure for chart in charts_of(table(out))}
    assert {"learning", "cost", "history", "popularity", "cold", "missing-text"} == set(charts)
    users = pd.read_parquet(out / "users.parquet").query("model == 'SASRecMM'")
    cold = users.loc[users["target_count"] == 0, "ndcg@10"]
    bars = {trace.name: trace for trace in charts["cold"].data}["SASRecMM"]
    assert bars.x[0] == f"cold<br>n={len(cold)}"
    assert bars.y[0] == pytest.approx(cold.mean())
    by_history = {trace.name: trace for trace in charts["history"].data}["SASRecMM"]
    counts = [int(label.partition("n=")[2]) for label in by_history.x]
    assert sum(counts) == len(users)
    mean = sum(n * y for n, y in zip(counts, by_history.y, strict=True)) / len(users)
    assert mean == pytest.approx(users["ndcg@10"].mean())


@pytest.mark.parametrize(("lengths", "kind"), [((60, 5), "log"), ((20, 5), None)])
def test_one_long_row_does_not_press_the_learning_curves_of_the_others_flat(done, lengths, kind):
    found = table(done[0])
    for row, length in zip(found.rows, lengths, strict=True):
        metric = {found.metrics[0]: 0.1}
        vars(row)["epochs"] = [[{"epoch": i, "valid": metric} for i in range(length)]]
    figure = _learning(found, found.metrics[0])
    assert figure.layout.xaxis.type == kind
    assert [max(trace.x) for trace in figure.data] == list(lengths)


def test_names_may_be_broken_at_a_plus_and_stay_escaped():
    line = [Cell("a<b>+slow", "a"), Cell("+8.9 %", 8.9)]
    text = str(
        _template()
        .make_module({"tables": [], "environment": [], **BLANK})
        .grid([Column("model", text=True), Column("gain")], [line], True)
    )
    assert "a&lt;b&gt;+<wbr>slow" in text
    assert "+8.9 %" in text


def test_weights_that_a_model_tells_of_itself_are_drawn(done):
    out, _ = done
    found = table(out)
    folder = found.rows[1].outcomes[0].run / "explain"
    folder.mkdir()
    try:
        (folder / "fusion_by_category.csv").write_text(
            "category,items,text,image\n(all),120,0.4,0.6\n<b>Home</b>,60,0.3,0.7\nNone,9,0.5,0.5\n"
        )
        (folder / "gates_by_activity.csv").write_text(
            "history_length,histories,window,block,layer\n"
            "1 to 5,34,0.9,0.2,1\n6 to 10,266,0.8,0.3,1\n"
        )
        charts = {chart.title: chart.figure for chart in charts_of(found)}
    finally:
        shutil.rmtree(folder)
    bars = charts["SASRecMM: fusion weights by category"].data
    assert [(bar.name, list(bar.x)) for bar in bars] == [
        ("text", [0.5, 0.3, 0.4]),
        ("image", [0.5, 0.7, 0.6]),
    ]
    assert len(charts["SASRecMM: gates by length of the history"].data) == 2


def test_rows_of_one_colour_have_other_marks_and_lines():
    looks = [_style(number) for number in range(14)]
    assert len(set(looks)) == 14
    assert len({(colour, symbol) for colour, _, symbol in looks}) == 14


@pytest.mark.parametrize(
    "word", ["plain", "two words", "--val_interval={rating: '[4,inf)'}", "it's $HOME", 'a "b" c']
)
def test_the_command_of_the_page_can_be_run_again(word):
    assert shlex.split(_quoted(word)) == [word]
    assert """'"'""" not in _quoted("--val_interval={rating: '[4,inf)'}")


def test_nothing_in_the_data_ends_the_element_it_stands_in():
    text = _json_for_html({"a": "</script><b>&"})
    assert not set(text) & set("<>&")
    assert json.loads(text) == {"a": "</script><b>&"}


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(browser, out, width):
    """The report in a window of that width, when all of its scripts have run."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((out / "report.html").as_uri())
    deadline = time.time() + 60
    while browser.execute_script("return document.body.dataset.ready") != "true":
        assert time.time() < deadline, browser.get_log("browser")
        time.sleep(0.1)
    return browser


@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_without_an_error(done, browser, width):
    page = opened(browser, done[0], width)
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.chart')].map(chart => ({"
        "  traces: chart.querySelectorAll('.trace').length,"
        "  width: chart.querySelector('.main-svg').getBoundingClientRect().width}))"
    )
    assert len(drawn) == 6
    assert all(chart["traces"] for chart in drawn)
    assert all(200 < chart["width"] <= width for chart in drawn)


def test_the_page_fits_a_phone_and_its_tables_scroll_inside(done, browser):
    page = opened(browser, done[0], 390)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    tallest = page.execute_script(
        "return Math.max(...[...document.querySelectorAll('tbody tr')]"
        "  .map(row => row.getBoundingClientRect().height))"
    )
    assert tallest < 120  # names are not broken into letters
    smallest = page.execute_script(
        "return Math.min(...[...document.querySelectorAll('main p, main li, main td, main dd')]"
        "  .map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12


def test_a_click_on_a_head_sorts_the_table(done, browser):
    page = opened(browser, done[0], 1280)

    def column(number):
        return page.execute_script(
            "return [...document.querySelector('table[data-sortable]').tBodies[0].rows]"
            f"  .map(row => row.cells[{number}].dataset.value)"
        )

    def click(number):
        page.execute_script(
            "document.querySelector('table[data-sortable]').tHead.rows[0]"
            f"  .cells[{number}].querySelector('button').click()"
        )

    click(1)
    values = [float(value) for value in column(1)]
    assert values == sorted(values, reverse=True)
    click(1)
    assert [float(value) for value in column(1)] == sorted(values)
    click(0)
    click(0)
    assert column(0) == ["Pop", "SASRecMM"]
