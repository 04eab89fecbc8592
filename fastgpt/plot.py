"""Draws runs from their metrics: a run's own loss.png, and `fastgpt plot`, several runs on one page, as a picture and as an HTML file."""

import io
import json
import math
import warnings
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt import files, metrics
from fastgpt.config import PlotConfig, UserError

MOST_BYTES = 2**30  # of a metrics.jsonl
MOST_POINTS = 2000  # of a curve: more are not seen
MOST_LABELS = 8  # beside a panel's curves
# Okabe and Ito's colours, which people see apart who do not see red, green or blue as others do. Yellow, the eighth, is too pale on white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = [(), (6, 3), (2, 2), (9, 3, 2, 3)]  # four, and seven colours: 28 runs differ, and neighbours in both
MARKERS = "os^DvXP"
MOST_RUNS = len(COLORS) * len(DASHES)
X_LABELS = {"iter": "iteration", "tokens": "tokens", "hours": "hours of training"}
PANELS = {"lr": "learning rate", "tokens_per_s": "tokens/s", "grad_norm": "gradient norm"}
# Settings that are no news in a legend.
ALIKE = {"out_dir", "init_from", "overwrite", "preset", "wandb_run_name", "sample_tokens", "join_timeout"}


class Point(NamedTuple):
    """A value of a run, with all that it can be drawn against. What the record does not say is None."""

    iter: float
    tokens: float | None
    hours: float | None
    value: float


@dataclass
class Curves:
    """A run to be drawn."""

    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]

    def points(self, key: str) -> list[Point]:
        """The values of a key, by iteration."""
        found = []
        for r in self.records:
            if is_number(r.get(key)) and is_number(r["iter"]):
                tokens, seconds = (r[k] if is_number(r.get(k)) else None for k in ("tokens", "train_s"))
                found.append(Point(r["iter"], tokens, None if seconds is None else seconds / 3600, r[key]))
        return sorted(found, key=lambda p: p.iter)


def is_number(value: Any) -> bool:
    """Whether a value from a metrics.jsonl can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e30


def smoothed(points: list[Point], share: float) -> list[Point]:
    """The points with the mean of the values around each: of so large a share of all, as many before it as after it, but at the end."""
    reach, sums = math.ceil(share * len(points) / 2), [0.0, *accumulate(p.value for p in points)]
    found = []
    for i, p in enumerate(points):
        near = min(reach, i)  # at the start the loss falls too fast for a longer mean
        first, end = i - near, min(i + near + 1, len(points))
        found.append(p._replace(value=(sums[end] - sums[first]) / (end - first)))
    return found


def thinned(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS of the points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    found = []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        ends = {min(stretch, key=lambda p: p.value), max(stretch, key=lambda p: p.value)}
        found += sorted(ends, key=lambda p: p.iter)
    return found


def spread(places: list[float], gap: float) -> list[float]:
    """The places moved apart, so that each two are at least `gap` from each other, and none moves further than it must."""
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[tuple[float, list[int]]] = []  # (middle, who stands there)
    for i in order:
        middle, who = places[i], [i]
        while groups and middle - groups[-1][0] < gap * (len(who) + len(groups[-1][1])) / 2:
            before, others = groups.pop()
            middle = (before * len(others) + middle * len(who)) / (len(others) + len(who))
            who = others + who
        groups.append((middle, who))
    found = list(places)
    for middle, who in groups:
        for k, i in enumerate(who):
            found[i] = middle + gap * (k - (len(who) - 1) / 2)
    return found


# ---- a run's own loss curve ----


def plot_losses(records: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw the loss curves of metrics records into a PNG: training loss by iteration, evaluations as points."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    steps = [r for r in records if is_number(r.get("loss"))]
    evals = [r for r in records if is_number(r.get("train_loss")) and is_number(r.get("val_loss"))]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["iter"] for r in steps], [r["loss"] for r in steps], lw=1, alpha=0.6, label="training batches")
    ends = []
    for key, style, label in (("train_loss", "o--", "train, evaluated"), ("val_loss", "s-", "held out, evaluated")):
        (line,) = axes.plot([r["iter"] for r in evals], [r[key] for r in evals], style, ms=4, label=label)
        if evals:
            ends.append((evals[-1]["iter"], evals[-1][key], f"{evals[-1][key]:.3f}", line.get_color()))
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    if ends:
        label_ends(figure, axes, ends)
    figure.savefig(path)


def label_ends(figure: Any, axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Write a text for each end (x, y, text, colour) of a curve, in a column at the right: none over another, nor over a curve."""
    figure.get_layout_engine().execute(figure)  # else the pixels of a place are not known
    size, (left, right) = 8, axes.get_xlim()
    point = figure.dpi / 72
    wide = (10 + 0.55 * size * max(len(text) for *_, text, _ in ends)) * point
    column = right + 0.02 * (right - left)
    axes.set_xlim(left, left + (column - left) / (1 - min(0.6, wide / axes.bbox.width)))
    heights = [float(axes.transData.transform((x, y))[1]) for x, y, *_ in ends]
    places = spread(heights, 1.25 * size * point)
    for (x, y, text, color), place in zip(ends, places, strict=True):
        at = column, float(axes.transData.inverted().transform((0, place))[1])
        line = dict(arrowstyle="-", color=color, lw=0.7, shrinkA=0, shrinkB=2, relpos=(0, 0.5))
        axes.annotate(text, (x, y), xytext=at, va="center", fontsize=size, arrowprops=line, annotation_clip=False)


