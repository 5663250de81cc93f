"""Bad input through the command line: the fault cases 1 to 33 of reliability.md.

Each fault is planted into a copy of the generated data set. A refusal must have exit code 2, a
message that names the culprit, and must leave nothing behind; what is accepted must give the
result of the clean data. `benchmarks/cases.py` runs RecBole itself on the same inputs.
"""

import io
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recbole_mm.cli import main, run_main
from recbole_mm.config import DATASETS


@pytest.fixture
def world(tmp_path):
    """A copy of tiny that a test may break."""
    shutil.copytree(DATASETS / "tiny", tmp_path / "data" / "tiny")
    return tmp_path


def folder(world):
    return world / "data" / "tiny"


def launch(world, *arguments, model="Pop"):
    return run_main(
        [
            *(f"--model={model}", "--dataset=tiny", f"--data_path={world / 'data'}", "--epochs=1"),
            *("--show_progress=False", "--MAX_ITEM_LIST_LENGTH=10", "--mfl_pretrain_epochs=0"),
            *(f"--checkpoint_dir={world / 'saved'}", f"--feature_cache_dir={world / 'cache'}"),
            *arguments,
        ]
    )


def refused(world, capsys, *fragments, arguments=(), model="Pop"):
    assert launch(world, *arguments, model=model) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (world / "saved").exists()
    assert not list(world.rglob("*.tmp"))


def result(world, *arguments, model="Pop"):
    """Test result, protocol and report of a run that must work; its folder is removed."""
    assert launch(world, *arguments, model=model) == 0
    (run,) = (world / "saved" / "tiny" / model).iterdir()
    content = json.loads((run / "result.json").read_text())
    shutil.rmtree(world / "saved")
    return content


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def features(world, values, *, declaration="{path: x.npy, ids: ids.txt}", ids=None):
    """Write a matrix and its ids, and return the argument that declares it."""
    np.save(folder(world) / "x.npy", values)
    tokens = [f"i{n:03d}" for n in range(len(values))] if ids is None else ids
    (folder(world) / "ids.txt").write_text("\n".join(tokens) + "\n")
    return f"--modalities={{x: {declaration}}}"


def matrix(rows=120):
    return np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)


# ---------------------------------------------------------------------- interactions


def test_case_1_missing_data_set(world, capsys):
    shutil.rmtree(folder(world))
    refused(world, capsys, "no data set 'tiny'", "tiny.inter", "set data_path")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "the file is empty"),
        ("user_id:token\titem_id:token\ttimestamp:float\n", "has a header but no row"),
    ],
)
def test_case_2_empty_or_header_only_file(world, capsys, content, fragment):
    (folder(world) / "tiny.inter").write_text(content)
    refused(world, capsys, "tiny.inter", fragment)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("user_id", "is not name:type"),
        ("user_id:token:x", "is not name:type"),
        ("user_id:tokn", "has the unknown type 'tokn'"),
    ],
)
def test_case_3_malformed_header_is_quoted(world, capsys, field, wrong):
    header = f"{field}\titem_id:token\ttimestamp:float"
    rewrite(folder(world) / "tiny.inter", lambda b: header.encode() + b[b.index(b"\n") :])
    refused(world, capsys, "tiny.inter, line 1: field 'user_id", f"the header {header!r} {wrong}")


