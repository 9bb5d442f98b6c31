"""What types cannot say about a configuration: bounds, choices that contradict each other, choices without effect."""

from collections.abc import Callable
from typing import Any

from fp4lab.config import PHASES, Blind
from fp4lab.errors import UserError

# key: (smallest allowed value, may it be equal)
_BOUNDS: dict[str, tuple[float, bool]] = {
    "seq_len": (1, True),
    "steps": (1, True),
    "lr": (0, True),
    "threads": (0, True),
    "step.chunk_rows": (1, True),
    "step.train_last_layers": (1, True),
    "step.eps": (0, False),
    "step.health_every": (0, True),
    "step.streams": (0, True),
    "step.beta1": (0, True),
    "step.beta2": (0, True),
    "step.weight_decay": (0, True),
    "step.max_update": (0, False),
    "step.clip_grad": (0, False),
    "guard.limit_gb": (0, False),
    "guard.over_s": (0, True),
    "guard.poll_s": (0.005, True),
    "guard.sample_s": (0, True),
    "guard.host_available_min_gb": (0, True),
    "guard.wall_s": (0, False),
    "guard.phase_wall_s": (0, False),
    "guard.term_grace_s": (0, True),
    "task.batch_size": (1, True),
    "task.accumulate": (1, True),
    "task.warmup_steps": (0, True),
    "task.eval_every": (0, True),
    "task.log_every": (1, True),
    "task.max_tokens": (1, True),
    "task.controls_kept": (0, True),
    "task.controls_loss": (0, True),
    "task.stop_at_loss": (0, False),
    "task.checkpoint_every": (0, True),
    "task.checkpoints_kept": (1, True),
    "task.turns": (1, True),
    "task.temperature": (0, True),
    "task.top_p": (0, False),
    "task.turn_s": (0, False),
    "task.repetition_limit": (0, False),
}


def check(config: dict[str, Any]) -> None:
    """What types cannot say. Raises UserError naming the option, its value and what is expected."""
    for key in _BOUNDS:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        _bound(key, value)
    for key in ("beta1", "beta2"):
        if config["step"][key] >= 1:
            raise UserError(f"step.{key}={config['step'][key]}: expected less than 1")
    kind, path = config["weights"]["kind"], config["weights"]["path"]
    if kind in ("hf", "dat") and not path:
        what = "folder with config.json and *.safetensors" if kind == "hf" else ".dat file"
        raise UserError(f"weights={kind} needs weights.path=<{what}>")
    if kind == "shipped" and config["model"]["name"] != "tiny":
        raise UserError(
            f"model={config['model']['name']} has no shipped weights: add weights=random, "
            "weights=hf weights.path=<folder> or weights=dat weights.path=<file>"
        )
    if config["step"]["name"] == "fused" and config["task"]["name"] in ("step", "tune"):
        _check_fused(config)
    if config["step"]["join"] and config["step"]["name"] == "chunked":
        _check_joined(config)
    if config["weights"]["embedding"] == "nvfp4":
        _check_packed_embedding(config)
    if config["task"]["stop_at_goals"] and not config["task"]["goals"]:
        raise UserError(
            "task.stop_at_goals=true: there are no goals to meet; give task.goals=<file>, e.g. data/identity/goals.jsonl"
        )
    if config["task"]["accumulate"] > config["task"]["batch_size"]:
        raise UserError(
            f"task.accumulate={config['task']['accumulate']}: a batch has task.batch_size={config['task']['batch_size']} rows; "
            "expected no more parts than that"
        )
    if config["task"]["controls_kept"] > 1:
        raise UserError(f"task.controls_kept={config['task']['controls_kept']}: expected a share, at most 1")
    if config["backend"]["native_fp4"] and config["backend"]["activations"] != "nvfp4":
        raise UserError("backend.native_fp4=true multiplies FP4 by FP4: it needs backend.activations=nvfp4")


