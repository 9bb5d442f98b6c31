"""Work that nothing waits for before the step ends, on CUDA streams beside the one that computes."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

KEPT = 64 << 20  # bytes of inputs that may wait for their work; beyond them the main stream does


class Beside:
    """`run(work, inputs)` behind what was launched so far, on one of `streams` in turn; `join()` before anything reads it.

    The inputs are held until the work is done: the allocator knows of their own stream only. With no streams, or off the GPU,
    the work is done at once.
    """

    def __init__(self, device: torch.device, streams: int):
        self._streams = [torch.cuda.Stream(device) for _ in range(streams)] if device.type == "cuda" else []
        self._under_way: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._turn = self._bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def run(self, work: Callable[[], None], *inputs: Tensor) -> None:
        if not self._streams:
            work()
            return
        stream, main = self._streams[self._turn], torch.cuda.current_stream()
        self._turn = (self._turn + 1) % len(self._streams)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            work()
            self._under_way.append((stream.record_event(), inputs))
        self._bytes += _nbytes(inputs)
        while self._bytes > KEPT and len(self._under_way) > 1:
            event, done = self._under_way.popleft()
            main.wait_event(event)
            self._bytes -= _nbytes(done)

    def join(self) -> None:
        """What is launched from now on comes after all of the work."""
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)
        self._under_way.clear()
        self._bytes = 0


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.nbytes for t in tensors)
