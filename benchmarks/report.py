"""`fastgpt bench report`: a result file as a page of tables and plots, and as the README's block on performance.

A result file is pytest-benchmark's JSON with a key of our own, `fastgpt`, at benchmarks/results/<gpu>/<date>-<commit>.json; times in
it are seconds. A benchmark is a provider on a case: fastgpt, compiled (nanoGPT under torch.compile), strongest (plain PyTorch at its
best), and others. What a file leaves out or has as null is written "-".
"""

import json
import math
import os
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from fastgpt.config import UserError

ROOT = Path(__file__).parents[1]
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
    ("against compiled", "compiled nanoGPT's time over the row's, median (range of rounds): above 1 is faster.", "ratio", ""),
]  # fmt: skip
OP_COLUMNS = [
    ("ms", "median time of a call; `train` is forward and backward.", "ms", ",.4f"),
    ("TFLOP/s", "arithmetic of the op over its time.", "tflops", ",.2f"),
    ("GB/s", "the fewest bytes that the op can move over its time.", "gb_per_s", ",.0f"),
    ("of floor", "the least time for its FLOPs and bytes at the ceilings, as a share of its time.", "of_floor", ".0%"),
    ("host us", "the host's time for a call: where it is longer than the call, the GPU waits.", "host_us", ",.1f"),
    ("against baseline", "the baseline's time over the row's, median (range of rounds): above 1 is faster.", "ratio", ""),
]  # fmt: skip
BATCH = "B: sequences of a micro-step x micro-steps of an iteration; best: each provider's fastest B. T: tokens of a sequence."
# Parts of a shape that are in an op's label only for some ops; what is false or 0 never is.
MATTERS = {
    "n_head": ["attention", "optimizer"],
    "vocab_size": ["embedding", "linear_cross_entropy", "optimizer"],
    "bias": [],
}

# ---- reading ----


def load(path):
    """A result file as a dict. Raises UserError for a file that is missing, damaged, or no result of `fastgpt bench`."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        when(result)
        infos, stats = ([b[key] for b in result["benchmarks"]] for key in ("extra_info", "stats"))
        words = [result["fastgpt"]["device"], result["fastgpt"]["gpu"], *(b["fullname"] for b in result["benchmarks"])]
        words += [info[key] for info in infos for key in ("kind", "provider")]
        right = all(isinstance(w, str) for w in words)
        right &= all(0 < s[key] < math.inf for s in stats for key in ("median", "q1", "q3"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); `fastgpt bench` writes result files") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{path}: damaged, or no result of `fastgpt bench`")
    return result


def when(result):
    """The time of a run, in UTC."""
    time = datetime.fromisoformat(result["datetime"].replace("Z", "+00:00"))  # Python 3.10 reads no Z
    return time.replace(tzinfo=time.tzinfo or timezone.utc).astimezone(timezone.utc)


def readable(folder):
    """(path, result) of every result file below a folder that can be read, the oldest first."""
    found = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            found.append((path, load(path)))
        except UserError:
            continue
    return sorted(found, key=lambda pair: when(pair[1]))


def newest(root, n=1, device="cuda"):
    """Paths of the newest n results of runs on GPUs, or on CPUs, below root, the newest first, all of one: the newest run's."""
    runs = [(path, r["fastgpt"]["gpu"]) for path, r in reversed(readable(root)) if r["fastgpt"]["device"] == device]
    return [path for path, gpu in runs if gpu == runs[0][1]][:n]


def grouped(result, kind):
    """{case: its benchmarks, the fastest first} of the kind "step" or "op", in the file's order.

    A case is (model, B and T, dtype) or (op, shape, direction, dtype); a benchmark its extra_info, `ms`, and `ratio` in words.
    """
    groups = {}
    for b in result["benchmarks"]:
        info = b["extra_info"] | {"ms": b["stats"]["median"] * 1e3}
        if info["kind"] != kind:
            continue
        if kind == "step":
            info["ratio"] = ratio(info, "ratio_to_compiled", info["provider"] == "compiled")
            model, batch = (
                cell(info.get("model")),
                f"B={cell(info.get('batch_size'))} x {cell(info.get('accumulation'))}",
            )
            # Providers of one group belong together, also where each has a batch size of its own.
            batch = (b.get("group") or "").removeprefix(f"step {model} ") or batch
            case = model, f"{batch}, T={cell(info.get('block_size'))}", cell(info.get("dtype"))
        else:
            info["ratio"] = ratio(info, "ratio_to_baseline", info.get("baseline"))
            op, sizes = cell(info.get("op")), info.get("shape") or {}
            shape = " ".join(f"{k}={v}" for k, v in sizes.items() if v and op in MATTERS.get(k, [op]))
            case = op, shape or "-", cell(info.get("direction")), cell(info.get("dtype"))
        groups.setdefault(case, []).append(info)
    speed = lambda b: (-(b.get("tokens_per_s") or 0), b["ms"])  # noqa: E731
    return {case: sorted(benchmarks, key=speed) for case, benchmarks in groups.items()}


