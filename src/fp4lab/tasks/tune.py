"""task=tune: train over a data set with a held-out loss, answer the prompts on every path, write a checkpoint."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from fp4lab.chat.generate import greedy
from fp4lab.chat.template import render
from fp4lab.choices import idle_choices
from fp4lab.errors import Diverged, UserError
from fp4lab.events import Emit, Fed, Loss, Note, Progress, Turn
from fp4lab.model.paths import TRAINABLE
from fp4lab.tasks.advance import Advance
from fp4lab.tasks.exam import Exam
from fp4lab.tasks.export import check_model, check_output, hold_against, reloading, save_model, trained_is_same
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.probe import all_paths, probe
from fp4lab.tasks.resume import Checkpoints
from fp4lab.tasks.session import Session, open_session, report_data, report_samples
from fp4lab.train.batches import IGNORE, Batch, batches
from fp4lab.train.data import load_samples
from fp4lab.train.loss import evaluate


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up, then constant or a half cosine to a tenth of the peak. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def run(config: dict, emit: Emit) -> None:
    """Raises UserError for a backend that cannot be trained, Diverged when the loss is not finite, GoalsMissed."""
    task = config["task"]
    if config["backend"]["name"] not in TRAINABLE:
        raise UserError(f"backend={config['backend']['name']} cannot be trained; use backend=fp2 or backend=dense")
    check_output(config)
    for text in idle_choices(config, config.get("overrides", [])):
        emit(Note(topic="no_effect", text=text))
    phases = Phases(config, emit)
    session = open_session(config, emit)
    if task["output"]:
        check_model(session, trained=True)
    phases.done("model_loaded")
    session.dispose()
    session.compact()
    train, held_out = _data(session, emit)
    phases.done("batch_ready")
    exam = Exam.of(session, emit)
    if exam is not None:
        probe(session, config["prompt"], "before", emit)
        phases.done("first_token_done")
    advance = Advance(session, emit)
    checkpoints = Checkpoints(advance, emit)
    begun, seen = checkpoints.resume()
    train = itertools.islice(train, begun, None)
    started = time.monotonic()
    step = begun - 1
    if begun == config["steps"]:  # it died after its last step
        _evaluate(session, held_out, step, emit)
    for step in range(begun, config["steps"]):
        lr = learning_rate(step, config["steps"], config["lr"], task["warmup_steps"], task["schedule"])
        batch = next(train)
        emit(Fed(step=step, samples=_lines(batch)))
        done = advance(batch, lr)
        seen += int((batch.targets != IGNORE).sum())
        if step % task["log_every"] == 0 or step + 1 == config["steps"]:
            ms = (time.monotonic() - started) * 1e3 / (step + 1 - begun)
            emit(Loss(step=step, loss=done.loss, grad_norm=done.grad_norm, tokens=seen, lr=lr, ms=ms))
            if done.health is not None:
                emit(done.health)
        emit(Progress(what="training", done=step + 1, total=config["steps"]))
        last = step + 1 == config["steps"]
        if last or (task["eval_every"] and (step + 1) % task["eval_every"] == 0):
            value = _evaluate(session, held_out, step, emit)
            met = exam is not None and exam.ask_itself(session, step)
            if reached := _reached(task, value, met):
                emit(Note(topic="stop", text=f"training ended after step {step}: {reached}"))
                break
        checkpoints.step_done(step + 1, seen)  # when all of the step is recorded
    phases.done("optimizer_step_done")
    after = probe(session, config["prompt"], "after", emit)
    answer(session, task["prompts"], task["max_tokens"], emit)
    if exam is not None:
        exam.ask(session, all_paths(session), "after", step)
    if task["output"]:
        written = save_model(session, emit, trained=True)
        phases.done("export_done")
        activations, same = session.activations, trained_is_same(session)
        exact = max(session.dtype, torch.bfloat16, key=lambda t: torch.finfo(t).eps)  # the file's floats are rounded
        del session, advance, checkpoints, train  # the model that was trained is gone before it is loaded again
        again = open_session(reloading(config, written), emit)
        reloaded = probe(again, config["prompt"], "reloaded", emit)
        hold_against(after, reloaded, exact, activations, config, written, same, emit)
        if exam is not None:
            exam.ask(again, all_paths(again), "reloaded", step)
        again.dispose()
    phases.done("cleanup_done")
    if exam is not None:
        exam.conclude()


def _data(session: Session, emit: Emit) -> tuple[Iterator[Batch], list[Batch]]:
    """Batches to train on, without end, and those of the held-out loss."""
    config, data, pad = session.config, session.config["data"], session.tokenizer.endoftext
    size, end_token = config["task"]["batch_size"], not config["quirk"]["no_end_token"]
    sources = [(data["path"], "train"), (data["path"], "held_out")]
    if data["held_out"]:
        sources = [(data["path"], "all"), (data["held_out"], "all")]
    samples, held_out = (
        load_samples(path, session.tokenizer, config["seq_len"], data["style"], split, end_token) for path, split in sources
    )
    for path in dict.fromkeys(path for path, _ in sources):
        report_data(path, emit)
    report_samples(session, samples, emit)
    train = batches(samples, size, pad, config["seed"], None, config["seq_len"], config["task"]["pack"], data["order"])
    if not held_out:
        said = (
            f"no sample of {sources[1][0]} is held out (a tenth is, by its text): no held-out loss; data.held_out=FILE has one"
        )
        if config["task"]["stop_at_loss"] is not None:
            raise UserError(f"task.stop_at_loss: {said}")
        emit(Note(topic="data", text=said))
        return train, []
    return train, list(batches(held_out, size, pad, 0, pack=False))


def _evaluate(session: Session, held_out: list[Batch], step: int, emit: Emit) -> float:
    """The held-out loss, infinite where there is nothing to take it on. Raises Diverged."""
    if not held_out:
        return math.inf
    value, tokens = evaluate(session.model, held_out, session.config["loss"])
    emit(Loss(step=step, loss=value, split="eval", tokens=tokens))
    if not math.isfinite(value):
        raise Diverged(f"the held-out loss is {value} after step {step}")
    return value


def _lines(batch: Batch) -> dict[str, list[int]]:
    """The samples of a batch, by file."""
    lines: dict[str, list[int]] = {}
    for source in batch.sources:
        file, _, line = source.rpartition(":")
        lines.setdefault(file, []).append(int(line))
    return lines


def _reached(task: dict[str, Any], held_out_loss: float, met: bool) -> str:
    """Which of the targets that end training early is reached, in words; empty if none."""
    if task["stop_at_goals"] and met:
        return "goals met, controls intact (task.stop_at_goals)"
    if task["stop_at_loss"] is not None and held_out_loss <= task["stop_at_loss"]:
        return f"a held-out loss of {held_out_loss:.4f} (task.stop_at_loss={task['stop_at_loss']:g})"
    return ""


def answer(session: Session, prompts: list[str], max_tokens: int, emit: Emit) -> None:
    """Greedy answers of every path. A line `first\\nsecond` of `prompts` is a conversation of several turns."""
    stops = {session.tokenizer.im_end, session.tokenizer.endoftext}
    for name, path in all_paths(session).items():
        for conversation in prompts:
            messages: list[dict[str, str]] = []
            for n, prompt in enumerate(conversation.split("\n")):
                messages.append({"role": "user", "content": prompt})
                ids = session.tokenizer.encode(render(messages))
                out = greedy(path, ids, max_tokens, stops, session.device)
                text = session.tokenizer.decode(out)
                messages.append({"role": "assistant", "content": text})
                emit(
                    Turn(
                        n=n,
                        path=name,
                        prompt=prompt,
                        prompt_tokens=len(ids),
                        context_tokens=len(ids) + len(out),
                        ids=out,
                        text=text,
                    )
                )
