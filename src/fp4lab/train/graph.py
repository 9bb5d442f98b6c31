"""A training step as one captured CUDA graph for each shape of batch: no launch waits for Python."""

import torch
from torch import Tensor

from fp4lab.model.qwen3 import Qwen3
from fp4lab.train.fused import FusedAdamW

GRAPHS = 8  # shapes that are kept captured; others run eagerly


class GraphedStep:
    """Forward, loss, backward with its updates: `step(lr, ids, targets)` -> loss [] on the device; then `optimizer.report()`.

    The first batch of a shape runs eagerly, which compiles and warms up what capturing must not; the second is captured. Both
    run the same kernels on the same bits. `eager` turns capturing off.
    """

    def __init__(self, model: Qwen3, optimizer: FusedAdamW, eager: bool = False):
        self.model, self.optimizer = model, optimizer
        self.eager = eager or optimizer.head.device.type != "cuda" or not optimizer.all_kernels()
        optimizer.static = not self.eager
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self._seen: set[tuple] = set()
        self._pool = None if self.eager else torch.cuda.graph_pool_handle()

    def describe(self) -> str:
        """Which path runs, for the records."""
        if self.eager:
            return "steps run eagerly"
        return "a shape's first step runs eagerly, later ones as a captured CUDA graph"

    def step(self, lr: float, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets [B, T] on any device."""
        self.optimizer.begin(lr)
        device = self.optimizer.head.device
        shape = (*ids.shape, self.optimizer.count)
        if shape in self._graphs:
            graph, static_ids, static_targets, loss = self._graphs[shape]
            static_ids.copy_(ids)
            static_targets.copy_(targets)
            graph.replay()
            return loss
        ids, targets = ids.to(device), targets.to(device)
        if self.eager or shape not in self._seen or len(self._graphs) >= GRAPHS:
            self._seen.add(shape)
            return self._body(ids, targets)
        ids, targets = ids.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        after, self.optimizer.after_each = self.optimizer.after_each, None
        # The backward before the updates beside it (`Beside`), which fill the device and which nothing waits for.
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.Stream(device, priority=-1)):
            loss = self._body(ids, targets)
        self.optimizer.after_each = after
        self._graphs[shape] = graph, ids, targets, loss
        graph.replay()
        return loss

    def _body(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.clear()
        loss = self.optimizer.loss(self.model.hidden(ids), targets)
        loss.backward()
        self.optimizer.update_vectors()
        return loss.detach()
