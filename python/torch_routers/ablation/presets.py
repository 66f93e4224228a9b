"""The sizes of a comparison: `Settings`, and the presets by name."""

from dataclasses import dataclass, field, fields

from torch_routers.ablation.errors import AblationError


def _option(default, text: str):
    """A field that is also a command line option, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on, besides the text and the rows."""

    steps: int = _option(200, "optimiser steps per model")
    seeds: tuple[int, ...] = _option((0,), "one model per row and seed")
    learning_rates: tuple[float, ...] = _option(
        (8e-3,), "peaks, tried with the first seed; the best by validation counts"
    )
    layers: int = _option(4, "transformer blocks")
    hidden_size: int = _option(96, "width of the model")
    heads: int = _option(4, "attention heads")
    num_experts: int = _option(8, "experts per layer")
    top_k: int = _option(2, "experts per token")
    expert_size: int = _option(128, "hidden width of an expert")
    vocab_size: int = _option(1024, "tokens of the byte-level BPE")
    sequence: int = _option(128, "tokens per sequence")
    batch: int = _option(12, "sequences per step")
    train_bytes: int = _option(240_000, "most training text per domain")
    heldout_bytes: int = _option(30_000, "most validation text and test text per domain, each")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            numbers = value if isinstance(value, tuple) else (value,)
            positive = all(number > 0 for number in numbers) or option.name == "seeds"
            if not (numbers and positive and len(set(numbers)) == len(numbers)):
                raise AblationError(
                    f"--{option.name.replace('_', '-')}: expected different positive numbers, "
                    f"got {value}"
                )
        if self.hidden_size % (2 * self.heads):
            raise AblationError(
                f"--hidden-size: expected a multiple of 2 * heads={2 * self.heads}, "
                f"got {self.hidden_size}"
            )
        if self.top_k > self.num_experts:
            raise AblationError(
                f"--top-k: expected at most num_experts={self.num_experts}, got {self.top_k}"
            )

    def limits(self) -> dict[str, int]:
        """The most bytes per domain, by split."""
        return {
            "train": self.train_bytes,
            "validation": self.heldout_bytes,
            "test": self.heldout_bytes,
        }


PRESETS = {
    "quick": Settings(steps=60, heldout_bytes=12_000),
    "demo": Settings(),
    "full": Settings(
        steps=1000,
        seeds=(0, 1, 2),
        learning_rates=(8e-3, 16e-3, 32e-3),
        train_bytes=1_000_000,
        heldout_bytes=100_000,
    ),
}
