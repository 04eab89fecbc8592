"""The files that `fastgpt tune` writes, and the launch configurations that a run reads from its file.

A file belongs to one GPU, one dtype and one kind of model: width, heads, length, and whether it uses dropout, document masks or a
16-bit residual stream. Batch size and vocabulary may differ from those measured. A file is used only with the sources and versions
that it names.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from fastgpt import files, ops
from fastgpt.config import cache_folder
from fastgpt.parse import shown
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
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """(the file's contents, {op: row} for the ops with a row faster than the shipped one, {op: reason} for entries that are not right).

    The contents are without these entries. Raises ValueError that says why this run cannot use the file, and OSError if it cannot be
    read.
    """
    try:
        saved = files.read_json(file)
        entries, here = dict(saved["ops"]), saved["where"]
        differs = [name for name, now in conditions(shape, dtype, device).items() if here.get(name) != now]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("it is damaged") from None
    if differs:
        raise ValueError(f"its {', '.join(differs)} {'is' if len(differs) == 1 else 'are'} not this run's")
    rows, refused = {}, {}
    for op, found in entries.items():
        try:
            if op not in RECORDS or not RECORDS[op].row:
                raise ValueError("there is no such op")
            if not isinstance(found, dict) or type(found.get("kept")) is not bool:
                raise ValueError("it does not say whether it was kept")
            row = ops.triton.configs.instead_of(RECORDS[op].row(shape, dtype, device), found.get("row"))  # type: ignore[misc]
            if found["kept"]:
                rows[op] = row
        except ValueError as e:
            refused[op] = str(e)
    return {**saved, "ops": {op: found for op, found in entries.items() if op not in refused}}, rows, refused


def load_rows(shape: Shape, dtype: torch.dtype, device: str | torch.device) -> tuple[tuple[str, str], ...]:
    """The rows of this run's file, as `ops.Kernels` takes them; () without a file. Prints the file's name, and what of it is not used.

    They are of the right types, and a kernel can be launched with them. Whether they also compute the right thing `choose` finds out.
    """
    file = path(shape, dtype, device)
    try:
        _, rows, refused = read(file, shape, dtype, device)
    except FileNotFoundError:  # not tuned
        return ()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        print(
            f"launch configurations: the shipped ones; {file} is not taken: {reason}. `fastgpt tune` writes a new one"
        )
        return ()
    for op, why in refused.items():
        print(f"launch configurations: of {file} {shown(op)} is not taken: {why}")
    if rows or not refused:
        names = ", ".join(rows)
        print(f"launch configurations: {f'{names} as tuned, the others' * bool(rows) or 'all'} as shipped, by {file}")
    return tuple((op, row.text) for op, row in rows.items())


def source_hash() -> str:
    """A hash of the sources that decide a result: the kernels, and what checks, runs and times them."""
    names = "ops", "reference", "records", "verify", "choose", "timing", "model", "step", "graphs", "runner"
    files = [
        *sorted(Path(ops.triton.__file__).parent.glob("*.py")),
        *(Path(__file__).with_name(f"{name}.py") for name in names),
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
