#!/usr/bin/env bash
# MS MARCO passages as RocketQA and ANCE-Tele use them -> $1/corpus.tsv (id, title, text), train.jsonl, test.jsonl.
# Questions and judgements are MS MARCO's (test: dev small). The titles are RocketQA's: first put para.txt and
# para.title.txt of its data into $1 (wget_data.sh in its repository). A passage without a title gets "-", as in theirs.
set -euo pipefail
[ -z "${DRY:-}" ] || exit 0                        # a recipe counts its stages (progress.sh)
cd "$(dirname "$0")/.."
DATA=$1
case "$DATA" in *" "*) echo "DATA cannot have spaces in it" >&2 && exit 2 ;; esac
if [ ! -f $DATA/corpus.tsv ]; then
    for file in para.txt para.title.txt; do
        if [ ! -f $DATA/$file ]; then
            echo "$DATA/$file is missing: take it from RocketQA's data (its wget_data.sh)" >&2
            exit 2
        fi
    done
    awk -F '\t' -v OFS='\t' 'NR == FNR { title[$1] = $2; next } { print $1, ($1 in title ? title[$1] : "-"), $2 }' \
        $DATA/para.title.txt $DATA/para.txt >$DATA/corpus.tsv.tmp
    mv $DATA/corpus.tsv.tmp $DATA/corpus.tsv
fi
if [ ! -f $DATA/train.jsonl ] || [ ! -f $DATA/test.jsonl ]; then
    python -m prepare.download msmarco --out $DATA
    from=$DATA/msmarco
    python -m prepare.convert msmarco $from/queries.train.tsv $from/qrels.train.tsv $DATA/train.jsonl
    python -m prepare.convert msmarco $from/queries.dev.small.tsv $from/qrels.dev.small.tsv $DATA/test.jsonl
fi