def _check_packed_embedding(config: dict[str, Any]) -> None:
    """A packed embedding can be read everywhere, and trained by step=fused alone."""
    trains = config["task"]["name"] in ("step", "tune") and config["backend"]["name"] in ("fp2", "dense")
    if trains and config["step"]["name"] != "fused":
        raise UserError(
            f"weights.embedding=nvfp4: step={config['step']['name']} trains an embedding of floats; use step=fused, or "
            "weights.embedding=raw"
        )
    if config["backend"]["name"] == "dense":
        raise UserError("weights.embedding=nvfp4 has no unquantised weights: it needs backend=fp2, bridge or noste")


def _check_joined(config: dict[str, Any]) -> None:
    """What rows of many tensors in one state cannot do."""
    step = config["step"]
    for key in ("offload_mv", "offload_w", "offload_grad", "flush_each_param"):
        if step[key]:
            raise UserError(
                f"step.{key}=true works parameter by parameter, and step.join=true joins them: leave one of them false"
            )
    if step["kernels"]:
        raise UserError("step.kernels=true updates matrix by matrix, and step.join=true joins them: leave one of them false")
    if config["weights"]["levels"] == "tensor":
        raise UserError(
            "weights.levels=tensor: rows of several tensors have no scale in common; step.join=true needs single or row"
        )
    if config["backend"]["name"] == "dense" or config["quirk"]["pack_everything"]:
        raise UserError("step.join=true joins packed linears: it needs backend=fp2 and quirk.pack_everything=false")


def _check_fused(config: dict[str, Any]) -> None:
    """What an update inside the backward pass cannot do."""
    step = config["step"]
    if step["clip_grad"] is not None:
        raise UserError(
            f"step.clip_grad={step['clip_grad']}: step=fused uses each gradient before the global norm is known. Bound every "
            "element's update with step.max_update=1.0 instead, or clip with step=chunked"
        )
    if config["task"]["accumulate"] > 1:
        raise UserError(
            f"task.accumulate={config['task']['accumulate']}: step=fused uses each gradient before the next part of the batch "
            "has one. Use step=chunked, or recompute=block with the whole batch at once"
        )
    if config["loss"] != "ce":
        raise UserError(f"loss={config['loss']}: step=fused has cross-entropy alone; use loss=ce, or step=chunked")
    if config["quirk"]["pack_everything"] or config["quirk"]["no_final_norm"]:
        raise UserError("quirk.pack_everything and quirk.no_final_norm are incidents of step=chunked; step=fused has neither")
    if config["backend"]["name"] == "dense":
        raise UserError("backend=dense has no packed weights to keep: step=fused needs backend=fp2")


def check_guard(guard: dict[str, Any], option: Callable[[str], str]) -> None:
    """`check` for the guard's limits alone, which `option` renames for the message. Raises UserError."""
    for key in _BOUNDS:
        group, _, name = key.partition(".")
        if group == "guard":
            _bound(key, guard[name], option(key))
    if guard["blind"] not in Blind.__members__:
        raise UserError(f"{option('guard.blind')}={guard['blind']}: expected {' or '.join(Blind.__members__)}")


def _bound(key: str, value: float | None, shown: str | None = None) -> None:
    least, equal = _BOUNDS[key]
    if value is not None and not (value >= least if equal else value > least):
        raise UserError(f"{shown or key}={value}: expected a number {'of at least' if equal else 'greater than'} {least:g}")


