# Sourced by dist_train.sh and dist_test.sh: starts a script of this folder in several processes.

# run_processes NPROC SCRIPT [arguments of the script]
run_processes() {
    local nproc=$1 script=$2 meeting
    shift 2
    if [ "${NNODES:-1}" = 1 ]; then
        meeting=(--standalone) # a free port of this machine
    else
        meeting=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR" --master-port "${PORT:-29500}")
    fi
    # torchrun, whose own stack trace says nothing of the error of a process.
    local torchrun='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main(sys.argv[1:])
except ChildFailedError:
    sys.exit(1)
'
    exec "${PYTHON:-python}" -c "$torchrun" "${meeting[@]}" --nproc-per-node "$nproc" "$script" "$@"
}
