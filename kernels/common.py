"""What every op needs: registration with torch, autocast's dtype, the matrix products of cuBLAS, strides, dropout."""

import functools

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # as the kernels are from here on, whatever the environment becomes
if INTERPRETED:
    from fastgpt.kernels import interpreter

    interpreter.mend()


LIBRARY = torch.library.Library("fastgpt", "FRAGMENT")  # torch.ops.fastgpt

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    # Inductor writes an error's text for each op that it does not know, and with it all that the op was computed from: exponential in
    # the layers. PyTorch 2.13 mended it. The target's name says enough.
    from torch._inductor.exc import OperatorIssue

    OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: str(target))


def kernel_op(*writes):
    """A decorator that makes a launcher an op that torch.compile does not look into; `writes` names the arguments that it writes into.

    A launcher takes its outputs as arguments and answers nothing, so there is nothing that torch.library must be told about them. In
    eager mode a call is the launcher itself. Under torch.compile it is the op fastgpt::NAME, registered by define and impl: such a call
    costs 2.5 us of host time, one by torch.library.custom_op 10 to 35.
    """

    def register(launcher):
        name, launch = launcher.__name__, on_device(launcher)
        LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=writes))
        LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastgpt::{name}", lambda *args, **kwargs: None, lib=LIBRARY)
        opaque = getattr(torch.ops.fastgpt, name).default

        @functools.wraps(launcher)
        def call(*args):
            return opaque(*args) if torch.compiler.is_compiling() else launch(*args)

        call.opaque = opaque
        return call

    return register


def forbid_double_backward(name):
    """A decorator of an autograd.Function's backward: differentiating it would take its answer for a constant, in silence.

    Raises RuntimeError under create_graph=True.
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


def on_device(launcher):
    """The launcher on its first argument's GPU: Triton launches on the current one."""

    @functools.wraps(launcher)
    def launch(x, *args):
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return launcher(x, *args)
        return launcher(x, *args)

    return launch


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_run(x):
    """Whether Triton can run on x: on an NVIDIA GPU from sm_80 on or the CPU through the interpreter, in a dtype of at most fp32."""
    return x.dtype in DTYPES and _device_can_run(x.device.type, x.device.index)


@torch.compiler.assume_constant_result  # torch.compile need not trace the questions
def _device_can_run(kind, index):
    if kind == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)
    return kind == "cpu" and INTERPRETED


def check_dtype(x):
    """Raise ValueError for a dtype that the kernels do not compute in."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}: the kernels take float32, float16 and bfloat16")


def compute_dtype(x):
    """The dtype that an op answers in: autocast's where it is on for x's device, else x's own. Raises ValueError."""
    check_dtype(x)
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rows(x):
    """x [..., C] as [B, T, C], for kernels that take three strides; a copy only of more dimensions that are no view of that."""
    return x[(None,) * (3 - x.dim())] if x.dim() <= 3 else x.reshape(-1, *x.shape[-2:])


def check_seed(dropout_p, seed):
    """Dropout needs its seed, an int64 tensor of one element on the device: a CUDA graph can then be given another."""
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p} is not in [0, 1]")
    if dropout_p > 0 and not (torch.is_tensor(seed) and seed.dtype == torch.int64 and seed.numel() == 1):
        raise ValueError("dropout_p > 0 needs a seed: an int64 tensor of one element")


def kept_scale(dropout_p):
    """What dropout multiplies the elements by that it keeps: 1 / (1 - dropout_p)."""
    return 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)


def needs_grad(*tensors):
    """Whether a backward may follow: what only it needs is then written, and else left out."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def like(x, dtype):
    """An empty, dense tensor of x's shape."""
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def mm(a, b, out, accumulate=False):
    """Write a @ b into out by cuBLAS, accumulated in fp32 and rounded once to out's dtype; or add it to an fp32 out in that GEMM.

    Products are written by `out=`, which autocast leaves alone: it would round an fp32 product to 16 bits.
    """
    half = a.is_cuda and a.dtype != torch.float32  # torch has out_dtype on CUDA alone
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


def project(x, weight, bias, out):
    """Write x [M, K] weight [N, K]^T + bias [N] or None into out [M, N], by cuBLAS."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def sum_rows(x, out):
    """Write the sum over rows of x [M, N], added in fp32, into out [N]: a bias's gradient. Nothing where out is None."""
    if out is not None and out.dtype == torch.float32:
        torch.sum(x, 0, dtype=torch.float32, out=out)
    elif out is not None:
        out.copy_(x.sum(0, dtype=torch.float32))


def cast(weight, dtype, shadow=None):
    """A weight in the compute dtype, for an op that takes both: its gradient goes to the weight itself, in full precision.

    No copy is made where the weight has a shadow in that dtype (fastgpt.shadows); `shadow` is that of a weight which this is an alias of.
    """
    shadow = getattr(weight, "shadow", None) if shadow is None else shadow
    if shadow is not None and shadow.dtype == dtype and shadow.device == weight.device:
        return shadow
    return weight.detach().to(dtype)


def precision(dtype=torch.float32):
    """How tl.dot multiplies fp32: as torch does, IEEE unless TF32 was allowed. For other dtypes it has no meaning."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # From 2.9 on torch has two settings, and reading the older one fails where the newer was used.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


@triton.jit
def dropout_keep_mask(seed_ptr, index, p):
    """Which elements dropout keeps, each with probability 1 - p: Philox4x32-7 of the seed and the element's index alone.

    Seven rounds pass every test of randomness that ten do (Salmon et al., SC'11), for less of what binds this: arithmetic.
    """
    return tl.rand(tl.load(seed_ptr), index, n_rounds=7) >= p
