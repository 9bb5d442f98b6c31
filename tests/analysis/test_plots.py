"""The picture of a sweep: a panel a run, killed ones too, and where memory got."""

import math
from pathlib import Path

import pytest

from fp4lab.analysis.plots import MOST_RUNS, save_figure, sweep_figure
from fp4lab.errors import UserError
from fp4lab.events import End, Loss, Phase, Sample, Start, encode, to_record


def write_run(folder: Path, overrides: list[str], events: list) -> None:
    folder.mkdir(parents=True)
    lines = [encode({"t": 0.0, "wall": "w", **to_record(e)}) for e in [Start(overrides=overrides), *events]]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def sweep(tmp_path):
    """Three runs without result.json: two phases and a loss; killed at 300 MiB after its first phase; nothing at all."""
    started = Phase(name="start", proc_rss_mib=100.0, proc_peak_rss_mib=110.0)
    loaded = Phase(name="model_loaded", proc_rss_mib=200.0, proc_peak_rss_mib=250.0)
    write_run(tmp_path / "0", ["lr=0.1"], [loaded, started, Loss(loss=3.0), Loss(step=1, loss=2.0), End("completed")])
    write_run(tmp_path / "1", ["lr=0.2"], [started, Sample(proc_rss_mib=300.0), Loss(loss=math.nan)])
    write_run(tmp_path / "2", ["lr=0.3"], [])
    return tmp_path


def bars(axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


def test_a_panel_a_run_in_the_order_of_phases(sweep):
    *panels, losses = [a for a in sweep_figure(sweep).axes if a.get_visible()]
    assert len(panels) == 3
    assert [t.get_text() for t in panels[0].get_xticklabels()] == ["start", "model_loaded"]
    assert dict(zip([round(p.get_center()[0]) for p in panels[0].patches], bars(panels[0]), strict=True))[1] == 250.0
    assert "1: lr=0.2" in panels[1].get_title(loc="left") and "unfinished" in panels[1].get_title(loc="left")
    assert bars(panels[1]) == [110.0, 300.0], "its phase, and how high the supervisor saw it get"
    assert "no phase reached" in panels[2].texts[0].get_text()
    assert "2" in {t.get_text() for t in losses.texts} and "no loss" in {t.get_text() for t in losses.texts}


def test_device_memory_where_it_is_known(tmp_path):
    write_run(tmp_path / "0", [], [Phase(name="start", proc_rss_mib=9.0, torch_allocated_mib=5.0, torch_peak_mib=7.0)])
    assert bars(sweep_figure(tmp_path).axes[0]) == [7.0]


def test_the_file(sweep):
    path = save_figure(sweep, sweep / "runs.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["runs.txt", "missing/runs.png"])
def test_a_name_that_cannot_be_written(sweep, name):
    with pytest.raises(UserError, match=name.split("/")[-1]):
        save_figure(sweep, sweep / name)


def test_too_many_runs(tmp_path):
    for i in range(MOST_RUNS + 1):
        write_run(tmp_path / str(i), [], [])
    with pytest.raises(UserError, match="at most"):
        sweep_figure(tmp_path)
