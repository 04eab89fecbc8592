"""The counted launches and bytes of a micro-step: as recorded, and of what the kernels really touch."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import triton.runtime.interpreter as interpreter

from fastgpt import ops
from fastgpt.benchmarks import count
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

M, C, V, L = 32 * 1024, 768, 50304, 2  # tokens, width, vocabulary; GPT-2's 12 layers are the slow test's
OURS = ("fastgpt", "fastgpt-eager")
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

# Counted in a process of its own, which takes the CPU for a GPU: GPT-2's width at 2 layers; then a tiny model, as it is, and with a pass
# over the stream that is planted in each block.
SCRIPT = """
import contextlib, dataclasses, json, logging, sys
from fastgpt.benchmarks import count
from fastgpt.model import Block

class Shallow(count.CountConfig):
    def gpt_config(self):
        return dataclasses.replace(super().gpt_config(), n_layer=2)

logging.getLogger("torch").setLevel(logging.ERROR)
tiny = dict(preset="tiny", batch_size=4, block_size=64, vocab_size=101, bias=True)
ours = dict(arms="fastgpt,fastgpt-eager")
with contextlib.redirect_stdout(sys.stderr):
    found = {"fp32": count.count(Shallow()), "bf16": count.count(Shallow(**ours, residual="bf16"))}
    found["tiny"] = count.count(count.CountConfig(**tiny, **ours, by_kernel=True))
    step = Block.step
    Block.step = lambda self, x, *rest: step(self, -x, *rest)
    found["planted"] = count.count(count.CountConfig(**tiny, **ours))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The recorded (bytes, launches) outside GEMMs and attention of an exact micro-step at 32 x 1024. A change that raises one of fastgpt's adds
# a kernel or a pass over memory: lower them where it lowers, and raise them only with the reason in the commit. The peers' are recorded so
# that they are not slowed down unseen.
RECORDED = {
    2: {"fastgpt": (11.682e9, 58), "fastgpt-eager": (11.682e9, 59), "eager": (70.68e9, 102), "compiled": (24.27e9, 84)},
    12: {"fastgpt": (29.93e9, 268), "fastgpt-eager": (29.93e9, 269), "eager": (114.83e9, 492), "compiled": (56.37e9, 414)},
}  # fmt: skip


def held(found, recorded):
    """Hold what was counted to what is recorded, closely from both sides: a figure that falls is to be recorded."""
    for arm, (bytes_, launches) in recorded.items():
        assert found[arm]["launches"] == launches, arm
        # Inductor of torch 2.11 moves 0.6% more in nanoGPT's loss.
        rel = 1e-2 if arm == "compiled" and torch.__version__.startswith("2.11.") else 5e-4
        assert found[arm]["non_gemm_bytes"] == pytest.approx(bytes_, rel=rel), arm


def test_a_micro_step_moves_and_launches_what_is_recorded(counted):
    held(counted["fp32"], RECORDED[2])


