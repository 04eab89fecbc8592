"""A check that cannot fail is no check: each fault that is planted in a kernel must turn `fastgpt verify`'s comparison red.

tests/test_compiled.py plants the same ones in the compiled kernels.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from faults import CASES, DOCUMENTS, plant, small_blocks
from kernel_case import DEVICE

from fastgpt import kernels
from fastgpt.kernels import configs
from fastgpt.records import problem
from fastgpt.verify import compare


def comparisons(op, shape):
    """Those that `verify` makes, in fp32, on blocks so small that every loop runs more than once."""
    it = problem(op, shape, torch.float32, DEVICE)
    return compare(it.kernel, it.reference, it.inputs, it.outputs, it.grads)


@pytest.fixture
def _small_blocks(monkeypatch):
    for name, row in small_blocks().items():
        monkeypatch.setattr(configs, name, row)


@pytest.mark.usefixtures("_small_blocks", "poison")
@pytest.mark.parametrize(
    ("op", "what", "right", "wrong", "shape"), [pytest.param(*c, id=f"{c[0]}: {c[1]}") for c in CASES]
)
def test_a_planted_fault_is_found(op, what, right, wrong, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, op, plant(op, right, wrong, tmp_path))
    assert not all(c.holds for c in comparisons(op, shape)), f"{what}: nothing noticed"


SOUND = [*dict.fromkeys((op, shape) for op, *_, shape in CASES), ("attention", replace(DOCUMENTS, dropout=0.2))]


@pytest.mark.usefixtures("_small_blocks", "poison")
@pytest.mark.parametrize(("op", "shape"), [pytest.param(*s, id=f"{s[0]}: T={s[1].T}, p={s[1].dropout}") for s in SOUND])
def test_the_same_comparisons_hold_without_a_fault(op, shape):
    assert all(c.holds for c in comparisons(op, shape))
