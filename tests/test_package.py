"""The package as a user meets it: importing, building, reporting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import torch_routers as tr
from torch_routers import env

ROOT = Path(__file__).parent.parent
PACKAGE = Path(tr.__file__).parent


def run(*command, path=None, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or []))}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


def copy_of_the_package(folder):
    """Without the compiled libraries."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return shutil.copytree(PACKAGE, folder / "torch_routers", ignore=ignore)


# ---- an import that fails says what was found, what is needed, and what to do --------------------


def last_line_of_import(*path):
    result = run("-c", "import torch_routers", path=path)
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_with_a_torch_too_old(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text('__version__ = "2.9.1+cu128"\n')
    copy_of_the_package(tmp_path)
    assert last_line_of_import(tmp_path) == (
        "ImportError: torch_routers: expected torch >= 2.13, got 2.9.1+cu128. "
        'Run `pip install "torch>=2.13"`.'
    )


def test_without_the_library(tmp_path):
    copy_of_the_package(tmp_path)
    assert last_line_of_import(tmp_path) == (
        "ImportError: torch_routers: expected the compiled library libtorch_routers.so, got none. "
        "Run `pip install --no-build-isolation -e .` in a checkout."
    )


def test_with_a_library_that_does_not_load(tmp_path):
    (copy_of_the_package(tmp_path) / "libtorch_routers.so").write_bytes(b"no library")
    message = last_line_of_import(tmp_path)
    assert f"expected libtorch_routers.so to load with torch {torch.__version__}" in message
    assert message.endswith("Run `pip install --no-build-isolation -e .` in a checkout.")


def test_the_library_names_the_torch_that_it_needs():
    """The version in _library.py is the one that the build targets and the metadata asks for."""
    major, minor = 2, 13
    assert f"NEEDED = ({major}, {minor})" in (PACKAGE / "_library.py").read_text()
    cmake, metadata = (ROOT / "CMakeLists.txt").read_text(), (ROOT / "pyproject.toml").read_text()
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in cmake
    assert f'"torch>={major}.{minor}"' in metadata


# ---- building ------------------------------------------------------------------------------------


def test_setup_without_torch_names_the_commands():
    result = run("-S", "setup.py", "build_ext", cwd=ROOT)  # -S: no packages but Python's own
    assert result.returncode != 0
    assert 'pip install "torch>=2.13" pybind11 cmake ninja setuptools' in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_the_cuda_option_is_checked(tmp_path):
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-DTORCH_ROUTERS_CUDA=perhaps"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "TORCH_ROUTERS_CUDA: expected auto, on or off, got perhaps" in result.stderr


# ---- importing and reporting ---------------------------------------------------------------------


def test_importing_brings_no_optional_package():
    """Extras are imported by those who use them; what torch itself brings is torch's."""
    program = "import json, sys, torch_routers; print(json.dumps(list(sys.modules)))"
    names = set(json.loads(run("-c", program, path=[PACKAGE.parent]).stdout))
    optional = {"transformers", "peft", "accelerate", "tokenizers", "matplotlib", "pytest"}
    assert "torch_routers.ops.gate" in names
    assert not names & {*optional, "torch_routers.ablation"}
    assert "torch._dynamo" not in names, "importing the compiler takes a second"


def test_environment_report():
    result = run("-m", "torch_routers.env", "--json", path=[PACKAGE.parent])
    report = json.loads(result.stdout)
    assert report.keys() == env.report().keys()
    assert report["torch_routers"] == tr.__version__
    assert report["torch"] == torch.__version__
    assert report["instruction set"] in report["instruction sets"]
    assert report["TORCH_ROUTERS_CUDA"] in ("auto", "on", "off")
    text = run("-m", "torch_routers.env", path=[PACKAGE.parent]).stdout
    assert f"torch                     {torch.__version__}" in text


def test_version_is_that_of_the_metadata():
    assert f'version = "{tr.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert tr.__version__ in (ROOT / "CHANGELOG.md").read_text()
