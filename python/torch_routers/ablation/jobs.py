"""Cells one after another, or several at once in processes of their own."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.presets import Settings
from torch_routers.ablation.rows import Row
from torch_routers.ablation.tokens import TokenText
from torch_routers.ablation.train import train_cell

Cell = dict[str, Any]
OnStep = Callable[[Cell, float], None]


def run_cells(
    cells: Sequence[Cell],
    rows: Sequence[Row],
    settings: Settings,
    text: TokenText,
    *,
    jobs: int,
    on_step: OnStep,
) -> Iterator[dict[str, Any]]:
    """Yields the record of each cell as soon as it ends; what it measures depends on no other.

    Args:
        jobs: processes, each with as many threads as torch has in this one. One job is this
            process. Closing the iterator, or an error, ends the others.
        on_step: called after each step with its cell and training bits per byte.

    Raises:
        AblationError: a cell raises it, or a process ends before its cell.
    """
    jobs = min(jobs, len(cells))
    setup = ({row.name: row for row in rows}, settings, text, jobs)
    if jobs > 1:
        return _in_processes(cells, setup, jobs, on_step)
    return (_run(cell, *setup, on_step) for cell in cells)


def load_average() -> tuple[float, ...] | None:
    """Processes that wanted to run in the last 1, 5 and 15 minutes, where the system tells."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def _run(
    cell: Cell,
    rows: dict[str, Row],
    settings: Settings,
    text: TokenText,
    jobs: int,
    on_step: OnStep,
) -> dict[str, Any]:
    threads = torch.get_num_threads()
    machine = {"jobs": jobs, "threads": threads, "load_average": load_average()}
    measured = train_cell(
        rows[cell["row"]],
        settings,
        text,
        seed=cell["seed"],
        learning_rate=cell["learning_rate"],
        on_step=lambda bits: on_step(cell, bits),
    )
    return {"cell": cell, "machine": machine, **measured}


def _in_processes(
    cells: Sequence[Cell], setup: tuple, jobs: int, on_step: OnStep
) -> Iterator[dict[str, Any]]:
    waiting = iter(cells)
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(jobs):
            connection, process = _start()
            workers[connection] = process
        # By value: torch would share memory, of which containers have little.
        pickled = pickle.dumps((torch.get_num_threads(), *setup))
        for connection, process in workers.items():
            with _alive(process):
                connection.send_bytes(pickled)
                connection.send(next(waiting))
        missing = len(cells)
        while missing:
            for connection in wait(list(workers)):
                with _alive(workers[connection]):
                    message = connection.recv()
                if isinstance(message, AblationError):
                    raise message
                if isinstance(message, tuple):
                    on_step(*message)
                    continue
                missing -= 1
                if (cell := next(waiting, None)) is not None:
                    connection.send(cell)
                yield message
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _start() -> tuple[Connection, BaseProcess]:
    """A new process, and the connection to it."""
    # Not forked: torch has threads already, and a fork of those hangs.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    # Inherited: Ctrl-C reaches all processes of a terminal, and this one ends the others.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    there.close()
    return here, process


def _work(connection: Connection) -> None:
    """What a process does: gets a cell, sends its steps and its record, until nobody listens."""
    with suppress(EOFError, ConnectionError):
        try:
            threads, *setup = pickle.loads(connection.recv_bytes())
            torch.set_num_threads(threads)
            while True:
                cell = connection.recv()
                connection.send(_run(cell, *setup, lambda *step: connection.send(step)))
        except AblationError as error:
            connection.send(error)


@contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """Talks to a process; tells if it has ended instead."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        process.join()
        raise AblationError(
            f"ablation: expected every process of --jobs to go on, got exit code "
            f"{process.exitcode} of one. If it told nothing, memory ran out: try fewer --jobs"
        ) from error
