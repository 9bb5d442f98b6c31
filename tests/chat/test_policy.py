"""Every KV policy gives the same greedy tokens as the others and as transformers, over random conversations."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SHAPES, dequantised_hf, hf_model, shape_of, store_of, weights_of

from fp4lab.chat.generate import generate, greedy
from fp4lab.chat.policy import POLICIES, Persistent, Prefill, Replay
from fp4lab.chat.sampling import Sampler
from fp4lab.model.paths import bridge_model, fp2_model, noste_model, reference_model

CLOSE = [7, 8]
STOPS = {7, 11, 23}


@functools.cache
def models(name):
    """Our four paths with the model of transformers that each must equal."""
    store = store_of(shape_of(name), weights_of(hf_model(name)))
    packed = dequantised_hf(name, store)
    return {
        "bridge": (bridge_model(store, torch.float32), packed),
        "fp2": (fp2_model(store, torch.float32, None), packed),
        "fp2 cached": (fp2_model(store, torch.float32, None, eval_cache=True), packed),
        "noste": (noste_model(store, torch.float32), packed),
        "dense": (reference_model(store, torch.float32), hf_model(name)),
    }


def policies(path):
    return {
        "replay": Replay(path, "cpu"),
        "prefill whole": Prefill(path, "cpu"),
        "prefill token": Prefill(path, "cpu", token_by_token=True),
        "persistent whole": Persistent(path, "cpu", capacity=64),
        "persistent token, growing": Persistent(path, "cpu", token_by_token=True),
    }


def theirs(model, context, max_tokens):
    """transformers' generate: the ids without the stop."""
    ids = torch.tensor([context])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(STOPS),
        pad_token_id=0,
    )[0, len(context) :].tolist()
    return out[:-1] if out and out[-1] in STOPS else out


turn = st.lists(st.integers(0, 95), min_size=1, max_size=9)
conversation = st.lists(st.tuples(turn, st.integers(1, 6)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(turns=conversation, path=st.sampled_from(["bridge", "fp2", "fp2 cached", "noste", "dense"]))
def test_all_policies_answer_like_transformers(name, turns, path):
    ours, oracle = models(name)[path]
    running = policies(ours)
    context: list[int] = []
    for new, max_tokens in turns:
        context = context + new
        expected = theirs(oracle, context, max_tokens)
        for kind, policy in running.items():
            answer = generate(policy, new, max_tokens=max_tokens, stops=STOPS, pick=Sampler(), close=CLOSE)
            assert answer.ids == expected, kind
            assert answer.finish == ("length" if len(expected) == max_tokens else "stop")
            assert policy.context == context + expected + CLOSE
            if isinstance(policy, Persistent):
                assert policy.cache_len == policy.most_cached == len(policy.context)
            elif isinstance(policy, Prefill):
                assert policy.cache is None and policy.most_cached == len(context) + max(len(answer.token_ms) - 1, 0)
            else:
                assert policy.most_cached == policy.cache_bytes == 0
        context = context + expected + CLOSE
    assert greedy(ours, context, 4, STOPS, "cpu") == theirs(oracle, context, 4)


class Counting:
    """Counts the tokens that a path encodes."""

    def __init__(self, path):
        self.path, self.encoded = path, 0

    def hidden(self, ids, cache=None):
        self.encoded += ids.shape[1]
        return self.path.hidden(ids, cache)

    def __getattr__(self, name):
        return getattr(self.path, name)


@pytest.mark.parametrize(
    "kind, expected", [("replay", [4 + 5 + 6, 12 + 13 + 14]), ("prefill", [6, 14]), ("persistent", [9, 8])]
)
def test_what_each_policy_encodes(kind, expected):
    """persistent encodes what is new (turn, answer, close); prefill the context again; replay all of it for every token."""
    # replay: 4 + 5 + 6, then 12 + 13 + 14
    path = Counting(models("untied, 4 groups")["noste"][0])
    policy = POLICIES[kind](path, "cpu")
    for new, count in zip(([1, 2, 3, 4], [5, 6, 9]), expected, strict=True):
        path.encoded = 0
        generate(policy, new, max_tokens=3, stops=set(), pick=Sampler(), close=CLOSE)
        assert path.encoded == count


def test_a_cache_is_as_large_as_it_must_be():
    path = models("untied, 4 groups")["noste"][0]
    kept = Persistent(path, "cpu", capacity=30)
    growing = Persistent(path, "cpu")
    for policy, sizes in ((kept, (30, 30)), (growing, (9, 18))):
        for size in sizes:
            generate(policy, [1, 2, 3, 4], max_tokens=3, stops=set(), pick=Sampler(), close=CLOSE)
            assert policy.cache.capacity == size
    assert kept.cache_bytes == 2 * 4 * 30 * 2 * 2 * 16  # k and v, fp32, tokens, layers, heads, head_dim


def test_an_answer_ends_when_no_position_is_left_and_when_its_time_is_up():
    path = models("untied, 4 groups")["noste"][0]
    for policy in policies(path).values():
        answer = generate(policy, [1, 2, 3], max_tokens=50, stops=set(), pick=Sampler(), close=CLOSE, max_context=10)
        assert answer.finish == "full" and len(policy.context) == 10
    answer = generate(Replay(path, "cpu"), [1, 2, 3], max_tokens=50, stops=set(), pick=Sampler(), close=CLOSE, turn_s=1e-9)
    assert answer.finish == "time" and len(answer.ids) == 1


def test_logits_that_are_not_finite_are_noticed_at_their_token():
    class Broken(Counting):
        def logits(self, hidden):
            out = self.path.logits(hidden)
            return out if self.encoded < 6 else out * torch.nan

    path = Broken(models("untied, 4 groups")["noste"][0])
    answer = generate(Prefill(path, "cpu"), [1, 2, 3, 4], max_tokens=6, stops=set(), pick=Sampler(), close=CLOSE)
    assert answer.bad_logits_at == 2
    assert answer.ids[2:] == [0, 0, 0, 0], "the reference's !!!!"


def test_the_answers_likelihood_is_that_of_a_forward_over_it():
    path = models("untied, 4 groups")["noste"][0]
    new = [1, 2, 3, 4]
    answer = generate(Prefill(path, "cpu"), new, max_tokens=5, stops=set(), pick=Sampler(), close=CLOSE)
    with torch.no_grad():
        logits = path.logits(path.hidden(torch.tensor([new + answer.ids])))[0]
    expected = torch.nn.functional.cross_entropy(logits[3:-1], torch.tensor(answer.ids))
    assert answer.nll == pytest.approx(float(expected), rel=1e-4)
