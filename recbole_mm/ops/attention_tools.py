"""What the branches of sparse attention share: tiles, softmax in base 2, dropout, best blocks.

Every branch goes through its scores tile by tile and keeps, for the backward pass, only the
log2-sum-exp of each query; the weights are computed again there. Memory is that of one tile, and
with dropout one byte for each weight that is seen: what was kept.

Queries reach the branches multiplied by ``log2(e) / sqrt(d)``, so that softmax is powers of 2:
``exp2`` costs a third of ``exp`` on a CPU. A gradient with respect to such scores carries ``ln 2``.

Shapes: ... any leading dimensions, T queries of a tile, K keys of a tile, d width of a head,
C blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@dataclass(frozen=True)
class ChosenBlocks:
    """What selection sees: the tokens, up to the query, of its own block and of chosen ones.

    Attributes:
        chosen: int64. ``(B, L, m)`` for each query, -1 for none; or, if shared, ``(B, N, m)`` for
            each of the ``N = ceil(L / b)`` blocks of queries: the first ``min(i, m)`` of block
            ``i`` are earlier blocks, the rest is not read.
        block_size: Tokens ``b`` in a block.
        is_shared: Whether the queries of a block share their choice.
    """

    chosen: Tensor
    block_size: int
    is_shared: bool


_LEVELS = 1 << 16  # dropout compares 16 random bits


def tile_scores(device: torch.device) -> int:
    """Scores to hold at once: what fits the L2 cache of a CPU core, or fills a GPU."""
    return 1 << 18 if device.type == "cpu" else 1 << 25


def n_fitting(scores_each: int, device: torch.device) -> int:
    """How many things of so many scores fit a tile, one at least."""
    return max(1, tile_scores(device) // max(1, scores_each))


def tiles(total: int, scores_each: int, device: torch.device) -> Iterator[slice]:
    """Cut ``total`` things, of ``scores_each`` scores, into runs that fit a tile."""
    step = n_fitting(scores_each, device)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """Products of query (..., T, d) and key (..., K, d): (..., T, K), in float32 at least.

    Sums are taken in float32; of bfloat16 and float16 operands each product arrives rounded to
    their type, as ``torch.bmm`` gives it (SDPA keeps float32 there, and is a little more exact).
    """
    return _accumulated(torch.bmm(query, key.transpose(1, 2)))


def softmax_(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax in base 2, not yet divided by its sum; overwrites ``scores``.

    Args:
        scores: ``(..., T, K)``; -inf hides a key, and each query sees one at least.

    Returns:
        Weights ``(..., T, K)``, their sum and the highest score, both ``(..., T, 1)``.
    """
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp2_()
    return weights, weights.sum(-1, keepdim=True), highest


def mix(weights: Tensor, value: Tensor) -> Tensor:
    """Weights (..., T, K) times value (..., K, d), in float32 at least."""
    return _accumulated(torch.bmm(weights.to(value.dtype), value))


