#!/usr/bin/env bash
# The claim of EMDR2 at a laptop's size: questions and their answers alone teach a retriever that has seen no label.
#
#   start    two encoders after inverse cloze, the sentences of the corpus alone; no question, no label, no dev set
#   fid      a T5 learns to read what this start finds: FIRST steps of plain FiD over its best FIRST_READ passages
#   ARM      then STEPS steps of EMDR2 from both. The weights of the last step count; nothing is chosen by dev.
# Arms, each RUN/ARM_seedN. The question encoder learns alone (train_doc_encoder: false) but in `none`, `sync` and `async`:
#   token    the released loss                   sequence, kl   the paper's other two losses
#   k16, k32 more passages a question             shuffled       answers of other questions: must not gain
#   longer   token goes on for STEPS more, the control of the next three
#   none     both encoders learn on from token for STEPS more, the index stays; sync: it is renewed every 30 steps; async: by a
#            second process
#   plain    FiD goes on for STEPS, no retriever learns: the control of token's exact match
#
# A recipe that was stopped continues where it was. Arms can run at the same time, with OMP_NUM_THREADS=1, once
# `ARMS= SEEDS=` has made what they share.
set -euo pipefail
DATA=${DATA:-data/demo}                            # corpus.tsv, train.jsonl, dev.jsonl, test.jsonl
RUN=${RUN:-runs/emdr2_alone}
START=${START:-data/models/tinybert-4l}
T5=${T5:-data/models/flan-t5-small}
SEEDS=${SEEDS-1 2 3}                               # of `token`; the other arms take the first
ARMS=${ARMS-token shuffled plain}
FIRST=${FIRST:-60} STEPS=${STEPS:-120} BATCH=${BATCH:-16}
READ=${READ:-8} FIRST_READ=${FIRST_READ:-4} DEPTH=${DEPTH:-100}
# the encoders' peak is 3e-5 = 0.15 * 2e-4. differs: the paper has 2e-5 for all, 64 questions a step, and dropout 0.1
TRAIN_FLAGS="--top_k $READ --reader_tokens 112 --answer_tokens 12 --temperature 1.0 --gradient_checkpointing false
    --batch_size $BATCH --question_chunk 4 --passage_chunk 32 --score_chunk 16 --encoding_batch_size 64 --eval_batch_size 32
    --learning_rate 2.0e-4 --retriever_lr_scale 0.15 --warmup 4 --dropout 0 --mixed_precision no --keep last ${TRAIN_FLAGS:-}"
CLOZE_FLAGS=${CLOZE_FLAGS-}
ENCODE_FLAGS=${ENCODE_FLAGS-} ANSWER_FLAGS=${ANSWER_FLAGS-}
LAUNCH=${LAUNCH:-python} FORMAT=${FORMAT:-auto}
. "$(dirname "$0")/stage.sh"
only ARMS "token sequence kl k16 k32 shuffled longer none sync async plain"

[ $DATA != data/demo ] || stage $DATA/test.jsonl python recipes/demo/prepare.py
[ $START != data/models/tinybert-4l ] || stage $START python recipes/demo/prepare.py
[ $T5 != data/models/flan-t5-small ] || stage $T5 python recipes/demo/flan_t5.py

# the start, and what it finds
stage $RUN/cloze.jsonl python recipes/demo/inverse_cloze.py $DATA/corpus.tsv $RUN/cloze.jsonl $FORMAT
stage $RUN/start/metrics.json $LAUNCH train_dpr.py --config config/train_dpr_demo_cloze.yaml --run_dir $RUN/start \
    --init $START --train $RUN/cloze.jsonl --dev "" $CORPUS --resume exact $CLOZE_FLAGS
encode $RUN/start
search $RUN/start $DATA/test.jsonl $DEPTH test

