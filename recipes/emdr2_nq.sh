#!/usr/bin/env bash
# EMDR2 on Natural Questions (Singh et al. 2021): a trained retriever and a T5, trained on together. It needs what
# recipes/dpr_nq.sh left: an encoder for questions, one for passages, and the vectors.
#
# Published exact match, dev / test (the paper's table, in the repository of its code), base size, 50 passages read:
#   FiD, DPR's retriever and a T5 reader, not trained together    47.3 / 48.3    (the nearest to what starts here)
#   FiD, MSS retriever and reader, not trained together           38.5 / 40.1    (what EMDR2 starts from)
#   EMDR2                                                         50.4 / 52.5
# Ours: not run. Time: not measured. Disk: 13 GB for the corpus, 33 GB of vectors each for the retriever before and
# after, 23 GB of checkpoints. REFRESH=async takes 99 GB more: two finished folders of vectors and one in progress.
#
# REFRESH=sync stops the training every 500 steps to encode the passages anew. The paper does that on other devices,
# while the training goes on, so the vectors are older. (Its code waits where they are late; ours does not.) It takes
# two commands at the same time, on one node. Start the second once the corpus exists:
#   REFRESH=async CUDA_VISIBLE_DEVICES=0,1,2,3 bash recipes/emdr2_nq.sh
#   CUDA_VISIBLE_DEVICES=4,5,6,7 bash recipes/emdr2_worker.sh runs/emdr2_nq --corpus data/nq/corpus.tsv \
#     --mixed_precision fp16
#
# TriviaQA and WebQuestions: emdr2_trivia.sh and emdr2_webq.sh run this file with other variables.
# CLOZE=true needs no retriever: one is trained on sentences that are taken out of their passages (inverse cloze), without
# any question. With MSS=true after it, that is how the paper's own retriever began. Without MSS let the reader learn first
# (BASELINE=true READER_FIRST=true), and the question encoder alone (REFRESH=none TRAIN_FLAGS="--train_doc_encoder false"):
# what a laptop shows of it is recipes/claim_emdr2.sh.
#
# Smaller: DATA, RUN, RETRIEVER, READER=google/flan-t5-small, READ=10, TRAIN_FLAGS="--top_k 10 --mixed_precision no",
# ANSWER_FLAGS="--mixed_precision no", LAUNCH=python. Files in DATA: corpus.tsv, train_qa.jsonl, dev_qa.jsonl,
# test.jsonl, all with answers. A recipe that was stopped continues where it was.
DATA=${DATA:-data/nq}
SET=${SET:-nq}                                     # in the names of DPR's files
TRAIN=${TRAIN:-$DATA/train_qa.jsonl}
DEV=${DEV-$DATA/dev_qa.jsonl}                      # chooses the best checkpoint; "": the last
RUN=${RUN:-runs/emdr2_nq}
RETRIEVER=${RETRIEVER:-runs/dpr_nq}                # query_encoder/ and doc_encoder/ to start from
READER=${READER:-t5-base}
CONFIG=${CONFIG:-config/train_emdr2_nq.yaml}
REFRESH=${REFRESH:-sync}                           # sync | async | none
BASELINE=${BASELINE:-false}                        # true: also FiD over the retriever as it is
READER_FIRST=${READER_FIRST:-false}                # true, with BASELINE: EMDR2 goes on from that FiD's reader
CLOZE=${CLOZE:-false}                              # true: begin with a retriever of your own, trained without labels
START=${START:-bert-base-uncased}                  # its two encoders
CLOZE_FLAGS=${CLOZE_FLAGS:-}
MSS=${MSS:-false}                                  # true: begin with the paper's pre-training, on masked sentences
SPAN_FLAGS=${SPAN_FLAGS:-}
DEPTH=${DEPTH:-100}                                # passages retrieved for a test question
READ=${READ:-50}                                   # so many of them are read
TRAIN_FLAGS=${TRAIN_FLAGS:-}
ANSWER_FLAGS=${ANSWER_FLAGS---mixed_precision bf16}
ENCODE_FLAGS=${ENCODE_FLAGS---mixed_precision fp16}
LAUNCH=${LAUNCH:-accelerate launch --quiet} FORMAT=${FORMAT:-auto}
. "$(dirname "$0")/stage.sh"

