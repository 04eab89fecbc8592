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
from fastgpt.records import RECORDS
from fastgpt.verify import versions


def environment(device):
    """What must be the same for a time to hold, whatever was timed: the GPU, the sources, the versions, how fp32 is multiplied."""
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "source": source_hash(), **versions(), "fp32": ops.triton.common.precision()}


def conditions(shape, dtype, device):
    """All that must be the same for a file to hold."""
    return {
        **environment(device), "architecture": ops.triton.configs.architecture(torch.device(device)), "dtype": str(dtype)[6:],
        "n_embd": shape.n_embd, "n_head": shape.n_head, "block_size": shape.T, "dropout": shape.dropout > 0,
        "doc_mask": shape.doc_mask, "narrow_residual": shape.narrow_residual,
    }  # fmt: skip


def path(shape, dtype, device):
    """Where a run looks for its file."""
    c = conditions(shape, dtype, device)
    gpu = re.sub(r"[^a-z0-9]+", "-", c["gpu"].lower()).strip("-")
    modes = "".join(f"-{mode}" for mode in ("dropout", "doc_mask", "narrow_residual") if c[mode])
    model = f"{c['n_embd']}x{c['n_head']}-{c['block_size']}{modes}"
    return cache_folder() / "tuned" / f"{gpu}-{c['dtype']}-{model}.json"


def read(file, shape, dtype, device):
    """(the file's contents, {op: row} of what it found faster than the tables). Raises ValueError that says why it does not hold
    here, and OSError where there is none."""
    try:
        saved = json.loads(file.read_text())
        differs = [name for name, now in conditions(shape, dtype, device).items() if saved["where"].get(name) != now]
        rows = {}
        for op, found in saved["ops"].items() if not differs else ():
            if found["kept"]:
                rows[op] = type(RECORDS[op].row(shape, dtype, device))(**found["row"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is damaged") from None
    if differs:
        raise ValueError(f"its {', '.join(differs)} {'is' if len(differs) == 1 else 'are'} not this run's")
    return saved, rows


def load_rows(shape, dtype, device):
    """The rows of this run's file, as `ops.Kernels` takes them; none where there is no file. A line says which file it is, or why it
    is not taken."""
    file = path(shape, dtype, device)
    try:
        _, rows = read(file, shape, dtype, device)
    except FileNotFoundError:  # nobody tuned
        return ()
    except (OSError, ValueError) as e:
        print(f"launch configurations: the shipped ones; {file} is not taken: {e}. `fastgpt tune` makes it anew")
        return ()
    names = ", ".join(rows)
    print(f"launch configurations: {f'{names} as tuned, the others' * bool(rows) or 'all'} as shipped, by {file}")
    return tuple((op, row.text) for op, row in rows.items())


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
    """A hash of all that computes: the kernels' sources, PyTorch's side, what is timed, the rule, and what chooses."""
    files = [
        *sorted(Path(ops.triton.__file__).parent.glob("*.py")),
        *(Path(__file__).with_name(f"{name}.py") for name in ("ops", "reference", "records", "verify", "choose")),
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
