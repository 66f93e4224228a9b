"""gru_cell: one step of a gated recurrent unit, against a loop over tokens and elements."""

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def reference(input_gates, hidden_gates, state, *, valid_mask=None):
    size = state.shape[-1]
    if size == 0:
        return {"state": state}
    a, b = (x.reshape(-1, 3, size) for x in (input_gates, hidden_gates))
    before, after = state.reshape(-1, size), []
    for t in range(len(before)):
        if valid_mask is not None and not valid_mask.reshape(-1)[t]:
            after.append(before[t])
            continue
        row = []
        for i in range(size):
            reset = 1 / (1 + torch.exp(-(a[t, 0, i] + b[t, 0, i])))
            update = 1 / (1 + torch.exp(-(a[t, 1, i] + b[t, 1, i])))
            candidate = torch.tanh(a[t, 2, i] + reset * b[t, 2, i])
            row.append((1 - update) * candidate + update * before[t, i])
        after.append(torch.stack(row) if row else before[t])
    return {"state": torch.stack(after).view(state.shape) if after else state}


def call(*args, **options):
    return {"state": ops.gru_cell(*args, **options)}


# ---- samples -------------------------------------------------------------------------------------


def inputs(*leading, size=3, spread=1.0):
    gates = (spread * seeded(*leading, 3 * size, seed=seed) for seed in (1, 2))
    return *gates, seeded(*leading, size, seed=3).tanh()


def alternating(*leading):
    return (torch.arange(torch.Size(leading).numel()) % 3 != 1).view(leading)


def samples():
    yield Sample("a few", inputs(4), smooth=True)
    yield Sample("masked", inputs(4), {"valid_mask": alternating(4)}, smooth=True)
    yield Sample("leading", inputs(2, 3, size=2), {"valid_mask": alternating(2, 3)}, smooth=True)
    for size in 1, 16, 33, 128:
        yield Sample(f"size {size}", inputs(5, size=size))
    yield Sample("one token", inputs(size=5))
    yield Sample("no tokens", inputs(0))
    yield Sample("no size", inputs(3, size=0))
    yield Sample("all masked", inputs(3), {"valid_mask": torch.zeros(3, dtype=torch.bool)})
    yield Sample("far", inputs(20, size=9, spread=40.0))
    yield Sample("near", inputs(20, size=9, spread=1e-4))
    gates, hidden, state = inputs(6)
    gates, hidden = gates.clone(), hidden.clone()
    gates[0, 0], gates[1, 4], hidden[2, 7], gates[3, 8] = torch.nan, torch.inf, -torch.inf, 1e30
    yield Sample("not finite", (gates, hidden, state))
    gates[[1, 4]], hidden[4] = torch.nan, torch.inf
    mask = torch.tensor([False, False, False, False, False, True])
    yield Sample("NaN where nobody looks", (gates, hidden, state), {"valid_mask": mask})


def sized(tokens):
    yield Sample("sized", inputs(tokens, size=21), {"valid_mask": alternating(tokens)})


def errors():
    gates, hidden, state = inputs(2)
    op = "gru_cell: expected "

    def error(name, said, *, gates=gates, hidden=hidden, state=state, **options):
        return Error(name, (gates, hidden, state), op + said, options)

    yield error("no dimension", "state of shape [..., size], got []", state=state[0, 0])
    places = "of shape [tokens=2, 3 * size], size=3, got "
    yield error("few gates", "input_gates " + places + "[2, 8]", gates=gates[:, :8])
    yield error("few tokens", "hidden_gates " + places + "[1, 9]", hidden=hidden[:1])
    yield error("two dtypes", "input_gates in the dtype of state, float64, got float32",
                gates=gates.float())  # fmt: skip
    half = "state in float32 or float64, got bfloat16. Convert it with .float()"
    yield Error("half", (gates.bfloat16(), hidden.bfloat16(), state.bfloat16()), op + half)
    yield error("mask dtype", "valid_mask in bool, got float32", valid_mask=torch.ones(2))
    yield error("mask shape", "valid_mask of shape [tokens=2], got [3]",
                valid_mask=torch.ones(3, dtype=torch.bool))  # fmt: skip


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    size, mask = sample.args[2].shape[-1], sample.options.get("valid_mask")
    gates, hidden = (x.reshape(-1, 3 * size) if size else x.flatten(0, -2) for x in sample.args[:2])
    state = sample.args[2].reshape(-1, size) if size else sample.args[2].flatten(0, -2)
    inputs = gates, hidden, state, None if mask is None else mask.reshape(-1)
    yield torch.ops.torch_routers.gru_cell.default, inputs
    yield torch.ops.torch_routers._gru_cell_backward.default, (torch.ones_like(state), *inputs)


CASES = [
    OpCase("gru_cell", call, reference, samples, errors, overloads,
           (torch.float32, torch.float64), lambda sample: 16, sized=sized, per_token=True),
]  # fmt: skip
