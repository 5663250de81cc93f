"""Mutated files of every format against the readers of features, ids and atomic files.

Whatever a file holds, it is read, or refused with an error that names it: no other exception, no
more than ``CPU_SECONDS``, nothing unpickled, started or written. `make fuzz` does it at length.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import pickle
import platform
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_mm.data.atomic import read_atomic
from recbole_mm.data.features import load_features
from recbole_mm.errors import EnvironmentFault, InputError
from tests.data.test_feature_files import TOKENS, VALUES, WITH_IDS, WITHOUT_IDS, write

CPU_SECONDS = 10
ITEMS = ["[PAD]", *TOKENS]
ATOMIC = {
    "toy.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    + "".join(f"u{n}\t{TOKENS[n % 4]}\t{n}.5\t{978_300_760 + n}\n" for n in range(6)),
    "toy.item": "item_id:token\ttitle:token_seq\tyear:float\tvector:float_seq\n"
    + "".join(f'{t}\ta "title {n}\t19{n}0\t0.5 -1e3\n' for n, t in enumerate(TOKENS)),
}
IDS = {
    "ids.txt": "\n".join(TOKENS),
    "ids.json": json.dumps(TOKENS),
    "map.json": json.dumps({token: row for row, token in enumerate(TOKENS)}),
    "toy.item2index": "".join(f"{token}\t{row}\n" for row, token in enumerate(TOKENS)),
    "ids.csv": "item_id,row\n" + "".join(f"{token},{row}\n" for row, token in enumerate(TOKENS)),
    "atomic.item": ATOMIC["toy.item"],
}


class Bomb:
    """Its pickle touches a file called ``canary`` when somebody loads it."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


BOMB = pickle.dumps(Bomb(), protocol=2)
BOMBS = {
    "bomb.npy": lambda path: np.save(path, np.array([Bomb()], object), allow_pickle=True),
    "bomb.npz": lambda path: np.savez(path, features=np.array([Bomb()], object)),
    "bomb.pt": lambda path: torch.save(Bomb(), path),
    "bomb.pth": lambda path: torch.save(Bomb(), path, _use_new_zipfile_serialization=False),
    "raw.pt": lambda path: path.write_bytes(BOMB),
}


@dataclass(frozen=True)
class Target:
    """A valid file (or a bomb), and what reads it in the folder where it lies."""

    data: bytes
    read: Callable[[Path], None]


def _features(path: Path) -> None:
    """As a run does: read, match with the items, check."""
    declared: dict[str, object] = {"path": str(path.name)}
    if path.parent.name == "folder":
        declared = {"path": "folder"}
    elif path.name in WITHOUT_IDS or path.name in BOMBS:
        declared["ids"] = "ids.txt"
    if path.suffix == ".feat1CLS":
        declared["dim"] = 3
    _load(declared, path)


def _ids(path: Path) -> None:
    _load({"path": "f.npy", "ids": path.name}, path)


def _load(declared: dict[str, object], path: Path) -> None:
    folder = path.parent.parent if path.parent.name == "folder" else path.parent
    table = load_features(
        {"x": {**declared, "nan": "mask"}},
        ITEMS,
        dataset_name="toy",
        dataset_path=folder,
        min_coverage=0,
    )
    features = table["x"]
    assert features.values[features.rows].float()[features.present].isfinite().all()


def _atomic(path: Path) -> None:
    is_inter = path.suffix == ".inter"
    read_atomic(path, time_field="timestamp" if is_inter else None)
    read_atomic(path, as_text=[] if is_inter else ["title"], columns=["item_id"])


def make_targets(folder: Path) -> dict[str, Target]:
    """Write every valid file, and what beside it a reader needs."""
    for name, text in {**IDS, **ATOMIC}.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in (*WITH_IDS, *WITHOUT_IDS):
        write(folder / name, VALUES)
    for name, save in BOMBS.items():
        save(folder / name)
    readers = dict.fromkeys((*WITH_IDS, *WITHOUT_IDS, *BOMBS), _features)
    readers |= dict.fromkeys(IDS, _ids) | dict.fromkeys(ATOMIC, _atomic)
    readers[f"folder/{TOKENS[1]}.npy"] = readers.pop("folder")
    return {name: Target((folder / name).read_bytes(), read) for name, read in readers.items()}


