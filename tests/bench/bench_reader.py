"""
The reader side by side with the reference's way: every row padded to the full length, one forward pass a
question, spans sorted in a python loop (behaviour of DPR dpr/models/reader.py and reader_data.py).

Same weights, questions, passages and threads; tokenising is in the time of both. Training: forward,
backward, clipping and AdamW of one batch. Prediction: the answers to as many questions. Interleaved, each in
turn the first, n rounds; prints questions per second of both, and the ratio (median and range).

Before anything is timed: how far the gradients of both are apart, over their norm, without dropout and with
padding_takes_part, as the reference has it (ours is timed without: padding is then not even read), and how
many answers agree in their letters; the reference's are decoded from tokens, ours cut out of the passage.

Run: python tests/bench/bench_reader.py --model data/models/tinybert-4l --train data/demo/train.jsonl
--train_run runs/demo/bm25_runs/train.run --corpus data/demo/corpus.tsv
"""

import argparse
import copy
import statistics
import sys
import time
import unicodedata
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train_reader import add_gradient, answer_all, draw, make_batch  # noqa: E402
from utils.data import Corpus  # noqa: E402
from utils.encoder import collate  # noqa: E402
from utils.plumbing.checkpoint import make_optimizer  # noqa: E402
from utils.plumbing.config import load_config  # noqa: E402
from utils.reader import load_reader  # noqa: E402
from utils.reader_data import find_training_rows, read_ranking, tokenize_rows  # noqa: E402

DEVICE = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, backward=torch.Tensor.backward, autocast=nullcontext
)


def reference_step(questions, reader, length, passages):
    """Loss of drawn questions with all rows at full length, missing ones as padding, in one graph each."""
    for question in questions:
        rows = question["ids"] + [[]] * (passages - len(question["ids"]))
        start_ML, end_ML, relevance_M = reader(**collate(reader, rows, length))
        start_L, end_L = start_ML[0].log_softmax(0), end_ML[0].log_softmax(0)
        spans = torch.stack([start_L[a] + end_L[b] for a, b in question["spans"]])
        (-spans.logsumexp(0) - relevance_M.log_softmax(0)[0]).div(len(questions)).backward()


@torch.no_grad()
def reference_answers(examples, corpus, reader, length, most):
    """The best span of the most relevant passage of each question, by sorting all candidates in python."""
    reader.eval()
    answers = []
    for example in examples:
        passages = [corpus[row] for row in example["rows"].tolist()]
        rows = tokenize_rows(reader.tokenizer, example["question"], passages, length)
        start_ML, end_ML, relevance_M = reader(**collate(reader, [ids for ids, _ in rows], length))
        best = relevance_M.argmax().item()
        (ids, first), start_L, end_L = rows[best], start_ML[best].tolist(), end_ML[best].tolist()
        spans = [
            (start_L[i] + end_L[j], i, j)
            for i in range(first, len(ids))
            for j in range(i, min(i + most, len(ids)))
        ]
        _, i, j = max(spans)
        while i > first and reader.continues_V[ids[i]]:  # to whole words, as both do
            i -= 1
        while j + 1 < len(ids) and reader.continues_V[ids[j + 1]]:
            j += 1
        answers.append(reader.tokenizer.decode(ids[i : j + 1], clean_up_tokenization_spaces=True))
    return answers


def gradient_of(step, reader):
    """What step() leaves in .grad, as one tensor; .grad is empty before and after."""
    step()
    grad = torch.cat([p.grad.flatten() for p in reader.parameters()])
    reader.zero_grad(set_to_none=True)
    return grad


def letters(answer):
    """In lower case, without accents and anything else that an uncased BERT's tokens lose."""
    return "".join(c for c in unicodedata.normalize("NFD", answer.lower()) if c.isalnum())


