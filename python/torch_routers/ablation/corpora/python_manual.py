"""The language manual that pydoc shows: ``help("comparisons")``."""

import re
from collections.abc import Iterator

from torch_routers.ablation.corpora.base import Corpus, Document, join_by_name
from torch_routers.ablation.errors import AblationError

# A section begins with a line that is underlined.
SECTION = re.compile(r"\n\n(?=[^\n]+\n(?:\*{3,}|={3,}|-{3,}|~{3,}|\^{3,})\n)")


def read(domain: str) -> Corpus:
    """One document per section.

    Some topics are passages of others. A paragraph is kept once, in the longest topic that has
    it, or else test documents would be training documents under another name.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise AblationError(
            "ablation: expected the module pydoc_data of Python's standard library, got none. "
            f"Name the corpora without {domain!r} in --corpora"
        ) from None
    documents = join_by_name(_sections(topics))
    size = sum(len(text) for text in topics.values())
    kept = sum(len(document.text) for document in documents)
    note = f"paragraphs that several topics repeat are kept once ({kept:,} of {size:,} characters)"
    return Corpus(domain, documents, (note,))


def _sections(topics: dict[str, str]) -> Iterator[Document]:
    seen: set[str] = set()
    for _, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        for section in SECTION.split(text.strip()):
            paragraphs = [part for part in section.split("\n\n") if part not in seen]
            seen.update(paragraphs)
            if paragraphs:
                yield Document(section.partition("\n")[0], "\n\n".join(paragraphs))
