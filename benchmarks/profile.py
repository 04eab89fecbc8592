"""Where the time of a step goes: a trace, and its time by op beside what the roofline predicts."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from fastgpt.benchmarks import roofline
from fastgpt.benchmarks.harness import CUDA, ceilings, sync

# What a kernel, or on the CPU an operator, is for: the first match of its name. Inductor's carry the names of what they fuse.
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
    run()  # the first of its kind, whatever it makes
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=activities) as profile:
        run()
        sync()
    return profile


def work(profile):
    """(name, seconds) of each kernel that the GPU ran; without one, of each operator, its callees apart."""
    for event in profile.events():
        if CUDA and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            yield event.name, event.device_time_total / 1e6
        elif not CUDA and event.self_cpu_time_total:
            yield event.name, event.self_cpu_time_total / 1e6


def facts(micro_step):
    """{"launches_per_micro_step": kernels that the GPU ran, None without one; "attention_kernel": the one that ran}."""
    attention, launches = Counter(), 0
    for name, seconds in work(profiled(micro_step)):
        launches += not name.lower().startswith(("memcpy", "memset"))
        if group(name) == "attention":
            attention[name] += seconds
    return {
        "launches_per_micro_step": launches or None if CUDA else None,  # none where the GPU may not be traced
        "attention_kernel": next(
            iter(sorted(attention, key=lambda n: ("bwd" in n or "backward" in n, -attention[n]))), None
        ),
    }


def write(step, config, batch_size, path):
    """Profile step(), an iteration of one micro-step; write path.json.gz, for chrome://tracing, and path.md, the time by op."""
    profile = profiled(step)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(f"{path}.json.gz")
    seconds, count = Counter(), Counter()
    for name, time in work(profile):
        seconds[group(name)] += time
        count[group(name)] += 1
    top, floor = ceilings(), Counter()
    for part in roofline.step_parts(config, batch_size):
        known = next((g for g in GROUPS if g in part.op), "optimizer" if part.direction == "update" else "gemm")
        floor[known] += part.seconds(top["flops"], top["bandwidth"])
    rows = [f"| {g} | {count[g]} | {1e3 * seconds[g]:.3f} | {1e3 * floor[g]:.3f} |" for g, _ in seconds.most_common()]
    Path(f"{path}.md").write_text(
        f"# {Path(path).name}: one iteration, {1e3 * sum(seconds.values()):.3f} ms of work\n\n"
        f"The floor is the roofline's, by the ceilings measured in the same run: {top['flops'] / 1e12:.3g} TFLOP/s, "
        f"{top['bandwidth'] / 1e12:.3g} TB/s. GELU has none: fused into a GEMM it is part of that one's.\n\n"
        f"| op | {'launches' if CUDA else 'operators'} | ms | floor ms |\n|---|---:|---:|---:|\n"
        + "\n".join(rows)
        + "\n"
    )
