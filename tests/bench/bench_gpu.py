"""
The rows of the cost table that need a GPU, in one process: models of the papers' sizes with random weights,
real text.

Run: python tests/bench/bench_gpu.py --bert_tokenizer data/models/tinybert-4l --corpus data/demo/corpus.tsv
--train data/demo/train.jsonl

Rows (--rows; each goes on where another fails):
gemm     FLOP per second of torch.mm, squares of 8192, in four precisions: the peaks of this card.
encode   BERT-base, passages/s from texts to vectors, tokenising included: texts as they are, and texts that
         fill all 256 tokens. Ours as doc2embedding.py does it, nanoDPR's way (batches of 32, padded to 256),
         sentence-transformers (in the same process, if it is installed). "useful" is the FLOP of
         bench_encode.py's formula; its share is of the squares in that precision.
train    A step with one shared BERT-base, a hard negative each, tokenising included, every way of
         bench_train.py (GradCache and sentence-transformers where they are installed): 128 questions, and
         with a gradient cache --cached.
recipe   Ours with two towers and 128 questions, as the NQ recipe has them; then --big with the cache.
search   --passages random unit vectors of 768 numbers in fp16, on the GPU and in main memory: ours where they
         lie on the GPU, ours sent block by block, and the bare float32 product.
rerank   BERT-base cross-encoder, pairs/s: ours, and sentence-transformers' CrossEncoder.

Turns forth and back, medians (ranges); ratios are within a turn. Memory: the most that torch had allocated,
with weights, gradients and AdamW, or beside them. Nothing here says anything about accuracy: the weights are
random. That the ways compute the same is checked on CPUs by the other benchmarks, in float32.
--tiny: everything small, on any device, to see that it runs.
"""

import copy
import gc
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import bench_train  # noqa: E402
from tests.bench.bench_encode import nano_dpr, ours, useful_flop  # noqa: E402
from tests.bench.harness import parser, ratios, spread, take_turns  # noqa: E402
from utils import search as search_module  # noqa: E402
from utils.corpus import Corpus  # noqa: E402
from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs  # noqa: E402
from utils.data import read_questions  # noqa: E402
from utils.encoder import tokenize_passages  # noqa: E402
from utils.plumbing.files import write_json  # noqa: E402
from utils.plumbing.weights import load_encoder  # noqa: E402
from utils.search import exact_topk  # noqa: E402

