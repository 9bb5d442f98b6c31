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
# # Why nothing moved at small learning rates
#
# **What happened.** For three days the log trained Qwen3-4B to say one sentence about itself. At rates of 1e-5 to 3e-4 the
# loss came down and the model answered as before; at 1e-3, or with the head's gradient multiplied, it came apart within
# steps. The log called the first "weight inertia" and looked for it in the data. Both are arithmetic of the number format:
# a weight that is only its 4-bit code cannot take a small step, and a second moment that is only its 4-bit code underflows.
# This notebook shows the two, apart and then together, and what makes a model learn that has no other weights than codes.

# %%
import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, options, records
from torch import nn

from fp4lab.checkpoint import open_weights
from fp4lab.nvfp4 import pack, unpack
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.checks import adam_bound
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.state import Moment

common.style()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. What the records say
#
# Three steps of the shipped model at a low and a high rate of the log, gradients clipped to 0.5 as there (stored runs of
# `+experiment=devlog_lr`). The loss falls in every row. But with weights rounded to nearest (`packed`, the log's) the share
# of stored codes that moved is zero, not small: zero, at 1e-3 too. What learned were norms and embedding, which are kept in
# fp32 here; the log's exports did not contain them.


# %%
def row(run):
    o, health, losses = options(run), records(run, "state_health").iloc[-1], records(run, "loss")
    first, last = losses[losses.split == "train"].loss.iloc[0], losses[losses.split == "eval"].loss.iloc[-1]
    return {
        "master": o["step.master"],
        "moments": o["step.state"],
        "lr": float(o["lr"]),
        "loss before": first,
        "after": last,
        "codes moved": health.code_changed,
        "update kept": health.update_kept,
        "m blocks at scale 0": health.zero_scale.get("m"),
        "v blocks at scale 0": health.zero_scale.get("v"),
    }


seen = pd.DataFrame([row(run) for run in sorted((common.STORED / "lr").iterdir(), key=lambda p: int(p.name))])
packed = seen[seen.master == "packed"]
assert (packed["codes moved"] == 0).all() and (packed["after"] < packed["loss before"]).all()
seen.sort_values(["master", "moments", "lr"]).round(5)

# %% [markdown]
# ## 2. A lost update
#
# AdamW's first steps move each weight by about lr. A weight in NVFP4 lies on a grid whose spacing is the block's scale
# times 0.5, 1 or 2; rounding to nearest takes it back unless the step passes half of that. The grid of the shipped model's
# own weights, against the rates of the log:

# %%
file = open_weights("dat", "models/tiny/model.dat")
names = [n for n in file.names() if "_proj" in n]
scales, codes = [], []
for name in names:
    p = file.get(name)
    code = torch.stack([p.codes & 7, (p.codes >> 4) & 7], dim=-1).flatten(1)
    scales.append(p.block_scale.float().repeat_interleave(16, dim=1)[:, : code.shape[1]].flatten())
    codes.append(code.flatten())
scale, code = torch.cat(scales), torch.cat(codes).long()
up = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, torch.inf])[code]  # half way to the next larger code
down = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0])[code]
nearest = (torch.minimum(up, down) * scale).numpy()

fig, axis = plt.subplots()
grid = np.geomspace(1e-6, 1e-1, 200)
axis.plot(grid, [(nearest < step).mean() for step in grid], color=BLUE)
for lr, colour in ((1e-5, GREEN), (8e-5, ORANGE), (1e-3, RED)):
    axis.axvline(lr, color=colour, ls="--", lw=1)
    axis.text(lr * 1.1, 0.93, f"lr {lr:g}", color=colour)
axis.set(
    xscale="log",
    xlabel="size of the step",
    ylabel="share of weights",
    title="Weights whose code a step of this size can change",
)
print(f"smallest step that changes any code: {nearest.min():.1e}; half of all weights need {np.median(nearest):.1e}")

# %% [markdown]
# The smallest scale of these files is 2^-6, so the smallest half-step is 2^-8 = 0.0039: four times the highest rate the log
# tried, and four hundred times its lowest. And since each step begins at the stored code, not at where the last one wanted
# to be, a hundred small steps are no better than one. (Qwen3-4B's blocks lie at the same smallest scale in great part: its
# weights are small.)
#
# Rounding stochastically, up with the probability of the distance, a step of 0.0001 moves one weight in eighty by a whole
# code and the rest by nothing, and is right on average:


