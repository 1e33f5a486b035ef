"""
A training step of EMDR2 side by side with the reference's way (behaviour of EMDR2 megatron/model/
emdr2_model.py and tasks/openqa/e2eqa/train_e2eqa.py, on our models).

The reference's way: every question, passage and answer padded to the full length; all passages of the batch
in one forward pass; for the likelihood by each passage alone, T5 reads and writes all of them once more, and
holds the logits of the whole vocabulary for all before it takes the few that it wants; one backward pass of
both losses.

Same weights, questions, answers, passages, losses, dropout and threads; tokenising, search, forward,
backward, clipping and AdamW are in the time of both. Before anything is timed, loss and gradient must be
equal to 1e-4 (without dropout, in float64). Interleaved, n rounds; prints questions per second of both and
the ratio (median and range), where our seconds go, and how long a refresh takes.

Memory, of one step without AdamW, each way in a process of its own, with and without checkpointing (the
layers' activations made again in the backward pass, then not counted as kept): the bytes that autograd keeps
at once, every storage counted once and weights not at all; the most elements of a tensor, forward and
backward; the resident memory of the process at its peak, and before the step.
--tiny measures only this, with random models of 2 layers x 32, but of T5's vocabulary, on passages of 120 to
160 tokens (100 words) and answers of 2 to 8.

trap: a T5 of random weights says nothing about time, and a tiny one less about the memory of layers than
about that of logits.

Run: python tests/bench/bench_emdr2.py --reader data/models/flan-t5-small --query_encoder
runs/demo/query_encoder --doc_encoder runs/demo/doc_encoder --embeddings runs/demo/embeddings
--train data/demo/train.jsonl --corpus data/demo/corpus.tsv --questions 2 --passages 8
     python tests/bench/bench_emdr2.py --tiny

B questions · K passages each · N contexts, B*K · L tokens of a context · T answer tokens · D hidden · V words
"""

import argparse
import copy
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_
from transformers.modeling_outputs import BaseModelOutput

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.saved import Largest  # noqa: E402
from tests.toy import CITIES, COLOURS, THINGS, make_world  # noqa: E402
from tests.toy_t5 import t5  # noqa: E402
from train_emdr2 import TOWERS, add_gradient, draw_questions, load_questions, retrieve  # noqa: E402
from utils.data import Corpus  # noqa: E402
from utils.distributed import peak_memory  # noqa: E402
from utils.encoder import collate, tokenize_passages, tokenize_questions  # noqa: E402
from utils.fid import PAD, load_fid, tokenize_answers, tokenize_contexts  # noqa: E402
from utils.live_index import LiveIndex  # noqa: E402
from utils.plumbing.checkpoint import make_optimizer  # noqa: E402
from utils.plumbing.config import load_config  # noqa: E402
from utils.plumbing.files import read_json, write_json  # noqa: E402
from utils.plumbing.weights import load_encoder  # noqa: E402

DEVICE = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, backward=torch.Tensor.backward, autocast=nullcontext
)
INPUTS = ("reader", "query_encoder", "doc_encoder", "embeddings", "train", "corpus")
SCHEMA = "config/train_emdr2_nq.yaml"
EQUAL = 1e-4  # how far losses, and gradients over their norm, may be apart


# ---------------------------------------------------------------- the two ways
def of_labels(logits_sTV, labels_sT):
    """log p of the labels, log_sT, in float32; s is any shape."""
    log_sTV = logits_sTV.float().log_softmax(-1)
    return log_sTV.gather(-1, labels_sT.clamp(min=0)[..., None]).squeeze(-1)


