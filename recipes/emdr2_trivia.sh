#!/usr/bin/env bash
# EMDR2 on TriviaQA (Singh et al. 2021): recipes/emdr2_nq.sh on other questions. Published exact match, dev / test, base
# size, 50 passages read: 71.1 / 71.4. Ours: not run. Time: not measured.
# RETRIEVER: trained with config/train_dpr_trivia.yaml, or CLOZE=true. The corpus is that of NQ: a link saves 13 GB.
export DATA=${DATA:-data/trivia} SET=${SET:-trivia} RUN=${RUN:-runs/emdr2_trivia}
export RETRIEVER=${RETRIEVER:-runs/dpr_trivia} CONFIG=${CONFIG:-config/train_emdr2_trivia.yaml}
exec bash "$(dirname "$0")/emdr2_nq.sh"
