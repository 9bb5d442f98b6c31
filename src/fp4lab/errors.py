"""Errors that are the user's to mend: shown as one message, without a traceback."""


class UserError(Exception):
    """A wrong file, key or option. The message names it, says what was expected and what to do."""


class PlannedStop(Exception):
    """`stop_after` was reached; a success."""


class Collapsed(Exception):
    """The model's output has collapsed: non-finite logits or the `!!!!` rule (reference log, collapse guard)."""


class Diverged(Exception):
    """The loss is not finite."""


class GoalsMissed(Exception):
    """Training ran to its end, and the model does not do what task.goals and task.controls ask."""
