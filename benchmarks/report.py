"""`fastgpt bench report`: a result file as a page of tables and plots, and as the README's table.

A result file is pytest-benchmark's JSON with one key of our own, `fastgpt`; it stands at benchmarks/results/<gpu>/<date>-<commit>.json.
Each of its benchmarks is a provider on a case, such as fastgpt, compiled (nanoGPT under torch.compile) or pytorch (plain PyTorch at its
best). A peer is a provider that is not fastgpt's. What a file leaves out or has as null is written "-".
"""

import math
import os
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastgpt import files
from fastgpt.config import PathText, Settings, UserError
from fastgpt.parse import shown

ROOT, RESULTS = Path(__file__).parents[1], "benchmarks/results"
BEGIN, END = "<!-- performance: fastgpt bench report --readme -->", "<!-- /performance -->"

# A column: title, what it says, the key in a benchmark, the format.
STEP_COLUMNS = [
    ("batch", "sequences of a micro-step.", "batch_size", ","),
    ("ms", "median time of an iteration: all micro-steps and the update.", "ms", ",.2f"),
    ("tokens/s", "tokens of an iteration over its time.", "tokens_per_s", ",.0f"),
    ("MFU", "the model's FLOP/s as a share of the peak in the GPU's data sheet.", "mfu", ".1%"),
    ("MFU of ceiling", "the same as a share of the FLOP/s that this run measured.", "mfu_of_ceiling", ".1%"),
    ("peak GB", "the most memory allocated at a time.", "peak_memory_gb", ".2f"),
    ("launches", "kernels launched in a micro-step.", "launches_per_micro_step", ","),
    ("against compiled", "compiled nanoGPT's time over the row's, median (range of rounds): above 1 is faster.", "against", ""),
]  # fmt: skip
OP_COLUMNS = [
    ("ms", "median time of a call; `train` is forward and backward.", "ms", ",.4f"),
    ("TFLOP/s", "the op's arithmetic over its time.", "tflops", ",.2f"),
    ("GB/s", "the fewest bytes that the op can move over its time.", "gb_per_s", ",.0f"),
    ("of floor", "the least time for its FLOPs and bytes at the ceilings, as a share of its time.", "of_floor", ".0%"),
    ("host us", "the host's time for a call. Where it is longer than the call, the GPU waits.", "host_us", ",.1f"),
    ("against baseline", "the baseline's time over the row's, median (range of rounds): above 1 is faster.", "against", ""),
]  # fmt: skip
PEERS = (
    "Of each case the fastest implementation that is equal to PyTorch and not fastgpt's, beside fastgpt's fastest. Ratio: its time over "
    "that of fastgpt's fastest, by their medians against the baseline: above 1 fastgpt is faster."
)
UNEQUAL = "They do not compute what PyTorch computes, so they have no time. fastgpt's own fail the run."
INDUCTOR = "; Inductor left gradients of LayerNorm's weights unwritten before (pytorch issue 193061)"
BATCH = "B: sequences of a micro-step x micro-steps of an iteration. T: tokens of a sequence."


class ReportConfig(Settings):
    """Write the report of a result file, given by path, else of the newest."""

    EXAMPLES = ["fastgpt bench report", "fastgpt bench report result.json", "fastgpt bench report --readme"]

    readme: bool = Field(False, description="write the README's table of the newest result instead")
    out: PathText = Field(RESULTS, description="folder of the results")


# ---- a result file: what of it is read. What it has in addition is passed over ----

MOST_PANELS, MOST_BARS = 24, 300  # of a plot: matplotlib takes seconds for these
Word = Annotated[str, Field(max_length=10_000)]
Number = Annotated[float, Field(gt=-1e30, lt=1e30)]
Seconds = Annotated[float, Field(ge=1e-12, le=1e9)]
Spread = Annotated[
    list[Number], Field(min_length=3, max_length=3)
]  # median, least, greatest; of clocks the median is second


class Part(BaseModel):
    """Base of the parts of a result file: strict types (an int passes for a float)."""

    model_config = ConfigDict(strict=True)


class Stats(Part):
    median: Seconds
    q1: Seconds
    q3: Seconds


