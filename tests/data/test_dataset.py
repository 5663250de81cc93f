from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.data import dataset as recbole_dataset
from recbole.data.utils import create_dataset as recbole_create_dataset
from recbole.data.utils import data_preparation
from recbole.utils import init_seed

from recbole_mm.data.batches import count_targets
from recbole_mm.data.create import create_dataset, on_our_floor
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.sequential_dataset import TARGET_ROW, MultimodalSequentialDataset
from recbole_mm.errors import InputError
from recbole_mm.protocol import describe

INTER = "user_id:token item_id:token timestamp:float"
LAST = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}


def interactions(seed=0, users=12, items=20, shortest=3, longest=12):
    """Random histories, rows in no order, some times equal, none beyond float32."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{rng.integers(items)}", int(rng.integers(40)))
        for user in range(users)
        for _ in range(rng.integers(shortest, longest + 1))
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


def pairs(part):
    """(user, item) tokens of the targets of a part."""
    ids = part.field2id_token
    return sorted(
        (ids["user_id"][user], ids["item_id"][item])
        for user, item in zip(
            part.inter_feat["user_id"].tolist(), part.inter_feat["item_id"].tolist(), strict=True
        )
    )


def batches(config, dataset):
    """All batches of the three loaders, as lists of dictionaries."""
    init_seed(config["seed"], True)
    found = []
    for loader in data_preparation(config, dataset):
        for batch in loader:
            interaction = batch if hasattr(batch, "interaction") else batch[0]
            rest = () if hasattr(batch, "interaction") else batch[1:]
            found.append((interaction.interaction, rest))
    return found


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for (mine, rest), (stock, stock_rest) in zip(ours, theirs, strict=True):
        assert mine.keys() == stock.keys()
        for field in stock:
            value = mine[field]
            if field.startswith("timestamp") and "timestamp_list" in stock:
                assert value.dtype == torch.float64
                value = value.float()
            assert value.dtype == stock[field].dtype
            assert torch.equal(value, stock[field]), field
        for value, stock_value in zip(rest, stock_rest, strict=True):
            assert str(value) == str(stock_value)


# batches equal RecBole's

SPLITS = [
    {"LS": "valid_and_test"},
    {"LS": "valid_only"},
    {"LS": "test_only"},
    {"RS": [0.6, 0.2, 0.2]},
]
FULL = {
    "load_col": {
        "inter": ["user_id", "item_id", "timestamp", "words", "rating"],
        "item": ["item_id", "kind", "tags", "price"],
        "user": ["user_id", "age"],
    }
}


def write_rich_files(make, shortest):
    """Files with features of every type."""
    rng = np.random.default_rng(1)

    def words(longest):
        return " ".join(f"w{i}" for i in rng.integers(9, size=rng.integers(longest + 1)))

    rows = interactions(shortest=shortest)
    if shortest == 1:
        rows += [("two", "i1", 3), ("one", "i1", 5), ("two", "i2", 1)]
    items = sorted({row[1] for row in rows})
    return make(
        inter=(
            INTER + " words:token_seq rating:float",
            [(*row, words(4), rng.integers(10) / 2) for row in rows],
        ),
        item=(
            "item_id:token kind:token tags:token_seq price:float",
            [(item, f"k{rng.integers(3)}", words(3), rng.integers(99) / 7) for item in items],
        ),
        user=(
            "user_id:token age:float",
            [(user, rng.integers(99)) for user in sorted({row[0] for row in rows})],
        ),
    )


@pytest.fixture
def rich(make):
    return write_rich_files(make, shortest=1)


@pytest.fixture
def rich_and_long(make):
    """Histories for which RecBole's two ways to leave one out agree."""
    return write_rich_files(make, shortest=4)