# Data: all questions of DPR's split, 79,168 and 8,757; DPR trains on the 58,880 for which it knows a passage.
dpr_corpus
qa() { # SPLIT FILE
    if [ $SET = webquestions ] && [ $1 != test ]; then # DPR has no qa.csv of them
        dpr_training $SET-$1 $2
    else
        dpr_questions $SET-$1 $2
    fi
}
qa train $TRAIN
[ -z "$DEV" ] || qa dev $DEV
qa test $DATA/test.jsonl

train() { # RUN_DIR CONFIG TRAIN DEV [FLAGS]: from RETRIEVER and READER
    stage $1/metrics.json $LAUNCH train_emdr2.py --config $2 --run_dir $1 --train $3 --dev "$4" $CORPUS \
        --query_encoder $RETRIEVER/query_encoder --doc_encoder $RETRIEVER/doc_encoder \
        --embeddings $RETRIEVER/embeddings --reader $READER --resume exact $TRAIN_FLAGS "${@:5}"
}
answer() { # RUN_DIR RANKING: the test questions, from the passages that a retriever found -> RUN_DIR/answers*.json
    stage $1/answers.metrics.json $LAUNCH answer.py --reader $1/reader --questions $DATA/test.jsonl --ranking $2 \
        $CORPUS --depth $READ --out $1/answers.json $ANSWER_FLAGS
}

# compares two files: the gain of the second
COMPARE="python recipes/compare.py --corpus_format $FORMAT $DATA/corpus.tsv $DATA/test.jsonl"

# Optional: a retriever without any label. Its pairs are whole texts, so it needs no corpus, and no negatives but those of
# the batch.
if [ $CLOZE = true ]; then
    RETRIEVER=$RUN/cloze
    stage $RUN/cloze.jsonl python recipes/demo/inverse_cloze.py $DATA/corpus.tsv $RUN/cloze.jsonl $FORMAT
    stage $RETRIEVER/metrics.json $LAUNCH train_dpr.py --config config/train_dpr_nq.yaml --run_dir $RETRIEVER \
        --init $START --train $RUN/cloze.jsonl --dev "" --corpus "" --negatives 0 --epochs 1 --resume exact $CLOZE_FLAGS
fi
encode $RETRIEVER

# Optional: questions out of the corpus itself. What is trained on them is the start of all that follows.
if [ $MSS = true ]; then
    stage $RUN/mss.jsonl python -m prepare.salient_spans $CORPUS --out $RUN/mss.jsonl $SPAN_FLAGS
    train $RUN/mss config/train_emdr2_mss.yaml $RUN/mss.jsonl ""
    RETRIEVER=$RUN/mss READER=$RUN/mss/reader
    encode $RETRIEVER
fi

# Before: what the retriever finds, and what a FiD reader makes of it when the retriever stays as it is.
search $RETRIEVER $DATA/test.jsonl $DEPTH test
if [ $BASELINE = true ]; then
    train $RUN/fid $CONFIG $TRAIN "$DEV" --retriever_loss none --refresh none
    answer $RUN/fid $RETRIEVER/test.run
    [ $READER_FIRST = false ] || READER=$RUN/fid/reader
fi

# EMDR2. After it: what its retriever finds, exact match, and the curves of the training.
train $RUN $CONFIG $TRAIN "$DEV" --refresh $REFRESH
encode $RUN
search $RUN $DATA/test.jsonl $DEPTH test
answer $RUN $RUN/test.run
stage $RUN/curves.png python -m recipes.plot $RUN
stage $RUN/compare.txt write $RUN/compare.txt $COMPARE $RETRIEVER/test.run $RUN/test.run
cat $RUN/compare.txt
if [ $BASELINE = true ]; then
    stage $RUN/compare_answers.txt write $RUN/compare_answers.txt $COMPARE $RUN/fid/answers.answers.json \
        $RUN/answers.answers.json
    cat $RUN/compare_answers.txt
fi
