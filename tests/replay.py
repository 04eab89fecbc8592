"""A CUDA graph for the CPU: records what a function launches, PyTorch's operators and the interpreter's kernels, and replays it.

As a graph does, it computes nothing while it records, reads and writes the same memory each time, takes numbers as they were then, and
refuses what waits for a result. Random numbers are drawn anew in each replay.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero"}


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Recording(TorchDispatchMode):
    """record(run), then replay() as often as wanted."""

    def __init__(self):
        super().__init__()
        self.launches, self.before, self.replays, self.inside = [], [], 0, False

    def record(self, run):
        """run's answer, whose memory holds nan until a replay; whatever it wrote to is as it was."""
        execute, self.made = GridExecutor.__call__, []
        random = torch.get_rng_state()

        def launch(executor, *args, **options):
            self.keep(tensors((args, options)))
            self.launches.append(lambda: execute(executor, *args, **options))
            self.inside = True  # how the interpreter runs it is not launched
            try:
                execute(executor, *args, **options)
            finally:
                self.inside = False

        GridExecutor.__call__ = launch
        try:
            with self:
                answer = run()
        finally:
            GridExecutor.__call__ = execute
            torch.set_rng_state(random)
            for t, values in reversed(self.before):
                t.copy_(values)
        for t in self.made:
            if not t.requires_grad:
                t.fill_(float("nan") if t.is_floating_point() else 0)
        return answer

    def keep(self, written):
        """Remember the values of what will be written to."""
        self.before += [
            (t.data, t.detach().clone()) for t in written
        ]  # .data: PyTorch does not count what is put back as a change

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for a result: no graph can hold it")
        schema = func._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        written = tensors(
            [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        )
        self.keep(written)
        out = func(*args, **kwargs)
        if view:
            return out
        if written:
            self.launches.append(lambda: func(*args, **kwargs))
        else:
            made = tensors(out)
            self.made += made

            def again():
                for t, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                    t.copy_(new)

            self.launches.append(again)
        return out

    @torch.no_grad()
    def replay(self):
        """Launch it all again."""
        self.replays += 1
        for launch in self.launches:
            launch()
