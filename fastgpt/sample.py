"""Sample text from a trained model, with nanoGPT's flags: `fastgpt sample`, or `python -m fastgpt.sample`."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fastgpt import checkpoint as checkpoints
from fastgpt import data, distributed, sharded, tokenizer
from fastgpt.config import SampleConfig, UserError


def sample(cfg: SampleConfig) -> None:
    """Print num_samples continuations of the prompt of a SampleConfig. Raises UserError."""
    distributed.check_device(cfg.device)
    start = cfg.start
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--start={cfg.start}: the file cannot be read ({e})") from None
    torch.manual_seed(cfg.seed)
    cuda = "cuda" in cfg.device
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    if cfg.init_from == "resume":
        saved = sharded.load(cfg.out_dir)
        model, meta = checkpoints.build_model(saved, cfg.out_dir), find_meta(saved)
    else:
        saved, model, meta = {}, checkpoints.pretrained(cfg.init_from, 0.0), None
    tok = tokenizer.from_meta(meta)
    if saved.get("config", {}).get("doc_mask"):  # mask the documents of a prompt as training did
        model.set_doc_mask(tok.end_of_text)
    if tok.n_vocab > model.config.vocab_size:
        raise UserError(
            f"{cfg.out_dir}: the model has {model.config.vocab_size} tokens, but the tokenizer {tok.n_vocab}: "
            "its dataset's meta.pkl is missing; run where data/NAME/meta.pkl is"
        )
    ids = tok.encode_prompt(start)
    if not ids:
        raise UserError("--start: the prompt is empty; give at least one character, such as --start=$'\\n'")
    model.eval().to(cfg.device)
    if cfg.compile:
        model.compile()
    x = torch.tensor([ids], device=cfg.device)
    allowed = tok.decodable(model.config.vocab_size).to(cfg.device)
    with torch.autocast("cuda", dtype=getattr(torch, cfg.dtype)) if cuda else nullcontext():
        for _ in range(cfg.num_samples):
            try:
                y = model.generate(x, cfg.max_new_tokens, cfg.temperature, cfg.top_k, allowed)
            except RuntimeError as e:
                if "probability tensor" not in str(e):
                    raise
                raise UserError(f"{cfg.out_dir}: the model's output is nan: its training diverged") from None
            print(f"{tok.decode(y[0].tolist())}\n---------------", flush=True)


def find_meta(saved: dict[str, Any]) -> dict[str, Any] | None:
    """The meta in a checkpoint, else that of the dataset in its config. None means GPT-2's encoding."""
    if "meta" in saved.get("fastgpt", {}):
        return saved["fastgpt"]["meta"]
    dataset = saved.get("config", {}).get("dataset")
    meta = data.load_meta(data.dataset_folder(dataset)) if dataset else None
    if meta is None:
        print("No meta.pkl found, assuming GPT-2 encodings...")
    return meta


if __name__ == "__main__":
    from fastgpt.cli import main

    sys.exit(main(["sample", *sys.argv[1:]]))
