"""The typed schema of `conf/`: every key a run knows, its type, its default and what it means.

Hydra composes YAML into these dataclasses, so a misspelt key or an unknown choice fails at composition, naming itself.
Choices are enums (OmegaConf has no Literal). The worker gets the same thing as a plain dict (`to_dict`).
"""

import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

# Enum, not StrEnum or Literal: OmegaConf knows it, and names the choices when a value is none of them.
StopAfter = Enum(
    "StopAfter",
    [
        "none",
        "start",
        "model_loaded",
        "session_disposed",
        "post_load_compacted",
        "first_token_done",
        "state_initialized",
        "batch_ready",
        "zero_grad_done",
        "forward_done",
        "backward_done",
        "optimizer_step_done",
        "turn_done",
        "export_done",
        "cleanup_done",
    ],
)
Device = Enum("Device", ["auto", "cpu", "cuda"])
DType = Enum("DType", ["auto", "float32", "bfloat16", "float16"])
LossName = Enum("LossName", ["ce", "scalar"])
TaskName = Enum("TaskName", ["step", "tune", "chat", "compare", "export", "inspect"])
WeightsKind = Enum("WeightsKind", ["shipped", "random", "hf", "dat"])
BackendName = Enum("BackendName", ["dense", "bridge", "fp2", "noste"])
Activations = Enum("Activations", ["none", "nvfp4"])
KvcName = Enum("KvcName", ["replay", "prefill", "persistent"])
StepName = Enum("StepName", ["chunked", "fused", "dense"])
Recompute = Enum("Recompute", ["none", "block", "selective"])
StateFormat = Enum("StateFormat", ["nvfp4", "nvfp4_two_level", "int8", "int8_block", "bf16", "fp32"])
Master = Enum("Master", ["packed", "packed_stochastic", "packed_residual", "bf16", "bf16_stochastic", "fp32"])
TrackerName = Enum("TrackerName", ["offline", "online", "off"])
OnCollapse = Enum("OnCollapse", ["end", "flag"])
Prefill = Enum("Prefill", ["whole", "token"])
Order = Enum("Order", ["random", "sequential"])
Style = Enum("Style", ["official", "training"])
EmbeddingFormat = Enum("EmbeddingFormat", ["raw", "nvfp4"])
Rule = Enum("Rule", ["ct", "torchao", "native", "nearest", "stochastic", "four_over_six"])
Levels = Enum("Levels", ["single", "tensor", "row"])
Format = Enum("Format", ["dat", "hf", "compressed-tensors", "modelopt"])
Head = Enum("Head", ["auto", "keep", "nvfp4", "float"])
Blind = Enum("Blind", ["warn", "refuse"])
Schedule = Enum("Schedule", ["constant", "cosine"])


# Folders in a run's own: what a training goes on from; what attempts that died left
CHECKPOINTS, BEFORE = "checkpoints", "before-"
PHASES = tuple(p.name for p in StopAfter if p is not StopAfter.none)  # in order


@dataclass
class TaskConfig:
    """What the run does, and the keys of one task alone (`_TASK_KEYS` says whose)."""

    name: TaskName = TaskName.step
    batch_size: int = 1  # rows of seq_len tokens
    accumulate: int = 1  # tune: parts that a batch goes through the model in; gradients are summed
    pack: bool = False  # tune: several samples in each of batch_size rows of seq_len tokens; none sees another
    schedule: Schedule = Schedule.constant  # learning rate over the run
    warmup_steps: int = 0
    eval_every: int = 0  # steps between held-out losses; 0 = only at the end
    log_every: int = 10  # steps between loss events
    prompts: list[str] = field(default_factory=list)  # tune: answered on every path at the end; compare: the prompts
    prompt_file: str | None = None  # compare: a file of prompts instead, one a line
    max_tokens: int = 24  # of each answer
    goals: str | None = None  # tune: file of what must be answered (tasks/goals.py); a miss ends the run as "goals_missed"
    controls: str | None = None  # tune: file of prompts whose answers must stay as they were
    controls_kept: float = 0.9  # share of control answers that must stay, token by token
    controls_loss: float = 0.1  # nats a token: the most that the loss of the untuned model's control answers may rise
    stop_at_goals: bool = False  # tune: end training at the first evaluation that meets goals and controls
    stop_at_loss: float | None = None  # tune: end training at the first evaluation with a held-out loss this low
    checkpoint_every: int = 0  # tune: steps between checkpoints to resume from, in the run's folder; 0 = none
    checkpoints_kept: int = 1  # tune: the newest that stay
    resume: str | None = None  # tune: a run's folder, or a checkpoint of it, to go on from; with sweep.resume its own
    output: str | None = None  # tune, export: the file (dat) or folder (else) to write
    format: Format = Format.dat  # of `output`
    head: Head = Head.auto  # lm_head in `output`: keep (as it is, tied or not), nvfp4, float; auto: nvfp4 in a .dat, else keep
    overwrite: bool = False  # what is at `output` may be replaced
    turns: int = 1  # of the conversation: `prompt`, then `followup_prompt` again and again
    followup_prompt: str = "continue."
    conversation: str | None = None  # file of turns instead: .txt (one a line) or .jsonl ({"role", "content"})
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # sample from the smallest set of tokens that has this probability
    stop_tokens: list[str] = field(default_factory=list)  # besides <|im_end|> and <|endoftext|>
    ignore_eos: bool = False  # stop at max_tokens alone
    turn_s: float | None = None  # longest turn
    clean_before_turn: bool = False  # collect garbage, synchronise, empty the allocator's cache
    on_collapse: OnCollapse = OnCollapse.end  # !!!!, logits that are not finite, repetition: end the run, or note it
    repetition_limit: float | None = 0.8  # share of repeated 4-grams from which an answer has collapsed


