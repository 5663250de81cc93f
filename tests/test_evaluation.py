"""Evaluation: equal to RecBole's, unbiased in ties, bounded in memory; results of single users."""

import json
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector as RecBoleCollector
from recbole.evaluator import Evaluator as RecBoleEvaluator
from recbole.evaluator.register import metric_types
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType
from torch.utils._python_dispatch import TorchDispatchMode

import recbole_mm
from recbole_mm.config import Config
from recbole_mm.errors import InputError, NumericalError
from recbole_mm.evaluation import Collector, Evaluator, PerUser, Ranker, per_user
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.ops.ranking import places, tie_keys, top_k
from recbole_mm.quick_start import _eval_batch_unit

RANKING = sorted(name for name, kind in metric_types.items() if kind == EvaluatorType.RANKING)


class Scores(torch.nn.Module):
    """A model whose scores are a table of users and items."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def full_sort_predict(self, interaction):
        return self.table[interaction["user_id"]].clone()


class Vectors(MultimodalSequentialRecommender):
    """A model of ours whose users have fixed vectors."""

    def __init__(self, users, items):
        torch.nn.Module.__init__(self)
        self.users, self.items = users, items

    def scoring_table(self):
        return self.items

    def user_vectors(self, interaction):
        return self.users[interaction["user_id"]]


def configure(topk, metrics=RANKING, **values):
    """A configuration as the evaluator reads it; ours of `tiny` with other metrics."""
    config = Config("BPR", "tiny", config_dict={"mask_history": True})
    final = {"topk": list(topk), "metrics": list(metrics), "metric_decimal_place": 12, **values}
    config.final_config_dict.update(final)
    return config


def ranker(model, n_items, config, tile=None):
    made = Ranker(model, config, SimpleNamespace(item_num=n_items))
    if tile:
        made.tile = made.most_scores = tile
    return made


def batch_of(n_users, history, targets, first=0):
    """A batch of RecBole's loader: sets of masked items and of targets for each user."""
    pairs = [
        tuple(torch.tensor([p[i] for p in of], dtype=torch.long) for i in (0, 1))
        for of in (
            [(row, item) for row, items in enumerate(sets) for item in sorted(items)]
            for sets in (history, targets)
        )
    ]
    users = Interaction({"user_id": torch.arange(first, first + n_users)})
    return users, pairs[0], *pairs[1]


def evaluate(collector, config, batches, counts):
    """RecBole's metrics of what a collector, RecBole's or ours, makes of some batches."""
    collector.data_struct.set("data.num_items", len(counts) + 1)
    for batch in batches:
        collector.eval_batch_collect(*batch)
    collector.data_struct.set("data.count_items", counts)
    # RecBole 1.2.1 cannot hand out numbers and counters
    ours = isinstance(collector, Collector)
    struct = collector.get_data_struct() if ours else collector.data_struct
    return (Evaluator if ours else RecBoleEvaluator)(config).evaluate(struct)


def by_recbole(config, table, batches, counts):
    """RecBole's own masking, collector and evaluator."""

    def scored():
        for users, history, positive_u, positive_i in batches:
            scores = table[users["user_id"]].clone()
            scores[:, 0] = -torch.inf
            scores[history] = -torch.inf
            yield scores, users, positive_u, positive_i

    return evaluate(RecBoleCollector(config), config, scored(), counts)


def by_us(config, made, batches, counts):
    collector = Collector(config)
    ranked = ((made(b, **collector.wants), b[0], b[2], b[3]) for b in batches)
    return evaluate(collector, config, ranked, counts)


