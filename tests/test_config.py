"""Precedence, safety and refusals of the configuration (reliability.md, cases 1, 28, 31, 32)."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import yaml
from recbole.model.sequential_recommender import SASRec
from recbole.utils import ModelType
from torch import nn

import recbole_mm
from recbole_mm.config import (
    DATASETS,
    PROPERTIES,
    Config,
    digest_of_data,
    reusable,
)
from recbole_mm.data.derive import text as derived_text
from recbole_mm.errors import EnvironmentFault, InputError
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.models.mufasa import MUFASA
from recbole_mm.plain_yaml import parse_value
from recbole_mm.registry import get_model
from recbole_mm.trainer import trainer_class


def config(model="MUFASA", dataset="tiny", files=None, values=None, line=()):
    return Config(model, dataset, files, values, line)


def refused(match, **kwargs):
    with pytest.raises(InputError, match=match):
        config(**kwargs)


def test_sources_are_ordered_from_property_file_to_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("n_layers: 3\nepochs: 11\nseed: 5\n")
    stronger = tmp_path / "b.yaml"
    stronger.write_text("epochs: 12\n")
    made = config(
        files=[file, stronger], values={"seed": 6, "eval_step": 2}, line=["--eval_step=3"]
    )
    assert made["temperature"] == 0.1  # our property file
    assert made["metric_decimal_place"] == 6  # ours over RecBole's 4
    assert made["stopping_step"] == 10  # RecBole's
    assert (made["n_layers"], made["epochs"], made["seed"], made["eval_step"]) == (3, 12, 6, 3)


def test_mappings_of_several_files_are_merged(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("eval_args: {mode: uni50}\nmodalities: {cover: {path: a.npy}}\n")
    second.write_text("eval_args: {order: RO}\nmodalities: [cover]\n")
    made = config("BPR", files=[first, second])
    assert made["eval_args"]["mode"] == {"valid": "uni50", "test": "uni50"}
    assert made["eval_args"]["order"] == "RO"
    assert list(made["modalities"]) == ["cover"]


def test_a_key_that_a_file_has_twice_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 1\nseed: 2\nepochs: 3\n")
    refused(r"a\.yaml: .*the key 'epochs' is given twice(.|\n)*line 3", files=[file])


def test_data_path_holds_for_the_data_set_that_recbole_brings_too(tmp_path):
    refused("no data set 'ml-100k': looked for", dataset="ml-100k", values={"data_path": "nowhere"})
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k/ml-100k.inter").touch()
    mine = config(dataset="ml-100k", values={"data_path": str(tmp_path)})
    assert mine["data_path"] == str(tmp_path / "ml-100k")
    recboles = config(dataset="ml-100k")
    assert "dataset_example" in recboles["data_path"]
    assert "data_path" not in reusable(recboles.resolved())  # another machine has its own copy
    assert reusable(mine.resolved())["data_path"] == str(tmp_path)


def test_the_digest_of_the_data_knows_which_encoder_auto_is(monkeypatch):
    def digests(model, method):
        text = {"text": {"derive": "text", "fields": ["movie_title"], "method": method}}
        made = config(model, "ml-100k", values={"modalities": text})
        found = []
        for installed in (None, "folder"):
            monkeypatch.setattr(
                derived_text, "_minilm_folder", lambda installed=installed: installed
            )
            found.append(digest_of_data(made))
        return found

    of_auto = digests("MUFASA", "auto")
    of_tfidf = digests("MUFASA", "tfidf")
    assert of_auto[0] != of_auto[1]
    assert of_tfidf[0] == of_tfidf[1]


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(DATASETS / "tiny", tmp_path / "data" / "tiny")
    made = config(values={"data_path": "~/data", "checkpoint_dir": "~/runs"})
    assert made["data_path"] == str(tmp_path / "data" / "tiny")
    assert made["checkpoint_dir"] == str(tmp_path / "runs")


def test_builtin_models_get_the_same_evaluation_keys_as_ours():
    ours, builtin = config(), config("SASRec")
    general = config("BPR")
    for key in ("eval_args", "metrics", "topk", "valid_metric", "mask_history", "eval_batch_size"):
        assert ours[key] == builtin[key] == general[key]


def test_the_program_that_imports_us_keeps_its_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--epochs=99", "--durations=5"])
    assert config()["epochs"] != 99


def test_the_dict_of_the_caller_is_not_changed():
    values = {"learning_rate": "0.5"}
    assert config(values=values)["learning_rate"] == 0.5
    assert values == {"learning_rate": "0.5"}


def test_command_line_values_are_data_and_never_code(tmp_path):
    canary = tmp_path / "canary"
    refused(
        "learning_rate must be of type float",
        line=[f"--learning_rate=__import__('pathlib').Path('{canary}').touch()"],
    )
    assert not canary.exists()


def test_config_dict_strings_are_data_and_never_code(tmp_path):
    canary = tmp_path / "canary"
    refused("epochs", values={"epochs": f"__import__('pathlib').Path('{canary}').touch()"})
    assert not canary.exists()


def test_yaml_files_cannot_build_objects(tmp_path):
    canary = tmp_path / "canary"
    file = tmp_path / "evil.yaml"
    file.write_text(f"epochs: !!python/object/apply:os.mkdir ['{canary}']\n")
    refused(r"evil\.yaml: not valid YAML", files=[file])
    assert not canary.exists()


@pytest.mark.parametrize("text", ["2020-13-45", "0x_", "!!timestamp 'x'", "[" * 3000])
def test_what_trips_the_yaml_parser_is_text_or_refused(tmp_path, text):
    assert parse_value(text) == text
    file = tmp_path / "odd.yaml"
    file.write_text(f"seed: {text}\n")
    refused(r"odd\.yaml: not valid YAML", files=[file])


@pytest.mark.parametrize("name", ["../tiny", "/data/tiny", "..", "a/b", "."])
def test_a_data_set_cannot_be_named_by_a_path(name):
    refused("plain folder name", dataset=name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("12", 12),
        ("True", True),
        ("None", None),
        ("[5,10]", [5, 10]),
        ("{'LS': 'valid_and_test'}", {"LS": "valid_and_test"}),
        ("[5,inf)", "[5,inf)"),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_values_are_yaml_scalars(text, value):
    assert parse_value(text) == value


def test_values_with_an_equals_sign_survive():
    assert config(line=["--checkpoint_dir=a=b"])["checkpoint_dir"] == "a=b"


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (
            "learning_rat",
            0.1,
            "unknown key 'learning_rat' in config_dict; did you mean 'learning_r",
        ),
        ("window_sise", 3, "did you mean 'window_size'"),
        ("epochs", "many", "epochs must be of type int, got 'many'"),
        ("epochs", 1.5, "epochs must be of type int, got 1.5"),
        ("epochs", True, "epochs must be of type int, got True"),
        ("use_id", 1, "use_id must be of type bool, got 1"),
        ("learning_rate", 0, "learning_rate must be positive"),
        ("hidden_dropout_prob", 1.5, "hidden_dropout_prob must lie in"),
        ("train_batch_size", 0, "train_batch_size must be at least 1, got 0"),
        ("learner", "adamm", "unknown optimizer 'adamm'; did you mean 'adam'"),
        ("metrics", ["NDGC"], "unknown metric 'NDGC'; did you mean 'ndcg'"),
        ("topk", [0, 10], "topk must hold positive integers, got 0"),
        ("valid_metric", "NDCG@7", r"valid_metric 'NDCG@7' is outside topk \[5, 10, 20\]"),
        ("valid_metric", "GAUC", "valid_metric 'GAUC' is not among metrics"),
        ("n_heads", 0, "n_heads must be at least 1, got 0"),
        ("n_layers", -1, "n_layers must be at least 1, got -1"),
        ("n_heads", 3, "n_heads must divide hidden_size: 64 is not a multiple of 3"),
        ("train_objective", "some", "train_objective must be 'last' or 'all'"),
        ("on_bad_time", "guess", "on_bad_time must be 'error' or 'drop'"),
        ("min_coverage", 2.0, "min_coverage must lie in"),
        ("save_dataset", True, "save_dataset: True writes a pickle"),
        ("modalities", ["sound"], "'sound' is not declared"),
    ],
)
def test_bad_values_are_refused_before_any_data_is_read(key, value, match):
    refused(match, values={key: value})


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("--valid_metric=NDCG", "for each of topk .*: write for example NDCG@20"),
        ("--topk=[]", "topk must hold at least one"),
        ("--eval_args={splt: {LS: valid_and_test}}", "unknown key 'splt'.*did you mean 'split'"),
        ("--eval_args={group_by: users}", "group_by must be user or none, got 'users'"),
        ("--eval_args={order: XO}", "order must be TO or RO"),
        ("--eval_args={split: {RT: [8, 1, 1]}}", "split must be one of RS, LS and TS"),
        ("--eval_args={split: {RS: [8, 2]}}", "RS takes three shares"),
        ("--eval_args={split: {RS: [8, 2, 0]}}", "leaves no row to train on, or to test"),
        ("--eval_args={split: {LS: valid_only}}", "'valid_only' has no test part"),
        ("--benchmark_filename=[train, test]", "must name three parts"),
        ("--benchmark_filename=train", "benchmark_filename must be of type list"),
        ("--rm_dup_inter=frist", "rm_dup_inter must be 'first', 'last' or None"),
        ("--alias_of_item_id=item_id_list", "alias_of_item_id must be of type list"),
        ("--seed=-1", "seed must be at least 0"),
        ("--seed=5000000000", "seed must be below"),
        ("--weight_decay=-0.5", "weight_decay must be at least 0"),
        ("--learning_rate=.nan", "learning_rate must be positive, got nan"),
        ("--embedding_size=0", "embedding_size must be at least 1"),
        ("--embedding_size=6.5", "embedding_size must be a whole number, got 6.5"),
        ("--clip_grad_norm={max_nrm: 5}", "clip_grad_norm: unknown key 'max_nrm'.*'max_norm'"),
        ("--clip_grad_norm=5", "clip_grad_norm must be a mapping"),
        ("--train_neg_sample_args={sampel_num: 1}", "unknown key 'sampel_num'.*'sample_num'"),
        (
            "--train_neg_sample_args={distribution: uniform, sample_num: 0}",
            "sample_num must be at least 1",
        ),
        ("--state=verbose", "state must be a level of logging"),
        ("--checkpoint_dir=", "checkpoint_dir must name a folder"),
        ("--data_path=None", "data_path must name the folder that holds"),
        ("--eval_args={mode: labeled}", "mode labeled has no ranking"),
        ("--eval_args={mode: {valdi: uni50}}", "mode: unknown key 'valdi'.*did you mean 'valid'"),
        ("--eval_args={mode: uni-5}", "mode must be full, labeled, uniN or popN.*got 'uni-5'"),
        ("--eval_args={mode: uni}", "mode must be full, labeled, uniN or popN.*got 'uni'"),
        ("--clip_grad_norm={max_norm: -1}", "max_norm must be a positive number, got -1"),
        ("--clip_grad_norm={max_norm: abc}", "max_norm must be a positive number, got 'abc'"),
        ("--load_col={itme: [item_id]}", "load_col: unknown key 'itme'.*did you mean 'item'"),
        ("--LIST_SUFFIX=", "LIST_SUFFIX must name"),
        ("--feature_cache_dir=2026", "feature_cache_dir must be of type str or None, got 2026"),
        ("--encoding=5", "encoding must be of type str or None, got 5"),
        ("--learner=sparse_adam", "sparse gradients, which BPR does not have"),
        ("--train_neg_sample_args={dynamic: True}", "candidate_num.*must be at least 1, got 0"),
        ("--transform=crop", "transform: 'crop' is unknown"),
        ("--transform=crop_itemseq", "crop_itemseq needs a number eta, got None"),
        ("--eta=0.5", "unknown key 'eta'"),
        ("--valid_metric_bigger=False", "valid_metric_bigger: False, but NDCG@10 is better when"),
        ("--loss_decimal_place=-1", "loss_decimal_place must be at least 0"),
        ("--dataloaders_save_path=a.pth", "dataloaders_save_path names a pickle"),
    ],
)
def test_what_recbole_would_trip_over_is_refused(line, match):
    refused(match, model="BPR", line=[line])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"mfl_batch_items": 1}, "mfl_batch_items must be at least 2"),
        ({"feature_norm": 0.0}, "feature_norm must be positive"),
        ({"feature_norm": "unit"}, "feature_norm"),
        ({"use_id": False}, "no score reads the id embeddings.*collaborative_target: cooccurrence"),
        ({"mfl_pretrain_epochs": -1}, "mfl_pretrain_epochs must be at least 0"),
        ({"loss_memory_mb": 0}, "loss_memory_mb must be at least 1"),
        ({"gbce_t": 2.0}, r"gbce_t must lie in \[0, 1\]"),
        ({"inner_size": 0}, "inner_size must be at least 1"),
        ({"hidden_size": -64}, "hidden_size must be at least 1"),
        ({"initializer_range": -1.0}, "initializer_range must be positive"),
        ({"hidden_act": "gulu"}, "hidden_act: 'gulu' is unknown"),
        ({"learner": "sparse_adam"}, "sparse_adam needs sparse gradients"),
        (
            {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
            "MUFASA would take the drawn items for targets",
        ),
        (
            {"mask_history": True, "eval_args": {"mode": "uni100"}},
            "no effect on the candidates that mode uni100 draws",
        ),
    ],
    ids=str,
)
def test_what_our_models_would_trip_over_is_refused(values, match):
    refused(match, values=values)


def test_ids_that_no_score_reads_are_no_fault_where_nothing_aligns_with_them():
    for values in (
        {"collaborative_target": "cooccurrence"},
        {"collaborative_weight": 0.0},
        {"modalities": {}},
    ):
        config(values={"use_id": False, **values})


def test_the_length_of_features_is_no_key_of_a_model_without_features():
    refused("SASRecFast reads no features", model="SASRecFast", values={"feature_norm": 1.0})


def test_pairs_to_swap_are_a_list():
    refused("swap_pairs", model="CAMMSR", values={"swap_pairs": 3})


@pytest.mark.parametrize(
    ("model", "values", "match"),
    [
        ("MUFASA", {"selection": "head"}, "selection: 'head' is unknown; use one of query, query_"),
        ("MUFASA", {"window_size": 0}, "window_size must be at least 1, got 0"),
        ("CAMMSR", {"swap_ratio": 1.5}, r"swap_ratio must lie in \[0, 1\], got 1.5"),
        ("CAMMSR", {"contrast_temperature": 0.0}, "contrast_temperature must be positive, got 0.0"),
        ("CAMMSR", {"contrast_weight": -1.0}, "contrast_weight must be at least 0, got -1.0"),
        ("CAMMSR", {"input_norm": "batch"}, "'batch' is unknown; use one of dyt, layernorm"),
        ("CAMMSR", {"gate": "hard"}, "gate: 'hard' is unknown; use one of attentive, linear"),
        ("CAMMSR", {"n_experts": 0}, "n_experts must be at least 1, got 0"),
        ("CAMMSR", {"category_weight_sign": 2}, "sign: 2 is unknown; use one of 1, -1"),
        ("MDSRec", {"relation_graph": "smoth"}, "relation_graph: 'smoth' is unknown"),
        ("MDSRec", {"interest_attention": "center"}, "interest_attention: 'center' is unknown"),
        ("MDSRec", {"fusion": "gate"}, "fusion: 'gate' is unknown"),
        ("MDSRec", {"n_graph_layers": -1}, "n_graph_layers must be at least 0"),
        ("SASRecFast", {"loss_memory_mb": 0}, "loss_memory_mb must be at least 1"),
    ],
    ids=str,
)
def test_options_of_a_model_are_refused_by_the_model_that_reads_them(model, values, match):
    refused(match, model=model, values=values)


UNBOUND = {"anchor_modality"}  # a warning of the run: which modalities there are says the data


@pytest.mark.parametrize(
    "path", sorted((PROPERTIES / "model").glob("*.yaml")), ids=lambda p: p.stem
)
def test_no_key_of_a_model_takes_just_any_word_or_number(path):
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    wrong = {str: "nonsense", int: -7, float: -7.5}
    tried = {key: wrong[type(value)] for key, value in known.items() if type(value) in wrong}
    for key in tried.keys() - UNBOUND:
        refused(rf"{key}\b", model=path.stem, values={key: tried[key]})


def test_a_category_field_is_one_column():
    refused("category_field must be of type str", values={"category_field": ["kind"]})


@pytest.mark.parametrize("metric", ["AUC", "GAUC", "LogLoss"])
def test_a_metric_without_cuts_needs_none(metric):
    mode = "uni5" if metric == "GAUC" else "labeled"
    values = {"metrics": [metric], "valid_metric": metric, "eval_args": {"mode": mode}}
    assert config("BPR", values=values)["valid_metric"] == metric
    refused(
        f"{metric} has one value", model="BPR", values={**values, "valid_metric": f"{metric}@10"}
    )


def test_filters_have_no_place_beside_a_data_set_that_comes_split():
    values = {"benchmark_filename": ["a", "b", "c"], "user_inter_num_interval": "[5,inf)"}
    refused("user_inter_num_interval: .* has no effect", values=values)
    values["user_inter_num_interval"] = "[0, inf)"  # filters nothing
    refused(
        "benchmark_filename: .*tiny.a.inter does not exist; there are tiny.inter", values=values
    )


def test_a_part_of_eval_args_leaves_the_rest_as_it_is(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("eval_args: {mode: uni5}\n")
    split = {"LS": "test_only"}
    made = config("BPR", files=[file], values={"eval_args": {"split": split}})["eval_args"]
    assert (made["split"], made["order"], made["group_by"]) == (split, "TO", "user")
    assert made["mode"] == {"valid": "uni5", "test": "uni5"}


def test_a_linked_data_set_is_found_again_under_its_name(tmp_path):
    """Where the link leads to, another folder may have the name of the data set."""
    shutil.copytree(DATASETS / "tiny", tmp_path / "store" / "tiny_v2")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "tiny").symlink_to(tmp_path / "store" / "tiny_v2")
    made = config(values={"data_path": str(tmp_path / "sets")})
    again = config(None, None, [reusable(made.resolved())])
    assert again["data_path"] == str(tmp_path / "sets" / "tiny")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is there")
def test_wandb_is_missing_before_anything_is_read():
    with pytest.raises(EnvironmentFault, match="pip install wandb"):
        config("BPR", values={"log_wandb": True})


def test_keys_of_other_models_on_the_command_line_are_told(caplog):
    config("SASRec", line=["--knn_k=7"])
    assert "knn_k in the command line is a key of other models: SASRec ignores it" in caplog.text
    caplog.clear()
    config("SASRec", values={"dropout_prob": 0.9})  # GRU4Rec's
    assert "dropout_prob in config_dict is a key of other models" in caplog.text
    caplog.clear()
    Config("SASRec", "tiny", None, None, ["--knn_k=7"], shared=True)
    assert not caplog.text


def test_one_file_needs_no_list_and_values_are_no_files(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 7\n")
    assert config(files=file)["epochs"] == config(files=str(file))["epochs"] == 7
    refused("give values by key as config_dict", files={"epochs": 7})


@pytest.mark.parametrize("model", ["CAMMSR", "MDSRec"])
def test_negatives_are_refused_for_a_model_that_draws_none(model):
    refused(
        f"n_negatives: {model} has no loss on sampled negatives",
        model=model,
        line=["--n_negatives=20"],
    )
    assert config("MUFASA", line=["--n_negatives=20"])["n_negatives"] == 20


def test_a_model_of_columns_needs_one():
    refused(
        "SASRecF reads columns of .item, name one", model="SASRecF", line=["--selected_features=[]"]
    )


def test_a_percentage_of_cold_items_is_checked_before_any_data_is_read():
    for wrong in (".nan", "-5", "150"):
        refused("cold_items must be a percentage", line=[f"--cold_items={wrong}"])


def test_a_key_of_another_model_may_stand_in_a_shared_file(tmp_path):
    file = tmp_path / "shared.yaml"
    file.write_text("window_size: 32\nepochs: 4\n")
    assert config("SASRec", files=[file])["epochs"] == 4


@pytest.mark.parametrize("line", ["epochs=3", "--epochs", "--=3"])
def test_arguments_of_another_form_are_refused(line):
    refused("is not of the form --key=value", line=[line])


def test_a_key_given_twice_is_refused():
    refused("'epochs' is given twice", line=["--epochs=1", "--epochs=2"])


def test_unknown_model_is_refused_with_the_nearest_name():
    refused("unknown model 'MUFASSA'; did you mean 'MUFASA'", model="MUFASSA")
    refused("did you mean 'SASRec'", model="sasrec")


def test_models_that_cannot_run_say_why():
    refused("'S3Rec' does not run here: .*pickled", model="S3Rec")


def test_missing_data_set_lists_what_was_looked_for(tmp_path):
    refused(
        r"no data set 'tinny': looked for .*tinny\.inter; data sets below .*: none",
        dataset="tinny",
        values={"data_path": str(tmp_path)},
    )


def test_missing_config_file_is_refused(tmp_path):
    refused("cannot be read", files=[tmp_path / "no.yaml"])


def test_config_file_must_be_a_mapping(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    refused("must be a mapping", files=[file])


def test_a_list_of_modalities_picks_from_the_declared_ones():
    declared = config()["modalities"]
    assert len(declared) > 1
    name = next(iter(declared))
    assert config(line=[f"--modalities=[{name}]"])["modalities"] == {name: declared[name]}
    assert config(values={"modalities": []})["modalities"] == {}


def test_builtin_models_refuse_the_all_objective_with_the_reason():
    refused(
        "not possible for SASRec: RecBole's SASRec reads one position",
        model="SASRec",
        values={"train_objective": "all"},
    )


def test_cross_entropy_models_need_no_word_about_negative_sampling():
    assert config("SASRec")["train_neg_sample_args"]["distribution"] == "none"
    assert config("SASRec", values={"loss_type": "BPR"})["train_neg_sample_args"]["sample_num"] == 1


def test_columns_that_a_model_selects_are_loaded():
    made = config("SASRecF", values={"selected_features": ["categories"]})
    assert made["load_col"]["item"] == ["item_id", "categories"]


def test_old_numpy_names_are_there_for_recbole():
    config()
    assert getattr(np, "float") is np.float64  # noqa: B009  (ruff knows the old name)


def test_resolved_is_plain_data_that_yaml_reads_back():
    plain = config().resolved()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["device"] == "cpu" or plain["device"].startswith("cuda")


def test_use_gpu_false_means_cpu():
    assert config(values={"use_gpu": False})["device"].type == "cpu"


# ------------------------------------------------------------------------- models of others


class Warmer(MUFASA):
    default_config: ClassVar = {"warmth": 0.5, "window_size": 4}


class Hotter(Warmer):
    default_config: ClassVar = {"warmth": 0.9}


class Stacked(SASRec):
    pass


def test_a_class_has_the_properties_of_those_it_derives_from_and_its_own():
    config = Config(Hotter, "tiny", config_dict={"block_size": 3})
    assert (config["warmth"], config["window_size"], config["block_size"]) == (0.9, 4, 3)
    assert config["mfl_batch_items"] == Config("MUFASA", "tiny")["mfl_batch_items"]
    assert Config(Stacked, "tiny")["n_layers"] == Config("SASRec", "tiny")["n_layers"]
    with pytest.raises(InputError, match="warmth must be of type float"):
        Config(Warmer, "tiny", config_dict={"warmth": "hot"})
    with pytest.raises(InputError, match="unknown key 'warmth'"):
        Config("MUFASA", "tiny", config_dict={"warmth": 0.5})


def test_a_class_that_derives_from_one_of_ours_runs():
    values = {"epochs": 1, "show_progress": False, "MAX_ITEM_LIST_LENGTH": 10}
    result = recbole_mm.run(Hotter, "tiny", config_dict=values, saved=False)
    assert result["model"] == "Hotter"


def test_a_class_has_the_trainer_of_what_it_derives_from_and_not_of_its_namesake():
    mufasa = trainer_class(ModelType.SEQUENTIAL, MUFASA)
    assert trainer_class(ModelType.SEQUENTIAL, Hotter) is mufasa
    assert mufasa.__name__ == "MUFASATrainer"
    plain = trainer_class(ModelType.SEQUENTIAL, SASRec)
    namesake = type("MUFASA", (SASRec,), {"__module__": "mine"})
    assert trainer_class(ModelType.SEQUENTIAL, namesake) is plain
    assert trainer_class(ModelType.SEQUENTIAL, type("KGAT", (SASRec,), {})) is plain
    kgat = get_model("KGAT")
    derived = type("Mine", (kgat,), {"__module__": "mine"})
    assert trainer_class(ModelType.KNOWLEDGE, derived) is trainer_class(ModelType.KNOWLEDGE, kgat)


class Bare(MultimodalSequentialRecommender):
    """The least that a model of one's own says: items, users, loss; a key of its own."""

    default_config: ClassVar = {"width": 8}

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, config["width"], padding_idx=0)

    def item_vectors(self, items):
        return self.item_embedding(items)

    def forward(self, item_seq, item_seq_len, items):
        return items[item_seq].sum(1) / item_seq_len.clamp(min=1)[:, None]

    def calculate_loss(self, interaction):
        step = self.step_items(interaction)
        return (self.next_item_loss(interaction, self.item_vectors(step.items), step),)


