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
# # The answer was `!!!!`
#
# **What happened.** On 24 February the log's training graph (path B) answered every prompt with `!!!!`. The inference path
# (A) and the block graph over A's weights (C) were well. It took a day. This is how the same day reads when every run keeps
# records: from the symptom to the cause without a debugger, in two runs of the shipped model whose records are in
# `experiments/results`.
#
# | run | | command |
# |---|---|---|
# | 0 | the incident | `python run.py task=compare dtype=float16 quirk.scale_bytes_undecoded=true` |
# | 1 | as it should be | `python run.py task=compare dtype=float16` |

# %%
import tempfile
from pathlib import Path

import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import BLUE, GREEN, GREY, ORANGE, RED, records

from fp4lab.checkpoint import open_weights

common.style()
broken, sound = (common.STORED / f"first_token/{n}" for n in (0, 1))
{run.name: common.options(run)["quirk.scale_bytes_undecoded"] for run in (broken, sound)}

# %% [markdown]
# ## 1. The symptom
#
# The first token of each path. B's list is punctuation with the lowest ids of the vocabulary, each at minus infinity: not
# an opinion but what a sort leaves when nothing can be compared. The log saw the same, and id 0 is "!".

# %%
tokens = records(broken, "first_token")
pd.DataFrame({row.path: [f"{text!r} {logit:.1f}" for _, logit, text in row.top10[:5]] for row in tokens.itertuples()})

# %% [markdown]
# ## 2. Which path, and is it a number at all?
#
# Three counters settle what kind of fault it is. All 256 hidden values and all 4096 logits of B are not a number; A and C
# have none. So it is no matter of sampling, template or tokenizer: those are shared.

# %%
tokens.set_index("path")[["hidden_nan", "hidden_inf", "logits_nan", "logits_inf"]]

# %% [markdown]
# A equals C: their weights and the graph are right. What only B has is its weights' way through dequantisation. That is the
# log's rule of interpretation, and here a column: `fault` is set where a pair is further apart than rounding explains.

# %%
pairs = records(broken, "first_token_diff").set_index("pair")
pairs[["top1_equal", "kl", "expected_kl", "fault", "first_divergent_layer", "why"]]

# %% [markdown]
# ## 3. Where does it begin?
#
# In layer 0. In fp16 there is nothing to see there but "not a number", so the same two runs once more in fp32, which holds
# larger values. Everything is finite now, and it is plain that precision was never the problem: B is not slightly off, it
# computes something else from the first layer on. A check for finite values would have passed this run.

# %%
with tempfile.TemporaryDirectory() as folder:
    wide = common.sweep(Path(folder), "task=compare", "dtype=float32", "quirk.scale_bytes_undecoded=true,false")
    layers = [records(run, "layer_diff") for run in wide]
    finite = records(wide[0], "first_token").logits_nan.sum() == 0
    kl = records(wide[0], "first_token_diff").set_index("pair").kl

fig, (left, right) = plt.subplots(1, 2)
ab = layers[0][layers[0].pair == "A-B"]
left.semilogy(ab.layer, ab.max_abs_a, "o-", color=BLUE, label="A")
left.semilogy(ab.layer, ab.max_abs_b, "s-", color=RED, label="B, scale bytes undecoded")
left.axhline(65504, color=GREY, ls="--", lw=1)
left.text(0, 1.2e5, "largest fp16 number", color=GREY, fontsize=9)
left.set(title="Largest hidden value, fp32", xlabel="layer", ylabel="|x|")
left.legend(loc="upper right", bbox_to_anchor=(1, 0.86))
for pair, colour, line in (("A-B", RED, "o-"), ("B-C", ORANGE, "s:"), ("A-C", BLUE, "o-")):
    of = layers[0][layers[0].pair == pair]
    right.semilogy(of.layer, np.maximum(of.relative_error, 1e-9), line, color=colour, label=pair)
