"""Data sets in the layouts of other projects: every interaction and vector arrives, by its name."""

from __future__ import annotations

import json
import pickle
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from recbole_mm.cli import main
from recbole_mm.data.feature_files import read_features
from recbole_mm.data.layouts import LAYOUTS, import_dataset
from recbole_mm.errors import InputError

ITEMS = [f"B00{i}" for i in range(12)]
# of 3 to 9 items; u3 comes back to one
HISTORIES = {
    "u0": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "u1": [3, 2, 1, 0, 9],
    "u2": [10, 4, 7],
    "u3": [5, 6, 5, 7, 5],
}
WIDTHS = {"text": 3, "image": 2}


@pytest.fixture
def vectors():
    rng = np.random.default_rng(7)
    held = {name: rng.normal(size=(len(ITEMS), w)).astype("float32") for name, w in WIDTHS.items()}
    held["image"][4] = 0  # no image
    return held


def interactions(folder, name):
    frame = pd.read_csv(folder / f"{name}.inter", sep="\t", dtype=str)
    assert [column.split(":")[0] for column in frame][:3] == ["user_id", "item_id", "timestamp"]
    frame.columns = [column.split(":")[0] for column in frame]
    return frame


def in_order(frame):
    frame = frame.assign(timestamp=frame["timestamp"].astype(float))
    frame = frame.sort_values(["user_id", "timestamp"], kind="stable")
    return {user: part["item_id"].tolist() for user, part in frame.groupby("user_id")}


def named(histories=HISTORIES):
    return {user: [ITEMS[item] for item in items] for user, items in histories.items()}


def check_features(folder, vectors, *, absent=("B004",), first=0):
    for modality, matrix in vectors.items():
        file = read_features(folder / f"{modality}.safetensors")
        assert file.tokens == ITEMS[first:]
        present = dict(zip(file.tokens, file.present.tolist(), strict=True))
        for token, row in zip(file.tokens, file.values.numpy(), strict=True):
            assert np.array_equal(row, matrix[ITEMS.index(token)])
            assert present[token] == (modality == "text" or token not in absent)
        assert file.metadata["source_sha256"]


# ------------------------------------------------------------------ writers, as the projects write


def write_mmrec(folder, vectors, *, mapped=True):
    users = list(HISTORIES)
    lines = ["userID\titemID\trating\ttimestamp\tx_label"]
    for user, items in HISTORIES.items():
        for at, item in enumerate(items):
            lines.append(f"{users.index(user)}\t{item}\t5.0\t{1400000000 + 60 * at}\t{at % 3}")
    folder.mkdir(parents=True)
    (folder / "baby.inter").write_text("\n".join(lines) + "\n")
    if mapped:
        rows = "".join(f"{token}\t{i}\n" for i, token in enumerate(ITEMS))
        (folder / "i_id_mapping.csv").write_text("asin\titemID\n" + rows)
        rows = "".join(f"{user}\t{i}\n" for i, user in enumerate(users))
        (folder / "u_id_mapping.csv").write_text("user_id\tuserID\n" + rows)
    np.save(folder / "image_feat.npy", vectors["image"].astype("float64"))
    np.save(folder / "text_feat.npy", vectors["text"])


def write_unisrec(folder, vectors, *, cap=4, shortest_first=False, header=True):
    """Prefixes of at most ``cap`` items, the longest first."""
    name = folder.name
    folder.mkdir(parents=True)
    parts = {part: [] for part in ("train", "valid", "test")}
    for u, items in enumerate(HISTORIES.values()):
        places = {"train": range(len(items) - 3, 0, -1), "valid": [len(items) - 2]}
        places["test"] = [len(items) - 1]
        if shortest_first:
            places["train"] = range(1, len(items) - 2)
        for part, rows in parts.items():
            for place in places[part]:
                before = " ".join(map(str, items[max(0, place - cap) : place]))
                rows.append(f"{u}\t{before}\t{items[place]}")
    for part, rows in parts.items():
        head = "user_id:token\titem_id_list:token_seq\titem_id:token"
        (folder / f"{name}.{part}.inter").write_text("\n".join([head, *rows]) + "\n")
    index = "".join(f"{token}\t{i}\n" for i, token in enumerate(ITEMS))
    (folder / f"{name}.item2index").write_text(index)
    index = "".join(f"{user}\t{i}\n" for i, user in enumerate(HISTORIES))
    (folder / f"{name}.user2index").write_text(index)
    texts = "item_id:token\ttext:token_seq\n" if header else ""
    texts += "".join(f'{token}\tA "quoted" title {token}.\n' for token in ITEMS[1:])
    (folder / f"{name}.text").write_text(texts)
    vectors["text"].tofile(folder / f"{name}.feat1CLS")
    vectors["text"].tofile(folder / f"{name}.feat2CLS")
    vectors["image"].tofile(folder / f"{name}.feat3CLS")


