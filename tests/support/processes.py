"""Runs a function in several processes that share a gloo group."""

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def _work(
    function: Callable, rank: int, world: int, folder: Path, seconds: float, arguments
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * seconds, file=sys.__stderr__)  # where it hangs
    try:
        # A file instead of a port, which another process might take meanwhile.
        dist.init_process_group(
            'gloo',
            init_method=f'file://{folder}/store',
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        torch.save(function(rank, world, *arguments), folder / f'{rank}.pt')
        # The group is not taken down: with torch 2.1 that hung once, after every result was there.
        # A process that leaves while another still communicates would end it.
        while any(not _is_through(other, folder) for other in range(world)):
            time.sleep(0.01)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        (folder / f'{rank}.txt').write_text(traceback.format_exc())
        os._exit(1)


def _is_through(rank: int, folder: Path) -> bool:
    return (folder / f'{rank}.pt').exists() or (folder / f'{rank}.txt').exists()


def run_processes(
    function: Callable, world: int, folder: Path, *arguments: object, seconds: float = 180
) -> list:
    """Results of ``function(rank, world, *arguments)``, one per process.

    Args:
        function: At the top level of a file in this folder.
        world: Number of processes.
        folder: An empty folder.
        *arguments: What else it takes.
        seconds: After which they are killed.
    """
    context = torch.multiprocessing.get_context('spawn')
    processes = [
        context.Process(target=_work, args=(function, rank, world, folder, seconds, arguments))
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    told = '\n'.join(path.read_text() for path in sorted(folder.glob('*.txt')))
    assert codes == [0] * world, f'exit codes {codes} after {seconds} s at most\n{told}'
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(world)]