def test_cases_4_and_5_byte_order_mark_and_crlf_change_nothing(world):
    clean = result(world)
    rewrite(folder(world) / "tiny.inter", lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n"))
    broken = result(world)
    assert broken["protocol"] == clean["protocol"]
    assert broken["test_result"] == clean["test_result"]


def test_cases_6_and_7_quotes_and_na_lose_no_row(world):
    path = folder(world) / "tiny.item"
    lines = path.read_text().splitlines()
    for row, title in enumerate(['"odd', "NA", "null", 'a "b', "nan", "None"], start=1):
        cells = lines[row].split("\t")
        lines[row] = "\t".join([cells[0], title, *cells[2:]])
    path.write_text("\n".join(lines) + "\n")
    rename = {"i001": "NA", "i002": "null", "i003": "nan", "i004": '"i004'}
    for name in ("tiny.inter", "tiny.item", "image_ids.txt"):
        text = (folder(world) / name).read_text()
        for old, new in rename.items():
            text = text.replace(old, new)
        (folder(world) / name).write_text(text)
    done = result(
        world,
        "--modalities={t: {derive: text, fields: [title], method: tfidf, dim: 4}}",
        model="SASRecMM",
    )
    assert done["data"]["interactions"]["items"] == 120
    assert done["data"]["interactions"]["interactions"] == 3328


def test_case_8_short_row_names_its_line(world, capsys):
    path = folder(world) / "tiny.inter"
    lines = path.read_text().splitlines()
    lines[6] = "\t".join(lines[6].split("\t")[:2])
    path.write_text("\n".join(lines) + "\n")
    refused(world, capsys, "tiny.inter, line 7: 2 fields where the header has 3")


@pytest.mark.parametrize("value", ["", "yesterday", "nan"])
def test_case_9_bad_time_is_refused_or_dropped_and_never_imputed(world, capsys, value):
    path = folder(world) / "tiny.inter"
    lines = path.read_text().splitlines()
    lines[4] = "\t".join([*lines[4].split("\t")[:2], value])
    path.write_text("\n".join(lines) + "\n")
    refused(world, capsys, "line 5", "on_bad_time")
    dropped = result(world, "--on_bad_time=drop")
    assert dropped["data"]["interactions"]["interactions"] == 3327
    assert any("1 rows without a usable time dropped" in x for x in dropped["data"]["lines"])


def test_case_10_repeated_rows_are_counted_and_kept(world):
    path = folder(world) / "tiny.inter"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1], lines[2]]) + "\n")
    done = result(world)
    assert done["data"]["interactions"]["interactions"] == 3330
    assert any("2 repeated" in line for line in done["data"]["lines"])


def test_case_11_equal_times_keep_the_order_of_the_file(world):
    path = folder(world) / "tiny.inter"
    header, *rows = path.read_text().splitlines()
    # two times in turns: sorts that are not stable leave an order alone that is sorted already
    times = [str(7 + n % 2) for n in range(len(rows))]
    rows = ["\t".join([*r.split("\t")[:2], t]) for r, t in zip(rows, times, strict=True)]
    path.write_text("\n".join([header, *rows]))
    first, again = result(world), result(world)
    assert first["protocol"]["test"] == again["protocol"]["test"]
    last = {}
    for row in sorted(rows, key=lambda row: row.split("\t")[2]):  # Python's sort is stable
        user, item, _ = row.split("\t")
        last[user] = item
    from hashlib import sha256

    digest = sha256("".join(sorted(f"{u}\t{i}\n" for u, i in last.items())).encode())
    assert first["protocol"]["test"] == digest.hexdigest()[:12]


def test_case_12_filters_that_leave_nothing_show_the_counts(world, capsys):
    arguments = ["--item_inter_num_interval=[100000,inf)"]
    refused(world, capsys, "3328", "item_inter_num_interval", arguments=arguments)


def test_case_13_short_users_are_counted(world):
    path = folder(world) / "tiny.inter"
    path.write_text(path.read_text() + "short1\ti000\t5\nshort2\ti000\t5\nshort2\ti003\t6\n")
    done = result(world)
    assert done["protocol"]["test_users"] == 300
    assert done["data"]["lines"][1:4] == [
        "  train: 2730 rows of 301 users; 1 users have none",
        "  valid: 300 rows of 300 users; 2 users have none",
        "  test: 300 rows of 300 users; 2 users have none",
    ]


# ---------------------------------------------------------------------- features


