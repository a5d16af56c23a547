#!/usr/bin/env bash
# All GPU figures in one call of under 8 minutes: checks the kernels on this GPU first, then measures.
#     pip install triton pytest && bash benchmarks/run_gpu.sh
# Prints tables and writes benchmarks/results/*_cuda*.csv. Without mmdet and mmseg the whole training
# steps and inference are left out, and it says so.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit('run_gpu.sh: no CUDA device: these figures need a GPU')
try:
    import triton
except ImportError:
    sys.exit('run_gpu.sh: triton is not installed: pip install triton')
print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)
PY
start=$SECONDS
"$PYTHON" benchmarks/layer.py --device cuda --dtype float32 --seconds 2 --rounds 50
"$PYTHON" benchmarks/layer.py --device cuda --dtype bfloat16 --seconds 2 --rounds 50
"$PYTHON" benchmarks/sparsestmax.py --device cuda
if "$PYTHON" -c 'import mmdet, mmseg' 2>/dev/null; then
    "$PYTHON" benchmarks/training_step.py --device cuda --height 800 --width 1344 --rois 512 --seconds 20
    "$PYTHON" benchmarks/deployment.py --device cuda --seconds 20
else
    echo 'training_step.py and deployment.py were not run: mmdet or mmseg is not installed'
fi
echo "done in $((SECONDS - start)) s"
