"""The pictures of all rows together."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from torch_routers.ablation import draw
from torch_routers.ablation.run import RowResult

CAPTIONS = {
    "loss_curves.png": "Training loss, and its difference to {baseline} on the same batches",
    "domains.png": "Test loss by domain, as the difference to {baseline}",
    "load.png": "Load of every expert",
    "specialisation.png": "Which experts the domains use",
}


def draw_all(rows: Sequence[RowResult], baseline: RowResult, folder: Path) -> dict[str, str]:
    """Writes the pictures into ``folder``; returns their captions by file name.

    The heat maps need a row with experts, and show its first seed.
    """
    routed = [row for row in rows if row.records[0]["test"]["load"] is not None]
    figures = {
        "loss_curves.png": _loss_curves(rows, baseline),
        "domains.png": _domains(rows, baseline),
    }
    if routed:
        figures["load.png"] = _load(routed)
        figures["specialisation.png"] = _specialisation(routed)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return {name: CAPTIONS[name].format(baseline=baseline.name) for name in figures}


def _loss_curves(rows: Sequence[RowResult], baseline: RowResult) -> Figure:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.4), layout="constrained", width_ratios=(2, 3)
    )
    base = draw.curves(baseline).mean(0)
    differences, lines = {}, {}
    for number, row in enumerate(rows):
        curve = draw.curves(row).mean(0)
        style = {
            "color": draw.COLOURS[number % len(draw.COLOURS)],
            "linestyle": draw.LINES[number % len(draw.LINES)],
            "linewidth": 1.6,
        }
        differences[row.name] = draw.smooth(curve - base)
        left.plot(*draw.smooth(curve), **style)
        (lines[row.name],) = right.plot(*differences[row.name], **style)
    draw.scale_to_late(right, list(differences.values()))
    seeds = len(baseline.records)
    means = f"weighted mean of {draw.smoothing_window(len(base))} steps"
    means += f" and {seeds} seeds" if seeds > 1 else ""
    left.set(title="Training loss", xlabel="step", ylabel=f"bits per byte ({means})")
    right.set(
        title=f"Difference to {baseline.name}, same batches",
        xlabel="step",
        ylabel="bits per byte (less is better)",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    # In the order in which the lines end, from top to bottom.
    names = sorted(lines, key=lambda name: -differences[name][1][-1])
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return figure


def _domains(rows: Sequence[RowResult], baseline: RowResult) -> Figure:
    others = [row for row in rows if row.name != baseline.name] or [baseline]
    differences = [draw.domain_differences(row, baseline) for row in others]
    titles = list(differences[0])
    columns = min(5, len(titles))
    lines = -(-len(titles) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
        figsize=(2 + 2 * columns, 0.8 + lines * (0.7 + 0.26 * len(others))),
    )
    for axes, title in zip(grid.flat, titles, strict=False):
        axes.axvline(0, color="black", linewidth=1)
        draw.points(axes, [found[title] for found in differences])
        axes.set_title(title)
    grid[0, 0].set_yticks(range(len(others)), [row.name for row in others])
    for axes in grid.flat[len(titles) :]:
        axes.set_axis_off()
    seeds = len(baseline.records)
    bars = f"; bars: standard deviation of {seeds} seeds" if seeds > 1 else "; one seed"
    figure.suptitle("Test loss by domain")
    figure.supxlabel(f"bits per byte, difference to {baseline.name} (less is better{bars})")
    return figure


def _load(routed: Sequence[RowResult]) -> Figure:
    layers, _, experts = draw.loads(routed[0]).shape
    columns = min(3, len(routed))
    lines = -(-len(routed) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(1.2 + columns * max(2.5, 0.42 * experts), 1.1 + lines * (1 + 0.42 * layers)),
    )
    for axes, row in zip(grid.flat, routed, strict=False):
        image = draw.load_map(axes, draw.loads(row))
        axes.set_title(row.name)
    for axes in grid.flat[len(routed) :]:
        axes.set_axis_off()
    figure.suptitle(f"Load of every expert on the test text, {draw.which_seed(routed[0])}")
    draw.colour_bar(figure, image, grid, "slots, 1 = fair share")
    return figure


def _specialisation(routed: Sequence[RowResult]) -> Figure:
    layers, domains, experts = draw.loads(routed[0]).shape
    columns = 1 if len(routed) < 6 else 2
    lines = -(-len(routed) // columns)
    cell = 0.28 if columns == 1 else 0.2
    size = 2 + columns * (0.4 + cell * layers * experts), 1 + lines * (0.7 + cell * domains)
    figure, grid = plt.subplots(
        lines, columns, squeeze=False, sharey=True, layout="constrained", figsize=size
    )
    for axes, row in zip(grid.flat, routed, strict=False):
        image = draw.domain_map(axes, draw.loads(row))
        axes.set_title(row.name)
    grid[0, 0].set_yticks(range(domains), routed[0].values("bits_per_byte_by_domain")[0])
    for axes in grid.flat[len(routed) :]:
        axes.set_axis_off()
    figure.suptitle(
        f"Experts 0 to {experts - 1} of every layer that each domain of the test text uses, "
        f"{draw.which_seed(routed[0])}"
    )
    draw.colour_bar(figure, image, grid, "slots of the domain, 1 = fair share")
    return figure
