#!/usr/bin/env bash
# ANCE-Tele on TriviaQA (Sun et al. 2022): recipes/ance_tele_nq.sh on other questions. Those of the test may be longer.
# Expected after episode 3, top-5 / 20 / 100 of 11,313 test questions (README of ANCE-Tele's code): 76.9 / 83.4 / 87.3
# Ours: not run. Time: not measured. The corpus is that of NQ: a link from data/nq/corpus.tsv saves 13 GB.
export DATA=${DATA:-data/trivia} SET=${SET:-trivia} RUN=${RUN:-runs/ance_tele_trivia}
export CONFIG=${CONFIG:-config/train_dpr_ance_tele_trivia.yaml}
export TEST_TOKENS=${TEST_TOKENS:-64}
exec bash "$(dirname "$0")/ance_tele_nq.sh"
