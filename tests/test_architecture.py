"""Who may know whom: the rules of CONTRIBUTING.md that a search can see."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "python/torch_routers"


def sources(*patterns):
    return sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def includes(path):
    """What a file includes, and what the headers of the project among it do."""
    names = re.findall(r'#include [<"]([^">]+)[">]', path.read_text())
    ours = [ROOT / "csrc" / name for name in names if (ROOT / "csrc" / name).exists()]
    return names + [name for header in ours for name in includes(header)]


KERNELS = sources("*/*_kernel.h", "*/*_math.h", "*/*_cpu.cpp", "*/*_cuda.cu", "common/*")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_no_torch(path):
    assert not [name for name in includes(path) if re.match(r"torch/|ATen/|c10/|op/", name)]


@pytest.mark.parametrize("path", sources("*/*"), ids=lambda path: path.name)
def test_operators_know_no_other_operator(path):
    folders = {name.split("/")[0] for name in includes(path) if (ROOT / "csrc" / name).exists()}
    assert folders <= {path.parent.name, "common", "op"}
    if path.parent.name == "common":
        assert folders <= {"common"}


@pytest.mark.parametrize("path", sources("*/*"), ids=lambda path: path.name)
def test_threads_are_torchs_and_intrinsics_are_in_common(path):
    text = path.read_text()
    assert not re.search(r"#pragma omp|std::thread|<<<", text)
    if path.parent.name != "common":
        assert "intrin.h" not in text


# ---- Python --------------------------------------------------------------------------------------

#: From the ground up: a file imports from its own level and below.
LEVELS = [
    {"_library", "_C"},
    {"_autograd", "registry"},
    {"ops", "noise"},
    {"routing"},
    {"delivery", "losses", "metrics"},
    {"routers"},
    {"layers", "lora", "env", "balancing", "presets", "replication"},
    {"integrations", "ablation"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in PYTHON.rglob("*.py") if path != PYTHON / "__init__.py")


def imports_at_import_time(tree):
    """The parts of torch_routers that a module imports outside functions and type checking."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_routers"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else (alias.name for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if "torch_routers." in a.name)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PYTHON)))
def test_imports_point_down(path):
    level = LEVEL[path.relative_to(PYTHON).parts[0].removesuffix(".py")]
    for name in imports_at_import_time(ast.parse(path.read_text())):
        assert LEVEL.get(name, 0) <= level, f"{path.name} imports {name}"


#: What it unpickles comes through a pipe from the process that started it.
UNPICKLES = PYTHON / "ablation" / "jobs.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PYTHON)))
def test_nothing_is_unpickled_or_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "torch.load", "__import__"), name
        if isinstance(node, ast.Import) and path != UNPICKLES:
            assert "pickle" not in ast.dump(node)


#: Each waits for the device, or makes sizes that a compiler cannot know.
FORBIDDEN = {"item", "tolist", "nonzero", "bincount", "unique", "masked_select"}


@pytest.mark.parametrize(
    "path",
    sorted(p for part in ("routers", "layers", "losses") for p in (PYTHON / part).glob("*.py")),
    ids=lambda path: path.name,
)
def test_forwards_do_not_wait_for_the_device(path):
    classes = ast.parse(path.read_text()).body
    # Its experts are modules, which need to be told how many rows they get.
    allowed = [c for c in classes if not (isinstance(c, ast.ClassDef) and c.name == "ExpertList")]
    for function in (node for c in allowed for node in ast.walk(c)):
        if isinstance(function, ast.FunctionDef) and function.name in ("forward", "route", "_mix"):
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
            names = {c.func.attr for c in calls if isinstance(c.func, ast.Attribute)}
            assert not names & FORBIDDEN
            loops = [n for n in ast.walk(function) if isinstance(n, ast.For)]
            assert not [loop for loop in loops if "range(" in ast.unparse(loop.iter)]


def test_tests_use_what_is_public():
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name in ("test_differentiable.py", Path(__file__).name):
            continue  # the former tests the one tool that is for authors of operators
        imports = r"^ *(from torch_routers\._|import torch_routers\._|from torch_routers import _)"
        assert not re.search(imports, path.read_text(), re.MULTILINE), path


def test_the_project_speaks_of_itself_alone():
    words = re.compile(r"/(work|farm|root|home)/|\.\./shared")
    for folder in "csrc", "python", "tests", "docs", "examples":
        for path in (ROOT / folder).rglob("*"):
            text = path.suffix in (".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".txt", ".sh")
            if text and "_build" not in path.parts and path != Path(__file__):
                assert not words.search(path.read_text()), path
