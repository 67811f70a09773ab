"""One program in several processes, on this machine: started, joined and watched.

Each process calls `join`, hands its data to `pssm.infer.shard`, and fits as ever. JAX connects the processes (on CPUs
over gloo). When one dies, the others cannot go on: `launch` then ends them all, so give long fits a `checkpoint`.
"""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence

import jax

from pssm._checks import check_count

ADDRESS, COUNT, INDEX = "PSSM_COORDINATOR", "PSSM_PROCESSES", "PSSM_PROCESS"


def join() -> bool:
    """Connects this process with the others that `launch` has started; to be called before anything is computed.

    On several machines, call `jax.distributed.initialize` yourself in its place; all else is the same.

    Returns:
        Whether there are others; False where the program was started by itself, and runs as ever.

    Raises:
        RuntimeError: the others do not answer, or JAX has computed something already.

    Example:
        >>> join()
        False
    """
    if ADDRESS not in os.environ:
        return False
    jax.distributed.initialize(
        coordinator_address=os.environ[ADDRESS],
        num_processes=int(os.environ[COUNT]),
        process_id=int(os.environ[INDEX]),
    )
    return True


def launch(command: Sequence[str], num_processes: int, *, timeout: float | None = None) -> list[str]:
    r"""Runs a command in several processes that find each other by `join`, and waits for all of them.

    Args:
        command: the program and its arguments, such as `[sys.executable, "train.py"]`.
        num_processes: how many.
        timeout: seconds after which all are ended; None for never.

    Returns:
        What each process printed, by its index.

    Raises:
        RuntimeError: a process failed, and the others were ended; with the end of what it said.
        TimeoutError: they did not end in time.

    Example:
        >>> import sys
        >>> launch([sys.executable, "-c", "import os; print(os.environ['PSSM_PROCESS'])"], 2)
        ['0\n', '1\n']
    """
    check_count("num_processes", num_processes)
    begun = time.monotonic()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [open(os.path.join(folder, str(i)), "w+", encoding="utf-8") for i in range(num_processes)]  # noqa: SIM115
        running = []
        try:
            for i, output in enumerate(outputs):
                env = os.environ | {ADDRESS: address, COUNT: str(num_processes), INDEX: str(i)}
                running.append(subprocess.Popen(list(command), env=env, stdout=output, stderr=subprocess.STDOUT))
            while any(p.poll() is None for p in running):
                failed = [i for i, p in enumerate(running) if p.poll() not in (None, 0)]
                if failed:
                    break
                if timeout is not None and time.monotonic() - begun > timeout:
                    raise TimeoutError(f"`command` did not end within {timeout} seconds; all processes were ended.")
                time.sleep(0.05)
        finally:
            for p in running:
                if p.poll() is None:
                    p.kill()
                p.wait()
            texts = [_text(output) for output in outputs]
        failed = [i for i, p in enumerate(running) if p.returncode > 0] or [
            i for i, p in enumerate(running) if p.returncode
        ]
        if failed:
            raise RuntimeError(f"`command`: process {failed[0]} of {num_processes} failed:\n{texts[failed[0]][-4000:]}")
        return texts


def _text(output) -> str:
    output.seek(0)
    text = output.read()
    output.close()
    return text