@pytest.mark.parametrize("group_by", ["user", "none"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("numerical", [[], ["timestamp", "price"]])
def test_sequential_batches_equal_recboles(rich, split, group_by, numerical):
    keys = {
        **FULL,
        "eval_args": {"split": split, "order": "TO", "group_by": group_by, "mode": "full"},
        "numerical_features": numerical,
    }
    stock = batches(rich("SASRec", **keys), recbole_create_dataset(rich("SASRec", **keys)))
    ours = create_dataset(rich("SASRec", **keys))
    assert isinstance(ours, MultimodalSequentialDataset)
    ours = batches(rich("SASRec", **keys), ours)
    if numerical:
        for batch, _ in ours:
            assert batch["timestamp_list"].dtype == torch.float32
            batch["timestamp"], batch["timestamp_list"] = (
                batch["timestamp"].double(),
                batch["timestamp_list"].double(),
            )
    assert_same_batches(ours, stock)


@pytest.mark.parametrize("order", ["TO", "RO"])
@pytest.mark.parametrize("group_by", ["user", "none"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_general_batches_equal_recboles(rich_and_long, split, group_by, order):
    keys = {
        **FULL,
        "eval_args": {"split": split, "order": order, "group_by": group_by, "mode": "full"},
    }
    stock = batches(
        rich_and_long("BPR", **keys), recbole_create_dataset(rich_and_long("BPR", **keys))
    )
    ours = create_dataset(rich_and_long("BPR", **keys))
    assert type(ours) is MultimodalDataset
    assert_same_batches(batches(rich_and_long("BPR", **keys), ours), stock)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_sampled_evaluation_equals_recboles(rich_and_long, model):
    keys = {**FULL, "eval_args": {**LAST, "mode": "uni5"}}
    stock = batches(
        rich_and_long(model, **keys), recbole_create_dataset(rich_and_long(model, **keys))
    )
    assert_same_batches(
        batches(rich_and_long(model, **keys), create_dataset(rich_and_long(model, **keys))), stock
    )


def test_sequence_fields_are_cut_like_recboles(rich):
    keys = {**FULL, "seq_len": {"tags": 1, "words": 2, "nothing": 3}}
    stock = batches(rich(**keys), recbole_create_dataset(rich(**keys)))
    ours = batches(rich(**keys), create_dataset(rich(**keys)))
    assert ours[0][0]["words_list"].shape[1:] == (4, 2)
    assert_same_batches(ours, stock)


def test_field_properties_equal_recboles(rich):
    keys = {**FULL, "numerical_features": ["price"]}
    ours, stock = create_dataset(rich(**keys)), recbole_create_dataset(rich(**keys))
    ours.build()
    stock.build()
    for name in ("field2type", "field2source", "field2seqlen", "field2bucketnum"):
        assert getattr(ours, name) == getattr(stock, name)
    for field in stock.field2id_token:
        assert ours.field2id_token[field].tolist() == stock.field2id_token[field].tolist()


def test_batches_of_worker_processes_equal_recboles(rich):
    stock = batches(rich(**FULL), recbole_create_dataset(rich(**FULL)))
    keys = {**FULL, "worker": 2}
    assert_same_batches(batches(rich(**keys), create_dataset(rich(**keys))), stock)


def test_rows_equal_recboles_for_every_kind_of_index(rich):
    stock = recbole_create_dataset(rich(**FULL)).build()[0]
    ours = create_dataset(rich(**FULL)).build()[0]
    indices = (3, torch.tensor(3), torch.tensor([1]), [4, 0], slice(2, 5), np.array([5, 5, 1]))
    for index in indices:
        assert_same_batches([(ours[index].interaction, ())], [(stock[index].interaction, ())])
        mine, theirs = ours[index], stock[index]
        assert len(mine) == len(theirs)


def test_whole_columns_equal_recboles(rich):
    for mine, theirs in zip(
        create_dataset(rich(**FULL)).build(),
        recbole_create_dataset(rich(**FULL)).build(),
        strict=True,
    ):
        assert len(mine) == len(theirs)
        for field in theirs.inter_feat:
            assert field in mine.inter_feat
            assert torch.equal(
                mine.inter_feat[field].to(theirs.inter_feat[field].dtype), theirs.inter_feat[field]
            )
        assert "nothing" not in mine.inter_feat
        assert (mine.inter_matrix() != theirs.inter_matrix()).nnz == 0
        ours = mine.inter_matrix(form="csr", value_field="rating")
        assert (ours != theirs.inter_matrix(form="csr", value_field="rating")).nnz == 0
        # RecBole's counter leaves the first interaction of every user out, its matrix does not
        users, items = theirs.inter_matrix().nonzero()
        assert len(users) == theirs.inter_matrix().nnz
        assert mine.item_counter == Counter(items)


def test_whole_columns_follow_a_sort(rich):
    train = create_dataset(rich(**FULL)).build()[0]
    before = train.inter_feat["item_id_list"]
    train.shuffle()
    after = train.inter_feat["item_id_list"]
    assert not torch.equal(before, after)
    assert torch.equal(after, train[slice(None)]["item_id_list"])


def test_unused_columns_are_dropped(rich):
    keys = {**FULL, "unused_col": {"inter": ["timestamp", "timestamp_list", "rating"]}}
    stock = batches(rich(**keys), recbole_create_dataset(rich(**keys)))
    ours = batches(rich(**keys), create_dataset(rich(**keys)))
    assert "timestamp" not in ours[0][0]
    assert "rating_list" in ours[0][0]
    assert_same_batches(ours, stock)


def test_unused_columns_are_dropped_from_windows(rich):
    unused = {"inter": ["timestamp", "timestamp_list", "rating"]}
    keys = {**FULL, "unused_col": unused, "train_objective": "all"}
    row = create_dataset(rich(**keys)).build()[0][0]
    assert not set(unused["inter"]).intersection(row.columns)
    assert {"words", "rating_list", "item_id_target_list"} <= set(row.columns)


@pytest.mark.parametrize("model", ["FEARec", "SASRecF"])
def test_recboles_models_train_on_it(rich, model):
    keys = {"selected_features": ["tags"], "contrast": "un", "sim": "dot", "tau": 1.0}
    config = rich(model, **FULL, **keys)
    train = data_preparation(config, create_dataset(config))[0]
    net = config.model_class(config, train.dataset)
    loss = net.calculate_loss(next(iter(train)))
    torch.autograd.set_detect_anomaly(False)  # RecBole's import of sequential models sets it
    assert torch.isfinite(loss)


# the choice of a class


def test_every_class_of_recbole_gets_the_floor():
    for name, base in vars(recbole_dataset).items():
        if isinstance(base, type) and issubclass(base, recbole_dataset.Dataset):
            ours = on_our_floor(base)
            assert issubclass(ours, (base, MultimodalDataset)), name
            assert ours is on_our_floor(base)
            lazy = issubclass(base, recbole_dataset.SequentialDataset) and name != "DIENDataset"
            assert issubclass(ours, MultimodalSequentialDataset) == lazy


def test_class_is_named_after_recboles(make):
    rows = interactions()
    config = make(
        inter=(INTER, rows),
        kg=("head_id:token relation_id:token tail_id:token", [("e1", "r", "e2")]),
        link=("item_id:token entity_id:token", [(rows[0][1], "e1")]),
    )
    columns = {
        "inter": ["user_id", "item_id", "timestamp"],
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
    }
    names = {
        model: type(create_dataset(config(model, load_col=columns, additional_feat_suffix=[])))
        for model in ("BPR", "FM", "SASRec", "DIEN", "KGAT", "KSR")
    }
    assert {model: cls.__name__ for model, cls in names.items()} == {
        "BPR": "MultimodalDataset",
        "FM": "MultimodalDataset",
        "SASRec": "MultimodalSequentialDataset",
        "DIEN": "MultimodalDIENDataset",
        "KGAT": "MultimodalKnowledgeBasedDataset",
        "KSR": "MultimodalKSRDataset",
    }


# items, users and interactions are those of .inter


def write_side_files(make, rows, known, extra):
    files = {"inter": (INTER, rows)}
    for end, field, place in (("item", "item_id", 1), ("user", "user_id", 0)):
        tokens = sorted({row[place] for row in rows})[:known] + [f"x{i}" for i in range(extra)]
        files[end] = (
            f"{field}:token {end}_color:token",
            [(token, "red") for token in tokens[::-1]],
        )
    return make(**files)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize(("known", "extra"), [(99, 0), (99, 5), (4, 0), (4, 5)])
def test_ids_and_interactions_do_not_depend_on_side_files(make, model, known, extra):
    rows = interactions()
    alone = create_dataset(make(inter=(INTER, rows))(model))
    columns = {
        "inter": ["user_id", "item_id", "timestamp"],
        "item": ["item_id", "item_color"],
        "user": ["user_id", "user_color"],
    }
    config = write_side_files(make, rows, known, extra)(model, load_col=columns)
    ours = create_dataset(config)
    for field in ("user_id", "item_id"):
        assert ours.field2id_token[field].tolist() == alone.field2id_token[field].tolist()
    assert ours.inter_feat.equals(alone.inter_feat)
    assert ours.report.items_without_row == max(0, ours.item_num - 1 - known)
    if (known, extra) == (99, 0):
        stock = recbole_create_dataset(config)
        assert ours.field2id_token["item_id"].tolist() == stock.field2id_token["item_id"].tolist()
    test = ours.build()[2]
    assert pairs(test) == pairs(alone.build()[2])
    colors = ours.item_feat["item_color"]
    assert colors[0] == 0
    assert (colors > 0).sum() == min(known, ours.item_num - 1)


def test_a_column_of_two_files_is_refused(make):
    rows = interactions()
    config = make(
        inter=(INTER, rows),
        item=("item_id:token color:token", [(rows[0][1], "red")]),
        user=("user_id:token color:token", [(rows[0][0], "red")]),
    )
    with pytest.raises(InputError, match=r"toy.item, line 1: .*'color'.*rename"):
        create_dataset(config(load_col=None))


def test_side_file_without_a_known_item_is_refused(make):
    config = make(inter=(INTER, interactions()), item=("item_id:token", [("3.0",), ("4.0",)]))
    with pytest.raises(InputError, match=r"item_id.*'i.*'3.0', '4.0'"):
        create_dataset(
            config(load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]})
        )


def test_vectors_of_unknown_items_do_not_widen_the_catalogue(make):
    rows = interactions()
    items = sorted({row[1] for row in rows})
    vectors = [(item, f"{i} 1") for i, item in enumerate([*items[1:], "x1", "x2"])]
    config = make(inter=(INTER, rows), itememb=("iid:token vector:float_seq", vectors))(
        "SASRec",
        load_col={
            "inter": ["user_id", "item_id", "timestamp"],
            "itememb": ["iid", "vector"],
        },
        additional_feat_suffix=["itememb"],
        alias_of_item_id=["iid"],
        preload_weight={"iid": "vector"},
    )
    dataset = create_dataset(config)
    assert dataset.item_num == len(items) + 1
    weights = dataset.get_preload_weight("iid")
    assert weights.shape == (len(items) + 1, 2)
    for i, item in enumerate(items[1:]):
        assert weights[dataset.token2id("item_id", item)].tolist() == [i, 1]


def test_alias_that_is_not_loaded_is_refused(make):
    config = make(inter=(INTER, interactions()))
    with pytest.raises(InputError, match=r"alias_of_item_id: no column 'item_ids'.*'item_id'"):
        create_dataset(config(alias_of_item_id=["item_ids"]))


def test_related_items_that_are_unknown_leave_their_list(make):
    rows = interactions()
    items = sorted({row[1] for row in rows})
    config = make(
        inter=(INTER, rows),
        item=("item_id:token also:token_seq", [(item, f"{items[0]} x1") for item in items]),
    )(
        load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "also"]},
        alias_of_item_id=["also"],
    )
    dataset = create_dataset(config)
    assert dataset.item_num == len(items) + 1
    assert [row.tolist() for row in dataset.item_feat["also"][1:]] == [
        [dataset.token2id("item_id", items[0])]
    ] * len(items)


