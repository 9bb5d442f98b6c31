"""`fp4lab compare` and `fp4lab inspect`."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fp4lab import cli
from fp4lab.encoding import encode
from fp4lab.events import End, Loss, Note, Phase, Start, to_record

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Two runs: one that failed for a reason in brackets, one that was killed with its supervisor."""
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / "sweep"
    reason = "KeyError: [/data] of [task]"
    for name, lr, end in (("0", "0.1", [End(status="failed", reason=reason, seconds=2.0)]), ("1", "0.2", [])):
        events = [
            Start(overrides=[f"lr={lr}"]),
            Phase(name="start", ms=1.0, proc_rss_mib=64.0),
            Loss(loss=2.5),
            Note(text="a [b]"),
        ]
        run = folder / name
        run.mkdir(parents=True)
        lines = [encode({"t": 1.0, "wall": "w", **to_record(e)}) for e in [*events, *end]]
        (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    result = {"status": "failed", "reason": reason, "overrides": ["lr=0.1"], "seconds": 2.0, "loss": 2.5}
    (folder / "0" / "result.json").write_text(encode(result))
    return folder


@pytest.fixture
def fp4lab(monkeypatch, capsys):
    """fp4lab("compare", folder) -> (exit code, stdout, stderr), through the function behind the command."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fp4lab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_compare(fp4lab, sweep):
    code, out, err = fp4lab("compare", sweep)
    assert (code, err) == (0, "") and "\x1b" not in out
    lines = out.splitlines()
    assert all(len(line) <= 120 for line in lines[:4])
    head, first, second, *said = lines[next(i for i, line in enumerate(lines) if line.startswith("run")) :]
    assert head.split()[:3] == ["run", "lr", "status"]
    assert first.split()[:4] == ["0", "0.1", "failed", "2.5000"]
    assert second.split()[:4] == ["1", "0.2", "unfinished", "2.5000"]
    assert said[0] == "run 0: failed after start: KeyError: [/data] of [task]"
    assert said[1].startswith("run 1: unfinished: its records have no end")


def test_compare_as_csv(fp4lab, sweep):
    code, out, _ = fp4lab("compare", "--csv", sweep)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert [(r["run"], r["lr"], r["status"], r["loss"]) for r in rows] == [
        ("0", "0.1", "failed", "2.5"),
        ("1", "0.2", "unfinished", "2.5"),
    ]


def test_inspect_a_run(fp4lab, sweep):
    code, out, _ = fp4lab("inspect", sweep / "0")
    assert code == 0
    for words in ("start", "64.0 MiB resident", "loss 2.500000", "note a [b]", "failed: KeyError: [/data] of [task] (2.00 s)"):
        assert words in out


def test_inspect_a_checkpoint(fp4lab, tmp_path):
    from fp4lab.checkpoint.dat import DatFile

    path = ROOT / "models/tiny/model.dat"
    code, out, _ = fp4lab("inspect", path)
    with DatFile.open(path) as file:
        keys = [e.key for e in file.entries.values()]
    listed = [line.split()[-1] for line in out.splitlines() if line.split()[0].isdigit() and "entries" not in line]
    assert code == 0 and listed == keys and len(keys) > 10


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_what_is_missing_is_named(fp4lab, tmp_path, command):
    code, out, err = fp4lab(command, tmp_path / "nowhere")
    assert code == 2 and out == ""
    assert err.startswith("fp4lab: ") and "nowhere" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_folder_without_runs(fp4lab, tmp_path, command):
    code, _, err = fp4lab(command, tmp_path)
    assert code == 2 and "no runs in it" in err


def test_a_file_that_is_no_checkpoint(fp4lab, tmp_path):
    (tmp_path / "x.dat").write_bytes(b"nothing of the kind")
    code, _, err = fp4lab("inspect", tmp_path / "x.dat")
    assert code == 2 and "x.dat" in err


def test_the_installed_command(tmp_path):
    command = Path(sys.executable).parent / "fp4lab"
    done = subprocess.run([command, "compare", tmp_path / "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fp4lab: ") and "Traceback" not in done.stderr


def test_compare_sorted_and_filtered(fp4lab, sweep):
    _, out, _ = fp4lab("compare", sweep, "--csv", "--sort", "-lr")
    assert [r["run"] for r in csv.DictReader(io.StringIO(out))] == ["1", "0"]
    _, out, _ = fp4lab("compare", sweep, "--json", "--filter", "status=unfinished", "--filter", "lr>0.1")
    assert [(r["run"], r["loss"], r["worst_kl"]) for r in json.loads(out)] == [("1", 2.5, None)]
    code, out, err = fp4lab("compare", sweep, "--filter", "speed=1")
    assert code == 2 and out == "" and "speed" in err and "peak_mib" in err


def test_compare_against_another_sweep(fp4lab, sweep, tmp_path):
    code, out, _ = fp4lab("compare", sweep, "--against", sweep)
    assert code == 0 and "2 runs compared" in out and "differences: 0" in out
    other = tmp_path / "other"
    shutil.copytree(sweep, other)
    path = other / "1" / "events.jsonl"
    path.write_text(path.read_text().replace('"loss": 2.5', '"loss": 2.75'))
    code, out, _ = fp4lab("compare", other, "--against", sweep)
    assert code == 1 and "+10.00%" in out and "differences: 1" in out
    code, out, _ = fp4lab("compare", other, "--against", sweep, "--json")
    (found,) = json.loads(out)["differences"]
    assert code == 1 and (found["run"], found["what"], found["was"], found["now"]) == ("1", "loss", 2.5, 2.75)
    assert fp4lab("compare", other, "--against", sweep, "--tolerance", "loss=0.2")[0] == 0
    assert fp4lab("compare", other, "--tolerance", "loss=0.2")[0] == 2
