"""`python -m benchmarks.save_time`: how long a save keeps training waiting, in the foreground and in the background, in steps.

A model of 4 layers, n_embd 512 and GPT-2's vocabulary (456 MB with its optimizer) trains on the CPU. Each save is timed as the loop
meets it. The first one in the background also allocates the snapshot. Pass a folder on the disk to be measured: `... save_time DIR`.
"""

import platform
import statistics
import sys
import tempfile
import time

import torch

from fastgpt.checkpoint import Writer
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

SAVES, STEPS, SEQUENCES = 3, 2, 4


def main(folder: str | None) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=4, n_head=8, n_embd=512, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    idx = torch.randint(50257, (SEQUENCES, 257))

    def step() -> float:
        began = time.perf_counter()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    alone = statistics.median([step() for _ in range(4)][1:])
    cpu = next(
        (x.partition(":")[2].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    print(f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}; a step takes {alone:.2f} s")
    for background in (False, True):
        with tempfile.TemporaryDirectory(dir=folder) as out_dir:
            writer, stalls, beside = Writer(out_dir, 1, background, print), [], []
            for n in range(1, SAVES + 1):
                checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": n}
                began = time.perf_counter()
                writer.save(checkpoint, best=False)
                stalls.append(time.perf_counter() - began)
                beside += [step() for _ in range(STEPS)]
                writer.wait()  # as a run that saves rarely finds it
            writer.wait()
        where = "background" if background else "foreground"
        said = ", ".join(f"{s / alone:.2f}" for s in stalls)
        print(f"{where}: save() takes {said} steps; a step after it {statistics.median(beside) / alone:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:] or [None])
