"""Which cells a table has, and what identifies them."""

import pytest

from recbole_mm.compare.plan import plan
from recbole_mm.config import Config, reusable
from recbole_mm.errors import InputError


def labels(cells):
    return list(dict.fromkeys(cell.row.label for cell in cells))


def keys(*models, **options):
    return [cell.key for cell in plan(list(models), ["tiny"], 1, **options)]


def test_seeds_go_outermost_and_start_with_that_of_the_configuration():
    cells = plan(["Pop", "BPR"], ["tiny"], 3)
    assert [(cell.row.label, cell.seed) for cell in cells] == [
        (model, seed) for seed in (2020, 2021, 2022) for model in ("Pop", "BPR")
    ]
    assert [cell.seed for cell in plan(["Pop"], ["tiny"], [5, 3])] == [5, 3]


def test_each_cell_has_a_key_of_its_own_and_finds_it_again():
    first = [cell.key for cell in plan(["Pop", "BPR", "MUFASA"], ["tiny"], 2)]
    assert len(set(first)) == 6
    assert first == [cell.key for cell in plan(["Pop", "BPR", "MUFASA"], ["tiny"], 2)]


def test_what_changes_results_changes_the_key_and_nothing_else_does(tmp_path):
    base = keys("SASRec")
    assert keys("SASRec", command_line=["--epochs=7"]) != base
    assert keys("SASRec", config_dict={"mask_history": True}) != base
    assert keys("SASRec", command_line=["--state=DEBUG", "--use_gpu=False"]) == base
    # RecBole's SASRec reads no features, so their choice is not its matter
    assert keys("SASRec", command_line=["--modalities=[text]"]) == base
    assert keys("MUFASA", command_line=["--modalities=[text]"]) != keys("MUFASA")


def test_other_contents_of_the_data_files_are_other_cells(tmp_path):
    def written(times):
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        rows = "\n".join(f"u{u}\ti{i}\t{t}" for u in range(3) for i, t in enumerate(times))
        (folder / "mine.inter").write_text(
            f"user_id:token\titem_id:token\ttimestamp:float\n{rows}\n"
        )
        (cell,) = plan(["Pop"], ["mine"], 1, config_dict={"data_path": str(tmp_path)})
        return cell.key

    assert written([1, 2, 3, 4]) != written([1, 2, 4, 3])
    assert written([1, 2, 3, 4]) == written([1, 2, 3, 4])


@pytest.mark.parametrize("model", ["SASRec", "BPR", "Pop", "MUFASA", "CAMMSR", "MDSRec"])
def test_the_values_of_a_cell_make_the_configuration_that_was_planned(model):
    (cell,) = plan([model], ["tiny"], 1, command_line=["--epochs=3", "--topk=[5,10]"])
    again = Config(model, "tiny", [cell.values])
    assert reusable(again.resolved()) == dict(cell.values)


def test_ablation_files_are_found_by_name_and_by_a_star():
    cells = plan(["MUFASA+without_anchor", "MUFASA"], ["tiny"], 1)
    assert [cell.values["use_anchor"] for cell in cells] == [False, True]
    everything = labels(plan(["MUFASA+*"], ["tiny"], 1))
    assert everything[0] == "MUFASA"
    assert {"MUFASA+ids_only", "MUFASA+without_block"} <= set(everything)
    both = plan(["MUFASA+without_anchor+without_block"], ["tiny"], 1)[0].values
    assert (both["use_anchor"], both["use_block"]) == (False, False)


def test_variants_of_a_file_come_before_those_of_the_package(tmp_path):
    file = tmp_path / "v.yaml"
    file.write_text("short: {MAX_ITEM_LIST_LENGTH: 5}\nwithout_anchor: {epochs: 9}\n")
    cells = plan(["SASRec+short", "MUFASA+without_anchor"], ["tiny"], 1, variants=file)
    assert cells[0].values["MAX_ITEM_LIST_LENGTH"] == 5
    assert (cells[1].values["epochs"], cells[1].values["use_anchor"]) == (9, True)


