"""``make bench``, or ``PYTHONPATH=tests python -m bench [names]``."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import report
from .harness import Options, Row, copy_bandwidth

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", help="rows with one of these words in their name; default: all")
    add("--rounds", type=int, help="default 31; with --quick 9")
    add("--threads", type=int, default=1)
    add("--quick", action="store_true", help="fewer rows and rounds, no compiled baselines")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of permute, combine")
    add("--allocator", choices=report.ALLOCATORS, default="warm")
    add("--out", type=Path, default=ROOT / "build/bench", help="folder of results.json, results.md")
    add("--docs", type=Path, help="write the table there too, as docs/benchmarks_table.md is")
    return parser.parse_args()


def enter_allocator(name: str) -> None:
    """glibc reads its settings at the start of a process: start again under those of the regime."""
    if report.allocator() == name:
        return
    rest = {k: v for k, v in os.environ.items() if k not in report.ALLOCATORS["warm"]}
    command = [sys.executable, "-m", "bench", *sys.argv[1:]]
    os.execve(sys.executable, command, rest | report.ALLOCATORS[name])


def selected(names: list[str], options: Options) -> Iterator[Row]:
    for module in BENCHMARKS:
        for row in importlib.import_module(f".{module}", __package__).rows(options):
            if not names or any(name in row.name for name in names):
                yield row


def results(rows: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    """A row that fails is a result too: the others are still worth having."""
    for row in rows:
        try:
            measured = row.measure(options)
        except Exception as error:
            measured = {"name": row.name, "error": f"{type(error).__name__}: {error}"}
        yield report.judge(measured)


def show(found: Iterable[dict[str, Any]], copy_gb_per_s: float) -> list[dict[str, Any]]:
    """Prints results as they come, and keeps them."""
    kept, header = [], None
    for result in found:
        columns = report.BYTES if "bytes" in result else report.TIMES
        if columns is not header and "error" not in result:
            header = columns
            print(report.line(header, header))
        print(report.line(report.cells(result, copy_gb_per_s), columns), flush=True)
        kept.append(result)
    return kept


def main() -> int:
    args = arguments()
    enter_allocator(args.allocator)
    torch.set_num_threads(args.threads)
    options = Options(
        rounds=args.rounds or (9 if args.quick else 31),
        sample_ms=2 if args.quick else 5,
        threads=args.threads,
        quick=args.quick,
        dtype=getattr(torch, args.dtype),
    )
    machine, copy = report.machine(options), copy_bandwidth(options)
    for key, value in machine.items():
        print(f"{key:26}{value}")
    print(f"{'copy':26}{copy:.1f} GB/s, read and written\n")
    rows = show(results(selected(args.names, options), options), copy)
    report.write({"machine": machine, "copy_gb_per_s": copy, "rows": rows}, args.out, args.docs)

    bars = [row["reached"] for row in rows if row["reached"] is not None]
    failed = sum("error" in row for row in rows)
    print(f"\n{sum(bars)} of {len(bars)} bars reached, {failed} rows failed; {args.out}/results.md")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
