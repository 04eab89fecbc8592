"""What several ops share: registration with torch, autocast's dtype, cuBLAS's matrix products, strides, dropout."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import configs

INTERPRETED = triton.knobs.runtime.interpret  # read once: later changes of it have no effect
if INTERPRETED:
    from fastgpt.kernels import interpreter

    interpreter.mend()

RUNTIME, COMPILATION = triton.knobs.runtime, triton.knobs.compilation
LAUNCHES = 1024  # of a kernel, that `launch` remembers
NO_GPU = (
    "active drivers",
    "cpu tensor?",
)  # Triton's words for tensors on the CPU, on a machine without a GPU and on one with

LIBRARY = torch.library.Library("fastgpt", "FRAGMENT")  # torch.ops.fastgpt


def kernel_op(*writes: str) -> Callable[[Callable], Any]:
    """A decorator that makes a launcher an op, which torch.compile does not trace. `writes`: names of the arguments that it writes.

    A launcher gets its outputs as arguments and returns nothing, so no fake implementation must describe them. In eager mode a call runs
    the launcher directly. Under torch.compile it is the op fastgpt::NAME, which is registered by define and impl: a call costs 2.5 us of
    host time; with torch.library.custom_op it costs 10 to 35 us. `.opaque` of the result is the OpOverload.
    """

    def register(launcher):
        name = launcher.__name__
        LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=writes))
        LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastgpt::{name}", lambda *args, **kwargs: None, lib=LIBRARY)
        opaque = getattr(torch.ops.fastgpt, name).default

        @functools.wraps(launcher)
        def call(*args):
            return opaque(*args) if torch.compiler.is_compiling() else launcher(*args)

        call.opaque = opaque
        return call

    return register


def forbid_double_backward(name: str) -> Callable[[Callable], Callable]:
    """A decorator of an autograd.Function's backward, which then raises RuntimeError under create_graph=True.

    Without it autograd would silently treat the backward's result as a constant.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name}: a kernel's gradient has no gradient; leave out create_graph=True, or take PyTorch's op"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel on a grid of programs, on its arguments' GPU. `options`: its constants, num_warps, num_stages.

    A multiplication and an addition become one FMA. This is said here because Triton 3.10 is to switch it off by default: LayerNorm's
    forward then has 12% more instructions.

    At each launch Triton finds out anew which compiled kernel it needs: 10 to 18 us of host time. Here a launch takes the compiled kernel
    of an earlier one with the same key, which holds all that Triton may compile for.

    Raises RuntimeError for tensors that are not on a GPU; the interpreter takes them.
    """
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    likeness, tensor = _likeness(args)
    device = tensor.get_device()
    if tensor.is_cuda and device != torch.cuda.current_device():  # Triton launches on the current GPU
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **options)
        return
    launched = kernel.__dict__.setdefault("launched", {})
    key = None if likeness is None or _observed(kernel) else (device, kernel.hash, *options.items(), *likeness)
    if key is not None and key in launched:
        compiled, constants = launched[key]
        x, y, z = (*grid, 1, 1)[:3]
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants)
        return
    try:
        compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
    except (RuntimeError, ValueError) as e:
        if tensor.is_cuda or not any(said in str(e) for said in NO_GPU):
            raise
        raise RuntimeError(
            f"{kernel.__name__}: its tensors are on the {tensor.device.type}, and Triton's kernels run on an NVIDIA GPU. Move the tensors "
            "to one, or take PyTorch's op (fastgpt.ops with kernels='torch'), or set TRITON_INTERPRET=1 in the environment before Python "
            "starts: the interpreter, which is slow, then runs the kernels on the CPU"
        ) from e
    if key is not None and compiled is not None:
        constants = [options[name] for name in kernel.arg_names[len(args) :]]
        if len(launched) >= LAUNCHES:  # as from a text that grows: every length has keys of its own
            launched.clear()
        launched[key] = compiled, constants  # held: from 3.8 on Triton unloads a kernel that nothing holds


def _likeness(args):
    """(what Triton may compile for of a kernel's arguments, one of the tensors).

    These are the dtypes, a descriptor's block, and the ints: Triton asks whether they are 1 or multiples of 16, and how many bits they
    need. It also asks whether pointers are multiples of 16. If one is not, or an argument is of another type, None.
    """
    likeness, pointers, tensor = [], 0, None
    for x in args:
        kind = type(x)
        if kind is int or x is None:
            likeness.append(x)
        elif kind is Tensor or kind is Parameter:
            tensor = x
            pointers |= x.data_ptr()
            likeness.append(x.dtype)
        elif kind is float:
            likeness.append(kind)
        elif kind is TensorDescriptor:
            tensor = x.base
            likeness += tensor.dtype, *x.block_shape
        else:
            tensor = x if isinstance(x, Tensor) else tensor
            pointers = 1
    return None if pointers % 16 else likeness, tensor


def _observed(kernel):
    """Whether a hook, a profiler or a mode of debugging wants to see a launch, or compile for it."""
    enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook  # chains of hooks: `calls`
    return (
        RUNTIME.debug
        or COMPILATION.instrumentation_mode
        or getattr(RUNTIME, "add_stages_inspection_hook", None)  # Triton 3.6 has none
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
    )


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_run(x: Tensor) -> bool:
    """Whether the kernels can run on x: fp32, fp16 or bf16, on an NVIDIA GPU from sm_80 on or, with the interpreter, on the CPU."""
    return x.dtype in DTYPES and _device_can_run(x.device.type, x.device.index)


@torch.compiler.assume_constant_result  # torch.compile then does not trace it
def _device_can_run(kind, index):
    if kind == "cuda":
        return torch.version.hip is None and configs.architecture(torch.device(kind, index)) >= 80
    return kind == "cpu" and INTERPRETED


def check_dtype(x: Tensor) -> None:
    """Raise ValueError if the kernels cannot compute in x's dtype."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}: the kernels take float32, float16 and bfloat16")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of an op's output: autocast's if that is on for x's device, else x's. Raises ValueError as check_dtype."""
    check_dtype(x)
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cdiv(n: int, step: int) -> int:
    """n / step, rounded up. (Triton's own costs a host 2 us, here and below.)"""
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def rows(x: Tensor) -> Tensor:
    """x [..., C] as [B, T, C], for kernels that take three strides. Copies only if x has more dimensions and no such view."""
    if x.dim() == 3:
        return x
    return x[(None,) * (3 - x.dim())] if x.dim() <= 3 else x.reshape(-1, *x.shape[-2:])


def check_seed(dropout_p: float, seed: Tensor | None) -> None:
    """Raise ValueError if dropout_p is not in [0, 1], or lacks its seed, an int64 tensor of one element.

    The seed is on the device, so that each replay of a CUDA graph can use another.
    """
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p} is not in [0, 1]")
    if dropout_p > 0 and not (torch.is_tensor(seed) and seed.dtype == torch.int64 and seed.numel() == 1):
        raise ValueError("dropout_p > 0 needs a seed: an int64 tensor of one element")


