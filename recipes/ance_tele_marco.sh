#!/usr/bin/env bash
# ANCE-Tele on MS MARCO passages (Sun et al. 2022): recipes/ance_tele_nq.sh with one encoder for questions and passages,
# a negative being what nobody judged relevant, and other numbers. From coCondenser, pre-trained on this corpus.
# Expected after episode 3, MRR@10 / R@1000 of 6,980 dev questions: 39.1 / 98.4 (README of ANCE-Tele's code, OpenMatch's
# model card), here MRR@10 and hit@1000, on RocketQA's corpus with titles: not comparable with numbers without them.
# Ours: not run. Time: not measured.
set -euo pipefail
export DATA=${DATA:-data/msmarco} RUN=${RUN:-runs/ance_tele_marco} FORMAT=${FORMAT:-marco}
export START=${START:-Luyu/co-condenser-marco}
export CONFIG=${CONFIG:-config/train_dpr_ance_tele_marco.yaml}
export NEGATIVES=${NEGATIVES:-15 31 31} STOP_AFTER=${STOP_AFTER:-20000 20000 0} # of 62,867 steps an epoch, 3 epochs
export TRAIN=$DATA/train.jsonl
export SAMPLE=${SAMPLE:-30} POSITIVES=given TEST_DEPTH=${TEST_DEPTH:-1000}      # 60 negatives, then 120, then 180
bash "$(dirname "$0")/marco_data.sh" $DATA
exec bash "$(dirname "$0")/ance_tele_nq.sh"