@pytest.mark.parametrize("seed", range(4))
def test_filters_leave_what_recboles_leave(make, seed):
    rows = interactions(seed, users=30, items=25, shortest=1)
    # RecBole's rm_dup_inter leaves open which of two equal times comes first
    rows = [(user, item, time) for time, (user, item, _) in enumerate(rows)][::-1]
    items = sorted({row[1] for row in rows})
    config = make(
        inter=(INTER, rows),
        item=("item_id:token price:float", [(item, i) for i, item in enumerate(items)]),
    )
    keys = {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "price"]},
        "user_inter_num_interval": "[4,10]",
        "item_inter_num_interval": "(2,inf)",
        "val_interval": {"timestamp": "[20,inf)", "price": "[3,inf)"},
        "rm_dup_inter": "last",
    }
    stock, ours = recbole_create_dataset(config(**keys)), create_dataset(config(**keys))
    assert ours.inter_num == stock.inter_num
    assert ours.field2id_token["item_id"].tolist() == stock.field2id_token["item_id"].tolist()
    assert [pairs(part) for part in ours.build()] == [pairs(part) for part in stock.build()]
    names = [step.name for step in ours.report.steps]
    assert names == [
        "as read",
        "rm_dup_inter",
        "val_interval",
        "user_inter_num_interval, item_inter_num_interval",
    ]


def test_condition_on_items_removes_their_interactions_only(make):
    rows = [("a", "i", 1), ("a", "j", 2), ("a", "k", 3), ("a", "k", 4), ("a", "k", 5)]
    config = make(inter=(INTER, rows), item=("item_id:token year:float", [("i", 1), ("j", 9)]))(
        "BPR",
        load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "year"]},
        val_interval={"year": "[0,5]"},
    )
    assert create_dataset(config).field2id_token["item_id"].tolist() == ["[PAD]", "i", "k"]


def test_a_condition_on_a_column_that_is_not_read_is_named(make):
    config = make(inter=(INTER, interactions()))
    with pytest.raises(InputError, match=r"'timestam' is read; did you mean 'timestamp'.*load_col"):
        create_dataset(config("BPR", val_interval={"timestam": "[0,5]"}))


def test_rows_with_empty_ids_are_left_out_and_counted(make):
    rows = [("a", "", 1), ("", "j", 2), *interactions(), ("", "", 3), ("a", "", 4)]
    dataset = create_dataset(make(inter=(INTER, rows))())
    assert dataset.inter_num == len(rows) - 4
    assert [step.interactions for step in dataset.report.steps] == [len(rows), len(rows) - 4]
    alone = create_dataset(make(inter=(INTER, interactions()))())
    assert dataset.inter_feat.equals(alone.inter_feat)


def test_words_for_nothing_are_ids(make):
    names = ["NA", "null", "nan", "None"]
    rows = [(user, item, time) for user in names for time, item in enumerate(names)]
    dataset = create_dataset(make(inter=(INTER, rows))())
    assert dataset.inter_num == 16
    assert dataset.field2id_token["item_id"].tolist() == ["[PAD]", *names]


def test_two_intervals_are_joined(make):
    rows = [(f"u{n}", f"i{t}", t) for n in range(1, 9) for t in range(n)]
    dataset = create_dataset(make(inter=(INTER, rows))(user_inter_num_interval="[2,3];(6,7]"))
    assert dataset.field2id_token["user_id"].tolist() == ["[PAD]", "u2", "u3", "u7"]


def test_filters_that_leave_nothing_are_refused_with_counts(make):
    config = make(inter=(INTER, interactions(users=5)))(
        val_interval={"timestamp": "[5,inf)"}, user_inter_num_interval="[50,inf)"
    )
    with pytest.raises(InputError) as error:
        create_dataset(config)
    for part in ("as read: 5 users", "val_interval", "0 users, 0 items, 0 interactions", "loosen"):
        assert part in str(error.value)


# knowledge graphs