# ---------------------------------------------------------------------- mutations

NUMBERS = [0, 1, 2, 4, 255, 1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1]
NUMBERS += [(1 << 64) - 1, (1 << 64) - 8]
WORDS = [
    *(number.to_bytes(8, "little") for number in NUMBERS),
    *(b"\0", b"\t", b"\n", b"\r", b"\r\n", b",", b":", b" ", b'"', b"'", b"/", b"\\", b"../"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x1a", b"\x85"),
    *(b"nan", b"inf", b"-inf", b"1e999", b"-1", b"-0", b"0x1", b"1_0", b"9" * 30, b"9" * 5000),
    *(b"null", b"true", b"{}", b"[]", b"[" * 2000, b'{"a":' * 2000, b'{"a":1}', b"NaN"),
    *(b"|O", b"O8", b"<f8", b">f4", b"<c16", b"<M8[D]", b"|S3", b"<U3", b"True", b"()", b"(-1, 3)"),
    *(b"F64", b"BF16", b"BOOL", b"I64", b"F8_E4M3", b"__metadata__", b"features", b"present"),
    *(b"ids", b"DoubleStorage", b"HalfStorage", b"BoolStorage", b"ComplexFloatStorage"),
    *(b":token", b":float", b":token_seq", b":float_seq", b"item_id", b"row", b"vector"),
    *(BOMB, b"cos\nsystem\n(S'touch canary'\ntR.", b"c__builtin__\neval\n", b"K\x7f", b"J\xff"),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from([*["overwrite"] * 3, *["insert"] * 3, "delete", "repeat", "cut"]),
        st.integers(0, 1 << 13),  # where, after mixing: hypothesis is fond of small numbers
        st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(WORDS)),
        st.integers(1, 64),  # length of what is deleted or repeated
    ),
    min_size=1,
    max_size=5,
)
# in a zip, most edits only break a checksum: this one is made in a member instead
MEMBER = st.one_of(st.none(), st.integers(0, 7))


def mutate(data: bytes, edits: list[tuple[str, int, bytes, int]], member: int | None) -> bytes:
    """The file with some edits; those of a zip go to the member, whose checksum is renewed."""
    if member is not None and zipfile.is_zipfile(io.BytesIO(data)):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            names = old.namelist()
            for name in names:
                content = old.read(name)
                is_chosen = name == names[member % len(names)]
                new.writestr(name, mutate(content, edits, None) if is_chosen else content)
        return out.getvalue()
    changed = bytearray(data)
    for kind, where, word, length in edits:
        at = where * 2_654_435_761 % (1 << 32) * (len(changed) + 1) >> 32
        if kind == "overwrite":
            changed[at : at + len(word)] = word
        elif kind == "insert":
            changed[at:at] = word
        elif kind == "delete":
            del changed[at : at + length]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length] * 2
        else:
            del changed[at:]
    return bytes(changed)


# ---------------------------------------------------------------------- what must not happen


class Hang(BaseException):
    """Reading one file took too long; not an Exception, so that no reader can catch it."""


_seen: list[str] | None = None  # None: nobody watches


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and any(letter in str(arguments[1]) for letter in "wax+")
    if writes or event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.mkdir"):
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_hook)


@contextmanager
def watched(seconds: float = CPU_SECONDS) -> Iterator[None]:
    """Fail if what is inside unpickles, starts a program, writes a file or uses too much CPU."""
    global _seen

    def stop(*_: object) -> None:
        raise Hang(f"more than {seconds} CPU seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    seen: list[str] = []
    _seen = seen
    try:
        yield
    finally:
        _seen = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert not seen


def outcome(target: Target, path: Path, data: bytes) -> str:
    """Read one file: ``read``, or the name of the error that refused it."""
    path.unlink()  # the last file may still be mapped
    path.write_bytes(data)
    try:
        with watched():
            target.read(path)
    except (InputError, EnvironmentFault) as error:
        refusal = error
    else:
        return "read"
    assert path.name in str(refusal) or path.parent.name in str(refusal), refusal
    return type(refusal).__name__


def fuzz(name: str, target: Target, folder: Path, examples: int) -> tuple[Counter[str], int]:
    """Outcomes of the mutations of one target, and how many of them differed."""
    found: Counter[str] = Counter()
    different = set()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(edits=EDITS, member=MEMBER)
    def run(edits, member):
        data = mutate(target.data, edits, member)
        different.add(hash(data))
        found[outcome(target, folder / name, data)] += 1

    run()
    return found, len(different)


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, make_targets(folder)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "canary").exists()


