"""Records survive the trip through a line of JSON, non-finite floats included."""

import json
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4lab.encoding import decode, encode
from fp4lab.events import KINDS, STATUSES, End, Failure, FirstToken, Loss, to_record

_ODD = dict.fromkeys(("host", "config"), st.dictionaries(st.text(), st.none() | st.integers() | st.text()))


def _events(cls: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(cls)
    hints.pop("kind")
    return st.builds(cls, **{name: _ODD.get(name, st.from_type(hint)) for name, hint in hints.items()})


def same(a, b) -> bool:
    """Equal, with NaN equal to NaN and a float never equal to its name."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(kind, data):
    event = data.draw(_events(KINDS[kind]))
    record = {"t": 1.5, "wall": "2026-01-01", **to_record(event)}
    line = encode(record)
    assert "\n" not in line
    json.loads(line, parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    assert record["kind"] == kind
    assert same(decode(line), record)


@pytest.mark.parametrize(("value", "text"), [(math.nan, '"nan"'), (math.inf, '"inf"'), (-math.inf, '"-inf"')])
def test_non_finite_floats_have_names(value, text):
    line = encode(to_record(Loss(loss=value, grad_norm=value)))
    assert f'"loss": {text}' in line
    back = decode(line)
    assert same(back["loss"], value) and same(back["grad_norm"], value)
    back = decode(encode(to_record(End(peaks={"proc_rss_mib": value, "pid_mem_mib": None}))))
    assert same(back["peaks"], {"proc_rss_mib": value, "pid_mem_mib": None})


def test_text_that_looks_like_a_number_stays_text():
    back = decode(encode(to_record(Failure(reason="nan", traceback="inf"))))
    assert (back["reason"], back["traceback"]) == ("nan", "inf")
    back = decode(encode(to_record(FirstToken(prompt="nan", top10=[(1, math.nan, "nan")]))))
    assert back["prompt"] == "nan"
    assert same(back["top10"], [(1, math.nan, "nan")])


def test_unknown_kinds_and_fields_pass_through():
    assert decode('{"kind": "from_the_future", "loss": "nan"}') == {"kind": "from_the_future", "loss": "nan"}
    assert decode('{"kind": "loss", "new": "nan", "loss": 1.0}')["new"] == "nan"


@pytest.mark.parametrize("line", ["", "{", "[1]", "3", "null", '{"t": 1}', '{"kind": 3}', '{"kind": "loss", "loss": 1'])
def test_what_is_no_record(line):
    with pytest.raises(ValueError):
        decode(line)


def test_only_successes_exit_with_zero():
    assert {s for s, code in STATUSES.items() if code == 0} == {"completed", "stopped"}
    failures = [code for code in STATUSES.values() if code]
    assert len(set(failures)) == len(failures) and all(0 < code < 256 for code in failures)
