"""A golden comparison holds for the run it was made of and for the shipped model, and not for a changed one."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4lab.analysis.golden import _near, differences, save
from fp4lab.cli import app
from fp4lab.errors import UserError
from fp4lab.supervise.ledger import Ledger
from fp4lab.tasks import compare
from fp4lab.tracking.jsonl import JsonlTracker

SHIPPED = Path(__file__).parent / "golden_tiny.json"
"""Made by: python run.py task=compare 'task.prompts=[hi,who are you]' hydra.run.dir=outputs/golden, then
fp4lab compare outputs/golden --golden tests/analysis/golden_tiny.json --save"""


def recorded(config, folder):
    ledger = Ledger(config, folder, [], [JsonlTracker(folder / "events.jsonl")])
    compare.run(config, ledger.emit)
    ledger.close("completed", "")
    return folder


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """run_of(compose, *overrides) -> folder, each made once."""
    made = {}

    def make(compose, *overrides):
        if overrides not in made:
            config = compose("task=compare", "device=cpu", "task.prompts=[hi,who are you]", *overrides)
            made[overrides] = recorded(config, tmp_path_factory.mktemp("run"))
        return made[overrides]

    return make


def test_the_shipped_model_is_as_it_was(compose, run_of):
    assert differences(run_of(compose), SHIPPED) == []


def test_a_run_is_its_own_golden_run(compose, run_of, tmp_path):
    low = run_of(compose, "dtype=bfloat16")
    save(low, tmp_path / "g.json")
    assert differences(low, tmp_path / "g.json") == []
    assert differences(run_of(compose), tmp_path / "g.json") == [] == differences(low, SHIPPED), (
        "one is in the other's rounding"
    )


def test_a_fault_is_a_difference(compose, run_of):
    found = differences(run_of(compose, "quirk.scale_bytes_undecoded=true"), SHIPPED)
    assert {path for _, path, *_ in found} == {"B.fp2_ste", "A-B", "B-C"}
    assert any(what.startswith("size of layer 0") for _, _, what, *_ in found)
    assert ("hi", "A-B", "fault", "False", "True") in found


def test_a_logit_beyond_rounding_is_a_difference(compose, run_of, tmp_path):
    golden = json.loads(SHIPPED.read_text())
    golden["first_tokens"][0]["top10"][0][1] += 0.01
    (tmp_path / "g.json").write_text(json.dumps(golden))
    ((prompt, path, what, *_),) = differences(run_of(compose), tmp_path / "g.json")
    assert (prompt, path) == ("hi", "A.infer") and what.startswith("logit of id")


def changed(golden, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(golden))
    return tmp_path / "g.json"


def test_other_random_weights_are_a_difference(compose, run_of, tmp_path):
    """They have no file to tell them apart. In bfloat16 the codes differ; R is the same model, rounded."""
    save(run_of(compose, "weights=random"), tmp_path / "g.json")
    assert differences(run_of(compose, "weights=random"), tmp_path / "g.json") == []
    packed = {"A.infer", "B.fp2_ste", "C.noste_graph"}
    for other, differ in (("seed=2", packed | {"R.dense"}), ("dtype=bfloat16", packed)):
        found = differences(run_of(compose, "weights=random", other), tmp_path / "g.json")
        assert {path for _, path, *_ in found if "." in path} == differ


@pytest.mark.parametrize("group, name", [("first_tokens", "A.infer"), ("pairs", "A-C")])
def test_what_only_one_of_both_has_is_a_difference(compose, run_of, tmp_path, group, name):
    golden = json.loads(SHIPPED.read_text())
    first = golden[group].pop(1 if group == "pairs" else 0)
    assert name in first.values()
    path = changed(golden, tmp_path)
    assert ("hi", name, "comparison", "missing", "there") in differences(run_of(compose), path)
    golden[group].append({**first, "prompt": "hi", "path" if group == "first_tokens" else "pair": "X"})
    found = differences(run_of(compose), changed(golden, tmp_path))
    assert ("hi", "X", "comparison", "there", "missing") in found


def test_pair_numbers_and_depth_are_compared(compose, run_of, tmp_path):
    golden = json.loads(SHIPPED.read_text())
    golden["pairs"][0] |= {"kl": 1e-9, "max_abs_logit": 1e-3}
    golden["first_tokens"][0]["layer_rms"].pop()
    found = {(path, what) for _, path, what, *_ in differences(run_of(compose), changed(golden, tmp_path))}
    assert found == {("A-B", "kl"), ("A-B", "max_abs_logit"), ("A.infer", "layers")}


@given(st.floats(), st.floats(min_value=0, max_value=1e9))
def test_any_number_is_near_itself_and_no_finite_one_near_infinity(x, tolerance):
    assert _near(x, x, tolerance)
    assert not _near(math.inf, 1.0, math.inf) and not _near(x, math.nan if x == x else 1.0, tolerance)


def test_the_command_says_what_differs_and_exits_with_1(compose, run_of, tmp_path):
    good, bad = run_of(compose), run_of(compose, "quirk.scale_bytes_undecoded=true")
    cli = CliRunner()
    same = cli.invoke(app, ["compare", str(good), "--golden", str(SHIPPED)])
    assert (same.exit_code, "within tolerance" in same.output) == (0, True)
    other = cli.invoke(app, ["compare", str(bad), "--golden", str(SHIPPED)])
    assert other.exit_code == 1 and "differences from the golden run" in other.output and "A-B" in other.output
    kept = tmp_path / "k.json"
    assert cli.invoke(app, ["compare", str(good), "--golden", str(kept), "--save"]).exit_code == 0
    assert json.loads(kept.read_text())["first_tokens"] == json.loads(SHIPPED.read_text())["first_tokens"] or (
        differences(good, kept) == []
    )


def test_what_cannot_be_compared_is_refused(compose, run_of, tmp_path):
    with pytest.raises(UserError, match="made of weights with sha256"):
        differences(run_of(compose, "weights=random"), SHIPPED)
    bad = tmp_path / "x.json"
    for text in ("{}", "no json", '{"schema": 1, "weights": [], "first_tokens": [{}], "pairs": []}'):
        bad.write_text(text)
        with pytest.raises(UserError, match="not a golden comparison"):
            differences(run_of(compose), bad)
    with pytest.raises(UserError, match="no runs in it"):
        differences(tmp_path, SHIPPED)
