"""``python -m torch_routers.ablation``."""

import sys

NEEDED = {"matplotlib", "numpy", "scipy", "tokenizers", "tqdm"}


def main() -> int:
    try:
        from torch_routers.ablation.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"ablation: expected the package {error.name!r}, got none. "
            'Install the extra: pip install "torch-routers[ablation]"',
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
