"""The benchmarks' method, with a clock that the candidates turn themselves."""

import importlib
import json

import pytest
import torch

import torch_routers
from bench import report
from bench.__main__ import BENCHMARKS, results, selected, show
from bench.harness import CONTROL, OURS, Options, Row, compare, name_of, summary, time_by_turns

MICROSECOND = 1000


class Clock:
    """Nanoseconds that pass only when a candidate says so."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def candidate(self, microseconds, noise=lambda: 0):
        def call():
            self.now += microseconds * MICROSECOND + noise()

        return call


def measured(clock, **candidates):
    times = time_by_turns(candidates, 31, 20 * MICROSECOND, clock)
    return summary(times, [name for name in candidates if name not in (OURS, CONTROL)])


def test_the_ratio_is_against_the_strongest_baseline():
    clock = Clock()
    result = measured(
        clock,
        **{OURS: clock.candidate(10), CONTROL: clock.candidate(10)},
        slow=clock.candidate(50),
        strong=clock.candidate(20),
    )
    assert result["strongest"] == "strong"
    assert result["ratio"] == {"median": 2, "min": 2, "max": 2}
    assert result["control"]["median"] == result["ratio_of_minima"] / 2 == 1
    assert result["us"] == {OURS: 10, CONTROL: 10, "slow": 50, "strong": 20}


def test_a_machine_that_slows_down_moves_no_ratio():
    """Neighbours in time are compared, not the medians of two separate runs."""
    clock = Clock()
    calls = iter(range(10**6))

    def drift():
        return 5 * next(calls)

    result = measured(
        clock,
        **{OURS: clock.candidate(10, drift), CONTROL: clock.candidate(10, drift)},
        strong=clock.candidate(10, drift),
    )
    assert result["ratio"]["median"] == pytest.approx(1, abs=0.02)
    assert result["control"]["median"] == pytest.approx(1, abs=0.02)


def row(**changes):
    def double(x):
        return (2 * x,)

    options = {"inputs": lambda: (torch.randn(8),), "ours": double, "baselines": {"sum": double}}
    return Row(name="double forward E=8 k=2 T=1", **{**options, **changes})


def test_results_are_compared_before_anything_is_timed():
    wrong = row(baselines={"sum": lambda x: (x + x + 1e-3,)})
    with pytest.raises(ValueError, match=r"ours: expected result 0 within .* of sum's, got 0.001"):
        wrong.measure(Options(rounds=1, sample_ms=0, quick=True))
    nan = {"ours": (torch.tensor([float("nan")]),), "sum": (torch.ones(1),)}
    with pytest.raises(ValueError, match="got nan"):
        compare(row(), nan, "sum")


def test_gradients_are_compared_too():
    detached = row(ours=lambda x: (x + x.detach(),), backward=True)
    with pytest.raises(ValueError, match="expected result 1 within"):
        detached.measure(Options(rounds=1, sample_ms=0, quick=True))


def test_a_result_has_the_promised_keys():
    result = report.judge(row(traffic=1 << 20).measure(Options(rounds=2, sample_ms=0, quick=True)))
    assert result.keys() == {
        "name", "us", "strongest", "rounds", "ratio", "ratio_of_minima", "control", "gb_per_s",
        "bar", "reached",
    }  # fmt: skip
    assert result["rounds"] == 2 and result["us"].keys() == {OURS, CONTROL, "sum"}
    complete = {"machine": report.machine(Options()), "copy_gb_per_s": 20.0, "rows": [result]}
    assert json.loads(json.dumps(complete)) == complete
    assert complete["machine"].keys() >= {"processor", "instruction set", "threads", "torch"}
    assert "| E=8 k=2 T=1 |" in report.markdown(complete)


@pytest.mark.parametrize(
    "bar, reached",
    [
        ({"ratio": 2}, True),
        ({"ratio": 2.1}, False),
        ({"us": 10}, True),
        ({"ratio": 2, "us": 9}, False),
    ],
)
def test_a_bar_is_reached_when_all_of_it_is(monkeypatch, bar, reached):
    monkeypatch.setitem(report.BARS, "row", bar)
    result = {"name": "row", "ratio": {"median": 2.0}, "us": {OURS: 10.0}}
    assert report.judge(result)["reached"] is reached


def test_an_operator_that_is_missing_fails_and_hides_no_other_row(capsys):
    def missing(x):
        return torch_routers.ops.no_such_operator(x)

    options = Options(rounds=1, sample_ms=0, quick=True)
    first, second = show(results([row(ours=missing), row()], options), copy_gb_per_s=1.0)
    assert "no_such_operator" in first["error"] and "ratio" in second
    assert "FAILED: AttributeError" in capsys.readouterr().out


@pytest.mark.parametrize("module", BENCHMARKS)
def test_every_file_has_rows(module):
    rows = list(importlib.import_module(f"bench.{module}").rows(Options()))
    assert rows
    assert all(row.baselines for row in rows)


def test_every_bar_belongs_to_one_row():
    names = [row.name for row in selected([], Options())]
    assert len(names) == len(set(names))
    assert set(report.BARS) <= set(names)
    assert name_of("topk_gate", True, 8, 2, 64) in report.BARS
