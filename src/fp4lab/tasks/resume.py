"""A training that can go on after its death: everything that the next step reads, in one safetensors file.

Weights, moments, what every path computes with, the optimizer's count of steps, torch's random state; the data's position is
the number of steps, since the order of samples depends on the seed alone. The tensors of a run are those of any run of the same
configuration, in the same order, so a file is read back into them in place, and the steps after it have the same bits.

A run that goes on begins its records with what the one before it recorded of the steps that are done: its curve is whole, and
has no step twice.
"""

import functools
import hashlib
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
from fp4lab.config import BEFORE, CHECKPOINTS
from fp4lab.encoding import EVENTS, declared_types, decode
from fp4lab.errors import UserError
from fp4lab.events import KINDS, Emit, Event, File, Loss, Note, Progress
from fp4lab.model.paths import valueless
from fp4lab.tasks.advance import Advance
from fp4lab.tasks.session import data_files
from fp4lab.train.state import named_parts

FORMAT = "fp4lab training 1"
# What decides the weights of a step, besides the step itself.
_GROUPS = ("model", "weights", "backend", "step", "data", "quirk")
_KEYS = ("seq_len", "lr", "loss", "seed", "dtype")
_TASK = ("batch_size", "accumulate", "pack", "schedule", "warmup_steps")
_CONTENT = "the content of data.path"
_IDLE = (
    *(f"step.{k}" for k in ("health_every", "grad_norm", "flush_each_param", "streams", "graph")),
    *("data.held_out", "backend.eval_cache"),
)


class Checkpoints:
    """Of one run: written every task.checkpoint_every steps into its folder; the newest task.checkpoints_kept stay."""

    def __init__(self, advance: Advance, emit: Emit):
        self.advance, self.emit, self.config = advance, emit, advance.session.config
        self.every, self.kept = self.config["task"]["checkpoint_every"], self.config["task"]["checkpoints_kept"]
        self.run = Path(self.config.get("out_dir", "."))
        if self.every:  # one more than stays is there while it is written
            size = sum(t.nbytes for _, t in self._tensors())
            check_space(self.run / CHECKPOINTS, size * (self.kept + 1))

    @functools.cached_property
    def _decides(self) -> dict[str, Any]:
        return decides(self.config)

    def resume(self) -> tuple[int, int]:
        """(steps done, tokens seen) of task.resume, read back; (0, 0) without. Raises UserError."""
        source = self.config["task"]["resume"]
        if source is None:
            return 0, 0
        path = newest(Path(source))
        before = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
        if self.run.resolve() == before.resolve():
            raise UserError(
                f"task.resume={source} is this run's own folder, whose records would be lost; give another hydra.run.dir, or "
                "sweep.resume=true, which moves them to a folder in it"
            )
        file = SafetensorsFile(path)
        try:
            told = _told(file, path)
            _compare(told["decides"], self._decides, path)
            self._read(file, path)
        finally:
            file.close()
        steps, tokens = told["steps"], told["tokens"]
        if steps > self.config["steps"]:
            raise UserError(f"{path} has done {steps} steps, and steps={self.config['steps']}; give at least as many")
        self.advance.restore(steps)
        self.emit(File(role="checkpoint", path=str(path), format="safetensors", bytes=path.stat().st_size))
        last = self.config["steps"] - 1  # where no step is left its held-out loss is taken again
        known = [e for e in recorded(before, steps) if not (isinstance(e, Loss) and e.split == "eval" and e.step == last)]
        for event in known:
            self.emit(event)
        text = f"{path}: {steps} steps are done; their {len(known)} records are repeated here from {before / EVENTS}"
        self.emit(Note(topic="resume", text=text))
        return steps, tokens

    def step_done(self, steps: int, tokens: int) -> None:
        """Writes a checkpoint if it is due. `steps` of the run are done."""
        if not self.every or steps % self.every:
            return
        folder = self.run / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{steps:08d}.safetensors"
        tensors = dict(self._tensors())
        told = {"steps": steps, "tokens": tokens, "decides": self._decides}
        layout = plan(path.name, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {FORMAT: json.dumps(told)})
        check_space(path, layout.size)
        with whole_file(path) as part, FileWriter(part, layout) as writer:
            for n, (name, tensor) in enumerate(tensors.items(), start=1):
                writer.put(name, tensor)
                self.emit(Progress(what="checkpoint", done=n, total=len(tensors)))
        self.emit(File(role="checkpoint", path=str(path), format="safetensors", bytes=layout.size))
        here, aside = f"{CHECKPOINTS}/step-*.safetensors", f"{BEFORE}*/{CHECKPOINTS}/step-*.safetensors"
        for old in sorted([*self.run.glob(here), *self.run.glob(aside)], key=lambda p: p.name)[: -self.kept]:
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
            elif name == "random.cuda":
                torch.cuda.set_rng_state(file.tensor(name), self.advance.session.device)
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
        if self.advance.session.device.type == "cuda":
            yield "random.cuda", torch.cuda.get_rng_state(self.advance.session.device)

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        store = self.advance.session.store
        for name, parameter in self.advance.model.named_parameters():
            if not valueless(parameter):
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
    found = sorted((path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path).glob("step-*.safetensors"))
    if not found:
        raise UserError(
            f"task.resume={path}: no checkpoint there; expected {CHECKPOINTS}/step-*.safetensors (task.checkpoint_every)"
        )
    return found[-1]


def recorded(run: Path, steps: int) -> Iterator[Event]:
    """What the run in that folder recorded of its first `steps` steps, in order. A line that a kill cut off is none."""
    path = run / EVENTS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = decode(line)
        except ValueError:
            continue
        kind, at = record["kind"], record.get("step", 0)
        of_step = kind in ("batch", "loss") or record.get("when") == "step" or kind == "state_health"
        if of_step and at < steps + (kind == "state_health"):  # which counts from 1
            yield KINDS[kind](**{k: v for k, v in record.items() if k in declared_types(kind) and k != "kind"})


def decides(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide what weights a step leaves, flat. A schedule that is constant does not depend on `steps`."""
    found = {f"{group}.{k}": v for group in _GROUPS for k, v in config[group].items()}
    found |= {k: config[k] for k in _KEYS} | {f"task.{k}": config["task"][k] for k in _TASK}
    if config["task"]["schedule"] != "constant":
        found["steps"] = config["steps"]
    digest = hashlib.sha256()
    for file in data_files(config["data"]["path"]):
        digest.update(file.read_bytes())
    found[_CONTENT] = digest.hexdigest()[:16]
    return {k: v for k, v in found.items() if k not in _IDLE}


def _compare(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{path}: it was made with {key}={old.get(key)}, this run has {new.get(key)}; go on with the same, or begin "
                "anew in another folder"
            )


def _told(file: SafetensorsFile, path: Path) -> dict[str, Any]:
    if FORMAT not in file.metadata:
        raise UserError(
            f"{path}: not a training checkpoint of this version (its metadata lacks {FORMAT!r}); weights.path loads models"
        )
    return json.loads(file.metadata[FORMAT])


def _bytes(t: Tensor) -> Tensor:
    """The same memory without a meaning: float8 cannot be copied everywhere."""
    return t.detach().reshape(-1).view(torch.uint8)
