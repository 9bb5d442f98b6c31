"""task=step, the default: load, probe, take optimizer steps, probe again, with memory at the end of every phase."""

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fp4lab.choices import idle_choices
from fp4lab.errors import Diverged, UserError
from fp4lab.events import Emit, Loss, Note, Progress, StateHealth, TensorBytes
from fp4lab.model.config import HEAD
from fp4lab.model.paths import TRAINABLE, valueless
from fp4lab.model.qwen3 import Qwen3
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.probe import probe
from fp4lab.tasks.session import Session, open_session, report_data, report_samples
from fp4lab.telemetry.tensor_bytes import tensor_report
from fp4lab.train import checks, grads
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.batches import Batch, batches
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.data import load_samples, ordered
from fp4lab.train.fused import FusedAdamW
from fp4lab.train.graph import GraphedStep
from fp4lab.train.joined import JoinedAdamW
from fp4lab.train.loss import LOSSES, evaluate


def run(config: dict, emit: Emit) -> None:
    """Raises PlannedStop at `stop_after`, UserError, Diverged when the loss is not finite."""
    for text in idle_choices(config, config.get("overrides", [])):
        emit(Note(topic="no_effect", text=text))
    phases = Phases(config, emit)
    session = open_session(config, emit)
    phases.done("model_loaded")
    session.dispose()
    phases.done("session_disposed")
    session.compact()
    phases.done("post_load_compacted")
    probe(session, config["prompt"], "before", emit)
    phases.done("first_token_done")
    optimizer: Optimizer | None = make_optimizer(session, emit) if session.backend in TRAINABLE else None
    for row in byte_report(session, optimizer):
        emit(row)
    phases.done("state_initialized")
    samples = _batches(session, emit)
    phases.done("batch_ready")
    if optimizer is None:
        _evaluate(session, samples, phases, emit)
    else:
        _train(session, optimizer, samples, phases, emit)
        session.publish(optimizer.stored())
        probe(session, config["prompt"], "after", emit)
        value, tokens = evaluate(session.model, samples, config["loss"])
        emit(Loss(step=config["steps"], loss=value, split="eval", tokens=tokens))
    session.compact()
    phases.done("cleanup_done")