def write_hm4sr(folder, vectors, *, as_json=True):
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, items in HISTORIES.items():
        lines += [f"{user}\t{ITEMS[item]}\t{86400 * at + 5}" for at, item in enumerate(items)]
    (folder / "Games.inter").write_text("\n".join(lines) + "\n")
    # RecBole numbers items as they come: here backwards
    item2id = {"[PAD]": 0} | {token: 12 - i for i, token in enumerate(ITEMS)}
    with (folder / "item2id").open("wb") as file:
        pickle.dump(item2id, file)
    if as_json:
        (folder / "item2id.json").write_text(json.dumps(item2id))
    for file, modality in (("txt_emb.pt", "text"), ("img_emb.pt", "image")):
        matrix = torch.from_numpy(vectors[modality].copy()).flip(0)
        torch.save(torch.cat([torch.zeros(1, matrix.shape[1]), matrix]), folder / file)
    counts = torch.zeros(13, 4, dtype=torch.long)
    counts[item2id["B000"], [1, 3]] = torch.tensor([1, 2])
    torch.save(counts, folder / "cat.pt")
    (folder / "content.txt").write_text("B000\tFirst game. \nB001\tSecond game. \n")


def write_microlens(folder, vectors, *, english=False):
    (folder / "extracted_modality_features").mkdir(parents=True)
    lines = ["user,item,timestamp"]
    for u, items in enumerate(HISTORIES.values()):
        lines += [f"{u},{item + 1},{1580000000000 + at}" for at, item in enumerate(items)]
    (folder / "MicroLens-50k_pairs.csv").write_text("\n".join(lines) + "\n")
    if english:
        (folder / "MicroLens-50k_title_en.csv").write_text("1,One, two\n3,Three\n")
    else:
        (folder / "MicroLens-50k_titles.csv").write_text('item,title\n1,"One, two"\n3,Three\n')
    (folder / "tags_to_summary.csv").write_text("1,Film and television\n2,Food\n")
    np.save(folder / "MicroLens-50k_image_features_CLIPRN50.npy", vectors["image"])
    place = folder / "extracted_modality_features"
    np.save(place / "MicroLens-50k_title_en_text_features_BgeM3.npy", vectors["text"])


def write_ducho(folder, vectors, models=(("text", "sentence_transformers/all-mpnet-base-v2/1"),)):
    kinds = {"text": "textual_embeddings_1", "image": "visual_embeddings_1"}
    for modality, path in models:
        place = folder / kinds[modality] / path
        place.mkdir(parents=True)
        for token, row in zip(ITEMS, vectors[modality], strict=True):
            np.save(place / f"{token}.npy", row[None])


WRITERS = {
    "mmrec": write_mmrec,
    "unisrec": write_unisrec,
    "missrec": write_unisrec,
    "hm4sr": write_hm4sr,
    "microlens": write_microlens,
}


# --------------------------------------------------------------------------- what arrives


