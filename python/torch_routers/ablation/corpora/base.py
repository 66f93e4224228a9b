"""What a corpus is, and how the sources read it from installed packages."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch_routers.ablation.errors import AblationError


class Document(NamedTuple):
    """The unit of the split: it lies in one of training, validation and test, never in two."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The documents of one domain.

    Args:
        domain: the name that tables and pictures show.
        documents: with names that are unique in the domain.
        notes: what the source left out or joined, one sentence each, to be printed.
    """

    domain: str
    documents: list[Document]
    notes: tuple[str, ...] = ()


def package_file(package: str, *path: str, distribution: str) -> Path:
    """A file or folder inside an installed package, which is not imported.

    Raises:
        AblationError: the package, or the file in it, is not there.
    """
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        file = Path(folder, *path)
        if file.exists():
            return file
    raise AblationError(
        f"ablation: expected {'/'.join((package, *path))} of the package {distribution!r}, got "
        f'none. Install the extra: pip install "torch-routers[corpora]"'
    )


def read_files(paths: Iterable[Path], root: Path) -> tuple[list[Document], list[str]]:
    """One document per file, named by its path below ``root``; notes on what is not UTF-8."""
    documents, undecodable = [], []
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        try:
            documents.append(Document(name, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            undecodable.append(name)
    notes = []
    if undecodable:
        notes.append(f"{len(undecodable)} files are not UTF-8, left out: {', '.join(undecodable)}")
    return documents, notes


def join_by_name(parts: Iterable[Document]) -> list[Document]:
    """Parts of equal name become one document, in the order in which they came."""
    texts: dict[str, list[str]] = {}
    for name, text in parts:
        texts.setdefault(name, []).append(text)
    return [Document(name, "\n".join(pieces)) for name, pieces in texts.items()]
