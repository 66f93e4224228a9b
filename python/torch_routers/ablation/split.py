"""From corpora to training, validation and test text: by document, in equal shares of bytes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch_routers.ablation.corpora import Corpus, Document
from torch_routers.ablation.errors import AblationError

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1
"""The part of a domain's bytes that validation and test get, each."""
MIN_DOCUMENTS = 8
"""A document is cut to this part of its split's limit: no few long files stand for a domain."""
MIN_SHARE_BYTES = 1024


@dataclass(frozen=True)
class SplitText:
    """What is trained on and tested on.

    Args:
        documents: by split, then by domain.
        shares: bytes that every domain has in a split, up to one incomplete character.
        notes: everything that was left out, cut or joined on the way, to be printed.
    """

    documents: dict[str, dict[str, list[Document]]]
    shares: dict[str, int]
    notes: list[str]

    @property
    def domains(self) -> list[str]:
        return list(self.documents["train"])

    def sha256(self) -> str:
        """Of every domain, name and text, in order: equal hashes mean equal data."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def split_corpora(corpora: Sequence[Corpus], limits: dict[str, int]) -> SplitText:
    """Splits every corpus by document, then cuts all domains of a split to equal bytes.

    Args:
        limits: the most bytes per domain, by split. A split's share is that, or what the smallest
            domain has, whichever is less.

    Raises:
        AblationError: a domain has less than 1024 bytes in a split.
    """
    notes = [f"{corpus.domain}: {note}" for corpus in corpora for note in corpus.notes]
    documents: dict[str, dict[str, list[Document]]] = {split: {} for split in SPLITS}
    for corpus in corpora:
        kept = _without_repetition(corpus.documents)
        if len(kept) < len(corpus.documents):
            notes.append(
                f"{corpus.domain}: {len(corpus.documents) - len(kept)} of {len(corpus.documents)} "
                "documents are empty or repeated, left out"
            )
        for split, part in zip(SPLITS, _split(corpus.domain, kept), strict=True):
            documents[split][corpus.domain] = part
    shares = {}
    for split, parts in documents.items():
        shares[split] = _cut_to_equal_shares(split, parts, limits[split], notes)
    return SplitText(documents, shares, notes)


def _without_repetition(documents: Sequence[Document]) -> list[Document]:
    by_text: dict[str, Document] = {}
    for document in documents:
        if document.text.strip():
            by_text.setdefault(document.text, document)
    return list(by_text.values())


def _split(domain: str, documents: Sequence[Document]) -> tuple[list[Document], ...]:
    """Training, validation, test. In the order of their names' hashes, documents go to the test
    text until it has its part of the bytes, then to validation, then to training."""

    def place(document: Document) -> bytes:
        return hashlib.sha256(f"{domain}/{document.name}".encode()).digest()

    part = HELD_OUT * sum(map(_size, documents))
    splits: tuple[list[Document], ...] = ([], [], [])
    train, validation, test = splits
    test_size = validation_size = 0
    for document in sorted(documents, key=place):
        if test_size < part:
            test.append(document)
            test_size += _size(document)
        elif validation_size < part:
            validation.append(document)
            validation_size += _size(document)
        else:
            train.append(document)
    return splits


def _cut_to_equal_shares(
    split: str, parts: dict[str, list[Document]], limit: int, notes: list[str]
) -> int:
    """Cuts the domains of a split in place; returns the bytes that each now has."""
    longest = limit // MIN_DOCUMENTS
    for domain, part in parts.items():
        parts[domain] = [_cut(document, longest) for document in part]
    sizes = {domain: sum(map(_size, part)) for domain, part in parts.items()}
    smallest = min(sizes, key=sizes.__getitem__)
    if sizes[smallest] < MIN_SHARE_BYTES:
        raise AblationError(
            f"ablation: expected at least {MIN_SHARE_BYTES} bytes of {split} text in each domain, "
            f"got {sizes[smallest]} in {smallest!r}. Give it more text, in more files, or leave "
            "it out"
        )
    if sizes[smallest] < limit:
        notes.append(f"{split}: {smallest!r} has the least text and sets the share of all")
    notes.append(f"{split}: documents are cut at {longest:,} bytes, the last one where it fills up")
    share = min(limit, sizes[smallest])
    for domain, part in parts.items():
        parts[domain] = _take(part, share)
    return share


def _take(documents: Sequence[Document], limit: int) -> list[Document]:
    """The first documents, the last of them cut, with ``limit`` bytes in all."""
    taken, left = [], limit
    for document in documents:
        taken.append(_cut(document, left))
        left -= _size(taken[-1])
        if not taken[-1].text:
            return taken[:-1]
    return taken


def _cut(document: Document, limit: int) -> Document:
    """Its first ``limit`` bytes, without a character that would be cut in two."""
    text = document.text.encode()[:limit].decode(errors="ignore")
    return document._replace(text=text)


def _size(document: Document) -> int:
    return len(document.text.encode())