# %%
def drift(master: str, lr: float, steps: int) -> np.ndarray:
    """The mean of 4096 weights under a constant pull of lr a step."""
    torch.manual_seed(0)
    stored = pack(torch.randn(64, 64) * 0.02, "torchao", "single")
    weight = nn.Parameter(unpack(stored))
    start = unpack(stored).mean().item()
    options = AdamWOptions(chunk_rows=64, state="fp32", master=master, keep_high_precision=())
    optimizer, means = ChunkedAdamW({"w": weight}, {"w": stored}, options), [0.0]
    for _ in range(steps):
        weight.grad = -torch.ones_like(weight)
        optimizer.step(lr)
        means.append(unpack(optimizer.stored()["w"]).mean().item() - start)
    return np.array(means)


fig, axes = plt.subplots(1, 2)
for axis, lr in zip(axes, (1e-4, 1e-3), strict=True):
    steps = np.arange(41)
    axis.plot(steps, lr * steps, color=GREY, lw=4, alpha=0.4, label="wanted")
    axis.plot(steps, drift("packed", lr, 40), color=RED, label="packed, nearest")
    axis.plot(steps, drift("packed_stochastic", lr, 40), color=BLUE, label="packed, stochastic")
    axis.set(title=f"Mean weight, lr {lr:g}", xlabel="step")
_ = axes[0].legend()

# %% [markdown]
# `update_kept` in every run's records is the slope of this: the change made, regressed on the change wanted. 0 is inertia,
# 1 is right on average. `update_lost`, the share of updates that left the stored value as it was, cannot tell them apart
# (1.0 and 0.99): most updates are lost either way, but those that are not are large enough to make up for it.

# %% [markdown]
# ## 3. A moment that underflows
#
# v is 0.001 g² after the first step. Packed with block scales alone it needs a scale of v / 6 in E4M3, and below 2^-10 that
# rounds to 0: the block is gone unless |g| was above 2.4. m = 0.1 g survives from 0.06 on. Between the two, the update is m
# / (0 + eps).


# %%
def survives(format: str, root: bool, value) -> np.ndarray:
    """The share of a block of equal moments that is still there after storing it, in a row beside a block of gradient 1.

    Where storing is a matter of chance, the mean of 40 rows.
    """
    kept, draws = [], 40
    for g in gradients:
        moment = Moment(draws, 32, format, root, "cpu", 0.999 if root else 0.9)
        true = torch.cat([torch.full((draws, 16), value(g)), torch.full((draws, 16), value(1.0))], dim=1)
        noise = torch.rand(2, draws, 2, generator=torch.Generator().manual_seed(0))
        moment.write(0, draws, true, torch.full((draws, 1), max(float(g), 1.0)), tuple(noise))
        kept.append((moment.read(0, draws) / true)[:, :16].mean().item())
    return np.array(kept)


gradients = np.geomspace(1e-4, 1e2, 120)
fig, (left, right) = plt.subplots(1, 2)
left.semilogx(gradients, survives("nvfp4", False, lambda g: 0.1 * g), color=BLUE, label="m = 0.1 g")
left.semilogx(gradients, survives("nvfp4", True, lambda g: 0.001 * g * g), color=RED, label="v = 0.001 g²")
left.axvspan(0.06, 2.4, color=ORANGE, alpha=0.15)
left.text(0.075, 0.5, "m without v", color=ORANGE)
left.set(title="Kept, block scales alone (the log's)", xlabel="|g|", ylabel="stored / true", ylim=(-0.05, 1.4))
left.legend(loc="upper left")
right.semilogx(gradients, survives("nvfp4_two_level", False, lambda g: 0.1 * g), color=BLUE, label="m")
right.semilogx(gradients, survives("nvfp4_two_level", True, lambda g: 0.001 * g * g), color=RED, label="v, as its square root")
_ = right.set(title="Kept, a scale a row on top", xlabel="|g|", ylim=(-0.05, 1.4))

# %% [markdown]
# Gradients that change in size from step to step then do what the log saw with a multiplier on the head: the update, in
# units of lr, for random gradients whose size alternates between 0.3 and 0.0003. Exact moments cannot pass the grey line,
# whatever the gradients (Cauchy-Schwarz, `train/checks.py`).


