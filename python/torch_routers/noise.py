"""Randomness by counters: a number depends on a seed, a row and a column alone.

So a token gets the same noise wherever it stands in a batch, on whichever rank, and again when
activation checkpointing repeats the forward.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, whose arithmetic wraps around
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def uniform(
    seed: int | Tensor, row_ids: Tensor, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Numbers in the open interval (0, 1), one per row id and column.

    .. math::  u_{rc} = \frac{\lfloor h(h(\mathrm{seed} + r\,\gamma) + c\,\gamma) / 2^{41} \rfloor
               + 1/2}{2^{23}}

    with :math:`h` the finaliser of SplitMix64 (Steele, Lea, Flood 2014) and :math:`\gamma` its
    increment; with 52 bits instead of 23 for float64.

    Args:
        seed: an int, or a scalar int64 tensor.
        row_ids: ``[rows]`` int64, such as the numbers of the tokens in the whole data set.
        columns: numbers per row.
        dtype: float32 or float64.

    Returns:
        ``[rows, columns]``.

    >>> ids = torch.tensor([3, 8])
    >>> torch.equal(uniform(1, ids, 4)[1], uniform(1, torch.tensor([8]), 4)[0])
    True
    """
    column = torch.arange(columns, device=row_ids.device)
    bits = hashed(hashed(row_ids * _GOLDEN + seed).unsqueeze(-1) + column * _GOLDEN)
    kept = 52 if dtype == torch.float64 else 23  # with 1/2 more it is still exact, thus never 1
    return (_shift(bits, 64 - kept).to(dtype) + 0.5) / 2**kept


class Stream(IntEnum):
    """Uses of randomness in one call, whose numbers do not depend on each other."""

    JITTER = 0
    LOGITS = 1
    SECOND_CHOICE = 2
    EXPERTS = 3


class Noise:
    """The random numbers of one call.

    Args:
        x: ``[..., n]``, the tokens; numbers come in its dtype, which is float32 or float64.
        seed: an int, or a scalar int64 tensor. Default: one from torch's generator, which
            ``torch.manual_seed`` and activation checkpointing govern.
        row_ids: ``[...]`` int64, numbers of the tokens. Default: their position in the batch.
    """

    def __init__(
        self, x: Tensor, seed: int | Tensor | None = None, row_ids: Tensor | None = None
    ) -> None:
        if row_ids is not None and (row_ids.dtype != torch.int64 or row_ids.shape != x.shape[:-1]):
            raise ValueError(
                f"Noise: expected row_ids in int64 of shape {list(x.shape[:-1])}, "
                f"got {row_ids.dtype} of shape {list(row_ids.shape)}"
            )
        self._shape, self._dtype = x.shape[:-1], x.dtype
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=x.device)
        elif not isinstance(seed, Tensor):
            seed = torch.full((), seed, dtype=torch.int64, device=x.device)
        self.seed = seed
        tokens = self._shape.numel()
        self.row_ids = (
            torch.arange(tokens, device=x.device) if row_ids is None else row_ids.reshape(-1)
        )

    def uniform(self, stream: Stream, columns: int) -> Tensor:
        """``[..., columns]``, in the open interval (0, 1)."""
        offset = (int(stream) * _MIX1 + 2**63) % 2**64 - 2**63  # wraps around, as int64 would
        numbers = uniform(self.seed + offset, self.row_ids, columns, self._dtype)
        return numbers.view(*self._shape, columns)

    def jittered(self, x: Tensor, jitter: float) -> Tensor:
        """``x`` ``[..., n]``, each number times one uniform in ``[1 - jitter, 1 + jitter]``."""
        return x * (1 + jitter * (2 * self.uniform(Stream.JITTER, x.shape[-1]) - 1))

    def gumbel(self, stream: Stream, columns: int) -> Tensor:
        """The standard Gumbel distribution: ``-ln(-ln u)``."""
        return -(-self.uniform(stream, columns).log()).log()

    def normal(self, stream: Stream, columns: int) -> Tensor:
        """The standard normal distribution: its quantile at ``u``."""
        return math.sqrt(2) * (2 * self.uniform(stream, columns) - 1).erfinv()


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros: torch shifts the sign in."""
    return (x >> by) & (2 ** (64 - by) - 1)


def hashed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a bijection of int64."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)
