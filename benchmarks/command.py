"""`fastgpt bench`: run the suite and write its report; and the commands compare, report, count, roofline and scaling."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pydantic import Field

from fastgpt.benchmarks import compare, report, roofline, scaling
from fastgpt.config import PathText, Settings, UserError
from fastgpt.parse import close, parse

OPS = ("layer_norm", "attention", "gelu_mlp", "linear_cross_entropy", "embedding", "adamw")
FILES = {
    "headline": ["train"],
    "step": ["train"],
    "ops": OPS,
    **{op: [op] for op in OPS},
}  # --only: the files bench_NAME.py
COMMANDS = ("compare", "report", "count", "roofline", "scaling")
USAGE = """fastgpt bench                          measure this machine, and write a report
fastgpt bench compare [A.json B.json]  what became slower from one result to another: exit status 1
fastgpt bench report [FILE.json]       write a result's report again; --readme: the README's table
fastgpt bench count                    kernels and bytes of a micro-step, counted without a GPU
fastgpt bench roofline                 the least time that a step can take on a GPU, by part
fastgpt bench scaling                  what many GPUs would do, predicted

Each takes --key=value; --help behind it lists its flags. Those of the first:
"""


class BenchConfig(Settings):
    """Measure training steps and kernels beside other libraries on this machine, and write a report."""

    EXAMPLES = [
        "fastgpt bench --quick",
        "fastgpt bench --only=headline --budget=200",
        "fastgpt bench compare",
        "fastgpt bench roofline --gpu=H100",
    ]

    budget: int = Field(480, gt=0, description="seconds for everything; the most important comes first")
    only: str = Field("", description="headline, which is the first of step; step, ops, or one op: " + ", ".join(OPS))
    quick: bool = Field(False, description="fewer cases and rounds; without a GPU sizes are toys either way")
    out: PathText = Field(report.RESULTS, description="folder of the results; each GPU has a folder in it")
    profile: bool = Field(
        False,
        description="a trace of each implementation's step, and its time by op beside the least possible",
    )


def bench(argv):
    """Run the words behind `fastgpt bench`: the exit status. Raises UserError."""
    command, rest = "", argv
    if argv and not argv[0].startswith("-"):
        command, *rest = argv
    flags = [word for word in rest if not word.endswith(".json") or word.startswith("-")]
    files = [os.path.expanduser(word) for word in rest if word not in flags]
    prog = f"fastgpt bench {command}".rstrip()
    if command.endswith(".json"):
        raise UserError(f"bench: {command}? `fastgpt bench compare` and `fastgpt bench report` take files")
    if command == "count":
        return count(rest)
    if command == "roofline":
        return roofline.roofline(parse(roofline.RooflineConfig, rest, prog)[0])
    if command == "scaling":
        return scaling.scaling(parse(scaling.ScalingConfig, rest, prog)[0])
    if command == "compare":
        return compare.run(parse(compare.CompareConfig, flags, prog)[0], files)
    if command == "report":
        return report.run(parse(report.ReportConfig, flags, prog)[0], files)
    if command:
        near = close(command, COMMANDS)
        raise UserError(
            f"bench: there is no command {command!r}; they are {', '.join(COMMANDS)}"
            + f"; the nearest is {near!r}" * bool(near)
        )
    if rest[:1] in (["-h"], ["--help"]):
        print(USAGE)
    return run(parse(BenchConfig, rest, prog)[0])


def count(argv):
    """The count, in a process of its own: it takes the CPU for a GPU, and records the kernels instead of running them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "fastgpt.benchmarks.count", *argv], env=env).returncode


def run(cfg):
    """Run the suite as a BenchConfig says: pytest's exit status. Raises UserError."""
    if cfg.only and cfg.only not in FILES:
        raise UserError(f"--only={cfg.only}: it is one of {', '.join(FILES)}")
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError:
        raise UserError(
            "bench: pytest and pytest-benchmark are not installed; pip install pytest pytest-benchmark"
        ) from None
    from fastgpt.benchmarks.progress import Progress

    folder, target = Path(__file__).parent, result_path(Path(cfg.out))
    names = FILES[cfg.only] if cfg.only else ("train", *OPS)
    own = tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent)  # a name that nobody can foresee
    part = Path(own.name) / target.name
    words = [
        *(f"{folder}/bench_{name}.py" for name in names), f"--rootdir={folder}", "-o", "addopts=", "-p", "no:terminal",
        "-p", "no:cacheprovider",
        f"--benchmark-storage=file://{own.name}", f"--benchmark-json={part}", "--benchmark-quiet", f"--budget={cfg.budget}",
        *["--quick"] * cfg.quick, *["--first"] * (cfg.only == "headline"),
        *[f"--profile-to={target.with_suffix('')}-profile"] * cfg.profile,
    ]  # fmt: skip
    start = time.monotonic()
    try:
        status = pytest.main(words, plugins=[Progress(cfg.budget)])
        print(f"\n{time.monotonic() - start:.0f} s")
        if part.is_file() and part.stat().st_size:
            part.replace(target)
            print(f"results: {target}\nreport:  {report.write(target)}")
        else:
            print("nothing was measured" + (": raise --budget" if status == 0 else ""))
            status = status or 1
    finally:
        own.cleanup()
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return int(status)


def result_path(out):
    """out/GPU/DATE-COMMIT.json of a run that begins now; its folder is made. Raises UserError where it cannot be written."""
    from fastgpt.benchmarks import machine

    name = ("" if torch.cuda.is_available() else "cpu ") + machine.gpu_name().lower()
    folder = out / re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror}); give another folder") from None
    commit = machine.commit()
    return folder / f"{time.strftime('%Y-%m-%dT%H%M%S')}-{commit['id'][:7]}{'-dirty' * commit['dirty']}.json"
