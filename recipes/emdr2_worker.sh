#!/usr/bin/env bash
# EMDR2's asynchronous refresh: encode the passages again while train_emdr2.py trains on other devices (refresh: async).
# Run:  CUDA_VISIBLE_DEVICES=1 bash recipes/emdr2_worker.sh runs/emdr2_nq --corpus data/nq/corpus.tsv --mixed_precision fp16
# LAUNCH="accelerate launch" starts doc2embedding.py on several devices; the flags after the run's folder are its flags.
#
# The two share nothing but RUN/refresh (utils/live_index.py), so each may be slow, die and start again without the
# other. The newest passage encoder becomes vectors under a hidden name; renamed to `embeddings`, they are handed over.
# The same command goes on after a crash. It ends when the training run has written its metrics.json.
#
# differs: EMDR2's training waits for the vectors, and two broadcasts tell when (tasks/openqa/e2eqa/async_indexer.py)
set -euo pipefail
[ -z "${DRY:-}" ] || exit 0                        # a recipe counts its stages (progress.sh)
RUN=$1 LAUNCH=${LAUNCH:-python} SECONDS_BETWEEN=${SECONDS_BETWEEN:-5}

while [ ! -f "$RUN/metrics.json" ]; do
    encoder=$(ls -d "$RUN"/refresh/step_*/doc_encoder 2>/dev/null | tail -1 || true)
    step=$(dirname "$encoder")
    if [ -n "$encoder" ] && [ ! -d "$step/embeddings" ]; then
        # why at once: the trainer replaces an encoder that nobody works on, and python takes seconds to start
        mkdir "$step/.embeddings" 2>/dev/null || true
        if $LAUNCH doc2embedding.py --doc_encoder "$encoder" --out "$step/.embeddings" "${@:2}"; then
            if [ -d "$encoder" ]; then mv "$step/.embeddings" "$step/embeddings"; else rm -rf "$step"; fi
        elif [ -d "$encoder" ]; then # what went wrong stands above; repeat the command when it is settled
            exit 1
        fi # the trainer has replaced this encoder by a newer one
    else
        sleep "$SECONDS_BETWEEN"
    fi
done
echo "$RUN: training has finished, so has its worker"