def bad_features(world, capsys, argument, *fragments):
    refused(world, capsys, *fragments, arguments=[argument], model="SASRecMM")


def test_case_14_missing_feature_file(world, capsys):
    argument = "--modalities={x: {path: no.npy, index: token}}"
    bad_features(world, capsys, argument, "no.npy does not exist; ")


def test_case_15_ids_without_a_match_show_both_sides(world, capsys):
    argument = features(world, matrix(), ids=[f"{n}.0" for n in range(120)])
    both = ("Ids there: '0.0', '1.0', '2.0'; items here: 'i", "('3.0' is not '3')")
    bad_features(world, capsys, argument, "none of its 120 ids", *both)


def test_case_16_low_coverage_is_refused_and_lowered_on_request(world, capsys):
    argument = features(world, matrix(60))
    bad_features(world, capsys, argument, "min_coverage", "0.9")
    done = result(world, argument, "--min_coverage=0.4", model="SASRecMM")
    assert done["data"]["modalities"][0]["missing"] == 60


def test_case_17_features_never_add_items(world):
    clean = result(world, "--modalities={}", model="MUFASA")
    argument = features(world, matrix(150))
    done = result(world, argument, model="MUFASA")
    assert done["data"]["modalities"][0]["unknown"] == 30
    assert done["protocol"] == clean["protocol"]


def test_case_18_duplicate_ids_must_agree(world, capsys):
    ids = [f"i{n:03d}" for n in range(120)]
    values = np.concatenate([matrix(), matrix()[:1]])
    assert result(world, features(world, values, ids=[*ids, "i000"]), model="SASRecMM")
    values[-1] += 1
    bad_features(world, capsys, features(world, values, ids=[*ids, "i000"]), "i000")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_case_19_non_finite_values_are_refused_or_masked(world, capsys, bad):
    values = matrix()
    values[5, 1] = bad
    bad_features(world, capsys, features(world, values), "i005", "nan: mask")
    argument = features(world, values, declaration="{path: x.npy, ids: ids.txt, nan: mask}")
    done = result(world, argument, model="SASRecMM")
    assert done["data"]["modalities"][0]["missing"] == 1


def test_case_20_zero_rows_are_counted(world, caplog):
    values = matrix()
    values[:3] = 0
    done = result(world, features(world, values), model="SASRecMM")
    assert "all-zero 3" in done["data"]["lines"][-1]
    assert "3 of 120 items have all-zero vectors" in caplog.text


def test_case_21_wrong_width_of_a_bare_float_file(world, capsys):
    matrix(114).tofile(folder(world) / "tiny.feat1CLS")  # 456 numbers: no multiple of 5
    declaration = "{path: '{dataset}.feat1CLS', dim: 5, ids: image_ids.txt}"
    wrong = "tiny.feat1CLS: 1824 bytes are not a whole number of float32 rows of `dim: 5`"
    bad_features(world, capsys, f"--modalities={{x: {declaration}}}", wrong)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_case_22_other_number_types_are_read(world, dtype):
    argument = features(world, (10 * matrix()).astype(dtype))
    assert result(world, argument, model="SASRecMM")


def test_case_23_ragged_side_file_names_its_line(world, capsys):
    rows = [f"i{n:03d}\t1 2 3" for n in range(120)]
    rows[7] = "i007\t1 2"
    (folder(world) / "tiny.itememb").write_text(
        "item_id:token\tvector:float_seq\n" + "\n".join(rows) + "\n"
    )
    bad_features(
        *(world, capsys, "--modalities={x: {path: '{dataset}.itememb', column: vector}}"),
        "tiny.itememb, line 9: 2 numbers for item 'i007', 3 in the rows before",
    )


def test_case_24_a_matrix_of_another_height_than_its_ids(world, capsys):
    ids = [f"i{n:03d}" for n in range(119)]
    wrong = ("ids.txt names 119 items", "x.npy has 120 rows (one more:")
    bad_features(world, capsys, features(world, matrix(), ids=ids), *wrong)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.parquet", "x.pt"])
