"""Content hashes of feature files."""

import os

import numpy as np

from recbole_mm.data.digest import sha256_of, stamp_of


def write_folder(path):
    path.mkdir()
    for number, token in enumerate(("B01", "7", "ü 3")):
        np.save(path / f"{token}.npy", np.full((1, 3), number, np.float32))


def test_hash_is_sha256sum_and_follows_the_content(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert sha256_of(path) == known
    before = path.stat()
    path.write_bytes(b"abd")  # same size, within one tick of the clock
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_of(path) != known


def test_hash_of_an_unchanged_file_is_not_computed_again(tmp_path, monkeypatch):
    path = tmp_path / "f.bin"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    first = sha256_of(path)
    monkeypatch.setattr("hashlib.sha256", None)
    assert sha256_of(path) == first


def test_hash_of_a_folder_follows_names_and_content(tmp_path):
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b")
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    (tmp_path / "b" / "7.npy").rename(tmp_path / "b" / "8.npy")
    assert sha256_of(tmp_path / "a") != sha256_of(tmp_path / "b")


def test_odd_names_and_links_that_lead_nowhere_are_left_to_the_reader(tmp_path):
    write_folder(tmp_path / "a")
    (tmp_path / "a" / os.fsdecode(b"\xff.npy")).write_bytes(b"1")
    assert len(sha256_of(tmp_path / "a")) == 64
    (tmp_path / "a" / "gone.npy").symlink_to(tmp_path / "nowhere")
    assert stamp_of(tmp_path / "a")[0] > 0
    assert len(sha256_of(tmp_path / "a")) == 64