def tile_gradients(
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile.

    Args:
        scores: ``(n, T, K)``, -inf where hidden; overwritten.
        query: ``(n, T, d)``.
        key: ``(n, K, d)``.
        value: ``(n, K, d)``.
        grad: ``(n, T, d)``, gradient of the output, times ``ln 2`` and the scale of the dropout.
        log_sum: ``(n, T, 1)``, log2 of the sum of powers over all keys of a query.
        delta: ``(n, T, 1)``, ``ln 2`` times product of the output and its gradient.
        keep: ``(n, T, K)``, what dropout kept, or ``None`` for everything.

    Returns:
        Gradients of query, key and value; the last one still times ``ln 2``.
    """
    grads = scores_of(grad, value)
    weigh_(scores, grads, log_sum, delta, keep)
    weights, grads = scores.to(query.dtype), grads.to(query.dtype)
    return (
        torch.bmm(grads, key),
        torch.bmm(grads.transpose(1, 2), query),
        torch.bmm(weights.transpose(1, 2), grad),
    )


def weigh_(
    scores: Tensor, grads: Tensor, log_sum: Tensor, delta: Tensor, keep: Tensor | None
) -> None:
    """Turn scores into weights, and gradients of the weights into those of the scores.

    All arguments but ``grads`` (n, T, K) are those of :func:`tile_gradients`. After it,
    ``scores`` holds the weights that dropout kept.
    """
    weights = scores.sub_(log_sum).exp2_()
    if keep is not None:
        grads.mul_(keep)
    grads.sub_(delta).mul_(weights)
    if keep is not None:
        weights.mul_(keep)


def gather_blocks(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks (N, b, d) at ``index`` (g, n), side by side: (g, n b, d)."""
    picked = blocks.flatten(1).index_select(0, index.flatten())
    return picked.view(len(index), -1, blocks.shape[-1])


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores and sums: float32 for half precision, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _accumulated(x: Tensor) -> Tensor:
    return x.to(score_dtype(x.dtype))


def hidden(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask for scores of vectors of ``dtype``: 0 where ``seen``, -inf elsewhere."""
    return torch.zeros_like(seen, dtype=score_dtype(dtype)).masked_fill_(~seen, -math.inf)


class Dropout:
    """Keeps or drops attention weights, the same ones in the backward pass.

    A weight is kept with the probability that 16 random bits can express next to
    ``1 - rate``; ``scale`` is the inverse of that very probability, so the mean is exact.

    Args:
        rate: Probability of dropping a weight, in [0, 1).
        generator: Source of the draws; ``None`` for torch's own.
    """

    def __init__(self, rate: float, generator: torch.Generator | None) -> None:
        self.threshold = min(round(rate * _LEVELS), _LEVELS - 1)
        self.scale = _LEVELS / (_LEVELS - self.threshold)
        self.generator = generator
        self.drawn: list[Tensor] = []

    def draw(self, weights: Tensor) -> Tensor | None:
        """Choose what to keep of the next tile, uint8 of its shape; ``None`` for everything."""
        if self.threshold == 0:
            return None
        words = torch.empty(-(-weights.numel() // 4), dtype=torch.int64, device=weights.device)
        words.random_(-(2**63), None, generator=self.generator)
        bits = words.view(torch.int16)[: weights.numel()].view(weights.shape)
        keep = torch.empty_like(weights, dtype=torch.uint8)
        torch.ge(bits, self.threshold - _LEVELS // 2, out=keep)
        self.drawn.append(keep)
        return keep

    def replay(self) -> Iterator[Tensor | None]:
        """What :meth:`draw` chose, tile by tile."""
        return iter(self.drawn) if self.drawn else itertools.repeat(None)


def best_blocks(merit: Tensor, n_best: int) -> Tensor:
    """Indices of the largest values, largest first, ties to the lower index.

    Args:
        merit: ``(..., C)``, not negative, ``C`` at most 2**20.
        n_best: Values to choose, at most ``C``.

    Returns:
        ``(..., n_best)`` int64.
    """
    n_blocks = merit.shape[-1]
    if merit.dtype == torch.float64:
        return merit.sort(dim=-1, descending=True, stable=True).indices[..., :n_best]
    # The bits of a float that is not negative order as integers do. With the index below them the
    # key is unique, hence no ties, and exact in a double. Taking the maximum away n times needs no
    # branch: for a few blocks that is several times faster than topk, let alone a stable sort.
    last = n_blocks - 1
    room = 1 << n_blocks.bit_length()
    rank = torch.arange(n_blocks, 0, -1, device=merit.device, dtype=torch.float64)
    key = merit.float().view(torch.int32).double().mul_(room).add_(rank)  # all above 0
    smaller = torch.empty_like(key)
    best = []
    for _ in range(n_best):
        highest = key.amax(-1, keepdim=True)
        best.append(highest)
        key.mul_(torch.lt(key, highest, out=smaller))
    ranks = torch.cat(best, dim=-1).long() % room  # of the last block 1, of the first C
    ranks.clamp_(1, n_blocks)  # the key of a NaN with the bit of its sign is anything
    return last + 1 - ranks
