"""The command line."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import torch_routers as tr
from torch_routers.ablation.corpora import CORPORA, chosen_domains, read_corpora
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.plots import draw_all
from torch_routers.ablation.presets import PRESETS, Settings
from torch_routers.ablation.report import conclusions, console_line, data_lines, table_markdown
from torch_routers.ablation.results import Results
from torch_routers.ablation.rows import ROWS, chosen_rows
from torch_routers.ablation.run import load_average, run_rows
from torch_routers.ablation.split import split_corpora
from torch_routers.ablation.tokens import tokenize


def parser() -> argparse.ArgumentParser:
    """All options; those of `Settings` come from its fields, with the preset as their default."""
    result = argparse.ArgumentParser(
        prog="python -m torch_routers.ablation",
        description="Trains the same small language model with each router on real text, and "
        "leaves a table and pictures.",
    )
    result.add_argument(
        "--preset",
        choices=PRESETS,
        default="demo",
        help="quick (60 steps), demo (200 steps, the default) or full (1000 steps, 3 seeds, 3 "
        "learning rates)",
    )
    result.add_argument(
        "--out", type=Path, default=Path("ablation-results"), help="default: ablation-results"
    )
    result.add_argument(
        "--corpora",
        default="default",
        help=f"default (comes with Python and torch), all (needs the extra 'corpora'), none, or "
        f"names with commas between: {', '.join(CORPORA)}",
    )
    result.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="text files of your own as one more domain; may be repeated",
    )
    result.add_argument(
        "--rows", default="all", help=f"all, or names with commas between: {', '.join(ROWS)}"
    )
    result.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="your router as one more row; may be repeated. The file is run",
    )
    result.add_argument("--threads", type=int, help="of torch; default: free processors")
    result.add_argument("--fresh", action="store_true", help="run finished cells again as well")
    sizes = result.add_argument_group("sizes, instead of the preset's")
    for option in fields(Settings):
        several = isinstance(option.default, tuple)
        sizes.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default[0] if several else option.default),
            nargs="+" if several else None,
            help=option.metadata["help"],
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        _compare(options)
    except AblationError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Finished cells are kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def _compare(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    settings = _settings(options)
    rows = chosen_rows(options.rows, options.router)
    threads = _free_threads() if options.threads is None else options.threads
    if threads < 1:
        raise AblationError(f"--threads: expected at least 1, got {threads}")
    torch.set_num_threads(threads)
    print(_machine())

    print("Reading text …", flush=True)
    text = split_corpora(
        read_corpora(chosen_domains(options.corpora), _folders(options.text)), settings.limits()
    )
    tokens = tokenize(text, vocab_size=settings.vocab_size, length=settings.sequence)
    for line in data_lines(settings, text, tokens):
        print(f"  {line}")

    options.out.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    results = Results(options.out / "results.jsonl", notes, forget=options.fresh)
    for note in notes:
        print(note)
    seeds = len(settings.seeds)
    finished = []
    for row in run_rows(rows, settings, tokens, text.sha256(), results, write=_write):
        if not finished:
            _write(console_line(None, None, seeds))
        finished.append(row)
        _write(console_line(row, finished[0], seeds))
    baseline = finished[0]
    pictures = draw_all(finished, baseline, options.out)
    table = table_markdown(finished, baseline, settings, text, tokens, pictures)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    for line in conclusions(finished, baseline):
        print(line)
    names = ", ".join(("results.jsonl", "table.md", *pictures))
    print(f"{options.out}: {names}. {time.perf_counter() - begin:.0f} s.")


def _write(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()


def _settings(options: argparse.Namespace) -> Settings:
    given = {option.name: getattr(options, option.name) for option in fields(Settings)}
    changed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    return replace(PRESETS[options.preset], **changed)


def _folders(arguments: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not (name and separator and folder) or name in folders:
            raise AblationError(f"--text: expected NAME=DIR with a new NAME, got {argument}")
        folders[name] = Path(folder)
    return folders


def _free_threads() -> int:
    """As many of torch's threads as processors have nothing else to do.

    Two threads that share a processor with other work are several times slower than one, because
    they wait for each other dozens of times per layer.
    """
    busy = (load_average() or (0.0,))[0]
    return max(1, min(torch.get_num_threads(), round((os.cpu_count() or 1) - busy)))


def _machine() -> str:
    load = load_average()
    return (
        f"torch_routers {tr.__version__}, torch {torch.__version__}; {torch.get_num_threads()} "
        f"threads, {os.cpu_count()} processors; load average "
        f"{' '.join(f'{value:.2f}' for value in load) if load else 'unknown'}"
    )