class Info(Part):
    """What a benchmark says of itself; see Op.info and Step.info."""

    kind: Literal["step", "op"]
    provider: Word
    baseline: bool | None = None
    ratio: Annotated[list[Seconds], Field(min_length=3, max_length=3)] | None = None
    model: Word | None = None
    op: Word | None = None
    direction: Word | None = None
    shape: Word | None = None
    dtype: Word | None = None
    timed_by: Word | None = None
    attention_kernel: Word | None = None
    batch_size: Number | None = None
    tokens_per_s: Number | None = None
    mfu: Number | None = None
    mfu_of_ceiling: Number | None = None
    peak_memory_gb: Number | None = None
    launches_per_micro_step: Number | None = None
    tflops: Number | None = None
    gb_per_s: Number | None = None
    of_floor: Number | None = None
    host_us: Number | None = None


class Benchmark(Part):
    fullname: Word
    stats: Stats
    extra_info: Info


class Ceilings(Part):
    flops: Number | None = None
    bandwidth: Number | None = None
    dtype: Word | None = None


class LeftOut(Part):
    name: Word
    why: Word | None = None


class Run(Part):
    device: Word
    gpu: Word
    driver: Word | None = None
    versions: dict[Word, Word | Number | None] | None = None
    ceilings: Ceilings | None = None
    clocks: dict[Word, Spread | None] | None = None
    attention_kernel: Word | None = None
    budget_s: Number | None = None
    seconds: Number | None = None
    quick: bool | None = None
    left_out: list[LeftOut] | None = None


class Commit(Part):
    id: Word | None = None
    dirty: bool | None = None


class Result(Part):
    # pytest-benchmark's JSON, and `fastgpt`.
    datetime: Word
    commit_info: Commit | None = None
    benchmarks: Annotated[list[Benchmark], Field(max_length=1000)]
    fastgpt: Run


def run(cfg, files):
    """Write the reports of result files, or the README's table: the exit status. Raises UserError."""
    if cfg.readme and files:
        raise UserError(f"bench report --readme: takes the newest result under --out, not {files[0]}")
    if cfg.readme:
        path = update_readme(Path("README.md"), cfg.out)
        print("README.md: the table " + (f"is of {path}" if path else "says that nothing was measured on a GPU yet"))
        return 0
    found = files or newest(cfg.out) or newest(cfg.out, device="cpu")
    if not found:
        raise UserError(f"bench report: no result under {cfg.out}; give a file")
    for path in found:
        print(write(path))
    return 0


# ---- reading ----


def load(path):
    """A result file as a dict. Raises UserError for a file that is missing, damaged, or no result of `fastgpt bench`."""
    try:
        result = files.read_json(path, files.DATA)
        Result.model_validate(result)
        when(result)
        infos = [b["extra_info"] for b in result["benchmarks"]]
        panels = {info.get("op") or tuple(info.get(key) for key in ("model", "shape", "dtype")) for info in infos}
        if len(panels) > MOST_PANELS:
            raise ValueError(f"{len(panels)} ops and models are more than there are")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); `fastgpt bench` writes result files") from None
    except ValidationError as e:
        error = e.errors(include_input=False, include_url=False)[0]
        why = f"{shown('.'.join(map(str, error['loc'])))}: {error['msg']}"
    except (ValueError, OverflowError) as e:
        why = str(e)
    else:
        return result
    raise UserError(f"{path}: damaged, or no result of `fastgpt bench` ({why})")


def when(result):
    """The time of a run, in UTC."""
    time = datetime.fromisoformat(result["datetime"].replace("Z", "+00:00"))  # Python 3.10 reads no Z
    return time.replace(tzinfo=time.tzinfo or timezone.utc).astimezone(timezone.utc)


def newest(root, n=1, device="cuda"):
    """Paths of the newest n results below root of runs on a device, the newest first, all of the newest run's GPU or CPU."""
    runs = []
    for path in Path(root).rglob("*.json"):
        try:
            result = load(path)
        except UserError:
            continue
        if result["fastgpt"]["device"] == device:
            runs.append((when(result), path, result["fastgpt"]["gpu"]))
    runs.sort(reverse=True)
    return [path for _, path, gpu in runs if gpu == runs[0][2]][:n]


