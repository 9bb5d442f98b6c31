"""What `quirk.*` does in a run: which incidents are on, and which of them cannot show in it."""

from pathlib import Path
from typing import Any

import torch

from fp4lab.events import Note
from fp4lab.model.config import Qwen3Config
from fp4lab.model.paths import E4M3_TOP_EXPONENT, TRAINABLE
from fp4lab.model.store import WeightStore


def quirk_notes(config: dict[str, Any], shape: Qwen3Config, store: WeightStore) -> list[Note]:
    """One note of those that are on, and one for each that changes nothing here, with the reason."""
    on = [name for name, value in config["quirk"].items() if value]
    notes = [Note(topic="quirk", text=f"incidents switched on: {', '.join(on)}")] if on else []
    for name in on:
        reason = _idle(name, config, shape, store)
        if reason:
            notes.append(Note(topic="no_effect", text=f"quirk.{name}=true has no effect: {reason}."))
    return notes


def _idle(quirk: str, config: dict[str, Any], shape: Qwen3Config, store: WeightStore) -> str | None:
    task, backend, kvc = config["task"], config["backend"]["name"], config["kvc"]
    chat, trains = task["name"] == "chat", backend in TRAINABLE
    if quirk in ("scale_bytes_undecoded", "rope_theta_1e6", "e4m3_top_nan") and chat and backend != "fp2":
        return f"it is an incident of path B, and task=chat answers through backend={backend}"
    if quirk == "rope_theta_1e6" and shape.rope_theta == 1e6:
        return "the model's rope_theta is 1e6"
    if quirk == "e4m3_top_nan" and not _has_top_scales(store):
        return "no block scale of these weights is 256 or more (two-level scales are: weights=random weights.levels=row)"
    if quirk == "no_offset_mask" and not (
        chat and backend == "fp2" and kvc["name"] == "persistent" and kvc["prefill"] == "whole"
    ):
        return "a prefill behind a cache needs task=chat backend=fp2 kvc=persistent kvc.prefill=whole"
    if quirk == "no_final_norm" and not (task["name"] == "step" and trains):
        return "it is in the training loss of task=step, for backends that are trained"
    if quirk == "pack_everything" and not (task["name"] == "step" and trains and config["step"]["name"] == "chunked"):
        return "it is in the optimizer of task=step step=chunked"
    if quirk == "no_end_token" and (task["name"] not in ("step", "tune") or Path(config["data"]["path"]).suffix == ".txt"):
        return "it leaves <|im_end|> out of the targets of dialogues, in task=step and task=tune"
    if quirk == "fp16_scales" and not (task["name"] in ("tune", "export") and task["output"]):
        return "it is in the .dat file that task=tune and task=export write to task.output"
    if quirk == "top_p_can_empty" and not (chat and task["temperature"] > 0 and task["top_p"] < 1):
        return "a nucleus is drawn from in task=chat with task.temperature above 0 and task.top_p below 1"
    return None


def _has_top_scales(store: WeightStore) -> bool:
    return any(bool(((_bytes(p.block_scale) & 0x7F) >= E4M3_TOP_EXPONENT).any()) for p in store.fused.values())


def _bytes(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.uint8)
