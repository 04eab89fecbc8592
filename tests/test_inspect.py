"""`fastgpt inspect`: a model's weights against the rules of its init, signals against their prediction, and the schemes."""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, losses
from torch import nn

from fastgpt import checkpoint as checkpoints
from fastgpt import depth, init, inspection
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

SMALL = "--n_layer=3 --n_head=2 --n_embd=32 --block_size=32 --dataset=letters".split()  # noqa: SIM905


@pytest.fixture
def inspect(fastgpt, dataset):
    """Inspect a small new model: (exit status, stdout, the report)."""

    def run(*flags):
        status, out, err = fastgpt("inspect", *SMALL, "--json=report.json", *flags)
        assert err == ""
        return status, out, json.loads(open("report.json").read())

    return run


def planted(monkeypatch, change):
    """Let the constructor of a GPT end with a change of its weights."""
    right = GPT._init_weights

    def wrong(model):
        right(model)
        with torch.no_grad():
            change(model)

    monkeypatch.setattr(GPT, "_init_weights", wrong)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", init.SCHEMES)
def test_a_new_model_has_the_weights_of_its_scheme(inspect, scheme, bias):
    status, out, report = inspect(f"--init_scheme={scheme}", f"--bias={bias}")
    assert status == 0, out
    assert report["differing_bits"] == []
    assert all(g["as_expected"] for g in report["groups"])
    c = GPTConfig(32, 26, 3, 2, 32, 0.0, bias)
    std = {"nanogpt": 0.02 / 6**0.5, "no_rescale": 0.02, "times_0.02": 0.0004, "over_sqrt_layers": 0.02 / 3**0.5,
           "times_sqrt_2_over_layers": 0.02 * (2 / 3) ** 0.5, "over_sqrt_width": 0.02 / 32**0.5, "pytorch": (3 * 32) ** -0.5}  # fmt: skip
    (projection,) = (g for g in report["groups"] if g["name"] == "attn.c_proj.weight")
    assert projection["expected_std"] == pytest.approx(std[scheme])
    assert projection["std"] == pytest.approx(std[scheme], rel=0.1)
    # What is written down of nanoGPT's draws is right of their number, too: docs and table say it.
    assert report["draws"]["calls"] == 10 * c.n_layer + 6 + (4 * c.n_layer if bias else 0)
    assert report["draws"]["numbers"] > 2 * report["draws"]["stay"]


@pytest.mark.parametrize(
    ("change", "what", "value"),
    [
        (lambda m: m.transformer.h[1].mlp.c_fc.weight.mul_(1.1), "transformer.h.1.mlp.c_fc.weight: std", 0.022),
        (lambda m: m.transformer.wpe.weight.add_(0.01), "transformer.wpe.weight: mean", 0.01),
        (lambda m: [b.attn.c_proj.weight.normal_(std=0.02) for b in m.transformer.h], "all 3: std", 0.02),
        (lambda m: m.transformer.ln_f.weight.fill_(1.5), "transformer.ln_f.weight: mean", 1.5),
    ],
    ids=["a wrong std", "a wrong mean", "a skipped rescale", "a wrong constant"],
)
def test_the_table_shows_a_planted_fault(inspect, monkeypatch, change, what, value):
    """The statistics find it by themselves, without the replay of bits."""
    monkeypatch.setattr(inspection, "differing_bits", lambda *_: [])
    planted(monkeypatch, change)
    status, out, report = inspect()
    assert status == 1
    (wrong,) = (g["largest_deviation"] for g in report["groups"] if not g["as_expected"])
    assert f"<- {wrong}" in out
    said, _, number = wrong.rpartition(" ")
    assert said == what
    assert float(number) == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_shown(inspect, monkeypatch, value):
    planted(monkeypatch, lambda m: m.transformer.wpe.weight[0, :1].fill_(value))
    status, out, report = inspect()
    assert status == 1
    assert "<- transformer.wpe.weight: " in out
    assert [g["name"] for g in report["groups"] if not g["as_expected"]] == ["wpe.weight"]


def test_a_terminal_shows_it_in_colour(inspect, monkeypatch):
    terminal = SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True))
    planted(monkeypatch, lambda m: m.transformer.ln_f.weight.fill_(1.5))
    assert "\033" not in inspect()[1]
    monkeypatch.setattr(inspection, "sys", terminal)
    (line,) = (line for line in inspect()[1].splitlines() if "\033" in line)
    assert line.startswith(f"{inspection.RED}ln_f.weight")
    assert line.endswith(inspection.PLAIN)