train() { # NAME FROM READER STEPS FLAGS...: train_emdr2.py from the encoders of FROM
    local epoch=$(($(lines_of $TRAIN) / BATCH))
    [ $epoch -gt 0 ] || { echo "error: $TRAIN fills no batch of $BATCH" >&2 && exit 2; }
    stage $RUN/$1/metrics.json $LAUNCH train_emdr2.py --run_dir $RUN/$1 --train $TRAIN --dev $DATA/dev.jsonl $CORPUS \
        --query_encoder $2/query_encoder --doc_encoder $2/doc_encoder --embeddings $2/embeddings --reader $3 \
        --epochs $((($4 + epoch - 1) / epoch)) --stop_after $4 --eval_every 30 --resume exact $TRAIN_FLAGS "${@:5}"
}
answer() { # NAME READER RANKING: the test questions, from the READ best passages
    stage $RUN/$1.metrics.json $LAUNCH answer.py --reader $2 --questions $DATA/test.jsonl --ranking $3 $CORPUS \
        --depth $READ --out $RUN/$1.json $ANSWER_FLAGS
}
question_encoder() { # NAME SEED FROM READER FLAGS...: an arm in which the passages' vectors stay those of the start
    local name=$1_seed$2
    train $name $3 $4 $STEPS --seed $2 --refresh none --train_doc_encoder false "${@:5}"
    stage $RUN/$name/embeddings ln -s ../start/embeddings $RUN/$name/embeddings
    search $RUN/$name $DATA/test.jsonl $DEPTH test
}
both_encoders() { # NAME REFRESH: what the passage encoder adds
    train $1_seed$seed $second $STEPS --seed $seed --refresh $2 --refresh_every 30
    encode $RUN/$1_seed$seed
    search $RUN/$1_seed$seed $DATA/test.jsonl $DEPTH test
}
shuffle() { python -c 'import json, random, sys
rows = [json.loads(line) for line in sys.stdin]
answers = [row["answers"] for row in rows]
random.Random(7).shuffle(answers)
for row, others in zip(rows, answers):
    print(json.dumps(row | {"answers": others}))' <$DATA/train.jsonl; }

# the reader learns to read first: a trial with an untrained one, and with both encoders, lost 8 points on dev
TRAIN=$DATA/train.jsonl
train fid $RUN/start $T5 $FIRST --seed 1 --retriever_loss none --refresh none --top_k $FIRST_READ

read -r seed _ <<<"$SEEDS"
first="$RUN/start $RUN/fid/reader" second="$RUN/token_seed$seed $RUN/token_seed$seed/reader"
for arm in $ARMS; do
    case $arm in
    token)
        for s in $SEEDS; do question_encoder token $s $first; done
        # one reader, two retrievers: what the passages alone are worth in exact match
        answer fid_on_start $RUN/fid/reader $RUN/start/test.run
        answer fid_on_token $RUN/fid/reader $RUN/token_seed$seed/test.run
        answer token_on_token $RUN/token_seed$seed/reader $RUN/token_seed$seed/test.run
        stage $RUN/belief.json python -m recipes.reader_signal batch $DATA/corpus.tsv $DATA/test.jsonl \
            $RUN/start/test.run $RUN/fid/reader $RUN/token_seed$seed/test.run $RUN/token_seed$seed/reader $RUN/belief.json ;;
    sequence) question_encoder sequence $seed $first --marginal sequence ;;
    kl) question_encoder kl $seed $first --retriever_loss kl ;;
    k16) question_encoder k16 $seed $first --top_k 16 ;;
    k32) question_encoder k32 $seed $first --top_k 32 ;;
    shuffled)
        stage $RUN/shuffled.jsonl write $RUN/shuffled.jsonl shuffle
        TRAIN=$RUN/shuffled.jsonl question_encoder shuffled $seed $first ;;
    longer) question_encoder longer $seed $second ;;
    none | sync) both_encoders $arm $arm ;;
    async)
        bash recipes/emdr2_worker.sh $RUN/async_seed$seed $CORPUS $ENCODE_FLAGS &
        worker=$!
        # it waits for a training that may have failed; the plan of the stages belongs to the real run
        [ -n "$DRY" ] || trap 'pkill -P $worker || true; kill $worker 2>/dev/null || true; rm -f "$STAGES"*' EXIT
        both_encoders async async
        wait $worker
        [ -n "$DRY" ] || grep -q "are in use" $RUN/async_seed$seed/log.txt || {
            echo "error: $RUN/async_seed$seed: its vectors were never renewed; delete it" >&2 && exit 2
        } ;;
    plain)
        train plain_seed$seed $RUN/start $RUN/fid/reader $STEPS --seed $seed --retriever_loss none --refresh none
        answer plain_on_start $RUN/plain_seed$seed/reader $RUN/start/test.run ;;
    esac
done

# the ranks of every test question, and each arm over the start
answers=()
for name in fid_on_start fid_on_token token_on_token plain_on_start; do answers+=($name=$RUN/$name.answers.json); done
keep_ranks start=$RUN/start/test.run $(arms '*') "${answers[@]}"

# what each arm finds and answers, and whose belief the reader changed
pairs=(start=start/test.run)
for pair in $(arms '*') "${answers[@]}"; do [ ! -f ${pair#*=} ] || pairs+=(${pair%%=*}=${pair#*=$RUN/}); done
python recipes/page_table.py $RUN $DATA "${pairs[@]}"
[ $RUN/page.html -nt $RUN/table.json ] || python recipes/page.py $RUN --data $DATA --out $RUN/page.html
