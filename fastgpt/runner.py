"""How a micro-step runs: chosen for the step as a whole, by timing whole micro-steps on this GPU.

Three candidates: our kernels in CUDA graphs (no compiler, no host time, gradients added in their GEMMs); our kernels under torch.compile;
PyTorch's operators alone under torch.compile, as nanoGPT trains. The fastest is kept for the GPU, the versions, the sources and the shape.
So a run is never slower than compiled nanoGPT for long.

Each candidate is timed in a process of its own: if CUDA ends a capture, or memory is too small, the run itself has lost nothing.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastgpt import graphs, metrics, ops, timing, tuned
from fastgpt.choose import choose, is_time, recall, remember
from fastgpt.config import RESIDUAL, GPTConfig, TrainConfig, UserError, own_environment
from fastgpt.model import GPT
from fastgpt.parse import shown
from fastgpt.records import Shape
from fastgpt.shadows import Shadows, shadow_dtype
from fastgpt.step import micro_step, mixed_precision

SECONDS = 120.0  # that all candidates together may take
GAIN = 0.1  # of a run's time, that the fastest candidate may save at best
OVERHEAD = 1e-3  # seconds that even a tiny micro-step takes
ITERATIONS, WINDOWS = 2, 3  # timed in a row, and how often
DOCUMENT = 512  # tokens of a document, on average, where attention stays within them


@dataclass(frozen=True)
class Runner:
    """compile: under torch.compile. graphs: a micro-step is a CUDA graph's replay. plain: PyTorch's operators in place of kernels."""

    compile: bool
    graphs: bool
    plain: bool = False

    @property
    def text(self) -> str:
        """What runs, in words."""
        what = "plain PyTorch" if self.plain else "our kernels"
        how = ", ".join(["compiled"] * self.compile + ["in CUDA graphs"] * self.graphs) or "eager"
        return f"{what}, {how}" + " (as nanoGPT trains)" * (self.plain and self.compile)


EAGER, GRAPHS, COMPILE = Runner(False, False), Runner(False, True), Runner(True, False)
PLAIN = Runner(True, False, plain=True)
NAMES = {"graphs": GRAPHS, "compile": COMPILE, "plain": PLAIN, "eager": EAGER}


@dataclass(frozen=True)
class Work:
    """What a micro-step computes, and with what: everything that its time depends on but the GPU, the sources and the versions.

    sequences: of a micro-step. accumulates: whether an iteration has several micro-steps, of which one begins the gradients.
    kernels: a --kernels spec. replays: whether graphs are possible: DDP averages gradients in a micro-step that is none.
    """

    config: GPTConfig
    sequences: int
    accumulates: bool
    kernels: str
    dtype: str
    recompute: str = "none"
    doc_mask: bool = False
    residual: str = "fp32"
    replays: bool = True
    activation: str = "gelu"

    @property
    def first(self) -> str:
        """The runner that a run takes where nothing was timed."""
        return "graphs" if self.replays else "eager"

    @property
    def shape(self) -> Shape:
        """The Shape by which kernels are chosen."""
        narrow, tanh = self.residual == "bf16", self.activation == "gelu_tanh"
        return Shape.of(self.sequences, self.config, doc_mask=self.doc_mask, narrow_residual=narrow, tanh=tanh)

    def key(self, device: str) -> dict[str, Any]:
        """Everything that its time depends on."""
        dtype, rows = getattr(torch, self.dtype), {}
        with suppress(OSError, ValueError):  # not tuned, or not for this run
            _, rows, _ = tuned.read(tuned.path(self.shape, dtype, device), self.shape, dtype, device)
        library = str(torch.backends.cuda.preferred_blas_library())
        rows = {op: row.text for op, row in rows.items()}
        return {"work": asdict(self), "rows": rows, "blas": library, **tuned.environment(device)}

    def candidates(self) -> list[str]:
        """The names of the runners to time, the likeliest first. Pinned kernels stay: plain PyTorch is then no candidate."""
        return [self.first, *(["plain"] if self.kernels == "auto" else []), "compile"]

    def kernels_of(self, runner: Runner, device: str) -> ops.Kernels:
        """The ops.Kernels of a runner: chosen under it. Plain PyTorch keeps the update that was chosen, which is outside the micro-step."""
        found = choose(
            self.kernels,
            self.shape,
            getattr(torch, self.dtype),
            device,
            runner.compile and not runner.plain,
            runner.graphs,
        )
        return ops.Kernels(adamw=found.adamw, rows=found.rows) if runner.plain else found


def asked(cfg: TrainConfig, given: Any) -> Runner | None:
    """The Runner that a TrainConfig's flags say; None if it is to be chosen. given: the names of the settings that the user gave.

    --compile and --cuda_graphs mean what they mean in nanoGPT. Raises UserError for flags that contradict, and for graphs without CUDA.
    """
    cuda, flags = cfg.device.startswith("cuda"), [name for name in ("compile", "cuda_graphs") if name in given]
    if cfg.runner != "auto" and flags:
        raise UserError(f"--runner={cfg.runner}: --{flags[0]} is given too; leave one of them out")
    runner = NAMES[cfg.runner] if cfg.runner != "auto" else Runner(cfg.compile, cfg.cuda_graphs)
    if runner.graphs and not cuda:
        flag = "--cuda_graphs=True" if cfg.runner == "auto" else "--runner=graphs"
        raise UserError(f"{flag}: there are no CUDA graphs on --device={cfg.device}; leave it out")
    return runner if cfg.runner != "auto" or flags or not cuda else None


def find(
    work: Work, device: str, micro_steps: int, seconds: float = SECONDS, time_one: Callable | None = None
) -> Runner:
    """The fastest Runner of a run's micro-steps, as kept, or timed now for `seconds` at most; prints what was timed.

    micro_steps: how many the run has left. If they are too few to earn the timing back, it is `work.first`. Raises
    torch.OutOfMemoryError if no candidate's micro-step fits.
    """
    first = NAMES[work.first]
    if ops.triton is None or micro_steps <= 0:
        return first
    found = recall("runners", work.key(device), lambda saved: as_timed(saved.get("found"), work)) or {}
    about = micro_steps * estimate(work, device)
    short = about * GAIN < seconds
    if short and not found:
        print(f"runner: {first.text}; the run takes about {about:.0f} s, too short to time others")
        return first
    if missing := not short and found.keys() < {*work.candidates()}:
        print(f"choosing the runner, by whole micro-steps (once, {seconds:.0f} s at most; --runner=graphs skips it)")
    print("\n".join([f"  {'runner':52}{'GPU ms':>10}{'wall ms':>10}", *(row(name, ms) for name, ms in found.items())]))
    if missing:
        found = time_all(work, device, seconds, found, time_one)
    timed = {name: ms for name, ms in found.items() if "wall" in ms}
    if not timed:
        if len(found) == len(work.candidates()) and all(ms.get("memory") for ms in found.values()):
            raise torch.OutOfMemoryError(next(iter(found.values()))["failed"])
        print(f"runner: {first.text}, since nothing could be timed")
        return first
    best = min(timed, key=lambda name: timed[name]["wall"])
    ratio = ""
    if "plain" in timed:
        ratio = f", {timed['plain']['wall'] / timed[best]['wall']:.2f} times as fast as plain PyTorch compiled"
    print(f"runner: {NAMES[best].text}{ratio}")
    return NAMES[best]


def row(name: str, ms: dict[str, Any]) -> str:
    """The line of a candidate."""
    cells = f"{ms['gpu']:10.3f}{ms['wall']:10.3f}" if "wall" in ms else f"  {ms['failed']}"
    return f"  {name + ': ' + NAMES[name].text:52}{cells}"


def as_timed(found: Any, work: Work) -> dict[str, Any]:
    """What was kept of the candidates: {name: an `answer`}, of which one could be timed. Raises ValueError that says what cannot be."""
    if type(found) is not dict or not found:
        raise ValueError("it has no candidates")
    for name, ms in found.items():
        if name not in work.candidates():
            raise ValueError(f"{shown(name)} is no candidate")
        if not answer(ms):
            raise ValueError(f"{name} has neither times nor a reason why it has none")
    if not any("wall" in ms for ms in found.values()):
        raise ValueError("nothing could be timed")
    return found


def answer(ms: Any) -> bool:
    """Whether a value that was read says how a candidate did: {"gpu", "wall"} in milliseconds, or {"failed": reason}, and not both."""
    if type(ms) is not dict:
        return False
    if ms.keys() == {"gpu", "wall"}:
        return all(is_time(t) and t > 0 for t in ms.values())
    return type(ms.get("failed")) is str and ms.keys() <= {"failed", "memory"} and type(ms.get("memory", True)) is bool


def estimate(work: Work, device: str) -> float:
    """About how many seconds a micro-step takes: its FLOPs at half of the GPU's peak (where unknown, of an A100's)."""
    c = work.config
    n = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    flops = work.sequences * c.block_size * (6 * n + 12 * c.n_layer * c.n_embd * c.block_size)
    peak = metrics.peak_flops(device, work.dtype) or metrics.PEAKS["A100"][0]
    return max(OVERHEAD, flops / (peak / 2))


def time_all(
    work: Work, device: str, seconds: float, found: dict[str, Any], time_one: Callable | None = None
) -> dict[str, Any]:
    """Time the candidates that are not in `found`, for `seconds` in all, print each, and keep the answer: {name: `in_a_process`'s}.

    What is not reached is left to the next run, and so is what lacked memory. What did not end though it had all the time has failed.
    """
    found, deadline, alone = dict(found), time.monotonic() + seconds, True
    for name in [name for name in work.candidates() if name not in found]:
        left = deadline - time.monotonic()
        result = (time_one or in_a_process)(work, name, device, left) if left > 0 else None
        if result is None and alone:
            result = {"failed": f"not done in {seconds:.0f} s"}
        print(row(name, result or {"failed": f"not reached in {seconds:.0f} s; the next run times it"}), flush=True)
        if result is not None:
            found[name] = result
        alone = False
    if any("wall" in ms for ms in found.values()):
        lasting = {name: ms for name, ms in found.items() if not ms.get("memory")}  # others may use this GPU now
        remember("runners", work.key(device), {"found": lasting})
    return found


# ---- the process of a candidate ----


def in_a_process(work: Work, name: str, device: str, seconds: float) -> dict[str, Any] | None:
    """Time a candidate's micro-steps in a process: {"gpu", "wall"} in milliseconds, or {"failed": reason, "memory": whether it is that}.

    None if it takes longer than `seconds`: the process is then ended.
    """
    command = [sys.executable, "-m", "fastgpt.runner", json.dumps(asdict(work)), name, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=own_environment())
    except subprocess.TimeoutExpired:
        return None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError, RecursionError):
        found = None
    if not answer(found):
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no reason given")
        return {"failed": f"exit status {done.returncode}: {last}"}
    return found


def main(argv: list[str]) -> None:
    """Time one candidate, and print the result as the last line: `python -m fastgpt.runner WORK NAME DEVICE`."""
    given, name, device = argv
    fields = json.loads(given)
    work = Work(**{**fields, "config": GPTConfig(**fields["config"])})
    try:
        found: dict[str, Any] = measure(work, NAMES[name], device)
    except torch.OutOfMemoryError as e:
        found = {"failed": str(e).splitlines()[0], "memory": True}
    except Exception as e:  # whatever keeps a candidate from running is its result
        reason = graphs.first_line(str(e)) if str(e) else type(e).__name__
        found = {"failed": reason, "memory": "out of memory" in reason}
    print(json.dumps(found))


def measure(work: Work, runner: Runner, device: str) -> dict[str, float]:
    """{"gpu", "wall"}: milliseconds of a micro-step as the trainer runs it. wall: what the clock shows, the host's time included."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    dtype, autocast, scaler = mixed_precision(device, work.dtype)
    torch.manual_seed(1)
    model = GPT(work.config).to(device)
    model.set_recompute(work.recompute)
    model.set_residual(RESIDUAL[work.residual])
    model.set_activation(work.activation)
    if work.doc_mask:
        model.set_doc_mask(work.config.vocab_size - 1)
    kernels = work.kernels_of(runner, device)
    model.set_kernels(kernels)
    run: Any = torch.compile(model, dynamic=False) if runner.compile else model
    if shadows := shadow_dtype(kernels, dtype):
        Shadows(model, shadows)
    accumulation = 2 if work.accumulates else 1

    def step(x, y):
        return micro_step(run, x, y, scaler, accumulation, autocast)

    def refused(line):
        reason, given_up, _ = line.partition("; the run goes on without")
        if given_up:
            raise RuntimeError(reason)

    replays = graphs.Graphs(step, model.parameters(), refused) if runner.graphs else None
    batches = [tokens(work, device) for _ in range(4)]

    def iteration():
        for i in range(accumulation):
            x, y = batches[0]
            batches.append(batches.pop(0))  # each micro-step has other tokens than the last
            replays(x, y, fresh=i == 0) if replays else step(x, y)
        for p in model.parameters():
            p.grad = None

    for _ in range(graphs.WARM_UP + 2):
        iteration()
    host = timing.host_ms([iteration], 3)
    gpu = statistics.median(timing.gpu_ms([iteration], host) for _ in range(WINDOWS))
    wall = []
    for _ in range(WINDOWS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ITERATIONS):
            iteration()
        torch.cuda.synchronize()
        wall.append((time.perf_counter() - start) * 1e3 / ITERATIONS)
    return {"gpu": gpu / accumulation, "wall": statistics.median(wall) / accumulation}


def tokens(work: Work, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of random tokens by Zipf's law, as a text's are; in documents of DOCUMENT tokens on average."""
    c = work.config
    ids = (torch.rand(work.sequences, c.block_size + 1) * torch.tensor(float(c.vocab_size)).log()).exp().long() - 1
    ids = ids.clamp(0, c.vocab_size - 2)
    if work.doc_mask:
        ids[torch.rand(ids.shape) < 1 / DOCUMENT] = c.vocab_size - 1
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


if __name__ == "__main__":
    main(sys.argv[1:])
