"""`fastgpt inspect`: a model's weights against the rules of its init, and how large its signals are in each layer.

A new model is checked in two ways. Its weights and torch's generator must have the bits of nanoGPT's draws, replayed one by one from
`init.draws`. And mean and standard deviation of each tensor must be those of its rule, within what chance allows at its size.
"""

import io
import json
import math
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import checkpoint as checkpoints
from fastgpt import data, depth, files, huggingface, init, sharded
from fastgpt.config import GPTConfig, InspectConfig, UserError
from fastgpt.distributed import check_device
from fastgpt.model import ACTIVATIONS, GPT, new_gpt
from fastgpt.parse import check_heads, check_value, train_base
from fastgpt.prepare import EMBEDDED, prepare_embedded
from fastgpt.study import where, words

MOST_TOKENS = 256  # of a sequence whose signals are measured
SIGMAS = 5.0  # standard errors within which a measured value is a rule's: chance leaves them once in 1.7 million times
RED, YELLOW, PLAIN = "\033[31m", "\033[33m", "\033[0m"


def base(given: dict[str, Any], has_file: bool) -> dict[str, Any]:
    """The values that the flags change: a training run's, on a device that is there. --out_dir alone means the checkpoint in it."""
    alone = "out_dir" in given and not (has_file or given.keys() & {"init_from", "preset", "dataset", "n_layer"})
    start = {"init_from": "resume"} if alone else {}
    device = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    return {**train_base({**given, **start}, has_file), **start, **device}


# ---- the rules ----


class Rule(NamedTuple):
    """What the values of a group's tensors are drawn from."""

    text: str
    mean: float
    std: float
    flatness: float  # (kurtosis - 1) / 4: the std of n values varies by std * sqrt(flatness / n)


def normal(std: float) -> Rule:
    return Rule(f"normal, std {std:.4g}", 0.0, std, 0.5)


def uniform(bound: float) -> Rule:
    return Rule(f"uniform, up to {bound:.4g}", 0.0, bound / math.sqrt(3), 0.2)


def constant(value: float) -> Rule:
    return Rule(f"constant {value:g}", value, 0.0, 0.0)


def group_of(name: str) -> str:
    """The group of a parameter: its name without the layer."""
    return re.sub(r"^transformer\.(h\.\d+\.)?", "", name)


def rule_of(name: str, c: GPTConfig, scheme: str) -> Rule:
    """The rule of a parameter in a scheme."""
    std = init.SCHEMES[scheme].std
    if ".ln_" in name:
        return constant(1.0 if name.endswith("weight") else 0.0)
    if std is None:
        if name == init.WPE:
            return normal(1.0)
        fan_in = 4 * c.n_embd if ".mlp.c_proj" in name else c.n_embd
        return uniform(fan_in**-0.5)
    if name.endswith("bias"):
        return constant(0.0)
    return normal(std(c) if name.endswith("c_proj.weight") else init.STD)


# ---- the table ----


class Group:
    """The tensors of all layers that have one rule: their mean and standard deviation, together and one by one."""

    def __init__(self, name: str, rule: Rule):
        self.name, self.rule = name, rule
        self.tensors: list[tuple[str, int, float, float]] = []  # (name, numbers, mean, mean square)

    def add(self, name: str, p: Tensor) -> None:
        flat = p.detach().double().flatten()
        self.tensors.append((name, flat.numel(), flat.mean().item(), flat.square().mean().item()))

    @property
    def numbers(self) -> int:
        return sum(n for _, n, *_ in self.tensors)

    @property
    def mean(self) -> float:
        return sum(n * mean for _, n, mean, _ in self.tensors) / self.numbers

    @property
    def std(self) -> float:
        square = sum(n * square for _, n, _, square in self.tensors) / self.numbers
        return math.sqrt(max(square - self.mean**2, 0.0))

    def error(self, numbers: int) -> tuple[float, float]:
        """Standard errors of mean and std that so many values of the rule have by chance."""
        return self.rule.std / math.sqrt(numbers), self.rule.std * math.sqrt(self.rule.flatness / numbers)

    def deviations(self) -> list[tuple[str, float]]:
        """(what deviates, by how many standard errors) for each tensor and for all together, the largest first. Infinite for a constant,
        and for what is not finite."""
        whole = (f"all {len(self.tensors)}", self.numbers, self.mean, self.std**2 + self.mean**2)
        found = []
        for name, n, mean, square in [*self.tensors, whole]:
            by_mean, by_std = self.error(n)
            std = math.sqrt(max(square - mean**2, 0.0))
            for what, off, chance in (
                (f"mean {mean:.4g}", abs(mean - self.rule.mean), by_mean),
                (f"std {std:.4g}", abs(std - self.rule.std), by_std),
            ):
                known = chance and off < math.inf
                errors = 0.0 if off <= 1e-12 else off / chance if known else math.inf
                found.append((f"{name}: {what}", errors))
        return sorted(found, key=lambda pair: -pair[1])


