"""`fastgpt bench count`: the launches and the bytes of one micro-step, forward and backward, counted without a GPU.

Nothing is computed: every tensor is fake. Four arms are counted. Each is nanoGPT's maths under autocast to bfloat16, without the update.

    eager            the plain model of peers/, one aten operator at a time
    compiled         the same under torch.compile: the baseline. A node of Inductor's schedule for an H200 is a kernel
    fastgpt          GPT with every Triton kernel, compiled as `train.py` does by default
    fastgpt-eager    the same without the compiler

A kernel's bytes are what it must move through memory: each tensor that it reads once, each that it writes once, and of a gather the
rows that it reads. The bytes of GEMMs and of attention stand in columns of their own. A GEMM with an epilogue counts its operands and
one result as GEMM, the rest as the epilogue's. `Record.kernels` (fastgpt/records.py) says what a Triton kernel reads and writes.

This module runs in a process of its own: it makes torch take the CPU for a GPU.
"""

import contextlib
import functools
import io
import json
import logging
import math
import re
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from fastgpt import ops
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.benchmarks.roofline import step_parts
from fastgpt.config import RESIDUAL, Residual, StepShape, UserError
from fastgpt.metrics import PEAKS
from fastgpt.model import GPT
from fastgpt.parse import parse
from fastgpt.records import RECORDS, Shape
from fastgpt.shadows import Shadows

ARMS = ("eager", "compiled", "fastgpt", "fastgpt-eager")
PREDICTED = ("A100", "RTX 4090", "H100", "H200", "B200")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic has a deprecated method `json`, which nobody calls here

    class CountConfig(StepShape):
        """Count the kernels and bytes of a micro-step, without a GPU."""

        GROUPS = {"preset": "the step", "arms": "the count", "gemm_share": "what --predict supposes"}
        EXAMPLES = ["fastgpt bench count --preset=tiny", "fastgpt bench count --arms=compiled,fastgpt --predict=True"]

        arms: str = Field(",".join(ARMS), description="which implementations to count")
        residual: Residual = Field("fp32", description="dtype of the residual stream in fastgpt's own")
        by_kernel: bool = Field(False, description="a row for each kernel instead of for each op")
        json: bool = Field(False, description="print JSON instead of the tables")
        predict: bool = Field(
            False, description="what a micro-step would take on each GPU at the next four flags' rates"
        )
        gemm_share: float = Field(
            0.8, gt=0, le=1, description="of a data sheet's FLOP/s, which large products reach: 788 of an H200's 989"
        )
        attention_share: float = Field(
            0.27,
            gt=0,
            le=1,
            description="the same of attention: cuDNN's 288 forward and about 240 backward on an H100, at 1024 tokens and heads of 64",
        )
        memory_share: float = Field(
            0.85, gt=0, le=1, description="of a data sheet's bytes/s, which a streaming kernel reaches"
        )
        launch_us: float = Field(1.5, ge=0, description="microseconds on the GPU from one kernel to the next")


# What aten operators are for. Of a fused kernel's operators the first match in this order names it.
GROUPS = {
    "layer_norm": r"layer_norm",
    "gelu_mlp": r"gelu",
    "linear_cross_entropy": r"log_softmax|nll_loss",
    "embedding": r"embedding|arange|sort",
    "dropout": r"dropout|bernoulli|rand",
    "cat": r"cat|split|slice|stack",
    "fill": r"zero|full|fill|ones",
    "sum": r"sum|div|mul",
    "add": r"add",
    "cast": r"_to_copy|convert",
    "copy": r"clone|copy_|contiguous|view|permute|transpose|t\b",
}
NO_LAUNCH = re.compile(r"empty|_unsafe_view|detach|alias|expand|lift_fresh")  # views, and memory as it lies


@dataclass
class Launch:
    """One kernel: the op that it serves, its direction and name, and its bytes by what they belong to."""

    op: str
    direction: str
    name: str
    bytes: int = 0  # neither a GEMM's nor attention's
    gemm_bytes: int = 0
    attention_bytes: int = 0


def library_launch(direction, name, moved):
    """The Launch of a kernel of a library, by its operator's name."""
    if re.search(r"mm\b", name):
        return Launch("gemm", direction, name, gemm_bytes=moved)
    if "scaled_dot_product" in name:
        return Launch("attention", direction, name, attention_bytes=moved)
    return Launch(group([name]), direction, name, moved)


