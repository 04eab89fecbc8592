"""How config files and flags become settings.

Words of a command line apply from left to right. A wrong word is refused with a `UserError` before any work; its message names the right
one, where there is one that is near.
"""

import ast
import difflib
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, get_args

from pydantic import ValidationError

from fastgpt import config_file, usage
from fastgpt.config import QUICKSTART_OUT, Settings, TrainConfig, UserError, default_device, preset

LONGEST = 100  # characters of a value or a name in a message


# Names that other programs give to settings, the setting (of several, the first that a command has), and what else is to be said.
INSTEAD = [
    ("lr max_lr peak_lr base_lr", "learning_rate", ""),
    ("lr_min final_lr end_lr", "min_lr", ""),
    ("steps max_steps num_steps n_steps train_steps total_steps iters num_iters iterations num_iterations", "max_iters", ""),
    ("epoch epochs num_epochs n_epochs max_epochs num_train_epochs", "max_iters", "there are no epochs: it counts updates"),
    ("bs batch micro_batch_size device_batch_size train_batch_size per_device_train_batch_size", "batch_size", ""),
    ("ctx ctx_len n_ctx context context_length context_size seqlen seq_len seq_length sequence_length max_seq_len n_positions",
     "block_size", ""),
    ("layers num_layers n_layers depth num_hidden_layers blocks", "n_layer", ""),
    ("heads num_heads n_heads num_attention_heads", "n_head", ""),
    ("dim d_model width hidden hidden_size hidden_dim emb_dim embed_dim embedding_dim n_embed model_dim", "n_embd", ""),
    ("wd decay l2", "weight_decay", ""),
    ("betas adam_beta1", "beta1", ""),
    ("adam_beta2", "beta2", ""),
    ("clip max_norm max_grad_norm gradient_clip gradient_clip_val clip_grad_norm", "grad_clip", ""),
    ("accum grad_accum accumulation accumulation_steps grad_accum_steps", "gradient_accumulation_steps", ""),
    ("warmup warmup_steps num_warmup_steps", "warmup_iters", ""),
    ("decay_steps lr_decay_steps", "lr_decay_iters", ""),
    ("eval_every eval_freq eval_steps val_every val_interval", "eval_interval", ""),
    ("save_every save_interval save_steps checkpoint_interval", "eval_interval", "a checkpoint follows an evaluation"),
    ("log_every log_freq log_steps logging_steps", "log_interval", ""),
    ("resume resume_from resume_from_checkpoint load checkpoint ckpt ckpt_path model_path", "init_from out_dir", ""),
    ("model model_type model_size model_name model_name_or_path size pretrained", "preset init_from", ""),
    ("data data_dir data_path train_file corpus", "dataset input", "train_data and val_data take files of tokens"),
    ("output out output_dir save_dir save_path outdir outfile output_file", "out_dir out to json", ""),
    ("file text text_file source", "input", ""),
    ("encoding enc vocab", "tokenizer", ""),
    ("precision amp bf16 fp16 mixed_precision half", "dtype", ""),
    ("gpu cuda cpu use_cuda", "device", ""),
    ("random_seed rng_seed", "seed", ""),
    ("flash flash_attn flash_attention attention attn", "kernels", ""),
    ("gradient_checkpointing activation_checkpointing", "recompute", ""),
    ("strategy ddp fsdp", "parallel", ""),
    ("wandb use_wandb", "wandb_log", ""),
    ("project", "wandb_project", ""),
    ("name run_name experiment exp_name", "wandb_run_name", ""),
    ("force overwrite_output_dir", "overwrite", ""),
    ("prompt", "start", ""),
    ("n samples n_samples", "num_samples", ""),
    ("max_tokens length num_tokens", "max_new_tokens", ""),
    ("temp", "temperature", ""),
    ("config config_file cfg", "", "give the file's name alone, as in `fastgpt train FILE.py`"),
    ("gpus n_gpus num_gpus nproc nproc_per_node devices world_size", "", "torchrun says it: `torchrun --nproc_per_node=N train.py ...`"),
]  # fmt: skip
SAME_VALUES = [("bfloat16", "bf16"), ("float16", "fp16", "half"), ("float32", "fp32", "float")]


