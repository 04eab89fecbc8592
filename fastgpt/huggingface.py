"""A GPT-2 in Hugging Face's format: its weights as a GPT, and its tokenizer. Needs huggingface_hub and safetensors, and no transformers.

A name is a local folder, or an id of the hub. What config.json asks for is computed as transformers' GPT2LMHeadModel computes it, or
refused by the field's name. Files may come from a stranger: no code of them runs, and what they claim is compared with the config before
memory is taken for weights.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import files
from fastgpt.checkpoint import gpt_config, shapes_of
from fastgpt.claims import Claim, Fault, claims
from fastgpt.config import MODEL_SIZES, GPTConfig, UserError
from fastgpt.model import GPT
from fastgpt.parse import close, shown
from fastgpt.tokenizer import END_OF_TEXT, HuggingFace, from_meta

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
TEXTS = ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"]
SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]
MOST_HEADER = 2**24  # bytes of a safetensors file that describe its tensors; GPT-2 XL's are 80 kB
MOST_TOKENIZER = 15 * 2**20  # a checkpoint's settings, of which the tokenizer is a part, may have 16 MB
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# transformers' causal mask, in files of its earlier versions.
BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")

# The names that transformers has for the functions in model.ACTIVATIONS.
ACTIVATION_NAMES = {
    "gelu": "gelu", "gelu_python": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip
# Other names that GPT2Config knows its sizes by.
SIZES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_positions": "max_position_embeddings",
    "vocab_size": "vocab_size",
}  # fmt: skip
DEFAULTS = dict(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)  # GPT2Config's


def missing(library: str, name: str) -> UserError:
    return UserError(
        f"--init_from={name}: the library {library} is not installed; pip install huggingface_hub safetensors tokenizers"
    )


def find(name: str) -> Path:
    """The folder of a model: a local one, or what the hub has under this id, downloaded into Hugging Face's cache. Raises UserError."""
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UserError(f"--init_from={name}: it is no folder; give the one that has config.json and the weights")
    if not MODEL_ID.fullmatch(name):
        raise UserError(
            f"--init_from={name}: there is no such folder, and an id of the hub looks like gpt2 or org/name"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing("huggingface_hub", name) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=TEXTS + SAFETENSORS))
        if not any(folder.glob("model*.safetensors*")):
            folder = Path(snapshot_download(name, allow_patterns=TEXTS + PICKLES))
    except Exception as e:  # the hub and the network fail in many ways
        reason = " ".join(str(e).split())[:300]
        known = ["scratch", "resume", "auto", *MODEL_SIZES]
        near = close(name, known)
        hint = f"the nearest name is {near!r}" if near and near != name else f"known words are {', '.join(known)}"
        raise UserError(
            f"--init_from={name}: there is no such folder, and no GPT-2 weights could be loaded from the hub: {reason}; {hint}"
        ) from None
    return folder


def load(name: str, dropout: float | None = None, activation: str = "") -> GPT:
    """The GPT in a folder or under an id of the hub, on the CPU. Prints what nanoGPT prints. Raises UserError.

    activation: a name of model.ACTIVATIONS; "" is nanoGPT's, gelu, or relu where the weights were trained with it.
    """
    print(f"loading weights from pretrained gpt: {name}")
    folder = find(name)
    try:
        config, theirs, factors = read_config(folder)
        with ExitStack() as stack:
            found = {full_name(k): t for k, t in open_weights(folder, name, stack).items()}
            check_weights(found, config)
            print(f"forcing vocab_size={config.vocab_size}, block_size={config.block_size}, bias=True")
            if dropout is not None:
                print(f"overriding dropout rate to {dropout}")
                config.dropout = dropout
            model = GPT(config)
            model.set_activation(choose_activation(theirs, activation))
            fill(model, found, factors)
    except Fault as e:
        raise UserError(f"--init_from={name}: {e}") from None
    return model


# ---- the config ----


