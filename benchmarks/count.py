"""`fastgpt bench count`: the launches and the bytes of one micro-step, forward and backward, counted without a GPU.

Nothing is run: every tensor is fake. Four arms are counted, all with nanoGPT's maths under autocast to bfloat16 and with the
update left out:

    eager            the plain model of peers/, an aten operator at a time
    compiled         the same as torch.compile would run it, the baseline: traced by AOTAutograd, then fused by Inductor as for an
                     H200; each node of its schedule is a kernel
    fastgpt          GPT with every Triton kernel, compiled as `train.py` does by default: Inductor around the ops
    fastgpt-eager    the same without the compiler

A kernel's bytes are what it must move through memory: each tensor that it reads once, each that it writes once, no more than
the rows that it gathers. GEMMs and attention are launches like all others, but their bytes stand apart; of a GEMM with an epilogue
only its operands and one result are the GEMM's. What a Triton kernel reads and writes stands in TRAFFIC, which a test holds to
what the interpreter sees it touch.

This is for a process of its own, which then takes the CPU for a GPU.
"""

import contextlib
import copy
import inspect
import io
import json
import logging
import math
import os
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.config import RESIDUAL, CountConfig, UserError, parse
from fastgpt.model import GPT

ARMS = ("eager", "compiled", "fastgpt", "fastgpt-eager")

# What a kernel reads -> what it writes, by parameter, `_ptr` left out; a:b is as many rows of a as b has elements. Arguments that
# are None take no part. Of mlp_gemm the first three are the GEMM itself.
TRAFFIC = {
    "embed_forward": "idx wte:idx wpe:idx seed -> x",
    "embed_backward_wpe": "dx seed -> dwpe",
    "embed_keys": "idx -> keys",
    "embed_backward_wte": "dx ids places seed dwte:ids -> dwte:ids",
    "norm_forward": "x branch weight bias seed -> stream h stats",
    "norm_backward": "dh dstream stream stats weight seed -> dx dbranch partial",
    "norm_reduce": "partial -> dweight dbias",
    "attention_forward": "qkv docs seed -> out lse",
    "attention_delta": "out dout -> delta",
    "attention_backward": "qkv dout docs seed lse delta -> dqkv",
    "mlp_gemm forward": "a b bias -> post pre",
    "mlp_gemm backward": "a b pre -> dpre post partial",
    "mlp_column_sums": "partial -> out",
    "loss_rows": "logits targets -> loss logits",
    "loss_mean": "losses targets -> loss share",
    "loss_scale": "x dloss share -> out",
}

# aten operators by what they are for, the first match of all that were fused into a kernel
GROUPS = {
    "layer_norm": r"layer_norm",
    "gelu": r"gelu",
    "cross_entropy": r"log_softmax|nll_loss",
    "embedding": r"embedding|arange|sort",
    "dropout": r"dropout|bernoulli|rand",
    "cat": r"cat|split|slice|stack",
    "fill": r"zero|full|fill|ones",
    "sum": r"sum|div|mul",
    "add": r"add",
    "cast": r"_to_copy|convert",
    "copy": r"clone|copy_|contiguous|view|permute|transpose|t\b",
}
# Operators that launch nothing: they answer with a view, or memory as it lies.
NOTHING = re.compile(r"empty|_unsafe_view|detach|alias|expand|lift_fresh")


@dataclass
class Launch:
    """One kernel: what it is for, its direction and name, its bytes by what they belong to."""

    op: str
    direction: str
    name: str
    bytes: int = 0  # neither a GEMM's nor attention's
    gemm_bytes: int = 0
    attention_bytes: int = 0


def size(t):
    """Bytes of a tensor's elements; those that a stride of 0 repeats count once."""
    return math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size()


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def group(names):
    """What aten operators are for, by GROUPS."""
    return next((g for g, pattern in GROUPS.items() if any(re.search(pattern, n) for n in names)), "other")


