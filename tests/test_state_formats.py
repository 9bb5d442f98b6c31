"""experiments/state-formats: its configurations compose and train, and its table says what the records say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fp4lab.choices import check
from fp4lab.events import End, to_record
from fp4lab.tasks import tune

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "state-formats"
SMALL = ("steps=4", "task.batch_size=2", "seq_len=32", "task.log_every=1", "task.warmup_steps=1", "dtype=float32",
         "data.path=data/dialogues/zh_greetings.jsonl", "threads=1")  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("state_formats_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("picture", None)
    return module


def record(compose, regime, master, state, seed, out: Path) -> None:
    """One run in this process, its records as grid.py leaves them."""
    choices = (f"+experiment=state_formats_{regime}", f"step.master={master}", f"step.state={state}", f"seed={seed}")
    config = compose(*choices, *SMALL)
    check(config)
    records: list[dict] = []
    tune.run(config, lambda e: records.append(to_record(e)))
    records.append(to_record(End(status="completed")))
    folder = out / regime / f"{master}.{state}.{seed}"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps({"t": 0, "wall": "", **r}) + "\n" for r in records))


def test_runs_become_a_table_with_the_bits_that_formats_have(compose, tmp_path, table, monkeypatch, capsys):
    bits = {("fp32", "fp32"): 100.5, ("packed_stochastic", "nvfp4_two_level"): 13.5, ("packed_residual", "int8_block"): 28.75}
    for master, state in bits:
        record(compose, "finetune", master, state, 1, tmp_path)
    record(compose, "scratch", "fp32", "fp32", 1, tmp_path)
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path), "--out", str(tmp_path / "out")])
    assert table.main() == 0
    cells = pd.read_csv(tmp_path / "out" / "cells.csv").set_index(["regime", "master", "state"])
    for pair, expected in bits.items():
        assert cells.loc[("finetune", *pair), "bits"] == pytest.approx(expected, abs=0.3)
    assert cells.loc[("scratch", "fp32", "fp32"), "gap"] == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "trade-off.png").read_bytes()[:4] == b"\x89PNG"


def test_without_the_reference_it_says_so(compose, tmp_path, table, monkeypatch, capsys):
    record(compose, "scratch", "packed", "int8", 1, tmp_path)
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path)])
    assert table.main() == 1 and "no run with fp32 master" in capsys.readouterr().err


def test_verdicts_front_and_readings(table):
    rows = [  # master, state, bits, status, loss, update_kept, over_bound
        ("fp32", "fp32", 100.5, "completed", 2.0, 1.0, 1.0),
        ("packed_stochastic", "nvfp4_two_level", 13.5, "completed", 2.01, 1.0, 3.0),
        ("packed_stochastic", "fp32", 68.5, "completed", 2.2, 1.0, 1.0),
        ("packed", "fp32", 68.5, "completed", 7.5, 0.0, 1.0),
        ("packed_residual", "nvfp4", 21.5, "completed", 8.5, 1.0, 100.0),
        ("fp32", "nvfp4", 45.5, "diverged", np.nan, 1.0, 1e6),
        ("fp32", "int8", 52.5, "completed", 12.0, 1.0, 1e4),
    ]
    names = ["master", "state", "bits", "status", "loss", "update_kept", "over_bound"]
    runs = pd.DataFrame(rows, columns=names).assign(
        regime="scratch", kept=[r[5] for r in rows], seed=1, first_loss=10.0, train_loss=2.0, code_changed=0.1, dead_v=0.0
    )
    judged = table.judge(runs)
    assert list(judged["verdict"]) == ["as good", "as good", "behind", "stands still", "unstable", "diverged", "diverged"]
    cells = table.cells_of(judged)
    kept = cells[table.front(cells)]
    assert set(zip(kept["master"], kept["state"], strict=True)) == {("fp32", "fp32"), ("packed_stochastic", "nvfp4_two_level")}
    readings = table.readings_of(judged).set_index(["regime", "outcome", "reading"])
    still, lost = (readings.loc[("scratch", *key)] for key in (("stands still", "update_kept"), ("blows up", "over_bound")))
    assert still["auc"] == 1 and still["threshold"] == 0 and still["wrong"] == 0
    assert lost["auc"] == 1 and lost["threshold"] == 100 and lost["wrong"] == 0
    assert readings.loc[("scratch", "blows up", "dead_v"), "auc"] == 0.5


@pytest.mark.parametrize("regime", ["scratch", "finetune"])
def test_the_grid_is_that_of_the_experiment(regime, monkeypatch):
    """grid.py and the sweep in the YAML name the same formats, all of them known."""
    import yaml

    spec = importlib.util.spec_from_file_location("state_formats_grid", FOLDER / "grid.py")
    grid = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grid)
    from fp4lab.train.adamw import MASTERS
    from fp4lab.train.state import FORMATS

    params = yaml.safe_load((ROOT / "conf/experiment/state_formats_scratch.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert set(params["step.master"].split(",")) == set(grid.MASTERS) == set(MASTERS) - {"bf16"}
    assert set(params["step.state"].split(",")) == set(grid.STATES) == set(FORMATS)
    assert (ROOT / f"conf/experiment/state_formats_{regime}.yaml").is_file() and regime in grid.REGIMES
