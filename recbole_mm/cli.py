"""The command line: ``recbole-mm run`` and ``run_recbole_mm.py``."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from recbole_mm import __version__
from recbole_mm.errors import InputError, RecboleMMError

_EPILOG = """\
Any key of the configuration can follow as --key=value, for example
  --learning_rate=0.0005 --MAX_ITEM_LIST_LENGTH=200 --modalities=[text] --epochs=20

exit codes: 0 done, 1 some cells of a table failed, 2 bad input or configuration,
3 environment, memory or disk, 4 numerical failure
"""
# of the commands that take any key of the configuration
_WITH_KEYS: dict[str, Any] = {
    "epilog": _EPILOG,
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,  # argparse hands it on to no command
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``recbole-mm``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="recbole-mm",
        description="Multimodal sequential recommendation for RecBole.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"recbole-mm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate one model", **_WITH_KEYS)
    _add_run_arguments(run)
    explain = commands.add_parser(
        "explain",
        help="tables and plots of what the model of a run tells of itself",
        description="Write explain/*.csv and *.png into a run folder (plots need matplotlib).",
        epilog="Stronger values follow as --key=value, for example --data_path=dataset",
        allow_abbrev=False,
    )
    explain.add_argument("run", help="run folder, as the run printed it")
    explain.add_argument(
        "--items", nargs="+", metavar="ITEM", help="items to show, by token (the most popular 20)"
    )
    explain.add_argument("--model", "-m", help="module:Class, for a run of a class of your own")
    explain.set_defaults(action=_explain)
    _add_tune(commands)
    commands.add_parser("models", help="list the models that run").set_defaults(action=_models)
    _add_compare(commands)
    _add_extract(commands)
    _add_download(commands)
    _add_import(commands)
    return _guarded(parser, arguments)


def run_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``run_recbole_mm.py``: ``recbole-mm run`` without the word ``run``."""
    parser = argparse.ArgumentParser(
        prog="run_recbole_mm.py",
        description="Train and evaluate one model under RecBole.",
        **_WITH_KEYS,
    )
    _add_run_arguments(parser)
    return _guarded(parser, arguments)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "-m",
        help="a model of this package or of RecBole, or module:Class for one of your own (MUFASA; "
        "none with --config_files)",
    )
    parser.add_argument(
        "--dataset", "-d", help="folder name below data_path (ml-100k; none with --config_files)"
    )
    parser.add_argument(
        "--config_files", default="", help='YAML files: "a.yaml b.yaml"; quote a blank in a name'
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_run)
    _add_model_arguments(parser)
    parser.add_argument(
        "--resume", metavar="RUN", help="folder of an interrupted run, to be continued"
    )
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes that share every batch; one for each GPU of --gpu_id=0,1 (1)",
    )


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="search for hyper-parameters, by validation only",
        description="Search for the configuration with the best validation score. The same command "
        "continues an interrupted search.",
        **_WITH_KEYS,
    )
    tune.set_defaults(action=_tune)
    _add_model_arguments(tune)
    tune.add_argument("--engine", default="optuna", help="recbole, optuna or ray (optuna)")
    tune.add_argument("--algo", default="bayes", help="exhaustive, random or bayes (bayes)")
    tune.add_argument("--trials", type=int, help="how many (20; with exhaustive every combination)")
    tune.add_argument(
        "--params_file", help="search space in RecBole's hyper.test syntax (properties/hyper)"
    )
    tune.add_argument(
        "--storage",
        help="optuna: a database that several processes may share, sqlite:///study.db; ray: a "
        "folder (inside --out)",
    )
    tune.add_argument("--seed", type=int, help="of the search and of every trial (2020)")
    tune.add_argument(
        "--seeds", type=int, default=1, help="runs of a trial, scored by their mean (1)"
    )
    tune.add_argument("--out", default="tuned", help="folder of the results (tuned)")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="side-by-side tables of many models, data sets and seeds",
        description="Runs every model on every data set with every seed, and writes the tables. "
        "The same command goes on where an interrupted one was.",
        **_WITH_KEYS,
    )
    parser.set_defaults(action=_compare)
    add = parser.add_argument
    add(
        "--models",
        required=True,
        help="SASRec,MUFASA,MUFASA+without_anchor,CAMMSR+*,module:Class",
    )
    add("--datasets", required=True, help="folder names below data_path: ml-100k,my_data")
    add("--seeds", default="1", help="how many (1), or which: 2020,2021,2022; 2020, is one")
    add("--out", default="compare", help="folder of runs and tables (compare)")
    add("--config_files", default="", help='YAML files for every run: "a.yaml b.yaml"')
    add("--tuned", help="folder with <dataset>/<model>.yaml or <model>.yaml")
    add("--variants", help="YAML file of named variants, name: {key: value}, for MODEL+name")
    add("--show", default="", help="metrics of the tables: NDCG@10,Hit@10")
    add("--jobs", type=int, default=1, help="processes at a time (1)")
    add("--threads", type=int, default=1, help="threads of each process (1)")
    add(
        "--modality_ablation",
        action="store_true",
        help="add a row for every other subset of a model's modalities",
    )
    add(
        "--missing_modality",
        action="append",
        default=[],
        metavar="text:0,25,50,75,100",
        help="score the test set with a modality hidden for some percent of its items",
    )
    add(
        "--cold_start",
        type=float,
        nargs="?",
        const=10.0,
        default=0.0,
        metavar="PERCENT",
        help="leave the newest items out of training and show them apart (10 percent of the items)",
    )


