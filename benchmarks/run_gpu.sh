#!/usr/bin/env bash
# All GPU figures in one call of at most 7 minutes: checks first, then measures, tables last.
#     bash benchmarks/run_gpu.sh [FOLDER, default work_dirs/gpu]
# It needs python3 with torch, Triton, NumPy and pytest, and for the training step torchvision.
# Without a GPU it runs on tiny inputs through Triton's interpreter, which checks this script alone.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-work_dirs/gpu}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
rm -f "$OUT"/*.csv "$OUT"/*.log "$OUT"/store
start=$SECONDS
failed=()
said() { echo "== $1 ($((SECONDS - start)) s)"; }

GPU=$("$PYTHON" - <<'PY'
import sys
try:
    import numpy, pytest, torch, triton
except ImportError as error:
    sys.exit(f'run_gpu.sh: {error}: it needs torch, triton, numpy and pytest')
print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')
print('torch', torch.__version__, 'triton', triton.__version__, file=sys.stderr)
PY
)
if [ -z "$GPU" ]; then
    echo 'no CUDA device: a dry run on the CPU, whose figures mean nothing'
    export SSN_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    limit=900
else
    echo "$GPU"
    limit=60
fi

said smoke
rm -f "$OUT/store"
timeout $limit "$PYTHON" benchmarks/gpu.py smoke "$OUT"

if [ -n "$GPU" ]; then
    said 'tests on the GPU, in 4 processes'
    TESTS=tests/test_ops/test_gpu.py
    "$PYTHON" -m pytest -q --collect-only "$TESTS" | grep '::' > "$OUT/tests.log"
    for part in 0 1 2 3; do
        awk -v part=$part 'NR % 4 == part' "$OUT/tests.log" | tr '\n' '\0' |
            timeout 110 xargs -0 "$PYTHON" -m pytest -q -p no:cacheprovider \
            > "$OUT/tests_$part.log" 2>&1 &
    done
    for job in $(jobs -p); do wait "$job" || failed=("tests on the GPU, see $OUT/tests_?.log"); done
    tail -qn 1 "$OUT"/tests_?.log
    if [ ${#failed[@]} != 0 ]; then
        grep -hE '^(FAILED|ERROR)' "$OUT"/tests_?.log || true
        echo 'run_gpu.sh: tests failed or ran out of time; figures follow all the same'
    fi
fi

said 'layers, after warming their kernels up'
"$PYTHON" benchmarks/gpu.py layers "$OUT" --seconds 110
said 'what launches cost the CPU, with a driver that runs nothing'
timeout 60 "$PYTHON" benchmarks/host_cost.py --rounds 200 > "$OUT/host_cost.log" 2>&1 ||
    failed+=("host_cost.py, see $OUT/host_cost.log")
tail -n 1 "$OUT/host_cost.log"
said 'a training step of Mask R-CNN'
"$PYTHON" benchmarks/gpu.py step "$OUT" --seconds 70
"$PYTHON" benchmarks/gpu.py names "$OUT"
"$PYTHON" benchmarks/gpu.py tables "$OUT" | tee "$OUT/tables.txt"
for what in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $what"; done
said "done, all of it in $OUT"
exit $((${#failed[@]} > 0))
