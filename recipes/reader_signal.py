"""
What a FiD reader could teach a retriever: how much of its belief lies on passages that hold the answer?

For questions of whose K best passages some, but not all, hold an answer: the share of the retriever's prior
on those that do, and of EMDR2's posteriors (train_emdr2.py), which the retriever is drawn to. A signal
without content leaves the shares where the prior has them.

In:  a ranking (test_dpr.py) of questions with answers, the corpus, any T5 or a reader of train_emdr2.py
Out: a json, each with interval and n: "prior", "token", "sequence", "kl", the mean shares; "likeliest", how
     often the passage that makes the answer likeliest holds it; "by_chance", the share of such passages
Run: python -m recipes.reader_signal CORPUS QUESTIONS RANKING READER OUT.json
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
    found = {
        name: float(p_K[holds_K].sum()) for name, p_K in posteriors(log_prior_K, log_likelihood_KT).items()
    }
    likeliest = int(log_likelihood_KT.sum(1).argmax())
    return found | {"likeliest": float(holds_K[likeliest]), "by_chance": float(holds_K.float().mean())}


def main(corpus, questions, ranking, reader, out):
    corpus, questions, rankings = Corpus(corpus), read_questions(questions, match="string"), read_run(ranking)
    reader = fid.load_fid(reader, LENGTHS).eval()
    values = {}
    for question in questions:
        hits = rankings.get(question["qid"], [])[:TOP_K]
        passages = [corpus.passage(pid) for pid, _ in hits]
        holds_K = [has_answer(passage.text, question["answers"]) for passage in passages]
        if all(holds_K) or not any(holds_K):
            continue
        # log p(answer | question, passage k alone), without dropout
        ids = fid.tokenize_contexts(reader, question["question"], passages)
        labels_1T = fid.tokenize_answers(reader, question["answers"][:1])
        with torch.no_grad():
            hidden_KLD, mask_KL = fid.encode_contexts(reader, ids, TOP_K)
        log_1KT = fid.document_log_likelihood(reader, hidden_KLD[None], mask_KL[None], labels_1T, TOP_K)
        log_prior_K = torch.tensor([score for _, score in hits]).log_softmax(0)
        for name, share in shares(log_prior_K, log_1KT[0], holds_K).items():
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


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 6:
            raise UserError("usage: python -m recipes.reader_signal CORPUS QUESTIONS RANKING READER OUT.json")
        main(*sys.argv[1:])