right.semilogy(ab.layer, ab.expected, "--", color=GREY, lw=1, label="explained by rounding")
right.set(title="Difference of two paths (0 drawn at 1e-9)", xlabel="layer", ylabel="|a - b| / smaller")
right.legend()
print(f"all logits of B finite in fp32: {finite}; KL(A, B) = {kl['A-B']:.1f} nats, KL(A, C) = {kl['A-C']:.1e}")

# %% [markdown]
# The layer's parts are compared in the order they are computed, and the first that is apart is named:

# %%
first = records(broken, "layer_diff")
first[first.part.notna()][["pair", "layer", "part", "nonfinite_a", "nonfinite_b"]]

# %% [markdown]
# `q`, the first linear of the model. Its input is the embedding, the same in all paths. So the weights are wrong before
# anything was computed.

# %% [markdown]
# ## 4. The weights
#
# `weight_diff` holds what B multiplies by against what is stored. The stored weights of every linear stay below 1; B's
# reach 126. And the error is nearly the same everywhere, some 510 times the stored norm. A broken tensor would be wrong in
# its own way; a factor that all share is a unit.

# %%
weights = records(broken, "weight_diff")
fig, axis = plt.subplots(figsize=(9, 3.2))
axis.semilogy(weights.index, weights.max_abs_stored, "o", ms=4, color=BLUE, label="stored")
axis.semilogy(weights.index, weights.max_abs_b, "s", ms=4, color=RED, label="what B multiplies by")
axis.set(title="Largest weight of each linear", xlabel="linear, in the order of the model", ylabel="|w|")
axis.legend()
print(f"relative error: {weights.relative_error.min():.0f} to {weights.relative_error.max():.0f} times the stored norm")

# %% [markdown]
# ## 5. The cause
#
# A weight is code x block scale, the scale one byte of E4M3. The loader handed the bytes on as `uint8`; the kernel paths
# reinterpret them, path B multiplied by them. The picture has both readings of every byte. Below 16 the bytes of E4M3 are
# linear, byte x 2^-9, and that is where nearly all scales of this file lie: the factor that all share is 512.

# %%
byte = torch.arange(0, 127, dtype=torch.uint8)
decoded = byte.view(torch.float8_e4m3fn).float().numpy()
file = open_weights("dat", "models/tiny/model.dat")
seen = torch.cat([file.get(name).block_scale.view(torch.uint8).flatten() for name in weights.name])
fig, (left, right) = plt.subplots(1, 2)
left.semilogy(byte, decoded, color=BLUE, label="E4M3, what it means")
left.semilogy(byte, np.maximum(byte.numpy(), 0.5), color=RED, label="integer, what B read")
left.set(title="One byte, two readings", xlabel="byte", ylabel="scale")
left.legend()
right.hist(seen.numpy(), bins=np.arange(0, 64), color=GREEN)
right.set(title="Scale bytes of the shipped model", xlabel="byte", ylabel="blocks", yscale="log")
typical = int(seen.float().median())
print(
    f"median byte {typical}: means {decoded[typical]:.4f}, read as {typical}: {typical / decoded[typical]:.0f} times too large"
)

# %% [markdown]
# ## 6. After the fix
#
# B equals A and C, to the bit. The log's B stayed near and apart after its fix (top-1 "Hello" where A said "Hi"): two more
# differences were left in it, another rope theta and another quantiser ([incidents](../doc/incidents.md), 2 and 4).

# %%
assert records(sound, "first_token_diff").kl.eq(0).all()
records(sound, "first_token_diff").set_index("pair")[["top1_equal", "kl", "max_abs_logit", "fault"]]

# %% [markdown]
# ## What we keep from it
#
# - **A scale has a type.** Block scales are `float8_e4m3fn` from the file on; a multiplication with a byte is an error of
#   types.
# - **Paths are compared in every run**, whatever it is about; a fault names the pair, the layer and the part.
# - **Finite is not right.** In fp32 this incident is finite, and thousands of nats away. The check is the distance from
#   another path.
# - **Weights are compared before activations.** Four records would have been enough: `weight_diff` of the first linear
#   alone.