def grouped(result, kind):
    """{case: its benchmarks, the fastest first} of the kind "step" or "op", in the file's order.

    A case is (model, shape, dtype) or (op, shape, direction, dtype). A benchmark is its extra_info, with `ms` and `against`.
    """
    groups = {}
    for b in result["benchmarks"]:
        info = b["extra_info"] | {"ms": b["stats"]["median"] * 1e3}
        if info["kind"] != kind:
            continue
        ratio = info.get("ratio")
        spread = "{:.2f}x ({:.2f}–{:.2f})".format(*ratio) if ratio else "-"
        info["against"] = "baseline" if info.get("baseline") else spread
        keys = ("model", "shape", "dtype") if kind == "step" else ("op", "shape", "direction", "dtype")
        case = tuple(cell(info.get(key)) for key in keys)
        groups.setdefault(case, []).append(info)
    return {c: sorted(bs, key=lambda b: (-(b.get("tokens_per_s") or 0), b["ms"])) for c, bs in groups.items()}


# ---- words ----


def cell(value, spec=""):
    """A value in a format, or "-" where there is none. Markdown's own characters are escaped."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return " ".join(format(value, spec).split()).replace("|", "\\|").replace("<", "&lt;")


def table(titles, rows, left):
    """A Markdown table: the first `left` columns are words, the others numbers."""
    lines = [titles, ["---"] * left + ["---:"] * (len(titles) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def case_table(columns, groups, first):
    """The table of grouped benchmarks: `first` {title: place in the case}, the provider (the fastest in bold), then columns."""
    rows = []
    for case, benchmarks in groups.items():
        for b in benchmarks:
            provider = f"**{cell(b['provider'])}**" if b is benchmarks[0] else cell(b["provider"])
            cells = [cell(b.get(key), spec) for _, _, key, spec in columns]
            rows.append([*(case[place] for place in first.values()), provider, *cells])
    return table([*first, "provider", *(column[0] for column in columns)], rows, len(first) + 1)


def first_of(benchmarks, ours):
    """The fastest of fastgpt's providers, or of its peers; {} where there is none."""
    return next((b for b in benchmarks if b["provider"].startswith("fastgpt") == ours), {})


def peer_table(groups):
    """The table of the fastest other implementation of each case."""
    rows = []
    for case, benchmarks in groups.items():
        peer, ours = (first_of(benchmarks, ours) for ours in (False, True))
        ratios = [(b.get("ratio") or [None])[0] for b in (ours, peer)]
        ratio = cell(ratios[0] / ratios[1], ".2f") + "x" if all(ratios) else "-"
        times = [(cell(b.get("provider")), cell(b.get("ms"), ",.4g")) for b in (peer, ours)]
        rows.append([", ".join(case), *times[0], *times[1], ratio])
    return table(["case", "fastest other", "ms", "fastgpt's fastest", "ms", "ratio"], rows, 2)


def explained(columns):
    return "\n".join(f"- {title}: {says}" for title, says, _, _ in columns)


def short(name):
    """The parameters in a test's name; without any, the name."""
    return name.partition("[")[2].removesuffix("]") or name


def listed(pairs):
    """A Markdown list of (what, which) pairs: each `what` once, with all of its `which`."""
    groups = {}
    for what, which in pairs:
        groups.setdefault(what, []).append(which)
    return "\n".join(f"- {what}: {', '.join(which)}" for what, which in groups.items())


def commit(result):
    info = result.get("commit_info") or {}
    return (info.get("id") or "unknown")[:7] + "-dirty" * bool(info.get("dirty"))


def versions(result):
    return ", ".join(f"{name} {cell(v)}" for name, v in (result["fastgpt"].get("versions") or {}).items()) or "-"


def warnings(result):
    """What a reader must know before the first number: paragraphs."""
    cpu = "**Measured on a CPU, at toy sizes: these numbers say nothing of a GPU.**"
    quick = "**A quick run: few cases and few rounds, for a first look only.**"
    return [cpu] * (result["fastgpt"]["device"] != "cuda") + [quick] * bool(result["fastgpt"].get("quick"))