# %%
def updates(state: str, steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 64))
    options = AdamWOptions(chunk_rows=16, state=state, master="fp32", keep_high_precision=())
    optimizer = ChunkedAdamW({"w": weight}, {}, options)
    found = []
    for step in range(steps):
        weight.grad = torch.randn(16, 64) * (0.3 if step % 2 == 0 else 0.0003)
        found.append(optimizer.step(1e-9).max_update_over_lr)
    return found


fig, axis = plt.subplots()
steps = range(1, 13)
for state, colour in (("nvfp4", RED), ("int8", ORANGE), ("nvfp4_two_level", BLUE), ("fp32", GREEN)):
    axis.semilogy(steps, updates(state), "o-", ms=4, color=colour, label=state)
axis.semilogy(steps, [adam_bound(0.9, 0.999, t) for t in steps], color=GREY, lw=1, ls="--", label="bound of exact moments")
axis.set(title="Largest |update| / lr, gradients of alternating size", xlabel="step", ylabel="|update| / lr", ylim=(0.3, 3e9))
axis.legend(ncols=3, fontsize=9, loc="upper left")
worst = max(updates("nvfp4"))
assert worst > 1e5 and max(updates("nvfp4_two_level")) < 20
print(f"block scales alone: up to {worst:.0e} lr")

# %% [markdown]
# So the log stood between two walls. With gradients clipped small, both moments are zero (the table in 1: every block of m
# and v at scale 0) and each step is the sign of its own gradient, times lr, lost in rounding. With larger gradients m lives
# and v does not, and a step is millions of lr. No learning rate lies between.

# %% [markdown]
# ## 4. Together: does it learn?
#
# A matrix of 64 x 64 to be found from noisy examples, 400 steps at lr 1e-3, with the stored state of each choice and
# nothing else. The yardstick has fp32 everywhere.


# %%
def learn(state: str, master: str, steps: int = 400, lr: float = 1e-3) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(64, 64, generator=generator) * 0.05
    stored = pack(torch.randn(64, 64, generator=generator) * 0.02, "nearest", "row")
    weight = nn.Parameter(unpack(stored))
    options = AdamWOptions(chunk_rows=64, state=state, master=master, keep_high_precision=())
    optimizer, losses = ChunkedAdamW({"w": weight}, {"w": stored}, options), []
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        loss = nn.functional.mse_loss(x @ weight.T, x @ target.T)
        (weight.grad,) = torch.autograd.grad(loss, weight)
        optimizer.step(lr)
        losses.append(loss.item())
    return losses


CHOICES = {
    "fp32 weights and moments": ("fp32", "fp32", GREY),
    "packed to nearest, fp32 moments": ("fp32", "packed", ORANGE),
    "packed to nearest, single-level moments (the log's)": ("nvfp4", "packed", RED),
    "fp32 weights, single-level moments": ("nvfp4", "fp32", PURPLE),
    "packed stochastic, two-level moments": ("nvfp4_two_level", "packed_stochastic", BLUE),
}
fig, axis = plt.subplots(figsize=(9, 4))
for name, (state, master, colour) in CHOICES.items():
    smooth = pd.Series(learn(state, master)).ewm(span=15).mean()
    axis.semilogy(smooth, color=colour, label=f"{name}: {smooth.iloc[-1]:.4f}")
axis.set(title="Loss", xlabel="step", ylabel="mean squared error")
_ = axis.legend(fontsize=9)

# %% [markdown]
# A toy, and shown as one: what it proves is the mechanism, not the quality of any choice on a language model. Single-level
# moments do no harm in it, because its gradients are so small that both are zero: what is left is the sign of each
# gradient, which is enough for so simple a loss. What becomes of them with larger gradients is above, and on the shipped
# model in `doc/incidents.md`, 8.
#
# ## What we keep from it
#
# - **Count codes, not losses.** A loss can fall on norms and embedding alone. `code_changed` and `update_kept` are in every
#   step's record, and the note `inertia` says it in words.
# - **A format is part of the optimizer.** The learning rate of a packed weight has a smallest useful value, and it is the
#   grid's.
# - **Round stochastically, or keep a master.** The first costs nothing to store.
# - **v must not underflow.** Keep its root, with a scale a row, and never read a zero beside a moment that is not.
