"""
Encoding passages side by side: nanoDPR's way, sentence-transformers, ours; and memory by corpus size.

Run: python tests/bench/bench_encode.py speed --model runs/dpr_nq/doc_encoder --corpus data/nq/corpus.tsv
     python tests/bench/bench_encode.py memory

speed: the same passages, weights and threads; every turn runs all ways one after the other, so that a slow
minute of the machine hits all of them. Timed: from texts to vectors, tokenising included, loading not.
nanoDPR's way is written anew: batches of 32 in corpus order, padded to passage_tokens (256), fp32.
sentence-transformers (if --peer_python names a python that has it) waits between its turns in a process of
its own (written for version 6.2); its texts are pairs (title, text), lengths, pooling and token types those
of --model, so its vectors must be ours.
memory: peak resident memory of doc2embedding.py for corpora of short passages and a tiny random encoder.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PEER = """
import json, sys, time
import numpy as np, torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
model, pooling, types, length, batch, threads, folder = sys.argv[1:]
torch.set_num_threads(int(threads))
bert = Transformer(model, max_seq_length=int(length))
if types == "zeros":
    bert.tokenizer.model_input_names = ["input_ids", "attention_mask"]
pool = Pooling(bert.get_embedding_dimension(), pooling)
encoder = SentenceTransformer(modules=[bert, pool], device="cpu")
texts = [tuple(pair) for pair in json.load(open(folder + "/texts.json"))]
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    vectors = encoder.encode(texts, batch_size=int(batch), show_progress_bar=False)
    seconds = time.perf_counter() - began
    np.save(folder + "/peer.npy", vectors)
    print(seconds, flush=True)
"""


# ----------------------------------------------------------------------------------------------- speed
def nano_dpr(encoder, texts):
    """Batches of 32 in corpus order, every one padded to the full length: [N, D]."""
    import torch

    from utils.encoder import collate, tokenize_passages

    vectors = []
    with torch.no_grad():
        for k in range(0, len(texts), 32):
            ids = tokenize_passages(encoder, texts[k : k + 32])
            vectors.append(encoder(**collate(encoder, ids, encoder.inputs["passage_tokens"])).numpy())
    return np.concatenate(vectors)


def ours(encoder, texts, batch):
    """As in doc2embedding.py: sorted by length, padded to the longest of a batch."""
    from utils.encoder import embed, tokenize_passages

    return embed(encoder, tokenize_passages(encoder, texts), batch, "passage")


def speed(args):
    import torch

    from utils.data import Corpus
    from utils.encoder import load_encoder

    torch.set_num_threads(args.threads)
    encoder, corpus = load_encoder(args.model, "passage").eval(), Corpus(args.corpus)
    rows = np.linspace(0, len(corpus) - 1, min(args.passages, len(corpus))).astype(int).tolist()
    texts = [(corpus[row].title, corpus[row].text.strip()) for row in rows]
    ways = {
        "nanoDPR's way": lambda: nano_dpr(encoder, texts),
        "ours": lambda: ours(encoder, texts, args.batch_size),
    }
    seconds, vectors = {way: [] for way in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if args.peer_python:
            (Path(folder) / "texts.json").write_text(json.dumps(texts))
            inputs = [encoder.inputs[key] for key in ("pooling", "token_types", "passage_tokens")]
            inputs += [args.batch_size, args.threads]
            command = [args.peer_python, "-c", PEER, args.model, *map(str, inputs), folder]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            peer = subprocess.Popen(command, **pipes)
            if peer.stdout.readline().strip() != "ready":
                sys.exit(f"error: {args.peer_python} cannot run sentence-transformers; its message is above")
            seconds["sentence-transformers"] = []
        for turn in range(args.repeat + 1):
            for way in seconds:
                if way in ways:
                    began = time.perf_counter()
                    vectors[way] = ways[way]()
                    spent = time.perf_counter() - began
                else:
                    print("go", file=peer.stdin, flush=True)
                    spent = float(peer.stdout.readline())
                    vectors[way] = np.load(Path(folder) / "peer.npy")
                seconds[way] += [spent] if turn else []  # the first turn warms up
        if peer:
            peer.stdin.close()
            peer.wait()
    lengths = sorted(map(len, [encoder.tokenizer(*text).input_ids for text in texts]))
    print(
        f"{len(texts)} passages of {lengths[len(texts) // 2]} tokens (median), {encoder.dim} dimensions, "
        f"{args.threads} threads, n = {args.repeat}"
    )
    print(f"{'way':24} {'passages/s':>24} {'times nanoDPR':>22} {'largest difference':>20}")
    reference = seconds["nanoDPR's way"]
    for way, spent in seconds.items():
        rates = [len(texts) / s for s in spent]
        ratios = [base / s for base, s in zip(reference, spent, strict=True)]
        columns = [f"{np.median(c):8.2f} ({min(c):.2f}-{max(c):.2f})" for c in (rates, ratios)]
        difference = np.abs(vectors[way] - vectors["nanoDPR's way"]).max()
        print(f"{way:24} {columns[0]:>24} {columns[1]:>22} {difference:20.1e}")


# ---------------------------------------------------------------------------------------------- memory
def memory(args):
    from tests.toy import make_world

    print(f"{'passages':>10} {'peak MB':>9} {'seconds':>8}")
    peaks = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            world, corpus = make_world(folder), Path(folder) / "big.tsv"
            with open(corpus, "w") as file:
                file.write("id\ttext\ttitle\n")
                file.writelines(
                    f"{i}\tthe old river of paris is red and number {i}\tparis\n" for i in range(1, size + 1)
                )
            flags = {"doc_encoder": world / "doc_encoder", "corpus": corpus, "out": Path(folder) / "e"}
            flags |= {"shard_size": args.shard_size, "batch_size": 256}
            command = ["doc2embedding.py", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))]
            environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
            measured = [sys.executable, __file__, "child", *command]
            done = subprocess.run(measured, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            peak, spent = map(float, done.stdout.split()[-2:])
            peaks.append(peak)
            print(f"{size:10,} {peak:9.0f} {spent:8.1f}", flush=True)
    print(f"first to last: {peaks[-1] - peaks[0]:+.0f} MB (8 bytes a passage: its place in the file)")


def child(command):
    """Run `command` to its end; print its peak resident memory in MB, and the seconds it took."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit, time.perf_counter() - began)


def main():
    if sys.argv[1:2] == ["child"]:  # used by `memory` itself: the peak of one process, not of all so far
        return child(sys.argv[2:])
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = options.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("speed")
    one.add_argument("--model", required=True, help="a passage encoder with encoder_inputs.json")
    one.add_argument("--corpus", required=True)
    one.add_argument("--passages", type=int, default=512, help="evenly spread over the corpus")
    one.add_argument("--batch_size", type=int, default=32, help="of ours and of sentence-transformers")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--repeat", type=int, default=5)
    one.add_argument("--peer_python", default="", help="python with sentence-transformers")
    two = modes.add_parser("memory")
    two.add_argument("--sizes", type=int, nargs="+", default=[50_000, 500_000])
    two.add_argument("--shard_size", type=int, default=16384)
    args = options.parse_args()
    {"speed": speed, "memory": memory}[args.mode](args)


if __name__ == "__main__":
    main()
