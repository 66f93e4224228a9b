"""The example with a pretrained encoder: its text, methods and training, with a tiny encoder."""

import hashlib
import json
from collections import Counter

import pytest
import torch

import torch_routers as tr
from minilm import data, methods, report
from minilm.settings import Settings
from torch_routers.ablation.corpora import CORPORA
from torch_routers.ablation.errors import AblationError

transformers = pytest.importorskip("transformers")
encoder, train = map(pytest.importorskip, ("minilm.encoder", "minilm.train"))

LENGTH = 32
SETTINGS = Settings(steps=4, seeds=(0,), batch=2, length=LENGTH, rank=2)
LIMITS = {"train": 400, "validation": 48, "test": 96}


class Words:
    """A tokenizer that remembers what it was given: a number for each word, 0 behind the end."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts, *, truncation, max_length, padding, return_tensors):
        self.texts.append(texts)
        rows = [[1 + hash_of(word) % 90 for word in text.split()][:max_length] for text in texts]
        rows = [row + [0] * (max_length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(rows)}


def hash_of(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


@pytest.fixture(scope="module")
def read():
    tokenizer = Words()
    tasks = data.read_tasks(tokenizer, LIMITS, LENGTH)
    texts = iter(tokenizer.texts)
    return {task.name: (task, {split: next(texts) for split in data.SPLITS}) for task in tasks}


@pytest.fixture
def tiny_encoder(monkeypatch):
    """Two layers of random weights; the same for every model."""

    def load():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            config = transformers.BertConfig(
                vocab_size=100,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            model = transformers.BertModel(config, add_pooling_layer=False)
        return model.requires_grad_(False)

    monkeypatch.setattr(encoder, "load_encoder", load)
    return load


@pytest.fixture
def tasks(read):
    return [task for task, _ in read.values()]


def cell(method, seed=0):
    return {"method": method, "seed": seed, "learning_rate": 1e-2}


def test_classes_are_balanced_within_the_limits(read):
    for task, _ in read.values():
        for split, limit in LIMITS.items():
            counts = task.labels[split].bincount(minlength=len(task.classes))
            assert (counts == counts[0]).all()
            assert 0.9 * limit < counts.sum() <= limit
            assert task.tokens[split].shape == (counts.sum(), LENGTH)


def test_no_text_is_in_two_splits_or_twice(read):
    for _, texts in read.values():
        assert max(Counter(text for part in texts.values() for text in part).values()) == 1


def test_a_chapter_is_in_one_split(read):
    chapters = {}
    for chapter in CORPORA["bible"].read("bible").documents:
        for verse in chapter.text.splitlines():
            chapters.setdefault(verse, chapter.name)
    _, texts = read["bible"]
    of_split = [{chapters[verse] for verse in part} for part in texts.values()]
    assert not any(of_split[i] & of_split[j] for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    "task, text, label",
    [
        ("bible", "David", "history"),
        ("bible", "Jesus", "gospels"),
        ("django", "senha", "pt"),
        ("django", "adgangskode", "da"),
        ("imdb", "waste", "negative"),
        ("rotten-tomatoes", "bad", "negative"),
    ],
)
def test_labels_belong_to_the_texts(read, task, text, label):
    task, texts = read[task]
    pairs = zip(texts["train"], task.labels["train"].tolist())
    found = Counter(task.classes[number] for words, number in pairs if text in words)
    assert found.most_common(1)[0][0] == label


def test_a_text_with_two_labels_is_in_no_split():
    examples = [data.Example("one", "a", "one"), data.Example("one", "b", "one")]
    examples += [data.Example("two", "a", "two")] * 2
    parts = data.split_examples(examples)
    assert [text for part in parts.values() for text in part] == ["two"]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"seeds": (1, 1)}, {"seeds": (-1,)}, {"learning_rates": (-1e-3,)}]
)
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(AblationError, match=f"--{next(iter(wrong))}".replace("_", "-")):
        Settings(**wrong)


def test_a_missing_encoder_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(encoder, "MODULE", "no_such_module")
    with pytest.raises(AblationError, match=r"expected the package .*Run: make models"):
        encoder.load_encoder()


@pytest.mark.parametrize("method", methods.METHODS)
def test_only_adapters_and_heads_are_trained(method, tiny_encoder, tasks, monkeypatch):
    models = []
    evaluate = train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda model, *rest: models.append(model) or evaluate(model, *rest)
    )
    record = train.train_cell(cell(method), SETTINGS, tasks)
    assert json.loads(json.dumps(record)) == record
    state = models[0].encoder.state_dict()
    for name, value in tiny_encoder().state_dict().items():
        layer, _, parameter = name.rpartition(".")
        kept = state.get(f"{layer}.base_layer.{parameter}", state.get(name))
        assert torch.equal(kept, value), name
    changed = [name for name in state if "routed_B" in name and state[name].any()]
    experts = {"heads": 0, "lora": 1}.get(method, methods.EXPERTS)
    assert len(changed) == 2 * 2 * experts  # layers, modules


def test_plain_lora_has_as_many_parameters(tiny_encoder, tasks):
    found = {
        method: train.train_cell(cell(method), SETTINGS, tasks)["parameters"]
        for method in ("heads", "lora", "molora", "lora-mixer", "oracle")
    }
    assert found["lora"] == found["molora"] == found["lora-mixer"]
    routers = 2 * methods.EXPERTS * 16
    assert found["molora"] - found["oracle"] == routers
    assert found["heads"] == 17 * sum(len(task.classes) for task in tasks)


def test_the_oracle_takes_the_expert_of_the_task(tiny_encoder, tasks):
    test = train.train_cell(cell("oracle"), SETTINGS, tasks)["test"]
    shares = torch.tensor(test["shares"])
    assert torch.equal(shares, torch.eye(4).expand_as(shares))
    assert test["mutual_information"] == pytest.approx(2)


def test_lora_mixer_leaves_its_experts_alone_in_the_second_phase(tiny_encoder):
    config = methods.METHODS["lora-mixer"].config(SETTINGS)
    model = encoder.MultiTaskModel(config, [2])

    def trained():
        return {name for name, p in model.encoder.named_parameters() if p.requires_grad}

    model.begin_phase("hard")
    first = trained()
    model.begin_phase("soft", experts=False)
    second = trained()
    assert first and all("routed_A" in name or "routed_B" in name for name in first)
    assert second and all("routed_gate" in name for name in second)


def test_inference_of_lora_mixer_leaves_three_experts(tiny_encoder):
    model = encoder.MultiTaskModel(methods.METHODS["lora-mixer"].config(SETTINGS), [2])
    model.begin_phase("soft_topk")
    with tr.collect(model.eval()) as routings, torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert all(((routing.weights != 0).sum(-1) == 3).all() for routing in routings)


@pytest.mark.parametrize("method", ["lora", "molora", "oracle"])
def test_padding_changes_nothing(method, tiny_encoder):
    torch.manual_seed(0)
    model = encoder.MultiTaskModel(methods.METHODS[method].config(SETTINGS), [3, 2])
    model.begin_phase(methods.METHODS[method].inference)
    for parameter in model.encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens, numbers = torch.randint(1, 100, (4, 5)), torch.tensor([0, 1, 0, 1])
    tokens[1, 3:] = 0
    padded = torch.nn.functional.pad(tokens, (0, 6))
    for short, long in zip(model.eval()(tokens, numbers), model(padded, numbers)):
        torch.testing.assert_close(short, long)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_learns(method, tiny_encoder):
    """The label is the parity of the first word, of which the second task has the opposite."""
    words = torch.randint(1, 9, (2, 60, 3))
    labels = (words[..., 0] + torch.tensor([[0], [1]])) % 2
    found = [
        data.Task(
            str(number),
            ["even", "odd"],
            dict.fromkeys(data.SPLITS, words[number]),
            dict.fromkeys(data.SPLITS, labels[number]),
        )
        for number in (0, 1)
    ]
    settings = Settings(steps=80, batch=20, head_learning_rate=0.1, rank=2)
    record = train.train_cell(cell(method), settings, found)
    assert min(record["test"]["accuracy"].values()) > 0.75


def test_a_seed_gives_the_same_record_again(tiny_encoder, tasks):
    first, second, other = (
        train.train_cell(cell("molora", seed), SETTINGS, tasks) for seed in (0, 0, 1)
    )
    assert first["test"] == second["test"] and first["test"] != other["test"]


def test_table_pairs_by_seed_and_takes_the_best_rate_by_validation(tasks):
    def record(method, seed, rate, validation, test):
        found = {task.name: test for task in tasks}
        return {
            "cell": {"method": method, "seed": seed, "learning_rate": rate},
            "validation": {"accuracy": dict.fromkeys(found, validation)},
            "test": {"accuracy": found, "mutual_information": None, "shares": None},
            "parameters": 1000,
            "cpu_seconds": 1.0,
        }

    rows = report.by_method(
        {
            "lora": [record("lora", s, 1e-3, 0.5, 0.5 + s / 10) for s in (0, 1)],
            "molora": [record("molora", s, 1e-3, 0.6, 0.51 + s / 10) for s in (0, 1)]
            + [record("molora", s, 2e-3, 0.5, 0.9) for s in (0, 1)],
        }
    )
    table = report.table_markdown(rows, Settings(seeds=(0, 1)), tasks, {})
    accuracy, difference, _ = (
        line.split(" | ")[-1] for line in table.splitlines() if line.startswith("| `molora`")
    )
    assert accuracy == "56.0 ± 7.1 |" and difference == "+1.0 ± 0.0 |"
