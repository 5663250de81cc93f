"""A trained model from its run folder alone: no data set, no feature file, nothing executed.

What a model reads of its data set besides the number of items is kept in ``items.safetensors``:
features, categories, item graphs. :class:`StoredItems` hands it out in the data set's place.

Shapes: B histories, N items (row 0 is padding), L sequence length, C categories.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from recbole.utils import EvaluatorType, InputType, ModelType
from torch import Tensor

from recbole_mm import compat
from recbole_mm.checkpoint import Checkpoint, fingerprint, load_weights, read
from recbole_mm.data.categories import CategoryTable
from recbole_mm.data.features import FeatureTable, ModalityFeatures
from recbole_mm.data.item_graph import ItemGraphs
from recbole_mm.errors import InputError, NumericalError, nearest
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.registry import model_of_run
from recbole_mm.run_folder import DAMAGED, ITEMS, RunFolder

_LOG = logging.getLogger(__name__)

_ENUMS = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}


# ------------------------------------------------------------------------- what is kept


def item_constants(net: Any, train: Any) -> Checkpoint | None:
    """What a model reads of the items; ``None`` for a model that reads ids only.

    Of a feature file only the rows of items are kept, in the file's number type.

    Args:
        net: The model.
        train: The training part of its data set.
    """
    if not getattr(net, "consumes_features", False):
        return None
    table = train.item_features
    tensors: dict[str, Tensor] = {}
    for name, features in table.items():
        used, place = torch.unique(features.rows[features.present], return_inverse=True)
        rows = torch.zeros_like(features.rows)
        rows[features.present] = place
        tensors |= {
            # one row more than none: an absent item points at row 0
            f"feature.{name}.values": features.values[used if len(used) else [0]],
            f"feature.{name}.rows": rows,
            f"feature.{name}.present": features.present,
        }
    categories = train.item_categories
    if categories is not None:
        tensors["categories"] = categories.multi_hot
    graphs = getattr(net, "graphs", None)
    if graphs is not None:
        for name, graph in _named(graphs).items():
            tensors |= {f"graph.{name}.{part}": t for part, t in _parts(graph).items()}
        tensors["trained"] = torch.from_numpy(np.unique(train.training_interactions()[1]))
    about = {
        "n_items": table.n_items - 1,
        "features": table.widths,
        "categories": None if categories is None else list(categories.names),
        "graphs": None if graphs is None else list(graphs.modal),
    }
    return Checkpoint(tensors, about)


def _named(graphs: ItemGraphs) -> dict[str, sp.csr_matrix]:
    return {"behaviour": graphs.behaviour, **{f"of.{n}": g for n, g in graphs.modal.items()}}


def _parts(graph: sp.csr_matrix) -> dict[str, Tensor]:
    parts = {"row": graph.indptr, "column": graph.indices, "weight": graph.data}
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}


class _NotStoredError(InputError, AttributeError):
    """Also what ``getattr`` with a default expects."""


class StoredItems:
    """Stands in for the data set when a model is built from a run folder.

    Raises:
        InputError: When the model asks for what a run folder does not hold.
    """

    def __init__(
        self, config: Mapping[str, Any], ids: Mapping[str, list[str]], kept: Checkpoint
    ) -> None:
        self.field2id_token = {field: np.array(tokens) for field, tokens in ids.items()}
        self._model = config["model"]
        self._kept = kept
        self._n_items = len(ids[config["ITEM_ID_FIELD"]])
        self.item_features = FeatureTable(
            [self._modality(name) for name in kept.about["features"]], self._n_items
        )
        names = kept.about["categories"]
        self.item_categories = (
            None if names is None else CategoryTable(tuple(names), kept.tensors["categories"])
        )
        modal = kept.about["graphs"]
        self.item_graphs = (
            None
            if modal is None
            else ItemGraphs(self._graph("behaviour"), {n: self._graph(f"of.{n}") for n in modal})
        )

    def _modality(self, name: str) -> ModalityFeatures:
        parts = self._kept.under(f"feature.{name}")
        # the report of a file, which is not there
        return ModalityFeatures(name=name, report=None, **parts)  # type: ignore[arg-type]

    def _graph(self, name: str) -> sp.csr_matrix:
        row, column, weight = (
            self._kept.tensors[f"graph.{name}.{part}"].numpy()
            for part in ("row", "column", "weight")
        )
        return sp.csr_matrix((weight, column, row), (self._n_items, self._n_items))

    def num(self, field: str) -> int:
        """Number of tokens of an id field, padding included."""
        if field not in self.field2id_token:
            raise self._missing(f"the number of {field!r}")
        return len(self.field2id_token[field])

    def training_interactions(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """No users, and each item once that occurred in training: the histories are not kept."""
        if "trained" not in self._kept.tensors:
            raise self._missing("training_interactions")
        items = self._kept.tensors["trained"].numpy()
        return np.zeros_like(items), items

    def __getattr__(self, name: str) -> Any:
        raise self._missing(name)

    def _missing(self, what: str) -> _NotStoredError:
        return _NotStoredError(
            f"{self._model} asks its data set for {what}, which a run folder does not hold; "
            "use recbole_mm.open_run, which reads the data again"
        )


# ------------------------------------------------------------------------- load


class Recommendations(NamedTuple):
    """Items and their scores for each history, best first.

    They are fewer than ``k`` if the history is masked and no others are left.
    """

    items: list[list[str]]
    scores: list[list[float]]


class Recommender:
    """A trained model that answers for histories of item tokens.

    Attributes:
        model: In evaluation mode.
        config: Values of the run; a key that it does not have is ``None``, as in RecBole.
        items: Tokens by internal id; the first is padding.
    """

    def __init__(self, model: Any, config: Mapping[str, Any], items: Sequence[str]) -> None:
        self.model = model
        self.config = config
        self.items = list(items)
        self._id_of = {token: number for number, token in enumerate(self.items) if number}

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        mask_history: bool | None = None,
        skip_unknown: bool = False,
    ) -> Recommendations:
        """The next items of some histories.

        Args:
            histories: Of each user the item tokens, oldest first. The model reads the last
                ``MAX_ITEM_LIST_LENGTH``.
            k: How many items.
            mask_history: Leave out the items of the history, all of them; ``None``: as the run was
                evaluated.
            skip_unknown: Pass over tokens that are no item of the run instead of refusing them.

        Raises:
            InputError: On a token that is no item, an empty history, an impossible ``k``, or a
                model that does not rank by history.
            NumericalError: If a score is not finite.
        """
        if self.config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
            raise InputError(
                f"{self.config['model']} recommends to users that it was trained on, not to "
                "histories; use a sequential model"
            )
        if isinstance(k, bool) or not hasattr(k, "__index__"):  # as numpy's integers have
            raise InputError(f"k must be a whole number, got {k!r}")
        if not 1 <= k < len(self.items):
            raise InputError(f"k must lie between 1 and {len(self.items) - 1}, got {k!r}")
        masked = self.config["mask_history"] if mask_history is None else mask_history
        ids = self._all_ids(histories, skip_unknown)
        memory = (self.config["eval_memory_mb"] or 512) << 20
        step = max(1, min(self.config["eval_batch_size"], memory // (8 * len(self.items))))
        found = Recommendations([], [])
        for start in range(0, len(ids), step):
            chunk = ids[start : start + step]
            top = torch.topk(self._scores(chunk, masked=masked), k)
            for scores, items in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                kept = [n for n, score in enumerate(scores) if score > -torch.inf]
                found.items.append([self.items[items[n]] for n in kept])
                found.scores.append([scores[n] for n in kept])
        return found

    @torch.no_grad()
    def item_vectors(self) -> tuple[list[str], NDArray[np.float32]]:
        """What an index of nearest neighbours is built from, by largest inner product.

        Returns:
            Tokens of the ``N - 1`` items, and their vectors ``(N - 1, D)``, without padding.

        Raises:
            InputError: If the model does not rank by products of vectors of this package's form.
        """
        self._check_has_vectors()
        table = self.model.scoring_table()[1:].float().cpu()
        return self.items[1:], table.numpy().copy()  # the model scores with its own

    @torch.no_grad()
    def user_vectors(
        self, histories: Sequence[Sequence[str]], *, skip_unknown: bool = False
    ) -> NDArray[np.float32]:
        """Vectors ``(B, D)`` whose products with :meth:`item_vectors` are the scores.

        Args:
            histories: As in :meth:`recommend`.
            skip_unknown: As in :meth:`recommend`.

        Raises:
            InputError: On what :meth:`recommend` and :meth:`item_vectors` refuse.
        """
        self._check_has_vectors()
        ids = self._all_ids(histories, skip_unknown)
        step = self.config["eval_batch_size"]
        chunks = (self._batch(ids[start : start + step]) for start in range(0, len(ids), step))
        none = self.model.scoring_table()[:0]  # of the right width, should there be no history
        with self._no_other_columns():
            found = torch.cat([none, *map(self.model.user_vectors, chunks)])
        return found.float().cpu().numpy()

    def _check_has_vectors(self) -> None:
        ours = MultimodalSequentialRecommender
        predict = getattr(type(self.model), "full_sort_predict", None)
        if not isinstance(self.model, ours) or predict is not ours.full_sort_predict:
            raise InputError(
                f"{self.config['model']} does not say which vectors its scores are products of; "
                "models do that derive from MultimodalSequentialRecommender and rank as it does"
            )

    def _all_ids(self, histories: Any, skip_unknown: bool) -> list[list[int]]:
        if isinstance(histories, (str, bytes)) or not hasattr(histories, "__iter__"):
            raise InputError(f"histories must be a list of lists of item tokens, got {histories!r}")
        return [self._ids(n, history, skip_unknown) for n, history in enumerate(histories)]

    def _ids(self, number: int, history: Sequence[str], skip_unknown: bool) -> list[int]:
        is_text = isinstance(history, (str, bytes))
        if is_text or not hasattr(history, "__len__"):
            kind = "a text" if is_text else type(history).__name__
            raise InputError(f"history {number} is {kind}, not a list of item tokens: {history!r}")
        unknown = [token for token in history if str(token) not in self._id_of]
        if unknown and not skip_unknown:
            raise InputError(
                f"history {number}: {unknown[0]!r} is no item of this run"
                f"{nearest(str(unknown[0]), self._id_of)}; leave it out, or set skip_unknown=True"
            )
        ids = [self._id_of[str(token)] for token in history if str(token) in self._id_of]
        if not ids:
            raise InputError(f"history {number} has no item of this run; give at least one")
        return ids

    def _batch(self, histories: Sequence[Sequence[int]]) -> Interaction:
        """What a model reads of histories, on its device."""
        longest = self.config["MAX_ITEM_LIST_LENGTH"]
        rows = [list(history[-longest:]) for history in histories]
        sequence = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            sequence[number, : len(row)] = torch.tensor(row)
        length = torch.tensor([len(row) for row in rows])
        batch = Interaction({self.model.ITEM_SEQ: sequence, self.model.ITEM_SEQ_LEN: length})
        return batch.to(self.config["device"])

    @contextmanager
    def _no_other_columns(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise InputError(
                f"{self.config['model']} reads {error} of a history besides its items; "
                "use recbole_mm.open_run"
            ) from error

    def _scores(self, histories: Sequence[Sequence[int]], *, masked: bool) -> Tensor:
        """Scores ``(B, N)`` on the model's device; -inf at padding, and at what is masked."""
        with self._no_other_columns():
            scores = self.model.full_sort_predict(self._batch(histories))
        scores = scores.view(len(histories), -1).float()
        if not torch.isfinite(scores[:, 1:]).all():
            raise NumericalError(f"{self.config['model']}: a score is not finite; train it anew")
        scores[:, 0] = -torch.inf
        if masked:
            row_of = torch.repeat_interleave(torch.tensor([len(h) for h in histories]))
            items = torch.tensor([item for h in histories for item in h])
            scores[row_of.to(scores.device), items.to(scores.device)] = -torch.inf
        return scores