def read_config(folder: Path) -> tuple[GPTConfig, str, list[float]]:
    """(GPTConfig, name of its activation, factor of each block's queries) of a folder's config.json. Raises Fault."""
    c = read_json(folder / "config.json", files.CONFIG)
    sizes = {ours: c.get(ours, c.get(theirs, DEFAULTS[ours])) for ours, theirs in SIZES.items()}
    for field, other in SIZES.items():
        if field in c and other in c and c[other] != c[field]:
            raise Fault(f"config.json has {field} = {shown(c[field])} and {other} = {shown(c[other])}, which are one")
    args = {k: v for k, v in sizes.items() if k != "n_positions"}
    config = gpt_config({**args, "block_size": sizes["n_positions"], "dropout": 0.0, "bias": True}, "config.json")

    only: dict[str, list[Any]] = {
        "model_type": ["gpt2"], "n_inner": [None, 4 * config.n_embd], "n_ctx": [config.block_size], "layer_norm_epsilon": [1e-5],
        "tie_word_embeddings": [True], "add_cross_attention": [False], "is_encoder_decoder": [False], "pruned_heads": [None, {}],
        "quantization_config": [None], "compression_config": [None], "auto_map": [None, {}], "is_causal": [True],
        "per_layer_config": [None, {}],
        "architectures": [None, ["GPT2LMHeadModel"], ["GPT2Model"]],
        "scale_attn_weights": [True, False], "scale_attn_by_inverse_layer_idx": [True, False],
        "activation_function": [*ACTIVATION_NAMES],
    }  # fmt: skip
    for field, allowed in only.items():
        if field in c and not any(c[field] == value and type(c[field]) is type(value) for value in allowed):
            can = " or ".join(json.dumps(value) for value in allowed)
            raise Fault(f"config.json has {field} = {json.dumps(c[field])[:200]}; GPT computes only {can}")
    # transformers divides a query's products with the keys by these; attention here by sqrt(n_embd / n_head) alone.
    scale = 1.0 if c.get("scale_attn_weights", True) else math.sqrt(config.n_embd / config.n_head)
    by_layer = c.get("scale_attn_by_inverse_layer_idx", False)
    factors = [scale / (i + 1) if by_layer else scale for i in range(config.n_layer)]
    return config, ACTIVATION_NAMES[c.get("activation_function", "gelu_new")], factors


