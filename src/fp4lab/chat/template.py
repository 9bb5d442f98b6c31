"""Qwen's chat template, and the two other forms that the reference used (reference log, 4.1).

    official   <|im_start|>{role}\\n{text}<|im_end|>\\n ... <|im_start|>assistant\\n
    training   the same with a newline before the <|im_end|> of what the user (or system) says

There is no default system message. `turn_prompt` and `CLOSE` are the parts that a persistent KV cache appends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fp4lab.errors import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ASSISTANT_START = f"{IM_START}assistant\n"
CLOSE = f"{IM_END}\n"  # ends an answer: two tokens
STYLES = ("official", "training")
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


def render(messages: Sequence[Message], style: str = "official", add_generation_prompt: bool = True) -> str:
    """The text of a conversation.

    Args:
        messages: each with `role` (system, user or assistant) and `content`, taken literally: a special
            token written in it becomes that token when encoded.
        style: one of `STYLES`. "official" equals the `chat_template` of Qwen3 Instruct without tools.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises UserError for an unknown style or a message that is not of this form.
    """
    if style not in STYLES:
        raise UserError(f"template style {style!r}: expected one of {', '.join(STYLES)}")
    text = "".join(open_turn(message) + close_turn(message, style) for message in messages)
    return text + ASSISTANT_START if add_generation_prompt else text


def open_turn(message: Message) -> str:
    """`<|im_start|>{role}\\n{content}`, without what ends the turn."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"chat message with role {role!r}: expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"chat message of {role} with content {content!r}: expected text")
    return f"{IM_START}{role}\n{content}"


def close_turn(message: Message, style: str = "official") -> str:
    """What follows the content. Answers end alike in both styles: the reference never rendered one in training."""
    return "\n" + CLOSE if style == "training" and message["role"] != "assistant" else CLOSE


def turn_prompt(text: str) -> str:
    """One user turn up to the point where the answer starts, to append to a persistent cache."""
    return render([{"role": "user", "content": text}])
