#!/usr/bin/env bash
# Evaluate in several processes: one per GPU (nccl), or without a GPU on the CPU (gloo).
#   tools/dist_test.sh CONFIG CHECKPOINT NPROC [arguments of tools/test.py]
# On several machines also set NNODES, NODE_RANK, MASTER_ADDR and PORT, the last two alike on all.
set -euo pipefail

if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: tools/dist_test.sh CONFIG CHECKPOINT NPROC [arguments of tools/test.py]" >&2
    echo "dist_test.sh: got NPROC '${3:-}', expected a positive number of processes" >&2
    exit 2
fi
config=$1 checkpoint=$2 nproc=$3
shift 3
if [ "${NNODES:-1}" = 1 ]; then
    meeting=(--standalone) # a free port of this machine
else
    meeting=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR" --master-port "${PORT:-29500}")
fi
# torchrun, whose own stack trace says nothing of the error of a process.
torchrun='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main(sys.argv[1:])
except ChildFailedError:
    sys.exit(1)
'
exec "${PYTHON:-python}" -c "$torchrun" "${meeting[@]}" --nproc-per-node "$nproc" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
