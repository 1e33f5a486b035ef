"""
Encoding passages side by side: nanoDPR's way, sentence-transformers, Tevatron, ours, and the rate of bare
matrix products.

Run: python tests/bench/bench_encode.py --model runs/dpr_nq/doc_encoder --corpus data/nq/corpus.tsv

The same passages, weights and threads, from texts to vectors; loading is not timed. nanoDPR's way, written
anew: batches of 32 in corpus order, padded to --length, fp32. sentence-transformers (of --peer_python) waits
between its turns in a process of its own; its texts are pairs (title, text). Tevatron's way, restated:
"title text" is one text; corpus order, a batch padded to its longest, then to a multiple of 16, pickled.
Printed: passages per second; the ratios to nanoDPR's way and to ours within a turn (median, range); "apart":
the largest difference from nanoDPR's vectors (Tevatron: from ours of its text) over the largest number.
--mixed_precision bf16 adds ours with weights in bf16, and under autocast.

The second table: useful FLOP, those of the matrix products that the passages need without any padding, for n
tokens, D dimensions, I in the feed-forward layer:
  layers * (2 n (4 D D + 2 D I) + 4 n n D)         projections, feed-forward, attention
per second, over the rate of torch.mm in the same turn, type and threads, of the model's own shapes, for the
tokens of a batch of median length. Softmax, GELU, norms and tokenising are no matrix products.
--profile prints instead in which operations ours spends its time, as shares.
"""

