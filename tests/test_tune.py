"""`fastgpt tune`: a made-up clock's fastest configuration wins if it is right, and later runs take it. The kernels are real."""

import functools
import json
import re
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import torch
from kernel_case import DEVICE

pytest.importorskip("triton")
from fastgpt import choose, files, ops, tune, tuned
from fastgpt.config import TuneConfig, UserError
from fastgpt.kernels import common, configs, gelu_mlp
from fastgpt.parse import parse
from fastgpt.records import RECORDS, Shape, problem
from fastgpt.timing import Times

FLAGS = f"--preset=tiny --batch_size=1 --block_size=16 --vocab_size=65 --dtype=float32 --device={DEVICE}".split()
SHAPE = Shape(1, 16, 64, 2, 65, bias=False)
RUN = SHAPE, torch.float32, DEVICE
OPS = [op for op, record in RECORDS.items() if record.row]


@pytest.fixture(autouse=True)
def gpu(workdir, monkeypatch):
    """A machine whose GPU is made up."""
    monkeypatch.setattr(tune, "needs_gpu", lambda device: None)
    monkeypatch.setattr(choose, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, fork=torch.random.fork_rng: fork(devices=[]))


def run(rounds, *flags):
    """Tune where a row takes rounds(row), milliseconds in turn: the file that runs take."""
    cfg, _ = parse(TuneConfig, [*FLAGS, *flags], "fastgpt tune")
    tune.tune(cfg, lambda functions: {row: rounds(row) for row in functions})
    return tuned.path(*RUN)


def shipped(op):
    return RECORDS[op].row(*RUN)


def farthest(op):
    """The last row of every grid in turn: a search that goes wrong does not end there."""
    row = shipped(op)
    for grid in configs.GRIDS[type(row)]:
        row = configs.neighbours(row, grid)[-1]
    return row


def leaves(row):
    """The values of a row's fields, and of the fields of these."""
    values = [getattr(row, f.name) for f in fields(row)]
    return [leaf for value in values for leaf in (leaves(value) if is_dataclass(value) else [value])]


def nearer(target):
    """A clock by which a row is the faster, the more it has in common with the target."""

    def rounds(row):
        same = row != "shipped" and sum(a == b for a, b in zip(leaves(row), leaves(target), strict=True))
        return [2 - same / 20] * 3

    return rounds


@pytest.fixture
def narrow(monkeypatch):
    """Of each field that is searched, the first and the last value."""
    for kind, grids in configs.GRIDS.items():
        ends = tuple({field: values[:: len(values) - 1] for field, values in grid.items()} for grid in grids)
        monkeypatch.setitem(configs.GRIDS, kind, ends)


@pytest.fixture
def few(monkeypatch):
    """Few candidates, where not the search is in question but what comes of it."""
    grid = dict(block=(512, 1024), forward_warps=(4, 8))
    monkeypatch.setitem(configs.GRIDS, configs.EmbeddingConfig, (grid,))
    monkeypatch.setitem(configs.GRIDS, configs.NormConfig, (dict(backward_warps=(4, 16)),))
    monkeypatch.setitem(configs.GRIDS, configs.AttentionConfig, (dict(inner=(16, 32, 64)),))


# On a GPU some of these rows do not fit, and are rejected for that.
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="of rows that all can be launched, as in the interpreter")


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_the_fastest_wins_and_runs_take_it(op, narrow, capsys, monkeypatch):
    target = farthest(op)
    assert target != shipped(op)
    file = run(nearer(target), f"--only={op}")
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.split()[0] == op)
    assert line.endswith(f"  {target!r}")
    found = json.loads(file.read_text())["ops"][op]
    assert found["row"] == asdict(target)
    assert found["ms"] < found["shipped_ms"]
    assert f"{found['shipped_ms']:.3f}" in line
    rows = tuned.load_rows(*RUN)
    assert rows == ((op, target.text),)
    said = capsys.readouterr().out
    assert said == f"launch configurations: {op} as tuned, the others as shipped, by {file}\n"
    asked, of = set(), type(target).of
    monkeypatch.setattr(type(target), "of", lambda text: asked.add(text) or of(text))
    it = problem(op, *RUN)
    choose.check(it, functools.partial(it.by_ops, kernels=ops.Kernels(**{op: "triton"}, rows=rows)))
    assert asked == {target.text}, "what a run then launches by"


