"""What a study's results say: means with 95% confidence intervals as Markdown, a plot, and the figures between the marks of a page.

A mark in a page is `<!--= WORDS -->TEXT<!--/-->`. `fastgpt study --page=FILE --out=FOLDER` writes each TEXT anew from the results in
FOLDER, as the words say (FIGURES). So a page's figures are never typed, and the same results give the same bytes.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastgpt import files, init
from fastgpt.config import UserError
from fastgpt.depth import figure, png
from fastgpt.parse import close
from fastgpt.plot import COLORS, MARKERS

MARK = re.compile(r"(<!--= (.+?) -->).*?(<!--/-->)", re.DOTALL)

# Student's t that 95% of the values are within, for 1 to 30 degrees of freedom. For more than 30 the last one is a little too wide.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95% confidence interval) of at least two values."""
    t = T95[min(len(values) - 1, 30) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


class Results:
    """The runs in a study.json, by setting and seed."""

    def __init__(self, path: Path):
        held = read_json(path)
        try:
            self.shape = dict(held["runs"][0]["shape"])
            self.where = sorted({r["where"] for r in held["runs"]})
            self.runs: dict[tuple, dict[int, dict[str, Any]]] = {}
            for r in held["runs"]:
                key = r["scheme"], r["depth"], r["activation"], r["lr"], r["warmup"]
                self.runs.setdefault(key, {})[r["seed"]] = r
        except (TypeError, KeyError, IndexError) as e:
            raise UserError(f"{path}: not the results of a study ({type(e).__name__}: {e})") from None

    def values(self, key: tuple, what: str = "val") -> list[float | None]:
        """A value of each seed."""
        return [r[what] for _, r in sorted(self.runs.get(key, {}).items())]

    def over_all(self, of: Callable, what: str, form: str) -> str:
        """A mean, or a greatest value, of all runs."""
        return format(of(r[what] for runs in self.runs.values() for r in runs.values()), form)

    def differences(self, key: tuple, other: tuple) -> list[float | None]:
        """The val loss less that of another setting, seed by seed."""
        a, b = self.runs.get(key, {}), self.runs.get(other, {})
        pairs = ((a[seed]["val"], b[seed]["val"]) for seed in sorted(a.keys() & b.keys()))
        return [None if x is None or y is None else x - y for x, y in pairs]


def said(values: list[float | None], sign: str = "") -> str:
    """Mean and interval as text. Where runs are not finite, how many."""
    if not values:
        return "-"
    finite = [v for v in values if v is not None]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} not finite"
    if len(values) < 2:
        return f"{finite[0]:{sign}.3f}, one run"
    mean, half = interval(finite)
    return f"{mean:{sign}.3f} ± {half:.3f}"


def table(results: Results, depth: int, activation: str, lr: float) -> str:
    """A Markdown table of all schemes and warm-ups at one depth, activation and learning rate."""
    keys = [k for k in results.runs if k[1:4] == (depth, activation, lr)]
    warmups = sorted({k[4] for k in keys}, reverse=True)
    schemes = [s for s in init.SCHEMES if any(k[0] == s for k in keys)]
    head = ["scheme", *(f"val loss, {spoken(w)}" for w in warmups)]
    if len(warmups) == 2:
        head.append("what leaving out warm-up adds")
    head += [f"less nanogpt's, {spoken(w)}" for w in warmups]
    head.append("largest gradient norm, " + " / ".join(map(spoken, warmups)))
    rows = []
    for s in schemes:
        of = {w: (s, depth, activation, lr, w) for w in warmups}
        row = [f"`{s}`", *(said(results.values(of[w])) for w in warmups)]
        if len(warmups) == 2:
            row.append(said(results.differences(of[warmups[1]], of[warmups[0]]), "+"))
        row += [
            "" if s == "nanogpt" else said(results.differences(of[w], ("nanogpt", *of[w][1:])), "+") for w in warmups
        ]
        norms = ([v for v in results.values(of[w], "norm") if v is not None] for w in warmups)
        row.append(" / ".join(f"{max(v):.3g}" if v else "-" for v in norms))
        rows.append(row)
    return markdown(head, rows)


def spoken(warmup: int) -> str:
    """A warm-up, in words."""
    return f"warm-up {warmup}" if warmup else "none"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, with a line before and after."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n" + "\n".join(lines) + "\n"


