"""
A training step side by side: nanoDPR's loop, sentence-transformers' losses, the GradCache package, ours.

Same weights (one shared encoder everywhere, so the optimizer costs the same), same questions, passages,
lengths and threads; tokenising, forward, backward, clipping and AdamW are in the time of all. Each way is a
process of its own at each batch size, and waits while the others take their turn; n rounds. Printed:
questions per second and the ratio to the first way of the table within a round (median, range); the
resident memory of the process at its peak, beyond that before the first step (AdamW's two states included);
the peak of activations that autograd saves, counted in a first step, which is not timed.
--cache_only leaves out the ways without a gradient cache, whose memory grows with the batch (TinyBERT, 4
layers, 160 tokens: about 65 MB a question), for batches that do not fit; the ratio is then to GradCache's.
The peers live in an environment of their own: pip install GradCache==0.0.1 sentence-transformers==6.2.0
beside requirements.txt, and run this with that python.

Run: python tests/bench/bench_train.py --model data/models/tinybert-4l --train runs/demo/data/train.jsonl
--corpus data/demo/corpus.tsv --batches 8,32,128
     python tests/bench/bench_train.py --model data/models/tinybert-4l --train runs/demo/data/train.jsonl
--corpus data/demo/corpus.tsv --batches 64,256,512 --cache_only
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.saved import Saved  # noqa: E402
from train_dpr import TOWERS, add_gradient, load_towers, make_batch  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.data import Corpus, passage_of, read_questions  # noqa: E402
from utils.distributed import peak_memory  # noqa: E402

ANSWER = "answer:"
WAYS = ("nanoDPR's loop", "sentence-transformers", "ours")
WAYS += ("GradCache package", "sentence-transformers cached", "ours, grad_cache")
LENGTHS = {"question_tokens": 32, "passage_tokens": 160}


def examples_of(train, corpus, start, size):
    """(questions, positives, negatives) as strings; passages as (title, text)."""
    rows = [train[(start + i) % len(train)] for i in range(size)]
    texts = [[passage_of(row[key][0], corpus) for row in rows] for key in ("positives", "negatives")]
    return [row["question"] for row in rows], *([(p.title, p.text) for p in part] for part in texts)


def tokens(tokenizer, texts, length):
    """Padded to the longest of the batch, as nanoDPR does."""
    texts = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
    return dict(tokenizer(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))


def nano_way(args):
    """
    One forward of all questions and one of all passages, padded to the longest (behaviour of N:train_dpr.py).
    """
    model, tokenizer = (
        AutoModel.from_pretrained(args.model).train(),
        AutoTokenizer.from_pretrained(args.model),
    )

    def gradient(questions, positives, negatives):
        q_BD = model(**tokens(tokenizer, questions, LENGTHS["question_tokens"])).last_hidden_state[:, 0]
        passages = tokens(tokenizer, positives + negatives, LENGTHS["passage_tokens"])
        p_PD = model(**passages).last_hidden_state[:, 0]
        F.cross_entropy(q_BD @ p_PD.T, torch.arange(len(questions))).backward()

    return model, gradient


def package_way(args):
    """The GradCache package (luyug), both chunk sizes alike."""
    import gradcache
    import gradcache.context_managers

    # The file on PyPI (0.0.1) is installed as gradcache but imports itself as grad_cache.
    sys.modules["grad_cache"] = gradcache
    sys.modules["grad_cache.context_managers"] = gradcache.context_managers
    from gradcache.grad_cache import GradCache

    model, tokenizer = (
        AutoModel.from_pretrained(args.model).train(),
        AutoTokenizer.from_pretrained(args.model),
    )

    def loss(q_BD, p_PD):
        return F.cross_entropy(q_BD @ p_PD.T, torch.arange(len(q_BD)))

    cache = GradCache([model, model], args.chunk, loss, get_rep_fn=lambda out: out.last_hidden_state[:, 0])

    def gradient(questions, positives, negatives):
        cache(
            tokens(tokenizer, questions, LENGTHS["question_tokens"]),
            tokens(tokenizer, positives + negatives, LENGTHS["passage_tokens"]),
        )

    return model, gradient


def sentence_transformers_way(args, cached):
    """MultipleNegativesRankingLoss, or its cached form with mini-batches of the chunk size."""
    from sentence_transformers import SentenceTransformer, losses, models

    transformer = models.Transformer(args.model, max_seq_length=LENGTHS["passage_tokens"])
    model = SentenceTransformer(
        modules=[transformer, models.Pooling(transformer.get_embedding_dimension(), "cls")]
    )
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.chunk)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    loss.train()

    def gradient(questions, positives, negatives):
        columns = [
            questions,
            *([f"{title} {text}" for title, text in part] for part in (positives, negatives)),
        ]
        loss([model.tokenize(column) for column in columns], None).backward()

    return model, gradient


def our_way(args, train, corpus, cached):
    """add_gradient of train_dpr.py on a batch of make_batch."""
    argv = ["--init", args.model, "--shared_encoder", "--mask_duplicates", "false", "--gradient_scale", "1"]
    argv += [
        "--question_chunk",
        str(2 * args.chunk),
        "--passage_chunk",
        str(args.chunk),
        "--grad_cache",
        str(cached),
    ]
    cfg = load_config("", "config/train_dpr_nq.yaml", argv)
    vars(cfg).update(LENGTHS)
    towers = load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, "cpu")
    device = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=0,
        backward=torch.Tensor.backward,
        autocast=nullcontext,
    )

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


def work(name, args):
    """The process of one way and batch size: a step for every line it reads; then its memory."""
    torch.set_num_threads(args.threads)
    corpus, train = Corpus(args.corpus), [row for row in read_questions(args.train) if row["negatives"]]
    model, gradient = make_way(name, args, train, corpus)
    optimizer, size = torch.optim.AdamW(model.parameters(), lr=1e-5), int(args.batches)
    saved, before = Saved(), psutil.Process().memory_info().rss

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
    print(ANSWER, json.dumps([peak_memory(torch.device("cpu")) - before, saved.peak]), flush=True)


def answer(process):
    """What comes after ANSWER in the next such line of a process; the packages print lines of their own."""
    for line in process.stdout:
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    sys.exit("error: a way ended early; its message is above")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--batches", default="8,32,128")
    parser.add_argument("--cache_only", action="store_true", help="only the ways with a gradient cache")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--way", choices=WAYS)  # used by this script itself, in its own processes
    args = parser.parse_args()
    if args.way:
        return work(args.way, args)
    ways = WAYS[3:] if args.cache_only else WAYS
    print(f"{args.model}, chunk {args.chunk}, {args.threads} threads, n = {args.rounds}")
    for size in map(int, args.batches.split(",")):
        command = [sys.executable, __file__, *sys.argv[1:], "--batches", str(size), "--way"]
        processes, seconds = {}, {name: [] for name in ways}
        for name in ways:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes[name] = subprocess.Popen([*command, name], **pipes)
            answer(processes[name])  # why one after the other: the first steps are those of the peak
        for _ in range(args.rounds):
            for name, process in processes.items():
                print("step", file=process.stdin, flush=True)
                seconds[name].append(answer(process))
        print(
            f"\nbatch {size:<30} {'questions/s':>24} {'times ' + ways[0]:>26} {'peak MB':>8} {'saved MB':>9}"
        )
        for name, process in processes.items():
            process.stdin.close()
            peak, saved = answer(process)
            process.wait()
            rates = [size / spent for spent in seconds[name]]
            ratios = [a / b for a, b in zip(seconds[ways[0]], seconds[name], strict=True)]
            columns = [f"{statistics.median(c):.2f} ({min(c):.2f}-{max(c):.2f})" for c in (rates, ratios)]
            print(f"  {name:34} {columns[0]:>24} {columns[1]:>26} {peak / 1e6:8.0f} {saved / 1e6:9.0f}")


if __name__ == "__main__":
    main()
