"""
All that one GPU can show, in 15 minutes: models of the papers' sizes with random weights, real text.

Run: python tests/bench/bench_gpu.py --bert_tokenizer data/models/tinybert-4l --t5_tokenizer
data/models/flan-t5-small --corpus data/nq_small/corpus.tsv --train data/nq_small/train.jsonl --out F

Rows (--rows), each in a process of its own with its own seconds (LIMITS); a row that fails or is stopped
keeps what it has printed, and the next one begins. All goes to the screen and to the end of --out at once.
gemm     FLOP per second of torch.mm, squares of 8192, in four precisions: the peaks of this card.
tests    tests/test_gpu.py.
encode   BERT-base, passages/s from texts to vectors, tokenising included: texts as they are, and texts that
         fill all 256 tokens. Ours as doc2embedding.py does it (weights in bf16, 64k tokens at a time), as it
         did (autocast, 256 rows), and compiled; nanoDPR's way (batches of 32, padded to 256);
         sentence-transformers. Useful FLOP as in bench_encode.py, over those of the squares.
file     doc2embedding.py on the whole corpus, from file to disk; also compiled, its minutes counted.
train    A step with one shared BERT-base, a hard negative each, tokenising included, every way of
         bench_train.py: 128 questions, and with a gradient cache --cached.
recipe   Ours with two towers and 128 questions, as the NQ recipe has them; then --big with the cache.
rerank   BERT-base cross-encoder, pairs/s: ours, and sentence-transformers' CrossEncoder.
reader   A step of the extractive reader, 16 questions of 24 passages: ours, and DPR's way, each row padded to
         350 tokens.
emdr2    A step of EMDR2 with T5-base and two BERT-base, without the search: ours, and the reference's way:
         all padded, T5 reads each passage twice, one backward pass; then the recipe's step of 64 questions.
profile  In which operations encode, train and emdr2 spend the GPU's time.

Turns forth and back, medians (ranges); ratios are within a turn. Memory: the most that torch had allocated
beside weights and AdamW. The weights are random. --tiny: all small, on any device, to see that it runs, and
that both ways of emdr2 and reader have one gradient.
"""

import copy
import gc
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # why: a process that has used the GPU cannot be forked
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.functional import pad  # noqa: E402
from torch.nn.utils import clip_grad_norm_  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_emdr2  # noqa: E402
import train_reader  # noqa: E402
from tests.bench import bench_train  # noqa: E402
from tests.bench.bench_encode import nano_dpr, ours, useful_flop  # noqa: E402
from tests.bench.harness import ROOT, parser, profile, ratios, spread, take_turns  # noqa: E402
from utils import fid, reader  # noqa: E402
from utils.corpus import Corpus  # noqa: E402
from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs  # noqa: E402
from utils.data import read_questions  # noqa: E402
from utils.encoder import collate, embed, tokenize_passages, tokenize_questions  # noqa: E402
from utils.plumbing.config import load_config  # noqa: E402
from utils.plumbing.devices import rows_that_fit  # noqa: E402
from utils.plumbing.files import write_json  # noqa: E402
from utils.plumbing.weights import TOWERS, load_encoder  # noqa: E402

transformers.logging.set_verbosity_error()  # else a report for every pooler that is left out
INPUTS = {"question_tokens": 256, "passage_tokens": 256, "pooling": "cls", "token_types": "zeros"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"gemm": 30, "tests": 150, "encode": 130, "file": 90, "train": 80, "recipe": 50, "rerank": 40}
LIMITS |= {"reader": 50, "emdr2": 100, "profile": 60}  # 780 seconds


def turns(works, args, before=1):
    """{name: seconds of args.repeat turns}, after some that only warm up."""
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    return take_turns(works, args.repeat, before, wait)


def autocast_of(args, kind):
    """What doc2embedding.py and the trainers put around a forward pass."""
    if kind == "fp32":
        return nullcontext
    return partial(torch.autocast, torch.device(args.device).type, DTYPES[kind])


def peak_of(work, device):
    """GB that torch had allocated at most during work(), beyond what it had before; 0 on a CPU."""
    if device == "cpu":
        work()
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def device_of(args, kind):
    """What add_gradient of the trainers takes of accelerate."""
    device = SimpleNamespace(device=torch.device(args.device), process_index=0, scaler=None)
    device.backward, device.autocast = torch.Tensor.backward, autocast_of(args, kind)
    return device


