"""
Answer the questions of a ranking with a trained reader, and count exact match and F1.

An extractive reader (train_reader.py) cuts its answer out of one passage. A FiD (train_emdr2.py; Izacard and
Grave 2021) writes it from all passages. The role in encoder_inputs.json says which of the two it is.

In:   a question file, a ranking of it (test_dpr.py, rerank.py), the corpus and a reader
Out:  `out` (DPR's json); next to it .answers.json ({qid: answer}) and .metrics.json (EM, F1, intervals)
Run:  accelerate launch answer.py --reader runs/reader_nq/reader --depth 100 --out runs/reader_nq/test.json
      accelerate launch answer.py --reader runs/emdr2_nq/reader --depth 50 --out runs/emdr2_nq/test.json
Next: recipes/compare.py, which compares two .answers.json question by question
"""

import time
from pathlib import Path

from utils import fid, reader
from utils.data import Corpus, read_ranking
from utils.metrics import answer_scores, print_table, with_intervals
from utils.plumbing.config import (
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_model,
    need_out,
)
from utils.plumbing.devices import start
from utils.plumbing.files import write_json
from utils.plumbing.weights import read_inputs

# by the role in encoder_inputs.json. Another reader is a module with answer_all, answer_line and READS_ALL, a
# line here, and its role in CHOICES (utils/plumbing/weights.py)
READERS = {"reader": (reader, reader.load_reader), "fid": (fid, fid.load_fid)}
SUFFIXES = (".json", ".answers.json", ".metrics.json")  # the three files that stand for `out`


# ---------------------------------------------------------------- the reader
def load_model(path):
    """Return (the module of a reader, the reader in the folder `path`)."""
    role = read_inputs(path, "reader").get("role")
    # no role: facebook/dpr-reader-*; load_reader refuses any other one
    kind, load = READERS.get(role, READERS["reader"])
    return kind, load(path)


def depths_of(kind, cfg):
    """Return the numbers of passages from which answers are wanted, the largest last."""
    smaller = set() if kind.READS_ALL else {n for n in cfg.eval_top_docs if 0 < n < cfg.depth}
    return sorted(smaller | {cfg.depth})


# ---------------------------------------------------------------- files
def write_predictions(out, examples, depths, answers):
    """Write the three files, and print the table of EM and F1."""
    # from: DPR train_extractive_reader.py:512-536
    rows = []
    texts = {}  # the answers from all passages
    for example, predictions in zip(examples, answers, strict=True):
        row = {"question": example["question"], "gold_answers": example["answers"], "predictions": []}
        for depth, prediction in zip(depths, predictions, strict=True):
            if prediction:
                row["predictions"].append({"top_k": depth, "prediction": prediction})
        rows.append(row)
        last = predictions[-1]
        texts[example["qid"]] = last["text"] if last else ""
    metrics = with_intervals(answer_scores(examples, answers, depths))

    paths = [Path(out).with_suffix(suffix) for suffix in SUFFIXES]
    write_json(paths[0], rows)
    write_json(paths[1], texts)
    write_json(paths[2], metrics)
    print_table(metrics, paths[0].name)
    print(f"written: {', '.join(map(str, paths))}")


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/answer.yaml")
    must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"))
    at_least(cfg, 1, "depth", "max_answer_length", "batch_size")
    need_file(cfg, "questions", "ranking", "corpus")
    need_out(cfg, "out", *SUFFIXES[1:], ending=".json")
    need_model(cfg, "reader")
    accelerator = start(cfg.mixed_precision)

    # data and reader
    with accelerator.main_process_first():  # the first to open a corpus writes its index
        corpus = Corpus(cfg.corpus, cfg.corpus_format)
    examples, note = read_ranking(cfg.questions, cfg.ranking, corpus, cfg.depth, need=())
    kind, model = load_model(cfg.reader)
    model.to(accelerator.device)
    if kind is reader:
        model.max_answer_length = cfg.max_answer_length
    depths = depths_of(kind, cfg)

    # answers
    began = time.time()
    answers = kind.answer_all(model, examples, corpus, depths, cfg.batch_size, accelerator)
    rate = len(examples) / (time.time() - began)
    if accelerator.is_main_process:
        print(f"{note}\n{rate:.1f} questions/s of up to {cfg.depth} passages")
        write_predictions(cfg.out, examples, depths, answers)


if __name__ == "__main__":
    with friendly_errors():
        main()
