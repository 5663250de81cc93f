r"""What MDSRec consists of: item relations, interests in one modality, fusion of the modalities.

================================================  =====================================
items enhanced over the graphs of all modalities  :class:`ItemRelations`
interest centres of a history                     :class:`InterestCentres`
interest-centralized attention                    :class:`InterestLayer`
the user in one modality                          :class:`ModalityInterest`
the user in all of them                           :class:`InterestFusion`
================================================  =====================================

The abstract of MDSRec (arXiv 2412.08103) names these parts [paper]; it gives no formula. Every
formula here is [ours], with the relative that it follows where there is one.

Shapes: B batch, L sequence length, T real positions of the whole batch, N items (row 0 is padding),
M modalities, D hidden size, H heads, K interest centres. Sequences are padded on the right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.errors import check_choice
from recbole_mm.layers.encoder import FeedForward, TransformerEncoder
from recbole_mm.ops.masking import masked_mean, masked_softmax, padding_mask
from recbole_mm.ops.packing import Packing, by_length
from recbole_mm.ops.propagation import propagate
from recbole_mm.ops.running_mean import running_softmax_mean

ATTENTIONS = ("centres", "running", "self", "global")
CAUSAL = ("running", "self")
FUSIONS = ("attention", "sum", "concat")


class ItemRelations(nn.Module):
    r"""One embedding table, carried over the item graph of every modality.

    .. math::
        H^m = (A^m)^{n} E

    The graphs stand on the diagonal of one matrix, so that a layer of all modalities is a single
    sparse product. Their tensors are buffers that are not saved.

    Source: [inferred: LATTICE, FREEDOM].

    Args:
        crow: ``(M * N + 1,)`` int64, CSR row starts of the block-diagonal matrix.
        col: ``(E,)`` int64.
        weight: ``(E,)`` floating point; the matrix is symmetric.
        n_modalities: Number of blocks ``M``.
        n_layers: Number of products ``n``; with 0 every :math:`H^m` is E.

    Shape:
        - embedding: ``(N, D)``
        - output: ``(M, N, D)``; zero where an item has no edge, unless ``n_layers`` is 0

    Raises:
        ValueError: If the tensors make no symmetric matrix of ``M`` blocks, or ``n_layers`` is
            negative.
    """

    crow: Tensor
    col: Tensor
    weight: Tensor

    def __init__(
        self, crow: Tensor, col: Tensor, weight: Tensor, n_modalities: int, n_layers: int
    ) -> None:
        super().__init__()
        if n_layers < 0:
            raise ValueError(f"n_graph_layers must be at least 0, got {n_layers}")
        size = len(crow) - 1
        if size % n_modalities:
            raise ValueError(f"{size} rows are not {n_modalities} blocks of one size")
        if not _is_symmetric(crow, col, weight):
            raise ValueError("the graphs are not symmetric, so that gradients would be wrong")
        self.n_modalities = n_modalities
        self.n_layers = n_layers
        self.register_buffer("crow", crow, persistent=False)
        self.register_buffer("col", col, persistent=False)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, embedding: Tensor) -> Tensor:
        """Carry the table over the graphs; shapes as in the class."""
        stacked = embedding.repeat(self.n_modalities, 1)  # (M * N, D)
        carried = propagate(self.crow, self.col, self.weight, stacked, self.n_layers)
        return carried.view(self.n_modalities, *embedding.shape)


def _is_symmetric(crow: Tensor, col: Tensor, weight: Tensor) -> bool:
    size = len(crow) - 1
    row = torch.arange(size, device=crow.device).repeat_interleave(crow.diff())
    if len(row) != len(col) or (len(col) and not 0 <= int(col.min()) <= int(col.max()) < size):
        return False
    there, there_order = (row * size + col).sort()
    back, back_order = (col * size + row).sort()
    return torch.equal(there, back) and torch.equal(weight[there_order], weight[back_order])


class InterestCentres(nn.Module):
    r"""The few vectors that stand for a history.

    ``centres``: the centres are the user's own, each a mean of the history under weights of its
    own. ``global``: the centres are shared by all users; a user has a share in each.

    .. math::
        c_k = \sum_l \operatorname{softmax}_l(s_l^\top \theta_k) \, s_l
        \qquad\text{or}\qquad
        c_k = K g_k \operatorname{mean}_l \operatorname{softmax}_k(s_l^\top g_k / \sqrt D)

    Source: ``centres`` [inferred: Fan et al., *Lighter and Better: Low-Rank Decomposed
    Self-Attention Networks for Next-Item Recommendation* (LightSANs), SIGIR 2021]; ``global``
    [inferred: the interests of MISSRec, MM 2023, here learned rather than found by clustering].

    Args:
        hidden_size: Width ``D``.
        k_interests: Number of centres ``K``, at least 1.
        shared: Whether the centres are shared by all users (``global``).

    Shape:
        - x: ``(B, L, D)``
        - visible: ``(B, L)`` bool, the real positions
        - output: ``(B, K, D)``; zero for a row without a real position
    """

    def __init__(self, hidden_size: int, k_interests: int, *, shared: bool) -> None:
        super().__init__()
        if k_interests < 1:
            raise ValueError(f"k_interests must be at least 1, got {k_interests}")
        self.shared = shared
        if shared:
            # entries of size one, as those of x, which leaves a layer norm
            self.centre = nn.Parameter(torch.randn(k_interests, hidden_size))  # g
        else:
            self.theta = nn.Linear(hidden_size, k_interests, bias=False)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Find the centres; shapes as in the class."""
        visible = visible.unsqueeze(-1)  # (B, L, 1)
        if self.shared:
            K, D = self.centre.shape
            belongs = (x @ self.centre.T * D**-0.5).softmax(-1)  # (B, L, K)
            share = masked_mean(belongs, visible, dim=1)  # (B, K)
            return K * share.unsqueeze(-1) * self.centre
        weights = masked_softmax(self.theta(x), visible, dim=1)  # (B, L, K)
        return weights.transpose(1, 2) @ x


