"""A run through the Python interface: every kind of model, masking, selection, tuning."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from recbole.data.utils import load_split_dataloaders

import recbole_mm
from recbole_mm.config import DATASETS, Config
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.errors import EnvironmentFault, InputError, NumericalError, OutOfMemory
from recbole_mm.evaluation import per_user
from recbole_mm.protocol import Protocol, assert_comparable
from recbole_mm.registry import get_model, model_names
from recbole_mm.trainer import trainer_class
from recbole_mm.training import CUTS_PADDING

QUICK = {"epochs": 1, "MAX_ITEM_LIST_LENGTH": 10, "show_progress": False, "train_batch_size": 256}


@pytest.mark.parametrize(
    "refusal",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
    ],
)
@pytest.mark.parametrize("place", ["SummaryWriter", "TemporaryDirectory"])
def test_a_disk_that_refuses_the_files_of_others_is_a_fault_of_the_machine(
    refusal, place, tmp_path, monkeypatch
):
    def refuse(*_):
        raise refusal

    monkeypatch.setattr(f"recbole_mm.trainer.{place}", refuse)
    with pytest.raises(EnvironmentFault, match=f"{refusal.strerror[:8]}.*TMPDIR"):
        recbole_mm.run("SASRecFast", "tiny", config_dict={**QUICK, "checkpoint_dir": str(tmp_path)})


def run(model, **values):
    return recbole_mm.run(model, "tiny", config_dict={**QUICK, **values}, saved=False)


def protocol(result):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in result["protocol"].items()}
    return Protocol(**values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("SASRec", {}),
        ("GRU4Rec", {}),
        ("BERT4Rec", {}),
        ("NARM", {}),
        ("LightSANs", {}),
        ("FEARec", {}),
        ("CORE", {}),
        ("SASRecF", {"selected_features": ["categories"]}),
        ("GRU4RecF", {"selected_features": ["categories"]}),
        ("FDSA", {"selected_features": ["categories"]}),
        ("Pop", {}),
        ("ItemKNN", {}),
        ("BPR", {}),
        ("LightGCN", {}),
        ("NGCF", {}),
        ("MultiVAE", {}),
    ],
)
def test_built_in_models_run_under_our_protocol(model, values):
    result = run(model, **values)
    assert_comparable(protocol(result), protocol(run("SASRecFast")))
    assert all(0 <= value <= 1 for value in result["test_result"].values())


def test_a_column_of_numbers_is_refused_where_a_model_would_fail_at_it(tmp_path):
    data = shutil.copytree(DATASETS / "tiny", tmp_path / "tiny")
    lines = (data / "tiny.item").read_text(encoding="utf-8").splitlines()
    rows = [lines[0] + "\tprice:float", *(f"{line}\t1.5" for line in lines[1:])]
    (data / "tiny.item").write_text("\n".join(rows) + "\n", encoding="utf-8")
    values = {"data_path": str(tmp_path), "selected_features": ["categories", "price"]}
    with pytest.raises(InputError, match=r"price is of type float.*numerical_features: \[price\]"):
        run("SASRecF", **values)
    assert run("SASRecF", **values, numerical_features=["price"])["epochs"] > 0


def test_a_selected_column_that_load_col_leaves_out_is_named():
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
    with pytest.raises(InputError, match="selected_features: categories is not loaded"):
        run("SASRecF", selected_features=["categories"], load_col=columns)


def test_the_model_of_the_readme_runs_with_both_objectives():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = (
        part for part in re.findall(r"```python\n(.*?)```", readme, re.S) if "LastItem" in part
    )
    names = {"__name__": "readme"}
    exec(code, names)  # noqa: S102
    for objective in ("all", "last"):
        result = run(names["LastItem"], train_objective=objective, epochs=5)
        assert result["test_result"]["ndcg@10"] > 0.08  # at random .04


def test_history_masking_means_the_same_for_sequential_and_general_models():
    """A popularity ranking is computed by hand under both settings."""
    open_, masked = run("Pop"), run("Pop", mask_history=True)
    assert masked["test_result"]["hit@10"] > open_["test_result"]["hit@10"]
    with pytest.raises(InputError, match="mask_history: False and True"):
        assert_comparable(protocol(open_), protocol(masked))


def test_runs_whose_drawn_candidates_differ_are_not_compared():
    """RecBole draws a user's past for sequential models and never for general ones."""
    drawn = {"eval_args": {"mode": "uni20"}}
    sequential, general = run("SASRecFast", **drawn), run("BPR", **drawn)
    assert [protocol(r).mask_history for r in (sequential, general)] == [False, True]
    with pytest.raises(InputError, match="mask_history"):
        assert_comparable(protocol(sequential), protocol(general))