def parse(
    schema: type[Settings], argv: list[str], prog: str, base: Callable[[dict[str, Any], bool], dict[str, Any]] | None = None,
    check: Callable[[Any], None] = lambda cfg: None,
) -> tuple[Any, set[str]]:  # fmt: skip
    """(settings of a schema, names that the words and their files gave), of command-line words.

    A word is a config file (nanoGPT's .py, or .toml), `--key=value`, `--key value`, or for a switch `--key` alone; later ones win. What
    nothing gives comes from `base(given values, whether a file was read)`, else from the schema's defaults. `check(settings)` may refuse
    them. Prints and exits on -h and on --print_config. Raises UserError.
    """
    given, has_file = {}, False  # given: name -> (value, where it was said)
    show = any(word.replace("-", "_") == "__print_config" for word in argv)
    words = enumerate(argv, 1)
    for i, word in words:
        if word in ("-h", "--help"):
            print(usage.help_text(schema, prog), end="", flush=True)
            raise SystemExit(0)
        if not word.startswith("--"):
            check_file(schema, word)
            # An expression in a file may name any setting: it has the value given before, else its default.
            known = {n: f.get_default(call_default_factory=True) for n, f in schema.model_fields.items()}
            known.update({name: value for name, (value, _) in given.items()})
            say = (lambda text: None) if show else print
            found = config_file.read(os.path.expanduser(word), schema.model_fields, known, say)
            for key, (_, where) in found.items():
                check_key(schema, key, where)
            given.update(found)
            has_file = True
            continue
        key, equals, text = word[2:].partition("=")
        key = key if key in schema.model_fields else key.replace("-", "_")
        if key == "print_config" and not equals:
            continue
        check_key(schema, key, word)
        kind = schema.model_fields[key].annotation
        bare = i == len(argv) or argv[i].startswith("-") or argv[i].endswith((".py", ".toml", ".json"))
        if not equals and bare and kind is bool:
            text = "True"
        elif not equals:
            text = next(words, (i, None))[1]  # type: ignore[assignment]
            if text is None or text.startswith("--"):
                raise UserError(f"--{key}: a value is missing; write --{key}=VALUE")
        given[key] = (text if kind is str else literal(text), f"--{key}")
    values = {name: check_value(schema, name, value, where) for name, (value, where) in given.items()}
    cfg = schema(**{**(base(values, has_file) if base else {}), **values})
    check(cfg)
    if show:
        print(usage.config_text(cfg, values, prog), end="", flush=True)
        raise SystemExit(0)
    return cfg, set(values)


def parse_train(argv: list[str], prog: str = "train.py") -> tuple[TrainConfig, set[str]]:
    """(TrainConfig, names given) of command-line words; see `parse`.

    The words change nanoGPT's defaults, or the preset that they name. Where nothing says what is to be trained they change the preset
    quickstart.
    """
    cfg, given = parse(TrainConfig, argv, prog, train_base, check_heads)
    if cfg.device == "cpu" and "device" not in given:
        print(f"no CUDA GPU here: training on the CPU{', without torch.compile' * (not cfg.compile)}")
    return cfg, given


def train_base(given: dict[str, Any], has_file: bool) -> dict[str, Any]:
    """The values that a training run's files and flags change: a preset's; and without a GPU the CPU's.

    A config file, --preset, --dataset and --train_data say what is to be trained. So do weights to start from, another run's or GPT-2's:
    they must not go on with the quickstart's text and settings. Data of the user's own are not a preset's dataset.
    """
    named = has_file or given.keys() & {"preset", "dataset", "train_data"}
    start = given.get("init_from", "scratch")
    own = start == "scratch" or (start in ("resume", "auto") and of_quickstart(given.get("out_dir", QUICKSTART_OUT)))
    base = dict(device="cpu", compile=False) if "device" not in given and default_device() == "cpu" else {}
    name = "quickstart" if own and not named else given.get("preset", "")
    base |= {**preset(name), "preset": name}
    if given.get("train_data") and given.get("val_data"):
        base.pop("dataset", None)
    return base


def of_quickstart(out_dir: str) -> bool:
    """Whether a run that goes on in out_dir is one of the preset quickstart: by the folder's name, else by its config.json."""
    if out_dir == QUICKSTART_OUT:
        return True
    try:
        preset, _ = config_file.read_start(os.path.join(out_dir, "config.json"), lambda text: None)["preset"]
    except (UserError, KeyError):  # no run of ours
        return False
    return preset == "quickstart"


