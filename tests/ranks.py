"""Functions of a test file on several processes, the ranks of a gloo group on this machine.

A server is started once, imports torch once, and forks itself for each rank of each job. A fork of
the test runner would not do: it has threads.
"""

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch._dynamo  # noqa: F401  (wrappers and optimisers would import it in each rank)
import torch.distributed as dist


class Ranks:
    """``with Ranks() as ranks: ranks(function, world_size, …)`` raises what a rank raised."""

    def __enter__(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error):
        self._server.stdin.close()  # ends its loop
        self._server.wait(timeout=60)

    def __call__(self, function, world_size, timeout=60, **arguments):
        """Call a function that a test file defines; arguments are what JSON can say."""
        module = Path(function.__code__.co_filename).stem  # pytest has its own names for modules
        job = [module, function.__name__, world_size, timeout, arguments]
        print(json.dumps(job), file=self._server.stdin, flush=True)
        error = json.loads(self._server.stdout.readline())
        assert not error, error


def serve():
    for line in sys.stdin:
        module, name, *job = json.loads(line)
        function = getattr(importlib.import_module(module), name)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(function, *job, Path(folder))), flush=True)


def run(function, world_size, timeout, arguments, folder):
    """What the ranks have to say if one of them fails; else nothing."""
    deadline = time.monotonic() + timeout + 5  # the ranks' own watchdogs come first
    ranks, failed = {}, False
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            work(function, rank, world_size, timeout, arguments, folder)
        ranks[pid] = rank
    while ranks and not failed and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del ranks[pid]
            failed = status != 0
        else:
            time.sleep(0.01)
    for pid in ranks:  # what waits for one that failed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not failed and not ranks:
        return ""
    logs = [f"rank {rank}:\n{(folder / str(rank)).read_text()}" for rank in range(world_size)]
    return "\n".join(logs)


def work(function, rank, world_size, timeout, arguments, folder):
    """One rank, from fork to exit."""
    code = 1
    try:
        log = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(timeout, exit=True)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        function(**arguments)
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of gloo may abort while the interpreter shuts down


if __name__ == "__main__":
    serve()