KG = {
    "load_col": {
        "inter": ["user_id", "item_id", "timestamp"],
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
    }
}


@pytest.fixture
def knowledge(make):
    """Items i1 to i5, of which two are linked, with a link of an item that nobody had."""
    rows = [(u, f"i{i}", t) for u in "abc" for t, i in enumerate([4, 1, 3, 2])]
    rows.append(("d", "i5", 1))
    return make(
        inter=(INTER, rows),
        kg=(
            "head_id:token relation_id:token tail_id:token",
            [("e1", "is", "red"), ("e3", "is", "blue"), ("e9", "is", "red"), ("red", "of", "e3")],
        ),
        link=("item_id:token entity_id:token", [("i3", "e3"), ("i1", "e1"), ("i9", "e9")]),
    )


@pytest.mark.parametrize("kg_reverse_r", [False, True])
def test_knowledge_models_have_the_same_items(knowledge, kg_reverse_r):
    plain = create_dataset(knowledge("BPR"))
    dataset = create_dataset(knowledge("KGAT", **KG, kg_reverse_r=kg_reverse_r))
    assert set(dataset.field2id_token["item_id"]) == set(plain.field2id_token["item_id"])
    for mine, theirs in zip(dataset.build(), plain.build(), strict=True):
        assert pairs(mine) == pairs(theirs)
    # an entity that is an item has the id of the item; the others come behind the items
    assert dataset.entity_num == dataset.item_num + 3
    for item, entity in (("i1", "e1"), ("i3", "e3")):
        assert dataset.token2id("item_id", item) == dataset.token2id("head_id", entity)
    names = dataset.field2id_token["head_id"]
    triples = zip(
        names[dataset.head_entities],
        dataset.field2id_token["relation_id"][dataset.relations],
        names[dataset.tail_entities],
        strict=True,
    )
    assert [*triples][:4] == [
        ("e1", "is", "red"),
        ("e3", "is", "blue"),
        ("e9", "is", "red"),
        ("red", "of", "e3"),
    ]


def test_knowledge_model_trains_on_it(knowledge):
    config = knowledge("CKE", **KG)
    train = data_preparation(config, create_dataset(config))[0]
    from recbole.utils import KGDataLoaderState

    train.set_mode(KGDataLoaderState.RSKG)
    net = config.model_class(config, train._dataset)
    torch.autograd.set_detect_anomaly(False)
    assert all(torch.isfinite(loss) for loss in net.calculate_loss(next(iter(train))))


def test_the_columns_of_a_graph_are_asked_for(knowledge):
    columns = {source: KG["load_col"][source] for source in ("inter", "kg")}
    with pytest.raises(InputError, match=r"CKE reads .link too; add link: \[item_id, entity_id\]"):
        create_dataset(knowledge("CKE", load_col=columns))


def test_preloaded_weights_are_of_the_number_type_of_models(make):
    inter = (INTER, [("a", f"i{t}", t) for t in range(4)])
    dataset = create_dataset(make(inter=inter)())
    dataset._preloaded_weight = {"code": np.array([[0.0, 0.0], [0.5, 1.5]])}  # as RecBole makes it
    weight = dataset.get_preload_weight("code")
    assert weight.dtype == np.float32
    assert weight[1].tolist() == [0.5, 1.5]


def test_missing_graph_is_refused(make):
    with pytest.raises(InputError, match=r"toy.kg, toy.link; it holds toy.inter"):
        create_dataset(make(inter=(INTER, interactions()))("KGAT", **KG))


# order


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("scale", [1, 0.001])
def test_order_is_that_of_the_exact_time(make, model, scale):
    start = 1_600_000_000  # float32 has a grid of 128 s here
    rows = [("a", f"i{t}", start + t * scale) for t in (3, 1, 0, 4, 2, 5)]
    _, valid, test = create_dataset(make(inter=(INTER, rows))(model)).build()
    assert pairs(test) == [("a", "i5")]
    assert pairs(valid) == [("a", "i4")]


@pytest.mark.parametrize("normalize_all", [True, False])
def test_sequences_follow_the_exact_time(make, normalize_all):
    start = 1_600_000_000
    order = [3, 1, 0, 4, 2, 5]
    rows = [("a", f"i{t}", start + t) for t in order]
    test = create_dataset(make(inter=(INTER, rows))(normalize_all=normalize_all)).build()[2]
    row = test[[0]]
    tokens = test.field2id_token["item_id"]
    assert tokens[row["item_id_list"][0]].tolist() == ["i1", "i2", "i3", "i4"]
    times = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = times / 5 if normalize_all else times + start
    assert torch.equal(row["timestamp_list"][0], expected)


def test_nanoseconds_are_told_apart(make):
    rows = [("a", f"i{t}", 1_600_000_000_000_000_000 + t) for t in (3, 1, 0, 4, 2)]
    test = create_dataset(make(inter=(INTER, rows))()).build()[2]
    assert pairs(test) == [("a", "i4")]


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_equal_times_keep_the_order_of_the_file(make, model):
    rows = [(user, f"i{n}", 7) for n in range(30) for user in "ab"]
    config = make(inter=(INTER, rows))(model, rm_dup_inter="first", MAX_ITEM_LIST_LENGTH=30)
    _, valid, test = create_dataset(config).build()
    assert pairs(test) == [("a", "i29"), ("b", "i29")]
    assert pairs(valid) == [("a", "i28"), ("b", "i28")]
    if model == "SASRec":
        items = test[[0]]["item_id_list"][0, :29]
        assert test.field2id_token["item_id"][items].tolist() == [f"i{n}" for n in range(29)]


@pytest.mark.parametrize("keep", ["first", "last"])
def test_equal_times_keep_the_order_of_the_file_when_repeats_go(make, keep):
    rng = np.random.default_rng(0)
    rows = [("a", f"i{rng.integers(200)}", rng.integers(3)) for _ in range(300)]
    by_time = [item for _, item, _ in sorted(rows, key=lambda row: row[2])]
    if keep == "last":
        by_time = list(dict.fromkeys(by_time[::-1]))[::-1]
    dataset = create_dataset(make(inter=(INTER, rows))(rm_dup_inter=keep))
    items = dataset.field2id_token["item_id"][dataset.inter_feat["item_id"]]
    assert items.tolist() == list(dict.fromkeys(by_time))


def test_time_of_another_type_is_refused(make):
    text = "user_id:token\titem_id:token\ttimestamp:token\na\ti\t1\n"
    with pytest.raises(InputError, match="timestamp:float"):
        create_dataset(make(inter=text)())


