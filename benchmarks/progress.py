"""What `fastgpt bench` prints while it runs: a line for each result as it comes."""

import sys

import pytest

from fastgpt.benchmarks import harness

LEGEND = """A line is one implementation:
its median time; how many times as fast as the first line of its group it is (1.25x: a quarter faster; a few percent are noise);
and its rate. 100% of the limit would be the least time that this machine's own product of matrices and copy allow."""


class Progress:
    """A pytest plugin in place of its terminal reporter."""

    def __init__(self, budget):
        self.budget, self.group, self.row, self.said = budget, None, None, set()

    def pytest_collection_finish(self, session):
        if not harness.CUDA:
            self.say("No CUDA GPU here: toy sizes on a CPU. These numbers say nothing of a GPU.\n")
        self.say(f"{len(session.items)} cases in at most {self.budget} s, the most important first. {LEGEND}")

    def pytest_collectreport(self, report):
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    @pytest.hookimpl(tryfirst=True)  # before the fixtures are gone; what is printed here pytest would capture
    def pytest_runtest_teardown(self, item):
        benchmark = item.funcargs.get("benchmark")
        if benchmark is not None and benchmark.extra_info and benchmark.stats is not None:
            self.row = benchmark.group, line(benchmark.extra_info, benchmark.stats.stats.median)

    def pytest_runtest_logreport(self, report):
        case = report.nodeid.rpartition("[")[2].rstrip("]")
        if report.failed:
            self.say(f"\nFAILED {case}\n{report.longreprtext}")
        elif report.skipped:
            why = report.longrepr[2].removeprefix("Skipped: ")
            what = "the rest" if why.startswith("the budget of") else f"{case.split()[0]} {case.split()[-1]}"
            if (what, why) not in self.said:  # once for all shapes
                self.said.add((what, why))
                self.say(f"  -- {what}: {why}")
        elif report.when == "teardown" and self.row:
            group, result = self.row
            self.say(result if group == self.group else f"\n{group}\n{result}")
            self.group, self.row = group, None

    def say(self, text):
        print(text, flush=True)


def line(info, seconds):
    """A result as a line: time, ratio to the baseline, rate."""
    against = " " * 8 if info["ratio"] is None else f"{info['ratio'][0]:7.2f}x"
    if info["kind"] == "step":
        share, of = (info["mfu"], "MFU") if info["mfu"] else (info["mfu_of_ceiling"], "of the limit")
        rest = f"{info['tokens_per_s']:12,.0f} tok/s{100 * share:7.1f}% {of}"
    else:
        flops = f"{info['tflops']:9.2f} TFLOP/s" if info["tflops"] else " " * 17
        rest = f"{flops}{info['gb_per_s']:9.1f} GB/s{100 * info['of_floor']:7.1f}% of the limit"
    return f"  {info['provider']:28}{seconds * 1e3:11.4f} ms{against}{rest}"
