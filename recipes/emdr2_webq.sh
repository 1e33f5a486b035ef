#!/usr/bin/env bash
# EMDR2 on WebQuestions (Singh et al. 2021): recipes/emdr2_nq.sh on other questions. Published exact match, dev / test,
# base size, 50 passages read: 49.9 / 48.7. Ours: not run. Time: not measured.
# RETRIEVER: trained with config/train_dpr_webq.yaml, or CLOZE=true. The corpus is that of NQ: a link saves 13 GB.
export DATA=${DATA:-data/webq} SET=${SET:-webquestions} RUN=${RUN:-runs/emdr2_webq}
export TRAIN=${TRAIN:-$DATA/train.jsonl} DEV=${DEV-$DATA/dev.jsonl}
export RETRIEVER=${RETRIEVER:-runs/dpr_webq} CONFIG=${CONFIG:-config/train_emdr2_webq.yaml}
exec bash "$(dirname "$0")/emdr2_nq.sh"
