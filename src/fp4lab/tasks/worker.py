"""The worker's entry: the task that the configuration names, in this process."""

import os

from fp4lab.events import Emit
from fp4lab.tasks import chat, compare, export, inspect, step, tune
from fp4lab.tasks.limits import soft_limit

TASKS = {
    "step": step.run,
    "tune": tune.run,
    "chat": chat.run,
    "compare": compare.run,
    "export": export.run,
    "inspect": inspect.run,
}


def main(config: dict, emit: Emit) -> None:
    """Runs the task. Its errors leave as exceptions; `fp4lab.errors` says which are the user's."""
    import torch

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    if config["task"]["name"] in ("step", "tune"):
        be_deterministic(config["deterministic"])
    with soft_limit(config, emit):
        TASKS[config["task"]["name"]](config, emit)


def be_deterministic(on: bool) -> None:
    """Before the first use of a GPU. What torch cannot do so warns in the worker's log, and goes on.

    Adding up rows of an embedding and attention's backward are what differs from run to run otherwise (torch's notes on
    reproducibility).
    """
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose anew on each stream
    torch.use_deterministic_algorithms(on, warn_only=True)
    # filling every new tensor finds bugs, and costs a write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
