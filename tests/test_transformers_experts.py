"""The library's kernels as a way of Transformers to run experts."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("transformers", minversion="5")  # of those before, another test

from tiny_transformers import MODELS, batch, blocks_of, gate_of, tiny
from torch_routers.integrations.transformers import register_experts, swap_routers

pytestmark = pytest.mark.transformers
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_do_eagerly(name):
    """With experts that see no token: there are fewer choices than experts."""
    model, ids = tiny(name).train(), batch(1, 1)
    model.set_experts_implementation("eager")
    other = copy.deepcopy(model)
    other.set_experts_implementation(register_experts())
    for m in model, other:
        m(ids, labels=ids).logits.square().sum().backward()
    assert_close(other(batch()).logits, model(batch()).logits, **CLOSE)
    unused = 0
    for (key, ours), theirs in zip(other.named_parameters(), model.parameters()):
        assert_close(ours.grad, theirs.grad, **CLOSE, msg=key)
        if ".experts." in key:
            unused += sum(not gradient.any() for gradient in ours.grad)
    assert unused > 0


class Experts(nn.Module):
    """In the layout of Transformers 5."""

    num_experts = 4
    act_fn = nn.SiLU()

    def __init__(self, gate, bias, transposed, norm):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = gate, bias, transposed
        self.has_post_expert_norm, self._is_expert_parallel = norm, True
        generator = torch.Generator().manual_seed(0)
        up = 2 * 6 if gate else 6
        for name, sizes in {
            "gate_up_proj" if gate else "up_proj": (up, 5),
            "down_proj": (5, 6),
        }.items():
            weight = torch.randn(4, *sizes, generator=generator, dtype=torch.float64)
            weight = weight.transpose(1, 2).contiguous() if transposed else weight
            setattr(self, name, nn.Parameter(weight))
            if bias:
                value = torch.randn(4, sizes[0], generator=generator, dtype=torch.float64)
                setattr(self, f"{name}_bias", nn.Parameter(value))
        self.post_expert_norm = nn.LayerNorm(5, dtype=torch.float64) if norm else None

    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return torch.tanh(gate) * up


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_layouts_of_experts(gate, bias, transposed, norm):
    """Against the batched way of Transformers; an expert has no rows, one is of another rank."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    experts = Experts(gate, bias, transposed, norm)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[0, 3], [3, 4], [1, 0]])
    weights.data[1, 1] = 0  # as Transformers has it for experts of other ranks
    results = []
    for name in register_experts("ours"), "batched_mm":
        y = ALL_EXPERTS_FUNCTIONS[name](experts, x, indices, weights)
        inputs = [x, weights, *experts.parameters()]
        results.append((y, torch.autograd.grad(y.square().sum(), inputs)))
    assert_close(*results, atol=1e-12, rtol=1e-12)


def test_empty_slots_cost_no_row():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    experts, rows = Experts(True, False, False, False), []
    experts._apply_gate = lambda gate_up: rows.append(gate_up.any(-1).sum()) or gate_up[..., ::2]
    indices = torch.tensor([[2, 2, 2], [1, 0, 1], [3, 4, 3]])
    weights = torch.rand(3, 3, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    ALL_EXPERTS_FUNCTIONS[register_experts()](experts, x, indices, weights)
    assert rows == [4]


@pytest.mark.parametrize("router", ["TopKRouter", "ReLURouter"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_swapped_routers_and_experts_go_together(name, router):
    model, ids = tiny(name), batch()
    swap_routers(model, router)
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    model.set_experts_implementation(register_experts())
    assert_close(model(ids).logits, expected, **CLOSE)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(gate_of(block).weight.grad.any() for block in blocks_of(model))


def test_half_precision_is_summed_in_single():
    """The error against float32 is that of rounding once, not of adding up in bfloat16."""
    model = tiny("mixtral")
    block, x = blocks_of(model)[0], torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(4).expand(64, 4)
    weights = torch.full((64, 4), 0.25)
    model.set_experts_implementation(register_experts())
    expected = block.experts(x.bfloat16().float(), indices, weights)
    model.bfloat16()
    error = (block.experts(x.bfloat16(), indices, weights).float() - expected).abs().max()
    assert 0 < error < 0.02 * expected.abs().max()


@pytest.mark.parametrize("router", ["TopKRouter", "ReLURouter"])
def test_a_swapped_layer_compiles_whole(router):
    model = tiny("mixtral")
    swap_routers(model, router)
    model.set_experts_implementation(register_experts())
    block = blocks_of(model)[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for samples in 2, 3:
        x = torch.randn(samples, 7, 16, generator=torch.Generator().manual_seed(samples))
        assert_close(compiled(x), block(x), atol=0, rtol=0)
