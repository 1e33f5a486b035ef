#!/usr/bin/env bash
# ANCE-Tele on MS MARCO passages (Sun et al. 2022): the commands of recipes/ance_tele_nq.sh, with other numbers. One
# encoder takes questions and passages. A negative is what nobody judged relevant. coCondenser was pre-trained on this
# corpus.
# Expected after episode 3, MRR@10 / R@1000 of 6,980 dev questions: 39.1 / 98.4 (README of ANCE-Tele's code, OpenMatch's
# model card). Here they are MRR@10 and hit@1000. The corpus has RocketQA's titles: do not compare with numbers of the
# corpus without titles. Ours: not run. Time: not measured.
set -euo pipefail
export DATA=${DATA:-data/msmarco} RUN=${RUN:-runs/ance_tele_marco} FORMAT=${FORMAT:-marco}
export START=${START:-Luyu/co-condenser-marco}
export CONFIG=${CONFIG:-config/train_dpr_ance_tele_marco.yaml}
export NEGATIVES=${NEGATIVES:-15 31 31} STOP_AFTER=${STOP_AFTER:-20000 20000 0} # of 62,867 steps an epoch, 3 epochs
export TRAIN=$DATA/train.jsonl
export SAMPLE=${SAMPLE:-30} POSITIVES=given TEST_DEPTH=${TEST_DEPTH:-1000}      # 60 negatives, then 120, then 180
bash "$(dirname "$0")/marco_data.sh" $DATA
exec bash "$(dirname "$0")/ance_tele_nq.sh"
