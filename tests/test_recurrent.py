"""The recurrent router: its cell, and the state on its way through the layers."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torch_routers as tr

H, E, SIZE = 10, 6, 7


def router(**options):
    router = tr.RecurrentRouter(H, E, 2, **options).double()
    router.weight.data *= 40
    router.projector.data *= 20
    return router


def routers(count=3, **options):
    torch.manual_seed(0)
    cell = tr.RecurrentCell(SIZE)
    return [router(cell=cell, **options) for _ in range(count)]


def x(*shape, seed=1):
    return torch.randn(
        *shape, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


# ---- the cell ------------------------------------------------------------------------------------


def scalar_cell():
    """The worked example: reset, update and candidate of one number."""
    cell = tr.RecurrentCell(1).double()
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor([[0.5], [0.2], [0.7]]))
        cell.weight_hh.copy_(torch.tensor([[-0.3], [0.4], [-0.6]]))
        cell.bias_ih.copy_(torch.tensor([0.1, -0.1, 0.0]))
        cell.bias_hh.copy_(torch.tensor([0.0, 0.05, 0.2]))
    return cell


def test_worked_example():
    u = torch.tensor([[0.8]], dtype=torch.float64, requires_grad=True)
    state = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    after = scalar_cell()(u, state)
    of_u, of_state = torch.autograd.grad(after.sum(), (u, state))
    for actual, expected in (after, 0.3960075), (of_u, 0.2172151), (of_state, 0.4183559):
        assert actual.item() == pytest.approx(expected, abs=5e-8)
    assert scalar_cell()(u).item() == pytest.approx(0.2808855, abs=5e-8)  # the first layer


@pytest.mark.parametrize("kind, other", [("gru", nn.GRUCell), ("rnn", nn.RNNCell)])
def test_equals_the_cell_of_pytorch(kind, other):
    cell, module = tr.RecurrentCell(SIZE, kind).double(), other(SIZE, SIZE).double()
    module.load_state_dict(cell.state_dict())
    u, state = x(5)[:, :SIZE], x(5, seed=2)[:, :SIZE].tanh()
    for given in state, None:
        results = []
        for each in cell, module:
            inputs = [v.clone().requires_grad_() for v in (u, state)]
            after = each(inputs[0], None if given is None else inputs[1])
            after.square().sum().backward()
            gradients = [p.grad for p in each.parameters()]
            results.append([after, inputs[0].grad, *gradients])
            each.zero_grad()
        assert_close(*results, rtol=1e-12, atol=1e-14)


def test_the_state_stays_within_one():
    cell, state = tr.RecurrentCell(SIZE).double(), None
    for step in range(50):
        state = cell(30 * x(4, seed=step)[:, :SIZE], state)
    assert state.abs().max() <= 1  # below it but for rounding


# ---- from layer to layer -------------------------------------------------------------------------


def run(routers, inputs, **context):
    state, routings = None, []
    for each in routers:
        routings.append(each(inputs, state=state, **context))
        state = routings[-1].state
    return routings


def test_earlier_layers_matter():
    first, second, _ = routers()
    inputs = x(9)
    state = first(inputs).state
    assert not torch.equal(second(inputs, state=state).logits, second(inputs).logits)
    assert torch.equal(second(inputs, state=torch.zeros_like(state)).logits, second(inputs).logits)


def test_the_gradient_reaches_earlier_layers():
    for detach in False, True:
        layers = routers(detach_state=detach)
        run(layers, x(9))[-1].logits.square().sum().backward()
        assert layers[-1].projector.grad.any()
        assert (layers[0].projector.grad is None) == detach
        assert layers[0].weight.grad is None
    assert layers[0].cell is layers[2].cell


def test_masked_tokens_keep_their_state():
    layers, mask = routers(), torch.arange(9) % 3 != 1
    state = x(9, seed=3)[:, :SIZE].tanh()
    inputs = x(9)
    inputs[~mask] = torch.nan
    routing = layers[0](inputs, valid_mask=mask, state=state)
    assert torch.equal(routing.state[~mask], state[~mask])
    assert not (routing.state[mask] == state[mask]).any()


def test_the_state_is_in_full_precision():
    layer = routers()[0].bfloat16()
    routing = layer(x(4).bfloat16())
    assert routing.state.dtype == torch.float32
    assert layer(x(4).bfloat16(), state=routing.state.bfloat16()).state.dtype == torch.float32


class Block(nn.Module):
    passes_state = True

    def __init__(self, router):
        super().__init__()
        self.moe = tr.MoE(router, tr.SwiGLUExperts(E, H, 8)).double()

    def forward(self, x, *, state=None):
        y, routing = self.moe(x, state=state, return_routing=True)
        return x + y, routing.state


class Checkpointed(Block):
    use_reentrant = False

    def forward(self, x, *, state=None):
        def block(x, state):
            return super(Checkpointed, self).forward(x, state=state)

        return checkpoint(block, x, state, use_reentrant=self.use_reentrant)


class Reentrant(Checkpointed):
    use_reentrant = True


def stack(block=Block):
    torch.manual_seed(0)
    cells = [router(cell=tr.RecurrentCell(SIZE)) for _ in range(3)]
    first, *others = map(block, cells)
    return tr.RecurrentStack([first, nn.Linear(H, H).double(), *others])


def test_a_stack_hands_the_state_on():
    model, inputs = stack(), x(2, 5)
    y, state = inputs, None
    for layer in model.layers:
        if isinstance(layer, Block):
            y, state = layer(y, state=state)
        else:
            y = layer(y)
    assert torch.equal(model(inputs), y)
    assert len({id(layer.moe.router.cell) for layer in model.layers if hasattr(layer, "moe")}) == 1
    names = [name for name, _ in model.named_parameters() if "cell" in name]
    assert len(names) == 4, "one cell, once"


@pytest.mark.parametrize("block", [Checkpointed, Reentrant])
def test_checkpoints_change_nothing(block):
    results = []
    for each in Block, block:
        model, inputs = stack(each), x(2, 5).requires_grad_()
        y = model(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)


def test_tokens_one_by_one_are_what_they_are_together():
    """As in generation: the state goes through the layers, not along the sequence."""
    layers, inputs = routers(), x(6)
    together = run(layers, inputs)[-1]
    for t in range(6):
        alone = run(layers, inputs[t : t + 1])[-1]
        assert_close(alone.state[0], together.state[t])
        assert torch.equal(alone.indices[0], together.indices[t])


def test_errors():
    for arguments, said in {
        ("kind", "lstm"): r"RecurrentCell: expected kind among \['gru', 'rnn'\], got 'lstm'",
        ("size", 0): "RecurrentCell: expected size >= 1, got 0",
    }.items():
        with pytest.raises(ValueError, match=said):
            tr.RecurrentCell(**dict([arguments]))
    with pytest.raises(ValueError, match="share_cell: expected a model with a RecurrentRouter"):
        tr.share_cell(nn.Linear(2, 2))
    different = nn.ModuleList([router(), router(cell=tr.RecurrentCell(3))])
    with pytest.raises(ValueError, match="share_cell: expected cells like RecurrentCell"):
        tr.share_cell(different)


def test_a_copied_model_still_shares_its_cell():
    model = copy.deepcopy(stack())
    assert len({id(m) for m in model.modules() if isinstance(m, tr.RecurrentCell)}) == 1