@dataclass
class ModelConfig:
    """Shapes. With `path`, its config.json decides and `config` stays empty."""

    name: str = "tiny"
    path: str | None = None  # folder with config.json and tokenizer.json
    config: dict[str, Any] = field(default_factory=dict)  # the fields of a Qwen3 config.json


@dataclass
class WeightsConfig:
    """Where tensors come from."""

    kind: WeightsKind = WeightsKind.shipped
    path: str | None = None  # file (dat) or folder (hf)
    rule: Rule = Rule.torchao  # how unquantised linears are packed
    levels: Levels = Levels.single  # second-level scale: none, one a tensor, one a row
    embedding: EmbeddingFormat = EmbeddingFormat.raw  # nvfp4: packed like the linears; a tied head is then the same bytes


@dataclass
class BackendConfig:
    """How a linear is computed: R dense, A bridge, B fp2 (straight-through), C noste."""

    name: BackendName = BackendName.fp2
    activations: Activations = Activations.none  # none: W4A16; nvfp4: W4A4 (emulated without FP4 matrix units)
    native_fp4: bool = False  # torch's scaled FP4 product, sm_100 and later; unconfirmed on hardware
    eval_cache: bool = False  # fp2: keep dequantised weights while gradients are off


@dataclass
class KvcConfig:
    """What generation keeps between tokens and turns."""

    name: KvcName = KvcName.replay
    prefill: Prefill = Prefill.whole  # the prompt in one forward, or a token at a time


@dataclass
class StepConfig:
    """How parameters are updated (reference section 5.4)."""

    name: StepName = StepName.chunked
    chunk_rows: int = 32  # rows decoded at a time: bounds the optimizer's scratch memory
    # how moments are stored: nvfp4 and nvfp4_two_level in 4.5 bits each, int8 (a scale a row) and int8_block (of 256) in 8
    state: StateFormat = StateFormat.nvfp4_two_level  # from scratch int8_block learns a little better (doc/training.md)
    # how weights are stored between steps: packed and packed_stochastic in 4.5 bits, packed_residual 12.5, bf16_stochastic 16
    master: Master = Master.packed_stochastic
    train_last_layers: int | None = None  # only the last N blocks learn, linears and norms; null: everything
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_update: float | None = None  # cap on |update| / lr per element
    join: bool = False  # one state for all parameters of a width: the same update in fewer kernels, for small models on a GPU
    flush_each_param: bool = False  # synchronise and empty the allocator's cache after each parameter
    offload_mv: bool = False  # keep moments in host memory
    offload_w: bool = False  # keep packed weights in host memory
    offload_grad: bool = False  # move gradients to host memory before the step
    grad_norm: bool = True  # compute and record the global gradient norm
    clip_grad: float | None = None  # clip the global gradient norm to this
    sanitize: bool = False  # NaN and Inf in gradients become 0
    kernels: bool = True  # on a GPU: updates by Triton kernels; false, step=chunked's default: plain torch, the reference
    streams: int = 2  # step=fused on a GPU: CUDA streams beside the backward's, for weight gradients and updates; 0: none
    graph: bool = True  # step=fused on a GPU: a shape's later steps are one captured CUDA graph; false: eager
    health_every: int = 1  # every this many steps it is counted what became of weights and blocks; 0: never