def all_tables(results: Results) -> str:
    """Every table of a study, with titles: study.md."""
    parts = [f"{about(results)}\n"]
    for depth, activation, lr in sorted({k[1:4] for k in results.runs}):
        parts.append(f"\n{depth} blocks, {activation}, learning rate {lr:g}:\n{table(results, depth, activation, lr)}")
    return "".join(parts)


def about(results: Results) -> str:
    """What was run, in a sentence or two."""
    s, n = results.shape, sum(map(len, results.runs.values()))
    seeds = [len(r) for r in results.runs.values()]
    each = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    return (
        f"{n} runs of {s['iters']} updates, {each} seeds of each setting: width {s['n_embd']}, {s['n_head']} heads, "
        f"{s['batch_size']} x {s['block_size']} tokens an update, {s['eval_iters'] * s['batch_size'] * s['block_size']:,} held-out tokens. "
        f"On {'; '.join(results.where)}."
    )


def draw(results: Results) -> bytes:
    """A PNG of val losses with their intervals: a panel for each depth and learning rate, schemes beside each other."""
    panels = sorted({(k[1], k[3]) for k in results.runs})
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    f = figure(6.5 * columns, 0.6 + 3.6 * rows)
    axes_of = [f.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
    warmups = sorted({k[4] for k in results.runs}, reverse=True)
    for axes, (depth, lr) in zip(axes_of, panels, strict=True):
        kinds = list(dict.fromkeys((k[0], k[2]) for k in results.runs if (k[1], k[3]) == (depth, lr)))
        kinds.sort(key=lambda k: (list(init.SCHEMES).index(k[0]), k[1]))
        for j, warmup in enumerate(warmups):
            for i, (scheme, activation) in enumerate(kinds):
                values = [v for v in results.values((scheme, depth, activation, lr, warmup)) if v is not None]
                if len(values) < 2:
                    continue
                mean, half = interval(values)
                y = i + 0.22 * (j - (len(warmups) - 1) / 2)
                color = COLORS[j % len(COLORS)]
                label = spoken(warmup).replace("none", "no warm-up") if i == 0 else None
                axes.plot(values, [y] * len(values), "|", color=color, ms=5, alpha=0.5)
                axes.errorbar(
                    mean, y, xerr=half, fmt=MARKERS[j % len(MARKERS)], color=color, ms=6, capsize=3, label=label,
                    mfc="white" if j else color,
                )  # fmt: skip
        names = [scheme if activation == "gelu" else f"{scheme}, {activation}" for scheme, activation in kinds]
        axes.set_yticks(range(len(kinds)), names)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set(title=f"{depth} blocks, learning rate {lr:g}", xlabel="val loss (nats per token)")
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize=8)
    return png(f)


# ---- a page's figures ----


def find(held: Any, path: list[str]) -> Any:
    """What stands at a path in JSON. Of a list a word `key=value` takes the first dict that has it, and a number that place."""
    for word in path:
        if isinstance(held, list) and "=" in word:
            key, _, value = word.partition("=")
            held = next(x for x in held if str(x[key]) == value)
        else:
            held = held[int(word)] if isinstance(held, list) else held[word]
    return held


def setting(name: str) -> tuple:
    """The key of a setting's name, as nanogpt-L12-gelu-lr0.01-w20."""
    scheme, depth, activation, lr, warmup = re.fullmatch(r"(.+)-L(\d+)-(.+)-lr(.+)-w(\d+)", name).groups()  # type: ignore[union-attr]
    return scheme, int(depth), activation, float(lr), int(warmup)


def value(folder: Path, file: str, path: str, form: str = "") -> str:
    """A value in a JSON file, by its path with slashes."""
    return format(find(read_json(folder / file), path.split("/")), form)


def ratio(folder: Path, file: str, path: str, other: str, form: str = ".2f") -> str:
    """A value in a JSON file over another."""
    held = read_json(folder / file)
    return format(find(held, path.split("/")) / find(held, other.split("/")), form)


def rescaled(folder: Path, file: str) -> str:
    """The table of the stream at several depths, with and without the rescale."""
    rows = []
    for r in read_json(folder / file)["signals"]["rescale"]:
        first, end, predicted = r["measured"][0], r["measured"][-1], r["predicted"][-1]
        rows.append(
            [
                str(r["depth"]),
                f"`{r['scheme']}`",
                f"{first:.4f}",
                f"{end:.4f}",
                f"{predicted:.4f}",
                f"{end / first:.2f}",
            ]
        )
    return markdown(["blocks", "scheme", "embedding", "end", "predicted end", "end / embedding"], rows)


