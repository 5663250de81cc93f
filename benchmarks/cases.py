"""The forty fault cases: recbole_mm beside RecBole itself on the same input, as a table.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/cases.py [--keep FOLDER] [--out docs/cases.md]

Loaded into pytest (``-p benchmarks.cases``), this file records each launch of
tests/test_fault_cases.py: a copy of the planted data, the arguments, what recbole_mm said. Then
RecBole runs on each copy in a process of its own. Faults that are not a file or an argument have
a probe of RecBole in ``PROBES``; ``GUARDS`` names their tests, which are run too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    1: "missing data set folder",
    2: "empty or header-only .inter",
    3: "header without `:type`, with two `:`, of unknown type",
    4: "byte order mark",
    5: "CRLF (planted together with 4; clean data first)",
    6: "stray quotes in titles",
    7: "ids NA, null, nan (planted together with 6; 120 items, 3,328 interactions)",
    8: "short row",
    9: "missing, non-numeric, NaN timestamp (refused; then `on_bad_time: drop`)",
    10: "two repeated rows among 3,330",
    11: "two different times in all rows (run twice)",
    12: "filters leave nothing",
    13: "two users too short for the split",
    14: "feature file missing",
    15: "feature ids without a match",
    16: "features of 60 of 120 items",
    17: "features of 30 unknown items (120 items; clean data first)",
    18: "duplicate feature ids: equal, then different",
    19: "NaN, Inf in features (refused; then `nan: mask`)",
    20: "three all-zero vectors",
    21: "wrong width of feat*CLS",
    22: "float64, float16, int32 features",
    23: "ragged float_seq",
    24: "one id fewer than rows",
    25: "truncated npy, npz, safetensors, parquet, pt",
    26: "malicious pickle in npy, pt, npz",
    27: "`ids` path, or member of an archive, out of the data set",
    28: "YAML object tag; Python in a command-line value",
    29: "corrupt, missing, CMYK, empty image in `extract`",
    30: "text that is empty, 2 MB long, emoji",
    31: "unknown key `learning_rat`",
    32: "wrong type, optimizer, metric, topk > items, valid_metric, heads",
    33: "loss or gradient not finite (learning rate 1e30)",
    34: "scores not finite in evaluation",
    35: "all scores tied (chance is hit@10 = 10 / 120 = .083)",
    36: "memory of an evaluation of 5,000 users x 100,000 items, batches of 4,096 users",
    37: "CUDA out of memory in evaluation",
    38: "killed and resumed",
    39: "disk full while saving",
    40: "checkpoint of another item set; two runs in one second; changed data and a cache; "
    "interrupted download",
}
TESTS = "tests/test_fault_cases.py"
# tests of cases that no launch shows whole; a missing one is an error of this script
GUARDS = {
    26: [
        "tests/test_serving.py::test_a_pickle_in_the_place_of_weights_is_refused_and_not_executed"
    ],
    27: ["tests/data/test_download.py::test_members_that_lead_out_are_refused"],
    33: [
        "tests/test_training.py::test_the_last_good_checkpoint_survives_a_gradient_that_is_not_finite",
        "tests/test_training.py::test_a_pretraining_loss_that_is_not_finite_names_its_terms_and_batch",
    ],
    34: [
        "tests/test_evaluation.py::test_case_34_a_score_that_is_not_finite_is_named",
        "tests/test_serving.py::test_a_score_that_is_not_finite_is_no_recommendation",
    ],
    35: [
        "tests/test_evaluation.py::test_case_35_a_tie_gives_the_expected_metric_of_all_its_orders"
    ],
    36: ["tests/test_evaluation.py::test_case_36_a_large_evaluation_stays_within_its_budget"],
    37: ["tests/test_evaluation.py::test_case_37_a_full_device_halves_the_users_and_finishes"],
    38: [
        "tests/test_resume.py::test_a_run_killed_in_an_epoch_ends_as_if_it_had_not_been",
        "tests/test_resume.py::test_a_run_killed_between_epochs_ends_as_if_it_had_not_been",
        "tests/test_resume.py::test_a_run_can_be_killed_again_and_again",
        "tests/test_resume.py::test_early_stopping_remembers",
        "tests/test_resume.py::test_a_damaged_checkpoint_is_refused",
        "tests/test_checkpoint.py::test_whatever_the_moment_of_a_crash_one_whole_state_is_read",
    ],
    39: ["tests/test_checkpoint.py::test_a_full_disk_leaves_the_earlier_checkpoint_and_no_remains"],
    40: [
        "tests/test_serving.py::test_another_item_set_is_refused",
        "tests/test_serving.py::test_another_feature_width_is_refused",
        "tests/test_serving.py::test_weights_of_another_model_are_refused",
        "tests/test_checkpoint.py::test_a_file_of_another_format_is_refused",
        "tests/test_resume.py::test_changed_data_are_refused",
        "tests/test_run_folder.py::test_two_runs_of_the_same_second_get_two_folders",
        "tests/data/test_derive.py::test_second_call_and_touch_are_hits",
        "tests/data/test_derive.py::test_one_changed_byte_is_a_miss",
        "tests/data/test_derive.py::test_other_declaration_is_a_miss",
        "tests/data/test_derive.py::test_damaged_file_is_derived_anew",
        "tests/data/test_download.py::test_an_interrupted_download_leaves_nothing_and_a_retry_works",
        "tests/data/test_download.py::test_another_archive_than_the_last_time_is_refused",
    ],
}


# ---------------------------------------------------------------------- recording, inside pytest


def pytest_runtest_setup(item: Any) -> None:
    if not item.nodeid.startswith(TESTS) or not hasattr(item.module, "launch"):
        return
    launch = getattr(item.module, "_launch", item.module.launch)
    item.module._launch, item.module.launch = launch, _recorder(launch, item.nodeid)


def _recorder(launch: Callable[..., int], test: str) -> Callable[..., int]:
    def recorded(world: Path, *arguments: str, model: str = "Pop") -> int:
        folder = Path(os.environ["CASES"])
        here = folder / f"{len(list(folder.glob('launch*'))):03d}"
        here = here.with_name(f"launch{here.name}")
        shutil.copytree(world, here / "world", symlinks=True)
        said = io.StringIO()
        standard = sys.stderr
        try:
            with contextlib.redirect_stderr(said):
                code = launch(world, *arguments, model=model)
        finally:
            standard.write(said.getvalue())  # the test looks at it
        about = {"test": test, "world": str(world), "arguments": arguments, "model": model}
        results = sorted((world / "saved").rglob("result.json"))
        result = json.loads(results[-1].read_text()) if results else None
        (here / "launch.json").write_text(
            json.dumps({**about, "code": code, "said": said.getvalue(), "result": result})
        )
        return code

    return recorded


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome == "skipped":
        with (Path(os.environ["CASES"]) / "outcomes.jsonl").open("a") as file:
            file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


# ---------------------------------------------------------------------- RecBole itself


def recbole(model: str = "Pop", **values: Any) -> Any:
    """``run_recbole`` on `tiny` of the current folder, leave-one-out by time, full ranking."""
    from recbole.quick_start import run_recbole

    given = {
        "data_path": "data",
        "use_gpu": False,
        "epochs": 1,
        "show_progress": False,
        "MAX_ITEM_LIST_LENGTH": 10,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "metrics": ["NDCG", "Hit"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        **({"train_neg_sample_args": None} if model == "SASRec" else {}),
        **values,
    }
    return run_recbole(model=model, dataset="tiny", config_dict=given)


def in_a_process(work: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Exit code and output of ``work`` in a fork of this process, with ``folder`` as cwd.

    Kept in ``folder``, where a later call finds them.
    """
    kept, output = folder / "recbole.json", folder / "recbole.txt"
    if kept.exists():
        return json.loads(kept.read_text())["code"], output.read_text(errors="replace")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            signal.alarm(300)
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    kept.write_text(json.dumps({"code": os.waitstatus_to_exitcode(status)}))
    return in_a_process(work, folder)


