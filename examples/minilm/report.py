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
    names = [task.name for task in tasks]
    parts = [
        "# Four tasks, one encoder",
        f"Accuracy on test text in percent{noted}. {settings.steps} steps of {settings.batch} "
        "examples of each task.",
        _table(
            ["method", *names, "mean"],
            [
                [f"`{name}`", *(spread(v).text(1) for v in _of_tasks(row, names))]
                for name, row in rows.items()
            ],
        ),
        *_differences(rows, names),
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


def _of_tasks(row: Sequence[Record], names: Sequence[str]) -> list[list[float]]:
    """The accuracies of each task, then the means; of each seed."""
    return [*(accuracies(row, name) for name in names), means(row)]


def _differences(rows: Rows, names: Sequence[str]) -> list[str]:
    """To the baseline, paired by seed; nothing where one seed shows no spread."""
    baseline = rows.get(BASELINE)
    others = {name: row for name, row in rows.items() if name != BASELINE}
    if baseline is None or len(baseline) < 2 or not others:
        return []
    lines = []
    for name, row in others.items():
        pairs = zip(_of_tasks(row, names), _of_tasks(baseline, names), strict=True)
        found = [difference(*pair) for pair in pairs]
        lines.append([f"`{name}`", *(f"{d.mean:+.1f} ± {d.margin:.1f}" for d in found)])
    return [
        f"Differences to `{BASELINE}`, paired by seed, ± half of the 95 % interval over "
        f"{len(baseline)} seeds (Student's t). They tell about other seeds, not about other text.",
        _table(["method", *names, "mean"], lines),
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