def _add_extract(commands: Any) -> None:
    parser = commands.add_parser(
        "extract",
        help="turn a folder of item images into a feature file",
        description="Encodes <item token>.jpg (.jpeg, .png, .webp, .gif, .bmp) and writes the "
        "feature file beside the data set. Images that cannot be read are listed. The same command "
        "goes on where an interrupted one was.",
        epilog="Any key of the configuration can follow as --key=value, for example --gpu_id=1\n"
        "For text, declare {derive: text, fields: [title]}: a run then encodes it by itself.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(action=_extract)
    add = parser.add_argument
    add("dataset", help="folder name below data_path")
    add("--images", required=True, metavar="FOLDER", help="the images, named after their items")
    add(
        "--encoder",
        default="pixels",
        help="pixels: colour and layout only, weak; clip:ViT-B-32, clip:NAME/WEIGHTS (extra clip); "
        "timm:resnet50 (extra timm) (pixels)",
    )
    add("--dim", type=int, help="width of the vectors (128 for pixels, else the encoder's)")
    add(
        "--out",
        default="image.safetensors",
        help="feature file; a bare name stands in the folder of the data set (image.safetensors)",
    )
    add(
        "--max_failed",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the images that may fail (0.1)",
    )
    add("--data_path", help="folder that holds the data set's folder (dataset)")
    add("--config_files", default="", help='YAML files: "a.yaml b.yaml"')


def _add_download(commands: Any) -> None:
    parser = commands.add_parser(
        "download",
        help="fetch one of the data sets that RecBole publishes",
        description="Fetches the archive, checks it and unpacks it; the folder appears whole or "
        "not at all.",
        allow_abbrev=False,
    )
    parser.set_defaults(action=_download)
    add = parser.add_argument
    add("name", help="as in RecBole's list, for example ml-1m; with --url the name to give it")
    add("--url", help="address of a zip archive of atomic files that is not in the list")
    add("--sha256", help="what the archive must have; that of an earlier download is kept anyway")
    add("--data_path", default="dataset", help="folder to put the data set's folder in (dataset)")


def _add_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="turn a data set of another project into atomic files and feature files",
        description="Reads a folder in the layout of MMRec, UniSRec, MISSRec, HM4SR, Ducho or "
        "MicroLens, and writes atomic files, a feature file for each modality and a YAML file that "
        "declares them; the new folder appears whole or not at all.",
        allow_abbrev=False,
    )
    parser.set_defaults(action=_import)
    add = parser.add_argument
    add("layout", help="mmrec, unisrec, missrec, hm4sr, ducho or microlens")
    add("folder", help="that holds the data set in that layout; nothing is written there")
    add("--name", help="of the data set (that of its files)")
    add("--data_path", default="dataset", help="folder to put the data set's folder in (dataset)")


