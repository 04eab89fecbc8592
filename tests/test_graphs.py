"""CUDA graphs of micro-steps: training with them is training without, on a made-up graph that replays what was launched."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, command, in_two_processes, losses
from kernel_case import DEVICE
from replay import Recording
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import graphs, runner
from fastgpt.graphs import CaptureEnded
from fastgpt.model import GPT, GPTConfig
from fastgpt.shadows import Shadows
from fastgpt.step import micro_step, train_step

pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU has graphs of its own: test_a_real_graph_is_the_same_training"
)


@pytest.fixture
def made_up(monkeypatch):
    """Recordings in place of CUDA graphs; the list of them."""
    recordings = []

    def capture(run, pool):
        recordings.append(Recording())
        return recordings[-1].replay, recordings[-1].record(run), "a pool"

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "waits", lambda: nullcontext([]))
    return recordings


class Batches:
    """Other tokens each time."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)
        self.prefetch()

    def prefetch(self):
        self.next = torch.randint(31, (2, 1, 4), generator=self.generator).to(DEVICE).unbind()

    def get(self):
        return self.next


def train(
    graphed, kernels="torch", accumulation=2, steps=4, dropout=0.0, recompute="none", shadows=False, dtype=torch.float32, scaled=False,
):  # fmt: skip
    """(losses, gradient norms, weights at the end) of a few steps, the learning rate another each time; and what was said."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 31, n_layer=1, n_head=1, n_embd=16, dropout=dropout, bias=True)).to(DEVICE)
    model.set_kernels(kernels)
    model.set_recompute(recompute)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE)
    if shadows:
        Shadows(model, dtype)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**6, growth_factor=2.0**20, growth_interval=2, enabled=scaled)
    autocast = torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)
    said, found = [], []
    settings = scaler, accumulation, autocast
    runs = (
        graphs.Graphs(lambda x, y: micro_step(model, x, y, *settings), model.parameters(), said.append)
        if graphed
        else None
    )
    batches = Batches()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        found += train_step(model, optimizer, scaler, batches, accumulation, autocast, 1.0, runs)
        found = [t.clone() for t in found]
    return found + [p.detach() for p in model.parameters()], said


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@on_cpu
@pytest.mark.parametrize(
    ("accumulation", "how"),
    [
        (1, {}),
        (3, dict(dropout=0.2)),
        pytest.param(1, dict(kernels="triton", recompute="block"), marks=pytest.mark.slow),
        pytest.param(2, dict(kernels="triton", dropout=0.2, dtype=torch.float16, shadows=True), marks=pytest.mark.slow),
        (2, dict(dtype=torch.float16, scaled=True, steps=8)),
    ],
    ids=["torch", "dropout", "triton recomputing", "triton dropout shadows", "a loss scale that falls and rises"],
)
def test_training_with_graphs_is_training_without(made_up, how, accumulation):
    plain, _ = train(False, accumulation=accumulation, **how)
    graphed, said = train(True, accumulation=accumulation, **how)
    assert_same(graphed, plain)
    assert said == ["CUDA graphs: from here on a micro-step is one replay"]
    assert len(made_up) == min(accumulation, 2), "one that begins the gradients, one that adds to them"
    # Two iterations ran without; each micro-step since was one replay.
    assert sum(r.replays for r in made_up) == (how.get("steps", 4) - 2) * accumulation


@on_cpu
def test_the_made_up_graph_replays_and_does_not_run(made_up, monkeypatch):
    """What a graph would freeze shows: an input that is not copied, a number from the host."""
    plain, _ = train(False)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "copy_",
            lambda self, other, copy=torch.Tensor.copy_: self if self.dtype == torch.int64 else copy(self, other),
        )
        stale, _ = train(True)
    assert any(not torch.equal(a, b) for a, b in zip(stale, plain, strict=True))
    numbers = iter(range(1, 100))
    x = torch.ones(3)
    recording = Recording()
    y = recording.record(lambda: x * next(numbers))
    assert y.isnan().all(), "nothing was computed yet"
    recording.replay()
    recording.replay()
    assert y.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match="waits"):
        Recording().record(lambda: float(x.sum()))


@on_cpu
def test_a_micro_step_under_graphs_is_one_replay_on_the_host(made_up, monkeypatch):
    """The host copies the two inputs and replays: it calls neither the model nor autograd, and no kernel."""
    model = GPT(GPTConfig(8, 31, n_layer=1, n_head=1, n_embd=16))
    model.set_kernels("triton")
    runs, calls = [], []
    scaler, autocast = torch.amp.GradScaler("cuda", enabled=False), nullcontext()

    def run(x, y):
        runs.append("micro_step")
        return micro_step(model, x, y, scaler, 2, autocast)

    graphed, batches = graphs.Graphs(run, model.parameters(), lambda line: None), Batches()
    for _ in range(graphs.WARM_UP + 1):
        for i in range(2):
            graphed(*batches.get(), fresh=i == 0)
        model.zero_grad(set_to_none=True)
    runs.clear()
    for name, (_, loss) in dict(graphed.captured).items():
        graphed.captured[name] = lambda: calls.append("replay"), loss

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Dispatched():
        for i in range(2):
            graphed(*batches.get(), fresh=i == 0)
    assert calls == 2 * ["copy_", "copy_", "replay"]
    assert runs == []


@on_cpu
@pytest.mark.parametrize("when", ["fresh", "more"])
def test_what_cannot_be_captured_goes_on_without(made_up, monkeypatch, when):
    plain, _ = train(False)
    capture, calls = graphs.capture, []

    def failing(run, pool):
        calls.append(pool)
        if len(calls) == (1 if when == "fresh" else 2):
            capture(run, pool)  # and what it has begun is left lying
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return capture(run, pool)

    monkeypatch.setattr(graphs, "capture", failing)
    graphed, said = train(True)
    assert_same(graphed, plain)
    reason = (
        "a micro-step cannot be captured (operation not permitted when stream is capturing); the run goes on without"
    )
    assert said[-1] == f"CUDA graphs: {reason}"
    assert calls == ([None] if when == "fresh" else [None, "a pool"]), (
        "it is not tried again, and the memory is one pool"
    )


@on_cpu
def test_what_waits_for_the_gpu_is_not_captured(made_up, monkeypatch):
    modes = []
    monkeypatch.setattr(graphs, "waits", WAITS)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 1:  # as PyTorch says once
            warnings.warn(notice, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    run = GPT.forward

    def waiting(self, *args, **kwargs):
        if modes and modes[-1] == "warn":
            if waiting.waits:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", waiting)
    for waiting.waits in (False, True):
        modes.clear()
        made_up.clear()
        with pytest.warns(UserWarning, match="something else") as caught:
            _, said = train(True)
        assert notice not in map(str, (w.message for w in caught))
        assert modes[:2] == ["warn", 0]
        assert len(said) == 1
        assert bool(made_up) != waiting.waits
    assert f"{Path(__file__).name}:" in said[0]
    assert "waits for the GPU); the run goes on without" in said[0]


def test_a_capture_that_cuda_gave_up_ends_the_run_in_a_line(monkeypatch):
    """PyTorch is left in the midst of it: nothing more could be computed. What merely raised leaves it sound."""
    streams, sound = [], True

    class Graph:
        """torch.cuda.graph, whose end is the capture's."""

        def __init__(self, *args, **options):
            assert options == {"capture_error_mode": "thread_local"}

        def __enter__(self):
            return self

        def __exit__(self, *args):
            if not sound:
                raise RuntimeError(
                    "CUDA error: operation failed due to a previous error during capture\nCompile with ..."
                )

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None, pool=lambda: "the pool"))
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "mine")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    assert graphs.capture(lambda: 3, None) == (None, 3, "the pool")
    with pytest.raises(ZeroDivisionError):
        graphs.capture(lambda: 1 / 0, None)
    assert streams == []
    sound = False
    for run, said in ((lambda: 3, "operation failed due to"), (lambda: 1 / 0, "division by zero")):
        with pytest.raises(
            CaptureEnded,
            match=rf"--runner=graphs: a micro-step cannot be captured \(.*{said}.*\); give --runner=eager$",
        ):
            graphs.capture(run, None)
    assert streams == ["mine", "mine"]


