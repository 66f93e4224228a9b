"""The sizes of the comparison, and the presets by name."""

from dataclasses import dataclass

from torch_routers.ablation.errors import AblationError


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on, besides the text, the encoder and the method."""

    steps: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (5e-3,)
    """Of adapters and routers; of several, the best by validation counts."""
    head_learning_rate: float = 5e-3
    rank: int = 8
    """Of an expert."""
    lora_alpha: int = 16
    """The same for all methods: what all ranks together may change in a step is then equal."""
    batch: int = 4
    """Examples of each task in a step."""
    length: int = 32
    """Tokens, at most, of an example."""
    train: int = 1600
    """Examples of each task, at most; as many of each class."""
    validation: int = 80
    test: int = 400

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise AblationError(f"--steps: expected at least 1, got {self.steps}")
        for name in "seeds", "learning_rates":
            values = getattr(self, name)
            if min(values) < 0 or len(set(values)) < len(values):
                option = name.replace("_", "-")
                raise AblationError(f"--{option}: expected different numbers >= 0, got {values}")


PRESETS = {
    "quick": Settings(steps=2, seeds=(0,), batch=2, length=16, train=32, validation=16, test=16),
    "default": Settings(),
    "full": Settings(steps=1000, learning_rates=(2e-3, 5e-3), batch=8, length=64, validation=400),
}