def test_a_file_is_of_all_that_it_was_measured_under(monkeypatch):
    here = tuned.conditions(*RUN)
    for other in (
        dict(dropout=0.1), dict(doc_mask=True), dict(narrow_residual=True), dict(n_embd=32), dict(n_head=4), dict(T=8),
    ):  # fmt: skip
        shape = replace(SHAPE, **other)
        assert tuned.conditions(shape, *RUN[1:]) != here
        assert tuned.path(shape, *RUN[1:]) != tuned.path(*RUN)
    for place, name in ((configs, "architecture"), (common, "precision"), (tuned, "source_hash")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *args: "another")
            assert tuned.conditions(*RUN) != here, name


def test_another_runs_findings_are_kept(few):
    """Two commands at a time: what one finds while the other searches stays in the file."""

    def rounds(row):
        if not inner:
            inner.append(row)
            run(lambda row: [1.0] * 3, "--only=layer_norm")
        return [1.0] * 3

    inner = []
    file = run(rounds, "--only=embedding, embedding")
    assert list(json.loads(file.read_text())["ops"]) == ["layer_norm", "embedding"]
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("out", ["..", "/", "folder"])
def test_a_place_that_is_no_file_is_a_line_and_leaves_nothing(workdir, out):
    (workdir / "folder").mkdir()
    before = sorted(workdir.parent.rglob("*"))
    with pytest.raises(UserError, match="--out="):
        run(lambda row: [1.0] * 3, f"--out={out}", "--only=embedding")
    assert [p for p in sorted(workdir.parent.rglob("*")) if p not in before and "cache" not in p.parts] == []


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ((2.0, [2.0, 2.0, 2.0]), False),
        ((2.0, [1.99, 1.99, 1.99]), False),
        ((2.0, [1.0, 1.0, 2.1]), False),
        ((2.0, [1.9, 1.9, 1.9]), True),
    ],
    ids=["a tie", "half a percent", "slower in one round", "five percent"],
)
def test_the_shipped_row_stays_unless_another_is_surely_faster(few, times, kept):
    row = shipped("embedding")
    file = run(lambda r: [times[0]] * 3 if r in (row, "shipped") else times[1], "--only=embedding")
    found = json.loads(file.read_text())["ops"]["embedding"]
    assert (found["kept"], found["row"] != asdict(row)) == (kept, kept)
    assert found["rejected"] == {}
    assert len(tuned.load_rows(*RUN)) == kept


def test_a_lucky_time_is_measured_again(few):
    row, times = shipped("embedding"), {}

    def rounds(r):
        times[r] = times.get(r, 0) + 1
        return [2.0 if r in (row, "shipped") else 1.0 if times[r] == 1 else 3.0] * 3

    file = run(rounds, "--only=embedding")
    assert json.loads(file.read_text())["ops"]["embedding"]["kept"] is False