# ---- words ----


def cell(value, spec=""):
    """A value in a format, or "-" where there is none; what Markdown would take for its own is escaped."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return " ".join(format(value, spec).split()).replace("|", "\\|").replace("<", "&lt;")


def ratio(info, key, is_baseline):
    """A ratio of extra_info in words: "1.25x (1.20–1.30)", without the range where the file has none."""
    median, low, high = (cell(info.get(key + end), ".2f") for end in ("", "_min", "_max"))
    if is_baseline or median == "-":
        return "baseline" if is_baseline else "-"
    return f"{median}x" if "-" in (low, high) else f"{median}x ({low}–{high})"


def table(titles, rows, left):
    """A Markdown table: the first `left` columns are words, the others numbers."""
    lines = [titles, ["---"] * left + ["---:"] * (len(titles) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def case_table(columns, groups, first):
    """The table of grouped benchmarks: `first` {title: place in the case}, the provider, then columns."""
    rows = []
    for case, benchmarks in groups.items():
        for b in benchmarks:
            provider = f"**{cell(b['provider'])}**" if b is benchmarks[0] else cell(b["provider"])
            cells = [cell(b.get(key), spec) for _, _, key, spec in columns]
            rows.append([*(case[place] for place in first.values()), provider, *cells])
    return table([*first, "provider", *(title for title, _, _, _ in columns)], rows, len(first) + 1)


def step_title(case):
    return "{} {}, {}".format(*case)


def short(name):
    """The parameters of a test's name, or all of a name without."""
    return name.partition("[")[2].removesuffix("]") or name


def listed(pairs):
    """A Markdown list of (what, which) pairs: each `what` once, with all of its `which`."""
    groups = {}
    for what, which in pairs:
        groups.setdefault(what, []).append(which)
    return "\n".join(f"- {what}: {', '.join(which)}" for what, which in groups.items())


def explained(columns):
    return "\n".join(f"- {title}: {says}" for title, says, _, _ in columns)


def commit(result):
    info = result.get("commit_info") or {}
    return (info.get("id") or "unknown")[:7] + "-dirty" * bool(info.get("dirty"))


def versions(result):
    return ", ".join(f"{name} {cell(v)}" for name, v in (result["fastgpt"].get("versions") or {}).items()) or "-"


