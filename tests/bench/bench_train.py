"""
A training step side by side: nanoDPR's loop, sentence-transformers' losses, the GradCache package, ours.

Same weights (one shared encoder), questions, passages, lengths, threads, and a loss of dot products.
Tokenising, forward, backward, clipping and AdamW are in the time of all. Each way is a process of its own at
each batch size, and waits while the others take their turn. nanoDPR's loop, restated from its behaviour: one
forward pass of all questions, one of all passages, each padded to its longest.

Printed: questions per second; how many times as fast ours is within a round, plain and with the gradient
cache (median, range); the resident memory of the process at its peak, beyond that before the first step
(AdamW's two states included); the peak of activations that autograd saves, counted in a first step, which
is not timed; "apart", how far the gradient of 8 questions, without dropout, is from ours, over its norm.

--cache_only leaves out the ways without a gradient cache, whose memory grows with the batch. --peer_python
names a python that has requirements.txt, GradCache==0.0.1 and sentence-transformers==6.2.0.

Run: python tests/bench/bench_train.py --model data/models/tinybert-4l --train runs/demo/data/train.jsonl
--corpus data/demo/corpus.tsv --batches 8,32,128 --peer_python NAME
"""

import json
import re
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.harness import ANSWER, Peer, parser, ratios, spread, take_turns  # noqa: E402
from tests.saved import Saved  # noqa: E402
from train_dpr import add_gradient, make_batch  # noqa: E402
from utils.data import Corpus, passage_of, read_questions  # noqa: E402
from utils.plumbing.config import load_config  # noqa: E402
from utils.plumbing.weights import TOWERS, load_towers  # noqa: E402

RECIPE = "config/train_dpr_nq.yaml"
WAYS = ("nanoDPR's loop", "sentence-transformers", "ours")
WAYS += ("GradCache package", "sentence-transformers cached", "ours, grad_cache")
PEERS = ("sentence-transformers", "GradCache package", "sentence-transformers cached")
LENGTHS = {"question_tokens": 32, "passage_tokens": 160}


def examples_of(train, corpus, start, size):
    """(questions, positives, negatives) as strings; passages as (title, text)."""
    rows = [train[(start + i) % len(train)] for i in range(size)]
    texts = [[passage_of(row[key][0], corpus) for row in rows] for key in ("positives", "negatives")]
    return [row["question"] for row in rows], *([(p.title, p.text) for p in part] for part in texts)