def test_mmrec(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    done = import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    folder = tmp_path / "data/baby"
    frame = interactions(folder, "baby")
    assert in_order(frame) == named()
    assert frame["timestamp"].iloc[0] == "1400000000"
    assert frame["rating"].tolist() == ["5.0"] * len(frame)
    check_features(folder, vectors)
    assert (done.users, done.items, done.interactions) == (4, 11, 22)
    assert done.features == {"image": (11, 2, 10), "text": (12, 3, 11)}
    assert any("x_label" in note for note in done.notes)


def test_mmrecs_missing_images_are_missing(tmp_path, vectors):
    """Its notebook gives them the mean of the others, and lists them."""
    others = vectors["image"][8:].astype("float64")
    vectors["image"][8:] = others
    vectors["image"][:8] = others.mean(axis=0)
    write_mmrec(tmp_path / "baby", vectors)
    done = import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    assert done.features == {"image": (4, 2, 3), "text": (12, 3, 11)}  # one of four in no history
    file = read_features(tmp_path / "data/baby/image.safetensors")
    assert file.present.tolist() == [False] * 8 + [True] * 4
    (tmp_path / "baby/missed_img_itemIDs.csv").write_text("0\n9\n")
    done = import_dataset("mmrec", tmp_path / "baby", tmp_path / "data", name="listed")
    file = read_features(tmp_path / "data/listed/image.safetensors")
    assert file.present.tolist() == [False] * 8 + [True, False, True, True]
    (tmp_path / "baby/missed_img_itemIDs.csv").write_text("12\n")
    with pytest.raises(InputError, match=r"has an itemID 12, and image_feat.npy only 12 rows"):
        import_dataset("mmrec", tmp_path / "baby", tmp_path / "data", name="other")


def test_equal_vectors_are_not_missing(tmp_path):
    write_mmrec(tmp_path / "baby", {"image": np.ones((12, 2)), "text": np.ones((12, 2))})
    done = import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    assert done.features["image"] == (12, 2, 11)


@pytest.mark.parametrize("name", ["on", "1", "null"])
def test_names_of_modalities_stay_names(tmp_path, vectors, name):
    write_mmrec(tmp_path / "baby", vectors)
    (tmp_path / "baby/text_feat.npy").rename(tmp_path / f"baby/{name}_feat.npy")
    done = import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    assert set(yaml.safe_load(done.config.read_text())["modalities"]) == {"image", name}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("_feat.npy", "'' cannot name a modality"),
        ("i mage_feat.npy", "is the modality i_mage, too"),
    ],
)
def test_names_of_no_modality_are_refused(tmp_path, vectors, name, match):
    write_mmrec(tmp_path / "baby", vectors)
    (tmp_path / "baby/text_feat.npy").rename(tmp_path / "baby" / name)
    (tmp_path / "baby/image_feat.npy").rename(tmp_path / "baby/i-mage_feat.npy")
    refused(match, "mmrec", tmp_path / "baby", tmp_path / "data")


def test_mmrec_without_names_keeps_its_numbers(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors, mapped=False)
    import_dataset("mmrec", tmp_path / "baby", tmp_path / "data", name="mine")
    frame = interactions(tmp_path / "data/mine", "mine")
    assert in_order(frame)["3"] == ["5", "6", "5", "7", "5"]
    file = read_features(tmp_path / "data/mine/text.safetensors")
    assert file.tokens == [str(i) for i in range(12)]


@pytest.mark.parametrize("cap", [2, 4, 50])
@pytest.mark.parametrize("shortest_first", [False, True])
def test_unisrecs_prefixes_become_the_histories_again(tmp_path, vectors, cap, shortest_first):
    write_unisrec(tmp_path / "Sci", vectors, cap=cap, shortest_first=shortest_first)
    done = import_dataset("unisrec", tmp_path / "Sci", tmp_path / "data")
    folder = tmp_path / "data/Sci"
    frame = interactions(folder, "Sci")
    assert in_order(frame) == named()
    assert frame.groupby("user_id")["timestamp"].apply(list)["u2"] == ["0", "1", "2"]
    check_features(folder, vectors)
    texts = (folder / "Sci.item").read_text().splitlines()
    assert texts[0] == "item_id:token\ttext:token_seq"
    assert texts[1] == "B000\t_"
    assert texts[2] == 'B001\tA "quoted" title B001.'
    assert any("feat2CLS" in note for note in done.notes)


def test_a_text_file_without_a_header_loses_no_line(tmp_path, vectors):
    write_unisrec(tmp_path / "Sci", vectors, header=False)
    import_dataset("missrec", tmp_path / "Sci", tmp_path / "data")
    assert 'B001\tA "quoted" title' in (tmp_path / "data/Sci/Sci.item").read_text()


