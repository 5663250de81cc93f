r"""Mixture of experts for items in several modalities: gates and experts.

All layers work on the real positions of a batch side by side, see
:class:`recbole_mm.ops.packing.Packing`. Weights of all modalities and experts stand in one tensor
each, so that every step is one product for all of them.

Shapes: T real positions of a batch, B batch, L sequence length, M modalities, D hidden size,
E experts, K input width of an expert, H inner width, G sets of experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.ops.masking import causal_mask
from recbole_mm.ops.packing import Packing


class AttentiveGate(nn.Module):
    r"""Gate values from attention over the positions of a sequence, for each modality.

    .. math::
        Q^m, K^m, V^m = e^m W_Q^m,\; e^m W_K^m,\; e^m W_V^m, \qquad
        G^m = \operatorname{softmax}\Bigl(\frac{Q^m {K^m}^\top}{\sqrt{E}}\Bigr) V^m

    The softmax runs over positions. The gate values themselves are signed and are not normalised
    over experts. A position whose modality is missing is no key; where no key is left, the gate
    values are exactly zero.

    Source: CAMMSR, arXiv 2603.04320, Eq. (6)-(7) [paper]; attention within one sequence
    [inferred: e holds a position]; ``causal`` [ours].

    Args:
        n_modalities: Number of modalities ``M``.
        hidden_size: Width ``D`` of a modality's vector.
        n_experts: Number of experts ``E``.
        causal: Whether a position sees itself and earlier ones only, or all real ones.

    Shape:
        - x: ``(T, M, D)``
        - present: ``(T, M)`` bool
        - output: ``(T, M, E)``
    """

    def __init__(
        self, n_modalities: int, hidden_size: int, n_experts: int, causal: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        # W_Q, W_K, W_V side by side
        self.weight = nn.Parameter(torch.empty(n_modalities, hidden_size, 3 * n_experts))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution, as RecBole does."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor, present: Tensor, packing: Packing) -> Tensor:
        """Gate values of every real position; shapes as in the class."""
        qkv = torch.einsum("tmd,mdf->tmf", x, self.weight)  # (T, M, 3E)
        qkv_BMLF = packing.pad(qkv).transpose(1, 2)  # (B, M, L, 3E)
        query, key, value = qkv_BMLF.chunk(3, dim=-1)
        visible = packing.pad(present).transpose(1, 2).unsqueeze(2)  # (B, M, 1, L)
        if self.causal:
            visible = visible & causal_mask(visible.shape[-1], x.device)  # (B, M, L, L)
        # the softmax over no key at all would be NaN: such a query sees everything, then nothing
        seeing = visible.any(-1, keepdim=True)
        gates = F.scaled_dot_product_attention(query, key, value, attn_mask=visible | ~seeing)
        gates = torch.where(seeing, gates, 0.0)  # (B, M, L, E)
        return packing.pack(gates.transpose(1, 2))


class LinearGate(nn.Module):
    r"""Gate values from one position: :math:`G^m = \operatorname{softmax}_k(e^m W^m + b^m)`.

    Source: CAMMSR, arXiv 2603.04320, ablation "w/o Att" [paper]; its form as usual for mixtures
    of experts [inferred].

    Args:
        n_modalities: Number of modalities ``M``.
        hidden_size: Width ``D`` of a modality's vector.
        n_experts: Number of experts ``E``.

    Shape:
        as in :class:`AttentiveGate`; output sums to one over experts
    """

    def __init__(self, n_modalities: int, hidden_size: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_modalities, hidden_size, n_experts))
        self.bias = nn.Parameter(torch.empty(n_modalities, n_experts))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution, as RecBole does; zero the biases."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, present: Tensor, packing: Packing) -> Tensor:
        """Gate values of every real position; shapes as in the class."""
        logits = torch.einsum("tmd,mde->tme", x, self.weight) + self.bias
        return logits.softmax(-1)


class GatedExperts(nn.Module):
    r"""Sum of the experts' outputs, each times its gate value.

    .. math::
        y^m = \sum_k g^m_k \bigl(W_2^{mk} \operatorname{gelu}(W_1^{mk} x + a^{mk}) + b^{mk}\bigr)

    Source: CAMMSR, arXiv 2603.04320, Eq. (5) [paper].

    Args:
        n_sets: Sets of experts ``G``: one for each modality, or 1 for a set that all share.
        n_experts: Experts ``E`` of a set, at least 1.
        input_size: Width ``K`` of the common input.
        inner_size: Width ``H`` between the two maps.
        output_size: Width ``D`` of the output.

    Shape:
        - x: ``(T, K)``
        - gates: ``(T, M, E)``; ``M`` is ``G``, or anything if ``G`` is 1
        - output: ``(T, M, D)``

    Raises:
        ValueError: If ``n_experts`` is below 1.
    """

    def __init__(
        self, n_sets: int, n_experts: int, input_size: int, inner_size: int, output_size: int
    ) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts must be at least 1, got {n_experts}")
        self.weight_1 = nn.Parameter(torch.empty(n_sets, n_experts, inner_size, input_size))
        self.bias_1 = nn.Parameter(torch.empty(n_sets, n_experts, inner_size))  # a
        self.weight_2 = nn.Parameter(torch.empty(n_sets, n_experts, output_size, inner_size))
        self.bias_2 = nn.Parameter(torch.empty(n_sets, n_experts, output_size))  # b
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution, as RecBole does; zero the biases."""
        for weight, bias in ((self.weight_1, self.bias_1), (self.weight_2, self.bias_2)):
            nn.init.normal_(weight, std=std)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Mix the experts; shapes as in the class."""
        G, E, H, _ = self.weight_1.shape
        # positions last: one product for all experts of all sets, then one for each, no copy
        inner_GEHT = torch.addmm(self.bias_1.view(-1, 1), self.weight_1.flatten(0, 2), x.T)
        inner_GEHT = F.gelu(inner_GEHT).view(G * E, H, -1)
        outer_GEDT = torch.baddbmm(
            self.bias_2.flatten(0, 1).unsqueeze(-1), self.weight_2.flatten(0, 1), inner_GEHT
        ).view(G, E, -1, x.shape[0])
        gates_ME1T = gates.permute(1, 2, 0).unsqueeze(2)
        mixed_MDT = torch.sum(gates_ME1T * outer_GEDT, dim=1)
        return mixed_MDT.permute(2, 0, 1)
