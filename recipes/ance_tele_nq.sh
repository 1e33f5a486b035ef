#!/usr/bin/env bash
# ANCE-Tele on Natural Questions (Sun et al. 2022), in three episodes. In each, the last model finds negatives near the
# question (ANN) and near its positive (look-ahead); the negatives of the last episode are kept (momentum). A new model
# learns from all of them. It starts from coCondenser, never from the last model. Episodes 1 and 2 stop early, on the
# schedule of 40 epochs.
#
# Expected after episode 3, top-5 / 20 / 100 of 3,610 test questions (README of ANCE-Tele's code): 77.0 / 84.9 / 89.7
# Ours: not run. Time: not measured. Disk: 13 GB corpus + 33 GB of vectors for each of four models.
#
# TriviaQA and MS MARCO: ance_tele_trivia.sh and ance_tele_marco.sh run this file with other variables.
# Smaller: DATA, RUN, START, TRAIN_FLAGS="--batch_size 32 --mixed_precision no", ENCODE_FLAGS="", LAUNCH=python. Files in
# DATA: corpus.tsv, test.jsonl and train_ids.jsonl with positives as passage ids (TRAIN names another). A recipe that was
# stopped continues where it was.
#
# One episode, with the negatives that ANCE-Tele published ("our Epi-3 negatives"; the words are ids of BERT's vocab.txt):
#   python -m prepare.convert ance_tele_hn split*.hn.json vocab.txt runs/ance_tele_nq/m3.jsonl
#   EPISODES=3 bash recipes/ance_tele_nq.sh
# Where RUN/mN.jsonl is there, nothing is done that only makes it.
DATA=${DATA:-data/nq}
SET=${SET:-nq}                                     # in the names of DPR's files
TRAIN=${TRAIN:-$DATA/train_ids.jsonl}              # the training questions, positives as passage ids
RUN=${RUN:-runs/ance_tele_nq}
START=${START:-Luyu/co-condenser-wiki}
CONFIG=${CONFIG:-config/train_dpr_ance_tele_nq.yaml}
DEV=${DEV:-}                                       # a question file that chooses the best checkpoint; "": the last
EPISODES=${EPISODES:-1 2 3}
NEGATIVES=(${NEGATIVES:-3 7 11})                   # hard negatives a question and step, by episode
STOP_AFTER=(${STOP_AFTER:-2000 2000 0})            # steps, by episode; 0: none before the end
DEPTH=${DEPTH:-200}                                # passages retrieved for a question and for its positive
SAMPLE=${SAMPLE:-80}                               # drawn from each of the two: 160 negatives, then 320, then 480
LOOKAHEAD=${LOOKAHEAD:-true} MOMENTUM=${MOMENTUM:-true} # false: without these negatives
POSITIVES=${POSITIVES:-find}                       # find: where TRAIN names no positive, the first passage with the answer
TEST_DEPTH=${TEST_DEPTH:-100}
TEST_TOKENS=${TEST_TOKENS:-0}                      # length of a test question; 0: as in training
TRAIN_FLAGS=${TRAIN_FLAGS:-}
ENCODE_FLAGS=${ENCODE_FLAGS---mixed_precision fp16}
LAUNCH=${LAUNCH:-accelerate launch --quiet} FORMAT=${FORMAT:-auto}
. "$(dirname "$0")/stage.sh"

# Data: DPR's. why --ids: look-ahead searches with the positive's vector, so it needs the passage's id; the train.jsonl
# of dpr_nq.sh has texts instead. Questions without a passage are kept: they take the first passage with the answer.
dpr_corpus
dpr_training $SET-train $TRAIN --ids
dpr_questions $SET-test $DATA/test.jsonl

# M_0: coCondenser as it is, never trained for retrieval.
if [[ " $EPISODES " = *" 1 "* ]]; then
    FOR=$RUN/m1.jsonl
    stage $RUN/m0/doc_encoder python recipes/untrained.py --config $CONFIG --init $START --run_dir $RUN/m0 $TRAIN_FLAGS
    encode $RUN/m0
    FOR=
fi

mine() { # the negatives of an episode, found by the model of the last; it uses the loop's episode, last, model and questions
    local FOR=$model.jsonl
    search $last $TRAIN $DEPTH ann
    if [ $POSITIVES = find ]; then
        questions=$last/questions.jsonl        # mined only for the positives that it finds: look-ahead needs them
        stage $questions python mine_negatives.py --mode topk --positives find --negatives 1 --depth $DEPTH \
            --questions $TRAIN --run $last/ann.run $CORPUS --out $questions
    fi
    sources="--run $last/ann.run"
    if [ $LOOKAHEAD = true ]; then
        stage $last/lookahead.run python test_dpr.py --lookahead true --questions $questions $CORPUS \
            --embeddings $last/embeddings --index stream --k $DEPTH --out $last/lookahead.run
        sources+=" --lookahead_run $last/lookahead.run"
    fi
    if [ $MOMENTUM = true ] && [ $episode != 1 ]; then
        sources+=" --momentum $RUN/m$((episode - 1)).jsonl"
    fi
    stage $model.jsonl python mine_negatives.py --mode teleport --questions $questions $sources $CORPUS \
        --negatives $SAMPLE --depth $DEPTH --out $model.jsonl
}

for episode in $EPISODES; do
    last=$RUN/m$((episode - 1)) model=$RUN/m$episode questions=$TRAIN
    mine
    stage $model/metrics.json $LAUNCH train_dpr.py --config $CONFIG --run_dir $model --init $START \
        --train $model.jsonl --dev "$DEV" $CORPUS --negatives ${NEGATIVES[episode - 1]} \
        --stop_after ${STOP_AFTER[episode - 1]} --resume exact $TRAIN_FLAGS

    encode $model
    search $model $DATA/test.jsonl $TEST_DEPTH test --question_tokens $TEST_TOKENS
done
