"""Result files of `fastgpt bench`, made up."""

import json
from itertools import product
from pathlib import Path

SPEED = {"fastgpt": 1.27, "compiled": 1.0, "eager": 0.55, "pytorch": 1.13, "quack": 0.9, "liger": 0.8}
SHAPE = "B=32 T=1024 n_embd=768 n_head=12"


def benchmark(name, seconds, spread=0.01, **info):
    """One of pytest-benchmark's, its middle half `spread` of the median wide."""
    q1, q3 = seconds * (1 - spread / 2), seconds * (1 + spread / 2)
    stats = dict(median=seconds, q1=q1, q3=q3, iqr=q3 - q1, min=q1, max=q3)
    common = dict(device="cuda", timed_by="cuda graph", host_us=None, peak_memory_gb=12.345, unknown_key=1)
    group = name.rpartition(" ")[0]
    return dict(name=name, fullname=f"bench.py::test[{name}]", group=group, stats=stats, extra_info=common | info)


def step(provider, batch_size=32, seconds=0.1, **info):
    x = SPEED[provider]
    return benchmark(
        f"step gpt2 B={batch_size} x 4 {provider}", seconds / x, kind="step", provider=provider, model="gpt2",
        batch_size=batch_size, shape=f"B={batch_size} x 4, T=1024", dtype="bfloat16", timed_by="wall clock",
        tokens_per_s=batch_size * 4 * 1024 / seconds * x, mfu=0.4321 * x, mfu_of_ceiling=None, launches_per_micro_step=321,
        baseline=provider == "compiled", ratio=[x, x - 0.02, x + 0.03], **info,
    )  # fmt: skip


def op(name, direction, provider, seconds=0.4e-3, shape=SHAPE, **info):
    x = SPEED[provider]
    return benchmark(
        f"{name} 32x1024x768 {direction} {provider}", seconds / x, kind="op", provider=provider, op=name, direction=direction,
        shape=shape, dtype="bfloat16", tflops=456.7, gb_per_s=2345.0, of_floor=0.6 * x, baseline=provider == "compiled",
        ratio=[x, x - 0.01, x + 0.01], **dict(host_us=34.5) | info,
    )  # fmt: skip


def everything(**slower):
    """Steps and ops of several providers; `slower` {provider: factor} is planted in the steps."""
    arms, peers = ("compiled", "eager", "pytorch", "fastgpt"), ("compiled", "fastgpt", "quack")
    kernels = dict(fastgpt="cudnn_sdpa", pytorch="cudnn_sdpa")
    steps = [step(p, b, slower.get(p, 1) * 0.1, attention_kernel=kernels.get(p)) for b, p in product((12, 32), arms)]
    return steps + [op(*c) for c in product(("attention", "gelu_mlp"), ("forward", "train"), peers)]


def write_result(folder, benchmarks, day=1, commit="abcdef1234567", **run):
    """A result file like those of `fastgpt bench`: its path."""
    about = dict(
        device="cuda", gpu="NVIDIA H200", driver="575.51", versions=dict(python="3.12.1", torch="2.13.0", cudnn=None),
        ceilings=dict(flops=7.9e14, bandwidth=4.3e12, dtype="bfloat16"),
        clocks=dict(sm_mhz=[1755, 1950, 1980], power_w=[310.5, 655.1, 699.0]), attention_kernel="cudnn_sdpa_sm90",
        budget_s=480, seconds=431.2,
        left_out=[dict(name=f"attention {d} liger", why="not\n<installed>") for d in ("forward", "train")],
        quick=False,
    )  # fmt: skip
    result = dict(datetime=f"2026-07-{day:02}T12:00:00+00:00", commit_info=dict(id=commit, dirty=True), version="5.3.1")
    path = Path(folder) / f"2026-07-{day:02}T1200-{commit[:7]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | dict(machine_info={}, benchmarks=benchmarks, fastgpt=about | run)))
    return path
