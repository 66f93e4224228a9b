"""Losses, balancing and metrics of routers under the Trainer of Transformers."""

import copy
import importlib
import os
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import SequentialSampler

import torch_routers as tr
from ranks import Ranks
from torch_routers import metrics

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
integration = importlib.import_module("torch_routers.integrations.transformers")
VERSION = int(transformers.__version__.split(".")[0])

VOCAB, LENGTH, ROWS = 32, 8, 4


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": VOCAB}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def mixture(*, losses=None, seed=3, **options):
    """A small model with experts that do something, and routers that prefer some."""
    model = llama()
    default = [tr.losses.ZLoss(0.3), tr.losses.LoadBalanceLoss(0.3)]
    config = tr.lora.RoutedLoraConfig(
        r=4,
        num_experts=4,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        router_scope="block",
        router_arguments={"top_k": 2, "selection_bias": True},
        init_lora_weights=False,
        losses=default if losses is None else losses,
        **options,
    )
    torch.manual_seed(seed)
    tr.lora.inject(model, config)
    for module in model.modules():
        if isinstance(module, tr.Router):
            nn.init.normal_(module.weight)
    tr.follow_inputs(model)
    return model


class LanguageModel(nn.Module):
    """Returns its routings' loss, with the logits."""

    def __init__(self, losses):
        super().__init__()
        torch.manual_seed(0)
        router = tr.TopKRouter(16, 4, 2, losses=losses)
        nn.init.normal_(router.weight)
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.moe = tr.MoE(router, tr.SwiGLUExperts(4, 16, 8))

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **_):
        mask = attention_mask.bool()
        y, routing = self.moe(self.embed(input_ids), valid_mask=mask, return_routing=True)
        logits = self.head(y)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / items, "logits": logits, "aux_loss": routing.aux_loss}


def rows(count=ROWS, *, content=0):
    """Rows that are padded on the left, by another number of tokens each.

    Each has as many labels that are predicted as real tokens: the means of both weigh alike.
    """
    generator = torch.Generator().manual_seed(0)
    result = []
    for row in range(count):
        ids = torch.randint(1, VOCAB, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.int64)
        mask[: 1 + 2 * row % 7] = 0
        labels = torch.where(mask.bool(), ids, -100)
        ids = torch.where(mask.bool(), ids, content)
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


def full_rows(count=ROWS):
    """Rows without padding: the first label of each is of no prediction."""
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(LENGTH, dtype=torch.int64)
    return [{"input_ids": row, "attention_mask": mask, "labels": row} for row in ids]


