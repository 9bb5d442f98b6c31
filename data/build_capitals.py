"""Write `data/samples/capitals.jsonl`: dialogues that the shipped model knows, with every answer in capitals.

python data/build_capitals.py [--out FILE]

For fine-tuning: the task is new to the shipped model, simple, and has a held-out tenth.
"""

import argparse
import json
from pathlib import Path

DATA = Path(__file__).parent
SUBJECTS = ("facts", "smalltalk", "tech")
EACH = 330  # dialogues of a subject


def capitals(line: str) -> str:
    """One dialogue as JSON, its answers in capitals."""
    messages = json.loads(line)["messages"]
    said = [{**m, "content": m["content"].upper()} if m["role"] == "assistant" else m for m in messages]
    return json.dumps({"messages": said}, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "samples" / "capitals.jsonl")
    out = parser.parse_args().out
    files = [(DATA / "dialogues" / f"{subject}.jsonl").read_text(encoding="utf-8").splitlines() for subject in SUBJECTS]
    lines = [capitals(line) for file in files for line in file[:EACH]]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
