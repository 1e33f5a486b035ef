"""
Download an official file, go on where a broken download stopped, check it, unpack it.

Run: python -m prepare.download NAME [--out data]      (without NAME: the list of names)
NAME is one of the list, or a name of DPR's own download_data.py: data.retriever.qas.nq-test. As there, the
beginning of a name stands for all that begin so: data.retriever.qas.nq.
What stands under its final name is complete. "verified": it has the published hash. "unverified": no hash is
published, so only the server's length (and gzip's own checksum) was compared. NAME.source.json says which.
"""

import argparse
import gzip
import hashlib
import http.client
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from utils.plumbing.config import UserError, disk_is_full, friendly_errors, nearest, need_folder
from utils.plumbing.files import atomic_file, atomic_folder, need_space, read_json, write_json

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
    "nq-train_gold_info.json": DPR + "data/nq_gold_info/nq-train_gold_info.json.gz",
    "NQ-open.train.jsonl": NQ_OPEN + "NQ-open.train.jsonl",
    "NQ-open.dev.jsonl": NQ_OPEN + "NQ-open.dev.jsonl",
    "msmarco": MARCO + "collectionandqueries.tar.gz",
}
SETS = "nq-train nq-dev nq-adv-hn-train trivia-train trivia-dev squad1-train squad1-dev webquestions-train"
for name in f"{SETS} webquestions-dev curatedtrec-train curatedtrec-dev".split():
    URLS[f"biencoder-{name}.json"] = f"{DPR}data/retriever/biencoder-{name}.json.gz"
for name in "nq-train nq-dev nq-test squad1-test webquestions-test curatedtrec-test".split():
    URLS[f"{name}.qa.csv"] = f"{DPR}data/retriever/{name}.qa.csv"
for name in "trivia-train trivia-dev trivia-test".split():
    URLS[f"{name}.qa.csv"] = f"{DPR}data/retriever/{name}.qa.csv.gz"
for name in "nq-train nq-dev nq-test".split():
    URLS[f"dpr-results-{name}.json"] = f"{DPR}data/retriever_results/single/{name}.json.gz"
# from: the names of DPR's dpr/data/download_data.py; ours follow from them, but for these
RESOURCES = {  # theirs: ours
    "data.wikipedia_split.psgs_w100": "psgs_w100.tsv",
    "data.gold_passages_info.nq_train": "nq-train_gold_info.json",
    "checkpoint.retriever.single.nq.bert-base-encoder": "dpr-single-nq.cp",
    "checkpoint.retriever.multiset.bert-base-encoder": "dpr-multiset.cp",
    "checkpoint.retriever.single-adv-hn.nq.bert-base-encoder": "dpr-single-adv-hn-nq.cp",
    "checkpoint.reader.nq-single.hf-bert-base": "dpr-reader-nq-single.cp",
}
for name in URLS:
    short = name.replace("webquestions", "webq").partition(".")[0]
    if name.startswith("biencoder-"):
        RESOURCES[f"data.retriever.{short.removeprefix('biencoder-')}"] = name
    elif name.endswith(".qa.csv"):
        RESOURCES[f"data.retriever.qas.{short}"] = name
    elif name.startswith("dpr-results-"):
        RESOURCES[f"data.retriever_results.nq.single.{short.rpartition('-')[2]}"] = name
