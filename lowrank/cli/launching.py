"""Start the processes that `accelerate launch --cpu --num_processes N` asks for."""

from __future__ import annotations

import os
import sys

from lowrank.errors import Refused

# what a launcher of several processes sets: torchrun's, and those of the MPI programs
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_missing_processes() -> None:
    """Replace this process by torchrun with the number of processes that accelerate was called with.

    On the CPU accelerate starts one process, and expects an MPI program to start the others. It names a port
    for them only if there is more than one. Raises `Refused` if the number cannot be read.
    """
    environment = os.environ
    alone = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment
    if not alone or any(name in environment for name in _COUNTS):
        return
    count = _count(_command_of_parent())
    if count is None:
        raise Refused(
            "accelerate starts only one process on the CPU; use `torchrun --nproc_per_node N` in place of "
            "`accelerate launch --cpu --num_processes N`"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # torchrun finds a free port
        environment.pop(name, None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    os.execv(sys.executable, [*torchrun, *sys.argv])


def _command_of_parent() -> list[str]:
    import psutil  # accelerate depends on it

    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _count(command: list[str]) -> int | None:
    """The number of processes in a command line of `accelerate launch`; None if it is another command."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    starts = ("launch", "accelerate.commands.launch", "accelerate-launch")
    at = next((i for i, word in enumerate(command) if os.path.basename(word) in starts), None)
    if at is None:
        return None
    given = launch_command_parser().parse_args(command[at + 1 :])
    if given.num_processes is None and given.config_file:
        return getattr(load_config_from_file(given.config_file), "num_processes", None)
    return given.num_processes
