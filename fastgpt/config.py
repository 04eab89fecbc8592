"""The settings: GPTConfig, the schemas of the commands, and the presets.

A setting's type, bounds, default and help stand in one line. fastgpt/parse.py reads files and flags into them. The schemas of
`fastgpt bench` stand with the benchmarks.
"""

import glob
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastgpt.init import SCHEMES


class UserError(Exception):
    """A mistake that the user can mend. It is shown as one line, with its exit status and no traceback."""

    status = 2


class Diverged(UserError):
    """A run that cannot go on: its loss, gradients or weights are not finite. All its processes raise it."""

    status = 3


def cache_folder() -> Path:
    """The folder of what fastgpt can make again: FASTGPT_CACHE, else fastgpt in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("FASTGPT_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastgpt")
    return Path(os.path.expanduser(named))


def own_environment() -> dict[str, str]:
    """The environment of a process that is to import this very fastgpt, installed or not."""
    here = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}


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


def default_dtype() -> "DType":
    """nanoGPT's: bfloat16 on a GPU that has it, else float16. The CPU ignores it and computes in float32."""
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float16"


def default_device() -> str:
    """cuda; cpu on a machine without a GPU. Where there is one that PyTorch cannot use, the user is to hear of it: cuda."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if torch.cuda.is_available() or (gpu_files() and not hidden) else "cpu"


def gpu_files() -> list[str]:
    """The GPUs that NVIDIA's driver shows."""
    return glob.glob("/dev/nvidia[0-9]*")


class Settings(BaseModel):
    """Base of the settings of a command: strict types (an int passes for a float), no unknown keys.

    GROUPS: the titles under which --help lists them, each by the first setting that stands under it. EXAMPLES: command lines.
    """

    GROUPS: ClassVar[dict[str, str]] = {}
    EXAMPLES: ClassVar[list[str]] = []
    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True, allow_inf_nan=False)


def as_path(text: str) -> str:
    """A path as a user writes it: `~` is the home folder, which no shell puts in its place behind a flag's `=`."""
    if "\0" in text:
        raise ValueError("has a NUL in it")
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(as_path)]
RESIDUAL = {"fp32": torch.float32, "bf16": torch.bfloat16}
Residual = Literal["fp32", "bf16"]
RunnerName = Literal["auto", "graphs", "compile", "eager"]
Recompute = Literal["none", "gelu", "block"]
Activation = Literal["gelu", "gelu_tanh", "relu"]
DType = Literal["float32", "bfloat16", "float16"]
if TYPE_CHECKING:
    InitScheme = str
else:
    InitScheme = Literal[tuple(SCHEMES)]  # the names in that table
Preset = Literal["", "quickstart", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "shakespeare-char", "tiny"]


