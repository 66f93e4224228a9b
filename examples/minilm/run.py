"""All cells of the comparison, several at once; finished ones are not run again."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

import torch
import transformers
from tqdm import tqdm

import torch_routers as tr
from minilm.data import Task, tasks_sha256
from minilm.encoder import weights_sha256
from minilm.settings import Settings
from minilm.train import train_cell
from torch_routers.ablation.results import Results

Record = dict[str, Any]


def run_methods(
    methods: Sequence[str],
    settings: Settings,
    tasks: Sequence[Task],
    results: Results,
    *,
    jobs: int,
) -> dict[str, list[Record]]:
    """The records of each method, by learning rate and seed.

    Args:
        results: where finished cells are looked for, and new ones are stored.
        jobs: processes of one thread; what they measure does not depend on their number.
    """
    cells = list(_cells(methods, settings, tasks))
    missing = [cell for cell in cells if results.find(cell) is None]
    # Not forked: torch has threads already, and a fork of those hangs.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(train_cell, cell, settings, tasks) for cell in missing]
        with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="model") as bar:
            bar.refresh()
            for future in as_completed(futures):
                results.add(future.result())
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return {
        method: [results.find(cell) for cell in cells if cell["method"] == method]
        for method in methods
    }


def _cells(
    methods: Sequence[str], settings: Settings, tasks: Sequence[Task]
) -> Iterator[dict[str, Any]]:
    """The identities of the cells: everything that their numbers depend on."""
    shared = asdict(settings)
    seeds, learning_rates = shared.pop("seeds"), shared.pop("learning_rates")
    shared["data_sha256"], shared["weights_sha256"] = tasks_sha256(tasks), weights_sha256()
    shared["versions"] = {
        package.__name__: package.__version__ for package in (tr, torch, transformers)
    }
    for seed in seeds:
        for method in methods:
            for learning_rate in learning_rates:
                yield {"method": method, "seed": seed, "learning_rate": learning_rate, **shared}
