"""GPTConfig, the settings of the commands, the presets, and how files and flags become settings.

A setting's type, bounds, default and help stand in one line. Files and flags apply from left to right, and nothing
that a file says is executed. Whatever cannot be is refused with a `UserError` before any work.
"""

import argparse
import ast
import difflib
import math
import operator
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class UserError(Exception):
    """What a user can mend: shown as one line, with exit status 2 and no traceback."""


def cache_folder():
    """Where fastgpt keeps what it can make again: FASTGPT_CACHE, or fastgpt under XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("FASTGPT_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgpt")


@dataclass
class GPTConfig:
    """The shape of a model, as nanoGPT's: same fields, order and defaults."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms together, as GPT-2 has them


def default_dtype():
    """nanoGPT's: bfloat16 on a GPU that has it, else float16. The CPU ignores it and computes in float32."""
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float16"


class Settings(BaseModel):
    """Base of the settings of a command: strict types (an int passes for a float), no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True, allow_inf_nan=False)


RESIDUAL = {"fp32": torch.float32, "bf16": torch.bfloat16}
Residual = Literal["fp32", "bf16"]
Recompute = Literal["none", "gelu", "block"]
DType = Literal["float32", "bfloat16", "float16"]
Preset = Literal["", "quickstart", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "shakespeare-char", "tiny"]


# fmt: off
class TrainConfig(Settings):
    """Every flag of training. Names, defaults and meanings are nanoGPT's; the last group is fastgpt's own."""

    # output
    out_dir: str = Field("out", description="folder of checkpoint, metrics and plot")
    eval_interval: int = Field(2000, gt=0, description="evaluate, and save a checkpoint, every so many iterations")
    log_interval: int = Field(1, gt=0, description="log every so many iterations")
    eval_iters: int = Field(200, gt=0, description="batches of each split that an evaluation averages")
    eval_only: bool = Field(False, description="evaluate once and stop")
    always_save_checkpoint: bool = Field(True, description="save after every evaluation, not only after the best yet")
    init_from: str = Field("scratch", description="scratch, resume (from out_dir), gpt2[-medium|-large|-xl] or a Hugging Face GPT-2 folder")
    # wandb
    wandb_log: bool = Field(False, description="log evaluations to Weights & Biases (the extra `wandb`)")
    wandb_project: str = Field("owt", description="its project")
    wandb_run_name: str = Field("gpt2", description="its run name")
    # data
    dataset: str = Field("openwebtext", description="data/NAME, a folder, or python-stdlib (embedded)")
    gradient_accumulation_steps: int = Field(40, gt=0, description="micro-steps of an iteration, over all GPUs")
    batch_size: int = Field(12, gt=0, le=2**24, description="sequences of a micro-step")
    block_size: int = Field(1024, gt=0, le=2**24, description="tokens of a sequence")
    # model
    n_layer: int = Field(12, gt=0, le=10_000, description="number of blocks")
    n_head: int = Field(12, gt=0, le=2**20, description="attention heads; divides n_embd")
    n_embd: int = Field(768, gt=0, le=2**20, description="width of the model")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability; 0 for pretraining, 0.1 and up for finetuning")
    bias: bool = Field(False, description="biases in Linears and LayerNorms")
    # AdamW
    learning_rate: float = Field(6e-4, ge=0, description="peak learning rate")
    max_iters: int = Field(600000, ge=0, description="number of updates")
    weight_decay: float = Field(1e-1, ge=0, description="weight decay of matrices and embeddings")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's beta2")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 clips nothing")
    # learning rate schedule
    decay_lr: bool = Field(True, description="warm up and decay; else constant")
    warmup_iters: int = Field(2000, ge=0, description="iterations of linear warm-up")
    lr_decay_iters: int = Field(600000, ge=0, description="iteration at which the cosine reaches min_lr")
    min_lr: float = Field(6e-5, ge=0, description="learning rate at the cosine's end")
    # distributed
    backend: str = Field("nccl", description="torch.distributed's backend; gloo where the device is the CPU")
    # system
    device: str = Field("cuda", description="cuda, cuda:1, cpu, mps; under torchrun each rank takes its own GPU")
    dtype: DType = Field(default_factory=default_dtype, description="autocast dtype on CUDA; float16 scales the loss")
    compile: bool = Field(True, description="torch.compile the model")
    # fastgpt's own
    kernels: str = Field("auto", description="auto, triton, torch, or by op as attention=torch")
    micro_batch: int | str = Field("", description="sequences computed at a time: a multiple of batch_size, or auto for what fills this GPU; the same update")
    cuda_graphs: bool = Field(False, description="replay each micro-step as one CUDA graph; with --compile=False nothing is compiled either")
    recompute: Recompute = Field("none", description="compute again in the backward what it would keep, to save memory: gelu, half of the MLP's; block, all of a block's")
    doc_mask: bool = Field(False, description="keep attention within documents, which the dataset's separator tokens part")
    residual: Residual = Field("fp32", description="dtype of the residual stream between blocks; bf16 moves fewer bytes, and rounds")
    preset: Preset = Field("", description="base that the other flags change: " + ", ".join(get_args(Preset)[1:]))
    train_data: str = Field("", description="token file or glob in place of the dataset's train.bin")
    val_data: str = Field("", description="token file or glob in place of the dataset's val.bin")
    seed: int = Field(1337, ge=0, lt=2**63, description="random seed; nanoGPT's is 1337")
    eval_seed: int | None = Field(None, ge=0, lt=2**63, description="seed of the evaluation batches; None: drawn among the training batches, as in nanoGPT")
    peak_flops: float | None = Field(None, gt=0, description="peak FLOP/s that MFU is counted against; None: looked up by GPU")
    sample_tokens: int = Field(0, ge=0, description="tokens of text to sample at the end")

    def gpt_config(self, vocab_size):
        """The GPTConfig of a new model."""
        shape = {k: getattr(self, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
        return GPTConfig(vocab_size=vocab_size, **shape)


class SampleConfig(Settings):
    """Every flag of sampling. Names, defaults and meanings are nanoGPT's; the last group is fastgpt's own."""

    init_from: str = Field("resume", description="resume (the checkpoint in out_dir), gpt2[-medium|-large|-xl] or a Hugging Face GPT-2 folder")
    out_dir: str = Field("out", description="folder of the checkpoint")
    start: str = Field("\n", description="the prompt, or FILE:path of one")
    num_samples: int = Field(10, gt=0, description="how many samples")
    max_new_tokens: int = Field(500, gt=0, description="tokens of each sample")
    temperature: float = Field(0.8, ge=0, description="below 1 less random, above 1 more; 0 takes the likeliest token")
    top_k: int = Field(200, ge=0, description="sample among the so many likeliest tokens; 0: among all")
    seed: int = Field(1337, ge=0, lt=2**63, description="random seed")
    device: str = Field("cuda", description="cuda, cuda:1, cpu, mps")
    dtype: DType = Field(default_factory=default_dtype, description="autocast dtype on CUDA")
    compile: bool = Field(False, description="torch.compile the full forward; steps on cached keys and values stay eager")


class PrepareConfig(Settings):
    """Every flag of preparing a text for training."""

    input: str = Field("", description="text file, or folder of text files")
    tokenizer: str = Field("bytes", description="bytes, chars, gpt2, or another tiktoken encoding by name")
    out: str = Field("", description="folder to write, such as data/NAME")


class StepShape(Settings):
    """A model and a micro-step, for commands that count."""

    preset: Preset = Field("gpt2", description="whose layers, heads and width: gpt2, gpt2-medium, gpt2-large, gpt2-xl, ...")
    batch_size: int = Field(32, gt=0, le=2**20, description="sequences of the micro-step")
    block_size: int = Field(1024, gt=0, le=2**24, description="tokens of a sequence")
    vocab_size: int = Field(50304, gt=0, le=2**24, description="vocabulary")
    bias: bool = Field(False, description="biases in Linears and LayerNorms")

    def gpt_config(self):
        """Its GPTConfig, without dropout."""
        shape = {k: v for k, v in preset(self.preset).items() if k in ("n_layer", "n_head", "n_embd")}
        return GPTConfig(self.block_size, self.vocab_size, **shape, dropout=0.0, bias=self.bias)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic keeps the name for a method that nobody calls here

    class VerifyConfig(Settings):
        """Every flag of verifying the kernels."""

        json: str = Field("", description="file to write the report to, as JSON")

    class CountConfig(StepShape):
        """Every flag of counting a micro-step's launches and bytes."""

        arms: str = Field("eager,compiled,fastgpt,fastgpt-eager", description="which to count")
        residual: Residual = Field("fp32", description="the residual stream of fastgpt's arms: fp32 or bf16")
        by_kernel: bool = Field(False, description="a row for each kernel instead of for each op")
        json: bool = Field(False, description="print JSON instead of the tables")


