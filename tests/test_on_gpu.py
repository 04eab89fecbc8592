"""`benchmarks/on_gpu.sh` says truly what came of each command, and the cases that its sanitizers watch are sound. No GPU is needed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastgpt.benchmarks import on_gpu, sanitize
from fastgpt.benchmarks.command import BenchConfig
from fastgpt.config import TuneConfig, VerifyConfig
from fastgpt.parse import parse, parse_train
from fastgpt.records import Problem, Shape, problem
from fastgpt.verify import run

SCRIPT = Path(sanitize.__file__).with_name("on_gpu.sh")
SANITIZERS = ("cases", *on_gpu.TOOLS, "consan")
PIECES = {
    "checks": ("verify-bfloat16", "verify-float16", "tests", *(f"train-{mode}" for mode in on_gpu.MODES)),
    "headline": ("headline",), "tune": ("tune",), "sanitize": SANITIZERS,
}  # fmt: skip
EVERY = [(stage, name) for stage, names in PIECES.items() for name in names]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is taken where there is no GPU")

# ---- the command, with stand-ins for all that it calls ----

# What becomes of a command is in the file that has its name, if there is one.
PYTHON = """#!/bin/bash
case "$*" in
    *"no CUDA GPU"*) name=gpu ;;
    *find_spec*) cat "$STAND_INS/missing" 2> /dev/null; exit 0 ;;
    *"fastgpt.cli verify"*) name=verify-${4#--dtype=} ;;
    *pytest*) name=tests ;;
    *--out_dir=*) name=${@: -1} && name=${name#*=} ;;
    *"fastgpt.cli bench"*) name=headline ;;
    *"fastgpt.cli tune"*) name=tune ;;
    *sanitize*) name=${TOOL:-${TRITON_INSTRUMENTATION_MODE:-cases}} ;;
esac
echo "$name $PYTHONUNBUFFERED $PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$STAND_INS/started"
case $(cat "$STAND_INS/$name" 2> /dev/null) in
    fails) echo "failed: 1 of 2 cases" && exit 1 ;;
    "cannot run") echo "not run: Triton has no $name" && exit 3 ;;
    crashes) kill -SEGV $$ ;;
    hangs) echo "halfway"; sleep 30 & echo $! > "$STAND_INS/child"; wait ;;
    "goes on") echo "CUDA graphs: a micro-step cannot be captured (why); the run goes on without" ;;
    "is silent") ;;
    *) echo "ran 2 of 2 cases" ;;
esac
"""
SANITIZER = """#!/bin/bash
[[ "$1 $3" == "--tool --error-exitcode" ]] || exit 9
export TOOL=$2
does=$(cat "$STAND_INS/$TOOL" 2> /dev/null)
if [[ $does != "starts nothing" ]]; then
    while [[ $1 != *python ]]; do shift; done
    "$@" || exit
fi
case $does in
    "finds errors") echo "========= ERROR SUMMARY: 3 errors" && exit 86 ;;
    "says nothing") ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a stage where commands end as given, `memcheck="crashes"`: its exit status, and {name: what its line says}."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"python": PYTHON, "compute-sanitizer": SANITIZER}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("STAND_INS", str(tmp_path))
    monkeypatch.setattr(on_gpu, "PYTHON", str(folder / "python"))
    monkeypatch.setattr(on_gpu, "GRACE", 0.2)
    monkeypatch.setattr(on_gpu, "LEAST", 0.1)
    before = {end: signal.getsignal(end) for end in (signal.SIGTERM, signal.SIGINT)}

    def stage(name, *flags, has_sanitizer=True, **ends):
        if not has_sanitizer:
            (folder / "compute-sanitizer").unlink()
        for piece, end in ends.items():
            (tmp_path / piece.replace("_", "-")).write_text(end)
        status = on_gpu.main([name, str(tmp_path / "out"), *flags])
        lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
        out = capsys.readouterr().out
        assert out.splitlines()[-len(lines) :] == lines, "the table stands at the end"
        assert len(out) < 12000
        return status, {line.split()[1]: line.split(" s  ", 1)[1] for line in lines}

    yield stage
    for end, what in before.items():
        signal.signal(end, what)


def test_all_pass(command, tmp_path):
    status, said = command("all")
    assert status == 0
    assert set(said) == {"gpu", *(name for _, name in EVERY), "total"}
    for _, name in EVERY:
        assert said[name].startswith("passed: "), name
        assert "ran 2 of 2 cases" in (tmp_path / "out" / f"{name}.txt").read_text()
    assert said["memcheck"] == "passed: ran 2 of 2 cases; 0 errors"
    started = [line.split(" ") for line in (tmp_path / "started").read_text().splitlines()]
    assert {unbuffered for _, unbuffered, _ in started} == {"1"}, "the log has what was printed, whenever the end comes"
    assert {name for name, _, no_caching in started if no_caching} == set(SANITIZERS)
    assert sum(seconds for seconds, _ in on_gpu.STAGES.values()) <= on_gpu.LIMIT < 600
    assert max(alone for _, alone in on_gpu.STAGES.values()) < 600


