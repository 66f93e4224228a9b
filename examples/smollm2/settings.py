"""The sizes of the examples with SmolLM2, by the name of the preset."""

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on, besides the text and the model."""

    steps: int = 30
    batch: int = 2
    """Rows of a micro-batch; a step has two."""
    length: int = 64
    """Tokens of a row."""
    train: int = 240
    """Rows of each domain, at most."""
    test: int = 8
    tokens: int = 16
    """To generate."""
    learning_rate: float = 2e-3


PRESETS = {
    "quick": Settings(steps=2, batch=1, length=16, train=12, test=2, tokens=4),
    "default": Settings(),
}


def parser(description: str) -> argparse.ArgumentParser:
    """The options of both scripts."""
    result = argparse.ArgumentParser(description=description.partition("\n")[0])
    result.add_argument("--preset", choices=PRESETS, default="default")
    result.add_argument("--out", type=Path, default=Path("smollm2-results"))
    return result
