#!/usr/bin/env bash
# All GPU figures in one call of at most 7 minutes: checks first, then measures, tables last.
#     bash benchmarks/run_gpu.sh [FOLDER, default work_dirs/gpu]
# It needs python3 with torch, Triton, NumPy and pytest, and for the training step torchvision.
# A part that fails or runs out of time is named at the end; the others run all the same.
# Without a GPU it runs on tiny inputs through Triton's interpreter, which checks this script alone.
set -uo pipefail
OUT=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-work_dirs/gpu}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT" || exit 1
rm -f "$OUT"/{layers,step,names}.csv "$OUT"/{tests,warm_,host_cost}*.log "$OUT"/{store,tables.txt}
start=$SECONDS
failed=()
running=()
said() { echo "== $1 ($((SECONDS - start)) s)"; }

# The seconds that a part may take: so many, but fewer where the 7 minutes end before.
limit() {
    local left=$((405 - SECONDS + start))
    if [ -z "$GPU" ]; then left=900; set -- 900; fi
    echo $(($1 < left ? $1 : left > 1 ? left : 1))
}
part() { # NAME SECONDS COMMAND...
    said "$1"
    timeout "$(limit "$2")" "${@:3}" || failed+=("$1")
}
beside() { # LOG SECONDS COMMAND...: the next does not wait for it
    timeout "$(limit "$2")" "${@:3}" > "$OUT/$1.log" 2>&1 &
    running+=("$! $OUT/$1.log")
}

GPU=$("$PYTHON" - <<'PY'
import sys
try:
    import numpy, pytest, torch, triton
except ImportError as error:
    sys.exit(f'run_gpu.sh: {error}: it needs torch, triton, numpy and pytest')
print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')
print('torch', torch.__version__, 'triton', triton.__version__, file=sys.stderr)
PY
) || exit 1
workers=8
if [ -z "$GPU" ]; then
    echo 'no CUDA device: a dry run on the CPU, whose figures mean nothing'
    export SSN_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    workers=1
else
    echo "$GPU"
fi

part smoke 80 "$PYTHON" benchmarks/gpu.py smoke "$OUT"

said "kernels are compiled for what is measured, in $workers processes${GPU:+, and tested in 4 others}"
for ((worker = 0; worker < workers; worker++)); do
    beside "warm_$worker" 110 "$PYTHON" benchmarks/gpu.py warm "$OUT" --share "$worker/$workers"
done
if [ -n "$GPU" ]; then
    "$PYTHON" -m pytest -q --collect-only tests/test_ops/test_gpu.py | grep '::' > "$OUT/tests.log"
    for worker in 0 1 2 3; do
        mapfile -t tests < <(awk -v worker=$worker 'NR % 4 == worker' "$OUT/tests.log")
        [ ${#tests[@]} = 0 ] && failed+=('tests on the GPU: none was found') && break
        beside "tests_$worker" 110 "$PYTHON" -m pytest -q -p no:cacheprovider "${tests[@]}"
    done
fi
for each in "${running[@]}"; do
    wait "${each%% *}" || failed+=("see ${each#* }")
done
if [ -n "$GPU" ]; then
    tail -qn 1 "$OUT"/tests_?.log
    grep -hE '^(FAILED|ERROR)' "$OUT"/tests_?.log
fi

part layers 130 "$PYTHON" benchmarks/gpu.py layers "$OUT" --seconds "$(limit 110)"
# Without a GPU by ATen: the interpreter takes minutes for 69 layers.
part 'a training step of Mask R-CNN' 100 env SSN_BACKEND= "$PYTHON" benchmarks/gpu.py step "$OUT" --seconds 70
part 'names of kernels' 30 "$PYTHON" benchmarks/gpu.py names "$OUT"
said 'what launches cost the CPU, with a driver that runs nothing'
timeout "$(limit 40)" "$PYTHON" benchmarks/host_cost.py --rounds 200 > "$OUT/host_cost.log" 2>&1 ||
    failed+=("see $OUT/host_cost.log")
tail -n 1 "$OUT/host_cost.log"
"$PYTHON" benchmarks/gpu.py tables "$OUT" | tee "$OUT/tables.txt" || failed+=(tables)
for what in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $what"; done
said "done, all of it in $OUT"
exit $((${#failed[@]} > 0))