@pytest.mark.parametrize(("stage", "name"), EVERY, ids=[name for _, name in EVERY])
def test_one_that_fails_is_said_so_and_stops_no_other(command, tmp_path, stage, name):
    status, said = command("all", **{name: "fails"})
    assert status == 1
    assert said.pop(name) == "FAILED: exit status 1; failed: 1 of 2 cases"
    assert said.pop("total").startswith("FAILED: ")
    if name == "cases":
        assert {said.pop(other) for other in SANITIZERS[1:]} == {"not run: what comes before it failed"}
    assert all(what.startswith("passed: ") for what in said.values())
    assert "failed: 1 of 2 cases" in (tmp_path / "out" / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    "name",
    ["tests", *(pytest.param(n, marks=pytest.mark.slow) for n in ("train-graphs", "headline", "tune", "racecheck"))],
)
def test_one_that_hangs_is_ended_within_the_limit_with_all_that_it_began(command, tmp_path, name):
    begun = time.monotonic()
    (stage,) = (stage for stage, names in PIECES.items() if name in names)
    status, said = command(stage, "--limit=3", **{name: "hangs"})
    assert time.monotonic() - begun < 10
    assert status == 1
    assert re.fullmatch(r"FAILED: timed out after \d s: halfway", said.pop(name))
    assert said.pop("total").startswith("FAILED: ")
    assert all(what.startswith("passed: ") for what in said.values())
    state = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    with contextlib.suppress(OSError):  # it is gone
        while state.read_text().split()[2] != "Z":  # nobody may ask for its exit status
            assert time.monotonic() - begun < 20, "it goes on"
            time.sleep(0.05)


def test_a_stage_is_ended_at_its_share(command):
    status, said = command("all", "--limit=8", verify_float16="hangs", headline="hangs")
    assert status == 1
    assert said["verify-float16"].startswith("FAILED: timed out after 1 s")
    assert said["headline"].startswith("FAILED: timed out after 3 s")
    assert said["tests"] == said["tune"] == said["cases"] == "passed: ran 2 of 2 cases"


def test_what_is_not_reached_has_not_passed(command):
    status, said = command("tune", "--limit=0.2")
    assert status == 1
    assert said["tune"] == "FAILED: not reached: no time is left"


@pytest.mark.parametrize(
    ("name", "end", "line"),
    [
        ("train-graphs", "goes on", r"FAILED: CUDA graphs: .*; the run goes on without"),
        ("tests", "crashes", r"FAILED: exit status -11"),
        ("memcheck", "finds errors", r"FAILED: exit status 86; 3 errors"),
        ("memcheck", "starts nothing", r"FAILED: it did not run the cases"),
        ("memcheck", "says nothing", r"FAILED: it did not run the cases"),
        ("racecheck", "crashes", r"FAILED: exit status 139"),
        ("initcheck", "crashes", r"FAILED: exit status 139"),
        ("consan", "crashes", r"FAILED: exit status -11"),
        ("consan", "is silent", r"FAILED: it did not run the cases"),
    ],
)
def test_what_has_not_passed_is_not_taken_for_it(command, name, end, line):
    (stage,) = (stage for stage, names in PIECES.items() if name in names)
    status, said = command(stage, **{name: end})
    assert status == 1
    assert re.fullmatch(line, said.pop(name).rstrip("; "))
    assert said.pop("total").startswith("FAILED: ")
    assert all(what.startswith("passed: ") for what in said.values())


def test_what_cannot_run_is_said_and_is_no_failure(command):
    status, said = command("sanitize", has_sanitizer=False, consan="cannot run")
    assert status == 0
    assert said["cases"].startswith("passed: ")
    assert said["consan"] == "not run: Triton has no consan"
    assert {said[tool] for tool in on_gpu.TOOLS} == {"not run: there is no compute-sanitizer here"}


def test_initcheck_informs(command):
    status, said = command("sanitize", initcheck="finds errors")
    assert status == 0
    assert said["initcheck"].startswith("passed: for information: 3 errors, maybe false")


def test_nothing_begins_without_a_gpu(command, tmp_path):
    status, said = command("all", gpu="fails")
    assert status == 2
    assert set(said) == {"gpu", "total"}
    assert len((tmp_path / "started").read_text().splitlines()) == 1


