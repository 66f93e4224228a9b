"""A page of pictures for each row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torch_routers.ablation import draw
from torch_routers.ablation.run import RowResult
from torch_routers.ablation.statistics import spread

FOLDER = "routers"
ROW, BASELINE = draw.COLOURS[2], draw.COLOURS[0]


def draw_pages(rows: Sequence[RowResult], baseline: RowResult, folder: Path) -> dict[str, str]:
    """Writes ``routers/<row>.png`` into ``folder``; returns these paths by row."""
    (folder / FOLDER).mkdir(exist_ok=True)
    pages = {row.name: f"{FOLDER}/{row.name}.png" for row in rows}
    for row in rows:
        figure = _page(row, baseline)
        figure.savefig(folder / pages[row.name], dpi=110)
        plt.close(figure)
    return pages


def _page(row: RowResult, baseline: RowResult) -> Figure:
    """Losses above; below, where there are experts, how they are used."""
    routed = row.records[0]["test"]["load"] is not None
    if not routed:
        figure = plt.figure(figsize=(13, 4.4), layout="constrained")
        losses = figure
    else:
        layers, domains, _ = draw.loads(row).shape
        heights = 4, 1.1 + 0.42 * layers, 1.1 + 0.32 * domains
        figure = plt.figure(figsize=(13, 0.6 + sum(heights)), layout="constrained")
        losses, layer_part, domain_part = figure.subfigures(3, 1, height_ratios=heights)
        _layers(layer_part, row)
        _specialisation(domain_part, row)
    _losses(losses, row, baseline)
    seeds = len(row.records)
    told = f"{seeds} seeds" if seeds > 1 else draw.which_seed(row)
    bits = spread(row.values("bits_per_byte")).text(3)
    figure.suptitle(
        f"{row.name}: {row.describes}\n{bits} bits/byte on the test text, {told}, learning rate "
        f"{row.learning_rate:g}"
    )
    return figure


def _losses(part: Figure, row: RowResult, baseline: RowResult) -> None:
    compared = row.name != baseline.name
    left, *middle, right = part.subplots(1, 2 + compared)
    pairs = draw.curves(row), draw.curves(baseline)
    window = f"weighted mean of {draw.smoothing_window(pairs[0].shape[1])} steps"
    if compared:
        left.plot(*draw.smooth(pairs[1].mean(0)), color=BASELINE, label=baseline.name)
        _difference(middle[0], *pairs)
        middle[0].set(
            title=f"Its difference to {baseline.name}", ylabel="bits per byte (less is better)"
        )
    # Dashed: the line below nearly coincides.
    style = {"color": ROW, "linestyle": "--" if compared else "-", "label": row.name}
    left.plot(*draw.smooth(pairs[0].mean(0)), **style)
    left.set(title="Training loss", ylabel=f"bits per byte ({window})")
    left.legend(frameon=False)
    for axes in (left, *middle):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    found = draw.domain_differences(row, baseline if compared else None)
    draw.points(right, list(found.values()))
    right.set_yticks(range(len(found)), found)
    if compared:
        right.axvline(0, color=BASELINE, linewidth=1)
        right.set(
            title="Test loss by domain", xlabel=f"bits per byte, difference to {baseline.name}"
        )
    else:
        right.set(title="Test loss by domain", xlabel="bits per byte")


def _difference(axes: Axes, curves: np.ndarray, base: np.ndarray) -> None:
    """Thin lines are seeds."""
    axes.axhline(0, color=BASELINE, linewidth=1)
    lines = [draw.smooth(difference) for difference in curves - base]
    for line in lines if len(lines) > 1 else ():
        axes.plot(*line, color=ROW, linewidth=0.8, alpha=0.5)
    mean = draw.smooth((curves - base).mean(0))
    axes.plot(*mean, color=ROW, linewidth=2)
    draw.scale_to_late(axes, [mean, *lines])


def _layers(part: Figure, row: RowResult) -> None:
    """Beside each layer of the heat map, its experts in numbers."""
    load = draw.loads(row)
    experts = load.shape[-1]
    left, right = part.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    image = draw.load_map(left, load)
    left.set_title(f"Load of every expert on the test text, {draw.which_seed(row)}")
    draw.colour_bar(part, image, [left], "1 = fair share")
    active, per_token = draw.experts_in_use(row)
    places = np.arange(len(load))
    for offset, values, colour, label in (
        (-0.2, active, draw.COLOURS[6], "active experts"),
        (0.2, per_token, ROW, "experts per token"),
    ):
        bars = right.barh(places + offset, values, 0.38, color=colour, label=label)
        right.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    right.set(title="Experts in use", xlim=(0, experts * 1.08), xlabel=f"of {experts} experts")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _specialisation(part: Figure, row: RowResult) -> None:
    load = draw.loads(row)
    axes = part.subplots()
    image = draw.domain_map(axes, load)
    axes.set_yticks(range(load.shape[1]), row.values("bits_per_byte_by_domain")[0])
    axes.set_title(f"Experts 0 to {load.shape[2] - 1} of every layer that each domain uses")
    draw.colour_bar(part, image, [axes], "1 = fair share")