class Collecting(transformers.Trainer):
    """The losses of routers that are collected, or that the model returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share = integration.share_of_step(self, inputs, num_items_in_batch)
        with tr.collect(model) as routings:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        of_routers = outputs["aux_loss"] if "aux_loss" in outputs else routings.aux_loss()
        return loss + share * of_routers


def trainer_of(model, folder, *, data=None, cls=transformers.Trainer, callbacks=(), **options):
    options = {
        "per_device_train_batch_size": ROWS,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **options,
    }
    if VERSION < 5:  # where it had no name
        if options.pop("train_sampling_strategy", None) == "sequential":
            in_order = {"_get_train_sampler": lambda self, data: SequentialSampler(data)}
            cls = type("InOrder", (cls,), in_order)
        options = {k.replace("activation_ch", "gradient_ch"): v for k, v in options.items()}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    data = rows() if data is None else data
    return cls(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks])


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def gates(model):
    found = [module.weight for module in model.modules() if isinstance(module, tr.Router)]
    assert found
    return found


def train(
    folder, delivery="attached", *, losses=None, model=None, cls=transformers.Trainer, **options
):
    """The model after two steps, with its losses delivered in one of the ways."""
    if model is None:
        model = LanguageModel(losses) if delivery == "returned" else mixture(losses=losses)
    by_hand = delivery in ("collected", "returned")
    cls = Collecting if by_hand else cls
    trainer = trainer_of(model, folder, cls=cls, **options)
    if delivery == "attached":
        integration.attach_to_loss(model)
    if delivery == "attached to trainer":
        integration.attach_to_trainer(trainer)
    trainer.train()
    return model


def one_step(model, micro_batches, rate=0.1):
    """The step that the objective asks for, from cross-entropies and losses by hand."""
    batches = [
        {name: torch.stack([row[name] for row in part]) for name in part[0]}
        for part in micro_batches
    ]
    items = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    for batch, count in zip(batches, items):
        with tr.collect(model) as routings:
            loss = model(**batch).loss
        (count / sum(items) * (loss + routings.aux_loss())).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate).step()


# ---- the objective -------------------------------------------------------------------------------


# Transformers 4 counts a first label, which is of no prediction, among the items of the step.
@pytest.mark.parametrize("padded", [True, False][: VERSION - 3])
@pytest.mark.parametrize("delivery", ["attached", "attached to trainer", "collected"])
@pytest.mark.transformers
def test_a_step_is_that_of_the_objective(tmp_path, delivery, padded):
    expected, data = mixture().train(), rows() if padded else full_rows()
    micro_batches = [data[:2], data[2:]]
    model = train(
        tmp_path,
        delivery,
        data=data,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    before = trained(copy.deepcopy(expected))
    one_step(expected, micro_batches)
    for name, value in trained(expected).items():
        assert_close(trained(model)[name], value, msg=name)
        assert not torch.equal(value, before[name]), name


DELIVERIES = ["attached", "attached to trainer", "collected", "returned"]


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_accumulation_changes_nothing(tmp_path, delivery):
    """The loss is a mean over tokens: that of parts, weighed by their shares, is that of all."""
    losses = [tr.losses.ZLoss(0.3)]
    once = train(tmp_path, delivery, losses=losses)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}
    accumulated = train(tmp_path, delivery, losses=losses, **options)
    without = train(tmp_path, delivery, losses=[tr.losses.ZLoss(0.0)])
    for name, value in trained(once).items():
        assert_close(trained(accumulated)[name], value, msg=name)
    for here, there in zip(gates(once), gates(without)):  # and the losses did something
        assert not torch.allclose(here, there)


def train_on_ranks(delivery, expected, average):
    """Each rank has half of the rows; two micro-batches of one row."""
    world = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(LOCAL_RANK=os.environ["RANK"], MASTER_ADDR="localhost", MASTER_PORT="1")
    lines = []
    model = train(
        os.path.dirname(expected),
        delivery,
        losses=[tr.losses.ZLoss(0.3)],
        data=rows() if average else [rows()[-1]] * ROWS,
        callbacks=[integration.RoutingCallback(2, log=lines.append)],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        average_tokens_across_devices=average,
        ddp_backend="gloo",
    )
    expected = torch.load(expected)
    for name, value in trained(model).items():
        assert_close(value, expected["parameters"][name], msg=name)
    (line,) = lines
    assert line == pytest.approx(expected["logged"])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_two_ranks_train_and_log_as_one(ranks, tmp_path, delivery, average):
    lines = []
    model = train(
        tmp_path,
        delivery,
        losses=[tr.losses.ZLoss(0.3)],
        data=rows() if average else [rows()[-1]] * ROWS,
        callbacks=[integration.RoutingCallback(2, log=lines.append)],
    )
    file = str(tmp_path / "expected")
    torch.save({"parameters": trained(model), "logged": lines[0]}, file)
    ranks(train_on_ranks, 2, delivery=delivery, expected=file, average=average)


def test_a_model_without_num_items_has_a_share_of_one(tmp_path):
    model = mixture(losses=[tr.losses.ZLoss(0.3)])
    model.accepts_loss_kwargs = False
    equal = [rows()[-1]] * ROWS
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}
    found = train(tmp_path, model=model, data=equal, **options)
    expected = train(tmp_path, losses=[tr.losses.ZLoss(0.3)], data=equal)
    for name, value in trained(expected).items():
        assert_close(trained(found)[name], value, msg=name)


def test_a_loss_that_is_not_trained_shows_as_nan(tmp_path):
    model = train(tmp_path, label_smoothing_factor=0.1)
    assert all(weight.isnan().all() for weight in gates(model))

    first = []

    class Dropping(transformers.Trainer):
        """From the second step on."""

        def compute_loss(self, model, inputs, *rest, **options):
            loss = super().compute_loss(model, inputs, **options)
            if not first:
                first.append(loss)
                return loss
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())

    model = mixture()
    integration.attach_to_loss(model)
    trainer_of(model, tmp_path, cls=Dropping).train()  # not by what the first step has learnt
    assert all(weight.isnan().all() for weight in gates(model))


def smooth(outputs, labels, num_items_in_batch=None):
    """A loss that is not the model's."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return (
        F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1) / num_items_in_batch
    )


