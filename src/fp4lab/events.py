"""The typed events of a run: what a worker reports, and what `events.jsonl` holds.

One JSON object a line: `t` (monotonic seconds since the supervisor started the run), `wall` (UTC, ISO 8601),
`kind`, then the event's fields. MiB are 2**20 bytes. A value that could not be read is null, never 0. `encoding.py` writes
and reads the lines.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

STATUSES = {
    # status: exit code of `run.py` (documented in README.md)
    "completed": 0,
    "stopped": 0,
    "failed": 1,
    "collapsed": 3,
    "diverged": 4,
    "oom": 5,
    "goals_missed": 6,
    "guard_killed": 124,
    "timeout": 125,
    "interrupted": 130,
    "killed_by_other": 137,
}


class Event:
    """Base of all events; `kind` names the record."""

    kind: ClassVar[str]


@dataclass
class Memory:
    """One look at memory, MiB. `source` names where the numbers came from, e.g. "torch+nvml+rss" or "rss".

    None is unknown, never 0.
    """

    torch_allocated_mib: float | None = None
    torch_reserved_mib: float | None = None
    torch_peak_mib: float | None = None  # peak of allocated since the previous phase
    cuda_used_mib: float | None = None
    cuda_total_mib: float | None = None
    pid_mem_mib: float | None = None  # device memory of the worker's process tree
    total_gpu_mem_mib: float | None = None  # device memory of all processes
    proc_rss_mib: float | None = None
    proc_peak_rss_mib: float | None = None  # peak resident set since the previous phase
    mem_available_mib: float | None = None
    mem_total_mib: float | None = None
    proc_pss_mib: float | None = None  # proportional set size: shared pages are divided among who shares them
    cgroup_mib: float | None = None  # held by the cgroup nearest to its limit
    cgroup_max_mib: float | None = None
    unified: bool | None = None  # CPU and GPU have one memory; None: no GPU was asked
    source: str = "unknown"


@dataclass
class Start(Event):
    """The manifest: enough to run it again, and to tell it to wandb again."""

    kind: ClassVar[str] = "start"
    run_id: str = ""  # of this start: the same in wandb
    task: str = ""
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)  # config group: choice
    config: dict[str, Any] = field(default_factory=dict)  # resolved
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None
    git_diff: str | None = None  # of tracked files against the commit; cut after supervise/manifest.py:DIFF_BYTES
    host: dict[str, Any] = field(default_factory=dict)
    devices: list[str] | None = None  # GPUs that NVML shows; None: there is no NVML


@dataclass
class File(Event):
    """A file the run read (or wrote), resolved."""

    kind: ClassVar[str] = "file"
    role: str = ""  # weights, config, tokenizer, data, output, checkpoint, snapshot
    path: str = ""
    format: str = ""
    bytes: int = 0
    sha256: str = ""


@dataclass
class Note(Event):
    """Something the user should know: a choice without effect, a slower path taken, an emulation."""

    kind: ClassVar[str] = "note"
    topic: str = ""
    text: str = ""


@dataclass
class Phase(Memory, Event):
    """The end of a phase: its name, how long it took, and memory now."""

    kind: ClassVar[str] = "phase"
    name: str = ""
    ms: float | None = None  # since the previous phase


@dataclass
class Sample(Memory, Event):
    """Memory as the supervisor saw it between phases."""

    kind: ClassVar[str] = "sample"


@dataclass
class Progress(Event):
    """Where a long piece of work stands; shown on a terminal, not recorded."""

    kind: ClassVar[str] = "progress"
    what: str = ""
    done: int = 0
    total: int = 0


@dataclass
class Loss(Event):
    kind: ClassVar[str] = "loss"
    step: int = 0
    loss: float = math.nan
    split: str = "train"  # train, eval (held-out data, or a backend that is not trained)
    trained: bool = True
    grad_norm: float | None = None
    tokens: int | None = None
    lr: float | None = None
    ms: float | None = None


@dataclass
class Fed(Event):
    """Which samples a step of task=tune was trained on."""

    kind: ClassVar[str] = "batch"
    step: int = 0
    samples: dict[str, list[int]] = field(default_factory=dict)  # file: its lines, from 1


@dataclass
class FirstToken(Event):
    kind: ClassVar[str] = "first_token"
    path: str = ""  # A.infer, B.fp2_ste, C.noste_graph, R.dense
    when: str = "before"  # before, after (the optimizer step), reloaded (from task.output)
    prompt: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    activations: str = "none"  # none (W4A16) or nvfp4 (W4A4)
    hidden_nan: int = 0
    hidden_inf: int = 0
    logits_nan: int = 0
    logits_inf: int = 0
    layer_rms: list[float] = field(default_factory=list)  # of the last position's hidden state after each layer
    top10: list[tuple[int, float, str]] = field(default_factory=list)  # (id, logit, text)


@dataclass
class FirstTokenDiff(Event):
    kind: ClassVar[str] = "first_token_diff"
    pair: str = ""  # e.g. "A-C"
    when: str = "before"  # as in `first_token`; export: one path before its export and loaded again, "A-A"
    top1_equal: bool = False
    overlap_at_10: float = 0.0  # share of the ten ids in both lists
    rank_correlation: float = math.nan  # Spearman over the union of both lists
    kl: float = math.nan  # KL(first || second) of the whole distributions, nats
    max_abs_logit: float = math.nan
    prompt: str = ""
    expected_kl: float | None = None  # what `why` explains at most, see tasks/tolerance.py
    expected_max_abs_logit: float | None = None
    expected_relative: float | None = None  # of hidden states
    why: str = ""
    fault: bool = False  # beyond what is expected, or not finite
    first_divergent_layer: int | None = None  # first layer whose relative difference passes expected_relative


@dataclass
class LayerDiff(Event):
    """Hidden states of two paths after one layer, at the last position of the prompt."""

    kind: ClassVar[str] = "layer_diff"
    pair: str = ""
    prompt: str = ""
    layer: int = 0
    relative_error: float = math.nan  # |a - b| over the smaller of |a| and |b|
    expected: float | None = None  # of it, see tasks/tolerance.py
    cosine: float = math.nan
    max_abs_a: float = math.nan
    max_abs_b: float = math.nan
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    part: str | None = None  # in the first divergent layer: q, k, v, attention, o, gate, up or down, which parted first


@dataclass
class WeightDiff(Event):
    """What path B multiplies by against what is stored, for one linear."""

    kind: ClassVar[str] = "weight_diff"
    name: str = ""
    relative_error: float = math.nan  # |B - stored| / |stored|
    max_abs_difference: float = math.nan  # of one weight
    max_abs_b: float = math.nan
    max_abs_stored: float = math.nan
    nonfinite: int = 0
    master_relative_error: float | None = None  # |master - stored| / |stored|; None without a master
    codes_equal: float | None = None  # share of FP4 codes that quantising the master again gives back


@dataclass
class Entry(Event):
    """One tensor of a checkpoint file."""

    kind: ClassVar[str] = "entry"
    number: int = 0
    key: str = ""
    type: str = ""
    shape: list[int] = field(default_factory=list)
    bytes: int = 0
    scale_min: int | None = None  # smallest and largest byte of block scales
    scale_max: int | None = None
    pair: str | None = None  # the entry that belongs to it
    refused: str | None = None  # why it would not be loaded


@dataclass
class Turn(Event):
    kind: ClassVar[str] = "turn"
    n: int = 0  # counts from 0 in each conversation
    path: str = ""
    kvc: str = ""
    system: str | None = None  # message before the first turn
    prompt: str = ""
    prompt_tokens: int = 0  # that this turn added, the opening of the answer included
    context_tokens: int = 0  # of the conversation when the turn is over
    template_tokens: int | None = None  # of the template's rendering of the same text
    canonical: bool | None = None  # the context is that rendering, id by id
    cache_len: int = 0  # tokens in the KV cache at its fullest
    cache_mib: float | None = None  # what the KV cache has reserved
    first_token_ms: float | None = None
    ms_per_token: float | None = None  # median of the tokens after the first
    seconds: float | None = None
    finish: str = ""  # stop, length, time, full
    nll: float | None = None  # mean negative log likelihood of the answer's own tokens, nats
    repetition: float | None = None  # share of 4-grams that occurred before
    ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass
class GoalAnswer(Event):
    """The answer to a prompt of task.goals, and whether it is what was asked for."""

    kind: ClassVar[str] = "goal"
    when: str = ""  # before (the untuned model), step, after, reloaded (from task.output)
    step: int = 0
    path: str = ""
    prompt: str = ""
    rule: str = ""  # exactly, unchanged, without
    wanted: str = ""
    met: bool = False
    finish: str = ""  # stop, length
    repetition: float | None = None  # share of 4-grams that occurred before
    ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass
class Controls(Event):
    """The untuned model's answers to task.controls, held against what the model would say now."""

    kind: ClassVar[str] = "controls"
    when: str = ""  # as in `goal`
    step: int = 0
    path: str = ""
    kept: int = 0  # answers that are the same, token by token, end included
    of: int = 0
    loss: float = math.nan  # of the untuned model's answers, nats a token
    loss_before: float = math.nan
    repetition: float = 0.0  # the largest of the changed answers
    changed: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # (prompt, before, now) of the first eight, after training


