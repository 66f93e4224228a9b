"""All cells of a comparison, row by row; finished ones are not run again."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy
import torch
from tqdm import tqdm

import torch_routers as tr
from torch_routers.ablation.presets import Settings
from torch_routers.ablation.results import Results
from torch_routers.ablation.rows import Row
from torch_routers.ablation.tokens import TokenText
from torch_routers.ablation.train import train_cell


@dataclass(frozen=True)
class RowResult:
    """A row with the learning rate that was best for it on the validation text.

    Args:
        name: of the row.
        describes: half a line.
        learning_rate: the chosen one.
        records: the cells with it, in the order of the seeds.
    """

    name: str
    describes: str
    learning_rate: float
    records: list[dict[str, Any]]

    def values(self, measure: str) -> list[Any]:
        """A measure of each seed: of the test text, or of the cell where the test has no such."""
        return [record["test"].get(measure, record.get(measure)) for record in self.records]


def run_rows(
    rows: Sequence[Row],
    settings: Settings,
    text: TokenText,
    data_sha256: str,
    results: Results,
    write: Callable[[str], None],
) -> Iterator[RowResult]:
    """Yields each row as soon as its last cell has ended, and shows progress on the way.

    Args:
        write: prints a line without disturbing the progress bar.
    """
    cells = {row.name: _cells(row, settings, data_sha256) for row in rows}
    missing = sum(results.find(cell) is None for row in cells.values() for cell in row)
    finished = sum(map(len, cells.values())) - missing
    if finished:
        write(f"{finished} cells are finished already and are not run again (--fresh runs them)")
    with tqdm(
        total=missing * settings.steps,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        disable=not missing,
    ) as bar:
        for row in rows:
            for cell in cells[row.name]:
                if results.find(cell) is None:
                    results.add(_run_cell(row, cell, settings, text, bar))
            yield _choose(row, [results.find(cell) for cell in cells[row.name]])


def versions() -> dict[str, str]:
    """Of what the numbers depend on, besides the arguments and the data."""
    return {
        "torch_routers": tr.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
    }


def load_average() -> tuple[float, ...] | None:
    """Processes that wanted to run in the last 1, 5 and 15 minutes, where the system tells."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def _cells(row: Row, settings: Settings, data_sha256: str) -> list[dict[str, Any]]:
    """The identities of a row's cells: everything that their numbers depend on."""
    shared = asdict(settings)
    seeds, learning_rates = shared.pop("seeds"), shared.pop("learning_rates")
    return [
        {
            "row": row.name,
            "router_sha256": row.source,
            "learning_rate": learning_rate,
            "seed": seed,
            **shared,
            "data_sha256": data_sha256,
            "versions": versions(),
        }
        for learning_rate in learning_rates
        for seed in seeds
    ]


def _run_cell(
    row: Row, cell: dict[str, Any], settings: Settings, text: TokenText, bar: tqdm
) -> dict[str, Any]:
    def on_step(bits: float) -> None:
        bar.set_postfix_str(f"{bits:.2f} bits/byte", refresh=False)
        bar.update()

    bar.set_description(f"{row.name}, seed {cell['seed']}, rate {cell['learning_rate']:g}")
    machine = {"threads": torch.get_num_threads(), "load_average": load_average()}
    measured = train_cell(
        row,
        settings,
        text,
        seed=cell["seed"],
        learning_rate=cell["learning_rate"],
        on_step=on_step,
    )
    return {"cell": cell, "machine": machine, **measured}


def _choose(row: Row, records: Sequence[dict[str, Any]]) -> RowResult:
    """The learning rate whose mean over seeds is best on the validation text."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        by_rate.setdefault(record["cell"]["learning_rate"], []).append(record)

    def validation(rate: float) -> float:
        return sum(record["validation"]["bits_per_byte"] for record in by_rate[rate])

    best = min(by_rate, key=validation)
    return RowResult(row.name, row.describes, best, by_rate[best])
