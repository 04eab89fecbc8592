"""What every op needs: how it is called in eager mode, under torch.compile and under autocast; strides; dropout."""

import functools

import torch
import triton
import triton.language as tl

if triton.knobs.runtime.interpret:
    from fastgpt.kernels import interpreter

    interpreter.mend()


class Op:
    """A differentiable op on plain tensors, made of two launchers and what autograd needs to know.

    forward(*args) and backward(*args) launch kernels and give tuples of new tensors; their signatures are annotated as
    torch.library wants them, and `fake_forward`, `fake_backward` give empty tensors of the same kind. setup_context is
    torch.autograd.Function's; gradients(launch, ctx, *grads) calls launch(...), which is the backward, and gives the
    gradients of forward's arguments. `mutates` names the arguments that backward writes into.

    In eager mode the launchers run directly: torch.library's boundary costs about 50 us a call. Under torch.compile the
    ops are the opaque `fastgpt::name` and `fastgpt::name_backward`.
    """

    def __init__(self, name, forward, fake_forward, backward, fake_backward, setup_context, gradients, mutates=()):
        self.name = name
        self.forward, self.backward = forward, backward = on_device(forward), on_device(backward)
        self.custom_backward = torch.library.custom_op(f"fastgpt::{name}_backward", backward, mutates_args=mutates)
        self.custom_backward.register_fake(fake_backward)
        self.custom = torch.library.custom_op(f"fastgpt::{name}", forward, mutates_args=())
        self.custom.register_fake(fake_forward)
        self.custom.register_autograd(functools.partial(gradients, self.custom_backward), setup_context=setup_context)
        members = {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(once(name, functools.partial(gradients, backward))),
        }
        self.function = type(name, (torch.autograd.Function,), members)

    def __call__(self, *args):
        return self.custom(*args) if torch.compiler.is_compiling() else self.function.apply(*args)


def once(name, gradients):
    """A backward that refuses to be differentiated itself: its answer would be taken for a constant, in silence."""

    def backward(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{name}: a kernel's gradient has no gradient; leave out create_graph=True, or take PyTorch's op"
            )
        return gradients(ctx, *grads)

    return backward


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
    return kind == "cpu" and triton.knobs.runtime.interpret


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


def ours(grad):
    """Mark a gradient that a backward has just made: the next one may write into it."""
    grad.is_fastgpts = True
    return grad


def is_ours(grad):
    """Whether a backward of ours made this gradient and nobody else holds it: a sum hands one tensor to both of its terms.

    A reference that Python code keeps, in a hook, is not counted.
    """
    return getattr(grad, "is_fastgpts", False) and grad.is_contiguous() and grad._use_count() == 1


adding = False  # whether a backward may add to weights' gradients by itself: fastgpt.ops.adding_in_place


def grad_of(weight):
    """The gradient of a weight that a GEMM may add to, fp32; None where there is none yet, or where somebody else must hear of it."""
    if (
        not adding
        or torch.compiler.is_compiling()
        or not (weight.is_leaf and weight.requires_grad)
        or weight.grad is None
    ):
        return None
    heard = weight._backward_hooks or weight._post_accumulate_grad_hooks
    mine = not heard and weight.grad.dtype == torch.float32 and weight.grad.is_contiguous()
    return weight.grad if mine else None


def mm(a, b, dtype, into=None):
    """a @ b by cuBLAS, accumulated in fp32 and rounded once, to dtype: a's own, fp32, or one that fp32 is cast to.

    With `into`, fp32, it is added to that and nothing is answered: the GEMM reads it where it would only write.
    """
    if into is None and dtype == a.dtype:
        return torch.mm(a, b)
    with torch.autocast(a.device.type, enabled=False):  # under which mm would answer in 16 bits again
        half = a.is_cuda and a.dtype != torch.float32  # torch 2.13 has out_dtype on CUDA alone
        if into is None:
            return (torch.mm(a, b, out_dtype=torch.float32) if half else torch.mm(a.float(), b.float())).to(dtype)
        if half:
            torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
        else:
            into.addmm_(a.float(), b.float())
    return None


def project(x, weight, bias, out):
    """out [M, N] = x [M, K] weight [N, K]^T + bias [N] or None, by cuBLAS."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def row_sums(dy, dtype):
    """A bias's gradient: the sum over rows of dy [M, N], added in fp32, in dtype; empty where that is None, without a bias."""
    return dy.new_empty(0) if dtype is None else dy.sum(0, dtype=torch.float32).to(dtype)


def cast(weight, dtype, shadow=None):
    """A weight in the compute dtype, for an op that takes both: its gradient goes to the weight itself, in full precision.

    shadow is such a one that the caller keeps: no copy is then made.
    """
    if shadow is not None and shadow.dtype == dtype:
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
def keep(seed_ptr, index, p):
    """Which elements dropout keeps, each with probability 1 - p: Philox4x32-7 of the seed and the element's index alone.

    Seven rounds pass every test of randomness that ten do (Salmon et al., SC'11), for less of what binds this: arithmetic.
    """
    return tl.rand(tl.load(seed_ptr), index, n_rounds=7) >= p