def test_missing_time_is_refused(make):
    config = make(inter=(INTER, interactions()))
    for model in ("SASRec", "BPR"):
        with pytest.raises(InputError, match=r"'timestamp' \(TIME_FIELD\).*load_col.inter"):
            create_dataset(config(model, load_col={"inter": ["user_id", "item_id"]}))
    with pytest.raises(InputError, match=r"without times: eval_args: .*RS: .*, order: RO}"):
        create_dataset(config("BPR", load_col={"inter": ["user_id", "item_id"]}))
    order = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "mode": "full"}
    create_dataset(config("BPR", load_col={"inter": ["user_id", "item_id"]}, eval_args=order))


@pytest.mark.parametrize(
    ("end", "columns", "key"),
    [
        ("inter", ["item_id", "timestamp"], "USER_ID_FIELD"),
        ("inter", ["users"], "USER_ID_FIELD"),
        ("item", ["color"], "ITEM_ID_FIELD"),
        ("kg", ["head_id", "tail_id"], "RELATION_ID_FIELD"),
        ("link", ["entity_id"], "ITEM_ID_FIELD"),
    ],
)
def test_missing_ids_are_refused(knowledge, tmp_path, end, columns, key):
    (tmp_path / "toy" / "toy.item").write_text("item_id:token\tcolor:token\ni1\tred\n")
    with pytest.raises(InputError, match=rf"toy.{end}: .*\({key}\).*load_col.{end}"):
        create_dataset(knowledge("KGAT", load_col={**KG["load_col"], end: columns}))


def test_misnamed_id_is_refused_with_the_nearest(make):
    with pytest.raises(InputError, match=r"'item' \(ITEM_ID_FIELD\).*did you mean 'item_id'"):
        create_dataset(make(inter=(INTER, interactions()))(ITEM_ID_FIELD="item"))


def test_unloaded_side_file_is_no_error(make):
    config = make(inter=(INTER, interactions()), item=("item_id:token", [("i1",)]))
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["nothing"]}
    assert create_dataset(config(load_col=columns)).item_feat is None


@pytest.mark.parametrize("interval", ["5", "[5,inf", "[a,b]", "", "[5]", "[5,1]", "[1,2];3"])
def test_illegible_interval_is_refused(make, interval):
    with pytest.raises(InputError, match=r"no interval"):
        create_dataset(make(inter=(INTER, interactions()))(user_inter_num_interval=interval))


def test_missing_files_are_refused(make, tmp_path):
    config = make(item=("item_id:token", [("i",)]))
    with pytest.raises(InputError, match=r"toy.inter; it holds toy.item; set data_path"):
        create_dataset(config())
    with pytest.raises(InputError, match="no such folder"):
        create_dataset(config(data_path=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_bad_times_are_refused_or_dropped(make, model):
    rows = [*interactions(), ("u1", "i1", ""), ("u2", "i2", "nan")]
    config = make(inter=(INTER, rows))
    with pytest.raises(InputError, match=rf"line {len(rows)}: timestamp is empty"):
        create_dataset(config(model))
    dataset = create_dataset(config(model, on_bad_time="drop"))
    assert dataset.report.bad_times == 2
    assert dataset.inter_num == len(rows) - 2


# leave one out


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**16))
@pytest.mark.parametrize("mode", ["valid_and_test", "valid_only", "test_only"])
def test_general_and_sequential_models_hold_out_the_same(make, seed, mode):
    config = make(inter=(INTER, interactions(seed, users=6, shortest=1, longest=6)))
    split = {"split": {"LS": mode}, "order": "TO", "mode": "full"}
    general = create_dataset(config("BPR", eval_args=split)).build()
    sequential = create_dataset(config("SASRec", eval_args=split)).build()
    for mine, theirs in zip(general[1:], sequential[1:], strict=True):
        assert pairs(mine) == pairs(theirs)


# split by time

by_time = pytest.mark.skipif(
    not hasattr(recbole_dataset.Dataset, "time_based_split"), reason="since RecBole 1.2.1"
)


def expected_parts(rows, ratios):
    """(user, item) of each part: later than a moment is test, before it the last are validation."""
    train, valid, test = (Fraction(ratio, sum(ratios)) for ratio in ratios)
    boundary = np.percentile([time for _, _, time in rows], 100 * float(1 - test))
    parts = [], [], []
    for user in {user for user, _, _ in rows}:
        history = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        early = [row for row in history if row[2] <= boundary]
        n_train = max(int(len(early) * train / (train + valid)), 1)
        for place, (_, item, time) in enumerate(history):
            part = 0 if place < n_train else 2 if time > boundary else 1
            if part or n_train > 1:  # a first interaction alone is no target
                parts[part].append((user, item))
    return [sorted(part) for part in parts]


@by_time
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**16), step=st.sampled_from([1, 100_000]))
@pytest.mark.parametrize("ratios", [[2, 1, 1], [7, 1, 2], [6, 2, 2]])
def test_a_split_by_time_is_exact_and_the_same_for_all_models(make, seed, step, ratios):
    """Unix seconds, one second or a day apart: float32 holds a step of 128 s at most."""
    rng = np.random.default_rng(seed)
    times = 1_600_000_000 + step * rng.permutation(60)
    rows = [(f"u{rng.integers(8)}", f"i{rng.integers(9)}", int(time)) for time in times]
    given = [ratio / sum(ratios) for ratio in ratios]
    split = {"split": {"TS": given}, "order": "TO", "mode": "full"}
    config = make(inter=(INTER, rows))
    general = create_dataset(config("BPR", eval_args=split)).build()
    sequential = create_dataset(config("SASRec", eval_args=split)).build()
    train, valid, test = expected_parts(rows, ratios)
    assert [pairs(part) for part in general] == [train, valid, test]
    assert [pairs(part) for part in sequential[1:]] == [valid, test]
    users, items = sequential[0].training_interactions()
    ids = sequential[0].field2id_token
    histories = zip(ids["user_id"][users], ids["item_id"][items], strict=True)
    assert sorted(histories) == train


@by_time
@pytest.mark.parametrize(
    ("model", "order", "message"),
    [("BPR", "RO", "needs order: TO"), ("DIEN", "TO", "split TS is not possible for DIEN")],
)
def test_a_split_by_time_that_cannot_be_exact_is_refused(make, model, order, message):
    split = {"split": {"TS": [0.5, 0.25, 0.25]}, "order": order, "mode": "full"}
    config = make(inter=(INTER, interactions()))
    with pytest.raises(InputError, match=message):
        create_dataset(config(model, eval_args=split)).build()


