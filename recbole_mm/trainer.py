"""RecBole's trainers with this package's checkpoints, history masking, checks and progress.

:func:`trainer_class` derives a trainer from whatever trainer RecBole gives a model, so that
built-in models keep their training procedure and share everything around it.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType, ModelType, get_trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from recbole_mm import compat
from recbole_mm.errors import NumericalError
from recbole_mm.evaluation import Collector, Evaluator, PerUser, Ranker
from recbole_mm.models.mufasa import MUFASA

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.run_folder import RunFolder

_LOG = logging.getLogger(__name__)

# RecBole's models that give the same scores on a batch cut to its longest row (a test compares
# them). The others read the configured length: convolutions, learned filters, low-rank maps.
CUTS_PADDING = frozenset(
    ("SASRec", "GRU4Rec", "NARM", "SASRecF", "GRU4RecF", "FDSA", "CORE", "SRGNN", "GCSAN")
)


class _WithProgress:
    """A RecBole loader that moves a progress bar; everything else is the loader's."""

    def __init__(self, loader: Any, bar: tqdm) -> None:
        self._loader = loader
        self._bar = bar

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield batch
            self._bar.update()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class TrainerMixin:
    """What our path adds to a RecBole trainer; comes before it in the bases.

    - the best epoch's weights go to the run folder as safetensors, or stay in memory without one;
    - evaluation ranks within ``eval_memory_mb`` (:mod:`recbole_mm.evaluation`), with one meaning of
      ``mask_history`` for sequential and for general models;
    - a non-finite loss term or score is a :class:`~recbole_mm.errors.NumericalError`;
    - each loss term is logged under its name (``loss_names`` of the model), as a mean over batches;
    - batches of the models in :data:`CUTS_PADDING` are cut to their longest row;
    - one line an epoch on the terminal, TensorBoard in the run folder.
    """

    config: Config
    model: Any  # RecBole's AbstractRecommender, untyped
    # set by RecBole's trainer
    best_valid_score: float
    valid_metric: str
    valid_metric_bigger: bool

    def __init__(self, config: Config, model: Any, folder: RunFolder | None) -> None:
        self.folder = folder
        self._best: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.per_user: PerUser | None = None
        self._term_sums: list[float] = []
        self._n_batches = 0
        self._epoch_seconds = (0.0, 0.0)
        self.history: list[dict[str, Any]] = []
        self.best_epoch = -1
        self._quiet = not config["show_progress"]
        # RecBole opens a TensorBoard writer and a checkpoint folder below the working directory
        with TemporaryDirectory() as scratch, compat.working_directory(Path(scratch)):
            super().__init__(config, model)  # type: ignore[call-arg]
            self.tensorboard.close()
        self.eval_collector, self.evaluator = Collector(config), Evaluator(config)
        self.tensorboard: Any = (
            _NoTensorboard()
            if folder is None
            else SummaryWriter(str(folder.path / "log_tensorboard"))
        )

    # ------------------------------------------------------------------ training

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Interaction], Any] | None = None,
        show_progress: bool = False,
    ) -> Any:
        loss_of = loss_func or self.model.calculate_loss
        self._term_sums, self._n_batches = [], 0

        def checked(interaction: Interaction) -> Any:
            losses = loss_of(self.without_padding(interaction))
            terms = losses if isinstance(losses, tuple) else (losses,)
            values = [term.item() for term in terms]
            self._n_batches += 1
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    raise NumericalError(
                        f"epoch {epoch_idx}, batch {self._n_batches}: loss term "
                        f"{self._loss_name(index, len(values))!r} is {value}; "
                        "lower learning_rate or set clip_grad_norm"
                    )
            if len(self._term_sums) != len(values):
                self._term_sums = [0.0] * len(values)
            self._term_sums = [s + v for s, v in zip(self._term_sums, values, strict=True)]
            return losses

        started = _clocks()
        bar = tqdm(
            total=len(train_data),
            desc=f"epoch {epoch_idx}",
            unit="batch",
            leave=False,
            disable=not show_progress,
            mininterval=0.5,
        )
        with bar:
            result = super()._train_epoch(  # type: ignore[misc]
                _WithProgress(train_data, bar), epoch_idx, loss_func=checked, show_progress=False
            )
        if self._n_batches == 0:
            # RecBole's knowledge trainers choose their own loss functions
            self._n_batches = len(train_data)
            self._term_sums = list(_flat(result))
        self._epoch_seconds = _since(started)
        return result

    def without_padding(self, interaction: Interaction) -> Interaction:
        """The batch cut to its longest history, if RecBole's model does not mind."""
        if self.config["model"] not in CUTS_PADDING:
            return interaction
        suffix = self.config["LIST_SUFFIX"]
        longest = max(1, int(interaction[self.config["ITEM_LIST_LENGTH_FIELD"]].max()))
        for field, column in interaction.interaction.items():
            if field.endswith(suffix) and column.dim() > 1:
                interaction.interaction[field] = column[:, :longest]
        return interaction

    def _loss_name(self, index: int, count: int) -> str:
        names: tuple[str, ...] = getattr(self.model, "loss_names", ())
        if len(names) == count:
            return names[index]
        return "loss" if count == 1 else f"loss{index + 1}"

    def _mean_terms(self) -> dict[str, float]:
        n = max(self._n_batches, 1)
        return {
            self._loss_name(index, len(self._term_sums)): value / n
            for index, value in enumerate(self._term_sums)
        }

    def _generate_train_loss_output(
        self, epoch_idx: int, s_time: float, e_time: float, losses: Any
    ) -> str:
        terms = ", ".join(f"{name} {value:.4f}" for name, value in self._mean_terms().items())
        return f"epoch {epoch_idx} training [{e_time - s_time:.2f} s, mean of a batch: {terms}]"

    def _add_train_loss_to_tensorboard(
        self, epoch_idx: int, losses: Any, tag: str = "Loss/Train"
    ) -> None:
        for name, value in self._mean_terms().items():
            self.tensorboard.add_scalar(f"{tag}/{name}", value, epoch_idx)
        self._note_epoch(epoch_idx)

    def _note_epoch(self, epoch_idx: int) -> None:
        self.history.append(
            {
                "epoch": epoch_idx,
                "train_seconds": self._epoch_seconds[0],
                "train_cpu_seconds": self._epoch_seconds[1],
                "loss": self._mean_terms(),
            }
        )

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, Any]:
        started = _clocks()
        score, result = super()._valid_epoch(valid_data, show_progress=False)  # type: ignore[misc]
        note = self.history[-1]
        note["valid_seconds"], note["valid_cpu_seconds"] = _since(started)
        note["valid"] = dict(result)
        better = (
            score >= self.best_valid_score
            if self.valid_metric_bigger
            else (score <= self.best_valid_score)
        )
        note["best"] = bool(better)
        if self.folder is not None:
            self.folder.append_line("metrics.jsonl", note)
        if not self._quiet:
            terms = "  ".join(f"{name} {value:.4f}" for name, value in note["loss"].items())
            tqdm.write(
                f"epoch {note['epoch']:>3}  {note['train_seconds']:6.1f} s  {terms}  "
                f"valid {self.valid_metric} {score:.4f}{'  *' if better else ''}"
            )
        return score, result

    def _check_nan(self, loss: Tensor) -> None:
        # terms are checked one by one above; this is for trainers that choose their own loss
        if not torch.isfinite(loss):
            raise NumericalError(f"the training loss is {loss.item()}; lower learning_rate")

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return
        self.best_epoch = epoch
        weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        other = copy.deepcopy(self.model.other_parameter())
        if self.folder is None:
            self._best = (weights, other)
            return
        # what RecBole keeps beside the weights may be a scipy matrix: it stays in this process
        self._best = ({}, other)
        tensors = {f"other_parameter.{k}": v for k, v in other.items() if isinstance(v, Tensor)}
        plain = {k: v for k, v in other.items() if isinstance(v, (bool, int, float, str))}
        self.folder.write_weights(
            {**weights, **tensors},
            {
                "model": self.config["model"],
                "dataset": self.config["dataset"],
                "epoch": epoch,
                "valid_metric": self.config["valid_metric"],
                "best_valid_score": float(self.best_valid_score),
                "other_parameter": plain,
                "not_saved": sorted(set(other) - set(plain) - {k[16:] for k in tensors}),
            },
        )
        _LOG.info("epoch %d saved to %s", epoch, self.folder.path)

    def _load_best(self) -> None:
        if self._best is None:
            return
        weights, other = self._best
        if self.folder is not None:
            weights = {
                name: tensor
                for name, tensor in self.folder.read_weights(self.config["device"]).items()
                if not name.startswith("other_parameter.")
            }
        self.model.load_state_dict(weights)
        self.model.load_other_parameter(copy.deepcopy(other))

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """RecBole's evaluation, of the best epoch's weights if ``load_best_model``."""
        if load_best_model:
            self._load_best()
        collector = self.eval_collector
        # the test set is scored once: what each user got is noted in the same pass
        collector.keeps = bool(load_best_model and self.config["save_per_user"])
        if eval_data:
            self._ranker = Ranker(
                self.model, self.config, eval_data._dataset, prepare=self.without_padding
            )
        result = super().evaluate(  # type: ignore[misc]
            eval_data, load_best_model=False, show_progress=show_progress
        )
        if collector.kept:
            self.per_user = collector.take(eval_data._dataset)
            if self.folder is not None:
                self.folder.write_arrays("per_user.npz", self.per_user.arrays())
        return result

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        ranked = self._ranker(batched_data, **self.eval_collector.wants)
        return batched_data[0], ranked, *batched_data[2:]

    def _neg_sample_batch_eval(self, batched_data: Any) -> Any:
        interaction, scores, *positives = super()._neg_sample_batch_eval(batched_data)  # type: ignore[misc]
        if self.config["eval_type"] == EvaluatorType.RANKING:
            scores = self._ranker.sampled(
                scores, interaction, batched_data[1], *positives, **self.eval_collector.wants
            )
        return interaction, scores, *positives