class InterestLayer(nn.Module):
    r"""Positions attend to interest centres in place of each other.

    .. math::
        C = \operatorname{centres}(S), \quad
        S' = \operatorname{LN}(S + \operatorname{heads}(S, C)), \quad
        S'' = \operatorname{LN}(S' + \operatorname{FFN}(S'))

    The cost is linear in ``L``, and nothing but the centres and the attention to them is computed
    for padding. Centres see the whole row, later positions too: this is not causal. With
    ``running`` every position has centres of its own, those of the row up to there; the last one's
    are the same in both. They cost what grows with :math:`L^2 / 32`, sums of blocks for each
    position, and the maps of queries and keys are computed for padding too.

    Source: [inferred: LightSANs], ``running`` [ours]; attention and feed-forward layer as in
    :class:`~recbole_mm.layers.encoder.TransformerLayer`, save the bias of the keys.

    Args:
        k_interests: Number of centres ``K``.
        shared: Whether the centres are shared by all users, see :class:`InterestCentres`.
        running: Whether a position sees the centres of what came before it alone; with centres of
            the user's own only.
        n_heads: Heads ``H``; must divide ``hidden_size``.
        hidden_size: Width ``D``.
        inner_size: Width inside the feed-forward layer.
        hidden_dropout_prob: Dropout before each residual sum.
        attn_dropout_prob: Dropout on attention probabilities.
        hidden_act: Activation of the feed-forward layer.
        layer_norm_eps: Added to the variance in layer norm.

    Shape:
        - x: ``(T, D)``, the real positions of ``packing``
        - output: ``(T, D)``, or ``(B, D)`` for the last position of each row alone; what stands
          there for a row without a real position is finite and has no meaning

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        k_interests: int,
        *,
        shared: bool,
        running: bool,
        n_heads: int,
        hidden_size: int,
        inner_size: int,
        hidden_dropout_prob: float,
        attn_dropout_prob: float,
        hidden_act: str,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        if hidden_size % n_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of n_heads {n_heads}; change either"
            )
        if shared and running:
            raise ValueError("centres that users share do not run along with a history")
        self.running = running
        self.n_heads = n_heads
        self.attn_dropout = attn_dropout_prob
        self.centres = InterestCentres(hidden_size, k_interests, shared=shared)
        self.query = nn.Linear(hidden_size, hidden_size)
        # a bias of the keys would add the same to all scores of a query
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.feed_forward = FeedForward(
            hidden_size, inner_size, hidden_act, hidden_dropout_prob, layer_norm_eps
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)  # (B, H, ..., D/H)

    def forward(self, x: Tensor, packing: Packing, *, last: bool) -> Tensor:
        """Attend from every position, or from the last of each row; shapes as in the class."""
        padded = packing.pad(x)  # (B, L, D)
        if self.running and not last:
            heads = packing.pack(by_length(self._running, padded, packing.real.sum(1)))
        else:
            centres = self.centres(padded, packing.real)  # (B, K, D)
            if last:
                place = (packing.real.sum(1) - 1).clamp(min=0)
                x = padded[torch.arange(len(padded), device=x.device), place]  # (B, D)
            query = self.query(x)
            heads = F.scaled_dot_product_attention(
                self._heads(query.unsqueeze(1) if last else packing.pad(query)),
                self._heads(self.key(centres)),
                self._heads(self.value(centres)),
                dropout_p=self.attn_dropout if self.training else 0.0,
            )  # (B, H, 1 or L, D/H)
            heads = heads.transpose(1, 2).flatten(2)
            heads = heads.squeeze(1) if last else packing.pack(heads)
        x = self.LayerNorm(x + self.dropout(self.dense(heads)))
        y: Tensor = self.feed_forward(x)
        return y

    def _running(self, x: Tensor, _length: Tensor) -> Tensor:
        """Attention of every position to the centres of its prefix, (B, L, D); dense, unpacked."""
        # the maps of a mean are the means of the maps, and a position has K centres
        both = torch.cat([self.key(x), self.value(x)], dim=-1)
        means = running_softmax_mean(self.centres.theta(x), both)  # (B, L, K, 2 * D)
        B, L, K, _ = means.shape
        keys, values = means.view(B, L, K, 2, self.n_heads, -1).unbind(3)  # (B, L, K, H, D/H)
        query = self.query(x).view(B, L, 1, self.n_heads, -1)
        scores = (query * keys).sum(-1) * keys.size(-1) ** -0.5  # (B, L, K, H)
        weights = F.dropout(scores.softmax(2), self.attn_dropout, self.training)
        heads: Tensor = (weights.unsqueeze(-1) * values).sum(2).flatten(2)
        return heads


class History:
    """A batch of histories in one modality: what of them is there, side by side.

    Items without the modality are left out; the others keep the positions that they had.

    Args:
        item_seq: ``(B, L)`` ids, padded on the right with anything.
        length: ``(B,)`` integer, real positions of each row.
        present: ``(N,)`` bool, items that have the modality; ``None`` if all have it.

    Attributes:
        ids: ``(T,)`` items that have the modality, row by row.
        position: ``(T,)`` their positions in ``item_seq``.
        length: ``(B,)`` how many each row holds.
        packing: The way to rows ``(B, L)`` of these items alone, padded on the right.
        place: ``(B, L)`` by position of ``item_seq``, the place of the last of these items up to
            there; -1 before the first.
    """

    def __init__(self, item_seq: Tensor, length: Tensor, present: Tensor | None = None) -> None:
        kept = padding_mask(length, item_seq.size(1))  # (B, L)
        if present is not None:
            kept = kept & present[item_seq]
        index = kept.flatten().nonzero().squeeze(1)
        self.ids = item_seq.flatten()[index]
        self.position = index % item_seq.size(1)
        self.length = kept.sum(1)
        self.packing = Packing(self.length, item_seq.size(1))
        self.place = kept.cumsum(1) - 1


class ModalityInterest(nn.Module):
    r"""A user's interest in one modality, from the history in that modality alone.

    .. math::
        S = \operatorname{drop}(\operatorname{LN}(E[s] + p)), \qquad
        u = \operatorname{attention}(S)_{\text{last}}

    An item without the modality is neither a centre's nor a key, and does not ask: the last item
    that has the modality does.

    Args:
        attention: ``centres``, ``running``, ``global`` (all :class:`InterestLayer`), or ``self``: a
            causal Transformer. ``running`` and ``self`` see no later position.
        max_length: Longest sequence ``L``.
        k_interests: Number of centres of a layer; without effect for ``self``.
        n_layers: Number of layers, at least 1.
        n_heads: Heads ``H``; must divide ``hidden_size``.
        hidden_size: Width ``D``.
        inner_size: Width inside the feed-forward layers.
        hidden_dropout_prob: Dropout on the input and before each residual sum.
        attn_dropout_prob: Dropout on attention probabilities.
        hidden_act: Activation of the feed-forward layers.
        layer_norm_eps: Added to the variance in layer norm.

    Shape:
        - vectors: ``(N, D)``, the items in this modality
        - output: u ``(B, D)``; exactly zero, with a zero gradient, where the history is empty

    Raises:
        ValueError: If an argument is out of range or ``attention`` is unknown.
    """

    def __init__(
        self,
        attention: str,
        max_length: int,
        *,
        k_interests: int,
        n_layers: int,
        n_heads: int,
        hidden_size: int,
        inner_size: int,
        hidden_dropout_prob: float,
        attn_dropout_prob: float,
        hidden_act: str,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        check_choice("interest_attention", attention, ATTENTIONS)
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        self.attention = attention
        self.position_embedding = nn.Embedding(max_length, hidden_size)  # p
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.encoder: TransformerEncoder | None = None
        if attention == "self":
            self.encoder = TransformerEncoder(
                n_layers,
                n_heads,
                hidden_size,
                inner_size,
                hidden_dropout_prob,
                attn_dropout_prob,
                hidden_act,
                layer_norm_eps,
            )
        else:
            self.layer = nn.ModuleList(
                InterestLayer(
                    k_interests,
                    shared=attention == "global",
                    running=attention == "running",
                    n_heads=n_heads,
                    hidden_size=hidden_size,
                    inner_size=inner_size,
                    hidden_dropout_prob=hidden_dropout_prob,
                    attn_dropout_prob=attn_dropout_prob,
                    hidden_act=hidden_act,
                    layer_norm_eps=layer_norm_eps,
                )
                for _ in range(n_layers)
            )

    def _inputs(self, history: History, vectors: Tensor) -> Tensor:
        x = F.embedding(history.ids, vectors) + self.position_embedding(history.position)
        y: Tensor = self.dropout(self.norm(x))  # (T, D)
        return y

    def forward(self, history: History, vectors: Tensor) -> Tensor:
        """The user at the last position; shapes as in the class."""
        x = self._inputs(history, vectors)
        packing, length = history.packing, history.length
        if self.encoder is not None:
            return self.encoder.last(packing.pad(x), length)
        for i, layer in enumerate(self.layer):
            x = layer(x, packing, last=i == len(self.layer) - 1)
        return torch.where(length[:, None] > 0, x, 0.0)

    def states(self, history: History, vectors: Tensor) -> Tensor:
        """The user at every position, ``(B, L, D)``; for ``running`` and ``self`` only.

        A position whose item lacks the modality has the state of the last one before it that has
        it, and zero if there is none. What stands at padding is finite and has no meaning.

        Raises:
            ValueError: If the attention is not causal.
        """
        if self.attention not in CAUSAL:
            raise ValueError(
                "interest centres of a whole history see later positions; "
                f"use interest_attention: {' or '.join(CAUSAL)}"
            )
        x, packing = self._inputs(history, vectors), history.packing
        if self.encoder is not None:
            x = self.encoder(packing.pad(x), history.length)
        else:
            for layer in self.layer:
                x = layer(x, packing, last=False)
            x = packing.pad(x)
        place = history.place.unsqueeze(-1)  # (B, L, 1)
        return torch.where(place >= 0, x.gather(1, place.clamp(min=0).expand_as(x)), 0.0)


class InterestFusion(nn.Module):
    r"""Modalities of a user side by side, so that one product with the items' scores them all.

    .. math::
        v = [a_1 u^1; \dots; a_M u^M], \qquad
        \text{score}_i = v^\top [E^1_i; \dots; E^M_i] = \sum_m a_m \langle u^m, E^m_i \rangle

    ``attention``: :math:`a = \operatorname{softmax}(W [u^1; \dots; u^M])` over the modalities that
    the history holds. ``sum``: :math:`a_m = 1`. ``concat``: no weights,
    :math:`v = W [u^1; \dots; u^M]` mixes the modalities.

    Args:
        fusion: ``attention``, ``sum`` or ``concat``.
        n_modalities: Number ``M``. With one, ``attention`` has nothing to weigh and is ``sum``.
        hidden_size: Width ``D``.

    Shape:
        - users: ``(..., M, D)``
        - heard: ``(..., M)`` bool, modalities that the history holds
        - output: ``(..., M * D)``

    Raises:
        ValueError: If ``fusion`` is unknown.
    """

    def __init__(self, fusion: str, n_modalities: int, hidden_size: int) -> None:
        super().__init__()
        check_choice("fusion", fusion, FUSIONS)
        self.fusion = fusion if n_modalities > 1 or fusion == "concat" else "sum"
        width = n_modalities * hidden_size
        if self.fusion != "sum":
            out = n_modalities if fusion == "attention" else width
            self.mix = nn.Linear(width, out, bias=False)  # W

    def weights(self, users: Tensor, heard: Tensor) -> Tensor:
        """Weight of each modality, ``(..., M)``: zero for one that the history does not hold.

        Raises:
            ValueError: For ``concat``, which has none.
        """
        if self.fusion == "concat":
            raise ValueError("fusion: concat has no weight of a modality; use attention or sum")
        if self.fusion == "sum":
            return heard.to(users.dtype)
        return masked_softmax(self.mix(users.flatten(-2)), heard)

    def forward(self, users: Tensor, heard: Tensor) -> Tensor:
        """Fuse; shapes as in the class."""
        if self.fusion == "concat":
            mixed: Tensor = self.mix(users.flatten(-2))
            return mixed
        return (self.weights(users, heard).unsqueeze(-1) * users).flatten(-2)
