"""task=inspect on the shipped model."""

import pytest

from fp4lab.errors import UserError
from fp4lab.events import to_record
from fp4lab.tasks import inspect


def test_entries_are_events(compose):
    records: list[dict] = []
    inspect.run(compose("task=inspect"), lambda e: records.append(to_record(e)))
    found = [r for r in records if r["kind"] == "entry"]
    assert len(found) == 112 and sum(r["pair"] is not None for r in found) == 86
    assert all(r["scale_min"] >= 8 for r in found if r["scale_min"] is not None), "torchao's smallest scale, reference 2.4"
    assert not any(r["refused"] for r in found)


def test_random_weights_are_no_file(compose):
    with pytest.raises(UserError, match="weights=random has none"):
        inspect.run(compose("task=inspect", "weights=random"), lambda e: None)
