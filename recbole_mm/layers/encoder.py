"""Post-norm Transformer encoder and its parts.

Architecture, parameter names and arithmetic are those of ``recbole.model.layers`` (1.2), so
that a state dict fits both ways; the two differences are speed and memory: scores, mask and
softmax are left to ``scaled_dot_product_attention``, and :meth:`TransformerEncoder.last`
computes the last layer for one position only.

Shapes: B batch, L sequence length, T queries, D hidden size, H heads.
Sequences are padded on the right: ``length`` (B,) counts the real positions of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.errors import check_choice
from recbole_mm.ops.packing import by_length

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # erf form, as RecBole's
    "relu": F.relu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
NORMS = ("dyt", "layernorm")


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Look up an activation by RecBole's name for it.

    Raises:
        ValueError: If the name is none of ``gelu``, ``relu``, ``swish``, ``tanh``, ``sigmoid``.
    """
    check_choice("hidden_act", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class DynamicTanh(nn.Module):
    r"""Element-wise stand-in for a normalisation layer: :math:`y = \tanh(\alpha x)`.

    Source: Zhu et al., *Transformers without Normalization*, CVPR 2025, in the form of CAMMSR
    (arXiv 2603.04320, Eq. 12): one trained scalar, no affine map after it.

    Its first value is 0.5 [inferred: that of Zhu et al.].

    Shape:
        - input and output: any
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Squash every entry into (-1, 1)."""
        return torch.tanh(self.alpha * x)


def normalisation(name: str, width: int, eps: float) -> nn.Module:
    """``layernorm`` over the last dimension, or ``dyt``, see :class:`DynamicTanh`.

    Raises:
        ValueError: If the name is neither.
    """
    check_choice("norm", name, NORMS)
    return DynamicTanh() if name == "dyt" else nn.LayerNorm(width, eps=eps)


class FeedForward(nn.Module):
    r"""Position-wise feed-forward layer, post-norm.

    .. math::
        y = \operatorname{LN}(x + \operatorname{drop}(W_2 \, \sigma(W_1 x + b_1) + b_2))

    Source: Vaswani et al., *Attention Is All You Need*, 2017, §3.3; as in RecBole.

    Args:
        hidden_size: Width ``D`` of input and output.
        inner_size: Width between the two maps.
        hidden_act: Name of :math:`\sigma`, see :func:`activation`.
        dropout: Probability of dropping an entry before the residual sum.
        layer_norm_eps: Added to the variance in layer norm.
        norm: ``layernorm``, or ``dyt`` for :class:`DynamicTanh` in its place.

    Shape:
        - input and output: ``(..., D)``
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        hidden_act: str,
        dropout: float,
        layer_norm_eps: float,
        norm: str = "layernorm",
    ) -> None:
        super().__init__()
        self.activation = activation(hidden_act)
        self.dense_1 = nn.Linear(hidden_size, inner_size)
        self.dense_2 = nn.Linear(inner_size, hidden_size)
        self.LayerNorm = normalisation(norm, hidden_size, layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map every position; shapes as in the class."""
        inner = self.activation(self.dense_1(x))
        y: Tensor = self.LayerNorm(x + self.dropout(self.dense_2(inner)))
        return y


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention with residual sum and layer norm.

    .. math::
        y = \operatorname{LN}(q + \operatorname{drop}(W_o \, \operatorname{heads}(q, x) + b_o))

    Source: Vaswani et al., 2017, §3.2; as in RecBole. In training, dropout falls on the
    attention probabilities, exactly as there. On a CPU that makes
    ``scaled_dot_product_attention`` form the ``(B, H, T, L)`` probabilities; with
    ``attn_dropout`` 0, or in evaluation, memory is linear in ``L``.

    Args:
        hidden_size: Width ``D``, a multiple of ``n_heads``.
        n_heads: Number of heads ``H``.
        hidden_dropout: Dropout before the residual sum.
        attn_dropout: Dropout on the attention probabilities.
        layer_norm_eps: Added to the variance in layer norm.
        norm: ``layernorm``, or ``dyt`` for :class:`DynamicTanh` in its place.

    Shape:
        - query: ``(B, T, D)``
        - context: ``(B, L, D)``, where keys and values come from
        - visible: ``(B, L)`` bool, keys that may be attended to, at least one in a row; or
          ``None``: a position attends to itself and earlier ones, ``T`` is ``L``
        - output: ``(B, T, D)``

    Raises:
        ValueError: If ``hidden_size`` is no multiple of ``n_heads``.
    """

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        hidden_dropout: float,
        attn_dropout: float,
        layer_norm_eps: float,
        norm: str = "layernorm",
    ) -> None:
        super().__init__()
        if hidden_size % n_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of n_heads {n_heads}; change either"
            )
        self.n_heads = n_heads
        self.attn_dropout = attn_dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = normalisation(norm, hidden_size, layer_norm_eps)
        self.out_dropout = nn.Dropout(hidden_dropout)

    def _heads(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        return x.view(B, L, self.n_heads, D // self.n_heads).transpose(1, 2)  # (B, H, L, D/H)

    def forward(self, query: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend from ``query`` to ``context``; shapes as in the class."""
        heads = F.scaled_dot_product_attention(
            self._heads(self.query(query)),
            self._heads(self.key(context)),
            self._heads(self.value(context)),
            attn_mask=None if visible is None else visible[:, None, None, :],
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=visible is None,
        )  # (B, H, T, D/H)
        mixed = self.dense(heads.transpose(1, 2).flatten(2))  # (B, T, D)
        y: Tensor = self.LayerNorm(query + self.out_dropout(mixed))
        return y


class TransformerLayer(nn.Module):
    """Multi-head attention, then a feed-forward layer; arguments as in :class:`TransformerEncoder`.

    Shape:
        as in :class:`MultiHeadAttention`
    """

    def __init__(
        self,
        n_heads: int,
        hidden_size: int,
        inner_size: int,
        hidden_dropout: float,
        attn_dropout: float,
        hidden_act: str,
        layer_norm_eps: float,
        norm: str,
    ) -> None:
        super().__init__()
        self.multi_head_attention = MultiHeadAttention(
            hidden_size, n_heads, hidden_dropout, attn_dropout, layer_norm_eps, norm
        )
        self.feed_forward = FeedForward(
            hidden_size, inner_size, hidden_act, hidden_dropout, layer_norm_eps, norm
        )

    def forward(self, query: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """Transform the query positions; shapes as in :class:`MultiHeadAttention`."""
        y: Tensor = self.feed_forward(self.multi_head_attention(query, context, visible))
        return y


class TransformerEncoder(nn.Module):
    """Stack of post-norm Transformer layers, interchangeable with RecBole's of the same name.

    It is causal: a position sees itself and earlier ones only.

    Args:
        n_layers: Number of layers, at least 1.
        n_heads: Heads ``H``; must divide ``hidden_size``.
        hidden_size: Width ``D``.
        inner_size: Width inside the feed-forward layer.
        hidden_dropout_prob: Dropout before each residual sum.
        attn_dropout_prob: Dropout on attention probabilities.
        hidden_act: Activation of the feed-forward layer, see :func:`activation`.
        layer_norm_eps: Added to the variance in layer norm.
        norm: ``layernorm``, or ``dyt`` for :class:`DynamicTanh` in its place.

    Shape:
        - x: ``(B, L, D)``, padded on the right with anything finite
        - length: ``(B,)`` integer, real positions of each row, 0 to ``L``

    Raises:
        ValueError: If ``n_layers`` is below 1, ``n_heads`` does not divide ``hidden_size`` or
            ``hidden_act`` or ``norm`` is unknown.
    """

    def __init__(
        self,
        n_layers: int = 2,
        n_heads: int = 2,
        hidden_size: int = 64,
        inner_size: int = 256,
        hidden_dropout_prob: float = 0.5,
        attn_dropout_prob: float = 0.5,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        norm: str = "layernorm",
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        layer = TransformerLayer(
            n_heads,
            hidden_size,
            inner_size,
            hidden_dropout_prob,
            attn_dropout_prob,
            hidden_act,
            layer_norm_eps,
            norm,
        )
        # copies, as in RecBole: a model that draws its weights afterwards draws the same ones
        self.layer = nn.ModuleList(copy.deepcopy(layer) for _ in range(n_layers))

    def _inner(self, x: Tensor, n_layers: int) -> Tensor:
        # padding stands to the right, so no real position ever sees it; no mask needed
        for index in range(n_layers):
            x = self.layer[index](x, x)
        return x

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """Encode every position.

        Args:
            x: ``(B, L, D)``.
            length: ``(B,)``.

        Returns:
            ``(B, L, D)``. What stands at padding positions is finite and has no meaning.
        """
        return by_length(lambda x, _: self._inner(x, len(self.layer)), x, length)

    def last(self, x: Tensor, length: Tensor) -> Tensor:
        """Encode the last real position of each row; the last layer computes no other.

        Equal, in value and gradient, to reading that position from :meth:`forward`.

        Args:
            x: ``(B, L, D)``.
            length: ``(B,)``.

        Returns:
            ``(B, D)``; exactly zero, with a zero gradient, for a row of length 0.
        """
        return by_length(self._last, x, length)

    def _last(self, x: Tensor, length: Tensor) -> Tensor:
        context = self._inner(x, len(self.layer) - 1)
        position = (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[-1])
        query = context.gather(1, position)  # (B, 1, D)
        state = self.layer[-1](query, context, _visible(x, length)).squeeze(1)  # (B, D)
        return torch.where(length[:, None] > 0, state, 0.0)


def _visible(x: Tensor, length: Tensor) -> Tensor:
    """Real keys of each row, (B, L); an empty row sees its first padding, lest softmax be NaN."""
    return torch.arange(x.shape[1], device=x.device) < length.clamp(min=1)[:, None]
