#!/usr/bin/env bash
# From a spreadsheet of artists to the same spreadsheet with bios: convert, validate, preview, run, export.
#
#   bash samples/pipeline.sh [--local] [--yes] CSV OUT [OPTION...]
#
# CSV is the spreadsheet, OUT the new one, for example bios.csv. Run the same command again after an interruption or
# after a change of the spreadsheet: it pays only for what has no bio yet. On a terminal it asks before it pays.
#
# --local               use a local mock server: no key, no cost, made-up bios (CSV and OUT may be left out)
# --yes                 do not ask, and show no bios beforehand
# --prices IN,OUT       US dollars per million input and output tokens, to say what it costs
# --max-new N           send nothing if it would be more than N requests
# --include-rejected    send the rejected requests again, too
# --results FILE        do not pay again for the bios in this results file; repeatable
# --interval SECONDS    time between two looks at the batches (default: 30)
#
# All other options are those of gen_batch_jsonl.py: --id-column, --name-column, --encoding, --prompt-file and so on.
# The default prompt is samples/bio_prompt.md, the default model gpt-6-luna with the settings in samples/bio_body.json.
set -euo pipefail
say() { echo "pipeline.sh: $1" >&2; }
fail() { say "error: $1"; exit "${2:-1}"; }
samples=$(dirname "${BASH_SOURCE[0]}")
project=$(CDPATH='' cd "$samples/.." && pwd)
usage=$(sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}")
[[ $# -gt 0 ]] || { echo "$usage" >&2; exit 2; }

# ---- options: the pipeline's own, and those that it hands on
files=() convert_with=() run_with=() preview_with=(--requests 3) export_with=(--excel)
local_api=no ask=no interval='' prices='' body='' endpoint=/v1/responses model=${MODEL:-gpt-6-luna}
[[ ! -t 0 || ! -t 2 ]] || ask=yes
prompt=${PROMPT_ID:+"$PROMPT_ID (from PROMPT_ID)"}${PROMPT_FILE:+"$PROMPT_FILE (from PROMPT_FILE)"}
while [[ $# -gt 0 ]]; do
    option=${1%%=*} value=${1#*=} both=$1
    case $1 in
        --help | -h) echo "$usage"; exit ;;
        --local=* | --yes=*) fail "$option takes no value; see --help" 2 ;;
        --local | --yes | --include-rejected | --skip-header | --strict | --verbose | --*=*) ;;
        --*)
            [[ $# -gt 1 && $2 != --* ]] || fail "$1 needs a value, or is no option of this script; see --help" 2
            value=$2 both=$1=$2; shift ;;
        -*) fail "CSV and OUT must be files; if $1 is the name of one, write ./$1" 2 ;;
        *) files+=("$1"); shift; continue ;;
    esac
    shift
    case $option in
        --local) local_api=yes ;;
        --yes) ask=no ;;
        --prices) prices=$value ;;
        --interval) interval=$value ;;
        --include-rejected | --max-new | --results) run_with+=("$both") ;;
        --model) model=$value ;;
        --prompt-id | --prompt-file) prompt=$value convert_with+=("$both") ;;
        --endpoint) endpoint=$value convert_with+=("$both") ;;
        --body-file) body=$value convert_with+=("$both") ;;
        --id-column | --name-column | --encoding | --skip-header) convert_with+=("$both") export_with+=("$both") ;;
        --in | --out) fail "CSV and OUT are named without $option; see --help" 2 ;;
        *) convert_with+=("$both") ;;
    esac