def table_of(model: GPT, scheme: str) -> list[Group]:
    """A Group for each kind of parameter, in the model's order. The tied tensor counts once, as wte."""
    groups: dict[str, Group] = {}
    for name, p in model.named_parameters():
        kind = group_of(name)
        if kind not in groups:
            groups[kind] = Group(kind, rule_of(name, model.config, scheme))
        groups[kind].add(name, p)
    return list(groups.values())


def tied(model: GPT) -> bool:
    """Whether head and token embedding are one tensor."""
    return model.lm_head.weight is model.transformer.wte.weight


def differing_bits(model: GPT, scheme: str, seed: int, state: Tensor) -> list[str]:
    """Where a new model's weights, or torch's generator after it was made, have not the bits of nanoGPT's draws from that seed.

    Each draw is made again, and held against the weight where it is the one that stays. In the scheme "pytorch" that is the last one of
    the constructors.
    """
    c, weights = model.config, dict(model.named_parameters())
    plan = list(init.draws(c))
    std = init.SCHEMES[scheme].std
    if std is None:
        constructors = next(i for i, d in enumerate(plan) if d.name == init.WTE and d.kind == "uniform") + 1
        stays, factor = {d.name: i for i, d in enumerate(plan[:constructors])}, 1.0
    else:
        stays = {d.name: i for i, d in enumerate(plan) if d.name.endswith("weight")}
        factor = std(c) / init.SCHEMES["nanogpt"].std(c)  # type: ignore[misc]
    wrong, rng = [], torch.get_rng_state()
    torch.manual_seed(seed)
    for i, draw in enumerate(plan):
        values = draw()
        if stays.get(draw.name) == i:
            if draw.name.endswith("c_proj.weight") and factor != 1.0:
                values.mul_(factor)
            if not torch.equal(values, weights[draw.name].detach().cpu()):
                wrong.append(draw.name)
    if not torch.equal(torch.get_rng_state(), state):
        wrong.append("torch's generator after the init")
    torch.set_rng_state(rng)
    return wrong


def draw_counts(c: GPTConfig) -> tuple[dict[str, str], int, int, int]:
    """({group: what nanoGPT's init draws for each of its tensors}, draws, random numbers, those of them that stay)."""
    plan = list(init.draws(c))
    times = Counter(d.name for d in plan)
    said = {
        group_of(n): f"{k}, the last stays" if n.endswith("weight") else f"{k}, then set to 0" for n, k in times.items()
    }
    stay = {d.name: math.prod(d.shape) for d in plan if d.name.endswith("weight")}
    return said, len(plan), sum(math.prod(d.shape) for d in plan), sum(stay.values())