def read_json(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file. Raises Fault."""
    try:
        found = json.loads(files.read_text(path, most))
    except OSError as e:
        raise Fault(f"{path.name} cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise Fault(f"{path.name} is no JSON ({type(e).__name__})") from None
    if type(found) is not dict:
        raise Fault(f"{path.name} is no object of JSON")
    return found


def choose_activation(theirs: str, asked: str) -> str:
    """The activation to run weights with that were trained with `theirs`. Prints a line if it is another. Raises Fault."""
    chosen = asked or ("relu" if theirs == "relu" else "gelu")
    if (chosen == "relu") != (theirs == "relu"):
        raise Fault(f"its weights were trained with {theirs}, and --activation={asked} is another function")
    if chosen != theirs:
        said = ", as nanoGPT runs such weights" if chosen == "gelu" else ""
        print(f"activation: {chosen}{said}; the weights were trained with what --activation={theirs} computes")
    return chosen


# ---- the weights ----


class Entry(NamedTuple):
    """A tensor in a file: what the file says of it, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for what is no float
    read: Callable[[], Tensor]


def full_name(key: str) -> str:
    """nanoGPT's name of a weight. OpenAI's files on the hub leave out `transformer.`."""
    return key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"


def open_weights(folder: Path, name: str, stack: ExitStack) -> dict[str, Entry]:
    """The tensors in a folder's files by name, not yet read. The stack closes the files. Raises Fault, or UserError without safetensors."""
    found: dict[str, Entry] = {}
    for path in weight_files(folder):
        if not os.path.isfile(path):  # as a folder is none, and a pipe
            raise Fault(f"{path.name[:100]} is missing, or no file")
        entries = of_safetensors(path, name, stack) if path.name.endswith(".safetensors") else of_pickle(path)
        if twice := found.keys() & entries.keys():
            raise Fault(f"{path.name} has {min(twice)}, which another file has too")
        found |= entries
    if len({full_name(key) for key in found}) < len(found):
        raise Fault("its files have a tensor with and without the prefix `transformer.`")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors if there are any. Raises Fault."""
    for whole, *_, index in (SAFETENSORS, PICKLES):
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            shards = read_json(folder / index, files.KEPT).get("weight_map")
            names: list[Any] = list(shards.values()) if type(shards) is dict else [None]
            ending = Path(whole).suffix
            if not all(type(n) is str and Path(n).name == n and n.endswith(ending) for n in names):
                raise Fault(f"{index}: its weight_map does not name files of this folder that end in {ending}")
            return [folder / n for n in sorted(set(names))]
    raise Fault("it has neither model.safetensors nor pytorch_model.bin")


def of_safetensors(path: Path, name: str, stack: ExitStack) -> dict[str, Entry]:
    """The tensors of a safetensors file. Raises Fault."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise missing("safetensors", name) from None
    try:
        with files.opened(path) as f:
            size = int.from_bytes(f.read(8), "little")
        if size > MOST_HEADER:
            raise Fault(f"{path.name} says that {size:,} bytes describe its tensors")
        f = stack.enter_context(safe_open(path, "pt"))  # compares all offsets with the file's size
        entries = {}
        for key in f.keys():  # noqa: SIM118
            part = f.get_slice(key)
            entries[key] = Entry(tuple(part.get_shape()), FLOATS.get(part.get_dtype()), partial(f.get_tensor, key))
    except Fault:
        raise
    except Exception as e:  # a damaged file can fail in any way
        raise Fault(f"{path.name} is no whole safetensors file ({' '.join(str(e).split())[:200]})") from None
    return entries


def of_pickle(path: Path) -> dict[str, Entry]:
    """The tensors of a file that torch.save wrote. Raises Fault."""
    try:
        tree = claims(path)
    except Fault as e:
        raise Fault(f"{path.name}: {e}") from None
    if wrong := [key for key, value in tree.items() if type(key) is not str or not isinstance(value, Claim)]:
        raise Fault(f"{path.name} holds {str(wrong[0])[:100]!r}, which is no tensor with a name")
    if (
        sum(claim.nbytes for claim in {(c.storage.key, c.offset, c.shape): c for c in tree.values()}.values())
        > path.stat().st_size
    ):
        raise Fault(f"{path.name}: its tensors share their memory")

    @cache
    def loaded():
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as e:  # of what torch.save writes beside data.pkl, anything may be missing
            raise Fault(f"{path.name}: PyTorch cannot read it ({' '.join(str(e).split())[:200]})") from None

    return {
        key: Entry(c.shape, c.dtype if c.dtype.is_floating_point else None, partial(lambda key: loaded()[key], key))
        for key, c in tree.items()
    }


def check_weights(found: dict[str, Entry], config: GPTConfig) -> None:
    """Raise Fault if the tensors are not those of a GPT-2 of this config, by name, shape and type. Takes masks out of `found`."""
    T = config.block_size
    for key in [key for key in found if BUFFER.fullmatch(key)]:
        if found[key].shape not in ((1, 1, T, T), (T, T), (), (1,)):
            raise Fault(f"its {key} has the shape {found[key].shape}, and is no mask of {T} positions")
        del found[key]
    if config.n_layer > len(found):
        raise Fault(f"its {len(found)} tensors are too few for n_layer = {config.n_layer}")
    shapes = shapes_of(config)
    if "lm_head.weight" not in found:
        del shapes["lm_head.weight"]
    if absent := shapes.keys() - found.keys():
        raise Fault(f"its files lack the tensor {min(absent)}")
    if unknown := found.keys() - shapes.keys():
        raise Fault(f"its files have the tensor {min(unknown)}, which no GPT-2 of its config has")
    for key, shape in shapes.items():
        wanted = shape[::-1] if key.endswith(CONV1D) else shape
        if found[key].shape != wanted or found[key].dtype is None:
            is_ = "no tensor of floats" if found[key].dtype is None else f"of shape {found[key].shape}"
            raise Fault(f"its tensor {key} is {is_}; config.json asks for floats of shape {wanted}")


@torch.no_grad()
def fill(model: GPT, found: dict[str, Entry], factors: list[float]) -> None:
    """Copy weights into a model. factors: what the queries of each block are multiplied by. Raises Fault."""
    ours = model.state_dict()
    for key, entry in found.items():
        value = entry.read()
        if key == "lm_head.weight":
            if not torch.equal(value.float(), found["transformer.wte.weight"].read().float()):
                raise Fault("its lm_head.weight and wte.weight differ, but in GPT they are one")
            continue
        # OpenAI's Conv1D stores its matrix as (in, out), a Linear as (out, in).
        ours[key].copy_(value.t() if key.endswith(CONV1D) else value)
    for block, factor in zip(model.transformer.h, factors, strict=True):
        for queries in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            queries[: model.config.n_embd] *= factor


# ---- the tokenizer ----

# SHA-256 of OpenAI's vocab.bpe, all of GPT-2's merges, as tiktoken has it too.
GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How a byte-level BPE writes bytes as characters: as themselves where that can be seen, and else from U+0100 on.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in SEEN]
BYTE_CHARS = {b: chr(b) for b in SEEN} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}


