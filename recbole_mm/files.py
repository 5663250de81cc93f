"""Files that are written whole or not at all, and by one process at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from recbole_mm.errors import EnvironmentFault, RecboleMMError

_LOG = logging.getLogger(__name__)


@contextmanager
def writing(path: Path, mend: str) -> Iterator[None]:
    """Turn what the disk says against writing ``path`` into an :class:`EnvironmentFault`.

    Args:
        path: What the message names.
        mend: How it ends: what to do.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot be written ({error.strerror or error}); {mend}"
        ) from error


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place, synced, if the block succeeds.

    Args:
        path: The file.
        shared: Whether others may write it at the same time. Each then has a temporary file of its
            own, which stays behind if its process is killed; else the next one writes over it.

    Raises:
        OSError: If the disk is full or the folder cannot be written; :func:`writing` words it.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # elsewhere folders cannot be opened
        _sync(path.parent)  # the rename itself


def read_json(path: Path) -> Any:
    """Contents of a JSON file in UTF-8, as :func:`write_text` writes it."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file as :func:`replacing` does, in UTF-8."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def alone(lock_file: Path, mend: str, taken: str | RecboleMMError) -> Iterator[None]:
    """Keep other processes out of the block; the system frees the lock if this one dies.

    Args:
        lock_file: What they lock; made, with its folder, and left behind.
        mend: What to do where it cannot be written, as in :func:`writing`.
        taken: If another process is in the block: a text is logged, and that process waited for;
            an error is raised.

    Raises:
        EnvironmentFault: If the lock cannot be written.
    """
    with writing(lock_file, mend):
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if isinstance(taken, RecboleMMError):
                raise taken from None
            _LOG.info(taken)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
