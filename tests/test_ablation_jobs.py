"""Cells of the router comparison in several processes."""

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from torch_routers.ablation import jobs, run
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.presets import Settings
from torch_routers.ablation.results import Results
from torch_routers.ablation.rows import ROWS, Row, router_file_row
from torch_routers.ablation.tokens import Sequences, TokenText

MY_ROUTER = Path(__file__).parents[1] / "examples" / "my_router.py"
TINY = Settings(
    steps=3, layers=2, hidden_size=16, heads=2, num_experts=4, expert_size=8, sequence=16, batch=4
)
VOCABULARY = 50
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text() -> TokenText:
    def sequences(count: int) -> Sequences:
        tokens = torch.randint(VOCABULARY, (count, TINY.sequence + 1))
        return Sequences(tokens, torch.arange(2).repeat_interleave(count // 2))

    counts = torch.arange(1, VOCABULARY + 1)
    splits = {"train": sequences(20), "validation": sequences(8), "test": sequences(8)}
    return TokenText(splits, ["a", "b"], torch.ones(VOCABULARY, dtype=torch.int64), counts, {})


def cells(*rows: str, **changes: object) -> list[jobs.Cell]:
    return [{"row": row, "seed": 0, "learning_rate": 1e-2} | changes for row in rows]


def run_cells(wanted, rows, text, *, count: int, on_step=lambda cell, bits: None):
    return list(jobs.run_cells(wanted, rows, TINY, text, jobs=count, on_step=on_step))


def router_file(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(
        "import multiprocessing, os\nimport torch_routers as tr\n\n\nclass Mine(tr.TopKRouter):\n"
        "    def __init__(self, hidden_size, num_experts, top_k):\n"
        f"        {body}\n        super().__init__(hidden_size, num_experts, top_k=top_k)\n"
    )
    return f"{file}:Mine"


def test_jobs_change_no_number(text: TokenText, monkeypatch: pytest.MonkeyPatch):
    rows = [*ROWS.values(), router_file_row(f"{MY_ROUTER}:CosineRouter")]
    wanted = cells(*(row.name for row in rows))
    measured = []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a process would use that is not told
    for count in (1, 2):
        steps = {row.name: [] for row in rows}

        def on_step(cell, bits, steps=steps):
            steps[cell["row"]].append(round(bits, 4))
            # As a terminal does for Ctrl-C; only this process may react to it.
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGINT)

        records = run_cells(wanted, rows, text, count=count, on_step=on_step)
        assert [record["cell"] for record in records] == wanted or count > 1
        for record in records:
            assert record["machine"].pop("load_average") == pytest.approx(os.getloadavg(), abs=99)
            assert record.pop("machine") == {"jobs": count, "threads": 1}
            assert record["curve"] == steps[record["cell"]["row"]]
            assert record.pop("cpu_seconds") > 0 < record.pop("tokens_per_cpu_second")
        measured.append({record["cell"]["row"]: record for record in records})
    assert measured[0] == measured[1]
    assert not multiprocessing.active_children()


def test_no_more_jobs_than_cells(text: TokenText):
    (record,) = run_cells(cells("hash"), [ROWS["hash"]], text, count=9)
    assert record["machine"]["jobs"] == 1
    assert run_cells([], [ROWS["hash"]], text, count=9) == []


def test_rows_come_in_order_once_their_last_cell_has_ended(text, tmp_path, monkeypatch):
    taken = []

    def scrambled(missing, rows, *arguments, **options):
        for number in (5, 1, 0, 2, 4, 3):  # two seeds of three rows
            taken.append(number)
            yield {"cell": missing[number], "validation": {"bits_per_byte": number}}

    monkeypatch.setattr(run, "run_cells", scrambled)
    settings = Settings(seeds=(0, 1))
    rows = [ROWS[name] for name in ("dense-active", "softmax", "hash")]
    path = tmp_path / "results.jsonl"
    seen = []
    for row in run.run_rows(rows, settings, text, "sha", Results(path, []), print, jobs=2):
        lines = [json.loads(line)["cell"] for line in path.open()]
        assert len(lines) == len(taken)  # on disk as soon as they end
        seen.append((row.name, len(taken)))
        assert [record["cell"]["seed"] for record in row.records] == [0, 1]
    assert seen == [("dense-active", 3), ("softmax", 6), ("hash", 6)]


def test_an_error_in_one_cell_ends_all(text: TokenText):
    wanted = [*cells("softmax"), *cells("dense-active", learning_rate=1e30), *cells("hash")]
    rows = [ROWS[cell["row"]] for cell in wanted]
    with pytest.raises(AblationError, match=r"finite training loss.*Try a lower --learning-rates"):
        run_cells(wanted, rows, text, count=2)
    assert not multiprocessing.active_children()


def test_ctrl_c_ends_the_jobs(text: TokenText):
    def interrupt(cell, bits):
        assert len(multiprocessing.active_children()) == 2
        raise KeyboardInterrupt

    rows = [ROWS["softmax"], ROWS["hash"]]
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells("softmax", "hash"), rows, text, count=2, on_step=interrupt)
    assert not multiprocessing.active_children()


def test_a_job_that_dies_is_told(text: TokenText, tmp_path: Path):
    dies = router_file(tmp_path, "if multiprocessing.parent_process(): os._exit(7)")
    with pytest.raises(AblationError, match="got exit code 7 of one"):
        run_cells(cells("hash", "Mine"), [ROWS["hash"], router_file_row(dies)], text, count=2)


def test_rows_are_built_again_from_names_and_files(tmp_path: Path):
    file = router_file(tmp_path, "pass")
    for row in (ROWS["smear"], router_file_row(file)):
        again: Row = pickle.loads(pickle.dumps(row))
        assert (again.name, again.source, again.file) == (row.name, row.source, row.file)
    pickled = pickle.dumps(router_file_row(file))
    router_file(tmp_path, "hidden_size = hidden_size")
    with pytest.raises(
        AblationError, match=r"--router: expected .*mine\.py:Mine to stay as it was"
    ):
        pickle.loads(pickled)