def test_a_ranking_for_each_interaction_is_not_compared_with_one_for_each_user():
    by_time = {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}}
    sequential, general = protocol(run("SASRecFast", **by_time)), protocol(run("Pop", **by_time))
    assert sequential.test == general.test
    assert general.test_rankings == general.test_users == sequential.test_users
    assert sequential.test_rankings > sequential.test_users
    assert f"ranked {sequential.valid_rankings} and {sequential.test_rankings}" in sequential.line()
    with pytest.raises(InputError, match=r"valid_rankings: .*test_rankings: "):
        assert_comparable(sequential, general)


def test_popularity_is_the_same_for_sequential_and_general_models(build_trainer):
    counts = [build_trainer(name)[1].train._dataset.item_counter for name in ("SASRec", "BPR")]
    counts.append(build_trainer("MUFASA", train_objective="all")[1].train._dataset.item_counter)
    assert counts[0] == counts[1] == counts[2]


def test_a_protocol_without_numbers_of_rankings_is_one_of_leave_one_out():
    held = run("Pop")["protocol"]
    older = {key: value for key, value in held.items() if not key.endswith("_rankings")}
    assert Protocol.from_dict(older) == Protocol.from_dict(held)
    with pytest.raises(InputError, match="made before rankings were counted"):
        Protocol.from_dict({**older, "split": "TS [0.8, 0.1, 0.1]"})


def test_masked_items_leave_the_ranking_of_a_sequential_model(build_trainer):
    trainer, world = build_trainer("SASRecFast", mask_history=True)
    batch = next(iter(world.test))
    interaction, _, _, positive_i = batch
    whole = per_user(trainer, world.test, k=world.model.n_items - 1)
    for row in range(5):
        length = int(interaction["item_length"][row])
        past = set(interaction["item_id_list"][row, :length].tolist()) - {int(positive_i[row])}
        assert past.isdisjoint(whole.topk[row])
        assert positive_i[row] in whole.topk[row]


@pytest.mark.parametrize("model", sorted(CUTS_PADDING))
def test_built_in_models_do_not_mind_that_their_padding_is_cut(model, build_trainer):
    values = {"selected_features": "[categories]"} if model.endswith("F") or model == "FDSA" else {}
    trainer, world = build_trainer(model, MAX_ITEM_LIST_LENGTH=30, **values)
    batch = next(iter(world.valid))[0]
    full = world.model.full_sort_predict(batch), world.model.calculate_loss(batch)
    cut = trainer.without_padding(batch)
    assert cut["item_id_list"].size(1) < 30
    short = world.model.full_sort_predict(cut), world.model.calculate_loss(cut)
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)


def test_non_finite_scores_are_an_error_and_never_a_metric(build_trainer):
    trainer, world = build_trainer("SASRecFast")
    with torch.no_grad():
        world.model.item_embedding.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="the score of item id 3 in row 0 is nan"):
        trainer.evaluate(world.valid, load_best_model=False)


def test_the_same_seed_gives_the_same_run():
    first, second = run("MUFASA"), run("MUFASA")
    assert first["test_result"] == second["test_result"]
    assert first["best_valid_score"] == second["best_valid_score"]


def test_the_best_epoch_is_scored_and_not_the_last(monkeypatch):
    """The weights are ruined after every epoch but the first."""
    good = run("SASRecFast", epochs=1)
    base = trainer_class.__globals__["TrainerMixin"]
    train = base._train_epoch

    def ruined(self, data, epoch, *args, **kwargs):
        result = train(self, data, epoch, *args, **kwargs)
        if epoch > 0:
            with torch.no_grad():
                self.model.item_embedding.weight.copy_(-torch.eye(121, 64))
        return result

    monkeypatch.setattr(base, "_train_epoch", ruined)
    result = run("SASRecFast", epochs=3)
    assert result["best_epoch"] == 0
    assert result["test_result"] == good["test_result"]


