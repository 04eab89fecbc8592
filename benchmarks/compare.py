"""`fastgpt bench compare`: two result files of one machine, case by case; exit status 1 where the second is slower.

A case is slower when its median grew by more than the threshold and by more than the noise, and the middle halves of its rounds do
not meet: a lone slow round is no regression. Beside it stand its ratios to the baseline of its own run: a machine that is in another
mood slows the baseline down as well, and leaves these as they were.
"""

from fastgpt.benchmarks.report import load, newest, short
from fastgpt.config import UserError


def newest_two(root):
    """Paths of the newest two results of one GPU below root, or without any of one CPU, the older first. Raises UserError where there
    are fewer."""
    paths = newest(root, 2) or newest(root, 2, "cpu")
    if len(paths) < 2:
        raise UserError(
            f"{root}: there are no two results of one GPU to compare; run `fastgpt bench`, or name two files"
        )
    return paths[1], paths[0]


def slower(a, b, threshold, ratio=None):
    """Whether b is slower than a, by the stats of two benchmarks; ratio is b's ratio to its baseline over a's, where both have one."""
    least = max(threshold, noise(a, b))
    return (
        b["median"] / a["median"] > 1 + least and b["q1"] > a["q3"] and (ratio is None or ratio < 1 / (1 + threshold))
    )


def to_baseline(benchmark):
    """A benchmark's ratio to the baseline that was measured beside it; None of the baseline itself."""
    info = benchmark["extra_info"]
    return None if info.get("baseline") else info.get("ratio_to_compiled") or info.get("ratio_to_baseline")


def noise(a, b):
    """Relative half-widths of the middle halves of two benchmarks, combined."""
    return sum(((s["q3"] - s["q1"]) / 2 / s["median"]) ** 2 for s in (a, b)) ** 0.5


def compare(a_path, b_path, threshold):
    """Print the cases of result A beside those of result B: 1 where one is slower in B or missing from it, else 0.

    `threshold`: relative growth of the median from which a case is slower, such as 0.05. Raises UserError for results of
    different GPUs or devices, of a quick run and a full one, and without a case in common.
    """
    a, b = load(a_path), load(b_path)
    for key, what in (("gpu", "GPUs"), ("device", "devices"), ("quick", "kinds of run (quick)")):
        one, other = a["fastgpt"].get(key), b["fastgpt"].get(key)
        if one != other:
            raise UserError(f"{a_path} and {b_path} do not compare: they are of different {what}, {one} and {other}")
    olds, news = ({x["fullname"]: x for x in result["benchmarks"]} for result in (a, b))
    both = [name for name in olds if name in news]
    if not both:
        raise UserError(f"{a_path} and {b_path} have no case in common")

    width = max(len(short(name)) for name in both)
    print(f"A: {a_path}\nB: {b_path}\n")
    print(f"{'case':{width}}{'A ms':>11}{'B ms':>11}{'B/A':>8}{'noise':>9}  verdict  to the baseline, A and B")
    found = {"slower": [], "faster": [], "same": []}
    for name in both:
        # The batch size that an arm is fastest with may be another than it was: times are of A's.
        batches = [x[name]["extra_info"].get("batch_size") or 1 for x in (olds, news)]
        old, new = olds[name]["stats"], news[name]["stats"]
        new = {key: new[key] * batches[0] / batches[1] for key in ("median", "q1", "q3")}
        ratios = [to_baseline(x[name]) for x in (olds, news)]
        says = "slower" if slower(old, new, threshold) else "faster" if slower(new, old, threshold) else "same"
        found[says].append(short(name))
        words = "  ".join(f"{r:.3f}x" if r else "-" for r in ratios) if any(ratios) else ""
        a_ms, b_ms = old["median"] * 1e3, new["median"] * 1e3
        times = f"{a_ms:11.4f}{b_ms:11.4f}{b_ms / a_ms:8.3f}{noise(old, new):9.1%}"
        print(f"{short(name):{width}}{times}  {says:7}  {words}".rstrip())
    missing = [name for name in olds if name not in news]
    for name in missing:
        why = [x.get("why") for x in b["fastgpt"].get("left_out") or [] if x["name"] == short(name)]
        print(f"missing from B: {short(name)}: {why[0] if why else 'no reason given'}")
    for name in news:
        if name not in olds:
            print(f"only in B: {short(name)}")
    counts = ", ".join(f"{len(names)} {says}" for says, names in found.items())
    worse = found["slower"] + [short(name) for name in missing]
    print(f"\n{counts}, {len(missing)} missing, at a threshold of {threshold:.1%}", *worse, sep="\n  ")
    return 1 if worse else 0