def reference_gradient(examples, answers, rows, corpus, models, index, cfg):
    """Add the gradient of both losses to .grad; returns (their sum, no seconds)."""
    fid, query, doc = models["reader"], models["query_encoder"], models["doc_encoder"]
    B, K = len(examples), cfg.top_k
    passages = [[corpus[row] for row in own] for own in rows]
    pairs = zip(examples, passages, strict=True)
    contexts = [ids for example, own in pairs for ids in tokenize_contexts(fid, example["question"], own)]
    read = collate(fid, contexts, cfg.reader_tokens)
    read = {key: read[key] for key in ("input_ids", "attention_mask")}
    labels_BT = tokenize_answers(fid, answers)
    labels_BT = pad(labels_BT, (0, cfg.answer_tokens - labels_BT.shape[1]), value=PAD)
    labels_BT = labels_BT.to(DEVICE.device)
    mask_BT, written_BT = labels_BT != PAD, fid.model.prepare_decoder_input_ids_from_labels(labels_BT)

    question_ids = tokenize_questions(query, [example["question"] for example in examples])
    q_BD = query(**collate(query, question_ids, query.inputs["question_tokens"]))
    index.search(q_BD.detach().cpu().numpy(), K)  # its time counts; but both ways read the passages of `rows`
    passage_ids = tokenize_passages(
        doc, [(passage.title, passage.text) for own in passages for passage in own]
    )
    d_BKD = doc(**collate(doc, passage_ids, doc.inputs["passage_tokens"])).unflatten(0, (B, K))
    scores_BK = torch.einsum("bd,bkd->bk", q_BD, d_BKD) / (cfg.temperature or math.sqrt(query.dim))

    hidden_NLD = fid.model.encoder(**read).last_hidden_state
    logits_BTV = fid.model(
        encoder_outputs=BaseModelOutput(hidden_NLD.reshape(B, -1, hidden_NLD.shape[2])),
        attention_mask=read["attention_mask"].view(B, -1),
        decoder_input_ids=written_BT,
        use_cache=False,
    ).logits
    reader = -of_labels(logits_BTV, labels_BT)[mask_BT].sum() / mask_BT.sum()

    with torch.no_grad():
        written_NT = written_BT.repeat_interleave(K, 0)
        logits_NTV = fid.model(**read, decoder_input_ids=written_NT, use_cache=False).logits
        labels_BKT = labels_BT[:, None].expand(-1, K, -1)
        log_BKT = of_labels(logits_NTV.unflatten(0, (B, K)), labels_BKT)
    mixture_BT = (scores_BK.log_softmax(1)[:, :, None] + log_BKT).logsumexp(1)
    retriever = -mixture_BT[mask_BT].sum() / mask_BT.sum()
    (reader + retriever).backward()
    return (reader + retriever).item(), {}


def our_gradient(examples, answers, rows, corpus, models, index, cfg):
    """Search and add_gradient of train_emdr2.py; returns (the sum of both losses, seconds of each part)."""
    began = time.perf_counter()
    retrieve(examples, index, models["query_encoder"], cfg.top_k, DEVICE, cfg)
    searched, backwards = time.perf_counter(), []

    def timed_backward(loss):
        start = time.perf_counter()
        loss.backward()
        backwards.append(time.perf_counter() - start)

    accelerator = SimpleNamespace(**vars(DEVICE) | {"backward": timed_backward})
    shown = add_gradient(examples, answers, rows, corpus, models, accelerator, cfg, 0)
    forward = time.perf_counter() - searched - sum(backwards)  # tokenising too
    took = {"search": searched - began, "forward": forward, "backward": sum(backwards)}
    return shown["loss"] + shown["ret"], took


WAYS = {"reference": reference_gradient, "ours": our_gradient}


# ---------------------------------------------------------------- what both are given
def load(args):
    """(cfg, corpus, training questions, models, index)."""
    torch.set_num_threads(args.threads)
    cfg = load_config("", SCHEMA, [])
    vars(cfg).update({key: getattr(args, key) for key in INPUTS})
    vars(cfg).update(reader_tokens=args.length, top_k=args.passages, batch_size=args.questions)
    corpus = Corpus(cfg.corpus)
    how = {"reader_tokens": cfg.reader_tokens, "answer_tokens": cfg.answer_tokens, "neighbors": False}
    models = {"reader": load_fid(cfg.reader, how, cfg.dropout).train()}
    for name, role in TOWERS.items():
        models[name] = load_encoder(getattr(cfg, name), role, dropout=cfg.dropout).train()
    train, _ = load_questions(cfg.train, corpus)
    return cfg, corpus, train, models, LiveIndex(corpus, cfg.embeddings, DEVICE)


def batch(step, cfg, corpus, train, models, index):
    """The arguments of a way, without the models: questions, one answer each, the rows of K passages each."""
    examples, answers = draw_questions(step, train, cfg)
    rows = retrieve(examples, index, models["query_encoder"], cfg.top_k, DEVICE, cfg)
    return examples, answers, rows, corpus


