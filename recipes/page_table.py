"""
Write the table.json that recipes/page.py reads, of a run whose recipe makes no table of its own.

In:  a run folder, its data folder, NAME=FILE pairs: rankings (.run) and answers (.answers.json); paths in RUN
Out: RUN/table.json, a row a pair; each is measured against the first, which is a ranking
Run: python recipes/page_table.py runs/emdr2_alone data/demo start=start/test.run token=token_seed1/test.run
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.compare import per_question  # noqa: E402
from utils.data import Corpus, read_questions  # noqa: E402
from utils.metrics import with_intervals  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import write_text  # noqa: E402


def main(run, data, *pairs):
    run, data = Path(run), Path(data)
    questions, corpus = read_questions(data / "test.jsonl", match="string"), Corpus(data / "corpus.tsv")
    rows, pictures = [], []
    for pair in pairs:
        name, _, path = pair.partition("=")
        metrics = with_intervals(per_question(run / path, questions, corpus))
        ranks = not path.endswith(".answers.json")
        row = {"key": name, "name": name, "system": "", "ranking": path if ranks else ""}
        row |= {"answers": "" if ranks else path, "metrics": metrics}
        rows.append(row | {"minutes_in_all": None, "updates": None})
        folder = Path(path).parent
        if (run / folder / "query_encoder").exists() and len(pictures) < 3:
            pictures.append((name, str(folder), path))
    first, *others = [row["key"] for row in rows if row["ranking"]]
    table = {"rows": rows, "notes": [], "seeds": {}, "pictures": pictures}
    table["pairs"] = [(name, first) for name in others]
    write_text(run / "table.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) < 4 or not all("=" in pair for pair in sys.argv[3:]):
            raise UserError("usage: python recipes/page_table.py RUN DATA NAME=FILE [NAME=FILE ...]")
        main(*sys.argv[1:])