@interpreted
def test_the_script_itself_where_there_is_no_gpu(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    words = ["bash", str(SCRIPT), "all", "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env | {"PYTHON": sys.executable})
    assert done.returncode == 2, done.stdout + done.stderr
    assert "FAILED: exit status 1; there is no CUDA GPU here" in (tmp_path / "out" / "summary.txt").read_text()


def test_ended_from_outside_it_ends_what_runs_and_says_so(command, tmp_path):
    def once_it_hangs():
        while not (tmp_path / "child").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=once_it_hangs).start()
    status, said = command("all", verify_float16="hangs")
    assert status == 1
    assert said["verify-float16"].startswith("FAILED: ")
    assert said["tune"] == "FAILED: not reached: no time is left"


def test_each_command_has_flags_that_there_are():
    runs = types.SimpleNamespace(missing=set())
    pieces = [piece for stage in on_gpu.STAGES for _, lanes in stage(runs) for lane in lanes for piece in lane]
    assert [piece.name for piece in pieces if piece.name in dict(map(reversed, EVERY))] == [
        piece.name for piece in pieces
    ]
    words = {piece.name: [word.replace("{seconds}", "99") for word in piece.words] for piece in pieces}
    assert words["headline"][3:] == ["bench", "--only=headline", "--budget=99", "--out=results"]
    verifies = [(f"verify-{dtype}", VerifyConfig) for dtype in on_gpu.DTYPES]
    for name, schema in (*verifies, ("headline", BenchConfig), ("tune", TuneConfig)):
        parse(schema, words[name][4:], name)
    for mode in on_gpu.MODES:
        parse_train(words[f"train-{mode}"][4:], "train")
    files = [word for word in words["tests"] if word.endswith(".py")]
    assert all(Path(file).is_file() for file in files)
    assert len(files) == len(on_gpu.TESTS)


# ---- what a bare machine lacks ----


def wheel(folder, name):
    """A wheel of a package of one empty module."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.mark.parametrize("carried", [False, True])
def test_carried_wheels_are_installed_and_what_is_missing_is_named(tmp_path, monkeypatch, capsys, carried):
    monkeypatch.setattr(on_gpu, "NEEDED", {"made-up": ("made_up", "made_up_core"), "numpy": ("numpy",)})
    monkeypatch.setattr(on_gpu, "WELCOME", {"welcome-peer": ("welcome_peer",)})
    monkeypatch.setattr(on_gpu, "GPU", "import made_up, fastgpt.benchmarks, fastgpt.kernels; print(fastgpt.__file__)")
    for name in ("made_up", "made_up_core") if carried else ():
        wheel(tmp_path, name)
    run = on_gpu.Run(tmp_path, 100)
    ready = on_gpu.begin(run, tmp_path if carried else None)
    said = capsys.readouterr().out
    assert ready == carried, said
    assert run.missing == ({"welcome_peer"} if carried else {"welcome_peer", "made_up", "made_up_core"})
    assert "missing: welcome_peer; --wheels=WHEELS installs them" in said
    assert re.search(r"pip download --only-binary=:all: .* --dest=WHEELS --no-deps welcome-peer$", said, re.MULTILINE)
    if carried:
        assert (tmp_path / "gpu.txt").read_text().strip() == str(tmp_path / "site" / "fastgpt" / "__init__.py")
    else:
        assert "FAILED: missing: made_up, made_up_core; --wheels=WHEELS installs them" in said
        assert re.search(rf"--python-version=3.{sys.version_info[1]} .* --dest=WHEELS made-up$", said, re.MULTILINE)
        assert not (tmp_path / "gpu.txt").exists()


# ---- the cases ----


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_case_reads_memory_that_nobody_wrote(poison, monkeypatch, capsys):
    """What initcheck looks for: any that it reports is none of ours. At sizes for the interpreter, which computes masked lanes too."""
    import triton.runtime.interpreter as interpreter

    monkeypatch.setattr(sanitize, "WHOLE", Shape(1, 16, 32, 2, 64))
    monkeypatch.setattr(sanitize, "PARTIAL", Shape(1, 9, 40, 5, 128, bias=False))
    load, unwritten = interpreter.InterpreterBuilder.create_masked_load, []

    def watched(self, pointers, mask, *rest):
        loaded = load(self, pointers, mask, *rest)
        unwritten.append((loaded.data != loaded.data)[mask.data].any())  # nan
        return loaded

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
    assert sanitize.sanitize() == 0
    said = capsys.readouterr().out.splitlines()
    assert list(sanitize.cases(short=True)) == [c for c in sanitize.cases() if c[1] in ("whole tiles", "partial tiles")]
    for op, what, _ in sanitize.cases():
        assert any(line.startswith(op) and what in line and line.endswith(" ran") for line in said)
    n = len(list(sanitize.cases()))
    assert said[-1] == f"ran {n} of {n} cases"
    assert not any(unwritten)

    it = problem("linear_cross_entropy", replace(sanitize.PARTIAL, vocab_size=127), torch.float16, "cpu")
    run(it.kernel, it.inputs.values(), it.grads)
    assert any(unwritten), "loss_rows reads the padding of such a vocabulary"


def planted(monkeypatch, kernel):
    """Let an op's kernel be kernel(x) of one input in each of its two cases; no other op has a case."""
    it = Problem({"x": torch.ones(3)}, ("y",), (torch.ones(3),), None, lambda x: (kernel(x),), None)
    monkeypatch.setattr(sanitize, "cases", lambda short: [("layer_norm", what, Shape(1, 1, 16, 1, 1)) for what in "ab"])
    monkeypatch.setattr(sanitize, "problem", lambda *case: it)
    monkeypatch.setattr(sanitize, "where", lambda gpu: ([], "here"))


def test_a_case_that_fails_is_named_and_the_next_one_runs(monkeypatch, capsys):
    calls = []

    def kernel(x):
        calls.append(x)
        if len(calls) == 1:
            raise RuntimeError("device-side assert triggered\nand much more")
        return x * 2

    planted(monkeypatch, kernel)
    assert sanitize.sanitize() == 1
    said = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(maxsplit=1) for line in said] == [
        ["layer_norm", "a               FAILED: device-side assert triggered"], ["layer_norm", "b               ran"],
        ["failed:", "1 of 2 cases"],
    ]  # fmt: skip


