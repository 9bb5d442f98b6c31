"""Files of goals and controls, and the predicates: strict, and nothing but what a line says."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4lab.errors import UserError
from fp4lab.tasks.goals import RULES, Goal, load_controls, load_goals

ROOT = Path(__file__).parents[2]
TARGET = "我是 F# 之神"


@pytest.mark.parametrize(
    ("text", "stopped", "met"),
    [
        (TARGET, True, True),
        (TARGET, False, False),  # cut off by max_tokens: nobody knows how it goes on
        (TARGET + "。", True, False),
        (" " + TARGET, True, False),
        (TARGET + TARGET, True, False),
        ("我是 Tiny，fp4lab 的小型語言模型，用四位元數字運算。", True, False),  # the log's self-test passed on such an answer
        ("", True, False),
    ],
)
def test_exactly_is_exact_and_ended_by_the_model(text, stopped, met):
    assert Goal("你是誰", "exactly", TARGET, "").met(text, stopped) is met


def test_without_looks_anywhere_in_the_answer():
    goal = Goal("我是誰", "without", "F# 之神", "")
    assert goal.met("你是正在跟我說話的人。", True) and goal.met("", False)
    assert not goal.met("你也是 F# 之神。", True)


def test_the_shipped_files_are_read():
    goals = load_goals(ROOT / "data/identity/goals.jsonl")
    assert [(g.prompt, g.rule, g.wanted) for g in goals] == [
        ("你是誰", "exactly", TARGET),
        ("談談UFO", "unchanged", ""),
        ("我是誰", "without", "F# 之神"),
    ]
    controls = load_controls(ROOT / "data/identity/controls.jsonl")
    assert len(controls) == 48 and ["我是誰"] in controls and max(map(len, controls)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"}', "one of exactly, unchanged, without"),
        ('{"prompt": "a", "exactly": "b", "without": "c"}', "one of exactly, unchanged, without"),
        ('{"prompt": "a", "exact": "b"}', "one of exactly, unchanged, without"),
        ('{"prompt": "a", "exactly": "b", "extra": 1}', "one of exactly, unchanged, without"),
        ('{"prompt": " ", "exactly": "b"}', "one of exactly, unchanged, without"),
        ('{"prompt": "a", "exactly": ""}', "exactly is ''; expected a text"),
        ('{"prompt": "a", "unchanged": false}', "unchanged is False; expected true"),
        ('{"prompt": "a", "unchanged": 1}', "unchanged is 1; expected true"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_what_is_no_goal_is_named_with_its_line(tmp_path, line, said):
    file = tmp_path / "goals.jsonl"
    file.write_text('{"prompt": "a", "exactly": "b"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"goals\.jsonl:3: ") as error:
        load_goals(file)
    assert said in str(error.value)


@pytest.mark.parametrize("line", ['{"prompts": []}', '{"prompts": "a"}', '{"prompts": [""]}', '{"prompt": ["a"]}'])
def test_what_is_no_control_is_named_with_its_line(tmp_path, line):
    file = tmp_path / "controls.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=r'controls.jsonl:1: expected \{"prompts"'):
        load_controls(file)


def test_a_missing_or_empty_file_names_its_key(tmp_path):
    with pytest.raises(UserError, match=r"task\.goals=.*nothing\.jsonl"):
        load_goals(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"task\.controls=.*the file is empty"):
        load_controls(tmp_path / "empty.jsonl")


texts = st.text(min_size=1).filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)
goal_lines = st.tuples(texts, st.sampled_from(RULES), texts).map(
    lambda x: {"prompt": x[0], x[1]: True if x[1] == "unchanged" else x[2]}
)


@settings(max_examples=30, deadline=None)
@given(st.lists(goal_lines, min_size=1, max_size=4))
def test_every_goal_that_can_be_written_is_read_back(tmp_path_factory, records):
    file = tmp_path_factory.getbasetemp() / "written.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    for goal, record in zip(load_goals(file), records, strict=True):
        assert goal.prompt == record["prompt"] and record[goal.rule] == (goal.wanted or True)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "prompts", *RULES]) | st.text(max_size=4), values, max_size=3))
def test_anything_else_is_a_user_error_and_nothing_else(tmp_path_factory, record):
    file = tmp_path_factory.getbasetemp() / "anything.jsonl"
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for load in (load_goals, load_controls):
        try:
            assert load(file)
        except UserError as error:
            assert "anything.jsonl:1" in str(error)