@dataclass
class StateHealth(Event):
    kind: ClassVar[str] = "state_health"
    step: int = 0
    zero_scale: dict[str, float] = field(default_factory=dict)  # w, m, v -> share of blocks whose scale is zero
    saturated: dict[str, float] = field(default_factory=dict)  # w, m, v -> share of blocks whose scale is the largest
    code_changed: float | None = None  # share of weights whose stored code or scale changed
    update_lost: float | None = None  # share of nonzero updates that left the stored value as it was
    update_kept: float | None = None  # slope of the change made on the change wanted: 1 is right on average, 0 is inertia
    max_update_over_lr: float | None = None


@dataclass
class MemoryEstimate(Event):
    """What the run was expected to need before anything was loaded; the arithmetic is in `train/estimate.py`."""

    kind: ClassVar[str] = "estimate"
    phase: str = ""  # the one that needs most: load, forward, backward or step
    total_mib: float = 0.0
    limit_mib: float | None = None  # the tightest of guard.limit_gb and what the machine has
    rows: dict[str, float] = field(default_factory=dict)  # what: MiB
    formulas: dict[str, str] = field(default_factory=dict)  # what: its arithmetic
    phases: dict[str, list[str]] = field(default_factory=dict)  # what: when it exists


@dataclass
class TensorBytes(Event):
    kind: ClassVar[str] = "tensor_bytes"
    tensor_kind: str = ""  # model_param, state_w_codes, ...
    device: str = ""
    dtype: str = ""
    count: int = 0
    mib: float = 0.0
    duplicate_mib: float = 0.0  # counted again through another tensor on the same storage


@dataclass
class Guard(Event):
    kind: ClassVar[str] = "guard"
    verdict: str = ""  # warning, breach
    reason: str = ""
    reading_mib: float | None = None
    limit_mib: float | None = None
    over_s: float | None = None
    period_s: float | None = None  # the polling period really achieved


@dataclass
class Failure(Event):
    """The worker's own last word before it dies of an exception."""

    kind: ClassVar[str] = "failure"
    status: str = "failed"
    reason: str = ""
    traceback: str = ""


@dataclass
class End(Event):
    kind: ClassVar[str] = "end"
    status: str = ""
    reason: str = ""
    exit_code: int | None = None  # the worker's
    signal: str | None = None
    seconds: float = 0.0
    peaks: dict[str, float | None] = field(default_factory=dict)


KINDS: dict[str, type[Event]] = {c.kind: c for c in Event.__subclasses__()}

Emit = Callable[[Event], None]


def utc_now() -> str:
    """Wall time of a record, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def to_record(event: Event) -> dict[str, Any]:
    """The event as a plain dict, `kind` first."""
    assert dataclasses.is_dataclass(event)
    return {"kind": event.kind, **dataclasses.asdict(event)}