# fmt: off
class TrainConfig(Settings):
    """Train a model. Flags that nanoGPT has keep their names, defaults and meanings; the others are fastgpt's own."""

    GROUPS = {
        "out_dir": "output", "wandb_log": "logging", "dataset": "data", "n_layer": "model", "learning_rate": "optimizer",
        "decay_lr": "schedule", "backend": "several GPUs", "device": "system", "kernels": "speed", "doc_mask": "model",
        "residual": "speed", "overwrite": "reliability", "preset": "data", "seed": "system", "peak_flops": "logging",
        "keep": "reliability", "sample_tokens": "output", "parallel": "several GPUs",
    }
    EXAMPLES = [
        "fastgpt train                                        # a small model on text that is built in",
        "fastgpt train config/train_shakespeare_char.py --max_iters=2000",
        "fastgpt train --preset=gpt2 --dataset=openwebtext --compile=False",
        "torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py",
        "fastgpt train --init_from=auto --out_dir=out         # go on with a run, or begin it",
        "fastgpt train config/train_gpt2.py --print_config    # what would be trained",
    ]

    # output
    out_dir: PathText = Field("out", description="folder of checkpoint, metrics and plot")
    eval_interval: int = Field(2000, gt=0, description="iterations from one evaluation to the next; each may save a checkpoint")
    log_interval: int = Field(1, gt=0, description="iterations from one logged line to the next")
    eval_iters: int = Field(200, gt=0, description="batches of each split in an evaluation")
    eval_only: bool = Field(False, description="evaluate once and stop")
    always_save_checkpoint: bool = Field(True, description="save after every evaluation, not only after the best one so far")
    init_from: PathText = Field("scratch", description="scratch, resume (from out_dir), auto (resume if there is a checkpoint, else scratch), or a GPT-2 in Hugging Face's format: a folder, or an id of the hub such as gpt2-medium or distilgpt2")
    # wandb
    wandb_log: bool = Field(False, description="nanoGPT's way to say --tracker=wandb")
    wandb_project: str = Field("owt", description="its project")
    wandb_run_name: str = Field("gpt2", description="its run name")
    # data
    dataset: PathText = Field("openwebtext", description="data/NAME, a folder, or python-stdlib (embedded)")
    gradient_accumulation_steps: int = Field(40, gt=0, le=2**24, description="micro-steps of an iteration, of all GPUs together")
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
    decay_lr: bool = Field(True, description="warm up and decay the learning rate; else it is constant")
    warmup_iters: int = Field(2000, ge=0, description="iterations of linear warm-up")
    lr_decay_iters: int = Field(600000, ge=0, description="iteration at which the cosine reaches min_lr")
    min_lr: float = Field(6e-5, ge=0, description="learning rate at the cosine's end")
    # distributed
    backend: str = Field("nccl", description="torch.distributed's backend; gloo where the device is the CPU")
    # system
    device: str = Field("cuda", description="cuda, cuda:1, cpu, mps; cpu where none is given and there is no GPU; under torchrun each rank takes its own GPU")
    dtype: DType = Field(default_factory=default_dtype, description="autocast dtype on CUDA; float16 scales the loss")
    compile: bool = Field(True, description="torch.compile the model; on CUDA, where neither this nor --cuda_graphs is given, --runner decides")
    # fastgpt's own
    kernels: str = Field("auto", description="auto, triton, torch, or by op as attention=torch")
    runner: RunnerName = Field("auto", description="how a micro-step runs: graphs (CUDA graphs of our kernels), compile, eager; auto times them and plain PyTorch, and takes the fastest")
    micro_batch: int | str = Field("auto", description="sequences computed at a time: a multiple of batch_size, or auto to fill this GPU; the update is the same")
    cuda_graphs: bool = Field(False, description="replay each micro-step as one CUDA graph; with --compile=True of the compiled model; overrides --runner=auto")
    recompute: Recompute = Field("none", description="save memory, and compute again in the backward: gelu, half of what the MLP keeps; block, all that a block keeps")
    doc_mask: bool = Field(False, description="keep attention within documents; the dataset's separator tokens say where one begins")
    activation: Activation = Field("gelu", description="between the Linears of an MLP: gelu, nanoGPT's, by erf; gelu_tanh, as OpenAI trained GPT-2; relu")
    residual: Residual = Field("fp32", description="dtype of the residual stream between blocks; bf16 moves fewer bytes, and rounds")
    init_scheme: InitScheme = Field("nanogpt", description="initial weights of a new model: nanogpt, or to compare with it " + ", ".join(list(SCHEMES)[1:]))
    overwrite: bool = Field(False, description="begin anew in an out_dir that holds a run: its first checkpoint replaces that run's")
    save_minutes: float | None = Field(None, gt=0, description="save a checkpoint also when this many minutes have passed since the last one")
    max_bad_steps: int = Field(8, gt=0, description="updates in a row whose loss or gradients are not finite, after which the run stops with exit status 3; each is left out")
    preset: Preset = Field("", description="base that the other flags change")
    train_data: PathText = Field("", description="token file or glob in place of the dataset's train.bin")
    val_data: PathText = Field("", description="token file or glob in place of the dataset's val.bin")
    seed: int = Field(1337, ge=0, lt=2**63, description="random seed; nanoGPT's is 1337")
    eval_seed: int | None = Field(None, ge=0, lt=2**63, description="seed of the evaluation batches; None: drawn among the training batches, as in nanoGPT")
    eval_windows: Literal["random", "first"] = Field("random", description="which windows an evaluation reads: random as in nanoGPT; first, the first eval_iters * batch_size of a split in order, the same every time, and nothing is drawn")
    peak_flops: float | None = Field(None, gt=0, description="peak FLOP/s for the MFU; None: by the GPU's name")
    keep: int = Field(2, gt=0, description="checkpoints to keep: ckpt.pt, the ones before it, and the best one")
    async_checkpoint: bool = Field(False, description="write checkpoints in the background, from a copy of weights and optimizer in the CPU's memory")
    sample_tokens: int = Field(0, ge=0, description="tokens of text to sample at the end")
    sample_every_eval: bool = Field(False, description="sample after every evaluation, too")
    tracker: Literal["none", "tensorboard", "wandb"] = Field("none", description="where to send the curves beside metrics.jsonl: tensorboard, files in out_dir/tensorboard; wandb, Weights & Biases")
    patience: int = Field(0, ge=0, description="evaluations in a row without a better val loss, after which the run ends; 0: never")
    target_loss: float | None = Field(None, gt=0, description="end the run at the first evaluation whose val loss is at most this")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="how several processes train one model: ddp, each has all of it; fsdp, each keeps a part of weights, gradients and moments")
    join_timeout: int = Field(300, gt=0, le=10**6, description="seconds to wait until all processes are there")
    timeout: int = Field(600, gt=0, le=10**6, description="seconds to wait for another process in training; more than an evaluation and a save take")

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The GPTConfig of a new model."""
        shape = {k: getattr(self, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
        return GPTConfig(vocab_size=vocab_size, **shape)


class SampleConfig(Settings):
    """Continue a prompt with a trained model. Flags have nanoGPT's names, defaults and meanings."""

    GROUPS = {"init_from": "model", "start": "text", "seed": "system"}
    EXAMPLES = [
        "fastgpt sample --out_dir=out-quickstart",
        "fastgpt sample --out_dir=out --start='Once upon a time' --num_samples=3 --max_new_tokens=100",
        "fastgpt sample --init_from=gpt2-xl --start=FILE:prompt.txt",
    ]

    init_from: PathText = Field("resume", description="resume (the checkpoint in out_dir), or a GPT-2 in Hugging Face's format: a folder, or an id of the hub such as gpt2-medium")
    out_dir: PathText = Field("out", description="folder of the checkpoint")
    start: str = Field("\n", description="the prompt, or FILE:path of one")
    num_samples: int = Field(10, gt=0, description="how many samples")
    max_new_tokens: int = Field(500, gt=0, description="tokens of each sample")
    temperature: float = Field(0.8, ge=0, description="below 1 less random, above 1 more; 0 takes the likeliest token")
    top_k: int = Field(200, ge=0, description="sample among the top_k likeliest tokens; 0: among all")
    seed: int = Field(1337, ge=0, lt=2**63, description="random seed")
    device: str = Field(default_factory=default_device, description="cuda, cuda:1, cpu, mps; nanoGPT's is cuda, and without a GPU it is cpu")
    dtype: DType = Field(default_factory=default_dtype, description="autocast dtype on CUDA")
    compile: bool = Field(False, description="torch.compile the full forward; steps on cached keys and values stay eager")
    # fastgpt's own
    activation: Literal["", Activation] = Field("", description="of weights from Hugging Face: gelu_tanh computes what OpenAI trained GPT-2 with; empty: as in training")


