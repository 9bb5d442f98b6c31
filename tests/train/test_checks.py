"""The checks of a training run: what they let pass and what they catch."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4lab.events import StateHealth
from fp4lab.train import checks
from fp4lab.train.data import Sample

BETA = st.floats(0.0, 0.999)


@settings(max_examples=200, deadline=None)
@given(BETA, BETA, st.lists(st.floats(-1e3, 1e3).filter(lambda g: abs(g) > 1e-3), min_size=1, max_size=40))
def test_no_gradients_make_adam_pass_its_bound(beta1, beta2, gradients):
    m = v = 0.0
    for step, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = abs(m / (1 - beta1**step)) / math.sqrt(v / (1 - beta2**step))
        assert update <= checks.adam_bound(beta1, beta2, step) * (1 + 1e-6)


@pytest.mark.parametrize("step", [1, 2, 7, 50])
def test_the_bound_is_reached(step):
    """By gradients proportional to a_i / b_i, the case of equality in Cauchy-Schwarz."""
    beta1, beta2 = 0.9, 0.999
    m = v = 0.0
    for age in reversed(range(step)):
        g = (beta1 / beta2) ** age
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    update = (m / (1 - beta1**step)) / math.sqrt(v / (1 - beta2**step))
    assert update == pytest.approx(checks.adam_bound(beta1, beta2, step), rel=1e-6)


def test_bounds_at_the_edges():
    assert checks.adam_bound(0.9, 0.999, 1) == 1
    assert checks.adam_bound(0.9, 0.999, 100_000) == pytest.approx(7.27, abs=0.01)
    assert checks.adam_bound(0.0, 0.0, 5) == 1
    assert checks.adam_bound(0.99, 0.5, 10**6) == math.inf


def test_loss_bound():
    assert checks.loss_out_of_range(89.375, 151936) and not checks.loss_out_of_range(12.0, 151936)
    assert not checks.loss_out_of_range(math.log(4096), 4096)


def sample(source, targets, mask):
    return Sample(list(range(len(targets))), targets, mask, source)


def test_end_token_among_the_targets():
    taught, untaught = sample("a.tsv:1", [5, 9], [True, True]), sample("a.tsv:2", [5, 9], [True, False])
    assert checks.no_end_token([untaught, untaught], 9) and not checks.no_end_token([untaught, taught], 9)
    assert not checks.no_end_token([sample("a.txt:1", [5, 6], [True, True])], 9), "raw text has no turns"


def health(**fields):
    return StateHealth(step=2, **fields)


def test_each_topic_of_a_step():
    def said(lr=1e-3, **fields):
        return set(checks.optimizer_step(health(**fields), lr, 0.9, 0.999))

    assert said(max_update_over_lr=1.0, update_kept=1.0, code_changed=0.1) == set()
    assert said() == set(), "unknown is no fault"
    assert said(max_update_over_lr=11.0) == {"moments"} == said(max_update_over_lr=math.nan)
    assert said(update_kept=0.0) == {"inertia"}
    assert said(lr=0.0, code_changed=0.1) == {"requantised"}
    assert said(lr=0.0, code_changed=0.0) == set()