class Recorder(TorchDispatchMode):
    """Records a Launch for each operator that is dispatched, and for each Triton kernel that is launched, while it is active."""

    def __init__(self):
        super().__init__()
        self.launches = []
        self.direction = "forward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if name.startswith("aten::") and not view and not NOTHING.search(name):
            self.dispatched(func, name, args, kwargs, out)
        return out

    def dispatched(self, func, name, args, kwargs, out):
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        only_written = written if re.search(r"fill|zero|copy_|\.out", f"{name}.{func._overloadname}") else []
        moved = sum(size(t) for t in tensors([v for k, v in given.items() if k not in only_written]))
        moved += sum(size(t) for t in tensors([given[k] for k in written] if written else out))
        # What is gathered is not all of what is there, and a backward may be handed what it does not read.
        if name == "aten::embedding":
            moved = 2 * size(out) + size(given["indices"])
        elif name == "aten::nll_loss_forward":
            moved = 2 * size(given["target"])
        elif name == "aten::nll_loss_backward":
            moved = size(out) + size(given["target"])
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            launch = Launch("gemm", self.direction, name, gemm_bytes=moved)
        elif "scaled_dot_product" in name:
            launch = Launch("attention", self.direction, name, attention_bytes=moved)
        else:
            launch = Launch(group([name]), self.direction, name, moved)
        self.launches.append(launch)

    def launched(self, kernel, *args, grid, warmup, **options):
        """In place of JITFunction.run."""
        names = [n for n in kernel.arg_names if n not in options]
        given = dict(zip(names, args, strict=True)) | options
        self.launches.append(triton_launch(kernel, given, self.direction))


def triton_launch(kernel, given, direction):
    """The Launch of a Triton kernel with arguments by name."""
    name = kernel.__name__.strip("_")
    if "BACKWARD" in given:
        name += " backward" if given["BACKWARD"] else " forward"
    moved = {side: traffic(name, given, side) for side in (0, 1)}
    op, total = kernel.__module__.rpartition(".")[2], sum(sum(m.values()) for m in moved.values())
    if op == "flash_attention":
        return Launch("attention", direction, name, attention_bytes=total)
    if name.startswith("mlp_gemm"):
        gemm = moved[0]["a"] + moved[0]["b"] + next(iter(moved[1].values()))
        return Launch(op, direction, name, total - gemm, gemm_bytes=gemm)
    return Launch(op, direction, name, total)


def traffic(name, given, side):
    """{parameter: bytes} that a kernel reads (side 0) or writes (side 1), by TRAFFIC."""
    found = {}
    for word in TRAFFIC[name].split(" -> ")[side].split():
        parameter, _, index = word.partition(":")
        tensor = argument(given, parameter)
        if tensor is not None:
            found[parameter] = size(tensor)
            if index:
                rows = argument(given, index).numel()
                found[parameter] = min(size(tensor), rows * size(tensor[0]))
    return found


def argument(given, parameter):
    """The tensor behind a kernel's parameter, or None."""
    value = given[parameter if parameter in given else parameter + "_ptr"]
    return getattr(value, "base", value)  # a TMA descriptor's


# ---- taking the CPU for a GPU ----

# What Inductor and the launchers ask of an H200. Source: NVIDIA's data sheet and the CUDA programming guide.
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 10**9, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip


def always(value):
    return lambda *args, **kwargs: value


def pretend_gpu(recorder):
    """Have torch, Inductor and the kernels' launchers see an H200, and Triton's launches go to recorder(). For good.

    Raises UserError without Triton.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are first imported
    try:
        from triton.runtime.jit import JITFunction

        from fastgpt.kernels import common, configs
    except ImportError:
        raise UserError("bench count: Triton is not installed; pip install triton") from None
    import torch._inductor.config
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton

    for place in (CudaInterface, CudaInterface.Worker):
        place.get_device_properties = staticmethod(always(H200))
        place.current_device = staticmethod(always(0))
    for name, value in (
        ("get_compute_capability", 90), ("is_available", True), ("device_count", 1), ("is_triton_capable", True),
        ("raise_if_triton_unavailable", None),
    ):  # fmt: skip
        setattr(CudaInterface, name, staticmethod(always(value)))
    for name, value in (
        ("get_device_properties", H200), ("get_device_capability", (9, 0)), ("device_count", 1), ("_lazy_init", None),
        ("current_device", None),  # the index of a CPU tensor's device: no launcher has to change it
    ):  # fmt: skip
        setattr(torch.cuda, name, always(value))
    _triton.has_triton = always(True)
    _triton.triton_hash_with_backend = always("")
    _triton.triton_backend = always(None)
    torch.version.cuda = torch.version.cuda or "13.0"
    # Whether to pad a product is measured, on a GPU alone: of an odd vocabulary the copies for it are not counted.
    torch._inductor.config.shape_padding = False
    # Autograd wants a driver for CUDA tensors, so all are the CPU's; Python code that asks them is told otherwise.
    FakeTensor.is_cuda = property(lambda t: True)
    FakeTensor.data_ptr = always(0)  # fresh memory begins on 16 bytes
    common._device_can_run = always(True)
    configs.architecture = always(90)
    JITFunction.run = lambda kernel, *args, **options: recorder().launched(kernel, *args, **options)


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
    """(module, call) of an arm: call(module, idx, targets) gives the outputs that its training step's forward has."""
    if arm.startswith("fastgpt"):
        ops.use("triton")
        model = GPT(config)
        model.keep_shadows(torch.bfloat16)
        model.set_residual(residual)
        return model, lambda model, idx, targets: model(idx, targets, return_logits=False)[1:]
    return PlainGPT(config), lambda model, idx, targets: model(idx, targets)


