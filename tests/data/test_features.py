"""Features are matched to items by token, checked, and reported; faults name their mend."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mm.config import Config
from recbole_mm.data.create import create_dataset
from recbole_mm.data.feature_files import save_features
from recbole_mm.data.features import FeatureTable, load_features
from recbole_mm.errors import InputError

ITEMS = ["[PAD]", "a", "b", "c", "d"]
VALUES = torch.arange(1.0, 13.0).reshape(4, 3)  # row i belongs to item i + 1


def load(folder, tokens=ITEMS, *, min_coverage=1.0, **declaration):
    """Load one modality ``text``; ``declaration`` are its keys."""
    return load_all(folder, {"text": declaration}, tokens, min_coverage=min_coverage)["text"]


def load_all(folder, declarations, tokens=ITEMS, *, min_coverage=1.0):
    return load_features(
        declarations,
        tokens,
        dataset_name="toy",
        dataset_path=folder,
        min_coverage=min_coverage,
    )


def npz(folder, tokens, values, name="f.npz"):
    np.savez(folder / name, ids=np.array(tokens), features=np.asarray(values))


def vectors(features):
    """What a model sees: (N, F), NaN where absent."""
    found = features.values[features.rows].float()
    found[~features.present] = float("nan")
    return found


def numbered(n):
    return ["[PAD]", *map(str, n)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_alignment_equals_a_dictionary(data):
    names = st.text(alphabet="ab13.é ", min_size=1, max_size=3)
    items = data.draw(st.lists(names, min_size=1, max_size=8, unique=True))
    strangers = data.draw(st.lists(names, max_size=8, unique=True))
    covered = data.draw(st.lists(st.sampled_from(items), min_size=1, unique=True))
    in_file = data.draw(st.permutations(list(dict.fromkeys(covered + strangers))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values = torch.randn(len(in_file), 2, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        save_features(Path(folder) / "f.safetensors", values, in_file)
        tokens = ["[PAD]", *items]
        features = load(folder, tokens, path="f.safetensors", min_coverage=0)

    by_token = dict(zip(in_file, values.tolist(), strict=True))
    assert features.present.tolist() == [False, *(item in by_token for item in items)]
    for item, row in zip(items, features.rows[1:].tolist(), strict=True):
        if item in by_token:
            assert features.values[row].tolist() == by_token[item]
        else:
            assert row == 0
    report = features.report
    matched = sum(item in by_token for item in items)
    assert (report.matched, report.missing) == (matched, len(items) - matched)
    assert report.unknown == len(in_file) - matched
    assert (report.rows, report.width, report.duplicate) == (len(in_file), 2, 0)


def test_table_keeps_the_order_of_the_config(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES, "toy.npz")
    npz(tmp_path, ITEMS[1:3], VALUES[:2, :1], "image.npz")
    declarations = {"text": {"path": "{dataset}.npz"}, "image": {"path": "image.npz"}}
    table = load_all(tmp_path, declarations, min_coverage=0.5)
    assert table.names == tuple(table) == ("text", "image")
    assert table.widths == {"text": 3, "image": 1}
    assert (len(table), table.n_items) == (2, 5)
    assert [report.name for report in table.reports] == ["text", "image"]
    assert table.present.tolist() == [
        [False, False],
        [True, True],
        [True, True],
        [True, False],
        [True, False],
    ]


def test_no_declaration_gives_an_empty_table(tmp_path):
    table = load_all(tmp_path, {})
    assert (len(table), table.present.shape) == (0, (5, 0))


def test_table_refuses_a_modality_over_other_items(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES)
    with pytest.raises(ValueError, match="over 5 items, not 6"):
        FeatureTable([load(tmp_path, path="f.npz")], 6)


@pytest.mark.parametrize("ids", ["ids.txt", "ids.json", "toy.item2index", "toy.item", "ids.csv"])
def test_matrix_is_matched_through_its_id_file(tmp_path, ids):
    np.save(tmp_path / "f.npy", VALUES.numpy()[::-1])
    order = ["d", "c", "b", "a"]
    rows = {token: row for row, token in enumerate(order)}
    text = {
        "ids.txt": "\n".join(order),
        "ids.json": json.dumps(dict(sorted(rows.items()))),
        "toy.item2index": "\n".join(f"{token}\t{rows[token]}" for token in "abcd"),
        "toy.item": "item_id:token\ttitle:token_seq\n" + "".join(f"{t}\tA b\n" for t in order),
        "ids.csv": "asin,item_id\n" + "".join(f"x{t},{t}\n" for t in order),
    }
    (tmp_path / ids).write_text(text[ids])
    features = load(tmp_path, path="f.npy", ids=ids.replace("toy", "{dataset}"))
    assert torch.equal(vectors(features)[1:], VALUES)
    assert features.report.ids == tmp_path / ids


def test_mmrec_is_read_unchanged(tmp_path):
    np.save(tmp_path / "image_feat.npy", VALUES.double().numpy())
    (tmp_path / "i_id_mapping.csv").write_text("asin\titemID\nB0\t0\nB1\t1\nB2\t2\nB3\t3\n")
    tokens = numbered([2, 0, 3])
    features = load(
        tmp_path, tokens, path="image_feat.npy", ids="i_id_mapping.csv", id_col="itemID"
    )
    assert torch.equal(vectors(features)[1:], VALUES[[2, 0, 3]])


def test_unisrec_is_read_unchanged(tmp_path):
    VALUES.numpy().tofile(tmp_path / "toy.feat1CLS")
    features = load(tmp_path, numbered([3, 0, 1]), path="{dataset}.feat1CLS", dim=3)
    assert torch.equal(vectors(features)[1:], VALUES[[3, 0, 1]])


def test_microlens_is_read_unchanged(tmp_path):
    np.save(tmp_path / "cover.npy", VALUES.numpy())
    features = load(tmp_path, numbered([4, 1]), path="cover.npy", index="token-1")
    assert torch.equal(vectors(features)[1:], VALUES[[3, 0]])


def test_hm4sr_needs_the_map_of_its_run(tmp_path):
    torch.save(VALUES, tmp_path / "txt_emb.pt")
    with pytest.raises(InputError, match="set `ids` to the mapping of token to row"):
        load(tmp_path, path="txt_emb.pt", index="recbole_internal")
    (tmp_path / "map.json").write_text(json.dumps({"[PAD]": 0, "b": 1, "a": 2, "d": 3}))
    features = load(
        tmp_path,
        path="txt_emb.pt",
        index="recbole_internal",
        ids="map.json",
        min_coverage=0.7,
    )
    assert features.rows.tolist() == [0, 2, 1, 0, 3]
    assert features.report.unknown == 0


def test_row_zero_of_a_recbole_matrix_is_no_item(tmp_path):
    torch.save(VALUES, tmp_path / "txt_emb.pt")
    (tmp_path / "map.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2, "d": 3}))
    with pytest.raises(InputError, match="item 'a' has row 0, which is padding"):
        load(tmp_path, path="txt_emb.pt", index="recbole_internal", ids="map.json")
    (tmp_path / "list.json").write_text(json.dumps(ITEMS))
    with pytest.raises(InputError, match="bare list of tokens does not say where padding"):
        load(tmp_path, path="txt_emb.pt", index="recbole_internal", ids="list.json")


def test_absent_rows_of_the_canonical_form_are_masked(tmp_path):
    present = torch.tensor([True, True, False, True])
    save_features(tmp_path / "f.safetensors", VALUES, ITEMS[1:], present)
    features = load(tmp_path, path="f.safetensors", min_coverage=0.5)
    assert features.present.tolist() == [False, True, True, False, True]
    assert features.report.missing == 1


def test_features_stay_a_view_of_the_file(tmp_path):
    np.save(tmp_path / "f.npy", VALUES.half().numpy())
    features = load(tmp_path, numbered([1, 2, 3, 4]), path="f.npy", index="token-1")
    assert features.values.dtype == torch.float16
    before = features.values[0, 0].item()
    whole = np.lib.format.open_memmap(tmp_path / "f.npy", mode="r+")
    whole[0, 0] = before + 1
    whole.flush()
    assert features.values[0, 0].item() == before + 1


def test_case_14_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"modalities\.text: feature file .*g\.npz does not exist"):
        load(tmp_path, path="g.npz")


def test_case_15_no_match_shows_both_sides(tmp_path):
    npz(tmp_path, ["1.0", "2.0", "3.0", "4.0"], VALUES)
    with pytest.raises(InputError) as error:
        load(tmp_path, numbered([1, 2, 3, 4]), path="f.npz", min_coverage=0)
    message = str(error.value)
    assert "none of its 4 ids is an item" in message
    assert "id_col" not in message  # an archive has no columns
    assert "'1.0', '2.0', '3.0'" in message
    assert "'1', '2', '3'" in message
    assert "'3.0' is not '3'" in message


def test_case_16_low_coverage_is_an_error_with_the_first_missing_item(tmp_path):
    npz(tmp_path, ["a", "c", "d"], VALUES[:3])
    with pytest.raises(InputError, match=r"3 of 4 items .*75\.0%.* first without one: 'b'.*`min_c"):
        load(tmp_path, path="f.npz", min_coverage=0.9)


def test_case_16_accepted_coverage_is_a_warning_and_a_mask(tmp_path, caplog):
    npz(tmp_path, ["a", "c", "d"], VALUES[:3])
    features = load(tmp_path, path="f.npz", min_coverage=0.75)
    assert features.present.tolist() == [False, True, False, True, True]
    assert "3 of 4 items have a vector (75.0%); first without one: 'b'" in caplog.text


def test_coverage_of_one_modality_may_be_another(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES, "whole.npz")
    npz(tmp_path, ITEMS[1:3], VALUES[:2], "half.npz")
    whole = {"path": "whole.npz", "min_coverage": 1}
    table = load_all(
        tmp_path,
        {"text": whole, "image": {"path": "half.npz", "min_coverage": 0.5}},
        min_coverage=0.9,
    )
    assert [report.matched for report in table.reports] == [4, 2]
    with pytest.raises(InputError, match=r"modalities\.image: .*`min_coverage` \(now 0\.6\)"):
        load_all(tmp_path, {"image": {"path": "half.npz", "min_coverage": 0.6}}, min_coverage=0)


def test_full_coverage_is_no_warning(tmp_path, caplog):
    npz(tmp_path, ITEMS[1:], VALUES)
    load(tmp_path, path="f.npz")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_case_17_extra_ids_add_no_item(tmp_path):
    npz(tmp_path, ["x", "a", "b", "y", "c", "d"], torch.arange(6.0)[:, None])
    features = load(tmp_path, path="f.npz")
    assert len(features.rows) == len(features.present) == 5
    assert features.report.unknown == 2
    assert vectors(features)[1:, 0].tolist() == [1, 2, 4, 5]


def test_padding_never_has_a_vector(tmp_path):
    npz(tmp_path, ITEMS, torch.ones(5, 2).cumsum(0))
    features = load(tmp_path, path="f.npz")
    assert not features.present[0]
    assert vectors(features)[1:, 0].tolist() == [2, 3, 4, 5]


def test_case_18_different_vectors_of_one_item_are_an_error(tmp_path):
    npz(tmp_path, ["a", "b", "a", "c", "d"], torch.arange(5.0)[:, None])
    with pytest.raises(InputError, match=r"item 'a' stands twice, at rows 0 and 2.*keep one"):
        load(tmp_path, path="f.npz")


def test_case_18_equal_vectors_of_one_item_are_counted(tmp_path):
    npz(tmp_path, ["a", "b", "a", "c", "d"], VALUES[[0, 1, 0, 2, 3]])
    features = load(tmp_path, path="f.npz")
    assert features.report.duplicate == 1
    assert torch.equal(vectors(features)[1:], VALUES)


def test_case_18_one_item_present_and_absent_is_an_error(tmp_path):
    tensors = {"features": torch.zeros(5, 2), "present": torch.tensor([1, 1, 0, 1, 1]).byte()}
    metadata = {"ids": json.dumps(["a", "b", "a", "c", "d"])}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "f.safetensors", metadata)
    with pytest.raises(InputError, match="item 'a' stands twice"):
        load(tmp_path, path="f.safetensors")


def test_case_18_duplicates_of_an_id_file_are_seen(tmp_path):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    (tmp_path / "i.json").write_text('{"a": 0, "b": 1, "c": 2, "d": 3, "a": 1}')
    with pytest.raises(InputError, match=r"i\.json: item 'a' stands twice, at rows 0 and 1"):
        load(tmp_path, path="f.npy", ids="i.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_case_19_non_finite_vector_is_an_error_with_its_items(tmp_path, bad):
    values = VALUES.clone()
    values[1, 2] = values[3, 0] = bad
    npz(tmp_path, ITEMS[1:], values)
    with pytest.raises(
        InputError,
        match=r"of 2 items hold NaN, Inf or .* \(first: 'b', 'd'\).*nan: m",
    ):
        load(tmp_path, path="f.npz")


def test_case_19_non_finite_vector_can_be_masked(tmp_path, caplog):
    values = VALUES.clone()
    values[1, 2] = float("nan")
    npz(tmp_path, ITEMS[1:], values)
    features = load(tmp_path, path="f.npz", nan="mask", min_coverage=0.5)
    assert features.present.tolist() == [False, True, False, True, True]
    assert features.rows.tolist() == [0, 0, 0, 2, 3]
    assert (features.report.nonfinite, features.report.missing) == (1, 1)
    assert "1 of 4 items have NaN, Inf or" in caplog.text


def test_non_finite_vector_of_a_stranger_does_not_matter(tmp_path):
    npz(tmp_path, ["x", *ITEMS[1:]], torch.cat([torch.full((1, 3), torch.nan), VALUES]))
    assert load(tmp_path, path="f.npz").report.nonfinite == 0


def test_float64_too_large_for_float32_is_an_infinity(tmp_path):
    npz(tmp_path, ITEMS[1:], np.full((4, 2), 1e300))
    with pytest.raises(InputError, match="of 4 items hold NaN, Inf or"):
        load(tmp_path, path="f.npz")


@pytest.mark.parametrize("number", [1e30, -1e30])
def test_a_vector_whose_length_is_beyond_float32_is_no_vector(tmp_path, number):
    values = torch.cat([VALUES[:3], torch.full((1, 3), number)])
    npz(tmp_path, ITEMS[1:], values)
    with pytest.raises(InputError, match=r"of 1 items hold NaN, Inf or .*\(first: 'd'\)"):
        load(tmp_path, path="f.npz")
    npz(tmp_path, ITEMS[1:], values.clamp(-1e18, 1e18))
    assert load(tmp_path, path="f.npz").present[1:].all()


def test_case_20_all_zero_vectors_are_counted_and_kept(tmp_path, caplog):
    npz(tmp_path, ITEMS[1:], VALUES * torch.tensor([1.0, 0, 0, 1])[:, None])
    features = load(tmp_path, path="f.npz")
    assert features.present[1:].all()
    assert features.report.zero == 2
    assert "2 of 4 items have all-zero vectors" in caplog.text
    assert "`zero: mask` would mask them" in caplog.text


def test_case_20_all_zero_vectors_can_be_masked(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES * torch.tensor([1.0, 0, 0, 1])[:, None])
    features = load(tmp_path, path="f.npz", zero="mask", min_coverage=0.5)
    assert features.present.tolist() == [False, True, False, False, True]
    assert (features.report.zero, features.report.matched) == (2, 2)


def test_masking_every_item_is_an_error_at_any_coverage(tmp_path):
    npz(tmp_path, ITEMS[1:], torch.zeros(4, 3))
    with pytest.raises(InputError, match="0 of 4 items have a vector"):
        load(tmp_path, path="f.npz", zero="mask", min_coverage=0)


def test_case_20_constant_matrix_is_a_warning(tmp_path, caplog):
    npz(tmp_path, ITEMS[1:], torch.ones(4, 3) * torch.arange(3))
    load(tmp_path, path="f.npz")
    assert "all vectors" in caplog.text
    assert "are equal" in caplog.text


def test_checks_see_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_mm.data.feature_files.common.CHUNK_NUMBERS", 7)  # two rows a chunk
    n = 9
    values = torch.randn(n, 3)
    values[8, 1], values[5] = torch.nan, 0
    npz(tmp_path, [str(i) for i in range(n)], values)
    features = load(tmp_path, numbered(range(n)), path="f.npz", nan="mask", min_coverage=0.5)
    assert (features.report.nonfinite, features.report.zero) == (1, 1)
    assert not features.present[9]


def test_case_21_half_the_width_is_seen_by_the_number_of_rows(tmp_path):
    torch.randn(10, 8).numpy().tofile(tmp_path / "toy.feat1CLS")
    for index in (None, "token"):
        with pytest.raises(InputError, match=r"has 20 rows, the item tokens run from 0 to 9"):
            load(tmp_path, numbered(range(10)), path="{dataset}.feat1CLS", dim=4, index=index)
    with pytest.raises(
        InputError, match=r"2 times as many as needed\. Is the width 8, not `dim: 4"
    ):
        load(tmp_path, numbered(range(10)), path="{dataset}.feat1CLS", dim=4, index="token")


def test_case_21_twice_the_width_is_seen_by_the_number_of_rows(tmp_path):
    torch.randn(10, 8).numpy().tofile(tmp_path / "toy.feat1CLS")
    with pytest.raises(InputError, match=r"has 5 rows.*run from 0 to 9.*check `dim`"):
        load(tmp_path, numbered(range(10)), path="toy.feat1CLS", dim=16, index="token")


def test_case_22_conversion_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    npz(tmp_path, ITEMS[1:], VALUES.double())
    features = load(tmp_path, path="f.npz")
    assert features.values.dtype == torch.float32
    assert features.report.dtype == "float64"
    assert "converted from float64 to float32" in caplog.text


def test_case_23_ragged_float_seq_is_an_error(tmp_path):
    (tmp_path / "toy.item").write_text("item_id:token\tv:float_seq\na\t1 2\nb\t1\n")
    with pytest.raises(InputError, match=r"modalities\.text: .*toy\.item, line 3: 1 numbers"):
        load(tmp_path, path="{dataset}.item")


@pytest.mark.parametrize(
    ("tokens", "n_rows", "first_row"),
    [(range(4), 4, 0), ([0, 3], 4, 0), (range(1, 5), 4, 0), ([2, 4], 4, 1)],
)
def test_case_24_counts_that_fit_one_numbering_only_need_no_index(
    tmp_path, tokens, n_rows, first_row
):
    np.save(tmp_path / "f.npy", VALUES[:n_rows].numpy())
    features = load(tmp_path, numbered(tokens), path="f.npy")
    assert features.rows[1].item() == first_row


@pytest.mark.parametrize(
    ("tokens", "n_rows"),
    [
        (range(4), 5),  # a row for padding, or an item that was filtered away
        (range(1, 5), 5),  # row 0 unused (token), or a filtered last item (token-1)
        (range(4), 3),  # no numbering has enough rows
        (range(1, 5), 3),
        ([2, 3], 9),
    ],
)
def test_case_24_other_counts_are_refused_with_all_hypotheses(tmp_path, tokens, n_rows):
    np.save(tmp_path / "f.npy", torch.randn(n_rows, 2).numpy())
    with pytest.raises(InputError) as error:
        load(tmp_path, numbered(tokens), path="f.npy")
    message = str(error.value)
    low, high = min(tokens), max(tokens)
    assert f"has {n_rows} rows, the item tokens run from {low} to {high}" in message
    assert f"`index: token` (row = token) needs {high + 1} rows" in message
    assert f"`index: token-1` (row = token - 1, no token 0) needs {high}" in message
    assert "row for padding" in message
    assert "Set `index`, or `ids`" in message


@pytest.mark.parametrize(
    ("tokens", "index"), [(range(5), "token"), (range(4), "token-1"), ([6], "token-1")]
)
def test_case_24_stated_index_that_does_not_fit_is_refused(tmp_path, tokens, index):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    with pytest.raises(InputError, match=f"so `index: {index}` does not fit"):
        load(tmp_path, numbered(tokens), path="f.npy", index=index)


def test_stated_index_allows_rows_that_no_item_uses(tmp_path):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    features = load(tmp_path, numbered([1, 2]), path="f.npy", index="token")
    assert features.rows.tolist() == [0, 1, 2]
    assert features.report.unknown == 2


@pytest.mark.parametrize("token", ["B01", "-1", "1.0", "01", "²", "9" * 30])
def test_bare_matrix_needs_whole_numbers_as_tokens(tmp_path, token):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    with pytest.raises(InputError, match=r"not a whole number.*set `ids`") as error:
        load(tmp_path, ["[PAD]", "1", token], path="f.npy", index="token")
    assert repr(token) in str(error.value)


@pytest.mark.parametrize(("n_ids", "hint"), [(3, "begin with a row for padding"), (5, "header")])
def test_case_24_id_file_of_another_length_is_refused(tmp_path, n_ids, hint):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    (tmp_path / "ids.txt").write_text("\n".join("abcde"[:n_ids]))
    with pytest.raises(InputError, match=rf"names {n_ids} items, .*f\.npy has 4 rows.*{hint}"):
        load(tmp_path, path="f.npy", ids="ids.txt")


@pytest.mark.parametrize("row", [4, -1])
def test_id_file_with_a_row_outside_the_matrix_is_refused(tmp_path, row):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    (tmp_path / "ids.json").write_text(json.dumps({"a": 0, "b": row}))
    with pytest.raises(InputError, match=rf"item 'b' has row {row}, .* has rows 0\.\.3"):
        load(tmp_path, path="f.npy", ids="ids.json")


def test_case_25_damaged_file_is_named(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES)
    whole = (tmp_path / "f.npz").read_bytes()
    (tmp_path / "f.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"modalities\.text: .*f\.npz: not a readable npz file"):
        load(tmp_path, path="f.npz")


@pytest.mark.parametrize("key", ["path", "ids"])
def test_case_27_relative_path_out_of_the_dataset_is_refused(tmp_path, key):
    folder = tmp_path / "toy"
    folder.mkdir()
    np.save(tmp_path / "f.npy", VALUES.numpy())
    np.save(folder / "f.npy", VALUES.numpy())
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    declaration = {"path": "f.npy", "ids": "ids.txt"}
    declaration[key] = f"../{declaration[key]}"
    with pytest.raises(InputError, match=rf"{key}: '\.\./.*' leads out of the dataset's folder"):
        load(folder, **declaration)


def test_case_27_absolute_id_file_outside_the_dataset_is_refused(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    np.save(folder / "f.npy", VALUES.numpy())
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(InputError, match=r"leads out of .*copy the file into it"):
        load(folder, path="f.npy", ids=str(tmp_path / "ids.txt"))


@pytest.mark.parametrize("key", ["path", "ids"])
def test_case_27_link_out_of_the_dataset_is_refused(tmp_path, key):
    folder = tmp_path / "toy"
    folder.mkdir()
    declaration = {"path": "f.npy", "ids": "ids.txt"}
    np.save(tmp_path / "f.npy", VALUES.numpy())
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    for name in declaration.values():
        if name == declaration[key]:
            (folder / name).symlink_to(tmp_path / name)
        else:
            (folder / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(InputError, match=f"{key}: .* leads out"):
        load(folder, **declaration)


@pytest.mark.parametrize("key", ["path", "ids"])
@pytest.mark.parametrize("name", ["a\0b.npy", "a" * 5000 + ".npy", "loop.npy"])
def test_what_is_no_path_is_refused(tmp_path, key, name):
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    np.save(tmp_path / "f.npy", VALUES.numpy())
    with pytest.raises(InputError, match=rf"modalities\.text: .*{key}|loop"):
        load(tmp_path, **{"path": "f.npy", key: name})


def test_absolute_feature_file_is_the_users_own_choice(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    npz(tmp_path, ITEMS[1:], VALUES)
    assert load(folder, path=str(tmp_path / "f.npz")).present[1:].all()


def test_dataset_folder_may_be_a_link_itself(tmp_path):
    (tmp_path / "real").mkdir()
    npz(tmp_path / "real", ITEMS[1:], VALUES)
    (tmp_path / "toy").symlink_to(tmp_path / "real")
    assert load(tmp_path / "toy", path="f.npz").present[1:].all()


def test_case_28_braces_in_a_path_are_not_evaluated(tmp_path):
    with pytest.raises(InputError, match=r"\{dataset\.__class__\}\.npz does not exist"):
        load(tmp_path, path="{dataset.__class__}.npz")


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"path": "f.npz", "idz": "x"}, r"unknown key 'idz'; did you mean 'ids'\?"),
        ({"path": "f.npz", "wobble": 1}, r"unknown key 'wobble'; use one of path, dim"),
        ({"dim": 3}, "no `path`"),
        ({"path": "f.npz", "dim": 3.0}, "dim: 3.0; set a positive whole number"),
        ({"path": "f.npz", "dim": 0}, "dim: 0; set a positive whole number"),
        ({"path": 3}, "path: 3 is not text"),
        ({"path": "f.npz", "index": "tokens"}, "index: 'tokens'; set one of token, token-1"),
        ({"path": "f.npz", "nan": "drop"}, "nan: 'drop'; set one of error, mask"),
        ({"path": "f.npz", "zero": []}, r"zero: \[\]; set one of keep, mask"),
        ({"path": "f.npz", "min_coverage": 1.5}, "min_coverage: 1.5 is outside"),
        ({"path": "f.npz", "min_coverage": "all"}, "min_coverage: 'all' is not a number"),
        ({"path": "f.npz", "index": "token"}, "names its items itself; remove `index`"),
        ({"path": "f.npz", "ids": "ids.txt"}, "names its items itself; remove `ids`"),
        ({"path": "f.npz", "column": "v"}, "column: 'v', but a npz file has none"),
        ({"path": "f.npz", "id_col": "v"}, "id_col: 'v', but a npz file has no columns"),
        ({"path": "f.npy", "ids": "ids.txt", "index": "token"}, "both say which row is whose"),
        ({"path": "f.npy", "ids": "ids.txt", "id_col": "x"}, "has no columns; remove `id_col"),
        ("f.npz", "is not a mapping"),
    ],
)
def test_wrong_declaration_is_refused_with_the_key(tmp_path, declaration, message):
    npz(tmp_path, ITEMS[1:], VALUES)
    np.save(tmp_path / "f.npy", VALUES.numpy())
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(InputError, match=rf"modalities\.text: .*{message}"):
        load_all(tmp_path, {"text": declaration})


@pytest.mark.parametrize(
    "name", ["id", "a.b", "", "type", "values", "training", 3, "/else", "a/b", "a\\b", "a\n"]
)
def test_name_that_a_model_cannot_hold_is_refused(tmp_path, name):
    npz(tmp_path, ITEMS[1:], VALUES)
    with pytest.raises(InputError, match="name"):
        load_all(tmp_path, {name: {"path": "f.npz"}})


def test_null_means_not_set(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES)
    assert load(tmp_path, path="f.npz", ids=None, index=None).present[1:].all()


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.9", None, True, float("nan")])
def test_min_coverage_is_a_share(tmp_path, value):
    with pytest.raises(InputError, match="min_coverage: "):
        load_all(tmp_path, {}, min_coverage=value)


def test_report_is_one_printable_line(tmp_path):
    folder = tmp_path / "new\nline"
    folder.mkdir()
    npz(folder, ["a", "b", "a", "x"], VALUES[[0, 1, 0, 2]])
    line = load(folder, path="f.npz", min_coverage=0.5).report.line()
    assert line.isprintable()
    assert line.startswith(
        "text: 4 rows x 3 float32, matched 2 of 4 items, missing 2, unknown 1, duplicate 1, "
        "NaN or Inf 0, all-zero 0, "
    )
    assert r"new\nline/f.npz, sha256 " in line


def test_report_is_json_with_full_hashes(tmp_path):
    np.save(tmp_path / "f.npy", VALUES.numpy())
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    held = load(tmp_path, path="f.npy", ids="ids.txt").report.as_dict()
    assert json.loads(json.dumps(held)) == held
    assert held["source"] == str(tmp_path / "f.npy")
    assert len(held["sha256"]) == len(held["ids_sha256"]) == 64
    assert (held["rows"], held["items"], held["matched"], held["missing"]) == (4, 4, 4, 0)


def test_hash_is_refused_when_the_file_changed_after_loading(tmp_path):
    npz(tmp_path, ITEMS[1:], VALUES)
    report = load(tmp_path, path="f.npz").report
    npz(tmp_path, ITEMS[1:], torch.cat([VALUES, VALUES], dim=1))
    with pytest.raises(InputError, match="changed since it was read"):
        _ = report.sha256


def test_hidden_features_are_nested_and_do_not_depend_on_the_order_of_ids():
    dataset = create_dataset(Config("SASRecMM", "tiny", config_dict={"show_progress": False}))
    table, tokens = dataset.item_features, dataset.item_tokens
    some, more, none = (table.hiding({"text": p}, tokens) for p in (25, 50, 100))
    n = int(table["text"].present.sum())
    assert [int(t["text"].present.sum()) for t in (some, more, none)] == [
        n - round(n / 4),
        n - round(n / 2),
        0,
    ]
    assert not (more["text"].present & ~some["text"].present).any()
    assert torch.equal(some["image"].present, table["image"].present)
    assert some.reports[0].matched == n - round(n / 4)

    backwards = [tokens[0], *reversed(tokens[1:])]
    reverse = torch.tensor([0, *range(len(tokens) - 1, 0, -1)])
    moved = replace(
        table["text"], rows=table["text"].rows[reverse], present=table["text"].present[reverse]
    )
    again = FeatureTable([moved], len(tokens)).hiding({"text": 25}, backwards)
    assert torch.equal(again["text"].present[reverse], some["text"].present)


@pytest.mark.parametrize(
    ("percent", "message"),
    [
        ({"audio": 5}, "'audio' is no modality here"),
        ({"text": 101}, "outside"),
        ({"text": "x"}, "number"),
    ],
)
def test_hidden_features_must_be_percentages_of_loaded_modalities(percent, message):
    values = {"show_progress": False, "hidden_features": percent}
    with pytest.raises(InputError, match=message):
        _ = create_dataset(Config("SASRecMM", "tiny", config_dict=values)).item_features
