"""All that needs a GPU, in one command of less than ten minutes, on a machine that has no more than PyTorch.

    benchmarks/on_gpu.sh all DIR          the four stages below, one after the other
    benchmarks/on_gpu.sh checks DIR       verify, the kernels' tests, and short runs of the trainer in bf16, in each of its modes
    benchmarks/on_gpu.sh headline DIR     the speed of GPT-2's step: the first wave of `fastgpt bench`
    benchmarks/on_gpu.sh tune DIR         faster launch configurations, in DIR alone: later runs measure what is shipped
    benchmarks/on_gpu.sh sanitize DIR     each op small, under compute-sanitizer's tools and under ConSan
    --wheels=DIR       what the machine lacks is installed from here, into DIR/site; nothing else is installed
    --limit=SECONDS    for everything; each stage has its part, and what one leaves is the next ones'

DIR gets a log for each command, the results, and summary.txt. The exit status is 1 if anything failed, ended late or was not reached,
and 2 where nothing could begin. Only the standard library is imported here.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
LIMIT = 590  # seconds: a lent machine may end a command after 600
GRACE = 3  # seconds between the polite end of a command and the other one
LEAST = 5  # seconds; with fewer a command does not begin

# Modules by what pip downloads for them. The first cannot be missing; what lacks the others leaves something out.
NEEDED = {
    "pydantic": ("pydantic", "pydantic_core", "annotated_types", "typing_inspection"), "pytest": ("pytest",),
    "pytest-benchmark": ("pytest_benchmark",), "hypothesis": ("hypothesis",), "numpy": ("numpy",), "tqdm": ("tqdm",),
    "tiktoken": ("tiktoken",), "matplotlib": ("matplotlib",),
}  # fmt: skip
WELCOME = {"liger-kernel": ("liger_kernel",), "pytest-xdist execnet": ("xdist",)}

GPU = """
import torch, triton
if not torch.cuda.is_available(): raise SystemExit("there is no CUDA GPU here")
free, total = torch.cuda.mem_get_info()
name, arch = torch.cuda.get_device_name(), "".join(map(str, torch.cuda.get_device_capability()))
print(f"{name}, sm_{arch}, {total / 1e9:.0f} GB, torch {torch.__version__}, triton {triton.__version__}")
"""
MISSING = """
import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])
"""
TESTS = (
    "adamw", "attention", "doc_mask", "embedding", "gelu_mlp", "graphs", "kernels", "kernels_in_training", "layer_norm", "linear",
    "linear_cross_entropy", "planted_faults", "runner", "timing",
)  # fmt: skip
TRAIN = (
    "train", "--preset=tiny", "--dtype=bfloat16", "--kernels=triton", "--gradient_accumulation_steps=4", "--max_iters=20",
    "--micro_batch=8", "--eval_interval=20", "--eval_iters=2",
)  # fmt: skip
# The last losses of the first five must be the same up to rounding: of graphs, auto and recompute the bits of eager.
MODES = {
    "eager": "--runner=eager",
    "auto": "",
    "graphs": "--runner=graphs",
    "recompute": "--runner=eager --recompute=block",
    "compiled": "--runner=compile",
    "bf16-stream": "--runner=eager --residual=bf16",
}
DTYPES = "bfloat16", "float16"  # in which GPUs train, the usual one first; the tests check fp32 as well
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ANY = r"\S.*"  # a line
ERRORS = 86  # the exit status by which compute-sanitizer says that it found errors


@dataclass
class Piece:
    """A command: its log is NAME.txt, and its line in the summary the last match of `says` in there.

    words: {seconds} is a budget, which leaves it time to begin and to write. fails: what must not be in the log. show: how many last
    lines of the log are printed. judge(code, log) may give (outcome, what to say) in place of all that.
    """

    name: str
    words: list
    says: str = ANY
    fails: str = r"(?!)"
    env: dict = field(default_factory=dict)
    show: int = 0
    judge: object = None


def cli(*words):
    return [PYTHON, "-m", "fastgpt.cli", *words]


def checks(run):
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    plugins = [] if "xdist" in run.missing else ["-n", "8"]
    pytest = [PYTHON, "-m", "pytest", "-q", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider"]
    tests = Piece("tests", [*pytest, *plugins, *files], says=r"\d+ (passed|failed).*")
    modes = [
        Piece(
            f"train-{name}", cli(*TRAIN, *flags.split(), f"--out_dir=train-{name}"), says=r"iteration 20: .*",
            fails=".*(goes on without|does not take).*",
        )
        for name, flags in MODES.items()
    ]  # fmt: skip
    by_compiler = [[p for p in modes if ("--runner=compile" in p.words) == c] for c in (False, True)]
    verify = [
        Piece(
            f"verify-{dtype}", cli("verify", f"--dtype={dtype}", f"--json=verify-{dtype}.json"),
            says=r"(all )?\d+ (of \d+ )?comparisons .*",
        )
        for dtype in DTYPES
    ]  # fmt: skip
    return [(1, [verify, [tests], *by_compiler])]


def headline(run):
    words = cli("bench", "--only=headline", "--budget={seconds}", "--out=results")
    return [(1, [[Piece("headline", words, says=r"fastgpt\S* .*tok/s.*", show=30)]])]


def tune(run):
    words = cli("tune", "--batch_size=16", "--budget={seconds}", "--out=tuned.json")
    return [(1, [[Piece("tune", words, show=12)]])]


def sanitize(run):
    cases = [PYTHON, "-m", "fastgpt.benchmarks.sanitize", "--short"]
    # With the caching allocator, what lies past a tensor's end is mostly another part of the same block.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lanes = []
    for tool in TOOLS:
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERRORS)]
        words += ["--launch-timeout", "0"]  # Python's imports may take long before CUDA is used
        # PyTorch and Triton ask the driver for what it may not have: such an answer is no error. Padding keeps tensors apart.
        words += ["--report-api-errors", "no", "--padding", "512"] if tool == "memcheck" else []
        lanes.append([Piece(tool, [*words, *cases], env=env, judge=watched(tool))])
    consan = env | {"TRITON_INSTRUMENTATION_MODE": "consan", "CUDA_LAUNCH_BLOCKING": "1"}
    lanes.append([Piece("consan", cases, env=consan, judge=watched("consan"))])
    # The cases alone come first: they compile the kernels, and the tools need not wait for that.
    return [(1, [[Piece("cases", cases, env=env, judge=watched("cases"))]]), (2, lanes)]


def watched(name):
    """The judge of the cases under a sanitizer. They passed if the status is 0, they ran, and a tool around them says what it found.

    A tool that could not start them may end with status 0 too.
    """

    def judge(code, log):
        ran, found = last(r"^ran .*", log), last(r"(?<= SUMMARY: ).*", log)
        if code == 0 and ran and (found or name not in TOOLS):
            return "passed", f"{ran}; {found}" if found else ran
        if code == 3 and (why := last(r"(?<=^not run: ).*", log)):
            return "not run", why
        if name == "initcheck" and code == ERRORS and ran:
            return "passed", f"for information: {found}, maybe false: it does not see what a kernel writes by TMA"
        if code == ERRORS:
            return "FAILED", found
        return "FAILED", "it did not run the cases" if code == 0 else last(r"^(failed|fastgpt: error): .*", log)

    return judge


# A stage is steps, one after the other, each a share of the stage's time and lanes; lanes are pieces, and run beside one another.
# Of each: seconds within `all`, and alone.
STAGES = {checks: (120, 420), headline: (235, 300), tune: (165, 300), sanitize: (70, 420)}


def last(pattern, text):
    """The last match of a pattern in a text, or ""."""
    return next((m.group() for m in reversed(list(re.finditer(pattern, text, re.MULTILINE)))), "")


def finish(process):
    """End a process and all that it began, if it has not ended."""
    for end, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, end)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


class Run:
    """What runs until a deadline, and the lines about it. out: the folder."""

    def __init__(self, out, seconds):
        self.out, self.end, self.stage = out, time.monotonic() + seconds, "begin"
        self.lines, self.missing, self.running, self.lock = [], set(), set(), threading.RLock()
        path = os.pathsep.join([os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"])
        packages = os.pathsep.join(filter(None, [str(out / "site"), os.environ.get("PYTHONPATH")]))
        self.env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": packages, "PATH": path}
        self.summary = open(out / "summary.txt", "a")

    def say(self, name, outcome, what, seconds=0.0, log=()):
        """Write the line of a piece, and print lines of its log: whether it passed."""
        line = f"{self.stage:10}{name:22}{seconds:5.0f} s  {outcome}: {what}"[:200]
        with self.lock:  # lanes run beside one another
            self.lines.append((outcome, line))
            print(line, *(f"    {line[:140]}" for line in log), sep="\n", flush=True)
            print(line, file=self.summary, flush=True)
        return outcome == "passed"

    def failed(self):
        return any(outcome == "FAILED" for outcome, _ in self.lines)

    def terminate(self, *_):
        """End what runs, and begin nothing more."""
        self.end = 0.0
        for process in list(self.running):
            finish(process)

    def piece(self, piece, seconds):
        """Run a piece for at most so many seconds, and say what came of it: whether it passed."""
        if seconds < LEAST:
            return self.say(piece.name, "FAILED", "not reached: no time is left")
        if not shutil.which(piece.words[0], path=self.env["PATH"]):
            return self.say(piece.name, "not run", f"there is no {piece.words[0]} here")
        log, start = self.out / f"{piece.name}.txt", time.monotonic()
        budget = str(max(1, int(seconds - 25)))
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [word.replace("{seconds}", budget) for word in piece.words], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, env=self.env | piece.env, cwd=self.out, start_new_session=True,
            )  # fmt: skip
        self.running.add(process)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finish(process)
        self.running.discard(process)
        text = log.read_text(errors="replace")
        if code is None:
            outcome, what = "FAILED", f"timed out after {seconds:.0f} s: {last(ANY, text)}"
        elif piece.judge:
            outcome, what = piece.judge(code, text)
        else:
            says, fails = last(piece.says, text), last(piece.fails, text)
            outcome, what = "FAILED" if code or fails else "passed", fails or says or last(ANY, text)
        if code and outcome == "FAILED":
            what = f"exit status {code}{what and '; '}{what}"
        show = 4 if outcome == "FAILED" else piece.show
        log = text.splitlines()[-show:] if show else ()
        return self.say(piece.name, outcome, what, time.monotonic() - start, log)

    def lane(self, pieces, end):
        """Run pieces one after the other until a time, each for an equal share of what is left."""
        for i, piece in enumerate(pieces):
            self.piece(piece, (min(end, self.end) - GRACE - time.monotonic()) / len(pieces[i:]))

    def steps(self, stage, end):
        """Run a stage until a time."""
        self.stage, steps, before = stage.__name__, stage(self), len(self.lines)
        for i, (share, lanes) in enumerate(steps):
            if any(outcome == "FAILED" for outcome, _ in self.lines[before:]):
                for piece in (p for lane in lanes for p in lane):
                    self.say(piece.name, "not run", "what comes before it failed")
                continue
            now = time.monotonic()
            until = now + (min(end, self.end) - now) * share / sum(s for s, _ in steps[i:])
            with ThreadPoolExecutor(len(lanes)) as pool:
                list(pool.map(lambda lane, until=until: self.lane(lane, until), lanes))


def lacking(run, packages):
    """The modules of packages that are not here."""
    names = [name for modules in packages.values() for name in modules]
    done = subprocess.run([PYTHON, "-c", MISSING, *names], capture_output=True, text=True, env=run.env, cwd=run.out)
    return set(done.stdout.split()) if done.returncode == 0 else set(names)


def begin(run, wheels):
    """Make this checkout importable, install what the machine lacks, and look for the GPU: whether all is here."""
    # This checkout as the package fastgpt, whatever is installed: links need neither pip's build nor its leave.
    shutil.rmtree(package := run.out / "site" / "fastgpt", ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*(ROOT / "fastgpt").iterdir(), ROOT / "benchmarks", ROOT / "kernels"]:
        if not (package / path.name).exists():
            (package / path.name).symlink_to(path.resolve())
    if wheels and lacking(run, NEEDED | WELCOME):
        install = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-index", "--upgrade", "--target=site"]
        run.piece(Piece("install", [*install, *sorted(map(str, wheels.resolve().glob("*.whl")))]), 60)
    run.missing = lacking(run, NEEDED | WELCOME)
    machine, (major, minor, *_) = os.uname().machine, sys.version_info
    download = f"pip download --only-binary=:all: --python-version={major}.{minor}"
    download += "".join(f" --platform={p}_{machine}" for p in ("manylinux_2_28", "manylinux2014")) + " --dest=WHEELS"
    ready = True
    for packages, outcome, flag in ((NEEDED, "FAILED", ""), (WELCOME, "not run", " --no-deps")):
        if lack := {p: run.missing & set(modules) for p, modules in packages.items() if run.missing & set(modules)}:
            what = f"missing: {', '.join(sorted(set.union(*lack.values())))}; --wheels=WHEELS installs them"
            run.say("packages", outcome, what)
            print(f"    {download}{flag} {' '.join(lack)}")
            ready &= packages is not NEEDED
    return ready and run.piece(Piece("gpu", [PYTHON, "-c", GPU]), 60)


def main(argv=None):
    """Run a command line: the exit status."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/on_gpu.sh", description=__doc__, formatter_class=how)
    stages = {stage.__name__: stage for stage in STAGES}
    parser.add_argument("stage", choices=["all", *stages])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"))
    parser.add_argument("--limit", type=float)
    args = parser.parse_args(argv)
    chosen = [s for name, s in stages.items() if args.stage in ("all", name)]
    limit = LIMIT if args.stage == "all" else STAGES[chosen[0]][1]
    args.out.mkdir(parents=True, exist_ok=True)
    run, start = Run(args.out.resolve(), args.limit or limit), time.monotonic()
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, run.terminate)
    if ready := begin(run, args.wheels and Path(args.wheels)):
        for i, stage in enumerate(chosen):
            shares, now = [STAGES[s][0] for s in chosen[i:]], time.monotonic()
            run.steps(stage, now + (run.end - now) * shares[0] / sum(shares))
    counts = [f"{sum(o == outcome for o, _ in run.lines)} {outcome}" for outcome in ("passed", "FAILED", "not run")]
    outcome, run.stage = "FAILED" if run.failed() else "passed", "end"
    print("", *(line for _, line in run.lines), sep="\n")
    run.say("total", outcome, f"{', '.join(counts)}; all of it is in {args.out}", time.monotonic() - start)
    return int(run.failed()) if ready else 2


if __name__ == "__main__":
    sys.exit(main())
