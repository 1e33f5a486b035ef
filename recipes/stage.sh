# Sourced by the recipes of RocketQA, ANCE-Tele and EMDR2: how a stage is run once, and the stages that they share.
# Needs: DATA, RUN, LAUNCH, FORMAT, ENCODE_FLAGS. MEASURE: a command that runs a stage and notes what it cost
# (recipes/measured.py PEAKS); empty: none.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/progress.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_DISABLE_TELEMETRY=1
case "$DATA$RUN" in *" "*) echo "DATA and RUN cannot have spaces in them" >&2 && exit 2 ;; esac
mkdir -p $RUN
under $RUN

# finished OUTPUT: it is there, complete, or there is what it is FOR
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

# write OUTPUT COMMAND...: write what the command prints, whole or not at all
write() {
    "${@:2}" >$1.tmp
    mv $1.tmp $1
}

# blank_titles FOLDER: its corpus.tsv or corpus.tsv.gz without titles. In nq_small a title tells the positives (docs/log.md)
blank_titles() {
    if [ -f $1/corpus.tsv ]; then cat $1/corpus.tsv; else gunzip -c $1/corpus.tsv.gz; fi |
        awk -F '\t' -v OFS='\t' 'NR > 1 { $3 = "" } 1'
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
