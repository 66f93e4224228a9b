"""The YAML files from which PyTorch generates its operators."""

import re
from collections.abc import Iterator
from pathlib import Path

from torch_routers.ablation.corpora.base import (
    Corpus,
    Document,
    join_by_name,
    package_file,
    read_files,
)

# A top-level entry begins in the first column and is no comment.
ENTRY = re.compile(r"^(?=[^\s#])", re.MULTILINE)
OPERATOR = re.compile(r"- (?:func|name|tag): _*(\w+?)_*\b")


def read(domain: str) -> Corpus:
    """One document per operator: its overloads, variants and derivatives in all files."""
    roots = (
        package_file("torchgen", "packaged", distribution="torch"),
        package_file("torch", "_export", distribution="torch"),
    )
    files = []
    notes = ["the entries of one operator in all files are one document"]
    for root in roots:
        documents, undecodable = read_files(root.rglob("*.yaml"), root)
        files += documents
        notes += undecodable
    return Corpus(domain, join_by_name(_entries(files)), tuple(notes))


def _entries(files: list[Document]) -> Iterator[Document]:
    for file in files:
        for entry in filter(None, ENTRY.split(file.text)):
            operator = OPERATOR.match(entry)
            name = operator[1] if operator else f"{Path(file.name).name}: {entry.splitlines()[0]}"
            yield Document(name, entry.rstrip())
