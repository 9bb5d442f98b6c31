"""A golden comparison holds for the run it was made of and for the shipped model, and not for a changed one."""

import json
from pathlib import Path

import pytest

from fp4lab.analysis.golden import differences, save
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


def test_what_cannot_be_compared_is_refused(compose, run_of, tmp_path):
    with pytest.raises(UserError, match="made of weights with sha256"):
        differences(run_of(compose, "weights=random"), SHIPPED)
    bad = tmp_path / "x.json"
    bad.write_text("{}")
    with pytest.raises(UserError, match="not a golden comparison"):
        differences(run_of(compose), bad)
    with pytest.raises(UserError, match="no runs in it"):
        differences(tmp_path, SHIPPED)