def _guarded(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Do what the arguments say; the exit code."""
    known, rest = parser.parse_known_args(arguments)
    try:
        known.action(known, rest)
        sys.stdout.flush()  # here, not at the exit of Python, where nobody would notice
    except RecboleMMError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        print(f"error: {name[:60]}...: too long for a name", file=sys.stderr)  # noqa: T201
        return InputError.exit_code
    return 0


def _is_unread() -> bool:
    """Whether whoever reads our output has enough."""
    try:
        print(flush=True)  # noqa: T201  (what failed before is no longer in the buffer)
    except BrokenPipeError:
        return True
    return False


def _models(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.registry import model_names

    if rest:
        raise InputError(f"models: unknown arguments {' '.join(rest)}; see --help")
    print("\n".join(model_names()))  # noqa: T201


def _run(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.quick_start import run  # torch and RecBole: seconds that --help need not wait

    files = _files(known)
    result = run(
        *_model_and_dataset(known, files),
        config_file_list=files or None,
        resume=known.resume,
        nproc=known.nproc,
        command_line=rest,
    )
    _print_result(result)


def _explain(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.quick_start import explain_run

    files = explain_run(known.run, known.items, model=known.model, command_line=rest)
    print("\n".join(str(file) for file in files))  # noqa: T201


def _tune(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.registry import is_own
    from recbole_mm.tuning import tune

    files = _files(known)
    options = ("params_file", "engine", "algo", "trials", "storage", "seed", "seeds", "out")
    result = tune(
        *_model_and_dataset(known, files),
        config_file_list=files or None,
        command_line=rest,
        **{option: getattr(known, option) for option in options},
    )
    failed = f", {result['failed']} failed" if result["failed"] else ""
    print(  # noqa: T201
        f"\nbest of {result['trials']} trials{failed}: validation {result['valid_metric']} "
        f"{result['best_valid_score']:.4f}"
    )
    print(tabulate(result["best"].items(), headers=["key", "value"]))  # noqa: T201
    folder, config = (os.path.relpath(result[key]) for key in ("folder", "config"))
    print(f"all trials: {folder}")  # noqa: T201
    command = ["recbole-mm", "run", "--config_files", shlex.quote(config)]
    if known.model is not None and is_own(known.model):
        command.append(f"--model={known.model}")
    if result["data_path"] is not None:
        command.append(f"--data_path={result['data_path']}")
    print(f"score it on test: {shlex.join(command)}")  # noqa: T201


def _compare(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.compare import IncompleteTables, compare, missing

    try:
        tables = compare(
            _names(known.models),
            _names(known.datasets),
            _seeds(known.seeds),
            out=known.out,
            config_files=_files(known),
            command_line=rest,
            tuned=known.tuned,
            variants=known.variants,
            show=_names(known.show),
            jobs=known.jobs,
            threads=known.threads,
            modality_ablation=known.modality_ablation,
            missing_modality=missing.parse(known.missing_modality),
            cold_start=known.cold_start,
        )
    except IncompleteTables as error:
        if error.tables:
            _print_tables(known.out)
        raise
    _print_tables(known.out)
    failed = sum(len(table.failures) for table in tables)
    if failed:
        cells = f"{failed} cell{'s' * (failed > 1)}"
        raise RecboleMMError(f"{cells} failed, see cells.csv; the same command tries again")


def _print_tables(out: str) -> None:
    print()  # noqa: T201
    for name in ("table.md", "cost.md"):
        print(Path(out, name).read_text(encoding="utf-8"))  # noqa: T201
    print(f"all files: {Path(out).resolve()}")  # noqa: T201


def _extract(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.config import DATASETS, Config
    from recbole_mm.data.atomic import format_of
    from recbole_mm.data.images import extract_images, item_tokens
    from recbole_mm.registry import RECBOLE_PROPERTIES

    place = [f"--data_path={known.data_path}"] if known.data_path else []
    # where the data set is, how it is written and the device; Pop, since a model must be named,
    # which cannot do all that a file for the run of another may ask for
    values = {"train_objective": "last", "explain": False}
    config = Config("Pop", known.dataset, _files(known), values, [*place, *rest], shared=True)
    folder = Path(config["data_path"])
    shipped = any(folder.resolve().is_relative_to(p) for p in (DATASETS, RECBOLE_PROPERTIES.parent))
    if shipped and Path(known.out).name == known.out:
        raise InputError(
            f"extract: {folder} comes with a package, and nothing is written there; copy "
            f"it to a folder of yours, for example data/{known.dataset}, and give --data_path=data"
        )
    out = Path(known.out)
    tokens = item_tokens(
        folder,
        known.dataset,
        item_id_field=config["ITEM_ID_FIELD"],
        atomic=format_of(config),
        benchmark=config["benchmark_filename"] or (),
    )
    done = extract_images(
        known.images,
        folder / out if out.name == known.out else out,
        tokens,
        encoder=known.encoder,
        dim=known.dim,
        max_failed=known.max_failed,
        device=config["device"],
        progress=config["show_progress"],
    )
    print("\n".join(done.lines()))  # noqa: T201
    print(f"{done.path}; declare it in a YAML file:\n\n{done.declaration(folder)}")  # noqa: T201


def _download(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.data.download import download

    if rest:
        raise InputError(f"download: unknown arguments {' '.join(rest)}; see --help")
    done = download(known.name, known.data_path, url=known.url, sha256=known.sha256)
    print("\n".join(done.lines()))  # noqa: T201


def _import(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from recbole_mm.data.layouts import import_dataset

    if rest:
        raise InputError(f"import: unknown arguments {' '.join(rest)}; see --help")
    done = import_dataset(known.layout, known.folder, known.data_path, name=known.name)
    print("\n".join(done.lines()))  # noqa: T201


def _files(known: argparse.Namespace) -> list[str]:
    if Path(known.config_files).is_file():  # one, and perhaps with a blank in its name
        return [known.config_files]
    try:
        return shlex.split(known.config_files)
    except ValueError as error:
        raise InputError(f"--config_files: {known.config_files!r}: {error}") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


_MOST_SEEDS = 100  # a larger number was meant as a seed


def _seeds(text: str) -> int | list[int]:
    numbers = _names(text)
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise InputError(f"--seeds: {text!r} is neither a number of seeds nor a list of seeds")
    if "," in text:
        return [int(number) for number in numbers]
    if int(text) > _MOST_SEEDS:
        raise InputError(
            f"--seeds {text} asks for {text} seeds; for that one seed write --seeds {text}, "
            "with the comma"
        )
    return int(text)


def _model_and_dataset(
    known: argparse.Namespace, files: Sequence[str]
) -> tuple[str | None, str | None]:
    # with config files, or a run folder, model and dataset stand there
    elsewhere = files or getattr(known, "resume", None)
    model, dataset = known.model, known.dataset
    # an empty one, --model=$UNSET, is no wish for the default
    if model is None and not elsewhere:
        model = "MUFASA"
    if dataset is None and not elsewhere:
        dataset = "ml-100k"
    return model, dataset


def _print_result(result: dict[str, Any]) -> None:
    valid = result["best_valid_result"] or {}
    rows = [[name, valid.get(name), value] for name, value in result["test_result"].items()]
    epochs = "not trained"
    if result["epochs"]:
        epochs = f"best epoch {result['best_epoch']}, last {result['epochs'] - 1}"
    title = (
        f"{result['model']} on {result['dataset']}: {epochs}, {result['parameters']:,} parameters, "
        f"{result['seconds']:.0f} s"
    )
    print()  # noqa: T201
    print(title)  # noqa: T201
    print(tabulate(rows, headers=["metric", "valid", "test"], floatfmt=".4f"))  # noqa: T201
    if result["run"]:
        print(f"run folder: {result['run']}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
