"""The reference log as data and as experiments: complete, composable for both models, and two of them run for real."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp4lab.analysis import devlog
from fp4lab.choices import check, idle_choices
from fp4lab.events import STATUSES

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("devlog_*.yaml"))
CATALOGUE = {c.name: c for c in devlog.catalogue(ROOT / "experiments/devlog")}
NUMBERS = (
    *("guard_limit_gb", "guard_over_s", "seq_len", "chunk_rows", "lr", "steps", "train_last_layers", "max_tokens", "turns"),
    *("first_loss", "loss", "peak_mib", "model_loaded_mib", "backward_mib", "step_mib", "seconds", "step_ms", "top1_id"),
)


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("run_devlog", ROOT / "experiments/run_devlog.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep(path: Path) -> dict[str, list[str]]:
    params = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"]
    return {key: str(values).split(",") for key, values in params.items()}


def test_the_log_is_complete():
    rows = devlog.log_rows(ROOT / "experiments/devlog.csv")
    seed, public = [f"S{i}" for i in range(1, 43)], [f"L{i}" for i in range(1, 33)]
    assert rows.index.is_unique and set(rows.index) == {*seed, *public, "L3b"}
    assert {id for id in rows.index if rows.source[id] == "public"} == {*public, "L3b"}
    assert rows.date.str.fullmatch(r"2026-02-\d\d").all() and rows.date.is_monotonic_increasing
    assert rows[["section", "configuration", "outcome", "result"]].notna().all().all()
    assert all(rows[name].dtype == float for name in NUMBERS)
    assert rows.offload.dropna().str.fullmatch("[tf]{3}").all()
    assert rows.loc["S40", "peak_mib"] == 111141 and rows.loc["L3b", "step_ms"] == 86000


def test_every_row_is_answered_or_has_a_reason():
    answered = list(itertools.chain.from_iterable(c.rows for c in CATALOGUE.values()))
    assert sorted(answered) == sorted(devlog.log_rows(ROOT / "experiments/devlog.csv").index)


def test_what_is_pointed_to_exists():
    for c in CATALOGUE.values():
        for row in c.rows.values():
            text = row.get("see", "")
            assert all((ROOT / name).exists() for name in re.findall(r"\b(?:tests|doc|src)/[\w./]+\w", text)), text
            names = re.findall(r"\+experiment=(\w+)", text)
            assert all((ROOT / f"conf/experiment/{name}.yaml").is_file() for name in names), text


def test_every_experiment_says_what_it_asks():
    assert {f"devlog_{c.name}" for c in CATALOGUE.values() if c.command} == {p.stem for p in EXPERIMENTS}
    for path in EXPERIMENTS:
        c = CATALOGUE[path.stem.removeprefix("devlog_")]
        text = path.read_text(encoding="utf-8")
        assert f"# {c.command}\n" in text and f"experiments/devlog/{c.name}.yaml" in text
        assert c.command == f"python run.py -m +experiment={path.stem}"
        assert c.question and c.expected and c.differs and c.rows and c.gpu


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("model", ["tiny", "qwen3_4b"])
def test_every_cell_composes(compose, path, model):
    """On both models, with nothing chosen that has no effect."""
    c, lists = CATALOGUE[path.stem.removeprefix("devlog_")], sweep(path)
    given = dict(o.split("=", 1) for o in c.gpu) if model == "qwen3_4b" else {}
    lists |= {k: v.split(",") for k, v in given.items()}
    for values in itertools.product(*lists.values()):
        overrides = [f"{k}={v}" for k, v in zip(lists, values, strict=True)]
        config = compose(f"+experiment={path.stem}", *overrides)
        check(config)
        assert config["model"]["name"] == model
        assert idle_choices(config, overrides) == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_row_is_answered_by_a_cell(path):
    """Of the shipped model's sweep, by its scaled values where there are some."""
    c, lists = CATALOGUE[path.stem.removeprefix("devlog_")], sweep(path)
    cells = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    for id, row in c.rows.items():
        if "run" in row:
            runs = [devlog.Run("", c.experiment, cell, []) for cell in cells]
            assert any(devlog.answers(run, row, c.scale) for run in runs), id


def test_the_driver_counts_cells(driver):
    c = CATALOGUE["chunk_grid"]
    assert driver.cells(c, []) == 3 * 2 * 2 * 2
    assert driver.cells(c, c.gpu) == 3


def test_records_are_slimmed(driver, tmp_path):
    records = [
        {"kind": "start", "git_diff": "x" * 9000, "git_dirty": True},
        {"kind": "file", "path": f"{ROOT}/models/tiny/model.dat"},
        {"kind": "weight_diff", "relative_error": 0.0},
        {"kind": "weight_diff", "relative_error": "nan"},
    ]
    path = tmp_path / "0/events.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "ph', encoding="utf-8")
    (tmp_path / "0/worker.log").write_text("said")
    assert driver.slim(tmp_path) == path.stat().st_size < 400
    left = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert left[0] == {"kind": "start", "git_diff": None, "git_dirty": True}
    assert left[1]["path"] == "models/tiny/model.dat" and left[2:] == [records[3]]
    assert not (tmp_path / "0/worker.log").exists()


def test_two_comparisons_for_real(tmp_path):
    """By the driver: the log's rows are met, killed cells included, in small files without this machine's paths."""
    out = tmp_path / "results"
    args = ["--out", str(out), "--only", "first_token", "guard", "--minutes", "2", "--", "threads=1"]
    command = [sys.executable, "experiments/run_devlog.py", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f.id: f.verdict for f in devlog.findings(devlog.load([out]), list(CATALOGUE.values()), devlog.log_rows())}
    assert {found[id] for id in ("S3", "S4", "S5", "S6", "S7", "S8", "S10", "S13", "S14")} == {"reproduced"}
    assert found["S9"] == found["S11"] == "better" and found["S1"] == "not run"
    files = sorted(p for p in out.rglob("*") if p.is_file())
    assert {p.name for p in files} == {"events.jsonl", "result.json", "report.md"}
    assert sum(p.stat().st_size for p in files) < 300_000
    assert all(str(ROOT) not in p.read_text(encoding="utf-8") for p in files)
    statuses = [json.loads((out / f"guard/{i}/result.json").read_text())["status"] for i in range(4)]
    assert statuses == ["completed", "guard_killed"] * 2 and set(statuses) <= set(STATUSES)


def test_an_unknown_comparison_is_refused(tmp_path):
    command = [sys.executable, "experiments/run_devlog.py", "--out", str(tmp_path), "--only", "chunkgrid"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "--only chunkgrid: expected one of chunk_grid, cleanup" in done.stderr