def load(
    folder: str | Path, *, model: str | type | None = None, device: torch.device | str | None = None
) -> Recommender:
    """The best model of a run, from its folder alone.

    Reads ``config.yaml``, ``ids.json``, ``items.safetensors`` and ``model.safetensors``; neither
    the data set nor its feature files are needed, and nothing in the folder is executed.

    Args:
        folder: A folder that :func:`recbole_mm.run` wrote.
        model: Class of the model, or ``module:Class``, if the package does not know its name.
        device: Where to put it; by default where the run's configuration and this machine say.

    Raises:
        InputError: If the folder is incomplete, if its parts do not belong together (naming the
            fields that differ), or if the model needs more of its data set than a folder holds.
    """
    path = Path(folder)
    run = RunFolder.at(path)
    if not run.has_weights:
        raise InputError(f"{path}: has no model.safetensors, its run saved no epoch; run it anew")
    config = _StoredConfig(run.read_config(), device)
    model_class = model_of_run(config["model"], path, model)
    ids = run.read_json("ids.json")
    kept = Checkpoint({}, {"features": {}, "categories": None, "graphs": None})
    if (path / ITEMS).is_file():
        kept = read(path / ITEMS)
    saved = run.read_weights()
    items = ids.get(config["ITEM_ID_FIELD"])
    if not isinstance(items, list):
        raise InputError(f"{path / 'ids.json'}: has no list of items; {DAMAGED}")
    _check(path, saved.about, kept.about, config, items)
    with compat.without_recboles_warnings():
        compat.set_numpy_names()
        net: Any = model_class(config, StoredItems(config, ids, kept))
    net = net.to(config["device"])
    load_best(net, saved, path)
    warn_of_unfinished(path)
    return Recommender(net, config, items)


