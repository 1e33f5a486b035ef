#!/usr/bin/env bash
# GC-DPR on Natural Questions: DPR's batch of 128 on one GPU of 11 GB (Gao et al. 2021, Table 1).
# Expected: top-5 / 20 / 100 of 68.6 / 79.3 / 86.0 (paper, 31 h on one 2080 Ti). Ours: not run (docs/replication.md).
# The pipeline is DPR's. config/train_gcdpr_nq.yaml is all that differs.
set -euo pipefail
cd "$(dirname "$0")"
RUN=${RUN:-runs/gcdpr_nq} CONFIG=${CONFIG:-config/train_gcdpr_nq.yaml} exec bash dpr_nq.sh
