"""All cells of a comparison, row by row; finished ones are not run again."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy
import torch
from tqdm import tqdm

import torch_routers as tr
from torch_routers.ablation.jobs import Cell, run_cells
from torch_routers.ablation.presets import Settings
from torch_routers.ablation.results import Results
from torch_routers.ablation.rows import Row
from torch_routers.ablation.tokens import TokenText


@dataclass(frozen=True)
class RowResult:
    """A row with the learning rate that was best for its first seed on the validation text.

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
    *,
    jobs: int = 1,
) -> Iterator[RowResult]:
    """Yields each row, in order, once its last cell has ended, and shows progress on the way.

    Learning rates, where there are several, are tried with the first seed; the other seeds are
    trained with the one that is best by then.

    Args:
        write: prints a line without disturbing the progress bar.
        jobs: cells that are trained at once.
    """
    seeds, rates = settings.seeds, settings.learning_rates
    sweeps = {row.name: _cells(row, settings, data_sha256, seeds[:1], rates) for row in rows}
    later = len(rows) * (len(seeds) - 1) * settings.steps
    bar = tqdm(
        total=later,
        unit="step",
        delay=1,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )

    def on_step(cell: Cell, bits: float) -> None:
        label = f"{cell['row']}, seed {cell['seed']}, rate {cell['learning_rate']:g}"
        bar.set_description(label, refresh=False)
        bar.set_postfix_str(f"{bits:.2f} bits/byte", refresh=False)
        bar.update()

    def run(cells: dict[str, list[Cell]]) -> Iterator[Row]:
        """Trains what is missing; yields each row, in order, once all its cells are there."""
        missing = [cell for row in cells.values() for cell in row if results.find(cell) is None]
        finished = sum(map(len, cells.values())) - len(missing)
        if finished:
            write(
                f"{finished} cells are finished already and are not run again (--fresh runs them)"
            )
        bar.total += len(missing) * settings.steps
        with closing(run_cells(missing, rows, settings, text, jobs=jobs, on_step=on_step)) as new:
            for row in rows:
                while any(results.find(cell) is None for cell in cells[row.name]):
                    results.add(next(new))
                yield row

    with bar:
        swept = len(rates) > 1
        chosen = dict.fromkeys(sweeps, rates[0])
        for row in run(sweeps) if swept else ():
            chosen[row.name] = _best(results.find(cell) for cell in sweeps[row.name])
        bar.total -= later
        cells = {
            row.name: _cells(row, settings, data_sha256, seeds, [chosen[row.name]]) for row in rows
        }
        # After a sweep the first seed is there, and was told of.
        missing = {name: of[1:] if swept else of for name, of in cells.items()}
        for row in run(missing):
            records = [results.find(cell) for cell in cells[row.name]]
            yield RowResult(row.name, row.describes, chosen[row.name], records)


def versions() -> dict[str, str]:
    """Of what the numbers depend on, besides the arguments and the data."""
    return {
        "torch_routers": tr.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
    }


def _cells(
    row: Row,
    settings: Settings,
    data_sha256: str,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
) -> list[Cell]:
    """The identities of a row's cells: everything that their numbers depend on."""
    shared = asdict(settings)
    del shared["seeds"], shared["learning_rates"]
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


def _best(records: Iterable[dict[str, Any]]) -> float:
    """The learning rate that is best on the validation text."""
    best = min(records, key=lambda record: record["validation"]["bits_per_byte"])
    return best["cell"]["learning_rate"]
