"""Filters and sorting of runs."""

import pandas as pd
import pytest

from fp4lab.analysis.select import column, filtered, ordered
from fp4lab.errors import UserError

RUNS = pd.DataFrame(
    {
        "run": ["0", "1", "2", "3"],
        "step.chunk_rows": ["16", "64", "8", "128"],
        "option loss": ["ce", "ce", "scalar", None],
        "lr": ["1e-4", "0.0001", "1e-3", "x"],
        "status": ["completed", "oom", "completed", "completed"],
        "loss": [2.0, float("nan"), 1.0, 2.0],
    }
)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ([], "0123"),
        (["status=completed"], "023"),
        (["status!=completed"], "1"),
        (["loss<2"], "2"),
        (["loss<=2", "chunk_rows>=16"], "03"),
        (["loss != 2"], "12"),
        (["lr=1e-4"], "01"),
        (["lr=x"], "3"),
        (["lr<1"], "012"),
        (["option loss=ce"], "01"),
        (["status=none of them"], ""),
    ],
)
def test_filters(filters, kept):
    assert "".join(filtered(RUNS, filters)["run"]) == kept


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ([], "0123"),
        (["chunk_rows"], "2013"),
        (["-step.chunk_rows"], "3102"),
        (["loss"], "2031"),
        (["-loss", "-run"], "3021"),
        (["lr"], "0123"),
        (["status", "-loss", "chunk_rows"], "0321"),
    ],
)
def test_orders(by, order):
    assert "".join(ordered(RUNS, by)["run"]) == order


@pytest.mark.parametrize("given", ["loss", "loss<", "loss<small", "=3", "nothing=1", ""])
def test_a_filter_that_is_none(given):
    with pytest.raises(UserError, match=r"loss|expected"):
        filtered(RUNS, [given])


def test_a_name_that_is_more_than_one_column():
    runs = RUNS.rename(columns={"lr": "other.chunk_rows"})
    with pytest.raises(UserError, match="more than one"):
        column(runs, "chunk_rows")
    assert column(runs, "step.chunk_rows") == "step.chunk_rows"
