"""
Download an official file, go on where a broken download stopped, verify it, unpack it.

Run: python -m prepare.download NAME [--out data]      (without NAME: the list of names)
What stands under its final name is complete. "verified": it has the published hash; "unverified": there is
none, so only the server's length (and gzip's own checksum) was compared. NAME.source.json keeps which.
"""

import argparse
import fcntl
import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from utils.plumbing.config import UserError, friendly_errors, nearest
from utils.plumbing.files import atomic_file, need_space, read_json, write_json

DPR = "https://dl.fbaipublicfiles.com/dpr/"
NQ_OPEN = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open/"
MARCO = "https://msmarco.z22.web.core.windows.net/msmarcoranking/"
# from: DPR dpr/data/download_data.py, which spells "retriver" as the server does
URLS = {  # name: url
    "psgs_w100.tsv": DPR + "wikipedia_split/psgs_w100.tsv.gz",
    "dpr-single-nq.cp": DPR + "checkpoint/retriever/single/nq/hf_bert_base.cp",
    "dpr-multiset.cp": DPR + "checkpoint/retriver/multiset/hf_bert_base.cp",
    "dpr-single-adv-hn-nq.cp": DPR + "checkpoint/retriver/single-adv-hn/nq/hf_bert_base.cp",
    "dpr-reader-nq-single.cp": DPR + "checkpoint/reader/nq-single/hf_bert_base.cp",
    "NQ-open.train.jsonl": NQ_OPEN + "NQ-open.train.jsonl",
    "NQ-open.dev.jsonl": NQ_OPEN + "NQ-open.dev.jsonl",
    "msmarco": MARCO + "collectionandqueries.tar.gz",
}
SETS = "nq-train nq-dev nq-adv-hn-train trivia-train trivia-dev squad1-train squad1-dev webquestions-train"
for name in f"{SETS} webquestions-dev curatedtrec-train curatedtrec-dev".split():
    URLS[f"biencoder-{name}.json"] = DPR + f"data/retriever/biencoder-{name}.json.gz"
for name in "nq-train nq-dev nq-test squad1-test webquestions-test curatedtrec-test".split():
    URLS[f"{name}.qa.csv"] = DPR + f"data/retriever/{name}.qa.csv"
for name in "trivia-train trivia-dev trivia-test".split():
    URLS[f"{name}.qa.csv"] = DPR + f"data/retriever/{name}.qa.csv.gz"
URLS["nq-train_gold_info.json"] = DPR + "data/nq_gold_info/nq-train_gold_info.json.gz"
# (bytes, hash) of what the server sends. from: huggingface/datasets, dataset_infos.json of wiki_dpr and of
# nq_open; allenai/ir_datasets, etc/downloads.json (md5: proof against accidents only)
HASHES = {
    "psgs_w100.tsv": (4694541059, "sha256:c39b020c855a2b5c25ffef3abe4a3b6f9b829ad7dbc14ec3d163d34d7c53ea8d"),
    "NQ-open.train.jsonl": (
        8522298,
        "sha256:0c93aaf13b12f855628489665e4ef85ffb8573ad444646f11f4fabdc57a0aabf",
    ),
    "NQ-open.dev.jsonl": (391316, "sha256:f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616"),
    "biencoder-nq-train.json": (2314892908, "md5:a1c927b5adae71388eb064329387709f"),
    "biencoder-nq-dev.json": (256239282, "md5:2640483dbe0df7ae29c6da419c551a80"),
    "biencoder-trivia-train.json": (1848559940, "md5:5aa4d3577c91425cd20e239ed89a252b"),
    "biencoder-trivia-dev.json": (207271749, "md5:d559dffe09acfe5a6370adea55b8abf2"),
    "msmarco": (1057717952, "md5:31644046b18952c1386cd4564ba2ae69"),
}
TRIES, PAUSE = 6, 2.0  # tries without a byte of progress; seconds before the second, then doubled
EXPANSION = 20  # unpacked bytes per packed byte that we believe; DPR's files have 3