class ExportConfig(Settings):
    """Write a run's newest checkpoint in another format: for transformers, llm.c or nanoGPT, or as safetensors."""

    EXAMPLES = ["fastgpt export --out_dir=out-quickstart --format=hf", "fastgpt export --out_dir=out --to=model.pt"]

    out_dir: PathText = Field("out", description="folder of the run, or a sharded checkpoint's own folder in it")
    format: Literal["nanogpt", "hf", "safetensors", "llmc"] = Field("nanogpt", description="nanogpt, one ckpt.pt of a sharded checkpoint; hf, a folder that transformers loads; safetensors, one file of the weights; llmc, llm.c's model.bin")
    to: PathText = Field("", description="file or folder to write; empty: in the folder of the run ckpt.pt, hf, model.safetensors or model.bin")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights in hf, safetensors and llmc")
    overwrite: bool = Field(False, description="replace what an earlier export wrote there")


class PlotConfig(Settings):
    """Draw the curves of runs on one page, as a PNG and as an HTML file. A RUN is an out_dir, or its metrics.jsonl."""

    EXAMPLES = ["fastgpt plot out-quickstart", "fastgpt plot out-a out-b --x=hours --out=compared"]

    out: PathText = Field("plot", description="what to write: this name with .png and with .html")
    x: Literal["iter", "tokens", "hours"] = Field("iter", description="what all but the losses are drawn against: iterations, tokens seen, or hours of training")
    smooth: float = Field(0.04, ge=0, lt=1, description="share of a run's logged iterations over which its training loss is averaged; 0: none")
    title: str = Field("", description="a title")


