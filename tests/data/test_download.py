"""Data sets fetched from a server of this machine: whole under their name, or not there."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from recbole_mm.cli import main
from recbole_mm.data import download as module
from recbole_mm.data.download import download, published
from recbole_mm.errors import EnvironmentFault, InputError

INTER = "user_id:token\titem_id:token\ttimestamp:float\n" + "u\ti\t1\n" * 50


def packed(*members):
    """A zip archive of (name or ZipInfo, text)."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members:
            archive.writestr(name, text)
    return held.getvalue()


GOOD = packed(("Tiny_Set.inter", INTER), ("Tiny_Set.item", "item_id:token\ni\n"), ("README", "x"))


class Server:
    """Hands out ``content``, or only its first ``cut`` bytes."""

    def __init__(self):
        self.content, self.cut, self.requests = GOOD, None, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                if outer.content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content[: outer.cut])

            def log_message(self, *_):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/Tiny_Set.zip"


@pytest.fixture
def server(monkeypatch):
    """A server that RecBole's list names for ``tiny-set``; no proxy stands before it."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "*")
    here = Server()
    monkeypatch.setattr(module, "published", lambda: {"tiny-set": here.url})
    thread = threading.Thread(target=here.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield here
    here.http.shutdown()
    thread.join()
    here.http.server_close()


def left(path):
    names = (p.name for p in path.iterdir()) if path.exists() else ()
    return sorted(name for name in names if name != ".SOURCE.json.lock")  # which stays


def test_a_data_set_is_fetched_renamed_and_recorded(server, tmp_path, capsys):
    assert main(["download", "tiny-set", "--data_path", str(tmp_path / "data")]) == 0
    folder = tmp_path / "data" / "tiny-set"
    assert left(folder) == ["README", "tiny-set.inter", "tiny-set.item"]
    assert left(folder.parent) == ["SOURCE.json", "tiny-set"]
    assert (folder / "tiny-set.inter").read_text() == INTER
    entry = json.loads((folder.parent / "SOURCE.json").read_text())["tiny-set"]
    assert entry["url"] == server.url
    assert entry["sha256"] == hashlib.sha256(GOOD).hexdigest()
    assert entry["files"]["tiny-set.inter"]["bytes"] == len(INTER)
    out = capsys.readouterr().out
    assert entry["sha256"] in out
    assert f"--dataset=tiny-set --data_path={tmp_path / 'data'}" in out


def test_downloads_at_once_all_keep_their_record(server, tmp_path, monkeypatch):
    """The second one ends after the first has fetched and before it records."""
    fetch, names = module._fetch, iter(["tiny-set", "other"])

    def fetch_while_another_ends(url, archive):
        fetch(url, archive)
        if next(names) == "tiny-set":
            download("other", tmp_path, url=server.url)

    monkeypatch.setattr(module, "_fetch", fetch_while_another_ends)
    download("tiny-set", tmp_path)
    assert json.loads((tmp_path / "SOURCE.json").read_text()).keys() == {"tiny-set", "other"}


def test_the_faster_of_two_downloads_of_a_name_keeps_its_record(server, tmp_path, monkeypatch):
    fetch, calls = module._fetch, iter((True, False))

    def fetch_while_the_other_ends(url, archive):
        fetch(url, archive)
        if next(calls):
            server.content = packed(("Tiny_Set.inter", INTER + "u\ti\t2\n"))
            download("tiny-set", tmp_path)

    monkeypatch.setattr(module, "_fetch", fetch_while_the_other_ends)
    assert not download("tiny-set", tmp_path).fetched
    assert left(tmp_path) == ["SOURCE.json", "tiny-set"]
    assert not download("tiny-set", tmp_path).fetched  # record and folder belong together


def test_a_whole_folder_is_left_as_it_is(server, tmp_path):
    first = download("tiny-set", tmp_path)
    again = download("tiny-set", tmp_path)
    assert (first.fetched, again.fetched, server.requests) == (True, False, 1)
    assert "complete" in again.lines()[0]
    (tmp_path / "tiny-set" / "notes.txt").write_text("mine")  # what was downloaded is still whole
    assert not download("tiny-set", tmp_path).fetched
    with pytest.raises(InputError, match="not abc"):
        download("tiny-set", tmp_path, sha256="abc")


def test_a_folder_that_is_not_whole_is_refused(server, tmp_path):
    download("tiny-set", tmp_path)
    (tmp_path / "tiny-set" / "tiny-set.inter").write_text("cut")
    with pytest.raises(InputError, match=r"tiny-set.inter is missing or not what was downloaded"):
        download("tiny-set", tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="not by download"):
        download("other", tmp_path, url=server.url)


@pytest.mark.parametrize("cut", [0, 100, len(GOOD) - 1])
def test_an_interrupted_download_leaves_nothing_and_a_retry_works(server, tmp_path, capsys, cut):
    server.cut = cut
    assert main(["download", "tiny-set", f"--data_path={tmp_path}"]) == 3
    assert server.url in capsys.readouterr().err
    assert left(tmp_path) == []
    server.cut = None
    assert main(["download", "tiny-set", f"--data_path={tmp_path}"]) == 0
    assert (tmp_path / "tiny-set" / "tiny-set.inter").read_text() == INTER


def test_ctrl_c_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download("tiny-set", tmp_path)
    assert left(tmp_path) == []


def test_a_page_that_is_not_there_is_named(server, tmp_path):
    server.content = None
    with pytest.raises(EnvironmentFault, match="404"):
        download("tiny-set", tmp_path)
    assert left(tmp_path) == []


def test_another_sha256_is_refused(server, tmp_path):
    with pytest.raises(InputError, match="not abc"):
        download("tiny-set", tmp_path, sha256="abc")
    assert left(tmp_path) == []
    good = hashlib.sha256(GOOD).hexdigest()
    assert download("tiny-set", tmp_path, sha256=good.upper()).sha256 == good


def test_another_archive_than_the_last_time_is_refused(server, tmp_path):
    download("tiny-set", tmp_path)
    (tmp_path / "tiny-set").rename(tmp_path / "away")
    server.content = packed(("tiny-set.inter", INTER + "u\tj\t2\n"))
    with pytest.raises(InputError, match="add --sha256") as error:
        download("tiny-set", tmp_path)
    assert left(tmp_path) == ["SOURCE.json", "away"]
    given = str(error.value).rpartition(" ")[2]
    assert download("tiny-set", tmp_path, sha256=given).sha256 == given
    assert json.loads((tmp_path / "SOURCE.json").read_text())["tiny-set"]["sha256"] == given


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "member",
    ["../out.inter", "/tmp/out.inter", "a/../../out.inter", "..\\out.inter", "C:/out.inter"],  # noqa: S108
)
def test_members_that_lead_out_are_refused(server, tmp_path, member):
    server.content = packed(("x.inter", INTER), (member, "x"))
    with pytest.raises(InputError, match="leads out"):
        download("tiny-set", tmp_path / "data")
    assert left(tmp_path / "data") == []
    assert left(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed(("x.inter", INTER), (link("x.item"), "/etc/hostname")), "is a link"),
        (packed(("x.inter", "0" * 10_000_000)), "would unpack to 10000000"),
        (packed(("x.txt", "x")), "holds no .inter"),
        (packed(("x.inter", INTER), ("tiny-set.item", ""), ("x.item", "")), "become one"),
        (GOOD[: len(GOOD) // 2], "not a readable zip"),
        (GOOD.replace(GOOD[60:70], b"0123456789"), "not a readable zip"),
        (b"<html>moved</html>", "not a readable zip"),
        (b"", "not a readable zip"),
    ],
    ids=["link", "bomb", "no-inter", "collision", "half", "flipped", "html", "empty"],
)
def test_a_bad_archive_leaves_nothing(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(InputError, match=message):
        download("tiny-set", tmp_path)
    assert left(tmp_path) == []


def test_a_folder_around_the_files_is_left_out(server, tmp_path):
    server.content = packed(
        ("top/", ""),
        ("top/x.train.inter", INTER),
        ("top/x.test.inter", INTER),
        ("top/more/x.kg", "k"),
        ("__MACOSX/._x", ""),
    )
    done = download("mine", tmp_path, url=server.url)
    assert sorted(done.files) == ["mine.test.inter", "mine.train.inter", "more/mine.kg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-sett"], "did you mean 'tiny-set'"),
        (["../tiny-set"], "no plain folder name"),
        (["x", "--url=file:///etc/passwd"], "no address of http"),
        (["tiny-set", "--sha=1"], "unknown arguments --sha=1"),
    ],
)
def test_bad_arguments_are_named(server, tmp_path, capsys, arguments, message):
    assert main(["download", *arguments, f"--data_path={tmp_path / 'data'}"]) == 2
    assert message in capsys.readouterr().err
    assert left(tmp_path) == []


def test_a_damaged_record_is_named(server, tmp_path):
    (tmp_path / "SOURCE.json").write_text('{"tiny-set": 3}')
    with pytest.raises(InputError, match=r"SOURCE.json: not what download wrote"):
        download("tiny-set", tmp_path)


def test_a_missing_pooch_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'recbole-mm\[download\]'"):
        download("tiny-set", tmp_path)


def test_recboles_list_has_ml_100k_and_only_plain_names():
    addresses = published()
    assert addresses["ml-100k"].startswith("https://")
    assert all("/" not in name for name in addresses)