def group(names):
    """What aten operators are for, by GROUPS."""
    return next((g for g, pattern in GROUPS.items() if any(re.search(pattern, n) for n in names)), "other")


def size(t):
    """Bytes of a tensor's elements; those that a stride of 0 repeats count once."""
    return math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size()


def sizes(tree):
    """Bytes of all tensors in a nest of them."""
    return sum(size(t) for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor))


class Recorder(TorchDispatchMode):
    """While active, records a Launch for each aten operator that is dispatched and each Triton kernel that is launched."""

    def __init__(self, direction="forward"):
        super().__init__()
        self.launches, self.direction = [], direction

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, returns = func._schema.name, func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if name.startswith("aten::") and not view and not NO_LAUNCH.search(name):
            self.launches.append(library_launch(self.direction, name, dispatched_bytes(func, args, kwargs, out)))
        return out


def launch(kernel, *args, grid, warmup, **options):
    """Stands in for JITFunction.run."""
    recorder = next(m for m in reversed(_get_current_dispatch_mode_stack()) if isinstance(m, Recorder))
    names = [n for n in kernel.arg_names if n not in options]
    given = dict(zip(names, args, strict=True)) | options
    recorder.launches.append(triton_launch(kernel, given, recorder.direction))


def dispatched_bytes(func, args, kwargs, out):
    """Bytes that an aten operator moves."""
    name, arguments = func._schema.name, func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    # What is gathered is not all of the table, and a backward may be handed what it does not read.
    if name == "aten::embedding":
        return 2 * size(out) + size(given["indices"])
    if name == "aten::nll_loss_forward":
        return 2 * size(given["target"])
    if name == "aten::nll_loss_backward":
        return size(out) + size(given["target"])
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    only_written = written if re.search(r"fill|zero|copy_|\bout$|_out$", f"{name}.{func._overloadname}") else []
    read = [v for k, v in given.items() if k not in only_written]
    return sizes(read) + sizes([given[k] for k in written] if written else out)


# ---- Triton's kernels ----


@functools.cache
def kernels():
    """{Triton kernel: (its op, what it reads -> what it writes)} of all records."""
    return {kernel: (op, words) for op, record in RECORDS.items() for kernel, words in record.kernels.items()}


def kernel_name(kernel, given):
    """A Triton kernel's name as the records have it."""
    direction = {True: " backward", False: " forward", None: ""}[given.get("BACKWARD")]
    return kernel.__name__.strip("_") + direction


def triton_launch(kernel, given, direction):
    """The Launch of a Triton kernel with arguments by name."""
    name = kernel_name(kernel, given)
    op = kernels()[name][0]
    reads, writes = (traffic(name, given, side) for side in (0, 1))
    moved = sum(reads.values()) + sum(writes.values())
    if op == "attention":
        return Launch(op, direction, name, attention_bytes=moved)
    gemm = reads["a"] + reads["b"] + next(iter(writes.values())) if name.startswith("mlp_gemm") else 0
    return Launch(op, direction, name, moved - gemm, gemm_bytes=gemm)


def traffic(name, given, side):
    """{parameter: bytes} that a kernel reads (side 0) or writes (side 1), by its record."""
    found = {}
    for word in kernels()[name][1].split(" -> ")[side].split():
        parameter, _, index = word.partition(":")
        tensor = argument(given, parameter)
        if tensor is not None:
            found[parameter] = size(tensor)
            if index:
                found[parameter] = min(size(tensor), argument(given, index).numel() * size(tensor[0]))
    return found


def argument(given, parameter):
    """The tensor behind a kernel's parameter, or None."""
    value = given[parameter if parameter in given else parameter + "_ptr"]
    return getattr(value, "base", value)  # a TMA descriptor's


def launchers():
    """{opaque op: its launcher} of all kernels."""
    found = (f for module in vars(ops.triton).values() for f in getattr(module, "__dict__", {}).values())
    return {f.opaque: f.__wrapped__ for f in found if hasattr(f, "opaque")}


# ---- taking the CPU for a GPU ----

# What Inductor and the launchers ask of an H200. Source: NVIDIA's data sheet and the CUDA programming guide.
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 10**9, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip


def always(value):
    return lambda *args, **kwargs: value