def test_a_broken_tie_is_shown(inspect, monkeypatch):
    def untie(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())

    planted(monkeypatch, untie)
    status, out, report = inspect()
    assert status == 1
    assert "two tensors, and nanoGPT has one" in out
    assert not report["tied"]
    assert "lm_head.weight" in {g["name"] for g in report["groups"]}


def test_bits_show_what_statistics_cannot(inspect, monkeypatch):
    """A draw in another order has the right statistics; one that is left out changes only what comes after."""
    planted(monkeypatch, lambda m: m.transformer.wpe.weight.copy_(m.transformer.wpe.weight.flip(0)))
    status, out, report = inspect()
    assert (status, report["differing_bits"]) == (1, ["transformer.wpe.weight"])
    assert "are not those of nanoGPT's draws from seed 1337: transformer.wpe.weight differ" in out
    planted(monkeypatch, lambda m: torch.rand(1))
    assert inspect()[2]["differing_bits"][-1] == "torch's generator after the init"


def test_a_scheme_leaves_the_generator_where_nanogpt_does():
    """So runs of one seed see the same batches. What a scheme does not scale has nanoGPT's bits."""
    c = GPTConfig(16, 26, 2, 2, 16, 0.0, True)
    torch.manual_seed(3)
    plain, state = GPT(c), torch.get_rng_state()
    for scheme in init.SCHEMES:
        torch.manual_seed(3)
        model = GPT(c)
        init.apply(model, scheme)
        assert torch.equal(torch.get_rng_state(), state), scheme
        if scheme != "pytorch":
            for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert torch.equal(a, b) == (scheme == "nanogpt" or not name.endswith("c_proj.weight")), (scheme, name)
    torch.manual_seed(3)  # "pytorch" is what PyTorch's constructors draw from the same seed
    nn.Embedding(26, 16), nn.Embedding(16, 16)
    first = nn.Linear(16, 48)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, first.weight)
    assert torch.equal(model.transformer.h[0].attn.c_attn.bias, first.bias)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(
    ("n_layer", "scheme"), [(2, "nanogpt"), (6, "nanogpt"), (12, "nanogpt"), (6, "no_rescale"), (4, "pytorch")]
)
def test_signals_are_as_predicted(n_layer, scheme, activation):
    """Mean squares of the stream and both branches, of several seeds: within their sampling error and 3% for the finite width."""
    c = GPTConfig(48, 20, n_layer, 4, 64, 0.0, bias=scheme == "pytorch")
    x = (
        torch.randint(20, (4, 48), generator=torch.Generator().manual_seed(0)) // torch.arange(1, 5)[:, None]
    )  # tokens repeat
    seen = []
    for seed in range(8):
        model, _ = inspection.new_model(c, scheme, activation, seed)
        seen.append(depth.measure(model, x, x, gradients=False)["layers"])
    expected = inspection.predicted(c, scheme, x, model.transformer.h[0].mlp.gelu)
    for key in ("stream", "attention", "mlp"):
        for layer in (1, n_layer):
            squares = [layers[layer][key] ** 2 for layers in seen]
            error = statistics.stdev(squares) / math.sqrt(len(squares))
            right = expected[layer][key] ** 2
            assert abs(statistics.fmean(squares) - right) < 4 * error + 0.03 * right, (key, layer)
            assert error < 0.12 * right, (key, layer)  # else the test would pass whatever is predicted


