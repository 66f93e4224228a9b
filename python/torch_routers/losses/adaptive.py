"""Factors of losses that adapt to what the losses achieve; plain numbers, moved once per step."""

from torch_routers.losses.base import RouterLoss


class AdaptiveFactor:
    r"""Moves the weight of a loss by its own progress (BlockFFN, arXiv 2507.08771).

    For ``warmup`` steps nothing moves. Then, every ``window`` steps, with the means :math:`m` of
    the loss over the last two windows, the weight :math:`\lambda` is to become

    .. math::
        \lambda \min\!\big(g', 4 \lambda_0 / \lambda\big), \qquad
        g = m_\mathrm{now} / m_\mathrm{before}, \quad
        g' = g \text{ if } g \le 1 \text{ else } \max(1.025, g)

    and goes there linearly over the next window, as in the reference code; equation 7 of the paper
    has neither the ramp nor the bound.

    Args:
        losses: those whose ``weight`` is moved, one per layer.
        initial: :math:`\lambda_0`.
        warmup, window: in steps.

    Raises:
        ValueError: an argument that does not fit.

    >>> from torch_routers.losses import ChunkSparsificationLoss
    >>> loss = ChunkSparsificationLoss(0.05)
    >>> factor = AdaptiveFactor([loss], 0.05, warmup=2, window=1)
    >>> for value in 0.40, 0.40, 0.42, 0.42:
    ...     factor.step(value)
    >>> round(loss.weight, 6)
    0.0525
    """

    def __init__(
        self, losses: list[RouterLoss], initial: float, *, warmup: int = 1000, window: int = 100
    ) -> None:
        if not initial > 0:
            raise ValueError(f"AdaptiveFactor: expected initial > 0, got {initial}")
        if window < 1 or warmup < 2 * window:
            raise ValueError(
                f"AdaptiveFactor: expected window >= 1 and warmup >= 2 * window, got {window} "
                f"and {warmup}"
            )
        self.losses, self.initial = list(losses), initial
        self.warmup, self.window = warmup, window
        self._steps, self._values = 0, []
        self._start = self._target = initial
        self._write(initial)

    def step(self, value: float) -> None:
        """After an optimizer step; ``value`` is the loss, averaged over layers and ranks."""
        self._steps += 1
        self._values = [*self._values, float(value)][-2 * self.window :]
        since = self._steps - self.warmup
        if since >= 0:
            ramp = since % self.window
            if ramp == 0:
                self._start, self._target = self._target, self._next()
            else:
                part = ramp / self.window
                self._write(self._start + part * (self._target - self._start))
            if ramp == 0:
                self._write(self._start)

    def state_dict(self) -> dict:
        """Plain data."""
        return {
            "steps": self._steps,
            "values": list(self._values),
            "start": self._start,
            "target": self._target,
            "weight": self.weight,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where ``state_dict`` was taken, and sets the weights."""
        self._steps, self._values = state["steps"], list(state["values"])
        self._start, self._target = state["start"], state["target"]
        self._write(state["weight"])

    def _next(self) -> float:
        before, now = self._values[: self.window], self._values[self.window :]
        if not sum(before) > 0:
            return self._target
        growth = sum(now) / sum(before)
        if growth > 1:
            growth = max(1.025, growth)
        return min(self._target * growth, 4 * self.initial)

    def _write(self, weight: float) -> None:
        self.weight = weight
        for loss in self.losses:
            loss.weight = weight


class AdaptiveSparsity:
    r"""Moves the weight of a `ReLUSparsityLoss` until the right share of experts is active.

    After each step the weight is multiplied by ``factor`` if more experts are active than wanted,
    else divided by it (ReMoE, arXiv 2412.14711, equation 11; where the shares are equal it stays).

    Args:
        losses: those whose ``weight`` is moved.
        target: the share of active experts wanted, k / E.
        initial: the first weight, 1e-8 in the paper.
        factor: 1.2 in the paper.
        floor: keep the weight at ``initial`` or above, as the baseline code of BlockFFN does.

    Raises:
        ValueError: an argument that does not fit.

    >>> from torch_routers.losses import ReLUSparsityLoss
    >>> loss = ReLUSparsityLoss(1e-8, top_k=2)
    >>> AdaptiveSparsity([loss], 2 / 16).step(0.5)
    >>> loss.weight
    1.2e-08
    """

    def __init__(
        self,
        losses: list[RouterLoss],
        target: float,
        *,
        initial: float = 1e-8,
        factor: float = 1.2,
        floor: bool = False,
    ) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"AdaptiveSparsity: expected target in (0, 1], got {target}")
        if not (initial > 0 and factor > 1):
            raise ValueError(
                f"AdaptiveSparsity: expected initial > 0 and factor > 1, got {initial} and {factor}"
            )
        self.losses, self.target, self.initial = list(losses), target, initial
        self.factor, self.floor = factor, floor
        self._write(initial)

    def step(self, active_share: float) -> None:
        """After a step; ``active_share`` is the share of active pairs of token and expert."""
        if active_share > self.target:
            self._write(self.weight * self.factor)
        elif active_share < self.target:
            least = self.initial if self.floor else 0.0
            self._write(max(self.weight / self.factor, least))

    def state_dict(self) -> dict:
        """Plain data."""
        return {"weight": self.weight}

    def load_state_dict(self, state: dict) -> None:
        """Sets the weights to those of ``state_dict``."""
        self._write(state["weight"])

    def _write(self, weight: float) -> None:
        self.weight = weight
        for loss in self.losses:
            loss.weight = weight