logging.set_verbosity_error()  # else a report for every pooler that is left out
INPUTS = {"question_tokens": 256, "passage_tokens": 256, "pooling": "cls", "token_types": "zeros"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def wait(device):
    """GPU work is asynchronous: a clock is read after it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def turns(works, args, before=1):
    """{name: seconds of args.repeat turns}, after some that only warm up."""
    return take_turns(works, args.repeat, before, lambda: wait(args.device))


def autocast_of(args, kind):
    """What doc2embedding.py and the trainers put around a forward pass."""
    if kind == "fp32":
        return nullcontext
    return partial(torch.autocast, torch.device(args.device).type, DTYPES[kind])


def peak_of(work, device):
    """GB that torch had allocated at most during work(), and that beyond what it had before; 0 on a CPU."""
    gc.collect()
    if torch.device(device).type != "cuda":
        return work() or (0.0, 0.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    peak = torch.cuda.max_memory_allocated()
    return peak / 1e9, (peak - before) / 1e9


# ---------------------------------------------------------------- what the rows are given
def make_models(args):
    """Random models of the papers' sizes in args.work, with real tokenizers."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    bert = BertConfig(vocab_size=30522, hidden_dropout_prob=0.1, **(small if args.tiny else {}))
    words = AutoTokenizer.from_pretrained(args.bert_tokenizer)
    for name, role in (("query_encoder", "question"), ("doc_encoder", "passage"), ("bert", "shared")):
        BertModel(bert).save_pretrained(args.work / name)
        words.save_pretrained(args.work / name)
        write_json(args.work / name / "encoder_inputs.json", {"role": role, **INPUTS, "pair": "bench"})
    bert.num_labels = 2
    BertForSequenceClassification(bert).save_pretrained(args.work / "cross")
    words.save_pretrained(args.work / "cross")
    write_json(args.work / "cross" / "encoder_inputs.json", {"role": "cross", "pair_tokens": 160})


# ---------------------------------------------------------------- rows
def gemm(args):
    n = 512 if args.tiny else 8192
    for kind in ("fp32", "tf32", "bf16", "fp16"):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = DTYPES.get(kind, torch.float32)
        a_nn, b_nn = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
        spent = turns({kind: lambda a=a_nn, b=b_nn: [a @ b for _ in range(10)]}, args)[kind]
        torch.backends.cuda.matmul.allow_tf32 = False
        args.peak[kind] = 10 * 2 * n**3 / statistics.median(spent)
        print(f"{kind}: {spread([10 * 2 * n**3 / s / 1e12 for s in spent], 1)} TFLOP/s")


def encode(args):
    encoder = load_encoder(args.work / "doc_encoder", "passage").to(args.device).eval()
    half = copy.deepcopy(encoder).bfloat16()
    some = np.linspace(0, len(args.corpus) - 1, 256 if args.tiny else 8192).astype(int).tolist()
    natural = [args.corpus[row] for row in some]
    triples = zip(natural, natural[1:] + natural[:1], natural[2:] + natural[:2], strict=True)
    full = [a._replace(text=f"{a.text} {b.text} {c.text}") for a, b, c in triples]
    sizes = (32,) if args.tiny else (64, 256, 512)
    theirs = sentence_encoder(args)
    for label, passages in (("texts as they are", natural), ("texts that fill 256 tokens", full)):
        lengths = [len(ids) for ids in tokenize_passages(encoder, passages)]
        few = passages[::8]  # the slow ways get an eighth
        works = {}
        bf16, fp16 = autocast_of(args, "bf16"), autocast_of(args, "fp16")
        works["nanoDPR's way, fp32"] = partial(nano_dpr, encoder, few)
        works["nanoDPR's way, bf16"] = partial(nano_dpr, encoder, few, bf16)
        works["ours, fp32, batch 256"] = partial(ours, encoder, few, 256)
        for size in sizes:
            works[f"ours, bf16, batch {size}"] = partial(ours, encoder, passages, size, autocast=bf16)
        works["ours, fp16, batch 256"] = partial(ours, encoder, passages, 256, autocast=fp16)
        works["ours, bf16 weights, batch 256"] = partial(ours, half, passages, 256)
        if theirs:
            texts = [(passage.title, passage.text) for passage in passages]
            quiet = {"batch_size": 256, "show_progress_bar": False}
            works["sentence-transformers, bf16, 256"] = partial(theirs.encode, texts, **quiet)
        works["tokenising alone"] = partial(tokenize_passages, encoder, passages)
        seconds = turns(works, args)
        mine = [name for name in works if "ours, bf16" in name]
        best = min(mine, key=lambda name: statistics.median(seconds[name]))  # noqa: B023
        print(f"{label}: {len(passages)} passages, {sum(lengths) / len(lengths):.0f} tokens on average")
        for name, spent in seconds.items():
            slow = "fp32" in name or "nanoDPR" in name
            spent = [8 * s for s in spent] if slow else spent
            read = np.repeat(lengths[::8], 8)[: len(lengths)] if slow else lengths
            flop = sum(useful_flop(encoder, n) for n in read) / statistics.median(spent)
            kind = next((kind for kind in DTYPES if kind in name), "bf16")
            note = f"{flop / 1e12:7.1f} useful TFLOP/s"
            note += f" = {flop / args.peak[kind]:.2f} of the peak" if args.peak else ""
            note = "" if name.startswith("tokenising") else note
            rate = spread([len(passages) / s for s in spent], 0)
            print(f"  {name:34} {rate:>26}/s  best ours is {ratios(spent, seconds[best]):>22} x  {note}")


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
        given = SimpleNamespace(
            model=str(args.work / "bert"), shared=shared, autocast=autocast_of(args, kind)
        )
        given.chunk, given.device = args.chunk, args.device
        model, gradient = bench_train.make_way(name, given, rows, args.corpus)
        optimizer, at = torch.optim.AdamW(model.to(args.device).train().parameters(), lr=1e-5), [0]

        def step():
            batch = bench_train.examples_of(rows, args.corpus, at[0], size)
            at[0] += size
            gradient(*batch)
            if at[0] == size:  # trap: autocast may remember a weight's cast from a pass without gradients
                idle = [n for n, p in model.named_parameters() if p.grad is None and "pooler" not in n]
                assert not idle, f"{name}: no gradient for {len(idle)} weights, such as {idle[0]}"
            clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return size, stepper


def train(args):
    size, stepper = prepare_steps(args)

    def compare(chosen, size):
        steps, memory = {}, {}
        for key in chosen:
            try:
                step = stepper(*key, size)
                step()  # AdamW's two states
                memory[key], steps[key] = peak_of(step, args.device)[1], step
            except (ImportError, AttributeError, TypeError, RuntimeError) as error:
                fault = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                print(f"  {', '.join(key)}: not run: {fault}")
        print(f"  {size} questions, a positive and a negative each, chunk {args.chunk}")
        seconds = turns(steps, args, before=3)  # the first ones also fill torch's store of memory
        mine = next(key for key in list(steps)[::-1] if key[0].startswith("ours"))
        for key, spent in seconds.items():
            rate, times = spread([size / s for s in spent], 1), ratios(spent, seconds[mine])
            print(f"  {', '.join(key):36} {rate:>24} questions/s, {mine[0]} is {times} x", end="")
            print(f", {memory[key]:.1f} GB beside weights and AdamW")

    kinds = [(name, "bf16") for name in bench_train.WAYS]
    compare(kinds[:3], size)
    compare(kinds[3:], args.cached)


def recipe(args):
    size, stepper = prepare_steps(args)
    cases = [(name, kind, size) for name in ("ours", "ours, grad_cache") for kind in ("fp32", "bf16")]
    for name, kind, n in [*cases, ("ours, grad_cache", "bf16", args.big)]:
        shared = n > size
        what = f"{name}, {kind}, {n} questions, {'one shared tower' if shared else 'two towers'}"
        try:
            step = stepper(name, kind, n, shared)
            step()  # AdamW's two states
            peak, _ = peak_of(step, args.device)
            spent = turns({name: step}, args)[name]
            print(f"  {what}: {spread([n / s for s in spent], 1)} questions/s, {peak:.1f} GB")
        except torch.OutOfMemoryError as error:
            print(f"  {what}: {str(error).splitlines()[0]}")
        step = None  # its weights make place for those of the next case


def search(args):
    D, chunk = 768, 1000 if args.tiny else 1_000_000
    N, k = args.passages, 100
    resident_ND = torch.empty(N, D, dtype=torch.float16, device=args.device)
    shards = []
    torch.manual_seed(0)
    for at in range(0, N, chunk):
        x_nD = torch.randn(min(chunk, N - at), D, device=args.device)
        resident_ND[at : at + chunk] = x_nD / x_nD.norm(dim=1, keepdim=True)
        shards.append(resident_ND[at : at + chunk].cpu().numpy())
        del x_nD
    rescored, real = [], search_module.rescore

    def timed_rescore(*given):
        wait(args.device)
        began = time.perf_counter()
        results = real(*given)
        rescored.append(time.perf_counter() - began)
        return results

    for Q in (1, 32, 3610):
        q_QD = torch.randn(Q, D, device=args.device)
        q_QD /= q_QD.norm(dim=1, keepdim=True)
        questions, found = q_QD.cpu().numpy(), {}

        def product(q_QD=q_QD):
            for at in range(0, N, 1 << 18):
                q_QD @ resident_ND[at : at + (1 << 18)].float().T

        def resident(questions=questions, found=found):
            found["resident"] = exact_topk(questions, shards, k, resident_ND=resident_ND)

        def sent(questions=questions, found=found):
            found["sent"] = exact_topk(questions, shards, k, device=args.device)

        works = {"bare product, fp32": product, "ours, resident": resident}
        works |= {"ours, sent by blocks": sent} if Q > 32 else {}
        rescored.clear()
        with patch.object(search_module, "rescore", timed_rescore):
            seconds = turns(works, args, before=Q <= 32)
        print(f"{N:,} x {D} fp16, {Q} questions, k = {k}")
        for name, spent in seconds.items():
            times = f", {ratios(seconds['bare product, fp32'], spent)} of the product's rate"
            print(f"  {name:22} {spread(spent, 3)} s{times}")
        print(f"  exact scores and order, on the CPU: {spread(rescored, 3)} s of each")
        if "sent" in found:
            assert all((a == b).all() for a, b in zip(*found.values(), strict=True))
            print("  resident and sent: the same bits")


def rerank(args):
    cross = load_cross_encoder(args.work / "cross").to(args.device)
    questions = [row["question"] for row in read_questions(args.train)]
    n = 256 if args.tiny else 4096
    pairs = [(questions[i % len(questions)], args.corpus[i % len(args.corpus)]) for i in range(n)]
    cast = autocast_of(args, "bf16")
    works = {"ours, bf16": lambda: probabilities(cross, tokenize_pairs(cross, pairs), 256, cast)}
    try:
        from sentence_transformers import CrossEncoder

        peer = CrossEncoder(str(args.work / "cross"), max_length=160, device=args.device)
        peer.bfloat16()
        texts = [(question, f"{passage.title} {passage.text}") for question, passage in pairs]
        quiet = {"batch_size": 256, "show_progress_bar": False}
        works["sentence-transformers, bf16"] = partial(peer.predict, texts, **quiet)
    except ImportError:
        print("sentence-transformers is not installed")
    seconds = turns(works, args)
    for name, spent in seconds.items():
        rate = spread([n / s for s in spent], 0)
        print(f"  {name:30} {rate} pairs/s, ours is {ratios(spent, seconds['ours, bf16'])} x")


ROWS = {row.__name__: row for row in (gemm, encode, train, recipe, rerank, search)}


def main():
    options = parser(__doc__)
    options.add_argument("--bert_tokenizer", required=True)
    options.add_argument("--corpus", required=True)
    options.add_argument("--train", required=True, help="questions with answers and positives")
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options.add_argument("--passages", type=int, default=21_000_000)
    options.add_argument("--chunk", type=int, default=256, help="passages in a pass; questions: twice")
    options.add_argument("--cached", type=int, default=512, help="questions with a gradient cache")
    options.add_argument("--big", type=int, default=2048, help="questions of the largest batch")
    options.add_argument("--tiny", action="store_true")
    options.set_defaults(repeat=3)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.passages, args.big, args.cached = min(args.passages, 5000), 16, 16
    elif args.device == "cpu":
        sys.exit("error: there is no GPU; --tiny runs anywhere")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    args.corpus, args.peak, failed = Corpus(args.corpus), {}, []
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        make_models(args)
        for row in args.rows:
            print(f"\n== {row}", flush=True)
            began = time.perf_counter()
            try:
                ROWS[row](args)
            except Exception:
                traceback.print_exc()
                failed.append(row)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            print(f"-- {row}: {time.perf_counter() - began:.1f} s in all", flush=True)
    sys.exit(f"error: failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
