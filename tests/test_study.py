"""`fastgpt study`: many small runs that a kill does not lose, their statistics, and a page made of them."""

import json
import math
import pickle
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fastgpt import study, study_page
from fastgpt.config import StudyConfig, own_environment
from fastgpt.study_page import Results

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/initialization.md", ROOT / "docs/initialization"
TINY = dict(
    n_embd=8, n_head=2, block_size=8, batch_size=2, iters=60, eval_iters=2, seeds=2, depths="1", learning_rates="0.01"
)
FLAGS = ["--out=s", "--schemes=nanogpt", "--processes=1", *(f"--{k}={v}" for k, v in TINY.items())]


@pytest.fixture
def corpus(workdir):
    """A small text in place of the embedded one, which takes seconds to prepare."""
    folder = workdir / "data/python-stdlib"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (np.arange(500) // 3 % 26).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 26}))
    return folder


@pytest.fixture
def here(monkeypatch):
    """Runs happen in this process: a new one imports PyTorch first."""

    def run_all(cfg, todo, processes):
        return [study.run_to_file(cfg, *one) for one in todo]

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(study, "expected_seconds", lambda cfg, todo: 100.0 * len(todo))


def run_files():
    return {path.name: path.read_bytes() for path in Path("s/runs").glob("*.json")}


def vals(found):
    return {name: json.loads(held)["val"] for name, held in found.items()}


def test_a_study_runs_what_is_missing(fastgpt, corpus, here):
    status, out, err = fastgpt("study", *FLAGS)
    assert (status, err) == (0, "")
    assert "4 runs of 60 updates, 0 of them done before\nthe others take about 7 minutes of one core" in out
    whole = run_files()
    assert len(whole) == 4
    assert len(set(vals(whole).values())) == 4
    torn, lost, *kept = sorted(whole)
    Path("s/study.json").unlink()
    Path(f"s/runs/{torn}").write_bytes(whole[torn][:50])
    Path(f"s/runs/{lost}").unlink()
    status, out, _ = fastgpt("study", *FLAGS)
    assert "4 runs of 60 updates, 2 of them done before" in out
    assert vals(run_files()) == vals(whole)
    assert all(run_files()[name] == whole[name] for name in kept)
    assert {p.name for p in Path("s").glob("study.*")} == {"study.json", "study.md", "study.png"}
    # What study.json has needs no files of the runs: a checkout of the source has none.
    for path in Path("s/runs").iterdir():
        path.unlink()
    assert "4 runs of 60 updates, 4 of them done before" in fastgpt("study", *FLAGS)[1]
    # More seeds and settings join the same results; other shapes do not.
    assert fastgpt("study", *FLAGS, "--seeds=3", "--schemes=no_rescale", "--activations=relu", "--warmups=0")[0] == 0
    results = Results(Path("s/study.json"))
    assert {k: len(r) for k, r in results.runs.items()} == {
        ("nanogpt", 1, "gelu", 0.01, 0): 2, ("nanogpt", 1, "gelu", 0.01, 20): 2, ("no_rescale", 1, "relu", 0.01, 0): 3
    }  # fmt: skip
    status, _, err = fastgpt("study", *FLAGS, "--iters=61")
    assert status == 2
    assert "s: its runs have iters=60, not 61; give another --out, or --iters=60" in err


def test_runs_differ_in_what_they_compare_alone(corpus):
    """The first loss is that of weights and first batch: it changes with what changes these."""

    def run(seed=1, **changes):
        setting = study.Setting(1, "nanogpt", "gelu", 0.01, 20)._replace(**changes)
        return study.run(study.train_config(StudyConfig(**TINY), setting, seed))

    base, *others = (
        run(),
        run(lr=0.02),
        run(warmup=0),
        run(scheme="pytorch"),
        run(activation="relu"),
        run(depth=2),
        run(seed=2),
    )
    assert [r["first"] == base["first"] for r in others] == [True, True, False, False, False, False]
    assert len({r["val"] for r in (base, *others)}) == 7
    assert {k: v for k, v in run().items() if k != "seconds"} == {k: v for k, v in base.items() if k != "seconds"}


def test_a_plan_runs_nothing(fastgpt, corpus):
    status, out, _ = fastgpt("study", *FLAGS, "--plan")
    assert status == 0
    assert re.search(r"the others take about \d+ s of one core", out)
    assert not Path("s").exists()


@pytest.mark.slow
def test_a_study_goes_on_after_a_kill(corpus):
    """kill -9 of the command: its worker ends too, what is done stays, and the rest is what an undisturbed study gives."""
    command = [sys.executable, "-m", "fastgpt.cli", "study", *FLAGS, "--seeds=8"]
    process = subprocess.Popen(command, env=own_environment(), stdout=subprocess.DEVNULL)
    try:
        for _ in range(3000):
            if Path("s/runs").is_dir() and run_files():
                break
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert any(alive(pid) for pid in children)
    finally:
        process.kill()
    process.wait()
    for _ in range(100):
        if not any(alive(pid) for pid in children):
            break
        time.sleep(0.1)
    assert not any(alive(pid) for pid in children)
    before = run_files()
    assert 0 < len(before) < 16
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"16 runs of 60 updates, {len(before)} of them done before" in done.stdout
    after = run_files()
    assert len(after) == 16
    assert {name: after[name] for name in before} == before
    held = json.loads(after[max(after.keys() - before.keys())])
    setting = study.Setting(*(held[k] for k in study.Setting._fields))
    assert study.run(study.train_config(StudyConfig(**TINY), setting, held["seed"]))["val"] == held["val"]


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--schemes=nanogpt,norescale"], "there is no 'norescale'; the nearest is 'no_rescale'"),
        (["--activations=gelu_tan"], "there is no 'gelu_tan'; the nearest is 'gelu_tanh'"),
        (["--learning_rates=0.1,nan"], "'nan' is not such a number"),
        (["--depths=0"], "'0' is not such a number"),
        (["--warmups=1.5"], "'1.5' is not such a number"),
        (["--n_head=3"], "--n_head=3 does not divide n_embd=8"),
        (["--depths=" + ",".join(map(str, range(1, 1000))), "--seeds=1000"], "runs are more than 100,000"),
        (["--page=nothing.md"], "--page=nothing.md: cannot be read"),
    ],
)
def test_bad_input_is_one_line(fastgpt, workdir, flags, says):
    status, _, err = fastgpt("study", *FLAGS, *flags)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