def print_table(groups: list[Group], c: GPTConfig, fresh: bool) -> None:
    """Print a line for each group. What is not the rule's is said in a word, and on a terminal in colour."""
    counts = draw_counts(c)[0]
    colour = sys.stdout.isatty()
    print(
        f"{'parameter':22}{'tensors':>8}{'numbers':>14}  {'rule':26}{'std':>11}{'by chance':>11}{'mean':>11}{'by chance':>11}  draws"
    )
    for g in groups:
        mean_error, std_error = g.error(g.numbers)
        name = "wte (= lm_head)" if g.name == "wte.weight" else g.name
        line = (
            f"{name:22}{len(g.tensors):>8}{g.numbers:>14,}  {g.rule.text:26}{g.std:>11.6f}{std_error:>11.1e}"
            f"{g.mean:>11.1e}{mean_error:>11.1e}  {counts.get(g.name, '')}"
        )
        what, off = g.deviations()[0]
        if off > SIGMAS:
            by = "" if off == math.inf else f", {off:.0f} standard errors off"
            moved = (
                f"std {g.std / g.rule.std:.2f} times the init's" if g.rule.std else f"constant {g.rule.mean:g} at init"
            )
            line += f"  <- {what}{by}" if fresh else f"  <- {moved}"
            line = f"{RED if fresh else YELLOW}{line}{PLAIN}" if colour else line
        print(line)


# ---- the command ----


def inspect(cfg: InspectConfig) -> int:
    """Print what an InspectConfig asks for, and write its files. Returns 1 if a new model's weights are not those of its scheme."""
    fresh, bits = cfg.init_from == "scratch", []
    depths = words("depths", cfg.depths, int, least=1) if cfg.depths else []
    if cfg.signals:
        check_device(cfg.device)
    if fresh:
        config, scheme, what = new_config(cfg), cfg.init_scheme, "a new model"
        check_memory(config, cfg)
        model, state = new_model(config, scheme, cfg.activation, cfg.seed)
        bits = differing_bits(model, scheme, cfg.seed, state)
    elif cfg.init_from in ("resume", "auto"):
        saved = sharded.load(cfg.out_dir)
        check_memory(GPTConfig(**saved["model_args"]), cfg)
        with redirect_stdout(io.StringIO()):
            model = checkpoints.build_model(saved, 0.0)
        scheme = checkpoints.scheme_of(saved)
        dataset = (saved.get("config") or {}).get("dataset", cfg.dataset)
        cfg = cfg.model_copy(
            update={"dataset": check_value(InspectConfig, "dataset", dataset, f"{saved['path']}: its dataset")}
        )
        what = f"{saved['path']}, iteration {saved['iter_num']}"
    else:
        model, scheme, what = huggingface.load(cfg.init_from, 0.0, ""), "nanogpt", cfg.init_from
    c = model.config
    what = (
        f"{what}: {c.n_layer} blocks, {c.n_head} heads, width {c.n_embd}, {c.vocab_size:,} tokens; init scheme {scheme}"
    )
    print(f"{what}\n")
    groups = table_of(model, scheme)
    print_table(groups, c, fresh)
    _, calls, drawn, stay = draw_counts(c)
    print(f"\ndraws of nanoGPT: {calls}, of {drawn:,} random numbers; {stay:,} stay, {drawn - stay:,} are thrown away")
    print(f"tie: lm_head and wte are {'one tensor' if tied(model) else 'two tensors, and nanoGPT has one'}")
    if fresh:
        those = f"those of nanoGPT's draws{'' if scheme == 'nanogpt' else f' with the scheme {scheme}'} from seed {cfg.seed}"
        differing = f": {', '.join(bits[:3])}{', ...' * (len(bits) > 3)} differ" if bits else ""
        print(f"bits: the weights, and torch's generator after them, are {'not ' * bool(bits)}{those}{differing}")
    wrong = fresh and (bool(bits) or not tied(model) or any(g.deviations()[0][1] > SIGMAS for g in groups))
    report = {
        "where": where(cfg.device if cfg.signals else "cpu"), "model": asdict(c), "scheme": scheme,
        "weights": "new" if fresh else "trained", "tied": tied(model), "differing_bits": bits,
        "draws": {"calls": calls, "numbers": drawn, "stay": stay}, "groups": [as_json(g) for g in groups],
    }  # fmt: skip
    if cfg.signals:
        report["signals"] = signals(model, scheme, cfg, fresh, what, depths)
    if cfg.json:
        files.write(Path(cfg.json), (json.dumps(finite(report), indent=1) + "\n").encode(), "--json")
    return int(wrong)


