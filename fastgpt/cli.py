"""The command `fastgpt`: train, sample, export, prepare, verify, tune, bench. A user's error is one line on stderr and exit status 2."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from fastgpt import __version__, signals  # PyTorch is imported later: a signal must meet a handler first

COMMANDS = {
    "train": "train a model; without arguments, a small one on text that is built in",
    "plot": "draw the curves of runs on one page: fastgpt plot RUN [RUN ...] [--key=value ...]",
    "sample": "continue a prompt with a trained model",
    "export": "write a trained model for transformers, llm.c or nanoGPT, or as safetensors",
    "prepare": "turn a text file or folder into a dataset",
    "verify": "check every kernel against PyTorch on this machine; exit status 1 if one fails",
    "inspect": "show a model's weights against its init's rules, and with --signals how large signals are by layer",
    "study": "train many small models, to compare initial weights, warm-up, learning rates and depths",
    "tune": "find the kernels' fastest launch configurations on this GPU, for later runs",
    "bench": "measure training steps and kernels against other libraries; also compare, count, roofline, report, scaling",
    "completion": "print a script for bash, zsh or fish that completes commands, flags and values",
    "help": "print this, or with a command its flags",
}
USAGE = f"""usage: fastgpt COMMAND [FILE.py|FILE.toml ...] [--key=value ...]

{"".join(f"  {name:11}{says}{chr(10)}" for name, says in COMMANDS.items())}
fastgpt COMMAND --help lists every flag with its default; fastgpt COMMAND ... --print_config, what they become; fastgpt --version.

examples:
  fastgpt train
  fastgpt sample --out_dir=out-quickstart
  fastgpt train config/train_shakespeare_char.py --max_iters=2000
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command line, and return the exit status."""
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if os.environ.get("RANK", "0") != "0" or sys.stdout is None:  # under torchrun only rank 0 prints
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:  # it was closed, as by `2>&-`
        sys.stderr = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters: do not fail
    return reported(lambda: run(command, argv))


def reported(run: Callable[[], int | None]) -> int:
    """Call run(), and return its exit status or 0. A UserError or an interruption becomes one line on stderr."""
    rank = int(os.environ.get("RANK", 0))
    try:
        with signals.raised():
            status = run() or 0
            sys.stdout.flush()  # inside the try: it raises if the pipe is closed
            return status
    except signals.Stopped as e:
        if rank == 0:
            print(f"\nfastgpt: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:  # where nobody listens to signals
        print("\nfastgpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the flush at exit would fail again
        print("fastgpt: the output was closed", file=sys.stderr)
        return 1
    except config().UserError as e:
        if not (rank and isinstance(e, config().Diverged)):  # all ranks raise that, and one says it
            print(f"fastgpt: {f'rank {rank}: ' * bool(rank)}error: {one_line(str(e))}", file=sys.stderr)
        return e.status
    except (
        OSError
    ) as e:  # of a user's path, as it is looked up: a folder that this user may not search, a name of 5,000 characters
        if e.errno not in (errno.EACCES, errno.ENAMETOOLONG) or not e.filename:
            raise
        print(f"fastgpt: error: {one_line(f'{e.filename}: {e.strerror}')}", file=sys.stderr)
        return 2


def config() -> Any:
    """The module of the settings and errors, which imports PyTorch: --version and --help do without."""
    from fastgpt import config

    return config


def one_line(text: str, most: int = 2000) -> str:
    """A message as one line. What it cites of a file may be long, or have characters that a terminal obeys."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[: most - 500]} ... {text[-500:]}"


def run(command: str, argv: list[str]) -> int | None:
    """Run one command, and return its exit status; None means 0. Raises UserError."""
    if command == "help" and argv:
        command, argv = argv[0], [*argv[1:], "--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return None
    if command in ("-V", "--version"):
        print(f"fastgpt {__version__}")
        return None
    from fastgpt.config import (
        ExportConfig,
        InspectConfig,
        PlotConfig,
        PrepareConfig,
        SampleConfig,
        StudyConfig,
        TuneConfig,
        UserError,
        VerifyConfig,
        own_environment,
    )
    from fastgpt.parse import close, parse, parse_train

    if command == "train":
        from fastgpt.trainer import Again, train

        try:
            train(*parse_train(argv, "fastgpt train"))
        except Again as e:  # in a process anew: of this one CUDA may be lost, or its memory in pieces
            print(f"fastgpt: {e}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            words = [sys.executable, "-m", "fastgpt.cli", "train", *argv, *e.flags]
            os.execve(sys.executable, words, own_environment())
    elif command == "plot":
        from fastgpt.plot import plot

        flags = [word for word in argv if word.startswith("-")]
        cfg, _ = parse(PlotConfig, flags, "fastgpt plot RUN [RUN ...]")
        plot([word for word in argv if word not in flags], cfg)
    elif command == "sample":
        from fastgpt.sample import sample

        sample(parse(SampleConfig, argv, "fastgpt sample")[0])
    elif command == "export":
        from fastgpt.export import export

        export(parse(ExportConfig, argv, "fastgpt export")[0])
    elif command == "prepare":
        from fastgpt.prepare import prepare

        cfg, _ = parse(PrepareConfig, argv, "fastgpt prepare")
        for name in ("input", "out"):
            if not getattr(cfg, name):
                raise UserError(f"--{name} is missing; write --{name}=PATH")
        prepare(cfg.input, cfg.tokenizer, cfg.out, cfg.field, cfg.separator, cfg.val_fraction, cfg.overwrite)
    elif command == "verify":
        cfg, _ = parse(VerifyConfig, argv, "fastgpt verify")
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # the import below reads it
        from fastgpt.verify import verify

        return verify(cfg.json, cfg.dtype)
    elif command == "tune":
        from fastgpt.tune import tune

        tune(parse(TuneConfig, argv, "fastgpt tune")[0])
    elif command == "inspect":
        from fastgpt.inspection import base, inspect

        return inspect(parse(InspectConfig, argv, "fastgpt inspect", base)[0])
    elif command == "study":
        from fastgpt.study import defaults, study

        study(parse(StudyConfig, argv, "fastgpt study", defaults)[0])
    elif command == "bench":
        from fastgpt.benchmarks.command import bench

        return bench(argv)
    elif command == "completion":
        from fastgpt.completion import completion

        print(completion(argv), end="")
    else:
        near = close(command, COMMANDS)
        hint = f"the nearest is {near!r}" if near else "fastgpt --help lists them"
        raise UserError(f"there is no command {command!r}; {hint}")
    return None


def entry(*words: str) -> None:
    """Run the command line in a process that is its own, with these words before it. The console script's entry point."""
    signals.listen()
    sys.exit(main([*words, *sys.argv[1:]]))


if __name__ == "__main__":
    entry()
