#!/usr/bin/env bash
# From a CSV of artists to a CSV of bios: convert, validate, run, export.
#
#   bash samples/pipeline.sh [--local] [--prompt-id ID] [CSV [OUT]]
#
# CSV is samples/input.csv by default, OUT is bios.csv. The pipeline keeps the requests and the results beside OUT, as
# bios.requests.jsonl and bios.results.jsonl. Run it again after a change of the spreadsheet or after an interruption:
# it pays only for requests that have no result yet.
#
# --local        use a local mock server: no key, no cost, made-up bios (kept in bios.local.results.jsonl)
# --prompt-id    use this stored prompt; otherwise PROMPT_ID, PROMPT_FILE or samples/bio_prompt.md is used
#
# Without --local, OPENAI_API_KEY must be set. Other variables: MODEL (default: gpt-6-luna), INTERVAL (seconds between
# polls, default: 30) and PYTHON (the interpreter for .venv, default: python3).
set -euo pipefail

samples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$samples")

fail() {
    echo "pipeline.sh: error: $1" >&2
    exit "${2:-1}"
}

local_api=no
prompt=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --local) local_api=yes ;;
        --prompt-id) [[ -n ${2:-} ]] || fail "--prompt-id needs an ID" 2; prompt=(--prompt-id "$2"); shift ;;
        --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        *) fail "unknown option $1; see --help" 2 ;;
    esac
    shift
done
[[ $# -le 2 ]] || fail "too many arguments; see --help" 2
csv=${1:-$samples/input.csv}
out=${2:-bios.csv}
[[ $out != -* && $out != */ && ! -d $out ]] || fail "OUT is not the name of a file: $out" 2
[[ ! $csv -ef $out ]] || fail "$csv is both CSV and OUT; choose another OUT" 2
requests=${out%.csv}.requests.jsonl
results=${out%.csv}.results.jsonl
[[ $local_api == no ]] || results=${out%.csv}.local.results.jsonl # keep made-up bios apart from paid ones
model=${MODEL:-gpt-6-luna}
if [[ ${#prompt[@]} -gt 0 ]]; then
    prompt_used="stored prompt ${prompt[1]}"
elif [[ -n ${PROMPT_ID:-} ]]; then
    prompt_used="stored prompt $PROMPT_ID (from PROMPT_ID)"
elif [[ -n ${PROMPT_FILE:-} ]]; then
    prompt_used="$PROMPT_FILE (from PROMPT_FILE)"
else
    prompt=(--prompt-file "$samples/bio_prompt.md")
    prompt_used=$samples/bio_prompt.md
fi
[[ $local_api == yes || -n ${OPENAI_API_KEY:-} ]] || fail "OPENAI_API_KEY is not set; export it, or try --local"

# use the active virtual environment, or else .venv, and install the packages there if they are missing
venv=${VIRTUAL_ENV:-$project/.venv}
python=$venv/bin/python
if ! "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("openai"))' 2>/dev/null; then
    echo "pipeline.sh: installing requirements.txt into $venv" >&2
    [[ -x $python ]] || "${PYTHON:-python3}" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$project/requirements.txt"
fi

if [[ $local_api == yes ]]; then
    scratch=$(mktemp -d)
    url=$scratch/url
    export XDG_STATE_HOME=$scratch
    "$python" "$samples/local_batch_api.py" > "$url" &
    server=$!
    trap 'kill "$server" 2>/dev/null || true; rm -rf "$scratch"' EXIT
    until [[ -s $url ]]; do
        kill -0 "$server" 2>/dev/null || fail "the local mock server did not start"
        sleep 0.05
    done
    export OPENAI_BASE_URL OPENAI_API_KEY=local
    OPENAI_BASE_URL=$(<"$url")
fi

interval=${INTERVAL:-30}
[[ $local_api == no ]] || interval=0.2

echo "pipeline.sh: prompt: $prompt_used; model: $model" >&2
"$python" "$project/gen_batch_jsonl.py" --in "$csv" --out "$requests" ${prompt[@]+"${prompt[@]}"} --model "$model"
"$python" "$project/batch_tool.py" validate --in "$requests"
status=0
"$python" "$project/batch_tool.py" run --in "$requests" --out "$results" --interval "$interval" || status=$?
# exit code 1 with results written means that some requests have no bio; the others are worth having
[[ $status -eq 0 || ( $status -eq 1 && -e $results && ! $results -ot $requests ) ]] || exit "$status"
"$python" "$project/batch_tool.py" export --in "$requests" --results "$results" --out "$out"
exit "$status"
