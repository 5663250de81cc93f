"""Losses of a next-item model over a large catalogue.

Shapes: T targets, N items, K sampled negatives, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.ops.aligned_products import aligned_rows

# On a CPU a larger block of logits only falls out of the cache: measured 10-40 % slower.
_CPU_BLOCK_MB = 16.0


def next_item_cross_entropy(
    states: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    memory_mb: float = 512.0,
    padding_excluded: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy over the whole catalogue, without the ``(T, N)`` logits.

    .. math::
        \ell = \frac{1}{T} \sum_i \Bigl( \log \sum_n \exp(h_i^\top w_n) - h_i^\top w_{y_i} \Bigr)

    Value and gradient are those of ``F.cross_entropy(states @ table.T, target)``. The logits
    exist for a block of targets at a time; the gradient of a block is taken while its logits
    are there, so that none is kept for, or computed again in, the backward pass. Logits of
    bfloat16 and float16 are normalised in float32. Under autocast the products are taken in
    the type that autocast gives them.

    Source: the loss is RecBole's; the order of computation is the known one of fused linear
    cross-entropy (Hsu et al., *Liger Kernel*, 2024, §3.2).

    Args:
        states: ``(T, D)``, what the model predicts from.
        table: ``(N, D)``, item vectors; row 0 is padding.
        target: ``(T,)`` int64 item ids; select real positions before.
        memory_mb: Memory for one block of logits, in MiB. A block has at least one target,
            hence at least N logits. Gradients of ``states`` and ``table`` come on top.
        padding_excluded: Whether row 0 is left out of the softmax. RecBole keeps it.

    Returns:
        Scalar, the mean over targets (0 if there are none), in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit or ``memory_mb`` is not positive.
        RuntimeError: In the backward pass, if a second derivative is asked for.
    """
    if states.dim() != 2 or table.dim() != 2 or states.shape[1] != table.shape[1]:
        raise ValueError(
            f"states {tuple(states.shape)} and table {tuple(table.shape)} must be (T, D) and (N, D)"
        )
    if target.shape != states.shape[:1]:
        raise ValueError(f"target must be ({len(states)},), got {tuple(target.shape)}")
    if not memory_mb > 0:
        raise ValueError(f"memory_mb must be positive, got {memory_mb}")
    if padding_excluded:
        table, target = table[1:], target - 1
    product_dtype = (states[:1] @ table[:1].T).dtype  # what autocast, if on, makes of it
    if table.device.type == "cpu":
        memory_mb = min(memory_mb, _CPU_BLOCK_MB)
    learning = torch.is_grad_enabled()
    loss: Tensor = _BlockwiseCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states.to(product_dtype), table.to(product_dtype), target, memory_mb, learning
    )
    return loss