def test_hm4sr(tmp_path, vectors):
    write_hm4sr(tmp_path / "Games", vectors)
    done = import_dataset("hm4sr", tmp_path / "Games", tmp_path / "data")
    folder = tmp_path / "data/Games"
    assert in_order(interactions(folder, "Games")) == named()
    for modality, matrix in vectors.items():
        file = read_features(folder / f"{modality}.safetensors")
        assert sorted(file.tokens) == sorted(ITEMS)
        for token, row in zip(file.tokens, file.values.numpy(), strict=True):
            assert np.array_equal(row, matrix[ITEMS.index(token)])
    assert done.features["image"] == (11, 2, 10)
    rows = (folder / "Games.item").read_text().splitlines()
    assert rows[:3] == [
        "item_id:token\tcategories:token_seq\ttext:token_seq",
        "B000\tc1 c3\tFirst game.",
        "B001\t_\tSecond game.",
    ]
    config = yaml.safe_load(done.config.read_text())
    assert config["category_field"] == "categories"


@pytest.mark.parametrize("english", [False, True])
def test_microlens(tmp_path, vectors, english):
    write_microlens(tmp_path / "raw", vectors, english=english)
    done = import_dataset("microlens", tmp_path / "raw", tmp_path / "data")
    folder = tmp_path / "data/MicroLens-50k"
    expected = {
        str(u): [str(item + 1) for item in items] for u, items in enumerate(HISTORIES.values())
    }
    assert in_order(interactions(folder, "MicroLens-50k")) == expected
    for modality, matrix in vectors.items():
        file = read_features(folder / f"{modality}.safetensors")
        assert file.tokens == [str(i) for i in range(1, 13)]
        assert np.array_equal(file.values.numpy(), matrix)
    rows = (folder / "MicroLens-50k.item").read_text().splitlines()
    assert rows[:4] == [
        "item_id:token\ttitle:token_seq\tcategories:token_seq",
        "1\tOne, two\tFilm_and_television",
        "2\t_\tFood",
        "3\tThree\t_",
    ]
    assert done.lines()[-1].endswith(f"--config_files={folder}/MicroLens-50k.yaml")