class RooflineConfig(StepShape):
    """Every flag of the roofline of a training step."""

    gpu: str = Field("H200", description="a GPU by name, whose data sheet counts")
    flops: float | None = Field(None, gt=0, description="FLOP/s in bf16, such as a benchmark's ceiling; None: the data sheet's")
    bandwidth: float | None = Field(None, gt=0, description="bytes/s of memory; None: the data sheet's")


class TuneConfig(StepShape):
    """Every flag of tuning the kernels' launch configurations, at the shapes of a run."""

    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability")
    doc_mask: bool = Field(False, description="for runs with --doc_mask")
    residual: Residual = Field("fp32", description="for runs with this --residual")
    device: str = Field("cuda", description="cuda, cuda:1")
    dtype: DType = Field(default_factory=default_dtype, description="autocast dtype")
    only: str = Field("", description="ops, with commas: gelu_mlp, attention, layer_norm, linear_cross_entropy, embedding, adamw, products; all of them otherwise")
    budget: int = Field(300, gt=0, description="seconds for everything, the op that takes most of a step first")
    out: str = Field("", description="file to write in place of the one that runs take")


class BenchConfig(Settings):
    """Every flag of a benchmark run."""

    budget: int = Field(480, gt=0, description="seconds for everything, most important first")
    only: str = Field("", description="step, ops, or one op: layer_norm, attention, gelu_mlp, cross_entropy, embedding, optimizer")
    quick: bool = Field(False, description="fewer cases and rounds; without a GPU at toy size either way")
    out: str = Field("benchmarks/results", description="folder of the results, one folder in it for each GPU")
    profile: bool = Field(False, description="a trace of each arm's step, and GPU time by op beside the roofline")