def new_config(cfg: InspectConfig) -> GPTConfig:
    """The GPTConfig of a new model: its vocabulary is that of the dataset, if that is here, else GPT-2's."""
    folder = data.dataset_folder(cfg.dataset)
    if cfg.dataset == EMBEDDED:
        prepare_embedded(folder)
    meta = data.load_meta(folder)
    check_heads(cfg)
    return cfg.gpt_config(meta["vocab_size"] if meta else 50304)


def new_model(c: GPTConfig, scheme: str, activation: str, seed: int) -> tuple[GPT, Tensor]:
    """(a new model, the state of torch's generator after it) from a seed."""
    torch.manual_seed(seed)
    with redirect_stdout(io.StringIO()):
        model = new_gpt(c, scheme, activation)
    return model, torch.get_rng_state()


def check_memory(c: GPTConfig, cfg: InspectConfig) -> None:
    """Raise UserError if a model does not fit into this machine's memory."""
    free = free_memory()
    C, T = c.n_embd, min(c.block_size, MOST_TOKENS)
    weights = (c.vocab_size + c.block_size) * C + 12 * c.n_layer * C * C
    takes = 4 * (weights + max(c.vocab_size * C, 4 * C * C))  # one draw is made again at a time
    if cfg.signals:
        # Gradients, and what the backward needs: the logits three times; of each block about 30 values of the width, and attention's.
        kept = 3 * c.vocab_size + c.n_layer * (30 * C + 3 * c.n_head * T)
        takes += 4 * weights + 4 * cfg.sequences * T * kept
    if free is not None and takes > free:
        raise UserError(
            f"{weights / 1e6:,.0f}M parameters take about {takes / 1e9:,.1f} GB to look at, and {free / 1e9:,.1f} GB of memory are free; "
            "take a smaller model, or a machine with more"
        )


def free_memory() -> int | None:
    """Bytes of this machine's memory that a program may take; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def as_json(g: Group) -> dict[str, Any]:
    """A group for the file of --json."""
    mean_error, std_error = g.error(g.numbers)
    worst, off = g.deviations()[0]
    return {
        "name": g.name, "tensors": len(g.tensors), "numbers": g.numbers, "rule": g.rule.text,
        "expected_mean": g.rule.mean, "mean": g.mean, "mean_error": mean_error,
        "expected_std": g.rule.std, "std": g.std, "std_error": std_error,
        "largest_deviation": worst, "standard_errors": off, "as_expected": off <= SIGMAS,
    }  # fmt: skip


def finite(thing: Any) -> Any:
    """A report with None for each number that is not finite: JSON has none."""
    if isinstance(thing, dict):
        return {k: finite(v) for k, v in thing.items()}
    if isinstance(thing, list):
        return [finite(v) for v in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


# ---- signals ----


def read_text(c: GPTConfig, cfg: InspectConfig) -> tuple[Tensor, Tensor, str]:
    """(token ids, targets [B,T], what text it is): sequences of the held-out text, evenly spread; else of the embedded one."""
    here = cfg.val_data or data.dataset_folder(cfg.dataset).is_dir() or cfg.dataset == EMBEDDED
    if not here and c.vocab_size < 256:
        raise UserError(
            f"--dataset={cfg.dataset}: there is no such data here, and the embedded text has 256 tokens, not {c.vocab_size}"
        )
    name = cfg.dataset if here else EMBEDDED
    with redirect_stdout(io.StringIO()):
        _, tokens, *_ = data.load_dataset(cfg.model_copy(update={"dataset": name}))
    tokens.vocab_size = c.vocab_size
    T = min(c.block_size, MOST_TOKENS, len(tokens) - 1)
    if T < 1:
        raise UserError(f"{tokens.paths[0]}: two tokens are needed, and it has {len(tokens)}")
    starts = [i * (len(tokens) - T - 1) // max(cfg.sequences - 1, 1) for i in range(cfg.sequences)]
    read = torch.from_numpy(tokens.read(starts, T + 1)).to(cfg.device)
    if not here:
        print(f"\nthere is no {cfg.dataset} here; signals are those of the embedded text")
    said = f"{cfg.sequences} x {T} tokens of {name}" + ("" if here else ", as bytes")
    return read[:, :-1].contiguous(), read[:, 1:].contiguous(), said


def predicted(c: GPTConfig, scheme: str, x: Tensor, activation: Any) -> list[dict[str, float]]:
    """`depth.predict` for the weights of a scheme."""
    return depth.predict(c, lambda name: rule_of(full_name(name), c, scheme).std, x, activation)


def full_name(name: str) -> str:
    """A parameter's name in the model, in the first block."""
    return f"transformer.{name}" if name.startswith("w") else f"transformer.h.0.{name}"


