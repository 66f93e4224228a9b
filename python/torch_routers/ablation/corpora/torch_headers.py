"""The C++ headers of PyTorch."""

from torch_routers.ablation.corpora.base import Corpus, package_file, read_files

PROJECTS = ("ATen", "c10", "torch")


def read(domain: str) -> Corpus:
    """One document per header."""
    root = package_file("torch", "include", distribution="torch")
    generated = root / "ATen" / "ops"
    paths = (
        path
        for project in PROJECTS
        for path in (root / project).rglob("*.h")
        if generated not in path.parents
    )
    documents, notes = read_files(paths, root)
    note = f"only {', '.join(PROJECTS)}; the generated ATen/ops is not read"
    return Corpus(domain, documents, (note, *notes))
