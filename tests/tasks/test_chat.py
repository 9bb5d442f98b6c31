"""task=chat on the shipped model: policies and backends agree, what a turn records, rules that end a run, stdin."""

import json
import subprocess
import sys

import pytest

from fp4lab.choices import TASK_PHASES, check
from fp4lab.errors import Collapsed, UserError
from fp4lab.events import to_record
from fp4lab.tasks import chat


def run(config):
    records: list[dict] = []
    check(config)
    chat.run(config, lambda e: records.append(to_record(e)))
    return records


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


TALK = ("task=chat", "task.turns=2", "prompt=who are you", "task.max_tokens=12")
BACKENDS = ("bridge", "fp2", "noste", "dense")


@pytest.mark.parametrize("kvc", ["replay", "prefill", "persistent"])
def test_every_backend_says_the_same(compose, kvc):
    said = []
    for backend in BACKENDS:
        turns = of(run(compose(*TALK, f"kvc={kvc}", f"backend={backend}")), "turn")
        said.append([t["ids"] for t in turns])
    assert all(ids == said[0] for ids in said), dict(zip(BACKENDS, said, strict=True))


def test_what_a_turn_records(compose):
    config = compose(*TALK, "kvc=persistent", "backend=bridge")
    records = run(config)
    assert [p["name"] for p in of(records, "phase")] == [*TASK_PHASES["chat"][:-2], "turn_done", "turn_done", "cleanup_done"]
    first, second = of(records, "turn")
    assert first["finish"] == "length" and len(first["ids"]) == 12
    assert first["context_tokens"] == first["prompt_tokens"] + 12 + 2 == first["cache_len"] == first["template_tokens"]
    assert second["context_tokens"] == first["context_tokens"] + second["prompt_tokens"] + len(second["ids"]) + 2
    assert first["canonical"] is True and first["kvc"] == "persistent" and first["path"] == "A.infer"
    assert first["cache_mib"] == second["cache_mib"] > 0
    assert min(first["first_token_ms"], first["ms_per_token"]) > 0 and first["seconds"] < 60
    losses = of(records, "loss")
    assert [x["loss"] for x in losses] == [first["nll"], second["nll"]] and not any(x["trained"] for x in losses)
    (tokens,) = of(records, "first_token")
    assert tokens["top10"][0][0] == first["ids"][0] and tokens["path"] == "A.infer"
    (estimate,) = of(records, "estimate")
    assert "KV cache" in estimate["rows"] and "moments" not in " ".join(estimate["rows"])


def test_stops_limits_and_seeds(compose):
    def ids(*more):
        return [t["ids"] for t in of(run(compose("task=chat", "backend=bridge", "kvc=prefill", "prompt=hi", *more)), "turn")]

    (short,) = ids()
    (long,) = ids("task.ignore_eos=true", "task.max_tokens=20", "task.on_collapse=flag")
    assert len(short) < len(long) == 20 and long[: len(short)] == short
    (cut,) = ids("task.stop_tokens=['!']")
    assert cut == short[: len(cut)] and len(cut) < len(short)
    warm = ("task.temperature=1.5", "task.turns=2", "task.on_collapse=flag", "task.max_tokens=8")
    assert ids(*warm) == ids(*warm)
    assert ids(*warm) != ids(*warm, "seed=4")
    (timed,) = of(run(compose("task=chat", "task.turn_s=1e-6")), "turn")
    assert timed["finish"] == "time" and len(timed["ids"]) == 1


def test_a_conversation_file_with_a_system_message(compose, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"role": "system", "content": "be short"}\n{"role": "user", "content": "hi"}\n')
    (turn,) = of(run(compose("task=chat", f"task.conversation={path}", "task.max_tokens=2")), "turn")
    assert turn["system"] == "be short" and turn["template_tokens"] == turn["context_tokens"]


def test_collapse_ends_or_flags(compose):
    """The reference's !!!!: scale bytes read as integers, logits of hundreds of thousands, one token for ever."""
    quirk = ("task=chat", "quirk.scale_bytes_undecoded=true", "task.ignore_eos=true", "dtype=float16")
    with pytest.raises(Collapsed, match="turn 1: "):
        run(compose(*quirk))
    records = run(compose(*quirk, "task.on_collapse=flag"))
    (note,) = [n for n in of(records, "note") if n["topic"] == "collapse"]
    assert "turn 1" in note["text"]
    assert not [n for n in of(run(compose("task=chat")), "note") if n["topic"] == "collapse"]


def test_mistakes_are_named(compose):
    with pytest.raises(UserError, match=r"'hello there' is .* tokens"):
        run(compose("task=chat", "task.stop_tokens=['hello there']"))
    with pytest.raises(UserError, match=r"turn 1 needs .* max_position_embeddings="):
        run(compose("task=chat", f"prompt={'word ' * 3000}"))
    with pytest.raises(UserError, match=r"task\.top_p=0\.0"):
        run(compose("task=chat", "task.top_p=0.0"))


def test_choices_without_effect_are_said(compose):
    notes = [n["text"] for n in of(run(compose("task=chat", "kvc.prefill=token", "lr=1", "task.batch_size=3")), "note")]
    assert [t.split(" ")[0] for t in notes if "no effect" in t] == ["kvc.prefill=token", "lr=1", "task.batch_size=3"]


def test_a_session_that_generates_keeps_no_masters(compose):
    from fp4lab.tasks.session import open_session

    for backend in BACKENDS:
        session = open_session(compose("task=chat", f"backend={backend}"), lambda e: None, trains=False)
        held = sum(p.numel() for p in session.model.parameters()) if hasattr(session.model, "parameters") else 0
        raw = sum(t.numel() for t in session.store.raw.values())
        assert held == (raw if backend in ("fp2", "noste") else 0 if backend == "bridge" else held)
        assert bool(session.store.packed) == (backend != "dense") and session.store.dense is None


def test_a_pipe_is_a_conversation(tmp_path):
    code = "from fp4lab.cli import main; main()"
    command = [sys.executable, "-c", code, "chat", "--out", str(tmp_path / "c"), "backend=bridge", "threads=1"]
    done = subprocess.run(command, input="hi\n\n/reset\nhi\n", capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and first
    lines = [json.loads(x) for x in (tmp_path / "c/chat.jsonl").read_text().splitlines()]
    assert [(x["turn"], x["output"], len(x["messages"])) for x in lines] == [(0, first, 1), (0, first, 1)]
    assert json.loads((tmp_path / "c/result.json").read_text())["status"] == "completed"
