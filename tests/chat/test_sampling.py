"""Sampling: the nucleus against its definition and against transformers, seeds, values that are not finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4lab.chat.sampling import Sampler, nucleus
from fp4lab.errors import Collapsed

probabilities = (
    st.lists(st.integers(0, 1000), min_size=1, max_size=12)
    .filter(any)
    .map(lambda x: torch.tensor(x, dtype=torch.float64) / sum(x))
)
shares = st.floats(0.001, 1.0)


@given(probabilities, shares)
def test_the_nucleus_is_the_smallest_likely_set_and_never_empty(p, top_p):
    kept = nucleus(p, top_p)
    members = kept > 0
    assert float(kept.sum()) == pytest.approx(1.0)
    size, mass = int(members.sum()), float(p[members].sum())
    assert size >= 1 and mass >= min(top_p, 1.0) - 1e-9
    ordered = p.sort(descending=True).values
    assert float(ordered[: size - 1].sum()) < top_p + 1e-9, "one token fewer would not do"
    assert mass == pytest.approx(float(ordered[:size].sum())), "they are the likeliest"
    torch.testing.assert_close(kept[members], p[members] / p[members].sum())


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=3, max_size=12, unique=True), st.floats(0.05, 0.99))
def test_the_nucleus_is_that_of_transformers(logits, top_p):
    warper = pytest.importorskip("transformers").TopPLogitsWarper(top_p)
    x = torch.tensor([logits]) / 5
    expected = warper(None, x)[0].softmax(0)
    torch.testing.assert_close(nucleus(x[0].softmax(0), top_p), expected, atol=1e-6, rtol=1e-5)


def test_the_references_nucleus_can_empty():
    p = torch.tensor([0.7, 0.2, 0.1])
    assert nucleus(p, 0.5).tolist() == [1, 0, 0]
    with pytest.raises(Collapsed, match=r"top_p=0.5 left no token.*0\.7"):
        nucleus(p, 0.5, can_empty=True)


def draws(sampler, turn, count=20):
    sampler.start_turn(turn)
    logits = torch.linspace(0, 1, 50)
    return [sampler(logits) for _ in range(count)]


def test_a_turns_draws_depend_on_seed_and_turn_alone():
    one, other = Sampler(1.0, seed=5), Sampler(1.0, seed=5)
    draws(other, 0, 3)
    assert draws(one, 1) == draws(other, 1)
    assert draws(one, 1) != draws(one, 2)
    assert draws(one, 1) != draws(Sampler(1.0, seed=6), 1)


def test_draws_follow_the_distribution():
    sampler = Sampler(2.0, top_p=0.9, seed=1)
    sampler.start_turn(0)
    logits = torch.tensor([2.0, 0.0, 1.0, -9.0])
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=4) / 4000
    expected = nucleus((logits / 2).softmax(0), 0.9)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_values_that_are_not_finite_are_impossible(temperature):
    sampler = Sampler(temperature)
    sampler.start_turn(0)
    assert sampler(torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf])) == 2
    assert sampler(torch.full((5,), torch.nan)) == 0
