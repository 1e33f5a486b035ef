#!/usr/bin/env bash
# ANCE-Tele's claim on real text (Sun et al. 2022): when a retriever mines its own negatives, each episode forgets
# training questions that the last one knew; look-ahead and momentum, the teleportation negatives, make it forget less
# and learn faster. Corpus, questions and start (M_D0 for coCondenser) are those of recipes/claim_rocketqa.sh.
#
# The arms are recipes/ance_tele_nq.sh with one config and equally many updates, with 3 negatives of a question in each:
#   ann   neighbours of the question      lookahead  + neighbours of its positive     momentum  + the last episode's
#   all   all three
# An arm with its seed is RUN/ance/ARM_seedN, an episode in it mN (m0: M_D0). In the first episode there is no momentum,
# so that ann and momentum are one training, and lookahead and all. FLOOR: an arm that is trained with a second seed,
# because two trainings differ even where nothing is forgotten. More seeds: SEEDS="1 2 3", with the same RUN.
# Out: RUN/episodes.json, RUN/episodes.png; RUN/ance/ranks.json, a number a question, for recipes/claims.py. forgotten: of the training questions, those whose positive was among the 20
# best after the last episode and is not after this one; known: those where it is. top-k, MRR@10: test questions by
# answers.
#
# Variables as in claim_rocketqa.sh, with the same RUN. A part of it: ARMS="ann all" FLOOR=.
set -euo pipefail
. "$(dirname "$0")/progress.sh"
FROM=${DATA:-data/nq_small}
export RUN=${RUN:-runs/claim_rocketqa} LAUNCH=${LAUNCH:-python} ENCODE_FLAGS=${ENCODE_FLAGS-}
ARMS=${ARMS:-ann lookahead momentum all} FLOOR=${FLOOR-all} SEEDS=${SEEDS:-1}
EPISODES=${EPISODES:-1 2 3} EPOCHS=${EPOCHS:-2}
NEGATIVES=${NEGATIVES:-3}                          # of a question in a step
DEPTH=${DEPTH:-20}                                 # passages retrieved; 200 of 21 million would be less than one here
[ $DEPTH -ge 20 ] || { echo "error: DEPTH is $DEPTH: what is known is looked for among the 20 best" >&2 && exit 2; }
SAMPLE=${SAMPLE:-10}                               # drawn from each of the two
TEST_DEPTH=${TEST_DEPTH:-100}
CONFIG=${CONFIG:-config/train_dpr_demo.yaml}
export DATA=$RUN/data DEV=${DEV-$RUN/data/dev.jsonl} FORMAT=auto
export MEASURE=${MEASURE-python recipes/measured.py $RUN/peaks.tsv}
. "$(dirname "$0")/stage.sh"
only ARMS "ann lookahead momentum all"
only FLOOR "ann lookahead momentum all"
DATA=$FROM PARTS=start ARMS= bash recipes/claim_rocketqa.sh
FLAGS="--batch_size 32 --passage_tokens 128 --question_tokens 32 ${FLAGS:-}"

each() { # NUMBER: it, once for every episode
    local episode
    for episode in $(seq ${EPISODES##* }); do echo $1; done
}
arm() { # ARM SEED
    local folder=$RUN/ance/$1_seed$2 start=$RUN/d0/query_encoder lookahead=false momentum=false like=
    case $1 in
    ann) like=momentum ;;
    lookahead) lookahead=true like=all ;;
    momentum) momentum=true like=ann ;;
    all) lookahead=true momentum=true like=lookahead ;;
    esac
    mkdir -p $folder
    [ -n "$DRY" ] || [ -e $folder/m0 ] || ln -s ../../d0 $folder/m0
    if [ -z "$DRY" ] && [ -n "$like" ] && [ ! -e $folder/m1 ] && [ -e $RUN/ance/${like}_seed$2/m1/test.run ]; then
        ln -s ../${like}_seed$2/m1 ../${like}_seed$2/m1.jsonl $folder
    fi
    RUN=$folder START=$start TRAIN=$DATA/train_answers.jsonl LOOKAHEAD=$lookahead MOMENTUM=$momentum \
        POSITIVES=given EPISODES=$EPISODES NEGATIVES=$(each $NEGATIVES) STOP_AFTER=$(each 0) \
        DEPTH=$DEPTH SAMPLE=$SAMPLE TEST_DEPTH=$TEST_DEPTH CONFIG=$CONFIG \
        TRAIN_FLAGS="$FLAGS --epochs $EPOCHS --seed $2 --rotate_negatives true --keep last" \
        bash recipes/ance_tele_nq.sh
    search $folder/m${EPISODES##* } $DATA/train_answers.jsonl $DEPTH ann
}
for seed in $SEEDS; do
    for name in $ARMS; do arm $name $seed; done
done
[ -z "$FLOOR" ] || arm $FLOOR 2
python recipes/forgetting.py $RUN
python -m recipes.plot --episodes $RUN/episodes.json --out $RUN/episodes.png
