"""``results.jsonl``: one line per finished cell, from which an interrupted run goes on."""

import json
import os
from pathlib import Path
from typing import Any


class Results:
    """The finished cells of a file.

    A cell is found by its identity: everything that its numbers depend on. The file may hold
    other comparisons as well; a cell that was run twice counts as its last line.

    Args:
        path: read if it exists, appended to.
        notes: gets a sentence about a last line that an interrupted run left incomplete.
        forget: finds no cell that was there before.
    """

    def __init__(self, path: Path, notes: list[str], *, forget: bool = False) -> None:
        self._path = path
        self._cells: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, rest = text.rpartition("\n")
        if rest:
            notes.append(f"{path.name}: the last line is incomplete, its cell is run again")
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for line in () if forget else whole.splitlines():
            record = json.loads(line)
            self._cells[_key(record["cell"])] = record

    def find(self, cell: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a finished cell."""
        return self._cells.get(_key(cell))

    def add(self, record: dict[str, Any]) -> None:
        """Stores a record; it is on disk when this returns."""
        self._cells[_key(record["cell"])] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _key(cell: dict[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
