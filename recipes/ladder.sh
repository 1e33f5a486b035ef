#!/usr/bin/env bash
# The ladder: BM25, DPR, GC-DPR, ANCE-Tele, RocketQA, a reader, FiD and EMDR2 on one corpus, from the same weights. It
# ends with one table, one picture and one page (recipes/ladder.py, plot.py, page.py). A ladder that was stopped continues
# where it was. Time: three and a half hours on two CPU cores, beside other
# programs (results/ladder_small).
#
# Every third training question loses its label. All encoders learn from the others. RocketQA gives the third
# pseudo-labels. Readers need only answers and learn from all questions. No checkpoint is chosen: the weights of the last
# step count. The dev questions are only watched. Real NQ: SIZE=full
# TITLES=true DATA=data/nq, a folder with corpus.tsv and {train,dev,test}.jsonl, with answers and with positives as
# passage ids.
#
# All variables can be set from outside. SEED=2 (or 3 ...) trains with another seed in its own RUN, and the table says
# how many seeds a row has; RUNGS="dpr ance rocket" EPISODES=1 runs only these. T5= (none): the rows of FiD and EMDR2
# say "not run". One GPU is large enough for several small models: after RUNGS=dpr LEG=true, run RUNGS=gc, RUNGS=ance
# and RUNGS=rocket at the same time, with LEG=true, which ends before the stages that need all of them. Then run the
# whole without LEG. The minutes of its table are then those of busy devices.
set -euo pipefail
. "$(dirname "$0")/progress.sh"
SIZE=${SIZE:-small} SEED=${SEED:-1} BATCH=${BATCH:-32} SCORED=${SCORED:-16} TEST_DEPTH=${TEST_DEPTH:-100}
DPR_CONFIG=${DPR_CONFIG:-config/train_dpr_demo.yaml} READER_CONFIG=${READER_CONFIG:-config/train_reader_demo.yaml}
START=${START:-data/models/tinybert-4l}            # of all encoders, cross-encoder and extractive reader
T5=${T5-data/models/flan-t5-small}                 # of FiD and EMDR2; with a hub: google/flan-t5-small
RUNGS=${RUNGS:-dpr gc ance rocket reader emdr2}
FLAGS="--passage_tokens 96 --question_tokens 32 --keep last --seed $SEED ${FLAGS:-}" # to all trainings of dual encoders
export CROSS_CONFIG=${CROSS_CONFIG:-config/train_cross_encoder_demo.yaml}
CROSS_FLAGS="--keep last --seed $SEED ${CROSS_FLAGS:-}"
EMDR2="--temperature 1.0 --learning_rate 2.0e-4 --retriever_lr_scale 0.15 --gradient_checkpointing false --epochs 1
    --dropout 0 --train_doc_encoder false --keep last"
case $SIZE in
small) # the demo's 10,033 passages and 970 questions, on two CPU cores
    DATA=${DATA:-data/demo} TITLES=${TITLES:-true} EPOCHS=${EPOCHS:-3} GC_BATCH=${GC_BATCH:-128}
    CLOZE=${CLOZE:-true}                           # a thousand questions are few: first the corpus itself teaches
    # after 80 updates the cross-encoder's scores lie between 0.14 and 0.87: nothing would pass the paper's 0.1 and 0.9
    BELOW=${BELOW:-0.2} ABOVE=${ABOVE:-0.8}
    ENCODE_FLAGS=${ENCODE_FLAGS-} ANSWER_FLAGS=${ANSWER_FLAGS-} READER_DEPTH=${READER_DEPTH:-3} READ=${READ:-8}
    EMDR2_FLAGS="$EMDR2 --top_k 8 --reader_tokens 112 --answer_tokens 12 --batch_size 16 --question_chunk 2
        --passage_chunk 16 --score_chunk 16 --stop_after 60 --warmup 4 --mixed_precision no
        --encoding_batch_size 64 --eval_batch_size 32 ${EMDR2_FLAGS:-}" ;;
