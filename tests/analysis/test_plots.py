"""The picture of a sweep: a panel a run, killed ones too, and where memory got."""

import math
from pathlib import Path

import pytest
import sweeps

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.plots import FIGURES, MOST_RUNS, memory_heatmap, memory_over_time, save_figure, sweep_figure
from fp4lab.analysis.plots.style import looks
from fp4lab.encoding import encode
from fp4lab.errors import UserError
from fp4lab.events import End, Guard, Loss, Phase, Sample, Start, to_record


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


def test_the_heatmap_marks_what_was_killed_and_the_limit(tmp_path):
    config = {"guard": {"limit_gb": 0.25}}
    for n, (rows, seq, mib) in enumerate([(16, 8, 100.0), (16, 32, 200.0), (64, 8, 260.0)]):
        status = "guard_killed" if mib > 256 else "completed"
        events = [Phase(name="start", proc_rss_mib=mib)]
        sweeps.write_run(tmp_path / str(n), [f"step.chunk_rows={rows}", f"seq_len={seq}"], events, status, config=config)
    figure = memory_heatmap(load_runs(tmp_path), x="seq_len")
    cells, scale = figure.axes
    assert [t.get_text() for t in cells.texts] == ["100", "✕ guard\n≥ 260", "200", "no run"]
    assert [t.get_text() for t in cells.get_xticklabels()] == ["8", "32"] and cells.get_ylabel() == "chunk_rows"
    assert "resident set" in figure.get_suptitle() and "MiB" in figure.get_suptitle()
    assert scale.get_ylabel() == "guard limit 256 MiB: the line" and 256.0 in [line.get_ydata()[0] for line in scale.lines]


def test_of_the_runs_of_a_cell_the_worst_is_shown(tmp_path):
    for n, (seed, seq, mib) in enumerate([(s, q, 100.0 + s) for s in range(7) for q in range(8)]):
        sweeps.write_run(tmp_path / str(n), [f"seed={seed}", f"seq_len={2**seq}", "lr=1"], [Phase(proc_rss_mib=mib)])
    figure = memory_heatmap(load_runs(tmp_path), y="lr")
    assert [t.get_text() for t in figure.axes[0].texts] == ["106"] * 8 and "over seed" in figure.get_suptitle()


def test_memory_over_time_ends_where_the_guard_saw_it(tmp_path):
    events = [
        Phase(name="start", proc_rss_mib=100.0),
        Sample(proc_rss_mib=200.0),
        Guard(verdict="breach", reading_mib=300.0, limit_mib=256.0),
        Sample(proc_rss_mib=0.0),  # it is gone
    ]
    sweeps.write_run(tmp_path / "0", ["lr=1"], events, "guard_killed", config={"guard": {"limit_gb": 0.25}})
    (axes,) = memory_over_time(load_runs(tmp_path)).axes
    line, limit, death = axes.lines
    assert list(line.get_xdata()) == [1.0, 2.0, 3.0] and list(line.get_ydata()) == [100.0, 200.0, 300.0]
    assert limit.get_ydata()[0] == 256.0 and (death.get_xdata()[0], death.get_ydata()[0]) == (3.0, 300.0)
    assert "guard_killed" in axes.get_title(loc="left") and axes.get_ylim()[1] > 300


def test_nothing_to_draw_is_none(tmp_path):
    sweeps.write_run(tmp_path / "0", [], [])
    frames = load_runs(tmp_path)
    assert {name: draw(frames) for name, draw in FIGURES.items()} == dict.fromkeys(FIGURES)


@pytest.mark.parametrize("count", [8, 9, 60])
def test_every_run_has_a_look_and_the_legend_stays_short(tmp_path, count):
    for n in range(count):
        sweeps.write_run(tmp_path / str(n), [f"lr={n % 5}", f"seed={n % 3}", f"seq_len={n}"], [])
    drawn, legend = looks(load_runs(tmp_path).runs)
    assert len(drawn) == count and len(legend) <= 12
    if count > 8:
        assert [text for text, _ in legend] == ["lr=0", "lr=1", "lr=2", "lr=3", "lr=4", "seed=0", "seed=1", "seed=2"]
        assert drawn["0"] == drawn["15" if count > 15 else "0"] and drawn["0"] != drawn["1"]


@pytest.mark.parametrize(
    ("held", "unified", "text", "levels"),
    [
        (None, None, "resident set of the process tree", [100.0, 110.0]),
        (0.0, False, "resident set of the process tree", [100.0, 110.0]),
        (500.0, False, "device memory of the process tree, NVML", [500.0, 500.0]),
        (500.0, True, "device memory (NVML) and resident set of the process tree", [600.0, 610.0]),
    ],
)
def test_the_memory_that_the_guard_watches(tmp_path, held, unified, text, levels):
    device = {"pid_mem_mib": held, "unified": unified}
    events = [Phase(name="start", proc_rss_mib=100.0, **device), Sample(proc_rss_mib=110.0, **device)]
    sweeps.write_run(tmp_path / "0", ["guard.limit_gb=0.75"], events)
    figure = memory_over_time(load_runs(tmp_path))
    assert figure.get_suptitle() == f"Memory over time (MiB): {text}"
    assert list(figure.axes[0].lines[0].get_ydata()) == levels
