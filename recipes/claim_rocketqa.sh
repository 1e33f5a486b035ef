#!/usr/bin/env bash
# RocketQA's claim on real text (Qu et al. 2021): negatives that nobody checked are often right passages; a
# cross-encoder throws most of these out; a retriever that learns from the rest is better. Nothing looks at answers
# when it mines, as on MS MARCO (recipes/rocketqa_marco.sh). The answers only count what was mined, score the test
# questions, and make one arm.
#
# PARTS: start    a corpus (recipes/claim_data.py), BM25's rankings, and M_D0, which learns in batch
#        shares   M_C, its scores, the negatives of each arm -> RUN/shares.json: how many hold an answer
#        arms     four dual encoders from M_D0's weights -> RUN/ARM_seedN/test.run, all of them in RUN/ranks.json
# The arms have one config and equally many updates. They differ in the negative of a question, in M_D0's ranking:
#   none      no negative of its own, only those of the batch
#   mined     the best-ranked passage that is not the labelled one
#   gated     the best-ranked of these that M_C gives less than BELOW (RUN/gate.txt); where M_C leaves none, one that
#             it did not see (RUN/checked.jsonl is without these)
#   filtered  the best-ranked of these without an answer: what the gate could do at best
#
# DATA: a folder with corpus.tsv or corpus.tsv.gz and {train,dev,test}.jsonl, with answers and with positives as passage
# ids. All titles are blank: in nq_small a title tells the positives (docs/log.md). A recipe that was stopped continues
# where it was; other variables need another RUN. More seeds: SEEDS="1 2 3", with the same RUN.
set -euo pipefail
FROM=${DATA:-data/nq_small}
RUN=${RUN:-runs/claim_rocketqa}
PARTS=${PARTS:-start shares arms}
ARMS=${ARMS:-none mined gated filtered} SEEDS=${SEEDS:-1}
QUESTIONS=${QUESTIONS:-2000} PASSAGES=${PASSAGES:-16000}
START=${START:-data/models/tinybert-4l} CROSS_START=${CROSS_START:-$START}
CONFIG=${CONFIG:-config/train_dpr_demo.yaml}
CROSS_CONFIG=${CROSS_CONFIG:-config/train_cross_encoder_demo.yaml}
START_EPOCHS=${START_EPOCHS:-6} EPOCHS=${EPOCHS:-2} CROSS_EPOCHS=${CROSS_EPOCHS:-1}
NEGATIVES=${NEGATIVES:-1}                          # of a question in its file, each a line; M_C learns from four
DEPTH=${DEPTH:-50}                                 # passages retrieved for a training question
SCORED=${SCORED:-20}                               # so many of them are rescored by M_C
BELOW=${BELOW:-0.1}                                # M_C is sure: a negative
TEST_DEPTH=${TEST_DEPTH:-100}
FLAGS="--batch_size 32 --passage_tokens 128 --question_tokens 32 ${FLAGS:-}"
CROSS_FLAGS=${CROSS_FLAGS:-}
DATA=$RUN/data DEV=${DEV-$RUN/data/dev.jsonl} ENCODE_FLAGS=${ENCODE_FLAGS-}
LAUNCH=${LAUNCH:-python} FORMAT=auto
MEASURE=${MEASURE-python recipes/measured.py $RUN/peaks.tsv}
. "$(dirname "$0")/stage.sh"
only PARTS "start shares arms"
only ARMS "none mined gated filtered"
mkdir -p $DATA
wants() { [[ " $PARTS " = *" $1 "* ]]; }
train() { # NAME INIT FILE NEGATIVES FLAGS...: a dual encoder, its vectors, its test; the last weights count
    stage $RUN/$1/metrics.json $LAUNCH train_dpr.py --config $CONFIG --run_dir $RUN/$1 --init $2 --train $3 \
        --negatives $4 --dev "$DEV" --keep last $CORPUS --resume exact $FLAGS "${@:5}"
    encode $RUN/$1
    search $RUN/$1 $DATA/test.jsonl $TEST_DEPTH test
}

if wants start; then
    [ $START != data/models/tinybert-4l ] || stage $START python recipes/demo/prepare.py
    stage $DATA/source.tsv write $DATA/source.tsv blank_titles $FROM
    stage $DATA/corpus.tsv python recipes/claim_data.py $FROM $DATA/source.tsv $DATA $QUESTIONS $PASSAGES
    for name in train test; do bm25 $DATA $name $DATA/$name.jsonl; done
    train d0 $START $DATA/train.jsonl 0 --epochs $START_EPOCHS
fi

# The negatives. train.jsonl has no answers: of a ranking every passage but the labelled one may be taken.
mine() { # NAME QUESTIONS FLAGS...
    stage $RUN/$1.jsonl python mine_negatives.py --mode denoise --questions $2 $CORPUS --run $RUN/d0/train.run \
        --depth $DEPTH --out $RUN/$1.jsonl "${@:3}"
}
if wants shares; then
    stage $RUN/bm25.jsonl python mine_negatives.py --mode topk --questions $DATA/train.jsonl $CORPUS \
        --run $DATA/bm25_train.run --negatives $NEGATIVES --out $RUN/bm25.jsonl
    search $RUN/d0 $DATA/train.jsonl $DEPTH train
    mine c $DATA/train.jsonl --negatives 4
    stage $RUN/c/metrics.json $LAUNCH train_cross_encoder.py --config $CROSS_CONFIG --run_dir $RUN/c --dev "" \
        --init $CROSS_START --train $RUN/c.jsonl $CORPUS --epochs $CROSS_EPOCHS --resume exact $CROSS_FLAGS
    rescore $RUN/d0 $DATA/train.jsonl $SCORED train

    SCORES="--scores $RUN/d0/train_ce.run --negatives $NEGATIVES"
    [ -n "$DRY" ] || [ -f $RUN/checked.jsonl ] || write $RUN/gate.txt echo $BELOW
    [ -n "$DRY" ] || [ $BELOW = "$(cat $RUN/gate.txt)" ] || { echo "error: $RUN was mined with another BELOW: take another RUN" >&2 && exit 2; }
    mine checked $DATA/train.jsonl $SCORES --negative_below $BELOW
    mine gated $DATA/train.jsonl $SCORES --negative_below $BELOW --fill true
    mine mined $DATA/train.jsonl $SCORES --negative_below 2 --fill true
    mine filtered $DATA/train_answers.jsonl $SCORES --negative_below 2 --fill true
    stage $RUN/shares.json python recipes/false_negatives.py $RUN
fi

if wants arms; then
    for seed in $SEEDS; do
        for arm in $ARMS; do
            file=$arm negatives=1
            [ $arm != none ] || file=mined negatives=0
            train ${arm}_seed$seed $RUN/d0/query_encoder $RUN/$file.jsonl $negatives --epochs $EPOCHS --seed $seed
        done
    done
    keep_ranks d0=$RUN/d0/test.run bm25=$DATA/bm25_test.run $(arms none mined gated filtered)
fi