# ---- fastgpt plot ----


def plot(words: list[str], cfg: PlotConfig) -> None:
    """Draw runs, each an out_dir or a metrics.jsonl, into a PNG and an HTML file. Raises UserError."""
    if not words:
        raise UserError(
            "there is nothing to plot; write fastgpt plot RUN [RUN ...], where RUN is an out_dir or a metrics.jsonl"
        )
    if len(words) > MOST_RUNS:
        raise UserError(f"{len(words)} runs are too many to be told apart on one page; plot at most {MOST_RUNS}")
    runs = [load(word) for word in words]
    names = [run.name for run in runs]
    for run, word in zip(runs, words, strict=True):
        if names.count(run.name) > 1:
            run.name = word
        run.name = clean(run.name)
        for x in ("tokens", "hours"):
            if all(getattr(p, x) is None for key in ("loss", "val_loss") for p in run.points(key)):
                print(f"{word}: its records have no {x}, and it is not drawn against them")
    written = []
    try:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        for ending, write in ((".png", write_picture), (".html", write_page)):
            with files.replacing(path := Path(cfg.out + ending)) as f:
                write(f, runs, cfg)
            written.append(str(path))
    except OSError as e:
        raise UserError(f"--out={cfg.out}: cannot be written ({e.strerror}); give another name") from None
    print(f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(written)}")


def load(word: str) -> Curves:
    """The run that a word names: an out_dir, or a metrics.jsonl. Raises UserError if nothing can be drawn of it."""
    path = Path(word)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = files.read(path, MOST_BYTES).splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a run's metrics: {e.strerror}") from None
    run = Curves("", {}, [r for line in lines if (r := metrics.parse_line(line))])
    if not any(run.points(key) for key in ("loss", "val_loss")):
        raise UserError(f"{path}: it has no losses of a run; fastgpt train writes them to OUT_DIR/metrics.jsonl")
    folder = path.resolve().parent
    run.name = folder.name if path.name == "metrics.jsonl" else path.stem
    try:
        found = files.read_json(folder / "config.json", files.DATA)
        run.settings = dict(found["settings"])
    except (OSError, ValueError, TypeError, KeyError):  # an older run, or somebody else's file: no settings to show
        run.settings = {}
    return run


def clean(text: Any) -> str:
    """A text for a legend: short, in one line."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return text if len(text) <= 40 else f"{text[:20]}...{text[-17:]}"


def legends(runs: list[Curves], most: int = 4) -> list[str]:
    """The runs' names, each with those of its settings that differ among the runs."""
    keys = [k for k in dict.fromkeys(k for run in runs for k in run.settings) if k not in ALIKE]
    differ = [k for k in keys if len({repr(run.settings.get(k)) for run in runs if run.settings}) > 1]
    found = []
    for run in runs:
        said = [f"{clean(k)}={clean(run.settings[k])}" for k in differ[:most] if k in run.settings]
        said += ["..."] * (bool(said) and len(differ) > most)
        found.append(f"{run.name}: {', '.join(said)}" if said else run.name)
    return found


