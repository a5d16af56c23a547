#!/usr/bin/env bash
# Train in several processes: one per GPU (nccl), or without a GPU on the CPU (gloo).
#   tools/dist_train.sh CONFIG NPROC [arguments of tools/train.py]
# On several machines also set NNODES, NODE_RANK, MASTER_ADDR and PORT, the last two alike on all.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: tools/dist_train.sh CONFIG NPROC [arguments of tools/train.py]" >&2
    echo "dist_train.sh: got NPROC '${2:-}', expected a positive number of processes" >&2
    exit 2
fi
config=$1 nproc=$2
shift 2
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
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