@interpreted
def test_what_is_wrong_or_does_not_run_is_rejected_with_its_reason(monkeypatch, capsys):
    def planted(h, w_fc, b_fc, w_proj, b_proj, recompute=False, row="", approximate="none", sound=gelu_mlp.gelu_mlp):
        config = configs.MLPConfig.of(row) if row else shipped("gelu_mlp")
        if config.forward.group == 16:
            raise RuntimeError("out of resource: shared memory\nand more")
        y = sound(h, w_fc, b_fc, w_proj, b_proj, recompute, row, approximate)
        return y * (1.001 if config.forward.block_m == 128 else 1)

    monkeypatch.setattr(gelu_mlp, "gelu_mlp", planted)
    grids = (
        dict(forward=configs.combined(block_m=(64, 128), warps=(4, 8))),
        dict(forward=configs.combined(group=(8, 16))),
    )
    monkeypatch.setitem(configs.GRIDS, configs.MLPConfig, grids)

    def rounds(row):  # what is wrong would be the fastest
        return [1.0 if row != "shipped" and (row.forward.block_m == 128 or row.forward.group == 16) else 2.0] * 3

    found = json.loads(run(rounds, "--only=gelu_mlp").read_text())["ops"]["gelu_mlp"]
    assert found["kept"] is False
    assert found["rejected"]["forward.group=16"] == "out of resource: shared memory"
    unequal = [row for row, why in found["rejected"].items() if "is not equal: y has" in why]
    assert {"forward.block_m=128", "forward.group=16"} <= {row.split()[0] for row in found["rejected"]}
    assert len(unequal) == len(found["rejected"]) - 1 == 2
    assert all("forward.block_m=128" in row for row in unequal)
    out = capsys.readouterr().out
    for row, why in found["rejected"].items():
        assert f"    {row}: {why}\n" in out


def test_the_budget_ends_the_search_and_what_is_left_is_named(monkeypatch, capsys):
    """The op that takes most of a step is first: here attention, of two layers, before the embedding. A candidate takes a minute."""
    now = 0.0
    monkeypatch.setattr(tune, "monotonic", lambda: now)

    def check(it, f, check=tune.check):
        nonlocal now
        now += 60
        check(it, f)

    monkeypatch.setattr(tune, "check", check)
    file = run(lambda row: [1.0], "--only=embedding,attention", "--budget=300")
    out = capsys.readouterr().out
    found = json.loads(file.read_text())["ops"]
    assert list(found) == ["attention"]
    grids = configs.GRIDS[configs.AttentionConfig]
    tried = {row for grid in grids for row in configs.neighbours(shipped("attention"), grid)} - {shipped("attention")}
    assert found["attention"]["tried"] == 1 + 5, "the shipped row, and of the others as many as there are minutes"
    assert found["attention"]["left"] == len(tried) - 5
    assert f"; {found['attention']['left']} candidates not reached" in out
    assert "the budget of 300 s is spent; not reached: embedding\n" in out


def test_ops_tuned_one_after_the_other_are_in_one_file(few, tmp_path):
    for op in ("layer_norm", "embedding"):
        file = run(nearer(farthest(op)), f"--only={op}")
    assert list(json.loads(file.read_text())["ops"]) == ["layer_norm", "embedding"]
    assert tuned.load_rows(*RUN) == tuple((op, farthest(op).text) for op in ("layer_norm", "embedding"))
    before = file.read_text()
    run(lambda row: [1.0], "--only=embedding", f"--out={tmp_path / 'a' / 'b.json'}")
    found = json.loads((tmp_path / "a" / "b.json").read_text())["ops"]
    assert list(found) == ["embedding"]
    assert found["embedding"]["shipped"] == repr(configs.EMBEDDING), "whatever the run's file has"
    assert file.read_text() == before


def test_a_file_that_does_not_hold_here_is_not_taken_and_says_so(few, monkeypatch, capsys):
    assert tuned.load_rows(*RUN) == ()
    assert capsys.readouterr().out == "", "nobody tuned"
    file = run(nearer(farthest("embedding")), "--only=embedding")
    good = file.read_text()

    def refused():
        capsys.readouterr()
        assert tuned.load_rows(*RUN) == ()
        out = capsys.readouterr().out
        assert out.startswith(f"launch configurations: the shipped ones; {file} is not taken: ")
        assert out.count("\n") == 1
        return out

    saved = json.loads(good)
    file.write_text(json.dumps(saved | {"where": saved["where"] | {"gpu": "another"}}))
    assert "its gpu is not this run's" in refused()
    for damaged in ("", "[]", "{}", good[:-9], '{"ops": []}', '{"ops": {}, "where": 1}', "[" * 9999, "9" * 9999):
        file.write_text(damaged)
        assert "it is damaged" in refused(), damaged
    file.write_text(good)
    monkeypatch.setattr(tuned, "source_hash", lambda: "another")
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "another"})
    assert "its source, torch are not this run's" in refused()


