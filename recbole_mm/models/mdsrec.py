r"""MDSRec
################################################

Reference:
    "MDSRec", a model of modal item relations and modal interests for multimodal sequential
    recommendation. https://arxiv.org/abs/2412.08103

The abstract is public, the formulas are not. It fixes three parts:

====================================================  ======================================
modal-aware item relation graphs, with behaviour      :mod:`recbole_mm.data.item_graph`
they enhance item representations                     :class:`.ItemRelations`
interest-centralized attention, for each modality     :class:`.ModalityInterest`
the user's embeddings of the modalities are fused     :class:`.InterestFusion`
item vector, user vector, score, objective            :class:`MDSRec`
====================================================  ======================================

Every formula is [ours] or [inferred]; ``properties/model/MDSRec.yaml`` marks each choice.

Shapes: B batch, L sequence length, N items, M modalities (the id, if used, is the first), D hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from recbole_mm.config_rules import at_least, one_of, share
from recbole_mm.data import item_graph
from recbole_mm.errors import InputError
from recbole_mm.explain import Table, by_activity, weight_columns
from recbole_mm.layers.projection import ModalityProjection
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.modules.modality_interest import (
    ATTENTIONS,
    CAUSAL,
    FUSIONS,
    History,
    InterestFusion,
    ItemRelations,
    ModalityInterest,
)

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset
    from recbole_mm.explain import Material

ID = "id"
BEHAVIOUR = "behaviour"
N_NEIGHBOURS = 10  # of an item, in the tables of `explain`


class MDSRec(MultimodalSequentialRecommender):
    r"""Items enhanced over modal graphs, an interest in each modality, one score of all.

    .. math::
        E^m_i = W_m f^m_i + H^m_i, \qquad H^m = (A^m)^n E, \qquad
        \text{score}_i = \sum_m a_m \langle u^m, E^m_i \rangle

    with :math:`f^m` the frozen features, :math:`A^m` the item graph of modality m and E a trained
    embedding of the item ids, shared by all graphs. The id is one more modality: its content is E
    itself, its graph is the behaviour graph. Without a graph, ``n_graph_layers: 0``, H is E.

    An item without modality m has no edge in :math:`A^m` and no vector there: it adds nothing to
    the score of that modality and no user's interest is drawn from it. An item that never occurs
    in training does not have the modality ``id``, and its row of E is zero: nothing is known of it
    but its content and its neighbours, by which it is scored. An item without any modality has the
    score 0 for everyone; only with ``use_id: False`` can it occur in training.

    Interest centres are those of the history so far at every position (``running``), so that a
    window is trained at all of them; ``centres`` of the whole history, ``global`` ones, and
    ``self``, a causal Transformer, are options.

    Raises:
        InputError: If a key has an impossible value, or nothing describes an item.
    """

    explains_items: ClassVar[bool] = True
    no_all_positions_reason: ClassVar[str] = (
        "its interest centres see the whole history, later items too "
        "(interest_attention: running makes it see earlier ones only)"
    )

    @classmethod
    def offered_objectives(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """``all`` only with an attention that sees no later item."""
        return ("last", "all") if values["interest_attention"] in CAUSAL else ("last",)

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """As in the base class."""
        super().check_options(values)
        at_least(values, 1, "behaviour_window", "knn_k", "k_interests")
        at_least(values, 0, "behaviour_k", "n_graph_layers")
        share(values, "mix_beta")
        one_of(values, "relation_graph", item_graph.RELATION_GRAPHS)
        one_of(values, "interest_attention", ATTENTIONS)
        one_of(values, "fusion", FUSIONS)

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)
        hidden_size = config["hidden_size"]
        features = dataset.item_features
        names = features.names
        if BEHAVIOUR in names:
            raise InputError(
                f"modalities: {BEHAVIOUR!r} is the graph of who is consumed together; "
                "give that modality another name"
            )
        if not names and not config["use_id"]:
            raise InputError(
                "use_id is False and there is no modality: nothing describes an item; "
                "declare modalities or set use_id: True"
            )
        self.modality_names = (ID, *names) if config["use_id"] else names

        users, items = dataset.training_interactions()
        try:
            # a run folder brings its graphs along instead of the histories that made them
            stored: item_graph.ItemGraphs | None = getattr(dataset, "item_graphs", None)
            self.graphs = stored or item_graph.item_graphs(
                features,
                users,
                items,
                behaviour_window=config["behaviour_window"],
                behaviour_k=config["behaviour_k"],
                relation_graph=config["relation_graph"],
                knn_k=config["knn_k"],
                mix_beta=config["mix_beta"],
                cache_dir=config["feature_cache_dir"],
            )
            graph_of = {ID: self.graphs.behaviour, **self.graphs.modal}
            carried = [
                item_graph.symmetric_normalise(graph_of[name]) for name in self.modality_names
            ]

            # layers, in the order in which the data meets them
            self.item_embedding = nn.Embedding(self.n_items, hidden_size, padding_idx=0)  # E
            self.project = (
                ModalityProjection(features, hidden_size, norm=self.feature_norm)  # W
                if names
                else None
            )
            self.relations = ItemRelations(
                *_block_diagonal(carried),
                n_modalities=len(self.modality_names),
                n_layers=config["n_graph_layers"],
            )
            self.interest = nn.ModuleDict(
                {
                    name: ModalityInterest(
                        config["interest_attention"],
                        self.max_seq_length,
                        k_interests=config["k_interests"],
                        n_layers=config["n_layers"],
                        n_heads=config["n_heads"],
                        hidden_size=hidden_size,
                        inner_size=config["inner_size"],
                        hidden_dropout_prob=config["hidden_dropout_prob"],
                        attn_dropout_prob=config["attn_dropout_prob"],
                        hidden_act=config["hidden_act"],
                        layer_norm_eps=config["layer_norm_eps"],
                    )
                    for name in self.modality_names
                }
            )
            self.fuse = InterestFusion(config["fusion"], len(self.modality_names), hidden_size)
        except ValueError as error:
            raise InputError(str(error)) from error

        # constants; none of them is saved
        present = features.present  # (N, M)
        trained = torch.zeros(self.n_items, 1, dtype=torch.bool)
        trained[torch.from_numpy(items)] = True
        if config["use_id"]:
            present = torch.cat([trained, present], dim=1)
        self.register_buffer("trained", trained, persistent=False)
        self.register_buffer("present", present, persistent=False)
        self.has_all_items = present[1:].all(dim=0).tolist()

        self.apply(self._init_weights)

    # ------------------------------------------------------------------ items and users

    def item_table(self) -> Tensor:
        """Enhanced item vectors of all modalities side by side, ``(N, M * D)``."""
        # the loss would draw an item that is never a target away from everyone
        ids = torch.where(self.trained, self.item_embedding.weight, 0.0)  # (N, D)
        vectors = self.relations(ids).transpose(0, 1)  # H: (N, M, D)
        contents = []
        if ID in self.interest:
            contents.append(ids.unsqueeze(1))
        if self.project is not None:
            contents.append(self.project(self.all_items())[0])
        vectors = torch.cat(contents, dim=1) + vectors
        return torch.where(self.present.unsqueeze(-1), vectors, 0.0).flatten(1)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """Fused interests ``(B, M * D)`` at the last real position."""
        fused: Tensor = self.fuse(*self._interests(item_seq, item_seq_len, items))
        return fused

    def states(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """Fused interests ``(B, L, M * D)`` at every position, for a causal attention only."""
        fused: Tensor = self.fuse(*self._interests(item_seq, item_seq_len, items, everywhere=True))
        return fused

    def _interests(
        self, item_seq: Tensor, length: Tensor, items: Tensor, *, everywhere: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Interests u, (..., M, D), and which modalities the history holds, (..., M)."""
        tables = items.view(len(items), len(self.modality_names), -1).unbind(1)  # (N, D) each
        whole = History(item_seq, length)  # the same for all modalities that every item has
        users, heard = [], []
        for m, (name, table) in enumerate(zip(self.modality_names, tables, strict=True)):
            interest = cast(ModalityInterest, self.interest[name])
            history = (
                whole if self.has_all_items[m] else History(item_seq, length, self.present[:, m])
            )
            users.append(
                interest.states(history, table) if everywhere else interest(history, table)
            )
            heard.append(history.place >= 0 if everywhere else history.length > 0)
        return torch.stack(users, dim=-2), torch.stack(heard, dim=-1)

    # ------------------------------------------------------------------ objective

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor]:
        """Cross-entropy over the catalogue."""
        return (self.next_item_loss(interaction, self.item_table()),)

    # ------------------------------------------------------------------ interpretation

    def neighbours(self, item_id: int, modality: str, k: int) -> list[tuple[int, float]]:
        """Nearest neighbours of an item in the graph of a modality, or in ``behaviour``.

        In ``smooth`` a weight is the cosine of the smoothed features, in ``mix`` a share of
        features and behaviour, in ``behaviour`` the share of the counts.

        Args:
            item_id: Internal id.
            modality: Name of a modality, or ``behaviour``: who is consumed together.
            k: How many, at most.

        Returns:
            Internal ids and weights, heaviest first.

        Raises:
            InputError: If there is no such graph or item.
        """
        graphs = self._named_graphs()
        if modality not in graphs:
            raise InputError(f"no graph {modality!r}; choose one of {', '.join(graphs)}")
        try:
            return item_graph.neighbours(graphs[modality], item_id, k)
        except ValueError as error:
            raise InputError(str(error)) from error

    def graph_overlap(self, k: int) -> dict[tuple[str, str], float]:
        """Mean Jaccard index of an item's ``k`` neighbours, for each pair of graphs.

        The graphs are ``behaviour`` and those of the modalities.
        """
        return item_graph.overlap(self._named_graphs(), k)

    def _named_graphs(self) -> dict[str, sp.csr_matrix]:
        return {BEHAVIOUR: self.graphs.behaviour, **self.graphs.modal}

    @torch.no_grad()
    def modality_weights(self, interaction: Interaction) -> Tensor:
        """Weight a of each modality in the score, by user.

        Args:
            interaction: A batch of histories.

        Returns:
            ``(B, M)``, in the order of ``modality_names``; 0 for a modality that the history does
            not hold. With ``fusion: attention`` rows sum to one, with ``sum`` each modality weighs
            1.

        Raises:
            InputError: With ``fusion: concat``, which has no weights.
        """
        try:
            return self.fuse.weights(
                *self._interests(*self.histories(interaction), self.scoring_table())
            )
        except ValueError as error:
            raise InputError(str(error)) from error

    def explain(self, material: Material) -> dict[str, Table]:
        """Graphs between items, and what each modality weighs for the users of the test set.

        Returns:
            ``neighbours``: of each chosen item, its ``N_NEIGHBOURS`` nearest in each graph;
            ``graph_overlap``: :meth:`graph_overlap` by k, with two graphs or more;
            ``modality_by_user`` and ``modality_by_activity``: :meth:`modality_weights`, but for
            ``fusion: concat``, which has none.
        """
        tables = {
            "neighbours": Table(self._neighbour_frame(material), "MDSRec: nearest neighbours")
        }
        if self.graphs.modal:
            overlap = pd.DataFrame(
                {"k": k, **{f"{a} and {b}": v for (a, b), v in self.graph_overlap(k).items()}}
                for k in range(1, N_NEIGHBOURS + 1)
            )
            tables["graph_overlap"] = Table(
                overlap,
                "MDSRec: overlap of the item graphs",
                tuple(overlap.columns[1:]),
                "mean Jaccard index of the k nearest neighbours",
                kind="lines",
            )
        return tables if self.fuse.fusion == "concat" else {**tables, **self._weights(material)}

    def _neighbour_frame(self, material: Material) -> pd.DataFrame:
        tokens = material.item_tokens
        rows = [
            (tokens[item], graph, rank, tokens[other], weight)
            for item in material.items
            for graph in self._named_graphs()
            for rank, (other, weight) in enumerate(self.neighbours(item, graph, N_NEIGHBOURS), 1)
        ]
        return pd.DataFrame(rows, columns=["item", "graph", "rank", "neighbour", "weight"])

    def _weights(self, material: Material) -> dict[str, Table]:
        names = weight_columns(self.modality_names)
        parts = []
        for batch in material.batches():
            values = self.modality_weights(batch).cpu().numpy()
            weights = pd.DataFrame(values, columns=list(names))
            weights.insert(0, "user", material.users(batch))
            weights.insert(1, "history_length", self.histories(batch)[1].cpu().numpy())
            parts.append(weights)
        users = pd.concat(parts, ignore_index=True)
        what = "weight of a modality in the score"
        return {
            "modality_by_user": Table(
                users,
                "MDSRec, test histories: modalities by user",
                names,
                what,
                kind="spread",
            ),
            "modality_by_activity": Table(
                by_activity(users, names),
                "MDSRec, test histories: modalities by user activity",
                names,
                f"mean {what}",
            ),
        }


def _block_diagonal(graphs: list[sp.csr_matrix]) -> tuple[Tensor, Tensor, Tensor]:
    """One CSR matrix with the graphs on its diagonal: row starts, columns, weights."""
    together = sp.block_diag(graphs, format="csr")
    return (
        torch.from_numpy(together.indptr).long(),
        torch.from_numpy(together.indices).long(),
        torch.from_numpy(together.data).float(),
    )
