"""Accuracy by task and method; which experts the tasks use, in the first and the last layer."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no window, no display needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from minilm.report import Rows, accuracies
from torch_routers.ablation.draw import COLOURS
from torch_routers.ablation.statistics import spread

CAPTIONS = {
    "accuracy.png": "Accuracy on test text, by task and method",
    "routing.png": "Mean weight of each expert, by task, in the first and the last layer",
}


def draw_all(rows: Rows, folder: Path) -> dict[str, str]:
    """Writes the pictures into ``folder``; returns their captions by file name."""
    figures = {"accuracy.png": _accuracy(rows)}
    routed = {name: row for name, row in rows.items() if row[0]["test"]["shares"]}
    if routed:
        figures["routing.png"] = _routing(routed)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return {name: CAPTIONS[name] for name in figures}


def _accuracy(rows: Rows) -> Figure:
    """A point for each method, below each other; the tasks side by side."""
    tasks = list(next(iter(rows.values()))[0]["test"]["accuracy"])
    figure, grid = plt.subplots(
        1, len(tasks), sharey=True, squeeze=False, layout="constrained", figsize=(11, 2.9)
    )
    for axes, task in zip(grid.flat, tasks, strict=True):
        found = [spread(accuracies(row, task)) for row in rows.values()]
        for place, value in enumerate(found):
            colour = COLOURS[place % len(COLOURS)]
            axes.errorbar(value.mean, place, xerr=value.std, fmt="o", color=colour, capsize=3)
        axes.set(title=task, xlabel="accuracy, %")
        axes.grid(alpha=0.3)
    grid[0, 0].set_yticks(range(len(rows)), list(rows))
    grid[0, 0].invert_yaxis()
    return figure


def _routing(routed: Rows) -> Figure:
    """Task by expert, of the first seed; a column for each method, a line for each layer."""
    figure, grid = plt.subplots(
        2, len(routed), squeeze=False, layout="constrained", figsize=(1.6 + 2.4 * len(routed), 4.4)
    )
    for column, (name, row) in enumerate(routed.items()):
        test = row[0]["test"]
        shares = np.array(test["shares"])
        for line, layer in enumerate((0, -1)):
            axes = grid[line, column]
            image = axes.imshow(shares[layer], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (task, expert), share in np.ndenumerate(shares[layer]):
                colour = "white" if share > 0.6 else "black"
                axes.text(
                    expert, task, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8
                )
            axes.set_xticks(range(shares.shape[-1]))
            axes.set_yticks(range(shares.shape[-2]), list(test["accuracy"]) if not column else [])
            axes.set_title(f"{name}, {('first', 'last')[line]} layer", fontsize=10)
        axes.set_xlabel("expert")
    figure.colorbar(image, ax=grid, label="mean weight of the task's tokens", fraction=0.04)
    return figure