@on_cpu
def test_a_broken_capture_ends_training(made_up, monkeypatch):
    def broken(run, pool):
        raise CaptureEnded("--runner=graphs: ...; give --runner=eager")

    monkeypatch.setattr(graphs, "capture", broken)
    with pytest.raises(CaptureEnded, match="give --runner=eager"):
        train(True)


WAITS = graphs.waits


def train_on_recordings(*flags):
    """A run of the trainer with Recordings in place of CUDA graphs."""

    def capture(run, pool):
        recording = Recording()
        return recording.replay, recording.record(run), None

    with (
        patch.multiple(graphs, capture=capture, waits=lambda: nullcontext([])),
        patch.object(runner, "asked", lambda cfg, given: runner.Runner(cfg.compile, cfg.cuda_graphs)),
    ):
        command("train", *flags)


@on_cpu
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 6), (2, 2)])
def test_the_trainer_with_graphs_is_the_trainer_without(dataset, capfd, processes, accumulation):
    """Of two processes three micro-steps each: DDP takes part in the last, which runs as it would; of one each, in that."""
    flags = [
        *TINY,
        "--dataset=letters",
        "--batch_size=2",
        "--block_size=8",
        "--max_iters=4",
        "--eval_interval=3",
        "--eval_iters=1",
    ]
    flags += [f"--gradient_accumulation_steps={accumulation}", "--warmup_iters=0"]
    for graphed in (True, False):
        words = [*flags, f"--cuda_graphs={graphed}", f"--out_dir={graphed}"]
        if processes == 1:
            train_on_recordings(*words)
            said = capfd.readouterr().out
        else:
            said = in_two_processes(train_on_recordings, *words)
        none = graphed and (processes, accumulation) == (2, 2)
        assert said.count("CUDA graphs: none, since DDP takes part") == none
        assert said.count("CUDA graphs: from here on") == (graphed and not none)
    assert len(losses("True")) == 4
    assert losses("True") == losses("False")


@pytest.mark.parametrize("flag", ["--cuda_graphs=True", "--runner=graphs"])
def test_without_a_gpu_it_is_refused(dataset, fastgpt, flag):
    flags = [word for word in TINY if "compile" not in word]
    status, _, err = fastgpt("train", "--dataset=letters", *flags, flag)
    assert status == 2
    assert err == f"fastgpt: error: {flag}: there are no CUDA graphs on --device=cpu; leave it out\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no CUDA graphs without a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_real_graph_is_the_same_training(accumulation, dropout):
    how = dict(kernels="triton", accumulation=accumulation, dtype=torch.bfloat16, shadows=True, dropout=dropout)
    plain, _ = train(False, **how)
    graphed, said = train(True, **how)
    assert said == ["CUDA graphs: from here on a micro-step is one replay"]
    assert_same(graphed, plain)