@dataclass
class QuirkConfig:
    """Incidents of the reference log, each switched on to be seen and caught."""

    scale_bytes_undecoded: bool = False  # B reads E4M3 scale bytes as integers (reference 2.5, failure 4)
    rope_theta_1e6: bool = False  # B ignores the checkpoint's rope_theta (reference 0.1)
    no_final_norm: bool = False  # loss on hidden states without the final norm (reference 0.7)
    pack_everything: bool = False  # norms and embedding optimised through FP4 too (failure 41)
    no_offset_mask: bool = False  # B sees the future in a prefill behind a cache (reference 0.4, failure 6)
    no_end_token: bool = False  # <|im_end|> is no target: stopping is never taught (reference 0.5, failure 25)
    e4m3_top_nan: bool = False  # B's table holds NaN for block scales of 256 to 448 (reference 2.4, failure 37)
    fp16_scales: bool = False  # task.output gets fp16 block scales instead of E4M3 bytes (reference 2.6, failure 28)
    top_p_can_empty: bool = False  # the nucleus lacks the token that crosses top_p (reference 4.2, failure 39)


@dataclass
class GuardConfig:
    """Limits of a run, enforced from outside it."""

    name: str = "host"
    limit_gb: float | None = None  # GB of 1024 MiB, of the worker's process tree
    over_s: float = 0.0  # how long a breach may last; 0 = none
    poll_s: float = 0.1  # between two looks near a limit; far from all limits up to 1 s
    sample_s: float = 1.0  # a memory sample is recorded this often
    host_available_min_gb: float | None = None  # end the run when the machine has less than this available
    wall_s: float | None = None  # the whole run
    phase_wall_s: float | None = None  # the longest time without a phase, loss, turn or other sign of progress
    term_grace_s: float = 5.0  # between SIGTERM and SIGKILL
    blind: Blind = Blind.warn  # what to do when memory cannot be read for 15 s: warn, or refuse to go on
    force: bool = False  # start although the estimate says that it cannot fit
    snapshot: bool = False  # CUDA: keep the allocation history, and write it when memory runs out (memory_viz opens it)


@dataclass
class TrackerConfig:
    """Where records go besides events.jsonl."""

    name: TrackerName = TrackerName.offline
    project: str = "fp4lab"
    group: str | None = None  # default: the sweep's name
    tags: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """What is trained on."""

    path: str = "data/samples/whoami.tsv"  # .txt, .tsv, .jsonl, or a folder of them
    held_out: str | None = None  # tune: text to measure the held-out loss on; null: a tenth of `path`, left out of training
    order: Order = Order.random  # of the samples: shuffled by `seed`, or as in the file
    style: Style = Style.official  # chat rendering (reference 4.1)


@dataclass
class SweepConfig:
    resume: bool = False  # skip runs that finished with the same configuration, go on from the checkpoints of others


@dataclass
class RunConfig:
    """One run."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    kvc: KvcConfig = field(default_factory=KvcConfig)
    step: StepConfig = field(default_factory=StepConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quirk: QuirkConfig = field(default_factory=QuirkConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seq_len: int = 32  # longest input, tokens
    steps: int = 1
    lr: float = 1e-4
    loss: LossName = LossName.ce
    recompute: Recompute = Recompute.none  # of activations: block (all but its input), selective (its MLP)
    prompt: str = "hi"  # of the first-token probe
    seed: int = 123
    device: Device = Device.auto
    dtype: DType = DType.auto  # of the computation; auto: float32 on a CPU, bfloat16 on a GPU
    threads: int = 0  # CPU threads; 0 = all cores
    deterministic: bool = True  # training on a GPU gives the same bits again; false: a faster backward of attention
    stop_after: StopAfter = StopAfter.none
    dry_run: bool = False  # list what would run


def register() -> None:
    """Makes the schema known to Hydra as `base_config`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="base_config", node=RunConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """The composed config as plain data: what the worker gets and what is recorded."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def fingerprint(config: dict[str, Any]) -> str:
    """SHA-256 of what decides a run's numbers; where records go, what is skipped and where it was interrupted do not."""
    kept = {k: v for k, v in config.items() if k not in ("tracker", "sweep", "dry_run", "guard")}
    kept["task"] = {k: v for k, v in config["task"].items() if k not in ("checkpoint_every", "checkpoints_kept", "resume")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
