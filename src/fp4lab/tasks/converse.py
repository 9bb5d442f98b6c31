"""A conversation at a terminal or over a pipe: a line is a turn, the end of the input ends it. In one process, unguarded."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fp4lab.events import Emit
from fp4lab.tasks.chat import Chat, read_script
from fp4lab.tasks.meter import Phases
from fp4lab.tasks.session import open_session

RESET = "/reset"


def converse(config: dict[str, Any], lines: Iterable[str], write: Callable[[str], None], emit: Emit) -> None:
    """Answers every line of `lines`, through `write` as the text is made. `/reset` forgets what was said.

    Raises UserError, Collapsed.
    """
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    system = read_script(config).system
    phases = Phases(config, emit)
    session = open_session(config, emit, trains=False)
    session.dispose()
    session.compact()
    phases.done("model_loaded")
    chat = Chat(session, emit, system)
    for line in lines:
        said = line.rstrip("\n")
        if said.strip() == RESET:
            chat = Chat(session, emit, system)
        elif said.strip():
            chat.turn(said, write)
            write("\n")
            phases.done("turn_done")
