"""Sample text from a trained model, with nanoGPT's flags: `fastgpt sample`, or `python -m fastgpt.sample`."""

import os
from typing import Any

import torch

from fastgpt import checkpoint as checkpoints
from fastgpt import data, distributed, files, health, huggingface, sharded, tokenizer
from fastgpt.config import SampleConfig, UserError
from fastgpt.meta import check_meta
from fastgpt.step import mixed_precision


def sample(cfg: SampleConfig) -> None:
    """Print num_samples continuations of the prompt of a SampleConfig. Raises UserError."""
    distributed.check_device(cfg.device)
    start = cfg.start
    if start.startswith("FILE:"):
        try:
            start = files.read_text(os.path.expanduser(start[5:]), files.DATA)
        except OSError as e:
            raise UserError(f"--start={cfg.start}: the file cannot be read ({e.strerror})") from None
    torch.manual_seed(cfg.seed)
    _, autocast, _ = mixed_precision(cfg.device, cfg.dtype)

    if cfg.init_from == "resume":
        where, cure = cfg.out_dir, "its dataset's meta.pkl is missing; run where data/NAME/meta.pkl is"
        saved = sharded.load(cfg.out_dir)
        if cfg.activation not in ("", trained := checkpoints.activation_of(saved)):
            raise UserError(
                f"--activation={cfg.activation}: {saved['path']} was trained with {trained}; leave the flag out"
            )
        model, meta = checkpoints.build_model(saved), find_meta(saved)
    else:
        where, cure = f"--init_from={cfg.init_from}", "they do not belong together"
        saved, model = {}, huggingface.load(cfg.init_from, 0.0, cfg.activation)
        meta = huggingface.tokenizer_meta(huggingface.find(cfg.init_from), model.config.vocab_size)
    tok = tokenizer.from_meta(meta)
    if saved.get("config", {}).get("doc_mask"):  # mask the documents of a prompt as training did
        model.set_doc_mask(tokenizer.separator(meta))
    if tok.n_vocab > model.config.vocab_size:
        raise UserError(
            f"{where}: the model has {model.config.vocab_size} tokens, but the tokenizer {tok.n_vocab}: {cure}"
        )
    ids = tok.encode_prompt(start)
    if not ids:
        raise UserError("--start: the prompt is empty; give at least one character, such as --start=$'\\n'")
    if broken := health.first_not_finite(model):
        raise UserError(f"{where}: {broken} is not finite: its training diverged")
    model.eval().to(cfg.device)
    model.set_kernels("torch")  # the kernels are measured for training, not for a token at a time
    if cfg.compile:
        model.compile()
    x = torch.tensor([ids], device=cfg.device)
    allowed = tok.decodable(model.config.vocab_size).to(cfg.device)
    with autocast:
        for _ in range(cfg.num_samples):
            try:
                y = model.generate(x, cfg.max_new_tokens, cfg.temperature, cfg.top_k, allowed)
            except RuntimeError as e:
                if "probability tensor" not in str(e):
                    raise
                raise UserError(f"{where}: the model's output is nan: its training diverged") from None
            print(f"{tok.decode(y[0].tolist())}\n---------------", flush=True)


def find_meta(saved: dict[str, Any]) -> dict[str, Any] | None:
    """The meta in a checkpoint, else that of the dataset in its config. None means GPT-2's encoding."""
    if "meta" in saved.get("fastgpt", {}):
        meta = saved["fastgpt"]["meta"]
        try:
            return meta and check_meta(meta)
        except ValueError as e:
            raise UserError(f"the checkpoint's meta: {e}; it is damaged, or another program wrote it") from None
    dataset = saved.get("config", {}).get("dataset")
    try:
        meta = data.load_meta(data.dataset_folder(dataset)) if dataset else None
    except (OSError, TypeError, ValueError):  # no name that a folder can have
        meta = None
    if meta is None:
        print("No meta.pkl found, assuming GPT-2 encodings...")
    return meta


if __name__ == "__main__":
    from fastgpt.cli import entry

    entry("sample")
