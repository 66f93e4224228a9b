"""What a bug report needs: ``python -m torch_routers.env [--json]``."""

import argparse
import importlib.metadata
import json
import platform

import torch

import torch_routers
from torch_routers import _C

_OPTIONAL = ("transformers", "peft", "accelerate", "tokenizers", "matplotlib", "numpy")


def report() -> dict[str, object]:
    """Versions, how the library was built, and what it runs on; plain data."""
    versions = {}
    for package in _OPTIONAL:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "torch_routers": torch_routers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "built with torch": _C.built_with_torch,
        "compiler": _C.compiler,
        "build type": _C.build_type,
        "TORCH_ROUTERS_CUDA": _C.cuda_option,
        "CUDA kernels": _C.cuda_version,
        "CUDA devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "instruction set": _C.cpu_capability(),
        "instruction sets": _C.cpu_capabilities(),
        "threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "optional packages": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_routers.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    data = report()
    if parser.parse_args().json:
        print(json.dumps(data, indent=2))
        return
    packages = data.pop("optional packages")
    for name, value in [*data.items(), *packages.items()]:
        words = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:26}{words or '-'}")


if __name__ == "__main__":
    main()
