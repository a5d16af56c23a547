#!/usr/bin/env bash
# Evaluate in several processes: one per GPU (nccl), or without a GPU on the CPU (gloo).
#   tools/dist_test.sh CONFIG CHECKPOINT NPROC [arguments of tools/test.py]
# On several machines also set NNODES, NODE_RANK, MASTER_ADDR and PORT, the last two alike on all.
set -euo pipefail
tools=$(dirname "$0")
source "$tools/torchrun.bash"

if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: tools/dist_test.sh CONFIG CHECKPOINT NPROC [arguments of tools/test.py]" >&2
    echo "dist_test.sh: got NPROC '${3:-}', expected a positive number of processes" >&2
    exit 2
fi
config=$1 checkpoint=$2 nproc=$3
shift 3
run_processes "$nproc" "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
