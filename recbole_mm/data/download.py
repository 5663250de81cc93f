"""Data sets that RecBole publishes, fetched and unpacked: ``recbole-mm download``.

An archive is fetched and unpacked beside its place, in a hidden folder that is renamed at the end,
so that a folder with the name of a data set is whole. ``SOURCE.json`` in ``data_path`` keeps for
each name where it came from and the sha256 of the archive and of each file; another download of
that name must have the same; ``.SOURCE.json.lock`` keeps two downloads from writing it at once. A
process that was killed leaves ``.<name>.*.part`` behind, which nothing reads.
"""

from __future__ import annotations

import json
import lzma
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import recbole
import yaml

from recbole_mm.data.digest import sha256_of
from recbole_mm.errors import EnvironmentFault, InputError, nearest
from recbole_mm.files import alone, write_text

_LIST = Path(recbole.__file__).parent / "properties/dataset/url.yaml"
_RECORD = "SOURCE.json"
_TIMEOUT = 60  # seconds without a byte
_MOST_EXPANSION = 100  # unpacked to packed; atomic files have 3 to 10, a zip bomb 1,000


@dataclass(frozen=True)
class Downloaded:
    """What stands in ``folder``.

    Attributes:
        folder: Of the data set.
        url: Address of its archive.
        sha256: Of its archive.
        files: Bytes by file name.
        fetched: False if it was there, whole, before.
    """

    folder: Path
    url: str
    sha256: str
    files: dict[str, int]
    fetched: bool

    def lines(self) -> list[str]:
        """The report, printable."""
        size = sum(self.files.values()) / 1e6
        state = "" if self.fetched else " are there and complete"
        return [
            f"{self.folder}: {len(self.files)} files, {size:,.1f} MB{state}",
            f"from {self.url}, sha256 {self.sha256}",
            f"use it: --dataset={self.folder.name} --data_path={self.folder.parent}",
        ]


def published() -> dict[str, str]:
    """Address of the archive of each data set in RecBole's own list."""
    listed: dict[str, str] = yaml.safe_load(_LIST.read_text(encoding="utf-8"))
    return listed


def download(
    name: str, data_path: Path | str, *, url: str | None = None, sha256: str | None = None
) -> Downloaded:
    """Fetch a data set into ``data_path/name``.

    Files are renamed after the data set, as RecBole does: ``Amazon_Baby.inter`` becomes
    ``amazon-baby.inter``. A folder around all files is left out.

    Args:
        name: Of the data set; without ``url``, in RecBole's list.
        data_path: Made if it is not there.
        url: Address of a zip archive, http or https.
        sha256: What the archive must have; default: what it had the last time, if it was fetched.

    Raises:
        InputError: On an unknown name, another sha256, a broken or unsafe archive, or a folder that
            is there and not whole.
        EnvironmentFault: If pooch is missing, the network or the disk says no.
    """
    data_path = Path(data_path)
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"download: {name!r} is no plain folder name")
    folder, record = data_path / name, _record(data_path)
    if folder.exists():
        return _standing(folder, record.get(name), sha256)
    if url is None:
        addresses = published()
        if name not in addresses:
            raise InputError(
                f"download: RecBole publishes no data set {name!r}{nearest(name, addresses)}; "
                "name one of its list, or give the --url of a zip archive"
            )
        url = addresses[name]
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"download: {url!r} is no address of http or https")

    temporary = None
    try:
        data_path.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=data_path))
        archive = temporary / "archive.zip"
        _fetch(url, archive)
        found = sha256_of(archive)
        _check_sha256(found, url, sha256, record.get(name), data_path)
        _unpack(archive, temporary / name, name, url)
        entry = {
            "url": url,
            "sha256": found,
            "bytes": archive.stat().st_size,
            "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": _files(temporary / name),
        }
        lock, others = data_path / f".{_RECORD}.lock", "waiting for another download's record"
        with alone(lock, "make room or choose another data_path", others):
            if folder.exists():  # another download of this name was faster; its record stays
                return _standing(folder, _record(data_path).get(name), sha256)
            # first: a record without a folder is harmless, a folder without its record is refused
            text = json.dumps({**_record(data_path), name: entry}, indent=2, sort_keys=True)
            write_text(data_path / _RECORD, text + "\n")
            (temporary / name).rename(folder)
    except (OSError, EnvironmentFault) as error:
        if isinstance(error, EnvironmentFault) and not isinstance(error.__cause__, OSError):
            raise
        raise EnvironmentFault(
            f"download of {url}: {_cause(error)}; nothing is left of it, and the same command "
            "tries again"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return _downloaded(folder, entry, fetched=True)


def _cause(error: Exception) -> str:
    return str(error.__cause__ if isinstance(error, EnvironmentFault) else error)


def _downloaded(folder: Path, entry: dict[str, Any], *, fetched: bool) -> Downloaded:
    files = {name: about["bytes"] for name, about in entry["files"].items()}
    return Downloaded(folder, entry["url"], entry["sha256"], files, fetched)


def _record(data_path: Path) -> dict[str, Any]:
    path = data_path / _RECORD
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: {
                "url": str(about["url"]),
                "sha256": str(about["sha256"]),
                "bytes": int(about["bytes"]),
                "fetched": str(about["fetched"]),
                "files": {
                    file: {"bytes": int(held["bytes"]), "sha256": str(held["sha256"])}
                    for file, held in about["files"].items()
                },
            }
            for name, about in held.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not what download wrote ({type(error).__name__}); move it away"
        ) from error