class CompareConfig(Settings):
    """Every flag of comparing two result files, given by path or else the newest two of the newest GPU."""

    threshold: float = Field(0.05, ge=0, description="how much slower is too slow: 0.05 is five percent")
    out: str = Field("benchmarks/results", description="folder of the results")


class ReportConfig(Settings):
    """Every flag of writing a report of a result file, given by path or else the newest."""

    readme: bool = Field(False, description="write the README's table of the newest result instead")
    out: str = Field("benchmarks/results", description="folder of the results")


# fmt: on

MODEL_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

# Learning rates of the larger sizes: GPT-3's for models of their size (arXiv 2005.14165, table 2.1).
PEAK_LR = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}

SHAKESPEARE_CHAR = dict(
    out_dir="out-shakespeare-char", eval_interval=250, log_interval=10, always_save_checkpoint=False,
    dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64, block_size=256,
    n_layer=6, n_head=6, n_embd=384, dropout=0.2,
    learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
)  # fmt: skip

TINY = dict(
    out_dir="out-tiny", eval_interval=50, eval_iters=10, log_interval=10,
    gradient_accumulation_steps=1, batch_size=8, block_size=64, n_layer=2, n_head=2, n_embd=64,
    learning_rate=1e-3, max_iters=100, lr_decay_iters=100, min_lr=1e-4, warmup_iters=10, compile=False,
)  # fmt: skip


def preset(name):
    """The settings that a preset changes, as a dict."""
    if name in MODEL_SIZES:
        return dict(MODEL_SIZES[name], learning_rate=PEAK_LR[name], min_lr=PEAK_LR[name] / 10)
    if name == "shakespeare-char":
        return dict(SHAKESPEARE_CHAR)
    if name == "tiny":
        return dict(TINY, dataset="python-stdlib", device="cuda" if torch.cuda.is_available() else "cpu")
    if name == "quickstart":
        return quickstart()
    return {}


QUICKSTART_OUT = "out-quickstart"


def quickstart():
    """A run on text that every machine has, sized to the machine at hand."""
    common = dict(dataset="python-stdlib", out_dir=QUICKSTART_OUT, sample_tokens=400, log_interval=20)
    if torch.cuda.is_available():  # nanoGPT's shakespeare_char size; the corpus is ten times as large, so no dropout
        return dict(
            SHAKESPEARE_CHAR | common, dropout=0.0, always_save_checkpoint=True,
            max_iters=2000, lr_decay_iters=2000, eval_interval=500, eval_iters=50,
        )  # fmt: skip
    return dict(
        common, device="cpu", compile=False, gradient_accumulation_steps=1,
        batch_size=16, block_size=64, n_layer=4, n_head=4, n_embd=128,
        learning_rate=3e-3, min_lr=3e-4, warmup_iters=50, max_iters=1000, lr_decay_iters=1000,
        eval_interval=250, eval_iters=20,
    )  # fmt: skip


