#!/usr/bin/env bash
# DPR on Natural Questions from the official files (Karpukhin et al. 2020, Table 2, "Single", NQ column).
# Expected: top-20 / top-100 of 78.4 / 85.4 (paper), 79.97 / 85.87 (released checkpoint). The reader's exact match: 41.5
# (paper, Table 4). Ours: not run (docs/replication.md).
# Time: not measured here; DPR's own training took about a day on 8 V100. Disk: 13 GB for the corpus, 33 GB for the
# vectors, 11 GB for checkpoints.
#
# `accelerate launch` starts one process for each GPU. Several processes without a GPU: LAUNCH="torchrun ..." (README).
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/nq}
RUN=${RUN:-runs/dpr_nq}
CONFIG=${CONFIG:-config/train_dpr_nq.yaml}
INIT=${INIT:-bert-base-uncased}
LAUNCH=${LAUNCH:-accelerate launch --quiet}
TRAIN_FLAGS=${TRAIN_FLAGS:-}
READER_INIT=${READER_INIT:-bert-base-uncased}
READER_FLAGS=${READER_FLAGS:-}
GOLD=${GOLD-$DATA/gold_train.json}                 # DPR's gold pages of the training questions; GOLD= for none
case "$DATA$RUN" in *" "*) echo "DATA and RUN cannot have spaces in them" >&2 && exit 2 ;; esac

# Data: 21,015,324 passages; 58,880 training and 6,515 dev questions with a BM25 negative each; 3,610 test questions.
if [ ! -f $DATA/corpus.tsv ]; then
    python -m prepare.download psgs_w100.tsv --out $DATA
    mv $DATA/psgs_w100.tsv $DATA/corpus.tsv
fi
for split in train dev test; do
    [ -f $DATA/$split.jsonl ] || [ -f $DATA/psgs_w100.tsv.source.json ] || [ -n "$(find -L $DATA/corpus.tsv -size +10G)" ] ||
        { echo "error: $DATA has a corpus of its own, but no $split.jsonl; put it there" >&2 && exit 2; }
done
for split in train dev; do
    if [ ! -f $DATA/$split.jsonl ]; then
        python -m prepare.download biencoder-nq-$split.json --out $DATA
        python -m prepare.convert dpr_json $DATA/biencoder-nq-$split.json $DATA/$split.jsonl
    fi
done
if [ ! -f $DATA/test.jsonl ]; then
    python -m prepare.download nq-test.qa.csv --out $DATA
    python -m prepare.convert dpr_qa $DATA/nq-test.qa.csv $DATA/test.jsonl
fi

$LAUNCH train_dpr.py --config $CONFIG --run_dir $RUN --init $INIT --resume exact \
    --train $DATA/train.jsonl --dev $DATA/dev.jsonl --corpus $DATA/corpus.tsv $TRAIN_FLAGS
$LAUNCH doc2embedding.py --doc_encoder $RUN/doc_encoder --corpus $DATA/corpus.tsv --out $RUN/embeddings
python test_dpr.py --questions $DATA/test.jsonl --corpus $DATA/corpus.tsv --embeddings $RUN/embeddings \
    --query_encoder $RUN/query_encoder --index stream --out $RUN/test/test.run

# The reader (paper Sec. 6) learns from what this retriever finds for the training questions.
for split in train dev; do
    python test_dpr.py --questions $DATA/$split.jsonl --corpus $DATA/corpus.tsv --embeddings $RUN/embeddings \
        --query_encoder $RUN/query_encoder --index stream --k 200 --out $RUN/$split/$split.run
done
if [ "$GOLD" = $DATA/gold_train.json ] && [ ! -f $GOLD ]; then
    python -m prepare.download nq-train_gold_info.json --out $DATA
    mv $DATA/nq-train_gold_info.json $GOLD
fi
$LAUNCH train_reader.py --config config/train_reader_nq.yaml --run_dir $RUN/reading --init $READER_INIT \
    --train $DATA/train.jsonl --train_run $RUN/train/train.run --dev $DATA/dev.jsonl --dev_run $RUN/dev/dev.run \
    --gold "$GOLD" --corpus $DATA/corpus.tsv --resume exact $READER_FLAGS
$LAUNCH answer.py --reader $RUN/reading/reader --questions $DATA/test.jsonl --ranking $RUN/test/test.run \
    --corpus $DATA/corpus.tsv --depth 100 --out $RUN/test/reader.json
