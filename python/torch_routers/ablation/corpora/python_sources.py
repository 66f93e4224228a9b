"""The source code of Python's standard library."""

import sysconfig
from pathlib import Path

from torch_routers.ablation.corpora.base import Corpus, read_files

# Tests repeat the code that they test; pydoc_data is the manual, a domain of its own.
LEFT_OUT = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}


def read(domain: str) -> Corpus:
    """One document per module."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if LEFT_OUT.isdisjoint(path.parts))
    documents, notes = read_files(paths, root)
    return Corpus(domain, documents, ("tests and installed packages are not read", *notes))
