#!/usr/bin/env bash
# Claims of DPR and GC-DPR at a laptop's size: which negatives, and what is a larger batch worth?
#
# Every arm starts from the same encoder (inverse cloze on the corpus) and learns from the same labelled questions:
#   inbatch  UPDATES steps of 32 questions, no hard negative
#   hard     the same with one BM25 negative a question
#   gc       as inbatch, but 128 questions a step by the gradient cache: four times as many negatives and questions
#   more     as inbatch, for as many questions as gc was shown: the control of gc
# Each is RUN/ARM_seedN; the weights of the last step count, nothing is chosen by dev. BM25 is the ranking beside them.
# The schedule of an arm is whole epochs: of the demo's 970 questions 60 steps, 240 for more,
# 63 for gc. The rate ends at 2 % of its peak, at 0.5 % for more and at 7 % for gc.
#
# A recipe that was stopped continues where it was.
set -euo pipefail
DATA=${DATA:-data/demo}                            # corpus.tsv, train.jsonl, dev.jsonl, test.jsonl
RUN=${RUN:-runs/dpr_gc}
START=${START:-data/models/tinybert-4l}
CONFIG=${CONFIG:-config/train_dpr_demo.yaml}
SEEDS=${SEEDS:-1 2 3} ARMS=${ARMS:-inbatch hard gc more}
UPDATES=${UPDATES:-60} BATCH=${BATCH:-32} GC_BATCH=${GC_BATCH:-128} DEPTH=${DEPTH:-100}
FLAGS="--passage_tokens 96 --question_tokens 32 --keep last ${FLAGS:-}"
CLOZE_FLAGS=${CLOZE_FLAGS-}
ENCODE_FLAGS=${ENCODE_FLAGS-}
LAUNCH=${LAUNCH:-python} FORMAT=${FORMAT:-auto}
. "$(dirname "$0")/stage.sh"
only ARMS "inbatch hard gc more"

[ $DATA != data/demo ] || stage $DATA/test.jsonl python recipes/demo/prepare.py
[ $START != data/models/tinybert-4l ] || stage $START python recipes/demo/prepare.py

bm25 $RUN test $DATA/test.jsonl
bm25_negatives $RUN train $DATA/train.jsonl 30
bm25_negatives $RUN dev $DATA/dev.jsonl 5

# where all arms start: sentences of the corpus, no question
stage $RUN/cloze.jsonl python recipes/demo/inverse_cloze.py $DATA/corpus.tsv $RUN/cloze.jsonl $FORMAT
stage $RUN/start/metrics.json $LAUNCH train_dpr.py --config config/train_dpr_demo_cloze.yaml --run_dir $RUN/start \
    --init $START --train $RUN/cloze.jsonl --dev "" $CORPUS --resume exact $FLAGS $CLOZE_FLAGS
encode $RUN/start
search $RUN/start $DATA/test.jsonl $DEPTH test

lines=$(lines_of $RUN/train.jsonl)
[ $lines -ge $GC_BATCH ] || { echo "error: GC_BATCH is $GC_BATCH, $lines questions have a label" >&2 && exit 2; }
train() { # NAME SEED BATCH UPDATES FLAGS...: a dual encoder, its vectors, its test
    local run=$RUN/$1_seed$2 epoch=$((lines / $3))
    stage $run/metrics.json $LAUNCH train_dpr.py --config $CONFIG --run_dir $run --init $RUN/start/query_encoder \
        --train $RUN/train.jsonl --dev $RUN/dev.jsonl $CORPUS --resume exact --seed $2 --batch_size $3 --stop_after $4 \
        --epochs $((($4 + epoch - 1) / epoch)) --eval_every $((lines / BATCH)) $FLAGS "${@:5}"
    encode $run
    search $run $DATA/test.jsonl $DEPTH test
}
for seed in $SEEDS; do
    for arm in $ARMS; do
        case $arm in
        inbatch) train inbatch $seed $BATCH $UPDATES --negatives 0 ;;
        hard) train hard $seed $BATCH $UPDATES ;;
        gc) train gc $seed $GC_BATCH $UPDATES --negatives 0 --grad_cache true ;;
        more) train more $seed $BATCH $((UPDATES * GC_BATCH / BATCH)) --negatives 0 ;;
        esac
    done
done

# the ranks of every test question, and each arm over the start
keep_ranks start=$RUN/start/test.run bm25=$RUN/bm25_test.run $(arms '*')