def _train(session: Session, optimizer: "Optimizer", samples: list[Batch], phases: Phases, emit: Emit) -> None:
    config, step_config = session.config, session.config["step"]
    model = session.model
    assert isinstance(model, Qwen3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    said: set[str] = set()

    def say(topic: str, text: str | None) -> None:
        """The first of a kind; every step has its numbers in StateHealth."""
        if text and topic not in said:
            said.add(topic)
            emit(Note(topic=topic, text=text))

    def checked(loss: Tensor, step: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {step}")
        if config["loss"] == "ce":
            say("loss", checks.loss_out_of_range(value, session.shape.vocab_size))
        return value

    graphed = None
    if isinstance(optimizer, FusedAdamW):
        graphed = GraphedStep(model, optimizer, eager=not step_config["graph"])
        emit(Note(topic="path", text=f"{optimizer.describe()}; {graphed.describe()}"))
    elif isinstance(optimizer, ChunkedAdamW) and optimizer.fast is not None:
        emit(Note(topic="path", text=optimizer.describe()))
    for step in range(config["steps"]):
        started = time.monotonic()
        batch = samples[step % len(samples)]
        for p in parameters:
            p.grad = None
        phases.done("zero_grad_done")
        norm = None
        if isinstance(optimizer, FusedAdamW):
            assert graphed is not None
            every = step_config["health_every"]
            optimizer.count = bool(every) and step % every == 0
            if graphed.eager:
                optimizer.begin(config["lr"])
                loss = _loss(session, batch, optimizer)
                phases.done("forward_done")
                value = checked(loss, step)
                loss.backward()
                phases.done("backward_done")
                health, norm = optimizer.finish()
            else:  # forward, backward and updates are one launch
                value = checked(graphed.step(config["lr"], batch.ids, batch.targets), step)
                health, norm = optimizer.report()
        else:
            loss = _loss(session, batch, None)
            phases.done("forward_done")
            value = checked(loss, step)
            loss.backward()
            del loss
            phases.done("backward_done")
            if step_config["sanitize"]:
                bad = grads.sanitize(parameters)
                if bad:
                    emit(Note(topic="gradients", text=f"step {step}: {bad} non-finite gradients were set to 0"))
            if step_config["grad_norm"] or step_config["clip_grad"]:
                norm = grads.grad_norm(parameters)
                if step_config["clip_grad"]:
                    grads.clip(parameters, norm, step_config["clip_grad"])
            health = optimizer.step(config["lr"])
        moved = session.publish(optimizer.stored(), count=not optimizer.stored())
        if not optimizer.stored():  # float masters: the codes that count are those they were just packed to
            health.code_changed = moved
        emit(health)
        for topic, text in checks.optimizer_step(health, config["lr"], step_config["beta1"], step_config["beta2"]).items():
            say(topic, text)
        phases.done("optimizer_step_done")
        tokens = int((batch.targets >= 0).sum())
        ms = (time.monotonic() - started) * 1e3
        emit(
            Loss(
                step=step,
                loss=value,
                grad_norm=None if norm is None else float(norm),
                tokens=tokens,
                lr=config["lr"],
                ms=ms,
            )
        )


def _evaluate(session: Session, samples: list[Batch], phases: Phases, emit: Emit) -> None:
    """A backend that cannot be trained: the same phases up to the forward, and an evaluation loss."""
    emit(Note(topic="trained", text=f"backend={session.backend} is not trained: the loss is an evaluation."))
    phases.done("zero_grad_done")
    value, tokens = evaluate(session.model, samples, session.config["loss"])
    emit(Loss(step=0, loss=value, split="eval", trained=False, tokens=tokens))
    phases.done("forward_done")


def _loss(session: Session, batch: Batch, fused: FusedAdamW | None) -> Tensor:
    assert isinstance(session.model, Qwen3)
    if fused is not None:
        return fused.loss(session.model.hidden(batch.ids.to(session.device)), batch.targets.to(session.device))
    final_norm = not session.config["quirk"]["no_final_norm"]
    hidden = session.model.hidden(batch.ids.to(session.device), final_norm=final_norm)
    return LOSSES[session.config["loss"]](session.model, hidden, batch.targets.to(session.device))


def _batches(session: Session, emit: Emit) -> list[Batch]:
    """One sample a step, as the reference feeds them; as many as there are steps."""
    config = session.config
    data, quirk = config["data"], config["quirk"]
    samples = load_samples(
        data["path"], session.tokenizer, config["seq_len"], data["style"], end_token=not quirk["no_end_token"]
    )
    report_data(data["path"], emit)
    report_samples(session, samples, emit)
    chosen = ordered(samples, config["seed"], config["data"]["order"])[: config["steps"]]
    return [b for s in chosen for b in batches([s], 1, session.tokenizer.endoftext, 0)]


class DenseAdamW:
    """step=dense: torch's AdamW, with the interface of the chunked one."""

    def __init__(self, parameters: dict[str, nn.Parameter], options: AdamWOptions):
        self._names, self._parameters = list(parameters), list(parameters.values())
        o = options
        self._adamw = torch.optim.AdamW(self._parameters, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)

    def names(self) -> list[str]:
        return self._names

    def stored(self) -> dict:
        return {}

    def tensors(self):
        for state in self._adamw.state.values():
            yield from ((f"state_{k}", t) for k, t in state.items() if isinstance(t, Tensor))

    def step(self, lr: float) -> StateHealth:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        return StateHealth(step=int(next(iter(self._adamw.state.values()))["step"]))


Optimizer = DenseAdamW | ChunkedAdamW | JoinedAdamW | FusedAdamW


def make_optimizer(session: Session, emit: Emit) -> Optimizer:
    """The optimizer that `step` names, over the model's trainable parameters.

    Asserts that what is trained, what is optimised and what would be exported are the same names.
    """
    model, c = session.model, session.config["step"]
    assert isinstance(model, Qwen3)
    if session.device.type == "cuda" and (c["offload_mv"] or c["offload_w"] or c["offload_grad"]):
        _refuse_offload_on_unified_memory(session.device)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fields = AdamWOptions.__dataclass_fields__
    options = AdamWOptions(
        **{k: v for k, v in c.items() if k in fields},
        pack_everything=session.config["quirk"]["pack_everything"],
        rule=session.config["weights"]["rule"],
        seed=session.config["seed"],
    )
    dense = session.store.dense
    if session.backend == "fp2":
        session.store.dense = None  # the masters take over
    if c["name"] == "dense":
        optimizer: Optimizer = DenseAdamW(parameters, options)
    elif c["name"] == "fused":
        packed, after = session.store.packed, _after_each(session, emit, flush=False)
        options = dataclasses.replace(options, offload_mv=False, offload_w=False, offload_grad=False)  # see `idle_choices`
        optimizer = FusedAdamW(model, packed, session.store.tied, options, after, dense, session.frozen)
    elif c["join"]:
        optimizer = JoinedAdamW(parameters, session.store.packed, options, _after_each(session, emit, flush=False))
    else:
        packed = session.store.packed if session.backend == "fp2" else {}
        optimizer = ChunkedAdamW(parameters, packed, options, _after_each(session, emit, c["flush_each_param"]))
    exported = {*session.store.raw, *session.store.packed} - ({HEAD} if session.store.tied else set()) - session.frozen
    trained = set(parameters) if c["name"] != "fused" else exported  # there most have no parameter of their own
    assert trained == set(optimizer.names()) == exported, "trained, optimised and exported tensors differ"
    return optimizer


def _after_each(session: Session, emit: Emit, flush: bool) -> Callable[[int, int], None]:
    """What happens between two parameters: a word to the progress bar, and the flush that was asked for."""

    def after(done: int, total: int) -> None:
        emit(Progress(what="optimizer step", done=done, total=total))
        if flush and session.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    return after


def _refuse_offload_on_unified_memory(device: torch.device) -> None:
    if getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
        raise UserError(
            "step.offload_mv, step.offload_w, step.offload_grad: this device shares its memory with the host, so "
            "offloading only moves the same bytes between accounts, with copies on top. Leave them false."
        )


def byte_report(session: Session, optimizer: Optimizer | None) -> list[TensorBytes]:
    """Bytes by kind, device and dtype; a storage that several tensors share is counted once."""
    groups: dict[str, list[Tensor]] = {}
    if optimizer is not None:
        for kind, t in optimizer.tensors():
            groups.setdefault(kind, []).append(t)
    for kind, t in session.store.tensors():
        groups.setdefault(kind, []).append(t)
    if isinstance(session.model, Qwen3):
        groups["model_param"] = [p for p in session.model.parameters() if p.requires_grad and not valueless(p)]
    return tensor_report(groups)