def locked(part):
    """`part` opened for appending by this process alone; a twin waits here until the first one is done."""
    while True:
        file = open(part, "ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
            return file
        file.close()  # the first one finished, and renamed or removed it


def receive(url, file, size):
    """One attempt to append the rest of `url`; returns what went wrong, or ""."""
    done = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "prepare.download", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={done}-"} if done else {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            if reply.headers.get_content_type() == "text/html":
                raise UserError(
                    f"{url}: got HTML (HTTP {reply.status}), not the file; is a login page between?"
                )
            if done and not reply.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                done = file.truncate(0)  # the server starts again
            rest = int(reply.headers.get("Content-Length", 0))
            total = rest and done + rest
            if size and total and total != size:
                raise UserError(f"{url}: has {total} bytes now, expected {size}; the file was replaced")
            unpacked = 3 * total if url.endswith(".gz") else 0  # beside it, as `unpack` asks for
            need_space(Path(file.name).parent, rest + unpacked, url)
            with tqdm(total=total or None, initial=done, unit="B", unit_scale=True, disable=None) as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            file.flush()
            got = file.seek(0, os.SEEK_END)
            return f"the connection closed at {got} of {total} bytes" if got < total else ""
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is left to send, or our part is not of this file
            if error.headers.get("Content-Range") == f"bytes */{done}":
                return ""
            file.truncate(0)
            return "the part did not fit the file"
        if error.code < 500 and error.code not in (408, 429):
            kind = error.headers.get_content_type()
            raise UserError(
                f"{url}: HTTP {error.code} {error.reason} ({kind}); is the name still right?"
            ) from None
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) == 28:  # ENOSPC
            raise UserError(f"{file.name}: the disk is full; free some, then run the command again") from None
        file.flush()
        return str(getattr(error, "reason", error) or type(error).__name__)


def fetch(url, file, size):
    """Append the rest of `url` to `file`, again and again while that helps."""
    tries, before = 0, file.seek(0, os.SEEK_END)
    while not size or before < size:  # one that is larger will not pass the hash
        problem = receive(url, file, size)
        if not problem:
            return
        now = file.seek(0, os.SEEK_END)
        tries = tries + 1 if now <= before else 1
        if tries >= TRIES:
            raise UserError(f"{url}: gave up after {tries} tries ({problem}); run the command again to go on")
        print(f"{problem}; trying again", flush=True)
        time.sleep(PAUSE * 2 ** (tries - 1))
        before = now


def verify(part, published):
    """What we know of `part`; ValueError when it has not the published hash ("sha256:..." or "md5:...")."""
    if not published:
        return "unverified: no hash of it is published"
    kind, _, expected = published.partition(":")
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise ValueError(f"has the {kind} {found}, expected {expected}")
    return f"verified, {published}"


def unpack(part, target, url):
    """gunzip or untar `part` to `target`, whole or not at all. ValueError: the archive is broken or evil."""
    if not url.endswith(".gz"):
        os.replace(part, target)
        return
    need_space(target.parent, 3 * part.stat().st_size, f"unpacking {target}")
    limit = EXPANSION * part.stat().st_size
    try:
        if url.endswith(".tar.gz"):
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
                new = Path(temporary) / "new"
                with tarfile.open(part, "r:gz") as archive:
                    for member in archive:
                        limit -= member.size
                        path = Path(member.name)
                        inside = not path.is_absolute() and ".." not in path.parts
                        if not inside or not (member.isfile() or member.isdir()) or limit < 0:
                            raise ValueError(f"member {member.name!r} is outside, a link, a device or huge")
                        archive.extract(member, new, filter="data")
                if target.exists():
                    shutil.rmtree(target)
                os.rename(new, target)
        else:
            with gzip.open(part) as source, atomic_file(target, "wb") as file:
                while block := source.read(1 << 20):
                    limit -= file.write(block)
                    if limit < 0:
                        raise ValueError(f"unpacks to more than {EXPANSION} times its size")
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise ValueError(f"is a broken archive: {error}") from None
    part.unlink()


def size_of(path):
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def download(name, out="data", force=False):
    """The path of the complete, unpacked file (or folder) `name` below `out`. See the module's docstring."""
    if name not in URLS:
        raise UserError(f"no file is called {name!r}; {nearest(name, list(URLS))}")
    url, (size, published) = URLS[name], HASHES.get(name, (0, ""))
    target, source = Path(out) / name, Path(out) / f"{name}.source.json"
    part, bad = Path(out) / f"{name}.part", Path(out) / f"{name}.bad"
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(part) as file:
        try:
            if target.exists() and not force:
                known = read_json(source) if source.exists() else {}
                if known.get("url") != url or known.get("bytes") != size_of(target):
                    raise UserError(f"{target}: is not as this command left it; --force replaces it")
                print(f"{target}: is complete ({known['check']})")
                return target
            fetch(url, file, size)
            file.flush()
            os.fsync(file.fileno())
            try:
                check = verify(part, published)
                unpack(part, target, url)
            except ValueError as error:
                os.replace(part, bad)
                raise UserError(f"{url}: {error}; kept as {bad}; run the command again") from None
            write_json(source, {"url": url, "bytes": size_of(target), "check": check})
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
    print(f"{target}: complete ({check})")
    return target


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="one of the names below")
    parser.add_argument("--out", default="data", help="folder to write into")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.name is None:
        print("\n".join(URLS))
    else:
        download(args.name, args.out, args.force)


if __name__ == "__main__":
    with friendly_errors():
        main()
