"""Phases of a run: their order, their memory, and where `stop_after` ends it."""

import time

from fp4lab.config import PHASES
from fp4lab.errors import PlannedStop
from fp4lab.events import Emit, Phase
from fp4lab.telemetry.device import PhaseMeter


class Phases:
    """`done(name)` reports memory and the time since the last phase, then stops the run if it was asked to."""

    def __init__(self, config: dict, emit: Emit):
        self.emit, self.stop_after = emit, config["stop_after"]
        self._device = config["device"]
        self._meter: PhaseMeter | None = None
        self._last = time.monotonic()
        self.done("start")

    def done(self, name: str) -> None:
        assert name in PHASES, name
        now = time.monotonic()
        if self._meter is None:
            self._meter = PhaseMeter(self._device)
        memory = self._meter.read()
        self.emit(Phase(name=name, ms=(now - self._last) * 1e3, **vars(memory)))
        self._last = time.monotonic()
        if name == self.stop_after:
            raise PlannedStop(f"stop_after={name}")
