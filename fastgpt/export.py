"""`fastgpt export`: a run's newest checkpoint in another program's format. Each is written completely, or not at all.

nanogpt      one ckpt.pt of a sharded checkpoint, optimizer and all
hf           a folder that transformers loads: config.json, model.safetensors, the tokenizer
safetensors  one file with the weights by nanoGPT's names, and the settings as JSON in its metadata
llmc         the file of weights that llm.c's programs begin from
"""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastgpt import checkpoint as checkpoints
from fastgpt import sharded, tokenizer
from fastgpt.config import ExportConfig, GPTConfig, UserError
from fastgpt.files import opened, replacing, sync_folder
from fastgpt.huggingface import BYTE_CHARS, CONV1D, byte_level
from fastgpt.sample import find_meta

TARGETS = {"nanogpt": "ckpt.pt", "hf": "hf", "safetensors": "model.safetensors", "llmc": "model.bin"}
HF_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}  # transformers'
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
LLMC_VERSIONS = {"float32": 3, "bfloat16": 5}
LLMC_MAGIC = 20240326
# How the files begin that are written here: with these bytes, from a place on.
BEGINNINGS = {
    "nanogpt": (0, b"PK"),
    "safetensors": (8, b'{"__metadata__"'),
    "llmc": (0, LLMC_MAGIC.to_bytes(4, "little")),
}


def export(cfg: ExportConfig) -> None:
    """Write what an ExportConfig asks for, and print what was written, of which checkpoint, and what reads it. Raises UserError."""
    out = Path(cfg.out_dir)
    to = Path(cfg.to) if cfg.to else run_folder(out) / TARGETS[cfg.format]
    if cfg.format == "nanogpt":
        check_sharded(out)
        if cfg.dtype != "float32":
            raise UserError(
                f"--dtype={cfg.dtype}: a checkpoint to go on from is float32; leave it out with --format=nanogpt"
            )
    to = to.resolve() if to.is_symlink() else to  # what a link names is replaced, and not the link
    check_target(to, cfg)
    checkpoint = sharded.load(out)
    source = f"{checkpoint.pop('path')}, iteration {checkpoint['iter_num']}"
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if cfg.format == "nanogpt":
            with aside(to) as path:
                checkpoints.write(checkpoint, path)
        elif cfg.format == "hf":
            write_hf(checkpoint, to, cfg.dtype)
        elif cfg.format == "safetensors":
            with aside(to) as path, replacing(path) as f:
                write_safetensors(f, of_nanogpt(checkpoint), cfg.dtype, metadata(checkpoint))
        else:
            with aside(to) as path, replacing(path) as f:
                write_llmc(f, checkpoint, cfg.dtype)
    except OSError as e:
        raise UserError(f"--to={to}: cannot be written ({e.strerror})") from None
    print(f"{source}, {says(cfg.format, to, checkpoints.activation_of(checkpoint))}")


