#!/usr/bin/env bash
# RocketQA on MS MARCO passages (Qu et al. 2021): the steps of recipes/rocketqa_nq.sh, which is to be read first. Here
# questions have no answers, so a negative is what nobody judged relevant. Step 1 draws negatives from the whole corpus.
# Each positive gets four negatives; where M_C leaves fewer, unchecked ones from further down are added. The three
# trainings take 40, 10 and 10 epochs.
#
# Expected, MRR@10 / R@50 / R@1000 of 6,980 dev questions (README of RocketQA's released code; hit@50, hit@1000 here):
#   M_D0 33.32 / 83.95 / 97.21     M_D1 36.38 / 84.63 / 97.44     M_D2 37.02 / 85.46 / 97.85
# on 8,841,823 passages with titles, which MS MARCO's own file does not have: do not compare with numbers without them.
# Ours: not run. Time: not measured.
#
# Variables and files as in rocketqa_nq.sh; train.jsonl needs positives only. On a corpus with a header, FORMAT=auto.
DATA=${DATA:-data/msmarco}
RUN=${RUN:-runs/rocketqa_marco}
START=${START:-nghuyong/ernie-2.0-base-en}
CROSS_START=${CROSS_START:-nghuyong/ernie-2.0-large-en}
CONFIG=${CONFIG:-config/train_dpr_rocketqa_marco.yaml}
CROSS_CONFIG=${CROSS_CONFIG:-config/train_cross_encoder_marco.yaml}
DEV=${DEV:-}
DEPTH=${DEPTH:-1000}                               # passages retrieved for a training question, and for a test question
SCORED=${SCORED:-50}                               # so many of them are rescored by the cross-encoder
UNLABELLED_DEPTH=${UNLABELLED_DEPTH:-50}
BELOW=${BELOW:-0.1} ABOVE=${ABOVE:-0.9}
TRAIN_FLAGS=${TRAIN_FLAGS:-} CROSS_FLAGS=${CROSS_FLAGS:-}
ENCODE_FLAGS=${ENCODE_FLAGS---mixed_precision fp16}
LAUNCH=${LAUNCH:-accelerate launch --quiet} FORMAT=${FORMAT:-marco}
. "$(dirname "$0")/stage.sh"

# Data: recipes/marco_data.sh. From RocketQA's data (its wget_data.sh): the unlabelled questions and, if you have it,
# qrels.train.addition.tsv, positives that were found by literal match.
if [ ! -f $DATA/unlabelled.jsonl ]; then
    if [ ! -f $DATA/orcas_yahoo_nq.query.txt ]; then
        echo "$DATA/orcas_yahoo_nq.query.txt is missing: take it from RocketQA's data (its wget_data.sh)" >&2
        exit 2
    fi
    python -m prepare.convert msmarco $DATA/orcas_yahoo_nq.query.txt $DATA/unlabelled.jsonl
fi
bash recipes/marco_data.sh $DATA
EXCLUDE=
if [ -f $DATA/qrels.train.addition.tsv ]; then
    stage $DATA/additions.jsonl python -m prepare.convert msmarco $DATA/msmarco/queries.train.tsv \
        $DATA/qrels.train.addition.tsv $DATA/additions.jsonl
    EXCLUDE="--exclude $DATA/additions.jsonl"
fi

train() { # NAME EPOCHS: the dual encoder on NAME.jsonl, from START
    stage $RUN/$1/metrics.json $LAUNCH train_dpr.py --config $CONFIG --run_dir $RUN/$1 --init $START \
        --train $RUN/$1.jsonl --dev "$DEV" $CORPUS --epochs $2 --resume exact $TRAIN_FLAGS
}
evaluate() { # NAME: alone, and rescored by the cross-encoder
    encode $RUN/$1
    search $RUN/$1 $DATA/test.jsonl $DEPTH test
    rescore $RUN/$1 $DATA/test.jsonl $SCORED test
}

# Step 1. M_D0 learns from random passages and all passages of a batch of 4,096 questions.
stage $RUN/d0.jsonl python recipes/random_negatives.py $DATA/corpus.tsv $FORMAT $DATA/train.jsonl $RUN/d0.jsonl
train d0 40
encode $RUN/d0
search $RUN/d0 $DATA/train.jsonl $DEPTH train

# Step 2. M_C learns to tell a judged passage from four that are drawn from the retrieved ones.
stage $RUN/c.jsonl python mine_negatives.py --mode denoise --questions $DATA/train.jsonl $CORPUS \
    --run $RUN/d0/train.run --negatives 4 --depth $DEPTH $EXCLUDE --out $RUN/c.jsonl
teach_cross_encoder

# Step 3. M_D1's negatives: the best-ranked passages that M_C calls irrelevant.
rescore $RUN/d0 $DATA/train.jsonl $SCORED train
denoise() { # NAME BELOW
    stage $RUN/$1.jsonl python mine_negatives.py --mode denoise --questions $DATA/train.jsonl $CORPUS \
        --run $RUN/d0/train.run --scores $RUN/d0/train_ce.run --negative_below $2 --negatives 4 --fill true \
        --depth $DEPTH $EXCLUDE --out $RUN/$1.jsonl
}
denoise d1 $BELOW
train d1 10
encode $RUN/d1

# Step 4. M_D2: what M_C is sure of in M_D1's ranking of unlabelled questions is added to step 3's file.
pseudo_labels 4
train d2 10

evaluate d0
evaluate d1
evaluate d2

# Optional: M_D1 without denoising: every score passes. The paper's point is that this hurts.
if [ "${ABLATION:-false}" = true ]; then
    denoise d1_raw 2
    train d1_raw 10
    evaluate d1_raw
fi