def groups(folder: Path, file: str) -> str:
    """The table of a model's parameters: rule, expected and measured standard deviation and mean."""
    rows = []
    for g in read_json(folder / file)["groups"]:
        rows.append([
            f"`{g['name']}`", f"{g['numbers']:,}", g["rule"], f"{g['expected_std']:.6f}", f"{g['std']:.6f} ± {g['std_error']:.0e}",
            f"{g['mean']:.1e} ± {g['mean_error']:.0e}",
        ])  # fmt: skip
    return markdown(["parameter", "numbers", "rule", "expected std", "measured std", "measured mean"], rows)


def by_activation(results: Results, depth: int, lr: float) -> str:
    """A Markdown table of nanoGPT's scheme with each activation."""
    keys = [k for k in results.runs if (k[0], k[1], k[3]) == ("nanogpt", depth, lr)]
    warmups = sorted({k[4] for k in keys}, reverse=True)
    rows = []
    for activation in dict.fromkeys(k[2] for k in keys):
        of = [("nanogpt", depth, activation, lr, w) for w in warmups]
        less = [said(results.differences(k, (*k[:2], "gelu", *k[3:])), "+") if activation != "gelu" else "" for k in of]
        rows.append([f"`{activation}`", *(said(results.values(k)) for k in of), *less])
    head = ["activation", *(f"val loss, {spoken(w)}" for w in warmups), *(f"less gelu's, {spoken(w)}" for w in warmups)]
    return markdown(head, rows)


# What the first word of a mark may be: it gives the text from the results' folder and the other words.
FIGURES: dict[str, Callable[..., str]] = {
    "value": value,
    "ratio": ratio,
    "rescale": rescaled,
    "groups": groups,
    "about": lambda folder: about(Results(folder / "study.json")),
    "table": lambda folder, depth, activation, lr: table(
        Results(folder / "study.json"), int(depth), activation, float(lr)
    ),
    "activations": lambda folder, depth, lr: by_activation(Results(folder / "study.json"), int(depth), float(lr)),
    "mean": lambda folder, *words: Results(folder / "study.json").over_all(statistics.fmean, *words),
    "most": lambda folder, *words: Results(folder / "study.json").over_all(max, *words),
    "loss": lambda folder, name: said(Results(folder / "study.json").values(setting(name))),
    "less": lambda folder, a, b: said(Results(folder / "study.json").differences(setting(a), setting(b)), "+"),
}


def read_json(path: Path) -> Any:
    """A file of results. Raises UserError."""
    try:
        return files.read_json(path, files.DATA)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None


def regenerated(text: str, folder: Path) -> str:
    """A page with the text between its marks made from the results in a folder. Raises UserError for a mark that says nothing."""

    def fill(mark):
        begin, words, end = mark.groups()
        name, *rest = words.split()
        if name not in FIGURES:
            raise UserError(f"the mark {begin}: there is no {name!r}; the nearest is {close(name, FIGURES, 0)!r}")
        try:
            return f"{begin}{FIGURES[name](folder, *rest)}{end}"
        except (TypeError, KeyError, IndexError, ValueError, AttributeError, StopIteration) as e:
            raise UserError(
                f"the mark {begin}: the results in {folder} have no such figure ({type(e).__name__}: {e})"
            ) from None

    return MARK.sub(fill, text)


def rewrite(page: Path, folder: Path) -> None:
    """Write a page's figures anew from the results in a folder."""
    try:
        old = files.read_text(page, files.DATA)
    except OSError as e:
        raise UserError(f"--page={page}: cannot be read ({e.strerror})") from None
    new = regenerated(old, folder)
    if new != old:
        files.write(page, new.encode(), "--page")
    print(f"{page}: {len(MARK.findall(new))} figures from {folder}, {'changed' if new != old else 'as they were'}")


def write_all(out: Path) -> None:
    """Write study.png and study.md beside a study.json."""
    results = Results(out / "study.json")
    files.write(out / "study.png", draw(results), "--out")
    files.write(out / "study.md", all_tables(results).encode(), "--out")
    print(f"results: {out / 'study.json'}, {out / 'study.png'}, {out / 'study.md'}")
    print(all_tables(results), end="")
