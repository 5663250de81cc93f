from __future__ import annotations

import pytest
import scipy.sparse as sp
import torch
from torch.testing import assert_close

from recbole_mm.modules.modality_interest import (
    ATTENTIONS,
    CAUSAL,
    History,
    InterestCentres,
    InterestFusion,
    InterestLayer,
    ItemRelations,
    ModalityInterest,
)
from tests.reference import encoder
from tests.reference import mdsrec as reference

N, L, D, H, K, M = 9, 6, 8, 2, 3, 3
# the last row holds nothing but items 3 and 5, which lack the modality
SEQUENCES = [[1, 2, 3, 4, 5, 6], [7], [3, 8, 8, 5], [3, 5]]
PRESENT = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1], dtype=torch.bool)


def padded(sequences, length=L, padding=0):
    """Ids and lengths."""
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in sequences])
    return ids, torch.tensor([len(row) for row in sequences])


def vectors(dtype=torch.float64):
    return torch.randn(N, D, dtype=dtype, requires_grad=True)


def interest(attention, n_layers=2, dropout=0.0, seed=0, **changes):
    torch.manual_seed(seed)
    module = ModalityInterest(
        attention,
        **{"max_length": L, "k_interests": K, "n_heads": H, "hidden_size": D}
        | {"hidden_dropout_prob": dropout, "attn_dropout_prob": dropout}
        | changes,
        n_layers=n_layers,
        inner_size=12,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    return module.double()


def gradients(inputs, output):
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((weight * output).sum(), inputs)


# ------------------------------------------------------------------------------- relations


def graphs(n=M):
    """Symmetric graphs (N, N); the first node has no edge in any."""
    half = torch.rand(n, N, N, dtype=torch.float64) * (torch.rand(n, N, N) < 0.4)
    both = half + half.transpose(1, 2)
    both[:, 0] = both[:, :, 0] = 0
    return both


def block_diagonal(dense):
    matrix = sp.block_diag([sp.csr_matrix(g.numpy()) for g in dense], format="csr")
    return (
        torch.from_numpy(matrix.indptr).long(),
        torch.from_numpy(matrix.indices).long(),
        torch.from_numpy(matrix.data),
    )


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_relations_carry_one_table_over_each_graph(n_layers):
    dense, table = graphs(), vectors()
    relations = ItemRelations(*block_diagonal(dense), M, n_layers)
    ours = relations(table)
    theirs = torch.stack([reference.propagate(graph, table, n_layers) for graph in dense])
    assert_close(ours, theirs)
    assert_close(gradients([table], ours), gradients([table], theirs))


def test_relations_save_nothing():
    assert ItemRelations(*block_diagonal(graphs()), M, 1).state_dict() == {}


def test_graphs_that_are_not_symmetric_are_refused():
    crow, col, weight = block_diagonal(graphs())
    with pytest.raises(ValueError, match="not symmetric"):
        ItemRelations(crow, col, weight + torch.arange(len(weight)), M, 1)
    with pytest.raises(ValueError, match="not symmetric"):
        ItemRelations(crow, (col + 1) % (M * N), weight, M, 1)
    with pytest.raises(ValueError, match="not symmetric"):
        ItemRelations(crow, col + N * M, weight, M, 1)


def test_wrong_sizes_of_relations_are_refused():
    with pytest.raises(ValueError, match="27 rows are not 2 blocks"):
        ItemRelations(*block_diagonal(graphs()), 2, 1)
    with pytest.raises(ValueError, match="n_graph_layers must be at least 0, got -1"):
        ItemRelations(*block_diagonal(graphs()), M, -1)


# ------------------------------------------------------------------------------- centres


@pytest.mark.parametrize("shared", [False, True])
def test_centres_equal_loop_reference_in_value_and_gradient(shared):
    module = InterestCentres(D, K, shared=shared).double()
    x = torch.randn(3, L, D, dtype=torch.float64, requires_grad=True)
    length = torch.tensor([L, 1, 4])
    ours = module(x, torch.arange(L) < length[:, None])
    parameter = next(module.parameters())
    loop = reference.shared_centres if shared else reference.own_centres
    theirs = torch.stack(
        [torch.stack(loop(list(x[i, :n]), parameter)) for i, n in enumerate(length)]
    )
    assert_close(ours, theirs)
    assert_close(gradients([x, parameter], ours), gradients([x, parameter], theirs))


@pytest.mark.parametrize("shared", [False, True])
def test_centres_of_an_empty_row_are_zero_in_value_and_gradient(shared):
    module = InterestCentres(D, K, shared=shared)
    x = torch.randn(2, L, D, requires_grad=True)
    centres = module(x, torch.zeros(2, L, dtype=torch.bool))
    assert centres.eq(0).all()
    for gradient in gradients([x, *module.parameters()], centres):
        assert gradient.eq(0).all()


def test_shared_centres_start_at_the_size_of_what_leaves_a_layer_norm():
    assert InterestCentres(64, 50, shared=True).centre.std().item() == pytest.approx(1.0, rel=0.1)


def test_without_a_centre_is_refused():
    with pytest.raises(ValueError, match="k_interests must be at least 1, got 0"):
        InterestCentres(D, 0, shared=False)


# ------------------------------------------------------------------------------- history


def test_history_leaves_out_items_without_the_modality():
    history = History(*padded(SEQUENCES), PRESENT)
    assert history.ids.tolist() == [1, 2, 4, 6, 7, 8, 8]
    assert history.position.tolist() == [0, 1, 3, 5, 0, 1, 2]
    assert history.length.tolist() == [4, 1, 2, 0]
    assert history.packing.pad(history.ids)[2].tolist() == [8, 8, 0, 0, 0, 0]
    assert history.place[2].tolist() == [-1, 0, 1, 1, 1, 1]


def test_history_of_a_modality_that_all_items_have_is_the_sequence():
    everything = PRESENT.new_ones(N)
    for history in (History(*padded(SEQUENCES)), History(*padded(SEQUENCES), everything)):
        assert history.ids.tolist() == [item for row in SEQUENCES for item in row]
        assert history.length.tolist() == [6, 1, 4, 2]


# ------------------------------------------------------------------------------- interest


def loop(module, attention, table, present):
    """The user in one modality by the loop over users."""
    state = dict(module.named_parameters())
    n_layers = len(module.encoder.layer if attention == "self" else module.layer)
    users = []
    for row in SEQUENCES:
        if attention != "self":
            user = reference.interest(state, row, table, present, n_layers, attention, H)
        else:
            own = {k.removeprefix("encoder."): v for k, v in state.items()}
            rows = reference.inputs(state, row, table, present, 1e-12)
            n = len(rows)
            user = encoder.transformer(own, rows, n, n_layers, H)[-1:]
            user = user[0] if user else torch.zeros(D, dtype=table.dtype)
        users.append(user)
    return torch.stack(users)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("present", [None, PRESENT], ids=["all", "some"])
def test_interest_equals_loop_reference_in_value_and_gradient(attention, n_layers, present):
    module, table = interest(attention, n_layers), vectors()
    ours = module(History(*padded(SEQUENCES), present), table)
    known = PRESENT.new_ones(N) if present is None else present
    theirs = loop(module, attention, table, known)
    assert_close(ours, theirs)
    inputs = [table, *module.parameters()]
    assert_close(gradients(inputs, ours), gradients(inputs, theirs))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_and_batch_mates_do_not_matter(attention):
    module, table = interest(attention), vectors()
    together = module(History(*padded(SEQUENCES), PRESENT), table)
    for i, row in enumerate(SEQUENCES):
        alone = module(History(*padded([row], len(row)), PRESENT), table)
        assert_close(alone[0], together[i])
    assert_close(module(History(*padded(SEQUENCES, L, padding=2), PRESENT), table), together)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_absent_items_have_no_influence(attention):
    module, table = interest(attention), vectors()
    disturbed = torch.where(PRESENT[:, None], table, torch.nan)
    history = History(*padded(SEQUENCES), PRESENT)
    assert_close(module(history, disturbed), module(history, table))
    # items 3 and 5 may as well be other ones that are absent
    swapped = [[{3: 5, 5: 3}.get(i, i) for i in row] for row in SEQUENCES]
    assert_close(module(History(*padded(swapped), PRESENT), table), module(history, table))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_batch_of_empty_histories_is_zero_in_value_and_gradient(attention):
    module, table = interest(attention), vectors()
    user = module(History(*padded([[3, 5], [3]]), PRESENT), table)
    assert user.shape == (2, D)
    assert user.eq(0).all()
    for gradient in torch.autograd.grad(
        user.sum(), [table, *module.parameters()], allow_unused=True
    ):
        assert gradient is None or gradient.eq(0).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_gets_a_gradient(attention):
    module = interest(attention, dropout=0.1)
    (module(History(*padded(SEQUENCES)), vectors()) ** 3).sum().backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("attention", ["centres", "global", "running"])
def test_dropout_falls_in_training_only(attention):
    module, table = interest(attention, dropout=0.5), vectors()
    history = History(*padded(SEQUENCES))
    assert not torch.equal(module(history, table), module(history, table))
    module.eval()
    assert torch.equal(module(history, table), module(history, table))


@pytest.mark.parametrize("attention", ["centres", "global", "running"])
def test_dropout_of_attention_falls_on_its_weights(attention):
    module, table = interest(attention, attn_dropout_prob=0.5), vectors()
    history = History(*padded(SEQUENCES))
    assert not torch.equal(module(history, table), module(history, table))


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("n_layers", [1, 2])
def test_causal_states_equal_the_last_state_of_every_prefix(attention, n_layers):
    module, table = interest(attention, n_layers), vectors()
    states = module.states(History(*padded(SEQUENCES), PRESENT), table)
    for i, row in enumerate(SEQUENCES):
        for n in range(1, len(row) + 1):
            prefix = module(History(*padded([row[:n]]), PRESENT), table)
            assert_close(states[i, n - 1], prefix[0])


@pytest.mark.parametrize("attention", ["centres", "global"])
def test_centres_of_whole_histories_have_no_state_at_other_positions(attention):
    with pytest.raises(ValueError, match="use interest_attention: running or self"):
        interest(attention).states(History(*padded(SEQUENCES)), vectors())


def test_dropout_on_running_centres_is_that_on_centres():
    """Attention weights are dropped in both forms of a layer, with the same expectation."""
    torch.manual_seed(1)
    module, table = interest("running", n_layers=1), vectors()
    history = History(*padded(SEQUENCES))
    module.layer[0].attn_dropout = 0.5
    assert not torch.equal(module.states(history, table), module.states(history, table))
    # before what is not linear: the mean over many draws is the value without dropout
    layer, x = module.layer[0], torch.randn(1, 5, D, dtype=torch.float64)
    with torch.no_grad():
        mean = layer._running(x.expand(20_000, 5, D), torch.full((20_000,), 5)).mean(0)
        layer.attn_dropout = 0.0
        assert_close(mean, layer._running(x, torch.tensor([5]))[0], atol=0.03, rtol=0)


def test_one_running_layer_has_the_last_state_of_centres():
    running, whole, table = interest("running", 1), interest("centres", 1), vectors()
    whole.load_state_dict(running.state_dict())
    history = History(*padded(SEQUENCES), PRESENT)
    assert_close(running(history, table), whole(history, table))


def test_centres_that_users_share_do_not_run():
    with pytest.raises(ValueError, match="do not run along"):
        InterestLayer(
            K,
            shared=True,
            running=True,
            n_heads=H,
            hidden_size=D,
            inner_size=12,
            hidden_dropout_prob=0,
            attn_dropout_prob=0,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "center"}, "'center' is unknown; use one of centres, running, self, global"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"k_interests": -1}, "k_interests must be at least 1, got -1"),
        ({"n_heads": 3}, "hidden_size 8 is not a multiple of n_heads 3"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        interest(**{"attention": "centres"} | changes)


# ------------------------------------------------------------------------------- fusion


def users_and_heard():
    users = torch.randn(4, M, D, dtype=torch.float64, requires_grad=True)
    heard = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    return users, heard


def test_attention_fusion_equals_loop_reference_in_value_and_gradient():
    module = InterestFusion("attention", M, D).double()
    users, heard = users_and_heard()
    theirs = torch.stack(
        [
            reference.attention_fusion(u, h, module.mix.weight)
            for u, h in zip(users, heard, strict=True)
        ]
    )
    assert_close(module.weights(users, heard), theirs)
    fused = (theirs.unsqueeze(-1) * users).flatten(1)
    assert_close(module(users, heard), fused)
    inputs = [users, module.mix.weight]
    assert_close(gradients(inputs, module(users, heard)), gradients(inputs, fused))


@pytest.mark.parametrize("fusion", ["attention", "sum"])
def test_fused_score_is_the_weighted_sum_of_the_modalities_scores(fusion):
    module = InterestFusion(fusion, M, D).double()
    users, heard = users_and_heard()
    items = torch.randn(N, M, D, dtype=torch.float64)
    score = module(users, heard) @ items.flatten(1).T
    weights = module.weights(users, heard)
    expected = sum(weights[:, m, None] * (users[:, m] @ items[:, m].T) for m in range(M))
    assert_close(score, expected)


def test_sum_weighs_every_modality_that_is_there_alike():
    users, heard = users_and_heard()
    assert_close(InterestFusion("sum", M, D).weights(users, heard), heard.double())


def test_concat_mixes_the_modalities_and_has_no_weights():
    module = InterestFusion("concat", M, D).double()
    users, heard = users_and_heard()
    assert_close(module(users, heard), users.flatten(1) @ module.mix.weight.T)
    with pytest.raises(ValueError, match="use attention or sum"):
        module.weights(users, heard)


def test_attention_over_one_modality_has_nothing_to_learn():
    module = InterestFusion("attention", 1, D)
    assert list(module.parameters()) == []
    users = torch.randn(5, 1, D)
    assert_close(module(users, torch.ones(5, 1, dtype=torch.bool)), users.flatten(1))


def test_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="'gate' is unknown; use one of attention, sum, concat"):
        InterestFusion("gate", M, D)
