"""Summary: records in, the body of result.json out."""

import math

from fp4lab.events import Failure, File, FirstTokenDiff, Loss, Note, Phase, Sample, StateHealth, to_record
from fp4lab.supervise.summary import Summary


def body(*events) -> dict:
    summary = Summary()
    for event in events:
        summary.add({"t": 0.0, "wall": "", **to_record(event)})
    return summary.result()


def test_nothing():
    result = body()
    assert result["peaks"] == {} and result["first_token"] == {} and result["files"] == [] and result["notes"] == []
    for key in ("loss", "first_loss", "trained", "slowest_phase", "last_phase", "state_health"):
        assert result[key] is None


def test_peaks_are_the_largest_but_the_smallest_of_what_is_available():
    result = body(
        Phase(name="a", proc_rss_mib=5, mem_available_mib=50, cuda_total_mib=80),
        Sample(proc_rss_mib=9, mem_available_mib=20, torch_peak_mib=None),
        Phase(name="b", proc_rss_mib=7, mem_available_mib=30, torch_peak_mib=3),
        Phase(name="c"),
    )
    assert result["peaks"] == {"proc_rss_mib": 9, "mem_available_mib": 20, "torch_peak_mib": 3}


def test_phases():
    result = body(Phase(name="a", ms=None), Phase(name="b", ms=5), Phase(name="c", ms=4))
    assert result["slowest_phase"] == {"name": "b", "ms": 5}
    assert result["last_phase"] == "c"


def test_held_out_loss_wins():
    train = [Loss(step=0, loss=3.0), Loss(step=1, loss=2.0)]
    result = body(*train)
    assert (result["loss"], result["first_loss"], result["trained"]) == (2.0, 3.0, True)
    result = body(Loss(loss=9.0, split="eval"), *train, Loss(loss=2.5, split="eval"))
    assert (result["loss"], result["first_loss"]) == (2.5, 3.0)


def test_a_backend_that_is_not_trained():
    result = body(Loss(loss=4.0, split="eval", trained=False))
    assert (result["loss"], result["first_loss"], result["trained"]) == (4.0, None, False)


def test_nan_loss_is_kept():
    assert math.isnan(body(Loss(loss=math.nan))["loss"])


def test_last_comparison_of_a_pair_wins():
    result = body(
        FirstTokenDiff(pair="A-C", when="before", kl=1.0),
        FirstTokenDiff(pair="A-R", when="before", kl=2.0),
        FirstTokenDiff(pair="A-C", when="after", kl=3.0, top1_equal=True),
    )
    assert {k: (v["when"], v["kl"]) for k, v in result["first_token"].items()} == {
        "A-C": ("after", 3.0),
        "A-R": ("before", 2.0),
    }
    assert not {"t", "wall", "kind", "pair"} & set(result["first_token"]["A-C"])


def test_of_several_prompts_the_worst_counts():
    diffs = [FirstTokenDiff(pair="A-B", when="before", prompt=p, kl=k, fault=f) for p, k, f in (
        ("a", 0.1, False), ("b", 0.0, True), ("c", 0.2, False), ("d", 0.05, False))]  # fmt: skip
    assert body(*diffs)["first_token"]["A-B"]["prompt"] == "b", "a fault, however small"
    broken = FirstTokenDiff(pair="A-B", when="before", prompt="e", kl=math.nan, fault=True)
    assert body(broken, *diffs)["first_token"]["A-B"]["prompt"] == "e"
    assert body(*diffs, FirstTokenDiff(pair="A-B", when="after", prompt="f", kl=0.0))["first_token"]["A-B"]["prompt"] == "f"


def test_files_notes_and_health():
    file = {"role": "data", "path": "x", "format": "tsv", "bytes": 3, "sha256": "ab"}
    result = body(File(**file), Note(topic="t", text="one"), Note(text="two"), StateHealth(step=1), StateHealth(step=2))
    assert result["files"] == [file]
    assert result["notes"] == ["one", "two"]
    assert result["state_health"]["step"] == 2 and "kind" not in result["state_health"]


def test_failure_is_kept_for_the_verdict():
    summary = Summary()
    assert summary.failure is None
    summary.add(to_record(Failure(status="oom", reason="r")))
    assert summary.failure is not None and summary.failure["status"] == "oom"
