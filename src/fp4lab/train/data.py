"""Text files to samples: next-token inputs and targets, and which targets count in the loss.

.txt    one raw text a line; every target counts                       (reference log 5.3, one-step)
.tsv    prompt<TAB>target; the target and its <|im_end|> count          (5.3, whoami, plus the end token)
.jsonl  {"messages": [...]} a line; all the assistant's turns count
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4lab.chat.template import ASSISTANT_START, close_turn, open_turn, render
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.errors import UserError

SUFFIXES = (".jsonl", ".tsv", ".txt")
SPLITS = ("all", "train", "held_out")
ORDERS = ("random", "sequential")
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Sample:
    """`targets[t]` is the token after `ids[t]`; it counts in the loss where `loss_mask[t]`. All of one length."""

    ids: list[int]
    targets: list[int]
    loss_mask: list[bool]
    source: str  # file:line

    def __len__(self) -> int:
        return len(self.ids)


class Samples(list[Sample]):
    """A list that also knows how many samples did not fit the window: those cut, and those left out as no target was inside."""

    cut: int = 0
    dropped: int = 0


def held_out(dialogue: dict[str, Any]) -> bool:
    """Whether a dialogue belongs to the tenth that training never sees; depends on its text alone."""
    messages = dialogue["messages"]
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    whole = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    digest = hashlib.sha256(f"{first}\0{whole}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def load_samples(
    path: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    style: str = "official",
    split: str = "all",
    end_token: bool = True,
) -> Samples:
    """Samples of a file, or of all data files of a directory in the order of their names.

    Args:
        seq_len: most inputs a sample has. Raw text keeps its start, prompts and dialogues keep their end.
        style: rendering of `.tsv` and `.jsonl`, see `fp4lab.chat.template`.
        split: "train" leaves out and "held_out" keeps only what `held_out` selects (a `.txt` or `.tsv` line
            is judged as the dialogue it would make).
        end_token: whether the <|im_end|> of an answer counts in the loss (False: quirk.no_end_token).

    Raises UserError for a missing or empty file, an unknown kind, and a malformed line (with its number).
    """
    if seq_len < 1:
        raise UserError(f"seq_len {seq_len}: expected at least 1")
    if split not in SPLITS:
        raise UserError(f"data split {split!r}: expected one of {', '.join(SPLITS)}")
    samples = Samples()
    found = 0
    for file in _files(Path(path)):
        for number, line in _lines(file):
            where = f"{file}:{number}"
            dialogue = _PARSERS[file.suffix](line, where)
            if dialogue is None:
                continue
            found += 1
            if split != "all" and held_out(dialogue) != (split == "held_out"):
                continue
            if file.suffix == ".txt":
                sample, length = _text_sample(line, tokenizer, seq_len, where)
            else:
                ids, counts = _dialogue_ids(dialogue, tokenizer, style, file.suffix == ".jsonl", end_token)
                length = len(ids) - 1
                ids, counts = ids[-(seq_len + 1) :], counts[-(seq_len + 1) :]
                sample = Sample(ids[:-1], ids[1:], counts[1:], where)
            if any(sample.loss_mask):
                samples.append(sample)
                samples.cut += length > seq_len
            else:
                samples.dropped += 1
    if not found:
        raise UserError(f"{path}: no samples; expected text lines, prompt<TAB>target lines or JSON dialogues")
    return samples


def ordered(samples: Sequence[Sample], seed: int, mode: str = "random", epoch: int = 0) -> list[Sample]:
    """One pass over the samples: as they are, or shuffled by `seed` and `epoch`; every sample occurs once."""
    if mode not in ORDERS:
        raise UserError(f"data order {mode!r}: expected one of {', '.join(ORDERS)}")
    out = list(samples)
    if mode == "random":
        random.Random(f"{seed}:{epoch}").shuffle(out)
    return out


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{path}: no data files in it; expected {', '.join('*' + s for s in SUFFIXES)}")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory; expected a {', '.join(SUFFIXES)} file or a folder of them")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of data; expected a name ending in {', '.join(SUFFIXES)}")
    return [path]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1. Splits at line ends only, unlike `str.splitlines`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _text(line: str, where: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": line}]}


def _pair(line: str, where: str) -> dict[str, Any] | None:
    if line.startswith("#") or (where.endswith(":1") and line.strip().lower() == "prompt\ttarget"):
        return None
    prompt, _, target = (part.strip() for part in line.partition("\t"))
    if not prompt or not target:
        raise UserError(f"{where}: expected prompt<TAB>target with text on both sides, got {line[:60]!r}")
    return _messages(prompt, target)


def _messages(prompt: str, target: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]}


def _dialogue(line: str, where: str) -> dict[str, Any]:
    try:
        dialogue = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); expected one dialogue on each line") from error
    messages = dialogue.get("messages") if isinstance(dialogue, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f'{where}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    try:
        render(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where}: no message of the assistant; there is nothing to learn from")
    return dialogue


_PARSERS = {".txt": _text, ".tsv": _pair, ".jsonl": _dialogue}


def _text_sample(line: str, tokenizer: Tokenizer, seq_len: int, where: str) -> tuple[Sample, int]:
    """The sample, and how many inputs the whole line would have."""
    ids = tokenizer.encode(line)
    if len(ids) < 3:
        raise UserError(f"{where}: {len(ids)} token(s); expected at least 3, write a longer line")
    length = min(seq_len, len(ids) - 1)
    return Sample(ids[:length], ids[1 : length + 1], [True] * length, where), len(ids) - 1


def _dialogue_ids(
    dialogue: dict[str, Any], tokenizer: Tokenizer, style: str, close_last: bool, end_token: bool
) -> tuple[list[int], list[bool]]:
    """Ids of the rendered dialogue and which of them the assistant wrote, <|im_end|> included if `end_token`.

    An answer is encoded apart from its opening, as generation does. `close_last`: keep the newline at the end.
    """
    ids: list[int] = []
    counts: list[bool] = []

    def add(piece: list[int], written: bool) -> None:
        ids.extend(piece)
        counts.extend([written] * len(piece))

    newline = tokenizer.encode("\n")
    for message in dialogue["messages"]:
        if message["role"] == "assistant":
            add(tokenizer.encode(ASSISTANT_START), False)
            add(tokenizer.encode(message["content"]), True)
            add([tokenizer.im_end], end_token)
            add(newline, False)
        else:
            add(tokenizer.encode(open_turn(message) + close_turn(message, style)), False)
    if not close_last:
        del ids[-len(newline) :], counts[-len(newline) :]
    return ids, counts