def count_eager(arm, config, residual, batch_size, recorders):
    """The launches of an arm, an operator at a time."""
    with FakeTensorMode():
        model, call = build(arm, config, residual)
        idx = torch.zeros((batch_size, config.block_size), dtype=torch.int64)
        with Recorder() as recorder:
            recorders.append(recorder)
            with torch.autocast("cpu", dtype=torch.bfloat16), AsOnCuda():
                loss = call(model, idx, idx.clone())[-1]
            recorder.launches.pop(0)  # the copy that stands for the targets
            recorder.direction = "backward"
            loss.backward()
            recorders.pop()
    return recorder.launches


def count_compiled(arm, config, residual, batch_size, recorders):
    """The launches of an arm as Inductor schedules them."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import TracingContext, tracing
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    found = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def compiler(direction):
        def compile_graph(graph, inputs):
            outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
            answers = [o.meta["val"] if isinstance(o, torch.fx.Node) else None for o in outputs]
            found.extend(scheduled(copy.deepcopy(graph), inputs, direction, fake, recorders))
            return make_boxed_func(lambda *args: answers)

        return compile_graph

    def partition(graph, inputs, **kwargs):
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **kwargs)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.call = build(arm, config, residual)

        def forward(self, idx, targets):
            return self.call(self.model, idx, targets)

    with fake:
        step = Step()
        idx = torch.zeros((batch_size, config.block_size), dtype=torch.int64)
        torch.compiler._is_compiling_flag = True  # Op asks it
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16), AsOnCuda(), tracing(TracingContext(fake)):
                run = aot_module_simplified(
                    step, (idx, idx.clone()), compiler("forward"), compiler("backward"), partition, select_decomp_table()
                )  # fmt: skip
                outputs = run(idx, idx.clone())
            outputs[-1].backward()
        finally:
            torch.compiler._is_compiling_flag = False
        # What the loss does not differentiate comes to the backward as zeros, which the runtime fills.
        found += [Launch("fill", "backward", "zeros for the logits' gradient", size(o)) for o in outputs[:-1]]
    return found


def scheduled(graph, inputs, direction, fake, recorders):
    """The Launches of an aten graph: Inductor's passes and schedule, with the graph's tensors on CUDA."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def on_cuda(t):
        if not isinstance(t, torch.Tensor):
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0")

    with fake, torch.no_grad():
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(on_cuda, node.meta["val"])
        graph.recompile()
        inputs = [on_cuda(t) for t in inputs]
    view_to_reshape(graph)
    with V.set_fake_mode(fake), torch.no_grad():
        post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph, example_inputs=inputs, shape_env=ShapeEnv(), is_inference=False, is_backward=direction == "backward"
        )
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            return [x for node in lowering.scheduler.nodes for x in node_launches(node, direction, fake, recorders)]


def node_launches(node, direction, fake, recorders):
    """The Launches of one node of Inductor's schedule: a fused kernel, a GEMM, attention, one of our ops, or none."""
    from torch._inductor import ir, scheduler

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return []
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        inner = node.node
        if isinstance(inner, ir.MultiOutput):  # an output of a node before, whose bytes it has
            return []
        overload = getattr(inner, "op_overload", None)
        if overload is not None and overload.namespace == "fastgpt":
            return op_launches(inner, overload, direction, fake, recorders)
        name = str(getattr(inner, "python_kernel_name", None) or overload)
        moved = sum(accesses(node)) + sum(size_of(user) for user in outputs_of(node))
        if "scaled_dot_product" in name:
            return [Launch("attention", direction, name, attention_bytes=moved)]
        if re.search(r"mm\b", name):
            return [Launch("gemm", direction, name, gemm_bytes=moved)]
        return [Launch(group([name]), direction, name, moved)]
    origins = {str(o.meta.get("original_aten", o.target)) for s in node.get_nodes() for o in s.node.origins}
    return [Launch(group(sorted(origins)), direction, "triton " + " ".join(sorted(origins)), sum(accesses(node)))]


