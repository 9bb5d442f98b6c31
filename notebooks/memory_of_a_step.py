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
# # Where the memory of a training step goes
#
# **What happened.** One full AdamW step of Qwen3-4B took the log to 117 GiB of a 128 GB machine, and most attempts were
# killed. The tensors that such a step cannot do without are 6.4 GiB: four billion weights and two moments, 4.5 bits each.
# This notebook walks from one to the other, a decision at a time. Bars are `train/estimate.py`, the arithmetic by which
# every run is checked before it starts; where there is a measurement it stands beside it. No GPU is needed to follow.

# %%
import common
import matplotlib.pyplot as plt
import pandas as pd
from common import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from hydra import compose, initialize_config_dir

from fp4lab import config
from fp4lab.analysis.devlog import log_rows
from fp4lab.model.config import Qwen3Config
from fp4lab.train.estimate import PHASES, estimate

common.style()
CONTEXT_MIB = 527.0  # CUDA context and torch's kernels, measured on an H200
config.register()


def need(*overrides: str):
    """The estimate of one step of Qwen3-4B at seq_len 8, bf16, on a GPU."""
    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        composed = compose("config", overrides=["model=qwen3_4b", "weights=random", "seq_len=8", *overrides])
    c = config.to_dict(composed)
    return estimate(Qwen3Config.from_dict(dict(c["model"]["config"]), "conf"), c, "bfloat16", "cuda", CONTEXT_MIB)


# %% [markdown]
# ## What the log held
#
# The log's own figures, phase by phase. After loading 40 GiB for a model whose weights are 7.5 GiB in bf16: an allocator's
# cache of decoding temporaries, and a second copy for the inference path. In the step the optimizer makes fp32 copies of
# whole tensors.

# %%
rows = log_rows()
log = rows.loc[["S23", "S33", "L3b"], ["configuration", "model_loaded_mib", "backward_mib", "step_mib", "peak_mib"]]
(log.set_index("configuration") / 1024).round(1).rename(columns=lambda c: c.replace("_mib", ", GiB"))

# %% [markdown]
# ## One decision at a time

# %%
STEPS = [
    ("fp32 masters, moments,\ngradients (plain AdamW)", ["step=chunked", "step.state=fp32", "step.master=fp32"]),
    ("packed w, m, v;\nall gradients kept", ["step=chunked", "step.chunk_rows=16"]),
    ("update inside\nthe backward", ["step=fused", "step.chunk_rows=16"]),
    ("embedding packed too,\ntied to the head", ["step=fused", "step.chunk_rows=16", "weights.embedding=nvfp4"]),
]
estimates = [need(*overrides) for _, overrides in STEPS]
KINDS = {  # kind of tensor: (words in the estimate's rows, colour)
    "weights, packed": (("packed codes", "block scales"), BLUE),
    "moments": (("moments",), SKY),
    "float weights": (("trained parameters", "unquantised", "embedding and norms", "masters of"), ORANGE),
    "kept for the backward": (("weights kept", "activations", "logits", "inputs of blocks"), GREEN),
    "gradients": (("gradient",), RED),
    "context, scratch": (("process", "scratch", "foreach"), GREY),
}


def split(e) -> dict[str, float]:
    """GiB by kind in the phase that needs most."""
    phase, _ = e.peak()
    found = dict.fromkeys(KINDS, 0.0)
    for row in e.rows:
        if phase in row.phases:
            words = {k: w for k, (w, _) in KINDS.items()}
            kind = next((k for k in ("gradients", *KINDS) if any(x in row.what for x in words[k])), None)
            assert kind is not None, row.what
            found[kind] += row.mib / 1024
    return found


table = pd.DataFrame([split(e) for e in estimates], index=[name.replace("\n", " ") for name, _ in STEPS])
table.assign(total=table.sum(axis=1), phase=[e.peak()[0] for e in estimates]).round(2)

# %%
names = ["the log, step\n(S23, as logged)", *(name for name, _ in STEPS)]
fig, axis = plt.subplots(figsize=(9.5, 4.4))
worst = rows.loc["S23", "peak_mib"] / 1024
axis.barh(0, worst, color="#c9ced4")
axis.text(worst + 1, 0, f"{worst:.1f}", va="center")
left = [0.0] * len(STEPS)
for kind, (_, colour) in KINDS.items():
    if not table[kind].any():
        continue  # what the forward keeps is gone at these peaks
    axis.barh(range(1, len(names)), table[kind], left=left, color=colour, label=kind)
    left = [a + b for a, b in zip(left, table[kind], strict=True)]
for y, total in enumerate(left, start=1):
    axis.text(total + 1, y, f"{total:.1f}" if total > 10 else f"{total:.2f}", va="center")
