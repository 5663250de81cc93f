r"""Modalities computed from the data set's own files: text, knowledge graph, categories.

A declaration with the key ``derive`` names what to compute; the result is written once, in the
canonical form (ids inside the file), and the declaration becomes ``{path: <that file>}``:

.. code-block:: yaml

    modalities:
      text:      {derive: text, fields: [title, categories], method: auto, dim: ~}
      knowledge: {derive: knowledge, dim: 64}
      category:  {derive: categories, field: categories, dim: 16}

==============  =====================  =====================================================
``text``        ``{dataset}.item``     TF-IDF + truncated SVD, or a sentence encoder (:mod:`.text`)
``knowledge``   ``.kg``, ``.link``     SVD of the item-by-fact matrix (:mod:`.knowledge`)
``categories``  ``{dataset}.item``     multi-hot, or its SVD (:mod:`.categories`)
==============  =====================  =====================================================

``min_coverage`` beside ``derive`` goes into the resulting declaration as it is.

The fit sees every item of the data set, those of the validation and test targets included: it
reads content, never an interaction, so that nothing of the answer leaks. The result does not
depend on the interactions that a run keeps, and one cache file serves them all.

Shapes: n items of the source file, V terms, facts or categories, K width of the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from recbole_mm.data.atomic import RECBOLES_FORMAT, AtomicFormat
from recbole_mm.data.derive.categories import derive_categories
from recbole_mm.data.derive.common import Derived, Job, Source, major_minor
from recbole_mm.data.derive.knowledge import derive_knowledge
from recbole_mm.data.derive.text import derive_text, files_of, packages_of, text_method
from recbole_mm.data.digest import sha256_of
from recbole_mm.data.feature_files import read_features, save_features
from recbole_mm.errors import EnvironmentFault, InputError, nearest
from recbole_mm.files import alone

_LOG = logging.getLogger(__name__)

DERIVE_VERSION = 2
"""Raise it when a change here changes numbers: every cache file of before is then a miss."""

CACHE_MEND = (
    "set feature_cache_dir or RECBOLE_MM_CACHE to a folder with space that you may write to"
)
"""What to do where the cache cannot be written."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"fields": None, "method": "auto", "dim": None},
    "knowledge": {"dim": 64},
    "categories": {"field": None, "dim": 16},
}
_PASSED_ON = ("min_coverage",)  # judges the vectors, does not shape them: no part of the cache key
_FILES = {"text": ("item",), "knowledge": ("kg", "link"), "categories": ("item",)}


