#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command of less than nine minutes:
#
#     benchmarks/gpu_run.sh              # on Linux with a GPU; python3 with torch and triton there
#     benchmarks/gpu_run.sh --dry-run    # every line of it on a CPU, tiny, under the interpreter
#
# Nothing is installed and no network is used. Results go to $OUT, or to benchmarks/results/<device>:
# rows.jsonl, tune.jsonl, tiles.json, gpu_rates.json, environment.txt, ncu.csv, summary.txt, log.txt.
# The most valuable parts come first, each has a time limit, and what fails does not stop the rest,
# so a run that is cut off keeps what it has. BUDGET is the limit for all, in seconds (530).
set -uo pipefail
start=$SECONDS
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-530}
KEPT_FOR_SUMMARY=15
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

dry=
case "${1-}" in
    --dry-run) dry=1 ;;
    '') ;;
    *)
        echo "gpu_run.sh: expected --dry-run or nothing, got '$1'" >&2
        exit 2
        ;;
esac

if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1
    device=cpu
    OUT=${OUT:-.benchmarks/gpu_dry_run}
else
    if ! "$PYTHON" -c 'import torch, triton; raise SystemExit(not torch.cuda.is_available())'; then
        echo "gpu_run.sh: $PYTHON finds no GPU, or no torch or triton; PYTHON= names another one," \
            "--dry-run tries this out without a GPU" >&2
        exit 2
    fi
    device=cuda
    slug=$("$PYTHON" -c 'from benchmarks.environment import describe; print(describe("cuda").slug)')
    OUT=${OUT:-benchmarks/results/$slug}
fi
mkdir -p "$OUT"
log=$OUT/log.txt
: > "$log"
failed=()

say() { printf '%s\n' "$*" | tee -a "$log"; }

# part NAME LIMIT COMMAND...: run a command within its limit and what is left of the budget.
part() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    local left=$((BUDGET - KEPT_FOR_SUMMARY - (SECONDS - start)))
    if [ "$left" -le 5 ]; then
        say "== $name: left out, the budget of $BUDGET s is spent"
        failed+=("$name (left out)")
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    say "== $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    say "== $name: status $status after $((SECONDS - began)) s"
    [ "$status" -eq 0 ] || failed+=("$name (status $status)")
}

# with_tool TOOL ARGUMENTS... -- COMMAND...: run a command under a tool that may not be there; a dry
# run runs the command alone.
with_tool() {
    local tool=$1 arguments=()
    shift
    while [ "$1" != -- ]; do
        arguments+=("$1")
        shift
    done
    shift
    if [ -n "$dry" ]; then
        "$@"
    elif command -v "$tool" > /dev/null; then
        "$tool" "${arguments[@]}" "$@"
    else
        echo "$tool is not on PATH: left out"
    fi
}
export -f with_tool
export dry

# measure NAME LIMIT ARGUMENTS...: rows of some levels. The last case may overrun the budget.
measure() {
    local name=$1 limit=$2 left=$((BUDGET - KEPT_FOR_SUMMARY - (SECONDS - start)))
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    if [ -n "$dry" ]; then
        part "$name" 120 "$PYTHON" -m benchmarks.run --device cpu --size tiny --out "$OUT" \
            --dtypes fp32 --budget 5 --case-budget 0.2 "$@"
    else
        part "$name" "$limit" "$PYTHON" -m benchmarks.run --device cuda --out "$OUT" \
            --budget $((limit * 3 / 4)) "$@"
    fi
}

# warm LIMIT COMMAND...: have a command compile its kernels while something else is measured, which
# hardly touches the GPU; Triton keeps them on disk. `warmed` ends it.
warming=
warm() {
    local limit=$1 left=$((BUDGET - KEPT_FOR_SUMMARY - (SECONDS - start)))
    shift
    [ "$limit" -le "$left" ] || limit=$left
    [ -z "$dry" ] && [ "$limit" -gt 5 ] || return 0
    timeout --kill-after=5 "$limit" "$@" > /dev/null 2>&1 &
    warming=$!
}

# warmed [SECONDS]: go on, with what was compiled by then.
warmed() {
    local waited=0
    while [ -n "$warming" ] && kill -0 "$warming" 2> /dev/null && [ "$waited" -lt "${1-0}" ]; do
        sleep 1
        waited=$((waited + 1))
    done
    [ -z "$warming" ] || kill "$warming" 2> /dev/null
    warming=
}

summary() { "$PYTHON" -m benchmarks.report --summary "$OUT" > "$OUT/summary.txt" 2>> "$log"; }

