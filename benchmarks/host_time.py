"""`python -m benchmarks.host_time`: the host's time of a micro-step and of an update, measured without a GPU.

A GPU that waits for its host is not slow because of its kernels. What a host does between two launches is Python, and needs no GPU to be
timed: Triton's own launch path runs (the binder, the cache of compiled kernels, TMA descriptors, its launcher in C), with a stand-in
for the driver's library, whose launches return at once. The kernels are compiled for sm_90. The layers are real, and tiny.

    compiled            the plain model of peers/ under torch.compile: the baseline, which runs the code that Inductor writes for CUDA
    fastgpt             GPT with every Triton kernel, eager
    fastgpt-compiled    the same under torch.compile

Each micro-step is timed twice: the first of an iteration, which finds no gradients, and any other, which adds to them.

Left out on both sides: the time in the driver; cuBLAS's and cuDNN's calls, which return at once; the C++ of clip_grad_norm_ and of fused
AdamW. Of Inductor's launcher the part in Python runs, and the part in C++, of torch's CUDA builds alone, returns at once; 2.13 has a
faster one there, without the Python. (Before 2.13 Triton's launches instead.) Tensors are the CPU's: torch's other operators run as they
do there, on few elements. Times are those of one thread, the least of many calls, the arms by turns: another load of the machine changes
them, and the ratio less.

This module runs in a process of its own: it makes torch take the CPU for a GPU.
"""

import contextlib
import cProfile
import ctypes
import io
import json
import logging
import os
import platform
import pstats
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastgpt import ops
from fastgpt.benchmarks import count
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.config import GPTConfig, PathText, Settings, UserError
from fastgpt.model import GPT
from fastgpt.parse import parse
from fastgpt.shadows import Shadows
from fastgpt.step import micro_step

ARMS = ("compiled", "fastgpt", "fastgpt-compiled")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic has a deprecated method `json`, which nobody calls here

    class HostTimeConfig(Settings):
        """Every flag of measuring the host's time."""

        layers: str = Field("12,6", description="depths of the model, separated by commas")
        arms: str = Field(",".join(ARMS), description="which arms to measure")
        rounds: int = Field(100, ge=1, description="calls of which the fastest counts")
        profile: bool = Field(False, description="also where fastgpt's time goes, function by function")
        json: PathText = Field("", description="file to write the results to")


# ---- the stand-in for the driver's library ----

# The functions that Triton's driver.c calls. All succeed.
DRIVER = r"""
#include <string.h>
#include "cuda.h"
#define OK(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
static int something;
OK(cuGetErrorString, CUresult e, const char **s)
OK(cuCtxSetCurrent, CUcontext c)
OK(cuModuleUnload, CUmodule m)
OK(cuFuncSetAttribute, CUfunction f, CUfunction_attribute a, int v)
OK(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache c)
OK(cuCtxGetLimit, size_t *v, CUlimit l)
OK(cuCtxSetLimit, CUlimit l, size_t v)
OK(cuLaunchKernelEx, const CUlaunchConfig *c, CUfunction f, void **a, void **e)
OK(cuOccupancyMaxActiveClusters, int *n, CUfunction f, const CUlaunchConfig *c)
CUresult cuDriverGetVersion(int *v) { *v = 13000; return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *v) { *v = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&something; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return cuCtxGetCurrent(c); }
CUresult cuModuleLoadData(CUmodule *m, const void *data) { *m = (CUmodule)&something; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)&something; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType t, cuuint32_t rank, void *p, const cuuint64_t *size,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s,
    CUtensorMapL2promotion l, CUtensorMapFloatOOBfill fill) { memset(map, 0, sizeof *map); return CUDA_SUCCESS; }
"""


