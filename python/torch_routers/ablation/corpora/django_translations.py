"""The translations of Django's messages, from its ``.po`` catalogues."""

import ast
import re
from pathlib import Path

from torch_routers.ablation.corpora.base import (
    Corpus,
    Document,
    join_by_name,
    package_file,
    read_files,
)

# "msgstr" or "msgstr[1]", then quoted strings, one a line, that belong together.
TRANSLATION = re.compile(r'^msgstr(?:\[\d+\])? ("(?:.|\n")*"$)', re.MULTILINE)


def read(domain: str) -> Corpus:
    """One document per application and language, one line per message.

    The English originals are the same in every catalogue and are left out. The variants of a
    language (es, es_AR) are often word for word equal and are one document.
    """
    root = package_file("django", distribution="django")
    catalogues, notes = read_files(root.rglob("*.po"), root)
    documents = join_by_name(
        Document(_application_and_language(file.name), _translations(file.text))
        for file in catalogues
    )
    note = "translations only; the variants of a language (es, es_AR) are one document"
    return Corpus(domain, documents, (note, *notes))


def _application_and_language(name: str) -> str:
    *application, _, language, _, _ = Path(name).parts
    return "/".join((*application, language.partition("_")[0]))


def _translations(catalogue: str) -> str:
    messages = (
        "".join(ast.literal_eval(line) for line in match[1].splitlines())
        for match in TRANSLATION.finditer(catalogue)
    )
    _, *translations = messages  # the first is the catalogue's own header
    return "\n".join(filter(None, translations))
