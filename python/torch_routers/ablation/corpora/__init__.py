"""The corpora by name. To add one: a file with ``read(domain) -> Corpus``, and a line below."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch_routers.ablation.corpora import (
    django_translations,
    folder,
    king_james,
    movie_reviews,
    pronunciations,
    python_manual,
    python_sources,
    torch_headers,
    torch_yaml,
)
from torch_routers.ablation.corpora.base import Corpus, Document
from torch_routers.ablation.errors import AblationError

__all__ = ["CORPORA", "Corpus", "Document", "chosen_domains", "read_corpora"]


class Source(NamedTuple):
    read: Callable[[str], Corpus]
    default: bool
    """Whether it comes with Python and torch; the others come with the extra ``corpora``."""


CORPORA = {
    "python": Source(python_sources.read, default=True),
    "headers": Source(torch_headers.read, default=True),
    "yaml": Source(torch_yaml.read, default=True),
    "manual": Source(python_manual.read, default=True),
    "bible": Source(king_james.read, default=False),
    "imdb": Source(movie_reviews.read, default=False),
    "rotten-tomatoes": Source(movie_reviews.read, default=False),
    "cmudict": Source(pronunciations.read, default=False),
    "django": Source(django_translations.read, default=False),
}


def chosen_domains(choice: str) -> list[str]:
    """``default``, ``all``, ``none`` or names with commas between, in the order of `CORPORA`.

    Raises:
        AblationError: a name is unknown.
    """
    if choice == "none":
        return []
    groups = {
        "default": [name for name, source in CORPORA.items() if source.default],
        "all": list(CORPORA),
    }
    names = groups.get(choice) or choice.split(",")
    unknown = [name for name in names if name not in CORPORA]
    if unknown:
        raise AblationError(
            f"--corpora: expected default, all, none or names of {', '.join(CORPORA)}, "
            f"got {', '.join(unknown)}"
        )
    return [name for name in CORPORA if name in names]


def read_corpora(domains: Sequence[str], folders: dict[str, Path]) -> list[Corpus]:
    """Reads the named corpora and the user's folders.

    Raises:
        AblationError: a name is taken twice, no text is left, or a source cannot be read.
    """
    taken = [name for name in folders if name in domains]
    if taken:
        raise AblationError(
            f"--text: expected a NAME that no corpus has, got {taken[0]}. Choose another name"
        )
    corpora = [CORPORA[name].read(name) for name in domains]
    corpora += [folder.read(name, path) for name, path in folders.items()]
    if not corpora:
        raise AblationError("--corpora: expected at least one corpus or --text, got none")
    return corpora