@pytest.mark.parametrize(
    ("op", "wrong", "why"),
    [
        ("adamw", {"chunk": 64}, "chunk=64 is not 1 to 64 blocks of 1024"),  # it trained, and wrongly
        ("adamw", {"block": 1000}, "block=1000"),
        ("adamw", {"warps": 64}, "warps=64"),
        ("adamw", {"chunk": 2**63}, "chunk=9223372036854775808"),
        ("adamw", {"chunk": "8192"}, "chunk='8192'"),
        ("adamw", {"chunk": True}, "chunk=True"),
        ("adamw", {"more": 1}, "its fields are not block, chunk, clip_block, warps"),
        ("adamw", None, "its fields are not"),
        ("adamw", [], "its fields are not"),
        ("layer_norm", {"max_width": 32}, "max_width=32 is not 1024"),
        ("attention", {"inner": 8}, "inner=8 is below 16"),
        ("attention", {"stages": 0}, "stages=0"),
        ("attention", {"gated_inner": 0}, "gated_inner=0"),
        ("gelu_mlp", {"forward": {"warps": 4}}, "missing"),
        ("gelu_mlp", {"forward": 4}, "forward=4"),
        ("linear_cross_entropy", {"memory_share": 2.0}, "memory_share=2.0"),
        ("linear_cross_entropy", {"memory_share": float("nan")}, "memory_share=nan"),
        ("linear_cross_entropy", {"block": 16}, "block=16 is below 32"),
        ("linear", {}, "there is no such op"),
        ("warp", {}, "there is no such op"),
    ],
)
def test_a_row_that_no_kernel_can_have_is_not_taken_and_the_others_are(op, wrong, why, capsys):
    """The file was edited, or another version wrote it: the entry is named, with the reason, and its op runs as shipped."""
    row = asdict(shipped(op)) if op in OPS else {}
    row = row | wrong if isinstance(wrong, dict) else wrong
    other = "embedding", farthest("embedding")
    entries = {op: dict(kept=True, row=row), other[0]: dict(kept=True, row=asdict(other[1]))}
    file = tuned.path(*RUN)
    files.write_json(file, dict(where=tuned.conditions(*RUN), ops=entries))
    assert tuned.load_rows(*RUN) == ((other[0], other[1].text),)
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith(f"launch configurations: of {file} {op!r} is not taken: ")
    assert why in line
    assert summary.startswith("launch configurations: embedding as tuned")


@pytest.mark.parametrize("entry", [1, [], {}, {"kept": 1}, {"kept": "no"}, None])
def test_an_entry_of_another_form_is_not_taken(entry, capsys):
    files.write_json(tuned.path(*RUN), dict(where=tuned.conditions(*RUN), ops=dict(adamw=entry)))
    assert tuned.load_rows(*RUN) == ()
    assert "'adamw' is not taken: it does not say whether it was kept\n" in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["auto", "triton"])
