"""What the tests of the kernels share: where they run, inputs, odd strides, the three-way rule, a host's Philox."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch

from fastgpt.verify import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]
SEED = 0x1234567_89ABCDE
# A copy of an input or a gradient with the same values and other strides. The last two repeat values instead.
VIEWS = {
    "sliced rows": lambda t: torch.stack((t, t), 1).flatten(0, 1)[::2],
    "sliced columns": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "part of a wider row": lambda t: torch.cat((t, t), -1)[..., : t.size(-1)],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded rows": lambda t: t[:, :1].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
}


def randn(*shape, dtype=torch.float32, scale=1.0, shift=0.0):
    return (torch.randn(shape, device=DEVICE) * scale + shift).to(dtype)


def run_as(f, dtype):
    """f under autocast to dtype (float32: without), as a function that gives a tuple."""

    def call(*inputs):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            found = f(*inputs)
        return found if isinstance(found, tuple) else (found,)

    return call


def hold(op, reference, inputs, outputs, grads):
    """Hold op's outputs and every gradient of its inputs to `fastgpt verify`'s three-way rule.

    op and reference take the same inputs and give a tuple of outputs, named by `outputs`; `grads` are the outputs' gradients,
    None where one is not to be differentiated. inputs by name; one that is None, or no floating tensor, is passed as it is.
    """
    for c in compare(op, reference, inputs, outputs, grads):
        assert c.holds, f"{c.what}: error {c.error:.3g}, PyTorch's {c.torch_error:.3g}, floor {c.floor:.3g}"


def seed():
    return torch.tensor([SEED], device=DEVICE)


def philox_uniform(seed, counter, rounds=7):
    """Philox 4x32 on the host: the first of four words for a counter of four and a key of 64 bits, as a uniform."""
    c = list(counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    word = c[0] - 2**32 if c[0] >= 2**31 else c[0]
    return (-word - 1 if word < 0 else word) * 4.6566127342e-10


def far(rows, columns, dtype=torch.float16):
    """[rows, columns] whose rows lie 2^30 elements apart: the third begins where an int32 has wrapped. A CPU touches few pages."""
    n = (rows - 1) * 2**30 + columns
    if DEVICE == "cpu":  # numpy's zeros are not written before they are read
        whole = torch.from_numpy(np.zeros(n, str(dtype).removeprefix("torch.")))
    else:
        whole = torch.zeros(n, dtype=dtype, device=DEVICE)
    return whole.as_strided((rows, columns), (2**30, 1))


def same_bits(f, leaves, runs=None):
    """Whether f(*leaves).backward() gives every leaf the same gradient each time. The interpreter has one order only."""
    grads = []
    for _ in range(runs or (20 if DEVICE == "cuda" else 2)):
        fresh = [t.detach().requires_grad_() for t in leaves]
        f(*fresh).backward()
        grads.append([t.grad for t in fresh])
    return all(torch.equal(a, b) for run in grads[1:] for a, b in zip(grads[0], run, strict=True))


@contextmanager
def poisoned():
    """What a kernel does not write is nan: `torch.empty` gives nan. Numpy, in which the interpreter computes, says nothing of it."""
    # Not in place: torch.compile of torch 2.11 gives zeros for the gradient of an output that a forward wrote into.
    fill = lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t  # noqa: E731
    nan = lambda make: lambda *a, **k: fill(make(*a, **k))  # noqa: E731
    makers = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")
    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        for of, name in makers:
            stack.enter_context(patch.object(of, name, nan(getattr(of, name))))
        yield
