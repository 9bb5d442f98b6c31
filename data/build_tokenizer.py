"""Write `models/tiny/tokenizer.json` from `data/dialogues/`. Same text, same bytes.

python data/build_tokenizer.py [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from fp4lab.chat.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096


def texts() -> Iterator[str]:
    for path in sorted((HERE / "dialogues").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for message in json.loads(line)["messages"]:
                yield f"{message['role']}\n"  # as the template writes it, so that a role is one piece
                yield message["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "models" / "tiny" / "tokenizer.json")
    out = parser.parse_args().out
    raw = train_tokenizer(texts(), VOCAB_SIZE)
    raw.save(str(out))
    print(f"{out}: {raw.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