done
if [[ $local_api == yes ]]; then
    [[ ${#files[@]} -gt 0 ]] || files=("$samples/input.csv")
    [[ ${#files[@]} -gt 1 ]] || files+=(bios.csv)
    ask=no interval=${interval:-0.2}
fi
[[ ${#files[@]} -eq 2 ]] || fail "name one CSV and one OUT; see --help" 2
csv=${files[0]} out=${files[1]}
convert_with+=(--model "$model")
[[ -n $prompt ]] || { prompt=$samples/bio_prompt.md; convert_with+=(--prompt-file "$prompt"); }
if [[ $model == gpt-6-luna ]]; then
    prices=${prices:-0.05,0.25}
    [[ -n $body || $endpoint != */responses ]] || { body=$samples/bio_body.json; convert_with+=(--body-file "$body"); }
fi
[[ -z $prices ]] || { run_with+=(--prices "$prices"); preview_with+=(--prices "$prices"); }
if [[ $ask == yes ]]; then run_with+=(--ask); else exec < /dev/null; fi
run_with+=(--interval "${interval:-30}")

# ---- files: requests, results and the checksum of OUT stand beside OUT
[[ ! -e $csv || -f $csv ]] || fail "CSV must be a file, as it is read twice: $csv" 2
[[ $out == *[!/].[cC][sS][vV] && ! -d $out ]] || fail "OUT must be the name of a .csv file: $out" 2
[[ ! $csv -ef $out ]] || fail "$csv is both CSV and OUT; choose another OUT" 2
stem=${out%.*}
[[ ! -e $out || -e $stem.written ]] || fail "$out was not written by this script; rename it, or choose another OUT" 2
[[ $local_api == no || ! -e $stem.results.jsonl ]] ||
    fail "$out has bios that were paid for; choose another OUT for --local" 2
kept=$stem
[[ $local_api == no ]] || kept=$stem.local
requests=$kept.requests.jsonl results=$kept.results.jsonl

# ---- Python: the active virtual environment if it has the packages, else .venv
has_packages() {
    "$1" -c 'import importlib.metadata as packages, sys
sys.exit(sys.version_info < (3, 11) or not packages.version("openai").startswith("3."))' 2> /dev/null
}
python=${VIRTUAL_ENV:-$project/.venv}/bin/python
has_packages "$python" || python=$project/.venv/bin/python
if ! has_packages "$python"; then
    newest=''
    if ! "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        for newest in python3.{20..11} python3 ''; do
            [[ -n $newest ]] || fail "no Python 3.11 or later with the module venv was found; install one"
            ! "$newest" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || break
        done
    fi
    say "installing requirements.txt into $project/.venv"
    [[ -z $newest ]] || "$newest" -m venv --clear "$project/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$project/requirements.txt"
fi

# ---- whatever ends this script ends what it has started
trap 'kill $(jobs -p) 2> /dev/null || true; wait; [[ $local_api == no ]] || rm -rf "$scratch"' EXIT
trap 'exit 130' INT; trap 'exit 143' TERM; trap 'exit 129' HUP
if [[ $local_api == yes ]]; then
    scratch=$(mktemp -d)
    "$python" "$samples/local_batch_api.py" > "$scratch/url" &
    until [[ -s $scratch/url ]]; do
        kill -0 "$!" 2> /dev/null || fail "the local mock server did not start"
        sleep 0.05
    done
    export OPENAI_BASE_URL OPENAI_API_KEY=local XDG_STATE_HOME=$scratch NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
    OPENAI_BASE_URL=$(< "$scratch/url")
fi

# ---- the chain
say "prompt: $prompt; model: $model; body: ${body:-none}; prices: ${prices:-none}"
"$python" "$project/gen_batch_jsonl.py" --in "$csv" --out "$requests" "${convert_with[@]}"
"$python" "$project/batch_tool.py" validate --in "$requests"
if [[ $ask == yes && ! -s $results ]]; then
    say "first a few bios to read; the batch pays for them again"
    "$python" "$project/batch_tool.py" preview --in "$requests" "${preview_with[@]}" >&2
fi
# run is in the background, so that a signal to this script ends it at once; <&0 lets it read the answer all the same
before=$(ls -iL "$results" 2> /dev/null || true)
status=0
"$python" "$project/batch_tool.py" run --in "$requests" --out "$results" "${run_with[@]}" <&0 &
wait "$!" || status=$?
# 1 with new results means that some artists have no bio: the others are worth having
[[ $status -eq 0 || ( $status -eq 1 && $(ls -iL "$results" 2> /dev/null) != "$before" ) ]] || exit "$status"
if [[ -s $out && $(cksum < "$out") != $(cat "$stem.written" 2> /dev/null) ]]; then
    edited=$stem.edited-$(date +%Y%m%d-%H%M%S).csv
    cp -p "$out" "$edited"
    say "$out was edited, so it was copied to $edited before it is written again"
    : > "$out"
fi
: >> "$stem.written"
"$python" "$project/batch_tool.py" export --in "$requests" --results "$results" --csv "$csv" \
    --out "$out" "${export_with[@]}"
cksum < "$out" > "$stem.written"
exit "$status"
