"""What padding contains changes nothing, and a recorded routing gives the same result again."""

import torch

import torch_routers as tr


def main() -> None:
    torch.manual_seed(0)
    moe = tr.MoE(
        tr.TopKRouter(hidden_size=32, num_experts=8, top_k=2),
        tr.SwiGLUExperts(num_experts=8, hidden_size=32, intermediate_size=64),
    ).eval()

    # Three sequences of 6, 4 and 1 tokens, padded to 6.
    lengths = torch.tensor([6, 4, 1])
    valid_mask = torch.arange(6) < lengths[:, None]
    x = torch.randn(3, 6, 32)

    y, routing = moe(x, valid_mask=valid_mask, return_routing=True)
    print("slots given to each expert:", routing.counts.tolist())
    print("indices of the last sequence:", routing.indices[2].tolist())
    assert routing.counts.sum() == lengths.sum() * 2
    assert (routing.indices[~valid_mask] == -1).all() and (y[~valid_mask] == 0).all()

    spoiled = x.masked_fill(~valid_mask[..., None], torch.nan)
    again, _ = moe(spoiled, valid_mask=valid_mask, return_routing=True)
    assert torch.equal(again, y)
    print("NaN in the padding: the same bits")

    # Replay: the experts are those of the record, the weights follow from the present logits.
    replayed, second = moe(x, indices=routing.indices, valid_mask=valid_mask, return_routing=True)
    assert torch.equal(second.weights, routing.weights) and torch.equal(replayed, y)
    print("replayed: the same weights, the same result")

    with torch.no_grad():
        moe.router.weight.mul_(-1)  # every preference turns into its opposite
    fresh, forced = moe.router(x), moe.router(x, indices=routing.indices)
    assert torch.equal(forced.indices, routing.indices)
    assert not torch.equal(fresh.indices, routing.indices)
    print("after a change of the router: the recorded experts, other weights")


if __name__ == "__main__":
    main()