import contextlib
import copy
import functools
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.harness import Peer, parser, profile, ratios, spread, take_turns  # noqa: E402
from utils.corpus import Corpus  # noqa: E402
from utils.encoder import collate, embed, tokenize_passages  # noqa: E402
from utils.plumbing.weights import load_encoder  # noqa: E402

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
print("answer: 0", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    vectors = encoder.encode(texts, batch_size=int(batch), show_progress_bar=False)
    seconds = time.perf_counter() - began
    np.save(folder + "/peer.npy", vectors)
    print("answer:", seconds, flush=True)
"""


# ---------------------------------------------------------------- the ways
def in_corpus_order(encoder, passages, batch, tokenize, length_of, autocast=contextlib.nullcontext):
    """Vectors [N, D] by batches as they come; length_of(id lists): what a batch is padded to."""
    vectors = []
    with torch.no_grad():
        for start in range(0, len(passages), batch):
            ids = tokenize(encoder, passages[start : start + batch])
            with autocast():
                vectors_bD = encoder(**collate(encoder, ids, [length_of(ids)]))
            vectors.append(vectors_bD.cpu().numpy())
    return np.concatenate(vectors)


def nano_dpr(encoder, passages, autocast=contextlib.nullcontext):
    """Batches of 32 in corpus order, every one padded to the full length: [N, D]."""
    length = encoder.inputs["passage_tokens"]
    return in_corpus_order(encoder, passages, 32, tokenize_passages, lambda ids: length, autocast)


def tevatron(encoder, passages, batch):
    """Tevatron 2's way: corpus order, a batch padded to its longest, then to a multiple of 16: [N, D]."""
    vectors = in_corpus_order(encoder, passages, batch, joined, lambda ids: -(-max(map(len, ids)) // 16) * 16)
    pickle.dumps((vectors, [str(i) for i in range(len(passages))]))
    return vectors


def joined(encoder, passages):
    """Id lists of "title text", one text, as Tevatron reads it."""
    texts = [f"{passage.title} {passage.text}" for passage in passages]
    return encoder.tokenizer(texts, truncation=True, max_length=encoder.inputs["passage_tokens"]).input_ids


def ours(encoder, passages, batch, **how):
    """As in doc2embedding.py: sorted by length, padded to the longest of a batch. how: of `embed`."""
    return embed(encoder, tokenize_passages(encoder, passages), batch, **how)


# ---------------------------------------------------------------- FLOP
def useful_flop(encoder, tokens):
    """The formula of the docstring, for one passage."""
    config = encoder.model.config
    D, inner, n = config.hidden_size, config.intermediate_size, tokens
    return config.num_hidden_layers * (2 * n * (4 * D * D + 2 * D * inner) + 4 * n * n * D)


def gemm(shapes, dtype):
    """Seconds a FLOP of torch.mm, [n, k] @ [k, m] for each (n, k, m) in turn, for half a second at least."""
    made = [[torch.randn(size).to(dtype) for size in ((n, k), (m, k), (n, m))] for n, k, m in shapes]
    rounds, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < 0.5:
        for x_nk, weight_mk, out_nm in made:
            torch.mm(x_nk, weight_mk.T, out=out_nm)
        rounds += 1
    return spent / rounds / sum(2 * n * k * m for n, k, m in shapes)


# ---------------------------------------------------------------- speed
def speed(args):
    torch.set_num_threads(args.threads)
    encoder = load_encoder(args.model, "passage", {"passage_tokens": args.length}).eval()
    corpus = Corpus(args.corpus)
    rows = np.linspace(0, len(corpus) - 1, min(args.passages, len(corpus))).astype(int).tolist()
    passages = [corpus[row]._replace(text=corpus[row].text.strip()) for row in rows]
    lengths = [len(ids) for ids in tokenize_passages(encoder, passages)]
    median = sorted(lengths)[len(lengths) // 2]
    config, T = encoder.model.config, args.batch_size * median
    inner, D = config.intermediate_size, config.hidden_size
    shapes = {"the model's shapes": [(T, D, D)] * 4 + [(T, D, inner), (T, inner, D)]}

    size = args.batch_size
    if args.profile:
        return print(profile(functools.partial(ours, encoder, passages, size), 12))
    ways = {"nanoDPR's way": functools.partial(nano_dpr, encoder, passages)}
    ways["ours"] = functools.partial(ours, encoder, passages, size)
    ways["Tevatron's way"] = functools.partial(tevatron, encoder, passages, size)
    dtypes = {"": torch.float32}
    if args.mixed_precision == "bf16":
        dtypes[", bf16"] = torch.bfloat16
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
        ways["ours, autocast, bf16"] = functools.partial(ours, encoder, passages, size, autocast=autocast)
        half = copy.deepcopy(encoder).bfloat16()
        ways["ours, bf16"] = functools.partial(ours, half, passages, size)
    vectors = {name: way() for name, way in ways.items()}  # it also warms up
    for name in shapes:
        for kind, dtype in dtypes.items():
            ways[f"GEMM, {name}{kind}"] = functools.partial(gemm, shapes[name], dtype)
    with tempfile.TemporaryDirectory() as top:
        if args.peer_python:
            (Path(top) / "texts.json").write_text(json.dumps([(p.title, p.text) for p in passages]))
            inputs = [encoder.inputs[key] for key in ("pooling", "token_types", "passage_tokens")]
            inputs += [size, args.threads, top]
            ways["sentence-transformers"] = peer = Peer(args.peer_python, "-c", PEER, args.model, *inputs)
            peer()
            vectors["sentence-transformers"] = np.load(Path(top) / "peer.npy")
        seconds = take_turns(ways, args.repeat, warm_up=0)
        if args.peer_python:
            peer.end()

    expected = {True: embed(encoder, joined(encoder, passages), size), False: vectors["nanoDPR's way"]}
    apart = {}
    for name in vectors:
        same = expected[name.startswith("Tevatron")]
        apart[name] = np.abs(vectors[name] - same).max() / np.abs(same).max()
        assert "bf16" in name or apart[name] < 1e-3, f"not the same vectors: {apart}"
    what = f"{len(passages)} passages of {median} tokens (median), {encoder.dim} dimensions"
    print(f"{what}, {args.threads} threads, n = {args.repeat}")
    print(f"{'way':24} {'passages/s':>24} {'times nanoDPR':>22} {'ours is faster by':>22} {'apart':>8}")
    for name in vectors:
        rate = spread([len(passages) / s for s in seconds[name]])
        times, mine = ratios(seconds["nanoDPR's way"], seconds[name]), ratios(seconds[name], seconds["ours"])
        print(f"{name:24} {rate:>24} {times:>22} {mine:>22} {apart[name]:8.0e}")
    flop = sum(useful_flop(encoder, n) for n in lengths)
    for kind in dtypes:
        heads = "".join(f"{'of ' + name:>25}" for name in shapes)
        print(f"\n{'useful FLOP' + kind:24} {'GFLOP/s':>24}{heads}")
        peaks = [f"GEMM, {name}{kind}" for name in shapes]
        for name in peaks:
            print(f"{name:24} {spread([1e-9 / s for s in seconds[name]]):>24}")
        for name in vectors:
            if name.endswith(", bf16") == bool(kind):
                each = [s / flop for s in seconds[name]]
                shares = "".join(f"{ratios(seconds[peak], each):>25}" for peak in peaks)
                print(f"{name:24} {spread([1e-9 / s for s in each]):>24}{shares}")


def main():
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="a passage encoder with encoder_inputs.json")
    options.add_argument("--corpus", required=True)
    options.add_argument("--passages", type=int, default=512, help="evenly spread over the corpus")
    options.add_argument("--length", type=int, default=256, help="maximum tokens of a passage")
    options.add_argument("--batch_size", type=int, default=32, help="of all ways but nanoDPR's")
    options.add_argument("--peer_python", default="", help="python with sentence-transformers")
    options.add_argument(
        "--mixed_precision", default="no", choices=("no", "bf16"), help="bf16: two more ways"
    )
    options.add_argument("--profile", action="store_true", help="only where the time of ours goes")
    speed(options.parse_args())


if __name__ == "__main__":
    main()