def pretend_gpu():
    """Make torch, Inductor and the launchers see an H200 for the rest of this process, and record Triton's launches.

    Raises UserError without Triton.
    """
    if ops.triton is None:
        raise UserError("bench count: Triton is not installed; pip install triton")
    import torch._inductor.config
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton
    from triton.runtime.jit import JITFunction

    for place in (torch.cuda, CudaInterface, CudaInterface.Worker):
        place.get_device_properties = staticmethod(always(H200))
    torch.cuda.current_device = always(-1)  # as the index of a CPU tensor's device: no launcher has to change it
    _triton.has_triton = always(True)
    # Inductor measures whether to pad a product, on a GPU alone. The copies for an odd vocabulary are therefore not counted.
    torch._inductor.config.shape_padding = False
    # Autograd wants a driver for CUDA tensors, so all tensors are the CPU's. Python code that asks them is told otherwise.
    FakeTensor.is_cuda = property(lambda t: True)
    FakeTensor.data_ptr = always(0)  # fresh memory begins on 16 bytes
    ops.triton.common._device_can_run = always(True)
    ops.triton.configs.architecture = always(90)
    ops.triton.configs.multiprocessors = always(H200.multi_processor_count)
    JITFunction.run = launch


class AsOnCuda(TorchFunctionMode):
    """What autocast and attention do on CUDA, for tensors of the CPU: the loss in fp32, attention by cuDNN."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            args = args[0].float(), *args[1:]
        elif function is F.scaled_dot_product_attention:
            p, causal = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_cudnn_attention(*args, None, True, p, causal, False)[0]
        return function(*args, **kwargs)


# ---- the arms ----


def build(arm, config, residual):
    """call(idx, targets) of an arm: the outputs of a training step's forward, the loss last."""
    if not arm.startswith("fastgpt"):
        return PlainGPT(config)
    model = GPT(config)
    model.set_kernels(ops.all_triton())
    model.set_residual(residual)
    Shadows(model, torch.bfloat16)
    return lambda idx, targets: model(idx, targets, return_logits=False)[1:]


def count_arm(arm, config, residual, batch_size):
    """The Launches of an arm: as they are dispatched, or as Inductor schedules them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = build(arm, config, residual)
        idx, targets = (torch.zeros((batch_size, config.block_size), dtype=torch.int64) for _ in range(2))
        if arm.endswith("eager"):
            with Recorder() as recorder:
                loss = as_on_cuda(call, idx, targets)[-1]
                recorder.direction = "backward"
                loss.backward()
            return recorder.launches
    found = []
    outputs = as_on_cuda(torch.compile(call, fullgraph=True, dynamic=False, backend=inductor(found)), idx, targets)
    outputs[-1].backward()
    # What the loss does not differentiate comes to the backward as zeros, which the runtime fills.
    return found + [Launch("fill", "backward", "zeros for the logits' gradient", size(o)) for o in outputs[:-1]]


def as_on_cuda(call, idx, targets):
    """call(idx, targets) under autocast to bf16, as it would be on CUDA."""
    with torch.autocast("cpu", dtype=torch.bfloat16), AsOnCuda():
        return call(idx, targets)


def inductor(found):
    """A backend for torch.compile: Inductor up to its schedule, whose Launches are added to `found`. It computes nothing."""
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx

    def inner_compile(graph, inputs, is_backward=False, **options):
        outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        answers = [o.meta["val"] if isinstance(o, torch.fx.Node) else None for o in outputs]
        found.extend(scheduled(graph, inputs, "backward" if is_backward else "forward"))

        def run(args):
            return [torch.empty_like(a) if isinstance(a, torch.Tensor) else a for a in answers]

        run._boxed_call = True
        return run

    def backend(graph, inputs):
        # Before PyTorch 2.13 AOTAutograd takes fake tensors of Dynamo's own mode alone.
        with TracingContext.get().fake_mode:
            fakes = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, requires_grad=t.requires_grad) for t in inputs
            ]
        return compile_fx(graph, fakes, inner_compile)

    return backend


def scheduled(graph, inputs, direction):
    """The Launches of an aten graph, as Inductor schedules it."""
    with lowered(graph, inputs, direction == "backward") as lowering:
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        fake = lowering.fake_mode
        return [launch for node in lowering.scheduler.nodes for launch in node_launches(node, direction, fake)]


@contextlib.contextmanager
def lowered(graph, inputs, is_backward):
    """Inductor's GraphLowering of an aten graph after its passes, with the graph's tensors on CUDA."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.compile_fx import _recursive_record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = detect_fake_mode(inputs)

    def on_cuda(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") if torch.is_tensor(t) else t

    with fake, torch.no_grad():
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(on_cuda, node.meta["val"])
        graph.recompile()
        inputs = [on_cuda(t) for t in inputs]
    view_to_reshape(graph)
    _recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fake), torch.no_grad():
        post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph, example_inputs=inputs, shape_env=ShapeEnv(), is_inference=False, is_backward=is_backward
        )
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            yield lowering


