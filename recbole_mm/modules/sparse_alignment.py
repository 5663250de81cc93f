r"""Sparse Attention-guided Alignment Layer (SAL) of MUFASA.

That SAL combines windowed, block-level and selective attention, and models how coherent blocks of
interest evolve and what varies inside a block, is [paper: MUFASA, arXiv 2508.09664, abstract].
Its formulas are not published: all that follows is [ours], after Native Sparse Attention
(arXiv 2502.11089).

Shapes: B batch, L sequence length, D hidden size, H heads, d = D / H, b tokens in a block,
C = L // b finished blocks, G branches in use.
Sequences are padded on the right: ``length`` (B,) counts the real positions of a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.errors import check_choice
from recbole_mm.layers.encoder import FeedForward, MultiHeadAttention
from recbole_mm.ops.masking import padding_mask
from recbole_mm.ops.packing import by_length
from recbole_mm.ops.rotary import rotate
from recbole_mm.ops.sparse_attention import (
    SELECTIONS,
    sparse_attention,
    sparse_attention_last,
)

COMPRESSIONS = ("mlp", "mean")

# Logits added to the gates: sigmoid gives the window .88 and each other branch .27 at the start.
_GATE_OFFSET = {"window": 2.0, "block": -1.0, "selected": -1.0}


class BlockCompression(nn.Module):
    r"""One vector for each finished block of a sequence.

    .. math::
        u_c = \frac1b \sum_{t} x_{cb+t} + W_2 \frac1b \sum_{t} \operatorname{GELU}(W_1 (x_{cb+t}
        + p_t) + a_1) + a_2

    with :math:`p_t` an embedding of the place inside a block. The mean keeps the vector where
    tokens live, so that it may share their key and value maps. ``compression="mean"`` is the
    first term alone.

    Only finished blocks have a vector, for only they are visible to a query. One that holds
    padding is visible to no real position, so no mask is needed.

    Args:
        hidden_size: Width ``D``.
        block_size: Tokens ``b`` in a block.
        compression: ``mlp`` or ``mean``.

    Shape:
        - x: ``(B, L, D)``
        - output: ``(B, C, D)``

    Raises:
        ValueError: If ``compression`` is unknown.
    """

    def __init__(self, hidden_size: int, block_size: int, compression: str = "mlp") -> None:
        super().__init__()
        check_choice("compression", compression, COMPRESSIONS)
        self.block_size = block_size
        self.compression = compression
        if compression == "mlp":
            self.place = nn.Embedding(block_size, hidden_size)  # p
            self.dense_1 = nn.Linear(hidden_size, hidden_size)  # W_1, a_1
            self.dense_2 = nn.Linear(hidden_size, hidden_size)  # W_2, a_2

    def forward(self, x: Tensor) -> Tensor:
        """Compress; shapes as in the class."""
        tokens = _blocked(x, self.block_size)  # (B, C, b, D)
        mean = tokens.mean(-2)  # (B, C, D)
        if self.compression == "mean":
            return mean
        inner = F.gelu(self.dense_1(tokens + self.place.weight))  # (B, C, b, D)
        mixed: Tensor = self.dense_2(inner.mean(-2))  # W_2 after the mean: b times cheaper, equal
        return mean + mixed


class SparseAlignmentAttention(nn.Module):
    r"""Windowed, block-level and selective attention with gates, residual sum and layer norm.

    .. math::
        y_j = \operatorname{LN}\Bigl(x_j + \operatorname{drop}\bigl(W_o \sum_g
        \sigma(W_g x_j + a_g + o_g) \, \operatorname{branch}_g(x)_j \bigr)\Bigr)

    The branches are defined in :mod:`recbole_mm.ops.sparse_attention`. Block vectors pass through
    the key and value maps of the tokens. ``block_evolution`` lets them attend causally to the
    vectors of earlier blocks first: how interest evolves from block to block.

    The constant :math:`o` favours the window at the start. It is added to the trained bias
    :math:`a` rather than stored in it, so that no re-initialisation can wipe it out.

    A branch switched off has neither parameters nor compute. Without the block level, selection
    goes by the mean of the keys of a block, and no gradient reaches that choice.

    The key map has no bias: it would add the same to all scores of a query, and with ``rotary`` a
    preference by distance alone, which the positions give already [ours].

    ``rotary`` turns queries and keys by their positions (:func:`.rotate`), a block's key by that of
    its middle: then x needs no position of its own, and a position beyond those of training is
    one more distance.

    Args:
        hidden_size: Width ``D``, a multiple of ``n_heads``.
        n_heads: Heads ``H``; all of them share one selection.
        hidden_dropout_prob: Dropout before the residual sum.
        attn_dropout_prob: Dropout on the attention weights of every branch.
        layer_norm_eps: Added to the variance in layer norm.
        window_size: Keys in the window, the query's own included.
        block_size: Tokens in a block.
        n_selected_blocks: Blocks attended to token by token, the query's own included.
        selection: ``query`` or ``query_block``, see :func:`.sparse_attention`.
        compression: ``mlp`` or ``mean``, see :class:`BlockCompression`.
        block_evolution: Whether block vectors attend to earlier ones.
        rotary: Whether queries and keys carry their positions; needs an even ``d``.
        use_window: Windowed branch on or off.
        use_block: Block-level branch on or off.
        use_selected: Selective branch on or off.

    Shape:
        - x: ``(B, L, D)``, padded on the right with anything finite
        - length: ``(B,)`` integer
        - output: ``(B, L, D)``

    Raises:
        ValueError: If a size is out of range, a choice is unknown, or no branch is on.
    """

    gate_offset: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        hidden_dropout_prob: float,
        attn_dropout_prob: float,
        layer_norm_eps: float,
        window_size: int = 64,
        block_size: int = 32,
        n_selected_blocks: int = 5,
        selection: str = "query",
        compression: str = "mlp",
        block_evolution: bool = True,
        rotary: bool = True,
        use_window: bool = True,
        use_block: bool = True,
        use_selected: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "window_size": window_size,
            "block_size": block_size,
            "n_selected_blocks": n_selected_blocks,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if hidden_size % n_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of n_heads {n_heads}; change either"
            )
        if rotary and hidden_size // n_heads % 2 != 0:
            raise ValueError(
                f"rotary positions need heads of even width, got {hidden_size} / {n_heads} = "
                f"{hidden_size // n_heads}; change hidden_size or n_heads"
            )
        check_choice("selection", selection, SELECTIONS)
        switches = {"window": use_window, "block": use_block, "selected": use_selected}
        branches = [name for name, used in switches.items() if used]
        if not branches:
            raise ValueError("no branch is on; set use_window, use_block or use_selected")
        self.n_heads = n_heads
        self.branches = tuple(branches)  # in the order of their gates
        self.attn_dropout_prob = attn_dropout_prob
        self.window_size = window_size if use_window else None
        self.block_size = block_size
        self.n_selected_blocks = n_selected_blocks if use_selected else None
        self.selection = selection
        self.use_block = use_block
        self.rotary = rotary

        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(hidden_size, n_heads * len(branches))
        offset = torch.tensor([_GATE_OFFSET[name] for name in branches])  # o, (G,)
        self.register_buffer("gate_offset", offset, persistent=False)
        if use_block:
            self.compress = BlockCompression(hidden_size, block_size, compression)
        self.evolve = (
            MultiHeadAttention(
                hidden_size, n_heads, hidden_dropout_prob, attn_dropout_prob, layer_norm_eps
            )
            if use_block and block_evolution
            else None
        )
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.out_dropout = nn.Dropout(hidden_dropout_prob)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """Attend from every position; shapes as in the class."""
        position = torch.arange(x.shape[1], device=x.device)
        key, value = self._placed(self.key(x), position), self._heads(self.value(x))  # (B, H, L, d)
        block_key, block_value = self._blocks(x, key)
        heads = sparse_attention(
            self._placed(self.query(x), position),
            key,
            value,
            self._gates(x),
            length,
            block_size=self.block_size,
            window_size=self.window_size,
            block_key=block_key,
            block_value=block_value,
            n_selected_blocks=self.n_selected_blocks,
            selection=self.selection,
            dropout=self.attn_dropout_prob if self.training else 0.0,
        )
        return self._output(x, heads)

    def last(self, x: Tensor, length: Tensor) -> Tensor:
        """Attend from the last real position of each row.

        Time is linear in ``L``, but for the attention between the ``L / block_size`` block vectors
        with ``block_evolution``.

        Args:
            x: ``(B, L, D)``.
            length: ``(B,)``, at least 1.

        Returns:
            ``(B, D)``, equal to row ``length - 1`` of :meth:`forward`.
        """
        position = (length - 1).clamp(min=0)  # (B,)
        final = _row(x, position)  # (B, 1, D)
        everywhere = torch.arange(x.shape[1], device=x.device)
        key, value = self._placed(self.key(x), everywhere), self._heads(self.value(x))
        block_key, block_value = self._blocks(x, key)
        block_query = None
        if self.selection == "query_block":
            first = position // self.block_size * self.block_size
            block_query = self._placed(self.query(_row(x, first)), first[:, None, None]).squeeze(2)
        heads = sparse_attention_last(
            self._placed(self.query(final), position[:, None, None]).squeeze(2),
            key,
            value,
            self._gates(final).squeeze(2),
            length,
            block_size=self.block_size,
            window_size=self.window_size,
            block_key=block_key,
            block_value=block_value,
            n_selected_blocks=self.n_selected_blocks,
            block_query=block_query,
            dropout=self.attn_dropout_prob if self.training else 0.0,
        )
        return self._output(final, heads.unsqueeze(2)).squeeze(1)

    def last_gates(self, x: Tensor, length: Tensor) -> Tensor:
        """Gates of the last real position of each row, ``(B, G)``, the mean over heads.

        In the order of ``branches``. A gate scales its branch, 0 to 1; they do not sum to one.
        """
        return self._gates(_row(x, (length - 1).clamp(min=0))).squeeze(2).mean(1)

    def _heads(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        return x.view(B, L, self.n_heads, D // self.n_heads).transpose(1, 2)  # (B, H, L, d)

    def _placed(self, x: Tensor, position: Tensor) -> Tensor:
        """Heads of queries or keys x (B, T, D) at these positions, (B, H, T, d)."""
        return rotate(self._heads(x), position) if self.rotary else self._heads(x)

    def _gates(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self._heads(self.gate(x)) + self.gate_offset)  # (B, H, L, G)

    def _blocks(self, x: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Key and value of each finished block, (B, H, C, d), as far as a branch needs them."""
        if self.use_block:
            block = self.compress(x)  # (B, C, D)
            if self.evolve is not None and block.shape[1] > 0:
                block = self.evolve(block, block)
            count = torch.arange(block.shape[1], device=x.device)
            middle = count * self.block_size + (self.block_size - 1) / 2
            return self._placed(self.key(block), middle), self._heads(self.value(block))
        if self.n_selected_blocks is not None and self.n_selected_blocks > 1:
            return _blocked(key.detach(), self.block_size).mean(-2), None
        return None, None

    def _output(self, x: Tensor, heads: Tensor) -> Tensor:
        mixed = self.dense(heads.transpose(1, 2).flatten(2))
        y: Tensor = self.LayerNorm(x + self.out_dropout(mixed))
        return y


