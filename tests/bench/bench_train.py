"""
A training step side by side: nanoDPR's loop, sentence-transformers' losses, the GradCache package, ours.

Same weights (one shared encoder everywhere, so the optimizer costs the same), same questions, passages,
lengths and threads; tokenising, forward, backward, clipping and AdamW are in the time of all. Interleaved, n
rounds; prints questions per second as ratios to nanoDPR's loop (median and range) and the peak of activations
that autograd saves.
The peers live in an environment of their own: pip install GradCache==0.0.1 sentence-transformers==6.2.0
beside requirements.txt, and run this with that python.

Run: python tests/bench/bench_train.py --model data/models/tinybert-4l --train runs/demo/data/train.jsonl
--corpus data/demo/corpus.tsv
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.saved import Saved  # noqa: E402
from train_dpr import TOWERS, add_gradient, load_towers, make_batch  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.data import Corpus, passage_of, read_questions  # noqa: E402

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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--batches", default="8,32,128")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus, train = Corpus(args.corpus), [row for row in read_questions(args.train) if row["negatives"]]
    ways = {
        "nanoDPR's loop": nano_way(args),
        "sentence-transformers": sentence_transformers_way(args, False),
        "ours": our_way(args, train, corpus, False),
        "GradCache package": package_way(args),
        "sentence-transformers cached": sentence_transformers_way(args, True),
        "ours, grad_cache": our_way(args, train, corpus, True),
    }
    print(f"{args.model}, chunk {args.chunk}, {args.threads} threads, n = {args.rounds}")
    for size in map(int, args.batches.split(",")):
        seconds, peak = {name: [] for name in ways}, {}
        optimizers = {
            name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, (model, _) in ways.items()
        }
        for round_number in range(-1, args.rounds):  # -1 warms up and counts bytes
            batch = examples_of(train, corpus, (round_number + 1) * size, size)
            for name, (model, gradient) in ways.items():
                saved = Saved()
                start = time.perf_counter()
                if round_number < 0:
                    with saved:
                        gradient(*batch)

                else:
                    gradient(*batch)
                clip_grad_norm_(model.parameters(), 2.0)
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
                if round_number < 0:
                    peak[name] = saved.peak
                else:
                    seconds[name].append(time.perf_counter() - start)
        print(
            f"\nbatch {size}: questions per second over nanoDPR's loop | median (range) | saved activations"
        )
        for name, took in seconds.items():
            ratios = [a / b for a, b in zip(seconds["nanoDPR's loop"], took, strict=True)]
            print(
                f"  {name:30} {statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                f" {peak[name] / 1e6:8.0f} MB"
            )


if __name__ == "__main__":
    main()