def learn(gradient, models):
    """A step of training: gradient(), clipping, AdamW."""
    weights = [weight for model in models for weight in model.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)

    def step():
        gradient()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(works, items, args, mine, unit="questions"):
    """Print items/s, how fast `mine` is, and the memory beside what stays, of {name: work}."""
    memory = {}
    for name in list(works):
        try:
            works[name]()  # AdamW's two states
            memory[name] = peak_of(works[name], args.device)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:  # memory, or a peer's version
            print(f"  {name}: not run: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            del works[name]
    seconds = turns(works, args, before=2)  # the first ones also fill torch's store of memory
    for name, spent in seconds.items():
        rate, times = spread([items / s for s in spent], 1), ratios(spent, seconds[mine])
        print(f"  {name:34} {rate:>24} {unit}/s, {mine} is {times} x, {memory[name]:.1f} GB", flush=True)


def same_gradient(ways, models):
    """Assert that all of [gradient()] leave the same .grad in models, without dropout, in float64."""
    found = []
    for model in models:
        model.double().eval()
    for gradient in ways:
        gradient()
        weights = [weight for model in models for weight in model.parameters()]
        found.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        for weight in weights:
            weight.grad = None
    apart = max((one - found[0]).norm() / found[0].norm() for one in found[1:])
    assert apart < 1e-4, f"not the same computation: {apart}"
    print(f"  gradients apart: {apart:.0e}")
    for model in models:
        model.float().train()


# ---------------------------------------------------------------- what the rows are given
def models(args):
    """Random models of the papers' sizes in args.work, with real tokenizers."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    bert = transformers.BertConfig(vocab_size=30522, hidden_dropout_prob=0.1, **(small if args.tiny else {}))
    words = transformers.AutoTokenizer.from_pretrained(args.bert_tokenizer)
    for name, role in (("query_encoder", "question"), ("doc_encoder", "passage"), ("bert", "shared")):
        transformers.BertModel(bert).save_pretrained(args.work / name)
        words.save_pretrained(args.work / name)
        write_json(args.work / name / "encoder_inputs.json", {"role": role, **INPUTS, "pair": "bench"})
    bert.num_labels = 2
    transformers.BertForSequenceClassification(bert).save_pretrained(args.work / "cross")
    words.save_pretrained(args.work / "cross")
    write_json(args.work / "cross" / "encoder_inputs.json", {"role": "cross", "pair_tokens": 160})
    small = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    base = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    tokens = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    t5 = transformers.T5Config(**(small if args.tiny else base), **tokens)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(args.work / "t5")
    transformers.AutoTokenizer.from_pretrained(args.t5_tokenizer).save_pretrained(args.work / "t5")


# ---------------------------------------------------------------- rows
def gemm(args):
    print(torch.cuda.get_device_name() if args.device == "cuda" else "CPU")
    n = 512 if args.tiny else 8192
    for kind in ("fp32", "tf32", "bf16", "fp16"):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = DTYPES.get(kind, torch.float32)
        a_nn, b_nn = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
        spent = turns({kind: lambda a=a_nn, b=b_nn: [a @ b for _ in range(10)]}, args)[kind]
        torch.backends.cuda.matmul.allow_tf32 = False
        args.peak[kind] = 10 * 2 * n**3 / statistics.median(spent)
        write_json(args.work / "peak.json", args.peak)
        print(f"{kind}: {spread([10 * 2 * n**3 / s / 1e12 for s in spent], 1)} TFLOP/s")


def tests(args):
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_gpu.py"], cwd=ROOT)


def file(args):
    half = {"mixed_precision": "bf16"}
    for number, flags in enumerate([{}] if args.device == "cpu" else [half, half | {"compile": "true"}]):
        files = {"doc_encoder": args.work / "doc_encoder", "corpus": args.corpus.path}
        flags = flags | files | {"out": args.work / f"embeddings{number}"}
        command = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        done = subprocess.run([sys.executable, "doc2embedding.py", *command], cwd=ROOT, capture_output=True)
        lines = done.stdout.decode().splitlines() or [done.stderr.decode()[-2000:]]
        said = [line for line in lines if "passages/s" in line or "batches" in line or done.returncode]
        print(f"doc2embedding.py {flags.get('compile', '')}", *said, sep="\n  ", flush=True)


def encode(args):
    encoder = load_encoder(args.work / "doc_encoder", "passage").to(args.device).eval()
    half = copy.deepcopy(encoder).bfloat16()
    compiled = copy.deepcopy(half)
    compiled.model.compile(dynamic=False, backend="eager" if args.tiny else "inductor")
    lengths = list(range(32, 257, 32))
    torch._dynamo.config.recompile_limit = 2 * len(lengths)
    some = np.linspace(0, len(args.corpus) - 1, 64 if args.tiny else 8192).astype(int).tolist()
    natural = [args.corpus[row] for row in some]
    triples = zip(natural, natural[1:] + natural[:1], natural[2:] + natural[:2], strict=True)
    full = [a._replace(text=f"{a.text} {b.text} {c.text}") for a, b, c in triples]
    tokens = rows_that_fit(0, 1, encoder.dim, torch.device(args.device)) or 4096
    theirs = sentence_encoder(args)
    for label, passages in (("texts as they are", natural), ("texts that fill 256 tokens", full)):
        sizes = [len(ids) for ids in tokenize_passages(encoder, passages)]
        few = passages[::8]  # the slow ways get an eighth
        bf16 = autocast_of(args, "bf16")
        works = {"nanoDPR's way, bf16": partial(nano_dpr, encoder, few, bf16)}
        works["ours, fp32"] = partial(ours, encoder, few, 0, tokens=tokens)
        works["ours, bf16 autocast, 256 rows"] = partial(ours, encoder, passages, 256, autocast=bf16)
        works["ours, bf16, 256 rows"] = partial(ours, half, passages, 256)
        works["ours, bf16, by tokens"] = partial(ours, half, passages, 0, tokens=tokens)
        works["ours, bf16, compiled"] = partial(ours, compiled, passages, 0, tokens=tokens, lengths=lengths)
        if theirs:
            texts = [(passage.title, passage.text) for passage in passages]
            quiet = {"batch_size": 256, "show_progress_bar": False}
            works["sentence-transformers, bf16"] = partial(theirs.encode, texts, **quiet)
        works["tokenising alone"] = partial(tokenize_passages, encoder, passages)
        seconds = turns(works, args)
        print(f"{label}: {len(passages)} passages, {sum(sizes) / len(sizes):.0f} tokens on average")
        wanted = works["ours, fp32"]()
        for name in ("ours, bf16, by tokens", "ours, bf16, compiled"):
            apart = np.abs(works[name]()[::8] - wanted).max() / np.abs(wanted).max()
            print(f"  {name}, {tokens} tokens: {apart:.0e} apart from fp32")
        for name, spent in seconds.items():
            slow = "fp32" in name or "nanoDPR" in name
            spent = [8 * s for s in spent] if slow else spent
            read = np.repeat(sizes[::8], 8)[: len(sizes)] if slow else sizes
            flop = sum(useful_flop(encoder, n) for n in read) / statistics.median(spent)
            kind = next((kind for kind in DTYPES if kind in name), "bf16")
            note = (
                f"{flop / 1e12:7.1f} useful TFLOP/s = {flop / args.peak.get(kind, math.inf):.2f} of the peak"
            )
            note = "" if name.startswith("tokenising") else note
            rate = spread([len(passages) / s for s in spent], 0)
            times = ratios(spent, seconds["ours, bf16, by tokens"])
            print(f"  {name:34} {rate:>26}/s  by tokens is {times:>20} x  {note}", flush=True)


def sentence_encoder(args):
    """sentence-transformers' encoder of the same weights in bf16, or None where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer
    except ImportError:
        return print("sentence-transformers is not installed")
    bert = Transformer(str(args.work / "doc_encoder"), max_seq_length=256)
    bert.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    width = bert.auto_model.config.hidden_size
    return SentenceTransformer(modules=[bert, Pooling(width, "cls")], device=args.device).bfloat16()


def prepare_steps(args):
    """(questions in a batch, stepper): stepper(way, precision, size, shared) -> what does a step."""
    size, rng = 8 if args.tiny else 128, np.random.default_rng(0)
    rows = [row for row in read_questions(args.train) if row["positives"]]
    ids = [args.corpus[int(row)].id for row in rng.integers(len(args.corpus), size=len(rows))]
    rows = [row | {"negatives": [one]} for row, one in zip(rows, ids, strict=True)]
    bench_train.LENGTHS = {"question_tokens": 256, "passage_tokens": 256}

    def stepper(name, kind, size, shared=True):
        given = SimpleNamespace(model=str(args.work / "bert"), shared=shared, chunk=args.chunk)
        given.autocast, given.device = autocast_of(args, kind), args.device
        model, way = bench_train.make_way(name, given, rows, args.corpus)
        starts = itertools.count(0, size)

        def gradient():
            start = next(starts)
            way(*bench_train.examples_of(rows, args.corpus, start, size))
            # trap: autocast may remember a weight's cast from a pass without gradients
            idle = [n for n, p in model.named_parameters() if p.grad is None and "pooler" not in n]
            assert start or not idle, f"{name}: no gradient for {len(idle)} weights, such as {idle[0]}"

        return learn(gradient, [model.to(args.device).train()])

    return size, stepper


def train(args):
    size, stepper = prepare_steps(args)
    for ways, questions in ((bench_train.WAYS[:3], size), (bench_train.WAYS[3:], args.cached)):
        steps = {}
        for way in ways:
            try:
                steps[way] = stepper(way, "bf16", questions)
            except ImportError as error:
                print(f"  {way}: not run: {error}")
        print(f"  {questions} questions, a positive and a negative each, chunk {args.chunk}, bf16")
        compare(steps, questions, args, ways[-1])
        steps = None  # their memory is for the next ones


def recipe(args):
    size, stepper = prepare_steps(args)
    cases = [(name, kind, size) for name in ("ours", "ours, grad_cache") for kind in ("fp32", "bf16")]
    for name, kind, questions in [*cases, ("ours, grad_cache", "bf16", args.big)]:
        shared = questions > size
        print(f"  {questions} questions, {kind}, {'one shared tower' if shared else 'two towers'}")
        compare({name: stepper(name, kind, questions, shared)}, questions, args, name)


def rerank(args):
    cross = load_cross_encoder(args.work / "cross").to(args.device)
    questions = [row["question"] for row in read_questions(args.train)]
    n = 256 if args.tiny else 4096
    pairs = [(questions[i % len(questions)], args.corpus[i % len(args.corpus)]) for i in range(n)]
    cast = autocast_of(args, "bf16")
    size = rows_that_fit(128, 160, 768, torch.device(args.device))
    works = {"ours, bf16": lambda: probabilities(cross, tokenize_pairs(cross, pairs), size, cast)}
    try:
        from sentence_transformers import CrossEncoder

        peer = CrossEncoder(str(args.work / "cross"), max_length=160, device=args.device)
        peer.bfloat16()
        texts = [(question, f"{passage.title} {passage.text}") for question, passage in pairs]
        quiet = {"batch_size": 256, "show_progress_bar": False}
        works["sentence-transformers, bf16"] = partial(peer.predict, texts, **quiet)
    except ImportError:
        print("sentence-transformers is not installed")
    compare(works, n, args, "ours, bf16", "pairs")


# ---------------------------------------------------------------- reader and EMDR2, next to the originals
def reader_row(args):
    cfg = load_config("", "config/train_reader_nq.yaml", [])
    size, passages, tokens = (3, 4, 200) if args.tiny else (cfg.batch_size, cfg.passages_per_question, 350)
    cfg.batch_size = size
    model = reader.load_reader(args.work / "bert", {"reader_tokens": tokens}, cfg.dropout, new_head=True)
    model.to(args.device).train()
    questions = []
    for number, row in enumerate(read_questions(args.train)[:size]):
        texts = [args.corpus[passages * number + i] for i in range(passages)]
        sequences = reader.tokenize_rows(model, row["question"], texts)
        first = sequences[0][1]
        ids = [ids for ids, _ in sequences]
        questions.append({"ids": ids, "spans": [(first, first + 1), (first + 2, first + 2)]})
    device = device_of(args, "fp32" if args.tiny else "bf16")
    width = model.model.config.num_hidden_layers * model.model.config.hidden_size
    cfg.passage_chunk = rows_that_fit(24, tokens, width, device.device)
    together = rows_that_fit(1, passages * tokens, width, device.device)
    chunks = [questions[i : i + together] for i in range(0, size, together)]

    def mine():
        train_reader.add_gradient(chunks, model, device, cfg, 0)

    def theirs():
        for question in questions:
            with device.autocast():
                start_ML, end_ML, relevance_M = model(**collate(model, question["ids"], [tokens]))
            longest = len(question["ids"][0])  # differs: DPR's padding takes part in the softmax over tokens
            start_L, end_L = start_ML[0, :longest].log_softmax(0), end_ML[0, :longest].log_softmax(0)
            spans = torch.stack([start_L[a] + end_L[b] for a, b in question["spans"]])
            loss = -spans.logsumexp(0) - relevance_M.log_softmax(0)[0]
            (loss / size).backward()

    name = f"ours, {together} at a time"
    if args.tiny:
        same_gradient((mine, theirs), [model])
    compare({name: learn(mine, [model]), "DPR's way": learn(theirs, [model])}, size, args, name)


def emdr2_ways(args, size, chunks):
    """({name: gradient}, the models) of `size` questions: ours in `chunks`, and the reference's way."""
    cfg = load_config("", "config/train_emdr2_nq.yaml", [])
    if args.tiny:
        vars(cfg).update(top_k=4, reader_tokens=64, answer_tokens=8)
    cfg.batch_size = size
    lengths = {"reader_tokens": cfg.reader_tokens, "answer_tokens": cfg.answer_tokens}
    models = {"reader": fid.load_fid(args.work / "t5", lengths, cfg.dropout)}
    for name, role in TOWERS.items():
        models[name] = load_encoder(args.work / name, role, dropout=cfg.dropout)
    for model in models.values():
        model.to(args.device).train()
    examples, rng = [], np.random.default_rng(0)
    for row in read_questions(args.train)[:size]:
        rows = rng.integers(len(args.corpus), size=cfg.top_k)
        examples.append(row | {"answer": row["answers"][0], "rows": rows.tolist()})
    device = device_of(args, "fp32" if args.tiny else "bf16")

    def mine(chunk):
        cfg.question_chunk = chunk
        cfg.passage_chunk = rows_that_fit(200, cfg.reader_tokens, 12 * 768, device.device)
        train_emdr2.add_gradient(examples, args.corpus, models, device, cfg, 0)

    def theirs():
        with device.autocast():
            emdr2_loss(examples, args.corpus, models, cfg).backward()

    ways = {f"ours, {chunk} at a time": partial(mine, chunk) for chunk in chunks}
    return ways | {"the reference's way": theirs}, models


def emdr2_loss(examples, corpus, models, cfg):
    """Both losses in one graph, all padded to the full length (EMDR2 megatron/model/emdr2_model.py)."""
    model, query, doc = models["reader"], models["query_encoder"], models["doc_encoder"]
    B, K = len(examples), cfg.top_k
    contexts, passages = [], []
    for example in examples:
        own = [corpus[row] for row in example["rows"]]
        passages += own
        contexts += fid.tokenize_contexts(model, example["question"], own)
    read = collate(model, contexts, [cfg.reader_tokens])
    del read["token_type_ids"]
    labels_BT = fid.tokenize_answers(model, [example["answer"] for example in examples])
    labels_BT = pad(labels_BT, (0, cfg.answer_tokens - labels_BT.shape[1]), value=fid.PAD)
    labels_BT = labels_BT.to(read["input_ids"].device)
    mask_BT = labels_BT != fid.PAD
    written_BT = model.model.prepare_decoder_input_ids_from_labels(labels_BT)

    # the retriever's scores
    question_ids = tokenize_questions(query, [example["question"] for example in examples])
    q_BD = query(**collate(query, question_ids, [query.inputs["question_tokens"]]))
    ids = tokenize_passages(doc, passages)
    d_BKD = doc(**collate(doc, ids, [doc.inputs["passage_tokens"]])).unflatten(0, (B, K))
    scores_BK = torch.einsum("bd,bkd->bk", q_BD, d_BKD) / (cfg.temperature or math.sqrt(query.dim))

    # all passages at once
    def log_of(logits_sTV, labels_sT):
        log_sTV = logits_sTV.to(torch.promote_types(logits_sTV.dtype, torch.float32)).log_softmax(-1)
        return log_sTV.gather(-1, labels_sT.clamp(min=0)[..., None]).squeeze(-1)

    hidden_NLD = model.model.encoder(**read).last_hidden_state
    states = BaseModelOutput(hidden_NLD.reshape(B, -1, hidden_NLD.shape[2]))
    given = {"encoder_outputs": states, "attention_mask": read["attention_mask"].view(B, -1)}
    logits_BTV = model.model(**given, decoder_input_ids=written_BT, use_cache=False).logits
    loss = -log_of(logits_BTV, labels_BT)[mask_BT].sum() / mask_BT.sum()

    # each passage alone, read once more
    with torch.no_grad():
        written_NT = written_BT.repeat_interleave(K, 0)
        logits_NTV = model.model(**read, decoder_input_ids=written_NT, use_cache=False).logits
        labels_BKT = labels_BT[:, None].expand(-1, K, -1)
        log_BKT = log_of(logits_NTV.unflatten(0, (B, K)), labels_BKT)
    mixture_BT = (scores_BK.log_softmax(1)[:, :, None] + log_BKT).logsumexp(1)
    return loss - mixture_BT[mask_BT].sum() / mask_BT.sum()


def emdr2(args):
    size, few = (3, 2) if args.tiny else (4, 2)
    ways, models = emdr2_ways(args, size, (few, size))
    if args.tiny:
        same_gradient(ways.values(), models.values())
    steps = {name: learn(way, models.values()) for name, way in ways.items()}
    compare(steps, size, args, f"ours, {size} at a time")
    steps = ways = models = None  # their memory is for the next models

    # the recipe's step
    size = 4 if args.tiny else 64
    chunk = rows_that_fit(4, 50 * 256, 12 * 768, torch.device(args.device))
    ways, models = emdr2_ways(args, size, (chunk,))
    for model in models.values():
        model.model.activation_checkpointing_enable()
    name = f"ours, {chunk} at a time"
    print(f"  the recipe's step, {size} questions, checkpointing")
    compare({name: learn(ways[name], models.values())}, size, args, name)


def profiles(args):
    encoder = load_encoder(args.work / "doc_encoder", "passage").to(args.device).bfloat16()
    ids = tokenize_passages(encoder, [args.corpus[row] for row in range(64 if args.tiny else 4096)])
    tokens = rows_that_fit(0, 1, encoder.dim, torch.device(args.device))
    print("encode:", profile(lambda: embed(encoder, ids, 64, tokens=tokens), 8), flush=True)
    size, stepper = prepare_steps(args)
    print("train:", profile(stepper("ours", "bf16", size), 8), flush=True)
    ways, models = emdr2_ways(args, 4, (4,))
    print("emdr2:", profile(learn(ways["ours, 4 at a time"], models.values()), 8), flush=True)


ROWS = {row.__name__: row for row in (gemm, tests, encode, file, train, recipe, rerank)}
ROWS |= {"reader": reader_row, "emdr2": emdr2, "profile": profiles}


def in_a_process(function, args, limit):
    """Call function(args) in a fork, for `limit` seconds at most; return what went wrong, or ""."""

    def call():
        os.setsid()  # what it starts is in its group
        torch.set_num_threads(args.threads)
        peaks = args.work / "peak.json"
        args.peak = json.loads(peaks.read_text()) if peaks.is_file() else {}
        function(args)

    assert not torch.cuda.is_initialized(), "a fork could not use the GPU"
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(limit)
    alive = process.is_alive()
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return f"stopped after {limit} s" if alive else f"exit code {process.exitcode}" * (process.exitcode != 0)


def main():
    options = parser(__doc__)
    options.add_argument("--bert_tokenizer", required=True)
    options.add_argument("--t5_tokenizer", required=True)
    options.add_argument("--corpus", required=True)
    options.add_argument("--train", required=True, help="questions with answers and positives")
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options.add_argument("--out", default="", help="a file; what is printed is added to its end")
    options.add_argument("--chunk", type=int, default=256, help="passages in a pass; questions: twice")
    options.add_argument("--cached", type=int, default=512, help="questions with a gradient cache")
    options.add_argument("--big", type=int, default=2048, help="questions of the largest batch")
    options.add_argument("--tiny", action="store_true")
    options.set_defaults(repeat=3)
    args = options.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.big, args.cached, args.chunk = 16, 16, 4
    elif args.device == "cpu":
        sys.exit("error: there is no GPU; --tiny runs anywhere")
    if args.out:
        screen = subprocess.Popen(["tee", "-a", args.out], stdin=subprocess.PIPE)
        os.dup2(screen.stdin.fileno(), 1)
        os.dup2(1, 2)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    print(f"{versions}, {args.threads} threads; commit:", flush=True)
    subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT)
    args.corpus, failed = Corpus(args.corpus), []
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        patience = 20 if args.tiny else 1
        if fault := in_a_process(models, args, 60 * patience):
            sys.exit(f"error: no models: {fault}")
        for row in args.rows:
            print(f"\n== {row}", flush=True)
            began = time.perf_counter()
            if fault := in_a_process(ROWS[row], args, LIMITS[row] * patience):
                failed.append(f"{row}: {fault}")
            print(f"-- {row}: {time.perf_counter() - began:.1f} s in all {fault}", flush=True)
    sys.exit(f"error: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
