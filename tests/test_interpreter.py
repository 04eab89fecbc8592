"""bf16 in Triton's interpreter, as kernels/interpreter.py mends it: PyTorch's bits; and what happens where it cannot be mended."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from kernel_case import DTYPES
from triton.runtime.interpreter import InterpreterBuilder

from fastgpt import verify
from fastgpt.config import UserError
from fastgpt.kernels import interpreter

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities and nan
]
BF16 = torch.bfloat16
ALL = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)  # every number: subnormals, infinities, nan
SOME = torch.cat([ALL[::257], ALL[[0x8000, 0x7F7F, 0x7F80, 0xFF80]]])  # and -0, the largest, the infinities


@triton.jit
def _cast(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


def assert_bits(found, expected):
    """Of one dtype and equal to the bit, the sign of a zero too; any nan equals any other."""
    assert found.dtype == expected.dtype
    if expected.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = (t.nan_to_num(0, posinf=float("inf"), neginf=-float("inf")) for t in (found, expected))
        assert torch.equal(found.signbit(), expected.signbit())
    elif expected.dtype == torch.bool:  # whose bytes are 0 and 1
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    assert torch.equal(found, expected)


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, y, x.numel())
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bool], ids=str)
def test_every_bf16_in_another_dtype(dtype):
    assert_bits(cast(ALL, dtype), ALL.to(dtype))


def test_every_bf16_that_an_integer_holds():
    x = torch.where(ALL.abs() < 2**31, ALL, 0)  # nan, too, is 0
    assert_bits(cast(x, torch.int32), x.to(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_floats_around_every_tie(dtype):
    """Each bf16, what follows it in fp32, half way to the next, and a unit to either side of that."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = (upper[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    for x in bits.to(torch.int32).view(torch.float32).to(dtype).split(2**16):
        assert_bits(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.int64, torch.bool], ids=str)
def test_other_dtypes_in_bf16(dtype):
    x = torch.arange(-(2**15), 2**15) * (2**40 + 1 if dtype == torch.int64 else 1)
    x = x.to(torch.int16).view(dtype) if dtype == torch.float16 else x.to(dtype)
    assert_bits(cast(x, BF16), x.to(BF16))


@triton.jit
def _elementwise(x_ptr, y_ptr, out_ptr, n, how: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + i, i < n, other=0.0), tl.load(y_ptr + j, j < n, other=0.0)
    if how == "+":
        z = x + y
    elif how == "-":
        z = x - y
    elif how == "*":
        z = x * y
    elif how == "/":
        z = x / y
    elif how == "<":
        z = (x < y) & (x <= y)
    elif how == "<=":
        z = x <= y
    elif how == "==":
        z = x == y
    elif how == "!=":
        z = x != y
    elif how == "fma":
        z = tl.fma(x + y * 0.0, y, x)
    elif how == "abs":
        z = tl.abs(x) + y
    elif how == "negative":
        z = -x < y
    else:
        z = tl.where(x > y, x, y)
    tl.store(out_ptr + i * n + j, z, (i < n) & (j < n))


ELEMENTWISE = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": lambda x, y: x.float() / y.float(),  # Triton divides in fp32
    "<": torch.lt,
    "<=": torch.le,
    "==": torch.eq,
    "!=": torch.ne,
    "fma": lambda x, y: ((x + y * 0).float() * y.float() + x.float()).to(BF16),
    "abs": lambda x, y: x.abs() + y,
    "negative": lambda x, y: -x < y,
    "where": lambda x, y: torch.where(x > y, x, y),
}


@pytest.mark.parametrize("how", ELEMENTWISE)
def test_arithmetic_and_comparisons(how):
    # The interpreters of some versions fuse an fma: no product may then leave the range of fp32.
    some = SOME if how != "fma" else torch.where((SOME.abs() > 1e-15) & (SOME.abs() < 1e15), SOME, 0)
    expected = ELEMENTWISE[how](some[:, None], some[None, :])
    out = torch.empty_like(expected)
    _elementwise[(1,)](some, some, out, len(some), how, 512)
    assert_bits(out, expected)