def warn_of_unfinished(folder: Path) -> None:
    """Say that the weights are not those of a finished run."""
    if not (folder / "result.json").is_file():
        _LOG.warning(
            "%s: its run is not finished; these are the best weights so far. Go on: "
            "recbole-mm run --resume=%s",
            *(folder, folder),
        )


def load_best(net: Any, saved: Checkpoint, folder: Path) -> None:
    """Give a model the best weights of its run, for evaluation."""
    device = next(net.parameters()).device
    load_weights(net, saved.outside("other_parameter"), folder)
    other = {k: v.to(device) for k, v in saved.under("other_parameter").items()}
    # what RecBole keeps beside the weights and is neither tensor nor number, its constructor made
    net.load_other_parameter({**saved.about.get("other_parameter", {}), **other})
    net.eval()


class _StoredConfig(dict[str, Any]):
    """Values of a run, with RecBole's enumerations; a missing key is ``None``, as in RecBole."""

    def __init__(self, values: Mapping[str, Any], device: torch.device | str | None) -> None:
        super().__init__(values)
        for key, kind in _ENUMS.items():
            self[key] = kind[values[key]]
        self["device"] = _device(device) if device else compat.config_device(values)

    def __missing__(self, key: str) -> None:
        return None


def _device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise InputError(f"device: {given!r} is none that torch knows; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {given!r}, but no GPU is found here; leave it out")
    return device


def _check(
    folder: Path,
    saved: Mapping[str, Any],
    kept: Mapping[str, Any],
    config: Mapping[str, Any],
    items: Sequence[str],
) -> None:
    """The parts of a folder must belong together."""
    here = {
        "model": config["model"],
        "dataset": config["dataset"],
        "n_items": len(items) - 1,
        "items": fingerprint(items),
        "features": kept["features"],
    }
    differing = [
        f"{key} ({saved.get(key)!r} in model.safetensors, {value!r} beside it)"
        for key, value in here.items()
        if saved.get(key) != value
    ]
    if kept.get("n_items", here["n_items"]) != here["n_items"]:
        differing.append(f"n_items ({kept['n_items']} in {ITEMS}, {here['n_items']} in ids.json)")
    if differing:
        raise InputError(
            f"{folder}: its files are not of one run, they differ in {'; '.join(differing)}; "
            "restore them, or run it anew"
        )
