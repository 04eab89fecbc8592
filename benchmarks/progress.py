"""What `fastgpt bench` shows while it runs: a line for each result as it comes, and on a terminal a bar."""

import sys
import time

import pytest
from tqdm import tqdm


class Progress:
    """A pytest plugin in place of its terminal reporter."""

    def __init__(self, budget):
        self.budget, self.start, self.bar, self.group = budget, time.monotonic(), None, None
        self.said, self.row = set(), None

    def pytest_collection_finish(self, session):
        self.bar = tqdm(total=len(session.items), unit="case", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.say(
            f"{len(session.items)} cases within {self.budget} s, most important first; what is compared is measured together"
        )

    def pytest_collectreport(self, report):
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    def pytest_runtest_logstart(self, nodeid, location):
        if self.bar is not None:
            self.bar.set_description(nodeid.rpartition("[")[2].rstrip("]"))

    @pytest.hookimpl(tryfirst=True)  # before the fixtures are gone
    def pytest_runtest_teardown(self, item):
        benchmark = item.funcargs.get("benchmark")
        if benchmark is not None and benchmark.extra_info and benchmark.stats is not None:
            self.row = benchmark.group, benchmark.extra_info, benchmark.stats.stats.median

    def pytest_runtest_logreport(self, report):
        op, _, name = report.nodeid.rpartition("[")[2].rstrip("]").partition(" ")
        if report.when == "teardown":
            self.bar.update()
            if self.row:
                self.show(*self.row)
            self.row = None
        if report.failed:
            self.say(f"\nFAILED {op} {name}\n{report.longreprtext}")
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            why = ("the rest", "", reason) if reason.startswith("the budget of") else (op, name.split()[-1], reason)
            if why not in self.said:  # once for all shapes
                self.said.add(why)
                self.say(f"  -- {' '.join(why[:2]).strip()}: {reason}")

    def show(self, group, info, seconds):
        """A result as a line, under its case's name."""
        if group != self.group:
            self.group = group
            self.say(f"\n{group}")
        ratio = info.get("ratio_to_compiled", info.get("ratio_to_baseline"))
        against = "        " if ratio is None else f"{ratio:7.2f}x"
        if info["kind"] == "step":
            peak, of = (info["mfu"], "MFU") if info["mfu"] is not None else (info["mfu_of_ceiling"], "of the ceiling")
            rest = f"{info['tokens_per_s']:12,.0f} tok/s{100 * peak:7.1f}% {of}"
        else:
            flops = f"{info['tflops']:9.2f} TFLOP/s" if info["tflops"] else " " * 17
            rest = f"{flops}{info['gb_per_s']:9.1f} GB/s{100 * info['of_floor']:7.1f}% of its floor"
        self.say(f"  {info['provider']:22}{seconds * 1e3:11.4f} ms{against}{rest}")

    def say(self, line):
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def finish(self):
        """Close the bar; say how long it took."""
        if self.bar is not None:
            self.bar.close()
        print(f"\n{time.monotonic() - self.start:.0f} s")
