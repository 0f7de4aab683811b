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
measure() { # BUDGET ARGUMENTS...: rows of some levels
    local budget=$1
    shift
    if [ -n "$dry" ]; then
        module benchmarks --device cpu --tiny --out "$OUT" "$@" --dtypes fp32 --budget 5 \
            --case-budget 0.1
    else
        module benchmarks --device cuda --out "$OUT" --budget "$budget" "$@"
    fi
}

smoke() {
    module benchmarks.speed.smoke --out "$OUT" ${dry:+--tiny}
    measure 90 --levels kernel --case-budget 3
}
headline() {
    # torch.compile takes most of a minute per shape; without it there is time for more shapes.
    measure 150 --levels layer --sweeps main --dtypes bf16 fp32 --case-budget 10 \
        --without frozen_compiled dcft_compiled
    [ -n "$dry" ] || measure 0 --levels layer --shapes 8192x4096x4096 --case-budget 5 \
        --providers frozen_compiled dcft_compiled dcft
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
    cp dcft_kernels/triton/tiles.json "$OUT/tiles.json"
    if [ -n "$dry" ]; then
        module benchmarks.tune --dry-run --out "$OUT" --kernels expand --dtypes fp32 --budget 5
    else
        module benchmarks.tune --out "$OUT" --table "$OUT/tiles.json" --dtypes bf16 \
            --budget $((LIMIT - 20))
    fi
}
profile() {
    local shape=4096x768x768
    [ -z "$dry" ] || shape=20x32x48
    module benchmarks.speed.profile --out "$OUT" --shapes $shape \
        --methods frozen dcft_row_block dcft_torch lora_by_hand
    [ -z "$dry" ] || return 0
    module benchmarks.speed.profile --out "$OUT" --shapes 8192x4096x4096
    if command -v ncu > /dev/null; then
        run ncu --csv --set basic --kernel-name 'regex:^_.*_kernel$' --log-file "$OUT/ncu.csv" \
            "$PYTHON" -m benchmarks.speed.profile --once --methods dcft_row_block --out "$OUT"
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