def test_a_model_of_ones_own_needs_three_methods_and_no_file():
    values = {"epochs": 1, "show_progress": False, "MAX_ITEM_LIST_LENGTH": 10}
    assert recbole_mm.run(Bare, "tiny", config_dict=values, saved=False)["model"] == "Bare"
    with pytest.raises(InputError, match=r"needs Bare.states, which is not defined"):
        recbole_mm.run(Bare, "tiny", config_dict={**values, "train_objective": "all"}, saved=False)


def test_the_run_of_a_class_asks_for_the_class(tmp_path):
    values = {"epochs": 1, "show_progress": False, "checkpoint_dir": str(tmp_path)}
    folder = recbole_mm.run(Bare, "tiny", config_dict=values)["run"]
    with pytest.raises(InputError, match=r"'Bare' is no model .* give its class, model=Bare"):
        recbole_mm.load(folder)
    with pytest.raises(InputError, match=r"'Bare' is no model .* give its class, model=Bare"):
        recbole_mm.open_run(folder)
    for opened in (recbole_mm.load, recbole_mm.open_run):
        with pytest.raises(InputError, match=r"unknown model 'Bare'.*named module:Class"):
            opened(folder, model="Bare")
    assert recbole_mm.load(folder, model=Bare).recommend([["i001"]], k=2).items