@pytest.mark.slow
def test_a_micro_step_of_gpt2_as_the_command_counts_it():
    words = [sys.executable, "-m", "fastgpt.cli", "bench", "count", "--preset=gpt2", "--batch_size=32", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    held(json.loads(done.stdout), RECORDED[12])


def test_no_kernel_casts_copies_or_fills(counted):
    for which in ("fp32", "bf16"):
        assert not {"cast", "cat", "copy", "fill"} & {r["op"] for r in counted[which]["fastgpt"]["ops"]}
        rest = [r for r in counted[which]["fastgpt-eager"]["ops"] if r["op"] in ("cast", "cat", "copy", "fill")]
        assert [(r["op"], r["launches"], r["bytes"]) for r in rest] == [
            ("fill", 1, 8)
        ]  # the 1 that a backward begins with
    # With biases there are their casts. The compiler adds no kernel of its own.
    compiled, eager = (
        {(r["kernel"], r["direction"]): r["launches"] for r in counted["tiny"][arm]["ops"]} for arm in OURS
    )
    assert eager.pop(("aten::ones_like", "backward")) == 1
    assert compiled == eager


def test_the_peers_are_counted_as_they_run(counted):
    """Held to figures that follow from the shapes: what nanoGPT does to each tensor, compiled and eager, is known."""
    rows = {(r["op"], r["direction"]): r for r in counted["fp32"]["compiled"]["ops"]}
    assert rows["gelu_mlp", "forward"]["bytes"] == L * 2 * M * 4 * C * 2  # read, written
    assert rows["gelu_mlp", "backward"]["bytes"] == L * 3 * M * 4 * C * 2
    assert rows["cat", "backward"]["bytes"] == L * 2 * M * 3 * C * 2  # dq, dk and dv into one
    assert rows["fill", "backward"]["bytes"] == M * V * 2  # zeros for logits that the loss does not need
    # Those zeros read, the logits read, their gradient written.
    assert rows["linear_cross_entropy", "backward"]["bytes"] == pytest.approx(3 * M * V * 2, rel=2e-2)
    assert rows["linear_cross_entropy", "forward"]["bytes"] == pytest.approx(M * V * 2, rel=1e-3)
    assert rows["gemm", "forward"]["launches"] == 4 * L + 1
    assert rows["gemm", "backward"]["launches"] == 2 * (4 * L + 1)
    attention = L * (4 + 8) * M * C * 2 + L * 2 * M * 12 * 4  # q, k, v, out; their gradients too; lse written and read
    for arm in ("compiled", "eager"):
        assert counted["fp32"][arm]["attention_bytes"] == pytest.approx(attention, rel=1e-3)
    eager = {(r["op"], r["direction"]): r["bytes"] for r in counted["fp32"]["eager"]["ops"]}
    # log_softmax in and out; backward a sparse gradient is filled, and three tensors pass.
    assert eager["linear_cross_entropy", "forward"] == pytest.approx(2 * M * V * 4, rel=1e-3)
    assert eager["linear_cross_entropy", "backward"] == pytest.approx(4 * M * V * 4, rel=1e-3)
    for arm in count.ARMS:
        assert counted["fp32"][arm]["gemm_bytes"] == pytest.approx(counted["fp32"]["eager"]["gemm_bytes"], rel=0.02)


@pytest.mark.parametrize("arm", OURS)
def test_a_stream_in_bf16_moves_two_bytes_less_wherever_it_passes(counted, arm):
    """And no launch more. Of an element: the embedding's output; the first norm's input; stream in and out of the other 2 L.
    Backward, of each of those: the gradient by the stream (but behind the last norm), the stream, dx, and dbranch, which is dx and not
    written; of the first norm the gradient, the stream and dx; the embedding's two reads."""
    passes = 1 + 1 + 2 * L * 2 + 2 * L * 4 - 1 + 3 + 2
    wide, narrow = counted["fp32"][arm], counted["bf16"][arm]
    assert wide["non_gemm_bytes"] - narrow["non_gemm_bytes"] == passes * M * C * 2
    for key in ("launches", "gemm_bytes", "attention_bytes"):
        assert wide[key] == narrow[key]


def test_an_added_pass_over_the_stream_shows(counted):
    """A planted pass raises the bytes by a read and a write of the stream, and the launches by one, a block and direction."""
    clean, slow = ({arm: counted[which][arm] for arm in OURS} for which in ("tiny", "planted"))
    stream = 4 * 64 * 64 * 4
    assert slow["fastgpt-eager"]["launches"] == clean["fastgpt-eager"]["launches"] + 2 * 2
    assert slow["fastgpt-eager"]["non_gemm_bytes"] == clean["fastgpt-eager"]["non_gemm_bytes"] + 2 * 2 * 2 * stream
    # Inductor may fuse one of them with a neighbour.
    assert slow["fastgpt"]["launches"] > clean["fastgpt"]["launches"]
    assert slow["fastgpt"]["non_gemm_bytes"] > clean["fastgpt"]["non_gemm_bytes"] + stream


def test_the_prediction_is_the_counts_at_the_rates_given(capsys):
    """By hand for GPT-2 on an H100 at its data sheet's rates: 989 TFLOP/s, 3.35 TB/s."""
    cfg = count.CountConfig(arms="compiled,fastgpt", gemm_share=1, attention_share=1, memory_share=1, launch_us=2)
    counts = dict(launches=100, non_gemm_bytes=3.35e9)
    found = {"compiled": counts, "fastgpt": counts}
    ms = count.predicted(found, cfg, "compiled", "H100")
    tokens, pair = 32 * 1024, 2 * 1024 * 768 * 12
    assert ms["attention"] == pytest.approx(tokens * (2 + 5) / 2 * pair / 989e12 * 1e3, rel=0.01)
    assert ms["GEMMs"] == pytest.approx(tokens * 6 * (12 * 12 * 768**2 + 50304 * 768) / 989e12 * 1e3, rel=0.01)
    assert (ms["memory"], ms["launches"]) == (pytest.approx(1.0), pytest.approx(0.2))
    seven = count.predicted(found, cfg, "fastgpt", "H100")["attention"]
    assert seven == pytest.approx(ms["attention"] * (2 + 7) / (2 + 5))
    count.show_predicted(found, cfg)
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split()[-8:-6]) for line in lines if line.startswith("H100")] == [
        ("H100", "compiled"),
        ("H100", "fastgpt"),
    ]
    assert len(lines) == 2 + 2 * len(count.PREDICTED)