def default_cache_dir() -> Path:
    """The folder for derived features where the config names none.

    Returns:
        ``$RECBOLE_MM_CACHE``, ``$XDG_CACHE_HOME/recbole_mm`` or ``~/.cache/recbole_mm``, the first
        that is set. Nothing is created.
    """
    if chosen := os.environ.get("RECBOLE_MM_CACHE"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # relative paths are to be ignored, says the XDG specification
    return (xdg if xdg.is_absolute() else Path("~/.cache").expanduser()) / "recbole_mm"


def cache_folder(chosen: str | Path | None) -> Path:
    """The folder that the configuration names, or else :func:`default_cache_dir`.

    Raises:
        EnvironmentFault: If it begins with the home of a user who is unknown or has none.
    """
    try:
        return default_cache_dir() if chosen is None else Path(chosen).expanduser()
    except RuntimeError as error:
        raise EnvironmentFault(
            f"the cache of derived features: {chosen or '~'}: {error}; {CACHE_MEND}"
        ) from error


def resolve_declarations(
    declarations: Mapping[str, Mapping[str, Any]],
    *,
    tokens: Sequence[str],
    dataset_name: str,
    dataset_path: str | Path,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    item_id_field: str = "item_id",
    knowledge_fields: Sequence[str] = ("entity_id", "head_id", "relation_id", "tail_id"),
    atomic: AtomicFormat = RECBOLES_FORMAT,
) -> dict[str, Mapping[str, Any]]:
    """Compute the modalities declared with ``derive`` and declare their files instead.

    The cache key is a sha256 of the contents of the source files, of the declaration and of the
    versions that shape the numbers: a touched file is a hit, a changed byte a miss. A cache file
    that no longer holds what was written is computed anew.

    Args:
        declarations: Modality name -> declaration; those without ``derive`` pass unchanged.
        tokens: Token of each internal item id, ``tokens[0]`` that of padding. Compared with the
            ids of the source file before anything is computed; the result does not depend on it.
        dataset_name: Stem of the atomic files.
        dataset_path: Folder of the atomic files.
        cache_dir: Folder of the results; ``None`` for :func:`default_cache_dir`.
        progress: Show a progress bar while computing.
        item_id_field: Name of the id column in ``.item`` and ``.link``.
        knowledge_fields: Names of the columns entity, in ``.link``, and head, relation and tail, in
            ``.kg``.
        atomic: How the atomic files are written.

    Returns:
        Declarations for :func:`~recbole_mm.data.features.load_features`, in the order given.

    Raises:
        InputError: On an unknown kind, key or method, a missing file or column, a source without
            content, or one that shares no item with ``tokens``.
        EnvironmentFault: If MiniLM is asked for and not installed, or the cache cannot be written.
    """
    source = Source(
        name=dataset_name,
        folder=Path(dataset_path),
        item_id_field=item_id_field,
        knowledge_fields=tuple(knowledge_fields),
        atomic=atomic,
    )
    cache = cache_folder(cache_dir)
    resolved: dict[str, Mapping[str, Any]] = {}
    for name, declaration in declarations.items():
        if not isinstance(declaration, Mapping) or declaration.get("derive") is None:
            resolved[name] = declaration  # not ours to judge
            continue
        try:
            passed_on = {k: v for k, v in declaration.items() if k in _PASSED_ON}
            options = _checked({k: v for k, v in declaration.items() if k not in _PASSED_ON})
            files = {suffix: _existing(source, suffix) for suffix in _FILES[options["derive"]]}
            job = Job(name, options, source, files, tokens, progress)
            resolved[name] = {"path": str(_derived_file(job, cache.absolute())), **passed_on}
        except (InputError, EnvironmentFault) as error:
            raise type(error)(f"modalities.{name}: {error}") from error
        except OSError as error:
            raise EnvironmentFault(
                f"modalities.{name}: {error}; check the permissions of {source.folder}"
            ) from error
    return resolved


def _checked(declaration: Mapping[str, Any]) -> dict[str, Any]:
    """The declaration with its defaults and with ``auto`` decided."""
    kind = declaration["derive"]
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise InputError(
            f"derive: {kind!r} is unknown; set one of {', '.join(_OPTIONS)}"
            f"{nearest(str(kind), _OPTIONS)}"
        )
    options = {"derive": kind, **_OPTIONS[kind]}
    for key, value in declaration.items():
        if key not in options:
            raise InputError(
                f"unknown key {key!r} beside derive: {kind}; known: {', '.join(options)}"
                f"{nearest(str(key), options)}"
            )
        if value is not None:
            options[key] = value

    dim = options["dim"]
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
        raise InputError(f"dim: {dim!r}; set a positive whole number")
    if kind == "text":
        if isinstance(options["fields"], str):
            options["fields"] = [options["fields"]]
        fields = options["fields"]
        if (
            not isinstance(fields, list)
            or not fields
            or not all(isinstance(f, str) for f in fields)
        ):
            raise InputError(f"fields: {fields!r}; list columns of .item, as in fields: [title]")
        options["method"] = text_method(options["method"])
    if kind == "categories" and not isinstance(options["field"], str):
        raise InputError(
            f"field: {options['field']!r}; set the column of .item that holds the categories"
        )
    return options


def _existing(source: Source, suffix: str) -> Path:
    path = source.folder / f"{source.name}.{suffix}"
    if not path.is_file():
        raise InputError(
            f"{path} is not there; put it there, set data_path to the folder that holds the data "
            "set, or remove the modality"
        )
    return path


# -- the cache --------------------------------------------------------------------------------


def _derived_file(job: Job, cache: Path) -> Path:
    """The file of one modality, from the cache or computed now."""
    kind = job.options["derive"]
    digests = {path.name: sha256_of(path) for path in job.files.values()}
    stem = re.sub(r"[^\w.-]+", "_", job.source.name)
    path = cache / f"{stem}-{kind}-{_key(job, digests)[:32]}.safetensors"
    if not _is_intact(path):
        # a second writer would change the file under a run that has read it, not yet its sha256
        waiting = f"{path}: another process derives it; waiting for it"
        with alone(path.with_name(f".{path.name}.lock"), CACHE_MEND, waiting):
            if not _is_intact(path):  # another process may have made it
                _derive(job, path, digests)
                return path
    _LOG.info("%s: derived earlier, %s", job.modality, path)
    return path


def _derive(job: Job, path: Path, digests: Mapping[str, str]) -> None:
    """Compute the vectors of one modality and keep them as ``path``."""
    kind = job.options["derive"]
    begin = time.perf_counter()
    compute = {
        "text": derive_text,
        "knowledge": derive_knowledge,
        "categories": derive_categories,
    }[kind]
    with (
        logging_redirect_tqdm(),
        tqdm(total=4, desc=f"derive {job.modality}", unit="step", disable=not job.progress) as bar,
    ):

        def announce(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        derived = compute(job, announce)
        announce("write")
        metadata = {
            "normalised": "l2",
            "source": " ".join(digests),
            "source_sha256": " ".join(digests.values()),
            "declaration": json.dumps(job.options, sort_keys=True),
            "explained_variance": f"{derived.explained_variance:.4f}",
            **derived.metadata,
        }
        _write(path, derived, metadata)
    _LOG.info(
        "%s: derived in %.1f s by %s: %d of %d items, width %d, explained variance %.3f; "
        "kept as %s",
        job.modality,
        time.perf_counter() - begin,
        metadata["encoder"],
        derived.present.sum(),
        len(derived.ids),
        derived.values.shape[1],
        derived.explained_variance,
        path,
    )


def _key(job: Job, digests: Mapping[str, str]) -> str:
    """sha256 of everything that the result depends on."""
    method = str(job.options.get("method"))
    packages = ["scikit-learn", "scipy", *packages_of(method)]
    source = job.source
    inputs = {
        "derive": DERIVE_VERSION,
        "options": job.options,
        "files": list(digests.values()),
        "format": [
            source.item_id_field,
            *source.knowledge_fields,
            *astuple(source.atomic),
        ],
        "packages": {package: major_minor(package) for package in packages},
    }
    model = files_of(method)
    if model is not None:
        inputs["model"] = model
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _content_digest(
    tokens: Sequence[str], values: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]
) -> str:
    digest = hashlib.sha256(json.dumps(tokens).encode())
    digest.update(np.ascontiguousarray(values).data)
    digest.update(np.ascontiguousarray(present).data)
    return digest.hexdigest()


def _is_intact(path: Path) -> bool:
    """Whether ``path`` is there and holds what was written to it."""
    if not path.is_file():
        return False
    try:
        file = read_features(path)
    except InputError as error:
        _LOG.warning("%s; derived anew", error)
        return False
    if file.tokens is not None and file.present is not None:
        found = _content_digest(file.tokens, file.values.numpy(), file.present.numpy())
        if found == file.metadata.get("content_sha256"):
            return True
    _LOG.warning("%s: not what was written to it; derived anew", path)
    return False


def _write(path: Path, derived: Derived, metadata: dict[str, str]) -> None:
    """Keep the result; all of the file is written or none."""
    content = _content_digest(derived.ids, derived.values, derived.present)
    try:
        save_features(
            path,
            torch.from_numpy(derived.values),
            derived.ids,
            torch.from_numpy(derived.present),
            {**metadata, "content_sha256": content},
        )
    except (OSError, EnvironmentFault) as error:
        raise EnvironmentFault(f"the cache of derived features: {error}; {CACHE_MEND}") from error
