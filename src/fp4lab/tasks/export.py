"""task=export: the model that `weights` names, written in `task.format`, loaded again and asked the same.

What is packed is relabelled; floats are quantised as the session does (weights.rule, weights.levels). `save_model` does the
writing for task=tune too, from what was trained.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4lab.checkpoint import open_weights, wide_scales
from fp4lab.checkpoint.atomic import refuse_existing
from fp4lab.checkpoint.convert import recipe_for
from fp4lab.checkpoint.export import Exported, Target, export, plan, refuse_own_input
from fp4lab.checkpoint.formats import model_order
from fp4lab.checkpoint.public import SCHEMES
from fp4lab.checkpoint.quantise import Quantised, TensorError
from fp4lab.checkpoint.weights import MemoryWeights, Replaced, Weights
from fp4lab.choices import idle_choices
from fp4lab.errors import UserError
from fp4lab.events import Emit, File, Note, Progress
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.model.qwen3 import Qwen3
from fp4lab.nvfp4 import PackedTensor
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.probe import Seen, difference, probe
from fp4lab.tasks.session import SHIPPED, Session, open_session


def run(config: dict[str, Any], emit: Emit) -> None:
    """Raises UserError for what cannot be written, and when the reloaded model is another than the one in memory."""
    if not config["task"]["output"]:
        raise UserError("task=export writes task.output=<file.dat or folder>; give it")
    check_output(config)
    for text in idle_choices(config, config.get("overrides", [])):
        emit(Note(topic="no_effect", text=text))
    phases = Phases(config, emit)
    session = open_session(config, emit)
    check_model(session)
    phases.done("model_loaded")
    before = probe(session, config["prompt"], "before", emit)
    phases.done("first_token_done")
    done = save_model(session, emit)
    phases.done("export_done")
    dtype, activations = session.dtype, session.activations
    session.dispose()
    session.compact()
    del session
    again = open_session(reloading(config, done), emit)
    after = probe(again, config["prompt"], "after", emit)
    again.dispose()
    hold_against(before, after, dtype, activations, config, done, _is_same_model(config, done), emit)
    phases.done("cleanup_done")


def hold_against(
    before: dict[str, Seen],
    after: dict[str, Seen],
    dtype: torch.dtype,
    activations: str,
    config: dict[str, Any],
    done: Exported,
    same: bool,
    emit: Emit,
) -> None:
    """Reports how far each path's first token is from that of the model which was exported, `dtype` saying how exact both are.

    Raises UserError where they are further apart although the file holds the `same` weights.
    """
    said = []
    for path in sorted(before.keys() & after.keys()):
        found = difference(f"{path[0]}-{path[0]}", dtype, activations, before[path], after[path])
        found.when, found.prompt = "export", config["prompt"]
        emit(found)
        if same and path[0] != "R" and found.fault:
            raise UserError(
                f"{done.path}: reloaded, path {path} gives other logits (KL {found.kl:.3g}, expected {found.expected_kl:.3g} "
                "at most): this is a fault of the export; keep the source"
            )
        said.append(f"{path} KL {found.kl:.3g}")
    emit(Note(topic="reload", text=f"{done.path} loaded again, against the model before: {', '.join(said)}"))


def trained_is_same(session: Session) -> bool:
    """Whether what is trained is the same model to the rounding of the file's floats: no linear is quantised again on loading.

    A tied head is, from the embedding's floats; so is an embedding that was packed, where the format has none.
    """
    task, weights = session.config["task"], session.config["weights"]
    head = session.store.tied and task["format"] != "dat" and task["head"] != "nvfp4"
    embedding = weights["embedding"] == "nvfp4" and task["format"] != "dat"
    incident = any(session.config["quirk"].values())  # B may compute with other weights than it trains, on purpose
    return task["format"] != "hf" and not head and not embedding and not incident


def _is_same_model(config: dict[str, Any], done: Exported) -> bool:
    """Whether the file holds the very weights that the session ran on, so that other logits are a fault.

    Floats are not, nor what was quantised for the file in another way than for the session: with other levels, or dividing by
    the second-level scale as compressed-tensors does, which turns codes that lie on a tie.
    """
    task = config["task"]
    if task["format"] == "hf" or task["head"] == "float":
        return False
    if not done.errors or task["format"] == "dat":
        return True
    return task["format"] == "modelopt" and config["weights"]["levels"] != "row"


def check_output(config: dict[str, Any]) -> None:
    """What would stop the writing, told before the run begins. Raises UserError."""
    task = config["task"]
    if task["output"]:
        refuse_existing(task["output"], may_overwrite(config))
        if config["weights"]["path"] or config["weights"]["kind"] == "shipped":
            refuse_own_input(Path(task["output"]), [_path(config)])


def may_overwrite(config: dict[str, Any]) -> bool:
    """Also what an earlier attempt of this run left in its own folder, when it is gone on with (sweep.resume)."""
    output, out_dir = config["task"]["output"], config.get("out_dir")
    own = output is not None and out_dir is not None and Path(out_dir).resolve() in Path(output).resolve().parents
    return config["task"]["overwrite"] or (config["sweep"]["resume"] and own)


def _path(config: dict[str, Any]) -> Path:
    return Path(config["weights"]["path"] or SHIPPED / "model.dat")


def reloading(config: dict[str, Any], done: Exported) -> dict[str, Any]:
    """The configuration of a run on what was exported."""
    again = copy.deepcopy(config)
    again["weights"].update(kind="dat" if done.format == "dat" else "hf", path=str(done.path))
    if done.format != "dat":
        again["model"].update(path=None, config={}, name="exported")
    return again


def check_model(session: Session, trained: bool = False) -> None:
    """What would stop `save_model`, told before hours of training: room on the disk, what the format cannot hold, no tokenizer.

    Raises UserError.
    """
    weights, target = _to_write(session, trained, [])
    try:
        plan(weights, target)
        if target.format in SCHEMES and isinstance(weights, Replaced):
            for name in (n for n, v in weights.values.items() if isinstance(v, PackedTensor) and v.levels == "row"):
                if name != EMBEDDING and name not in session.frozen:  # the others keep the rows that they have
                    raise UserError(
                        f"task.format={target.format} has one second-level scale a tensor, and {name} is trained with one a "
                        "row (weights.levels=row, or a source whose q/k/v or gate/up differ in theirs): use task.format=dat, "
                        "or task.format=hf and `fp4lab convert` after it"
                    )
    finally:
        weights.close()


def save_model(session: Session, emit: Emit, trained: bool = False) -> Exported:
    """Writes the session's model as task.output in task.format, and reports its files.

    Untrained, the tensors are the checkpoint's own; `trained` takes the store's, in the checkpoint's order and dtypes.
    Raises UserError.
    """
    errors: list[TensorError] = []
    weights, target = _to_write(session, trained, errors)
    try:
        done = export(weights, target, errors, lambda n, total, name: emit(Progress(what="export", done=n, total=total)))
    finally:
        weights.close()
    for info in done.files:
        emit(File(role="output", path=str(info.path), format=info.format, bytes=info.bytes, sha256=info.sha256))
    for text in done.notes:
        emit(Note(topic="export", text=text))
    if target.scales == "float16":
        count, nbytes = wide_scales(done.path)
        text = f"{count} entries of block scales are floats ({nbytes} bytes); who reads E4M3 bytes reads other weights"
        emit(Note(topic="export", text=f"{done.path}: {text}"))
    if errors:
        worst = max(errors, key=lambda e: e.relative_error)
        text = f"{len(errors)} tensors were quantised; worst relative error {worst.relative_error:.4f} ({worst.name})"
        emit(Note(topic="export", text=text))
    return done


def _to_write(session: Session, trained: bool, errors: list[TensorError]) -> tuple[Weights, Target]:
    """What `save_model` writes, open, and where. `errors` is filled while it is read."""
    config, task = session.config, session.config["task"]
    form, rules = task["format"], config["weights"]
    values = _trained(session, form, task["head"]) if trained else None
    recipe = None
    if not trained and form != "hf":
        levels = "tensor" if rules["levels"] == "row" and form != "dat" else rules["levels"]
        recipe = recipe_for(form, rules["rule"], levels, head=None if task["head"] == "auto" else task["head"])
    weights = _checkpoint(session)
    if values is not None:
        weights = Replaced(weights, values)
    if recipe is not None:
        weights = Quantised(weights, recipe, form == "compressed-tensors", errors.append)
    wide = config["quirk"]["fp16_scales"] and form == "dat"
    return weights, Target(
        Path(task["output"]),
        form,
        scales="float16" if wide else "e4m3",
        config=_config_folder(session),
        overwrite=may_overwrite(config),
    )


def _checkpoint(session: Session) -> Weights:
    """The checkpoint that the session was loaded from, open; of random weights, the store."""
    kind = session.config["weights"]["kind"]
    if kind == "random":
        store = session.store
        values: dict[str, Tensor | PackedTensor] = {**(store.dense or store.packed), **store.raw}
        if store.tied:
            values.pop(HEAD, None)
        return MemoryWeights({n: values[n] for n in sorted(values, key=model_order)})
    return open_weights("dat" if kind == "shipped" else kind, _path(session.config))


@torch.no_grad()
def _trained(session: Session, form: str, head: str) -> dict[str, Tensor | PackedTensor]:
    """Everything the optimizer moved, by name: norms, embedding, linears and the head.

    A tied head is the embedding; it is written on its own where the format wants one (`.dat`), or `head` asks for it.
    """
    store = session.store
    values: dict[str, Tensor | PackedTensor] = {**store.packed, **store.raw}
    if form == "hf" and session.backend == "dense" and isinstance(session.model, Qwen3):
        values.update({n: p.detach() for n, p in session.model.named_parameters()})
    if store.tied and form != "dat" and head != "nvfp4":
        values.pop(HEAD, None)
    if head == "float" and HEAD in values:
        raise UserError("task.head=float: a trained head is exported as it was trained; use task.head=auto")
    return {n: values[n] for n in sorted(values, key=model_order)}


def _config_folder(session: Session) -> Path | None:
    """Of config.json and the tokenizer: the model's own, where the weights have none beside them."""
    model, weights = session.config["model"], session.config["weights"]
    if weights["kind"] == "hf":
        return None
    return Path(model["path"]) if model["path"] else None