def stand_in(folder):
    """Build the library in a folder and load it: Triton's driver then finds this libcuda. Raises UserError without a C compiler."""
    from triton.backends.nvidia import driver

    folder = Path(folder)
    (folder / "cuda_stub.c").write_text(DRIVER)
    library = folder / "libcuda.so.1"
    words = [
        "-shared",
        "-fPIC",
        "-O2",
        "-w",
        "-I",
        *driver.include_dirs,
        f"-Wl,-soname,{library.name}",
        "-o",
        str(library),
    ]
    try:
        subprocess.run([os.environ.get("CC", "gcc"), str(folder / "cuda_stub.c"), *words], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(
            f"host_time: the stand-in for the driver's library cannot be built ({e}); install gcc"
        ) from None
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class Current(int):
    """The current device, which is also that of a CPU's tensor."""

    __ne__ = count.always(False)


def pretend_gpu(folder):
    """Make torch, Inductor and the launchers take the CPU for an H200 for the rest of this process. Raises UserError."""
    if ops.triton is None:
        raise UserError("host_time: Triton is not installed; pip install triton")
    stand_in(folder)
    import triton
    from torch.utils import _triton

    _triton.has_triton = count.always(True)
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._inductor.select_algorithm import extern_kernels
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device, self.get_current_stream = (
                torch.cuda.current_device,
                torch._C._cuda_getCurrentRawStream,
            )
            self.get_device_capability = count.always((9, 0))

    torch.cuda._initialized, torch.cuda._is_in_bad_fork = True, count.always(False)
    torch._C._cuda_getDevice = count.always(Current())
    for name in ("exchange_device", "maybe_exchange_device"):
        setattr(torch.cuda, "_" + name, count.always(Current()))
        setattr(CudaInterface, name, staticmethod(count.always(Current())))
    torch._C._cuda_getCurrentRawStream = count.always(0)
    torch.cuda.device_count, torch.cuda.set_device = count.always(1), count.always(None)
    for place in (torch.cuda, CudaInterface, CudaInterface.Worker):
        place.get_device_properties = staticmethod(count.always(count.H200))
    torch.Tensor.is_cuda = property(count.always(True))
    ops.triton.common._device_can_run = count.always(True)
    ops.triton.configs.architecture, ops.triton.configs.multiprocessors = count.always(90), count.always(132)
    triton_helpers.set_driver_to_gpu = count.always(None)
    triton.runtime.driver.set_active(Driver())

    def write(*args, out, **options):
        return out

    for place in (torch, extern_kernels):
        place.mm = place.addmm = write
    F.scaled_dot_product_attention, F.cross_entropy = cudnn_attention, fp32_cross_entropy
    norms = [torch.zeros(())]
    torch._foreach_norm, torch._fused_adamw_ = count.always(norms), count.always(None)
    torch._foreach_add_, torch._foreach_mul_ = count.always(None), count.always(None)
    torch._inductor.config.use_static_cuda_launcher = torch.__version__ >= (2, 13)
    # C++ of torch's CUDA builds: it reads the arguments, and launches.
    torch._C._StaticCudaLauncher = SimpleNamespace(
        _load_kernel=count.always((1, 1, 0, 0)), _unload_kernel=count.always(None), _launch_kernel=count.always(None)
    )
    triton_heuristics.CachingAutotuner.bench = count.always(1.0)
    torch._inductor.config.compile_threads = 1  # its workers would find no GPU
    torch.set_num_threads(1)


# ---- Inductor's code for CUDA, run on the CPU ----

cross_entropy = F.cross_entropy
ATTENTION = "_scaled_dot_product_cudnn_attention"
empty = torch._C._dynamo.guards._empty_strided_cpu  # what generated code calls


def cudnn_attention(q, k, v, dropout_p=0.0, is_causal=False):
    """What F.scaled_dot_product_attention does on CUDA, of tensors of the CPU."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout_p, is_causal, False)[0]


def fp32_cross_entropy(logits, *args, **options):
    """What F.cross_entropy does under CUDA's autocast."""
    return cross_entropy(logits.float(), *args, **options)


class Library:
    """Stands in for an aten operator of a library in generated code: its outputs as its fake implementation has them, unwritten."""

    def __init__(self, name):
        self.operator, self.outputs = getattr(torch.ops.aten, name).default, None

    def default(self, *args):
        if self.outputs is None:
            with FakeTensorMode(allow_non_fake_inputs=True):
                found = self.operator(*args)
            self.outputs = [(tuple(o.shape), o.stride(), o.dtype) if torch.is_tensor(o) else o for o in found]
        return [empty(*o) if isinstance(o, tuple) else o for o in self.outputs]


def inner_compile(graph, inputs, is_backward=False, **options):
    """Stands in for Inductor's: the code that it writes for an aten graph on CUDA, which runs on the CPU's tensors."""
    from torch._inductor.codecache import PyCodeCache

    with count.lowered(graph, inputs, is_backward) as lowering:
        code = lowering.codegen()[0].value
    code = code.replace("empty_strided_cuda(", "empty_strided_cpu(").replace(f"torch.ops.aten.{ATTENTION}", ATTENTION)
    libraries = {name: Library(name) for name in (ATTENTION, ATTENTION + "_backward")}
    module = PyCodeCache.load_by_key_path(*PyCodeCache.write(code), attrs=libraries)

    def run(args):
        return module.call(args)

    run._boxed_call = True
    return run


def compiled(call):
    """torch.compile of a model's call."""
    from torch._inductor.compile_fx import compile_fx

    return torch.compile(
        call, fullgraph=True, dynamic=False, backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile)
    )


# ---- the arms ----