def test_tuned_configurations_are_taken_by_data_set_then_by_model(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "SASRec.yaml").write_text("learning_rate: 0.01\n")
    (tmp_path / "SASRec.yaml").write_text("learning_rate: 0.02\n")
    (tmp_path / "BPR.yaml").write_text("learning_rate: 0.03\n")
    cells = plan(["SASRec", "BPR", "Pop"], ["tiny"], 1, tuned=tmp_path)
    assert [cell.values["learning_rate"] for cell in cells] == [0.01, 0.03, 0.001]

    assert [cell.tuned for cell in cells] == [True, True, False]


def test_a_tuned_configuration_sets_no_seed_for_one_row(tmp_path):
    (tmp_path / "SASRec.yaml").write_text("model: SASRec\ndataset: tiny\nseed: 7\n")
    with pytest.raises(InputError, match=r"SASRec\.yaml: seed is not for one row: use --seeds"):
        plan(["SASRec", "BPR"], ["tiny"], 1, tuned=tmp_path)


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_that_is_named_stays_beside_an_equal_one_of_the_modality_ablation(order):
    models = ["MUFASA", "MUFASA+ids_only"][::order]
    found = labels(plan(models, ["tiny"], 1, modality_ablation=True))
    assert sorted(found) == ["MUFASA", "MUFASA+ids_only", "MUFASA[image]", "MUFASA[text]"]
    assert [label for label in found if label in models] == models


def test_every_subset_of_modalities_is_a_row_of_models_that_read_them():
    cells = plan(["SASRec", "SASRecMM"], ["tiny"], 1, modality_ablation=True)
    assert labels(cells) == [
        "SASRec",
        "SASRecMM",
        "SASRecMM[text]",
        "SASRecMM[image]",
        "SASRecMM[]",
    ]
    assert [list(cell.values["modalities"]) for cell in cells[1:]] == [
        ["text", "image"],
        ["text"],
        ["image"],
        [],
    ]


def test_what_a_variant_sets_is_not_overruled_by_keys_for_all_rows(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("patient: {stopping_step: 20}\n")
    line = ["--stopping_step=3", "--epochs=7"]
    cells = plan(["BPR+patient", "Pop"], ["tiny"], 1, command_line=line, variants=file)
    assert [cell.values["stopping_step"] for cell in cells] == [20, 3]
    assert {cell.values["epochs"] for cell in cells} == {7}


GIVEN = "--modalities={text: {path: other.npy, ids: t.txt}, sound: {path: sound.npy, ids: t.txt}}"


def test_a_list_of_modalities_picks_from_what_the_command_line_declares(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("quiet: {modalities: [text]}\n")
    cells = plan(["SASRecMM", "SASRecMM+quiet"], ["tiny"], 1, command_line=[GIVEN], variants=file)
    assert [list(cell.values["modalities"]) for cell in cells] == [["text", "sound"], ["text"]]
    assert all(cell.values["modalities"]["text"]["path"] == "other.npy" for cell in cells)
    subsets = plan(["SASRecMM"], ["tiny"], 1, command_line=[GIVEN], modality_ablation=True)
    paths = [{d["path"] for d in cell.values["modalities"].values()} for cell in subsets]
    assert paths == [{"other.npy", "sound.npy"}, {"other.npy"}, {"sound.npy"}, set()]


def test_a_variant_changes_a_part_of_eval_args(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("last: {eval_args: {split: {LS: test_only}}}\n")
    line = ["--eval_args={mode: uni50}"]
    (cell,) = plan(["BPR+last"], ["tiny"], 1, command_line=line, variants=file)
    assert cell.values["eval_args"]["split"] == {"LS": "test_only"}
    assert cell.values["eval_args"]["mode"] == {"valid": "uni50", "test": "uni50"}


def test_rows_with_other_drawn_candidates_are_refused_before_they_are_trained():
    with pytest.raises(InputError, match="SASRec and BPR cannot share a table of tiny"):
        plan(["BPR", "SASRec"], ["tiny"], 1, command_line=["--eval_args={mode: uni50}"])


def test_a_shipped_data_set_is_found_beside_those_of_data_path(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n" + "u\ti\t1\n" * 4
    )
    cells = plan(["Pop"], ["mine", "tiny"], 1, command_line=[f"--data_path={tmp_path}"])
    assert [cell.dataset for cell in cells] == ["mine", "tiny"]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["SASRek"], {}, "SASRek on tiny: unknown model 'SASRek'; did you mean 'SASRec'"),
        (["MUFASA+without_ancor"], {}, "no variant 'without_ancor'; did you mean 'without_anchor'"),
        (["SASRec+*"], {}, "no ablations of SASRec"),
        (["SASRec", "SASRec"], {}, "SASRec is the same as SASRec"),
        (
            ["MUFASA", "MUFASA+without_anchor"],
            {"command_line": ["--use_anchor=False"]},
            "its variant sets nothing new",
        ),
        (["SASRec"], {"command_line": ["--seed=3"]}, "use --seeds"),
        (["SASRec"], {"command_line": ["--checkpoint_dir=x"]}, "use --out"),
        (["SASRec"], {"tuned": "no/such/folder"}, "is no folder"),
        (["SASRec"], {"tuned": "."}, "has no file for any row"),
        ([], {}, "--models: name at least one"),
        (["Pop"], {"command_line": ["--data_path=/no/such/folder"]}, "no data set 'tiny'"),
        (["SASRec"], {"command_line": ["--epoch=3"]}, "did you mean 'epochs'"),
        (["SASRec"], {"command_line": ["--knn_k=3"]}, "--knn_k: no row of the table reads it"),
    ],
)
def test_a_wrong_name_key_or_value_is_refused_before_anything_runs(models, options, message):
    with pytest.raises(InputError) as caught:
        plan(models, ["tiny"], 1, **options)
    assert message in str(caught.value)


