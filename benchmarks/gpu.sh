#!/usr/bin/env bash
# What a GPU is needed for, in stages of less than four minutes that can each be run alone:
#
#     benchmarks/gpu.sh STAGE...          smoke, headline, tests, tune, profile
#     benchmarks/gpu.sh --dry-run [STAGE...]   the same, tiny, on a CPU under the interpreter
#
#   smoke     is every strategy right and repeatable, and what do its kernels take alone
#   headline  layers at the project's goal shapes against every provider, then further shapes
#   tests     the tests marked gpu
#   tune      measures tiles; a changed tiles.json lies in $OUT afterwards
#   profile   kernels of a step, and ncu where it is installed
#
# It needs Linux with a GPU and python3 with torch and triton; PYTHON names another interpreter.
# Nothing is installed or downloaded. Every row is on disk as soon as it is known, in $OUT or
# benchmarks/results/<device>, so a stage that is cut off keeps what it has. LIMIT is the time of a
# stage in seconds (235).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-235}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

dry=
if [ "${1-}" = --dry-run ]; then
    dry=1
    export TRITON_INTERPRET=1
    OUT=${OUT:-.benchmarks/gpu_dry_run}
    shift
    [ $# -gt 0 ] || set -- smoke headline tests tune profile
elif ! "$PYTHON" -c 'import torch, triton; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $PYTHON finds no GPU, or no torch or triton; --dry-run needs no GPU" >&2
    exit 2
fi
if [ $# -eq 0 ]; then
    echo "gpu.sh: expected some of smoke, headline, tests, tune, profile" >&2
    exit 2
fi
if [ -z "${OUT-}" ]; then
    OUT=benchmarks/results/$("$PYTHON" -c \
        'from benchmarks.environment import describe; print(describe("cuda").slug)')
fi
mkdir -p "$OUT"

status=0
run() { # COMMAND...: within what is left of the stage's time
    local left=$((LIMIT - (SECONDS - began)))
    echo "== $* (at most $left s)"
    timeout --kill-after=5 "$((left > 1 ? left : 1))" "$@" || {
        echo "== failed with status $?: $*" >&2
        status=1
    }
}
module() { run "$PYTHON" -m "$@"; }
measure() { # BUDGET ARGUMENTS...: rows
    local budget=$1
    shift
    if [ -n "$dry" ]; then
        module benchmarks --device cpu --tiny --out "$OUT" "$@" --dtype fp32 --budget 5 \
            --case-budget 0.1
    else
        module benchmarks --device cuda --out "$OUT" --budget "$budget" "$@"
    fi
}

smoke() {
    module benchmarks.speed.smoke --out "$OUT" ${dry:+--tiny}
    measure 90 --only '^kernel' --case-budget 3
}
headline() {
    # torch.compile takes most of a minute per shape, so its providers run last and at one shape.
    measure 150 --only '^layer-main(?!.*compiled)' --dtype bf16 --case-budget 10
    [ -n "$dry" ] || measure 30 --shapes 8192x4096x4096 --case-budget 5 \
        --only '^layer.*(dcft|compiled)$'
    module benchmarks.report "$OUT"
}
tests() {
    if [ -n "$dry" ]; then
        module pytest -q -p no:cacheprovider -m gpu --collect-only tests/kernels
    else
        local jobs
        jobs=$("$PYTHON" -c 'import os, xdist; print("-n", max(1, os.cpu_count() - 1))' 2> /dev/null)
        # shellcheck disable=SC2086
        module pytest -q -p no:cacheprovider -m gpu tests $jobs --maxfail=25
    fi
}
tune() {
    # An entry takes up to a minute, and the last one starts before the budget is spent.
    local options=(--only bf16 --budget $((LIMIT - 70)))
    [ -z "$dry" ] || options=(--dry-run --only 'expand fp32')
    module benchmarks.tune --out "$OUT" --table "$OUT/tiles.json" "${options[@]}"
}
profile() {
    module benchmarks.speed.profile --out "$OUT" ${dry:+--tiny}
    if [ -z "$dry" ] && command -v ncu > /dev/null; then
        run ncu --csv --set basic --kernel-name 'regex:^_.*_kernel$' --log-file "$OUT/ncu.csv" \
            "$PYTHON" -m benchmarks.speed.profile --once --out "$OUT"
    fi
}

for stage in "$@"; do
    began=$SECONDS
    case $stage in
        smoke | headline | tests | tune | profile) "$stage" ;;
        *)
            echo "gpu.sh: no stage '$stage'" >&2
            exit 2
            ;;
    esac
    echo "== $stage: $((SECONDS - began)) s; results in $OUT"
done
exit $status