def test_a_split_by_time_trains_every_model_on_the_same_and_says_when_nothing_is_late(tmp_path):
    split = {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}}
    rules = [protocol(run(model, **split)) for model in ("BPR", "SASRecFast")]
    assert len({(part.train, part.valid, part.test) for part in rules}) == 1
    rows = [f"u{user}\ti{(user + time) % 30}\t{time}" for user in range(40) for time in range(8)]
    (tmp_path / "lab").mkdir()
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (tmp_path / "lab" / "lab.inter").write_text("\n".join([header, *rows]) + "\n")
    with pytest.raises(InputError, match="no user of lab has a row in the test part of the split"):
        recbole_mm.run(
            "BPR", "lab", config_dict={**QUICK, **split, "data_path": str(tmp_path)}, saved=False
        )


def test_a_data_set_without_long_histories_is_refused(tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    rows = "\n".join(f"u{u}\ti{u + i}\t{u + i}" for u in range(5) for i in range(2))
    (folder / "short.inter").write_text(f"user_id:token\titem_id:token\ttimestamp:float\n{rows}\n")
    with pytest.raises(InputError, match="at least 3 interactions"):
        recbole_mm.run(
            "Pop",
            "short",
            config_dict={"data_path": str(tmp_path), "topk": [1], "valid_metric": "NDCG@1"},
            saved=False,
        )


def test_a_run_without_validation_has_no_score_and_its_result_is_strict_json(tmp_path):
    values = {**QUICK, "eval_args": {"split": {"LS": "test_only"}}, "checkpoint_dir": str(tmp_path)}
    result = recbole_mm.run("Pop", "tiny", config_dict=values)
    assert result["best_valid_score"] is None
    assert result["best_valid_result"] is None

    def refuse(constant):
        raise AssertionError(constant)

    written = Path(result["run"], "result.json").read_text(encoding="utf-8")
    assert json.loads(written, parse_constant=refuse)["test_result"] == result["test_result"]


def test_the_objective_function_serves_recboles_tuning_and_leaves_the_test_set_alone(monkeypatch):
    base = trainer_class.__globals__["TrainerMixin"]
    scored, evaluate = [], base.evaluate

    def counted(self, data, *args, **kwargs):
        scored.append(data)
        return evaluate(self, data, *args, **kwargs)

    monkeypatch.setattr(base, "evaluate", counted)
    values = {**QUICK, "model": "SASRecFast", "dataset": "tiny"}
    result = recbole_mm.objective_function(values)
    assert {"model", "best_valid_score", "valid_score_bigger", "best_valid_result"} <= set(result)
    assert result["test_result"] == {}
    assert result["run"] is None
    assert len(scored) == 1  # validation, after the only epoch
    assert recbole_mm.objective_function(values, score_test=True)["test_result"]
    assert len(scored) == 3


def test_pretraining_can_freeze_the_fusion_layer():
    frozen = run("MUFASA", freeze_mfl=True)
    free = run("MUFASA")
    assert frozen["parameters"] < free["parameters"]


def test_a_context_aware_model_asks_for_labels_and_runs_with_drawn_ones():
    with pytest.raises(InputError, match="FM learns from labels, but the interactions of tiny"):
        run("FM")
    with pytest.raises(InputError, match=r"RecBole refuses the data or a key.*rating"):
        run("FM", threshold={"rating": 4})
    drawn = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
    result = run("FM", **drawn)
    assert_comparable(protocol(result), protocol(run("BPR")))


@pytest.mark.parametrize(
    "values",
    [
        {"val_interval": {"rating": "[3,5]"}},
        {"val_interval": {"item_id": "i1"}},
        {"normalize_field": ["rating"]},
        {"numerical_features": ["rating"]},
        {"unload_col": {"inter": ["timestamp"]}},
    ],
    ids=str,
)
def test_what_recboles_data_sets_raise_is_bad_input(values):
    with pytest.raises(InputError):
        run("BPR", **values)


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(MultimodalDataset, "_count", lambda self: {}["a slip"])
    with pytest.raises(KeyError, match="a slip"):
        run("BPR")


def test_a_package_that_a_model_needs_is_named(monkeypatch):
    def needs_it(self):
        raise ModuleNotFoundError("No module named 'faiss'", name="faiss")

    monkeypatch.setattr(get_model("NCL"), "e_step", needs_it)
    with pytest.raises(EnvironmentFault, match="NCL needs the package faiss"):
        run("NCL")


def test_a_package_that_a_model_is_built_with_is_named(monkeypatch):
    def needs_it(*_):
        raise ModuleNotFoundError("No module named 'dgl'", name="dgl")

    monkeypatch.setattr("recbole.model.general_recommender.bpr.BPR.apply", needs_it)
    with pytest.raises(EnvironmentFault, match="BPR needs the package dgl"):
        run("BPR")


@pytest.mark.parametrize("model", ["BPR", "NeuMF"])
def test_a_model_of_drawn_items_that_has_none_says_so(model):
    with pytest.raises(InputError, match=f"train_neg_sample_args: {model} learns from drawn items"):
        run(model, train_neg_sample_args=None)


def test_a_run_needs_users_and_items():
    values = {
        "USER_ID_FIELD": None,
        "ITEM_ID_FIELD": None,
        "load_col": {"inter": ["timestamp"]},
        "metrics": ["AUC"],
        "valid_metric": "AUC",
        "threshold": {"timestamp": 1.5e9},
        "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "mode": "labeled"},
    }
    with pytest.raises(InputError, match="USER_ID_FIELD and ITEM_ID_FIELD: a run knows"):
        run("FM", **values)


def test_losses_are_shown_to_the_place_that_is_asked_for(build_trainer):
    trainer, _ = build_trainer("SASRecFast", loss_decimal_place=2)
    assert trainer._shown({"next_item": 1.23456}) == ["next_item 1.23"]


def too_much():
    return torch.empty(10**15)


def torn():
    raise MemoryError


def full_gpu():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee ...")


@pytest.mark.parametrize(
    ("allocate", "said"),
    [(too_much, "can't allocate memory"), (torn, "MemoryError"), (full_gpu, r"2.00 GiB.\)")],
)
def test_without_memory_the_keys_that_ask_for_it_are_named(monkeypatch, allocate, said):
    monkeypatch.setattr(get_model("SASRecFast"), "calculate_loss", lambda *_: allocate())
    with pytest.raises(
        OutOfMemory,
        match=f"SASRecFast on tiny: out of memory on cpu .*{said}.*; lower train_batch_size "
        r"\(now 256\), MAX_ITEM_LIST_LENGTH \(now 10\), loss_memory_mb \(now 512\), eval_memory_mb",
    ) as caught:
        run("SASRecFast")
    assert caught.value.exit_code == 3


def test_another_fault_of_a_model_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(get_model("SASRecFast"), "calculate_loss", broken)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        run("SASRecFast")


def test_every_model_of_the_list_is_there():
    assert [name for name in model_names() if not isinstance(get_model(name), type)] == []


def test_pickled_loaders_of_an_earlier_run_of_recbole_are_not_opened(tmp_path):
    (tmp_path / "tiny-for-Pop-dataloader.pth").write_bytes(b"no pickle")
    values = {"epochs": 1, "show_progress": False, "checkpoint_dir": str(tmp_path)}
    config = Config("Pop", "tiny", None, values)
    assert load_split_dataloaders(config) is None
    assert config.resolved()["dataloaders_save_path"] is None
    assert recbole_mm.run("Pop", "tiny", config_dict=values, saved=False)["test_result"]


@pytest.mark.parametrize("model", ["SASRecMM", "BPR"])
def test_the_pieces_of_a_run_give_what_the_run_gives(model):
    """As a script for RecBole has them; its own trainer would leave ``mask_history`` out."""
    from recbole.data import data_preparation
    from recbole.utils import init_seed

    from recbole_mm.data.create import create_dataset

    values = {**QUICK, "mask_history": True}
    config = Config(model, "tiny", None, values)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    net = config.model_class(config, train.dataset).to(config["device"])
    trainer = recbole_mm.get_trainer(config["MODEL_TYPE"], config.model_class)(config, net)
    trainer.fit(train, valid, saved=True, show_progress=False)
    done = recbole_mm.run(model, "tiny", None, values, saved=False)
    assert dict(trainer.evaluate(test)) == done["test_result"]


def test_weights_of_an_unfinished_run_are_called_so(tmp_path, caplog):
    done = recbole_mm.run("SASRecMM", "tiny", None, {**QUICK, "checkpoint_dir": str(tmp_path)})
    recbole_mm.open_run(done["run"])
    assert "not finished" not in caplog.text
    Path(done["run"], "result.json").unlink()
    for read in (recbole_mm.open_run, recbole_mm.load):
        caplog.clear()
        read(done["run"])
        assert "its run is not finished" in caplog.text
    with pytest.raises(InputError, match=f"no config.yaml; there is one below it, {done['run']}"):
        recbole_mm.load(tmp_path)
