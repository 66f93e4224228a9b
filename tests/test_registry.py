"""Names and configurations."""

import pytest

import torch_routers as tr


def test_registry_finds_and_explains():
    assert tr.list_routers("TopK*") == ["TopKRouter"]
    assert "HashRouter" in tr.list_routers(causal=True, needs=("token_ids",))
    with pytest.raises(ValueError, match=r"create_router: expected one of .*'TopKRouter'.*'topk'"):
        tr.create_router("topk")
    with pytest.raises(ValueError, match=r"create_router: expected one of .*, got 'ZLoss'"):
        tr.create_router("ZLoss", weight=1.0)
    with pytest.raises(ValueError, match=r"list_routers: expected traits among .*, got \['fast'\]"):
        tr.list_routers(fast=True)


@pytest.mark.parametrize(
    "config",
    [
        None,
        [],
        {},
        {"class": 3},
        {"class": "os.system", "command": "true"},
        {"class": "ZLoss"},
        {"class": "ZLoss", "weight": 1.0, "more": 2},
        {"class": "ZLoss", "weight": 1j},
        {"class": "ZLoss", "weight": {"class": "eval"}},
        {"class": "ZLoss", 1: 2},
        {"class": "TopKRouter", "hidden_size": 4, "num_experts": 2, "top_k": 3},
    ],
    ids=repr,
)
def test_bad_configurations_are_value_errors(config):
    with pytest.raises(ValueError):
        tr.from_config(config)


def test_a_name_in_use_is_refused():
    with pytest.raises(ValueError, match="expected a class name that is not in use, got 'ZLoss'"):
        type("ZLoss", (tr.losses.RouterLoss,), {"__module__": "elsewhere"})
