"""The command `fastgpt`: train, sample, prepare, verify, tune, bench. What a user can mend is one line on stderr and exit status 2."""

import os
import sys

import torch

from fastgpt.config import PrepareConfig, SampleConfig, TuneConfig, UserError, VerifyConfig, parse, parse_train

USAGE = """usage: fastgpt COMMAND [FILE.py|FILE.toml ...] [--key=value ...]

  train     train a model; without anything else, a small one on the embedded text
  sample    continue a prompt with a trained model
  prepare   turn a text file or folder into a dataset
  verify    hold every kernel to PyTorch on this machine; exit status 1 if one fails
  tune      search this GPU's fastest launch configurations of the kernels, for later runs
  bench     measure this machine: steps and kernels against their peers; also compare, count, roofline, report

fastgpt COMMAND --help lists every flag with its default.
"""


def main(argv=None):
    """Run a command line; the exit status."""
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if os.environ.get("RANK", "0") != "0":  # under torchrun, one process speaks for all
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # text that the terminal cannot show is no reason to stop
    hint = "; --init_from=resume goes on from the last checkpoint saved" if command == "train" else ""
    return reported(lambda: run(command, argv), hint)


def reported(run, hint=""):
    """run()'s exit status, or 0; what a user can mend, and an interruption with its hint, as a line on stderr."""
    try:
        status = run() or 0
        sys.stdout.flush()  # here, where a closed pipe is answered
        return status
    except UserError as e:
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
        print(f"fastgpt: {rank}error: {e}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastgpt: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor is there anything to flush at the exit
        print("fastgpt: nobody reads the output any more", file=sys.stderr)
        return 1


def run(command, argv):
    """Run one command; its exit status, or None for 0. Raises UserError."""
    if command == "train":
        from fastgpt.trainer import train

        train(*parse_train(argv, "fastgpt train"))
    elif command == "sample":
        from fastgpt.sample import sample

        sample(parse(SampleConfig, argv, "fastgpt sample")[0])
    elif command == "prepare":
        from fastgpt.prepare import prepare

        cfg, _ = parse(PrepareConfig, argv, "fastgpt prepare")
        for name in ("input", "out"):
            if not getattr(cfg, name):
                raise UserError(f"--{name} is missing; write --{name}=PATH")
        prepare(cfg.input, cfg.tokenizer, cfg.out)
    elif command == "verify":
        cfg, _ = parse(VerifyConfig, argv, "fastgpt verify")
        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, with this:
        from fastgpt.verify import verify

        return verify(cfg.json)
    elif command == "tune":
        from fastgpt.tune import tune

        tune(parse(TuneConfig, argv, "fastgpt tune")[0])
    elif command == "bench":
        from fastgpt.benchmarks.command import bench

        return bench(argv)
    elif command in ("-h", "--help"):
        print(USAGE, end="")
    else:
        raise UserError(f"there is no command {command!r}; fastgpt --help lists them")
    return None


def entry():
    """The console script's entry point."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
