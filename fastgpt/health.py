"""Whether a run is sound: updates that were left out, loss spikes, parameters that are not finite."""

import itertools
import math
import statistics
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt.optim import local


class LeftOut(NamedTuple):
    """An update that was left out: iteration, its first micro-batch's offsets, loss, gradient norm, and how many in a row with it."""

    it: int
    offsets: Tensor
    loss: float
    norm: float
    in_a_row: int


class Watch:
    """Finds the updates that were left out, as their loss or gradient norm was not finite. `len` is the number of those not seen yet.

    Adding one does not wait for the GPU, and looking waits once for all. With a loss scale (float16, `scaler`) an overflow of the
    gradients alone is no fault while the scale is above 1: so the scaler finds its scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler):
        self.scaler, self.in_a_row = scaler, 0
        self.unseen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def __len__(self):
        return len(self.unseen)

    def add(self, it: int, offsets: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Add an iteration: its first micro-batch's offsets, its loss [] and its gradient norm [], on the device."""
        self.unseen.append((it, offsets, loss, norm))

    def look(self) -> list[LeftOut]:
        """Those left out since the last look. Sets `last`, (loss, gradient norm) of the last iteration added."""
        values = torch.stack([t.float() for *_, loss, norm in self.unseen for t in (loss, norm)]).view(-1, 2).tolist()
        found = []
        for (it, offsets, *_), (loss, norm) in zip(self.unseen, values, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row = 0
            elif not (math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
                self.in_a_row += 1
                found.append(LeftOut(it, offsets, loss, norm, self.in_a_row))
        self.unseen.clear()
        self.last: tuple[float, float] = tuple(values[-1])
        return found


class Spikes:
    """Finds losses far above those before them. Within the first `least` losses it finds none."""

    def __init__(self, window: int = 128, least: int = 16, deviations: float = 6.0):
        self.losses: deque[float] = deque(maxlen=window)
        self.least, self.deviations = least, deviations

    def height(self, loss: float) -> float | None:
        """Standard deviations of this loss above the mean of the last `window` ones; None if they are fewer than `deviations`."""
        height = None
        if len(self.losses) >= self.least:
            spread = statistics.pstdev(self.losses)
            above = loss - statistics.fmean(self.losses)
            if above > self.deviations * spread:
                height = above / spread if spread else math.inf
        self.losses.append(loss)
        return height


def first_not_finite(model: nn.Module, gradients: bool = False) -> str | None:
    """The name of the first parameter that is not finite (or, with `gradients`, whose gradient is not); None if all are finite.

    If the model is sharded, every process must call it.
    """
    tensors = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    named = {name: t for name, t in tensors.items() if t is not None}
    bad = torch.stack([~t.isfinite().all() for t in local(list(named.values()))]).int()
    if any(hasattr(t, "to_local") for t in named.values()):
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    name = next(itertools.compress(named, bad.tolist()), None)
    return f"the gradient of {name}" if name and gradients else name
