"""Writes the README's table of routers: ``python docs/generate_router_table.py [--check]``.

What a router does is the first line of its docstring, its papers are the arXiv ids there; when to
choose it is the first sentence of that section of its page.
"""

import inspect
import re
import sys
from pathlib import Path

import torch_routers as tr

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MARKERS = re.compile("(?<=<!-- routers -->\n).*?(?=<!-- /routers -->)", re.DOTALL)


def table() -> str:
    """The table of the library's routers; others that happen to be registered are not in it."""
    classes = [getattr(tr.routers, name, None) for name in tr.list_routers()]
    rows = ["| router | what | when | paper |", "| --- | --- | --- | --- |"]
    return "\n".join([*rows, *(row(cls) for cls in classes if cls is not None)]) + "\n"


def row(cls: type[tr.Router]) -> str:
    docstring = inspect.getdoc(cls)
    page = f"docs/routers/{cls.__module__.rpartition('.')[2]}.md"
    section = re.search("## When to choose it\n+(.+?\\.)\\s", (ROOT / page).read_text(), re.DOTALL)
    papers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", docstring))
    cells = (
        f"[`{cls.__name__}`]({page})",
        docstring.splitlines()[0].replace("``", "`"),
        " ".join(section[1].split()),
        ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers),
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    text = README.read_text()
    current = MARKERS.sub(lambda _: table(), text)
    if "--check" not in sys.argv:
        README.write_text(current)
        return 0
    if current != text:
        print("README.md: the table of routers is not current. Run docs/generate_router_table.py")
    return int(current != text)


if __name__ == "__main__":
    sys.exit(main())
