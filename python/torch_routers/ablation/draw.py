"""What the pictures are made of: curves, differences, heat maps."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # files only: no window, no display needed

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from torch_routers.ablation.run import RowResult
from torch_routers.ablation.statistics import Spread, spread
from torch_routers.metrics import active_experts

# Okabe and Ito: told apart by colour-blind readers; lines differ as well.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
SMOOTHING = 0.1
"""The part of a curve over which a point is a weighted mean."""
HOTTEST = 3.0
"""Where the colours of the heat maps end, in fair shares."""
EVERYTHING = "all text"


def curves(row: RowResult) -> np.ndarray:
    """``[seeds, steps]`` training bits per byte."""
    return np.array([record["curve"] for record in row.records])


def smooth(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, counted from 1, and the means around them, with the weights of a Hann window."""
    window = smoothing_window(len(curve))
    weights = np.hanning(window + 2)[1:-1]
    means = np.convolve(curve, weights / weights.sum(), mode="valid")
    return np.arange(len(means)) + (window + 1) / 2, means


def smoothing_window(steps: int) -> int:
    """The steps of which a point is the mean."""
    return max(1, round(SMOOTHING * steps))


def scale_to_late(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Shows 0 and the last four fifths: the first steps differ by more than what lasts."""
    late = np.concatenate([[0.0], *(values[steps > steps[-1] / 5] for steps, values in lines)])
    margin = 0.1 * np.ptp(late) or 0.01
    axes.set_ylim(late.min() - margin, late.max() + margin)


def domain_differences(row: RowResult, baseline: RowResult | None) -> dict[str, Spread]:
    """Test bits per byte of all text and by domain, seed by seed less those of the baseline."""

    def bits(of: RowResult) -> dict[str, list[float]]:
        by_domain = of.values("bits_per_byte_by_domain")
        parts = {name: [seed[name] for seed in by_domain] for name in by_domain[0]}
        return {EVERYTHING: of.values("bits_per_byte"), **parts}

    found, base = bits(row), bits(baseline) if baseline else {}
    return {
        name: spread(np.subtract(values, base.get(name, 0)).tolist())
        for name, values in found.items()
    }


def points(axes: Axes, values: Sequence[Spread]) -> None:
    """One below the other, with bars where there are several seeds."""
    stds = [value.std for value in values]
    axes.errorbar(
        [value.mean for value in values],
        range(len(values)),
        xerr=None if stds[0] is None else stds,
        fmt="o",
        color=COLOURS[2],
        capsize=3,
    )
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(alpha=0.3)


def loads(row: RowResult) -> np.ndarray:
    """``[layers, domains, experts]`` slots of the first seed."""
    return np.array(row.records[0]["test"]["load"])


def which_seed(row: RowResult) -> str:
    """The one that `loads` shows."""
    return f"seed {row.records[0]['cell']['seed']}"


def experts_in_use(row: RowResult) -> tuple[np.ndarray, np.ndarray]:
    """``[layers]`` each, of `loads`: active experts, and experts per token."""
    load = loads(row).sum(1)
    slots = load.sum(-1)
    per_token = row.records[0]["test"]["slots_per_token"] * slots / slots.mean()
    return active_experts(torch.from_numpy(load)).numpy(), per_token


def load_map(axes: Axes, load: np.ndarray) -> AxesImage:
    """``[layers, domains, experts]``: layer by expert, with numbers."""
    shares = _shares(load.sum(1))
    image = _heat(axes, shares)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_xticks(range(shares.shape[1]))
    axes.set_yticks(range(shares.shape[0]))
    for (layer, expert), share in np.ndenumerate(shares):
        axes.text(
            expert,
            layer,
            f"{share:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if 0.35 < share < 2.3 else "white",
        )
    return image


def domain_map(axes: Axes, load: np.ndarray) -> AxesImage:
    """``[layers, domains, experts]``: domain by expert, the layers side by side."""
    layers, _, experts = load.shape
    image = _heat(axes, np.concatenate(_shares(load), axis=-1))
    for layer in range(1, layers):
        axes.axvline(layer * experts - 0.5, color="black", linewidth=1.5)
    middles = (np.arange(layers) + 0.5) * experts - 0.5
    axes.set_xticks(middles, [f"layer {layer}" for layer in range(layers)])
    axes.tick_params(axis="x", length=0)
    return image


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    """The fair share is 1."""
    bar = figure.colorbar(image, ax=axes, label=label, extend="max", fraction=0.04, pad=0.02)
    bar.set_ticks([0, 0.5, 1, 2, HOTTEST])


def _shares(load: np.ndarray) -> np.ndarray:
    return load.shape[-1] * load / np.maximum(load.sum(-1, keepdims=True), 1)


def _heat(axes: Axes, shares: np.ndarray) -> AxesImage:
    """White is the fair share, blue is less, red is more."""
    norm = TwoSlopeNorm(1, vmin=0, vmax=HOTTEST)
    return axes.imshow(shares, cmap="RdBu_r", norm=norm, aspect="auto")