def check(train, few, corpus, readers, cfg):
    """(distance of the gradients, number of equal answers); the two readers have the same weights."""
    ours, theirs = (reader.eval() for reader in readers)
    like = SimpleNamespace(**vars(cfg) | {"padding_takes_part": True, "batch_size": len(train)})
    drawn = [draw(example, i, 0, corpus, ours, cfg) for i, example in enumerate(train)]
    a = gradient_of(lambda: add_gradient([drawn], ours, DEVICE, like, 0), ours)
    b = gradient_of(
        lambda: reference_step(drawn, theirs, cfg.reader_tokens, cfg.passages_per_question), theirs
    )
    answers = answer_all(few, corpus, ours, DEVICE, cfg, [cfg.test_depth])
    reference = reference_answers(few, corpus, theirs, cfg.reader_tokens, cfg.max_answer_length)
    same = [letters(x["text"]) == letters(y) for [x], y in zip(answers, reference, strict=True)]
    return ((a - b).norm() / b.norm()).item(), sum(same)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--train_run", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--length", type=int, default=350)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--passages", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = load_config("", "config/train_reader_nq.yaml", [])
    vars(cfg).update(reader_tokens=args.length, passages_per_question=args.passages, workers=0)
    vars(cfg).update(batch_size=args.questions, test_depth=args.passages)
    corpus = Corpus(args.corpus)
    examples, corpus, _ = read_ranking(args.train, args.train_run, corpus, 100)
    how = {"reader_tokens": args.length, "token_types": "zeros"}
    ours = load_reader(args.model, how, cfg.dropout, new_head=True)
    theirs = copy.deepcopy(ours)
    train, _ = find_training_rows(args.train, examples[:400], corpus, ours.tokenizer, {}, cfg)
    few = [example | {"rows": example["rows"][: args.passages]} for example in train]
    optimizers = [make_optimizer(reader.named_parameters(), cfg) for reader in (ours, theirs)]
    sizes = f"{args.questions} questions x {args.passages} passages, {args.length} tokens"
    print(f"{args.model}, {sizes}, {args.threads} threads, n = {args.rounds}")
    apart, same = check(train[:2], few[: args.questions], corpus, (ours, theirs), cfg)
    print(f"  gradients apart: {apart:.0e}; {same} of {args.questions} answers agree", flush=True)
    assert apart < 1e-3, "the two ways are not the same computation"
    seconds = {name: [] for name in ("train, reference", "train, ours", "answer, reference", "answer, ours")}
    for step in range(-1, args.rounds):  # -1 warms up
        block = few[(step + 1) * args.questions : (step + 2) * args.questions]

        def their_step(step=step):
            chosen = train[(step + 1) * args.questions : (step + 2) * args.questions]
            questions = [draw(example, i, 0, corpus, theirs, cfg) for i, example in enumerate(chosen)]
            reference_step(questions, theirs.train(), args.length, args.passages)

        def our_step(step=step):
            chosen = train[(step + 1) * args.questions : (step + 2) * args.questions]
            add_gradient(make_batch(0, chosen, corpus, ours.train(), cfg), ours, DEVICE, cfg, 0)

        def their_answers(block=block):
            reference_answers(block, corpus, theirs, args.length, cfg.max_answer_length)

        def our_answers(block=block):
            answer_all(block, corpus, ours, DEVICE, cfg, [args.passages])

        works = list(zip(seconds, (their_step, our_step, their_answers, our_answers), strict=True))
        for name, work in works[:: 1 if step % 2 else -1]:
            start = time.perf_counter()
            work()
            if name.startswith("train"):
                i = int(name.endswith("reference"))
                clip_grad_norm_((ours, theirs)[i].parameters(), cfg.max_grad_norm)
                optimizers[i].step()
                optimizers[i].zero_grad(set_to_none=True)
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(seconds[f"{name.split(',')[0]}, reference"], took, strict=True)]
        rate = args.questions / statistics.median(took)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"  {name:18} {rate:7.2f} q/s   {spread}")


if __name__ == "__main__":
    main()
