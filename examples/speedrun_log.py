"""The log of a run in the form of modded-nanogpt's records: the code, the versions, nvidia-smi, and a line for each evaluation.

    python examples/speedrun_log.py out-gpt2-3.28 > speedrun.txt

The time is that of training, from its first iteration on, with compilation and without evaluations.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

import fastgpt
import fastgpt.kernels
from fastgpt.metrics import read_metrics

RULE = "=" * 100


def code() -> str:
    """The source of the installed packages fastgpt and fastgpt.kernels."""
    packages = [Path(module.__file__).parent for module in (fastgpt, fastgpt.kernels)]
    return "\n".join(
        f"# {p.parent.name}/{p.name}\n{p.read_text()}" for folder in packages for p in sorted(folder.glob("*.py"))
    )


def nvidia_smi() -> str:
    """What nvidia-smi prints, or that there is none."""
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return "nvidia-smi: not found on this machine\n"


def lines(out_dir: str) -> list[str]:
    """`step:125/5100 val_loss:4.8001 train_time:23000ms step_avg:184.00ms` for each evaluation of a run."""
    last = json.loads((Path(out_dir) / "config.json").read_text())["settings"]["max_iters"]
    found = []
    for record in read_metrics(Path(out_dir) / "metrics.jsonl"):
        if "val_loss" in record:
            step, ms = record["iter"], record["train_s"] * 1000
            mean = ms / step if step else float("nan")
            loss = f"val_loss:{record['val_loss']:.4f}"
            found.append(f"step:{step}/{last} {loss} train_time:{ms:.0f}ms step_avg:{mean:.2f}ms")
    return found


if __name__ == "__main__":
    print(code(), RULE, sep="\n")
    cuda = f"compiled for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    print(f"Running fastgpt {fastgpt.__version__} on Python {sys.version}, PyTorch {torch.__version__} {cuda}")
    print(nvidia_smi(), RULE, sep="\n")
    print(*lines(sys.argv[1]), sep="\n")