def check(cfg, corpus, train, models, index):
    """
    Assert that both ways have the same loss and gradient, of three questions at most, without dropout, in
    float64; returns how far they are apart: the loss, and each model's gradient over its norm.
    """
    # why float64: of passages that explain an answer alike, little but rounding is left for the encoders.
    # Three questions are more than a chunk of ours, and no more memory than needed.
    cfg = SimpleNamespace(**vars(cfg) | {"batch_size": min(3, cfg.batch_size)})
    given, found = batch(0, cfg, corpus, train, models, index), {}
    for name, gradient in WAYS.items():
        own = {key: copy.deepcopy(model).double().eval() for key, model in models.items()}
        loss, _ = gradient(*given, own, index, cfg)
        grads = {key: [p.grad for p in model.parameters()] for key, model in own.items()}
        assert all(grad is not None for key in grads for grad in grads[key]), "a weight without a gradient"
        found[name] = loss, {key: torch.cat([grad.flatten() for grad in grads[key]]) for key in grads}
    (loss, theirs), (our_loss, ours) = found.values()
    apart = {"loss": abs(loss - our_loss)}
    apart |= {key: ((theirs[key] - ours[key]).norm() / theirs[key].norm()).item() for key in theirs}
    assert max(apart.values()) < EQUAL, f"the two ways are not the same computation: {apart}"
    return apart


# ---------------------------------------------------------------- memory
class Kept:
    """The bytes that autograd keeps for the backward pass, and their peak; a storage counts once."""

    def __init__(self, models):
        self.now = self.peak = 0
        weights = (p for model in models.values() for p in model.parameters())
        self.users = {p.untyped_storage().data_ptr(): 1 for p in weights}  # these are never let go

    def hooks(self):
        """The context in which to run a step."""
        counter = self

        class Holder:
            def __init__(self, tensor):
                storage = tensor.untyped_storage()
                self.tensor, self.place, self.size = tensor, storage.data_ptr(), storage.nbytes()
                counter.users[self.place] = counter.users.get(self.place, 0) + 1
                if counter.users[self.place] == 1:
                    counter.now += self.size
                    counter.peak = max(counter.peak, counter.now)

            def __del__(self):
                counter.users[self.place] -= 1
                if not counter.users[self.place]:
                    counter.now -= self.size

        return torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor)


def measure(args):
    """Print the memory of one step as json. args.only: way,question_chunk,whether activations are remade."""
    name, chunk, checkpointing = args.only.split(",")
    cfg, corpus, train, models, index = load(args)
    cfg.question_chunk = int(chunk)
    if checkpointing == "yes":
        for model in models.values():
            model.model.activation_checkpointing_enable()
    given, kept = batch(0, cfg, corpus, train, models, index), Kept(models)
    before = peak_memory(DEVICE.device)
    with kept.hooks(), Largest() as largest:
        WAYS[name](*given, models, index, cfg)
    print(json.dumps([largest.numel, kept.peak, peak_memory(DEVICE.device), before]))


def print_memory(args):
    """A table: the reference, ours with all questions at once, ours as the recipe has it."""
    few = load_config("", SCHEMA, []).question_chunk
    ways = {"reference": ("reference", args.questions), "ours, all questions": ("ours", args.questions)}
    if few < args.questions:
        ways |= {f"ours, {few} at a time": ("ours", few)}
    heads = "kept", "largest tensor", "process at its peak", "before"
    print(f"  {'memory of a step':35}" + "{:>11} {:>22} {:>22} {:>10}".format(*heads))
    for checkpointing in ("no", "yes"):
        for label, (name, chunk) in ways.items():
            flags = [f"--{key}={getattr(args, key)}" for key in (*INPUTS, "questions", "passages", "length")]
            flags += [f"--threads={args.threads}", f"--only={name},{chunk},{checkpointing}"]
            command = [sys.executable, __file__, *flags]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            numel, *sizes = json.loads(done.stdout.splitlines()[-1])
            kept, peak, before = (f"{size / 1e6:,.0f} MB" for size in sizes)
            largest = f"{numel / 1e6:.1f} M = {4 * numel / 1e6:,.0f} MB"
            label += ", checkpointing" * (checkpointing == "yes")
            print(f"  {label:35}{kept:>11} {largest:>22} {peak:>22} {before:>10}", flush=True)


