r"""Causal attention in three branches: windowed, block-level and selective.

For query ``j`` of a head, with ``b`` tokens in a block (block ``c`` holds the tokens ``c b`` to
``(c + 1) b - 1``), scores scaled by ``1 / sqrt(d)``:

- *window*: softmax attention over the keys ``j - w + 1 .. j``;
- *block-level*: softmax attention over one key and one value for each **visible** block. A block
  is visible once it is finished, ``(c + 1) b - 1 <= j``, so that no future token leaks. A query
  with no visible block gets exactly 0;
- *selective*: softmax attention over the single tokens, up to ``j``, of ``n`` blocks: the query's
  own one, always, and the ``n - 1`` other visible blocks with the largest block-level
  probability, summed over all heads of the layer (one group), ties to the lower block.

The output is the sum of the branches, each weighted by its gate.

The choice of blocks is discrete and passes no gradient. The block-level branch, which shares
its queries and block keys with the choice, is what trains the scores.

Source: the three branches [paper: MUFASA, arXiv 2508.09664, abstract]; their form follows Native
Sparse Attention (arXiv 2502.11089) [ours].

Shapes: B batch, H heads, L sequence length, d width of a head, C = L // b finished blocks, n
selected blocks, G branches in use.
"""

from __future__ import annotations

from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.errors import check_choice
from recbole_mm.ops.attention_tools import LN_2, LOG2_E, ChosenBlocks, Dropout
from recbole_mm.ops.block_attention import block_attention, choose_blocks
from recbole_mm.ops.masking import masked_softmax, padding_mask
from recbole_mm.ops.token_attention import token_attention

SELECTIONS = ("query", "query_block")
FORMS = ("auto", "dense", "sparse")

