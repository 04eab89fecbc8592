"""`fastgpt bench roofline`: the floor of a training step on a GPU, part by part.

The parts are those of the records (fastgpt/records.py): one GEMM, one attention, or one pass over memory. A part's floor is the larger
of two times: its FLOPs over the matrix units' rate, and its bytes over the memory's. Bytes are the fewest that nanoGPT's maths under
autocast to bf16 must move: each input is read once, each output is written once, and what fits into a neighbour's pass is fused. Nothing
is measured here: `fastgpt bench` says how near a machine comes.
"""

from pydantic import Field

from fastgpt.config import StepShape, UserError
from fastgpt.metrics import PEAKS, peaks
from fastgpt.records import RECORDS, Shape, n_params


# fmt: off
class RooflineConfig(StepShape):
    """The least time that a training step can take on a GPU, by part: by its FLOPs, or by the bytes that it must move."""

    GROUPS = {"preset": "the step", "gpu": "the GPU"}
    EXAMPLES = ["fastgpt bench roofline --gpu=H100", "fastgpt bench roofline --preset=gpt2-xl --batch_size=8"]

    gpu: str = Field("H200", description="a GPU by name; its data sheet gives the rates")
    flops: float | None = Field(None, gt=0, description="FLOP/s in bf16, such as a benchmark's ceiling; None: the data sheet's")
    bandwidth: float | None = Field(None, gt=0, description="bytes/s of memory; None: the data sheet's")
# fmt: on


def step_parts(shape, n_layer, itemsize=2):
    """The Parts of an iteration of one micro-step, in the order in which they run."""
    parts = {op: record.parts_of_step(shape, n_layer, itemsize) for op, record in RECORDS.items()}
    qkv, proj = parts["linear"][:3], parts["linear"][3:]
    parts |= {"linear": qkv, "attention": parts["attention"] + proj}
    return [p for of_op in parts.values() for p in of_op]


def rates(cfg):
    """(FLOP/s, bytes/s) of a RooflineConfig: the given ones, else a data sheet's. Raises UserError for an unknown GPU."""
    sheet = peaks(cfg.gpu)
    if not sheet and not (cfg.flops and cfg.bandwidth):
        raise UserError(f"--gpu={cfg.gpu}: not in the table ({', '.join(PEAKS)}); give --flops and --bandwidth")
    return cfg.flops or sheet[0], cfg.bandwidth or sheet[1]


def roofline(cfg):
    """Print the table of a RooflineConfig. Raises UserError for an unknown GPU."""
    config = cfg.gpt_config()
    shape, (flops, bandwidth) = Shape.of(cfg.batch_size, config), rates(cfg)
    parts = step_parts(shape, config.n_layer)
    print(
        f"{cfg.preset}: {n_params(shape, config.n_layer) / 1e6:.1f}M parameters, {shape.B} x {shape.T} tokens, one micro-step and "
        f"the update, on {cfg.gpu} ({flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s)\n"
    )
    titles = (("times", 6), ("GFLOP", 10), ("GB", 8), ("FLOPs ms", 10), ("bytes ms", 10), ("least ms", 10))
    print(f"{'part':24}{'direction':11}" + "".join(f"{title:>{width}}" for title, width in titles))
    for p in parts:
        work, moved = p.times * p.flops, p.times * p.bytes
        print(
            f"{p.op:24}{p.direction:11}{p.times:6}{work / 1e9:10.0f}{moved / 1e9:8.2f}{work / flops * 1e3:10.3f}"
            f"{moved / bandwidth * 1e3:10.3f}{p.seconds(flops, bandwidth) * 1e3:10.3f}"
        )
    work, moved = (sum(p.times * getattr(p, what) for p in parts) for what in ("flops", "bytes"))
    outside = sum(p.times * p.bytes for p in parts if not p.flops and p.direction != "update")
    tokens = shape.B * shape.T
    outside += sum(p.times for p in parts if "GELU" in p.op) * tokens * 4 * shape.n_embd * 2  # the pre-activation
    print(
        f"\n{work / 1e12:.2f} TFLOP, {moved / 1e9:.1f} GB; {outside / 1e9:.1f} GB of it outside GEMMs and attention, the update apart"
    )
    floors, best = sum(p.seconds(flops, bandwidth) for p in parts), max(work / flops, moved / bandwidth)
    print(f"sum of the parts:      {floors * 1e3:9.2f} ms, {tokens / floors:12,.0f} tok/s")
    print(f"all overlapped:        {best * 1e3:9.2f} ms, {tokens / best:12,.0f} tok/s")