def signals(model: GPT, scheme: str, cfg: InspectConfig, fresh: bool, what: str, depths: list[int]) -> dict[str, Any]:
    """Measure, predict and draw the signals of a model; write signals.png, signals.html, and rescale.png of --depths, into --out."""
    c, out = model.config, Path(cfg.out)
    x, y, text = read_text(c, cfg)
    activation = ACTIVATIONS[model.activation]()
    report: dict[str, Any] = {"text": text, **depth.measure(model.to(cfg.device), x, y)}
    report["predicted"] = predicted(c, scheme, x, activation)
    if not fresh:
        fresh_model, _ = new_model(c, scheme, model.activation, cfg.seed)
        report["init"] = depth.measure(fresh_model.to(cfg.device), x, y)["layers"]
    said = f"{text}; loss {report['loss']:.4f}, ln(tokens) {math.log(c.vocab_size):.4f}; logits' rms {report['logits']:.4g}"
    if fresh:
        said += f", predicted {math.sqrt(c.n_embd) * rule_of(init.WTE, c, scheme).std:.4g}"
    print(f"\n{said}\n")
    rows = depth.lines(report["layers"], report["predicted"] if fresh else None)
    depth.print_lines(rows)
    pictures = [("signals by layer", depth.draw_signals(report, what))]
    files.write(out / "signals.png", pictures[0][1], "--out")
    written = [out / "signals.png"]
    if depths:
        report["rescale"] = rescale(c, model.activation, depths, cfg, x, y)
        title = f"a new model's stream, width {c.n_embd}, {text}"
        pictures.append(("the stream with and without the rescale", depth.draw_rescale(report["rescale"], title)))
        files.write(out / "rescale.png", pictures[1][1], "--out")
        written.append(out / "rescale.png")
    files.write(out / "signals.html", depth.page(what, said, pictures, rows).encode(), "--out")
    print(f"\npictures: {', '.join(map(str, [*written, out / 'signals.html']))}")
    return report


def rescale(
    c: GPTConfig, activation: str, depths: list[int], cfg: InspectConfig, x: Tensor, y: Tensor
) -> list[dict[str, Any]]:
    """The stream by layer of new models of several depths, with and without the rescale: measured and predicted."""
    found = []
    print(f"\n{'blocks':>9}{'scheme':>14}{'embedding':>12}{'end':>10}{'predicted':>11}{'end / embedding':>17}")
    for n_layer in depths:
        deep = replace(c, n_layer=n_layer)
        check_memory(deep, cfg.model_copy(update={"signals": False}))
        for scheme in ("nanogpt", "no_rescale"):
            model = new_model(deep, scheme, activation, cfg.seed)[0].to(cfg.device)
            streams = [
                [row["stream"] for row in rows]
                for rows in (
                    depth.measure(model, x, y, gradients=False)["layers"],
                    predicted(deep, scheme, x, ACTIVATIONS[activation]()),
                )
            ]
            found.append(dict(depth=n_layer, scheme=scheme, measured=streams[0], predicted=streams[1]))
            first, end = streams[0][0], streams[0][-1]
            print(f"{n_layer:>9}{scheme:>14}{first:>12.4f}{end:>10.4f}{streams[1][-1]:>11.4f}{end / first:>17.2f}")
    return found