def test_students_t():
    """The table holds 95% of the density, integrated here."""
    for df, t in enumerate(study_page.T95, 1):
        scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        x = np.linspace(-t, t, 200_001)
        y = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
        assert np.trapezoid(y, x) == pytest.approx(0.95, abs=1e-4), df
    values = [1.0, 2.0, 4.0, 5.0, 8.0]
    assert study_page.interval(values) == (4.0, pytest.approx(2.776 * statistics.stdev(values) / 5**0.5))


def write_results(vals, path="study.json"):
    """A study.json with these val losses: {(scheme, warm-up): [by seed]}."""
    shape = dict(iters=5, n_head=1, n_embd=4, block_size=2, batch_size=3, eval_iters=7)
    runs = [
        dict(shape=shape, where="a CPU", depth=12, scheme=s, activation="gelu", lr=0.01, warmup=w, seed=i, val=v, norm=v)
        for (s, w), many in vals.items() for i, v in enumerate(many, 1)
    ]  # fmt: skip
    Path(path).write_text(json.dumps({"runs": runs}))
    return Results(Path(path))


def test_losses_are_compared_seed_by_seed(workdir):
    """Seeds vary far more than the difference, which is nearly the same in each."""
    results = write_results({
        ("nanogpt", 20): [1.0, 2.0, 3.0], ("nanogpt", 0): [1.1, 2.2, 3.3],
        ("no_rescale", 20): [1.5, 2.5, 3.5], ("no_rescale", 0): [1.5, None, 3.5],
    })  # fmt: skip
    text = study_page.table(results, 12, "gelu", 0.01)
    assert text.splitlines()[3:] == [
        "| `nanogpt` | 2.000 ± 2.484 | 2.200 ± 2.733 | +0.200 ± 0.248 |  |  | 3 / 3.3 |",
        "| `no_rescale` | 2.500 ± 2.484 | 1 of 3 not finite | 1 of 3 not finite | +0.500 ± 0.000 | 1 of 3 not finite | 3.5 / 3.5 |",
    ]
    assert study_page.draw(results) == study_page.draw(results)


def test_the_page_is_made_of_the_stored_results(fastgpt, workdir):
    """Byte for byte: every figure that is lost comes again."""
    text = PAGE.read_text()
    marks = study_page.MARK.findall(text)
    assert len(marks) > 20
    # In Markdown a line that begins with a comment is HTML: such a mark must stand by itself.
    assert not re.search(r"^ *<!--= [^\n]*-->[^\n<]", text, re.MULTILINE)
    emptied = study_page.MARK.sub(r"\1\3", text)
    assert len(emptied) < len(text) - 1000
    Path("page.md").write_text(emptied)
    status, out, _ = fastgpt("study", "--page=page.md", f"--out={RESULTS}")
    assert status == 0
    assert Path("page.md").read_bytes() == PAGE.read_bytes()
    assert "figures" in out
    assert "changed" in out
    assert "as they were" in fastgpt("study", "--page=page.md", f"--out={RESULTS}")[1]


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("valu x", "there is no 'valu'; the nearest is 'value'"),
        ("value nothing.json a", "nothing.json: cannot be read"),
        ("loss nanogpt", "no such figure"),
        ("value study.json runs/99", "no such figure"),
        ("table 12", "no such figure"),
    ],
)
def test_a_mark_that_says_nothing_is_refused(fastgpt, workdir, mark, says):
    write_results({("nanogpt", 0): [1.0, 2.0]})
    page = f"x <!--= {mark} -->old<!--/--> y"
    Path("page.md").write_text(page)
    status, _, err = fastgpt("study", "--page=page.md", "--out=.")
    assert status == 2
    assert says in err
    assert Path("page.md").read_text() == page
