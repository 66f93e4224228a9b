"""What is true of the hash router alone: its tables."""

import pytest
import torch

import torch_routers as tr


def zipf(vocab_size=2000):
    return (1e6 / torch.arange(1, vocab_size + 1)).long()[
        torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    ]


def loads(router, counts):
    """Tokens of each expert, by slot."""
    empty = torch.zeros(router.top_k, router.num_experts, dtype=torch.int64)
    return empty.scatter_add(1, router.table.T, counts.expand(router.top_k, -1))


def test_balanced_loads_differ_by_the_count_of_one_id_at_most():
    counts = zipf()
    load = loads(tr.HashRouter.balanced(counts, 8), counts)[0]
    assert load.max() - load.min() <= counts.max()
    chance = loads(tr.HashRouter(2000, 8), counts)[0]
    assert load.float().std() < 0.1 * chance.float().std()


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_every_slot_is_balanced_and_experts_are_distinct(top_k):
    counts = zipf()
    router = tr.HashRouter.balanced(counts, 8, top_k)
    assert (router.table.sort(-1).values.diff(dim=-1) > 0).all()
    spread = loads(router, counts).sum(0)
    assert spread.max() - spread.min() <= 2 * counts.max()


def test_experts_are_not_always_chosen_together():
    """Two slots of eight experts make 28 pairs; a common load would make four."""
    table = tr.HashRouter.balanced(zipf(), 8, 2).table.sort(-1).values
    assert len({tuple(row) for row in table.tolist()}) == 28


def test_seeds_make_different_tables():
    counts = zipf()
    for make in (
        lambda seed: tr.HashRouter(2000, 8, 2, seed=seed),
        lambda seed: tr.HashRouter.balanced(counts, 8, 2, seed=seed),
    ):
        assert torch.equal(make(1).table, make(1).table)
        assert not torch.equal(make(1).table, make(2).table)


def test_a_table_of_ones_own():
    table = torch.tensor([[2, 0], [1, 2], [0, 1]])
    router = tr.HashRouter.from_table(table, num_experts=3)
    assert torch.equal(router(torch.zeros(3, 4), token_ids=torch.arange(3)).indices, table)


@pytest.mark.parametrize(
    "table, message",
    [
        (torch.zeros(3), "table of integers of shape [vocab_size, top_k], got torch.float32"),
        (torch.tensor([[0, 3]]), "table in [0, num_experts=3), got 0 to 3"),
        (torch.tensor([[0, -1]]), "table in [0, num_experts=3), got -1 to 0"),
        (torch.tensor([[1, 1]]), "table with distinct experts per row, got equal"),
    ],
)
def test_says_what_is_wrong_with_a_table(table, message):
    with pytest.raises(ValueError) as info:
        tr.HashRouter.from_table(table, num_experts=3)
    assert str(info.value).startswith(f"HashRouter: expected {message}")


def test_says_what_is_wrong_with_counts():
    with pytest.raises(ValueError, match=r"expected token_counts of shape \[vocab_size\], got"):
        tr.HashRouter.balanced(torch.zeros(2, 2), 2)
