"""Two sweeps, run by run."""

import math

import pytest
from sweeps import PAIRS, write_run

from fp4lab.analysis.against import TOLERANCES, compare_sweeps, shared_differences, tolerances
from fp4lab.analysis.frames import load_runs
from fp4lab.errors import UserError
from fp4lab.events import Loss, Phase


@pytest.fixture
def sweeps(tmp_path):
    """make(name, {(lr, seq): loss}, other option) -> its runs; the run's number is its place."""

    def make(name, losses, *more, status="completed", mib=100.0):
        for at, ((lr, seq), loss) in enumerate(losses.items()):
            events = [Phase(name="start", proc_rss_mib=mib), Loss(loss=loss), *PAIRS]
            options = [f"lr={lr}", f"seq_len={seq}", *more, f"hydra.sweep.dir={name}"]
            write_run(tmp_path / name / str(at), options, events, status)
        return load_runs(tmp_path / name).runs

    return make


LOSSES = {(1, 8): 2.0, (1, 16): 3.0, (2, 8): math.nan}


def test_the_same_sweep_in_another_order_is_equal(sweeps):
    other = dict(reversed(LOSSES.items()))
    assert compare_sweeps(sweeps("a", LOSSES), sweeps("b", other), TOLERANCES) == (3, [])


def test_what_moved_beyond_its_tolerance(sweeps):
    was, now = sweeps("a", LOSSES), sweeps("b", {**LOSSES, (1, 8): 2.001, (1, 16): 3.1, (2, 8): 1.0}, mib=104.0)
    count, found = compare_sweeps(now, was, TOLERANCES)
    assert count == 3
    assert [(d.run, d.options, d.what, d.was, d.now) for d in found[:1]] == [("1", "lr=1 seq_len=16", "loss", 3.0, 3.1)]
    assert found[0].change == pytest.approx(0.1 / 3)
    assert (
        (found[1].run, found[1].what, found[1].change) == ("2", "loss", None) and math.isnan(found[1].was) and len(found) == 2
    )
    assert {d.what for d in compare_sweeps(now, was, {"peak_mib": 0.03})[1]} == {"peak_mib"}


def test_status_and_first_token_are_compared_exactly(sweeps):
    was, now = sweeps("a", LOSSES), sweeps("b", LOSSES, status="oom")
    assert {(d.what, d.was, d.now) for d in compare_sweeps(now, was, {})[1]} == {("status", "completed", "oom")}
    now["status"], now["first_token"] = "completed", "A≠B"
    assert {d.what for d in compare_sweeps(now, was, {})[1]} == {"first_token"}


def test_a_run_that_one_sweep_lacks(sweeps):
    fewer = {k: v for k, v in LOSSES.items() if k != (1, 16)}
    count, found = compare_sweeps(sweeps("a", fewer), sweeps("b", LOSSES), TOLERANCES)
    assert count == 2 and [(d.options, d.what, d.was, d.now) for d in found] == [("lr=1 seq_len=16", "run", "there", "missing")]


def test_an_option_that_each_sweep_holds_fixed_is_what_was_changed(sweeps):
    was, now = sweeps("a", LOSSES, "step.state=int8"), sweeps("b", LOSSES, "step.state=nvfp4", "+new=1")
    assert compare_sweeps(now, was, TOLERANCES) == (3, [])
    assert shared_differences(now, was) == {"step.state": ("int8", "nvfp4"), "new": ("", "1")}


def test_tolerances(sweeps):
    runs = sweeps("a", LOSSES)
    assert tolerances(["seconds=0.2", "peak_mib=off"], runs) == {"loss": 1e-3, "seconds": 0.2}
    for bad in ("seconds", "seconds=-1", "seconds=much", "lr=0.1", "nothing=1"):
        with pytest.raises(UserError):
            tolerances([bad], runs)