def loud(result):
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
    lines = [
        f"{'GPU' if run['device'] == 'cuda' else 'CPU'}: {cell(run['gpu'])}, driver {cell(run.get('driver'))}",
        f"versions: {versions(result)}",
        f"run: {when(result):%Y-%m-%d %H:%M} UTC, {cell(run.get('seconds'), '.0f')} s{budget}",
        f"commit: {commit(result)}{dirty}",
        f"clocks and power, median and range: {', '.join(spans) or '-'}",
        f"ceilings measured in this run: {cell(flops, ',.2f')} TFLOP/s in {cell(ceilings.get('dtype'))}, {cell(bandwidth, '.2f')} TB/s",
        f"attention kernel that ran: {cell(run.get('attention_kernel'))}",
        f"timed: {', '.join(f'{n} {how}' for how, n in timed.items()) or '-'}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def write(path):
    """Write the report of the result X.json beside it: X.md, whose path is returned, and up to three plots. Raises UserError."""
    path, result = Path(path), load(path)
    steps, ops = grouped(result, "step"), grouped(result, "op")
    parts = [f"# fastgpt bench on {cell(result['fastgpt']['gpu'])}", *loud(result), about(result)]
    parts += ["In each case the fastest provider comes first, in bold."]
    parts += ["## Steps", BATCH, explained(STEP_COLUMNS)] if steps else []
    for case, benchmarks in steps.items():
        parts += [f"### {step_title(case)}", case_table(STEP_COLUMNS, {case: benchmarks}, {})]
        kernels = listed((f"`{b['attention_kernel']}`", b["provider"]) for b in benchmarks if b.get("attention_kernel"))
        parts += ["Attention ran in:", kernels] if kernels else []
    bars = {step_title(case): {"": benchmarks} for case, benchmarks in steps.items()}
    text = "{provider}  {tokens_per_s:,.0f}  {ratio}"
    parts += bar_plot(path, "steps", "tokens/s of a training step", result, bars, "tokens_per_s", text)
    parts += history_plot(path, result)
    parts += ["## Ops", explained(OP_COLUMNS)] if ops else []
    bars = {}
    for op in dict.fromkeys(case[0] for case in ops):
        own = {case: benchmarks for case, benchmarks in ops.items() if case[0] == op}
        parts += [f"### {op}", case_table(OP_COLUMNS, own, {"shape": 1, "direction": 2, "dtype": 3})]
        bars[op] = {f"{shape}\n{direction}, {dtype}": bs for (_, shape, direction, dtype), bs in own.items()}
    title, text = (
        "how near to the floor (dotted: none is faster) at the measured ceilings",
        "{provider}  {of_floor:.0%}  {ms:,.4f} ms  {ratio}",
    )
    parts += bar_plot(path, "ops", title, result, bars, "of_floor", text, line=1)
    left_out = listed((cell(x.get("why")), short(x["name"])) for x in result["fastgpt"].get("left_out") or [])
    parts += ["## Left out", left_out or "Nothing."]
    page = path.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


# ---- plots ----


def colours(result):
    """{provider: colour}, the same in every plot of a result."""
    from matplotlib import colormaps

    fixed = {"fastgpt": "tab:blue", "compiled": "tab:orange", "strongest": "tab:green", "eager": "tab:gray"}
    free = (8, 6, 18, 16, 12, 10, 9, 7, 19, 17, 13, 11, 1, 3, 5)  # of tab20, what is not fixed
    palette = [colormaps["tab20"](k) for k in free]
    others = sorted({b["extra_info"]["provider"] for b in result["benchmarks"]} - fixed.keys())
    return fixed | {provider: palette[i % len(palette)] for i, provider in enumerate(others)}


def panels(heights, title):
    """(figure, axes by title) of panels one above the other: {title: inches}."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(10, sum(heights.values()) + 0.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=list(heights.values()))[:, 0]
    for a, name in zip(axes, heights, strict=True):
        a.set_title(name, loc="left", fontsize=10, fontweight="bold")
        a.tick_params(labelsize=8)
        a.spines[["top", "right"]].set_visible(False)
        a.grid(alpha=0.3)
        a.set_axisbelow(True)
    return figure, dict(zip(heights, axes, strict=True))


def save(figure, path, name):
    """Write a plot beside the result X.json as X-name.png: Markdown that shows it, as a list of one."""
    figure.savefig(path.with_name(f"{path.stem}-{name}.png"))
    return [f"![{name}]({path.stem}-{name}.png)"]


def bar_plot(path, name, title, result, groups, key, text, line=0):
    """Bars of {panel: {label: benchmarks}} as long as a key says, text behind each, a mark at `line`; see `save`. [] without data."""
    known = {p: {label: [b for b in bs if (b.get(key) or 0) > 0] for label, bs in g.items()} for p, g in groups.items()}
    known = {p: {label: bs for label, bs in g.items() if bs} for p, g in known.items() if any(g.values())}
    if not known:
        return []
    heights = {p: 0.55 + 0.19 * sum(len(bs) + 0.8 for bs in g.values()) for p, g in known.items()}
    figure, axes = panels(heights, f"{title}, {result['fastgpt']['gpu']}")
    for panel, a in axes.items():
        y, middles, longest = 0, [], line
        for bs in known[panel].values():
            middles.append(y + (len(bs) - 1) / 2)
            for b in bs:
                a.barh(y, b[key], 0.9, color=colours(result)[b["provider"]])
                words = a.annotate(text.format(**b), (b[key], y), (4, 0), textcoords="offset points", fontsize=8)
                words.set(va="center", bbox=dict(facecolor="white", edgecolor="none", pad=0.5))
                y, longest = y + 1, max(longest, b[key])
            y += 0.8
        a.set_yticks(middles, known[panel])
        a.tick_params(axis="y", length=0)
        a.grid(visible=False, axis="y")
        a.set(xlim=(0, 1.65 * longest), ylim=(y - 1.2, -0.7))
        a.xaxis.set_major_formatter("{x:.0%}" if line else "{x:,.0f}")
        a.axvline(line, color="black", lw=0.8, ls=":", zorder=0)
    return save(figure, path, name)


def history_plot(path, result):
    """Tokens/s of fastgpt and of compiled over the folder's runs on this GPU, up to this one; see `save`. [] where it is the first."""
    like = lambda r: all(r["fastgpt"].get(k) == result["fastgpt"].get(k) for k in ("gpu", "device", "quick"))  # noqa: E731
    runs = [r for _, r in readable(path.parent) if like(r) and when(r) <= when(result)]
    steps, cases = [grouped(r, "step") for r in runs], grouped(result, "step")
    if len(runs) < 2 or not cases:
        return []
    title = f"tokens/s over commits, {result['fastgpt']['gpu']}"
    figure, axes = panels(dict.fromkeys(map(step_title, cases), 2.0), title)
    for case, a in zip(cases, axes.values(), strict=True):
        for provider in ("fastgpt", "compiled"):
            rates = [{b["provider"]: b.get("tokens_per_s") for b in step.get(case, [])}.get(provider) for step in steps]
            a.plot(rates, "o-", ms=4, color=colours(result)[provider], label=provider)
        a.set_xticks(range(len(runs)), map(commit, runs), rotation=30 if len(runs) > 8 else 0)
        a.set_xlim(-0.5, len(runs) - 0.5)
        a.margins(y=0.2)
        a.yaxis.set_major_formatter("{x:,.0f}")
        a.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path, "history")