def kept_scale(dropout_p: float) -> float:
    """The factor of the elements that dropout keeps: 1 / (1 - dropout_p); 0 if it keeps none."""
    return 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow. If not, forwards do not write what only a backward needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised, contiguous tensor of x's shape."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Write a @ b into out by cuBLAS: summed in fp32, rounded once to out's dtype. accumulate: add it to out, which must be fp32.

    All products use `out=`: autocast does not change such calls. It would round an fp32 product to 16 bits.
    """
    half = a.is_cuda and a.dtype != torch.float32  # torch has out_dtype only on CUDA
    if out.dtype == a.dtype and not accumulate:
        torch.mm(a, b, out=out)
    elif out.dtype != torch.float32:
        product = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        mm(a, b, product)
        out.copy_(product)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out) if half else out.addmm_(a.float(), b.float())
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out) if half else torch.mm(a.float(), b.float(), out=out)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x weight^T + bias into out by cuBLAS: x [M, K], weight [N, K], bias [N] or None, out [M, N]."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def sum_rows(x: Tensor, out: Tensor | None) -> None:
    """Write the sum over the rows of x [M, N], computed in fp32, into out [N]: a bias's gradient. If out is None, do nothing."""
    if out is not None and out.dtype == torch.float32:
        torch.sum(x, 0, dtype=torch.float32, out=out)
    elif out is not None:
        out.copy_(x.sum(0, dtype=torch.float32))


def cast(weight: Tensor, dtype: torch.dtype, shadow: Tensor | None = None) -> Tensor:
    """A weight in the compute dtype, detached: the op's gradient goes to the weight itself, in full precision.

    A shadow in that dtype (fastgpt.shadows) is used instead of a copy. `shadow`: the shadow of the parameter, if weight is only an alias
    of it; None: weight.shadow, if any.
    """
    shadow = getattr(weight, "shadow", None) if shadow is None else shadow
    if shadow is not None and shadow.dtype == dtype and shadow.device == weight.device:
        return shadow
    return weight.detach().to(dtype)


def precision(dtype: torch.dtype = torch.float32) -> str:
    """How tl.dot multiplies fp32: "tf32" if torch is allowed to use TF32, else "ieee". Other dtypes ignore it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # From 2.9 on torch has two settings. Reading the older one fails after the newer one was set.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


@triton.jit
def dropout_keep_mask(seed_ptr, index, p):
    """Whether dropout keeps each element, with probability 1 - p: Philox4x32-7 of the seed and the element's index only.

    Seven rounds pass the same tests of randomness as ten (Salmon et al., SC'11), with less arithmetic, which limits the speed.
    """
    return tl.rand(tl.load(seed_ptr), index, n_rounds=7) >= p