def test_a_tuned_row_must_be_equal_to_pytorch_before_it_runs(spec, monkeypatch, capsys):
    """Once on a machine: what passed is remembered for this row. What fails leaves the shipped row, not PyTorch."""
    rows = {op: farthest(op) for op in ("embedding", "adamw")}
    entries = {op: dict(kept=True, row=asdict(row)) for op, row in rows.items()}
    files.write_json(tuned.path(*RUN), dict(where=tuned.conditions(*RUN), ops=entries))
    monkeypatch.setattr(choose.timing, "together", lambda calls: {i: Times(float(i == "torch"), 0.0) for i in calls})
    checked, wrong = [], {"embedding"}

    def check(op, shape, dtype, device, implementation, kernels):
        if implementation == "triton":
            checked.append((op, kernels.row(op)))
            if op in wrong and kernels.row(op):
                raise ArithmeticError("is not equal: x has 9.0 times PyTorch's error")

    monkeypatch.setattr(choose, "check_small", check)
    kernels = choose.choose(spec, *RUN, False)
    assert kernels == replace(ops.all_triton(), rows=(("adamw", rows["adamw"].text),))
    out = capsys.readouterr().out
    assert f"of {tuned.path(*RUN)} embedding is not taken; it was tried, and is not equal: x has 9.0" in out
    assert {(op, row.text) for op, row in rows.items()} <= set(checked)
    wrong.clear()
    checked.clear()
    choose.choose(spec, *RUN, False)
    assert ("adamw", rows["adamw"].text) not in checked, "remembered"
    assert ("embedding", rows["embedding"].text) in checked, "what failed is tried again"


def test_without_a_gpu_no_tuned_row_is_used(monkeypatch):
    files.write_json(
        tuned.path(*RUN),
        dict(where=tuned.conditions(*RUN), ops=dict(adamw=dict(kept=True, row=asdict(farthest("adamw"))))),
    )
    assert tuned.load_rows(*RUN), "the file is right"
    monkeypatch.setattr(choose, "is_cuda", lambda device: False)
    for spec in ("auto", "triton", "adamw=triton"):
        assert choose.choose(spec, *RUN, False).rows == ()


def test_another_model_is_not_tuned_by_it(few, capsys):
    run(nearer(farthest("embedding")), "--only=embedding")
    capsys.readouterr()
    for other in (dict(T=33), dict(n_embd=32), dict(n_head=4), dict(dropout=0.1)):
        assert tuned.load_rows(replace(SHAPE, **other), *RUN[1:]) == ()
        assert capsys.readouterr().out == ""
    assert tuned.load_rows(replace(SHAPE, B=7, vocab_size=11), *RUN[1:]), "a batch and a vocabulary may be others"


def test_a_choice_is_measured_anew_with_a_tuned_configuration(few, monkeypatch, capsys):
    prepared = []

    def prepare(it, kernels, compiled, prepare=choose.prepared):
        prepared.append(kernels)
        return prepare(it, kernels, compiled)

    monkeypatch.setattr(choose, "prepared", prepare)
    monkeypatch.setattr(choose, "check", lambda it, f: None)
    times = {"torch": Times(2.0, 0.0), "triton": Times(1.0, 0.0)}
    monkeypatch.setattr(choose.timing, "together", lambda calls: times)

    def ask():
        """(the Kernels chosen, {op: row} of the kernels that were measured for it)."""
        prepared.clear()
        chosen = choose.choose("auto", *RUN, False)
        return chosen, {op: k.row(op) for k in prepared for op in ops.OPS if getattr(k, op) == "triton"}

    assert ask() == (ops.all_triton(), dict.fromkeys(ops.OPS, ""))
    assert ask() == (ops.all_triton(), {}), "remembered"
    file, row = run(nearer(farthest("embedding")), "--only=embedding"), farthest("embedding").text
    capsys.readouterr()
    assert ask() == (replace(ops.all_triton(), rows=(("embedding", row),)), {"embedding": row})
    assert capsys.readouterr().out.startswith(
        f"launch configurations: embedding as tuned, the others as shipped, by {file}\n"
    )
    file.unlink()
    assert ask() == (ops.all_triton(), {}), "remembered too"


