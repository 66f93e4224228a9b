"""Every router of the library decides about experts of low rank."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

import cases.routers
import torch_routers as tr
from cases.op_case import seeded
from cases.router_case import EXPERTS, HIDDEN, inputs, padding

CASES = cases.collect(cases.routers)
every_router = pytest.mark.parametrize("case", CASES, ids=str)
OUT = 5
#: Arguments of a call of the model that become the context of its routers.
OF_MODEL = {"token_ids": "input_ids", "task_ids": "routing_task_ids"}


class Model(nn.Module):
    """A layer, whose router follows the inputs of the model."""

    def __init__(self, router):
        super().__init__()
        torch.manual_seed(4)
        self.layer = tr.lora.RoutedLoraLinear(nn.Linear(HIDDEN, OUT).double())
        names = [f"e{e}" for e in range(EXPERTS)]
        self.layer.add_mix(
            "default",
            {name: e % 4 for e, name in enumerate(names)},  # one has no rank at all
            {name: 0.5 + e for e, name in enumerate(names)},
            tr.lora.RoutingScope(router, "layer"),
            owns_router=True,
        )
        for name in names:
            self.layer.reset_expert("default", name, init=False)
        tr.follow_inputs(self)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        return self.layer(inputs_embeds)


def call(case, x, mask=None):
    """The model, and how it is called."""
    router = case.router(torch.float64)
    router.losses = nn.ModuleList()
    known = {name: value for name, value in case.context(x.shape[:-1]).items() if name in OF_MODEL}
    arguments = {OF_MODEL[name]: value for name, value in known.items()}
    return Model(router), {"inputs_embeds": x, "attention_mask": mask, **arguments}


@every_router
def test_equals_a_loop_over_tokens_and_experts(case):
    x, mask = inputs(2, 7, dtype=torch.float64), padding(2, 7)
    model, arguments = call(case, x, mask)
    with tr.collect(model) as routings:
        y = model(**arguments)
    (routing,), layer = routings, model.layer
    for b, s in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        expected, weights = layer.base_layer(x[b, s]), routing.weights[b, s]
        experts = range(EXPERTS) if routing.indices is None else routing.indices[b, s].tolist()
        assert mask[b, s] or not weights.any()
        for slot, e in enumerate(experts):
            if e >= 0:
                a, b_e = (f["default"][f"e{e}"].weight for f in (layer.routed_A, layer.routed_B))
                expected = expected + (0.5 + e) * weights[slot] * (b_e @ (a @ x[b, s]))
        assert_close(y[b, s], expected)


# A straight-through gradient is another one than that of the values, on purpose.
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "straight-through"], ids=str)
def test_gradients(case):
    x = seeded(1, 3, HIDDEN, seed=6).double().requires_grad_()
    model, arguments = call(case, x)
    model.eval()  # noise would be new in each call
    names, trained = zip(*(item for item in model.named_parameters() if "base" not in item[0]))

    def of(x, *parameters):
        given = dict(zip(names, parameters))
        return torch.func.functional_call(model, given, kwargs={**arguments, "inputs_embeds": x})

    assert gradcheck(of, (x, *trained))