def tokenizer_meta(folder: str | Path, vocab_size: int | None = None) -> dict[str, Any] | None:
    """The meta of a folder's tokenizer (tokenizer.py); None if that is GPT-2's. Raises UserError.

    vocab_size: the model's. Without tokenizer files, one of GPT-2's size means GPT-2's tokenizer.
    """
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").exists():
            spec = read_json(folder / "tokenizer.json", MOST_TOKENIZER)
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            spec = of_vocab_and_merges(folder)
        elif vocab_size in (50257, 50304):
            return None
        else:
            of = f", and its {vocab_size} tokens are not GPT-2's" if vocab_size else ""
            raise Fault(f"it has no tokenizer.json, nor vocab.json and merges.txt{of}: put its tokenizer there")
        if is_gpt2(spec):
            return None
        return HuggingFace(json.dumps(spec, ensure_ascii=False, separators=(",", ":"))).meta()
    except (Fault, UserError) as e:
        raise UserError(f"{folder}: {e}") from None


def compare_tokenizers(name: str, vocab_size: int, meta: dict[str, Any] | None, ids: list[int]) -> None:
    """Print a line if the tokenizer of weights reads a dataset's first ids as another text than the dataset's own does."""
    try:
        own = tokenizer_meta(find(name), vocab_size)
        if own == meta:  # of GPT-2's nothing is loaded: its table may have to be downloaded
            return
        both = [from_meta(own), from_meta(meta)]
    except UserError:  # there is none, or it cannot be loaded: nothing to compare
        return
    known = both[0].decodable(vocab_size) & both[1].decodable(vocab_size)
    ids = [i for i in ids if known[i]]
    if both[0].decode(ids) != both[1].decode(ids):
        print(f"warning: {name} has another tokenizer than the dataset: its weights know these token ids as other text")


def of_vocab_and_merges(folder: Path) -> dict[str, Any]:
    """What tokenizer.json would say, of the files vocab.json and merges.txt that GPT-2 had first. Raises Fault."""
    if (folder / "added_tokens.json").exists():
        raise Fault("it has added_tokens.json and no tokenizer.json; save its tokenizer with a newer transformers")
    vocab = read_json(folder / "vocab.json", MOST_TOKENIZER)
    try:
        lines = files.read_text(folder / "merges.txt", MOST_TOKENIZER).split("\n")
    except OSError as e:
        raise Fault(f"merges.txt cannot be read ({e.strerror})") from None
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = {END_OF_TEXT: vocab[END_OF_TEXT]} if type(vocab.get(END_OF_TEXT)) is int else {}
    return byte_level(vocab, merges, special)


def byte_level(
    vocab: dict[str, int], merges: list[list[str]], special: dict[str, int], pattern: str | None = None
) -> dict[str, Any]:
    """A tokenizer.json of a byte-level BPE. pattern: the regular expression of its words; None: GPT-2's."""
    words: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": pattern is None,
    }
    decoder = {**words, "use_regex": True}
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        words = {"type": "Sequence", "pretokenizers": [split, words]}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges,
    }  # fmt: skip
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in special.items()],
        "normalizer": None, "pre_tokenizer": words, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip


def is_gpt2(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer.json says GPT-2's tokenizer. Its merges are known by their hash, and its vocabulary follows from them."""
    try:
        model, words = spec["model"], spec["pre_tokenizer"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        text = "".join(f"{a} {b}\n" for a, b in pairs)
        if hashlib.sha256(f"#version: 0.2\n{text}".encode()).hexdigest() != GPT2_MERGES:
            return False
        tokens = [BYTE_CHARS[b] for b in SEEN + HIDDEN] + [a + b for a, b in pairs]
        vocab = {token: i for i, token in enumerate(tokens)}
        added = [(token["content"], token["id"]) for token in spec.get("added_tokens") or []]
        end = (END_OF_TEXT, len(tokens))
        return (
            model["vocab"] in (vocab, vocab | dict([end]))
            and added in ([], [end])
            and spec.get("normalizer") is None
            and words["type"] == "ByteLevel"
            and not words["add_prefix_space"]
            and words.get("use_regex", True)
        )
    except (KeyError, TypeError, ValueError, AttributeError):  # of another kind
        return False
