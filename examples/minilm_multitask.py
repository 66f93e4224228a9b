"""Four tasks, one pretrained encoder: does a mixture of LoRAs beat one LoRA of the same size?

    make models
    python examples/minilm_multitask.py

Sentiment of two kinds of film reviews, the part of the Bible that a verse is from, and the language
of a message, all at once. Leaves a table and pictures in ``minilm-results``.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from minilm.data import read_tasks
from minilm.encoder import load_tokenizer
from minilm.methods import METHODS
from minilm.pictures import draw_all
from minilm.report import by_method, table_markdown
from minilm.run import run_methods
from minilm.settings import PRESETS
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.results import Results


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    result.add_argument("--preset", choices=PRESETS, default="default")
    result.add_argument("--out", type=Path, default=Path("minilm-results"))
    result.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    result.add_argument("--seeds", type=int, nargs="+")
    result.add_argument("--steps", type=int)
    result.add_argument("--learning-rates", type=float, nargs="+")
    result.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at once")
    result.add_argument("--fresh", action="store_true", help="run finished cells again as well")
    return result


def main() -> None:
    options = parser().parse_args()
    given = {name: getattr(options, name) for name in ("seeds", "steps", "learning_rates")}
    changed = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    if options.jobs < 1:
        raise AblationError(f"--jobs: expected at least 1, got {options.jobs}")
    settings = replace(PRESETS[options.preset], **changed)
    limits = {"train": settings.train, "validation": settings.validation, "test": settings.test}

    tasks = read_tasks(load_tokenizer(), limits, settings.length)
    print("Examples of each class in training / validation / test:")
    for task in tasks:
        print(f"  {task.describe()}")

    options.out.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    results = Results(options.out / "results.jsonl", notes, forget=options.fresh)
    for note in notes:
        print(note)
    records = run_methods(options.methods, settings, tasks, results, jobs=options.jobs)
    rows = by_method(records)
    pictures = draw_all(rows, options.out)
    table = table_markdown(rows, settings, tasks, pictures)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    try:
        main()
    except AblationError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished cells are kept; the same command goes on.")
