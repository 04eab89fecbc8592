"""The floor of a training step on a GPU: FLOPs and bytes of each of its parts, and the time that they take at least.

    python -m benchmarks.roofline --preset=gpt2 --batch_size=32 --gpu=H200        (also: fastgpt bench roofline)

A part is one GEMM, one attention, or one pass over memory; its floor is the larger of its FLOPs over the matrix units' rate and its
bytes over the memory's. Bytes are the fewest that nanoGPT's maths under autocast to bf16 must move: each input read once, each output
written once, the residual stream fp32, whatever can be fused into a neighbour fused. Nothing here is measured: `fastgpt bench` says how
near a machine comes. Source of the counting: the shapes alone (docs/performance.md).
"""

import sys
from dataclasses import dataclass

from fastgpt.config import RooflineConfig, UserError, parse
from fastgpt.metrics import PEAK_BANDWIDTH, PEAK_FLOPS, known_gpu

STREAM = 4  # bytes of an element of the residual stream, of weights, their gradients and moments: fp32


@dataclass(frozen=True)
class Part:
    """One piece of work: FLOPs of the matrix units, bytes of memory, and how often it comes."""

    op: str
    direction: str
    flops: float
    bytes: float
    times: int = 1

    def seconds(self, flops_per_s, bytes_per_s):
        """The least time of all its times."""
        return self.times * max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def gemm(op, direction, m, n, k, itemsize, out_itemsize=None, extra=0, times=1):
    """[m, k] times [k, n]; `extra`: bytes that an epilogue moves beside the product."""
    moved = (m * k + k * n) * itemsize + m * n * (out_itemsize or itemsize) + extra
    return Part(op, direction, 2 * m * n * k, moved, times)


def linear(op, m, n, k, itemsize, times=1):
    """A Linear [n, k] on m rows: the product, the input's gradient and the weight's, which is fp32."""
    return [
        gemm(op, "forward", m, n, k, itemsize, times=times),
        gemm(op + " dX", "backward", m, k, n, itemsize, times=times),
        gemm(op + " dW", "backward", n, k, m, itemsize, STREAM, times=times),
    ]


def layer_norm(M, C, itemsize, times=1):
    """Of the first block: there is no branch yet."""
    return [
        Part("layer_norm", "forward", 0, M * C * (STREAM + itemsize), times),
        Part("layer_norm", "backward", 0, M * C * (2 * STREAM + itemsize), times),
    ]


def add_layer_norm(M, C, itemsize, times=1):
    """Stream and branch in, new stream and its norm out; and their gradients, the branch's in the compute dtype."""
    return [
        Part("add_layer_norm", "forward", 0, M * C * 2 * (STREAM + itemsize), times),
        Part("add_layer_norm", "backward", 0, M * C * (3 * STREAM + 2 * itemsize), times),
    ]


def attention(M, T, C, H, itemsize, times=1):
    """Causal: half of the scores. Five products in the backward, two in the forward; 4 bytes of lse a row and head."""
    return [
        Part("attention", "forward", 2 * M * T * C, 4 * M * C * itemsize + 4 * M * H, times),
        Part("attention", "backward", 5 * M * T * C, 8 * M * C * itemsize + 4 * M * H, times),
    ]


def gelu_mlp(M, C, itemsize, times=1):
    """Two Linears with the GELU in the epilogues: the pre-activation is written beside the activation, and read by the backward."""
    F = 4 * C
    up, up_dx, up_dw = linear("mlp up", M, F, C, itemsize, times)
    down, down_dx, down_dw = linear("mlp down", M, C, F, itemsize, times)
    gelu = M * F * itemsize
    return [
        Part("mlp up + GELU", "forward", up.flops, up.bytes + gelu, times), down,
        Part("mlp down dX + GELU'", "backward", down_dx.flops, down_dx.bytes + gelu, times), down_dw, up_dx, up_dw,
    ]  # fmt: skip


def linear_cross_entropy(M, C, V, itemsize):
    """The head's three GEMMs, and one pass over the logits: read for the loss, their gradient written in their place."""
    logits = M * V * itemsize
    head = linear("head", M, V, C, itemsize)
    return [
        head[0],
        Part("cross_entropy", "forward", 0, logits),
        Part("cross_entropy", "backward", 0, logits),
        *head[1:],
    ]


def embedding(M, T, C, V):
    """A row written a token, and each row of the table that may be wanted gathered; backward the stream's gradient read once, and
    added to those rows."""
    rows = min(M, V)
    return [
        Part("embedding", "forward", 0, (M + rows) * C * STREAM),
        Part("embedding", "backward", 0, (M + 2 * rows + T) * C * STREAM),
    ]


def optimizer(n_params, shadow=2):
    """The norm of the gradients, and AdamW: weight, gradient and two moments read, all but the gradient written, and so many bytes
    of a shadow."""
    return [
        Part("gradient norm", "update", 0, n_params * STREAM),
        Part("AdamW", "update", 0, n_params * (7 * STREAM + shadow)),
    ]


