"""task=compare: where two paths part. First tokens, layers, the part of a layer, and B's weights against the stored ones."""

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4lab.choices import idle_choices
from fp4lab.errors import UserError
from fp4lab.events import Emit, LayerDiff, Loss, Note, WeightDiff
from fp4lab.model.linears import DenseLinear, SteLinear
from fp4lab.model.paths import PATHS
from fp4lab.nvfp4 import repack_like, unpack
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.microscope import apart, first_part, layer_input
from fp4lab.tasks.probe import Seen, all_paths, probe, prompt_ids
from fp4lab.tasks.session import Session, open_session
from fp4lab.tasks.tolerance import relative

_ROWS = 256  # positions whose logits exist at once: those of a long prompt would take more than the model


def run(config: dict[str, Any], emit: Emit) -> None:
    """Raises PlannedStop at `stop_after`, UserError."""
    for text in idle_choices(config, config.get("overrides", [])):
        emit(Note(topic="no_effect", text=text))
    prompts = read_prompts(config)
    phases = Phases(config, emit)
    session = open_session(config, emit)
    phases.done("model_loaded")
    session.dispose()
    phases.done("session_disposed")
    session.compact()
    phases.done("post_load_compacted")
    paths = all_paths(session)
    losses: list[Loss] = []
    for n, prompt in enumerate(prompts):
        seen = probe(session, prompt, "before", emit)
        for first, second in itertools.combinations(sorted(seen), 2):
            layers(session, prompt, (first, second), paths, seen, emit)
        losses.append(prompt_loss(session, prompt, n))
        emit(losses[-1])
    if len(losses) > 1:  # what the run's row shows
        tokens = [x.tokens or 0 for x in losses]
        mean = sum(x.loss * t for x, t in zip(losses, tokens, strict=True)) / sum(tokens)
        emit(Loss(step=len(losses), loss=mean, split="eval", trained=False, tokens=sum(tokens)))
    phases.done("first_token_done")
    b = paths[PATHS["fp2"]]
    for name, linear in b.named_modules():
        if isinstance(linear, SteLinear | DenseLinear) and f"{name}.weight" in session.store.packed:
            emit(weight(session, f"{name}.weight", linear))
    session.compact()
    phases.done("cleanup_done")


def read_prompts(config: dict[str, Any]) -> list[str]:
    """task.prompt_file (one a line), else task.prompts, else `prompt`. Raises UserError."""
    task = config["task"]
    if task["prompt_file"] is None:
        return task["prompts"] or [config["prompt"]]
    path = Path(task["prompt_file"])
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"task.prompt_file={path}: cannot be read ({e}); expected UTF-8 text with one prompt a line") from e
    if not lines:
        raise UserError(f"task.prompt_file={path}: no prompt in it; expected one a line")
    return lines


def layers(
    session: Session, prompt: str, names: tuple[str, str], paths: dict[str, Any], seen: dict[str, Seen], emit: Emit
) -> None:
    """One LayerDiff a layer, of the last position; the first divergent one is computed again to tell which part parted."""
    pair = "-".join(n[0] for n in names)
    a, b = (seen[n][0] for n in names)
    tolerance, _ = relative(pair, session.dtype, len(a), session.activations)
    divergent = False
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        error, part = apart(x, y), None
        if not divergent and not error <= tolerance:
            divergent = True
            given = layer_input(paths[names[0]], prompt_ids(session, prompt), i)
            alone, _ = relative(pair, session.dtype, 1, session.activations)
            part = first_part(paths[names[0]], paths[names[1]], i, given, alone)
        emit(
            LayerDiff(
                pair=pair,
                prompt=prompt,
                layer=i,
                relative_error=error,
                expected=tolerance,
                cosine=float(F.cosine_similarity(x, y, dim=0)),
                max_abs_a=float(x.abs().max()),
                max_abs_b=float(y.abs().max()),
                nonfinite_a=_bad(x),
                nonfinite_b=_bad(y),
                part=part,
            )
        )


@torch.no_grad()
def weight(session: Session, name: str, linear: nn.Module) -> WeightDiff:
    """What B multiplies by, and its master, against the stored tensor."""
    p = session.store.packed[name]
    stored = unpack(p, session.dtype)
    master = linear.weight
    assert isinstance(master, Tensor)
    if isinstance(linear, SteLinear):
        used, again = unpack(linear.packed, session.dtype), repack_like(master, p, rule=session.config["weights"]["rule"])
        same = ((again.codes ^ p.codes) & 0x0F == 0).sum() + ((again.codes ^ p.codes) & 0xF0 == 0).sum()
        codes_equal = float(same) / (2 * p.codes.numel())
    else:  # quirk.scale_bytes_undecoded: B has no image of its master
        used, codes_equal = master.detach().to(session.dtype), None
    return WeightDiff(
        name=name,
        relative_error=_off(used, stored),
        max_abs_difference=float((used - stored).abs().max()),
        max_abs_b=float(used.abs().max()),
        max_abs_stored=float(stored.abs().max()),
        nonfinite=_bad(used),
        master_relative_error=_off(master.detach(), stored),
        codes_equal=codes_equal,
    )


@torch.no_grad()
def prompt_loss(session: Session, prompt: str, n: int) -> Loss:
    """Mean negative log likelihood of the prompt's own tokens under the session's path."""
    ids = torch.tensor([prompt_ids(session, prompt)], device=session.device)
    model: Any = session.model
    hidden, targets, total = model.hidden(ids)[0, :-1], ids[0, 1:], 0.0
    for at in range(0, len(targets), _ROWS):
        logits = model.logits(hidden[at : at + _ROWS])
        total += float(F.cross_entropy(logits, targets[at : at + _ROWS], reduction="sum"))
    return Loss(step=n, loss=total / len(targets), split="eval", trained=False, tokens=len(targets))


def _off(x: Tensor, from_: Tensor) -> float:
    return float((x.float() - from_.float()).norm() / from_.float().norm())


def _bad(x: Tensor) -> int:
    return int((~x.isfinite()).sum())
