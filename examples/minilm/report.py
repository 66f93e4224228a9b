"""The table: accuracy by task and method, what the routing tells about the task, and the cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from minilm.data import Task
from minilm.methods import BASELINE, METHODS
from minilm.settings import Settings
from torch_routers.ablation.statistics import difference, spread

NOTHING = "–"
Record = dict[str, Any]
Rows = dict[str, list[Record]]


def by_method(records: Mapping[str, Sequence[Record]]) -> Rows:
    """The records of each method with its learning rate that is best on the validation text."""
    rows = {}
    for method, of_method in records.items():
        by_rate: Rows = {}
        for record in of_method:
            by_rate.setdefault(record["cell"]["learning_rate"], []).append(record)
        rows[method] = max(by_rate.values(), key=lambda group: sum(means(group, "validation")))
    return rows


def accuracies(row: Sequence[Record], task: str) -> list[float]:
    """In percent, of each seed."""
    return [100 * record["test"]["accuracy"][task] for record in row]


def means(row: Sequence[Record], split: str = "test") -> list[float]:
    """The mean over tasks, in percent, of each seed."""
    found = [list(record[split]["accuracy"].values()) for record in row]
    return [100 * sum(values) / len(values) for values in found]


def table_markdown(
    rows: Rows, settings: Settings, tasks: Sequence[Task], pictures: Mapping[str, str]
) -> str:
    """The whole report.

    Args:
        pictures: captions by file name.
    """
    seeds = len(settings.seeds)
    noted = f", ± the standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    parts = [
        "# Four tasks, one encoder",
        f"Accuracy on test text in percent{noted}. {settings.steps} steps of {settings.batch} "
        "examples of each task.",
        _table(
            ["method", *(task.name for task in tasks), "mean", f"to {BASELINE}"],
            [_accuracy_line(name, row, rows.get(BASELINE), tasks) for name, row in rows.items()],
        ),
        f"Last column: the difference of the means to `{BASELINE}`, paired by seed, ± half of its "
        "95 % interval (Student's t): 0 is inside unless the difference is the larger number.",
        _table(
            ["method", "learning rate", "MI, bits", "trained, k", "CPU s"],
            [_cost_line(name, row) for name, row in rows.items()],
        ),
        "MI: what the expert of a token tells about its task, from the mean weights, of 2 bits; "
        "the mean over routers. Trained: parameters, heads included.",
        "\n".join(f"- `{name}`: {METHODS[name].describes}." for name in rows),
        *(f"![{caption}]({name})" for name, caption in pictures.items()),
        "## Text",
        "Examples of each class in training / validation / test:",
        "\n".join(f"- {task.describe()}" for task in tasks),
        "## Settings",
        ", ".join(f"{name} {value}" for name, value in asdict(settings).items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy_line(
    name: str, row: Sequence[Record], baseline: Sequence[Record] | None, tasks: Sequence[Task]
) -> list[str]:
    found = None
    if baseline is not None and name != BASELINE:
        found = difference(means(row), means(baseline))
    return [
        f"`{name}`",
        *(spread(accuracies(row, task.name)).text(1) for task in tasks),
        spread(means(row)).text(1),
        NOTHING if found is None else f"{found.mean:+.1f} ± {found.margin:.1f}",
    ]


def _cost_line(name: str, row: Sequence[Record]) -> list[str]:
    bits = [record["test"]["mutual_information"] for record in row]
    return [
        f"`{name}`",
        f"{row[0]['cell']['learning_rate']:g}",
        NOTHING if bits[0] is None else spread(bits).text(3),
        f"{row[0]['parameters'] / 1000:.0f}",
        spread([record["cpu_seconds"] for record in row]).text(0),
    ]


def _table(headings: list[str], lines: list[list[str]]) -> str:
    under = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, under, *lines])
