"""
Other people's files become ours, and ours theirs. All is streamed: DPR's json is 7 GB.

Run: python -m prepare.convert FORMAT IN... OUT
into a question file (--ids: passages by id, not by text):
  dpr_json          biencoder-nq-train.json          OUT     DPR's training json, or jsonl; --ids
  dpr_qa            nq-test.qa.csv                   OUT     question \\t python list of answers
  nq_open           NQ-open.dev.jsonl                OUT     {"question", "answer": [...]}
  msmarco           queries.train.tsv [qrels.tsv]    OUT     without qrels: unlabelled questions
  beir              queries.jsonl [qrels/test.tsv]   OUT
  rocketqa          data_train/nq_de1_denoise.tsv    OUT     six columns, one line a negative
  rocketqa_answers  test.query.txt test.answers.txt  OUT     RocketQA's NQ
  ance_tele         nq-train-qrels.jsonl             OUT     ANCE-Tele's questions with positives; --ids
  ance_tele_hn      split*.hn.json vocab.txt         OUT     its negatives, which are token ids of BERT
  tevatron          train.jsonl                      OUT     {"query_id", "positive_passages", ...}; --ids
into a corpus or vectors:
  vectors           FILES corpus.tsv                 FOLDER  DPR's .pkl or nanoDPR's .npy -> embeddings
into a ranking:
  from_trec         run.trec                         OUT     sorted as trec_eval sorts it
  from_dpr_result   result.json                      FOLDER  of DPR, FiD (or jsonl), Pyserini:
                                                             questions.jsonl, corpus.jsonl, result.run
  rocketqa_scores   res.top50 scores.txt             OUT     one score of a cross-encoder a line
from ours:
  trec              test.run                         OUT     TREC's six columns, for trec_eval
  dpr_result        test.run test.jsonl corpus.tsv   OUT     DPR's result json, which its reader reads
  to_dpr_json       train.jsonl [corpus.tsv]         OUT     DPR's training json
  to_dpr_qa         test.jsonl                       OUT     DPR's question \\t list of answers
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from prepare import questions, rankings
from utils.plumbing.config import UserError, friendly_errors, need_file, need_folder, need_out

MANY = tuple(range(2, 1000))
RESULT = ("questions.jsonl", "corpus.jsonl", "result.run")  # what from_dpr_result writes


class Format(NamedTuple):
    convert: object  # a function; one for questions yields entries, another takes the paths and OUT
    inputs: tuple = (1,)  # how many files it takes
    questions: bool = False
    folder: bool = False  # whether OUT is a folder
    ids: bool = False  # whether --ids is for it


def from_vectors(*paths):
    from prepare.vectors import from_vectors  # why here: it loads torch, which takes seconds

    from_vectors(*paths)


FORMATS = {
    "dpr_json": Format(questions.from_training, questions=True, ids=True),
    "dpr_qa": Format(questions.from_dpr_qa, questions=True),
    "nq_open": Format(questions.from_nq_open, questions=True),
    "msmarco": Format(questions.from_msmarco, (1, 2), questions=True),
    "beir": Format(questions.from_beir, (1, 2), questions=True),
    "rocketqa": Format(questions.from_rocketqa, questions=True),
    "rocketqa_answers": Format(questions.from_rocketqa_answers, (2,), questions=True),
    "ance_tele": Format(questions.from_ance_tele, questions=True, ids=True),
    "ance_tele_hn": Format(questions.from_ance_tele_hn, MANY, questions=True),
    "tevatron": Format(questions.from_tevatron, questions=True, ids=True),
    "vectors": Format(from_vectors, MANY, folder=True),
    "from_trec": Format(rankings.from_trec),
    "from_dpr_result": Format(rankings.from_dpr_result, folder=True),
    "rocketqa_scores": Format(rankings.from_rocketqa_scores, (2,)),
    "trec": Format(rankings.to_trec),
    "dpr_result": Format(rankings.to_dpr_result, (3,)),
    "to_dpr_json": Format(questions.to_dpr_json, (1, 2)),
    "to_dpr_qa": Format(questions.to_dpr_qa),
}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m prepare.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT")
    parser.add_argument("files", nargs="+", metavar="IN... OUT")
    parser.add_argument("--ids", action="store_true", help="passages by id, not by text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv or ["--help"])

    # refuse wrong arguments before any work
    *inputs, out = args.files
    chosen = FORMATS[args.format]
    if len(inputs) not in chosen.inputs:
        allowed = "2 or more" if chosen.inputs == MANY else " or ".join(map(str, chosen.inputs))
        raise UserError(f"{args.format} takes {allowed} input files and OUT")
    if args.ids and not chosen.ids:
        with_ids = ", ".join(name for name, known in FORMATS.items() if known.ids)
        raise UserError(f"--ids belongs to {with_ids}")
    for path in inputs:
        paths = argparse.Namespace(IN=path, OUT=out)
        if chosen.folder:
            need_folder(paths, "OUT")
            if Path(path).name in RESULT and Path(path).resolve().parent == Path(out).resolve():
                raise UserError(f"OUT: {path} would be overwritten; name another folder")
        else:
            need_out(paths, "OUT")
        need_file(paths, "IN")

    if chosen.questions:
        options = {"ids": True} if args.ids else {}
        counts = Counter()
        entries = chosen.convert(*inputs, counts=counts, **options)
        questions.write_questions(out, inputs[0], entries, counts)
    else:
        chosen.convert(*inputs, out)
        print(f"written: {out}")


if __name__ == "__main__":
    with friendly_errors():
        main()
