"""Causal attention on packed queries, keys and values, against each backend of scaled_dot_product_attention and what is importable.

fastgpt's gradients are the same bits each time. The fastest backward of most peers adds them up as it comes: beside it stands the same
peer's `-deterministic` one. sdpa-flash is FlashAttention-2, the fastest but on cards where cuDNN is ahead.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.benchmarks.harness import Op, importable, needs_gpu
from fastgpt.records import Shape

SHAPES = [
    Shape(16, 1024, 768, 12, 1), Shape(8, 2048, 768, 12, 1), Shape(4, 4096, 768, 12, 1),  # GPT-2 124M's heads
    Shape(16, 1024, 1024, 16, 1), Shape(16, 1024, 1600, 25, 1),  # 350M's and 1.5B's
]  # fmt: skip

attention = Op("attention", SHAPES, Shape(2, 64, 64, 1, 1), baseline="sdpa", inductor=False)


def on_heads(attend):
    """A function of qkv [B, T, 3 C], of one of q, k and v [B, T, H, 64] that gives [B, T, H, 64], alone or first of several."""

    def f(qkv):
        B, T, C3 = qkv.shape
        answer = attend(*(t.view(B, T, -1, 64) for t in qkv.split(C3 // 3, dim=2)))
        return ((answer[0] if isinstance(answer, tuple) else answer).flatten(2),)

    return f


def backend(kind):
    """A provider: one of PyTorch's backends."""

    def make(it):
        needs_gpu(f"PyTorch's {kind.name}")

        def f(qkv):
            with sdpa_kernel(kind):
                return it.reference(qkv)

        return f

    return make


@contextlib.contextmanager
def deterministic_algorithms():
    """PyTorch's setting, without the filling of all new memory that comes with it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Deterministic(torch.autograd.Function):
    """f(qkv), whose forward and backward both run under PyTorch's deterministic algorithms."""

    @staticmethod
    def forward(ctx, f, qkv):
        with torch.enable_grad(), deterministic_algorithms():
            ctx.qkv = qkv.detach().requires_grad_()
            (ctx.y,) = f(ctx.qkv)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, dy):
        with deterministic_algorithms():
            return None, *torch.autograd.grad(ctx.y, ctx.qkv, dy)


def deterministic(make):
    """A provider: another one's function under PyTorch's deterministic algorithms. A backend that has none refuses them."""

    def made(it):
        f = make(it)
        return lambda qkv: (Deterministic.apply(f, qkv),)

    return made


for name, kind in (
    ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
):
    attention.provider(name)(backend(kind))
    attention.provider(f"{name}-deterministic")(deterministic(backend(kind)))


@attention.provider("flex")
def flex(it):
    needs_gpu("FlexAttention's backward")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = it.inputs["qkv"].size(1)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    return on_heads(lambda *qkv: attend(*(t.transpose(1, 2) for t in qkv), block_mask=mask).transpose(1, 2))


def packed(module, **how):
    """A provider: a flash-attn package's attention on packed heads, which writes dq, dk and dv in place."""

    def make(it):
        needs_gpu("FlashAttention")
        attend = importable(module).flash_attn_qkvpacked_func

        def f(qkv):
            return (attend(qkv.view(*qkv.shape[:2], 3, -1, 64), causal=True, **how).flatten(2),)

        return f

    return make


def unpacked(module, **how):
    """A provider: the same of one that has no attention on packed heads."""

    def make(it):
        needs_gpu("FlashAttention")
        attend = importable(module).flash_attn_func
        return on_heads(lambda *qkv: attend(*qkv, causal=True, **how))

    return make


for name, make, module in (
    ("flash-attn-2", packed, "flash_attn"),
    ("flash-attn-3", packed, "flash_attn_interface"),
    ("flash-attn-4", unpacked, "flash_attn.cute"),
):
    attention.provider(name)(make(module))
    attention.provider(f"{name}-deterministic")(make(module, deterministic=True))


test_attention = attention.benchmark()