def tokens(tokenizer, texts, length):
    """Padded to the longest of the batch, as nanoDPR does."""
    texts = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
    return tokenizer(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt")


def nano_way(args):
    """One forward pass of all questions and one of all passages, padded to the longest."""
    model = AutoModel.from_pretrained(args.model).train().to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def gradient(questions, positives, negatives):
        questions = tokens(tokenizer, questions, LENGTHS["question_tokens"]).to(args.device)
        passages = tokens(tokenizer, positives + negatives, LENGTHS["passage_tokens"]).to(args.device)
        with args.autocast():
            q_BD = model(**questions).last_hidden_state[:, 0].float()
            p_PD = model(**passages).last_hidden_state[:, 0].float()
        F.cross_entropy(q_BD @ p_PD.T, torch.arange(len(q_BD), device=args.device)).backward()

    return model, gradient


def package_way(args):
    """The GradCache package (luyug), chunks as large as ours."""
    import gradcache
    import gradcache.context_managers

    # The file on PyPI (0.0.1) is installed as gradcache but imports itself as grad_cache.
    sys.modules["grad_cache"] = gradcache
    sys.modules["grad_cache.context_managers"] = gradcache.context_managers
    from gradcache.grad_cache import GradCache

    model = AutoModel.from_pretrained(args.model).train().to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def loss(q_BD, p_PD):
        return F.cross_entropy(q_BD.float() @ p_PD.float().T, torch.arange(len(q_BD), device=args.device))

    cache = GradCache(
        [model, model], [2 * args.chunk, args.chunk], loss, get_rep_fn=lambda out: out.last_hidden_state[:, 0]
    )

    def gradient(questions, positives, negatives):
        questions = tokens(tokenizer, questions, LENGTHS["question_tokens"]).to(args.device)
        passages = tokens(tokenizer, positives + negatives, LENGTHS["passage_tokens"]).to(args.device)
        with args.autocast():  # around both passes
            cache(dict(questions), dict(passages))

    return model, gradient


def sentence_transformers_way(args, cached):
    """MultipleNegativesRankingLoss, or its cached form with mini-batches of the chunk size."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import dot_score

    bert = Transformer(args.model, max_seq_length=LENGTHS["passage_tokens"])
    pooling = Pooling(bert.get_embedding_dimension(), "cls")
    model, how = SentenceTransformer(modules=[bert, pooling], device=args.device), {"scale": 1.0}
    how["similarity_fct"] = dot_score
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.chunk, **how)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **how)
    model.train()

    def gradient(*columns):
        columns = [model.preprocess(column) for column in columns]
        for i, column in enumerate(columns):
            columns[i] = {key: x.to(args.device) for key, x in column.items() if torch.is_tensor(x)}
        with args.autocast():  # around both passes of the cached one, whose second is in backward()
            loss(columns, None).backward()

    return model, gradient


def our_way(args, train, corpus, cached):
    """add_gradient of train_dpr.py on a batch of make_batch."""
    argv = ["--init", args.model, "--shared_encoder", str(args.shared), "--mask_duplicates", "false"]
    argv += ["--gradient_scale", "1"]
    # why: the others feed what the tokenizer gives, and not every BERT's gives segments
    names = AutoTokenizer.from_pretrained(args.model).model_input_names
    types = "segments" if "token_type_ids" in names else "zeros"
    argv += ["--token_types", types, "--grad_cache", str(cached)]
    argv += ["--question_chunk", str(2 * args.chunk), "--passage_chunk", str(args.chunk)]
    cfg = load_config("", RECIPE, argv)
    vars(cfg).update(LENGTHS)
    towers = load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, args.device)
    device = SimpleNamespace(device=torch.device(args.device), process_index=0, autocast=args.autocast)
    device.backward = torch.Tensor.backward

    def gradient(questions, positives, negatives):
        entry = [[{"title": t, "text": x} for t, x in part] for part in (positives, negatives)]
        rows = zip(questions, *entry, strict=True)
        rows = [{"question": q, "positives": [p], "negatives": [n]} for q, p, n in rows]
        cfg.batch_size = len(rows)
        add_gradient(make_batch(0, rows, None, towers, cfg), towers, device, cfg, 0)

    return torch.nn.ModuleList(set(towers.values())), gradient


def make_way(name, args, train, corpus):
    """(model, gradient) of one of WAYS."""
    if name.startswith("sentence-transformers"):
        return sentence_transformers_way(args, name.endswith("cached"))
    if name.startswith("ours"):
        return our_way(args, train, corpus, name.endswith("grad_cache"))
    return {"nanoDPR's loop": nano_way, "GradCache package": package_way}[name](args)


def resident(key):
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    # why not getrusage: its peak begins with that of the process that started this one
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def work(name, args):
    """The process of one way and batch size: a step for every line it reads; then its memory."""
    torch.set_num_threads(args.threads)
    corpus, train = Corpus(args.corpus), [row for row in read_questions(args.train) if row["negatives"]]
    model, gradient = make_way(name, args, train, corpus)
    optimizer, size = torch.optim.AdamW(model.parameters(), lr=1e-5), int(args.batches)
    saved, before = Saved(), resident("VmRSS")

    model.eval()
    gradient(*examples_of(train, corpus, 0, 8))
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    torch.save(torch.cat(grads), Path(args.folder) / f"{name}.pt")
    del grads  # or one gradient would count in the peak of every way
    optimizer.zero_grad(set_to_none=True)
    model.train()

    def step(start, watch):
        batch = examples_of(train, corpus, start, size)
        began = time.perf_counter()
        with watch:
            gradient(*batch)
        clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    step(0, saved)  # warms up and counts bytes
    print(ANSWER, 0, flush=True)
    for number, _ in enumerate(sys.stdin, 1):
        print(ANSWER, step(number * size, nullcontext()), flush=True)
    print(ANSWER, json.dumps([resident("VmHWM") - before, saved.peak]), flush=True)


def compare(size, ways, args, folder):
    """All ways at one batch size; prints its table."""
    processes = {}
    for name in ways:  # why one after the other: the first steps are those of the peak
        python = args.peer_python if name in PEERS else sys.executable
        flags = [f"--batches={size}", "--way", name, "--folder", folder]
        processes[name] = Peer(python, __file__, *sys.argv[1:], *flags)
    ours = [name for name in ways if name.startswith("ours")]
    grads = {name: torch.load(Path(folder) / f"{name}.pt") for name in ways}
    apart = {name: ((g - grads[ours[-1]]).norm() / g.norm()).item() for name, g in grads.items()}
    assert max(apart.values()) < 1e-3, f"the ways are not the same computation: {apart}"

    seconds = take_turns(processes, args.repeat, warm_up=0)
    heads = "".join(f"{f'{name}: times':>25}" for name in ours)
    print(f"\nbatch {size:<24} {'questions/s':>22}{heads} {'peak MB':>8} {'saved MB':>9} {'apart':>8}")
    for name, process in processes.items():
        process.end()
        peak, saved = process.answer()
        rate = spread([size / spent for spent in seconds[name]])
        times = "".join(f"{ratios(seconds[name], seconds[mine]):>25}" for mine in ours)
        memory = f"{peak / 1e6:8.0f} {saved / 1e6:9.0f}"
        print(f"  {name:28} {rate:>22}{times} {memory} {apart[name]:8.0e}", flush=True)


def main():
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--train", required=True, help="questions with negatives")
    options.add_argument("--corpus", required=True)
    options.add_argument("--batches", default="8,32,128")
    options.add_argument("--cache_only", action="store_true", help="only the ways with a gradient cache")
    options.add_argument("--chunk", type=int, default=8, help="passages in a forward pass; questions: twice")
    options.add_argument("--peer_python", default="", help="python with the peers")
    options.add_argument("--way", choices=WAYS)  # used by this script itself, in its own processes
    options.add_argument("--folder")
    options.set_defaults(device="cpu", autocast=nullcontext, shared=True)  # others: bench_gpu.py
    args = options.parse_args()
    if args.way:
        return work(args.way, args)
    ways = [name for name in WAYS[3 if args.cache_only else 0 :] if args.peer_python or name not in PEERS]
    print(f"{args.model}, chunk {args.chunk}, {args.threads} threads, n = {args.repeat}")
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, args.batches.split(",")):
            compare(size, ways, args, folder)


if __name__ == "__main__":
    main()