def _clocks() -> tuple[float, float]:
    """Wall and processor time; on a shared machine only the second can be compared."""
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _clocks()
    return round(wall - started[0], 4), round(cpu - started[1], 4)


def _flat(losses: Any) -> Iterator[float]:
    if isinstance(losses, tuple):
        for loss in losses:
            yield from _flat(loss)
    elif losses is not None:
        yield float(losses)


class _NoTensorboard:
    """Takes RecBole's events and keeps none, for runs that save nothing."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Ignore a scalar."""

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore a set of hyper-parameters."""


class MUFASATrainer(Trainer):
    """Pre-trains MUFASA's fusion layer on the catalogue before it trains the whole.

    [ours]: ``mfl_pretrain_epochs`` passes over all items, in random batches of
    ``mfl_batch_items``, with the four fusion losses alone; ``freeze_mfl`` then keeps the fusion
    layer as it is.
    """

    model: MUFASA

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Pre-train the fusion layer, then train as RecBole does."""
        self._pretrain()
        return super().fit(*args, **kwargs)

    def _pretrain(self) -> None:
        epochs = self.config["mfl_pretrain_epochs"] if self.model.fusion_losses is not None else 0
        parameters = list(self.model.fusion_parameters())
        if epochs:
            ids = getattr(self.model, "item_embedding", None)
            optimizer = self._build_optimizer(
                params=parameters + ([] if ids is None else list(ids.parameters()))
            )
            self.model.train()
            for epoch in range(epochs):
                started = time.perf_counter()
                sums: dict[str, float] = {}
                batches = self.model.catalogue_batches()
                for items in batches:
                    optimizer.zero_grad()
                    terms = self.model.fusion_terms(items)
                    total = torch.stack(list(terms.values())).sum()
                    if not torch.isfinite(total):
                        raise NumericalError(
                            f"pre-training epoch {epoch}: fusion losses are "
                            f"{ {k: v.item() for k, v in terms.items()} }; lower learning_rate"
                        )
                    if total.requires_grad:
                        total.backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0.0) + value.item()
                means = ", ".join(f"{k} {v / len(batches):.4f}" for k, v in sums.items())
                message = (
                    f"fusion pre-training {epoch}  {time.perf_counter() - started:6.1f} s  {means}"
                )
                _LOG.info(message)
                if self.config["show_progress"]:
                    tqdm.write(message)
        if self.config["freeze_mfl"]:
            for parameter in parameters:
                parameter.requires_grad_(False)


_OWN = {"MUFASA": MUFASATrainer}


def trainer_class(model_type: ModelType, name: str) -> type:
    """The trainer of a model: ours or RecBole's choice for it, with :class:`TrainerMixin`."""
    return _mixed(_OWN.get(name) or get_trainer(model_type, name))


@functools.cache
def _mixed(base: type) -> type:
    return type(base.__name__, (TrainerMixin, base), {})
