"""`fastgpt bench`: run the suite and write its report; compare, count, roofline and report beside it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from fastgpt.benchmarks import compare, harness, machine, report, roofline
from fastgpt.config import BenchConfig, CompareConfig, ReportConfig, RooflineConfig, UserError, parse

USAGE = """usage: fastgpt bench [--key=value ...]                    measure this machine, and write a report
       fastgpt bench compare [A.json B.json] [--key=value ...]   exit status 1 if something became slower
       fastgpt bench report [FILE.json] [--key=value ...]        write a result's report again; --readme: the README's table
       fastgpt bench count [--key=value ...]                     launches and bytes of a micro-step, without a GPU
       fastgpt bench roofline [--key=value ...]                  the floor of a step on a GPU, by part

`fastgpt bench --help`, and --help behind each of these, lists the flags.
"""
FILES = {  # what --only may be, and where it stands
    "step": ["bench_train"],
    "ops": [
        "bench_layer_norm",
        "bench_attention",
        "bench_gelu_mlp",
        "bench_cross_entropy",
        "bench_embedding",
        "bench_optimizer",
    ],
}
FILES |= {name.removeprefix("bench_"): [name] for name in FILES["ops"]}


def bench(argv):
    """A command line behind `fastgpt bench`: its exit status. Raises UserError."""
    command = argv[0] if argv and not argv[0].startswith("-") and not argv[0].endswith(".json") else ""
    rest = argv[1:] if command else argv
    files = [word for word in rest if word.endswith(".json") and not word.startswith("-")]
    flags = [word for word in rest if word not in files]
    if not command and files:
        raise UserError(f"bench: {files[0]}? `fastgpt bench compare` and `fastgpt bench report` take files")
    if command == "count":
        return count(rest)
    if command == "roofline":
        return roofline.roofline(parse(RooflineConfig, flags, "fastgpt bench roofline")[0])
    if command == "compare":
        cfg, _ = parse(CompareConfig, flags, "fastgpt bench compare")
        if len(files) not in (0, 2):
            raise UserError("bench compare: give two result files, or none for the newest two")
        return compare.compare(*(files or compare.newest_two(cfg.out)), cfg.threshold)
    if command == "report":
        return write_report(parse(ReportConfig, flags, "fastgpt bench report")[0], files)
    if command:
        raise UserError(f"bench: there is no command {command!r}; they are compare, report, count and roofline")
    if rest[:1] in (["-h"], ["--help"]):
        print(USAGE)
    return run(parse(BenchConfig, flags, "fastgpt bench")[0])


def count(argv):
    """The count in a process of its own: it takes the CPU for a GPU, and kernels must be recorded, not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "fastgpt.benchmarks.count", *argv], env=env).returncode


def write_report(cfg, files):
    """The report beside a result file, or the README's table."""
    if cfg.readme and files:
        raise UserError(f"bench report --readme: takes the newest result under --out, not {files[0]}")
    if cfg.readme:
        report.update_readme(Path("README.md"), Path(cfg.out))
        said = next((f"is of {path}" for path in report.newest(cfg.out)), "says that nothing was measured on a GPU yet")
        print(f"README.md: the table {said}")
        return 0
    found = [Path(f) for f in files] or report.newest(cfg.out) or report.newest(cfg.out, device="cpu")
    if not found:
        raise UserError(f"bench report: no result under {cfg.out}; give a file")
    for path in found:
        print(report.write(path))
    return 0


def run(cfg):
    """Run the suite as a BenchConfig says: pytest's exit status. Raises UserError."""
    if cfg.only and cfg.only not in FILES:
        raise UserError(f"--only={cfg.only}: it is one of {', '.join(FILES)}")
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError:
        raise UserError("bench: pytest and pytest-benchmark are not installed; pip install 'fastgpt[bench]'") from None
    from fastgpt.benchmarks.progress import Progress

    folder = Path(__file__).parent
    target = result_path(Path(cfg.out))
    part = target.with_suffix(".part")
    names = [name for names in FILES.values() for name in names] if not cfg.only else FILES[cfg.only]
    words = [
        *dict.fromkeys(f"{folder / name}.py" for name in names), f"--rootdir={folder}", "-o", "addopts=", "-p", "no:terminal",
        "-p", "no:cacheprovider",
        f"--benchmark-json={part}", "--benchmark-quiet", f"--budget={cfg.budget}", *["--quick"] * cfg.quick,
        *[f"--profile-to={target.parent / (target.stem + '-profile')}"] * cfg.profile,
    ]  # fmt: skip
    progress = Progress(cfg.budget)
    try:
        status = pytest.main(words, plugins=[progress])
        progress.finish()
        if part.is_file() and part.stat().st_size:
            part.replace(target)
            print(f"results: {target}\nreport:  {report.write(target)}")
        else:
            print("nothing was measured" + (": raise --budget" if status == 0 else ""))
            status = status or 1
    finally:
        part.unlink(missing_ok=True)
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return int(status)


def result_path(out):
    """out/GPU/DATE-COMMIT.json of a run that begins now, its folder made. Raises UserError where it cannot be."""
    name = ("" if harness.CUDA else "cpu ") + machine.gpu_name().lower()
    folder = out / re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".part").touch()
        (folder / ".part").unlink()
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror}); give another folder") from None
    commit = machine.commit()
    return folder / f"{time.strftime('%Y-%m-%dT%H%M%S')}-{commit['id'][:7]}{'-dirty' * commit['dirty']}.json"
