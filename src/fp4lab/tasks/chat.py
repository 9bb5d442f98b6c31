"""task=chat: a conversation through one path under a KV policy; latency, memory and text of every turn."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp4lab.chat.collapse import repetition, signs
from fp4lab.chat.conversation import Conversation, Script, load_script
from fp4lab.chat.generate import Answer, generate
from fp4lab.chat.policy import POLICIES, Persistent, Replay
from fp4lab.chat.sampling import Sampler
from fp4lab.chat.stream import TextStream
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.choices import idle_choices
from fp4lab.errors import Collapsed, UserError
from fp4lab.events import Emit, FirstToken, Loss, Note, Progress, Turn
from fp4lab.model.paths import PATHS
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.probe import first_token
from fp4lab.tasks.session import Session, open_session

_MIB = 1 << 20


def run(config: dict[str, Any], emit: Emit) -> None:
    """Raises PlannedStop at `stop_after`, UserError, Collapsed where an answer has come apart and may not."""
    for text in idle_choices(config, config.get("overrides", [])):
        emit(Note(topic="no_effect", text=text))
    script = read_script(config)
    phases = Phases(config, emit)
    session = open_session(config, emit, trains=False)
    phases.done("model_loaded")
    session.dispose()
    phases.done("session_disposed")
    session.compact()
    phases.done("post_load_compacted")
    chat = Chat(session, emit, script.system, script.turns)
    for n, prompt in enumerate(script.turns):
        emit(Progress(what="turn", done=n, total=len(script.turns)))
        chat.turn(prompt)
        phases.done("turn_done")
    session.compact()
    phases.done("cleanup_done")


def read_script(config: dict[str, Any]) -> Script:
    """`prompt` and `followup_prompt`, or the file. Raises UserError."""
    task = config["task"]
    if task["conversation"] is not None:
        return load_script(Path(task["conversation"]))
    return Script([config["prompt"]] + [task["followup_prompt"]] * (task["turns"] - 1))


class Chat:
    """A conversation that goes on: `turn(text)` asks, answers and reports.

    `expected` are the turns that will come, if they are known: the persistent cache is made large enough for them.
    """

    def __init__(self, session: Session, emit: Emit, system: str | None = None, expected: list[str] | None = None):
        config = session.config
        self._session, self._emit, self._task = session, emit, config["task"]
        self._kvc = config["kvc"]["name"]
        self.conversation = Conversation(session.tokenizer, config["data"]["style"], system)
        self._stops = stop_ids(session.tokenizer, self._task["stop_tokens"]) if not self._task["ignore_eos"] else set()
        self._sampler = Sampler(
            self._task["temperature"], self._task["top_p"], config["seed"], config["quirk"]["top_p_can_empty"]
        )
        self._policy = self._make_policy(system, expected or [])

    def _make_policy(self, system: str | None, expected: list[str]) -> Replay:
        s, token_by_token = self._session, self._session.config["kvc"]["prefill"] == "token"
        if self._kvc != "persistent":
            return POLICIES[self._kvc](s.model, s.device, token_by_token)
        whole = Conversation(s.tokenizer, self.conversation.style, system)
        asked = sum(len(whole.ask(text)) for text in expected)
        capacity = asked + len(expected) * (self._task["max_tokens"] + len(whole.close))
        return Persistent(s.model, s.device, token_by_token, min(capacity, s.shape.max_position_embeddings))

    def turn(self, prompt: str, on_text: Callable[[str], None] | None = None) -> Turn:
        """One turn; `on_text` hears the answer as it is made. Raises UserError when no position is left, Collapsed."""
        s, task, n = self._session, self._task, len(self.conversation.answers)
        if task["clean_before_turn"]:
            s.compact()
        new, close, most = self.conversation.ask(prompt), self.conversation.close, s.shape.max_position_embeddings
        needed = len(self._policy.context) + len(new) + 1 + len(close)
        if needed > most:
            raise UserError(
                f"turn {n + 1} needs {needed} tokens of context and the model has max_position_embeddings={most}; "
                "ask for fewer turns, shorter ones, or a smaller task.max_tokens"
            )
        stream = TextStream(s.tokenizer)

        def heard(token: int) -> None:
            piece = stream.push(token)
            if on_text is not None and piece:
                on_text(piece)

        self._sampler.start_turn(n)
        answer = generate(
            self._policy,
            new,
            max_tokens=task["max_tokens"],
            stops=self._stops,
            pick=self._sampler,
            close=close,
            max_context=most,
            turn_s=task["turn_s"],
            on_token=heard,
        )
        self.conversation.answered(stream.text, answer.ids)
        template_tokens, canonical = self.conversation.check(self._policy.context)
        said = Turn(
            n=n,
            path=PATHS[s.backend],
            kvc=self._kvc,
            system=self.conversation.system if n == 0 else None,
            prompt=prompt,
            prompt_tokens=len(new),
            context_tokens=len(self._policy.context),
            template_tokens=template_tokens,
            canonical=canonical,
            cache_len=self._policy.most_cached,
            cache_mib=self._policy.cache_bytes / _MIB,
            first_token_ms=answer.token_ms[0],
            ms_per_token=statistics.median(answer.token_ms[1:]) if len(answer.token_ms) > 1 else None,
            seconds=sum(answer.token_ms) / 1e3,
            finish=answer.finish,
            nll=answer.nll,
            repetition=repetition(answer.ids),
            ids=answer.ids,
            text=stream.text,
        )
        if n == 0:
            self._emit(self._first_token(prompt, new, answer))
        self._emit(said)
        self._emit(Loss(step=n, loss=answer.nll, split="eval", trained=False, tokens=len(answer.token_ms)))
        self._judge(n, answer, stream.text)
        return said

    def _judge(self, n: int, answer: Answer, text: str) -> None:
        found = signs(text, answer.ids, answer.bad_logits_at, self._task["repetition_limit"])
        if not found:
            return
        said = f"turn {n + 1}: {'; '.join(found)}"
        if self._task["on_collapse"] == "end":
            raise Collapsed(said)
        self._emit(Note(topic="collapse", text=said))

    def _first_token(self, prompt: str, ids: list[int], answer: Answer) -> FirstToken:
        """The list of this path alone: others are not loaded to generate."""
        assert answer.first_logits is not None
        s = self._session
        token = first_token(s.tokenizer, PATHS[s.backend], "before", prompt, ids, answer.first_logits)
        token.activations = "none" if s.backend == "dense" else s.activations
        return token


def stop_ids(tokenizer: Tokenizer, more: list[str]) -> set[int]:
    """<|im_end|>, <|endoftext|> and `more`. Raises UserError for one that is not a single token."""
    found = {tokenizer.im_end, tokenizer.endoftext}
    for text in more:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(f"task.stop_tokens: {text!r} is {len(ids)} tokens of this tokenizer; expected exactly one")
        found.add(ids[0])
    return found
