"""The commands of README.md, docs/ and examples/: where they stand, how they are run, and how they are parsed without running."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "examples/README.md"]
IN_CLONE = {  # their commands are to be run in a clone; those of the other pages in any folder
    "README.md", "docs/add_a_kernel.md", "docs/initialization.md", "docs/nanogpt.md", "docs/scaling.md", "examples/README.md",
}  # fmt: skip
REASONS = (  # why a block may be left out
    r"needs an NVIDIA GPU|needs several GPUs|needs a cluster|needs the network|needs the package \w+|needs 20 GB of data"
    r"|needs files of your own|needs a model in hf/|takes minutes, and CI runs it by itself"
    r"|takes a minute, and 2 GB of memory|takes half an hour of a core that does nothing else"
)
SECONDS = 600  # after which a page is ended

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?(?P<fence>```+)(?P<kind>\w*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S
)
HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1(.*?)\n.*?^\2$", re.M | re.S)
PUNCTUATION = ";&|()<>\n"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. why: the reason not to run it, or None."""

    page: Path
    line: int
    kind: str
    text: str
    why: str | None

    def __str__(self):
        return f"{name_of(self.page)}, line {self.line}"


def name_of(page: Path) -> str:
    """A page's path in the checkout; of another page the file's name."""
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def blocks(page: Path, *kinds: str) -> list[Block]:
    """The fenced blocks of a page, of these kinds: the words behind the fence."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, m.start("fence")) + 1, m["kind"], m["text"], m["why"])
        for m in FENCE.finditer(text)
    ]
    return [block for block in found if block.kind in kinds]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each of our own commands in shell text: ["train", "--preset=gpt2"], whatever starts it."""
    text = HEREDOC.sub(r"\3", text.replace("\\\n", " ")).replace("\n", "\n\n")  # a comment takes the first of them
    lexer = shlex.shlex(text, posix=True, punctuation_chars=PUNCTUATION)
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if not set(word) <= set(PUNCTUATION):
            words.append(word)
            if re.search(r"\s(fastgpt|train\.py|fastgpt\.cli) ", word):  # a command in quotes, as behind `bash -c`
                yield from commands(word)
            continue
        for i, word in enumerate(words):
            if word == "fastgpt" and all(w in ("srun", "exec", "if", "!", "time", "$") or "=" in w for w in words[:i]):
                yield words[i + 1 :]
            elif word.endswith("train.py") and not word.startswith("-") and i and starts(words[i - 1]):
                yield ["train", *words[i + 1 :]]
            elif word in ("fastgpt", "fastgpt.cli") and i and words[i - 1] == "-m":
                yield words[i + 1 :]
        words = []


def starts(word: str) -> bool:
    """Whether a word may stand before train.py: an interpreter, or a flag of torchrun."""
    return word in ("python", "python3", "exec") or word.startswith("--")


class Parsed(BaseException):
    """Raised in place of what a command would do."""


def check(words: list[str]) -> str:
    """What our command line says against these words, without carrying them out; "" if nothing."""
    from fastgpt import cli, parse
    from fastgpt.benchmarks import command

    def parsed_only(schema, argv, *args):
        there = [
            word
            for word in argv
            if word.startswith("-") or not word.endswith((".py", ".toml", ".json")) or Path(word).exists()
        ]
        raise Parsed(whole(schema, there, *args))

    def count(argv):
        known = {
            "arms",
            "residual",
            "by_kernel",
            "json",
            "predict",
        }  # CountConfig's own: its module replaces parts of torch
        parsed_only(command.roofline.StepShape, [w for w in argv if w[2:].split("=")[0] not in known], "count")

    whole, said = parse.parse, io.StringIO()
    with (
        patch.object(parse, "parse", parsed_only),
        patch.object(command, "parse", parsed_only),
        patch.object(command, "count", count),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            status = cli.main(words)
        except (Parsed, SystemExit):
            status = 0
    return said.getvalue() or f"exit status {status}" if status else ""


# ---- running ----

SESSION = """import json, sys
names = {"__name__": "__main__"}
for place, text in json.loads(sys.argv[1]):
    print("@@", place, flush=True)
    exec(compile(text, place, "exec"), names)
"""


def copy_of_the_clone(target: Path) -> None:
    """What git tracks or would track, as a folder of its own. Without git: all but what runs and tools leave behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        left = shutil.ignore_patterns("__pycache__", ".*cache", "*.egg-info", "build", "out*", "data", ".venv", "venv")
        shutil.copytree(ROOT, target, symlinks=True, ignore=left)
        return
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def own_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one. `pip install` in it fetches nothing, and changes nothing elsewhere: its
    bin folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "above.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    pip = folder / "bin/pip"
    pip.write_text(
        f'#!/bin/sh\nc="$1"; shift\nexec {folder}/bin/python -m pip "$c" --no-index --no-build-isolation "$@"\n'
    )
    pip.chmod(0o755)
    return folder / "bin"


def run_page(page: Path, folder: Path, cache: Path) -> str:
    """Run the blocks of a page in `folder`: the shell's in order, in one shell, then Python's in one session. What ran and what did not,
    in a line. A failure is an AssertionError with the block and its output."""
    name = name_of(page)
    shell = [block for block in blocks(page, "sh") if block.why is None]
    python = [block for block in blocks(page, "python") if block.why is None]
    script = "".join(f"echo '@@ {block}'\n{block.text}" for block in shell)
    if python:
        session = json.dumps([(str(block), block.text) for block in python])
        script += f"python -c {shlex.quote(SESSION)} {shlex.quote(session)}\n"

    work, home = folder / "work", folder / "home"
    home.mkdir()
    if name in IN_CLONE:
        copy_of_the_clone(work)
    else:
        work.mkdir()
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    programs = Path(sys.executable).parent
    if "pip install" in script:
        programs = own_environment(folder / "venv")
        environment.pop("PYTHONPATH", None)
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"PATH": path, "FASTGPT_CACHE": str(cache), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", timeout=SECONDS,
    )  # fmt: skip
    last = done.stdout.rpartition("@@ ")[2]
    assert done.returncode == 0, f"exit status {done.returncode} of {last[-5000:]}"
    left = [f"line {block.line} ({block.why})" for block in blocks(page, "sh", "python") if block.why]
    ran = f"{len(shell) + len(python)} blocks ran, in {time.monotonic() - began:.0f} s"
    return f"{name}: {ran}; not run: {', '.join(left) or 'none'}"