class PrepareConfig(Settings):
    """Turn a text into a dataset: train.bin, val.bin and meta.pkl."""

    EXAMPLES = [
        "fastgpt prepare --input=book.txt --out=data/book",
        "fastgpt prepare --input=folder --tokenizer=gpt2 --out=data/folder",
        "fastgpt train --dataset=book",
    ]

    input: PathText = Field("", description="file or folder: text, .jsonl, .jsonl.gz or .parquet")
    tokenizer: str = Field("bytes", description="bytes, chars, gpt2, another tiktoken encoding by name, or a folder that has a Hugging Face tokenizer")
    out: PathText = Field("", description="folder to write, such as data/NAME")
    field: str = Field("", description="the JSON object's field, or the Parquet table's column, that has the text; empty: text")
    separator: str = Field("", description="text between documents, where \\n, \\t and \\0 may stand in it; empty: the tokenizer's end-of-text token, and nothing for bytes and chars, which have none")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="part of the characters that goes to val: the last ones")
    overwrite: bool = Field(False, description="replace a dataset of another text, or made in another way, in out")


class StepShape(Settings):
    """A model and a micro-step, for commands that count."""

    preset: Preset = Field("gpt2", description="whose layers, heads and width: gpt2, gpt2-medium, gpt2-large, gpt2-xl, ...")
    batch_size: int = Field(32, gt=0, le=2**20, description="sequences of the micro-step")
    block_size: int = Field(1024, gt=0, le=2**24, description="tokens of a sequence")
    vocab_size: int = Field(50304, gt=0, le=2**24, description="vocabulary")
    bias: bool = Field(False, description="biases in Linears and LayerNorms")

    def gpt_config(self) -> GPTConfig:
        """Its GPTConfig, without dropout."""
        shape = {k: v for k, v in preset(self.preset).items() if k in ("n_layer", "n_head", "n_embd")}
        return GPTConfig(self.block_size, self.vocab_size, **shape, dropout=0.0, bias=self.bias)


