"""Does another engine give the tuned model's answers? Asks an exported folder through transformers; exit code 1 on a miss.

python experiments/identity/ask_transformers.py FOLDER --untuned FOLDER [--goals data/identity/goals.jsonl] [--max-tokens 48]

FOLDER is what task.output or `fp4lab export --to compressed-tensors` (or hf) wrote; the untuned model, in the same format, says
what "unchanged" means. Everything is the folder's own: template, stop tokens, dtype; decoding is greedy.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import transformers

from fp4lab.errors import UserError
from fp4lab.tasks.goals import load_goals


def asker(folder: Path, max_tokens: int):
    """prompt -> (answer, whether the model ended it)."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give a folder that `fp4lab export --to compressed-tensors` wrote")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def ask(prompt: str) -> tuple[str, bool]:
        asked = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        ended = said[-1] == tokenizer.eos_token_id
        return tokenizer.decode(said[:-1] if ended else said), ended

    return ask


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--untuned", type=Path, required=True)
    parser.add_argument("--goals", default="data/identity/goals.jsonl")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    missed = 0
    try:
        before, after = (asker(folder, options.max_tokens) for folder in (options.untuned, options.folder))
        for goal in load_goals(options.goals):
            was, _ = before(goal.prompt)
            text, ended = after(goal.prompt)
            wanted = dataclasses.replace(goal, wanted=was) if goal.rule == "unchanged" else goal
            met = wanted.met(text, ended)
            missed += not met
            print(f"{'met   ' if met else 'missed'} {goal.prompt}: {was} -> {text}{'' if ended else ' (not ended)'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