full) # 61,703 passages and 16,402 questions of NQ, on a GPU
    DATA=${DATA:-data/nq_small} EPOCHS=${EPOCHS:-4} GC_BATCH=${GC_BATCH:-512} CLOZE=${CLOZE:-false}
    TITLES=${TITLES:-false}                        # blank: in nq_small a title tells the positives (docs/log.md)
    ENCODE_FLAGS=${ENCODE_FLAGS---mixed_precision fp16} ANSWER_FLAGS=${ANSWER_FLAGS---mixed_precision bf16}
    READER_DEPTH=${READER_DEPTH:-20} READ=${READ:-20} # passages that the extractive reader, and FiD, answer from
    FLAGS="--mixed_precision bf16 --question_chunk 256 --passage_chunk 256 $FLAGS"
    CROSS_FLAGS="--mixed_precision bf16 $CROSS_FLAGS"
    READER_FLAGS="--mixed_precision bf16 --reader_tokens 192 --passages_per_question 6 --batch_size 8 --question_chunk 8
        --passage_chunk 48 --test_depth 20 ${READER_FLAGS:-}"
    EMDR2_FLAGS="$EMDR2 --top_k 20 --reader_tokens 160 --answer_tokens 16 --batch_size 32 --question_chunk 8
        --passage_chunk 160 --score_chunk 64 --warmup 0.05 --eval_every 250 --mixed_precision bf16
        --encoding_batch_size 512 --eval_batch_size 200 ${EMDR2_FLAGS:-}" ;;
*) echo "SIZE must be small or full, got $SIZE" >&2 && exit 2 ;;
esac
FROM=$DATA RUN=${RUN:-runs/ladder_$SIZE$([ $SEED = 1 ] || echo _seed$SEED)}
export BELOW=${BELOW:-0.1} ABOVE=${ABOVE:-0.9}
export RUN DATA=$RUN/data DEV=$RUN/data/dev.jsonl ENCODE_FLAGS ANSWER_FLAGS READ
export LAUNCH=${LAUNCH:-python} FORMAT=${FORMAT:-auto}
export MEASURE="python recipes/measured.py $RUN/peaks.tsv"
. "$(dirname "$0")/stage.sh"
only RUNGS "dpr gc ance rocket reader emdr2"
mkdir -p $DATA
DUAL="$FLAGS --batch_size $BATCH --epochs $EPOCHS"
wants() { [[ " $RUNGS " = *" $1 "* ]]; }
evaluate() { # NAME
    encode $RUN/$1
    search $RUN/$1 $DATA/test.jsonl $TEST_DEPTH test
}
train() { # NAME FLAGS...: a dual encoder on the labelled questions, its vectors, its test
    stage $RUN/$1/metrics.json $LAUNCH train_dpr.py --config $DPR_CONFIG --run_dir $RUN/$1 --init $BASE \
        --train $DATA/train.jsonl --dev $DEV $CORPUS --resume exact $DUAL "${@:2}"
    evaluate $1
}