# ------------------------------------------------------------------------- devices


@pytest.mark.parametrize("value", ["cuda", "nonsense"])
def test_the_device_is_chosen_by_other_keys(value):
    refused("use_gpu: False is the CPU, gpu_id a GPU", line=[f"--device={value}"])


def test_a_gpu_is_named_by_its_number():
    refused("gpu_id must be numbers of GPUs such as 0 or '0,1', got 'abc'", line=["--gpu_id=abc"])


@pytest.mark.parametrize("visible", ["3", "GPU-8f6d4a1c", "2,3", "", None])
def test_the_users_choice_of_gpus_stays(monkeypatch, visible):
    """A job of a shared machine is told by CUDA_VISIBLE_DEVICES where it may run."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = config()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if visible is None else visible)
    assert made["gpu_id"] == "0"
    config(line=["--gpu_id=1"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_gpu_that_was_asked_for_and_is_not_there_is_told(caplog, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config(line=["--gpu_id=0"])
    assert "no GPU is found here" in caplog.text
    caplog.clear()
    config()
    config(values={"use_gpu": False})
    assert not caplog.text


def test_hidden_features_are_those_of_modalities():
    refused(
        "'txt' is no modality here; did you mean 'text'", values={"hidden_features": {"txt": 5}}
    )


def test_a_loss_that_no_model_of_recbole_has_is_refused():
    refused(
        "loss_type: 'XX' is unknown; use one of CE, BPR", model="SASRec", line=["--loss_type=XX"]
    )


@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("BPR", {"metrics": ["NDCG", "TailPercentage"], "tail_ratio": 0.2}),
        ("FEARec", {"contrast": "us_x", "sim": "dot", "tau": 1.0}),
        ("AutoInt", {"has_residual": True}),
        ("DiffRec", {"norm": True}),
        ("SASRec", {"transform": "crop_itemseq", "eta": 0.5}),
        ("SASRec", {"transform": "reorder_itemseq", "beta": 0.5}),
        ("SASRec", {"transform": "mask_itemseq", "mask_ratio": 0.5}),
    ],
    ids=str,
)
def test_keys_that_recbole_reads_and_writes_nowhere_are_kept(model, values):
    config = Config(model, "tiny", None, values)
    assert {key: config[key] for key in values} == values


def test_a_key_of_a_metric_needs_the_metric():
    refused("tail_ratio: 0.2 is for the metric TailPercentage", values={"tail_ratio": 0.2})


def test_a_key_of_other_models_is_ignored_with_a_warning(caplog):
    config(values={"reg_weight": 0.1})
    assert "reg_weight in config_dict is a key of other models: MUFASA ignores it" in caplog.text


@pytest.mark.parametrize("model", [3, dict, ["MUFASA"], Path])
def test_what_is_no_model_is_refused(model):
    refused("model must be a name .* or a class derived from a model of RecBole", model=model)


def test_a_data_set_of_the_user_goes_before_the_one_that_is_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(config()["data_path"]) == DATASETS / "tiny"
    shutil.copytree(DATASETS / "tiny", tmp_path / "dataset" / "tiny")
    made = config()
    assert Path(made["data_path"]).resolve() == tmp_path / "dataset" / "tiny"
    assert config(None, None, [reusable(made.resolved())])["data_path"] == str(
        tmp_path / "dataset" / "tiny"
    )


def test_columns_can_be_selected_where_all_are_loaded():
    values = {"load_col": None, "selected_features": ["categories"]}
    assert Config("SASRecF", "tiny", None, values)["load_col"] is None


def test_random_order_is_refused_for_sequential_models():
    values = {"eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO"}}
    with pytest.raises(InputError, match="not possible for the sequential model SASRec; use order"):
        Config("SASRec", "tiny", None, values)
    assert Config("BPR", "tiny", None, values)["eval_args"]["order"] == "RO"


def test_a_value_behind_a_blank_names_the_mend():
    with pytest.raises(InputError, match=r"'--epochs' is not of the form .*; write --epochs=VALUE"):
        Config("SASRec", "tiny", command_line=["--epochs", "3"])
