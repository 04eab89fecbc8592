"""A benchmark run under pytest: its options, its order, its budget, and what the result file says of the machine."""

import signal
import time

import pytest
import torch

from fastgpt.benchmarks import harness, machine
from fastgpt.verify import versions

QUICK = 10  # the importance up to which --quick measures: the first step and each op's first shape


def pytest_addoption(parser):
    group = parser.getgroup("fastgpt")
    group.addoption("--budget", type=float, help="seconds for everything; what they do not reach is skipped")
    group.addoption("--quick", action="store_true", help="fewer cases and rounds")
    group.addoption("--first", action="store_true", help="only what is due first")
    group.addoption("--profile-to", metavar="DIR", help="write a trace of each arm's step here, and its time by op")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config):
    """None: what is timed has the machine to itself."""
    return 0


def pytest_configure(config):
    config.addinivalue_line("markers", "importance(n): when a benchmark is due; 0 comes first")
    config.fastgpt_start = time.monotonic()
    config.fastgpt_left_out = {}  # name of a case: why it has no time
    config.fastgpt_watch = machine.Watch()


def pytest_unconfigure(config):
    config.fastgpt_watch.stop()


def pytest_collection_modifyitems(config, items):
    items.sort(key=importance)  # stable
    if config.getoption("--quick") or config.getoption("--first"):
        items[:] = [i for i in items if importance(i) <= (0 if config.getoption("--first") else QUICK)]


def importance(item):
    marker = item.get_closest_marker("importance")
    return marker.args[0] if marker else 50


def pytest_collection_finish(session):
    names = map(name_of, session.items)
    session.config.fastgpt_left_out.update(dict.fromkeys(names, "not reached: the run was interrupted"))
    if session.items and not session.config.option.collectonly:
        harness.ceilings()  # while nothing else is in the GPU's memory


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """Skip a benchmark that begins after the budget's end, and stop it where it reaches that."""
    budget = item.config.getoption("--budget")

    def stop(*_):
        raise pytest.skip.Exception(
            f"the budget of {budget:g} s is spent"
        )  # no Exception: `except Exception` lets it pass

    before = signal.signal(signal.SIGALRM, stop)
    if budget is not None:
        left = item.config.fastgpt_start + budget - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 1.0)  # again each second: a destructor would swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def name_of(item):
    """The parameters of a benchmark, which are its case's name."""
    return item.callspec.id if hasattr(item, "callspec") else item.name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    left_out = item.config.fastgpt_left_out
    if report.when != "teardown" and report.outcome in ("skipped", "failed"):
        why = report.longrepr[2] if report.skipped else f"FAILED: {call.excinfo.typename}: {call.excinfo.value}"
        left_out[name_of(item)] = why.removeprefix("Skipped: ").splitlines()[0]
    elif report.when == "call":
        left_out.pop(name_of(item), None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    baselines = (b["extra_info"] for b in output_json["benchmarks"] if b["extra_info"].get("provider") == "compiled")
    output_json["fastgpt"] = {
        "device": harness.DEVICE, "gpu": machine.gpu_name(), "driver": machine.driver(),
        "versions": {**versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "ceilings": harness.ceilings(), "clocks": config.fastgpt_watch.stop(),
        "attention_kernel": next((x["attention_kernel"] for x in baselines), None),
        "budget_s": config.getoption("--budget"), "seconds": time.monotonic() - config.fastgpt_start,
        "quick": bool(config.getoption("--quick")),
        "left_out": [{"name": name, "why": why} for name, why in config.fastgpt_left_out.items()],
    }  # fmt: skip


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.update(machine.commit())  # of the source, wherever this runs