# ---- what ConSan can check ----


def test_consan_is_not_tried_where_it_can_check_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "run_cases", None)  # whatever runs, fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitize, "where", lambda gpu: ([], "here"))
    monkeypatch.setenv("TRITON_INSTRUMENTATION_MODE", "consan")
    assert sanitize.sanitize() == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("not run: ConSan is compiled into kernels")
    for capability, why in (((8, 9), "ConSan's assertions need sm_90, and this is sm_89"), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert sanitize.why_not("consan", True) == why
    assert sanitize.why_not("misspelt", True) == "there is no sanitizer misspelt"


@pytest.mark.parametrize("compiles", [{"mlp_gemm"}, set()])
def test_consan_says_what_it_checked_and_what_it_could_not_compile(monkeypatch, capsys, compiles):
    def kernel(x):
        raise RuntimeError("PassManager::run failed")

    planted(monkeypatch, kernel)
    monkeypatch.setenv("TRITON_INSTRUMENTATION_MODE", "consan")
    monkeypatch.setattr(sanitize, "why_not", lambda mode, gpu: "")
    monkeypatch.setattr(sanitize, "find_checked", lambda names: names.update(compiles))
    status = sanitize.sanitize()
    last = capsys.readouterr().out.splitlines()[-1]
    limit = f"; ConSan of Triton {version('triton')} does not compile layer_norm"
    if compiles:
        assert (status, last) == (0, "ran 0 of 2 cases; assertions in mlp_gemm" + limit)
    else:
        assert (status, last) == (3, "not run: no kernel has anything that ConSan checks" + limit)


COMPILE = """
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt.benchmarks.sanitize import find_checked


@triton.jit
def _pipelined(x, y, n):
    i = tl.arange(0, 16)
    acc = tl.zeros([16, 16], tl.float32)
    for k in tl.range(0, n, 16, num_stages=3):
        a = tl.load(x + i[:, None] * 512 + k + i[None, :])
        acc = tl.dot(a, a, acc, input_precision="ieee")
    tl.store(y + i[:, None] * 16 + i[None, :], acc)


@triton.jit
def _plain(x, y, n):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i))


names = set()
find_checked(names)
for kernel in (_pipelined, _plain):
    source = ASTSource(kernel, dict(x="*fp32", y="*fp32", n="i32"), {}, {(0,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]})
    for again in range(2):  # the second time from the cache
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"instrumentation_mode": "consan"})
    print(kernel.__name__, sorted(names))
    names.clear()
"""


@pytest.mark.slow
def test_a_kernel_that_consan_checks_is_found_by_its_code(workdir):
    Path("compiled.py").write_text(COMPILE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(workdir), "TRITON_INSTRUMENTATION_MODE": "consan"}
    done = subprocess.run([sys.executable, "compiled.py"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_pipelined ['pipelined']", "_plain []"]
