"""How large signals are in each layer: the residual stream, the branches added to it, attention's entropy, gradients; measured, predicted,
and drawn.

Prediction at init (docs/initialization.md derives it). Weights are independent and many, so a layer's output is about Gaussian, and what
matters of two tokens is the covariance K of their streams [T,T], mean over the width. It goes from layer to layer without the weights:

    LayerNorm   R = K / sqrt(diag + eps) of both tokens
    attention   K += C var(c_proj) C var(c_attn) M R M^T, where M is the mean over a token and those before it: queries and keys are so
                small that attention is nearly uniform
    MLP         K += 4C var(c_proj) E[f(u) f(v)], u and v normal with the covariance C var(c_fc) R, f the activation
"""

import base64
import html
import math
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.plot import COLORS, DASHES, MARKERS

EPS = 1e-5  # LayerNorm's
TERMS, NODES = 40, 128  # of the activation's expansion, and of the quadrature that finds it


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return x.detach().double().square().mean().sqrt().item()


def entropy_share(attention: Any, h: Tensor) -> float:
    """Mean entropy of attention's weights over all heads and queries, as a share of the largest that there can be: 1 is uniform."""
    B, T, C = h.shape
    q, k, _ = attention.c_attn(h).split(C, dim=2)
    q, k = (x.view(B, T, attention.n_head, C // attention.n_head).transpose(1, 2) for x in (q, k))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    above = torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1)
    logs = scores.masked_fill(above, -math.inf).float().log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(above, 0.0)).sum(-1)
    uniform = torch.arange(1, T + 1, device=h.device).float().log()
    return (entropy.mean() / uniform.mean()).item() if T > 1 else 1.0


def measure(model: GPT, x: Tensor, y: Tensor, gradients: bool = True) -> dict[str, Any]:
    """The signals of a model for token ids x and targets y [B,T]: a dict a layer in "layers", the embedding first; "logits", "loss".

    Signals and gradients of the stream are root mean squares; gradients of a block's weights are norms. A model's own gradients are lost.
    """
    model.eval()
    t = model.transformer
    layers: list[dict[str, float]] = []
    streams = []
    with torch.set_grad_enabled(gradients):
        stream = t.wte(x) + t.wpe(torch.arange(x.size(1), device=x.device))
        layers.append({"stream": rms(stream)})
        streams.append(stream)
        for block in t.h:
            h = block.ln_1(stream)
            with torch.no_grad():
                share = entropy_share(block.attn, h)
            attention = block.attn(h)
            middle = stream + attention
            mlp = block.mlp(block.ln_2(middle))
            stream = middle + mlp
            streams.append(stream)
            layers.append(dict(stream=rms(stream), attention=rms(attention), mlp=rms(mlp), entropy=share))
        logits = model.lm_head(t.ln_f(stream))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
    if gradients:
        model.zero_grad(set_to_none=True)
        for s in streams:
            s.retain_grad()
        loss.backward()
        for row, s in zip(layers, streams, strict=True):
            row["gradient"] = rms(s.grad)
        for row, block in zip(layers[1:], t.h, strict=True):
            for name in ("attn", "mlp"):
                grads = [p.grad.norm() for p in getattr(block, name).parameters()]
                row[f"{name}_gradient"] = torch.stack(grads).norm().item()
        model.zero_grad(set_to_none=True)
    return {"layers": layers, "logits": rms(logits), "loss": loss.item()}


# ---- the prediction ----


def expansion(f: Any, std: float) -> tuple[np.ndarray, float]:
    """([a_k^2], E[f(u)^2]) of an activation for u normal with this std: E[f(u) f(v)] = sum of a_k^2 r^k, if u and v correlate by r."""
    z, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    values = f(torch.from_numpy(std * z)).numpy()
    squares, before, polynomial = [], np.zeros_like(z), np.ones_like(z)
    for k in range(TERMS):  # polynomial: Hermite's k-th, of unit variance
        squares.append(float((weights * values * polynomial).sum()) ** 2)
        before, polynomial = polynomial, (z * polynomial - math.sqrt(k) * before) / math.sqrt(k + 1)
    return np.array(squares), float((weights * values**2).sum())


def predict(c: GPTConfig, std: Any, x: Tensor, activation: Any) -> list[dict[str, float]]:
    """The stream's and both branches' root mean squares by layer for token ids x [B,T], as `measure` finds them at init.

    std(name) is the standard deviation of a parameter, by its name in the first block or in the transformer.
    """
    C, ids = c.n_embd, x.cpu().numpy()
    T = ids.shape[1]
    same = ids[:, :, None] == ids[:, None, :]
    K = std("wte.weight") ** 2 * same + std("wpe.weight") ** 2 * np.eye(T)
    mean = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    bias = (lambda name: std(name) ** 2) if c.bias else lambda name: 0.0
    qkv, out = C * std("attn.c_attn.weight") ** 2, C * std("attn.c_proj.weight") ** 2
    up, down = C * std("mlp.c_fc.weight") ** 2, 4 * C * std("mlp.c_proj.weight") ** 2

    def correlated(K):
        scale = 1 / np.sqrt(np.diagonal(K, axis1=1, axis2=2) + EPS)
        return K * scale[:, :, None] * scale[:, None, :]

    def size(K):
        return math.sqrt(np.diagonal(K, axis1=1, axis2=2).mean())

    layers = [{"stream": size(K)}]
    for _ in range(c.n_layer):
        values = qkv * correlated(K) + bias("attn.c_attn.bias")
        attention = out * (mean @ values @ mean.T) + bias("attn.c_proj.bias")
        K = K + attention
        before = up * correlated(K) + bias("mlp.c_fc.bias")
        variance = np.diagonal(before, axis1=1, axis2=2)
        squares, second = expansion(activation, math.sqrt(variance.mean()))
        r = before / np.sqrt(variance[:, :, None] * variance[:, None, :])
        after = np.polynomial.polynomial.polyval(r, squares)
        after[:, np.arange(T), np.arange(T)] = second  # the sum is cut off, and that shows only where r is 1
        mlp = down * after + bias("mlp.c_proj.bias")
        K = K + mlp
        layers.append({"stream": size(K), "attention": size(attention), "mlp": size(mlp)})
    return layers


# ---- tables and pictures ----

COLUMNS = {
    "stream": "stream", "attention": "attention", "mlp": "MLP", "entropy": "entropy", "gradient": "d stream",
    "attn_gradient": "d attn", "mlp_gradient": "d MLP",
}  # fmt: skip


def lines(measured: list[dict[str, float]], predicted: list[dict[str, float]] | None) -> list[list[str]]:
    """The cells of a table by layer, the head first: measured values, and beside the first three what was predicted."""
    columns = [(k, title, "measured") for k, title in COLUMNS.items()]
    if predicted:
        columns[3:3] = [(k, f"{COLUMNS[k]} pred.", "predicted") for k in ("stream", "attention", "mlp")]
    rows = [["layer", *(title for _, title, _ in columns)]]
    for i, row in enumerate(measured):
        cells = [(row if which == "measured" else predicted[i]).get(k) for k, _, which in columns]  # type: ignore[index]
        rows.append([str(i) if i else "embedding", *("" if v is None else f"{v:.4g}" for v in cells)])
    return rows


def print_lines(rows: list[list[str]]) -> None:
    """Print a table, its columns to the right."""
    for row in rows:
        print(
            f"{row[0]:>9}"
            + "".join(f"{cell:>16}" if "pred" in row[i] else f"{cell:>13}" for i, cell in enumerate(row) if i)
        )


def figure(width: float, height: float) -> Any:
    """An empty figure."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def draw_signals(report: dict[str, Any], title: str) -> bytes:
    """A PNG of all signals by layer: of the weights, of a new model where the weights are not, and as predicted for a new one."""
    f = figure(12, 7)
    f.suptitle(title, fontsize=11)
    panels = f.subplots(2, 3).flat
    kinds = [(report["layers"], "measured", 0, "-")]
    if report.get("init"):
        kinds = [(report["layers"], "trained", 1, "-"), (report["init"], "at init", 0, "-")]
    titles = {
        "stream": "residual stream, rms", "attention": "attention's branch, rms", "mlp": "MLP's branch, rms",
        "entropy": "attention's entropy, share of the uniform's", "gradient": "gradient of the stream, rms",
        "weights": "gradient of a block's weights, norm",
    }  # fmt: skip
    for axes, (key, label) in zip(panels, titles.items(), strict=True):
        for rows, name, color, dash in kinds:
            for j, k in enumerate(("attn_gradient", "mlp_gradient") if key == "weights" else (key,)):
                at = [i for i, row in enumerate(rows) if k in row]
                name_here = f"{name}, {('attention', 'MLP')[j]}" if key == "weights" else name
                axes.plot(
                    at, [rows[i][k] for i in at], dash, marker=MARKERS[color + 2 * j], ms=4, color=COLORS[color],
                    mfc="white" if j else COLORS[color], label=name_here,
                )  # fmt: skip
        if report.get("predicted") and key in ("stream", "attention", "mlp"):
            rows = report["predicted"]
            at = [i for i, row in enumerate(rows) if key in row]
            axes.plot(at, [rows[i][key] for i in at], "--", color="black", lw=1.5, label="predicted at init")
        axes.set(xlabel="layer (0: embedding)", title=label)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return png(f)


def draw_rescale(comparison: list[dict[str, Any]], title: str) -> bytes:
    """A PNG of the stream by layer for several depths: with the rescale of c_proj, and without it."""
    f = figure(11, 5)
    f.suptitle(title, fontsize=11)
    panels = f.subplots(1, 2, sharey=True)
    depths = sorted({row["depth"] for row in comparison})
    for row in comparison:
        axes, i = panels[int(row["scheme"] == "no_rescale")], depths.index(row["depth"])
        at = range(row["depth"] + 1)
        every = max(1, row["depth"] // 12)
        how = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ms=6, ls="", markevery=every)
        axes.plot(at, row["measured"], label=f"{row['depth']} blocks, measured", **how)
        axes.plot(
            at,
            row["predicted"],
            ls=(0, DASHES[1:][i % len(DASHES[1:])]),  # points are measured, and no predicted line is solid
            color=COLORS[i % len(COLORS)],
            lw=1.5,
            label=f"{row['depth']} blocks, predicted",
        )
    for axes, text in zip(panels, ("with the rescale, 0.02 / sqrt(2 n_layer)", "without it, 0.02"), strict=True):
        axes.set(xlabel="layer (0: embedding)", title=text, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("residual stream, rms")
    return png(f)


def png(f: Any) -> bytes:
    """A figure as a PNG, the same bytes whenever it is drawn."""
    file = BytesIO()
    f.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff; margin: 16px auto; max-width: 1320px; padding: 0 16px; }}
  h1 {{ font-size: 20px; }} img {{ max-width: 100%; }}
  td, th {{ text-align: right; padding: 2px 12px; border-bottom: 1px solid #ddd; }}
</style>
<h1>{title}</h1>
<p>{said}</p>
{body}
</html>
"""


def page(title: str, said: str, pictures: list[tuple[str, bytes]], rows: list[list[str]]) -> str:
    """A self-contained HTML page: pictures with what they show, and a table."""
    parts = []
    for alt, picture in pictures:
        parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    head, *rest = rows
    cells = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rest]
    parts.append("<table>\n" + "\n".join(cells) + "\n</table>")
    return PAGE.format(title=html.escape(title), said=html.escape(said), body="\n".join(parts))
