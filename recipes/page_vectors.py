"""
Pictures of vectors for recipes/page.py: a question and passages around it in a plane, by several encoders.

The passages are its gold passage, negatives as DPR mines them, and the first ones of each encoder's ranking.
The plane is the same for all encoders, so that one sees the question move.

Q questions · N points of a picture · D dimensions · E encoders
"""

import numpy as np

from utils.metrics import first_rank, gold_ids
from utils.plumbing.files import read_json

PICTURES, NEIGHBOURS = 24, 8  # questions with a picture; passages of each ranking in it
NEGATIVES = 6  # of a question


def vectors_of(folder, questions, pids, corpus):
    """Return (vectors of questions [Q, D], of passages [N, D]) by the encoders of a folder."""
    # why imported here: torch takes seconds
    from utils.encoder import embed, tokenize_passages, tokenize_questions
    from utils.plumbing.embeddings import open_embeddings
    from utils.plumbing.weights import load_encoder
    from utils.search import fetch

    asking = load_encoder(folder / "query_encoder", "question")
    q_QD = embed(asking, tokenize_questions(asking, [question["question"] for question in questions]), 32)
    manifest = folder / "embeddings" / "manifest.json"
    if manifest.is_file() and read_json(manifest)["complete"]:
        shards, _ = open_embeddings(manifest.parent, corpus.sha256, False, rows=len(corpus))
        return q_QD, fetch(shards, np.array([corpus.row(pid) for pid in pids])).astype(np.float32)
    reading = load_encoder(folder / "doc_encoder", "passage")
    return q_QD, embed(reading, tokenize_passages(reading, [corpus.passage(pid) for pid in pids]), 32)


def plane_of(vectors_END):
    """
    Return (places [E, N, 2], share [E]): the vectors of every encoder in one plane, and how much of their
    variance lies in it. Each encoder's cloud is centred first; the two axes are those of all clouds together.
    """
    centred_END = vectors_END - vectors_END.mean(1, keepdims=True)
    _, _, axes_DD = np.linalg.svd(centred_END.reshape(-1, centred_END.shape[2]), full_matrices=False)
    places_EN2 = centred_END @ axes_DD[:2].T
    return places_EN2, (places_EN2**2).sum((1, 2)) / (centred_END**2).sum((1, 2))


def kinds_of(question, bm25, rankings, shelf, regex):
    """Return {pid: gold, negative, or the encoder that found it} of the passages in a question's picture."""
    qid, gold = question["qid"], list(gold_ids(question))
    kinds = {gold[0]: "gold"}
    for pid in bm25.get(qid, ()):
        right = pid in gold or (question["answers"] and shelf.holds(pid, question["answers"], regex))
        if not right and len(kinds) <= NEGATIVES:
            kinds[pid] = "negative"
    for name, ranking in rankings.items():
        for pid in list(ranking.get(qid, ()))[:NEIGHBOURS]:
            kinds.setdefault(pid, name)
    return kinds


def pictures_of(encoders, bm25, questions, shelf, regex):
    """
    Return {"encoders", "missing", "questions"} of some questions.

    encoders: [(name, folder, ranking), ...]; those without weights are missing. A ranking is
    {qid: {pid: score}}. bm25: the ranking that negatives are taken from. shelf: the page's passages.
    """
    there = [entry for entry in encoders if (entry[1] / "query_encoder").exists()]
    missing = [entry[0] for entry in encoders if entry not in there]
    pictures = {"encoders": [name for name, *_ in there], "missing": missing, "questions": []}
    questions = [question for question in questions if gold_ids(question)][:PICTURES]
    if not there or not questions:
        return pictures

    # the passages of every question, and all vectors
    rankings = {name: ranking for name, _, ranking in there}
    kinds = [kinds_of(question, bm25, rankings, shelf, regex) for question in questions]
    row_of = {pid: row for row, pid in enumerate(dict.fromkeys(pid for kind in kinds for pid in kind))}
    vectors = [vectors_of(folder, questions, list(row_of), shelf.corpus) for _, folder, _ in there]

    # a plane for each question
    for place, (question, kind) in enumerate(zip(questions, kinds, strict=True)):
        rows = [row_of[pid] for pid in kind]
        cloud_END = np.stack([np.concatenate([q_QD[[place]], p_ND[rows]]) for q_QD, p_ND in vectors])
        plane_EN2, share_E = plane_of(cloud_END.astype(np.float64))
        picture = {"qid": question["qid"], "text": question["question"], "kinds": list(kind.values())}
        picture |= {"passages": [shelf.number(pid) for pid in kind], "share": share_E.round(2).tolist()}
        picture |= {"places": plane_EN2.round(3).tolist(), "goldRanks": []}
        for ranking in rankings.values():
            rank = first_rank(pid in gold_ids(question) for pid in ranking.get(question["qid"], ()))
            picture["goldRanks"].append(rank if ranking else None)
        pictures["questions"].append(picture)
    return pictures