def load_recbole() -> None:
    """Import RecBole, with the three things without which it cannot start on today's packages."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    import numpy as np
    import torch

    torch.set_num_threads(1)
    for name, scalar in {
        "bool_": np.bool_,
        "float_": np.float64,
        "complex_": np.complex128,
    }.items():
        setattr(np, name, scalar)
    for name, scalar in {"object_": np.object_, "str_": np.str_, "unicode_": np.str_}.items():
        setattr(np, name, scalar)
    ray = types.ModuleType("ray")  # quick_start imports it; the ray that RecBole asks for is broken
    ray.tune = None  # type: ignore[attr-defined]
    sys.modules["ray"] = ray
    import recbole.model.sequential_recommender
    import recbole.quick_start  # noqa: F401


def side_file(data: Path, arguments: list[str]) -> dict[str, Any] | str:
    """RecBole's form of the declared features, or why there is none."""
    import numpy as np

    declared = next((a for a in arguments if a.startswith("--modalities={x: {path:")), None)
    if declared is None:
        return {}
    quoted, bare = re.findall(r"path: (?:'([^']+)'|([^,}]+))", declared)[0]
    named = (quoted or bare).replace("{dataset}", "tiny")
    file = data / named
    if file.exists() and file.suffix == ".npy" and (data / "ids.txt").is_file():
        values, ids = np.load(file), (data / "ids.txt").read_text().split("\n")[:-1]
        if len(values) != len(ids):
            return "not run: in its text form each vector stands beside its id"
        rows = [f"{i}\t{' '.join(map(str, v))}" for i, v in zip(ids, values, strict=True)]
        (data / "tiny.itememb").write_text("iid:token\tvec:float_seq\n" + "\n".join(rows) + "\n")
    elif named == "tiny.itememb":
        text = file.read_text().replace("item_id:token\tvector:", "iid:token\tvec:")
        file.write_text(text)
    elif file.exists() or (data / "..").joinpath("ids.txt").exists():
        return f"not run: RecBole reads no `{file.suffix}`"
    columns = {"inter": ["user_id", "item_id", "timestamp"], "itememb": ["iid", "vec"]}
    return {
        "additional_feat_suffix": ["itememb"],
        "load_col": columns,
        "alias_of_item_id": ["iid"],
        "preload_weight": {"iid": "vec"},
    }