# ---- the README ----


def readme_table(path, folder=ROOT):
    """The README's block, of a result file or, where no GPU has been measured, of None. `folder`: the README's."""
    if path is None:
        return (
            "Not measured on a GPU yet.\n\nOn a machine with an NVIDIA GPU `fastgpt bench` measures, and then "
            "`fastgpt bench report --readme` writes the numbers here."
        )
    path, result = Path(path), load(path)
    stem, steps, rows = Path(os.path.relpath(path, folder)).with_suffix("").as_posix(), grouped(result, "step"), []
    for (model, batch, dtype), benchmarks in steps.items():
        by = {b["provider"]: b for b in benchmarks}
        rates = [cell(by.get(p, {}).get("tokens_per_s"), ",.0f") for p in ("fastgpt", "compiled", "strongest")]
        ours = by.get("fastgpt", {})
        rows.append([model, f"{batch}, {dtype}", *rates, cell(ours.get("ratio")), cell(ours.get("mfu"), ".1%")])
    titles = ["model", "batch", "fastgpt tokens/s", "compiled nanoGPT tokens/s", "strongest tokens/s", "ratio", "MFU"]
    parts = [
        *loud(result),
        f"{cell(result['fastgpt']['gpu'])}, {when(result):%Y-%m-%d}, commit {commit(result)}; {versions(result)}. "
        f"Measured by `fastgpt bench`; [every provider, op and column]({stem}.md).",
        table(titles, rows, left=2),
        f"{BATCH} Strongest: plain PyTorch with every setting that makes it faster. Ratio: compiled nanoGPT's time over fastgpt's, "
        "median (range of rounds): above 1 is faster. MFU: fastgpt's, of the data sheet's peak.",
    ]
    drawn = any(b.get("tokens_per_s") for benchmarks in steps.values() for b in benchmarks)
    return "\n\n".join(parts + [f"![tokens/s of a training step]({stem}-steps.png)"] * drawn)


def readme_parts(path):
    """[before, block, after] of a README, the markers outside of the block. Raises UserError where they are missing."""
    try:
        before, begin, rest = Path(path).read_text(encoding="utf-8").partition(BEGIN)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    block, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{path}: no markers; put the lines {BEGIN} and {END} where the table is to stand")
    return [before + begin, block, end + after]


def update_readme(readme_path, results_root):
    """Write the newest GPU result below results_root into a README's block, and its report. Raises UserError."""
    before, _, after = readme_parts(readme_path)
    path = next(iter(newest(results_root)), None)
    if path and not path.with_suffix(".md").exists():  # the block links to it
        write(path)
    block = readme_table(path, Path(readme_path).parent)
    Path(readme_path).write_text(f"{before}\n{block}\n{after}", encoding="utf-8")
