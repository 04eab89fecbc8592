"""`benchmarks/on_gpu.sh sanitize` reports each sanitizer's outcome truly, and the cases that they watch are sound. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastgpt.benchmarks import sanitize
from fastgpt.records import Problem, Shape, problem
from fastgpt.verify import run

SCRIPT = Path(sanitize.__file__).with_name("on_gpu.sh")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NAMES = ("cases", *TOOLS, "consan")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is taken where there is no GPU")

# ---- the script, with stand-ins for all that it calls ----

# What becomes of a run is in the file that has its name, if there is one; `timeout` notes what it allows, and allows less.
PYTHON = """#!/bin/bash
name=${TOOL:-${TRITON_INSTRUMENTATION_MODE:-cases}}
echo "$name $PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$STAND_INS/started"
case $(cat "$STAND_INS/$name" 2> /dev/null) in
    fails) echo "attention  dropout  FAILED: why" && echo "failed: 1 of 2 cases" && exit 1 ;;
    "cannot run") echo "not run: Triton has no $name" && exit 3 ;;
    crashes) kill -SEGV $$ ;;
    hangs) sleep 30 ;;
    "is silent") ;;
    *) echo "ran 2 of 2 cases" ;;
esac
"""
SANITIZER = """#!/bin/bash
[[ "$1 $3" == "--tool --error-exitcode" ]] || exit 9
export TOOL=$2
does=$(cat "$STAND_INS/$TOOL" 2> /dev/null)
if [[ $does != "starts nothing" ]]; then
    while [[ $1 != python ]]; do shift; done
    "$@" || exit
fi
case $does in
    "finds errors") echo "========= ERROR SUMMARY: 3 errors" && exit 86 ;;
    "says nothing") ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""
TIMEOUT = """#!/bin/bash
[[ $1 == -k ]] && echo $(($2 + $3)) >> "$STAND_INS/seconds"
exec {timeout} -k 1 1 "${{@:4}}"
"""


@pytest.fixture
def on_gpu(tmp_path):
    """Run the stage where runs end as given, `memcheck="crashes"`: its exit status, and {name: what its line says}."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "env", "cat", "dirname", "grep", "mkdir", "sed", "sleep", "tail", "tee"):
        (folder / name).symlink_to(shutil.which(name))
    stand_ins = {"python": PYTHON, "compute-sanitizer": SANITIZER, "nvidia-smi": "#!/bin/bash\necho GPU"}
    stand_ins["timeout"] = TIMEOUT.format(timeout=shutil.which("timeout"))
    for name, text in stand_ins.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def stage(has_sanitizer=True, **ends):
        if not has_sanitizer:
            (folder / "compute-sanitizer").unlink()
        for name, end in ends.items():
            (tmp_path / name).write_text(end)
        env = {"PATH": str(folder), "STAND_INS": str(tmp_path), "CUDA_HOME": str(tmp_path)}
        command = [str(folder / "bash"), str(SCRIPT), "sanitize", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        lines = done.stdout.splitlines()[1:]
        assert (tmp_path / "out" / "sanitize.txt").read_text().splitlines() == lines
        said = dict(line.split(maxsplit=1) for line in lines)
        assert tuple(said) == NAMES
        return done.returncode, said

    return stage


def test_all_pass(on_gpu, tmp_path):
    status, said = on_gpu()
    assert status == 0
    for name in NAMES:
        assert said[name] == "passed: ran 2 of 2 cases" + ("; 0 errors" if name in TOOLS else "")
        assert "ran 2 of 2 cases" in (tmp_path / "out" / f"{name}.txt").read_text()
    started = (tmp_path / "started").read_text().splitlines()
    assert started == [f"{name} 1 -m benchmarks.sanitize" for name in NAMES], "with the caching allocator off"
    assert sum(map(int, (tmp_path / "seconds").read_text().split())) < 600, "less than ten minutes, whatever hangs"


@pytest.mark.parametrize(
    ("name", "end", "line"),
    [
        ("memcheck", "finds errors", r"FAILED \(3 errors\): .*/memcheck.txt"),
        ("memcheck", "fails", r"FAILED \(failed: 1 of 2 cases\): .*"),
        ("memcheck", "starts nothing", r"FAILED \(it did not run the cases\): .*"),
        ("memcheck", "says nothing", r"FAILED \(it did not run the cases\): .*"),
        ("racecheck", "crashes", r"FAILED \(exit status 139\): .*"),
        ("synccheck", "hangs", r"FAILED \(timed out after \d+ s, or killed\): .*/synccheck.txt"),
        ("initcheck", "crashes", r"FAILED \(exit status 139\): .*"),
        ("consan", "fails", r"FAILED \(failed: 1 of 2 cases\): .*"),
        ("consan", "crashes", r"FAILED \(exit status 139\): .*"),
        ("consan", "is silent", r"FAILED \(it did not run the cases\): .*"),
    ],
)
def test_one_that_does_not_pass_is_said_so_and_stops_no_other(on_gpu, tmp_path, name, end, line):
    status, said = on_gpu(**{name: end})
    assert status == 1
    assert re.fullmatch(line, said.pop(name))
    assert all(other.startswith("passed: ") for other in said.values())
    assert (tmp_path / "out" / f"{name}.txt").is_file()


def test_what_cannot_run_has_not_passed(on_gpu):
    status, said = on_gpu(has_sanitizer=False, consan="cannot run")
    assert status == 0
    assert said.pop("cases").startswith("passed: ")
    assert said.pop("consan") == "not run: Triton has no consan"
    assert set(said.values()) == {"not run: there is no compute-sanitizer; CUDA's toolkit has it"}


def test_initcheck_informs(on_gpu):
    status, said = on_gpu(initcheck="finds errors")
    assert status == 0
    assert said["initcheck"].startswith("for information: 3 errors, maybe false")


def test_nothing_is_watched_where_the_cases_fail_by_themselves(on_gpu, tmp_path):
    status, said = on_gpu(cases="fails")
    assert status == 1
    assert said.pop("cases").startswith("FAILED (failed: 1 of 2 cases): ")
    assert set(said.values()) == {"not run: the cases fail without it"}
    assert len((tmp_path / "started").read_text().splitlines()) == 1


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
    monkeypatch.setattr(sanitize, "cases", lambda: [("layer_norm", what, Shape(1, 1, 16, 1, 1)) for what in "ab"])
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


def test_a_kernel_that_consan_checks_is_found_by_its_code(workdir):
    Path("compiled.py").write_text(COMPILE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(workdir), "TRITON_INSTRUMENTATION_MODE": "consan"}
    done = subprocess.run([sys.executable, "compiled.py"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_pipelined ['pipelined']", "_plain []"]
