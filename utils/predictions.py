"""What the two readers, extractive and FiD, agree on: how answers are scored, and the files they go to."""

from pathlib import Path

from utils.metrics import answer_scores, print_table, with_intervals
from utils.plumbing.config import UserError, need_out
from utils.plumbing.files import write_json


def need_predictions_out(cfg, *inputs):
    """UserError where the three files that stand for `out` cannot be written, or would replace an input."""
    if Path(cfg.out).suffix != ".json":
        raise UserError(f"out must be the path of a .json file, got {cfg.out!r}")
    for suffix in (".json", ".answers.json", ".metrics.json"):
        need_out(type(cfg)(**vars(cfg) | {"out": str(Path(cfg.out).with_suffix(suffix))}), "out", *inputs)


def write_predictions(out, examples, answers, top_docs):
    """
    DPR's layout (train_extractive_reader.py:512-536) in `out`; {qid: answer} in .answers.json; EM and F1 with
    their intervals in .metrics.json and on the screen.
    """
    rows = [
        {
            "question": example["question"],
            "gold_answers": example["answers"],
            "predictions": [
                {"top_k": n, "prediction": one} for n, one in zip(top_docs, predictions, strict=True) if one
            ],
        }
        for example, predictions in zip(examples, answers, strict=True)
    ]
    write_json(out, rows)
    texts = [predictions[-1]["text"] if predictions[-1] else "" for predictions in answers]
    qids = [example["qid"] for example in examples]
    path = Path(out)
    write_json(path.with_suffix(".answers.json"), dict(zip(qids, texts, strict=True)))
    metrics = with_intervals(answer_scores(examples, answers, top_docs))
    write_json(path.with_suffix(".metrics.json"), metrics)
    print_table(metrics, path.name)
    print(f"written: {path}, {path.with_suffix('.answers.json')}, {path.with_suffix('.metrics.json')}")
