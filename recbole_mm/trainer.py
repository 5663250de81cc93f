"""RecBole's trainers with this package's checkpoints, history masking, checks and progress.

:func:`trainer_class` derives a trainer from whatever trainer RecBole gives a model, so that
built-in models keep their training procedure and share everything around it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from recbole.trainer import KGTrainer, TraditionalTrainer, Trainer
from recbole.utils import EvaluatorType, ModelType, get_trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from recbole_mm import __version__, compat, distributed
from recbole_mm.checkpoint import (
    Checkpoint,
    LooseState,
    fingerprint,
    load_weights,
    optimizer_state,
    random_states,
    set_optimizer_state,
    set_random_states,
)
from recbole_mm.data.batches import count_targets, loaders_of, seed_batches
from recbole_mm.errors import InputError, NumericalError
from recbole_mm.evaluation import Collector, Evaluator, PerUser, Ranker
from recbole_mm.models.mufasa import MUFASA
from recbole_mm.registry import get_model
from recbole_mm.training import TrainingLoop

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.run_folder import RunFolder

_LOG = logging.getLogger(__name__)


class TrainerMixin:
    """What our path adds to a RecBole trainer; comes before it in the bases.

    - the best epoch's weights go to the run folder as safetensors, or stay in memory without one;
    - evaluation ranks within ``eval_memory_mb`` (:mod:`recbole_mm.evaluation`), with one meaning of
      ``mask_history`` for sequential and for general models;
    - where the training stands goes there too, before every epoch and every ``checkpoint_minutes``,
      so that :meth:`resume` continues an interrupted one as if nothing had happened;
    - each loss term is logged under its name (``loss_names`` of the model), as a mean over batches;
    - one line an epoch on the terminal, TensorBoard in the run folder.
    """

    config: Config
    model: Any  # RecBole's AbstractRecommender, untyped
    # set by RecBole's trainer
    best_valid_score: float
    valid_metric: str
    valid_metric_bigger: bool

    # set by RecBole's trainer and TrainingLoop
    scaler: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    epochs: int
    start_epoch: int
    cur_step: int
    stopping_step: int
    best_valid_result: Any
    train_loss_dict: dict[int, Any]
    without_padding: Callable[[Interaction], Interaction]
    _loss_name: Callable[[int, int], str]

    resumable = False
    shareable = False  # by several processes

    def __init__(self, config: Config, model: Any, folder: RunFolder | None = None) -> None:
        self.folder = folder
        self._best: Checkpoint | None = None
        self._resumed: Checkpoint | None = None
        self._loose = LooseState(model)
        self._loaders: list[Any] = []
        self._loaders_before: list[Tensor] = []
        self._saved_at = time.monotonic()
        self._started = _clocks()
        self._seconds_before = (0.0, 0.0)
        self.per_user: PerUser | None = None
        self._epoch_seconds = (0.0, 0.0)
        self.history: list[dict[str, Any]] = []
        self._n_written = 0  # epochs of the history that metrics.jsonl holds
        self.best_epoch = -1
        self._items, self._n_items = "", 0
        self._features: dict[str, int] = {}
        self._quiet = not config["show_progress"]
        # RecBole opens a TensorBoard writer and a checkpoint folder below the working directory
        with TemporaryDirectory() as scratch, compat.working_directory(Path(scratch)):
            super().__init__(config, model)  # type: ignore[call-arg]
            self.tensorboard.close()
        # some of RecBole's go through the data once, whatever epochs says: they are validated, too
        self.eval_step: int = min(self.eval_step, self.epochs)
        self.eval_collector, self.evaluator = Collector(config), Evaluator(config)
        self.tensorboard: Any = (
            _NoTensorboard()
            if folder is None
            else SummaryWriter(str(folder.path / "log_tensorboard"))
        )

    # ------------------------------------------------------------------ training

    def fit(self, train_data: Any, valid_data: Any = None, *args: Any, **kwargs: Any) -> Any:
        """RecBole's ``fit``, from where the training stands.

        Returns:
            Score and result of validation at the best epoch.
        """
        count_targets(train_data, self.config["train_batch_size"])  # one from elsewhere, too
        self._loaders = loaders_of(train_data)
        tokens = train_data._dataset.field2id_token[self.config["ITEM_ID_FIELD"]]
        self._items, self._n_items = fingerprint(tokens), len(tokens) - 1
        if getattr(self.model, "consumes_features", False):
            self._features = train_data._dataset.item_features.widths
        over = False
        if self._resumed is not None:
            self._restore(self._resumed)
            over = self.start_epoch >= self.epochs or self.cur_step > self.stopping_step
        if self.start_epoch > self.epochs and not self._quiet:
            tqdm.write(f"{self.start_epoch} epochs are done, more than epochs: {self.epochs}")
        if over:  # killed between its last epoch and its result
            self.start_epoch, kwargs["saved"] = self.epochs, False
        self._saved_at = time.monotonic()
        try:
            result = super().fit(train_data, valid_data, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.tensorboard.close()  # RecBole leaves events to the end of the interpreter
        self._write_epochs()
        if len(self.history) < self.epochs and self.history:
            said = (
                f"stopped after epoch {self.history[-1]['epoch']}: no better validation in "
                f"{self.cur_step} evaluations (stopping_step {self.stopping_step})"
            )
            _LOG.info(said)
            if not self._quiet:
                tqdm.write(said)
        if not over:
            self._note_loaders()
            self._save_state(self.history[-1]["epoch"] + 1 if self.history else 0)
        return result

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Interaction], Any] | None = None,
        show_progress: bool = False,
    ) -> Any:
        self._n_passes = 0
        shared = distributed.n_processes() > 1
        share = distributed.rows_of if shared else None
        seed_batches(train_data, self.config["seed"], epoch_idx, share)
        if self._resumed is None:
            self._seconds_before = (0.0, 0.0)
            self._note_loaders()
            self._started = _clocks()
            self._save_state(epoch_idx)
        else:
            self._enter_epoch(self._resumed)
        result = super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)  # type: ignore[misc]
        if self._n_passes != 1:
            # RecBole's trainers that take several passes an epoch, or their own
            self._n_batches = len(train_data)
            self._term_sums = list(_flat(result))
        self._epoch_seconds = self._seconds_of_epoch()
        return result

    def _note_loaders(self) -> None:
        self._loaders_before = [loader.generator.get_state() for loader in self._loaders]

    def _seconds_of_epoch(self) -> tuple[float, float]:
        wall, cpu = _since(self._started)
        return self._seconds_before[0] + wall, self._seconds_before[1] + cpu

    def _mean_terms(self) -> dict[str, float]:
        n = max(self._n_batches, 1)
        return {
            self._loss_name(index, len(self._term_sums)): value / n
            for index, value in enumerate(self._term_sums)
        }

    def _shown(self, terms: dict[str, float]) -> list[str]:
        places = self.config["loss_decimal_place"]
        return [f"{name} {value:.{places}f}" for name, value in terms.items()]

    def _generate_train_loss_output(
        self, epoch_idx: int, s_time: float, e_time: float, losses: Any
    ) -> str:
        terms = ", ".join(self._shown(self._mean_terms()))
        return f"epoch {epoch_idx} training [{e_time - s_time:.2f} s, mean of a batch: {terms}]"

    def _add_train_loss_to_tensorboard(
        self, epoch_idx: int, losses: Any, tag: str = "Loss/Train"
    ) -> None:
        for name, value in self._mean_terms().items():
            self.tensorboard.add_scalar(f"{tag}/{name}", value, epoch_idx)
        self._note_epoch(epoch_idx)

    def _note_epoch(self, epoch_idx: int) -> None:
        self._write_epochs()  # one that was not validated is complete now
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
        self._write_epochs()
        if not self._quiet:
            terms = "  ".join(self._shown(note["loss"]))
            tqdm.write(
                f"epoch {note['epoch']:>3}  {note['train_seconds']:6.1f} s  {terms}  "
                f"valid {self.valid_metric} {score:.4f}{'  *' if better else ''}"
            )
        return score, result

    def _write_epochs(self) -> None:
        if self.folder is not None:
            for note in self.history[self._n_written :]:
                self.folder.append_line("metrics.jsonl", note)
        self._n_written = len(self.history)

    def _check_nan(self, loss: Tensor) -> None:
        # for NCL's trainer, which has a loop of its own
        if not torch.isfinite(loss):
            raise NumericalError(f"the training loss is {loss.item()}; lower learning_rate")

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        self.best_epoch = epoch
        weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        other = self.model.other_parameter()
        tensors = {k: v.clone() for k, v in other.items() if isinstance(v, Tensor)}
        scalars = (bool, int, float, str, type(None))
        plain = {k: v for k, v in other.items() if isinstance(v, scalars)}
        about = {
            **self._identity(),
            "epoch": epoch,
            "valid_metric": self.config["valid_metric"],
            "best_valid_score": float(self.best_valid_score),
            "other_parameter": plain,
            # matrices and modules that the model's constructor makes
            "not_saved": sorted(set(other) - set(plain) - set(tensors)),
        }
        weights |= {f"other_parameter.{name}": tensor for name, tensor in tensors.items()}
        if self.folder is None:
            self._best = Checkpoint(weights, about)
        else:
            self.folder.write_weights(weights, about)
            _LOG.info("epoch %d saved to %s", epoch, self.folder.path)

    def _load_best(self) -> None:
        best = self._best
        if self.folder is not None and self.folder.has_weights:
            best = self.folder.read_weights(self.config["device"])
        if best is None:
            return
        self.model.load_state_dict(best.outside("other_parameter"))
        self.model.load_other_parameter(
            {**best.about["other_parameter"], **best.under("other_parameter")}
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {
            "recbole_mm": __version__,
            "model": self.config["model"],
            "dataset": self.config["dataset"],
            "n_items": self._n_items,
            "items": self._items,
            "features": self._features,
        }

    # ------------------------------------------------------------------ interruption

    def resume(self, state: Checkpoint) -> None:
        """Let :meth:`fit` continue where ``state`` was written.

        Raises:
            InputError: If this training cannot be continued.
        """
        if not self._can_resume:
            raise InputError(
                f"{self.config['model']} cannot be resumed: RecBole's {type(self).__name__} keeps "
                "a state of its own; start its run again"
            )
        if state.about["unsaved"]:
            raise InputError(
                f"{self.config['model']} cannot be resumed: while it trains it changes "
                f"{', '.join(state.about['unsaved'])}, which a checkpoint does not hold; "
                "start its run again"
            )
        self._resumed = state

    @property
    def _can_resume(self) -> bool:
        return self.resumable and distributed.n_processes() == 1

    def _save_state(
        self,
        epoch: int,
        batch: int = 0,
        *,
        stage: str = "training",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Write where the training stands: before batch number ``batch`` of ``epoch``, from 0."""
        if self.folder is None or not self._can_resume:
            return
        learner = optimizer_state(optimizer or self.optimizer)
        loose, unsaved = self._loose.changed()
        states = random_states()
        parts = {
            "model": self.model.state_dict(),
            "attribute": loose.tensors,
            "optimizer": learner.tensors,
            "random": states.tensors,
            "loader": dict(enumerate(self._loaders_before)),
        }
        about = {
            **self._identity(),
            "position": {"stage": stage, "epoch": epoch, "batch": batch},
            "unsaved": unsaved,
            "attributes": loose.about,
            "optimizer": learner.about,
            "scaler": self.scaler.state_dict(),
            "random": states.about,
            "cur_step": self.cur_step,
            "best_epoch": self.best_epoch,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": self.best_valid_result,
            "history": self.history,
            "train_loss": list(self.train_loss_dict.items()),
            "of_epoch": {
                "sums": self._term_sums,
                "batches": self._n_batches,
                "seconds": self._seconds_of_epoch(),
            },
        }
        tensors = {f"{part}.{name}": t for part, held in parts.items() for name, t in held.items()}
        self.folder.write_state(tensors, about)
        self._saved_at = time.monotonic()

    def _restore(self, state: Checkpoint) -> None:
        about = state.about
        load_weights(self.model, state.under("model"), self.folder.path if self.folder else Path())
        loose = {k: v.to(self.device) for k, v in state.under("attribute").items()}
        self._loose.restore(Checkpoint(loose, about["attributes"]))
        self.scaler.load_state_dict(about["scaler"])
        for name in ("cur_step", "best_epoch", "best_valid_score", "history"):
            setattr(self, name, about[name])
        self.best_valid_result = about["best_valid_result"]
        self.train_loss_dict = dict(about["train_loss"])
        position = about["position"]
        if position["stage"] == "training":
            self.start_epoch = position["epoch"]
            self._restore_optimizer(self.optimizer, state)
        if self.folder is not None:
            self.folder.write_lines("metrics.jsonl", self.history)
            self._n_written = len(self.history)
        message = "resumed in {stage}, epoch {epoch}, after {batch} batches".format(**position)
        _LOG.info(message)
        if not self._quiet:
            tqdm.write(message)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, state: Checkpoint) -> None:
        learner = Checkpoint(state.under("optimizer"), state.about["optimizer"])
        set_optimizer_state(optimizer, learner)

    def _enter_epoch(self, state: Checkpoint) -> None:
        """Draw the batches of the epoch as they were drawn when it began."""
        for number, generator in state.under("loader").items():
            self._loaders[int(number)].generator.set_state(generator)
        self._note_loaders()
        self._set_random(state)
        wall, cpu = state.about["of_epoch"]["seconds"]
        self._seconds_before = (wall, cpu) if state.about["position"]["batch"] else (0.0, 0.0)
        self._started = _clocks()

    def _set_random(self, state: Checkpoint) -> None:
        set_random_states(Checkpoint(state.under("random"), state.about["random"]))

    def _enter_pass(self, train_data: Any) -> int:
        done: int = super()._enter_pass(train_data)  # type: ignore[misc]
        if self._resumed is not None:
            done = self._resumed.about["position"]["batch"]
            if done:
                so_far = self._resumed.about["of_epoch"]
                self._term_sums, self._n_batches = so_far["sums"], so_far["batches"]
        return done

    def _first_batch(self) -> None:
        if self._resumed is not None:
            # batches that are drawn again leave no trace
            self._set_random(self._resumed)
            self._resumed = None

    def _after_batch(self, epoch_idx: int, done: int) -> None:
        waited = time.monotonic() - self._saved_at
        if waited >= 60 * self.config["checkpoint_minutes"] and self._n_passes == 1:
            self._save_state(epoch_idx, done)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """RecBole's evaluation, of the best epoch's weights if ``load_best_model``.

        Raises:
            InputError: If ``model_file`` is given: RecBole would unpickle it.
        """
        if model_file is not None:
            raise InputError(
                f"model_file: {model_file!r} is not read; recbole_mm.open_run(folder) gives the "
                "model of a run with its best weights"
            )
        if load_best_model:
            self._load_best()
        collector = self.eval_collector
        # the test set is scored once: what each user got is noted in the same pass
        collector.keeps = bool(load_best_model and self.config["save_per_user"])
        if eval_data:
            shared = distributed.n_processes() > 1
            share = distributed.batches_of(eval_data) if shared else None
            seed_batches(eval_data, self.config["seed"], share=share)
            self._ranker = Ranker(
                self.model, self.config, eval_data._dataset, prepare=self.without_padding
            )
        result = super().evaluate(  # type: ignore[misc]
            eval_data, load_best_model=False, show_progress=show_progress
        )
        if collector.keeps and eval_data:
            self.per_user = collector.take(eval_data._dataset)
            if self.folder is not None and self.per_user is not None:
                self.folder.write_arrays("per_user.npz", self.per_user.arrays())
        return result

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        if not batched_data:  # another process's
            return (None,) * 4
        ranked = self._ranker(batched_data, **self.eval_collector.wants)
        return batched_data[0], ranked, *batched_data[2:]

    def _neg_sample_batch_eval(self, batched_data: Any) -> Any:
        if not batched_data:
            return (None,) * 4
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

    def close(self) -> None:
        """Nothing to write."""