axis.axvline(6.4, color=PURPLE, lw=1, ls="--")
axis.text(14, 4.05, "dashed: w, m and v, 6.4", color=PURPLE, fontsize=9, va="center")
axis.set(yticks=range(len(names)), yticklabels=names, xlabel="GiB at the peak, estimate but for the log's", xlim=(0, 128))
axis.invert_yaxis()
axis.grid(axis="y", alpha=0)
axis.legend(loc="lower right")
_ = axis.set_title("One AdamW step of Qwen3-4B")

# %% [markdown]
# 1. **Packed states.** Moments of 4.5 bits instead of 32 and no fp32 master: the step's peak moves from the optimizer to
#    the backward. What is left are floats that only the method needs: a bf16 copy of every weight that autograd keeps for
#    the backward, a bf16 gradient for each, and the embedding's, twice while head and lookup are added.
# 2. **The update inside the backward.** A linear's backward has its weight gradient for a moment. Used there and dropped,
#    no two gradients ever exist together, and no float weight has to exist at all: the backward decodes what it needs once
#    more. Head and cross-entropy go by pieces of the vocabulary.
# 3. **The embedding.** 389 million weights in bf16 with fp32 moments are 5 GiB, as much as all the rest. Packed like the
#    linears, and one with the head it is tied to, they are 0.6.

# %% [markdown]
# ## What is left
#
# The last bar row by row. Three fifths are moments, three tenths weights, the rest the CUDA context; what depends on the
# method is 0.1 GiB.

# %%
last = estimates[-1]
phase, total = last.peak()
print(last.table(phase))

# %% [markdown]
# ## Is the arithmetic right?
#
# The estimate counts tensors and leaves out the allocator's rounding. The same command ran on an H200 under a guard of 24 GB
# ([benchmarks](../doc/benchmarks.md), [memory](../doc/memory.md)); its record holds torch's peak, to which the context comes:

# %%
ran = common.STORED.parent / "h200-24gb" / "chunked" / "0"
print(*common.result(ran)["overrides"])
measured = common.records(ran, "phase").torch_peak_mib.max() + CONTEXT_MIB
chunked = need("step=chunked", "step.chunk_rows=16", "recompute=block").peak()[1]
print(f"estimate {chunked:.0f} MiB, measured {measured:.0f} MiB: {chunked / measured:.3f}")
assert 0.95 < chunked / measured <= 1.0

# %% [markdown]
# And on the shipped model, on this machine, the bytes of the optimizer's state as a run reports them (`tensor_bytes`),
# against the estimate's rows of the same run:

# %%
run = next(p for p in sorted((common.STORED / "load").iterdir()) if common.options(p)["stop_after"] == "state_initialized")
held = common.records(run, "tensor_bytes").groupby("tensor_kind").mib.sum()
expected = common.records(run, "estimate").iloc[0]["rows"]
both = pd.DataFrame(
    {
        "reported, MiB": [
            held.filter(regex="state_[mv]_").sum(),
            held["model_param"],
        ],
        "estimate, MiB": [
            expected["moments (nvfp4_two_level)"] + expected["moments of embedding, norms"],
            expected["trained parameters"],
        ],
    },
    index=["moments", "trained parameters"],
)
assert (both["reported, MiB"] / both["estimate, MiB"]).sub(1).abs().max() < 0.01
both.round(3)

# %% [markdown]
# ## Phase by phase
#
# The same four ways, in each phase of a step: without floats there is little left that rises.

# %%
fig, axis = plt.subplots(figsize=(9, 3.4))
for (name, _), e, colour, mark in zip(STEPS, estimates, (GREY, ORANGE, BLUE, GREEN), "osD^", strict=True):
    axis.plot(PHASES, [e.at(p) / 1024 for p in PHASES], mark + "-", color=colour, label=name.replace("\n", " "))
axis.set(ylabel="GiB", title="Estimate by phase", ylim=(0, 80))
_ = axis.legend(fontsize=9, loc="upper left")

# %% [markdown]
# ## What we keep from it
#
# - **Ask for the arithmetic before the memory.** A run that cannot fit is refused with this table; the log's machine went
#   down instead.
# - **The peak is a set of tensors at one moment**, and it moves when the largest set is made smaller. Measure each phase.
# - **Half of the log's memory was nobody's tensor**: caches and temporaries. An estimate that counts only tensors, held
#   against the measurement, is what shows them.
# - **Not free:** no gradient is kept, so there is nothing to clip by a global norm and nothing to accumulate
#   (`step.max_update` bounds each element instead), and weights are decoded twice.