"$PYTHON" -m benchmarks.environment > "$OUT/environment.txt"
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu \
        --format=csv >> "$OUT/environment.txt" 2>&1
fi
cat "$OUT/environment.txt" | tee -a "$log"

rivals="dcft lora_r8 lora_r8_16bit lora_r1 published lora_autograd lokr"
strategies="dcft_row_block dcft_fused dcft_scratch dcft_torch"
models="dcft dcft_grouped lora_r8 lora_r8_16bit lora_r1 lora_autograd published"

# 1. The headline: what is compared most, at the goals' shapes first.
warm 40 "$PYTHON" -m benchmarks.launch_once
measure ceilings 20 --levels ceiling --case-budget 1
warmed 10
if [ -n "$dry" ]; then
    measure headline 0 --levels layer --sweeps main --providers $rivals dcft_row_block dcft_fused
else
    measure headline 90 --levels layer --sweeps main --dtypes bf16 --case-budget 2 \
        --providers $rivals $strategies
fi
summary

# 2. Is it right? The benchmarks themselves, then the kernels on this device.
self_test_limit=20
[ -z "$dry" ] || self_test_limit=120 # a busy CPU, and Triton's interpreter
part "self-test" "$self_test_limit" "$PYTHON" -m benchmarks.selftest --device "$device"
if [ -n "$dry" ]; then
    part tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider \
        tests/kernels/test_expand.py -k repeats -x
else
    # Compiling their kernels takes ten minutes of one core.
    jobs=$("$PYTHON" -c 'import os, xdist; print("-n", max(1, os.cpu_count() - 1))' 2> /dev/null)
    warm 100 "$PYTHON" -m tests.kernels.sanitizer_program
    part tests 110 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests -k "not sanitizer" $jobs \
        ${jobs:+--dist worksteal} --maxfail=25
    warmed
fi

# 3. Blocks and training steps, merging, the kernels one by one, and how cost grows.
measure blocks 40 --levels block --case-budget 2 --providers $models
measure steps 35 --levels step --case-budget 2 --sweeps main --providers $models
measure merging 10 --levels merge --case-budget 0.5
measure kernels 25 --levels kernel --case-budget 1
if [ -n "$dry" ]; then
    measure growth 0 --levels layer --sweeps rank --providers dcft
else
    measure growth 30 --levels layer --sweeps rank kernel_size tokens stride --case-budget 0.7 \
        --providers dcft lora_r8 lora_autograd published
fi

# 4. What sanitizers and profilers say, where they may.
counters=dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum
counters+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
counters+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__occupancy_limit_registers
counters+=,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum
shape=8192x4096x4096 dtype=bf16
[ -z "$dry" ] || shape=20x32x48 dtype=fp32
profile() {
    with_tool ncu --csv --metrics "$counters" --kernel-name 'regex:^_.*_kernel$' \
        --clock-control none \
        -- "$PYTHON" -m benchmarks.launch_once --shape "$shape" --dtype "$dtype" > "$OUT/ncu.csv"
}
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 with_tool compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-regex 'kns=_kernel' -- "$PYTHON" -m tests.kernels.sanitizer_program
}
export -f profile sanitize
export PYTHON OUT counters shape dtype
part memcheck 25 bash -c 'sanitize memcheck'
part racecheck 25 bash -c 'sanitize racecheck'
part ncu 20 bash -c profile

# 5. The tiles and rates of this GPU, beside the shipped ones; copy them over to adopt them.
cp dcft_kernels/triton/tiles.json dcft_kernels/gpu_rates.json "$OUT/"
if [ -n "$dry" ]; then
    part tuner 120 "$PYTHON" -m benchmarks.tune --dry-run --budget 1 --out "$OUT" \
        --table "$OUT/tiles.json" --rates "$OUT/gpu_rates.json" --kernels expand --dtypes bf16
else
    part tuner 45 "$PYTHON" -m benchmarks.tune --budget 38 --dtypes bf16 --out "$OUT" \
        --table "$OUT/tiles.json" --rates "$OUT/gpu_rates.json"
fi

# 6. Whatever else there is time for, under a name that leaves the headline's rows alone.
measure others 20 --levels optimizer load --case-budget 0.5
[ -n "$dry" ] || measure everything 60 --levels layer --sweeps main --label others --case-budget 1

summary || failed+=("summary")
say
cat "$OUT/summary.txt" | tee -a "$log"
if [ ${#failed[@]} -gt 0 ]; then
    say "not complete: $(printf '%s; ' "${failed[@]}")"
fi
say "$((SECONDS - start)) s; results in $OUT"
[ -z "$dry" ] || [ ${#failed[@]} -eq 0 ]
