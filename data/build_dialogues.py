"""Write `data/dialogues/*.jsonl` from the authored phrases. Same code, same bytes.

python data/build_dialogues.py [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from authored import english, english_followups, mandarin, openers
from authored.surface import Chat

SEED = 20260401
# Subject -> (function that makes one dialogue, how many different ones to write).
SUBJECTS: dict[str, tuple[Callable[[random.Random], Chat], int]] = {
    "greetings": (english.greeting, 330),
    "ufo": (english.ufo, 650),
    "identity": (english.identity, 450),
    "openers": (openers.opener, 420),
    "facts": (english.fact, 1000),
    "smalltalk": (english.smalltalk, 420),
    "followups": (english_followups.followup, 950),
    "tech": (english.tech, 330),
    "control": (english.control, 300),
    "zh_greetings": (mandarin.greeting, 110),
    "zh_ufo": (mandarin.ufo, 220),
    "zh_identity": (mandarin.identity, 220),
    "zh_facts": (mandarin.fact, 330),
    "zh_smalltalk": (mandarin.smalltalk, 150),
    "zh_followups": (mandarin.followup, 320),
}


def build() -> dict[str, list[str]]:
    """JSON lines by subject. No dialogue occurs twice in the whole set."""
    seen: set[str] = set()
    out = {}
    for subject, (make, wanted) in SUBJECTS.items():
        rng = random.Random(f"{SEED}:{subject}")
        lines: list[str] = []
        for _ in range(wanted * 40):
            line = json.dumps({"messages": make(rng).messages()}, ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                lines.append(line)
            if len(lines) == wanted:
                break
        else:
            raise SystemExit(f"{subject}: only {len(lines)} of {wanted} different dialogues; add phrases or ask for fewer")
        out[subject] = lines
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "dialogues")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for subject, lines in build().items():
        (out / f"{subject}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
