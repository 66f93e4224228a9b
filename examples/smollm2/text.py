"""Text of three domains, from installed packages, as rows of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from torch_routers.ablation.corpora import read_corpora
from torch_routers.ablation.split import SPLITS, split_corpora

DOMAINS = ("bible", "imdb", "python")
BYTES_PER_TOKEN = 8
"""More than any of them has."""


def read_rows(
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[str],
    *,
    train: int,
    test: int,
    length: int,
) -> dict[str, dict[str, Tensor]]:
    """Rows of tokens, int64 ``[train or test, length]``, by domain and split.

    A document lies in one split, never in two; of its text, a row has what fits.

    Raises:
        AblationError: a package is not installed.
    """
    rows = {"train": train, "validation": 1, "test": test}
    limits = {split: max(4096, BYTES_PER_TOKEN * length * rows[split]) for split in SPLITS}
    split = split_corpora(read_corpora(list(domains), {}), limits)
    result: dict[str, dict[str, Tensor]] = {}
    for domain in domains:
        for name in ("train", "test"):
            text = "\n\n".join(document.text for document in split.documents[name][domain])
            tokens = torch.tensor(tokenizer(text)["input_ids"])
            found = tokens[: len(tokens) // length * length].view(-1, length)
            result.setdefault(domain, {})[name] = found[: rows[name]]
    return result