def check_heads(cfg: Any) -> None:
    """Raise UserError if the heads do not divide the width."""
    if cfg.n_embd % cfg.n_head:
        near = min((h for h in range(1, cfg.n_embd + 1) if cfg.n_embd % h == 0), key=lambda h: abs(h - cfg.n_head))
        raise UserError(f"--n_head={cfg.n_head} does not divide n_embd={cfg.n_embd}; the nearest that does is {near}")


def literal(text: str) -> Any:
    """The Python literal that a flag's text is, as in nanoGPT; the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def check_file(schema: type[Settings], word: str) -> None:
    """Raise UserError for a folder or a text where a config file may stand: it is the value of a flag."""
    if os.path.isdir(word) and "out_dir" in schema.model_fields:
        raise UserError(f"{word}: a folder is no config file; write --out_dir={word}")
    if os.path.exists(word) and "input" in schema.model_fields and not word.endswith((".py", ".toml", ".json")):
        raise UserError(f"{word}: no config file; write --input={word}")


def check_key(schema: type[Settings], key: str, where: str) -> None:
    """Raise UserError for a name that is no setting."""
    if key not in schema.model_fields:
        raise UserError(f"{where}: there is no setting {shown(key)}; {instead(schema, key)}")


def instead(schema: type[Settings], key: str) -> str:
    """What to write instead of a name that is no setting."""
    theirs = {}  # a name of another program's: what is said of it
    for names, settings, note in INSTEAD:
        right = next((name for name in settings.split() if name in schema.model_fields), None)
        if right or not settings:
            says = "; ".join(filter(None, [right and f"it is {right!r} here", note]))
            theirs.update(dict.fromkeys(names.split(), says))
    if likely := close(key.lower(), [*theirs, *schema.model_fields], 0.85):  # it, but for a letter
        return theirs.get(likely, f"the nearest is {likely!r}")
    near = close(key.lower(), schema.model_fields)
    return f"the nearest is {near!r}" if near else "--help lists them all"


def close(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """The word most like another, or None where none is like it."""
    return next(iter(difflib.get_close_matches(word[:LONGEST], list(words), n=1, cutoff=likeness)), None)


def check_value(schema: type[Settings], name: str, value: Any, where: str) -> Any:
    """The value in the setting's type. Raises UserError, which names the setting, the value and the nearest right one."""
    try:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OverflowError
        return getattr(schema.__pydantic_validator__.validate_assignment(schema.model_construct(), name, value), name)
    except ValidationError as e:
        problem = e.errors()[0]["msg"].lower().removeprefix("input ").removeprefix("value error, ")
    except OverflowError:
        problem = "is not within 64 bits"
    near = nearest(schema, name, value)
    named = "" if where.startswith("--") else f"{name}: "  # a file's place does not say which setting
    raise UserError(
        f"{where}: {named}{shown(value)} {problem}" + (near is not None) * f"; the nearest right value is {near!r}"
    )


def shown(value: Any) -> str:
    """A value of a file or flag for a message: whatever it is, as text that is not long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists within lists
        return f"this {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def nearest(schema: type[Settings], name: str, value: Any) -> Any:
    """A right value close to a wrong one; None where none is close."""
    field = schema.model_fields[name]
    kind = next(t for t in (get_args(field.annotation) or (field.annotation,)) if t is not type(None))
    word = shown(value).strip("'").lower()
    if choices := usage.choices(field):
        same = next((c for words in SAME_VALUES if word in words for c in choices if c in words), None)
        return same or close(word, choices)
    if kind is bool:
        yes, no = ("1", "1.0", "yes", "y", "on", "true", "t"), ("0", "0.0", "no", "n", "off", "false", "f", "none")
        return True if word in yes else False if word in no else None
    try:
        number = round(float(value)) if kind is int else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    step = 1 if kind is int else 1e-3
    for bound in field.metadata:
        if hasattr(bound, "gt"):
            number = max(number, bound.gt + step)
        if hasattr(bound, "ge"):
            number = max(number, bound.ge)
        if hasattr(bound, "le"):
            number = min(number, bound.le)
        if hasattr(bound, "lt"):
            number = min(number, bound.lt - step)
    return kind(number)