# ---------------------------------------------------------------- time
def optimizer_of(models, cfg):
    """AdamW of all three models, as main() of train_emdr2.py makes it."""
    named = [pair for model in models.values() for pair in model.named_parameters()]
    return make_optimizer(named, cfg)


def print_time(args, cfg, corpus, train, models, index):
    """Questions per second of both ways, the parts of our step, and a refresh."""
    models = dict(zip(WAYS, (models, copy.deepcopy(models)), strict=True))
    optimizers = {name: optimizer_of(own, cfg) for name, own in models.items()}
    seconds, parts = {name: [] for name in WAYS}, []
    for step in range(-1, args.rounds):  # -1 warms up
        given = batch(step + 1, cfg, corpus, train, models["ours"], index)
        for name, gradient in [*WAYS.items()][:: 1 if step % 2 else -1]:  # in turn each is the first
            own = [p for model in models[name].values() for p in model.parameters()]
            start = time.perf_counter()
            _, took = gradient(*given, models[name], index, cfg)
            learned = time.perf_counter()
            clip_grad_norm_(own, cfg.max_grad_norm)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            done = time.perf_counter()
            if step >= 0:
                seconds[name].append(done - start)
                parts += [took | {"clipping and AdamW": done - learned}] if took else []
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    for name, took in seconds.items():
        print(f"  {name:10} {args.questions / statistics.median(took):8.3f} questions/s")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"  ours over reference: {spread}, n = {args.rounds}")
    split = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
    print("  ours, seconds a step:", ", ".join(f"{key} {value:.3f}" for key, value in split.items()))
    start = time.perf_counter()
    index.refresh(models["ours"]["doc_encoder"], args.rounds, cfg.encoding_batch_size, nullcontext)
    took = time.perf_counter() - start
    print(
        f"  refresh of {len(corpus):,} passages: {took:.1f} s ({len(corpus) / took:.0f} a second), "
        f"{took / cfg.refresh_every:.3f} s a step where it is done every {cfg.refresh_every}"
    )


# ---------------------------------------------------------------- tiny
def make_tiny(folder):
    """Write 200 passages, 40 questions and random models into `folder`; returns the paths by their flags."""
    make_world(folder)
    draws, words = random.Random(0), CITIES + THINGS + COLOURS
    texts = [" ".join(draws.choices(words, k=draws.randint(110, 150))) for _ in range(200)]
    rows = "".join(f"{i}\t{text}\t{draws.choice(CITIES)}\n" for i, text in enumerate(texts))
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + rows, encoding="utf-8")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(40):
            question, answer = (
                " ".join(draws.choices(words, k=draws.randint(*k))) for k in ((8, 12), (1, 7))
            )
            file.write(json.dumps({"qid": str(i), "question": question, "answers": [answer]}) + "\n")
    for name in TOWERS:
        inputs = folder / name / "encoder_inputs.json"
        write_json(inputs, read_json(inputs) | {"question_tokens": 32, "passage_tokens": 256})
    paths = {name: folder / name for name in (*TOWERS, "embeddings")}
    paths |= {"corpus": folder / "corpus.tsv", "train": folder / "train.jsonl"}
    flags = {"doc_encoder": paths["doc_encoder"], "corpus": paths["corpus"], "out": paths["embeddings"]}
    command = [sys.executable, "doc2embedding.py", *(f"--{key}={value}" for key, value in flags.items())]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return paths | {"reader": t5(folder, vocab_size=32128)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in INPUTS:
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--passages", type=int, default=50)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return measure(args)
    absent = [key for key in INPUTS if not getattr(args, key)]
    if absent and not args.tiny:
        parser.error(f"--{absent[0]} is needed, or --tiny")
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            vars(args).update(make_tiny(Path(folder)))
        sizes = f"{args.questions} questions x {args.passages} passages, {args.length} tokens"
        name = "tiny random models" if args.tiny else args.reader
        print(f"{name}, {sizes}, {args.threads} threads", flush=True)
        print_memory(args)  # why first: a process inherits the peak of the one that started it
        loaded = load(args)
        apart = ", ".join(f"{key} {value:.0e}" for key, value in check(*loaded).items())
        print(f"  apart without dropout: {apart}", flush=True)
        if not args.tiny:
            print_time(args, *loaded)


if __name__ == "__main__":
    main()