# Data. A corpus without titles is a copy; the other files are links.
[ $FROM != data/demo ] || stage $FROM/test.jsonl python recipes/demo/prepare.py
[ $START != data/models/tinybert-4l ] || stage $START python recipes/demo/prepare.py
[ "$T5" != data/models/flan-t5-small ] || stage $T5 python recipes/demo/flan_t5.py
unlabelled() { python -c 'import json, sys
for line in list(sys.stdin)[2::3]:
    print(json.dumps({key: json.loads(line)[key] for key in ("qid", "question")}))' <$FROM/train.jsonl; }
link() { # FILE NAME
    stage $DATA/$2 ln -s "$(realpath $FROM/$1)" $DATA/$2
}
if [ $TITLES = true ]; then
    link corpus.tsv corpus.tsv
else
    stage $DATA/corpus.tsv write $DATA/corpus.tsv blank_titles $FROM
fi
link train.jsonl questions.jsonl                   # all of the training questions
link test.jsonl test.jsonl
stage $DATA/labelled.jsonl write $DATA/labelled.jsonl awk 'NR % 3' $FROM/train.jsonl
stage $DATA/unlabelled.jsonl write $DATA/unlabelled.jsonl unlabelled

# BM25: the first row, and the first negatives of every system.
bm25 $DATA test $DATA/test.jsonl
bm25_negatives $DATA train $DATA/labelled.jsonl 30
bm25_negatives $DATA dev $FROM/dev.jsonl 5

# Where all dual encoders start (ANCE-Tele's M_0): the weights as they are, or after sentences of the corpus.
stage $RUN/untrained/doc_encoder python recipes/untrained.py --config $DPR_CONFIG --init $START \
    --run_dir $RUN/untrained $FLAGS
evaluate untrained
BASE=$START first=untrained
if [ $CLOZE = true ]; then
    stage $DATA/cloze.jsonl python recipes/demo/inverse_cloze.py $DATA/corpus.tsv $DATA/cloze.jsonl $FORMAT
    stage $RUN/cloze/metrics.json $LAUNCH train_dpr.py --config config/train_dpr_demo_cloze.yaml --run_dir $RUN/cloze \
        --init $START --train $DATA/cloze.jsonl --dev $DEV $CORPUS --resume exact $FLAGS ${CLOZE_FLAGS:-}
    evaluate cloze
    BASE=$RUN/cloze/query_encoder first=cloze
fi
stage $RUN/m0 ln -s $first $RUN/m0

# DPR; GC-DPR with as many updates; and its control, DPR that is shown as many questions as GC-DPR.
lines=$(lines_of $DATA/train.jsonl)
[ $lines -ge $GC_BATCH ] || { echo "error: GC_BATCH is $GC_BATCH, $lines questions have a label" >&2 && exit 2; }
updates() { # BATCH UPDATES: the flags for so many
    local epoch=$((lines / $1))
    echo --batch_size $1 --stop_after $2 --epochs $((($2 + epoch - 1) / epoch)) --eval_every $((lines / BATCH))
}
if wants dpr; then train inbatch --negatives 0; train d0; fi
if wants gc; then
    train gc --grad_cache true $(updates $GC_BATCH $((lines / BATCH * EPOCHS)))
    train more $(updates $BATCH $((lines / BATCH * EPOCHS * GC_BATCH / BATCH)))
fi

# ANCE-Tele and RocketQA are their own recipes.
if wants ance; then
    START=$BASE CONFIG=$DPR_CONFIG TRAIN=$DATA/train.jsonl POSITIVES=given NEGATIVES="1 1 1" STOP_AFTER="0 0 0" \
        TRAIN_FLAGS="$DUAL --rotate_negatives true" bash recipes/ance_tele_nq.sh
fi
if wants rocket; then
    stage $RUN/gate.txt write $RUN/gate.txt echo $BELOW $ABOVE
    CROSS_START=$START START=$BASE CONFIG=$DPR_CONFIG POSITIVES=given UNLABELLED_DEPTH=$SCORED SCORED=$SCORED \
        RESCORED=d0 TRAIN_FLAGS="$DUAL" CROSS_FLAGS="$CROSS_FLAGS --dev $DEV" bash recipes/rocketqa_nq.sh
fi

[ "${LEG:-false}" = false ] || exit 0

# DPR with the cross-encoder, with BM25, and with a reader.
if wants rocket; then rescore $RUN/d0 $DATA/test.jsonl $SCORED test; fi
search $RUN/d0 $DATA/test.jsonl $TEST_DEPTH hybrid --bm25_run $DATA/bm25_test.run
if wants reader; then
    search $RUN/d0 $DATA/questions.jsonl 50 questions
    search $RUN/d0 $DEV 50 dev
    stage $RUN/reading/metrics.json $LAUNCH train_reader.py --config $READER_CONFIG --run_dir $RUN/reading $CORPUS \
        --train $DATA/questions.jsonl --train_run $RUN/d0/questions.run --dev $DEV --dev_run $RUN/d0/dev.run \
        --init $START --seed $SEED --keep last --resume exact ${READER_FLAGS:-}
    stage $RUN/reading/answers.metrics.json $LAUNCH answer.py --reader $RUN/reading/reader $CORPUS \
        --questions $DATA/test.jsonl --ranking $RUN/d0/test.run --depth $READER_DEPTH \
        --out $RUN/reading/answers.json $ANSWER_FLAGS
fi

# FiD over a retriever that has seen no question, then EMDR2 from both: what answers alone teach.
if wants emdr2 && [ -n "$T5" ]; then
    RETRIEVER=$RUN/m0 READER=$T5 CONFIG=config/train_emdr2_nq.yaml TRAIN=$DATA/questions.jsonl BASELINE=true \
        READER_FIRST=true CLOZE=false MSS=false REFRESH=none TRAIN_FLAGS="$EMDR2_FLAGS --seed $SEED" RUN=$RUN/emdr2 \
        bash recipes/emdr2_nq.sh
    stage $RUN/emdr2/belief.json python -m recipes.reader_signal batch $DATA/corpus.tsv $DATA/test.jsonl \
        $RUN/m0/test.run $RUN/emdr2/fid/reader $RUN/emdr2/test.run $RUN/emdr2/reader $RUN/emdr2/belief.json
fi
python recipes/ladder.py $RUN $(ls -d ${RUN}_seed* 2>/dev/null || true) $DATA
[ $RUN/ladder.png -nt $RUN/table.json ] || python -m recipes.plot --table $RUN/table.json --out $RUN/ladder.png
[ $RUN/page.html -nt $RUN/table.json ] || python recipes/page.py $RUN --out $RUN/page.html