class StudyConfig(Settings):
    """Train small models on the embedded text, one for each combination of the lists, which have commas, and compare their losses."""

    EXAMPLES = ["fastgpt study --schemes=nanogpt,no_rescale --seeds=5 --out=out-study", "fastgpt study --size=gpu"]

    out: PathText = Field("out-study", description="folder of the results; runs that it has are not run again")
    size: Literal["cpu", "gpu"] = Field("cpu", description="sets the defaults of all flags below: cpu, or gpu for models that take a GPU hours")
    schemes: str = Field("all", description="initial weights, as --init_scheme of train; all: each of them")
    activations: str = Field("gelu", description="as --activation of train")
    learning_rates: str = Field("0.001,0.01", description="peak learning rates; a cosine brings each down to a tenth")
    warmups: str = Field("0,20", description="iterations of warm-up")
    depths: str = Field("12", description="numbers of blocks")
    seeds: int = Field(5, ge=2, le=1000, description="runs of each combination, with seeds from 1 on")
    iters: int = Field(200, gt=0, description="updates of a run")
    n_head: int = Field(4, gt=0, le=2**20, description="attention heads; divides n_embd")
    n_embd: int = Field(64, gt=0, le=2**20, description="width")
    block_size: int = Field(64, gt=0, le=2**24, description="tokens of a sequence")
    batch_size: int = Field(4, gt=0, le=2**24, description="sequences of an update")
    eval_iters: int = Field(50, gt=0, description="batches of held-out text that measure a trained model, the same for all")
    device: str = Field("cpu", description="cpu, cuda, cuda:1")
    processes: int = Field(0, ge=0, le=1024, description="runs at a time; 0: one for each CPU core, and on a GPU one")
    plan: bool = Field(False, description="say what would run and how long it takes, and stop")
    page: PathText = Field("", description="run nothing: write the results in --out between the marks of this Markdown page")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic has a deprecated method `json`, which nobody calls here

    class VerifyConfig(Settings):
        """Check every kernel against PyTorch on this machine. Exit status 1 if one fails."""

        EXAMPLES = ["fastgpt verify", "fastgpt verify --dtype=bfloat16 --json=verify.json"]

        dtype: Literal["all", DType] = Field("all", description="the dtype to check in: float32, float16 or bfloat16; all: in each of them")
        json: PathText = Field("", description="file to write the report to, as JSON")


    class InspectConfig(TrainConfig):
        """Show a model's weights against its init's rules. The flags of training say which model. --out_dir alone: the checkpoint in it."""

        GROUPS = TrainConfig.GROUPS | {"json": "what to show"}
        EXAMPLES: ClassVar[list[str]] = ["fastgpt inspect --preset=gpt2", "fastgpt inspect --out_dir=out-quickstart --signals"]

        json: PathText = Field("", description="file to write the report to, as JSON")
        signals: bool = Field(False, description="measure signals and gradients by layer, and draw them into --out")
        out: PathText = Field("out-inspect", description="folder for signals.png, signals.html and rescale.png")
        sequences: int = Field(4, gt=0, le=2**16, description="sequences of held-out text, of at most 256 tokens, that are the models' input")
        depths: str = Field("", description="with --signals: numbers of blocks, as 12,24,48, at which the stream with the rescale and without is compared")


class TuneConfig(StepShape):
    """Find the kernels' fastest launch configurations on this GPU, at the shapes of a run, for later runs."""

    GROUPS = {"preset": "the run", "device": "tuning"}
    EXAMPLES = ["fastgpt tune", "fastgpt tune --preset=gpt2-medium --batch_size=16 --only=attention --budget=120"]

    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability")
    doc_mask: bool = Field(False, description="tune for runs with --doc_mask")
    residual: Residual = Field("fp32", description="tune for runs with this --residual")
    device: str = Field("cuda", description="cuda, cuda:1")
    dtype: DType = Field(default_factory=default_dtype, description="autocast dtype")
    only: str = Field("", description="ops, with commas: gelu_mlp, attention, layer_norm, linear_cross_entropy, embedding, adamw, products, runner; empty: all of them")
    budget: int = Field(300, gt=0, description="seconds for all ops; the one that takes most of a step comes first. The runner may take 120 more")
    out: PathText = Field("", description="file to write, in place of the one that runs read")


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


def preset(name: str) -> dict[str, Any]:
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


# What --size=gpu of a study changes: GPT-2's width, its depth and four times that, and ten times as many updates.
STUDY_ON_GPU = dict(
    device="cuda", schemes="nanogpt,no_rescale", depths="12,48", learning_rates="0.0006,0.003", warmups="0,100", iters=2000,
    n_head=12, n_embd=768, block_size=256, batch_size=64,
)  # fmt: skip

QUICKSTART_OUT = "out-quickstart"


def quickstart() -> dict[str, Any]:
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
