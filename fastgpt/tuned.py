"""What `fastgpt tune` found: the files, and the launch configurations that a run takes from its own.

A file is of one GPU, dtype and kind of model: width, heads, length, and whether it drops out, keeps to documents, or has a stream of
16 bits. The batch and the vocabulary may be others than it was measured at. It holds for the sources and versions that it names, and
is else not taken.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import torch

from fastgpt import ops
from fastgpt.config import cache_folder
from fastgpt.verify import versions


def lookup(op, shape, dtype, device):
    """(name, *arguments) of the function in configs that finds an op's row at a Shape; None for an op without a table."""
    device = torch.empty(0, device=device).device  # with its index, as a kernel's tensors have it
    return {
        "gelu_mlp": ("gelu_mlp", device, dtype, shape.n_embd * dtype.itemsize % 16 == 0),
        "attention": ("attention", device, dtype, shape.n_embd // shape.n_head),
        "layer_norm": ("layer_norm", shape.n_embd),
        "linear_cross_entropy": ("cross_entropy",),
        "embedding": ("embedding",),
        "adamw": ("adamw",),
    }.get(op)


def here(device):
    """What must be the same for a time to hold, whatever was timed: the GPU, the sources, the versions, how fp32 is multiplied."""
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "source": source_hash(), **versions(), "fp32": ops.kernels("gelu_mlp").precision()}


def conditions(shape, dtype, device):
    """All that must be the same for a file to hold."""
    return {
        **here(device), "architecture": ops.configs().architecture(torch.device(device)), "dtype": str(dtype)[6:],
        "n_embd": shape.n_embd, "n_head": shape.n_head, "block_size": shape.T, "dropout": shape.dropout > 0,
        "documents": shape.documents, "narrow": shape.narrow,
    }  # fmt: skip


def path(shape, dtype, device):
    """Where a run looks for its file."""
    c = conditions(shape, dtype, device)
    gpu = re.sub(r"[^a-z0-9]+", "-", c["gpu"].lower()).strip("-")
    modes = "".join(f"-{mode}" for mode in ("dropout", "documents", "narrow") if c[mode])
    model = f"{c['n_embd']}x{c['n_head']}-{c['block_size']}{modes}"
    return cache_folder() / "tuned" / f"{gpu}-{c['dtype']}-{model}.json"


def read(file, shape, dtype, device):
    """(the file's contents, {lookup: row} of what it found faster than the tables). Raises ValueError that says why it does not
    hold here, and OSError where there is none."""
    try:
        saved = json.loads(file.read_text())
        differs = [name for name, now in conditions(shape, dtype, device).items() if saved["where"].get(name) != now]
        configs, rows = ops.configs(), {}
        for op, found in saved["ops"].items() if not differs else ():
            if found["kept"]:
                name, *args = key = lookup(op, shape, dtype, device)
                rows[key] = type(getattr(configs, name)(*args))(**found["row"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is damaged") from None
    if differs:
        raise ValueError(f"its {', '.join(differs)} {'is' if len(differs) == 1 else 'are'} not this run's")
    return saved, rows


def take(shape, dtype, device):
    """Run by the rows of this run's file from now on, by the tables' where there is none; a line says which file it is, or why
    it is not taken."""
    ops.configs().use({})
    file = path(shape, dtype, device)
    try:
        _, rows = read(file, shape, dtype, device)
    except FileNotFoundError:  # nobody tuned
        return
    except (OSError, ValueError) as e:
        print(f"launch configurations: the shipped ones; {file} is not taken: {e}. `fastgpt tune` makes it anew")
        return
    ops.configs().use(rows)
    names = ", ".join(name for name, *_ in rows)
    print(f"launch configurations: {f'{names} as tuned, the others' * bool(rows) or 'all'} as shipped, by {file}")


def save(file, contents):
    """Write JSON to a file, whole or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(contents, indent=1))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def source_hash():
    """A hash of all that computes: the kernels' sources, what chooses among them, and PyTorch's side."""
    files = [
        *sorted(Path(ops.configs().__file__).parent.glob("*.py")),
        *(Path(__file__).with_name(f"{name}.py") for name in ("ops", "reference", "choose")),
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