class SparseAlignmentEncoder(nn.Module):
    """Stack of layers, each :class:`SparseAlignmentAttention` and a feed-forward layer.

    Args:
        hidden_size: Width ``D``.
        n_layers: Number of layers, at least 1.
        n_heads: Heads ``H``; must divide ``hidden_size``.
        inner_size: Width inside the feed-forward layer.
        hidden_act: Activation of the feed-forward layer, see :func:`.activation`.
        hidden_dropout_prob: Dropout before each residual sum.
        attn_dropout_prob: Dropout on attention weights.
        layer_norm_eps: Added to the variance in layer norm.
        **options: The other arguments of :class:`SparseAlignmentAttention`.

    Shape:
        - x: ``(B, L, D)``, padded on the right with anything
        - length: ``(B,)`` integer, real positions of each row, 0 to ``L``

    Raises:
        ValueError: If a size is out of range, a choice is unknown, or no branch is on.
    """

    def __init__(
        self,
        hidden_size: int,
        n_layers: int = 2,
        n_heads: int = 2,
        inner_size: int = 256,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.5,
        attn_dropout_prob: float = 0.5,
        layer_norm_eps: float = 1e-12,
        **options: Any,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        self.attention = nn.ModuleList(
            SparseAlignmentAttention(
                hidden_size,
                n_heads,
                hidden_dropout_prob,
                attn_dropout_prob,
                layer_norm_eps,
                **options,
            )
            for _ in range(n_layers)
        )
        self.feed_forward = nn.ModuleList(
            FeedForward(hidden_size, inner_size, hidden_act, hidden_dropout_prob, layer_norm_eps)
            for _ in range(n_layers)
        )

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """Encode every position.

        Args:
            x: ``(B, L, D)``.
            length: ``(B,)``.

        Returns:
            ``(B, L, D)``. What stands at padding positions is finite and has no meaning.
        """
        return by_length(partial(self._encode, n_layers=len(self.attention)), x, length)

    def last(self, x: Tensor, length: Tensor) -> Tensor:
        """Encode the last real position of each row; the last layer computes no other.

        Args:
            x: ``(B, L, D)``.
            length: ``(B,)``.

        Returns:
            ``(B, D)``, equal in value and gradient to reading that position from :meth:`forward`;
            exactly zero, with a zero gradient, for a row of length 0.
        """
        return by_length(self._last, x, length)

    def _last(self, x: Tensor, length: Tensor) -> Tensor:
        context = self._encode(x, length, len(self.attention) - 1)
        attention = cast(SparseAlignmentAttention, self.attention[-1])
        state = self.feed_forward[-1](attention.last(context, length))  # (B, D)
        return torch.where(length[:, None] > 0, state, 0.0)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of attention that are on."""
        return cast(SparseAlignmentAttention, self.attention[0]).branches

    def last_gates(self, x: Tensor, length: Tensor) -> Tensor:
        """Gates of the last real position in each layer, ``(B, n_layers, G)``.

        Arguments as in :meth:`last`; what a gate is, :meth:`SparseAlignmentAttention.last_gates`
        says.
        """
        gates = by_length(self._last_gates, x, length)
        return gates.view(len(x), len(self.attention), -1)

    def _last_gates(self, x: Tensor, length: Tensor) -> Tensor:
        gates = []
        for layer, attention in enumerate(self.attention):
            context = self._encode(x, length, layer)
            gates.append(cast(SparseAlignmentAttention, attention).last_gates(context, length))
        return torch.cat(gates, dim=1)  # (B, n_layers * G)

    def _encode(self, x: Tensor, length: Tensor, n_layers: int) -> Tensor:
        is_real = padding_mask(length, x.shape[1])[..., None]
        x = x.masked_fill(~is_real, 0.0)  # whatever stood there, NaN included, ends here
        for index in range(n_layers):
            x = self.feed_forward[index](self.attention[index](x, length))
        return x


def _row(x: Tensor, position: Tensor) -> Tensor:
    """Row ``position`` (B,) of x (B, L, D), as (B, 1, D)."""
    return x.gather(1, position[:, None, None].expand(-1, 1, x.shape[-1]))


def _blocked(x: Tensor, block_size: int) -> Tensor:
    """Finished blocks of x (..., L, D), as (..., C, b, D)."""
    n_blocks = x.shape[-2] // block_size
    tokens = x[..., : n_blocks * block_size, :]
    return tokens.reshape(*x.shape[:-2], n_blocks, block_size, x.shape[-1])
