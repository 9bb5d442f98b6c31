"""What a run comes to."""

import pytest

from fp4lab.analysis.rows import agreement


@pytest.mark.parametrize(
    ("equal", "different", "text"),
    [
        ([], [], ""),
        (["A-B", "A-C", "A-R", "B-C", "B-R", "C-R"], [], "A=B=C=R"),
        (["A-B", "A-C", "B-C"], ["A-R", "B-R", "C-R"], "A=B=C≠R"),
        (["A-C"], ["A-B", "B-C"], "A=C≠B"),
        (["A-R", "B-C"], ["A-B", "A-C", "B-R", "C-R"], "A=R≠B=C"),
        ([], ["A-B", "A-C", "B-C"], "A≠B≠C"),
        ([], ["A-R"], "A≠R"),
    ],
)
def test_agreement(equal, different, text):
    assert agreement({**{p: {"top1_equal": True} for p in equal}, **{p: {"top1_equal": False} for p in different}}) == text