# Transformers 4 does not divide the smoothed loss by the items of the step.
@pytest.mark.parametrize("which", ["compute_loss_func", "label_smoothing_factor"][: VERSION - 3])
@pytest.mark.transformers
def test_a_loss_that_is_not_the_models_is_attached_by_the_trainer(tmp_path, which):
    class Own(transformers.Trainer):
        def __init__(self, **options):
            super().__init__(**options, compute_loss_func=smooth)

    options = {"losses": [tr.losses.ZLoss(0.3)]}
    options |= {"cls": Own} if which == "compute_loss_func" else {which: 0.1}
    once = train(tmp_path, "attached to trainer", **options)
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}
    accumulated = train(tmp_path, "attached to trainer", **options)
    for name, value in trained(once).items():
        assert value.isfinite().all()
        assert_close(trained(accumulated)[name], value, msg=name)


def test_attached_losses_can_be_taken_away_again(tmp_path):
    model = mixture(losses=[tr.losses.ZLoss(0.3)])
    attached = integration.attach_to_loss(model)
    attached.remove()
    trainer = trainer_of(model, tmp_path, cls=Collecting)
    to_trainer = integration.attach_to_trainer(trainer)
    to_trainer.remove()
    expected = train(tmp_path, "collected", losses=[tr.losses.ZLoss(0.3)])
    trainer.train()
    assert attached.scale.isnan() and to_trainer.scale.isnan()  # they were not asked any more
    for name, value in trained(expected).items():
        assert torch.equal(trained(model)[name], value), name


def test_the_other_deliveries_are_refused(tmp_path):
    model = mixture()
    integration.attach_to_loss(model)
    with pytest.raises(RuntimeError, match="when `attach` already delivers them"):
        trainer_of(model, tmp_path, cls=Collecting).train()
    with pytest.raises(ValueError, match="attach: expected a model without attached losses"):
        integration.attach_to_loss(model)


def test_no_delivery_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="lora: expected a destination for 2 losses, got none"):
        trainer_of(mixture(), tmp_path).train()


def test_a_copied_model_learns_its_own_scale(tmp_path):
    model = mixture()
    integration.attach_to_loss(model)
    other = copy.deepcopy(model)
    trainer_of(model, tmp_path).train()
    trainer_of(other, tmp_path).train()
    for name, value in trained(model).items():
        assert torch.equal(trained(other)[name], value), name


# ---- TRL -----------------------------------------------------------------------------------------


def test_a_step_of_trl_is_that_of_the_objective(tmp_path):
    trl, datasets = map(pytest.importorskip, ("trl", "datasets"))
    words = importlib.import_module("tokenizers").models.WordLevel
    vocabulary = words({str(number): number for number in range(VOCAB)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=importlib.import_module("tokenizers").Tokenizer(vocabulary),
        pad_token="0",
        eos_token="1",
    )
    model, expected, lines = mixture(), mixture().train(), []
    data = [row["input_ids"][2 * number :] for number, row in enumerate(full_rows())]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(
            {"input_ids": [ids.tolist() for ids in data], "labels": [ids.tolist() for ids in data]}
        ),
        processing_class=tokenizer,
        callbacks=[integration.RoutingCallback(1, log=lines.append)],
    )
    integration.attach_to_trainer(trainer)
    trainer.train()
    assert len(lines) == 1
    before = trained(copy.deepcopy(expected))
    padded = [
        {
            "input_ids": F.pad(ids, (0, LENGTH - len(ids))),
            "attention_mask": F.pad(torch.ones_like(ids), (0, LENGTH - len(ids))),
            "labels": F.pad(ids, (0, LENGTH - len(ids)), value=-100),
        }
        for ids in data
    ]
    one_step(expected, [padded[:2], padded[2:]])
    for name, value in trained(expected).items():
        assert_close(trained(model)[name], value, msg=name)
        assert not torch.equal(value, before[name]), name  # it had a gradient


# ---- padding, checkpoints, resuming --------------------------------------------------------------


def watched(tmp_path, **options):
    """The model after two steps with balancing, and what was logged of them."""
    lines, model = [], options.pop("model", None) or mixture()
    controller = tr.BalanceController(model, 0.1)
    callback = integration.RoutingCallback(1, controller, log=lines.append)
    train(tmp_path, model=model, callbacks=[callback], **options)
    return model.state_dict(), lines


def test_what_stands_in_padding_changes_no_bit(tmp_path):
    state, lines = watched(tmp_path)
    other, of_other = watched(tmp_path, data=rows(content=17))
    assert lines == of_other and len(lines) == 2
    for name, value in state.items():
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.transformers
def test_checkpointing_changes_nothing_and_counts_once(tmp_path, reentrant):
    state, lines = watched(tmp_path)
    model = mixture()
    model.enable_input_require_grads()  # what a reentrant checkpoint asks for
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    other, of_other = watched(tmp_path, model=model, activation_checkpointing=True, **options)
    assert lines == of_other
    for name, value in state.items():
        assert_close(other[name], value, msg=name)
    biases = [value for name, value in state.items() if name.endswith("expert_bias")]
    assert len(biases) == 4 and sum(bias.any() for bias in biases) > 2
    assert len(calls) == 2 * 2  # of two steps, each with its recomputation


