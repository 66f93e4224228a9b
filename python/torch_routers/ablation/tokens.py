"""From documents to sequences of tokens, with the bytes that each token stands for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from torch_routers.ablation.corpora import Document
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.split import SplitText

START = "<|document|>"
"""The token before each document. It stands for no byte; its bits count all the same."""


@dataclass(frozen=True)
class Sequences:
    """One split as token sequences.

    Args:
        tokens: ``[sequences, length + 1]`` int64; inputs are all but the last, targets all but
            the first token. The last token of a sequence is the first of the next one.
        domains: ``[sequences]`` int64, index of the domain.
    """

    tokens: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenText:
    """The whole text, ready to train on.

    Args:
        splits: by name.
        domains: names, in the order of the indices in `Sequences.domains`.
        token_bytes: ``[vocab_size]`` int64, bytes that a token stands for.
        token_counts: ``[vocab_size]`` int64, how often it occurs in training.
        unused: tokens at the end of each domain and split that fill no sequence, by split.
    """

    splits: dict[str, Sequences]
    domains: list[str]
    token_bytes: Tensor
    token_counts: Tensor
    unused: dict[str, int]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text can be coded, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(text: SplitText, *, vocab_size: int, length: int) -> TokenText:
    """Trains the tokenizer on the training text and cuts all splits into sequences.

    Raises:
        AblationError: a domain fills no sequence in a split.
    """
    training = [document.text for part in text.documents["train"].values() for document in part]
    tokenizer = train_tokenizer(training, vocab_size)
    splits, unused = {}, {}
    for split, parts in text.documents.items():
        packed = [_pack(tokenizer, part, length) for part in parts.values()]
        short = [domain for domain, (rows, _) in zip(parts, packed, strict=True) if not len(rows)]
        if short:
            raise AblationError(
                f"ablation: expected text for a sequence of {length} tokens in each domain, got "
                f"less {split} text in {short[0]!r}"
            )
        splits[split] = Sequences(
            tokens=torch.cat([rows for rows, _ in packed]),
            domains=torch.arange(len(packed)).repeat_interleave(
                torch.tensor([len(rows) for rows, _ in packed])
            ),
        )
        unused[split] = sum(rest for _, rest in packed)
    # In a byte-level vocabulary each character of a token is one byte.
    token_bytes = torch.tensor(
        [
            0 if token == START else len(token)
            for token in map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))
        ]
    )
    inputs = splits["train"].tokens[:, :-1]
    token_counts = inputs.flatten().bincount(minlength=len(token_bytes))
    return TokenText(splits, text.domains, token_bytes, token_counts, unused)


def _pack(tokenizer: Tokenizer, documents: Sequence[Document], length: int) -> tuple[Tensor, int]:
    """All documents in a row, cut into sequences; the number of tokens left at the end."""
    start = tokenizer.token_to_id(START)
    ids: list[int] = []
    for coded in tokenizer.encode_batch([document.text for document in documents]):
        ids += [start, *coded.ids]
    stream = torch.tensor(ids)
    if len(stream) <= length:
        return stream.new_empty(0, length + 1), len(stream)
    sequences = stream.unfold(0, length + 1, length).contiguous()
    return sequences, len(stream) - sequences.shape[0] * length - 1


def training_order(sequences: int, *, steps: int, batch: int, seed: int) -> Tensor:
    """``[steps, batch]`` int64: which sequences each step sees. Every pass over the text has an
    order of its own; rows with the same seed see the same batches."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * batch / sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(passes)])
    return order[: steps * batch].view(steps, batch)