def _standing(folder: Path, entry: dict[str, Any] | None, sha256: str | None) -> Downloaded:
    """The folder, if it is what was downloaded."""
    if entry is None:
        raise InputError(
            f"{folder} is there already, and not by download; move it away, or choose another "
            "--data_path"
        )
    for name, about in entry["files"].items():
        file = folder / name
        if not file.is_file() or sha256_of(file) != about["sha256"]:
            raise InputError(
                f"{file} is missing or not what was downloaded; move {folder} away and download "
                "it again"
            )
    if sha256 is not None and sha256.lower() != entry["sha256"]:
        raise InputError(
            f"{folder} was downloaded from an archive with sha256 {entry['sha256']}, not {sha256}; "
            "move it away to download the other"
        )
    return _downloaded(folder, entry, fetched=False)


def _fetch(url: str, archive: Path) -> None:
    try:
        import pooch
    except ImportError as error:
        raise EnvironmentFault(
            "download needs pooch; run `pip install 'recbole-mm[download]'`"
        ) from error
    fetch = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 20, timeout=_TIMEOUT)
    fetch(url, str(archive), None)  # its errors, of requests, are OSErrors


def _check_sha256(
    found: str, url: str, wanted: str | None, entry: dict[str, Any] | None, data_path: Path
) -> None:
    if wanted is not None:
        if found != wanted.lower():
            raise InputError(
                f"download: {url} has sha256 {found}, not {wanted}; it is another archive, or "
                "damaged"
            )
    elif entry is not None and found != entry["sha256"]:
        raise InputError(
            f"download: {url} has sha256 {found}; that of {entry['fetched']} had "
            f"{entry['sha256']} ({data_path / _RECORD}). If the change is meant, add "
            f"--sha256 {found}"
        )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in files
    }


def _unpack(archive: Path, folder: Path, name: str, url: str) -> None:
    """Unpack an archive file by file, after all its names have been judged."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [
                m
                for m in packed.infolist()
                if not m.is_dir() and not m.filename.startswith("__MACOSX/")
            ]
            for member in members:
                _check_member(member)
            # a file cannot grow beyond the size that was judged: zipfile stops there
            unpacked, size = sum(m.file_size for m in members), archive.stat().st_size
            if unpacked > _MOST_EXPANSION * size:
                raise InputError(
                    f"{url}: {size} bytes would unpack to {unpacked}; no atomic files are packed so"
                )
            free = shutil.disk_usage(archive.parent).free
            if unpacked > free:
                raise EnvironmentFault(
                    f"{url}: needs {unpacked} bytes, {free} are free; free space"
                )
            for member, path in zip(members, _places(members, name, url), strict=True):
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
        *(EOFError, NotImplementedError, RuntimeError, ValueError),
    ) as error:
        if isinstance(error, (InputError, EnvironmentFault)):
            raise
        raise InputError(
            f"{url}: not a readable zip archive, broken off or damaged ({error}); nothing is left "
            "of it, and the same command tries again"
        ) from error


def _check_member(member: zipfile.ZipInfo) -> None:
    path, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
    leads_out = not path.parts or path.is_absolute() or ".." in path.parts
    if leads_out or "\\" in member.filename or ":" in path.parts[0]:
        raise InputError(f"archive: member {member.filename!r} leads out of its folder; refused")
    if kind not in (0, stat.S_IFREG):
        raise InputError(f"archive: member {member.filename!r} is a link or no file; refused")


def _places(members: list[zipfile.ZipInfo], name: str, url: str) -> list[PurePosixPath]:
    """Where each file goes, below the folder of the data set."""
    paths = [PurePosixPath(member.filename) for member in members]
    if paths and all(len(path.parts) > 1 and path.parts[0] == paths[0].parts[0] for path in paths):
        paths = [PurePosixPath(*path.parts[1:]) for path in paths]
    inter = [path.name for path in paths if path.suffix == ".inter"]
    if not inter:
        raise InputError(f"{url}: holds no .inter file, so no data set of RecBole's atomic files")
    stem = inter[0].split(".")[0]  # the publisher's spelling: Amazon_Baby
    if not any(file.startswith(f"{name}.") for file in inter):
        paths = [
            path.with_name(name + path.name.removeprefix(stem))
            if path.name.startswith(f"{stem}.")
            else path
            for path in paths
        ]
    if len(set(paths)) != len(paths):
        raise InputError(f"{url}: two of its files would become one; refused")
    return paths
