"""One pass over the training batches: number types, checks of losses and gradients, position.

RecBole's own pass makes a gradient scaler anew every epoch, clips gradients that are still scaled,
looks for NaN but not for infinity, and can neither be left nor entered in the middle. Its trainers
all end in ``Trainer._train_epoch``; :class:`TrainingLoop` takes the place of that one method.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from recbole.trainer import Trainer
from torch import Tensor
from tqdm import tqdm

from recbole_mm import compat, distributed
from recbole_mm.errors import EnvironmentFault, NumericalError

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config

# RecBole's models that give the same scores on a batch cut to its longest row (a test compares
# them). The others read the configured length: convolutions, learned filters, low-rank maps.
CUTS_PADDING = frozenset(
    ("SASRec", "GRU4Rec", "NARM", "SASRecF", "GRU4RecF", "FDSA", "CORE", "SRGNN", "GCSAN")
)

# below it, scaled gradients underflow as unscaled ones would: nothing is left to halve
_SMALLEST_SCALE = 1e-4


class TrainingLoop(Trainer):
    """RecBole's trainer with our pass over the batches.

    - ``torch_compile`` compiles the loss;
    - ``enable_amp`` computes losses in ``amp_dtype``; ``enable_scaler`` scales them for float16,
      with one scaler for the whole training; gradients are clipped after they are unscaled;
    - a loss term or a gradient that is not finite is a :class:`~recbole_mm.errors.NumericalError`
      that names the term, the batch and the state of its features;
    - batches of the models in :data:`CUTS_PADDING` are cut to their longest row;
    - several processes share each batch (:mod:`recbole_mm.distributed`).
    """

    config: Config
    model: Any  # RecBole's AbstractRecommender, untyped

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__(config, model)
        self.amp_dtype = getattr(torch, config["amp_dtype"])
        is_half = self.amp_dtype is torch.float16
        scales = config["enable_amp"] and config["enable_scaler"] and is_half
        self.scaler = compat.grad_scaler(self.device.type, enabled=scales)
        self._term_sums: list[float] = []
        self._n_batches = 0
        self._n_passes = 0
        self._replica: torch.nn.Module | None = None
        self._compiled: dict[Callable[[Interaction], Any], Callable[[Interaction], Any]] = {}

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Interaction], Any] | None = None,
        show_progress: bool = False,
    ) -> Any:
        self.model.train()
        loss_of = loss_func or self.model.calculate_loss
        self._n_passes += 1
        done = self._enter_pass(train_data)
        bar = tqdm(
            total=len(train_data),
            desc=f"epoch {epoch_idx}",
            unit="batch",
            leave=False,
            disable=None if show_progress else True,  # None: where nobody looks at a terminal
            mininterval=0.5,
        )
        with bar:
            for number, interaction in enumerate(train_data):
                if number >= done:
                    if number == done:
                        self._first_batch()
                    where = f"epoch {epoch_idx}, batch {number + 1}"
                    self._step(interaction.to(self.device), loss_of, where)
                    self._after_batch(epoch_idx, number + 1)
                bar.update()
            if done == len(train_data):
                self._first_batch()
        distributed.share_statistics(self.model)
        self._term_sums = distributed.mean(self._term_sums, self.device)
        return self._term_sums[0] if len(self._term_sums) == 1 else tuple(self._term_sums)

    # what a trainer that can be interrupted puts here

    def _enter_pass(self, train_data: Any) -> int:
        """Called before a pass; returns how many of its batches are done already."""
        self._term_sums, self._n_batches = [], 0
        return 0

    def _first_batch(self) -> None:
        """Called when the first batch that is not done has been drawn."""

    def _after_batch(self, epoch_idx: int, done: int) -> None:
        """Called after each optimizer step, with the number of batches done in this pass."""

    # ------------------------------------------------------------------ a step

    def _step(
        self, interaction: Interaction, loss_of: Callable[[Interaction], Any], where: str
    ) -> None:
        self.optimizer.zero_grad()
        interaction = self.without_padding(interaction)
        random_state = torch.get_rng_state()
        with _failures_of_the_compiler():
            terms = self._losses(self._shared(self._fast(loss_of)), interaction)
        weight = self._weight(interaction)
        self._note(terms, weight, interaction, where)

        def refuse(bad: list[str]) -> None:
            torch.set_rng_state(random_state)
            self._refuse_gradient(bad, loss_of, interaction, where)

        features = functools.partial(self._features_of, interaction)
        self._apply_gradient(sum(terms) * weight, self.optimizer, where, refuse, features)

    def _apply_gradient(
        self,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        where: str,
        refuse: Callable[[list[str]], None] | None = None,
        features: Callable[[], str] = str,
    ) -> None:
        """A step of the optimizer: scaled, checked and clipped as the configuration says.

        Args:
            loss: Scalar.
            optimizer: Whose parameters the step changes.
            where: Epoch and batch, for messages.
            refuse: Raises, given the parameters whose gradient is not finite.
            features: What to say of the features of the batch.
        """
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        if not self.scaler.is_enabled():  # the scaler leaves out steps that are not finite
            bad = self._not_finite()
            if bad and refuse is not None:
                refuse(bad)
            if bad:
                raise NumericalError(
                    f"{where}: the gradient is not finite at {', '.join(bad[:3])}; "
                    "lower learning_rate or set clip_grad_norm"
                )
        if self.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise NumericalError(
                f"{where}: gradients are not finite in float16 however little the loss is scaled"
                f"{features()}; set amp_dtype: bfloat16 or lower learning_rate"
            )

    def _fast(self, loss_of: Callable[[Interaction], Any]) -> Callable[[Interaction], Any]:
        """The loss as torch compiles it, if the configuration asks for that."""
        if not self.config["torch_compile"]:
            return loss_of
        if loss_of not in self._compiled:
            # dropout draws the numbers of an uncompiled run: only rounding may differ from it
            self._compiled[loss_of] = torch.compile(loss_of, options={"fallback_random": True})
        return self._compiled[loss_of]

    def _shared(self, loss_of: Callable[[Interaction], Any]) -> Callable[[Interaction], Any]:
        """The loss, with gradients that are averaged over the processes if there are several."""
        if distributed.n_processes() == 1:
            return loss_of
        if self._replica is None:  # not before: a trainer may freeze parameters first
            self._replica = distributed.replicated(self.model, self.config["seed"])
        return functools.partial(self._replica, loss_of)

    def _weight(self, interaction: Interaction) -> float:
        """Weight of this process's share of a batch: its part of the targets."""
        if distributed.n_processes() == 1:
            return 1.0
        everywhere = getattr(self.model, "train_objective", "last") == "all"
        n_targets = (
            (interaction[self.model.ITEM_TARGETS] > 0).sum() if everywhere else len(interaction)
        )
        return distributed.weight_of(n_targets, self.device)

    def _losses(
        self, loss_of: Callable[[Interaction], Any], interaction: Interaction
    ) -> tuple[Tensor, ...]:
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.enable_amp):
            losses = loss_of(interaction)
        return losses if isinstance(losses, tuple) else (losses,)

    def without_padding(self, interaction: Interaction) -> Interaction:
        """The batch cut to its longest history, if RecBole's model does not mind."""
        if not compat.is_recboles(type(self.model)) or self.config["model"] not in CUTS_PADDING:
            return interaction
        suffix = self.config["LIST_SUFFIX"]
        longest = max(1, int(interaction[self.config["ITEM_LIST_LENGTH_FIELD"]].max()))
        for field, column in interaction.interaction.items():
            if field.endswith(suffix) and column.dim() > 1:
                interaction.interaction[field] = column[:, :longest]
        return interaction

    # ------------------------------------------------------------------ checks

    def _note(
        self, terms: Sequence[Tensor], weight: float, interaction: Interaction, where: str
    ) -> None:
        """Add up the loss terms; refuse one that is not finite."""
        # one wait for a GPU, however many terms
        values = torch.stack([term.detach().double().reshape(()) for term in terms]).tolist()
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise NumericalError(
                    f"{where}: loss term {self._loss_name(index, len(values))!r} is {value}"
                    f"{self._features_of(interaction)}; lower learning_rate or set clip_grad_norm"
                )
        self._n_batches += 1
        if len(self._term_sums) != len(values):
            self._term_sums = [0.0] * len(values)
        self._term_sums = [s + weight * v for s, v in zip(self._term_sums, values, strict=True)]

    def _loss_name(self, index: int, count: int) -> str:
        names: tuple[str, ...] = getattr(self.model, "loss_names", ())
        if len(names) == count:
            return names[index]
        return "loss" if count == 1 else f"loss{index + 1}"

    def _not_finite(self) -> list[str]:
        """Parameters whose gradient is not finite."""
        gradients = {n: _numbers(p.grad) for n, p in self.model.named_parameters() if _has_grad(p)}
        if not gradients:
            return []
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])
        if torch.isfinite(norms).all():
            return []
        # the norm of finite numbers can overflow
        return [name for name, g in gradients.items() if not torch.isfinite(g).all()]

    def _refuse_gradient(
        self,
        bad: Sequence[str],
        loss_of: Callable[[Interaction], Any],
        interaction: Interaction,
        where: str,
    ) -> None:
        """Raise, naming the terms of the loss whose own gradient is not finite.

        They are computed once more, with the same dropout on a CPU.
        """
        terms = self._losses(loss_of, interaction)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        guilty = [
            repr(self._loss_name(index, len(terms)))
            for index, term in enumerate(terms)
            if term.requires_grad and not _all_finite(_gradients(term, parameters))
        ]
        of = " and ".join(guilty) if guilty else "the sum of the terms"
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NumericalError(
            f"{where}: the gradient of loss term {of} is not finite at {', '.join(bad[:3])}{more}"
            f"{self._features_of(interaction)}; lower learning_rate or set clip_grad_norm"
        )

    def _features_of(self, interaction: Interaction) -> str:
        """What the features of the items of a batch look like, for a message."""
        features = getattr(self.model, "features", None)
        if not features:
            return ""
        fields = [self.config["ITEM_ID_FIELD"], getattr(self.model, "ITEM_SEQ", "")]
        ids = [interaction[field].flatten() for field in fields if field in interaction]
        items = torch.unique(torch.cat(ids)).cpu()
        items = items[items > 0]
        parts = []
        for name, modality in features.items():
            held = items[modality.present[items]]
            values = modality.values[modality.rows[held]].float()
            length = values.norm(dim=1)
            numbers = (
                f", norms {length.min():.3g} to {length.max():.3g}, "
                f"{int((~torch.isfinite(values)).sum())} not finite"
                if len(held)
                else ""
            )
            parts.append(f"{name} of {len(held)} of {len(items)} items{numbers}")
        return f" (features of the batch: {'; '.join(parts)})"


@contextlib.contextmanager
def _failures_of_the_compiler() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).partition("\n")[0]
        raise EnvironmentFault(
            f"torch_compile: the loss cannot be compiled here ({reason}); install a C++ compiler "
            "(on a CPU) or triton (on a GPU), or set torch_compile: False"
        ) from error


def _has_grad(parameter: Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.numel() > 0


def _numbers(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _gradients(term: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return (_numbers(gradient) for gradient in found if gradient is not None)


def _all_finite(tensors: Iterator[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
