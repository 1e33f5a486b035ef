"""Downloads from a server of our own that breaks off, lies, and sends evil archives."""

import gzip
import hashlib
import http.server
import io
import os
import re
import tarfile
import threading
import types

import pytest

from prepare import download
from utils.plumbing.config import UserError

CONTENT = os.urandom(300_000) + b"id\ttext\ttitle\n" * 1000
PACKED = gzip.compress(CONTENT)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends server.files[path]; `closes` requests break off half-way; Range is honoured when `ranges`."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if self.path not in server.files:
            return self.send_error(404)
        body, begin = server.files[self.path], 0
        if server.ranges:
            begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if begin >= len(body) and server.ranges:
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        rest = body[begin:]
        if server.closes > 0:
            server.closes -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1; serve(name, path, body, published) makes `name` downloadable from it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.closes, server.ranges = {}, [], 0, True
    for name, value in {"URLS": {}, "HASHES": {}, "TRIES": 3, "PAUSE": 0.001}.items():
        monkeypatch.setattr(download, name, value)

    def serve(name, path, body, published=""):
        server.files[path] = body
        download.URLS[name] = f"http://127.0.0.1:{server.server_port}{path}"
        download.HASHES[name] = published

    server.serve = serve
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def sha(body):
    return "sha256:" + hashlib.sha256(body).hexdigest()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def refused(name, folder, words, left=()):
    """The download ends in this sentence, and leaves these files."""
    with pytest.raises(UserError, match=words):
        download.download(name, folder)
    assert names(folder) == [*left]


def test_resumes_where_the_server_broke_off(server, tmp_path, capsys):
    """A connection that closes at half is continued with Range, and the whole has the published hash."""
    server.serve("a.csv", "/a.csv", CONTENT, sha(CONTENT))
    server.closes = 5  # more often than TRIES, but every try gets some further
    path = download.download("a.csv", tmp_path)
    assert path.read_bytes() == CONTENT
    begin = 0
    for _, wanted in server.requests:  # each begins at the last byte that it has, and gets half of the rest
        assert wanted == f"bytes={begin}-"
        begin += (len(CONTENT) - begin) // 2 - 1
    assert len(server.requests) == 6
    assert "verified" in capsys.readouterr().out and names(tmp_path) == ["a.csv", "a.csv.source.json"]


def test_gives_up_and_goes_on_later(server, tmp_path):
    """After TRIES without progress only the .part is left; the same command goes on from there."""
    server.serve("a.csv", "/a.csv", CONTENT, sha(CONTENT))
    server.closes = 100
    (tmp_path / "a.csv.part").write_bytes(CONTENT[:-1])  # half of two bytes is no progress
    refused("a.csv", tmp_path, "closed at .* of .* bytes.; run the command again to go on", ["a.csv.part"])
    assert len(server.requests) == 3
    (tmp_path / "a.csv.part").write_bytes(CONTENT[:1000])  # as a power cut leaves it
    server.closes = 0
    download.download("a.csv", tmp_path)
    assert server.requests[-1][1] == "bytes=999-" and (tmp_path / "a.csv").read_bytes() == CONTENT


def test_parts_and_servers(server, tmp_path):
    """Halves of a server that ignores Range are not glued together; a part is complete, or too long."""
    server.serve("b.csv", "/b.csv", CONTENT, sha(CONTENT))
    server.ranges, server.closes = False, 1
    assert download.download("b.csv", tmp_path).read_bytes() == CONTENT
    server.ranges = True
    server.serve("a.csv", "/a.csv", CONTENT)
    (tmp_path / "a.csv.part").write_bytes(CONTENT)
    assert download.download("a.csv", tmp_path).read_bytes() == CONTENT
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.csv.part").write_bytes(CONTENT + b"more than there is")
    assert download.download("a.csv", tmp_path).read_bytes() == CONTENT


def test_not_the_file(server, tmp_path):
    """An empty or a missing file; a login page or nothing in place of a file without a published hash."""
    server.serve("a.csv", "/a.csv", b"")
    refused("a.csv", tmp_path, "a.csv: HTTP 416 .*is the name still right")
    del server.files["/a.csv"]
    refused("a.csv", tmp_path, "HTTP 404 .*is the name still right")
    assert len(server.requests) == 2  # and no second try
    server.ranges = False
    pages = [b"\n<!DOCTYPE html>please log in", b"<html>", b"<head><title>", b"<?xml version='1.0'?><Error>"]
    pages += [b"\xef\xbb\xbf\r\n" + b" " * 200 + b"<!-- proxy -->", b"", b"\n \n"]
    for body in pages:
        server.files["/a.csv"] = body
        refused("a.csv", tmp_path, "is empty or a web page; is a login page between", ["a.csv.bad"])


def test_wrong_content(server, tmp_path):
    """Right size, wrong bytes: kept as .bad, never under the name that other scripts read; a rerun works."""
    server.serve("a.csv", "/a.csv", CONTENT, sha(CONTENT))
    server.files["/a.csv"] = b"x" + CONTENT[1:]
    refused("a.csv", tmp_path, "sha256.*expected", ["a.csv.bad"])
    server.files["/a.csv"] = CONTENT
    assert download.download("a.csv", tmp_path).read_bytes() == CONTENT


