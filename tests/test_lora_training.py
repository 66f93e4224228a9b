"""Training mixtures of LoRAs: resumed, on several ranks, and where values must not be read."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import torch_routers as tr
from ranks import Ranks
from tiny_lm import HIDDEN, batch, loss_of, tiny_lm


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def model_with_experts(scope="block", **options):
    model = tiny_lm(torch.float64)
    options = {
        "router": "TopKRouter",
        "router_arguments": {"top_k": 2, "selection_bias": True},
        "losses": [tr.losses.LoadBalanceLoss(0.1), tr.losses.ZLoss(0.1)],
        **options,
    }
    config = tr.lora.RoutedLoraConfig(
        r=4,
        num_experts=4,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        router_scope=scope,
        init_lora_weights=False,
        **options,
    )
    torch.manual_seed(3)
    tr.lora.inject(model, config)
    tr.follow_inputs(model)
    return model.double()


def optimizer_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def test_going_on_from_a_checkpoint_changes_no_bit(tmp_path):
    def steps(model, optimizer, controller, numbers):
        for step in numbers:
            ids, mask = batch(seed=step)
            optimizer.zero_grad()
            with tr.collect(model) as routings:
                loss = loss_of(model(ids, attention_mask=mask), ids, mask)
            (loss + routings.aux_loss()).backward()
            optimizer.step()
            controller.step()

    model = model_with_experts()
    optimizer, controller = optimizer_of(model), tr.BalanceController(model, 0.05)
    steps(model, optimizer, controller, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint")
    steps(model, optimizer, controller, range(3, 6))

    other = model_with_experts()
    optimizer, controller = optimizer_of(other), tr.BalanceController(other, 0.05)
    saved = torch.load(tmp_path / "checkpoint")
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(other, optimizer, controller, range(3, 6))
    for (name, value), there in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(value, there), name
    biases = [v for name, v in model.state_dict().items() if name.endswith("expert_bias")]
    assert any(bias.any() for bias in biases) and len(biases) == 4


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def train_on_ranks(wrap, scope):
    """Losses with local statistics: the mean over ranks of what each rank has alone."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ids, _ = batch(2 * world_size)
    model = model_with_experts(scope)
    single = copy.deepcopy(model)
    if wrap == "ddp":
        forward = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer)
        forward = fully_shard(model)
    attached = tr.attach(forward)
    everywhere = torch.ones_like(ids[:2])
    for _ in range(2):
        for part in ids.chunk(world_size):
            with tr.collect(single) as routings:
                loss = loss_of(single(part, attention_mask=everywhere), part, everywhere)
            ((loss + routings.aux_loss()) / world_size).backward()
        part = ids.chunk(world_size)[rank]
        logits = forward(part, attention_mask=everywhere)
        attached(loss_of(logits, part, everywhere)).backward()
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        others = [p for p in single.parameters() if p.requires_grad]
        assert len(trained) == len(others) > 50
        for (name, p), q in zip(trained, others):
            assert p.grad is not None, name
            assert_close(whole(p.grad), q.grad, atol=1e-12, rtol=1e-9, msg=name)
        for parameters in ([p for _, p in trained], others):
            torch.optim.SGD(parameters, lr=0.1).step()
            for p in parameters:
                p.grad = None


@pytest.mark.parametrize("scope", ["module", "block"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_ranks_train_as_one_process(ranks, wrap, scope):
    ranks(train_on_ranks, 2, wrap=wrap, scope=scope)


@pytest.mark.transformers
def test_the_stock_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    config = tr.lora.RoutedLoraConfig(
        r=4,
        num_experts=3,
        target_modules=["q_proj", "v_proj", "down_proj"],
        router_scope="block",
        losses=[tr.losses.LoadBalanceLoss(0.1)],
    )
    tr.lora.inject(model, config)
    tr.lora.set_trainable(model, experts=["0", "2"])
    tr.follow_inputs(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(32, (8, 6))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(6)} for row in ids]

    class Trainer(transformers.Trainer):
        """With the losses of the routers added, as a subclass of its users would have it."""

        def compute_loss(self, model, inputs, **options):
            with tr.collect(model) as routings:
                loss = super().compute_loss(model, inputs, **options)
            return loss + routings.aux_loss()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # Transformers 4 takes the other
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        learns = "routed_" in name and ".default.1." not in name
        assert torch.equal(parameter, before[name]) != learns, name


@pytest.mark.parametrize("router", ["TopKRouter", "SoftRouter"])
@pytest.mark.parametrize("scope", ["module", "block", "layer", "model"])
def test_nothing_waits_for_the_device(scope, router):
    """Shapes and branches that depend on values would raise: these tensors have none."""
    options = {"router": router, "losses": []}
    if router == "SoftRouter":
        options["router_arguments"] = {}
    model = model_with_experts(scope, **options).to("meta")
    x = torch.zeros(2, 3, HIDDEN, device="meta", dtype=torch.float64, requires_grad=True)
    y = model.layers[0](x)
    y.sum().backward()
    assert y.device.type == "meta"
    trained = [p for p in model.layers[0].parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
