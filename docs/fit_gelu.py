"""The polynomial in `kernels/gelu_mlp.py`: what it is fitted to, and how exact GELU is by it. Run: python docs/fit_gelu.py

PHI(t) = P[X < -t] of a standard normal, so that GELU(x) = max(x, 0) - |x| PHI(|x|). log2 PHI is smooth, and a polynomial of
it errs relatively: the tail is as exact as the rest. Minimax by Lawson's iteration on Chebyshev nodes of [0, 6.5], where
6.5 PHI(6.5) = 2.6e-10 is below what fp16 can hold.
"""

import math

import torch

TOP, DEGREE = 6.5, 7


def fit():
    """(coefficients, constant first; the largest relative error of PHI on [0, TOP])."""
    t = (1 - torch.cos(torch.linspace(0, math.pi, 4001, dtype=torch.float64))) / 2 * TOP
    target = torch.special.log_ndtr(-t) / math.log(2)
    powers = torch.stack([(t / TOP) ** k for k in range(DEGREE + 1)], 1)
    weight = torch.ones_like(t)
    for _ in range(200):
        root = weight.sqrt()[:, None]
        c = torch.linalg.lstsq(powers * root, target[:, None] * root).solution[:, 0]
        error = (powers @ c - target).abs()
        weight = weight * error / (weight * error).sum()
    return [(c[k] / TOP**k).item() for k in range(DEGREE + 1)], error.max().item() * math.log(2)


def gelu(x, c):
    """GELU of x by the polynomial, each step rounded to fp32 as an FMA rounds it."""
    x = x.float()
    t = x.abs().clamp(max=TOP)
    c = torch.tensor(c, dtype=torch.float32)
    p = c[-1].expand_as(t)
    for coefficient in c.flip(0)[1:]:
        p = (p.double() * t.double() + coefficient.double()).float()
    return (x.clamp(min=0).double() - t.double() * torch.exp2(p).double()).float()


if __name__ == "__main__":
    c, error = fit()
    print(f"relative error of PHI on [0, {TOP}]: {error:.1e}")
    print(*[f"{v:.9e}," for v in c])
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.abs() <= 100]  # beyond, GELU(x) is x or 0, and ulps may overflow
        exact = x.double() * torch.special.ndtr(x.double())
        nearest = exact.to(dtype)
        ulp = torch.nextafter(nearest.abs(), torch.tensor(math.inf, dtype=dtype)).double() - nearest.abs().double()
        counts = exact.abs() >= 2**-24  # fp16's smallest number; below it only the absolute error is looked at
        for name, y in (("this polynomial", gelu(x, c).to(dtype)), ("torch's erf", torch.nn.functional.gelu(x))):
            e = (y.double() - exact).abs()
            worst = (e / ulp)[counts & ulp.isfinite()].max()
            print(
                f"{dtype}, {name}: of {counts.sum()} inputs {(y != nearest)[counts].sum()} not rounded to nearest, at worst "
                f"{worst:.4f} ulp; elsewhere an error of at most {e[~counts].max():.1e}"
            )
