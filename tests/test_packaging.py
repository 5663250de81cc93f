"""What is installed, imported and shipped."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed():
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "recbole_mm").rglob("__init__.py")
    }
    listed = set(setup_cfg()["options"]["packages"].split())
    assert listed == folders | {"recbole_mm.properties", "recbole_mm.dataset_atomic"}


def test_every_shipped_file_matches_a_pattern():
    data = setup_cfg()["options.package_data"]
    for name in ("properties", "dataset_atomic"):
        patterns = [p.strip() for p in data[f"recbole_mm.{name}"].split(",")]
        shipped = {p for pattern in patterns for p in (ROOT / name).glob(pattern)}
        needed = {p for kind in ("yaml", "test") for p in (ROOT / name).rglob(f"*.{kind}")} | set(
            (ROOT / "dataset_atomic/tiny").iterdir()
        )
        assert {p for p in needed if p.is_relative_to(ROOT / name)} <= shipped


def test_importing_the_package_is_cheap_and_silent():
    code = (
        "import sys, recbole_mm; assert 'torch' not in sys.modules and 'recbole' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_wheel_runs_from_any_folder(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(tmp_path / "site"),
            str(wheel),
        ],
        check=True,
    )
    code = (
        "import recbole_mm, sys; assert 'site' in recbole_mm.__file__, recbole_mm.__file__;"
        "r = recbole_mm.run('Pop', 'tiny', config_dict={'show_progress': False});"
        "print(r['test_result']['hit@10'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1