PRETRAINING = "pre-training"


class MUFASATrainer(Trainer):
    """Pre-trains MUFASA's fusion layer on the catalogue before it trains the whole.

    [ours]: ``mfl_pretrain_epochs`` passes over all items, in random batches of
    ``mfl_batch_items``, with the four fusion losses alone; ``freeze_mfl`` then keeps the fusion
    layer as it is.
    """

    model: MUFASA
    # of TrainerMixin and TrainingLoop, between which this class stands
    amp_dtype: torch.dtype
    _apply_gradient: Callable[..., None]
    _resumed: Checkpoint | None
    _save_state: Callable[..., None]
    _restore_optimizer: Callable[..., None]
    _set_random: Callable[[Checkpoint], None]

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Pre-train the fusion layer, then train as RecBole does."""
        self._pretrain()
        return super().fit(*args, **kwargs)

    def _pretrain(self) -> None:
        epochs = self.config["mfl_pretrain_epochs"] if self.model.fusion_losses is not None else 0
        parameters = list(self.model.fusion_parameters())
        first, state = self._pretrained()
        if first < epochs:
            ids = getattr(self.model, "item_embedding", None)
            optimizer = self._build_optimizer(
                params=parameters + ([] if ids is None else list(ids.parameters()))
            )
            if state is not None:
                self._restore_optimizer(optimizer, state)
                self._set_random(state)
            self.model.train()
            for epoch in range(first, epochs):
                self._save_state(epoch, stage=PRETRAINING, optimizer=optimizer)
                self._pretrain_epoch(epoch, optimizer)
        if self.config["freeze_mfl"]:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _pretrained(self) -> tuple[int, Checkpoint | None]:
        """Passes that an interrupted training had done, and its state if it was in the midst."""
        state = self._resumed
        if state is None:
            return 0, None
        if state.about["position"]["stage"] != PRETRAINING:
            return self.config["mfl_pretrain_epochs"], None
        self._resumed = None  # what follows the pre-training begins anew
        return state.about["position"]["epoch"], state

    def _pretrain_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        started = time.perf_counter()
        sums: dict[str, float] = {}
        batches = self.model.catalogue_batches()
        for number, items in enumerate(batches, 1):
            where = f"pre-training epoch {epoch}, batch {number}"
            optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.enable_amp):
                terms = self.model.fusion_terms(items)
            total = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(total):
                raise NumericalError(
                    f"{where}: fusion losses are "
                    f"{ {k: v.item() for k, v in terms.items()} }; lower learning_rate"
                )
            if total.requires_grad:
                self._apply_gradient(total, optimizer, where)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        means = ", ".join(f"{k} {v / len(batches):.4f}" for k, v in sums.items())
        message = f"fusion pre-training {epoch}  {time.perf_counter() - started:6.1f} s  {means}"
        _LOG.info(message)
        if self.config["show_progress"]:
            tqdm.write(message)


# trainers whose whole state is known: one optimizer, one pass an epoch, no attribute that changes.
# The others (KGAT, MKR, NCL, RaCT, RecVAE) train, and cannot be resumed.
_RESUMABLE = (Trainer, TraditionalTrainer, KGTrainer, MUFASATrainer)

# trainers whose every step is one of TrainingLoop. TraditionalTrainer's models count what they see
# instead of following a gradient: several processes would count a part each.
_SHAREABLE = (Trainer, KGTrainer, MUFASATrainer)


def trainer_class(model_type: ModelType, model: str | type) -> type:
    """The trainer of a model: ours or RecBole's choice for it, or for what it derives from.

    It has our :class:`TrainerMixin` before it and our :class:`TrainingLoop` beneath it, and is made
    as RecBole's are, ``trainer_class(config["MODEL_TYPE"], name)(config, model)``: without a run
    folder, which is its third argument.

    Args:
        model_type: ``config["MODEL_TYPE"]``.
        model: Name of the model as :func:`recbole_mm.get_model` takes it, or its class.
    """
    if isinstance(model, str):
        model = get_model(model)
    if issubclass(model, MUFASA):
        return _mixed(MUFASATrainer)
    recboles = (cls.__name__ for cls in model.__mro__ if compat.is_recboles(cls))
    return _mixed(get_trainer(model_type, next(recboles, "")))


@functools.cache
def _mixed(base: type) -> type:
    bases = (TrainerMixin, TrainingLoop) if base is Trainer else (TrainerMixin, base, TrainingLoop)
    able = {"resumable": base in _RESUMABLE, "shareable": base in _SHAREABLE}
    return type(base.__name__, bases, able)
