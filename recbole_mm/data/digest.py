"""Content hashes of feature files and folders, each file read once."""

from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from pathlib import Path

CHUNK_BYTES = 1 << 22
FRESH_NS = 2_000_000_000  # coarser than the time stamps of common file systems


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and last change in ns of a file; summed and latest over a folder and its files."""
    # a link that leads nowhere is refused by the reader, by name
    files = (file.stat(follow_symlinks=file.exists()) for file in path.glob("*.npy"))
    stats = [path.stat(), *files]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of its ``.npy`` files.

    Read in chunks, and once for the same path, size and time of change in a process.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        # what a link leads to that leads nowhere is the reader's to refuse
        digests = [sha256_of(file) if file.exists() else "nothing" for file in files]
        listing = "".join(f"{d}  {file.name}\n" for d, file in zip(digests, files, strict=True))
        # a name need not be UTF-8
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    size, changed = stamp_of(path)
    if time.time_ns() - changed < FRESH_NS:  # the next change may bear the same time
        return _sha256(path)
    return _remembered_sha256(path.resolve(), size, changed)


@lru_cache(maxsize=256)
def _remembered_sha256(path: Path, _size: int, _changed: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
