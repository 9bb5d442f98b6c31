"""The worker's entry: the task that the configuration names, in this process."""

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
    with soft_limit(config, emit):
        TASKS[config["task"]["name"]](config, emit)
