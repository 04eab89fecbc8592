"""Faults to plant in kernels: each must turn `fastgpt verify`'s comparison red, interpreted and compiled."""

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from fastgpt import kernels
from fastgpt.kernels import common, configs
from fastgpt.records import Shape

SHAPE = Shape(2, 70, 48, 3, 97)  # more than a block of queries, of keys, of rows; heads and a width of no power of two
FEWER = replace(SHAPE, T=30)  # for kernels of a program a row, which the interpreter takes one after another
DROPOUT = Shape(1, 24, 32, 2, 65, dropout=0.2)
GROUPS = Shape(1, 70, 64, 4, 65, n_head_kv=2)
TANH = replace(SHAPE, T=30, tanh=True)
DOCUMENTS = Shape(1, 70, 32, 2, 65, doc_mask=True)
FAULTS = {  # op, what is wrong, the text, what stands there instead, and the shape that shows it
    "layer_norm": [
        ("a wrong eps", "/ N + eps)", "/ N + 2 * eps)", FEWER),
        ("a variance that forgets the mean", "tl.where(mask, x - mean, 0.0)", "x", FEWER),
        ("a dropped term of dx", " + xhat * mean_gx", "", FEWER),
        ("the stream's gradient left out", "dx += dstream", "dx += 0 * dstream", FEWER),
        ("a partial sum dropped", "partial[: len(sums)]", "partial[: len(sums), 1:]", FEWER),
        ("dropout without its scale", "tl.where(dropout_keep_mask(seed_ptr, row * N + cols, p), branch * scale, 0.0)",
         "tl.where(dropout_keep_mask(seed_ptr, row * N + cols, p), branch, 0.0)", DROPOUT),
        ("another mask in the backward", "tl.where(dropout_keep_mask(seed_ptr, row * N + cols, p), dx * scale",
         "tl.where(dropout_keep_mask(seed_ptr, row * N + cols + 1, p), dx * scale", DROPOUT),
        ("the stream's gradient for the branch's, though dropout fell on that", "ctx.p == 0 and ", "", DROPOUT),
    ],
    "embedding": [
        ("positions off by one", "wpe_ptr + t * stride_pt", "wpe_ptr + (t + 1) * stride_pt", FEWER),
        ("a token's other places forgotten", "going = tl.load(ids_ptr + start, start < end, other=-1) == token", "going = False", FEWER),
        ("places past the run counted", "i < end, other=-1) == token", "i < end, other=-1) >= token", FEWER),
        ("a run cut at its span's end", "tl.where(begins | (token >= V), -1, token)", "-1", FEWER),
        ("a run's spans added more than once", "(token != tl.load(runs_ptr", "(-1 != tl.load(runs_ptr", FEWER),
        ("a span of a run forgotten", "mine[:, None] & (cols < C)[None, :], other",
         "mine[:, None] & (i > first)[:, None] & (cols < C)[None, :], other", FEWER),
        ("the head's gradient overwritten", "(before + tl.sum(x, 0))", "tl.sum(x, 0)", FEWER),
        ("a sequence dropped", "for start in range(0, B, ROWS)", "for start in range(0, B - ROWS, ROWS)", FEWER),
        ("the backward without dropout", "        dx = tl.where(dropout_keep_mask", "        tl.where(dropout_keep_mask", DROPOUT),
    ],
    "attention": [
        ("a mask off by one", "tl.where(_reaches((rows - n0)[:, None]", "tl.where(_reaches((rows - n0 + 1)[:, None]", SHAPE),
        ("a missing scale", "dk * grad_scale", "dk", SHAPE),
        ("the diagonal block unmasked", "tl.where(seen, prob, 0.0)", "prob", SHAPE),
        ("keys and values swapped", "v_ptr = k_ptr + H * D * stride_qc", "v_ptr = k_ptr", SHAPE),
        ("a key of the same place unseen", "(cols - m0 - 1)[:, None]", "(cols - m0)[:, None]", SHAPE),
        ("a scale of 1 for all", "< 2.0**26, scale, 1.0)", "< 0, scale, 1.0)", SHAPE),
        ("delta left out", "ds = prob * (dp - delta[:, None])", "ds = prob * dp", SHAPE),
        ("lse without the maximum", "m * scale + tl.log2(total)", "tl.log2(total)", SHAPE),
        ("an accumulator that is not rescaled", "acc * alpha[:, None]", "acc", SHAPE),
        ("a swapped stride", "_store(dq_ptr + 2 * H * D, block, 3 * H * D", "_store(dq_ptr + 2 * H * D, block, 2 * H * D", SHAPE),
        ("another mask in the backward", "keep = _dropout_keep_mask(seed, b, h, rows[None, :], cols[:, None], p)",
         "keep = _dropout_keep_mask(seed, b, h, cols[:, None], rows[None, :], p)", DROPOUT),
        ("dropout before the sum", "tl.sum(prob, 1)",
         "tl.sum(tl.where(_dropout_keep_mask(seed, b, h, rows[:, None], cols[None, :], p), prob, 0.0), 1)", DROPOUT),
        ("heads that take turns with the keys", "_head(k_ptr, b, h // GROUP,", "_head(k_ptr, b, h % (H // GROUP),", GROUPS),
        ("a group's last head left out", "for _ in range(GROUP):\n        if", "for _ in range(GROUP - 1):\n        if", GROUPS),
        ("dk of a group's first head alone", "q_head += stride_qh", "q_head += 0", GROUPS),
        ("documents that see one another", "row_docs == col_docs", "row_docs >= col_docs", DOCUMENTS),
    ],
    "gelu_mlp": [
        ("the tanh GELU", "return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))",
         "return x / (1 + tl.exp(-1.5957691216 * (x + 0.044715 * x * x * x)))", SHAPE),
        ("half of the derivative", "+ x * density", "", SHAPE),
        ("the erf GELU for the tanh one", "    if TANH:\n        _, s", "    if False:\n        _, s", TANH),
        ("half of the tanh GELU's derivative", "return s + slope * x", "return s + 0 * slope * x", TANH),
        ("a forgotten bias", "acc += tl.load(bias_ptr + rn", "acc += 0 * tl.load(bias_ptr + rn", SHAPE),
        ("a bias gradient of one tile", "sum_rows(partial, db_fc)", "sum_rows(partial[:1], db_fc)", SHAPE),
        ("a swapped stride", "b.stride()[:: -1 if backward else 1]", "b.stride()[:: 1 if backward else -1]", SHAPE),
        ("a step of K dropped", "for k0 in range(0, K, BK)", "for k0 in range(0, K - 1, BK)", Shape(1, 9, 33, 1, 65)),
    ],
    "linear": [
        ("a bias left out", "weight, bias, y.view", "weight, None, y.view", SHAPE),
        ("an input's gradient by half of the weight", "torch.mm(dy2, weight,", "torch.mm(dy2, weight / 2,", SHAPE),
        ("a row dropped from the weight's gradient", "mm(dy2.t(), x2, dw,", "mm(dy2[1:].t(), x2[1:], dw,", SHAPE),
        ("a bias's gradient of one row", "sum_rows(dy2, db)", "sum_rows(dy2[:1], db)", SHAPE),
    ],
    "adamw": [
        ("no bias correction", "return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))", "return y * 0 + 1", SHAPE),
        ("a wrong eps", "* rsqrt_v + eps)", "* rsqrt_v + 100 * eps)", SHAPE),
        ("eps before the correction", "(tl.sqrt_rn(v) * rsqrt_v + eps)", "((tl.sqrt_rn(v) + eps) * rsqrt_v)", SHAPE),
        ("betas swapped", "v = beta2 * v + rest2 * g * g", "v = (1 - rest1) * v + rest1 * g * g", SHAPE),
        ("decay by the gradient", "p -= lr * weight_decay * p", "g += weight_decay * p", SHAPE),
        ("nothing clipped", "scale = tl.load(scale_ptr)", "scale = 1.0", SHAPE),
        ("a norm of the first chunks", "for start in range(0, chunks, BLOCK)", "for start in range(0, BLOCK, BLOCK)", SHAPE),
        ("every chunk the first", "start = (chunk - tl.load(table_ptr + row * WIDTH + FIRST)) * CHUNK", "start = chunk * 0", SHAPE),
        ("steps that are not counted", "1 if taken is None else taken)", "0 if taken is None else 0 * taken)", SHAPE),
    ],
    "linear_cross_entropy": [
        ("no target in the gradient", "- log2_total) - 1", "- log2_total)", FEWER),
        ("ignored targets counted", "!= ignore_index).to(tl.int32)", "!= -2).to(tl.int32)", FEWER),
        ("ignored rows with a gradient", "tl.store(logits_ptr + cols, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), cols < room)",
         "pass", FEWER),
        ("a sum without the new maximum", "total * tl.exp2((m - m_new) * LOG2E)", "total", FEWER),
        ("the rest of a row left as it was", "_overwrite(logits_ptr + rest, rest < room, m, log2_total)", "pass", FEWER),
        ("the loss's own gradient left out", "tl.load(dloss_ptr).to(tl.float32) * ", "", FEWER),
        ("a chunk's weight gradient dropped", "accumulate=start > 0", "accumulate=False", FEWER),
    ],
}  # fmt: skip
CASES = [(op, *fault) for op, faults in FAULTS.items() for fault in faults]
number = itertools.count()


def plant(op, right, wrong, folder):
    """The module of an op's kernels with one text in place of another, from a file in a folder.

    Its launchers are no ops of torch.library, whose names belong to the sound ones. Whoever wants it to run puts it in place of
    `fastgpt.kernels.<op>`.
    """
    source = Path(getattr(kernels, op).__file__).read_text()
    assert right in source, f"plant it anew, the kernel has changed: {right}"
    file = Path(folder) / f"planted_{next(number)}.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    planted = importlib.util.module_from_spec(spec)
    with patch.object(common, "kernel_op", lambda *writes: lambda launcher: launcher):
        spec.loader.exec_module(planted)
    return planted


def small_blocks():
    """{table of configs: a row so small that every loop runs more than once}."""
    return {
        "EMBEDDING": configs.EmbeddingConfig(block=32, backward_tile=64, backward_span=4),
        "LINEAR_CROSS_ENTROPY": replace(configs.LINEAR_CROSS_ENTROPY, block=32, min_chunk=50, memory_share=0),
        "ADAMW": configs.AdamWConfig(chunk=512, block=128, warps=4, clip_block=4),
    }
