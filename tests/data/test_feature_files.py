"""Readers of feature files: each format gives the same matrix, each damage an error that helps."""

from __future__ import annotations

import csv
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recbole_mm.data.atomic import AtomicFormat
from recbole_mm.data.feature_files import (
    kind_of,
    read_features,
    read_ids,
    save_features,
)
from recbole_mm.errors import EnvironmentFault, InputError

TOKENS = ["B01", "7", "ü 3", "NA"]
VALUES = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3.25, 4.0, 5.0], [1e-3, 7.0, -8.0]])


class TouchWhenLoaded:
    """A pickle of this creates a file when somebody loads it."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


def wide_csv(path, values, tokens, separator=","):
    lines = [separator.join(["item_id", *(f"f{i}" for i in range(values.shape[1]))])]
    for token, row in zip(tokens, values.tolist(), strict=True):
        lines.append(separator.join([token, *map(repr, row)]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def list_csv(path, values, tokens):
    lines = ["item_id,vector"]
    lines += [f'{t},"{row}"' for t, row in zip(tokens, values.tolist(), strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def atomic(path, values, tokens):
    lines = ["item_id:token\ttitle:token_seq\tvector:float_seq"]
    for token, row in zip(tokens, values.tolist(), strict=True):
        lines.append(f'{token}\ta "quoted title\t{" ".join(map(repr, row))}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def list_parquet(path, values, tokens):
    pq.write_table(pa.table({"item_id": list(tokens), "vector": values.tolist()}), path)


def wide_parquet(path, values, tokens):
    columns = {f"f{i}": values[:, i].numpy() for i in range(values.shape[1])}
    pq.write_table(pa.table({"item_id": list(tokens), **columns}), path)


def folder(path, values, tokens):
    path.mkdir()
    for token, row in zip(tokens, values.numpy(), strict=True):
        np.save(path / f"{token}.npy", row[None])


WITH_IDS = {
    "f.safetensors": save_features,
    "f.npz": lambda path, values, tokens: np.savez(path, ids=tokens, features=values.numpy()),
    "wide.csv": wide_csv,
    "list.csv": list_csv,
    "tab.tsv": lambda path, values, tokens: wide_csv(path, values, tokens, "\t"),
    "list.parquet": list_parquet,
    "wide.parquet": wide_parquet,
    "folder": folder,
    "d.itememb": atomic,
}
WITHOUT_IDS = {
    "f.npy": lambda path, values: np.save(path, values.numpy()),
    "f.pt": lambda path, values: torch.save(values, path),
    "legacy.pth": lambda path, values: torch.save(
        values, path, _use_new_zipfile_serialization=False
    ),
    "d.feat1CLS": lambda path, values: values.numpy().tofile(path),
}
BINARY = ["f.safetensors", "f.npz", "f.npy", "f.pt", "legacy.pth", "wide.parquet", "list.parquet"]


def write(path, values=VALUES, tokens=TOKENS):
    """Write the values in the format that the name of the file asks for."""
    if path.name in WITH_IDS:
        WITH_IDS[path.name](path, values, tokens)
    else:
        WITHOUT_IDS[path.name](path, values)
    return path


def read(path):
    return read_features(path, dim=3 if path.suffix == ".feat1CLS" else None)


@pytest.mark.parametrize("name", WITH_IDS)
def test_every_format_with_ids_gives_each_token_its_row(tmp_path, name):
    file = read(write(tmp_path / name))
    assert sorted(file.tokens) == sorted(TOKENS)
    assert file.values.dtype == torch.float32
    order = [file.tokens.index(token) for token in TOKENS]
    assert_close(file.values[order], VALUES, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITHOUT_IDS)
def test_every_bare_matrix_gives_the_rows_in_order(tmp_path, name):
    file = read(write(tmp_path / name))
    assert file.tokens is None
    assert_close(file.values, VALUES, rtol=0, atol=0)


def mapped_files():
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["f.npy", "f.safetensors", "f.pt", "d.feat1CLS"])
def test_matrix_is_a_map_of_the_file_and_stays_one_without_the_reader(tmp_path, name):
    values = read(write(tmp_path / name)).values
    assert str(tmp_path / name) in mapped_files()
    assert values.untyped_storage().nbytes() < 1000
    del values
    assert str(tmp_path / name) not in mapped_files()


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="needs the size of the memory")
@pytest.mark.parametrize("name", ["f.npy", "f.safetensors"])
def test_matrix_larger_than_memory_is_mapped(tmp_path, name, recwarn):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    width = 1 << 20
    n_rows = 2 * memory // (4 * width) + 1
    size = 4 * width * n_rows
    with (tmp_path / name).open("wb") as stream:  # sparse: takes no room on the disk
        if name == "f.npy":
            header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, width)}
            np.lib.format.write_array_header_1_0(stream, header)
        else:
            entry = {"dtype": "F32", "shape": [n_rows, width], "data_offsets": [0, size]}
            text = json.dumps({"features": entry}).encode()
            text += b" " * (-len(text) % 8)
            stream.write(len(text).to_bytes(8, "little") + text)
        try:
            stream.truncate(stream.tell() + size)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    values = read_features(tmp_path / name).values
    assert values.shape == (n_rows, width)
    assert values[-1, -3:].tolist() == [0, 0, 0]
    assert not recwarn.list


@pytest.mark.parametrize("name", ["f.npy", "f.npz", "folder", "f.pt", "f.safetensors"])
def test_float16_stays_float16(tmp_path, name):
    file = read(write(tmp_path / name, VALUES.half()))
    assert file.values.dtype == torch.float16
    assert file.dtype == "float16"


@pytest.mark.parametrize("name", ["f.pt", "f.safetensors"])
def test_bfloat16_stays_bfloat16(tmp_path, name):
    file = read(write(tmp_path / name, VALUES.bfloat16()))
    assert file.dtype == "bfloat16"
    assert_close(file.values, VALUES.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8", "bool", ">f4"])
def test_other_numbers_become_float32(tmp_path, dtype):
    numbers = np.array([[1, 0], [1, 1]], dtype)
    np.save(tmp_path / "f.npy", numbers)
    file = read(tmp_path / "f.npy")
    assert file.values.dtype == torch.float32
    assert file.values.tolist() == [[1, 0], [1, 1]]
    assert file.dtype == dtype


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]"])
def test_what_is_not_a_real_number_is_refused(tmp_path, dtype):
    np.save(tmp_path / "f.npy", np.zeros((2, 2)).astype("i8").astype(dtype))
    with pytest.raises(InputError, match=r"f\.npy: dtype .*float32"):
        read(tmp_path / "f.npy")


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1), (0, 3), (3, 0), ()])
@pytest.mark.parametrize("name", ["f.npy", "f.pt"])
def test_what_is_not_a_matrix_is_refused(tmp_path, name, shape):
    write(tmp_path / name, torch.zeros(shape))
    with pytest.raises(InputError, match=name):
        read(tmp_path / name)


def test_declared_width_must_be_the_files(tmp_path):
    write(tmp_path / "f.npy")
    with pytest.raises(InputError, match=r"3 wide, `dim` says 768; set `dim: 3`"):
        read_features(tmp_path / "f.npy", dim=768)


def test_missing_file_is_named_with_its_neighbours(tmp_path):
    write(tmp_path / "f.npy")
    with pytest.raises(InputError, match=r"g\.npy does not exist; did you mean f\.npy"):
        read_features(tmp_path / "g.npy")
    (tmp_path / "h.npy").symlink_to("gone.npy")
    with pytest.raises(InputError, match=r"h\.npy does not exist; it is a link to gone\.npy$"):
        read_features(tmp_path / "h.npy")


def test_unknown_format_lists_the_known_ones(tmp_path):
    (tmp_path / "f.h5").write_bytes(b"\x89HDF")
    with pytest.raises(InputError, match=r"unknown feature format '\.h5'.*\.safetensors, \.npz"):
        read_features(tmp_path / "f.h5")


def test_headerless_file_needs_its_width(tmp_path):
    write(tmp_path / "d.feat1CLS")
    with pytest.raises(InputError, match=r"no header.*set `dim`, 768"):
        read_features(tmp_path / "d.feat1CLS")


def test_headerless_file_of_another_width_is_refused(tmp_path):
    write(tmp_path / "d.feat1CLS")
    with pytest.raises(InputError, match=r"48 bytes are not a whole number.*`dim: 5`"):
        read_features(tmp_path / "d.feat1CLS", dim=5)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def save_object_npz(path, ids, features):
    np.savez(path, ids=ids, features=features)


EVIL = {
    "f.npy": lambda path, evil: np.save(path, np.array([[evil]], object), allow_pickle=True),
    "f.pt": lambda path, evil: torch.save(evil, path),
    "legacy.pth": lambda path, evil: torch.save(evil, path, _use_new_zipfile_serialization=False),
    "raw.pt": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
    "raw.npy": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
    "raw.npz": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
    "ids.npz": lambda path, evil: save_object_npz(path, np.array([evil], object), np.ones((1, 2))),
    "features.npz": lambda path, evil: save_object_npz(path, ["a"], np.array([[evil]], object)),
    "f.pkl": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
    "raw.safetensors": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
    "raw.parquet": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", EVIL)
def test_pickle_is_refused_and_never_executed(tmp_path, canary, name):
    EVIL[name](tmp_path / name, TouchWhenLoaded(str(canary)))
    with pytest.raises(InputError, match=name):
        read_features(tmp_path / name)
    assert not canary.exists()


def test_pickle_in_a_folder_is_refused_and_never_executed(tmp_path, canary):
    folder(tmp_path / "folder", VALUES, TOKENS)
    EVIL["f.npy"](tmp_path / "folder" / "evil.npy", TouchWhenLoaded(str(canary)))
    with pytest.raises(InputError, match=r"evil\.npy.*Python objects"):
        read_features(tmp_path / "folder")
    assert not canary.exists()


def test_the_canary_would_have_sung(tmp_path, canary):
    EVIL["f.npy"](tmp_path / "f.npy", TouchWhenLoaded(str(canary)))
    np.load(tmp_path / "f.npy", allow_pickle=True)
    assert canary.exists()


@pytest.mark.parametrize("name", ["f.npy", "ids.npz"])
def test_object_arrays_are_refused_with_the_mend(tmp_path, name):
    EVIL[name](tmp_path / name, "harmless")
    with pytest.raises(InputError, match=r"object|save a one-dimensional array of strings"):
        read_features(tmp_path / name)


def test_state_dict_is_refused_with_its_keys(tmp_path):
    torch.save({"weight": VALUES}, tmp_path / "f.pt")
    with pytest.raises(InputError, match=r"holds a dict with keys \['weight'\].*tensor alone"):
        read_features(tmp_path / "f.pt")


def test_ragged_float_seq_names_the_line(tmp_path):
    (tmp_path / "d.itememb").write_text("item_id:token\tv:float_seq\na\t1 2\nb\t1 2 3\n")
    with pytest.raises(InputError, match=r"d\.itememb, line 3: 3 numbers for item 'b', 2 in"):
        read_features(tmp_path / "d.itememb")


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_columns_of_several_number_types_keep_their_values(order, tmp_path):
    columns = {"a": np.float32([1.0009765, 70000.0]), "b": np.float16([0.5, 2.0])}
    table = pa.table({"item_id": ["x", "y"], **{name: columns[name] for name in order}})
    pq.write_table(table, tmp_path / "f.parquet")
    read = read_features(tmp_path / "f.parquet")
    expected = np.stack([columns[name].astype(np.float32) for name in order], axis=1)
    np.testing.assert_array_equal(read.values.numpy(), expected)
    assert set(read.dtype.split(", ")) == {"float", "halffloat"}


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_a_file_with_an_array_for_each_item_is_told_in_few_words(name, tmp_path):
    arrays = {f"B{i:05}": np.zeros(3, np.float32) for i in range(5000)}
    if name == "f.npz":
        np.savez(tmp_path / name, **arrays)
    else:
        safetensors.numpy.save_file(arrays, tmp_path / name)
    with pytest.raises(InputError, match=r"only 'B00000', .*\(5000 in all\)") as caught:
        read_features(tmp_path / name)
    assert len(str(caught.value)) < 600


def test_ragged_list_column_names_the_row(tmp_path):
    table = pa.table({"item_id": ["a", "b", "c"], "v": [[1.0, 2.0], None, [1.0]]})
    pq.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"f\.parquet, row .: 1 numbers for item 'c', 2 in"):
        read_features(tmp_path / "f.parquet")


def test_folder_with_two_widths_names_the_file(tmp_path):
    folder(tmp_path / "folder", VALUES, TOKENS)
    np.save(tmp_path / "folder" / "zz.npy", np.zeros(5, np.float32))
    with pytest.raises(InputError, match=r"zz\.npy: 5 numbers .* but 7\.npy has 3"):
        read_features(tmp_path / "folder")


def test_text_that_is_no_number_names_the_line(tmp_path):
    (tmp_path / "f.csv").write_text("item_id,x,y\na,1,2\nb,1,two\n")
    with pytest.raises(InputError, match=r"f\.csv, line 3: item 'b': .*'two'"):
        read_features(tmp_path / "f.csv")


@pytest.mark.parametrize("name", ["f.csv", "d.item"])
def test_short_line_is_named(tmp_path, name):
    header = "item_id,x,y\na,1,2\nb,1\n" if name == "f.csv" else "item_id:token\tv:float_seq\na\n"
    (tmp_path / name).write_text(header)
    with pytest.raises(InputError, match=rf"{name}, line \d: \d columns, the header has \d"):
        read_features(tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
@pytest.mark.parametrize("name", BINARY)
def test_truncated_file_is_refused_by_name(tmp_path, name, share):
    path = write(tmp_path / name, VALUES.repeat(50, 1), [f"i{i}" for i in range(200)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=name):
        read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [name for name in BINARY if "parquet" not in name])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_flipped_bytes_give_an_input_error_or_numbers(tmp_path_factory, name, data):
    path = write(tmp_path_factory.mktemp("flip") / name)
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        held[data.draw(st.integers(0, len(held) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(held)
    try:
        outcome = f"{name} holds {read(path).values.ndim} dimensions"
    except InputError as error:  # anything else fails the test
        outcome = str(error)
    assert name in outcome


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 1 << 40]},
        {"shape": [4, 1 << 40]},
        {"shape": [-4, -3]},
        {"data_offsets": [-48, 0]},
        {"dtype": "F99"},
        {"shape": None},
    ],
)
def test_lying_safetensors_header_is_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]} | change
    text = json.dumps({"features": entry}).encode()
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    with pytest.raises(InputError, match=r"f\.safetensors: not a readable safetensors file"):
        read_features(path)


@pytest.mark.parametrize("member", ["../evil", "/evil", "a/b"])
def test_archive_member_with_a_path_is_refused(tmp_path, member):
    np.savez(tmp_path / "f.npz", **{"features": VALUES.numpy(), member: VALUES.numpy()})
    with pytest.raises(InputError, match=r"member '.*\.npy' is a path"):
        read_features(tmp_path / "f.npz")


def test_zip_that_claims_several_disks_is_refused(tmp_path):
    path = write(tmp_path / "f.pt")
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    claim = b"PK\6\7" + bytes(12) + b"\7\0\0\0"  # end of a 64-bit directory, on one of 7 disks
    path.write_bytes(whole[:end] + claim + whole[end:])
    with pytest.raises(InputError, match=r"f\.pt: damaged"):
        read(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.ones(1, 1, dtype=torch.float64).expand(10**6, 10**6), "only a part"),
        (lambda: torch.ones(2, 3, device="meta"), "save dense real numbers"),
        (lambda: torch.ones(2, 3, dtype=torch.uint8).view(torch.bits8), "tensor of bits8"),
        (lambda: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)]), "save dense"),
        (lambda: torch.ones(2, 3).to_sparse(), "save dense"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_odd_tensors_are_refused(tmp_path, tensor, message):
    torch.save(tensor(), tmp_path / "f.pt")
    with pytest.raises(InputError, match=rf"f\.pt.*{message}"):
        read(tmp_path / "f.pt")


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "f.npy")
    with pytest.raises(InputError, match=r"f\.npy: neither a file nor a folder"):
        read(tmp_path / "f.npy")
    with pytest.raises(InputError, match=r"f\.npy: not a file"):
        read(tmp_path)


def test_link_out_of_a_folder_is_refused(tmp_path):
    folder(tmp_path / "folder", VALUES, TOKENS)
    np.save(tmp_path / "secret.npy", VALUES[0].numpy())
    (tmp_path / "folder" / "x.npy").symlink_to(tmp_path / "secret.npy")
    with pytest.raises(InputError, match=r"x\.npy: link out of its folder"):
        read_features(tmp_path / "folder")


@pytest.mark.parametrize("name", ["list.csv", "d.itememb", "list.parquet"])
def test_row_without_numbers_is_an_item_without_a_vector(tmp_path, name):
    if name == "list.csv":
        (tmp_path / name).write_text('item_id,v\na,\nb,"[1, 2]"\nc,[]\n')
    elif name == "d.itememb":
        (tmp_path / name).write_text("item_id:token\tv:float_seq\na\t\nb\t1 2\nc\t\n")
    else:
        pq.write_table(
            pa.table({"item_id": ["a", "b", "c"], "v": [None, [1.0, 2.0], []]}), tmp_path / name
        )
    file = read_features(tmp_path / name)
    assert file.tokens == ["b"]
    assert file.values.tolist() == [[1, 2]]


def test_bom_and_crlf_and_quotes_are_read_as_text(tmp_path):
    text = '\ufeffitem_id:token\tname:token\tv:float_seq\r\na"\t"x\t1 2\r\nNA\ty"\t3 4\r\n'
    (tmp_path / "d.item").write_bytes(text.encode("utf-8"))
    file = read_features(tmp_path / "d.item")
    assert file.tokens == ['a"', "NA"]
    assert file.values.tolist() == [[1, 2], [3, 4]]


def test_several_vector_columns_must_be_told_apart(tmp_path):
    (tmp_path / "d.item").write_text("item_id:token\tv:float_seq\tw:float_seq\na\t1\t2 3\n")
    with pytest.raises(InputError, match=r"\['v', 'w'\].*set `column`"):
        read_features(tmp_path / "d.item")
    assert read_features(tmp_path / "d.item", column="w").values.tolist() == [[2, 3]]


def test_empty_cells_of_a_csv_are_what_pandas_wrote_them_for(tmp_path):
    frame = pd.DataFrame(VALUES.numpy()).assign(item_id=TOKENS)
    frame.iloc[1, 0] = frame.iloc[2, :-1] = np.nan
    frame.to_csv(tmp_path / "f.csv", index=False)
    file = read_features(tmp_path / "f.csv")
    assert file.tokens == [TOKENS[0], TOKENS[1], TOKENS[3]]
    assert file.values[1, 0].isnan()  # refused or masked, as `nan` says
    assert_close(file.values[[0, 2]], VALUES[[0, 3]], rtol=0, atol=1e-6)


def test_columns_of_a_csv_are_chosen_by_name(tmp_path):
    (tmp_path / "f.csv").write_text('title,asin,v\nx,a,"1 2"\ny,b,"3 4"\n')
    file = read_features(tmp_path / "f.csv", id_col="asin", column="v")
    assert file.tokens == ["a", "b"]
    with pytest.raises(InputError, match=r"no column 'asn'; set `id_col`.*did you mean 'asin'"):
        read_features(tmp_path / "f.csv", id_col="asn", column="v")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path / "wide.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match=r"recbole-mm\[parquet\]"):
        read_features(tmp_path / "wide.parquet")


def test_parquet_in_several_batches_keeps_its_order(tmp_path):
    n = 70_000  # pyarrow's batches hold 65,536 rows
    ids = [f"i{i}" for i in range(n)]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(n, dtype=np.float32)), 1)
    pq.write_table(pa.table({"item_id": pa.array(ids), "v": vectors}), tmp_path / "f.parquet")
    file = read_features(tmp_path / "f.parquet")
    assert file.tokens == ids
    assert torch.equal(file.values[:, 0], torch.arange(n, dtype=torch.float32))


def test_parquet_keeps_float16(tmp_path):
    column = pa.array(VALUES[:, 0].half().numpy())
    pq.write_table(pa.table({"item_id": TOKENS, "x": column}), tmp_path / "f.parquet")
    assert read_features(tmp_path / "f.parquet").values.dtype == torch.float16


def test_ids_that_are_floats_are_refused(tmp_path):
    np.savez(tmp_path / "f.npz", ids=np.array([1.0, 2.0]), features=np.ones((2, 2)))
    with pytest.raises(InputError, match=r"`ids` is float64"):
        read_features(tmp_path / "f.npz")
    pq.write_table(pa.table({"item_id": [1.0, None], "x": [1.0, 2.0]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"row 0: item id 1\.0 is float"):
        read_features(tmp_path / "f.parquet")


def test_integer_ids_are_decimal_text(tmp_path):
    np.savez(tmp_path / "f.npz", ids=np.array([3, 10]), features=np.ones((2, 2)))
    assert read_features(tmp_path / "f.npz").tokens == ["3", "10"]


def test_archive_without_features_lists_what_it_has(tmp_path):
    np.savez(tmp_path / "f.npz", vectors=VALUES.numpy())
    with pytest.raises(InputError, match=r"no array `features`, only 'vectors'"):
        read_features(tmp_path / "f.npz")


def test_not_as_many_ids_as_rows_is_refused(tmp_path):
    np.savez(tmp_path / "f.npz", ids=["a"], features=np.ones((2, 2)))
    with pytest.raises(InputError, match="1 ids for 2 rows"):
        read_features(tmp_path / "f.npz")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("i.txt", "a\nb c\nNA\n", (["a", "b c", "NA"], None)),
        ("i.ids", "\ufeffa\r\nb\r\n", (["a", "b"], None)),
        ("i.json", '["a", 7]', (["a", "7"], None)),
        ("i.json", '{"a": 1, "b": 0}', (["a", "b"], [1, 0])),
        ("d.item2index", "a\t1\nb\t0\n", (["a", "b"], [1, 0])),
        ("i.csv", "asin,itemID\nx,0\ny,1\n", (["x", "y"], None)),
        ("i.csv", "name,item_id\nx,0\ny,1\n", (["0", "1"], None)),
        ("i.csv", "asin,row\nx,1\ny,0\n", (["x", "y"], [1, 0])),
        ("i.csv", '"a,b"\n"x,1"\n', (["x,1"], None)),
        ("i_tab.csv", "asin\titemID\nx\t0\ny\t1\n", (["x", "y"], None)),
        ("d.item", "name:token\titem_id:token\nn\tx\nm\ty\n", (["x", "y"], None)),
    ],
)
def test_id_files_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode("utf-8"))
    assert read_ids(tmp_path / name) == expected


def test_id_column_of_mmrec(tmp_path):
    (tmp_path / "i_id_mapping.csv").write_text("asin\titemID\nB0\t0\nB1\t1\n")
    tokens, rows = read_ids(tmp_path / "i_id_mapping.csv", id_col="itemID")
    assert (tokens, rows) == (["0", "1"], None)


def test_integer_ids_out_of_order_are_ambiguous(tmp_path):
    (tmp_path / "i.csv").write_text("asin,itemID\nB0,1\nB1,0\nB2,2\n")
    with pytest.raises(InputError, match=r"row = position or row = id\? Add a column `row`"):
        read_ids(tmp_path / "i.csv", id_col="itemID")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("i.txt", "a\n\nb\n", r"line 2: empty"),
        ("i.json", '{"a": 1.5}', r"row 1.5 of item 'a'"),
        ("i.json", "3", "list of item tokens or a mapping"),
        ("i.json", "[1.5]", "item id 1.5 is float"),
        ("i.json", '["a"', "not a readable JSON"),
        ("d.item2index", "a 1\n", r"line 1: 'a 1' is not token<TAB>row"),
        ("d.item2index", "a\tx\n", r"line 1: row 'x'"),
        ("i.csv", "a,row\nx,y\n", r"line 2: row 'y'"),
        ("d.item", "name\titem\n", "field 'name' of the header .* is not name:type"),
        ("d.item", "a:token\tb:token\nx\n", "line 2: 1 fields where the header has 2"),
        ("i.csv", "", "empty"),
        ("i.txt", b"\xff\xfe", "not a readable text"),
    ],
)
def test_bad_id_file_is_refused_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        read_ids(tmp_path / name)
    assert name in str(error.value)


def test_missing_id_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"id file .*i\.txt does not exist"):
        read_ids(tmp_path / "i.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"id file .*folder cannot be used; it is no file$"):
        read_ids(tmp_path / "folder")


def test_saved_features_come_back_with_presence_and_metadata(tmp_path):
    present = torch.tensor([True, False, True, True])
    metadata = {"encoder": "all-MiniLM-L6-v2", "pooling": "mean"}
    save_features(tmp_path / "f.safetensors", VALUES, TOKENS, present, metadata)
    file = read_features(tmp_path / "f.safetensors")
    assert file.tokens == TOKENS
    assert file.metadata == metadata
    assert torch.equal(file.present, present)
    assert_close(file.values, VALUES, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_canonical_file_is_what_the_safetensors_library_reads(tmp_path, dtype):
    save_features(tmp_path / "f.safetensors", VALUES.to(dtype), TOKENS)
    tensors = safetensors.torch.load_file(tmp_path / "f.safetensors")
    assert torch.equal(tensors["features"], VALUES.to(dtype))
    assert tensors["present"].tolist() == [1, 1, 1, 1]
    assert tensors["present"].dtype == torch.uint8


def test_file_of_the_safetensors_library_is_read(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "features": VALUES, "z": torch.zeros(5)}
    path = tmp_path / "f.safetensors"
    safetensors.torch.save_file(tensors, path, {"ids": json.dumps(TOKENS)})
    file = read_features(path)
    assert file.tokens == TOKENS
    assert_close(file.values, VALUES, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["a"]}, "1 ids for 4 rows"),
        ({"tokens": ["a", "b", "a", "c"]}, "item token 'a' stands twice"),
        ({"present": torch.ones(3)}, r"present has shape \(3,\)"),
        ({"values": VALUES[0]}, "rows, width"),
        ({"values": VALUES / 0}, "item 'B01' holds NaN or Inf"),
        ({"metadata": {"ids": "x"}}, "`ids` is taken"),
        ({"metadata": {"normalised": True}}, "names to text"),
        ({"path": "f.npy"}, "ends in .safetensors"),
    ],
)
def test_contradictory_features_are_not_saved(tmp_path, change, message):
    arguments = {"path": "f.safetensors", "values": VALUES, "tokens": TOKENS} | change
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(InputError, match=message):
        save_features(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_absent_rows_may_hold_nan_when_saved(tmp_path):
    values = VALUES.clone()
    values[1] = float("nan")
    present = torch.tensor([True, False, True, True])
    save_features(tmp_path / "f.safetensors", values, TOKENS, present)
    assert torch.equal(read_features(tmp_path / "f.safetensors").present, present)


@pytest.mark.parametrize("dtype", ["float32", "float16", ">f8", "int64"])
def test_a_numpy_matrix_is_saved_as_its_tensor(tmp_path, dtype):
    matrix = (VALUES.numpy() * 10).astype(dtype)[::-1]
    save_features(
        tmp_path / "f.safetensors", matrix, np.array(TOKENS), np.array([True] * len(matrix))
    )
    file = read_features(tmp_path / "f.safetensors")
    assert file.tokens == TOKENS
    assert np.array_equal(
        file.values.numpy(), matrix.astype("float16" if dtype == "float16" else "float32")
    )
    with pytest.raises(InputError, match="dtype object"):
        save_features(tmp_path / "o.safetensors", matrix.astype(object), TOKENS)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    save_features(path, VALUES, TOKENS)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"cannot write .*No space left"):
        save_features(path, VALUES * 2, TOKENS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_presence_of_another_length_is_refused(tmp_path):
    tensors = {"features": VALUES, "present": torch.ones(3, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=r"`present` has shape \(3,\).* of the 4 rows"):
        read_features(tmp_path / "f.safetensors")


def test_canonical_file_without_rows_is_no_matrix(tmp_path):
    safetensors.torch.save_file({"features": torch.zeros(0, 3)}, tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=r"shape \(0, 3\); a feature matrix is \(rows, width\)"):
        read_features(tmp_path / "f.safetensors")


@pytest.mark.parametrize("header", [",item_id,f0", "Unnamed: 0,item_id,f0", ",itemID,f0"])
def test_row_numbers_of_pandas_are_no_feature_and_no_ids(tmp_path, header):
    (tmp_path / "f.csv").write_text(f"{header}\n0,3,0.5\n1,7,0.25\n")
    with pytest.raises(InputError, match="row numbers that pandas writes"):
        read_features(tmp_path / "f.csv")
    with pytest.raises(InputError, match="row numbers that pandas writes"):
        read_ids(tmp_path / "f.csv") if "item_id" not in header else read_features(
            tmp_path / "f.csv"
        )
    named = header.split(",")[1]
    file = read_features(tmp_path / "f.csv", id_col=named, column="f0")
    assert (file.tokens, file.values.tolist()) == (["3", "7"], [[0.5], [0.25]])
    (tmp_path / "g.csv").write_text("Unnamed: 0,v0,v1\ni1,1,2\ni2,3,4\n")
    file = read_features(tmp_path / "g.csv", id_col="Unnamed: 0")
    assert (file.tokens, file.values.tolist()) == (["i1", "i2"], [[1, 2], [3, 4]])


def test_the_index_column_of_pandas_parquet_is_no_feature(tmp_path):
    table = pd.DataFrame({"item_id": ["a", "b"], "f0": [1.0, 2.0]}, index=[5, 3])
    table.to_parquet(tmp_path / "f.parquet")
    file = read_features(tmp_path / "f.parquet")
    assert (file.tokens, file.values.tolist()) == (["a", "b"], [[1.0], [2.0]])
    table.drop(columns="item_id").to_parquet(tmp_path / "g.parquet")
    file = read_features(tmp_path / "g.parquet", id_col="__index_level_0__")
    assert (file.tokens, file.values.tolist()) == (["5", "3"], [[1.0], [2.0]])


def test_a_csv_cell_may_be_longer_than_pythons_limit(tmp_path):
    numbers = np.random.default_rng(0).random(8192)
    assert len(str(numbers.tolist())) > csv.field_size_limit()
    (tmp_path / "f.csv").write_text(f'item_id,vector\na,"{numbers.tolist()}"\n')
    before = csv.field_size_limit()
    assert read_features(tmp_path / "f.csv").values.shape == (1, 8192)
    assert csv.field_size_limit() == before


def test_atomic_files_are_read_in_the_format_of_the_data_set(tmp_path):
    commas = AtomicFormat(field_separator=",", seq_separator="|", encoding="latin-1")
    text = "item_id:token,vector:float_seq\né,0.5|1|2\nb,\nc,3|4|5\n"
    (tmp_path / "d.emb").write_bytes(text.encode("latin-1"))
    assert kind_of(tmp_path / "d.emb", commas) == "atomic"
    file = read_features(tmp_path / "d.emb", atomic=commas)
    assert (file.tokens, file.values.tolist()) == (["é", "c"], [[0.5, 1, 2], [3, 4, 5]])
    assert read_ids(tmp_path / "d.emb", atomic=commas) == (["é", "b", "c"], None)


@pytest.mark.parametrize(
    ("name", "kind"), [("x.feat12CLS", "headerless"), ("x.PT", "pt"), ("x.tsv", "csv")]
)
def test_format_is_told_by_the_name(tmp_path, name, kind):
    (tmp_path / name).touch()
    assert kind_of(tmp_path / name) == kind