def run_recbole_on(launch: dict[str, Any], here: Path) -> str:
    """What RecBole makes of a recorded launch."""
    world = here / "world"
    arguments = [a.replace(launch["world"], str(world)) for a in launch["arguments"]]
    values = side_file(world / "data" / "tiny", arguments)
    if isinstance(values, str):
        return values
    if any("derive: text" in argument for argument in arguments):
        columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
        values["load_col"] = columns
    model = launch["model"] if launch["model"] == "Pop" else "SASRec"

    def work() -> None:
        sys.argv = ["run_recbole.py", f"--checkpoint_dir={world / 'saved'}", *arguments]
        recbole(model, **values)

    code, output = in_a_process(work, world)
    said = outcome_of(code, output)
    return said + (" **The planted code ran.**" if (world / "canary").exists() else "")


def outcome_of(code: int, output: str) -> str:
    """Exit code, and the last line of a failure or the numbers of a success."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    if code:
        lines = [line for line in plain.splitlines() if line.strip()]
        kind = "traceback" if "Traceback" in plain else "message"
        return f"exit {code}, {kind}: {lines[-1] if lines else ''}"
    found = [
        re.findall(rf"number of {name}: (\d+)", plain) for name in ("users", "items", "inters")
    ]
    users, items, inters = (int(numbers[0]) if numbers else 0 for numbers in found)
    tests = re.findall(r"test result.*?ndcg@10', (?:np.float64\()?([\d.naif]+)", plain) or ["?"]
    return (
        f"exit 0: {users - 1:,} users, {items - 1:,} items, {inters:,} interactions, "
        f"NDCG@10 {tests[-1]}"
    )


# ---------------------------------------------------------------------- probes


def scores(change: Callable[[Any], Any]) -> None:
    """A whole run of SASRec as it is, and one whose scores are changed in evaluation."""
    from recbole.model.sequential_recommender.sasrec import SASRec

    def result() -> str:
        found = recbole("SASRec")["test_result"]
        return ", ".join(f"{name} {float(value):.4f}" for name, value in found.items())

    clean, original = result(), SASRec.full_sort_predict
    SASRec.full_sort_predict = lambda self, batch: change(original(self, batch))
    print(f"RESULT metrics are reported: {result()} (with its own scores: {clean})")


def resumed() -> None:
    """Four epochs in one go, and two and two."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    def trained(epochs: int, resume: str | None = None) -> tuple[Any, str]:
        values = {"data_path": "data", "use_gpu": False, "epochs": epochs, "stopping_step": 100}
        values |= {
            "MAX_ITEM_LIST_LENGTH": 10,
            "train_neg_sample_args": None,
            "valid_metric": "MRR@10",
        }
        values |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
        values |= {"show_progress": False, "checkpoint_dir": f"saved{epochs}{bool(resume)}"}
        sys.argv = ["x"]
        config = Config("SASRec", "tiny", config_dict=values)
        init_seed(config["seed"], config["reproducibility"])
        train, valid, _ = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], config["reproducibility"])
        model = get_model("SASRec")(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
        if resume:
            trainer.resume_checkpoint(resume)
        trainer.fit(train, valid, show_progress=False)
        trainer._save_checkpoint(epochs - 1, verbose=False)
        return torch.load(trainer.saved_model_file)["state_dict"], trainer.saved_model_file

    whole, _ = trained(4)
    again, _ = trained(4)
    _, half = trained(2)
    pieces, _ = trained(4, half)
    apart, same = (
        max(float((whole[name] - other[name]).abs().max()) for name in whole)
        for other in (pieces, again)
    )
    print(
        f"RESULT weights differ from those of 4 epochs by up to {apart:.2g} (4 again: {same:.2g})"
    )


def full_disk() -> None:
    """A second save that the system cuts off; then the checkpoint of the first is loaded."""
    import torch
    from recbole.trainer import Trainer

    save = Trainer._save_checkpoint

    def cut_off(self: Any, epoch: int, verbose: bool = True, **more: Any) -> None:
        save(self, epoch, verbose=verbose, **more)
        whole = Path(self.saved_model_file).stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, resource.RLIM_INFINITY))
        try:
            save(self, epoch + 1, verbose=False, **more)
        except Exception as error:
            print(f"the second save: {type(error).__name__}")
        try:
            torch.load(self.saved_model_file)
            print("RESULT the first checkpoint is intact")
        except Exception as error:
            print(f"RESULT the first checkpoint is lost: {type(error).__name__} on loading it")
        sys.stdout.flush()
        os._exit(0)

    Trainer._save_checkpoint = cut_off
    recbole("SASRec")