def node_launches(node, direction, fake):
    """The Launches of one node of Inductor's schedule: a fused kernel, a library's, one of our ops, or none."""
    from torch._inductor import ir, scheduler

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return []
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        origins = sorted({str(o.meta.get("original_aten", o.target)) for s in node.get_nodes() for o in s.node.origins})
        return [Launch(group(origins), direction, " ".join(["triton", *origins]), accessed(node))]
    kernel = node.node
    if isinstance(kernel, ir.MultiOutput):  # an output of the node before, which has its bytes
        return []
    overload = getattr(kernel, "op_overload", None)
    if overload is not None and overload.namespace == "fastgpt":
        return op_launches(kernel, overload, direction, fake)
    # Of several outputs each is a node of its own, a user of this one.
    users = (getattr(u.node, "node", None) for b in node.get_outputs() for u in b.users)
    outputs = (math.prod(u.get_size()) * u.get_dtype().itemsize for u in users if isinstance(u, ir.MultiOutput))
    name = str(getattr(kernel, "python_kernel_name", None) or overload)
    return [library_launch(direction, name, int(accessed(node) + sum(outputs)))]


def accessed(node):
    """Bytes of each buffer that a node reads and of each that it writes, apart from what lives only within a fused kernel.

    Inductor's own count, get_read_write_buffers_sizes, takes a buffer that is read and overwritten once.
    """
    from torch._inductor.dependencies import MemoryDep, StarDep
    from torch._inductor.virtualized import V

    inside, known, total = set(node.get_nodes()), node.scheduler.name_to_buf, 0
    for dependencies in (node.read_writes.reads, node.read_writes.writes):
        moved = {}
        for d in dependencies:
            users = {u.node for u in known[d.name].users} if d.name in known else set()
            if users and users <= inside and known[d.name].defining_op in inside:
                continue
            if isinstance(d, MemoryDep) and d.is_indirect():  # a gather reads as many elements as it looks up
                n = math.prod(map(int, d.size)) * V.graph.get_dtype(d.name).itemsize
            else:
                n = V.graph.get_dep_size_hint(d)
            moved[d.name] = min(moved.get(d.name, 0) + n, V.graph.get_dep_size_hint(StarDep(d.name)))
        total += sum(moved.values())
    return total


