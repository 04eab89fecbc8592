"""A micro-step's host time, beside compiled nanoGPT's; and a launch takes the compiled kernel that Triton would take. No GPU is needed."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="a C compiler builds the stand-in"),
]
# Each in a process of its own, which takes the CPU for a GPU.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}


def run(*words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# fastgpt's thread time over compiled nanoGPT's: 2 layers, eager. Measured: 2.0 to 2.5 at any load of the machine; before launches were
# remembered, 4.0 without load. What makes a launch slower shows here. Lower it where the time falls.
BOUND = 3.2


@pytest.mark.slow
def test_host_time_is_within_its_bound(tmp_path):
    file = tmp_path / "host_time.json"
    table = run("-m", "fastgpt.benchmarks.host_time", "--layers=2", "--arms=compiled,fastgpt", f"--json={file}")
    times = json.loads(file.read_text())["layers"]["2"]
    for part in ("first", "other"):
        assert times[part]["fastgpt"] < BOUND * times[part]["compiled"], table
    assert set(times) == {"first", "other", "update"}


LAUNCHES = """
import tempfile

import torch

from fastgpt.benchmarks import host_time

folder = tempfile.TemporaryDirectory()  # Triton 3.6 links each launcher to the library in it
host_time.pretend_gpu(folder.name)
import triton
import triton.language as tl
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import common
from fastgpt.kernels.common import launch


@triton.jit
def _copy(x, other, y, n, p, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = x.load([0, 0]) if isinstance(x, tl.tensor_descriptor) else tl.load(x + i, i < n)
    if other is not None:
        v += tl.load(other + i, i < n)
    v = tl.sum(v, 0) if isinstance(x, tl.tensor_descriptor) else v
    tl.store(y + i, v * p * (2 if TWICE else 1), i < n)


taken, by_triton = [], []
launcher, run = CudaLauncher.__call__, type(_copy).run


def launched(self, *args):
    taken.append(self)
    return launcher(self, *args)


def asked(self, *args, **options):
    by_triton.append(self)
    return run(self, *args, **options)


CudaLauncher.__call__, type(_copy).run = launched, asked
memory = torch.zeros(4096)
t, bf16, parameter = memory[:256], torch.zeros(256, dtype=torch.bfloat16), torch.nn.Parameter(torch.zeros(256))
wide = torch.zeros(64, 64)
descriptors = [TensorDescriptor.from_tensor(w, block) for w in (wide, wide.bfloat16()) for block in ([16, 16], [32, 16])]
usual = dict(BLOCK=16, TWICE=False)
cases = [
    *[((x, None, y, n, 0.5), usual) for x in (t, bf16, parameter, memory[1:]) for y in (t, memory[1:]) for n in (1, 7, 16, 32, 2**31)],
    *[((t, other, t, 16, p), usual) for other in (None, t, bf16) for p in (0.5, 0.0, 1.0, 1, 16, True, False)],
    *[((t, None, t, 16, 0.5), dict(BLOCK=block, TWICE=twice)) for block in (16, 32) for twice in (True, False, 1, 0)],
    *[((t, None, t, 16, 0.5), dict(BLOCK=block, TWICE=True, num_warps=8)) for block in (16, 32)],
    *[((d, None, t, 16, 0.5), usual) for d in descriptors],
]
for again in range(3):
    for i, (args, options) in enumerate(cases if again % 2 else cases[::-1]):
        launch(_copy, (1,), *args, **options)
        _copy[(1,)](*args, enable_fp_fusion=True, **options)
        ours, theirs = taken[-2:]
        assert ours is theirs, (args, options)
compiled = len(set(map(id, taken)))
assert compiled > 30, compiled

# The second time Triton is not asked: except of pointers and types that are unusual, or where someone watches.
def asks(*args, **options):
    by_triton.clear()
    launch(_copy, (1,), *args, **usual | options)
    return len(by_triton)

assert asks(t, None, t, 16, 0.5) == 0 and asks(t, None, t, 16, 0.25) == 0 and asks(descriptors[0], None, t, 16, 0.5) == 0
assert asks(memory[1:], None, t, 16, 0.5) == 1 and asks(t, None, t, 16, True) == 1
assert asks(t, None, t, 48, 0.5) == 1 and asks(t, None, t, 48, 0.5) == 0
seen = []
for name in ("launch_enter_hook", "launch_exit_hook"):
    hooks = getattr(knobs.runtime, name)
    hook = lambda metadata: seen.append(metadata.get()["name"])
    hooks.add(hook)
    assert asks(t, None, t, 16, 0.5) == 1
    hooks.remove(hook)
    assert asks(t, None, t, 16, 0.5) == 0
assert seen == ["_copy", "_copy"]
knobs.runtime.debug = True
assert asks(t, None, t, 16, 0.5) == 1
knobs.runtime.debug = False
_copy.add_pre_run_hook(lambda *args, **options: seen.append("before"))
assert asks(t, None, t, 16, 0.5) == 1 and seen[-1] == "before"
_copy.pre_run_hooks.clear()
assert asks(t, None, t, 16, 0.5) == 0
_copy._unsafe_update_src(_copy.src.replace("* p", "* p * 2"))
assert asks(t, None, t, 16, 0.5) == 1
# What is remembered has a bound.
common.LAUNCHES = 4
for n in range(100, 120):
    assert asks(t, None, t, n, 0.5) == 1 and asks(t, None, t, n, 0.5) == 0
    assert len(_copy.launched) <= 4
print(f"{len(cases)} launches, {compiled} compiled kernels")
"""


def test_a_launch_takes_the_compiled_kernel_that_triton_takes(tmp_path):
    file = tmp_path / "launches.py"  # Triton reads a kernel's source
    file.write_text(LAUNCHES)
    assert "compiled kernels" in run(str(file))