def other_items() -> None:
    """A checkpoint loaded over data whose items have changed places."""
    from recbole.quick_start import load_data_and_model

    def first_item() -> str:
        _, _, dataset, *_ = load_data_and_model(str(checkpoint))
        return str(dataset.id2token("item_id", 1))

    recbole("SASRec")
    (checkpoint,) = Path("saved").glob("*.pth")
    before = first_item()
    file = Path("data/tiny/tiny.inter")
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *reversed(rows)]) + "\n")
    print(f"RESULT loaded; the vector trained as item {before} now stands for {first_item()}")


def same_second() -> None:
    from recbole.trainer import trainer as module

    names = set()
    now = module.get_local_time()
    module.get_local_time = lambda: now
    original = module.Trainer.__init__

    def named(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        names.add(self.saved_model_file)

    module.Trainer.__init__ = named
    recbole("Pop", seed=1)
    recbole("Pop", seed=2)
    print(f"RESULT two runs in one second wrote {len(names)} checkpoint file")


def carriage_returns() -> None:
    """Case 5 without the byte order mark of case 4, on which RecBole stops."""
    file = Path("data/tiny/tiny.inter")
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    recbole("Pop")


def odd_ids() -> None:
    """Case 7 without the titles of case 6, on which RecBole stops."""
    file = Path("data/tiny/tiny.inter")
    text = file.read_text()
    for old, new in {"i001": "NA", "i002": "null", "i003": "nan"}.items():
        text = text.replace(old, new)
    file.write_text(text)
    recbole("Pop")


class Touch:
    """Its pickle touches ``canary`` when it is loaded."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def evil_checkpoint() -> None:
    import torch
    from recbole.quick_start import load_data_and_model

    torch.save(Touch(), "model.pth")
    try:
        load_data_and_model("model.pth")
    except Exception as error:
        print(f"then {type(error).__name__}")
    ran = "the planted code ran" if Path("canary").exists() else "the planted code did not run"
    print(f"RESULT {ran} (with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD)")


def stale_cache() -> None:
    recbole("Pop", save_dataset=True, checkpoint_dir="saved")
    file = Path("data/tiny/tiny.inter")
    file.write_text("\n".join(file.read_text().splitlines()[:1000]) + "\n")
    from recbole.data import utils

    made = []
    original = utils.data_preparation
    import recbole.quick_start.quick_start as quick

    quick.data_preparation = lambda config, data: (
        made.append(data.inter_num) or original(config, data)
    )
    recbole("Pop", save_dataset=True, checkpoint_dir="saved")
    print(f"RESULT after the file was cut to 999 rows, the cache still gives {made[0]:,}")


LIMIT = 8 << 30  # bytes of data of an evaluation, which must not take the machine


def large_evaluation(of_recbole: bool) -> None:
    """Case 36 on generated users; what the evaluation adds to the peak of memory."""
    from benchmarks.evaluation import SIDES, measure

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = measure(SIDES[0 if of_recbole else -1], 5_000, 100_000, 4_096)
    except (MemoryError, RuntimeError) as error:
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        said = str(error).splitlines()[0]
        print(f"RESULT ended at the limit of 8 GB after {taken:,.0f} MB: {said}")
    else:
        print(f"RESULT done, {found['MB']:,.0f} MB above the peak before it")


# what RecBole itself makes of a case; RESULT is what the table says
PROBES: dict[int, dict[str, Callable[[], None]]] = {
    5: {"CRLF only": carriage_returns},
    7: {"ids in .inter only": odd_ids},
    26: {"a checkpoint": evil_checkpoint},
    34: {"all scores NaN": lambda: scores(lambda s: s * float("nan"))},
    35: {"all scores 0": lambda: scores(lambda s: s * 0)},
    36: {"limit of 8 GB": lambda: large_evaluation(of_recbole=True)},
    38: {"2 + 2 epochs of SASRec": resumed},
    39: {"file size limited": full_disk},
    40: {
        "rows of .inter reversed": other_items,
        "same second": same_second,
        "save_dataset": stale_cache,
    },
}
# the same of recbole_mm, where no launch shows it
OUR_PROBES: dict[int, Callable[[], None]] = {
    36: lambda: large_evaluation(of_recbole=False),
}
NOT_RUN = {
    29: "not run: RecBole reads no images",
    37: "not run: no GPU",
}


# ---------------------------------------------------------------------- the table


def shortened(text: str, *folders: str) -> str:
    """One cell: no temporary folders, no line ends, at most 220 characters."""
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(folder, ".")
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 220 else text[:217] + "..."


def ours(launch: dict[str, Any]) -> str:
    """What recbole_mm made of a recorded launch."""
    if launch["code"] or not launch["result"]:
        errors = [x for x in launch["said"].splitlines() if x.startswith("error: ")]
        return f"exit {launch['code']}: {errors[-1] if errors else ''}"
    counts = launch["result"]["data"]["interactions"]
    found = "".join(
        f"; {m['name']}: {m['matched']} with a vector, {m['unknown']} unknown ids"
        for m in launch["result"]["data"].get("modalities", ())
    )
    return (
        f"exit 0: {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['interactions']:,} interactions, NDCG@10 "
        f"{launch['result']['test_result']['ndcg@10']:.4f}{found}"
    )


def cases_of(test: str) -> list[int]:
    """Numbers of the cases in the name of a test."""
    match = re.search(r"test_cases?_(\d+)(?:_and_(\d+))?", test)
    return [int(number) for number in match.groups() if number] if match else []


def record(folder: Path) -> None:
    """Run the tests of all cases, recording."""
    guards = [test for tests in GUARDS.values() for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.cases", TESTS, *guards]
    environment = {**os.environ, "CASES": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}")


def table(folder: Path) -> list[str]:
    """The rows of the table."""
    outcomes = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    seen: dict[int, list[tuple[str, str]]] = {number: [] for number in TITLES}
    for here in sorted(folder.glob("launch*")):
        launch = json.loads((here / "launch.json").read_text())
        for number in cases_of(launch["test"]):
            theirs = ""
            if number not in NOT_RUN:
                theirs = shortened(run_recbole_on(launch, here), str(here / "world"))
            seen[number].append((theirs, shortened(ours(launch), launch["world"])))
    for number, probes in PROBES.items():
        for name, work in probes.items():
            here = folder / f"probe{number}-{name.replace(' ', '-')}"
            here.mkdir(exist_ok=True)
            shutil.copytree(ROOT / "dataset_atomic/tiny", here / "data/tiny", dirs_exist_ok=True)
            sys.argv = ["probe"]
            code, output = in_a_process(work, here)
            said = re.findall(r"RESULT (.*)", output)
            theirs = said[-1] if said else outcome_of(code, output)
            seen[number].append((f"{name}: {shortened(theirs, str(here))}", ""))
    for number, work in OUR_PROBES.items():
        here = folder / f"ours{number}"
        here.mkdir(exist_ok=True)
        code, output = in_a_process(work, here)
        said = re.findall(r"RESULT (.*)", output)
        seen[number].append(("", said[-1] if said else outcome_of(code, output)))
    rows = []
    for number, title in TITLES.items():
        tests = {test.split("[")[0] for test, _ in outcomes if number in cases_of(test)}
        tests |= set(GUARDS.get(number, ()))
        results = [said for test, said in outcomes if test.split("[")[0] in tests]
        state = f"{len(results)} pass"
        if set(results) - {"passed"}:
            state = "**fails**"
        elif tests - {test.split("[")[0] for test, _ in outcomes}:
            state = "**not run**"
        theirs = [NOT_RUN[number]] if number in NOT_RUN else [t for t, _ in seen[number] if t]
        mine = list(dict.fromkeys(o for _, o in seen[number] if o))
        guards = [f"`{test.removeprefix('tests/')}`" for test in sorted(tests)]
        if not tests:
            mine, guards, state = ["**open**"], [], ""
        cells = [
            str(number),
            title,
            "<br>".join(dict.fromkeys(theirs)),
            "<br>".join(mine or ["what its tests ask"]),
        ]
        rows.append("| " + " | ".join([*cells, "<br>".join([*guards, state])]) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--keep", type=Path, help="folder of the recording; used again if it exists"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/cases.md")
    options = parser.parse_args()
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        if not (folder / "outcomes.jsonl").exists():
            folder.mkdir(exist_ok=True)
            record(folder)
        load_recbole()
        rows = table(folder)
    lines = [
        "# The forty fault cases, RecBole beside recbole_mm",
        "",
        f"{time.strftime('%Y-%m-%d')}, RecBole {version('recbole')}; made by",
        "`PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/cases.py`. Each fault is planted into",
        "a copy of `tiny` (300 users, 120 items, 3,328 interactions) by the test in the last",
        "column; both columns show what was observed on that copy, one line for each different",
        "outcome. RecBole runs its own `run_recbole` (Pop, or SASRec where recbole_mm runs a model",
        "with features) on the same arguments; a matrix is rewritten as its text side file. Three",
        "things were added, without which RecBole does not start or load on these packages:",
        "numpy's old names, an empty `ray` and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1. The protocols",
        "differ, so NDCG@10 compares within a column only; RecBole's Pop counts an item at most",
        "once a batch, which makes all items of `tiny` tie: its NDCG@10 tells which items are the",
        "targets, and nothing of scores. Long messages are cut. That a test fails when one of the",
        "checks is taken out is shown in [guards.md](../benchmarks/results/guards.md).",
        "",
        "| case | fault | RecBole 1.2.1 | recbole_mm | tests |",
        "| ---: | --- | --- | --- | --- |",
        *rows,
    ]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
