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
from torch_routers.ablation.jobs import load_average
from torch_routers.ablation.pages import FOLDER, draw_pages
from torch_routers.ablation.plots import draw_all
from torch_routers.ablation.presets import PRESETS, Settings
from torch_routers.ablation.report import conclusions, console_line, data_lines, table_markdown
from torch_routers.ablation.results import Results
from torch_routers.ablation.rows import ROWS, chosen_rows
from torch_routers.ablation.run import run_rows
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
        help="quick (60 steps), demo (200 steps, the default) or full (1000 steps, 3 seeds, "
        "the best of 3 learning rates)",
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
    result.add_argument(
        "--jobs", type=int, help="models trained at once; default: processors / threads"
    )
    result.add_argument("--threads", type=int, default=1, help="of torch in each job; default: 1")
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
    jobs = _jobs(options)
    torch.set_num_threads(options.threads)
    print(_machine(jobs))

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
    finished = []
    for row in run_rows(rows, settings, tokens, text.sha256(), results, write=_write, jobs=jobs):
        if not finished:
            _write(console_line(None, None, settings))
        finished.append(row)
        _write(console_line(row, finished[0], settings))
    baseline = finished[0]
    pictures = draw_all(finished, baseline, options.out)
    pages = draw_pages(finished, baseline, options.out)
    table = table_markdown(finished, baseline, settings, text, tokens, pictures, pages)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    for line in conclusions(finished, baseline, settings.learning_rates):
        print(line)
    names = ", ".join(("results.jsonl", "table.md", *pictures, f"{FOLDER}/"))
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


def _jobs(options: argparse.Namespace) -> int:
    """As many as the processors allow; other work on them only takes its share."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    processors = len(usable) or os.cpu_count() or 1
    for name in ("threads", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AblationError(f"--{name}: expected at least 1, got {value}")
    return options.jobs or max(1, processors // options.threads)


def _machine(jobs: int) -> str:
    load = load_average()
    return (
        f"torch_routers {tr.__version__}, torch {torch.__version__}; {jobs} jobs, "
        f"{torch.get_num_threads()} threads each, {os.cpu_count()} processors; load average "
        f"{' '.join(f'{value:.2f}' for value in load) if load else 'unknown'}"
    )
