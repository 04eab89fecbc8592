"""`fastgpt bench compare`: two result files of one machine, case by case; exit status 1 where the second is slower.

A case is slower when its median grew by more than the threshold and by more than the noise, and the middle halves of its rounds do not
meet: one slow round is no regression. Beside a case stand its ratios to the baseline of its own run. Where the whole machine is slower,
the baseline is too, and these ratios stay.
"""

from pydantic import Field

from fastgpt.benchmarks.report import RESULTS, load, newest, short
from fastgpt.config import PathText, Settings, UserError


class CompareConfig(Settings):
    """Compare two result files, given by path, else the newest two of the newest GPU, case by case."""

    EXAMPLES = ["fastgpt bench compare", "fastgpt bench compare before.json after.json --threshold=0.1"]

    threshold: float = Field(0.05, ge=0, description="how much slower is too slow: 0.05 is five percent")
    out: PathText = Field(RESULTS, description="folder of the results")


def run(cfg, files):
    """Compare two files, or without any the newest two: the exit status. Raises UserError."""
    if len(files) not in (0, 2):
        raise UserError("bench compare: give two result files, or none for the newest two")
    return compare(*(files or newest_two(cfg.out)), cfg.threshold)


def newest_two(root):
    """Paths of the newest two results of one GPU below root, or without any of one CPU, the older first. Raises UserError."""
    paths = newest(root, 2) or newest(root, 2, "cpu")
    if len(paths) < 2:
        raise UserError(
            f"{root}: there are no two results of one GPU to compare; run `fastgpt bench`, or name two files"
        )
    return paths[1], paths[0]


def noise(a, b):
    """Relative half-widths of the middle halves of two benchmarks' rounds, combined."""
    return sum(((s["q3"] - s["q1"]) / 2 / s["median"]) ** 2 for s in (a, b)) ** 0.5


def slower(a, b, threshold):
    """Whether b is slower than a, by the stats of two benchmarks."""
    return b["median"] / a["median"] > 1 + max(threshold, noise(a, b)) and b["q1"] > a["q3"]


def compare(a_path, b_path, threshold):
    """Print the cases of result A beside those of result B: 1 where one is slower in B or missing from it, else 0.

    threshold: relative growth of the median from which a case is slower, such as 0.05. Raises UserError for results of different GPUs
    or devices, of a quick run and a full one, and without a common case.
    """
    a, b = load(a_path), load(b_path)
    for key, what in (("gpu", "GPUs"), ("device", "devices"), ("quick", "kinds of run (quick)")):
        one, other = a["fastgpt"].get(key), b["fastgpt"].get(key)
        if one != other:
            raise UserError(f"{a_path} and {b_path} do not compare: they are of different {what}, {one} and {other}")
    olds, news = ({short(x["fullname"]): x for x in result["benchmarks"]} for result in (a, b))
    both = [name for name in olds if name in news]
    if not both:
        raise UserError(f"{a_path} and {b_path} have no case in common")
    width, found = max(map(len, both)), {"slower": [], "faster": [], "same": []}
    print(f"A: {a_path}\nB: {b_path}\n")
    print(f"{'case':{width}}{'A ms':>11}{'B ms':>11}{'B/A':>8}{'noise':>9}  verdict  ratio to the baseline in A, in B")
    for name in both:
        old, new = olds[name]["stats"], news[name]["stats"]
        infos = olds[name]["extra_info"], news[name]["extra_info"]
        says = "slower" if slower(old, new, threshold) else "faster" if slower(new, old, threshold) else "same"
        found[says].append(name)
        ratios = "  ".join(f"{i['ratio'][0]:.3f}x" for i in infos if i.get("ratio") and not i.get("baseline"))
        times = old["median"] * 1e3, new["median"] * 1e3
        print(
            f"{name:{width}}{times[0]:11.4f}{times[1]:11.4f}{times[1] / times[0]:8.3f}{noise(old, new):9.1%}  {says:7}  {ratios}".rstrip()
        )
    missing = [name for name in olds if name not in news]
    reasons = {x["name"]: x.get("why") for x in b["fastgpt"].get("left_out") or []}
    for name in missing:
        print(f"missing from B: {name}: {reasons.get(name) or 'no reason given'}")
    for name in news.keys() - olds.keys():
        print(f"only in B: {name}")
    counts = ", ".join(f"{len(names)} {says}" for says, names in found.items())
    worse = found["slower"] + missing
    print(f"\n{counts}, {len(missing)} missing, at a threshold of {threshold:.1%}", *worse, sep="\n  ")
    return 1 if worse else 0
