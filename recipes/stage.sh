# Sourced by most recipes: how a stage is run once, and the stages that they share. Needs: DATA, RUN, LAUNCH, FORMAT,
# ENCODE_FLAGS; teach_cross_encoder also CROSS_CONFIG, CROSS_START, CROSS_FLAGS; pseudo_labels also UNLABELLED_DEPTH, BELOW,
# ABOVE. MEASURE: a command that runs a stage and notes what it cost (recipes/measured.py PEAKS); empty: none.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/progress.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_DISABLE_TELEMETRY=1
case "$DATA$RUN" in *" "*) echo "DATA and RUN cannot have spaces in them" >&2 && exit 2 ;; esac
mkdir -p $RUN
under $RUN

# finished OUTPUT: it exists and is complete; or the file FOR exists, which OUTPUT would only have led to
finished() {
    if [ -n "${FOR:-}" ] && [ -e $FOR ]; then return; fi
    if [ "${1##*/}" = manifest.json ]; then grep -qs '"complete": true' $1; else [ -e $1 ]; fi
}

# stage OUTPUT COMMAND...: run the command unless OUTPUT exists. Every script writes its output whole or not at all and
# continues where it was killed, and so does a recipe. Vectors exist when their manifest says that they are complete.
# trap: an existing OUTPUT is not compared with the files that it was made from: delete what depends on a file that you
# replace. Other variables make other commands, which is said; give them another RUN.
stage() {
    local output=$1 began=$SECONDS state=open made
    shift
    ! finished $output || state=done
    count $(name_of $output) $state || return 0
    if [ $state = done ]; then
        made=$(grep -s "^$(name_of $output)	" $TOP/commands.tsv | tail -1 | cut -f 2- || true)
        [ -z "$made" ] || [ "$made" = "$*" ] || echo "warning: $output is there, made by another command: $made" >&2
        return 0
    fi
    printf '%s\t%s\n' $(name_of $output) "$*" >>$TOP/commands.tsv
    printf '\n== %s%s\n' "$(place)" "$*"
    if [ "$(type -t "$1")" = function ]; then "$@"; else ${MEASURE:+$MEASURE $output} "$@"; fi
    [ -e $output ] || { echo "error: $output is not there after: $*" >&2 && exit 1; }
    printf '%s\t%s\n' $(name_of $output) $((SECONDS - began)) >>$TOP/seconds.tsv
}

CORPUS="--corpus $DATA/corpus.tsv --corpus_format $FORMAT"

# only NAME WORDS: each word of the variable NAME is one of WORDS
only() {
    local word
    for word in ${!1}; do
        [[ " $2 " = *" $word "* ]] || { echo "error: $1: $word is none of $2" >&2 && exit 2; }
    done
}

# DPR's files under our names, each only where it is not there yet: dpr_corpus -> DATA/corpus.tsv, 21,015,324 passages;
# dpr_training NAME OUT [FLAGS]: questions with their passages; dpr_questions NAME OUT: questions with answers
# of_dpr FILE: stop unless the corpus is DPR's. Its questions would be trained and tested on other passages
of_dpr() {
    [ -z "$DRY" ] || return 0
    [ ! -f $DATA/corpus.tsv ] || [ -f $DATA/psgs_w100.tsv.source.json ] || [ -n "$(find -L $DATA/corpus.tsv -size +10G)" ] ||
        { echo "error: $DATA has a corpus of its own, but no ${1##*/}; put it there" >&2 && exit 2; }
}
dpr_corpus() {
    [ ! -f $DATA/corpus.tsv ] || return 0
    python -m prepare.download psgs_w100.tsv --out $DATA
    mv $DATA/psgs_w100.tsv $DATA/corpus.tsv
}
dpr_training() {
    [ ! -f $2 ] || return 0
    of_dpr $2
    python -m prepare.download biencoder-$1.json --out $DATA
    python -m prepare.convert dpr_json $DATA/biencoder-$1.json $2 "${@:3}"
}
dpr_questions() {
    [ ! -f $2 ] || return 0
    of_dpr $2
    python -m prepare.download $1.qa.csv --out $DATA
    python -m prepare.convert dpr_qa $DATA/$1.qa.csv $2
}

# bm25 FOLDER NAME QUESTIONS: BM25's ranking of the questions -> FOLDER/bm25_NAME.run, .metrics.json
bm25() {
    stage $1/bm25_$2.run python -m utils.bm25 --questions $3 $CORPUS --out $1/bm25_$2.run --index $RUN/bm25
}