def op_parts(op, shape, itemsize):
    """The Parts of one op at a Shape (fastgpt.verify) in a dtype of itemsize bytes. Raises KeyError for another op."""
    M, T, C, H, V = shape.B * shape.T, shape.T, shape.n_embd, shape.n_head, shape.vocab_size
    return {
        "layer_norm": lambda: layer_norm(M, C, itemsize),
        "add_layer_norm": lambda: add_layer_norm(M, C, itemsize),
        "attention": lambda: attention(M, T, C, H, itemsize),
        "gelu_mlp": lambda: gelu_mlp(M, C, itemsize),
        "linear_cross_entropy": lambda: linear_cross_entropy(M, C, V, itemsize),
        "embedding": lambda: embedding(M, T, C, V),
    }[op]()


def step_parts(config, batch_size, itemsize=2):
    """The Parts of a whole iteration of one micro-step: a GPTConfig at batch_size sequences of block_size tokens."""
    T, C, H, V, L = config.block_size, config.n_embd, config.n_head, config.vocab_size, config.n_layer
    M = batch_size * T
    return [
        *embedding(M, T, C, V),
        *layer_norm(M, C, itemsize),
        *add_layer_norm(M, C, itemsize, times=2 * L),
        *linear("qkv", M, 3 * C, C, itemsize, L),
        *attention(M, T, C, H, itemsize, L),
        *linear("proj", M, C, C, itemsize, L),
        *gelu_mlp(M, C, itemsize, L),
        *linear_cross_entropy(M, C, V, itemsize),
        *optimizer(n_params(config)),
    ]


def n_params(config):
    """Parameters of a GPT, position embeddings counted."""
    C, F = config.n_embd, 4 * config.n_embd
    weights = 4 * C * C + 2 * C * F + 2 * C
    biases = (3 * C + C + F + C + 2 * C) * config.bias
    return (config.vocab_size + config.block_size + 1 + config.bias) * C + config.n_layer * (weights + biases)


def rates(cfg):
    """(FLOP/s, bytes/s) that a RooflineConfig names: measured ones, or a GPU's data sheet. Raises UserError."""
    name = known_gpu(cfg.gpu)
    if not name and not (cfg.flops and cfg.bandwidth):
        raise UserError(f"--gpu={cfg.gpu}: not in the table ({', '.join(PEAK_FLOPS)}); give --flops and --bandwidth")
    return cfg.flops or PEAK_FLOPS[name], cfg.bandwidth or PEAK_BANDWIDTH[name]


def roofline(cfg):
    """Print the table of a RooflineConfig. Raises UserError for an unknown GPU."""
    config = cfg.gpt_config()
    flops, bandwidth = rates(cfg)
    parts = step_parts(config, cfg.batch_size)
    print(
        f"{cfg.preset}: {n_params(config) / 1e6:.1f}M parameters, {cfg.batch_size} x {cfg.block_size} tokens, one micro-step and "
        f"the update, on {cfg.gpu} ({flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s)\n"
    )
    print(
        f"{'part':24}{'direction':11}{'times':>6}{'GFLOP':>10}{'GB':>8}{'FLOPs ms':>10}{'bytes ms':>10}{'floor ms':>10}"
    )
    for p in parts:
        by_flops, by_bytes = p.times * p.flops / flops * 1e3, p.times * p.bytes / bandwidth * 1e3
        print(
            f"{p.op:24}{p.direction:11}{p.times:6}{p.times * p.flops / 1e9:10.0f}{p.times * p.bytes / 1e9:8.2f}"
            f"{by_flops:10.3f}{by_bytes:10.3f}{p.seconds(flops, bandwidth) * 1e3:10.3f}"
        )
    all_flops, all_bytes = (sum(p.times * getattr(p, what) for p in parts) for what in ("flops", "bytes"))
    plain = sum(p.times * p.bytes for p in parts if not p.flops and p.direction != "update")
    fused = sum(p.times for p in parts if "GELU" in p.op) * cfg.batch_size * cfg.block_size * 4 * config.n_embd * 2
    tokens = cfg.batch_size * cfg.block_size
    floors = sum(p.seconds(flops, bandwidth) for p in parts)
    best = max(all_flops / flops, all_bytes / bandwidth)
    outside = f"{(plain + fused) / 1e9:.1f} GB of it outside GEMMs and attention, the update apart"
    print(f"\n{all_flops / 1e12:.2f} TFLOP, {all_bytes / 1e9:.1f} GB; {outside}")
    print(f"sum of the floors:     {floors * 1e3:9.2f} ms, {tokens / floors:12,.0f} tok/s")
    print(f"all overlapped:        {best * 1e3:9.2f} ms, {tokens / best:12,.0f} tok/s")


if __name__ == "__main__":
    from fastgpt.cli import reported

    sys.exit(reported(lambda: roofline(parse(RooflineConfig, sys.argv[1:], "python -m benchmarks.roofline")[0])))
