"""The hash router: a fixed table from token ids to experts."""

import heapq
import itertools
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_routers.routers.base import Router, RouterTraits
from torch_routers.routing import Routing


class HashRouter(Router):
    r"""Give each token the experts that a table has for its vocabulary id.

    Nothing is learned, and no token can be treated by its context: the baseline that a learned
    router has to beat (Hash Layers, arXiv 2106.04426).

    .. math::  i_j = \mathrm{table}[\mathrm{id}, j], \qquad w_j = 1 / k

    The paper has one expert per token, of weight 1; with more, each slot weighs the same. An id
    beyond the table, as when the vocabulary grew, goes to experts ``(id + j) mod num_experts``.

    Args:
        vocab_size: rows of the table.
        num_experts: experts to choose from.
        top_k: experts per token, in ``[1, num_experts]``, all distinct.
        seed: of the random table. `balanced` and `from_table` make other tables.

    The table is a buffer ``[vocab_size, top_k]`` int64 of the ``state_dict``. Every call needs
    ``token_ids``, ``[...]`` of an integer dtype; `follow_inputs` brings them from the model's root.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = HashRouter.balanced(torch.tensor([50, 30, 20, 10]), num_experts=2)
    >>> router(torch.randn(4, 8), token_ids=torch.arange(4)).indices.flatten()
    tensor([0, 1, 1, 0])
    """

    traits = RouterTraits(needs=("token_ids",))

    def __init__(self, vocab_size: int, num_experts: int, top_k: int = 1, *, seed: int = 0) -> None:
        super().__init__(num_experts)
        if vocab_size < 1:
            raise ValueError(f"HashRouter: expected vocab_size >= 1, got {vocab_size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"HashRouter: expected top_k in [1, num_experts={num_experts}], got {top_k}"
            )
        self.vocab_size, self.top_k, self.seed = vocab_size, top_k, seed
        self.table: Tensor
        self.register_buffer("table", torch.empty(vocab_size, top_k, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the random table of ``seed``."""
        if self.table.is_meta:
            return
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(self.vocab_size, self.num_experts, generator=generator)
        self.table.copy_(scores.argsort(-1)[:, : self.top_k])

    @classmethod
    def from_table(cls, table: Tensor, num_experts: int) -> "HashRouter":
        """A router with the given table, ``[vocab_size, top_k]`` integers in [0, num_experts)."""
        if table.dim() != 2 or table.is_floating_point():
            raise ValueError(
                "HashRouter: expected table of integers of shape [vocab_size, top_k], "
                f"got {table.dtype} of shape {list(table.shape)}"
            )
        if not ((table >= 0) & (table < num_experts)).all():
            raise ValueError(
                f"HashRouter: expected table in [0, num_experts={num_experts}), "
                f"got {int(table.min())} to {int(table.max())}"
            )
        if (table.sort(-1).values.diff(dim=-1) == 0).any():
            raise ValueError("HashRouter: expected table with distinct experts per row, got equal")
        router = cls(table.shape[0], num_experts, table.shape[1])
        router.table.copy_(table)
        return router

    @classmethod
    def balanced(
        cls, token_counts: Tensor, num_experts: int, top_k: int = 1, *, seed: int = 0
    ) -> "HashRouter":
        """A router whose experts see about equally many tokens of a text.

        Ids are taken in descending order of frequency; each goes to the expert that has the fewest
        tokens so far (the paper's balanced hash), so that loads differ by no more than the count of
        one id. Each further slot does the same with loads of its own, with ids of similar frequency
        in random order, and passes over the experts that the id has. (With common loads the same
        experts would always be chosen together.)

        Args:
            token_counts: ``[vocab_size]``, how often each id occurs.
            num_experts, top_k: as in the constructor.
            seed: of the random order.
        """
        if token_counts.dim() != 1:
            raise ValueError(
                "HashRouter: expected token_counts of shape [vocab_size], "
                f"got {list(token_counts.shape)}"
            )
        router = cls(token_counts.shape[0], num_experts, top_k, seed=seed)
        counts = token_counts.tolist()
        by_count = sorted(range(len(counts)), key=lambda token: -counts[token])
        similar = [by_count[i : i + num_experts] for i in range(0, len(counts), num_experts)]
        generator = random.Random(seed)
        table: list[list[int]] = [[] for _ in counts]
        for slot in range(top_k):
            if slot > 0:
                similar = [generator.sample(ids, len(ids)) for ids in similar]
            _fill_slot(table, counts, itertools.chain(*similar), num_experts)
        router.table.copy_(torch.tensor(table))
        return router

    def route(
        self, x: Tensor, *, valid_mask: Tensor | None, token_ids: Tensor, **context: Any
    ) -> Routing:
        if token_ids.is_floating_point() or token_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"HashRouter: expected token_ids of integers of shape {list(x.shape[:-1])}, "
                f"got {token_ids.dtype} of shape {list(token_ids.shape)}"
            )
        ids = token_ids.long()
        known = (ids >= 0) & (ids < self.vocab_size)
        slots = torch.arange(self.top_k, device=ids.device)
        indices = torch.where(
            known.unsqueeze(-1),
            self.table[torch.where(known, ids, 0)],
            (ids.unsqueeze(-1) + slots) % self.num_experts,
        )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = torch.full(indices.shape, 1 / self.top_k, dtype=dtype, device=x.device)
        taken = torch.ones_like(indices)
        if valid_mask is not None:
            valid = valid_mask.unsqueeze(-1)
            weights, taken = weights * valid, taken * valid
        counts = taken.new_zeros(self.num_experts)
        counts = counts.scatter_add(0, indices.flatten(), taken.flatten())
        if valid_mask is not None:
            indices = torch.where(valid, indices, -1)
        return Routing(weights, indices, counts=counts)


def _fill_slot(
    table: list[list[int]], counts: list[int], ids: Iterable[int], num_experts: int
) -> None:
    """Appends to each id's experts the one with the lightest load that it does not have yet."""
    loads = [(0, expert) for expert in range(num_experts)]  # a heap
    for token in ids:
        passed_over = []
        while loads[0][1] in table[token]:
            passed_over.append(heapq.heappop(loads))
        load, expert = loads[0]
        heapq.heapreplace(loads, (load + counts[token], expert))
        table[token].append(expert)
        for item in passed_over:
            heapq.heappush(loads, item)
