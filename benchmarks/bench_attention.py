"""Causal attention on packed queries, keys and values, against each backend of scaled_dot_product_attention and what is importable."""

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


attention.provider("sdpa-cudnn")(backend(SDPBackend.CUDNN_ATTENTION))
attention.provider("sdpa-flash")(backend(SDPBackend.FLASH_ATTENTION))
attention.provider("sdpa-efficient")(backend(SDPBackend.EFFICIENT_ATTENTION))


@attention.provider("flex")
def flex(it):
    needs_gpu("FlexAttention's backward")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = it.inputs["qkv"].size(1)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    return on_heads(lambda *qkv: attend(*(t.transpose(1, 2) for t in qkv), block_mask=mask).transpose(1, 2))


@attention.provider("flash-attn-3")
def flash_attn_3(it):
    attend = importable("flash_attn_interface").flash_attn_func
    return on_heads(lambda *qkv: attend(*qkv, causal=True))


@attention.provider("flash-attn-4")
def flash_attn_4(it):
    attend = importable("flash_attn.cute").flash_attn_func
    return on_heads(lambda *qkv: attend(*qkv, causal=True))


test_attention = attention.benchmark()
