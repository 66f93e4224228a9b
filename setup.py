"""Builds the C++ part with CMake and puts its two libraries into the package."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("torch") is None:
    sys.exit(
        "torch_routers is built against the PyTorch you have, and there is none. Run\n"
        '    pip install "torch>=2.13" pybind11 cmake ninja setuptools\n'
        "    pip install --no-build-isolation ."
    )

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = Path(os.environ.get("TORCH_ROUTERS_BUILD_DIR", ROOT / "build"))


class CMakeBuild(build_ext):
    def build_extensions(self):
        import pybind11

        self.force = True  # copy what CMake made, also over a newer file of another build

        cuda = os.environ.get("TORCH_ROUTERS_CUDA", "auto").lower()
        print(f"torch_routers: TORCH_ROUTERS_CUDA={cuda}", flush=True)
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_ROUTERS_CUDA={cuda}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        targets = ["--target", "torch_routers", "_C"]
        subprocess.run(["cmake", "--build", BUILD, *targets, *jobs], check=True)
        super().build_extensions()

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(BUILD / "package" / library.name, library)

    def get_ext_filename(self, name):
        # The operators are a plain shared library: no Python version in its name.
        is_module = name.rpartition(".")[2] == "_C"
        return super().get_ext_filename(name) if is_module else name.replace(".", "/") + ".so"


setup(
    ext_modules=[Extension(f"torch_routers.{name}", []) for name in ("libtorch_routers", "_C")],
    cmdclass={"build_ext": CMakeBuild},
)
