"""
The bits of every script: toy runs of all stages with 1 and 2 processes, a sha256 of each thing they wrote.

Run: python -m tests.golden_runs new.json
     python -m tests.golden_runs old.json --tree ../another_checkout --against new.json
A refactoring is right when two checkouts give the same file on the same machine. Seconds are not compared,
nor the `pair` ids, which name the settings.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.processes import ENVIRONMENT, flags
from tests.toy import make_world
from tests.toy_t5 import t5

# what may differ between two trees
FREE = ("pair", "seconds", "search_seconds", "refresh_seconds", "minutes")
COMMON = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.1, "save_every": 3}
COMMON |= {"mixed_precision": "no"}


def stages(world):
    """(name, processes, script, keys) in order; later stages read what earlier ones have written."""
    corpus = {"corpus": world / "corpus.tsv"}
    sets = {key: world / f"{key}.jsonl" for key in ("train", "dev")}
    test = {"questions": world / "test.jsonl"} | corpus
    dpr = sets | corpus | COMMON | {"init": world / "bert", "question_tokens": 16, "passage_tokens": 32}
    dpr |= {"question_chunk": 3, "passage_chunk": 4, "gradient_scale": 1.0}
    cross = sets | corpus | COMMON | {"init": world / "bert", "pair_tokens": 40, "chunk": 5}
    runs = {"train_run": world / "found_train.run", "dev_run": world / "found_dev.run"}
    reader = sets | corpus | COMMON | runs | {"init": world / "bert", "reader_tokens": 48, "train_depth": 12}
    reader |= {"gold": "", "passages_per_question": 4, "test_depth": 6}
    reader |= {"question_chunk": 3, "passage_chunk": 5}
    emdr2 = sets | corpus | COMMON | {"batch_size": 6, "reader": world / "t5", "top_k": 4, "temperature": 0.0}
    emdr2 |= {"reader_tokens": 48, "answer_tokens": 6}
    emdr2 |= {"question_chunk": 4, "passage_chunk": 5, "score_chunk": 3}
    emdr2 |= {key: world / key for key in ("query_encoder", "doc_encoder")}
    emdr2 |= {"embeddings": world / "vectors"}
    emdr2 |= {"refresh_every": 4, "encoding_batch_size": 7, "eval_batch_size": 8, "eval_every": 7}
    emdr2 |= {"gradient_checkpointing": "false", "epochs": 3}
    search = {"query_encoder": world / "query_encoder", "embeddings": world / "vectors", "k": 30}
    mine = corpus | {"questions": sets["train"], "run": world / "found_train.run"}
    mine |= {"negatives": 3, "depth": 20}
    scores, ahead = world / "scores.run", world / "lookahead.run"

    yield "bm25", 1, "-m utils.bm25", test | {"out": world / "bm25.run", "k": 30}
    for processes in (1, 2):
        keys = corpus | {"doc_encoder": world / "doc_encoder", "shard_size": 17, "batch_size": 4}
        keys |= {"out": world / f"vectors{processes}"}
        yield f"encode{processes}", processes, "doc2embedding.py", keys
    shutil.copytree(world / "vectors1", world / "vectors")
    for split in ("train", "dev", "test"):
        found = search | corpus | {"questions": world / f"{split}.jsonl", "out": world / f"found_{split}.run"}
        yield f"search_{split}", 1, "test_dpr.py", found | {"index": "stream"}
    yield "flat", 1, "test_dpr.py", search | test | {"index": "Flat", "out": world / "flat.run"}
    yield "hnsw", 1, "test_dpr.py", search | test | {"index": "HNSW8", "out": world / "hnsw.run"}
    both = {"index": "stream", "bm25_run": world / "bm25.run", "out": world / "hybrid.run"}
    yield "hybrid", 1, "test_dpr.py", search | test | both
    near = {"questions": sets["train"], "lookahead": "true", "index": "stream", "out": ahead}
    yield "lookahead", 1, "test_dpr.py", search | corpus | near
    yield "topk", 1, "mine_negatives.py", mine | {"mode": "topk", "out": world / "topk.jsonl"}
    for processes in (1, 2):
        gc = {"grad_cache": "true", "run_dir": world / f"gc{processes}"}
        yield f"dpr{processes}", processes, "train_dpr.py", dpr | gc
        other = {"negatives": 2, "stop_after": 7, "run_dir": world / f"shared{processes}"}
        other |= {"rotate_negatives": "true", "shared_encoder": "true"}
        other |= {"token_types": "segments", "pooling": "mean"}
        yield f"shared{processes}", processes, "train_dpr.py", dpr | other
        push = {"adversarial_epsilon": 0.5, "run_dir": world / f"cross{processes}"}
        yield f"cross{processes}", processes, "train_cross_encoder.py", cross | push
        for name, keys in (("reader", reader), ("emdr2", emdr2)):
            keys = keys | {"run_dir": world / f"{name}{processes}"}
            yield f"{name}{processes}", processes, f"train_{name}.py", keys
    for name, keys in (("kl", {"retriever_loss": "kl"}), ("fid", {"retriever_loss": "none"})):
        yield name, 1, "train_emdr2.py", emdr2 | keys | {"run_dir": world / name}
    sequence = {"marginal": "sequence", "refresh": "none", "run_dir": world / "sequence"}
    yield "sequence", 1, "train_emdr2.py", emdr2 | sequence
    judge = {"cross_encoder": world / "cross1/cross_encoder", "ranking": mine["run"], "depth": 10}
    yield "rerank", 1, "rerank.py", judge | {"questions": sets["train"], "block": 7, "out": scores} | corpus
    gate = {"scores": scores, "negative_below": 0.293, "positive_above": 0.297}
    for mode, keys in (("denoise", {"fill": "true"}), ("pseudo_label", {})):
        keys = mine | gate | keys | {"mode": mode, "out": world / f"{mode}.jsonl"}
        yield mode, 1, "mine_negatives.py", keys
    tele = {"mode": "teleport", "lookahead_run": ahead, "momentum": world / "topk.jsonl"}
    yield "teleport", 1, "mine_negatives.py", mine | tele | {"out": world / "teleport.jsonl"}
    answer = test | {"ranking": world / "found_test.run"}
    for name, depth in (("reader", 6), ("emdr2", 4)):
        who = {"reader": world / f"{name}1/reader", "depth": depth, "out": world / f"{name}_answers.json"}
        yield f"{name}_answers", 1, "answer.py", answer | who


def run(tree, processes, script, keys):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    argv = [sys.executable, *(launcher if processes > 1 else []), *script.split(), *flags(keys)]
    done = subprocess.run(argv, cwd=tree, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def without(value):
    """The json value without the keys of FREE, at any depth."""
    if isinstance(value, dict):
        return {key: without(inner) for key, inner in value.items() if key not in FREE}
    return [without(inner) for inner in value] if isinstance(value, list) else value


def content(path):
    if path.suffix == ".jsonl":
        return json.dumps([without(json.loads(line)) for line in path.read_text().splitlines()]).encode()
    if path.suffix == ".json":
        return json.dumps(without(json.loads(path.read_text()))).encode()
    return path.read_bytes()


def hashes(world):
    """{path: sha256} of all that the stages wrote, but for checkpoints' state, logs and settings."""
    found = {}
    for path in sorted(path for path in world.rglob("*") if path.is_file()):
        name = str(path.relative_to(world))
        notes = path.suffix in (".txt", ".md", ".yaml", ".png", ".cfg") or path.name.endswith(".lock")
        notes |= path.name in ("state.json", "metrics.json")
        inside_checkpoint = "checkpoints" in name and ("manifest" in name or "index_encoder" in name)
        if not (notes or inside_checkpoint or "refresh" in name or ".index" in name):
            found[name] = hashlib.sha256(content(path)).hexdigest()
    return found


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("out")
    parser.add_argument("--tree", default=".", help="the checkout whose scripts are run")
    parser.add_argument("--against", default="", help="an earlier output; exit code 1 where it differs")
    parser.add_argument("--keep", default="", help="a new folder for the toy runs, kept afterwards")
    args = parser.parse_args()
    tree, folder = Path(args.tree).resolve(), args.keep or tempfile.mkdtemp(prefix="golden_runs_")
    world = make_world(Path(folder).resolve() / "world")
    t5(world)
    for name, processes, script, keys in stages(world):
        print(name, flush=True)
        run(tree, processes, script, keys)
    found = hashes(world)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(folder)
    if args.against:
        other = json.loads(Path(args.against).read_text())
        names = sorted({*found, *other})
        differ = [name for name in names if found.get(name) != other.get(name)]
        for name in differ:
            print(f"differs: {name}", "" if name in found and name in other else "(only in one)")
        print(f"{len(names) - len(differ)} of {len(names)} the same")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
