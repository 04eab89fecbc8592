"""What Triton's launcher compiles for the arguments at hand, by Triton's own rule; and the name of a launch."""

from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime import jit


def arguments_of(kernel, args, options):
    """{parameter: argument} of a launch; what is no option is taken out of `options`."""
    names = [n for n in kernel.arg_names if n not in options]
    return dict(zip(names, args, strict=True)) | {n: options.pop(n) for n in kernel.arg_names if n in options}


def label(kernel, arguments):
    """The kernel's name, and of one that goes both ways which way."""
    return kernel.__name__.strip("_") + {True: " backward", False: " forward", None: ""}[arguments.get("BACKWARD")]


def source(kernel, arguments):
    """The ASTSource of a launch: 1 and None are constants; of addresses and integers is known whether 16 divides them."""
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value, kind, key = arguments[p.name], "constexpr", None
        if not p.is_constexpr:
            kind, key = jit.native_specialize_impl(CUDABackend, value, p.is_const, True, True)
        signature[p.name] = kind
        if kind == "constexpr":
            constants[p.name] = value
        elif key:
            attributes[(i,)] = CUDABackend.parse_attr(key)
    return ASTSource(kernel, signature, constants, attributes)