class _BlockwiseCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``states @ table.T`` by blocks of rows; gradients taken on the way.

    Every product is written into a given tensor: two blocks never coexist, and autocast, which
    leaves such products alone, cannot change their type.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, table: Tensor, target: Tensor, memory_mb: float, learning: bool
    ) -> Tensor:
        narrow, wide = states.dtype, torch.promote_types(states.dtype, torch.float32)
        T, N = len(states), len(table)
        logit_size = wide.itemsize + (narrow.itemsize if narrow != wide else 0)
        width = aligned_rows(states, 1, N).stride(0)
        rows = max(1, min(T, int(memory_mb * 2**20 / (logit_size * width))))
        wide_block = aligned_rows(states, rows, N, dtype=wide)
        narrow_block = aligned_rows(states, rows, N) if narrow != wide else wide_block

        learn_states, learn_table = (learning and needed for needed in ctx.needs_input_grad[:2])
        grad_states = torch.empty_like(states) if learn_states else None
        grad_table = torch.zeros_like(table, dtype=wide) if learn_table else None
        narrow_grad = torch.empty_like(table) if learn_table and narrow != wide else None
        loss = states.new_zeros((), dtype=wide)
        for start in range(0, T, rows):
            h, y = states[start : start + rows], target[start : start + rows]
            product, p = narrow_block[: len(h)], wide_block[: len(h)]  # (rows, N)
            torch.mm(h, table.T, out=product)
            if narrow != wide:
                p.copy_(product)
            of_target = p.gather(1, y[:, None]).squeeze(1)  # refuses ids outside the table
            highest = p.amax(1)
            total = p.sub_(highest[:, None]).exp_().sum(1)
            loss += (highest + total.log() - of_target).sum()
            if not (learn_states or learn_table):
                continue
            p.div_(total[:, None])
            p[torch.arange(len(h), device=h.device), y] -= 1  # softmax - one-hot
            if narrow != wide:
                product.copy_(p)
            if grad_states is not None:
                torch.mm(product, table, out=grad_states[start : start + rows])
            if narrow_grad is not None and grad_table is not None:
                grad_table += torch.mm(product.T, h, out=narrow_grad)
            elif grad_table is not None:
                grad_table.addmm_(product.T, h)

        ctx.save_for_backward(grad_states, grad_table)
        ctx.n_targets = max(1, T)
        mean: Tensor = loss / ctx.n_targets
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the gradients kept would count as constants
            raise RuntimeError(
                "next_item_cross_entropy can be differentiated once; "
                "use F.cross_entropy(states @ table.T, target) for higher derivatives"
            )
        scale = grad / ctx.n_targets
        grads = (g if g is None else g * scale for g in ctx.saved_tensors)
        return *grads, None, None, None


def gbce_loss(
    positive_logit: Tensor, negative_logits: Tensor, *, n_items: int, t: float = 0.75
) -> Tensor:
    r"""Generalised binary cross-entropy on sampled negatives, for very large catalogues.

    .. math::
        \ell = -\frac{1}{K + 1} \Bigl( \beta \log \sigma(s^+) + \sum_k \log(1 - \sigma(s^-_k))
        \Bigr), \qquad \beta = \alpha \bigl(t (1 - \tfrac{1}{\alpha}) + \tfrac{1}{\alpha}\bigr),
        \quad \alpha = \frac{K}{N - 1}

    :math:`t = 0` is binary cross-entropy, overconfident under sampling; :math:`t = 1` gives
    calibrated probabilities.

    Source: Petrov & Macdonald, *gSASRec: Reducing Overconfidence in Sequential Recommendation
    Trained with Negative Sampling*, RecSys 2023, §5.

    Args:
        positive_logit: ``(T,)``, scores of the targets.
        negative_logits: ``(T, K)``, scores of negatives drawn uniformly.
        n_items: Number of items ``N`` that could be drawn, the target among them (padding not).
        t: Calibration, 0 to 1. [gSASRec: 0.75]

    Returns:
        Scalar, the mean over targets, in float32 or wider; 0 if there are none.

    Raises:
        ValueError: If the shapes do not fit, there is no negative, there are more negatives
            than other items, or ``t`` is outside 0 to 1.
    """
    if negative_logits.dim() != 2 or positive_logit.shape != negative_logits.shape[:1]:
        raise ValueError(
            f"positive_logit {tuple(positive_logit.shape)} and negative_logits "
            f"{tuple(negative_logits.shape)} must be (T,) and (T, K)"
        )
    n_negatives = negative_logits.shape[1]
    if not 1 <= n_negatives <= n_items - 1:
        raise ValueError(f"{n_negatives} negatives of {n_items} items; use 1 to {n_items - 1}")
    if not 0 <= t <= 1:
        raise ValueError(f"t must be between 0 and 1, got {t}")
    alpha = n_negatives / (n_items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    wide = torch.promote_types(
        negative_logits.dtype, torch.float32
    )  # sums of K half-precision terms
    surprise = F.softplus(negative_logits.to(wide)).sum(1)
    per_target = surprise - beta * F.logsigmoid(positive_logit.to(wide))
    return per_target.sum() / (max(1, len(per_target)) * (n_negatives + 1))
