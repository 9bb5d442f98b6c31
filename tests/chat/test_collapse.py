"""Signs of a collapsed answer."""

from hypothesis import given
from hypothesis import strategies as st

from fp4lab.chat.collapse import repetition, signs


def test_repetition_is_the_share_of_grams_seen_before():
    assert repetition(list(range(40))) == 0
    assert repetition([5] * 24) == 1 - 1 / 21
    assert repetition([1, 2] * 12) == 1 - 2 / 21
    assert repetition([5] * 10) == 0, "too short to say"


@given(st.lists(st.integers(0, 9), max_size=40))
def test_repetition_is_a_share(ids):
    assert 0 <= repetition(ids) < 1


def test_signs_are_told_in_words():
    fine = list(range(20))
    assert signs("all is well!!!", fine, None, 0.8) == []
    assert signs("a!!!!b", fine, None, 0.8) == ["the answer has !!!!"]
    assert signs("x", fine, 3, 0.8) == ["logits of token 3 are not finite"]
    assert signs("x", [1] * 24, None, 0.8) == ["95% of its 4-grams are repeated"]
    assert signs("x", [1] * 24, None, None) == []