@by_time
@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_a_split_by_an_embedded_time_is_refused(make, model):
    split = {"split": {"TS": [0.5, 0.25, 0.25]}, "order": "TO", "mode": "full"}
    config = make(inter=(INTER, interactions()))
    values = {"eval_args": split, "numerical_features": ["timestamp"]}
    with pytest.raises(InputError, match="split TS needs timestamp as it is"):
        create_dataset(config(model, **values)).build()


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_short_histories_are_trained_on_first_and_tested_next(make, model):
    rows = [(f"u{n}", f"i{t}", t) for n in range(1, 6) for t in range(n)]
    train, valid, test = create_dataset(make(inter=(INTER, rows))(model)).build()
    assert pairs(test) == [("u3", "i2"), ("u4", "i3"), ("u5", "i4")]
    assert pairs(valid) == [("u4", "i2"), ("u5", "i3")]
    counts = Counter(user for user, _ in pairs(train))
    first = 1 if model == "SASRec" else 0  # the first interaction is an input only
    assert counts == {
        f"u{n}": left - first
        for n, left in ((2, 2), (3, 2), (4, 2), (5, 3))  # u1 has nothing to be predicted from
    }
    report = train.report
    assert [(part.name, part.users, part.without) for part in report.parts] == [
        ("train", 4, 1),
        ("valid", 2, 3),
        ("test", 3, 2),
    ]
    assert "valid: 2 rows of 2 users; 3 users have none" in "\n".join(report.lines())


def test_users_of_one_interaction_do_not_part_general_models_from_sequential_ones(make):
    rows = [(f"u{n}", f"i{t}", t) for n in range(1, 6) for t in range(n)]
    config = make(inter=(INTER, rows))
    prints = {
        describe(config(model), tuple(create_dataset(config(model)).build())).train
        for model in ("SASRec", "BPR", "DIEN")
    }
    assert len(prints) == 1


def test_data_without_a_training_row_are_refused(make):
    config = make(inter=(INTER, [(u, "i", 1) for u in "abc"]))
    for objective in ("last", "all"):
        with pytest.raises(InputError, match=r"no row is left to train on.*3 interactions"):
            create_dataset(config(train_objective=objective)).build()


def test_other_ways_to_leave_one_out_are_refused(make):
    config = make(inter=(INTER, interactions()))
    split = {"split": {"LS": "last"}, "order": "TO", "mode": "full"}
    with pytest.raises(InputError, match=r"'last'"):
        create_dataset(config(eval_args=split)).build()


# windows


def naive_windows(histories, longest):
    """(inputs, targets) of the windows of each training history, cut from the end."""
    found = []
    for history in histories:
        inputs, targets = history[:-1], history[1:]
        cuts = list(range(len(targets), 0, -longest))
        for end in reversed(cuts):
            begin = max(0, end - longest)
            found.append((inputs[begin:end], targets[begin:end]))
    return found


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**16), longest=st.integers(1, 9))
def test_windows_hold_every_training_target_once(make, seed, longest):
    config = make(inter=(INTER, interactions(seed, users=5, shortest=1, longest=14)))
    keys = {"MAX_ITEM_LIST_LENGTH": longest}
    prefix = create_dataset(config(**keys)).build()
    window = create_dataset(config(**keys, train_objective="all")).build()

    rows = window[0][slice(None)]
    inputs, targets, lengths = (
        rows[field] for field in ("item_id_list", "item_id_target_list", "item_length")
    )
    assert inputs.shape == targets.shape == (len(lengths), longest)
    predicted = Counter()
    for user, row, n in zip(rows["user_id"].tolist(), targets.tolist(), lengths, strict=True):
        assert all(row[:n])
        assert not any(row[n:])
        predicted.update((user, item) for item in row[:n])
    train = prefix[0][slice(None)]
    assert predicted == Counter(
        zip(train["user_id"].tolist(), train["item_id"].tolist(), strict=True)
    )
    assert torch.equal(rows["item_id"], targets[torch.arange(len(targets)), lengths - 1])

    histories = defaultdict(list)
    for user, item in sorted(
        zip(train["user_id"].tolist(), range(len(train)), strict=True)
    ):  # the rows of a user are in the order of time
        histories[user] += [] if histories[user] else [train["item_id_list"][item, 0].item()]
        histories[user].append(train["item_id"][item].item())
    naive = naive_windows([histories[user] for user in sorted(histories)], longest)
    windows = zip(inputs.tolist(), targets.tolist(), lengths.tolist(), strict=True)
    assert [(row[:n], following[:n]) for row, following, n in windows] == naive

    for mine, theirs in zip(window[1:], prefix[1:], strict=True):
        assert mine[slice(None)].interaction.keys() == theirs[slice(None)].interaction.keys()
        assert torch.equal(mine[slice(None)]["item_id_list"], theirs[slice(None)]["item_id_list"])
    assert (window[0].inter_matrix() != prefix[0].inter_matrix()).nnz == 0
    assert window[0].item_counter == prefix[0].item_counter
    assert window[0].report.parts[0].targets == len(prefix[0])


def test_window_rows_have_lists_of_every_field(rich):
    keys = {**FULL, "train_objective": "all"}
    train = create_dataset(rich(**keys)).build()[0]
    rows = train[slice(None)]
    for field in ("item_id", "words", "rating", "timestamp"):
        assert f"{field}_list" in rows
    assert rows["words_list"].shape[:2] == rows["item_id_target_list"].shape
    assert train.field2type["item_id_target_list"].value == "token_seq"
    assert train.field2seqlen["item_id_target_list"] == 4
    row = train[1]
    assert row["item_id_target_list"].shape == (4,)


def test_windows_pass_through_the_loader(make):
    config = make(inter=(INTER, interactions()))(train_objective="all")
    loader = data_preparation(config, create_dataset(config))[0]
    seen = sum(int((batch["item_id_target_list"] > 0).sum()) for batch in loader)
    assert seen == loader.dataset.report.parts[0].targets


@pytest.mark.parametrize(("objective", "size"), [("all", 40), ("all", 3), ("last", 40)])
def test_the_size_of_a_batch_is_one_of_targets(make, objective, size):
    keys = {"train_objective": objective, "MAX_ITEM_LIST_LENGTH": 4, "train_batch_size": size}
    config = make(inter=(INTER, interactions(longest=20)))(**keys)
    loader = data_preparation(config, create_dataset(config))[0]
    for _ in range(2):  # once more changes nothing
        count_targets(loader, size)
    batches = list(loader)
    rows, targets = len(loader._dataset), loader.dataset.report.parts[0].targets
    expected = max(1, round(size * rows / targets))
    assert [len(batch["item_id"]) for batch in batches[:-1]] == [expected] * (len(batches) - 1)
    assert len(batches) == len(loader) > 2
    assert sum(len(batch["item_id"]) for batch in batches) == rows
    assert expected == size if objective == "last" else expected < size


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_the_batches_of_rows_with_drawn_items_are_left_alone(make, model):
    drawn = {"distribution": "uniform", "sample_num": 3}
    keys = {"train_batch_size": 7, "loss_type": "BPR", "train_neg_sample_args": drawn}
    config = make(inter=(INTER, interactions()))(model=model, **keys)
    loader = data_preparation(config, create_dataset(config))[0]
    count_targets(loader, 1000)
    assert loader.step == loader.batch_sampler.batch_size == 2  # with three items for each


