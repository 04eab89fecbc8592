"""Where the time of a step goes: a trace, and the time by op beside the roofline's."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from fastgpt.benchmarks import roofline
from fastgpt.benchmarks.harness import CUDA, ceilings, sync

# What a kernel is for, or on the CPU an operator: the first match of its name. Inductor's names have those of what they fuse.
GROUPS = {
    "optimizer": r"adam|multi_tensor|lpnorm|foreach|clip",
    "attention": r"attention|flash|fmha|sdpa|cudnn_generated",
    "cross_entropy": r"log_softmax|softmax|nll_loss|loss_",
    "layer_norm": r"norm|gamma",
    "gemm": r"gemm|xmma|nvjet|cutlass|cublas|mlp_|addmm|\bmm\b|matmul|linear",
    "gelu": r"gelu",
    "embedding": r"embed|sort|radix|index",
    "cast, copy, fill": r"copy|cat|fill|memset|memcpy|zero|to_copy|clone",
}


def group(name):
    """The group of a kernel's name, else "other"."""
    return next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(run):
    """torch.profiler's profile of one run()."""
    run()  # the first one may compile
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=activities) as profile:
        run()
        sync()
    return profile


def work(profile):
    """(name, seconds) of each kernel that the GPU ran; without one, of each operator, apart from those that it calls."""
    for event in profile.events():
        if CUDA and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            yield event.name, event.device_time_total / 1e6
        elif not CUDA and event.self_cpu_time_total:
            yield event.name, event.self_cpu_time_total / 1e6


def facts(micro_step):
    """{"launches_per_micro_step": kernels that the GPU ran, None without one, "attention_kernel": its name, or None}."""
    attention, launches = Counter(), 0
    for name, seconds in work(profiled(micro_step)):
        launches += not name.lower().startswith(("memcpy", "memset"))
        if group(name) == "attention":
            attention[name] += seconds
    forward_first = sorted(attention, key=lambda n: ("bwd" in n or "backward" in n, -attention[n]))
    # A GPU that may not be traced shows none.
    return {
        "launches_per_micro_step": launches if CUDA and launches else None,
        "attention_kernel": next(iter(forward_first), None),
    }


def write(step, shape, n_layer, path):
    """Profile step(), an iteration of one micro-step; write path.json.gz, for chrome://tracing, and path.md, the time by op."""
    profile = profiled(step)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(f"{path}.json.gz")
    seconds, count = Counter(), Counter()
    for name, time in work(profile):
        seconds[group(name)] += time
        count[group(name)] += 1
    top, floor = ceilings(), Counter()
    for part in roofline.step_parts(shape, n_layer):
        known = next((g for g in GROUPS if g in part.op), "optimizer" if part.direction == "update" else "gemm")
        floor[known] += part.seconds(top["flops"], top["bandwidth"])
    rows = [f"| {g} | {count[g]} | {1e3 * s:.3f} | {1e3 * floor[g]:.3f} |" for g, s in seconds.most_common()]
    head = f"""# {Path(path).name}: one iteration, {1e3 * seconds.total():.3f} ms of work

The floor is the roofline's, by the ceilings measured in the same run: {top["flops"] / 1e12:.3g} TFLOP/s, \
{top["bandwidth"] / 1e12:.3g} TB/s. GELU has no floor of its own: fused into a GEMM it is a part of that one's.

| op | {"launches" if CUDA else "operators"} | ms | floor ms |
|---|---:|---:|---:|
"""
    Path(f"{path}.md").write_text(head + "\n".join(rows) + "\n")