def test_the_tables_name_every_arm_and_kernel_and_a_wrong_arm_is_refused(counted, capsys):
    count.show(counted["fp32"], count.ARMS)
    said = capsys.readouterr().out
    assert all(f"\n{arm}\n" in said for arm in count.ARMS)
    count.show(counted["tiny"], ["fastgpt-eager"])
    said = capsys.readouterr().out
    assert all(kernel in said for kernel in count.kernels())
    words = [sys.executable, "-m", "fastgpt.benchmarks.count", "--arms=fastest"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'fastest' is none of eager, compiled" in done.stderr


# ---- the records' traffic, held to the interpreter ----


@pytest.fixture
def touched(monkeypatch):
    """[(kernel, arguments by name, {address read: bytes}, {address written: bytes})] of what the interpreter runs."""
    runs = []
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def note(kind, ptrs, mask):
        kept = ptrs.data if mask is None else ptrs.data[mask.data.astype(bool)]
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        runs[-1][kind].update(dict.fromkeys(kept.reshape(-1).tolist(), size))

    def masked_load(self, ptrs, mask, *rest):
        note(2, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        note(3, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def execute(self, *args, **options):
        names = [n for n in self.arg_names if n not in options]
        runs.append((self.fn, dict(zip(names, args, strict=False)) | options, {}, {}))
        return call(self, *args, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", masked_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", execute)
    return runs


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the interpreter")
@pytest.mark.parametrize(
    ("bias", "dropout", "stream"), [(False, 0.0, None), pytest.param(True, 0.1, torch.bfloat16, marks=pytest.mark.slow)]
)
def test_kernels_read_and_write_what_is_counted(touched, bias, dropout, stream):
    model = GPT(GPTConfig(32, 64, 1, 2, 32, dropout, bias))
    model.set_kernels(ops.all_triton())
    model.set_residual(stream)
    idx = torch.randint(64, (5, 32))
    idx[:, ::2] = 0  # a run over more than one span of the embedding's backward
    with torch.autocast("cpu", torch.bfloat16, enabled=stream is not None):
        loss = model(idx, idx, return_logits=False)[1]
    loss.backward()
    seen = set()
    for kernel, given, *addresses in touched:
        name = count.kernel_name(kernel, given)
        seen.add(name)
        for side in (0, 1):
            counted = count.traffic(name, given, side)
            spans = {p: count.argument(given, p) for p in counted}
            bytes_ = dict.fromkeys(counted, 0)
            for address, size in addresses[side].items():
                owners = [p for p, t in spans.items() if t.data_ptr() <= address < t.data_ptr() + span(t)]
                assert owners, f"{name}: {('reads', 'writes')[side]} what its record does not name"
                bytes_[owners[0]] += size
            for p, n in bytes_.items():
                assert n <= counted[p], f"{name}: {p} is {n} bytes, {counted[p]} were counted"
                # Not much less either: sums without a bias are written and half read, ids come more than once.
                assert n * 4 >= counted[p], f"{name}: {p} is {n} bytes, {counted[p]} were counted"
    assert seen == set(count.kernels())


def span(t):
    """Bytes from a tensor's first element to behind its last."""
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