# top-level group or key prefix -> (condition under which it has no effect, why)
def idle_choices(config: dict[str, Any], overrides: list[str]) -> list[str]:
    """Sentences about choices that the user made and that change nothing in this run."""
    task, backend, step = config["task"]["name"], config["backend"]["name"], config["step"]["name"]
    trains = backend in ("dense", "fp2")
    said = []
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if key.split(".")[0] == "kvc" and task != "chat":
            said.append(f"{override} has no effect: task={task} generates with no cache policy.")
        elif key == "kvc.prefill" and config["kvc"]["name"] == "replay":
            said.append(f"{override} has no effect: kvc=replay has no cache to fill.")
        elif task in ("chat", "compare", "export", "inspect") and (key.split(".")[0] == "step" or key in _TRAINING_ONLY):
            said.append(f"{override} has no effect: task={task} trains nothing.")
        elif key.split(".")[0] == "step" and task == "step" and not trains:
            said.append(f"{override} has no effect: backend={backend} is not trained.")
        elif key in _NOT_FUSED and step == "fused":
            said.append(f"{override} has no effect: step=fused updates each weight in the backward, and keeps nothing.")
        elif key in _FUSED_ONLY and step != "fused":
            said.append(f"{override} has no effect: step={step} has neither streams nor a graph of its own.")
        elif key in _CHUNKED_ONLY and step == "dense":
            said.append(f"{override} has no effect: step=dense is torch's AdamW on whole parameters.")
        elif key.startswith("task.") and key[5:] not in ("name", *_TASK_KEYS.get(task, ())):
            said.append(f"{override} has no effect in task={task}.")
        elif key == "data.held_out" and task != "tune":
            said.append(f"{override} has no effect: task={task} measures no held-out loss.")
        elif key == "backend.eval_cache" and backend != "fp2":
            said.append(f"{override} has no effect: only backend=fp2 requantises its weights.")
        elif key == "stop_after" and config["stop_after"] not in ("none", *TASK_PHASES.get(task, PHASES)):
            said.append(f"{override} has no effect: task={task} has no such phase.")
    return said


# task: its own keys under `task`; a task that is not listed has none
_TASK_KEYS: dict[str, tuple[str, ...]] = {
    "tune": (
        "batch_size",
        "accumulate",
        "pack",
        "schedule",
        "warmup_steps",
        "eval_every",
        "log_every",
        "prompts",
        "max_tokens",
        "goals",
        "controls",
        "controls_kept",
        "controls_loss",
        "repetition_limit",
        "stop_at_goals",
        "stop_at_loss",
        "checkpoint_every",
        "checkpoints_kept",
        "resume",
        "output",
        "format",
        "head",
        "overwrite",
    ),
    "export": ("output", "format", "head", "overwrite"),
    "compare": ("prompts", "prompt_file"),
    "chat": (
        *("turns", "followup_prompt", "conversation", "max_tokens", "temperature", "top_p", "stop_tokens", "ignore_eos"),
        *("turn_s", "clean_before_turn", "on_collapse", "repetition_limit"),
    ),
}
_LOADING = ("start", "model_loaded", "session_disposed", "post_load_compacted")
TASK_PHASES = {
    "step": tuple(p for p in PHASES if p not in ("turn_done", "export_done")),
    "tune": ("start", "model_loaded", "batch_ready", "first_token_done", "optimizer_step_done", "export_done", "cleanup_done"),
    "compare": (*_LOADING, "first_token_done", "cleanup_done"),
    "export": ("start", "model_loaded", "first_token_done", "export_done", "cleanup_done"),
    "inspect": ("start", "cleanup_done"),
    "chat": (*_LOADING, "turn_done", "cleanup_done"),
}
_TRAINING_ONLY = ("lr", "steps", "seq_len", "loss", "data.path", "data.order")
_NOT_FUSED = {f"step.{k}" for k in ("join", "flush_each_param", "offload_mv", "offload_w", "offload_grad", "sanitize")}
_FUSED_ONLY = {f"step.{k}" for k in ("streams", "graph", "health_every")}
_CHUNKED_ONLY = {
    f"step.{k}"
    for k in (
        "chunk_rows",
        "kernels",
        "state",
        "master",
        "max_update",
        "join",
        "flush_each_param",
        "offload_mv",
        "offload_w",
        "offload_grad",
    )
}