def test_with_dropout_attention_is_tuned_in_the_step_that_runs(few, monkeypatch):
    """gated_inner stands in for inner then: a grid of inner alone would try one thing many times."""
    row = replace(shipped("attention"), outer=64, inner=64, gated_inner=16)
    of = configs.AttentionConfig.of
    monkeypatch.setattr(configs, "attention", lambda device, dtype, head_size, text="": of(text) if text else row)
    inner = set()

    def rounds(functions):
        inner.update((r.inner, r.gated_inner) for r in functions)
        return {r: [1.0] for r in functions}

    tune.search("attention", replace(SHAPE, dropout=0.1), *RUN[1:], float("inf"), rounds)
    assert inner == {(16, None), (32, None), (64, None)}


def test_products_are_timed_by_both_libraries_and_the_setting_stays(monkeypatch, capsys):
    """A product of a layer counts as often as there are layers. The setting is made up: a CPU's PyTorch refuses cuBLASLt."""
    setting, seen = ["cublas"], []
    monkeypatch.setattr(
        torch.backends.cuda,
        "preferred_blas_library",
        lambda new=None: setting.append(new or setting[-1]) or setting[-1],
    )

    def measure(functions):
        for key, (f,) in functions.items():
            assert f() is None
            seen.append((key, setting[-1]))
        return {
            (library, what): [1.0 if library == "cublas" else 0.5 if "head" in what else 0.9] * 3
            for library, what in functions
        }

    cfg, _ = parse(TuneConfig, [*FLAGS, "--only=products"], "fastgpt tune")
    tune.tune(cfg, measure)
    found = json.loads(tuned.path(*RUN).read_text())["products"]
    layers, head = 2 * 4 * 3, 3
    assert found["cublas"] == pytest.approx(layers + head)
    assert found["cublaslt"] == pytest.approx(0.9 * layers + 0.5 * head)
    assert found["kept"] is True
    assert len(found["ratios"]) == 15
    assert (found["ratios"]["c_attn dw"], found["ratios"]["lm_head dx"]) == (0.9, 0.5)
    assert {library for (library, _), _ in seen} == {"cublas", "cublaslt"}
    assert all(library == during for (library, _), during in seen)
    assert setting[-1] == "cublas"
    line = next(line for line in capsys.readouterr().out.splitlines() if "products" in line)
    assert line.split()[1:4] == ["27.000", "23.100", "0.86"]
    assert "cuBLASLt; TORCH_BLAS_PREFER_CUBLASLT=1" in line
    assert tuned.load_rows(*RUN) == ()


def test_the_products_are_a_steps(monkeypatch):
    monkeypatch.setattr(common, "mm", lambda a, b, out: torch.mm(a, b, out=out))
    found = tune.products(SHAPE, 7, torch.float32, "cpu")
    shapes = {what: tuple(f().shape) for what, (_, f) in found.items()}
    assert shapes["c_attn forward"] == (16, 192)
    assert shapes["mlp.c_proj dx"] == (16, 256)
    assert shapes["lm_head dw"] == (65, 64)
    assert [times for times, _ in found.values()] == [7] * 12 + [1] * 3


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_grids_are_around_the_shipped_rows(sm, dtype, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: sm)
    for n_embd, n_head in ((768, 12), (1600, 25), (768, 6), (771, 3)):
        if n_embd // n_head > 128:
            continue
        for op in OPS:
            row = RECORDS[op].row(Shape(1, 16, n_embd, n_head, 65), dtype, DEVICE)
            grids = configs.GRIDS[type(row)]
            for grid in grids:
                found = configs.neighbours(row, grid)
                assert 3 <= len(set(found)) == len(found) <= 28
                changed = {name for r in found for name in re.findall(r"(\w+)\S*=", tune.difference(r, row))}
                assert changed <= set(grid)
                assert all(type(r) is type(row) for r in found)
                if dtype == torch.bfloat16 and n_embd // n_head == 64 and n_embd % 8 == 0:
                    assert row in found, (op, grid)


