"""`MoE` with `TopKRouter` and `SwiGLUExperts`: the whole layer, gate product included.

Nearly all of it are matrix products, hence two precisions: torch's default, "highest" (forward
only), and `torch.set_float32_matmul_precision("medium")`, which on some processors is another
library, twice as fast and as exact. Only the latter has bars.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import torch_routers as tr

from .bench_topk_gate import topk_softmax
from .harness import Options, Row, name_of

HIDDEN = 512


class Baselines:
    """The layer with the parameters of `moe`, from plain PyTorch."""

    def __init__(self, moe: tr.MoE):
        self.gate, self.k = moe.router.weight, moe.router.top_k
        self.up, self.down = moe.experts.gate_up_proj, moe.experts.down_proj

    def sort(self, x):
        weights, indices = topk_softmax(F.linear(x, self.gate), self.k)
        experts = indices.flatten()
        order = experts.to(torch.int16).argsort(stable=True)
        counts = torch.bincount(experts, minlength=self.gate.shape[0])
        return weights, order, order // self.k, counts

    def expert_rows(self, rows, counts):
        """Unbound weights: the gradient of `weight[e]` would be as large as all experts."""
        parts = zip(rows.split(counts.tolist()), self.up.unbind(0), self.down.unbind(0))
        return torch.cat([swiglu(part, up, down) for part, up, down in parts if part.shape[0]])

    def split_index_add(self, x):
        weights, order, tokens, counts = self.sort(x)
        rows = self.expert_rows(x.index_select(0, tokens), counts)
        scaled = rows * weights.flatten()[order, None]
        return (torch.zeros_like(x).index_add_(0, tokens, scaled),)

    def split_gather(self, x):
        weights, order, tokens, counts = self.sort(x)
        rows = self.expert_rows(x.index_select(0, tokens), counts)
        return (self.gather(rows, order, weights),)

    def grouped_mm(self, x):
        weights, order, tokens, counts = self.sort(x)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x.index_select(0, tokens)
        gate, up = F.grouped_mm(rows, self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return (self.gather(rows, order, weights),)

    def gather(self, rows, order, weights):
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
        rows = rows.index_select(0, place).view(*weights.shape, -1)
        return (rows * weights[..., None]).sum(1)

    def loop(self, x):
        """As models in Transformers have it: each expert looks for its tokens."""
        weights, indices = topk_softmax(F.linear(x, self.gate), self.k)
        mask, out = F.one_hot(indices, self.gate.shape[0]).permute(2, 1, 0), torch.zeros_like(x)
        for expert in mask.sum((1, 2)).nonzero().flatten():
            slot, token = torch.where(mask[expert])
            y = swiglu(x[token], self.up[expert], self.down[expert])
            out.index_add_(0, token, y * weights[token, slot, None])
        return (out,)


def swiglu(x, up, down):
    gate, up = F.linear(x, up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def make_layer(experts: int, k: int, intermediate: int) -> tr.MoE:
    torch.manual_seed(0)
    router = tr.TopKRouter(HIDDEN, experts, k)
    return tr.MoE(router, tr.SwiGLUExperts(experts, HIDDEN, intermediate))


def cases(options: Options) -> Iterator[tuple[int, int, int, int]]:
    """(num_experts, top_k, intermediate_size, tokens)."""
    for tokens in (64,) if options.quick else (1, 64, 4096):
        yield 8, 2, 512, tokens
        yield 64, 8, 256, tokens


def rows(options: Options) -> Iterator[Row]:
    for experts, k, intermediate, tokens in cases(options):
        moe = make_layer(experts, k, intermediate)
        plain = Baselines(moe)
        for precision, backward in ("highest", False), ("medium", False), ("medium", True):
            yield Row(
                name=f"{name_of('moe', backward, experts, k, tokens)} {precision}",
                inputs=lambda t=tokens: (torch.randn(t, HIDDEN),),
                ours=grad_mode(lambda x, moe=moe: (moe(x),), backward),
                baselines={
                    "sort, split, index_add": grad_mode(plain.split_index_add, backward),
                    "sort, split, gather": grad_mode(plain.split_gather, backward),
                    "sort, grouped_mm": grad_mode(plain.grouped_mm, backward),
                },
                information={"loop over experts": grad_mode(plain.loop, backward)},
                backward=backward,
                parameters=tuple(moe.parameters()),
                tolerance=1e-4,
                max_rounds=9 if tokens > 64 else 1000,
                matmul_precision=precision,
            )


def grad_mode(function, enabled):
    """Parameters require gradients; a forward row wants none."""
    return function if enabled else torch.no_grad()(function)