def op_launches(kernel, overload, direction, fake):
    """The Launches within one of our ops: its launcher is called on fake tensors."""
    origin = next(o for o in kernel.origins if o.target is overload)

    def value(x):
        t = x.meta["val"] if isinstance(x, torch.fx.Node) else x
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if torch.is_tensor(t) else t

    with fake, torch.no_grad():
        args, kwargs = pytree.tree_map(value, (origin.args, origin.kwargs))
        names = [a.name for a in overload._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        with Recorder(direction) as recorder:
            launchers()[overload](*given.values())
    return recorder.launches


# ---- the command ----


def summary(launches, by_kernel=False):
    """The sums of Launches, and a row an op (or a kernel) and direction, most bytes first."""
    rows = {}
    for x in launches:
        key = {"op": x.op, "direction": x.direction} | ({"kernel": x.name} if by_kernel else {})
        row = rows.setdefault(tuple(key.values()), key | dict(launches=0, bytes=0, gemm_bytes=0, attention_bytes=0))
        row["launches"] += 1
        for kind in ("bytes", "gemm_bytes", "attention_bytes"):
            row[kind] += getattr(x, kind)
    return {
        "launches": len(launches),
        "non_gemm_bytes": sum(x.bytes for x in launches),
        "gemm_bytes": sum(x.gemm_bytes for x in launches),
        "attention_bytes": sum(x.attention_bytes for x in launches),
        "ops": sorted(rows.values(), key=lambda r: (-r["bytes"], -r["launches"])),
    }


def count(cfg):
    """{arm: summary} of a CountConfig, and what was counted. Raises UserError for an unknown arm."""
    arms = cfg.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        raise UserError(f"--arms={cfg.arms}: {sorted(unknown)[0]!r} is none of {', '.join(ARMS)}")
    config = cfg.gpt_config()
    pretend_gpu()
    found = {"config": {**vars(config), "preset": cfg.preset, "batch_size": cfg.batch_size}, "torch": torch.__version__}
    for arm in arms:
        found[arm] = summary(count_arm(arm, config, RESIDUAL[cfg.residual], cfg.batch_size), cfg.by_kernel)
    return found


def show(found, arms):
    """Print the tables."""
    c = found["config"]
    print(
        f"one micro-step of {c['preset'] or 'nanoGPT'}: {c['n_layer']} layers, {c['n_embd']} wide, {c['batch_size']} x "
        f"{c['block_size']} tokens, bf16 autocast, forward and backward, the update apart; torch {found['torch']}\n"
    )
    print(
        f"{'implementation':16}{'launches':>10}{'GB outside GEMMs and attention':>32}{'GB in GEMMs':>13}{'in attention':>14}"
    )
    for arm in arms:
        a = found[arm]
        gb = (a[k] / 1e9 for k in ("non_gemm_bytes", "gemm_bytes", "attention_bytes"))
        print(f"{arm:16}{a['launches']:10,}" + "".join(f"{x:{w}.2f}" for x, w in zip(gb, (32, 13, 14), strict=True)))
    for arm in arms:
        print(f"\n{arm}\n  {'op':22}{'direction':10}{'launches':>9}{'GB':>9}")
        for r in found[arm]["ops"]:
            gb = f"{r['bytes'] / 1e9:9.3f}" if r["op"] not in ("gemm", "attention") else f"{'-':>9}"
            print(f"  {r['op']:22}{r['direction']:10}{r['launches']:9,}{gb}  {r.get('kernel', '')[:100]}".rstrip())


def predicted(found, cfg, arm, gpu):
    """{what: milliseconds} of an arm's micro-step on a GPU of metrics.PEAKS, at a CountConfig's rates.

    Each launch outside GEMMs and attention is bound by memory; nothing overlaps. fastgpt's attention computes seven products backward,
    the others' five.
    """
    config = cfg.gpt_config()
    parts = [p for p in step_parts(Shape.of(cfg.batch_size, config), config.n_layer) if p.direction != "update"]
    flops, bandwidth = PEAKS[gpu]
    attention = {
        d: sum(p.times * p.flops for p in parts if (p.op, p.direction) == ("attention", d))
        for d in ("forward", "backward")
    }
    gemms = sum(p.times * p.flops for p in parts) - sum(attention.values())
    products = 7 / 5 if arm.startswith("fastgpt") else 1
    return {
        "GEMMs": gemms / (cfg.gemm_share * flops) * 1e3,
        "attention": (attention["forward"] + products * attention["backward"]) / (cfg.attention_share * flops) * 1e3,
        "memory": found[arm]["non_gemm_bytes"] / (cfg.memory_share * bandwidth) * 1e3,
        "launches": found[arm]["launches"] * cfg.launch_us / 1e3,
    }


def show_predicted(found, cfg):
    """Print the table of `predicted`, with each arm's time and the first one's over it."""
    print(
        f"\n{'GPU':10}{'implementation':16}{'GEMMs ms':>10}{'attention':>11}{'memory':>9}{'launches':>10}{'sum ms':>9}{'ratio':>7}"
    )
    for gpu in PREDICTED:
        first = None
        for arm in cfg.arms.split(","):
            ms = predicted(found, cfg, arm, gpu)
            total = sum(ms.values())
            first = first or total
            cells = "".join(
                f"{x:{w}.2f}" for x, w in zip((*ms.values(), total, first / total), (10, 11, 9, 10, 9, 7), strict=True)
            )
            print(f"{gpu:10}{arm:16}{cells}")


def main(argv):
    """The command; its exit status."""
    cfg, _ = parse(CountConfig, argv, "fastgpt bench count")
    logging.getLogger("torch").setLevel(logging.ERROR)  # Inductor asks for what only a driver knows
    with contextlib.redirect_stdout(io.StringIO()):  # what models say as they are made
        found = count(cfg)
    if cfg.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, cfg.arms.split(","))
        if cfg.predict:
            show_predicted(found, cfg)
    return 0


if __name__ == "__main__":
    from fastgpt.cli import reported

    sys.exit(reported(lambda: main(sys.argv[1:])))