@contextmanager
def aside(to: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `to` when the block ends well.

    It is in a folder of its own: a run that is still training removes the unfinished files that it finds in its folder.
    """
    with tempfile.TemporaryDirectory(prefix=".export-", dir=to.parent) as folder:
        path = Path(folder) / to.name
        yield path
        os.replace(path, to)
        sync_folder(to.parent)


def says(format: str, to: Path, activation: str) -> str:
    """What was made, and what reads it."""
    if format == "hf":
        tanh = " --activation=gelu_tanh" * (activation == "gelu_tanh")
        python = f"in Python: transformers.AutoModelForCausalLM.from_pretrained({str(to)!r})"
        return f"is now a folder of transformers: {to}\n{python}\nmore text: fastgpt sample --init_from={shlex.quote(str(to))}{tanh}"
    if format == "llmc":
        return f"is now one file of llm.c: {to}\nin llm.c: ./train_gpt2cu -e {shlex.quote(str(to))}"
    if format == "safetensors":
        return f"is now one file: {to}\nin Python: safetensors.torch.load_file({str(to)!r})"
    more = f"\nmore text: fastgpt sample --out_dir={shlex.quote(str(to.parent))}"
    return f"is now one file: {to}" + more * (to.name == "ckpt.pt")


def run_folder(out: Path) -> Path:
    """The folder of a run, where out may be one of its sharded checkpoints."""
    return out.parent if (out / sharded.REST).exists() else out


def check_sharded(out: Path) -> None:
    """Raise UserError if the newest checkpoint is not a sharded one."""
    if sharded.newest(out) is None:
        path = checkpoints.checkpoint_path(out)
        is_one = f"{path} is one file already; --format=hf, safetensors or llmc makes another of it"
        none = "there is no sharded checkpoint, nor another; train first, or give another --out_dir"
        raise UserError(f"--out_dir={out}: {is_one if path.exists() else none}")


def check_target(to: Path, cfg: ExportConfig) -> None:
    """Raise UserError if something stands where the export goes, unless it is an earlier one, to be overwritten."""
    folder = cfg.format == "hf"
    if not to.exists() or (folder and to.is_dir() and not any(to.iterdir())):
        return
    if to.is_dir() != folder:
        raise UserError(f"--to={to}: it is a {'file' if folder else 'folder'}; give another place")
    if folder and (others := [path.name for path in to.iterdir() if path.name not in HF_FILES or path.is_dir()]):
        raise UserError(f"--to={to}: it has {min(others)}, which no export wrote; give another folder")
    if not folder and not begins_as(to, cfg.format):
        raise UserError(f"--to={to}: no export with --format={cfg.format} wrote this file; give another place")
    if not cfg.overwrite:
        raise UserError(f"--to={to}: it exists; replace it by --overwrite, or give another --to")


def begins_as(path: Path, format: str) -> bool:
    """Whether a file begins as one that is written in this format."""
    place, beginning = BEGINNINGS[format]
    try:
        with opened(path) as f:
            return f.read(64)[place:].startswith(beginning)
    except OSError:
        return False


# ---- the weights ----


def of_nanogpt(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by nanoGPT's names; the head, which is the embedding, once."""
    return ((name, weight) for name, weight in checkpoint["model"].items() if name != "lm_head.weight")


def of_transformers(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A model's weights as transformers has them: matrices (in, out), and every bias, of zeros where the model has none."""
    for name, weight in of_nanogpt(checkpoint):
        yield name, weight.t() if name.endswith(CONV1D) else weight
        biased = name.endswith(CONV1D) or ".ln_" in name
        if biased and name.endswith(".weight") and not checkpoint["model_args"]["bias"]:
            yield name.removesuffix("weight") + "bias", weight.new_zeros(weight.size(0))


def data_of(weight: Tensor, dtype: str) -> bytes:
    """A weight's memory as it stands in a file: little-endian, and of bfloat16 the bits."""
    weight = weight.detach().to("cpu", getattr(torch, dtype)).contiguous()
    bits = weight.view(torch.int16).numpy().astype("<i2") if dtype == "bfloat16" else weight.numpy().astype("<f4")
    return bits.tobytes()


def write_safetensors(f: BinaryIO, weights: Iterable[tuple[str, Tensor]], dtype: str, about: dict[str, str]) -> None:
    """Write tensors in the format of safetensors: the length of a JSON header, the header, and the tensors' memory."""
    weights = list(weights)
    header: dict[str, Any] = {"__metadata__": about}
    size, end = torch.finfo(getattr(torch, dtype)).bits // 8, 0
    for name, weight in weights:
        begin, end = end, end + weight.numel() * size
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for _, weight in weights:
        f.write(data_of(weight, dtype))


def metadata(checkpoint: dict[str, Any]) -> dict[str, str]:
    """What a safetensors file says of a checkpoint: each of its settings as JSON."""
    about = {name: checkpoint.get(name) for name in ("model_args", "config", "iter_num", "best_val_loss")}
    if isinstance(about["best_val_loss"], Tensor):  # nanoGPT's
        about["best_val_loss"] = about["best_val_loss"].tolist()
    about["tokenizer"] = (checkpoint.get("fastgpt") or {}).get("meta")
    try:
        return {
            "format": "pt",
            **{name: json.dumps(value, default=str, skipkeys=True) for name, value in about.items()},
        }
    except (ValueError, RecursionError):  # of lists that hold themselves
        raise UserError("--format=safetensors: the checkpoint's settings cannot be written as JSON") from None


def write_llmc(f: BinaryIO, checkpoint: dict[str, Any], dtype: str) -> None:
    """Write llm.c's file of weights: a header of 256 int32, then each kind of tensor, of all layers. Raises UserError.

    llm.c pads the vocabulary to a multiple of 128 rows, which it never reads as tokens.
    """
    c, activation = GPTConfig(**checkpoint["model_args"]), checkpoints.activation_of(checkpoint)
    if activation == "relu":
        raise UserError("--format=llmc: the model was trained with relu, and llm.c computes the tanh GELU alone")
    if activation == "gelu":
        print(
            "llm.c computes the tanh GELU, and this model was trained with the erf GELU: activations differ by at most 4.8e-4"
        )
    padded = -(-c.vocab_size // 128) * 128
    header = np.zeros(256, dtype="<i4")
    header[:8] = (
        LLMC_MAGIC, LLMC_VERSIONS[dtype], c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded,
    )  # fmt: skip
    f.write(header.tobytes())
    model = checkpoint["model"]

    def put(*names: str) -> None:
        for name in names:
            weight = model.get(name)
            if weight is None:  # a bias that the model does not have
                weight = torch.zeros(model[name.removesuffix("bias") + "weight"].size(0))
            f.write(data_of(weight, dtype))

    put("transformer.wte.weight")
    f.write(data_of(torch.zeros(padded - c.vocab_size, c.n_embd), dtype))
    put("transformer.wpe.weight")
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            put(*(f"transformer.h.{i}.{module}.{kind}" for i in range(c.n_layer)))
    put("transformer.ln_f.weight", "transformer.ln_f.bias")


# ---- transformers' folder ----


def write_hf(checkpoint: dict[str, Any], to: Path, dtype: str) -> None:
    """Write a folder that transformers loads. Raises OSError and UserError."""
    c, saved = GPTConfig(**checkpoint["model_args"]), checkpoint.get("config") or {}
    if saved.get("doc_mask"):
        print(
            "this run kept attention within documents (--doc_mask); transformers attends across them: give it one at a time"
        )
    meta = find_meta(checkpoint)
    spec, end_of_text = tokenizer_files(meta, c.vocab_size)
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size, "n_positions": c.block_size,
        "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": None,
        "activation_function": ACTIVATION_NAMES[checkpoints.activation_of(checkpoint)], "layer_norm_epsilon": 1e-5,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "tie_word_embeddings": True, "torch_dtype": dtype, **ids,
    }  # fmt: skip
    generation = {**ids, "suppress_tokens": not_tokens(meta, c.vocab_size) or None}
    texts: dict[str, Any] = {"config.json": config, "generation_config.json": generation}
    if spec is not None:
        marks = (
            {"bos_token": tokenizer.END_OF_TEXT, "eos_token": tokenizer.END_OF_TEXT} if end_of_text is not None else {}
        )
        texts["tokenizer.json"] = spec
        texts["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size, "clean_up_tokenization_spaces": False, **marks,
        }  # fmt: skip
    part = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        part.chmod(0o755)
        for name, content in texts.items():
            with replacing(part / name) as f:
                f.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
        with replacing(part / "model.safetensors") as f:
            write_safetensors(f, of_transformers(checkpoint), dtype, {"format": "pt"})
        sharded.replace(part, to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tokenizer_files(meta: dict[str, Any] | None, vocab_size: int) -> tuple[dict[str, Any] | None, int | None]:
    """(what tokenizer.json says of a dataset's tokenizer, the id of its end of text) of a dataset's meta.

    Prints a line where no tokenizer.json can be written, and returns None for it. vocab_size: the model's.
    """
    n_vocab = tokenizer.GPT2_END_OF_TEXT + 1
    tok: tokenizer.Tokenizer | None = None
    try:
        tok = tokenizer.from_meta(meta)
        n_vocab = tok.n_vocab
    except UserError as e:
        if meta is not None:
            print(f"no tokenizer.json: {e}")
            return None, None
    if n_vocab > vocab_size:
        print(f"no tokenizer.json: the tokenizer has {n_vocab} tokens, and the model {vocab_size}")
        return None, None
    if tok is None:
        print(
            "no tokenizer.json: GPT-2's table could not be loaded; transformers.AutoTokenizer.from_pretrained('gpt2') has it"
        )
        return None, tokenizer.GPT2_END_OF_TEXT
    if isinstance(tok, tokenizer.HuggingFace):
        return json.loads(tok.json), tok.end_of_text
    if isinstance(tok, tokenizer.Chars):
        if wrong := [c for c in tok.itos.values() if len(c) != 1 or "\ud800" <= c <= "\udfff"]:
            print(f"no tokenizer.json: it has no place for the token {wrong[0]!r}, which is no single character")
            return None, None
        spec = byte_level({c: i for i, c in tok.itos.items()}, [], {})
        return spec | {"pre_tokenizer": None, "decoder": {"type": "Fuse"}}, None
    encoding = tok.encoding
    ranks = encoding._mergeable_ranks
    vocab = {written(token): rank for token, rank in ranks.items()}
    merges = [[written(a), written(b)] for a, b in merges_of(ranks)]
    special = encoding._special_tokens
    pattern = None if encoding.name == "gpt2" else encoding._pat_str  # GPT-2's own has a name of its own there
    spec = byte_level(vocab | special, merges, special, pattern)
    spec["model"]["ignore_merges"] = encoding.name != "gpt2"  # as tiktoken: a word that is a token is that token
    return spec, tok.end_of_text


def not_tokens(meta: dict[str, Any] | None, vocab_size: int) -> list[int]:
    """The ids of a model that its dataset's tokenizer does not have, as of a padded vocabulary. `fastgpt sample` draws none of them."""
    try:
        known = tokenizer.from_meta(meta).decodable(vocab_size)
    except UserError:
        return list(range(tokenizer.GPT2_END_OF_TEXT + 1, vocab_size)) if meta is None else []
    return (~known).nonzero().flatten().tolist()


def written(token: bytes) -> str:
    """A token of a byte-level BPE as tokenizer.json writes it."""
    return "".join(BYTE_CHARS[b] for b in token)


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that a BPE merges, in order, of the ranks of its tokens, which is all that tiktoken keeps.

    A token was made by one merge of two tokens that were there before it: of what the merges before it make of its bytes.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[first] >= rank:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
