"""The pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no window, no display needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from torch_routers.ablation.run import RowResult
from torch_routers.ablation.statistics import spread

# Okabe and Ito: told apart by colour-blind readers; lines and markers differ as well.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"  # one more than colours: pairs repeat after 56 rows
SMOOTHING = 0.05
"""The part of the curve over which a point is a mean."""

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


def _style(number: int) -> dict[str, object]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "linewidth": 1.8,
    }


def _smooth(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and running means; the first point is the mean of the first whole window."""
    window = max(1, round(SMOOTHING * len(curve)))
    means = np.convolve(curve, np.ones(window) / window, mode="valid")
    return np.arange(window, len(curve) + 1), means


def _curve(row: RowResult) -> np.ndarray:
    return np.mean([record["curve"] for record in row.records], axis=0)


def _loss_curves(rows: Sequence[RowResult], baseline: RowResult) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    base = _curve(baseline)
    window = max(1, round(SMOOTHING * len(base)))
    late = []
    for number, row in enumerate(rows):
        style = _style(number)
        steps, differences = _smooth(_curve(row) - base)
        left.plot(*_smooth(_curve(row)), label=row.name, **style)
        right.plot(steps, differences, **style)
        late.append(differences[steps > len(base) / 5])
    # The first steps differ by much more than anything that lasts.
    low, high = np.min(late), np.max(late)
    margin = 0.1 * (high - low) or 0.01
    right.set_ylim(low - margin, high + margin)
    means = (
        f"mean of {window} steps"
        if len(baseline.records) == 1
        else (f"mean of {window} steps and {len(baseline.records)} seeds")
    )
    left.set(title="Training loss", xlabel="step", ylabel=f"bits per byte ({means})")
    right.set(
        title=f"Difference to {baseline.name}, same batches",
        xlabel="step",
        ylabel="bits per byte (less is better)",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    figure.legend(loc="outside lower center", ncols=min(len(rows), 5), frameon=False)
    return figure


def _domains(rows: Sequence[RowResult], baseline: RowResult) -> Figure:
    seeds = len(baseline.records)
    others = [row for row in rows if row.name != baseline.name] or [baseline]
    names = list(baseline.records[0]["test"]["bits_per_byte_by_domain"])
    places = np.arange(len(names) + 1)
    height = 1.2 + len(places) * (0.3 + 0.13 * len(others))
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    offsets = np.linspace(-0.3, 0.3, len(others)) if len(others) > 1 else [0.0]
    for row, offset in zip(others, offsets, strict=True):
        number = list(rows).index(row)
        differences = [
            spread(np.subtract(_bits(row, name), _bits(baseline, name)).tolist())
            for name in (None, *names)
        ]
        axes.errorbar(
            [found.mean for found in differences],
            places + offset,
            xerr=[found.std for found in differences] if seeds > 1 else None,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            capsize=2,
            label=row.name,
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.axhline(0.5, color="0.7", linewidth=1)
    axes.set_yticks(places, ["all text", *names])
    axes.set_ylim(len(places) - 0.5, -0.5)
    bars = f", bars: standard deviation of {seeds} seeds" if seeds > 1 else ", one seed"
    axes.set(
        title="Test loss by domain",
        xlabel=f"bits per byte, difference to {baseline.name} (less is better{bars})",
    )
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(others), 4), frameon=False)
    return figure


def _bits(row: RowResult, domain: str | None) -> list[float]:
    if domain is None:
        return row.values("bits_per_byte")
    return [bits[domain] for bits in row.values("bits_per_byte_by_domain")]


def _load(routed: Sequence[RowResult]) -> Figure:
    loads = [np.array(row.records[0]["test"]["load"]).sum(1) for row in routed]
    layers, experts = loads[0].shape
    columns = min(3, len(routed))
    lines = -(-len(routed) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(1.2 + columns * max(2.5, 0.42 * experts), 1.1 + lines * (1 + 0.42 * layers)),
    )
    shares = [load / load.mean(-1, keepdims=True) for load in loads]
    for axes, row, share in zip(grid.flat, routed, shares, strict=False):
        image = _heat(axes, share, numbers=True)
        axes.set(title=row.name, xlabel="expert", ylabel="layer")
        axes.set_xticks(range(experts))
        axes.set_yticks(range(layers))
    for axes in grid.flat[len(routed) :]:
        axes.set_axis_off()
    figure.suptitle(f"Load of every expert on the test text, {_which(routed)}")
    _colour_bar(figure, image, grid, "slots, 1 = fair share")
    return figure


def _specialisation(routed: Sequence[RowResult]) -> Figure:
    loads = [np.array(row.records[0]["test"]["load"]) for row in routed]
    layers, domains, experts = loads[0].shape
    figure, grid = plt.subplots(
        len(routed),
        1,
        squeeze=False,
        layout="constrained",
        figsize=(2.5 + 0.28 * layers * experts, 0.8 + len(routed) * (0.9 + 0.28 * domains)),
    )
    names = list(routed[0].records[0]["test"]["bits_per_byte_by_domain"])
    for axes, row, load in zip(grid.flat, routed, loads, strict=True):
        share = experts * load / load.sum(-1, keepdims=True)
        image = _heat(axes, np.concatenate(share, axis=-1), numbers=False)
        axes.set_title(row.name)
        axes.set_yticks(range(domains), names)
        axes.set_xticks([])
        for layer in range(1, layers):
            axes.axvline(layer * experts - 0.5, color="black", linewidth=1.5)
    axes.set_xticks(
        (np.arange(layers) + 0.5) * experts - 0.5,
        [f"layer {layer}, experts 0 to {experts - 1}" for layer in range(layers)],
    )
    axes.tick_params(axis="x", length=0)
    figure.suptitle(f"Experts that each domain of the test text uses, {_which(routed)}")
    _colour_bar(figure, image, grid, "slots of the domain, 1 = fair share")
    return figure


def _which(routed: Sequence[RowResult]) -> str:
    return f"seed {routed[0].records[0]['cell']['seed']}"


def _colour_bar(figure: Figure, image: AxesImage, grid: np.ndarray, label: str) -> None:
    bar = figure.colorbar(image, ax=grid, label=label, extend="max", fraction=0.04, pad=0.02)
    bar.set_ticks([0, 0.5, 1, 2, HOTTEST])


HOTTEST = 3.0
"""Where the colours of the heat maps end, in fair shares."""


def _heat(axes: Axes, shares: np.ndarray, *, numbers: bool) -> AxesImage:
    """White is the fair share, blue is less, red is more."""
    image = axes.imshow(
        shares, cmap="RdBu_r", norm=TwoSlopeNorm(1, vmin=0, vmax=HOTTEST), aspect="auto"
    )
    if numbers:
        for (line, column), share in np.ndenumerate(shares):
            pale = 0.35 < share < 2.3
            axes.text(
                column,
                line,
                f"{share:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if pale else "white",
            )
    return image
