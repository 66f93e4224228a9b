"""What a few seeds can tell: spread, paired differences, the smallest detectable one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.special import stdtrit

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (``n - 1``) over seeds; the latter is None for one seed."""

    mean: float
    std: float | None

    def text(self, digits: int) -> str:
        """``1.234 ± 0.005``."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """Differences of pairs, seed by seed.

    Args:
        mean: over seeds.
        std: of the differences, ``n - 1``.
        margin: half the width of the 95 % confidence interval around the mean (Student's t).
        detectable: the true difference that a test at 95 % would find in 80 % of such runs.
    """

    mean: float
    std: float
    margin: float
    detectable: float


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread over seeds."""
    std = float(numpy.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(numpy.mean(values)), std)


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference | None:
    """``values - baseline``, paired by position; None for one seed, which shows no spread.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = [value - base for value, base in zip(values, baseline, strict=True)]
    if len(pairs) < 2:
        return None
    std = float(numpy.std(pairs, ddof=1))
    error = std / math.sqrt(len(pairs))
    freedom = len(pairs) - 1
    confident = float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
    powerful = float(stdtrit(freedom, POWER))
    return Difference(
        mean=float(numpy.mean(pairs)),
        std=std,
        margin=confident * error,
        detectable=(confident + powerful) * error,
    )
