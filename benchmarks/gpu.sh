#!/usr/bin/env bash
# What a GPU is needed for, in stages of less than four minutes that can each be run alone:
#
#     benchmarks/gpu.sh STAGE...          smoke, headline, tests, shapes, tune, profile
#     benchmarks/gpu.sh --dry-run [STAGE...]   the same, tiny, on a CPU under the interpreter
#
#   smoke     is every strategy right and repeatable, and what do its kernels take alone
#   headline  layers at the project's goal shapes against every provider, a block of Llama-3-8B
#   tests     the tests marked gpu; failures.txt names those that failed
#   shapes    layers of other widths and numbers of tokens; torch.compile
#   tune      measures tiles; a changed tiles.json lies in $OUT afterwards
#   profile   kernels of a step; compute-sanitizer and ncu where they are installed
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
    [ $# -gt 0 ] || set -- smoke headline tests shapes tune profile
elif ! "$PYTHON" -c 'import torch, triton; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $PYTHON finds no GPU, or no torch or triton; --dry-run needs no GPU" >&2
    exit 2
fi
if [ $# -eq 0 ]; then
    echo "gpu.sh: expected some of smoke, headline, tests, shapes, tune, profile" >&2
    exit 2
fi
if [ -z "${OUT-}" ]; then
    OUT=benchmarks/results/$("$PYTHON" -c \
        'from benchmarks.environment import describe; print(describe("cuda").slug)')
fi
mkdir -p "$OUT"

status=0
run() { # COMMAND...: within what is left of the stage's time, and at most MOST seconds
    local left=$((LIMIT - (SECONDS - began)))
    local most=${MOST:-$left}
    left=$((left < most ? left : most))
    echo "== $* (at most $left s)"
    timeout --kill-after=5 "$((left > 1 ? left : 1))" "$@" || {
        echo "== failed with status $?: $*" >&2
        status=1
    }
}
module() { run "$PYTHON" -m "$@"; }
# Each of the following is a process of its own: an illegal memory access ends all that its process
# can do on the GPU.
measure() { # BUDGET ARGUMENTS...: rows
    local budget=$1
    shift
    if [ -n "$dry" ]; then
        module benchmarks --device cpu --tiny --out "$OUT" "$@" --dtype fp32 --case-budget 0.1
    else
        MOST=$((budget + 40)) module benchmarks --device cuda --out "$OUT" --budget "$budget" "$@"
    fi
}
layers() { # BUDGET SHAPES: every provider but torch.compile's, which take most of a minute
    local shapes=$2
    [ -z "$dry" ] || shapes='32x64->64'
    measure "$1" --only "^layer-main-($shapes)-.*-fwd.bwd-(?!.*compiled)" --case-budget 6 \
        --dtype bf16
}

smoke() {
    local strategy list='from benchmarks.speed.methods import STRATEGIES; print(*STRATEGIES)'
    for strategy in $("$PYTHON" -c "$list"); do
        MOST=60 module benchmarks.speed.smoke --strategies "$strategy" --out "$OUT" ${dry:+--tiny}
    done
    measure 60 --only '^kernel' --case-budget 4
}
headline() {
    layers 90 '8192x4096->4096|4096x768->768'
    measure 40 --only '^block-main-(tiny-)?llama(?!.*compiled)' --case-budget 6
    module benchmarks.report "$OUT"
}
tests() {
    # The stage `profile` runs compute-sanitizer, in bounded time.
    local options=(-v -m gpu tests --deselect tests/kernels/test_gpu.py::test_compute_sanitizer)
    [ -z "$dry" ] || options=(-q -m gpu --collect-only tests/kernels)
    if [ -z "$dry" ] && "$PYTHON" -c 'import xdist' 2> /dev/null; then
        options+=(-n "$(nproc)" --dist worksteal)
    fi
    module pytest -p no:cacheprovider -p benchmarks.failed_tests --failures "$OUT/failures.txt" \
        "${options[@]}"
}
shapes() {
    layers 90 '4096x1024->1024|(2048|32768)x4096->4096'
    [ -n "$dry" ] || measure 30 --shapes 8192x4096x4096 --dtype bf16 --case-budget 5 \
        --only '^layer.*(dcft|compiled)$'
    module benchmarks.report "$OUT"
}
tune() {
    # An entry takes up to a minute, and the last one starts before the budget is spent.
    local options=(--only bf16 --budget $((LIMIT - 70)))
    [ -z "$dry" ] || options=(--dry-run --only 'expand fp32')
    module benchmarks.tune --out "$OUT" --table "$OUT/tiles.json" "${options[@]}"
}
profile() {
    module benchmarks.speed.profile --out "$OUT" ${dry:+--tiny}
    [ -z "$dry" ] || return
    if command -v compute-sanitizer > /dev/null; then
        # An allocation for every tensor, so that an access outside of one shows.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 MOST=40 run compute-sanitizer --tool=memcheck \
            --error-exitcode=9 --kernel-regex=kns=_kernel "$PYTHON" -m tests.kernels.sanitizer_program
    fi
    if command -v ncu > /dev/null; then
        MOST=50 run ncu --csv --set basic --clock-control none --kernel-name 'regex:^_.*_kernel$' \
            --log-file "$OUT/ncu.csv" "$PYTHON" -m benchmarks.speed.profile --once --out "$OUT"
    fi
}

for stage in "$@"; do
    began=$SECONDS
    case $stage in
        smoke | headline | tests | shapes | tune | profile) "$stage" ;;
        *)
            echo "gpu.sh: no stage '$stage'" >&2
            exit 2
            ;;
    esac
    echo "== $stage: $((SECONDS - began)) s; results in $OUT"
done
exit $status
