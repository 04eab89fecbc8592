"""What the kernels execute is what was recorded, or less: a figure that no clock is needed for."""

import json

import pytest

pytest.importorskip("triton")
import figures
import triton
from ptx.parse import Instruction, UnknownPTX

RECORD = json.loads(figures.RECORD.read_text())


def worse(rows):
    """What is above the record, by kernel; all recorded ones of these cases must be there."""
    found = {figures.key(r): r for r in rows}
    wanted = {
        k: r for k, r in RECORD["kernels"].items() if (r["case"], r["sm"]) in {(r["case"], r["sm"]) for r in rows}
    }
    assert found.keys() == wanted.keys()
    return {k: lines for k, r in wanted.items() if (lines := figures.worse(found[k], r))}


def recorded_here():
    if RECORD["triton"] != triton.__version__:
        pytest.skip(
            f"{figures.RECORD.name} has the figures of Triton {RECORD['triton']}, and this is {triton.__version__}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_no_figure_is_worse_than_the_record(compiled, sm):
    """Better ones may stand unrecorded. Where a kernel's work has changed: `python tests/figures.py --record`, and say why."""
    recorded_here()
    rows = compiled(figures.table, sm)
    assert {r["case"] for r in rows} == figures.CASES.keys()
    assert worse(rows) == {}


AGAIN = (
    "m, total = _online(x, m, total)",
    "m, total = _online(x + 0 * tl.load(logits_ptr + start + 1 + tl.arange(0, BLOCK)).to(tl.float32), m, total)",
)


@pytest.mark.slow
def test_a_kernel_that_does_more_is_named(compiled):
    """A row of logits is read once more."""
    recorded_here()
    op = "linear_cross_entropy"
    found = worse(compiled(figures.table, 90, (op,), (op, *AGAIN)))
    assert list(found) == [f"{op}: loss_rows, sm_90"]
    assert any(line.startswith("global: ") for line in found[f"{op}: loss_rows, sm_90"])


def test_an_instruction_without_a_pipe_is_an_error():
    inst = Instruction("frobnicate.f32", [], None, 1, "kernel.py:12", "frobnicate.f32 %r1, %r1")
    with pytest.raises(UnknownPTX, match="no pipe is known"):
        figures.pipe(inst)