def test_case_25_truncated_files_are_named(world, capsys, name):
    (folder(world) / name).write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortr")
    bad_features(world, capsys, f"--modalities={{x: {{path: {name}, ids: image_ids.txt}}}}", name)


class Bomb:
    """Touches a canary when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.npz"])
def test_case_26_pickles_are_never_run(world, capsys, name):
    canary = world / "canary"
    path = folder(world) / name
    if name == "x.npy":
        np.save(path, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    elif name == "x.npz":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
        np.savez(path, features=np.array([Bomb(canary)], dtype=object), ids=np.array(["i000"]))
    else:
        path.write_bytes(pickle.dumps(Bomb(canary)))
    bad_features(world, capsys, f"--modalities={{x: {{path: {name}, ids: image_ids.txt}}}}", name)
    assert not canary.exists()


def test_case_27_an_id_file_cannot_leave_the_data_set(world, capsys):
    features(world, matrix())
    shutil.move(folder(world) / "ids.txt", world / "data" / "ids.txt")
    bad_features(world, capsys, "--modalities={x: {path: x.npy, ids: ../ids.txt}}", "../ids.txt")


def test_case_28_declarations_are_data(world, capsys):
    canary = world / "canary"
    evil = f"!!python/object/apply:os.mkdir ['{canary}']"
    bad_features(world, capsys, f"--modalities={evil}", "modalities")
    assert not canary.exists()


def test_case_28_values_of_the_command_line_are_data(world, capsys):
    canary = world / "canary"
    evil = f"--learning_rate=__import__('pathlib').Path('{canary}').touch()"
    refused(world, capsys, "learning_rate must be of type float", arguments=[evil])
    assert not canary.exists()


def pictures(world):
    """One small image for each of the 120 items, all different."""
    here = world / "images"
    here.mkdir()
    rng = np.random.default_rng(0)
    for n in range(120):
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((20, 16)).save(here / f"i{n:03d}.png")
    return here


def extract(world, *arguments):
    command = ["extract", "tiny", f"--images={world / 'images'}", "--show_progress=False"]
    return main([*command, "--data_path", str(world / "data"), "--dim=8", *arguments])


def break_images(here):
    """Five images that cannot be read, four that need a conversion; two items without one."""
    (here / "i000.png").write_bytes(b"")
    (here / "i001.png").write_bytes(b"no image at all")
    rewrite(here / "i002.png", lambda content: content[: len(content) // 2])
    Image.new("1", (9000, 9000)).save(here / "i003.png")  # 81 million pixels in 10 KB
    (here / "i004.png").unlink()
    (here / "i004.png").symlink_to(DATASETS / "tiny" / "tiny.item")
    image = Image.open(here / "i005.png").copy()
    for token, kind, form in (("i005", "CMYK", "jpg"), ("i006", "P", "gif"), ("i007", "LA", "png")):
        (here / f"{token}.png").unlink()
        image.convert(kind).save(here / f"{token}.{form}")
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(here / "i008.png")
    for token in ("i009", "i010"):
        (here / f"{token}.png").unlink()
    (here / "readme.txt").write_text("not an image")
    Image.new("RGB", (4, 4)).save(here / "of-no-item.png")


def test_case_29_bad_images_are_masked_and_listed(world, capsys):
    break_images(pictures(world))
    assert extract(world) == 0
    out = capsys.readouterr().out
    assert "image: 113 of 120 items have a vector, 8 wide, by pixels" in out
    assert "5 images failed, 2 items without an image, 1 images of no item" in out
    assert "failed: i000.png (an empty file), i001.png (no image" in out
    assert 'image: {path: "image.safetensors"}' in out
    listed = (folder(world) / "image.failed.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [f"i{n:03d}.png" for n in range(5)]
    assert "9000 x 9000 pixels" in listed[3]
    assert "link out of the folder" in listed[4]

    done = result(world, "--modalities={x: {path: image.safetensors}}", model="SASRecMM")
    (report,) = done["data"]["modalities"]
    assert (report["matched"], report["missing"], report["width"]) == (113, 7, 8)


def test_case_29_too_many_failures_leave_nothing(world, capsys):
    break_images(pictures(world))
    before = sorted(folder(world).iterdir())
    assert extract(world, "--max_failed=0.04") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: images: 5 of 118 cannot be read, more than max_failed 0.04")
    for name in ("i000.png (", "i001.png (", "i002.png (", "and 2 more"):
        assert name in message
    assert sorted(folder(world).iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["--images=nowhere"], 2, "nowhere is no folder"),
        (["--encoder=clip"], 2, "names no model; write clip:NAME"),
        (["--out=image.npy"], 2, "must end in .safetensors"),
        (["--imagez=x"], 2, "unknown key 'imagez'"),
        (["--data_path=nowhere"], 2, "no data set 'tiny'"),
    ],
)
def test_case_29_wrong_arguments_are_refused(world, capsys, arguments, code, fragment):
    pictures(world)
    before = sorted(folder(world).iterdir())
    assert extract(world, *arguments) == code
    assert fragment in capsys.readouterr().err
    assert sorted(folder(world).iterdir()) == before


def test_case_30_empty_text_is_missing_and_long_or_odd_text_is_read(world):
    path = folder(world) / "tiny.item"
    lines = path.read_text().splitlines()
    for row, title in enumerate(["", "word " * 400_000, "\U0001f600 \u4e2d\u6587"], start=1):
        cells = lines[row].split("\t")
        lines[row] = "\t".join([cells[0], title, *cells[2:]])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    argument = "--modalities={t: {derive: text, fields: [title], method: tfidf, dim: 4}}"
    done = result(world, argument, model="SASRecMM")
    assert done["data"]["modalities"][0]["missing"] >= 1


# ---------------------------------------------------------------------- configuration, training


def test_case_31_an_unknown_key_is_refused_with_the_nearest(world, capsys):
    refused(world, capsys, "'learning_rat'", "'learning_rate'", arguments=["--learning_rat=0.1"])


@pytest.mark.parametrize(
    ("argument", "fragment"),
    [
        ("--stopping_step=many", "stopping_step must be of type int, got 'many'"),
        ("--learner=adamm", "unknown optimizer 'adamm'; did you mean 'adam'"),
        ("--metrics=['NDGC']", "unknown metric 'NDGC'; did you mean 'ndcg'"),
        ("--topk=[10,500]", "more than the 120 items of tiny"),
        ("--valid_metric=NDCG@7", "valid_metric 'NDCG@7' is outside topk"),
        ("--n_heads=3", "n_heads must divide hidden_size: 64 is not a multiple of 3"),
    ],
)
def test_case_32_wrong_values_are_refused(world, capsys, argument, fragment):
    refused(world, capsys, fragment, arguments=[argument], model="SASRecFast")


def test_case_33_a_loss_that_is_not_finite_stops_the_run(world, capsys):
    assert launch(world, "--learning_rate=1e30", model="SASRecFast") == 4
    said = capsys.readouterr().err
    assert re.match(r"error: epoch 0, batch \d+: loss term 'next_item' is (nan|inf)", said)
    assert "Traceback" not in said


def test_an_unknown_key_of_a_declaration_is_refused(world, capsys):
    argument = features(world, matrix(), declaration="{path: x.npy, idz: ids.txt}")
    bad_features(world, capsys, argument, "'idz'", "ids")


def test_a_model_that_reads_no_features_says_so(world):
    argument = features(world, matrix(10))
    assert "not loaded" in " ".join(result(world, argument)["data"]["lines"])
