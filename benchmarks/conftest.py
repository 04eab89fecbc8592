"""What a benchmark run is: its options, its order, its budget, and what the result file says of the machine."""

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
    group.addoption("--profile-to", metavar="DIR", help="write a trace of each arm's step here, and its time by op")


def pytest_configure(config):
    config.addinivalue_line("markers", "importance(n): when a benchmark is due; 0 comes first")
    config.fastgpt_start = time.monotonic()
    config.fastgpt_left_out = {}
    config.fastgpt_watch = machine.Watch()


def pytest_unconfigure(config):
    config.fastgpt_watch.stop()


def pytest_collection_modifyitems(config, items):
    items.sort(key=importance)  # stable
    if config.getoption("--quick"):
        late = [i for i in items if importance(i) > QUICK]
        config.hook.pytest_deselected(items=late)
        items[:] = [i for i in items if i not in late]


def importance(item):
    marker = item.get_closest_marker("importance")
    return marker.args[0] if marker else 50


def remaining(config):
    """Seconds of the budget that are left, or None without one."""
    budget = config.getoption("--budget")
    return None if budget is None else budget - (time.monotonic() - config.fastgpt_start)


def pytest_collection_finish(session):
    session.config.fastgpt_left_out.update(
        dict.fromkeys(map(name_of, session.items), "not reached: the run was interrupted")
    )
    if session.items and not session.config.option.collectonly:
        harness.ceilings()  # on an empty machine


def pytest_runtest_setup(item):
    left = remaining(item.config)
    if left is not None and left <= 0:
        pytest.skip(spent(item.config))


def spent(config):
    return f"the budget of {config.getoption('--budget'):g} s is spent"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """Stop a benchmark where the budget ends, wherever it is."""
    left = remaining(item.config)

    def stop(*_):
        raise pytest.skip.Exception(spent(item.config))  # no Exception: what catches those goes on

    before = signal.signal(signal.SIGALRM, stop)
    if left is not None:
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 1.0)  # and again: in a destructor it would be lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def name_of(item):
    """What a case is called: its parameters."""
    return item.callspec.id if hasattr(item, "callspec") else item.name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "teardown" and report.outcome in ("skipped", "failed"):
        why = report.longrepr[2] if report.outcome == "skipped" else str(call.excinfo.value).strip()
        lines = why.removeprefix("Skipped: ").splitlines() or [type(call.excinfo.value).__name__]
        kind = "" if report.outcome == "skipped" else f"FAILED: {type(call.excinfo.value).__name__}: "
        item.config.fastgpt_left_out[name_of(item)] = kind + lines[0]
    elif report.when == "call":
        item.config.fastgpt_left_out.pop(name_of(item), None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    step = [b["extra_info"] for b in output_json["benchmarks"] if b["extra_info"].get("kind") == "step"]
    kernels = [x["attention_kernel"] for x in step if x["provider"] == "compiled" and x.get("attention_kernel")]
    output_json["fastgpt"] = {
        "device": harness.DEVICE, "gpu": machine.gpu_name(), "driver": machine.driver(),
        "versions": {**versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "ceilings": harness.ceilings(), "clocks": config.fastgpt_watch.stop(),
        "attention_kernel": kernels[0] if kernels else None,
        "budget_s": config.getoption("--budget"), "seconds": time.monotonic() - config.fastgpt_start,
        "quick": bool(config.getoption("--quick")),
        "left_out": [{"name": name, "why": why} for name, why in config.fastgpt_left_out.items()],
    }  # fmt: skip


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.update(machine.commit())  # of the source, wherever this runs
