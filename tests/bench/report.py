"""Results as a table, as Markdown and as JSON; what they were measured on; and the bars."""

import json
import operator
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from torch_routers import env

from .harness import OURS, Options

#: Name of a row -> {"ratio": at least} and/or {"us": at most}; {"bytes_ratio": at most}, …
BARS = json.loads((Path(__file__).parent / "bars.json").read_text())

#: glibc returns large blocks to the system, and each new page costs more than most kernels here.
ALLOCATORS = {
    "default": {},
    "warm": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "1000000000000",
        "MALLOC_TOP_PAD_": "1000000000",
    },
}


def allocator() -> str:
    """The regime that this process runs in, from its environment."""
    names = set(ALLOCATORS["warm"])
    found = {name: os.environ[name] for name in names & set(os.environ)}
    return next((name for name, wanted in ALLOCATORS.items() if wanted == found), str(found))


def machine(options: Options) -> dict[str, Any]:
    report = env.report()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    numbers = [re.search(rf"^{key}\s*: (.*)$", cpuinfo, re.M) for key in ("cpu family", "model")]
    family = ", ".join(f"{m[0].split(chr(9))[0]} {m[1]}" for m in numbers if m)
    name = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M)
    return {
        "processor": f"{name[1] if name else platform.processor()} ({family})",
        "processors": os.cpu_count(),
        "instruction set": report["instruction set"],
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "torch": report["torch"],
        "torch_routers": report["torch_routers"],
        "compiler": report["compiler"],
        "python": report["python"],
        "threads": options.threads,
        "clock": "CPU time of the thread" if options.threads == 1 else "wall",
        "allocator": allocator(),
        "dtype": str(options.dtype).removeprefix("torch."),
        "compiled baselines": not options.quick,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


#: What a bar may speak of: the value of a result, and how it compares.
MEASURES = {
    "ratio": (lambda result: result["ratio"]["median"], operator.ge),
    "us": (lambda result: result["us"][OURS], operator.le),
    "bytes_ratio": (lambda result: result["bytes_ratio"], operator.le),
    "bytes_per_token": (lambda result: result["bytes_per_token"], operator.le),
}


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """With its bar, and whether it is reached; None where there is nothing to reach."""
    bar = BARS.get(result["name"])
    if bar is None or "error" in result:
        return {**result, "bar": bar, "reached": None}
    reached = [MEASURES[key][1](MEASURES[key][0](result), limit) for key, limit in bar.items()]
    return {**result, "bar": bar, "reached": all(reached)}


# ---- tables --------------------------------------------------------------------------------------

TIMES = ["row", "ours µs", "strongest baseline", "µs", "ratio", "[min..max]", "control", "bar",
         "reached", "GB/s"]  # fmt: skip
BYTES = ["row", "ours bytes/token", "smallest baseline", "bytes/token", "ours/baseline", "bar",
         "reached"]  # fmt: skip


def cells(result: dict[str, Any], copy_gb_per_s: float) -> list[str]:
    """A line of the table TIMES or BYTES."""
    name, verdict = result["name"], {True: "yes", False: "no", None: "-"}[result["reached"]]
    if "error" in result:
        return [name, f"FAILED: {result['error']}"]
    strongest = result["strongest"]
    if "bytes" in result:
        ours, theirs = result["bytes_per_token"], result["bytes"][strongest] / result["tokens"]
        return [name, f"{ours:.0f}", strongest, f"{theirs:.0f}", f"{result['bytes_ratio']:.2f}",
                bar_words(result["bar"]), verdict]  # fmt: skip
    ratio, control, bandwidth = result["ratio"], result["control"]["median"], result.get("gb_per_s")
    doubt = "" if abs(result["ratio_of_minima"] / ratio["median"] - 1) < 0.15 else " ~"
    return [
        name,
        f"{result['us'][OURS]:.1f}",
        strongest,
        f"{result['us'][strongest]:.1f}",
        f"{ratio['median']:.2f}{doubt}",
        f"[{ratio['min']:.2f}..{ratio['max']:.2f}]",
        f"{control:.2f}",
        bar_words(result["bar"]),
        verdict,
        f"{bandwidth:.1f} ({bandwidth / copy_gb_per_s:.0%})" if bandwidth else "-",
    ]


def bar_words(bar: dict[str, float] | None) -> str:
    words = {"ratio": "{:g}", "us": "≤ {:g} µs", "bytes_ratio": "≤ {:g}",
             "bytes_per_token": "≤ {:g} bytes"}  # fmt: skip
    return ", ".join(words[key].format(limit) for key, limit in (bar or {}).items()) or "-"


def line(cells: list[str], header: list[str]) -> str:
    """For a terminal: names to the left, figures to the right."""
    widths = [45, 8, 24, 8, 7, 15, 7, 14, 7, 11]
    if header is BYTES:
        widths = [45, 16, 24, 14, 13, 18, 7]
    words = [f"{cell:<{w}}" if i in (0, 2) else f"{cell:>{w}}"
             for i, (cell, w) in enumerate(zip(cells, widths))]  # fmt: skip
    return " ".join(words).rstrip()


def markdown(report: dict[str, Any]) -> str:
    """A table per operation, under what all was measured on."""
    about = "; ".join(f"{key}: {value}" for key, value in report["machine"].items())
    parts = [f"{about}; copy: {report['copy_gb_per_s']:.1f} GB/s."]
    operations = {}
    for result in report["rows"]:
        operations.setdefault(result["name"].rpartition(" E=")[0], []).append(result)
    for operation, results in operations.items():
        header, rows = TIMES, []
        for result in results:
            header = BYTES if "bytes" in result else TIMES
            first, *rest = cells(result, report["copy_gb_per_s"])
            rows.append([first.removeprefix(operation).strip(), *rest])
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {operation}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def write(report: dict[str, Any], folder: Path, docs: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for path in (folder / "results.md", docs):
        if path:
            path.write_text(markdown(report))
