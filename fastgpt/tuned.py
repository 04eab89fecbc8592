"""The files that `fastgpt tune` writes, and the launch configurations that a run reads from its file.

A file belongs to one GPU, one dtype and one kind of model: width, heads, length, and whether it uses dropout, document masks or a
16-bit residual stream. Batch size and vocabulary may differ from those measured. A file is used only with the sources and versions
that it names.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastgpt import ops
from fastgpt.config import cache_folder
from fastgpt.records import RECORDS, Shape
from fastgpt.verify import versions


def environment(device: str | torch.device) -> dict[str, str]:
    """What every measured time depends on: the GPU, the sources, the versions, and the precision of fp32 products."""
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "source": source_hash(), **versions(), "fp32": ops.triton.common.precision()}


def conditions(shape: Shape, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Everything that a file depends on."""
    return {
        **environment(device), "architecture": ops.triton.configs.architecture(torch.device(device)), "dtype": str(dtype)[6:],
        "n_embd": shape.n_embd, "n_head": shape.n_head, "block_size": shape.T, "dropout": shape.dropout > 0,
        "doc_mask": shape.doc_mask, "narrow_residual": shape.narrow_residual,
    }  # fmt: skip


def path(shape: Shape, dtype: torch.dtype, device: str | torch.device) -> Path:
    """The path of a run's file."""
    c = conditions(shape, dtype, device)
    gpu = re.sub(r"[^a-z0-9]+", "-", c["gpu"].lower()).strip("-")
    modes = "".join(f"-{mode}" for mode in ("dropout", "doc_mask", "narrow_residual") if c[mode])
    model = f"{c['n_embd']}x{c['n_head']}-{c['block_size']}{modes}"
    return cache_folder() / "tuned" / f"{gpu}-{c['dtype']}-{model}.json"


def read(
    file: Path, shape: Shape, dtype: torch.dtype, device: str | torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the file's contents, {op: row} for the ops with a row faster than the shipped one).

    Raises ValueError that says why this run cannot use the file, and OSError if it cannot be read.
    """
    try:
        saved = json.loads(file.read_text())
        differs = [name for name, now in conditions(shape, dtype, device).items() if saved["where"].get(name) != now]
        rows = {}
        for op, found in saved["ops"].items() if not differs else ():
            if found["kept"]:
                rows[op] = type(RECORDS[op].row(shape, dtype, device))(**found["row"])  # type: ignore[misc]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is damaged") from None
    if differs:
        raise ValueError(f"its {', '.join(differs)} {'is' if len(differs) == 1 else 'are'} not this run's")
    return saved, rows


def load_rows(shape: Shape, dtype: torch.dtype, device: str | torch.device) -> tuple[tuple[str, str], ...]:
    """The rows of this run's file, as `ops.Kernels` takes them; () without a file. Prints the file's name, or why it is not used."""
    file = path(shape, dtype, device)
    try:
        _, rows = read(file, shape, dtype, device)
    except FileNotFoundError:  # not tuned
        return ()
    except (OSError, ValueError) as e:
        print(f"launch configurations: the shipped ones; {file} is not taken: {e}. `fastgpt tune` writes a new one")
        return ()
    names = ", ".join(rows)
    print(f"launch configurations: {f'{names} as tuned, the others' * bool(rows) or 'all'} as shipped, by {file}")
    return tuple((op, row.text) for op, row in rows.items())


def save(file: Path, contents: dict[str, Any]) -> None:
    """Write JSON to a file, completely or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(contents, indent=1))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def source_hash() -> str:
    """A hash of the sources that decide a result: the kernels, and what checks, runs and times them."""
    names = "ops", "reference", "records", "verify", "choose", "timing", "model", "step", "graphs", "runner"
    files = [
        *sorted(Path(ops.triton.__file__).parent.glob("*.py")),
        *(Path(__file__).with_name(f"{name}.py") for name in names),
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
