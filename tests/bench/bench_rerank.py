"""
Scoring pairs side by side: sentence-transformers' CrossEncoder.predict, and ours as in rerank.py.

Run: python tests/bench/bench_rerank.py --model runs/rocketqa_nq/cross_encoder --questions data/nq/dev.jsonl
     --run runs/dpr_nq/dev/dev.run --corpus data/nq/corpus.tsv --peer_python NAME

The same folder, pairs, batch size and threads; the two take turns, first one and then the other leading, so
that a slow minute of the machine hits both. Timed: from texts to scores in memory, tokenising included,
loading not. Both sort by length, theirs by letters. sentence-transformers (written for version 6.2) waits
between its turns in a process of its own, that of the python --peer_python names; without it, ours is timed
alone. Printed: pairs per second, and the ratio within a turn (median, range); the largest difference in P.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs  # noqa: E402
from utils.data import Corpus, iter_run, read_questions  # noqa: E402

PEER = """
import json, sys, time
import numpy as np, torch
from sentence_transformers import CrossEncoder
model, types, length, batch, threads, folder = sys.argv[1:]
torch.set_num_threads(int(threads))
encoder = CrossEncoder(model, max_length=int(length), device="cpu", activation_fn=torch.nn.Identity())
names = ["input_ids", "attention_mask", "token_type_ids"]
encoder[0].tokenizer.model_input_names = names[: 3 if types == "segments" else 2]  # not every folder says it
pairs = [tuple(pair) for pair in json.load(open(folder + "/pairs.json"))]
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    logits = encoder.predict(pairs, batch_size=int(batch), show_progress_bar=False)
    seconds = time.perf_counter() - began
    np.save(folder + "/peer.npy", logits)
    print(seconds, flush=True)
"""


def start_peer(args, cross, pairs, folder):
    """The peer's process, its model loaded."""
    texts = [(question, f"{passage.title} {passage.text}") for question, passage in pairs]
    (Path(folder) / "pairs.json").write_text(json.dumps(texts))
    inputs = [cross.inputs["token_types"], cross.inputs["pair_tokens"], args.batch_size, args.threads]
    command = [args.peer_python, "-c", PEER, args.model, *map(str, inputs), folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    peer = subprocess.Popen(command, **pipes)
    if peer.stdout.readline().strip() != "ready":
        sys.exit(f"error: {args.peer_python} cannot run sentence-transformers; its message is above")
    return peer


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", required=True, help="a cross-encoder with encoder_inputs.json")
    options.add_argument("--questions", required=True)
    options.add_argument("--run", required=True, help="the pairs are the first ones of this ranking")
    options.add_argument("--corpus", required=True)
    options.add_argument("--pairs", type=int, default=1024)
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeat", type=int, default=5)
    options.add_argument("--peer_python", default="", help="python with sentence-transformers")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    cross, corpus = load_cross_encoder(args.model), Corpus(args.corpus)
    questions = {question["qid"]: question["question"] for question in read_questions(args.questions)}
    pairs = []
    for qid, hits in iter_run(args.run):
        if qid in questions:
            pairs += [(questions[qid], corpus.passage(pid)) for pid, _ in hits]
        if len(pairs) >= args.pairs:
            break
    pairs = pairs[: args.pairs]

    def ours():
        began = time.perf_counter()
        found["ours"] = probabilities(cross, tokenize_pairs(cross, pairs), args.batch_size)
        return time.perf_counter() - began

    def theirs():
        print("go", file=peer.stdin, flush=True)
        spent = float(peer.stdout.readline())
        logits = torch.from_numpy(np.load(Path(folder) / "peer.npy")).double()
        found["sentence-transformers"] = (
            logits.sigmoid() if logits.ndim == 1 else logits.softmax(1)[:, 1]
        ).numpy()
        return spent

    ways, found = {"ours": ours}, {}
    with tempfile.TemporaryDirectory() as folder:
        if args.peer_python:
            peer = start_peer(args, cross, pairs, folder)
            ways = {"sentence-transformers": theirs, "ours": ours}
        seconds = {way: [] for way in ways}
        for turn in range(args.repeat + 1):
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                spent = ways[way]()
                seconds[way] += [spent] if turn else []  # the first turn warms up
        if args.peer_python:
            peer.stdin.close()
            peer.wait()
    first = next(iter(ways))
    lengths = sorted(map(len, tokenize_pairs(cross, pairs)))
    median = lengths[len(pairs) // 2]
    print(f"{len(pairs)} pairs of {median} tokens (median), {args.threads} threads, n = {args.repeat}")
    print(f"{'way':24} {'pairs/s':>24} {f'times {first}':>28} {'largest difference':>20}")
    for way, spent in seconds.items():
        ratios = [base / s for base, s in zip(seconds[first], spent, strict=True)]
        columns = [[len(pairs) / s for s in spent], ratios]
        columns = [f"{np.median(c):8.2f} ({min(c):.2f}-{max(c):.2f})" for c in columns]
        difference = np.abs(found[way] - found[first]).max()
        print(f"{way:24} {columns[0]:>24} {columns[1]:>28} {difference:20.1e}")


if __name__ == "__main__":
    main()