# bm25_negatives FOLDER NAME QUESTIONS N: its N best passages without an answer are the negatives -> FOLDER/NAME.jsonl
bm25_negatives() {
    bm25 $1 $2 $3
    stage $1/$2.jsonl python mine_negatives.py --mode topk --questions $3 $CORPUS --run $1/bm25_$2.run \
        --negatives $4 --out $1/$2.jsonl
}

# encode MODEL: the corpus by MODEL/doc_encoder -> MODEL/embeddings
encode() {
    stage $1/embeddings/manifest.json $LAUNCH doc2embedding.py --doc_encoder $1/doc_encoder $CORPUS \
        --out $1/embeddings $ENCODE_FLAGS
}

# search MODEL QUESTIONS K NAME [FLAGS]: the K passages nearest to each question -> MODEL/NAME.run, .metrics.json
search() {
    stage $1/$4.metrics.json python test_dpr.py --questions $2 $CORPUS --embeddings $1/embeddings \
        --query_encoder $1/query_encoder --index stream --k $3 --out $1/$4.run "${@:5}"
}

# rescore MODEL QUESTIONS DEPTH NAME: MODEL/NAME.run by the cross-encoder -> MODEL/NAME_ce.run, .metrics.json
rescore() {
    stage $1/$4_ce.metrics.json $LAUNCH rerank.py --questions $2 $CORPUS --ranking $1/$4.run --depth $3 \
        --cross_encoder $RUN/c/cross_encoder --out $1/$4_ce.run
}

# teach_cross_encoder: RocketQA's M_C, from RUN/c.jsonl -> RUN/c/cross_encoder
teach_cross_encoder() {
    stage $RUN/c/metrics.json $LAUNCH train_cross_encoder.py --config $CROSS_CONFIG --run_dir $RUN/c \
        --init $CROSS_START --train $RUN/c.jsonl $CORPUS --resume exact $CROSS_FLAGS
}

# pseudo_labels N: what M_C is sure of in M_D1's ranking of unlabelled questions, with N negatives each, and M_D1's own
# training file -> RUN/d2.jsonl
pseudo_labels() {
    search $RUN/d1 $DATA/unlabelled.jsonl $UNLABELLED_DEPTH unlabelled
    rescore $RUN/d1 $DATA/unlabelled.jsonl $UNLABELLED_DEPTH unlabelled
    stage $RUN/pseudo.jsonl python mine_negatives.py --mode pseudo_label --questions $DATA/unlabelled.jsonl \
        --run $RUN/d1/unlabelled.run $CORPUS --scores $RUN/d1/unlabelled_ce.run --negative_below $BELOW \
        --positive_above $ABOVE --negatives $1 --depth $UNLABELLED_DEPTH --out $RUN/pseudo.jsonl
    stage $RUN/d2.jsonl write $RUN/d2.jsonl cat $RUN/d1.jsonl $RUN/pseudo.jsonl
}

# write OUTPUT COMMAND...: write what the command prints, whole or not at all
write() {
    "${@:2}" >$1.tmp
    mv $1.tmp $1
}

# blank_titles FOLDER: its corpus.tsv or corpus.tsv.gz without titles. In nq_small a title tells the positives (docs/log.md).
# Which column it is, the header says, or FORMAT
blank_titles() {
    if [ -f $1/corpus.tsv ]; then cat $1/corpus.tsv; else gunzip -c $1/corpus.tsv.gz; fi |
        awk -F '\t' -v OFS='\t' -v format=$FORMAT '
            NR == 1 { column = format == "marco" ? 2 : 3; for (i = 1; i <= NF; i++) if ($i == "title") column = i }
            NR > 1 || format == "marco" { $column = "" }
            1'
}

# arms NAME...: ARM_seedN=its test ranking, of those that are there; '*' is every name
arms() {
    local name run
    for name; do
        for run in $RUN/${name}_seed*/test.run; do [ ! -f $run ] || echo "$(basename "${run%/test.run}")=$run"; done
    done
}

# keep_ranks NAME=FILE...: the ranks of every test question in the files that are there -> RUN/ranks.json; prints their
# table, with the gains over the first
keep_ranks() {
    local pair there=()
    for pair; do [ ! -f "${pair#*=}" ] || there+=("$pair"); done
    python -m recipes.claims store $DATA/corpus.tsv $DATA/test.jsonl $RUN/ranks.json "${there[@]}"
    python recipes/compare.py $DATA/corpus.tsv $DATA/test.jsonl "${there[@]#*=}"
}