# The dense form is the faster one up to so many positions, and up to so many for each key that a
# query sees in window and selection; measured on a CPU with blocks of 16, 32 and 64, that is 144 to
# 384 such keys.
_DENSE_UP_TO = {"query": 480, "query_block": 288}
_DENSE_BELOW = {"query": 1.75, "query_block": 1.4}


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    length: Tensor,
    *,
    block_size: int,
    window_size: int | None = None,
    block_key: Tensor | None = None,
    block_value: Tensor | None = None,
    n_selected_blocks: int | None = None,
    selection: str = "query",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    form: str = "auto",
) -> Tensor:
    """Gated sum of windowed, block-level and selective causal attention.

    A branch is used when its argument is given: the window with ``window_size``, the block level
    with ``block_value``, selection with ``n_selected_blocks``.

    Args:
        query: ``(B, H, L, d)``.
        key: ``(B, H, L, d)``.
        value: ``(B, H, L, d)``.
        gate: ``(B, H, L, G)``, weight of each branch in use, in the order window, block level,
            selection. Positive: its logarithm is taken (values are not checked, which would make a
            GPU wait).
        length: ``(B,)`` integer, real positions of each row, at most L (not checked); padding is
            on the right.
        block_size: Tokens ``b`` in a block.
        window_size: Keys ``w`` in the window, the query's own included.
        block_key: ``(B, H, C, d)``, key of each finished block; needed by the block level, and
            by selection of more than the query's own block.
        block_value: ``(B, H, C, d)``, value of each finished block.
        n_selected_blocks: Blocks ``n`` that a query attends to token by token, its own included.
        selection: ``query``: each query has its own blocks. ``query_block``: the first query of
            a block selects for all of that block, which stays causal.
        dropout: Probability of dropping an attention weight, in each branch on its own; where
            window and selection both see the whole row they are one attention, dropped once.
        generator: Source of the dropout; ``None`` for torch's own.
        form: ``dense``: tiles of queries against all earlier keys, under masks. ``sparse``: only
            the keys that are seen. Equal but for rounding and the draws of dropout; ``auto`` takes
            the faster one.

    Returns:
        ``(B, H, L, d)``, zero at padding.

    Raises:
        ValueError: If no branch is in use, an option is out of range or shapes do not fit.
    """
    _check(key, value, length, block_size, window_size, block_key, block_value)
    _check_options(n_selected_blocks, selection, dropout, block_key)
    _check_gate(query, gate, window_size, block_value, n_selected_blocks)
    check_choice("form", form, FORMS)
    B, H, L, d = query.shape
    gate = gate.to(query.dtype)  # autocast leaves gates in float32
    query, key, value, gate = _without_padding(length, query, key, value, gate)
    if block_key is not None:
        (block_key,) = _without_padding(length // block_size, block_key)
    if block_value is not None:
        (block_value,) = _without_padding(length // block_size, block_value)

    # from here on rows (G, L, d), G = B H, and softmax by powers of 2
    query = query * (LOG2_E * d**-0.5)
    q, k, v = (x.reshape(B * H, L, d) for x in (query, key, value))
    gates = iter(gate.reshape(B * H, L, -1, 1).unbind(-2))  # each (G, L, 1)
    n_others = 0 if n_selected_blocks is None else n_selected_blocks - 1
    sees_all = (n_others + 1) * block_size >= L  # then there is nothing to choose
    is_shared = selection == "query_block"
    outputs = []
    window = None if window_size is None else (window_size, next(gates))
    chosen = None
    if block_key is not None and block_value is not None:
        mixed, chosen = block_attention(
            q,
            block_key.flatten(0, 1),
            block_value.flatten(0, 1),
            next(gates),
            n_heads=H,
            block_size=block_size,
            n_best=0 if is_shared or sees_all else n_others,
            dropout=dropout,
            generator=generator,
        )
        outputs.append(mixed)
    selected = None
    if n_selected_blocks is not None and sees_all:  # as one block, everyone's own
        chosen = torch.empty(B, 1, 0, dtype=torch.int64, device=query.device)
        selected = ChosenBlocks(chosen, L, is_shared=True), next(gates)
    elif n_selected_blocks is not None:
        if chosen is None or is_shared:
            chosen = select_blocks(query, block_key, block_size, n_others, selection)
        selected = ChosenBlocks(chosen, block_size, is_shared), next(gates)
    outputs += _attend_to_tokens((q, k, v), window, selected, H, form, dropout, generator)
    return reduce(torch.add, outputs).view(B, H, L, d)


def select_blocks(
    query: Tensor, block_key: Tensor | None, block_size: int, n_others: int, selection: str
) -> Tensor:
    """Other blocks that each query, or block of queries, attends to token by token.

    Args:
        query: ``(B, H, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        block_key: ``(B, H, C, d)``, key of each finished block; ``None`` if ``n_others`` is 0.
        block_size: Tokens ``b`` in a block.
        n_others: Blocks to choose beside the own one, ``n - 1``.
        selection: ``query`` or ``query_block``.

    Returns:
        ``(B, Q, m)`` int64, best block first, -1 where fewer are visible. ``Q`` is ``L``, or the
        number ``ceil(L / b)`` of query blocks; ``m`` is the smaller of ``n_others`` and ``C``.
    """
    B, _, L, _ = query.shape
    step = 1 if selection == "query" else block_size
    position = torch.arange(0, L, step, device=query.device)  # of the queries that choose
    if block_key is None:
        return position.new_empty(B, len(position), 0)
    return choose_blocks(query[:, :, ::step], position, block_key, block_size, n_others)


def _attend_to_tokens(
    vectors: tuple[Tensor, Tensor, Tensor],
    window: tuple[int, Tensor] | None,
    selected: tuple[ChosenBlocks, Tensor] | None,
    n_heads: int,
    form: str,
    dropout: float,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Outputs (G, L, d) whose sum is that of the branches over tokens."""
    size = vectors[0].shape[1]
    attend = partial(
        token_attention, *vectors, n_heads=n_heads, dropout=dropout, generator=generator
    )
    gates = [branch[1] for branch in (window, selected) if branch is not None]
    window_sees_all = window is None or window[0] >= size
    selected_sees_all = selected is None or selected[0].block_size >= size
    if window_sees_all and selected_sees_all:  # plain causal attention, once for both
        if not gates:
            return []
        gate: Tensor = reduce(torch.add, gates)
        if dropout > 0.0:
            return [attend(window=(size, gate), selection=None, is_dense=True)]
        q, k, v = (x[:, None] for x in vectors)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=LN_2)
        return [gate * mixed.squeeze(1)]

    n_seen = 0 if window is None else window[0]
    selection = "query"
    if selected is not None:
        n_seen += selected[0].block_size * (selected[0].chosen.shape[-1] + 1)
        selection = "query_block" if selected[0].is_shared else "query"
    crossover = max(_DENSE_UP_TO[selection], _DENSE_BELOW[selection] * n_seen)
    is_dense = form == "dense" or (form == "auto" and size <= crossover)
    dense_window = is_dense or (window is not None and 2 * window[0] > size)
    dense_selected = is_dense or selected_sees_all
    if dense_window == dense_selected or len(gates) == 1:
        one = dense_selected if window is None else dense_window
        return [attend(window=window, selection=selected, is_dense=one)]
    return [
        attend(window=window, selection=None, is_dense=dense_window),
        attend(window=None, selection=selected, is_dense=dense_selected),
    ]


def sparse_attention_last(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    length: Tensor,
    *,
    block_size: int,
    window_size: int | None = None,
    block_key: Tensor | None = None,
    block_value: Tensor | None = None,
    n_selected_blocks: int | None = None,
    block_query: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Row ``length - 1`` of :func:`sparse_attention`, in time and memory linear in ``L``.

    Args:
        query: ``(B, H, d)``, query of the last real position.
        key: ``(B, H, L, d)``.
        value: ``(B, H, L, d)``.
        gate: ``(B, H, G)``, gates of the last real position.
        length: ``(B,)`` integer, real positions of each row.
        block_size: Tokens ``b`` in a block.
        window_size: Keys ``w`` in the window.
        block_key: ``(B, H, C, d)``.
        block_value: ``(B, H, C, d)``.
        n_selected_blocks: Blocks attended to token by token.
        block_query: ``(B, H, d)``, query of the first position of the last block: it chooses the
            blocks. To be given for selection ``query_block``, and only then.
        dropout: Probability of dropping an attention weight; see :func:`sparse_attention`.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(B, H, d)``, zero for a row of length 0.

    Raises:
        ValueError: If no branch is in use, an option is out of range or shapes do not fit.
    """
    _check(key, value, length, block_size, window_size, block_key, block_value)
    _check_options(n_selected_blocks, "query", dropout, block_key)
    query, gate = query.unsqueeze(2), gate.unsqueeze(2)  # (B, H, 1, d) and (B, H, 1, G)
    _check_gate(query, gate, window_size, block_value, n_selected_blocks)
    H, L, d = key.shape[1:]
    scale = d**-0.5
    last = length - 1  # (B,)
    gates = list(gate.to(query.dtype).unsqueeze(-1).unbind(-2))  # each (B, H, 1, 1)
    output = torch.zeros_like(query)

    def attend(keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        seen = seen[:, None, None]  # (B, 1, 1, K)
        keys, values = (x.masked_fill(~seen.transpose(-1, -2), 0.0) for x in (keys, values))
        weights = masked_softmax(query @ keys.transpose(-1, -2) * scale, seen)
        drop = Dropout(dropout, generator)
        keep = drop.draw(weights)
        if keep is not None:
            weights = weights * keep * drop.scale
        return weights @ values  # (B, H, 1, d)

    def attend_at(index: Tensor, seen: Tensor) -> Tensor:
        at = index.clamp(0, L - 1)[:, None, :, None].expand(-1, H, -1, d)
        return attend(key.gather(2, at), value.gather(2, at), seen)

    is_finished = padding_mask(length // block_size, L // block_size)  # (B, C)
    if block_key is not None and block_value is not None:
        block_gate = gates.pop(0 if window_size is None else 1)
        output = output + block_gate * attend(block_key, block_value, is_finished)
    if min(window_size or 0, (n_selected_blocks or 0) * block_size) >= L:
        seen = padding_mask(length, L)  # plain attention, once for both
        return (output + (gates[0] + gates[1]) * attend(key, value, seen)).squeeze(2)
    if window_size is not None:
        index = last[:, None] - torch.arange(min(window_size, L), device=key.device)  # (B, w)
        output = output + gates[0] * attend_at(index, index >= 0)
    if n_selected_blocks is not None:
        own = last.clamp(min=0) // block_size  # (B,)
        selected = own[:, None]  # (B, n)
        if block_key is not None:
            chooser, position = query.detach(), last.clamp(min=0)
            if block_query is not None:
                chooser, position = block_query.detach().unsqueeze(2), own * block_size
            others = choose_blocks(
                chooser * (LOG2_E * scale),
                position[:, None],
                block_key.masked_fill(~is_finished[:, None, :, None], 0.0),
                block_size,
                n_selected_blocks - 1,
            )
            selected = torch.cat((selected, others.squeeze(1)), dim=-1)
        token = torch.arange(block_size, device=key.device)
        index = (selected[..., None] * block_size + token).flatten(1)  # (B, n b)
        exists = (selected >= 0).repeat_interleave(block_size, dim=1)
        output = output + gates[-1] * attend_at(index, exists & (index <= last[:, None]))
    return output.squeeze(2)


def _without_padding(length: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zero what stands in (B, H, L, ...) from ``length`` on, lest a NaN there reach a product."""
    size = tensors[0].shape[2]
    if length.device.type == "cpu" and bool((length >= size).all()):
        return tensors
    is_padding = ~padding_mask(length, size)[:, None, :, None]
    return tuple(x.masked_fill(is_padding, 0.0) for x in tensors)


def _check(
    key: Tensor,
    value: Tensor,
    length: Tensor,
    block_size: int,
    window_size: int | None,
    block_key: Tensor | None,
    block_value: Tensor | None,
) -> None:
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must both be (B, H, L, d)"
        )
    if length.shape != key.shape[:1] or length.is_floating_point():
        raise ValueError(
            f"length must be {tuple(key.shape[:1])} integers, one for each row; got "
            f"{tuple(length.shape)} {length.dtype}"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}; None for no window")
    B, H, L, d = key.shape
    for name, x in (("block_key", block_key), ("block_value", block_value)):
        if x is not None and x.shape != (B, H, L // block_size, d):
            raise ValueError(
                f"{name} {tuple(x.shape)} must be {(B, H, L // block_size, d)}: one vector for "
                f"each finished block of {block_size} among {L} positions"
            )
    if block_value is not None and block_key is None:
        raise ValueError("block_value without block_key; give both, or neither")


def _check_options(
    n_selected_blocks: int | None, selection: str, dropout: float, block_key: Tensor | None
) -> None:
    check_choice("selection", selection, SELECTIONS)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if n_selected_blocks is None:
        return
    if n_selected_blocks < 1:
        raise ValueError(
            f"n_selected_blocks must be at least 1, got {n_selected_blocks}; None for no selection"
        )
    if n_selected_blocks > 1 and block_key is None:
        raise ValueError(
            f"n_selected_blocks {n_selected_blocks} needs block_key to choose by; give it, or "
            "set n_selected_blocks to 1"
        )


def _check_gate(
    query: Tensor,
    gate: Tensor,
    window_size: int | None,
    block_value: Tensor | None,
    n_selected_blocks: int | None,
) -> None:
    n_branches = sum(x is not None for x in (window_size, block_value, n_selected_blocks))
    if n_branches == 0:
        raise ValueError("no branch: give window_size, block_value or n_selected_blocks")
    if gate.shape != (*query.shape[:3], n_branches):
        raise ValueError(
            f"gate {tuple(gate.shape)} must be {(*query.shape[:3], n_branches)}: one weight for "
            f"each of the {n_branches} branches in use"
        )
