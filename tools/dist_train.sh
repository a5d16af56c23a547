#!/usr/bin/env bash
# Train in several processes: one per GPU (nccl), or without a GPU on the CPU (gloo).
#   tools/dist_train.sh CONFIG NPROC [arguments of tools/train.py]
# On several machines also set NNODES, NODE_RANK, MASTER_ADDR and PORT, the last two alike on all.
set -euo pipefail
tools=$(dirname "$0")
source "$tools/torchrun.bash"

if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: tools/dist_train.sh CONFIG NPROC [arguments of tools/train.py]" >&2
    echo "dist_train.sh: got NPROC '${2:-}', expected a positive number of processes" >&2
    exit 2
fi
config=$1 nproc=$2
shift 2
run_processes "$nproc" "$tools/train.py" "$config" --launcher pytorch "$@"
