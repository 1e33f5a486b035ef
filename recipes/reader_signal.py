"""
What a FiD reader could teach a retriever: how much of its belief lies on passages that hold the answer?

For questions of whose K best passages some, but not all, hold an answer: the share of the retriever's prior
on those that do, and of EMDR2's posteriors (train_emdr2.py), which the retriever is drawn to. A signal
without content leaves the shares where the prior has them. `batch` writes the beliefs themselves, of the
first of these questions, before and after a training, for recipes/page.py.

In:  a ranking (test_dpr.py) of questions with answers, the corpus, any T5 or a reader of train_emdr2.py
Out: a json, each with interval and n: "prior", "token", "sequence", "kl", the mean shares; "likeliest", how
     often the passage that makes the answer likeliest holds it; "by_chance", the share of such passages.
     batch: [{"qid", "passages": K ids that the first ranking found, "before", "after"}], the last two with
     "prior" and "posterior" (of the token loss), [K] each
Run: python -m recipes.reader_signal CORPUS QUESTIONS RANKING READER OUT.json
     python -m recipes.reader_signal batch CORPUS QUESTIONS RANKING READER RANKING_AFTER READER_AFTER OUT.json
"""

import sys

import torch

from utils import fid
from utils.data import Corpus, read_questions, read_run
from utils.metrics import with_intervals
from utils.plumbing.config import UserError, friendly_errors
from utils.plumbing.files import write_json
from utils.text import has_answer

TOP_K, LENGTHS = 8, {"reader_tokens": 112, "answer_tokens": 12}
BATCH = 16  # questions


def posteriors(log_prior_K, log_likelihood_KT):
    """Return {name: [K]}: what the retriever believed, and what each loss of train_emdr2.py draws it to."""
    # token: the mean over the answer's tokens of a posterior each; sequence: one, of the whole answer
    token_KT = (log_prior_K[:, None] + log_likelihood_KT).softmax(0)
    whole_K = log_likelihood_KT.sum(1)
    return {
        "prior": log_prior_K.exp(),
        "token": token_KT.mean(1),
        "sequence": (log_prior_K + whole_K).softmax(0),
        "kl": log_likelihood_KT.mean(1).softmax(0),
    }


def shares(log_prior_K, log_likelihood_KT, holds_K):
    """Return {name: share of the belief on passages that hold an answer} of one question."""
    holds_K = torch.tensor(holds_K)
    beliefs = posteriors(log_prior_K, log_likelihood_KT)
    found = {name: float(p_K[holds_K].sum()) for name, p_K in beliefs.items()}
    likeliest = int(log_likelihood_KT.sum(1).argmax())
    return found | {"likeliest": float(holds_K[likeliest]), "by_chance": float(holds_K.float().mean())}


def read(reader, question, passages):
    """Return log p(answer | question, passage k alone) [K, T], without dropout, of the first answer."""
    ids = fid.tokenize_contexts(reader, question["question"], passages)
    labels_1T = fid.tokenize_answers(reader, question["answers"][:1])
    with torch.no_grad():
        hidden_KLD, mask_KL = fid.encode_contexts(reader, ids, len(passages))
    return fid.document_log_likelihood(reader, hidden_KLD[None], mask_KL[None], labels_1T, len(passages))[0]


def open_questions(questions, rankings, corpus):
    """Yield (question, ids, passages, whether each holds an answer) where some of the best do, not all."""
    for question in questions:
        pids = [pid for pid, _ in rankings.get(question["qid"], [])[:TOP_K]]
        passages = [corpus.passage(pid) for pid in pids]
        holds_K = [has_answer(passage.text, question["answers"]) for passage in passages]
        if any(holds_K) and not all(holds_K):
            yield question, pids, passages, holds_K


def log_prior(rankings, question, pids):
    """Return [K]: the log of the retriever's belief in these passages, at temperature 1."""
    scores = dict(rankings[question["qid"]])
    return torch.tensor([scores[pid] for pid in pids]).log_softmax(0)


def main(corpus, questions, ranking, reader, out):
    corpus, questions, rankings = Corpus(corpus), read_questions(questions, match="string"), read_run(ranking)
    reader = fid.load_fid(reader, LENGTHS).eval()
    values = {}
    for question, pids, passages, holds_K in open_questions(questions, rankings, corpus):
        log_KT = read(reader, question, passages)
        for name, share in shares(log_prior(rankings, question, pids), log_KT, holds_K).items():
            values.setdefault(name, []).append(share)
    if not values:
        raise UserError(
            f"{ranking}: no question of whose best {TOP_K} passages some, but not all, hold an answer"
        )
    metrics = with_intervals(values)
    write_json(out, metrics)
    for name, m in metrics.items():
        print(
            f"{name:10} {100 * m['value']:5.1f} ({100 * m['low']:.1f} to {100 * m['high']:.1f}), n = {m['n']}"
        )


def batch(corpus, questions, ranking, reader, ranking_after, reader_after, out):
    corpus, questions = Corpus(corpus), read_questions(questions, match="string")
    rankings = {"before": read_run(ranking), "after": read_run(ranking_after)}
    readers = {"before": reader, "after": reader_after}
    readers = {name: fid.load_fid(path, LENGTHS).eval() for name, path in readers.items()}
    rows = []
    for question, pids, passages, _ in open_questions(questions, rankings["before"], corpus):
        if len(rows) == BATCH:
            break
        # a passage that fell out of the second ranking has no score there
        if not {*pids} <= {*dict(rankings["after"].get(question["qid"], []))}:
            continue
        row = {"qid": question["qid"], "passages": pids}
        for name, model in readers.items():
            log_KT = read(model, question, passages)
            beliefs = posteriors(log_prior(rankings[name], question, pids), log_KT)
            beliefs = {"prior": beliefs["prior"], "posterior": beliefs["token"]}
            row[name] = {key: [round(p, 4) for p in p_K.tolist()] for key, p_K in beliefs.items()}
        rows.append(row)
    write_json(out, rows)
    print(f"written: {out}, {len(rows)} questions")


if __name__ == "__main__":
    with friendly_errors():
        arguments = sys.argv[1:]
        if arguments[:1] == ["batch"] and len(arguments) == 8:
            batch(*arguments[1:])
        elif len(arguments) == 5:
            main(*arguments)
        else:
            usage = "CORPUS QUESTIONS RANKING READER [RANKING_AFTER READER_AFTER] OUT.json"
            raise UserError(f"usage: python -m recipes.reader_signal [batch] {usage}")
