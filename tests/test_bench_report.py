"""The benchmarks' report, comparison and README block, on result files made up here."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from results import SHAPE, benchmark, everything, op, step, write_result

from fastgpt.benchmarks import report
from fastgpt.benchmarks.compare import compare, newest_two
from fastgpt.config import UserError

ROOT = Path(__file__).parents[1]


def test_report_holds_the_numbers_of_the_file(tmp_path):
    path = write_result(tmp_path, everything(), day=2)
    page = report.write(path)
    text = page.read_text()
    assert page == path.with_suffix(".md")
    for words in (
        "NVIDIA H200, driver 575.51", "python 3.12.1, torch 2.13.0, cudnn -", "2026-07-02 12:00 UTC", "abcdef1-dirty",
        "431 s, of a budget of 480 s", "sm_mhz 1,950 (1,755–1,980)", "power_w 655 (310–699)", "790.00 TFLOP/s in bfloat16, 4.30 TB/s",
        "cudnn_sdpa_sm90", "12 ops by cuda graph", "8 steps by wall clock", "### gpt2 B=32 x 4, T=1024, bfloat16",
        "| **fastgpt** | 32 | 78.74 | 1,664,614 | 54.9% | - | 12.35 | 321 | 1.27x (1.25–1.30) |",
        "| compiled | 32 | 100.00 | 1,310,720 | 43.2% | - | 12.35 | 321 | baseline |",
        "| B=32 T=1024 n_embd=768 n_head=12 | train | bfloat16 | **fastgpt** | 0.3150 | 456.70 | 2,345 | 76% | 34.5 | 1.27x (1.26–1.28) |",
        "- not &lt;installed>: attention forward liger, attention train liger", "- `cudnn_sdpa`: fastgpt, pytorch\n",
    ):  # fmt: skip
        assert words in text, words
    assert "CPU" not in text
    for name in ("steps", "ops"):
        assert f"]({path.stem}-{name}.png)" in text
        pixels = imread(path.with_name(f"{path.stem}-{name}.png"))
        assert 200 < len(pixels) < 5000
        assert 800 < len(pixels[0]) < 2000
        assert np.ptp(pixels[..., 0]) > 0.5, "something is drawn"


def test_the_report_names_the_strongest_peer_of_its_gpu_case_by_case(tmp_path):
    ahead = [op("layer_norm", "train", p) for p in ("compiled", "fastgpt", "liger", "eager")]
    alone = [op("embedding", "train", "fastgpt"), op("gelu_mlp", "train", "quack")]
    steps = [step(p) for p in ("compiled", "pytorch", "fastgpt")]
    text = report.write(write_result(tmp_path, [*ahead, *alone, *steps], gpu="NVIDIA H100")).read_text()
    begin = text.index("## The fastest others on NVIDIA H100")
    table = text[begin : text.index("## Steps")]
    assert begin < text.index("## Steps")
    for row in (
        "| gpt2, B=32 x 4, T=1024, bfloat16 | pytorch | 88.5 | fastgpt | 78.74 | 1.12x |",
        f"| layer_norm, {SHAPE}, train, bfloat16 | compiled | 0.4 | fastgpt | 0.315 | 1.27x |",
        f"| embedding, {SHAPE}, train, bfloat16 | - | - | fastgpt | 0.315 | - |",
        f"| gelu_mlp, {SHAPE}, train, bfloat16 | quack | 0.4444 | - | - | - |",
    ):
        assert row in table, row
    assert "Not equal" not in text


def test_the_report_says_who_was_not_equal(tmp_path):
    case = "layer_norm 32x1024x768 bfloat16"
    why = "is not equal at full size: dweight is 2 from PyTorch's"
    left_out = [dict(name=f"{case} {d} inductor", why=why) for d in ("forward", "train")]
    left_out += [
        dict(name="gelu_mlp 32x1024x768 bfloat16 train fastgpt", why="FAILED: Failed: is not equal: y"),
        dict(name=f"{case} train quack", why="quack needs a GPU"),
    ]
    text = report.write(write_result(tmp_path, everything(), left_out=left_out)).read_text()
    said, rest = text[text.index("## Not equal") :].split("## Steps")
    names = f"{case} forward inductor, {case} train inductor"
    known = "Inductor left gradients of LayerNorm's weights unwritten before (pytorch issue 193061)"
    assert f"- {why}; {known}: {names}" in said
    assert "- FAILED: Failed: is not equal: y: gelu_mlp" in said
    assert rest.endswith(f"## Left out\n\n- quack needs a GPU: {case} train quack\n")


def test_what_is_missing_is_a_dash_and_a_cpu_is_said_loudly(tmp_path):
    bare = [
        benchmark("a", 0.1, kind="step", provider="fastgpt"),
        benchmark("b", 0.1, kind="op", provider="fastgpt", shape=None),
    ]
    path = write_result(
        tmp_path, bare, device="cpu", gpu="EPYC", clocks=None, ceilings=None, versions=None, left_out=[], quick=True
    )
    text = report.write(path).read_text()
    assert "say nothing of a GPU" in text
    assert "A quick run" in text
    assert "| **fastgpt** | - | 100.00 | - | - | - | 12.35 | - | - |" in text
    assert not list(tmp_path.glob("*.png")), "there is nothing to draw"
    assert report.write(write_result(tmp_path, [], day=2)).is_file()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"benchmarks": []}',
        '{"datetime": "2026-07-01", "fastgpt": {"device": "cuda"}, "benchmarks": []}',
    ],
)
def test_a_foreign_or_damaged_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^.*a\.json: damaged.*$"):
        report.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        report.load(tmp_path / "none.json")


def test_newest_never_mixes_gpus_and_passes_over_cpus_and_damaged_files(tmp_path):
    old, h200, newer = (write_result(tmp_path / "h200", everything(), day) for day in (1, 2, 4))
    write_result(tmp_path / "h100", everything(), 3, gpu="NVIDIA H100")
    write_result(tmp_path / "cpu", everything(), 5, device="cpu", gpu="EPYC")
    (tmp_path / "h200" / "2026-08-01T0000-0000000.json").write_text("{")
    assert report.newest(tmp_path) == [newer]
    assert report.newest(tmp_path, 5) == [newer, h200, old]
    assert newest_two(tmp_path) == (h200, newer)
    write_result(tmp_path / "h100", everything(), 6, gpu="NVIDIA H100")
    assert [p.parent.name for p in report.newest(tmp_path, 9)] == ["h100", "h100"]
    assert report.newest(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="no two results"):
        newest_two(tmp_path / "cpu")


def test_a_planted_slowdown_is_named_and_a_gain_is_not_punished(tmp_path, capsys):
    a, b = write_result(tmp_path, everything(), 1), write_result(tmp_path, everything(fastgpt=1.3), 2)
    assert compare(a, b, 0.05) == 1
    out = capsys.readouterr().out
    assert out.endswith(
        "2 slower, 0 faster, 18 same, 0 missing, at a threshold of 5.0%\n  step gpt2 B=12 x 4 fastgpt\n  step gpt2 B=32 x 4 fastgpt\n"
    )
    row = next(line.split() for line in out.splitlines() if line.startswith("step gpt2 B=32 x 4 fastgpt"))
    assert row[6:] == ["78.7402", "102.3622", "1.300", "0.7%", "slower", "1.270x", "1.270x"]
    assert compare(b, a, 0.05) == 0
    assert "0 slower, 2 faster" in capsys.readouterr().out
    assert compare(a, a, 0.0) == 0
    assert compare(a, b, 0.31) == 0


def test_noise_is_no_slowdown(tmp_path, capsys):
    a = write_result(tmp_path, [benchmark("x", 0.100, 0.3, kind="op", provider="fastgpt")], 1)
    b = write_result(tmp_path, [benchmark("x", 0.120, 0.3, kind="op", provider="fastgpt")], 2)
    assert compare(a, b, 0.05) == 0
    assert "1 same" in capsys.readouterr().out


def test_a_missing_case_fails_with_its_reason_and_a_new_one_does_not(tmp_path, capsys):
    a = write_result(tmp_path, everything(), 1)
    gone = [dict(name="step gpt2 B=12 x 4 eager", why="out of memory")]
    b = write_result(tmp_path, everything()[:1] + everything()[2:], 2, left_out=gone)
    assert compare(a, b, 0.05) == 1
    assert "missing from B: step gpt2 B=12 x 4 eager: out of memory" in capsys.readouterr().out
    assert compare(b, a, 0.05) == 0
    assert "only in B: step gpt2 B=12 x 4 eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dict(gpu="NVIDIA H100"), "NVIDIA H200 and NVIDIA H100"),
        (dict(device="cpu"), "cuda and cpu"),
        (dict(quick=True), "False and True"),
        (dict(benchmarks=[step("eager", 99)]), "no case in common"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path, other, words):
    a = write_result(tmp_path, everything(), 1)
    b = write_result(tmp_path, **dict(benchmarks=everything(), day=2) | other)
    with pytest.raises(UserError, match=words):
        compare(a, b, 0.05)


def test_the_readme_block_is_written_in_place_and_again_the_same(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# x\n")
    with pytest.raises(UserError, match="no markers"):
        report.update_readme(readme, tmp_path)
    readme.write_text(f"# before\n{report.BEGIN}\n{report.END}\nafter\n")
    report.update_readme(readme, tmp_path)
    assert "Not measured on a GPU yet." in readme.read_text()

    write_result(tmp_path / "results" / "cpu", everything(), 2, device="cpu", gpu="EPYC")
    report.update_readme(readme, tmp_path)
    assert "Not measured on a GPU yet." in readme.read_text()

    path = write_result(tmp_path / "results" / "h200", everything(), 1)
    report.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith(f"# before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    row = "| gpt2 | B=32 x 4, T=1024, bfloat16 | 1,664,614 (fastgpt) | 1,310,720 | 1,481,114 (pytorch) | 1.27x (1.25–1.30) | 54.9% |"
    for words in (row, "NVIDIA H200, 2026-07-01, commit abcdef1-dirty", f"](results/h200/{path.stem}-steps.png)"):
        assert words in text, words
    for name in (f"{path.stem}.md", f"{path.stem}-steps.png"):
        assert (path.parent / name).is_file(), "what the block links to"
    report.update_readme(readme, tmp_path)
    assert readme.read_text() == text


def test_the_readme_of_the_repository_says_what_the_newest_result_says():
    newest = next(iter(report.newest(ROOT / "benchmarks" / "results")), None)
    assert report.readme_parts(ROOT / "README.md")[1].strip() == report.readme_table(newest)