# histories


def test_history_is_the_whole_past_but_the_target(make):
    config = make(inter=(INTER, interactions(longest=20)))
    keys = {"mask_history": True, "MAX_ITEM_LIST_LENGTH": 3}
    parts = create_dataset(config(**keys)).build()
    past = defaultdict(list)
    whole = create_dataset(config())
    for user, item in whole.inter_feat[["user_id", "item_id"]].itertuples(index=False):
        past[user].append(item)
    for back, part in ((2, parts[1]), (1, parts[2])):
        batch = part[np.arange(len(part))]
        rows, items = part.history(batch)
        assert len(batch) > 3
        for row, (user, target) in enumerate(
            zip(batch["user_id"].tolist(), batch["item_id"].tolist(), strict=True)
        ):
            assert past[user][-back] == target
            expected = [item for item in past[user][:-back] if item != target]
            assert items[rows == row].tolist() == expected


def test_history_masks_what_recboles_general_loaders_mask(make):
    config = make(inter=(INTER, interactions()))
    general = config("BPR")
    sequential = config(mask_history=True)
    theirs = data_preparation(general, create_dataset(general))
    ours = data_preparation(sequential, create_dataset(sequential))
    for mine, stock in zip(ours[1:], theirs[1:], strict=True):
        masked = set()
        for batch, *_ in mine:
            rows, items = mine.dataset.history(batch)
            masked |= set(zip(batch["user_id"][rows].tolist(), items.tolist(), strict=True))
        expected = set()
        for batch, (rows, items), *_ in stock:
            expected |= set(zip(batch["user_id"][rows].tolist(), items.tolist(), strict=True))
        assert masked == expected


def test_only_evaluation_batches_know_their_history(make):
    config = make(inter=(INTER, interactions()))
    train, valid, test = create_dataset(config(mask_history=True)).build()
    assert TARGET_ROW not in train[[0]]
    assert TARGET_ROW in valid[[0]]
    assert TARGET_ROW in test[0]
    with pytest.raises(InputError, match="mask_history"):
        train.history(train[[0]])
    assert TARGET_ROW not in create_dataset(config()).build()[2][[0]]


def test_history_is_refused_where_it_is_cut(make):
    config = make(inter=(INTER, interactions()))
    with pytest.raises(InputError, match=r"mask_history.*DIEN"):
        create_dataset(config("DIEN", mask_history=True))


# lists that come in files


def benchmark(make, **files):
    header = "user_id:token item_id_list:token_seq item_id:token"
    rows = [("a", "i1 i2", "i3"), ("b", "i2", "i1")]
    return make(
        train_inter=(header, rows),
        valid_inter=(header, [("a", "i1 i2 i3", "i4")]),
        test_inter=(header, [("b", "i2 i1", "i5")]),
        **files,
    )


BENCHMARK = {
    "load_col": None,
    "benchmark_filename": ["train", "valid", "test"],
    "alias_of_item_id": ["item_id_list"],
}


def test_the_protocol_of_ready_made_parts_names_their_files(make):
    config = benchmark(make)(**BENCHMARK)
    rules = describe(config, create_dataset(config).build())
    assert (rules.split, rules.order) == ("in files train, valid, test", "as given")


def test_a_misspelt_column_is_said(make, caplog):
    make(inter=(INTER, [("a", f"i{t}", t) for t in range(4)]))
    columns = ["user_id", "item_id", "timestamp", "timestmap"]
    config = make(inter=(INTER, [("a", f"i{t}", t) for t in range(4)]))(load_col={"inter": columns})
    create_dataset(config)
    assert "no column 'timestmap' (load_col.inter); did you mean 'timestamp'" in caplog.text


def test_ready_made_lists_are_left_as_they_are(make):
    config = benchmark(make)
    stock = batches(config(**BENCHMARK), recbole_create_dataset(config(**BENCHMARK)))
    dataset = create_dataset(config(**BENCHMARK))
    assert_same_batches(batches(config(**BENCHMARK), dataset), stock)
    assert dataset.report.items == 5


def test_lists_that_are_longer_than_the_configuration_says_are_refused(make):
    config = benchmark(make)(MAX_ITEM_LIST_LENGTH=2, **BENCHMARK)
    with pytest.raises(InputError, match="is 2, but item_id_list in the files has up to 3 items"):
        create_dataset(config)


def test_an_item_of_a_ready_made_list_is_known(make):
    items = [("i2", "red"), ("x1", "blue"), ("i5", "green")]
    config = benchmark(make, item=("item_id:token color:token", items))
    dataset = create_dataset(config(**BENCHMARK))
    assert dataset.item_num == 6
    colors = dataset.field2id_token["color"][dataset.item_feat["color"].astype(int)]
    assert dict(zip(dataset.item_tokens, colors.tolist(), strict=True)) == {
        **dict.fromkeys(["[PAD]", "i1", "i3", "i4"], "[PAD]"),
        "i2": "red",
        "i5": "green",
    }


@pytest.mark.parametrize(
    ("key", "value", "mend"), [("mask_history", True, False), ("train_objective", "all", "last")]
)
def test_ready_made_lists_have_no_whole_history(make, key, value, mend):
    with pytest.raises(InputError, match=f"{key}.*benchmark_filename.*set {key}: {mend}"):
        create_dataset(benchmark(make)(**BENCHMARK, **{key: value}))


def test_ready_made_lists_and_targets_share_their_ids_without_a_word(make):
    values = {**BENCHMARK, "alias_of_item_id": None}
    dataset = create_dataset(benchmark(make)(**values))
    tokens = dataset.field2id_token
    assert tokens["item_id"] is tokens["item_id_list"]
    assert dataset.report.items == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("\ti1 i2\ti3", r"toy.valid.inter, interaction 2: user_id is empty"),
        ("a\ti1 i2\t", r"toy.valid.inter, interaction 2: item_id is empty"),
        ("a\t\ti3", r"toy.valid.inter, interaction 2: item_id_list is empty"),
    ],
)
def test_an_empty_id_in_a_ready_made_part_is_refused(make, row, message):
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    config = benchmark(make)
    make(valid_inter=f"{header}a\ti1 i2\ti4\n{row}\n")
    with pytest.raises(InputError, match=message):
        create_dataset(config(**BENCHMARK))


