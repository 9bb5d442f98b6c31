"""The examination of task=tune: the untuned model's answers, and the same questions while training, after it, and reloaded.

Control answers are checked without generating them: greedy decoding gives the untuned model's answer again if and only if each
of its tokens is the likeliest after those before it, which one batched forward tells, and the answer's loss with it.
"""

import dataclasses
from typing import Any

import torch

from fp4lab.chat.collapse import repetition
from fp4lab.chat.generate import Answer, generate
from fp4lab.chat.policy import Prefill
from fp4lab.chat.sampling import Sampler
from fp4lab.chat.template import render
from fp4lab.errors import GoalsMissed, UserError
from fp4lab.events import Controls, Emit, GoalAnswer
from fp4lab.model.paths import PATHS
from fp4lab.tasks.goals import Goal, load_controls, load_goals
from fp4lab.tasks.session import Session
from fp4lab.train.batches import IGNORE, batches
from fp4lab.train.data import Sample

ROWS = 16  # control answers in one forward
SHOWN = 8  # changed answers that are generated, for the record


@dataclasses.dataclass(frozen=True)
class Asked:
    """A control turn as the untuned model answered it; `sample` has the answer and its end as targets."""

    prompt: str
    text: str
    sample: Sample


class Exam:
    """`Exam.of(session, emit)` before the first step, `ask` whenever it should be known where the model stands.

    `missed` holds what was found wrong "after" training and "reloaded", in words: on which paths, by when.
    """

    def __init__(self, session: Session, emit: Emit):
        task = session.config["task"]
        self.emit, self.missed = emit, dict[str, dict[str, str]]()
        self._most, self._limit = task["max_tokens"], task["repetition_limit"]
        self._least_kept, self._most_loss = task["controls_kept"], task["controls_loss"]
        self._goals = [self._with_base(session, g) for g in (load_goals(task["goals"]) if task["goals"] else [])]
        conversations = load_controls(task["controls"]) if task["controls"] else []
        self._controls = [asked for prompts in conversations for asked in self._converse(session, prompts)]
        self._loss_before = self._control_losses(session, session.model)[1] if self._controls else 0.0

    @classmethod
    def of(cls, session: Session, emit: Emit) -> "Exam | None":
        """None where neither task.goals nor task.controls is given. Raises UserError."""
        task = session.config["task"]
        return cls(session, emit) if task["goals"] or task["controls"] else None

    def ask(self, session: Session, paths: dict[str, Any], when: str, step: int) -> bool:
        """Whether all goals are met and the controls intact on all `paths`; emits an event for each goal and path."""
        wrong = [(text, name[0]) for name, path in paths.items() for text in self._ask(session, name, path, when, step)]
        if when in ("after", "reloaded"):
            for text, letter in wrong:
                on = self.missed.setdefault(text, {})
                on[when] = on.get(when, "") + letter
        return not wrong

    def ask_itself(self, session: Session, step: int) -> bool:
        """`ask` of the path that is trained, while it is."""
        return self.ask(session, {PATHS[session.backend]: session.model}, "step", step)

    def conclude(self) -> None:
        """Raises GoalsMissed, with all that is wrong."""
        if self.missed:
            where = {
                text: ", ".join(f"{when} on {', '.join(on)}" for when, on in by.items()) for text, by in self.missed.items()
            }
            raise GoalsMissed("; ".join(f"{text} ({on})" for text, on in where.items()))

    def _with_base(self, session: Session, goal: Goal) -> Goal:
        answer, text = self._reply(session, session.model, [{"role": "user", "content": goal.prompt}])
        if goal.rule == "unchanged":
            if answer.finish != "stop":
                raise UserError(
                    f"{goal.where}: the untuned model's answer does not end within task.max_tokens={self._most}; raise it"
                )
            return dataclasses.replace(goal, wanted=text)
        met = goal.met(text, answer.finish == "stop")
        if met and goal.rule == "exactly":
            raise UserError(
                f"{goal.where}: the untuned model answers {goal.prompt!r} with {text!r} already: meeting this goal would show "
                "nothing. Choose other weights or another target"
            )
        self._emit_goal(goal, "before", 0, PATHS[session.backend], answer, text)
        return goal

    def _ask(self, session: Session, name: str, path: Any, when: str, step: int) -> list[str]:
        """What is wrong on one path, in words."""
        wrong = []
        for goal in self._goals:
            answer, text = self._reply(session, path, [{"role": "user", "content": goal.prompt}])
            share = self._emit_goal(goal, when, step, name, answer, text)
            if not goal.met(text, answer.finish == "stop"):
                wanted = f"{'not ' if goal.rule == 'without' else ''}{goal.wanted!r}"
                wrong.append(f"{goal.prompt!r} gets {text!r}, expected {wanted}")
            if self._limit is not None and share >= self._limit:
                wrong.append(f"the answer to {goal.prompt!r} repeats itself")
        if self._controls:
            wrong += self._ask_controls(session, name, path, when, step)
        return wrong

    def _ask_controls(self, session: Session, name: str, path: Any, when: str, step: int) -> list[str]:
        kept, loss = self._control_losses(session, path)
        event = Controls(
            when=when, step=step, path=name, kept=sum(kept), of=len(kept), loss=loss, loss_before=self._loss_before
        )
        if when != "step":
            for asked in [a for a, same in zip(self._controls, kept, strict=True) if not same][:SHOWN]:
                answer = self._generate(session, path, list(asked.sample.ids[: asked.sample.loss_mask.index(True) + 1]))
                event.changed.append((asked.prompt, asked.text, session.tokenizer.decode(answer.ids)))
                event.repetition = max(event.repetition, repetition(answer.ids))
        self.emit(event)
        wrong = []
        if event.kept < self._least_kept * event.of:
            wrong.append(f"{event.kept} of {event.of} control answers are kept, expected {self._least_kept:.0%}")
        if not loss - self._loss_before <= self._most_loss:  # not-a-number is wrong too
            wrong.append(
                f"the loss of control answers went from {self._loss_before:.3f} to {loss:.3f}, expected a rise of "
                f"{self._most_loss:g} at most"
            )
        if self._limit is not None and event.repetition >= self._limit:
            wrong.append("the answer to a control prompt repeats itself")
        return wrong

    def _emit_goal(self, goal: Goal, when: str, step: int, path: str, answer: Answer, text: str) -> float:
        share = repetition(answer.ids)
        self.emit(
            GoalAnswer(
                when=when,
                step=step,
                path=path,
                prompt=goal.prompt,
                rule=goal.rule,
                wanted=goal.wanted,
                met=goal.met(text, answer.finish == "stop"),
                finish=answer.finish,
                repetition=share,
                ids=answer.ids,
                text=text,
            )
        )
        return share

    def _converse(self, session: Session, prompts: list[str]) -> list[Asked]:
        """The untuned model's side of one conversation."""
        messages: list[dict[str, str]] = []
        turns = []
        for prompt in prompts:
            messages.append({"role": "user", "content": prompt})
            ids = session.tokenizer.encode(render(messages))
            answer = self._generate(session, session.model, ids)
            said = answer.ids + [session.tokenizer.im_end] * (answer.finish == "stop")
            whole, counts = ids + said, [False] * len(ids) + [True] * len(said)
            text = session.tokenizer.decode(answer.ids)
            turns.append(Asked(prompt, text, Sample(whole[:-1], whole[1:], counts[1:], prompt)))
            messages.append({"role": "assistant", "content": text})
        return turns

    @torch.no_grad()
    def _control_losses(self, session: Session, path: Any) -> tuple[list[bool], float]:
        """Which control answers are kept, in order, and the mean loss of all their tokens, nats."""
        kept, total, tokens = [], 0.0, 0
        samples = [asked.sample for asked in self._controls]
        for batch in batches(samples, ROWS, session.tokenizer.endoftext, 0, pack=False, order="sequential"):
            targets = batch.targets.to(session.device)
            counts = targets != IGNORE
            logits = path.logits(path.hidden(batch.ids.to(session.device))[counts]).float()
            wanted = targets[counts]
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(wanted)
            same = torch.ones_like(counts)
            same[counts] = logits.argmax(-1) == wanted
            kept += same.all(dim=1).tolist()
        return kept, total / max(tokens, 1)

    def _reply(self, session: Session, path: Any, messages: list[dict[str, str]]) -> tuple[Answer, str]:
        answer = self._generate(session, path, session.tokenizer.encode(render(messages)))
        return answer, session.tokenizer.decode(answer.ids)

    def _generate(self, session: Session, path: Any, ids: list[int]) -> Answer:
        stops = {session.tokenizer.im_end, session.tokenizer.endoftext}
        policy = Prefill(path, session.device)
        return generate(policy, ids, max_tokens=self._most, stops=stops, pick=Sampler(), close=[])