def test_ducho_adds_features_to_a_data_set(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    folder = tmp_path / "data/baby"
    import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    for modality in WIDTHS:
        (folder / f"{modality}.safetensors").unlink()
    before = (folder / "baby.inter").read_bytes()
    models = [
        ("text", "sentence_transformers/sentence-transformers/all-mpnet-base-v2/1"),
        ("image", "torch/ResNet50/avgpool"),
        ("image", "transformers/openai/clip-vit-base-patch16/1"),
    ]
    write_ducho(tmp_path / "demo_baby", vectors, models)
    done = import_dataset("ducho", tmp_path / "demo_baby", tmp_path / "data", name="baby")
    assert list(done.features) == ["text", "image_resnet50", "image_clip_vit_base_patch16"]
    assert yaml.safe_load(done.config.read_text())["modalities"].keys() == done.features.keys()
    file = read_features(folder / "image_resnet50.safetensors")
    assert dict(zip(file.tokens, file.present.tolist(), strict=True))["B004"] is False
    assert (folder / "baby.inter").read_bytes() == before
    with pytest.raises(InputError, match=r"ducho.yaml is there already; move it away"):
        import_dataset("ducho", tmp_path / "demo_baby", tmp_path / "data", name="baby")


def test_duchos_fused_vectors_are_called_so(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    write_ducho(tmp_path / "demo", vectors, [("image", "transformers/openai/clip/1")])
    place = tmp_path / "demo/visual_embeddings_1"
    place.rename(tmp_path / "demo/visual_embeddings_textual_embeddings_concat")
    done = import_dataset("ducho", tmp_path / "demo", tmp_path / "data", name="baby")
    assert list(done.features) == ["image_text_concat"]
    assert 'from "demo"' in done.config.read_text()
    own = tmp_path / "data/baby/baby.yaml"
    assert done.lines()[-1].endswith(f"--config_files={own} {done.config}'")


def test_an_interrupted_import_of_duchos_leaves_nothing(tmp_path, vectors, monkeypatch):
    write_mmrec(tmp_path / "baby", vectors, mapped=True)
    import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    folder = tmp_path / "data/baby"
    models = [("image", "torch/ResNet50/avgpool"), ("image", "torch/ResNet50/fc")]
    write_ducho(tmp_path / "demo", vectors, models)
    before, moved, rename = sorted(folder.iterdir()), [], Path.rename

    def interrupted(self, target):
        rename(self, target)
        moved.append(self.name)
        if len(moved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_dataset("ducho", tmp_path / "demo", tmp_path / "data", name="baby")
    monkeypatch.undo()
    assert len(moved) == 2
    assert sorted(folder.iterdir()) == before
    import_dataset("ducho", tmp_path / "demo", tmp_path / "data", name="baby")


def test_two_layers_of_one_model_keep_apart(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors, mapped=True)
    import_dataset("mmrec", tmp_path / "baby", tmp_path / "data")
    models = [("image", "torch/ResNet50/avgpool"), ("image", "torch/ResNet50/fc")]
    write_ducho(tmp_path / "demo", vectors, models)
    done = import_dataset("ducho", tmp_path / "demo", tmp_path / "data", name="baby")
    assert list(done.features) == ["image_resnet50", "image_resnet50_fc"]


@pytest.mark.parametrize("layout", sorted(WRITERS))
def test_what_was_imported_trains(tmp_path, vectors, layout, capsys):
    source = tmp_path / "raw" / "Set"
    WRITERS[layout](source, vectors)
    data = tmp_path / "of mine"
    assert main(["import", layout, str(source), "--name=mine", f"--data_path={data}"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("use it: recbole-mm ")
    command = shlex.split(command)
    assert command[:3] == ["run", "--model=SASRecMM", "--dataset=mine"]
    place = f"--checkpoint_dir={tmp_path / 'saved'}"
    quick = ["--epochs=1", "--topk=[5,10]", "--train_batch_size=8", place]
    assert main([*command, *quick]) == 0
    said = capsys.readouterr().out
    assert "matched 10 of 11 items, missing 1" in said  # the image of B004
    assert "matched 11 of 11 items, missing 0" in said


# --------------------------------------------------------------------------- what is refused


def refused(match, layout, folder, data, **more):
    with pytest.raises(InputError, match=match):
        import_dataset(layout, folder, data, **more)
    assert not data.exists() or not list(data.iterdir())


def test_a_pickle_is_not_opened(tmp_path, vectors):
    write_hm4sr(tmp_path / "Games", vectors, as_json=False)
    refused("is not opened here.*pickle.load", "hm4sr", tmp_path / "Games", tmp_path / "data")


@pytest.mark.parametrize(
    ("file", "old", "new", "match"),
    [
        ("u_id_mapping.csv", "u1\t1", "u0\t1", "a name or a userID stands twice"),
        ("i_id_mapping.csv", "B004\t4", "B003\t4", "a name or a itemID stands twice"),
        ("i_id_mapping.csv", "B004\t4", "B004\t04", "itemID '04' is not a whole number from 0"),
        ("baby.inter", "1400000060", "1_400", "timestamp '1_400' is not a number"),
    ],
)
def test_mmrecs_tables_say_each_thing_once(tmp_path, vectors, file, old, new, match):
    write_mmrec(tmp_path / "baby", vectors)
    path = tmp_path / "baby" / file
    path.write_text(path.read_text().replace(old, new))
    refused(match, "mmrec", tmp_path / "baby", tmp_path / "data")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("0, 1,5", "item ' 1' is not a whole number from 0"),
        ("0,0,5", "has an item 0; items are numbered from 1"),
    ],
)
def test_microlens_numbers_are_plain(tmp_path, vectors, row, match):
    write_microlens(tmp_path / "ml", vectors)
    with (tmp_path / "ml/MicroLens-50k_pairs.csv").open("a") as file:
        file.write(row + "\n")
    refused(match, "microlens", tmp_path / "ml", tmp_path / "data")


def test_microlens_texts(tmp_path, vectors):
    write_microlens(tmp_path / "ml", vectors)
    with (tmp_path / "ml/tags_to_summary.csv").open("a") as file:
        file.write("1,Food\n")
    import_dataset("microlens", tmp_path / "ml", tmp_path / "data")
    rows = (tmp_path / "data/MicroLens-50k/MicroLens-50k.item").read_text().splitlines()
    assert rows[1] == "1\tOne, two\tFilm_and_television Food"
    (tmp_path / "ml/MicroLens-50k_titles.csv").write_text('1,"One\n3,Three\n')
    with pytest.raises(InputError, match="the text of '1' goes on in the next line"):
        import_dataset("microlens", tmp_path / "ml", tmp_path / "data", name="other")


def test_unisrec_without_names_leaves_texts_out(tmp_path, vectors):
    write_unisrec(tmp_path / "Sci", vectors)
    for path in [*(tmp_path / "Sci").glob("*CLS"), tmp_path / "Sci/Sci.item2index"]:
        path.unlink()
    done = import_dataset("unisrec", tmp_path / "Sci", tmp_path / "data")
    assert any("Sci.text is left out: Sci.item2index" in note for note in done.notes)
    assert not (tmp_path / "data/Sci/Sci.item").exists()


def test_a_blank_last_line_is_none(tmp_path, vectors):
    write_unisrec(tmp_path / "Sci", vectors)
    with (tmp_path / "Sci/Sci.item2index").open("a") as file:
        file.write("\n")
    assert import_dataset("unisrec", tmp_path / "Sci", tmp_path / "data").items == 11


@pytest.mark.parametrize("count", [-1.0, float("nan")])
def test_counts_of_categories_are_counts(tmp_path, vectors, count):
    write_hm4sr(tmp_path / "Games", vectors)
    counts = torch.ones(13, 4)
    counts[3, 1] = count
    torch.save(counts, tmp_path / "Games/cat.pt")
    refused("cat.pt: holds a count that is neg", "hm4sr", tmp_path / "Games", tmp_path / "data")


def test_mmrec_without_a_time_has_no_order(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    inter = tmp_path / "baby/baby.inter"
    inter.write_text(inter.read_text().replace("timestamp", "when"))
    refused("has no column timestamp", "mmrec", tmp_path / "baby", tmp_path / "data")


def test_a_time_that_is_no_number_is_refused(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    inter = tmp_path / "baby/baby.inter"
    inter.write_text(inter.read_text().replace("1400000060", "soon"))
    refused("timestamp 'soon' is not a number", "mmrec", tmp_path / "baby", tmp_path / "data")


def test_files_of_different_states_are_refused(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    np.save(tmp_path / "baby/text_feat.npy", vectors["text"][:5])
    refused("5 rows, but baby.inter has an itemID 10", "mmrec", tmp_path / "baby", tmp_path / "d")
    np.save(tmp_path / "baby/text_feat.npy", np.ones((13, 3)))
    refused("13 rows, but item 12 has no name", "mmrec", tmp_path / "baby", tmp_path / "d")
    mapping = tmp_path / "baby/i_id_mapping.csv"
    mapping.write_text("asin\titemID\nB000\t0\n")
    refused("itemID .* has no name in the mapping of 1", "mmrec", tmp_path / "baby", tmp_path / "d")
    write_microlens(tmp_path / "ml", vectors)
    np.save(tmp_path / "ml/MicroLens-50k_image_features_CLIPRN50.npy", vectors["image"][:4])
    refused("4 rows, but .*_pairs.csv has an item 11", "microlens", tmp_path / "ml", tmp_path / "d")
    write_hm4sr(tmp_path / "Games", vectors)
    torch.save(torch.ones(5, 3), tmp_path / "Games/txt_emb.pt")
    refused("5 rows, but item2id.json has 12 items", "hm4sr", tmp_path / "Games", tmp_path / "d")


def test_rows_that_are_no_prefixes_are_refused(tmp_path, vectors):
    write_unisrec(tmp_path / "Sci", vectors)
    train = tmp_path / "Sci/Sci.train.inter"
    lines = train.read_text().splitlines()
    train.write_text("\n".join([lines[0], *lines[2:]]) + "\n")  # one row less
    refused("user '0' are not all prefixes of one", "unisrec", tmp_path / "Sci", tmp_path / "data")


def test_the_width_of_a_bare_matrix_is_never_guessed(tmp_path, vectors):
    write_unisrec(tmp_path / "Sci", vectors)
    (tmp_path / "Sci/Sci.feat1CLS").write_bytes(b"\0" * 40)
    refused(
        "40 bytes are no float32 numbers in 12 rows", "unisrec", tmp_path / "Sci", tmp_path / "d"
    )
    (tmp_path / "Sci/Sci.item2index").unlink()
    refused("Sci.item2index, which says how many", "unisrec", tmp_path / "Sci", tmp_path / "d")


def test_two_matrices_of_one_modality_are_refused(tmp_path, vectors):
    write_microlens(tmp_path / "ml", vectors)
    np.save(tmp_path / "ml/MicroLens-50k_image_features_other.npy", vectors["image"])
    refused("2 matrices for image", "microlens", tmp_path / "ml", tmp_path / "data")


def test_vectors_of_other_items_are_refused(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors, mapped=False)
    import_dataset("mmrec", tmp_path / "baby", tmp_path / "data", name="mine")
    write_ducho(tmp_path / "demo", vectors)
    folder = tmp_path / "data/mine"
    (folder / "text.safetensors").unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match=r"no vector is that of an item. Names there: 'B000'"):
        import_dataset("ducho", tmp_path / "demo", tmp_path / "data", name="mine")
    assert sorted(folder.iterdir()) == before
    refused(r"demo.inter does not exist; ducho", "ducho", tmp_path / "demo", tmp_path / "empty")


def test_nothing_is_written_over(tmp_path, vectors, capsys):
    write_mmrec(tmp_path / "baby", vectors)
    command = ["import", "mmrec", str(tmp_path / "baby"), f"--data_path={tmp_path / 'data'}"]
    assert main(command) == 0
    before = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    assert main(command) == 2
    assert "is there already; move it away" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == before


def test_a_bad_vector_leaves_nothing_behind(tmp_path, vectors):
    write_mmrec(tmp_path / "baby", vectors)
    bad = vectors["text"].copy()
    bad[3, 1] = np.nan
    np.save(tmp_path / "baby/text_feat.npy", bad)
    message = rf"^{tmp_path}/baby/text_feat.npy: the vector of item 'B003' holds NaN.*write zeros"
    refused(message, "mmrec", tmp_path / "baby", tmp_path / "data")
    np.save(tmp_path / "baby/text_feat.npy", 0 * vectors["text"])
    refused("text_feat.npy: every vector is zero", "mmrec", tmp_path / "baby", tmp_path / "data")


def mutated(data, rng):
    """A file that was cut off, has other bytes, or a part of it twice."""
    kind, place = rng.integers(4), int(rng.integers(len(data) + 1))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes(rng.integers(0, 256, 3, dtype=np.uint8)) + data[place + 3 :]
    if kind == 2:
        return (
            data[:place]
            + rng.choice([b"\t", b"\n", b",", b'"', b"\0", b"-1", b"1e999"])
            + data[place:]
        )
    return data + data[place:]


@pytest.mark.parametrize("layout", sorted(WRITERS))
def test_damaged_files_are_read_or_refused(tmp_path, vectors, layout):
    folder = tmp_path / "Set"
    WRITERS[layout](folder, vectors)
    good = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    rng = np.random.default_rng(2020)
    n_refused = 0
    for turn in range(60):
        path = list(good)[turn % len(good)]
        path.write_bytes(mutated(good[path], rng))
        try:
            import_dataset(layout, folder, tmp_path / "data", name=f"turn{turn}")
        except InputError:
            n_refused += 1
        path.write_bytes(good[path])
    assert 0 < n_refused < 60
    assert not [left for left in (tmp_path / "data").iterdir() if left.name.startswith(".")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_something_else_is_refused(tmp_path, layout):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/readme.txt").write_text("nothing")
    refused(r"needs one .*readme.txt|no <item>.npy", layout, tmp_path / "x", tmp_path / "data")
    refused("is no folder", layout, tmp_path / "y", tmp_path / "data")


def test_an_unknown_layout_is_refused(tmp_path):
    refused("layout: 'amazon' is unknown; use one of mmrec", "amazon", tmp_path, tmp_path / "data")
    write_mmrec(tmp_path / "baby", {"image": np.ones((12, 2)), "text": np.ones((12, 2))})
    refused("no plain folder name", "mmrec", tmp_path / "baby", tmp_path / "data", name="../x")