# ---- files and flags -> settings ----


def parse(schema, argv, prog, base=None):
    """Settings from command-line words, and the set of names that they and their files gave.

    A word is a config file (nanoGPT's .py, or .toml), `--key=value`, `--key value`, or of a switch `--key` alone; later ones
    win. What nothing
    gives comes from `base(given values, whether a file was read)`, else from the schema's defaults. Prints help and
    exits on -h. Raises UserError.
    """
    given, has_file = {}, False  # name -> (value, where it was said)
    words = enumerate(argv, 1)
    for i, word in words:
        if word in ("-h", "--help"):
            print(help_text(schema, prog), end="")
            raise SystemExit(0)
        if not word.startswith("--"):
            # Names in a file may refer to any setting: to what was given before, else to its default.
            known = {n: f.get_default(call_default_factory=True) for n, f in schema.model_fields.items()}
            known.update({name: value for name, (value, _) in given.items()})
            given.update(read_config(word, schema, known))
            has_file = True
            continue
        key, equals, text = word[2:].partition("=")
        check_key(schema, key, word)
        bare = i == len(argv) or argv[i].startswith("-") or argv[i].endswith((".py", ".toml"))
        if not equals and bare and is_switch(schema, key):
            text = "True"
        elif not equals:
            text = next(words, (i, None))[1]
            if text is None or text.startswith("--"):
                raise UserError(f"--{key}: a value is missing; write --{key}=VALUE")
        given[key] = (from_text(schema, key, text), f"--{key}")
    values = {name: check_value(schema, name, value, where) for name, (value, where) in given.items()}
    return schema(**{**(base(values, has_file) if base else {}), **values}), set(values)


def train_base(given, has_file):
    """The values that a training run's files and flags change: the preset's over nanoGPT's defaults, or quickstart's
    where nothing says what is to be trained."""
    named = has_file or given.keys() & {"preset", "dataset", "train_data"}
    start = given.get("init_from", "scratch")
    # Another run's checkpoint, or GPT-2's, is not to go on with the quickstart's text and settings.
    own = start == "scratch" or (start == "resume" and given.get("out_dir", QUICKSTART_OUT) == QUICKSTART_OUT)
    return preset("quickstart" if own and not named else given.get("preset", ""))


def parse_train(argv, prog="train.py"):
    """(TrainConfig, names given) from command-line words; see `parse`.

    Without a config file, --preset, --dataset or --train_data, and without another run's or GPT-2's weights to start
    from, the base is the preset quickstart; else it is nanoGPT's defaults under the preset.
    """
    cfg, given = parse(TrainConfig, argv, prog, train_base)
    if cfg.n_embd % cfg.n_head:
        near = min((h for h in range(1, cfg.n_embd + 1) if cfg.n_embd % h == 0), key=lambda h: abs(h - cfg.n_head))
        raise UserError(f"--n_head={cfg.n_head} does not divide n_embd={cfg.n_embd}; the nearest that does is {near}")
    return cfg, given


def from_text(schema, name, text):
    """The value that a flag's text stands for: a Python literal as in nanoGPT, the text itself for a string setting."""
    if schema.model_fields[name].annotation is str:
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def is_switch(schema, name):
    """Whether a setting is true or false."""
    return schema.model_fields[name].annotation is bool


def check_key(schema, key, where):
    if key not in schema.model_fields:
        near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0)
        raise UserError(f"{where}: there is no setting {key!r}; the nearest is {near[0]!r}")


def check_value(schema, name, value, where):
    """The value in the setting's type, or a UserError that names the setting, the value and the nearest right one."""
    try:
        return getattr(schema.__pydantic_validator__.validate_assignment(schema.model_construct(), name, value), name)
    except ValidationError as e:
        problem = e.errors()[0]["msg"].lower().removeprefix("input ")
        raise UserError(
            f"{where}: {value!r} {problem}; the nearest right value is {nearest(schema, name, value)!r}"
        ) from None