def test_measured_signals_are_those_of_the_model():
    """`measure` walks the blocks by itself: its loss and gradients must be the model's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 26, 2, 2, 16, 0.0, True))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # attention is not uniform, and biases count
    x, y = torch.randint(26, (2, 2, 16))
    found = depth.measure(model, x, y)
    _, loss = model(x, y)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.transformer.h[1].mlp.parameters()))
    assert found["layers"][2]["mlp_gradient"] == pytest.approx(norm, rel=1e-5)
    # Entropy, from probabilities computed the plain way.
    h = model.transformer.h[0].ln_1(model.transformer.wte(x) + model.transformer.wpe.weight[:16])
    q, k = (v.view(2, 16, 2, 8).transpose(1, 2) for v in model.transformer.h[0].attn.c_attn(h).split(16, 2)[:2])
    p = (q @ k.transpose(2, 3) / 8**0.5 + torch.full((16, 16), -math.inf).triu(1)).softmax(-1)
    entropy = torch.special.entr(p).sum(-1).mean() / torch.arange(1.0, 17).log().mean()
    assert found["layers"][1]["entropy"] == pytest.approx(entropy.item(), rel=1e-5)


def test_signals_are_written_as_pictures_and_a_page(inspect):
    status, out, report = inspect("--signals", "--depths=2,4", "--out=seen")
    assert status == 0
    for name in ("signals.png", "rescale.png"):
        assert open(f"seen/{name}", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    page = open("seen/signals.html").read()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert "4 x 32 tokens of letters" in out
    held = {(r["depth"], r["scheme"]): r["measured"][-1] for r in report["signals"]["rescale"]}
    assert held[4, "nanogpt"] / held[2, "nanogpt"] < 1.1 < held[4, "no_rescale"] / held[2, "no_rescale"]


def test_a_checkpoint_is_looked_at(fastgpt, train):
    train("--init_scheme=over_sqrt_layers")
    for flags in (["--out_dir=out"], ["--out_dir=out", "--init_from=resume", "--dataset=letters"]):
        status, out, err = fastgpt("inspect", *flags, "--signals", "--out=seen", "--json=report.json")
        assert (status, err) == (0, "")
        report = json.loads(open("report.json").read())
        assert report["scheme"] == "over_sqrt_layers"
        assert report["weights"] == "trained"
        assert "out/ckpt.pt, iteration 8: 2 blocks" in out
        assert "times the init's" in out
        assert len(report["signals"]["init"]) == len(report["signals"]["layers"]) == 3


def test_a_checkpoint_remembers_its_scheme(fastgpt, train, dataset):
    train("--init_scheme=no_rescale")
    saved = checkpoints.load("out")
    assert saved["config"]["init_scheme"] == "no_rescale"
    out = train("--init_from=resume", "--max_iters=12")
    assert "from the checkpoint: init_scheme = no_rescale" in out
    assert checkpoints.load("out")["config"]["init_scheme"] == "no_rescale"
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, "--init_from=resume", "--init_scheme=pytorch")
    assert status == 2
    assert "--init_scheme=pytorch: the checkpoint out/ckpt.pt has init_scheme=no_rescale" in err


def test_a_scheme_is_refused_where_there_is_no_init(fastgpt, train):
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, "--init_from=gpt2", "--init_scheme=pytorch")
    assert status == 2
    assert "--init_scheme=pytorch: the weights are those of gpt2; leave it out" in err
    train()
    for path in Path("out").glob("ckpt-*.pt"):  # the older ones would take its place
        path.unlink()
    saved = torch.load("out/ckpt.pt", weights_only=True)
    for wrong in ("xavier", ["nanogpt"]):
        saved["config"]["init_scheme"] = wrong
        torch.save(saved, "out/ckpt.pt")
        for words in (["inspect", "--out_dir=out"], ["train", "--dataset=letters", *TINY, "--init_from=resume"]):
            status, _, err = fastgpt(*words)
            assert status == 2
            assert "its init_scheme is" in err
            assert err.count("\n") == 1


def test_training_starts_from_the_scheme(train):
    """The first loss differs by the weights alone: the batches are the same."""
    first = {}
    for scheme in ("nanogpt", "times_0.02", "pytorch"):
        train(f"--init_scheme={scheme}", f"--out_dir={scheme}")
        first[scheme] = losses(scheme)[0]
    assert len(set(first.values())) == 3
    torch.manual_seed(1337)
    model = GPT(GPTConfig(16, 26, 2, 2, 16, 0.0, False))
    init.apply(model, "times_0.02")
    saved = checkpoints.load("times_0.02")
    assert saved["model_args"] == dict(
        n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=26, dropout=0.0
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--init_scheme=norescale"], "the nearest right value is 'no_rescale'"),
        (["--out_dir=nowhere"], "there is no checkpoint"),
        (["--n_layer=9999", "--n_embd=65536", "--n_head=2"], "of memory are free; take a smaller model"),
        (["--n_head=3"], "--n_head=3 does not divide n_embd=32"),
        (["--signals", "--depths=2,x"], "--depths=2,x: 'x' is not such a number"),
        (["--signals", "--out=report.json/x"], "--out: report.json/x/signals.png cannot be written"),
    ],
)
def test_bad_input_is_one_line(fastgpt, dataset, flags, says):
    open("report.json", "w").close()
    words = [] if flags[0].startswith("--out_dir") else SMALL
    status, _, err = fastgpt("inspect", *words, *flags)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_checkpoint_is_refused(fastgpt, workdir):
    (workdir / "out").mkdir()
    for content in (b"", b"text", b"PK\x03\x04" + bytes(100)):
        (workdir / "out/ckpt.pt").write_bytes(content)
        status, _, err = fastgpt("inspect", "--out_dir=out")
        assert status == 2
        assert "out/ckpt.pt" in err
        assert err.count("\n") == 1
