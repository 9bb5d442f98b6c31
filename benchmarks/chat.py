"""What a KV policy and a backend cost in a conversation, beside transformers on the same weights. Prints JSON.

python benchmarks/chat.py [--turns 3] [--max-tokens 8] [--repeat 3] [overrides, e.g. model=qwen3_4b weights=random]

turns   every backend under every policy: `turns` turns of `max_tokens` tokens, stop tokens ignored. Of each turn the time to
        the first token and of each token after it (ms, median over `repeat` conversations); MiB after loading and at the peak.
grow    one turn of 4, 6, 8, 10, 16 and 24 tokens (the log's S15 to S19) under persistent: the peak, and the cache's part of it
peer    transformers' Qwen3 in the same dtype with the unquantised (or dequantised) weights: its forward with its own cache,
        kept over turns ("persistent") or made anew ("prefill"), and without one ("replay")

On a GPU memory is what torch's allocator has given out; on a CPU it is the resident set, in which earlier rows leave traces.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fp4lab.events import Turn
from fp4lab.interactive import compose
from fp4lab.model.config import HEAD
from fp4lab.nvfp4 import unpack
from fp4lab.tasks.chat import Chat
from fp4lab.tasks.session import Session, open_session
from fp4lab.telemetry.host import resident_mib

MIB = 1 << 20
BACKENDS = {
    "bridge": ["backend=bridge"],
    "fp2, eval cache": ["backend=fp2", "backend.eval_cache=true"],
    "fp2": ["backend=fp2"],
    "dense": ["backend=dense"],
}
KVC = ("replay", "prefill", "persistent")
PROMPTS = ["write one short sentence about UFO and you", "continue."]


def nothing(_: Any) -> None: ...


class Memory:
    """Allocated now and at its peak since `reset`, MiB."""

    def __init__(self, cuda: bool):
        self.cuda = cuda

    def reset(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> float:
        return torch.cuda.memory_allocated() / MIB if self.cuda else resident_mib([os.getpid()]) or 0.0

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else self.now()


def summary(conversations: list[list[tuple[float, float | None]]]) -> dict[str, list[float]]:
    """(first token, each token after it) of every turn, ms, to medians by turn."""
    turns = list(zip(*conversations, strict=True))
    return {
        "first_token_ms": [round(statistics.median(f for f, _ in t), 2) for t in turns],
        "ms_per_token": [round(statistics.median(e for _, e in t if e is not None), 2) for t in turns],
    }


def ours(config: dict[str, Any], session: Session, prompts: list[str]) -> list[Turn]:
    session.config = config
    chat = Chat(session, nothing, expected=prompts)
    return [chat.turn(p) for p in prompts]


def measure(overrides: list[str], turns: int, max_tokens: int, repeat: int, memory: Memory) -> dict[str, Any]:
    prompts = [PROMPTS[min(n, 1)] for n in range(turns)]
    rows: dict[str, Any] = {}
    common = [*overrides, "task=chat", "task.ignore_eos=true", "task.on_collapse=flag", f"task.max_tokens={max_tokens}"]
    for name, choice in BACKENDS.items():
        memory.reset()
        started = time.perf_counter()
        session = open_session(compose([*common, *choice], Path("conf")), nothing, trains=False)
        session.dispose()
        memory.reset()
        row: dict[str, Any] = {
            "load_s": round(time.perf_counter() - started, 2),
            "loaded_mib": round(memory.now(), 1),
            "kvc": {},
            "grow": {},
        }
        for kvc in KVC:
            config = compose([*common, *choice, f"kvc={kvc}"], Path("conf"))
            ours(config, session, prompts[:1])  # warm
            memory.reset()
            said = [ours(config, session, prompts) for _ in range(repeat)]
            latencies = [[(t.first_token_ms or 0.0, t.ms_per_token) for t in c] for c in said]
            row["kvc"][kvc] = summary(latencies) | {
                "peak_mib": round(memory.peak(), 1),
                "cache_mib": round(max(t.cache_mib or 0 for t in said[0]), 2),
                "context_tokens": [t.context_tokens for t in said[0]],
                "ids": [t.ids for t in said[0]],
            }
        for tokens in (4, 6, 8, 10, 16, 24):
            config = compose([*common, *choice, "kvc=persistent", f"task.max_tokens={tokens}"], Path("conf"))
            memory.reset()
            (turn,) = ours(config, session, prompts[:1])
            row["grow"][tokens] = {"peak_mib": round(memory.peak(), 1), "cache_mib": round(turn.cache_mib or 0, 2)}
        rows[name] = row
        if name == "dense":
            rows["peer"] = peer(session, rows["dense"], prompts, max_tokens, repeat, memory)
        del session
    return rows


def hf_model(session: Session) -> Any:
    """transformers' model with the weights of our dense path."""
    import transformers

    shape, store = session.shape, session.store
    values: dict[str, Any] = {**shape.to_dict(), "tie_word_embeddings": store.tied, "attn_implementation": "sdpa"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    config = transformers.Qwen3Config(**values)
    with torch.device(session.device):
        model = transformers.Qwen3ForCausalLM._from_config(config, dtype=session.dtype).eval()
    source = dict(session.model.named_parameters())  # type: ignore[union-attr]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(source[name] if name in source else unpack(store.packed[HEAD], session.dtype))
    return model


@torch.no_grad()
def peer(
    session: Session, dense: dict[str, Any], prompts: list[str], max_tokens: int, repeat: int, memory: Memory
) -> dict[str, Any]:
    import transformers
    from transformers import DynamicCache

    model, device, tokenizer = hf_model(session), session.device, session.tokenizer
    session.model = session.store = None  # type: ignore[assignment]
    memory.reset()
    row: dict[str, Any] = {"transformers": transformers.__version__, "loaded_mib": round(memory.now(), 1), "kvc": {}}
    close = tokenizer.encode("<|im_end|>\n")

    def conversation(kvc: str, texts: list[str]) -> tuple[list[tuple[float, float | None]], list[list[int]]]:
        context: list[int] = []
        cache = DynamicCache() if kvc == "persistent" else None
        times: list[tuple[float, float | None]] = []
        answers = []
        for text in texts:
            context += tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
            if kvc == "prefill":
                cache = DynamicCache()
            stamps, answer = [time.perf_counter()], list[int]()
            while len(answer) < max_tokens:
                known = cache.get_seq_length() if cache is not None else 0
                ids = torch.tensor([context[known:]], device=device)
                out = model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
                token = int(out.logits[0, -1].argmax())
                stamps.append(time.perf_counter())
                answer.append(token)
                context.append(token)
            context += close
            gaps = [1e3 * (b - a) for a, b in itertools.pairwise(stamps)]
            times.append((gaps[0], statistics.median(gaps[1:])))
            answers.append(answer)
        return times, answers

    for kvc in KVC:
        conversation(kvc, prompts[:1])
        memory.reset()
        runs = [conversation(kvc, prompts) for _ in range(repeat)]
        same = [a == b for a, b in zip(runs[0][1], dense["kvc"][kvc]["ids"], strict=True)]
        row["kvc"][kvc] = summary([times for times, _ in runs]) | {
            "peak_mib": round(memory.peak(), 1),
            "same_ids_as_dense": same,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    memory = Memory(torch.cuda.is_available())
    device = torch.cuda.get_device_name() if memory.cuda else f"cpu, {torch.get_num_threads()} threads"
    rows = measure(args.overrides, args.turns, args.max_tokens, args.repeat, memory)
    for row in rows.values():
        for kvc in row["kvc"].values():
            kvc.pop("ids", None)
    out = {"device": device, "torch": torch.__version__, "overrides": args.overrides, "turns": args.turns}
    print(json.dumps({**out, "max_tokens": args.max_tokens, "repeat": args.repeat, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