def accesses(node):
    """Bytes of each buffer that a node reads and of each that it writes, what lives only within a fused kernel left out."""
    from torch._inductor.dependencies import MemoryDep, StarDep
    from torch._inductor.virtualized import V

    inside = set(node.get_nodes())
    known = node.scheduler.name_to_buf
    for dependencies in (node.read_writes.reads, node.read_writes.writes):
        moved = {}
        for d in dependencies:
            if d.name in known and known[d.name].defining_op in inside:
                users = {u.node for u in known[d.name].users}
                if users and users <= inside:
                    continue
            if isinstance(d, MemoryDep) and d.is_indirect():  # as many elements as are looked up
                n = math.prod(map(int, d.size)) * V.graph.get_dtype(d.name).itemsize
            else:
                n = V.graph.get_dep_size_hint(d)
            whole = V.graph.get_dep_size_hint(StarDep(d.name))
            moved[d.name] = min(moved.get(d.name, 0) + n, whole)
        yield from moved.values()


def outputs_of(node):
    """The buffers that a kernel of several outputs writes: nodes of their own to Inductor."""
    from torch._inductor import ir

    users = (u.node for b in node.get_outputs() for u in b.users)
    return [u.node for u in users if isinstance(getattr(u, "node", None), ir.MultiOutput)]


def size_of(buffer):
    """Bytes of one of Inductor's buffers."""
    return math.prod(map(int, buffer.get_size())) * buffer.get_dtype().itemsize


def op_launches(node, overload, direction, fake, recorders):
    """The Launches within one of our custom ops, its launcher called on fake tensors."""
    name = overload._schema.name.removeprefix("fastgpt::")
    launcher = launchers()[name]
    origin = next(o for o in node.origins if o.target is overload)

    def value(x):
        if not isinstance(x, torch.fx.Node):
            return x
        t = x.meta["val"]
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, torch.Tensor) else t

    with fake, torch.no_grad(), Recorder() as recorder:
        args, kwargs = pytree.tree_map(value, (origin.args, dict(origin.kwargs)))
        given = inspect.signature(launcher).bind(*args, **kwargs)
        recorder.launches.clear()
        recorder.direction = direction
        recorders.append(recorder)
        launcher(*given.args, **given.kwargs)
        recorders.pop()
    return recorder.launches


def launchers():
    """{name: launcher} of all our custom ops."""
    from fastgpt.kernels.common import Op

    every = [o for op in ops.KERNELS for o in vars(ops.kernels(op)).values() if isinstance(o, Op)]
    return {o.name: o.forward for o in every} | {o.name + "_backward": o.backward for o in every}


# ---- the command ----


def summary(launches, by_name=False):
    """The sums of Launches, and a row an op (or a kernel) and direction, most bytes first."""
    rows = {}
    for x in launches:
        key = {"op": x.op, "direction": x.direction} | ({"kernel": x.name} if by_name else {})
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
    recorders = []
    pretend_gpu(lambda: recorders[-1])
    found = {"config": {**vars(config), "preset": cfg.preset, "batch_size": cfg.batch_size}, "torch": torch.__version__}
    for arm in arms:
        counted = count_eager if arm.endswith("eager") else count_compiled
        found[arm] = summary(counted(arm, config, RESIDUAL[cfg.residual], cfg.batch_size, recorders), cfg.by_kernel)
    return found


def show(found, arms):
    """Print the tables."""
    c = found["config"]
    print(
        f"one micro-step of {c['preset'] or 'nanoGPT'}: {c['n_layer']} layers, {c['n_embd']} wide, {c['batch_size']} x "
        f"{c['block_size']} tokens, bf16 autocast, forward and backward, the update apart; torch {found['torch']}\n"
    )
    print(f"{'arm':16}{'launches':>10}{'GB outside GEMMs and attention':>32}{'GB in GEMMs':>13}{'in attention':>14}")
    for arm in arms:
        a = found[arm]
        gb = (a[k] / 1e9 for k in ("non_gemm_bytes", "gemm_bytes", "attention_bytes"))
        print(f"{arm:16}{a['launches']:10,}" + "".join(f"{x:{w}.2f}" for x, w in zip(gb, (32, 13, 14), strict=True)))
    for arm in arms:
        print(f"\n{arm}\n  {'op':18}{'direction':10}{'launches':>9}{'GB':>9}")
        for r in found[arm]["ops"]:
            gb = f"{r['bytes'] / 1e9:9.3f}" if r["op"] not in ("gemm", "attention") else f"{'-':>9}"
            print(f"  {r['op']:18}{r['direction']:10}{r['launches']:9,}{gb}  {r.get('kernel', '')[:100]}".rstrip())


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
    return 0


if __name__ == "__main__":
    from fastgpt.cli import reported

    sys.exit(reported(lambda: main(sys.argv[1:])))