def test_gzip_is_unpacked(server, tmp_path, capsys):
    """x.tsv.gz becomes x.tsv; without a known hash the output says unverified; a second call asks nobody."""
    server.serve("a.tsv", "/a.tsv.gz", PACKED)
    assert download.download("a.tsv", tmp_path).read_bytes() == CONTENT
    assert "unverified" in capsys.readouterr().out and names(tmp_path) == ["a.tsv", "a.tsv.source.json"]
    download.download("a.tsv", tmp_path)
    assert "is complete (unverified" in capsys.readouterr().out and len(server.requests) == 1
    (tmp_path / "a.tsv.source.json").unlink()  # as where another tool has made the file
    refused("a.tsv", tmp_path, "a.tsv: is not of this command; delete it to download it", ["a.tsv"])


@pytest.mark.parametrize("body", [PACKED[:-1000], PACKED[:-8] + b"\0" * 8, b"no gzip"], ids=range(3))
def test_broken_gzip(server, tmp_path, body):
    """A gzip that is cut, damaged, or none at all leaves no half file under its name."""
    server.serve("a.tsv", "/a.tsv.gz", body)
    refused("a.tsv", tmp_path, "broken archive.*run the command again", ["a.tsv.bad"])


def tar(*members):
    """A tar.gz; a member is (name, type, content or link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content
            archive.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()


def test_tar_is_unpacked(server, tmp_path):
    members = tar(("collection.tsv", tarfile.REGTYPE, CONTENT), ("d/q.tsv", tarfile.REGTYPE, b"q"))
    server.serve("m", "/m.tar.gz", members)
    folder = download.download("m", tmp_path)
    assert (folder / "collection.tsv").read_bytes() == CONTENT
    assert (folder / "d" / "q.tsv").read_bytes() == b"q"
    assert folder.stat().st_mode & 0o055 == 0o055  # others on the machine may read it
    download.download("m", tmp_path)
    assert len(server.requests) == 1 and names(tmp_path) == ["m", "m.source.json"]


@pytest.mark.parametrize(
    "member",
    [
        ("../../evil", tarfile.REGTYPE, b"x"),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("hard", tarfile.LNKTYPE, "../../evil"),
        ("device", tarfile.CHRTYPE, ""),
    ],
)
def test_evil_tar(server, tmp_path, member):
    """A member outside the folder, a link out of it or a device is refused by name; nothing is unpacked."""
    server.serve("m", "/m.tar.gz", tar(("fine", tarfile.REGTYPE, b"x"), member))
    refused("m", tmp_path / "out", f"broken archive: '{member[0]}'", ["m.bad"])
    assert names(tmp_path) == ["out"]


def test_disk_too_small(server, tmp_path, monkeypatch):
    """The need is compared with the free space first; of a packed file it is the unpacked size too."""
    server.serve("a.csv", "/a.csv", CONTENT)
    server.serve("a.tsv", "/a.tsv.gz", PACKED)
    for name, free in (("a.csv", 1000), ("a.tsv", 2 * len(PACKED))):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr("utils.plumbing.files.shutil.disk_usage", lambda _, usage=usage: usage)
        refused(name, tmp_path, f"{name}.* needs 0.0 GB .* are free")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("data.retriever.nq-train", ["biencoder-nq-train.json"]),
        ("data.retriever.webq-dev", ["biencoder-webquestions-dev.json"]),
        ("data.retriever.nq", [f"biencoder-nq-{name}.json" for name in ("train", "dev", "adv-hn-train")]),
        ("data.retriever.qas.trivia-test", ["trivia-test.qa.csv"]),
        ("data.retriever.qas.nq", [f"nq-{name}.qa.csv" for name in ("train", "dev", "test")]),
        ("data.retriever_results.nq.single.test", ["dpr-results-nq-test.json"]),
        ("checkpoint.retriever.multiset", ["dpr-multiset.cp"]),
        ("checkpoint.reader", ["dpr-reader-nq-single.cp"]),
        ("data.wikipedia_split", ["psgs_w100.tsv"]),
    ],
)
def test_names_of_dpr(monkeypatch, theirs, ours):
    """DPR's names and their beginnings, from its download_data.py."""
    fetched = []
    monkeypatch.setattr(download, "download", lambda name, _: fetched.append(name))
    monkeypatch.setattr("sys.argv", ["prepare.download", theirs])
    download.main()
    assert fetched == ours and set(ours) <= set(download.URLS)
    with pytest.raises(UserError, match="a name of DPR's that has no file here .* did you mean"):
        download.our_names("data.reader.nq.single.train")


def test_names():
    """A misspelt name is met with the nearest one; every url is https and every hash has a file."""
    with pytest.raises(UserError, match="did you mean 'psgs_w100.tsv'"):
        download.download("psgs_w100")
    assert all(url.startswith("https://") for url in download.URLS.values())
    assert set(download.HASHES) <= set(download.URLS)
    for published in download.HASHES.values():
        assert re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", published)