@st.composite
def worlds(draw):
    """Scores without ties, masks, targets of each user, and cut-offs."""
    n_users, n_items = draw(st.integers(1, 12)), draw(st.integers(6, 700))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shuffled = rng.permuted(np.tile(np.arange(n_items), (n_users, 1)), axis=1)
    table = torch.tensor(shuffled - n_items / 3, dtype=torch.float32)
    topk = draw(st.lists(st.integers(1, min(20, n_items // 3)), min_size=1, max_size=3))
    history, targets = [], []
    for _ in range(n_users):
        items = rng.permutation(np.arange(1, n_items))
        n_targets = 1 if draw(st.booleans()) else int(rng.integers(1, n_items // 4 + 1))
        n_masked = int(rng.integers(0, n_items - n_targets - max(topk)))
        targets.append(set(items[:n_targets].tolist()))
        history.append(set(items[n_targets : n_targets + n_masked].tolist()))
    counts = dict(enumerate(rng.integers(1, 99, n_items - 1).tolist(), start=1))
    return table, history, targets, topk, counts


@settings(deadline=None, max_examples=60)
@given(worlds(), st.integers(1, 12), st.integers(1, 3000))
def test_every_ranking_metric_is_recboles_where_scores_have_no_ties(world, batch, tile):
    table, history, targets, topk, counts = world
    config = configure(topk)
    batches = [
        batch_of(len(targets[i : i + batch]), history[i : i + batch], targets[i : i + batch], i)
        for i in range(0, len(targets), batch)
    ]
    theirs = by_recbole(config, table, batches, counts)
    ours = by_us(config, ranker(Scores(table), table.size(1), config, tile), batches, counts)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 1 + len(set(topk)) * (len(RANKING) - 1)
    assert dict(ours) == pytest.approx(dict(theirs), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([2, 7, 100, 1400]),
    k=st.integers(1, 25),
    levels=st.sampled_from([1, 2, 30, 10**6]),
    width=st.integers(60, 1600),
)
def test_ranks_and_lists_follow_one_total_order_in_any_chunks(seed, n_items, k, levels, width):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (6, n_items), generator=generator).float()
    scores[torch.rand(6, n_items, generator=generator) < 0.2] = -torch.inf
    scores[:, 0] = -torch.inf
    users = torch.arange(40, 46)
    keys = tie_keys(users[:, None], torch.arange(n_items))
    order = [
        sorted(
            (i for i in range(n_items) if scores[row, i] > -torch.inf),
            key=lambda i, row=row: (-scores[row, i].item(), keys[row, i].item()),
        )
        for row in range(6)
    ]

    def chunks():
        return [(a, scores[:, a : a + width]) for a in range(0, n_items, width)]

    assert top_k(chunks, users, k)[1].tolist() == [(row + [0] * k)[:k] for row in order]
    pairs = [(row, item) for row in range(6) for item in order[row][:: max(1, n_items // 9)]]
    rows, items = (torch.tensor([p[i] for p in pairs], dtype=torch.long) for i in (0, 1))
    found = places(chunks, users, rows, items)
    assert found.ranks.tolist() == [order[row].index(item) + 1 for row, item in pairs]
    above = [(scores[row] > scores[row, item]).sum().item() for row, item in pairs]
    equal = [(scores[row] == scores[row, item]).sum().item() for row, item in pairs]
    mean = [a + (e + 1) / 2 for a, e in zip(above, equal, strict=True)]
    assert found.mean_ranks.tolist() == pytest.approx(mean)
    assert found.n_candidates.tolist() == [len(row) for row in order]


@pytest.mark.parametrize("n_tied", [3, 40, 199])
def test_case_35_a_tie_gives_the_expected_metric_of_all_its_orders(n_tied):
    """The target is tied with others at the head; a constant scorer ties all items.

    Targets are always the same item, of the lowest id, whom ``torch.topk`` would favour.
    """
    n_users, n_items = 6_000, 200
    row = torch.linspace(-1, -2, n_items)
    row[1 : n_tied + 1] = 0.5
    config = configure([10], ["Hit", "MRR", "NDCG", "GAUC"])
    batch = batch_of(n_users, [set()] * n_users, [{1}] * n_users)
    ours = by_us(config, ranker(Scores(row.repeat(n_users, 1)), n_items, config), [batch], {})
    place = np.arange(1, n_tied + 1)
    listed = place <= 10
    for name, value in {
        "hit@10": listed * 1.0,
        "mrr@10": listed / place,
        "ndcg@10": listed / np.log2(place + 1),
    }.items():
        error = value.std() / math.sqrt(n_users)
        assert abs(ours[name] - value.mean()) <= 3 * error, name
    assert ours["gauc"] == pytest.approx(1 - (n_tied - 1) / 2 / (n_items - 2), abs=1e-9)


def test_a_row_with_fewer_candidates_than_k_lists_nothing_twice_and_nothing_masked():
    config = configure([5], ["Hit", "ItemCoverage"])
    batch = batch_of(2, [{1, 2, 3, 4, 5}, set()], [{6}, {6}])
    made = ranker(Scores(torch.ones(2, 8)), 8, config)(batch, k=5, placed=True)
    assert sorted(made.topk[0].tolist()) == [0, 0, 0, 6, 7]
    assert made.hits[0].sum() == 1
    assert len(set(made.topk[1].tolist())) == 5
    with pytest.raises(InputError, match=r"topk \[5\]: a user has fewer candidates than 5"):
        Collector(config).eval_batch_collect(made, *batch[:1], None, None)


# ------------------------------------------------------------------ models


STOCK = [
    *("SASRecFast", "SASRecMM", "MUFASA", "CAMMSR", "MDSRec"),
    *("SASRec", "GRU4Rec", "BPR", "LightGCN", "MultiVAE", "NeuMF"),
]


@pytest.mark.parametrize("name", STOCK)
def test_models_get_the_metrics_of_recboles_trainer(name, build_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # RecBole's trainer writes there
    general = name in ("BPR", "LightGCN", "MultiVAE", "NeuMF")
    trainer, world = build_trainer(
        name,
        metrics="[NDCG, MRR, Hit, Recall, MAP, Precision, GAUC]",
        metric_decimal_place=10,
        mask_history=general,  # RecBole always masks for general models
        repeatable=not general,
        eval_memory_mb=1,
    )
    stock = Trainer(world.config, world.model)
    theirs = stock.evaluate(world.test, load_best_model=False)
    ours = trainer.evaluate(world.test, load_best_model=False)
    assert dict(ours) == pytest.approx(dict(theirs), abs=1e-6)
    assert 0 < ours["ndcg@10"] < 1


@pytest.mark.parametrize("mode", ["uni20", "pop20"])
@pytest.mark.parametrize("name", ["SASRecFast", "BPR"])
def test_sampled_candidates_get_the_metrics_of_recboles_trainer(
    mode, name, build_trainer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trainer, world = build_trainer(
        name,
        eval_args=f"{{split: {{LS: valid_and_test}}, order: TO, group_by: user, mode: {mode}}}",
        metrics="[NDCG, MRR, Hit, GAUC]",
        metric_decimal_place=10,
    )
    # our trainer makes the loader draw the same candidates in every pass, RecBole's passes too
    ours = trainer.evaluate(world.test, load_best_model=False)
    np.random.seed(3)  # noqa: NPY002  (what RecBole's samplers draw from)
    theirs = Trainer(world.config, world.model).evaluate(world.test, load_best_model=False)
    assert dict(ours) == pytest.approx(dict(theirs), abs=1e-6)
    with torch.no_grad():
        (world.model.item_embedding.weight[1:]).fill_(math.nan)
    with pytest.raises(NumericalError, match="score of a sampled item is nan"):
        trainer.evaluate(world.test, load_best_model=False)


def test_every_ranking_metric_of_recbole_works_in_a_run():
    """RecBole 1.2.1 fails on its own metrics of coverage and popularity."""
    values = {"metrics": [*RANKING], "valid_metric": "ndcg@10", "epochs": 1, "topk": [10]}
    values |= {"show_progress": False}
    result = recbole_mm.run("BPR", "tiny", config_dict=values, saved=False)["test_result"]
    assert {key.partition("@")[0] for key in result} == set(RANKING)
    assert all(math.isfinite(value) for value in result.values())


# ------------------------------------------------------------------ pieces, memory, faults


class Peak(TorchDispatchMode):
    """Most bytes of tensors that were alive at once and made inside the block."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if not place or place in self.seen:
            return
        self.seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.seen.discard(place)
            self.now -= size

        weakref.finalize(storage, gone)


def product_world(n_users, n_items, seed=0):
    """Whole numbers: products are exact in any order, and often tied."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(-4, 5, (n_users, 8), generator=generator).float()
    items = torch.randint(-4, 5, (n_items, 8), generator=generator).float()
    targets = torch.randint(1, n_items, (n_users,), generator=generator).tolist()
    history = [{(t + d) % (n_items - 1) + 1 for d in range(1, 9)} - {t} for t in targets]
    return users, items, batch_of(n_users, history, [{t} for t in targets])


@pytest.mark.parametrize("tile", [200, 5_000, 60_000])
def test_pieces_of_any_size_give_the_same_ranks_and_lists(tile):
    users, items, batch = product_world(150, 900)
    config = configure([10])
    whole = ranker(Scores(users @ items.T), 900, config)(batch, k=10, placed=True)
    some = ranker(Vectors(users, items), 900, config, tile)(batch, k=10, placed=True)
    for one, other in zip((*whole[:5], *whole[5]), (*some[:5], *some[5]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["vectors", "scores"])
def test_memory_does_not_grow_with_users_or_items(form):
    config = configure([10], eval_memory_mb=16)
    peaks = []
    for n_users, n_items in ((100, 20_000), (400, 20_000), (100, 40_000)):
        users, items, batch = product_world(n_users, n_items)
        made = ranker({"vectors": Vectors, "scores": OnDemand}[form](users, items), n_items, config)
        with Peak() as memory:
            made(batch, k=10, placed=True)
        peaks.append(memory.peak / 2**20)
    assert max(peaks) < 16
    assert max(peaks) < 1.5 * min(peaks)


class OnDemand(torch.nn.Module):
    """A model like RecBole's: scores of all items, for as many users as it is asked."""

    def __init__(self, users, items):
        super().__init__()
        self.users, self.items = users, items

    def full_sort_predict(self, interaction):
        return self.users[interaction["user_id"]] @ self.items.T


def test_case_36_a_large_evaluation_stays_within_its_budget():
    generator = torch.Generator().manual_seed(0)
    # whole numbers, so that products are exact in any order
    users, items = (
        torch.randint(-500, 500, (n, 8), generator=generator).float() for n in (5_000, 100_000)
    )
    config = configure([10], eval_memory_mb=256)
    made, rows = ranker(Vectors(users, items), 100_000, config), torch.arange(1_000)
    found = []
    with Peak() as memory:
        for first in range(0, 5_000, 1_000):
            batch = Interaction({"user_id": rows + first}), None, rows, 1 + (rows + first) * 7
            found.append(made(batch, k=10, placed=first == 0))
    assert memory.peak < 256 * 2**20
    scores = users[:50] @ items.T
    scores[:, 0] = -torch.inf
    assert torch.equal(scores.gather(1, found[0].topk[:50]), scores.topk(10).values)
    targets = scores.gather(1, found[0].targets[:50, None])
    ranks = found[0].places.ranks[:50]
    assert ((scores > targets).sum(1) < ranks).all()
    assert (ranks <= (scores >= targets).sum(1)).all()


def test_case_37_a_full_device_halves_the_users_and_finishes(caplog):
    table = torch.randn(20, 50)

    class Cramped(Scores):
        def full_sort_predict(self, interaction):
            if len(interaction) > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().full_sort_predict(interaction)

    config = configure([5])
    batch = batch_of(20, [{2}] * 20, [{1}] * 20)
    with caplog.at_level("WARNING"):
        small = ranker(Cramped(table), 50, config)(batch, k=5, placed=True)
    roomy = ranker(Scores(table), 50, config)(batch, k=5, placed=True)
    assert torch.equal(small.topk, roomy.topk)
    assert torch.equal(small.places.ranks, roomy.places.ranks)
    assert caplog.messages == [
        f"evaluation: out of device memory, going on with {n} users" for n in (10, 5, 2)
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_case_34_a_score_that_is_not_finite_is_named(value):
    config = configure([5])
    table = torch.randn(9, 600)
    table[6, 521] = value
    batch = batch_of(9, [set()] * 9, [{1}] * 9)
    with pytest.raises(NumericalError, match=rf"item id 521 in row 6 is {value}"):
        ranker(Scores(table), 600, config, 1_900)(batch, k=5, placed=False)
    table[6, 521], table[:, 0] = 3e38, math.nan  # padding is nobody's business
    table[6, 520] = 3e38  # nor is a sum that overflows
    assert ranker(Scores(table), 600, config)(batch, k=5, placed=False).topk.shape == (9, 5)


@pytest.mark.parametrize(
    ("model", "mode", "unit"),
    [
        ("SASRec", "full", 1),
        ("BPR", "full", 121),
        ("SASRec", "uni20", 21),
        ("BPR", "pop20", 21),
        ("BPR", "{valid: uni20, test: full}", 121),
        ("FM", "labeled", 1),
    ],
)
def test_a_batch_has_eval_batch_size_users_in_every_mode(model, mode, unit):
    arguments = f"{{split: {{LS: valid_and_test}}, order: TO, group_by: user, mode: {mode}}}"
    values = {"eval_args": arguments, "eval_batch_size": 32}
    if mode == "labeled":
        values |= {"metrics": "[AUC]", "valid_metric": "AUC"}
    assert _eval_batch_unit(Config(model, "tiny", config_dict=values), 121) == unit


# ------------------------------------------------------------------ results of single users


@pytest.mark.parametrize("name", ["SASRecFast", "BPR"])
def test_results_by_user_have_the_metrics_of_the_whole(name, build_trainer):
    values = {"metrics": "[Hit, MRR, NDCG, Recall, MAP, Precision]", "topk": "[3, 10]"}
    if name == "BPR":  # several targets a user
        values["eval_args"] = "{split: {RS: [6, 2, 2]}, order: TO, group_by: user, mode: full}"
    trainer, world = build_trainer(name, metric_decimal_place=12, **values)
    whole = trainer.evaluate(world.test, load_best_model=False)
    got = per_user(trainer, world.test, k=7)
    assert {key: got.metric(key).mean() for key in whole} == pytest.approx(whole, abs=1e-12)
    assert got.topk.shape == (len(got.users), 7)
    listed = got.ranks <= 7
    assert listed.any()
    np.testing.assert_array_equal(
        got.topk[got.rows[listed], got.ranks[listed] - 1], got.targets[listed]
    )
    assert not (got.topk[got.rows[~listed]] == got.targets[~listed, None]).any()


def test_a_model_alone_gives_the_same_results_by_user(build_trainer):
    trainer, world = build_trainer("SASRecFast")
    world.model.train()
    one, two = per_user(trainer, world.test), per_user(world.model, world.test)
    assert world.model.training
    for key, array in one.arrays().items():
        np.testing.assert_array_equal(array, two.arrays()[key])


def test_a_run_saves_the_results_of_its_test_users_when_asked(tmp_path):
    values = {
        "epochs": 1,
        "show_progress": False,
        "checkpoint_dir": str(tmp_path),
        "topk": [10],
    }
    plain = recbole_mm.run("SASRecFast", "tiny", config_dict=values)
    result = recbole_mm.run("SASRecFast", "tiny", config_dict={**values, "save_per_user": True})
    assert result["test_result"] == plain["test_result"]
    folder = tmp_path.__class__(result["run"])
    assert not (folder.parent / plain["run"] / "per_user.npz").exists()
    got = PerUser.load(folder / "per_user.npz")
    ids = json.loads((folder / "ids.json").read_text())
    assert got.items.tolist() == ids["item_id"]
    assert set(got.users) == set(ids["user_id"][1:])
    table = got.frame(["ndcg@10", "hit@10"])
    assert table["ndcg@10"].mean() == pytest.approx(result["test_result"]["ndcg@10"], abs=1e-6)
    assert table.loc[got.users[3], "hit@10"] == float(got.ranks[3] <= 10)


def test_results_by_user_refuse_what_they_cannot_read(tmp_path, build_trainer):
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match=r"other\.npz.*save_per_user"):
        PerUser.load(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"array\.npy.*save_per_user"):
        PerUser.load(tmp_path / "array.npy")
    trainer, world = build_trainer("SASRecFast")
    got = per_user(trainer, world.test)
    with pytest.raises(InputError, match=r"'ndgc@10' is no metric.*did you mean 'ndcg'"):
        got.metric("ndgc@10")
    for name in ("ndcg", "ndcg@0", "ndcg@²"):
        with pytest.raises(InputError, match=r"is no metric of single users; known"):
            got.metric(name)
    got.save(tmp_path / "mine.npz")
    assert PerUser.load(tmp_path / "mine.npz").users.tolist() == got.users.tolist()