def write_picture(file: Any, runs: list[Curves], cfg: PlotConfig) -> None:
    """Write the PNG: losses against iterations, tokens and hours; then the rest against one of them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter
    from PIL import Image  # which matplotlib needs, too

    with warnings.catch_warnings(), rc_context({"text.parse_math": False}):  # a name is no formula
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font lacks
        figure = Figure(figsize=(13, 7.5), dpi=100, layout="constrained")
        panels = figure.subplots(2, 3)
        handles = []
        for i in range(len(runs)):
            handles.append(Line2D([], [], marker=MARKERS[i % len(MARKERS)], ms=5, **style(i)))
        for axes, x in zip(panels[0], X_LABELS, strict=True):
            draw_losses(axes, runs, x, cfg.smooth)
        for axes, (key, label) in zip(panels[1], PANELS.items(), strict=True):
            for i, run in enumerate(runs):
                draw(axes, thinned(run.points(key)), cfg.x, i, lw=1.2)
            axes.set(xlabel=X_LABELS[cfg.x], ylabel=label)
        for axes in panels.flat:
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep="") if "tokens" in axes.get_xlabel() else ScalarFormatter())
            if not axes.lines:
                axes.text(0.5, 0.5, "no records", ha="center", va="center", transform=axes.transAxes, color="gray")
        figure.legend(
            handles, [f" {text}" for text in legends(runs)], loc="outside upper left", ncols=1 if len(runs) < 4 else 2,
            fontsize=9, handlelength=4, title=clean(cfg.title) or None, alignment="left", frameon=False,
        )  # fmt: skip
        for axes, x in zip(panels[0], X_LABELS, strict=True):
            label_losses(figure, axes, runs, x)
        figure.savefig(drawn := io.BytesIO(), format="png")
    Image.open(drawn).convert("RGB").quantize(128).save(file, format="png", optimize=True)  # a third of the size


def style(i: int) -> dict[str, Any]:
    """Colour and dashes of run i."""
    dashes = DASHES[i % len(DASHES)]
    return dict(color=COLORS[i % len(COLORS)], linestyle=(0, dashes) if dashes else "-")


def draw(axes: Any, points: list[Point], x: str, i: int, **how: Any) -> None:
    """Draw points of run i, those that have such an x."""
    points = [p for p in points if getattr(p, x) is not None]
    if points:
        axes.plot([getattr(p, x) for p in points], [p.value for p in points], **{**style(i), **how})


def draw_losses(axes: Any, runs: list[Curves], x: str, smooth: float) -> None:
    """Draw the training losses, faint as they are and smoothed, and the evaluations as points."""
    tops = []
    for i, run in enumerate(runs):
        losses, evaluations = run.points("loss"), run.points("val_loss")
        calm = smoothed(losses, smooth)
        draw(axes, thinned(losses), x, i, lw=0.6, alpha=0.25, linestyle="-")
        draw(axes, thinned(calm), x, i, lw=1.3)
        draw(axes, thinned(evaluations), x, i, lw=0, marker=MARKERS[i % len(MARKERS)], ms=5)
        tops += [p.value for p in calm[len(calm) // 20 :][:1]] + [p.value for p in evaluations[1:2]]
    bottom, top = axes.get_ylim()
    if tops and max(tops) > bottom:  # the first losses are far above all others
        axes.set_ylim(bottom, min(top, max(tops) + 0.05 * (max(tops) - bottom)))
    axes.set(xlabel=X_LABELS[x], ylabel="loss (nats per token)")


def label_losses(figure: Any, axes: Any, runs: list[Curves], x: str) -> None:
    """Write each run's last val loss (or else training loss) at the end of its curve, if there are few runs."""
    ends = []
    for i, run in enumerate(runs):
        points = [p for p in run.points("val_loss") or run.points("loss") if getattr(p, x) is not None]
        if points:
            name = run.name if len(run.name) < 15 else f"{run.name[:4]}…{run.name[-9:]}"
            ends.append(
                (getattr(points[-1], x), points[-1].value, f"{points[-1].value:.4g} {name}", COLORS[i % len(COLORS)])
            )
    if 0 < len(ends) <= MOST_LABELS:
        label_ends(figure, axes, ends)


def write_page(file: Any, runs: list[Curves], cfg: PlotConfig) -> None:
    """Write the HTML file: plot.html with the runs in it."""
    data = []
    for i, (run, legend) in enumerate(zip(runs, legends(runs), strict=True)):
        losses = run.points("loss")
        curves = {key: thinned(run.points(key)) for key in ("val_loss", *PANELS)}
        curves |= {"loss": thinned(losses), "smooth": thinned(smoothed(losses, cfg.smooth))}
        short = {key: [[rounded(v) for v in p] for p in points] for key, points in curves.items()}
        dash = " ".join(map(str, DASHES[i % len(DASHES)]))
        data.append(
            dict(
                name=run.name,
                legend=legend,
                color=COLORS[i % len(COLORS)],
                dash=dash,
                marker=MARKERS[i % len(MARKERS)],
                curves=short,
            )
        )
    page = Path(__file__).with_name("plot.html").read_text(encoding="utf-8")
    held = json.dumps(dict(title=clean(cfg.title), x=cfg.x, runs=data), allow_nan=False, separators=(",", ":"))
    # A name may hold "</script>": in JSON "<" can be written otherwise.
    file.write(page.replace("{{RUNS}}", held.replace("<", "\\u003c")).encode())


def rounded(value: float | None) -> float | None:
    """A number with six digits, which are more than can be seen."""
    return value if value is None or value == math.floor(value) else float(f"{value:.6g}")