def build(arm, config):
    """(the model of an arm, its micro-step)."""
    if arm == "compiled":
        model = PlainGPT(config)
        call = compiled(model)
    else:
        model = GPT(config)
        model.set_kernels(ops.all_triton())
        Shadows(model, torch.bfloat16)
        call = model if arm == "fastgpt" else compiled(lambda x, y, return_logits: model(x, y, return_logits))
    x, y = (torch.randint(config.vocab_size, (2, config.block_size)) for _ in range(2))
    flags = {} if arm == "compiled" else dict(return_logits=False)
    scaler, autocast = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)
    return model, lambda: micro_step(lambda x, y, **_: call(x, y, **flags), x, y, scaler, 1, autocast)


def updates(model):
    """{name: an update} of a fastgpt model with gradients: its own, and what nanoGPT does."""
    with contextlib.redirect_stdout(io.StringIO()):
        ours = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ours.max_norm = 1.0
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in ours.param_groups]
    params, theirs = list(model.parameters()), torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def nanogpt():
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        theirs.step()

    return {"compiled": nanogpt, "fastgpt": ours.step}


def fastest(calls, rounds, before=lambda: None):
    """{name: the least thread time in ms} of {name: call}, by turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * min(taken) for name, taken in times.items()}


def measure(n_layer, arms, rounds):
    """({"first": {arm: ms}, "other": {arm: ms}, "update": {arm: ms}}, {arm: its micro-step}) of a model of GPT-2's depth or another's.

    An iteration's first micro-step makes the gradients; the others add to them.
    """
    config = GPTConfig(block_size=32, vocab_size=128, n_layer=n_layer, n_head=2, n_embd=32, bias=False)
    with contextlib.redirect_stdout(io.StringIO()):
        models, steps = zip(*(build(arm, config) for arm in arms), strict=True)
    steps = dict(zip(arms, steps, strict=True))
    for step in steps.values():
        for _ in range(3):  # the first compiles
            step()

    def clear():
        for model in models:
            model.zero_grad(set_to_none=True)

    found = {"first": fastest(steps, rounds, clear)}
    for step in steps.values():
        step()  # makes them
    found["other"] = fastest(steps, rounds)
    if "fastgpt" in arms:
        calls = updates(models[arms.index("fastgpt")])
        for call in calls.values():
            call()
        found["update"] = fastest(calls, rounds)
    return found, steps


# ---- the command ----


def show(found, n_layer):
    """Print a depth's rows, each beside its ratio to the baseline."""
    for part, times in found.items():
        for arm, ms in times.items():
            ratio = f"{ms / times['compiled']:10.2f}" if "compiled" in times else ""
            print(f"{n_layer:>6}  {part:8}{arm:18}{ms:8.2f}{ratio}")


def show_profile(step, rounds=30):
    """Print the functions in which a micro-step spends most time. Profiled, Python takes about twice its time."""
    profile = cProfile.Profile()
    for _ in range(rounds):
        profile.runcall(step)
    total, rows = 0.0, []
    for (file, line, function), (_, calls, own, cumulative, _) in pstats.Stats(profile).stats.items():
        total += own
        rows.append((own, cumulative, calls, f"{'/'.join(Path(file).parts[-2:])}:{line} {function}"))
    print(f"\n{'own %':>8}{'with callees %':>16}{'calls':>8}  function")
    for own, cumulative, calls, name in sorted(rows, reverse=True)[:40]:
        print(f"{100 * own / total:8.1f}{100 * cumulative / total:16.1f}{calls / rounds:8.0f}  {name[:100]}")


def main(argv):
    """The command; its exit status."""
    cfg, _ = parse(HostTimeConfig, argv, "python -m benchmarks.host_time")
    arms, depths = cfg.arms.split(","), cfg.layers.split(",")
    if unknown := set(arms) - set(ARMS):
        raise UserError(f"--arms={cfg.arms}: {sorted(unknown)[0]!r} is none of {', '.join(ARMS)}")
    if not all(depth.isdecimal() and int(depth) for depth in depths):
        raise UserError(f"--layers={cfg.layers}: write depths with commas, 12,6")
    logging.getLogger("torch").setLevel(logging.ERROR)  # Inductor asks for what only a driver knows
    results = {"versions": versions(), "cpu": cpu_name(), "layers": {}}
    print(f"{results['cpu']}; " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()))
    print(f"\nlayers  {'part':8}{'arm':18}{'ms':>8}{'ratio':>10}")
    with tempfile.TemporaryDirectory() as folder:
        pretend_gpu(folder)
        for depth in map(int, depths):
            results["layers"][depth], steps = measure(depth, arms, cfg.rounds)
            show(results["layers"][depth], depth)
    if cfg.profile and "fastgpt" in steps:
        show_profile(steps["fastgpt"])
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(results, indent=1))
    return 0


def versions():
    """What the times depend on."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "Python": platform.python_version()}


def cpu_name():
    """The processor, as Linux names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    from fastgpt.cli import reported

    sys.exit(reported(lambda: main(sys.argv[1:])))