NAMES = [
    *(name for name in (*WITH_IDS, *WITHOUT_IDS) if name != "folder"),
    *(f"folder/{TOKENS[1]}.npy", *IDS, *ATOMIC, *BOMBS),
]


@pytest.mark.parametrize("name", NAMES)
def test_mutated_file_is_read_or_refused(place, name):
    folder, targets = place
    assert set(targets) == set(NAMES)
    target = targets[name]
    whole = outcome(target, folder / name, target.data)
    assert whole == ("InputError" if name in BOMBS else "read")
    try:
        found, _ = fuzz(name, target, folder, examples=15)
    finally:
        (folder / name).write_bytes(target.data)
    assert found.total() >= 15


def spin():
    while True:
        pass


def test_the_alarms_ring(tmp_path):
    with pytest.raises(AssertionError, match=r"pickle\.find_class"), watched():
        pickle.loads(BOMB)  # noqa: S301  (that is the point)
    (tmp_path / "canary").unlink()
    with pytest.raises(AssertionError, match="open"), watched():
        (tmp_path / "x").write_text("x")
    with pytest.raises(Hang), watched(seconds=0.05):
        spin()


# ---------------------------------------------------------------------- at length


def report(counts: dict[str, tuple[Counter[str], int]], cpu: float) -> str:
    """The result as Markdown."""
    kinds = ["read", "InputError", "EnvironmentFault"]
    total = sum((found for found, _ in counts.values()), Counter())
    n_different = sum(different for _, different in counts.values())
    rows = [
        *((name, found, different) for name, (found, different) in counts.items()),
        ("**all**", total, n_different),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    packages = ", ".join(
        f"{name} {version(name)}"
        for name in ("numpy", "torch", "pandas", "pyarrow", "safetensors", "hypothesis")
    )
    lines = [
        "# Mutated files against the readers",
        "",
        f"{time.strftime('%Y-%m-%d')}; Python {platform.python_version()}, {packages}.",
        "",
        f'    make fuzz ARGS="{" ".join(sys.argv[1:])}"',
        "",
        "Each file is a valid one of its format (`bomb` and `raw`: a pickle that would touch a",
        "file) after one to five edits by hypothesis: bytes overwritten, inserted, deleted,",
        "repeated, cut off; in a zip also within a member whose checksum is then renewed. It is",
        "read as a run reads it. The command fails at the first exception other than `InputError`",
        "and `EnvironmentFault`, message that does not name the file, file that takes more than",
        f"{CPU_SECONDS} CPU seconds, unpickled class, started program, or file opened for writing.",
        "",
        "| file | mutated | of them different | " + " | ".join(kinds) + " |",
        "| --- |" + " ---: |" * (len(kinds) + 2),
        *(
            f"| {name} | {found.total():,} | {different:,} | "
            + " | ".join(f"{found[kind]:,}" for kind in kinds)
            + " |"
            for name, found, different in rows
        ),
        "",
        f"{cpu:.0f} CPU seconds, peak memory {peak:,.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000, help="mutated files, at least")
    parser.add_argument("--only", help="one file, for example f.pt")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", module="recbole_mm")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        targets = make_targets(folder)
        chosen = [options.only] if options.only else list(targets)
        each = -(-options.examples // len(chosen))
        begin = time.process_time()
        counts = {}
        for name in chosen:
            counts[name] = fuzz(name, targets[name], folder, each)
            (folder / name).write_bytes(targets[name].data)
        assert not list(folder.rglob("canary"))
        text = report(counts, time.process_time() - begin)
    assert not Path("canary").exists()
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
