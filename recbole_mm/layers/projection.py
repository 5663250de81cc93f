"""Frozen item features inside a model, and their projection to the hidden size.

Shapes: N items (row 0 is padding), M modalities, R stored rows, F feature width, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AT_ONCE = 4096  # rows whose lengths are computed together


class ItemVectors(Protocol):
    """Vectors of one modality: ``values`` (R, F), ``rows`` (N,), ``present`` (N,)."""

    @property
    def values(self) -> Tensor: ...  # noqa: D102
    @property
    def rows(self) -> Tensor: ...  # noqa: D102
    @property
    def present(self) -> Tensor: ...  # noqa: D102


class FrozenFeatures(nn.Module):
    """Vectors that are looked up by item and never trained nor saved.

    ``values`` stay as they are stored (float16 stays float16, a memory map stays a map): a change
    of the module's number type, ``.double()``, changes only what :meth:`forward` returns, and a
    deep copy shares them. Moving the module to another device does copy them there.

    Args:
        values: ``(R, F)`` floating point.
        rows: ``(N,)`` int64, row of each item; any row where the item is absent.
        present: ``(N,)`` bool.
        norm: Euclidean length that every vector is given when it is looked up, a zero vector
            excepted; ``None`` leaves it as it is stored.

    Shape:
        - items: any shape, int64 in [0, N)
        - output: ``(*items, F)``, float32 or the module's type; exactly zero for absent items

    Raises:
        ValueError: If the shapes or types do not fit together, or ``norm`` is not positive.
    """

    values: Tensor
    rows: Tensor
    present: Tensor
    scale: Tensor  # (N,) float64, what the vector of an item is multiplied by
    _like: Tensor  # empty; carries the number type and the device of the module

    def __init__(
        self, values: Tensor, rows: Tensor, present: Tensor, norm: float | None = None
    ) -> None:
        super().__init__()
        if norm is not None and not norm > 0:
            raise ValueError(f"norm must be positive, got {norm}")
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"values must be (R, F) floats, got {values.dtype} {values.shape}")
        if rows.ndim != 1 or rows.shape != present.shape:
            raise ValueError(
                f"rows {tuple(rows.shape)} and present {tuple(present.shape)} must both be (N,)"
            )
        if rows.dtype != torch.int64 or present.dtype != torch.bool:
            raise ValueError(
                f"rows must be int64 and present bool, got {rows.dtype}, {present.dtype}"
            )
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(values):
            raise ValueError(f"rows must lie in [0, {len(values)})")
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("present", present, persistent=False)
        self.register_buffer("_like", torch.empty(0), persistent=False)
        parts = torch.split(values, _AT_ONCE)
        lengths = [part.double().norm(dim=1) for part in parts]
        length = torch.cat([*lengths, values.new_empty(0, dtype=torch.float64)])  # (R,)
        self.is_finite = bool(length.isfinite().all())
        # as float16 has them too, under autocast, and products with them
        usual = ((length >= 0.01) & (length <= 1000)) | (length == 0)
        self.is_usual = bool(usual.all())
        if norm is None:
            scale = present.double()
        else:
            scale = torch.where(present, norm / length.clamp(min=1e-12)[rows], 0.0)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of items; shapes as in the class."""
        vectors = self.values[self.rows[items]].to(self._like.dtype)  # (*items, F)
        vectors = vectors * self._scale(items)
        if self.is_finite:
            return vectors
        # NaN * 0 is NaN
        return torch.where(self.present[items].unsqueeze(-1), vectors, 0.0)

    def times(self, weight: Tensor, items: Tensor) -> Tensor:
        """``forward(items) @ weight.T``, ``(*items, D)`` for a weight ``(D, F)``.

        Where there are not more stored rows than items, all rows are multiplied as they are stored,
        and products are looked up and given their length: D numbers of an item instead of F.
        """
        # a row that is not finite would reach the gradient of the weight, whoever asks for it
        if not self.is_usual or len(self.values) > items.numel():
            return F.linear(self(items), weight)
        products = F.linear(self.values.to(self._like.dtype), weight)  # (R, D)
        # F.embedding, whose gradient has one order of summation
        return F.embedding(self.rows[items], products) * self._scale(items)

    def _scale(self, items: Tensor) -> Tensor:
        return self.scale[items].to(self._like.dtype).unsqueeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFeatures:
        kept = {name: self._buffers[name] for name in ("values", "scale")}
        for name in kept:
            self._buffers[name] = None  # out of reach of a change of number type
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            self._buffers[name] = tensor if tensor is None else tensor.to(self._like.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenFeatures:
        memo[id(self.values)] = self.values
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return twin


class ModalityProjection(nn.Module):
    r"""Frozen features of all modalities, each projected to the hidden size by its own map.

    .. math::
        h_m = W f_m + b \qquad\text{or}\qquad
        h_m = \operatorname{LN}(W_2 \operatorname{gelu}(W_1 f_m + b_1) + b_2)

    Source: one layer as CAMMSR, arXiv 2603.04320, Eq. (2)-(4) [paper]; two layers for MUFASA's
    fusion layer [ours]. An absent feature gives exactly zero and ``present`` False.

    Encoders differ in the length of their vectors, 1 from sentence encoders, 10 from CLIP, and with
    it in the scale of what a projection starts from and in how far a step of Adam moves it:
    ``norm`` makes the model independent of that length. [ours]

    Args:
        features: Vectors of each modality, in the order of the output.
        hidden_size: Width ``D`` of the output.
        hidden_layers: 1 (linear) or 2 (perceptron and layer norm).
        norm: Length that each feature vector is given before it is projected; ``None`` for the
            stored one.

    Shape:
        - items: any shape, int64 in [0, N)
        - output: ``(*items, M, D)`` and present ``(*items, M)``, bool

    Raises:
        ValueError: If there is no modality or ``hidden_layers`` is neither 1 nor 2.
    """

    def __init__(
        self,
        features: Mapping[str, ItemVectors],
        hidden_size: int,
        hidden_layers: int = 1,
        norm: float | None = None,
    ) -> None:
        super().__init__()
        if not features:
            raise ValueError("there is no modality to project")
        if hidden_layers not in (1, 2):
            raise ValueError(f"hidden_layers must be 1 or 2, got {hidden_layers}")
        self.features = nn.ModuleDict(
            {
                name: FrozenFeatures(vectors.values, vectors.rows, vectors.present, norm)
                for name, vectors in features.items()
            }
        )
        self.project = nn.ModuleDict(
            {
                name: _projection(vectors.values.shape[1], hidden_size, hidden_layers)
                for name, vectors in features.items()
            }
        )

    def forward(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Project the features of items; shapes as in the class."""
        present, projected = [], []
        for name, project in self.project.items():
            features = cast(FrozenFeatures, self.features[name])
            present.append(features.present[items])
            layers = list(project) if isinstance(project, nn.Sequential) else [project]
            first, *others = cast(list[nn.Linear], layers)
            hidden = features.times(first.weight, items) + first.bias
            for layer in others:
                hidden = layer(hidden)
            projected.append(hidden)
        mask = torch.stack(present, dim=-1)  # (*items, M)
        hidden = torch.stack(projected, dim=-2)  # (*items, M, D)
        # a bias, or layer norm, would give an absent feature a vector
        return torch.where(mask.unsqueeze(-1), hidden, 0.0), mask


def _projection(width: int, hidden_size: int, hidden_layers: int) -> nn.Module:
    if hidden_layers == 1:
        return nn.Linear(width, hidden_size)
    return nn.Sequential(
        nn.Linear(width, hidden_size),  # W_1
        nn.GELU(),
        nn.Linear(hidden_size, hidden_size),  # W_2
        nn.LayerNorm(hidden_size),
    )