def test_ready_made_parts_of_a_sequential_model_need_lists(make):
    header, rows = "user_id:token item_id:token", [("a", "i1"), ("b", "i2")]
    config = make(**{f"{part}_inter": (header, rows) for part in ("train", "valid", "test")})
    values = {**BENCHMARK, "alias_of_item_id": None}
    with pytest.raises(InputError, match=r"no column 'item_id_list'.*hold the history of each row"):
        create_dataset(config(**values))
    assert create_dataset(config("BPR", **values)).report.items == 2


def test_ready_made_lists_are_no_training_histories(make):
    train, *_ = create_dataset(benchmark(make)(**BENCHMARK)).build()
    with pytest.raises(InputError, match="whole training histories, but benchmark_filename"):
        train.training_interactions()


def test_an_id_is_a_token(make):
    header = INTER.replace("user_id:token", "user_id:float")
    with pytest.raises(InputError, match="write user_id:token"):
        create_dataset(make(inter=(header, [(1, "i1", 2)]))())


def test_missing_ready_made_list_is_refused(make):
    keys = {**BENCHMARK, "benchmark_filename": ["train", "dev"]}
    with pytest.raises(InputError, match=r"toy.dev.inter; it holds toy.test.inter"):
        create_dataset(benchmark(make)(**keys))


# the report


def test_report_counts_what_happened(make):
    rows = [
        ("a", "i", 1),
        ("a", "i", 1),
        ("a", "j", 1),
        ("b", "i", 1),
        ("b", "k", 2),
        ("a", "k", ""),
    ]
    rows += [("c", f"i{t}", t) for t in range(4)]
    config = make(
        inter=(INTER, rows), item=("item_id:token", [("i",), ("k",), ("i0",), ("nobody",)])
    )(
        on_bad_time="drop",
        user_inter_num_interval="[3,inf)",
        load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
    )
    dataset = create_dataset(config)
    report = dataset.report
    held = report.as_dict()
    assert len(held.pop("histories")) == len(held.pop("columns")) == 12
    assert held == {
        "dataset": "toy",
        "users": 2,
        "items": 6,
        "interactions": 7,
        "steps": [
            {"name": "as read", "users": 3, "items": 7, "interactions": 9},
            {
                "name": "user_inter_num_interval, item_inter_num_interval",
                "users": 2,
                "items": 6,
                "interactions": 7,
            },
        ],
        "bad_times": 1,
        "duplicates": 1,
        "equal_times": 2,
        "items_without_row": 4,
        "parts": [],
    }
    parts = dataset.build()
    assert parts[1].report is dataset.report
    assert [
        part.as_dict() if hasattr(part, "as_dict") else part.rows for part in dataset.report.parts
    ] == [2, 1, 2]
    text = "\n".join(dataset.report.lines())
    for part in (
        "toy: 2 users, 6 items, 7 interactions",
        "as read: 3 users, 7 items, 9 interactions",
        "1 rows without a usable time dropped",
        "1 repeated (user, item, time) rows kept",
        "2 rows with the time of an earlier one",
        "4 items without a row in .item",
        "train: 2 rows of 2 users",
        "valid: 1 rows of 1 users; 1 users have none",
    ):
        assert part in text


# side information


@pytest.fixture
def catalogue(make):
    rows = [(u, f"i{i}", i) for u in "ab" for i in (4, 3, 2, 1, 0)]
    return make(
        inter=(INTER, rows),
        item=(
            "item_id:token title:token_seq tags:token_seq brand:token price:float",
            [
                ("i3", 'The "Big" one', "b a", "x", 1),
                ("nobody", "unseen", "z", "y", 2),
                ("i0", "_", "_", "_", 3),
                ("i1", "", "", "", 4),
                ("i3", "second row", "c", "w", 5),
                ("i4", " NA  null ", "a _ a", "x", 6),
            ],
        ),
    )


def test_item_categories_are_read_by_token(catalogue):
    dataset = create_dataset(catalogue(category_field="tags"))
    assert dataset.item_feat is None
    table = dataset.item_categories
    assert table is dataset.build()[0].item_categories
    assert table.names == ("a", "b")
    rows = dict(zip(dataset.item_tokens, table.multi_hot.tolist(), strict=True))
    assert rows == {
        "[PAD]": [False, False],
        "i0": [False, False],
        "i1": [False, False],
        "i2": [False, False],
        "i3": [True, True],
        "i4": [True, False],
    }


def test_a_token_column_gives_one_category(catalogue):
    assert create_dataset(catalogue(category_field="brand")).item_categories.names == ("x",)


def test_no_category_field_gives_no_categories(catalogue):
    assert create_dataset(catalogue()).item_categories is None


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("tag", r"no column 'tag' \(category_field\).*'tags'"),
        ("price", "of type float"),
        ("nothing", "price"),
    ],
)
def test_bad_category_field_is_refused(catalogue, field, found):
    with pytest.raises(InputError, match=found):
        _ = create_dataset(catalogue(category_field=field)).item_categories


def test_categories_that_nobody_has_are_refused(make):
    rows = interactions()
    config = make(inter=(INTER, rows), item=("item_id:token tags:token_seq", [(rows[0][1], "_")]))(
        category_field="tags"
    )
    with pytest.raises(InputError, match="category_field"):
        _ = create_dataset(config).item_categories


def test_categories_without_an_item_file_are_refused(make):
    config = make(inter=(INTER, interactions()))(category_field="tags")
    with pytest.raises(InputError, match=r"toy.item: no such file"):
        create_dataset(config).item_categories  # noqa: B018


def test_no_modality_gives_no_features(catalogue):
    assert create_dataset(catalogue()).item_features.names == ()


def test_item_features_are_read_by_token(catalogue, tmp_path):
    np.save(tmp_path / "toy" / "image.npy", np.arange(10, dtype=np.float32).reshape(5, 2))
    (tmp_path / "toy" / "ids.txt").write_text("i4\ni3\ni2\ni1\ni0\n")
    config = catalogue(modalities={"image": {"path": "image.npy", "ids": "ids.txt"}})
    dataset = create_dataset(config)
    table = dataset.item_features
    assert table is dataset.build()[2].item_features
    assert table.names == ("image",)
    image = table["image"]
    item = dataset.token2id("item_id", "i3")
    assert image.values[image.rows[item]].tolist() == [2, 3]
    assert image.present.tolist() == [False] + [True] * 5
