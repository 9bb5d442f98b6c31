"""task=inspect: the entries of the checkpoint that `weights` names. Without a model there is no loss and no first token."""

from pathlib import Path
from typing import Any

from fp4lab.checkpoint.entries import entries
from fp4lab.errors import UserError
from fp4lab.events import Emit, Entry, Note
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.session import SHIPPED


def run(config: dict[str, Any], emit: Emit) -> None:
    """Raises UserError when there is no file to look at."""
    weights = config["weights"]
    if weights["kind"] == "random":
        raise UserError("task=inspect looks at a file, and weights=random has none; use weights=shipped, dat or hf")
    phases = Phases(config, emit)
    path = Path(weights["path"] or SHIPPED / "model.dat")
    refused = 0
    for e in entries(path):
        refused += e.refused is not None
        fields = {k: v for k, v in vars(e).items() if k not in ("nbytes", "shape")}
        emit(Entry(**fields, shape=list(e.shape), bytes=e.nbytes))
    if refused:
        emit(Note(topic="refused", text=f"{path}: {refused} entries would be refused; `fp4lab inspect {path}` says why"))
    phases.done("cleanup_done")