def about(result):
    """What ran, where and how: a Markdown list."""
    run = result["fastgpt"]
    ceilings, clocks = run.get("ceilings") or {}, run.get("clocks") or {}
    flops, bandwidth = (ceilings.get(key) and ceilings[key] / 1e12 for key in ("flops", "bandwidth"))
    spans = [f"{name} {span[1]:,.0f} ({span[0]:,.0f}–{span[2]:,.0f})" for name, span in clocks.items() if span]
    infos = [b["extra_info"] for b in result["benchmarks"]]
    timed = Counter(f"{info['kind']}s by {cell(info.get('timed_by'))}" for info in infos)
    budget = f", of a budget of {run['budget_s']:.0f} s" if run.get("budget_s") else ""
    dirty = " (changes in the tree are not committed)" * commit(result).endswith("-dirty")
    return f"""\
- {"GPU" if run["device"] == "cuda" else "CPU"}: {cell(run["gpu"])}, driver {cell(run.get("driver"))}
- versions: {versions(result)}
- run: {when(result):%Y-%m-%d %H:%M} UTC, {cell(run.get("seconds"), ".0f")} s{budget}
- commit: {commit(result)}{dirty}
- clocks and power while something was timed, median and range: {", ".join(spans) or "-"}
- ceilings measured in this run: {cell(flops, ",.2f")} TFLOP/s in {cell(ceilings.get("dtype"))}, {cell(bandwidth, ".2f")} TB/s
- the baseline's attention kernel: {cell(run.get("attention_kernel"))}
- timed: {", ".join(f"{n} {how}" for how, n in timed.items()) or "-"}"""


def write(path):
    """Write the report of the result X.json beside it: X.md, whose path is returned, and up to two plots. Raises UserError."""
    path, result = Path(path), load(path)
    steps, ops = grouped(result, "step"), grouped(result, "op")
    parts = [f"# fastgpt bench on {cell(result['fastgpt']['gpu'])}", *warnings(result), about(result)]
    left_out = [(cell(x.get("why")), short(x["name"])) for x in result["fastgpt"].get("left_out") or []]
    unequal = [(why, name) for why, name in left_out if "not equal" in why]
    left_out = [x for x in left_out if x not in unequal]
    unequal = [(why + INDUCTOR * ("layer_norm" in name and "inductor" in name), name) for why, name in unequal]
    heading = f"## The fastest others on {cell(result['fastgpt']['gpu'])}"
    parts += [heading, PEERS, peer_table(steps | ops)] if steps or ops else []
    parts += ["## Not equal", UNEQUAL, listed(unequal)] if unequal else []
    parts += ["In each case the fastest provider comes first, in bold."]
    parts += ["## Steps", BATCH, explained(STEP_COLUMNS)] if steps else []
    for case, benchmarks in steps.items():
        parts += [f"### {' '.join(case[:2])}, {case[2]}", case_table(STEP_COLUMNS, {case: benchmarks}, {})]
        kernels = listed((f"`{b['attention_kernel']}`", b["provider"]) for b in benchmarks if b.get("attention_kernel"))
        parts += ["Attention ran in:", kernels] if kernels else []
    bars = {" ".join(case): {"": benchmarks} for case, benchmarks in steps.items()}
    parts += plot(path, "steps", "tokens/s of a training step", result, bars, "tokens_per_s", ",.0f")
    parts += ["## Ops", explained(OP_COLUMNS)] if ops else []
    bars = {}
    for op in dict.fromkeys(case[0] for case in ops):
        own = {case: benchmarks for case, benchmarks in ops.items() if case[0] == op}
        parts += [f"### {op}", case_table(OP_COLUMNS, own, {"shape": 1, "direction": 2, "dtype": 3})]
        bars[op] = {f"{shape}\n{direction}, {dtype}": bs for (_, shape, direction, dtype), bs in own.items()}
    parts += plot(
        path,
        "ops",
        "the floor, by the measured ceilings, over the time: nothing passes 100%",
        result,
        bars,
        "of_floor",
        ".0%",
    )
    page = path.with_suffix(".md")
    text = "\n\n".join([*parts, "## Left out", listed(left_out) or "Nothing."]) + "\n"
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{page}: cannot be written ({e.strerror})") from None
    return page


