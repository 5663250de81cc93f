"""Remove the guards of the fault cases one by one: a test must fail each time.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/guards.py [--work FOLDER] [--case 25 26]

Each entry of ``GUARDS`` takes one check out of a copy of the package, as an accident might: the
condition becomes ``False``, the step is left out, the unsafe call is made. The tests that belong to
it pass in the untouched copy, and at least one of them must fail in the changed one, for another
reason than a name that does not exist. Exit code 1 if a guard can be removed unnoticed. Cases
without an entry are named in the table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recbole_mm.run_folder import processor

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("recbole_mm", "tests", "properties", "dataset_atomic", "benchmarks", "setup.cfg")
SECONDS = 300  # for the tests of one guard
# what a typing error would raise: such a failure says nothing of the guard
OF_THE_MUTATION = ("SyntaxError", "ImportError", "ModuleNotFoundError", "NameError")
OF_THE_MUTATION += ("UnboundLocalError", "IndentationError")


class Guard(NamedTuple):
    """One check and the tests that need it.

    Attributes:
        case: Number in reliability.md.
        file: Below ``recbole_mm``.
        old: Text that stands there exactly once.
        new: The same without the guard.
        tests: Node ids below ``tests``, at least one of which fails without it.
    """

    case: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def fault(*names: str) -> tuple[str, ...]:
    """Tests of test_fault_cases.py."""
    return tuple(f"test_fault_cases.py::test_case_{name}" for name in names)


ATOMIC, DATASET, DERIVE = "data/atomic.py", "data/dataset.py", "data/derive/__init__.py"
FEATURES, RANKER = "data/features.py", "evaluation/ranker.py"
FILES, COMMON, ARRAYS, TABLES = (
    f"data/feature_files/{name}.py" for name in ("__init__", "common", "arrays", "tables")
)
T_DATASET, T_DERIVE, T_FILES = (
    f"data/test_{name}.py::test_" for name in ("dataset", "derive", "feature_files")
)
T_EVALUATION, T_CHECKPOINT = "test_evaluation.py::test_", "test_checkpoint.py::test_"
T_TRAINING, T_SERVING, T_RESUME = (f"test_{n}.py::test_" for n in ("training", "serving", "resume"))
KILLED = T_RESUME + "a_run_killed_in_an_epoch_ends_as_if_it_had_not_been"

GUARDS = [
    # ------------------------------------------------------------------ interactions
    Guard(
        *(1, "config.py", "if not (folder / name).is_file():", "if False:"),
        fault("1_missing_data_set"),
    ),
    Guard(2, ATOMIC, "if not line.strip():", "if False:", fault("2_empty_or_header_only_file")),
    Guard(2, ATOMIC, "if frame.empty:", "if False:", fault("2_empty_or_header_only_file")),
    Guard(
        *(3, ATOMIC, 'if field.count(":") != 1 or not name:', "if False:"),
        fault("3_malformed_header_is_quoted"),
    ),
    Guard(
        *(3, ATOMIC, "if kind not in _TYPES:", "if False:"), fault("3_malformed_header_is_quoted")
    ),
    Guard(
        *(4, ATOMIC, '.removeprefix("\\ufeff")', ""),
        ("test_fault_cases.py::test_cases_4_and_5_byte_order_mark_and_crlf_change_nothing",),
    ),
    Guard(
        *(5, ATOMIC, '"\\ufeff").rstrip("\\r\\n")', '"\\ufeff").rstrip("\\n")'),
        ("test_fault_cases.py::test_cases_4_and_5_byte_order_mark_and_crlf_change_nothing",),
    ),
    Guard(
        *(6, ATOMIC, "quoting=csv.QUOTE_NONE,", ""),
        ("test_fault_cases.py::test_cases_6_and_7_quotes_and_na_lose_no_row",),
    ),
    Guard(
        *(7, ATOMIC, "keep_default_na=False,", ""),
        ("test_fault_cases.py::test_cases_6_and_7_quotes_and_na_lose_no_row",),
    ),
    Guard(
        *(8, ATOMIC, "if shape != row * (len(shape) // len(row)):", "if False:"),
        fault("8_short_row_names_its_line"),
    ),
    Guard(
        *(9, ATOMIC, "elif bad.any():", "elif False:"),
        fault("9_bad_time_is_refused_or_dropped_and_never_imputed"),
    ),
    Guard(
        *(9, ATOMIC, "frame = frame[~bad_time].reset_index(drop=True)", "pass"),
        fault("9_bad_time_is_refused_or_dropped_and_never_imputed"),
    ),
    Guard(
        *(10, "data/report.py", "if self.duplicates:", "if False:"),
        fault("10_repeated_rows_are_counted_and_kept"),
    ),
    Guard(
        11,
        DATASET,
        'np.argsort(self.inter_feat[self.time_field].to_numpy(), kind="stable")',
        "np.argsort(self.inter_feat[self.time_field].to_numpy())",
        fault("11_equal_times_keep_the_order_of_the_file"),
    ),
    Guard(
        *(12, DATASET, "if not len(rows):", "if False:"),
        fault("12_filters_that_leave_nothing_show_the_counts"),
    ),
    Guard(
        *(13, DATASET, "part._n_targets(), self.report.users - users", "part._n_targets(), 0"),
        fault("13_short_users_are_counted"),
    ),
    # ------------------------------------------------------------------ features
    Guard(14, FILES, "if not path.exists():", "if False:", fault("14_missing_feature_file")),
    Guard(
        *(15, FEATURES, "if not n_found:", "if False:"),
        fault("15_ids_without_a_match_show_both_sides"),
    ),
    Guard(
        *(16, FEATURES, "if report.coverage < min_coverage or not", "if not"),
        fault("16_low_coverage_is_refused_and_lowered_on_request"),
    ),
    Guard(
        *(17, DATASET, "feat.drop(feat.index[unknown], inplace=True)", "continue"),
        (T_DATASET + "vectors_of_unknown_items_do_not_widen_the_catalogue",),
    ),
    Guard(18, FEATURES, "if not is_same:", "if False:", fault("18_duplicate_ids_must_agree")),
    Guard(
        *(19, FEATURES, 'if declared.nan == "error":', "if False:"),
        fault("19_non_finite_values_are_refused_or_masked"),
    ),
    Guard(20, FEATURES, "if is_zero.any():", "if False:", fault("20_zero_rows_are_counted")),
    Guard(
        *(21, ARRAYS, "if size == 0 or size % (4 * dim):", "if False:"),
        fault("21_wrong_width_of_a_bare_float_file"),
    ),
    Guard(
        *(22, COMMON, 'if dtype.kind not in "fiub":', "if False:"),
        (T_FILES + "what_is_not_a_real_number_is_refused",),
    ),
    Guard(
        *(23, TABLES, "if len(cells) != self.width:", "if False:"),
        fault("23_ragged_side_file_names_its_line"),
    ),
    Guard(
        *(24, FEATURES, "if len(file_tokens) != n_rows:", "if False:"),
        fault("24_a_matrix_of_another_height_than_its_ids"),
    ),
    Guard(
        25,
        COMMON,
        "except Exception as error:\n        raise _damaged",
        "except ZeroDivisionError as error:\n        raise _damaged",
        fault("25_truncated_files_are_named"),
    ),
    Guard(
        25,
        ARRAYS,
        'except Exception as error:\n        raise InputError(\n            f"{path}: damaged',
        "except ZeroDivisionError as error:\n"
        '        raise InputError(\n            f"{path}: damaged',
        fault("25_truncated_files_are_named"),
    ),
    Guard(
        26,
        ARRAYS,
        "copy_on_write(lambda mode: np.lib.format.open_memmap(path, mode=mode))",
        "np.load(path, allow_pickle=True)",
        fault("26_pickles_are_never_run"),
    ),
    Guard(
        *(26, ARRAYS, "np.load(path, allow_pickle=False)", "np.load(path, allow_pickle=True)"),
        fault("26_pickles_are_never_run"),
    ),
    Guard(
        26,
        ARRAYS,
        "weights_only=True, mmap",
        "weights_only=False, mmap",
        fault("26_pickles_are_never_run"),
    ),
    Guard(
        26,
        "checkpoint.py",
        "except (OSError, ValueError, SafetensorError) as error:",
        "except SafetensorError:\n"
        "        return Checkpoint(torch.load(path, weights_only=False), {})\n"
        "    except (OSError, ValueError) as error:",
        (T_SERVING + "a_pickle_in_the_place_of_weights_is_refused_and_not_executed",),
    ),
    Guard(
        *(27, FEATURES, "if not is_inside and not", "if False and not"),
        fault("27_an_id_file_cannot_leave_the_data_set"),
    ),
    Guard(
        *(27, ARRAYS, 'if "/" in member or "\\\\" in member:', "if False:"),
        (T_FILES + "archive_member_with_a_path_is_refused",),
    ),
    Guard(
        27,
        "data/download.py",
        'if leads_out or "\\\\" in member.filename or ":" in path.parts[0]:',
        "if False:",
        ("data/test_download.py::test_members_that_lead_out_are_refused",),
    ),
    Guard(
        *(
            28,
            "plain_yaml.py",
            "class Loader(yaml.SafeLoader):",
            "class Loader(yaml.UnsafeLoader):",
        ),
        fault("28_declarations_are_data"),
    ),
    Guard(
        28,
        "plain_yaml.py",
        "        value = _data_of(text)\n    except yaml.YAMLError:\n",
        "        value = eval(text)\n    except (NameError, SyntaxError, TypeError, ValueError):\n",
        fault("28_values_of_the_command_line_are_data"),
    ),
    Guard(
        28,
        "config.py",
        "return dict(config_dict or {})",
        "return self._convert_config_dict(config_dict or {})",
        ("test_config.py::test_config_dict_strings_are_data_and_never_code",),
    ),
    Guard(
        29,
        "data/images.py",
        "except Exception as error:  # whatever",
        "except ZeroDivisionError as error:  # whatever",
        fault("29_bad_images_are_masked_and_listed"),
    ),
    Guard(
        *(29, "data/images.py", "if width * height > _MOST_PIXELS:", "if False:"),
        fault("29_bad_images_are_masked_and_listed"),
    ),
    Guard(
        *(29, "data/images.py", "if path.is_symlink() and not", "if False and not"),
        fault("29_bad_images_are_masked_and_listed"),
    ),
    Guard(
        *(29, "data/images.py", "if n_failed > max_failed * len(files):", "if False:"),
        fault("29_too_many_failures_leave_nothing"),
    ),
    Guard(
        *(
            30,
            "data/derive/common.py",
            "(values != 0).any(axis=1), explained",
            "np.ones(len(ids), bool), explained",
        ),
        fault("30_empty_text_is_missing_and_long_or_odd_text_is_read"),
    ),
    # ------------------------------------------------------------------ configuration
    Guard(
        31,
        "config_rules.py",
        "if key not in known:\n        hint",
        "if False:\n        hint",
        fault("31_an_unknown_key_is_refused_with_the_nearest"),
    ),
    *(
        Guard(32, file, old, "if False:", fault("32_wrong_values_are_refused"))
        for file, old in (
            ("config_rules.py", "if wrong_bool or not isinstance(value, allowed):"),
            ("config_rules.py", "if learner.lower() not in OPTIMIZERS:"),
            (
                "config_rules.py",
                "if not isinstance(metric, str) or metric.lower() not in metric_types:",
            ),
            ("quick_start.py", 'if max(config["topk"]) > n_items:'),
            ("config_rules.py", "if cut and (not cut.isdigit() or int(cut) not in topk):"),
        )
    ),
    Guard(
        *(32, "config_rules.py", "isinstance(size, int) and size % heads", "False"),
        fault("32_wrong_values_are_refused"),
    ),
    # ------------------------------------------------------------------ training, evaluation
    Guard(
        *(33, "training.py", "if not math.isfinite(value):", "if False:"),
        fault("33_a_loss_that_is_not_finite_stops_the_run"),
    ),
    Guard(
        *(33, "training.py", "bad = self._not_finite()", "bad: list[str] = []"),
        (T_TRAINING + "the_last_good_checkpoint_survives_a_gradient_that_is_not_finite",),
    ),
    Guard(
        *(33, "trainer.py", "if not torch.isfinite(total):", "if False:"),
        (T_TRAINING + "a_pretraining_loss_that_is_not_finite_names_its_terms_and_batch",),
    ),
    Guard(
        *(34, RANKER, "if not math.isfinite(scores.sum()):", "if False:"),
        (T_EVALUATION + "case_34_a_score_that_is_not_finite_is_named",),
    ),
    Guard(
        *(34, "serving.py", "if not torch.isfinite(scores[:, 1:]).all():", "if False:"),
        (T_SERVING + "a_score_that_is_not_finite_is_no_recommendation",),
    ),
    Guard(
        35,
        "ops/ranking.py",
        "for rows in _few(tied.nonzero().squeeze(1), users.size(0)):",
        "for rows in ():",
        (T_EVALUATION + "case_35_a_tie_gives_the_expected_metric_of_all_its_orders",),
    ),
    Guard(
        36,
        RANKER,
        "self.tile = min(self.most_scores, _CPU_TILE) if on_cpu else self.most_scores",
        "self.tile = 2**62",
        (T_EVALUATION + "case_36_a_large_evaluation_stays_within_its_budget",),
    ),
    Guard(
        *(37, RANKER, "                if step == 1:\n", "                if True:\n"),
        (T_EVALUATION + "case_37_a_full_device_halves_the_users_and_finishes",),
    ),
    # ------------------------------------------------------------------ persistence
    Guard(
        *(38, "files.py", 'else f"{path.name}.tmp"', "else path.name"),
        (T_CHECKPOINT + "whatever_the_moment_of_a_crash_one_whole_state_is_read",),
    ),
    Guard(
        *(38, "trainer.py", "            self._restore_optimizer(self.optimizer, state)\n", ""),
        (KILLED + "[MUFASA-4]",),
    ),
    Guard(
        *(38, "trainer.py", "set_random_states(Checkpoint(", "_ = (Checkpoint("),
        (KILLED + "[MUFASA-4]",),
    ),
    Guard(
        38,
        "trainer.py",
        "self._loaders[int(number)].generator.set_state(generator)",
        "pass",
        (KILLED + "[BPR-7]", KILLED + "[MUFASA-4]"),
    ),
    Guard(
        38,
        "trainer.py",
        'for name in ("cur_step", "best_epoch",',
        'for name in ("best_epoch",',
        (T_RESUME + "early_stopping_remembers",),
    ),
    Guard(
        *(39, "files.py", "        _sync(temporary)\n", ""),
        (T_CHECKPOINT + "a_full_disk_leaves_the_earlier_checkpoint_and_no_remains",),
    ),
    Guard(
        *(39, "files.py", "        temporary.unlink(missing_ok=True)\n", ""),
        (T_CHECKPOINT + "a_full_disk_leaves_the_earlier_checkpoint_and_no_remains",),
    ),
    Guard(
        *(
            39,
            "files.py",
            "except OSError as error:",
            "except BlockingIOError as error:",
        ),
        (T_CHECKPOINT + "a_full_disk_leaves_the_earlier_checkpoint_and_no_remains",),
    ),
    *(
        Guard(40, "serving.py", f'        "{field}": {value},\n', "", (T_SERVING + test,))
        for field, value, test in (
            ("model", 'config["model"]', "weights_of_another_model_are_refused"),
            ("items", "fingerprint(items)", "another_item_set_is_refused"),
            ("features", 'kept["features"]', "another_feature_width_is_refused"),
        )
    ),
    Guard(
        *(40, "checkpoint.py", "if made != FORMAT:", "if False:"),
        (T_CHECKPOINT + "a_file_of_another_format_is_refused",),
    ),
    Guard(
        40,
        "quick_start.py",
        "        _check_data(interrupted.path, made)\n    elif saved:",
        "        pass\n    elif saved:",
        (T_RESUME + "changed_data_are_refused",),
    ),
    Guard(
        *(40, "run_folder.py", "path.mkdir()", "path.mkdir(exist_ok=True)"),
        ("test_run_folder.py::test_two_runs_of_the_same_second_get_two_folders",),
    ),
    Guard(
        *(40, DERIVE, '        "files": list(digests.values()),\n', ""),
        (T_DERIVE + "one_changed_byte_is_a_miss",),
    ),
    Guard(
        40,
        DERIVE,
        "path.name: sha256_of(path) for",
        "path.name: str(path.stat().st_mtime_ns) for",
        (T_DERIVE + "second_call_and_touch_are_hits",),
    ),
    Guard(
        *(40, DERIVE, 'if found == file.metadata.get("content_sha256"):', "if True:"),
        (T_DERIVE + "damaged_file_is_derived_anew",),
    ),
    Guard(
        *(40, "data/download.py", "shutil.rmtree(temporary, ignore_errors=True)", "pass"),
        ("data/test_download.py::test_an_interrupted_download_leaves_nothing_and_a_retry_works",),
    ),
    Guard(
        40,
        "data/download.py",
        'elif entry is not None and found != entry["sha256"]:',
        "elif False:",
        ("data/test_download.py::test_another_archive_than_the_last_time_is_refused",),
    ),
]


# ---------------------------------------------------------------------- recording, inside pytest


def pytest_exception_interact(node: Any, call: Any, report: Any) -> None:
    """Note what a test failed of, and what that was raised in the course of."""
    kinds, error = [], call.excinfo.value
    while error is not None:
        kinds.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    said = "".join(text for _, text in report.sections)  # ours may have swallowed it
    kinds += [kind for kind in OF_THE_MUTATION if f"{kind}:" in said]
    with Path(os.environ["GUARDS"]).open("a") as file:
        file.write(json.dumps([node.nodeid, kinds]) + "\n")


# ---------------------------------------------------------------------- one guard after the other


def run_tests(folder: Path, tests: list[str]) -> tuple[str, list[tuple[str, list[str]]]]:
    """How pytest ended (``passed``, ``failed`` or what went wrong), and the failures."""
    failures = folder / "failures.jsonl"
    failures.unlink(missing_ok=True)
    temporary = folder.parent / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        # a file changed twice in a second would be taken for its compiled form of before
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(temporary),
        "GUARDS": str(failures),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "benchmarks.guards"]
    command += ["-p", "no:cacheprovider", f"--basetemp={temporary / 'pytest'}"]
    with (folder.parent / "pytest.txt").open("w") as output:
        try:
            code = subprocess.run(
                [*command, *(f"tests/{test}" for test in tests)],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(SECONDS, 10 * len(tests)),
            ).returncode
        except subprocess.TimeoutExpired:
            return "timed out", []
    lines = failures.read_text().splitlines() if failures.exists() else []
    outcome = {0: "passed", 1: "failed"}.get(code, f"pytest ended with {code}")
    return outcome, [(node, kinds) for node, kinds in map(json.loads, lines)]


@contextlib.contextmanager
def without(guard: Guard, folder: Path) -> Iterator[None]:
    """The copy in ``folder`` with one guard removed, for the length of the block."""
    path = folder / "recbole_mm" / guard.file
    text = path.read_text()
    changed = text.replace(guard.old, guard.new)
    compile(changed, str(path), "exec")
    path.write_text(changed)
    try:
        yield
    finally:
        path.write_text(text)


def check_texts(guards: list[Guard]) -> None:
    """Every guard stands where it is looked for, once."""
    for guard in guards:
        count = (ROOT / "recbole_mm" / guard.file).read_text().count(guard.old)
        if count != 1:
            raise SystemExit(f"case {guard.case}: {guard.file} has {count} times: {guard.old}")


def place(guard: Guard) -> str:
    """Name of the function or class that the guard is in."""
    text = (ROOT / "recbole_mm" / guard.file).read_text()
    start = text.index(guard.old)
    line = text[: start + len(guard.old) - len(guard.old.lstrip())].count("\n") + 1
    names, scope = [], ast.parse(text).body
    while scope:
        inner = [
            node
            for node in scope
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and node.lineno <= line <= (node.end_lineno or 0)
        ]
        names += [node.name for node in inner]
        scope = inner[0].body if inner else []
    return ".".join(names)


def removed(guard: Guard, folder: Path) -> tuple[str, str]:
    """``noticed`` or what else happened without the guard, and the first test that failed."""
    with without(guard, folder):
        outcome, failures = run_tests(folder, list(guard.tests))
    if outcome == "passed":
        return "**unnoticed**", ""
    if outcome != "failed" or not failures:
        return f"**invalid**: {outcome}", ""
    test, kinds = failures[0]
    if set(kinds) & set(OF_THE_MUTATION):
        return f"**invalid**: {' in '.join(kinds)}", test
    return f"noticed: {kinds[0]}", test


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, help="folder for the copy (a temporary one)")
    parser.add_argument("--case", type=int, nargs="*", help="only these; prints the table")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/guards.md")
    options = parser.parse_args()
    guards = [guard for guard in GUARDS if not options.case or guard.case in options.case]
    check_texts(guards)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary).resolve() / "copy"
        folder.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            ignored = (
                {"ignore": shutil.ignore_patterns("__pycache__")} if copy is not shutil.copy else {}
            )
            copy(ROOT / name, folder / name, **ignored)
        outcome, failures = run_tests(folder, sorted({t for guard in guards for t in guard.tests}))
        if outcome != "passed":
            print((folder.parent / "pytest.txt").read_text()[-5000:])
            raise SystemExit(f"with all guards in place: {outcome}, {failures}")
        for guard in guards:
            said, _ = removed(guard, folder)
            print(f"case {guard.case}, {guard.file}: {guard.old.strip()!r}: {said}", flush=True)
            names = "<br>".join(f"`{name}`" for name in guard.tests)
            what = f"`{guard.file}`, `{place(guard)}`:<br>`{cell(guard.old)}`"
            rows.append(f"| {guard.case} | {what} | {names} | {cell(said)} |")
    unproven = sum("**" in row for row in rows)
    missing = sorted(set(range(1, 41)) - {guard.case for guard in GUARDS})
    lines = [
        "# Guards of the fault cases, removed one by one",
        "",
        f"{time.strftime('%Y-%m-%d')}, {processor()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}; made by",
        "`PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/guards.py`, which says how. "
        f"{len(rows)} guards, {unproven} that no test needs"
        + (f"; cases without a guard here: {', '.join(map(str, missing))}." if missing else "."),
        "",
        "| case | guard | tests | without it |",
        "| ---: | --- | --- | --- |",
        *rows,
    ]
    if options.case:
        print("\n".join(lines))
    else:
        options.out.write_text("\n".join(lines) + "\n")
    return int(unproven > 0)


if __name__ == "__main__":
    sys.exit(main())
