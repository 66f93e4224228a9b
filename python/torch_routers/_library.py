"""Loads the compiled operators. The only place that knows their file, and the torch they need."""

from pathlib import Path

import torch

NEEDED = (2, 13)
_FILE = Path(__file__).with_name("libtorch_routers.so")
_BUILD = "pip install --no-build-isolation -e ."


def _load() -> None:
    needed = ".".join(map(str, NEEDED))
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < NEEDED:
        raise ImportError(
            f"torch_routers: expected torch >= {needed}, got {torch.__version__}. "
            f'Run `pip install "torch>={needed}"`.'
        )
    if not _FILE.exists():
        raise ImportError(
            f"torch_routers: expected the compiled library {_FILE.name}, got none. "
            f"Run `{_BUILD}` in a checkout."
        )
    try:
        torch.ops.load_library(_FILE)
    except OSError as error:
        raise ImportError(
            f"torch_routers: expected {_FILE.name} to load with torch {torch.__version__}, "
            f"got: {error}. Run `{_BUILD}` in a checkout."
        ) from error


_load()