def test_data_sets_are_named_once():
    with pytest.raises(InputError, match="name each data set once"):
        plan(["Pop"], ["tiny", "tiny"], 1)


@pytest.mark.parametrize(
    "values", ["{mask_history: true}", "{topk: [5, 10]}", "{val_interval: {rating: '[3,inf)'}}"]
)
def test_rows_that_would_be_evaluated_otherwise_are_refused_before_training(tmp_path, values):
    file = tmp_path / "variants.yaml"
    file.write_text(f"other: {values}\n")
    key = values.strip("{").partition(":")[0]
    with pytest.raises(InputError, match=rf"SASRec and SASRec\+other cannot share .*tiny: {key}"):
        plan(["SASRec", "SASRec+other"], ["tiny"], 1, variants=file)
    assert plan(["SASRec+other", "MUFASA+other", "Pop+other"], ["tiny"], 1, variants=file)


@pytest.mark.parametrize("seeds", [0, [], [1, 1]])
def test_seeds_are_named_once(seeds):
    with pytest.raises(InputError, match="--seeds"):
        plan(["Pop"], ["tiny"], seeds)


@pytest.mark.parametrize("name", ["mine", "a[1]"])
def test_only_what_a_model_reads_is_in_its_key(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    file = folder / f"{name}.inter"
    rows = [f"u{u}\ti{i}\t{i}" for u in range(3) for i in range(4)]
    header = "user_id:token\titem_id:token\ttimestamp:float"

    def key(rows):
        file.write_text("\n".join([header, *rows]) + "\n")
        (cell,) = plan(["Pop"], [name], 1, config_dict={"data_path": str(tmp_path)})
        return cell.key

    whole = key(rows)
    assert key(rows[:-1]) != whole
    (folder / f"{name}.feat1CLS").write_text("x")  # features, which Pop does not read
    assert key(rows) == whole


def test_a_variant_sets_no_key_that_is_not_for_one_row(tmp_path):
    file = tmp_path / "v.yaml"
    file.write_text("lucky: {seed: 7}\n")
    with pytest.raises(InputError, match="lucky: seed is not for one row: use --seeds"):
        plan(["Pop+lucky"], ["tiny"], 1, variants=file)


def test_seeds_and_modes_that_no_cell_could_have_are_refused():
    with pytest.raises(InputError, match="a seed must lie in"):
        plan(["Pop"], ["tiny"], [2**32])
    labels = ["--eval_args={mode: labeled}", "--metrics=[AUC]", "--valid_metric=AUC"]
    with pytest.raises(InputError, match="mode labeled has no ranking"):
        plan(["FM"], ["tiny"], 1, command_line=labels)
