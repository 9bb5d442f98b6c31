"""task=tune with goals: asked before, while, after and reloaded, on A, B and C; what is missed ends the run as goals_missed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp4lab.errors import GoalsMissed, UserError
from fp4lab.events import STATUSES, to_record
from fp4lab.model.paths import ste_linears
from fp4lab.tasks import tune
from fp4lab.tasks.exam import Exam
from fp4lab.tasks.session import open_session

ROOT = Path(__file__).parents[2]
ABC = {"A.infer", "B.fp2_ste", "C.noste_graph"}
SMALL = (
    *("task=tune", "data.held_out=data/dialogues/zh_greetings.jsonl", "seq_len=48", "task.warmup_steps=0", "task.batch_size=4"),
    *("dtype=float32", "backend.eval_cache=true", "step.chunk_rows=65536", "task.max_tokens=24"),
)


def write(folder: Path, name: str, *records: dict) -> str:
    (folder / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(folder / name)


def tuned(compose, *overrides: str) -> tuple[list[dict], str]:
    """Records, and what GoalsMissed said (empty: success)."""
    records: list[dict] = []
    try:
        tune.run(compose(*SMALL, *overrides), lambda e: records.append(to_record(e)))
    except GoalsMissed as error:
        return records, str(error)
    return records, ""


@pytest.fixture
def files(tmp_path):
    return {
        "data": write(tmp_path, "data.jsonl", {"messages": [{"role": "user", "content": "你是誰"},
                                                             {"role": "assistant", "content": "好的"}]}),
        "goals": write(tmp_path, "goals.jsonl", {"prompt": "你是誰", "exactly": "好的"},
                       {"prompt": "thank you", "unchanged": True}, {"prompt": "hi", "without": "F#"}),
        "controls": write(tmp_path, "controls.jsonl", {"prompts": ["thank you"]}, {"prompts": ["hi", "who am I"]}),
    }  # fmt: skip


def test_reached_early_exported_reloaded_and_asked_again_on_every_path(compose, files, tmp_path):
    records, missed = tuned(
        compose,
        *(f"data.path={files['data']}", f"task.goals={files['goals']}", "step=dense", "lr=5e-4", "steps=60"),
        *("task.eval_every=2", "task.stop_at_goals=true", f"task.output={tmp_path / 'out.dat'}"),
    )
    assert missed == ""
    goals = [r for r in records if r["kind"] == "goal"]
    assert [r["met"] for r in goals if r["when"] == "before" and r["prompt"] == "你是誰"] == [False]
    for when in ("after", "reloaded"):
        assert {(r["path"], r["prompt"]) for r in goals if r["when"] == when} == {
            (path, prompt) for path in ABC for prompt in ("你是誰", "thank you", "hi")
        }
        assert all(r["met"] for r in goals if r["when"] == when)
    assert {r["text"] for r in goals if r["when"] == "reloaded" and r["prompt"] == "你是誰"} == {"好的"}
    (note,) = [r["text"] for r in records if r["kind"] == "note" and r["topic"] == "stop"]
    last = max(r["step"] for r in records if r["kind"] == "loss")
    assert f"after step {last}" in note and last < 59
    assert {r["when"] for r in records if r["kind"] == "first_token"} == {"before", "after", "reloaded"}


def test_what_is_missed_is_said_with_path_answer_and_expectation(compose, files):
    records, missed = tuned(
        compose,
        *(f"data.path={files['data']}", f"task.goals={files['goals']}", f"task.controls={files['controls']}"),
        *("step=dense", "lr=0", "steps=1"),
    )
    assert missed.startswith("'你是誰' gets '我是 Tiny") and missed.endswith("expected '好的' (after on A, B, C)")
    assert ";" not in missed  # untrained: the rest is as it was
    for r in (r for r in records if r["kind"] == "controls"):
        assert r["kept"] == r["of"] == 3 and r["changed"] == []
        assert r["loss"] == pytest.approx(r["loss_before"], abs=1e-4)


def test_controls_that_move_beyond_the_bounds_are_a_miss(compose, files):
    records, missed = tuned(
        compose,
        *(f"data.path={files['data']}", f"task.goals={files['goals']}", f"task.controls={files['controls']}"),
        *("step=dense", "lr=3e-3", "steps=12"),
    )
    assert "of 3 control answers are kept, expected 90% (after on A, B, C)" in missed
    assert "the loss of control answers went from" in missed
    (one, *_) = [r for r in records if r["kind"] == "controls" and r["when"] == "after"]
    assert one["kept"] < one["of"] and one["changed"] and all(was != now for _, was, now in one["changed"])
    assert "'thank you' gets" in missed  # unchanged it was to be


def test_a_goal_that_the_untuned_model_meets_is_refused(compose, tmp_path):
    goals = write(tmp_path, "goals.jsonl", {"prompt": "thank you", "exactly": "You are welcome!"})
    with pytest.raises(UserError, match=r"goals.jsonl:1: the untuned model answers 'thank you' .* already"):
        tuned(compose, f"task.goals={goals}", "steps=1")


def test_an_answer_that_does_not_end_cannot_stay_unchanged(compose, tmp_path):
    goals = write(tmp_path, "goals.jsonl", {"prompt": "談談UFO", "unchanged": True})
    with pytest.raises(UserError, match=r"does not end within task.max_tokens=3"):
        tuned(compose, f"task.goals={goals}", "steps=1", "task.max_tokens=3")


def test_a_control_is_kept_if_and_only_if_generating_gives_it_again(compose, tmp_path):
    """The forward over the old answers against real generation, with weights that were disturbed."""
    prompts = ["hi", "thank you", "談談UFO", "what is the capital of France?", "who am I", "再見", "UFO", "3 + 4"]
    controls = write(tmp_path, "controls.jsonl", *({"prompts": [p]} for p in prompts))
    session = open_session(compose(*SMALL, f"task.controls={controls}"), lambda e: None)
    records: list[dict] = []
    exam = Exam(session, lambda e: records.append(to_record(e)))
    torch.manual_seed(0)
    parts = [p.block_scale.view(torch.uint8) for n, p in session.store.packed.items() if "down_proj" in n]
    seen: set[bool] = set()
    for _ in range(5):  # from slightly to badly disturbed
        for scales in parts:
            scales += torch.randint(0, 12, scales.shape, dtype=torch.uint8)
        for _, linear in ste_linears(session.model):
            linear.clear_eval_cache()
        kept, _ = exam._control_losses(session, session.model)
        again = [exam._reply(session, session.model, [{"role": "user", "content": p}])[1] for p in prompts]
        assert kept == [asked.text == text for asked, text in zip(exam._controls, again, strict=True)]
        seen |= set(kept)
    assert seen == {True, False}


def test_the_run_exits_with_its_own_code_and_the_reason(files, tmp_path):
    command = [
        *(sys.executable, "run.py", *SMALL, f"data.path={files['data']}", f"task.goals={files['goals']}", "lr=0", "steps=1"),
        *("step=dense", "tracker=off", "threads=1", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert done.returncode == STATUSES["goals_missed"] == 6 and result["status"] == "goals_missed", done.stdout + done.stderr
    assert result["reason"].startswith("'你是誰' gets '我是 Tiny")
    assert result["goals"]["when"] == "after" and result["goals"]["A.infer"] == {"你是誰": False, "thank you": True, "hi": True}
    again = subprocess.run([*command, "sweep.resume=true"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "skipped: already goals_missed" in again.stdout and again.returncode == 6, "known, and still no success"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.stop_at_goals=true", "task.stop_at_goals=true: there are no goals"),
        ("task.controls_kept=1.5", "task.controls_kept=1.5: expected a share"),
        ("task.accumulate=5", "task.accumulate=5: a batch has task.batch_size=4 rows"),
    ],
)
def test_contradictions_are_refused(compose, override, said):
    from fp4lab.choices import check

    with pytest.raises(UserError, match=said):
        check(compose(*SMALL, override))


def test_a_held_out_loss_ends_training(compose, files):
    records, missed = tuned(compose, f"data.path={files['data']}", "steps=9", "task.eval_every=2", "task.stop_at_loss=100")
    assert missed == "" and max(r["step"] for r in records if r["kind"] == "loss") == 1
    assert any("task.stop_at_loss=100" in r["text"] for r in records if r["kind"] == "note")