# name: hash of what the server sends. from: huggingface/datasets, dataset_infos.json of wiki_dpr and of
# nq_open; allenai/ir_datasets, etc/downloads.json (md5: proof against accidents only)
HASHES = {
    "psgs_w100.tsv": "sha256:c39b020c855a2b5c25ffef3abe4a3b6f9b829ad7dbc14ec3d163d34d7c53ea8d",
    "NQ-open.train.jsonl": "sha256:0c93aaf13b12f855628489665e4ef85ffb8573ad444646f11f4fabdc57a0aabf",
    "NQ-open.dev.jsonl": "sha256:f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
    "biencoder-nq-train.json": "md5:a1c927b5adae71388eb064329387709f",
    "biencoder-nq-dev.json": "md5:2640483dbe0df7ae29c6da419c551a80",
    "biencoder-trivia-train.json": "md5:5aa4d3577c91425cd20e239ed89a252b",
    "biencoder-trivia-dev.json": "md5:d559dffe09acfe5a6370adea55b8abf2",
    "msmarco": "md5:31644046b18952c1386cd4564ba2ae69",
}
# no file of ours begins like a page: a tag, a comment or a declaration, after white space or a byte mark
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<[!?a-z]|$)", re.IGNORECASE)
TRIES = 6  # in a row without a byte of progress
PAUSE = 2.0  # seconds before the second try, doubled before every other


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def receive(url, part):
    """Append the rest of `url` to `part`. OSError: try again."""
    # why one byte less than we have: the rest of a complete part would be nothing, which is an error (416)
    begin = max(size_of(part) - 1, 0)
    headers = {"User-Agent": "prepare.download", "Accept-Encoding": "identity", "Range": f"bytes={begin}-"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
        if reply.status != 206:  # the server knows no ranges and begins again
            begin = 0
        total = begin + int(reply.headers.get("Content-Length", 0))
        unpacked = 3 * total if url.endswith(".gz") else 0
        need_space(part.parent, total - begin + unpacked, url)
        bar = tqdm(total=total or None, initial=begin, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab") as file:
            file.truncate(begin)
            while block := reply.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if size_of(part) < total:
        raise ConnectionError(f"the connection closed at {size_of(part)} of {total} bytes")


def fetch(url, part):
    """Receive all of `url` as the file `part`; try again as long as that helps."""
    tries = 0
    while True:
        before = size_of(part)
        try:
            return receive(url, part)
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)
            if disk_is_full(error):
                raise
            if code == 416 and part.exists():  # it is longer than the file
                part.unlink()
            elif code < 500 and code not in (408, 429):
                raise UserError(f"{url}: HTTP {code} {error.reason}; is the name still right?") from None
            problem = str(error) or repr(error)
        tries = 1 if size_of(part) > before else tries + 1
        if tries >= TRIES:
            raise UserError(f"{url}: gave up after {tries} tries ({problem}); run the command again to go on")
        print(f"{problem}; trying again", flush=True)
        time.sleep(PAUSE * 2 ** (tries - 1))


def verify(part, published):
    """Return what is known about `part`. ValueError: it is not the file of the published hash."""
    with open(part, "rb") as file:
        if not published:
            if PAGE.match(file.read(4096)):
                raise ValueError("is empty or a web page; is a login page between?")
            return "unverified: no hash of it is published"
        kind, _, expected = published.partition(":")
        digest = hashlib.file_digest(file, kind).hexdigest()
    if digest != expected:
        raise ValueError(f"has the {kind} {digest}, expected {expected}")
    return f"verified, {published}"


def unpack(part, target, url):
    """Untar, gunzip or only rename `part` to `target`, whole or not at all. ValueError: it is broken."""
    try:
        if url.endswith(".tar.gz"):
            with tarfile.open(part) as archive, atomic_folder(target) as folder:
                archive.extractall(folder, filter="data")  # refuses devices, and what would leave the folder
        elif url.endswith(".gz"):
            with gzip.open(part) as archive, atomic_file(target, "wb") as file:
                shutil.copyfileobj(archive, file, 1 << 20)
        else:
            part.replace(target)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise ValueError(f"is a broken archive: {error}") from None
    part.unlink(missing_ok=True)


def our_names(name):
    """Return the names in URLS that `name` means: one, or all of DPR's that begin with it."""
    if name in URLS:
        return [name]
    if name in RESOURCES:
        return [RESOURCES[name]]
    ours = [our for theirs, our in RESOURCES.items() if theirs.startswith(name) and "." in name]
    if ours:
        return ours
    if name.startswith(("data.", "checkpoint.", "indexes.", "pretrained.")):
        near = nearest(name, list(RESOURCES))
        raise UserError(f"{name}: a name of DPR's that has no file here (the list: no name at all); {near}")
    raise UserError(f"no file is called {name!r}; {nearest(name, list(URLS))}")


def download(name, out="data"):
    """Return the path of the complete, unpacked file (or folder) `name` below `out`."""
    if name not in URLS:
        raise UserError(f"no file is called {name!r}; {nearest(name, list(URLS))}")
    url = URLS[name]
    target = Path(out) / name
    part = Path(out) / f"{name}.part"
    source = Path(out) / f"{name}.source.json"
    if target.exists():
        if not source.exists():
            raise UserError(f"{target}: is not of this command; delete it to download it")
        print(f"{target}: is complete ({read_json(source)['check']})")
        return target
    part.parent.mkdir(parents=True, exist_ok=True)
    fetch(url, part)
    try:
        check = verify(part, HASHES.get(name))
        write_json(source, {"url": url, "check": check})  # it counts only where `target` exists
        unpack(part, target, url)
    except ValueError as error:
        source.unlink(missing_ok=True)
        bad = part.replace(part.with_suffix(".bad"))
        raise UserError(f"{url}: {error}; kept as {bad}; run the command again") from None
    print(f"{target}: complete ({check})")
    return target


def main():
    parser = argparse.ArgumentParser("python -m prepare.download", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", help="without it the command lists the names")
    parser.add_argument("--out", default="data", help="folder to write into")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.name is None:
        return print("\n".join(URLS))
    need_folder(args, "out")
    for name in our_names(args.name):
        download(name, args.out)


if __name__ == "__main__":
    with friendly_errors():
        main()
