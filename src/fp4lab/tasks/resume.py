"""A training that can go on after its death: everything that the next step reads, in one safetensors file.

Weights, moments, what every path computes with, the optimizer's count of steps, torch's random state; the data's position is
the number of steps, since the order of samples depends on the seed alone. The tensors of a run are those of any run of the same
configuration, in the same order, so a file is read back into them in place, and the steps after it have the same bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4lab.checkpoint.atomic import whole_file
from fp4lab.checkpoint.export import check_space
from fp4lab.checkpoint.layout import FileWriter
from fp4lab.checkpoint.safetensors_file import SafetensorsFile, plan
from fp4lab.errors import UserError
from fp4lab.events import Emit, File, Note
from fp4lab.tasks.advance import Advance
from fp4lab.train.state import named_parts

FOLDER, FORMAT = "checkpoints", "fp4lab training 1"
# What decides the weights of a step, besides the step itself.
_GROUPS = ("model", "weights", "backend", "step", "data", "quirk")
_KEYS = ("seq_len", "lr", "loss", "seed", "dtype")
_TASK = ("batch_size", "accumulate", "pack", "schedule", "warmup_steps")
_IDLE = ("step.health_every", "step.grad_norm", "step.flush_each_param", "step.graph", "data.held_out", "backend.eval_cache")


class Checkpoints:
    """Of one run: written every task.checkpoint_every steps into its folder; the newest task.checkpoints_kept stay."""

    def __init__(self, advance: Advance, emit: Emit):
        self.advance, self.emit, self.config = advance, emit, advance.session.config
        self.every, self.kept = self.config["task"]["checkpoint_every"], self.config["task"]["checkpoints_kept"]
        self.folder = Path(self.config["out_dir"]) / FOLDER if self.every else None

    def resume(self) -> tuple[int, int]:
        """(steps done, tokens seen) of task.resume, read back; (0, 0) without. Raises UserError."""
        source = self.config["task"]["resume"]
        if source is None:
            return 0, 0
        path = newest(Path(source))
        if Path(self.config["out_dir"]).resolve() in path.resolve().parents:
            raise UserError(
                f"task.resume={source} is this run's own folder, whose records would be lost; give another hydra.run.dir"
            )
        file = SafetensorsFile(path)
        try:
            told = _told(file, path)
            _compare(told["decides"], decides(self.config), path)
            self._read(file, path)
        finally:
            file.close()
        steps, tokens = told["steps"], told["tokens"]
        if steps >= self.config["steps"]:
            raise UserError(
                f"{path} has done {steps} steps, and steps={self.config['steps']}: nothing is left; give more steps"
            )
        self.advance.restore(steps)
        self.emit(File(role="checkpoint", path=str(path), format="safetensors", bytes=path.stat().st_size))
        self.emit(
            Note(topic="resume", text=f"{path}: {steps} steps are done; the losses before are in the records of that run")
        )
        return steps, tokens

    def step_done(self, steps: int, tokens: int) -> None:
        """Writes a checkpoint if it is due. `steps` of the run are done."""
        if self.folder is None or steps % self.every:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{steps:08d}.safetensors"
        tensors = dict(self._tensors())
        told = {"steps": steps, "tokens": tokens, "decides": decides(self.config)}
        layout = plan(path.name, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {FORMAT: json.dumps(told)})
        check_space(path, layout.size)
        with whole_file(path) as part, FileWriter(part, layout) as writer:
            for name, tensor in tensors.items():
                writer.put(name, tensor)
        self.emit(File(role="checkpoint", path=str(path), format="safetensors", bytes=layout.size))
        for old in sorted(self.folder.glob("step-*.safetensors"))[: -self.kept]:
            old.unlink()

    @torch.no_grad()
    def _read(self, file: SafetensorsFile, path: Path) -> None:
        self.advance.make_state()
        tensors = dict(self._tensors())
        if different := sorted(tensors.keys() ^ file.slots.keys()):
            raise UserError(f"{path}: {different[0]} is in one of it and this run alone; it is another version's or model's")
        for name, tensor in tensors.items():
            slot = file.slots[name]
            if (slot.dtype, slot.shape) != (tensor.dtype, tuple(tensor.shape)):
                raise UserError(
                    f"{path}: {name} is {slot.dtype} {list(slot.shape)}; this run has {tensor.dtype} {list(tensor.shape)}"
                )
            if name == "random":
                torch.set_rng_state(file.tensor(name))
            else:
                _bytes(tensor).copy_(_bytes(file.tensor(name)))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that the next step reads, by name; those that share memory once, under the first."""
        seen: set[tuple[Any, int]] = set()
        for name, tensor in self._all():
            place = tensor.device, tensor.data_ptr()
            if tensor.numel() and place not in seen:
                seen.add(place)
                yield name, tensor.detach()
        yield "random", torch.get_rng_state()

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        store = self.advance.session.store
        for name, parameter in self.advance.model.named_parameters():
            yield f"model.{name}", parameter.detach()
        for name, packed in store.packed.items():
            yield from ((f"stored.{name}.{part}", t) for part, t in named_parts(packed))
        for name, tensor in store.raw.items():
            yield f"stored.{name}", tensor
        for n, (kind, tensor) in enumerate(self.advance.state()):
            yield f"optimizer.{n:05d}.{kind}", tensor


def newest(path: Path) -> Path:
    """`path` itself if it is a file, else the newest checkpoint of the run whose folder it is. Raises UserError."""
    if path.is_file():
        return path
    found = sorted((path / FOLDER if (path / FOLDER).is_dir() else path).glob("step-*.safetensors"))
    if not found:
        raise UserError(
            f"task.resume={path}: no checkpoint there; expected {FOLDER}/step-*.safetensors (task.checkpoint_every)"
        )
    return found[-1]


def decides(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide what weights a step leaves, flat. A schedule that is constant does not depend on `steps`."""
    found = {f"{group}.{k}": v for group in _GROUPS for k, v in config[group].items()}
    found |= {k: config[k] for k in _KEYS} | {f"task.{k}": config["task"][k] for k in _TASK}
    if config["task"]["schedule"] != "constant":
        found["steps"] = config["steps"]
    return {k: v for k, v in found.items() if k not in _IDLE}


def _compare(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(f"{path}: it was made with {key}={old.get(key)}, this run has {new.get(key)}; resume with the same")


def _told(file: SafetensorsFile, path: Path) -> dict[str, Any]:
    if FORMAT not in file.metadata:
        raise UserError(
            f"{path}: not a training checkpoint of this version (its metadata lacks {FORMAT!r}); weights.path loads models"
        )
    return json.loads(file.metadata[FORMAT])


def _bytes(t: Tensor) -> Tensor:
    """The same memory without a meaning: float8 cannot be copied everywhere."""
    return t.detach().reshape(-1).view(torch.uint8)