@triton.jit
def _reduce(x_ptr, out_ptr, how: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :])
    if how == "sum":
        y = tl.sum(x, 1)
    elif how == "max":
        y = tl.max(x, 1)
    else:
        y = tl.sum(x.to(tl.float32), 1)
    tl.store(out_ptr + tl.arange(0, 16), y)


def test_reductions():
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
    steps = x[:, 0].clone()
    for column in x[:, 1:].t():
        steps += column
    for how, expected in (("sum", steps), ("max", x.amax(1)), ("sum in fp32", x.double().sum(1).to(BF16))):
        out = torch.empty(16, dtype=BF16)
        _reduce[(1,)](x, out, how)
        assert_bits(out, expected)


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, out_ptr, TRANSPOSED: tl.constexpr):
    i, k = tl.arange(0, 32), tl.arange(0, 64)
    a = tl.load(a_ptr + i[:, None] * 64 + k[None, :])
    if TRANSPOSED:
        b = tl.load(b_ptr + i[:, None] * 64 + k[None, :]).T
    else:
        b = tl.load(b_ptr + k[:, None] + i[None, :] * 64)
    out = i[:, None] * 32 + i[None, :]
    tl.store(out_ptr + out, tl.dot(a, b, tl.load(c_ptr + out)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_is_a_product_accumulated_in_fp32(dtype, transposed):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 64, generator=random).to(dtype) for _ in range(2))
    c, out = torch.randn(32, 32, generator=random), torch.empty(32, 32)
    _product[(1,)](a, b, c, out, transposed)
    a, b, c = a.double(), b.double(), c.double()
    # Of 65 terms each sum is rounded: products of 16-bit numbers are exact in fp32.
    bound = 65 * 2**-24 * (a.abs() @ b.abs().t() + c.abs())
    assert ((out.double() - (a @ b.t() + c)).abs() <= bound).all()


@triton.jit
def _masked(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    some = tl.load(x_ptr) > 0
    tl.store(out_ptr + i, tl.load(x_ptr + i, (i < n) & some, other=-1), some & (i > 0))


def test_a_mask_of_a_block_and_a_scalar_is_bool(monkeypatch):
    """Triton 3.9 refuses any other."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    masks = []

    def loaded(self, pointers, mask, *args):
        masks.append(mask.data.dtype)
        return load(self, pointers, mask, *args)

    def stored(self, pointers, x, mask, *args):
        masks.append(mask.data.dtype)
        return store(self, pointers, x, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stored)
    x, out = torch.arange(5, 9), torch.zeros(4, dtype=torch.int64)
    _masked[(1,)](x, out, 3, 4)
    assert out.tolist() == [0, 6, 7, -1]
    assert masks == [bool] * 3


@pytest.mark.parametrize("missing", ["create_dot", "ReduceOps", None])
def test_another_build_is_left_alone_with_one_warning_and_not_verified_in_bf16(missing, monkeypatch):
    """Simulated: a product that is wrong however its operands are widened, and a method or a class that has another name."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, d, *_: d)
    if missing:
        monkeypatch.delattr(InterpreterBuilder if missing == "create_dot" else interpreter.interpreter, missing)
    before = dict(vars(InterpreterBuilder))
    with pytest.warns(UserWarning, match=f"Triton {triton.__version__}: its interpreter computes bfloat16") as caught:
        interpreter.mend()
    assert len(caught) == 1
    assert vars(InterpreterBuilder) == before
    assert not interpreter.computes_bf16()
    dtypes, place = verify.where(gpu=False)
    assert dtypes == [torch.float32, torch.float16]
    assert "bfloat16 is not checked: this Triton's interpreter" in place
    with pytest.raises(UserError, match="--dtype=bfloat16: this Triton's interpreter computes it wrongly"):
        verify.where(gpu=False, only="bfloat16")