def nearest(schema, name, value):
    """A right value close to a wrong one, the default where nothing is close."""
    field = schema.model_fields[name]
    default = field.get_default(call_default_factory=True)
    kinds = [t for t in (get_args(field.annotation) or (field.annotation,)) if t is not type(None)]
    if not isinstance(kinds[0], type):  # a Literal's choices
        return difflib.get_close_matches(str(value), kinds, n=1, cutoff=0)[0]
    kind = kinds[0]
    if kind is bool:
        return str(value).lower() in ("1", "1.0", "yes", "y", "on", "true", "t")
    try:
        number = round(float(value)) if kind is int else float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    if math.isinf(number) or math.isnan(number):
        return default
    for bound in field.metadata:
        step = 1 if kind is int else 1e-3
        if hasattr(bound, "gt"):
            number = max(number, bound.gt + step)
        if hasattr(bound, "ge"):
            number = max(number, bound.ge)
        if hasattr(bound, "le"):
            number = min(number, bound.le)
        if hasattr(bound, "lt"):
            number = min(number, bound.lt - step)
    return kind(number)


def help_text(schema, prog):
    """What --help prints: every flag with its default and one line."""
    parser = argparse.ArgumentParser(
        prog, usage=f"{prog} [FILE.py|FILE.toml ...] [--key=value ...]", description=schema.__doc__, add_help=False
    )
    for name, field in schema.model_fields.items():
        kind = getattr(field.annotation, "__name__", "value").upper()
        default = field.get_default(call_default_factory=True)
        parser.add_argument(
            f"--{name}", metavar=kind, help=f"{field.description} (default: {default!r})".replace("%", "%%")
        )
    return parser.format_help()


# ---- config files, read and never executed ----

BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def read_config(path, schema, known):
    """{name: (value, where)} of a config file: TOML by its ending, else nanoGPT's assignments. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file (flags are written --key=value)") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a config file: {e}") from None
    print(f"Overriding config with {path}:\n{text}")
    if path.endswith(".toml"):
        try:
            found = {key: (value, path) for key, value in tomllib.loads(text).items()}
        except (tomllib.TOMLDecodeError, RecursionError) as e:
            raise UserError(f"{path}: not TOML: {e}") from None
    else:
        found = read_assignments(path, text, known, schema.model_fields)
    for key, (_, where) in found.items():
        check_key(schema, key, where)
    return found


def read_assignments(path, text, known, settings):
    """{name: (value, where)} of Python text made of assignments; imports and docstrings are passed over.

    A name that is no setting may help in later lines, as in nanoGPT; it is left out if one uses it.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f"{path}, line {getattr(e, 'lineno', None) or 1}: not Python: {getattr(e, 'msg', e)}") from None
    known, found = dict(known), {}
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            continue
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [getattr(node, "target", None)]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if not targets or not all(isinstance(t, ast.Name) for t in targets) or node.value is None:
            raise UserError(f"{where}: a config file is read, not run: only assignments `name = value` may stand in it")
        try:
            value = evaluate(node.value, known, where)
        except (TypeError, ValueError, ArithmeticError, RecursionError) as e:
            raise UserError(f"{where}: {e}") from None
        for target in targets:
            known[target.id] = value
            found[target.id] = (value, where)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return {name: v for name, v in found.items() if name in settings or name not in used}


def evaluate(node, known, where):
    """The value of an expression of literals, arithmetic, known names and str(time.time())."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, bool, str, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Call) and ast.unparse(node) == "time.time()":
        return time.time()
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "str"
        and len(node.args) == 1
        and not node.keywords
    ):
        return str(evaluate(node.args[0], known, where))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not)):
        value = evaluate(node.operand, known, where)
        return not value if isinstance(node.op, ast.Not) else -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = evaluate(node.left, known, where), evaluate(node.right, known, where)
        # Text is only ever added to, and no value grows large: a file must not be able to fill the memory.
        text = isinstance(left, str) or isinstance(right, str)
        if (not text or isinstance(node.op, ast.Add)) and not (isinstance(node.op, ast.Pow) and abs(right) > 64):
            value = BINARY[type(node.op)](left, right)
            if (len(value) if isinstance(value, str) else abs(value) / 2**50) < 10_000:
                return value
    raise UserError(
        f"{where}: {ast.unparse(node)!r} is not read: a value is made of literals, arithmetic, earlier names and str(time.time())"
    )
