"""The user's own text: ``--text NAME=DIR``."""

from pathlib import Path

from torch_routers.ablation.corpora.base import Corpus, read_files
from torch_routers.ablation.errors import AblationError


def read(domain: str, folder: Path) -> Corpus:
    """One document per file below ``folder``; hidden files and folders are not read.

    Raises:
        AblationError: ``folder`` is no folder.
    """
    if not folder.is_dir():
        raise AblationError(
            f"--text: expected {domain}=DIR with a folder of text files, got {folder}"
        )
    paths = (
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    documents, notes = read_files(paths, folder)
    return Corpus(domain, documents, tuple(notes))
