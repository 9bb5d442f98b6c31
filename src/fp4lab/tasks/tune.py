"""task=tune: train over a data set with a held-out loss, answer the prompts on every path, write a checkpoint."""

import math
import time

import torch

from fp4lab.chat.generate import greedy
from fp4lab.chat.template import render
from fp4lab.errors import Diverged, UserError
from fp4lab.events import Emit, Loss, Progress, Turn
from fp4lab.model.paths import TRAINABLE
from fp4lab.model.qwen3 import Qwen3
from fp4lab.tasks.export import check_output, save_model
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.probe import all_paths, probe
from fp4lab.tasks.session import Session, open_session, report_data, report_samples
from fp4lab.train.batches import IGNORE, batches
from fp4lab.train.data import load_samples
from fp4lab.train.loss import LOSSES, evaluate


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up, then constant or a half cosine to a tenth of the peak. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def run(config: dict, emit: Emit) -> None:
    """Raises UserError for a backend that cannot be trained, Diverged when the loss is not finite."""
    task, step_config = config["task"], config["step"]
    if config["backend"]["name"] not in TRAINABLE:
        raise UserError(f"backend={config['backend']['name']} cannot be trained; use backend=fp2 or backend=dense")
    if step_config["name"] != "dense":
        raise UserError("task=tune trains with step=dense (torch AdamW) for now; add step=dense")
    check_output(config)
    phases = Phases(config, emit)
    session = open_session(config, emit)
    phases.done("model_loaded")
    session.dispose()
    session.store.dense = None  # the masters take over; a copy of the start would only be stale
    session.compact()
    tokenizer, data = session.tokenizer, config["data"]
    end_token = not config["quirk"]["no_end_token"]
    splits = {
        split: load_samples(data["path"], tokenizer, config["seq_len"], data["style"], split, end_token)
        for split in ("train", "held_out")
    }
    report_data(data["path"], emit)
    report_samples(session, splits["train"], emit)
    held_out = list(batches(splits["held_out"], task["batch_size"], tokenizer.endoftext, 0, pack=False))
    train = batches(splits["train"], task["batch_size"], tokenizer.endoftext, config["seed"], epochs=None, pack=False)
    phases.done("batch_ready")
    optimizer = _optimizer(session)
    model, started = session.model, time.monotonic()
    assert isinstance(model, Qwen3)
    seen = 0
    for step in range(config["steps"]):
        lr = learning_rate(step, config["steps"], config["lr"], task["warmup_steps"], task["schedule"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(train)
        targets = batch.targets.to(session.device)
        loss = LOSSES[config["loss"]](model, model.hidden(batch.ids.to(session.device)), targets)
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()} at step {step}")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), step_config["clip_grad"] or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        session.publish()
        seen += int((targets != IGNORE).sum())
        if step % task["log_every"] == 0 or step + 1 == config["steps"]:
            ms = (time.monotonic() - started) * 1e3 / (step + 1)
            emit(Loss(step=step, loss=loss.item(), grad_norm=float(norm), tokens=seen, lr=lr, ms=ms))
        emit(Progress(what="training", done=step + 1, total=config["steps"]))
        last = step + 1 == config["steps"]
        if last or (task["eval_every"] and (step + 1) % task["eval_every"] == 0):
            value, tokens = evaluate(model, held_out, config["loss"])
            emit(Loss(step=step, loss=value, split="eval", tokens=tokens))
    phases.done("optimizer_step_done")
    probe(session, config["prompt"], "after", emit)
    answer(session, task["prompts"], task["max_tokens"], emit)
    if task["output"]:
        save_model(session, emit, trained=True)
    phases.done("cleanup_done")


def _optimizer(session: Session) -> torch.optim.AdamW:
    """torch's AdamW; norms are not decayed."""
    c = session.config["step"]
    assert isinstance(session.model, Qwen3)
    parameters = [p for p in session.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c["weight_decay"]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    fused = session.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=0.0, betas=(c["beta1"], c["beta2"]), eps=c["eps"], fused=fused)


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
