"""What a model answers from a seed, by nanoGPT's interface; and nanoGPT's own model, from a checkout of it.

`python tests/nanogpt.py /path/to/nanoGPT` records its answers in nanogpt_facts.json.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import torch

CONFIGS = {
    "plain": dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.0, bias=False),
    "bias": dict(block_size=24, vocab_size=50, n_layer=3, n_head=4, n_embd=20, dropout=0.0, bias=True),
    "dropout": dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.2, bias=True),
}


def load(checkout):
    """nanoGPT's module `model`."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers_of(GPT, GPTConfig, config, steps=20):
    """Everything that a model answers from a seed: weights, generator, losses, gradients, text."""
    torch.manual_seed(1337)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model = GPT(GPTConfig(**config))
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    answers = {
        "printed": printed.getvalue(),
        "initial": {k: v.clone() for k, v in model.state_dict().items()},
        "generator": torch.get_rng_state(),
        "losses": [],
    }
    for step in range(steps):
        data = torch.randint(config["vocab_size"], (4, config["block_size"] - 3 + 1))
        x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        y[0, :5] = -1
        logits, loss = model(x, y)
        loss.backward()
        if step == 0:
            answers["logits"] = logits.detach()
            answers["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answers["losses"].append(loss.item())
    answers["final"] = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    prompt = torch.arange(5)[None]
    answers["last logits"] = model(prompt)[0].detach()
    answers["text"] = model.generate(
        prompt, 60, temperature=0.8, top_k=10
    )  # beyond block_size, where the window slides
    answers["mfu"] = model.estimate_mfu(12, 0.5)
    return answers


if __name__ == "__main__":
    facts = {}
    module = load(sys.argv[1])
    for name in ("plain", "bias"):  # without dropout, whose draws on the CPU may differ between PyTorch's versions
        a = answers_of(module.GPT, module.GPTConfig, CONFIGS[name])
        facts[name] = {
            "config": CONFIGS[name],
            "shapes": {k: list(v.shape) for k, v in a["initial"].items()},
            "initial_sums": {k: v.double().sum().item() for k, v in a["initial"].items()},
            "generator_sha256": hashlib.sha256(a["generator"].numpy().tobytes()).hexdigest(),
            "losses": a["losses"],
            "gradient_norms": {k: v.double().norm().item() for k, v in a["gradients"].items()},
            "printed": a["printed"],
        }
    Path(__file__).with_name("nanogpt_facts.json").write_text(json.dumps(facts, indent=1) + "\n")
