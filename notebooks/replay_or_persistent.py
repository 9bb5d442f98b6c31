# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]

# %% [markdown]
# # Replay against a persistent cache
#
# **What happened.** The log's chat had a mode without a cache, one with a cache per call and one with a cache per
# conversation. They were compared by reading the answers, and looked alike. They were not: behind a cache the log's prefill
# had no causal mask, so from the second turn on tokens saw their own future. This notebook asks what a cache may change
# (time and memory), what it may not (a single number), and which record would have caught the difference. Eight turns of
# the shipped model, made here.

# %%
import tempfile
from pathlib import Path

import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import BLUE, GREY, ORANGE, RED, options, records

common.style()
COLOURS = {"replay": GREY, "prefill": ORANGE, "persistent": BLUE}
TALK = [
    "task=chat",
    "backend=fp2",
    "backend.eval_cache=true",
    "task.turns=8",
    "task.max_tokens=32",
    "task.ignore_eos=true",
    "task.on_collapse=flag",
    "prompt=who are you",
]
with tempfile.TemporaryDirectory() as folder:
    runs = common.sweep(Path(folder), *TALK, "kvc=replay,prefill,persistent")
    turns = {options(run)["kvc"]: records(run, "turn") for run in runs}
pd.DataFrame({name: t.text.str.slice(0, 34) for name, t in turns.items()})

# %% [markdown]
# ## The same tokens
#
# A policy decides what is computed again, so it must not decide what comes out. Ids are equal, token by token, in all
# turns; the mean negative log likelihood of the answers, which sees what an argmax hides, agrees to rounding.

# %%
reference = turns["replay"]
for name, t in turns.items():
    same = [a == b for a, b in zip(t.ids, reference.ids, strict=True)]
    off = (t.nll - reference.nll).abs().max()
    print(f"{name:<11} ids equal in {sum(same)} of {len(same)} turns, nll off by at most {off:.1e}")
    assert all(same) and off < 1e-4

# %% [markdown]
# ## What each encodes
#
# Replay runs the whole context through the model for every token. `prefill` does so once a turn, `persistent` never: it
# encodes what is new. So the time to the first token grows with the history for two of them, and each further token for
# one.

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5))
for name, t in turns.items():
    left.plot(t.context_tokens, t.first_token_ms, "o-", color=COLOURS[name], label=name)
    middle.plot(t.context_tokens, t.ms_per_token, "o-", color=COLOURS[name], label=name)
left.set(title="First token", xlabel="context after the turn, tokens", ylabel="ms", ylim=(0, None))
middle.set(title="Each token after it", xlabel="context after the turn, tokens", ylabel="ms", ylim=(0, None))
left.legend()
answered = reference.ids.str.len().to_numpy()
new, context = reference.prompt_tokens.to_numpy(), reference.context_tokens.to_numpy()
start = context - answered - 2  # the closing tokens are not in an answer
passes = {
    "replay": np.cumsum([sum(s + k for k in range(n)) for s, n in zip(start, answered, strict=True)]),
    "prefill": np.cumsum(start + answered),
    "persistent": np.cumsum(new + answered + 2),
}
for name, count in passes.items():
    right.semilogy(range(1, len(count) + 1), count, "o-", color=COLOURS[name], label=name)
right.set(title="Positions through the model, in all", xlabel="turn", ylabel="positions")
print({name: int(count[-1]) for name, count in passes.items()})

# %% [markdown]
# The right picture is arithmetic: after eight turns replay has computed 130 times as many positions as the persistent
# cache. The times are ten times apart and more at the end: a forward of one token costs nearly as much as one of fifty,
# since both are mostly launching. The first token of the first turn is slow for all three, because path B decodes its
# weights into a cache then; so it was in the log (4.1 s, then 0.54), and it is no matter of the policy. On an H200 with
# Qwen3-4B all three policies take the same time at this length ([benchmarks](../doc/benchmarks.md)): a cache pays by
# context, not by principle.

# %% [markdown]
# ## What it holds
#
# Keys and values of every layer, and nothing else grows. The invariant that the log asked for (27, 47, 67 tokens after its
# three turns) is checked in every turn: cache length = context = what the chat template gives for the same conversation.

# %%
t = turns["persistent"]
assert (t.cache_len == t.context_tokens).all()
t[["n", "prompt_tokens", "context_tokens", "cache_len", "template_tokens", "canonical", "cache_mib"]]

# %% [markdown]
# `canonical` may be false for a good reason: the context goes on from the ids that were generated, and a model may spell a
# word in other pieces than the tokenizer would. The log encoded the decoded text again each turn, which then is another
# context.

# %% [markdown]
# ## The incident
#
# Now with the log's mask: none, for a prefill behind a cache. The first turn has nothing behind it and is right. From the
# second on the numbers part; the answers are the same for a while, which is why nobody saw it. `replay` has no such prefill
# and does not change by a digit: a sweep over the policy is the test.

# %%
with tempfile.TemporaryDirectory() as folder:
    changes = ["quirk.no_offset_mask=true", "kvc=replay,persistent"]
    wrong = {options(run)["kvc"]: records(run, "turn") for run in common.sweep(Path(folder), *TALK, *changes)}

fig, axis = plt.subplots()
for name, t, mark, colour in (
    ("persistent, no mask", wrong["persistent"], "s-", RED),
    ("persistent", turns["persistent"], "o-", BLUE),
    ("prefill", turns["prefill"], "^-", ORANGE),
):
    axis.semilogy(t.n + 1, np.maximum((t.nll - reference.nll).abs(), 1e-9), mark, color=colour, label=name)
axis.axhline(1e-4, color=GREY, ls="--", lw=1)
axis.text(1, 1.4e-4, "what rounding may do", color=GREY, fontsize=9)
axis.set(title="Negative log likelihood of the answers, distance from replay", xlabel="turn", ylabel="nats")
axis.legend(loc="center right", bbox_to_anchor=(1, 0.38))
off = (wrong["persistent"].nll - reference.nll).abs()
parted = [i + 1 for i, (a, b) in enumerate(zip(wrong["persistent"].ids, reference.ids, strict=True)) if a != b]
print(f"turn 1 off by {off[0]:.1e}, turn 2 by {off[1]:.1e}; ids first differ in turn {parted[0] if parted else 'none'}")
assert off[0] < 1e-4 < off[1:].max() and (wrong["replay"].nll - reference.nll).abs().max() < 1e-4

# %% [markdown]
# ## What we keep from it
#
# - **A policy is a performance choice.** Anything else it changes is a fault, and `kvc=replay,persistent` is the test for
#   it.
# - **Compare numbers, not answers.** The likelihood moved in turn 2, the first token of the text in turn 8.
# - **State what a cache holds as an equation** and check it every turn: cache length = context tokens.
# - **Measure before choosing.** Where a token is bound by launching kernels the three policies cost the same.