def test_two_small_tiles_that_share_an_sm_are_tried_for_each_gemm():
    """Tile, stages and programs are changed together: one by one each change would be slower."""
    shipped = configs.GELU_MLP[90, 2]
    small = dict(block_m=128, block_n=128, stages=2, flatten=False, programs_per_sm=2)
    for half in ("forward", "backward"):
        wanted = replace(shipped, **{half: replace(getattr(shipped, half), **small)})
        assert any(wanted in configs.neighbours(shipped, grid) for grid in configs.GRIDS[configs.MLPConfig])
        gemm = getattr(wanted, half)
        assert gemm.registers * gemm.warps * 32 * gemm.programs_per_sm == 65536  # what an SM has
        assert getattr(shipped, half).registers is None


def test_what_cannot_be_launched_is_no_row():
    for kind, wrong in (
        (configs.GemmConfig, dict(block_m=100)),
        (configs.GemmConfig, dict(block_m=256, block_n=256)),
        (configs.GemmConfig, dict(programs_per_sm=2)),  # of 128 x 256 sums
        (configs.GemmConfig, dict(stages=0)),
        (configs.GemmConfig, dict(tma=1)),
        (configs.MLPConfig, dict(forward=None)),
        (configs.AttentionConfig, dict(inner=256)),
        (configs.AttentionConfig, dict(gated_inner=256)),
        (configs.AttentionConfig, dict(outer="128")),
        (configs.NormConfig, dict(forward_warps=True)),
        (configs.LossConfig, dict(memory_share=None)),
        (configs.AdamWConfig, dict(block=128)),  # two warps would hold an element that is updated in place
    ):
        row = {
            configs.MLPConfig: configs.GELU_MLP[90, 2], configs.GemmConfig: configs.GELU_MLP[90, 2].forward,
            configs.AttentionConfig: configs.ATTENTION[90, 2, 64],
            configs.NormConfig: configs.LAYER_NORM[0], configs.LossConfig: configs.LINEAR_CROSS_ENTROPY,
            configs.AdamWConfig: configs.ADAMW,
        }[kind]  # fmt: skip
        with pytest.raises(ValueError, match=kind.__name__):
            replace(row, **wrong)


def test_without_a_gpu_it_is_one_line(monkeypatch, fastgpt):
    monkeypatch.undo()
    if DEVICE == "cpu":
        assert fastgpt("tune") == (2, "", "fastgpt: error: tune: needs an NVIDIA GPU and Triton\n")
    assert fastgpt("tune", "--device=cpu") == (2, "", "fastgpt: error: tune: needs an NVIDIA GPU and Triton\n")


def test_the_gpu_that_is_asked_for(monkeypatch):
    monkeypatch.undo()
    current = []
    answers = dict(is_available=True, device_count=2, get_device_capability=(9, 0), get_device_name="a GPU")
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        tune.needs_gpu("cuda")
        tune.needs_gpu("cuda:1")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert current == ["cuda:1"]
    with pytest.raises(UserError, match="this machine has 2"):
        tune.needs_gpu("cuda:2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="from sm_80 on, and this is a GPU"):
        tune.needs_gpu("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(UserError, match="an NVIDIA GPU"):
        tune.needs_gpu("cuda")


def test_what_a_user_can_mend_is_one_line(monkeypatch, fastgpt, tmp_path):
    status, _, err = fastgpt("tune", *FLAGS, "--only=attention,layernorm")
    assert (status, err.count("\n")) == (2, 1)
    assert f"--only=attention,layernorm: 'layernorm' is none of {', '.join(OPS)}, products" in err
    (tmp_path / "file").touch()
    status, _, err = fastgpt("tune", *FLAGS, f"--out={tmp_path}/file/a.json")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"fastgpt: error: --out={tmp_path}/file/a.json: ")

    def full(*args):
        raise torch.OutOfMemoryError("of memory there is none")

    monkeypatch.setattr(tune, "problem", full)
    status, _, err = fastgpt("tune", *FLAGS)
    assert (status, err) == (
        2,
        "fastgpt: error: tune: embedding of 1 x 16 tokens does not fit; give a smaller --batch_size\n",
    )