def test_going_on_from_a_checkpoint_changes_no_bit(tmp_path):
    def run(folder, seed, resume=None, **options):
        model = mixture(seed=seed)
        integration.attach_to_loss(model)
        callback = integration.RoutingCallback(controller=tr.BalanceController(model, 0.1))
        options = {"optim": "adamw_torch", "max_steps": 4, **options}
        data, size = rows(12), 2
        trainer = trainer_of(
            model,
            folder,
            data=data,
            callbacks=[callback],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
            lr_scheduler_type="linear",
            save_only_model=False,
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "one", seed=3, **saves)
    other = run(tmp_path / "other", seed=4, resume=str(tmp_path / "one" / "checkpoint-2"))
    for name, value in whole.items():
        assert torch.equal(other[name], value), name
    assert any(v.any() for name, v in whole.items() if name.endswith("expert_bias"))


@torch.no_grad()
def test_generation_with_a_cache_is_that_without_padding():
    model = mixture(losses=[]).eval()
    model.generation_config.pad_token_id = 0
    data = rows()
    batch = {n: torch.stack([row[n] for row in data]) for n in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None}
    together = model.generate(**batch, use_cache=True, **options)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        alone = model.generate(ids[mask.bool()][None], use_cache=False, **options)
        assert torch.equal(together.sequences[row, -5:], alone.sequences[0, -5:])
        for here, there in zip(together.logits, alone.logits):
            assert_close(here[row], there[0], atol=1e-5, rtol=1e-4)


# ---- the callback --------------------------------------------------------------------------------


@pytest.mark.transformers
def test_callback_logs_all_tokens_of_every_nth_step(tmp_path):
    model, data = mixture(losses=[]), rows(8)
    callback = integration.RoutingCallback(2)
    trainer = trainer_of(
        model,
        tmp_path,
        data=data,
        callbacks=[callback],
        max_steps=4,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "train_loss" not in line]
    assert [line["step"] for line in logged] == [2, 4]
    for line, part in zip(logged, (data[2:4], data[6:8])):
        with tr.collect(model) as routings:
            for row in part:
                model(**{name: value[None] for name, value in row.items()})
        expected = metrics.read(metrics.summary(routings))
        assert {name: line[name] for name in expected} == pytest.approx(expected)
        assert len(line) == len(expected) + 2


def test_callback_logs_beside_the_trainer(tmp_path):
    model = mixture(losses=[])
    trainer = trainer_of(model, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.add_callback(integration.RoutingCallback(1, log=trainer.log))
    trainer.train()
    steps = [line["step"] for line in trainer.state.log_history if "loss" in line]
    of_routers = [
        line["step"] for line in trainer.state.log_history if any("router/" in n for n in line)
    ]
    assert steps == of_routers == [1, 2]


class Controller:
    """Looks at what it finds when it is called."""

    def __init__(self, model):
        self.parameter, self.found = next(iter(trained(model))), []
        self.model = model

    def step(self):
        parameter = dict(self.model.named_parameters())[self.parameter]
        self.found.append((parameter.detach().clone(), parameter.grad.clone()))


def test_controller_steps_once_per_step_when_backward_is_done(tmp_path):
    model = mixture()
    controller = Controller(model)
    callback = integration.RoutingCallback(controller=controller)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}
    train(tmp_path, model=model, callbacks=[callback], **options)
    (first, gradient), (second, _) = controller.found
    assert_close(second, first - 0.1 * gradient)


def test_callback_stops_looking_when_it_is_told_to(tmp_path):
    class Failing(transformers.Trainer):
        def training_step(self, *arguments, **options):
            raise KeyError("interrupted")

    model = mixture(losses=[])
    callback = integration.RoutingCallback(1)
    with pytest.raises(KeyError, match="interrupted"):
        trainer_of(model, tmp_path, cls=Failing, callbacks=[callback]).train()
    callback.stop()
    router = next(module for module in model.modules() if isinstance(module, tr.Router))
    weights = weakref.ref(router(torch.randn(3, 16)).weights)
    assert weights() is None  # nobody kept it


def test_callback_checks_its_argument():
    with pytest.raises(ValueError, match="RoutingCallback: expected log_every >= 1, got 0"):
        integration.RoutingCallback(0)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    name = "torch_routers.integrations.transformers"
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        ImportError, match=r"expected the package transformers, got none\. Run: pip"
    ):
        importlib.import_module(name)
