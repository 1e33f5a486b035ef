#!/usr/bin/env bash
# RocketQA on Natural Questions (Qu et al. 2021): one dual encoder, trained three times from the same weights with the
# same config. Only the training file changes, and that is the paper. M_D0 finds hard negatives. The cross-encoder M_C
# removes the false ones; M_D1 learns from the rest. Then M_D1 and M_C label questions that nobody has labelled; M_D2
# learns from these too. X.jsonl is the file that X/ was trained on.
#
# Expected, top-5 / 20 / 100 of 3,610 test questions (README of RocketQA's released code):
#   M_D0 68.89 / 80.83 / 87.40     M_D1 73.16 / 83.10 / 88.64     M_D2 73.32 / 83.38 / 88.64
# Ours: not run. Time: not measured. Disk: 13 GB corpus + 33 GB of vectors for each of the three.
#
# Smaller, on other data and weights: DATA, RUN, START, CROSS_START, TRAIN_FLAGS="--batch_size 32 --mixed_precision no
# --layer_norm_epsilon 0" (0 unless START is an ERNIE), CROSS_FLAGS likewise, ENCODE_FLAGS="", LAUNCH=python. Files in
# DATA: corpus.tsv, train.jsonl (one negative or more a question), test.jsonl, unlabelled.jsonl (qid, question).
# A recipe that was stopped continues where it was.
#
# From step 3 or 4, with the training files that RocketQA published (data_train/, six columns; its wget_data.sh):
#   python -m prepare.convert rocketqa data_train/nq_de1_denoise.tsv runs/rocketqa_nq/d1.jsonl
#   FROM=3 bash recipes/rocketqa_nq.sh
# FROM=4 likewise with d2.jsonl. FROM=3 goes on to step 4 where RUN/c/cross_encoder is a cross-encoder of yours.
DATA=${DATA:-data/nq}
RUN=${RUN:-runs/rocketqa_nq}
START=${START:-nghuyong/ernie-2.0-base-en}         # both towers, in every step
CROSS_START=${CROSS_START:-nghuyong/ernie-2.0-large-en}
CONFIG=${CONFIG:-config/train_dpr_rocketqa_nq.yaml}
CROSS_CONFIG=${CROSS_CONFIG:-config/train_cross_encoder_nq.yaml}
DEV=${DEV:-}                                       # a question file that chooses the best checkpoint; "": the last
DEPTH=${DEPTH:-100}                                # passages retrieved for a training question, and for a test question
SCORED=${SCORED:-100}                              # so many of them are rescored by the cross-encoder
UNLABELLED_DEPTH=${UNLABELLED_DEPTH:-50}           # both, for an unlabelled question
RESCORED=${RESCORED:-d0 d1 d2 d1_raw}              # models whose test rankings the cross-encoder rescores
POSITIVES=${POSITIVES:-ranking}                    # ranking: the first with the answer [its code]; given: train.jsonl's
BELOW=${BELOW:-0.1} ABOVE=${ABOVE:-0.9}            # the cross-encoder is sure: a negative, a positive
FROM=${FROM:-1}                                    # the step to begin with: 1 | 3 | 4
TRAIN_FLAGS=${TRAIN_FLAGS:-} CROSS_FLAGS=${CROSS_FLAGS:-}
ENCODE_FLAGS=${ENCODE_FLAGS---mixed_precision fp16}
LAUNCH=${LAUNCH:-accelerate launch --quiet} FORMAT=${FORMAT:-auto}
. "$(dirname "$0")/stage.sh"

# Data: DPR's, as in recipes/dpr_nq.sh; 58,880 training questions with the positive and a negative from BM25's 100 best.
if [ $FROM = 1 ] && ! there $DATA/unlabelled.jsonl; then
    if [ ! -f $DATA/mrqa.query.txt ]; then
        echo "$DATA/mrqa.query.txt is missing: take it from RocketQA's data (its wget_data.sh); id, tab, question" >&2
        exit 2
    fi
    python -m prepare.convert msmarco $DATA/mrqa.query.txt $DATA/unlabelled.jsonl
fi
dpr_corpus
[ $FROM != 1 ] || dpr_training nq-train $DATA/train.jsonl
dpr_questions nq-test $DATA/test.jsonl

taught() { there $RUN/c/metrics.json || [ -e $RUN/c/cross_encoder ]; } # is there a cross-encoder?
train() { # NAME FILE: the dual encoder on FILE, from START
    stage $RUN/$1/metrics.json $LAUNCH train_dpr.py --config $CONFIG --run_dir $RUN/$1 --init $START \
        --train $2 --dev "$DEV" $CORPUS --resume exact $TRAIN_FLAGS
}
evaluate() { # NAME: alone, and rescored by the cross-encoder
    encode $RUN/$1
    search $RUN/$1 $DATA/test.jsonl $DEPTH test
    if [[ " $RESCORED " = *" $1 "* ]] && taught; then rescore $RUN/$1 $DATA/test.jsonl $SCORED test; fi
}

denoise() { # NAME BELOW
    stage $RUN/$1.jsonl python mine_negatives.py --mode denoise --questions $DATA/train.jsonl $CORPUS \
        --run $RUN/d0/train.run --scores $RUN/d0/train_ce.run --negative_below $2 --positives $POSITIVES \
        --match_title true --negatives 1 --depth $DEPTH --out $RUN/$1.jsonl
}

if [ $FROM = 1 ]; then
    # Step 1. M_D0 learns from BM25's negatives and all passages of a batch of 1,024 questions.
    train d0 $DATA/train.jsonl
    encode $RUN/d0
    search $RUN/d0 $DATA/train.jsonl $DEPTH train

    # Step 2. M_C learns to tell the first passage with the answer from one that is drawn from those without.
    stage $RUN/c.jsonl python mine_negatives.py --mode denoise --questions $DATA/train.jsonl $CORPUS \
        --run $RUN/d0/train.run --positives $POSITIVES --match_title true --negatives 1 --depth $DEPTH --out $RUN/c.jsonl
    teach_cross_encoder

    # Step 3. M_D1's negative: the best-ranked passage without the answer that M_C, too, calls irrelevant.
    rescore $RUN/d0 $DATA/train.jsonl $SCORED train
    denoise d1 $BELOW
fi
if [ $FROM != 4 ]; then
    train d1 $RUN/d1.jsonl
    encode $RUN/d1
fi

# Step 4. M_D2: what M_C is sure of in M_D1's ranking of unlabelled questions is added to step 3's file.
if [ $FROM != 4 ] && taught; then pseudo_labels 1; fi
if [ $FROM != 3 ] || there $RUN/d2.jsonl; then train d2 $RUN/d2.jsonl; fi

for model in d0 d1 d2; do
    if there $RUN/$model/metrics.json; then evaluate $model; fi
done

# Optional: M_D1 without denoising: every score passes. The paper's point is that this hurts.
if [ "${ABLATION:-false}" = true ] && [ $FROM = 1 ]; then
    denoise d1_raw 2
    train d1_raw $RUN/d1_raw.jsonl
    evaluate d1_raw
fi
