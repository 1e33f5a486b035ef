# Sourced first by the recipes: which stage of how many begins, how long it took in an earlier run, and what is left.
#
# The number of stages is no constant. The recipe is run once before, dry: with DRY=1 a stage only writes its name down.
# trap: the rest of a recipe is executed in the dry pass too. The programs that write are empty functions there, and a
# recipe asks for what its own stages make by there() and lines_of(). A recipe that another one starts counts on.
DRY=${DRY:-}
if [ -n "$DRY" ]; then
    python() { :; }
    mv() { :; }
    cat() { :; }
elif [ -z "${STAGES:-}" ]; then
    STAGES=$(mktemp)                               # a line a stage, in order: its name, and `done` or `open`
    export STAGES
    trap 'rm -f "$STAGES" "$STAGES.begun"' EXIT
    DRY=1 bash "$0" "$@" >/dev/null 2>&1 || true   # a mistake is told by the real run
fi

# under RUN: the folder of the outermost recipe. An earlier run of the same name may be stored in results/
under() {
    export TOP=${TOP:-$1}
    EARLIER=results/${TOP##*/}
}

# name_of OUTPUT: the name of a stage, its path below that folder
name_of() { echo "${1#"$TOP"/}"; }

# there PATH: it exists; in the dry pass, a stage before makes it
there() { [ -e "$1" ] || { [ -n "$DRY" ] && grep -q "^$(name_of "$1")	" "$STAGES"; }; }

# lines_of FILE: how many lines it has; in the dry pass, which has no files, many
lines_of() { if [ -n "$DRY" ]; then echo 1000000; else wc -l <"$1"; fi; }

# count NAME STATE: note that a stage is planned or begins; false in the dry pass, which goes no further
count() {
    if [ -n "$DRY" ]; then
        printf '%s\t%s\n' "$1" "$2" >>"$STAGES"
        return 1
    fi
    echo "$1" >>"$STAGES.begun"
}

# place: prints `12 of 58 | `; with the times of an earlier run, `12 of 58 | 3.9 minutes, 51.0 to the end (FOLDER) | `
place() {
    local at file times=()
    at=$(wc -l <"$STAGES.begun")
    for file in "$EARLIER/seconds.tsv" "$EARLIER/peaks.tsv"; do [ ! -f "$file" ] || times+=("$file"); done
    awk -F '\t' -v at="$at" -v plan="$STAGES" -v folder="$EARLIER" '
        FILENAME != plan { seconds[$1] += NF > 2 ? $3 : $2; next }
        { total++ }
        total == at && seconds[$1] >= 3 { takes = sprintf("%.1f minutes, ", seconds[$1] / 60) }
        !known[$1]++ && total >= at && $2 == "open" { left += seconds[$1] } # a stage that comes again costs nothing
        END {
            if (total) printf "%d of %d | ", at, total
            if (left) printf "%s%.1f to the end (%s) | ", takes, left / 60, folder
        }' ${times[@]+"${times[@]}"} "$STAGES"
}
