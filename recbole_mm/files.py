"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from recbole_mm.errors import EnvironmentFault


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


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file as :func:`replacing` does, in UTF-8."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