def plot(path, name, title, result, panels, key, spec):
    """Draw benchmarks as bars of a key's length, {panel: {label: benchmarks}}, into X-name.png beside the result X.json.

    Returns Markdown that shows it, as a list of one; [] where no benchmark has the key.
    """
    rows = {p: [(label, b) for label, bs in g.items() for b in bs if (b.get(key) or 0) > 0] for p, g in panels.items()}
    rows = {p: bars for p, bars in rows.items() if bars}
    if sum(map(len, rows.values())) > MOST_BARS:
        rows = {p: bars[: MOST_BARS // len(rows)] for p, bars in rows.items()}
    if not rows:
        return []
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    with rc_context({"text.parse_math": False}):  # a name may have a $ in it
        return draw(Figure, path, name, title, result, rows, key, spec)


def draw(Figure, path, name, title, result, rows, key, spec):
    """The figure of `plot`."""
    heights = [0.6 + 0.2 * len(bars) for bars in rows.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.4), dpi=110, layout="constrained")
    figure.suptitle(f"{title}, {label(result['fastgpt']['gpu'])}", fontsize=11)
    colours = {"fastgpt": "tab:blue", "compiled": "tab:orange", "pytorch": "tab:green"}
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=heights)[:, 0]
    for (panel, bars), ax in zip(rows.items(), axes, strict=True):
        lengths = [b[key] for _, b in bars]
        drawn = ax.barh(range(len(bars)), lengths, color=[colours.get(b["provider"], "tab:gray") for _, b in bars])
        ax.bar_label(
            drawn, [f"{label(b['provider'])}  {b[key]:{spec}}  {b['against']}" for _, b in bars], padding=4, fontsize=8
        )
        first = {group: i for i, (group, _) in reversed(list(enumerate(bars)))}
        ax.set_yticks(list(first.values()), map(label, first), fontsize=8)
        ax.set_title(label(panel), loc="left", fontsize=10, fontweight="bold")
        ax.set(xlim=(0, 1.65 * max(lengths)), ylim=(len(bars) - 0.4, -0.6))
        ax.xaxis.set_major_formatter(f"{{x:{spec}}}")
    figure.savefig(path.with_name(f"{path.stem}-{name}.png"))
    return [f"![{name}]({path.stem}-{name}.png)"]


def label(text, most=120):
    """A text of a result in a plot: not longer than there is room for, and in two lines at most."""
    first, _, second = text.partition("\n")
    return "\n".join(" ".join(line.split())[:most] for line in (first, second) if line)


# ---- the README ----


def readme_table(path, folder=ROOT):
    """The README's table, of a result file, or of None where no GPU has been measured. folder: the README's."""
    if path is None:
        return (
            "Not measured on a GPU yet.\n\nOn a machine with an NVIDIA GPU `fastgpt bench` measures, and then "
            "`fastgpt bench report --readme` writes the numbers here."
        )
    path, result = Path(path), load(path)
    stem, rows = Path(os.path.relpath(path, folder)).with_suffix("").as_posix(), []
    for (model, shape, dtype), benchmarks in grouped(result, "step").items():
        by = {b["provider"]: b for b in benchmarks}
        ours, compiled, peer = first_of(benchmarks, True), by.get("compiled", {}), first_of(benchmarks, False)
        rates = [cell(b.get("tokens_per_s"), ",.0f") for b in (ours, compiled, peer)]
        for i, b in ((0, ours), (2, peer)):
            rates[i] += f" ({cell(b.get('provider'))})"
        rows.append([model, f"{shape}, {dtype}", *rates, cell(ours.get("against")), cell(ours.get("mfu"), ".1%")])
    titles = ["model", "batch", "fastgpt tokens/s", "compiled nanoGPT tokens/s", "the fastest other's", "ratio", "MFU"]
    parts = [
        *warnings(result),
        f"{cell(result['fastgpt']['gpu'])}, {when(result):%Y-%m-%d}, commit {commit(result)}; {versions(result)}. "
        f"Measured by `fastgpt bench`; [every provider, op and column]({stem}.md).",
        table(titles, rows, left=2),
        f"{BATCH} The fastest other: of those that are not fastgpt's. Ratio: compiled nanoGPT's time over fastgpt's, "
        "median (range of rounds): above 1 is faster. fastgpt: its fastest runner, which `--runner=auto` takes. MFU: fastgpt's, "
        "of the data sheet's peak.",
    ]
    return "\n\n".join(parts + [f"![tokens/s of a training step]({stem}-steps.png)"] * bool(rows))


def readme_parts(path):
    """[before, table, after] of a README, the markers outside of the table. Raises UserError where they are missing."""
    try:
        before, begin, rest = files.read_text(path, files.DATA).partition(BEGIN)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    block, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{path}: no markers; put the lines {BEGIN} and {END} where the table is to stand")
    return [before + begin, block, end + after]


def update_readme(readme_path, results_root):
    """Write the newest GPU result below results_root into a README, and its report: the result's path, or None. Raises UserError."""
    before, _, after = readme_parts(readme_path)
    path = next(iter(newest(results_root)), None)
    if path:
        write(path)  # the table links to it
    table = readme_table(path, Path(readme_path).parent)
    Path(readme_path).write_text(f"{before}\n{table}\n{after}", encoding="utf-8")
    return path
