"""The functions that the exercises ask for, and how an answer replaces the library's function.

    library()       {name: function} of the repository
    answers(folder) {name: function} of a folder of ex*.py files
    plug(chosen)    replaces library functions by the given ones, in every module that imported them
    watching(names) notices calls of the library's own functions

An answer is code of its own: it may call everything in the library but the function that it answers.
"""
import functools
import importlib.util
import inspect
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # read when Triton is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")      # read when transformers is imported

import discriminator  # noqa: E402
import lora  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import solver  # noqa: E402
from support import engine, upsample  # noqa: E402

LIBRARY = (discriminator, engine, lora, losses, model, sampler, solver)


def upsample_backward(grad, size, std):
    """grad [n 3 H W] -> grad_x [n 3 h w]. The library has no such function of its own: autograd calls the
    backward pass of upsample_normalize."""
    with torch.enable_grad():
        x = grad.new_zeros(len(grad), 3, *size, requires_grad=True)
        out = discriminator.upsample_normalize(x, grad.shape[2:], (0, 0, 0), std)
        return torch.autograd.grad(out, x, grad)[0]


def upsample_backward_triton(grad, size, std):
    """The same by the library's kernel, also in Triton's interpreter."""
    ctx = SimpleNamespace(shape=(len(grad), 3, *size), size=grad.shape[2:], std=std, dtype=grad.dtype)
    return upsample.FusedUpsampleNormalize.backward(ctx, grad)[0]


# file: (module that has the library's functions, their names)
EXERCISES = {
    "ex01_karras_grid": (solver, "karras_sigmas"),
    "ex02_precondition": (solver, "precondition"),
    "ex03_consistency": (solver, "consistency"),
    "ex04_euler": (solver, "euler_step", "guided"),
    "ex05_solve": (solver, "solve"),
    "ex06_pseudo_huber": (losses, "pseudo_huber", "consistency_weight"),
    "ex07_hinge": (losses, "hinge_d", "hinge_g"),
    "ex08_lora": (lora, "LoRALinear", "merge_lora"),
    "ex09_ema": (engine, "update_ema"),
    "ex10_tokens": (discriminator, "DinoFeatures", "TemporalHead"),
    "ex11_gather": (sys.modules[__name__], "upsample_backward", "upsample_backward_triton"),
    "ex12_samplers": (sampler, "sample", "time_travel"),
}


# file: the functions of the exercise's own, which the library does not have
DESIGNS = {
    "ex02_precondition": ("skip_and_out",), "ex06_pseudo_huber": ("exponent_within",),
    "ex07_hinge": ("still_teaches",), "ex09_ema": ("decay_for",), "ex12_samplers": ("mixed_noise",),
}


def library():
    """{name: function} of the repository: all names but those in DESIGNS."""
    return {name: getattr(module, name) for module, *names in EXERCISES.values() for name in names}


# The library's code that an answer must not be or call: library()[name], except for the names below. An
# answer may inherit from DinoFeatures and from TemporalHead's base class, as the stubs do.
RESIZES = upsample_backward, upsample.upsample_normalize, upsample.FusedUpsampleNormalize
KERNELS = [upsample._forward_kernel.fn, upsample._backward_kernel.fn] if upsample.triton else []
OWN_CODE = {name: (function,) for name, function in library().items()} | {
    "LoRALinear": (lora.LoRA, lora.LoRALinear),
    "DinoFeatures": (discriminator.DinoFeatures.forward,),
    "TemporalHead": (discriminator.TemporalHead.forward,),
    "upsample_backward": RESIZES,
    "upsample_backward_triton": (*RESIZES, *KERNELS, upsample_backward_triton),
    "skip_and_out": (solver.precondition,),         # its special case
}


def unwrapped(answer):
    """The function inside functools.partial, decorators and static methods."""
    while True:
        inner = getattr(answer, "func", None) if isinstance(answer, functools.partial) else \
            getattr(answer, "__wrapped__", None) or getattr(answer, "__func__", None)
        if inner is None:
            return answer
        answer = inner


@functools.cache
def real_path(file):
    return os.path.realpath(file)


def place(code):
    """(file, line, name) of a code object, the same for every copy of a function or module."""
    return real_path(code.co_filename), code.co_firstlineno, code.co_name


def places(things):
    """The places of functions, and of all functions that a class has or inherits."""
    classes = [thing for thing in things if inspect.isclass(thing)]
    methods = [getattr(kind, key, None) for kind in classes for key in dir(kind)]
    codes = [getattr(unwrapped(function), "__code__", None) for function in (*methods, *things)]
    return {place(code) for code in codes if inspect.iscode(code)}


def own_places(name):
    return {found for found in places(OWN_CODE.get(name, ())) if Path(found[0]).is_relative_to(ROOT)
            and not Path(found[0]).is_relative_to(ROOT / ".venv")}


@contextmanager
def watching(names):
    """Yields a set of names, to which every call of the library's own code for one of `names` adds that name
    while the with statement lasts: by import, inheritance, or in a second copy of the module. Python's
    profile function sees the calls; an answer that replaces it is not stopped."""
    watched, called = {found: name for name in names for found in own_places(name)}, set()
    short = {found[2] for found in watched}

    def notice(frame, event, argument):
        if event == "call" and frame.f_code.co_name in short and place(frame.f_code) in watched:
            called.add(watched[place(frame.f_code)])

    before = sys.getprofile()
    sys.setprofile(notice if watched else None)
    try:
        yield called
    finally:
        sys.setprofile(before)


def answers(folder):
    """Imports FOLDER/ex*.py. If a file cannot be imported, or an answer is the library's own function, the
    error is raised when that answer is used, so that one broken answer does not hide the others."""
    found = {}
    for file, (_, *names) in EXERCISES.items():
        names += DESIGNS.get(file, ())
        path = Path(folder).resolve() / f"{file}.py"
        spec = importlib.util.spec_from_file_location(f"{file}_of_{path.parent.name}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            sys.modules[spec.name] = module         # Triton and inspect look for the source there
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            found |= {name: broken(error) for name in names}
            continue
        for name in names:
            found[name] = answer = getattr(module, name, None)
            if answer is None:
                found[name] = broken(AttributeError(f"{path.name}: {name} is missing"))
            elif unwrapped(answer).__module__ != spec.name or places([answer]) & own_places(name):
                found[name] = broken(ImportError(f"{path.name}: {name} is imported, not written"))
    return found


def broken(error):
    """A function that raises `error`."""
    def fail(*args, **kwargs):
        raise error
    return fail


def plug(chosen):
    """chosen {name: function}: a subset of the names above. Changes the modules of the library in place."""
    own = library()
    swaps = [(own[name], function) for name, function in chosen.items() if name != "LoRALinear"]
    if "LoRALinear" in chosen:
        swaps.append((own["LoRALinear"], lora_layer(chosen["LoRALinear"])))
    if "upsample_backward" in chosen:
        swaps.append(upsample_with(chosen["upsample_backward"]))
    names = [vars(module) for module in LIBRARY]
    names += [vars(sys.modules[unwrapped(function).__module__]) for function in chosen.values()]
    for table in (*names, lora.LORA_LAYERS):
        for key, value in list(table.items()):
            for old, new in swaps:
                if value is old:
                    table[key] = new


def lora_layer(answer):
    """An answer's LoRALinear, with what the library's lora_layers and merge_lora need besides."""
    if issubclass(answer, lora.LoRA):
        return answer

    class LoRALinear(answer, lora.LoRA):
        def __init__(self, layer, rank, alpha):
            answer.__init__(self, layer, rank, alpha)
            self.plain = [layer]

    return LoRALinear


def upsample_with(upsample_backward):
    """(upsample_normalize, the same with another backward pass)."""
    library_upsample = discriminator.upsample_normalize

    class Upsample(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, size, mean, std, dtype):
            ctx.size, ctx.std = x.shape[2:], std
            return library_upsample(x, size, mean, std, dtype)

        @staticmethod
        def backward(ctx, grad):
            return upsample_backward(grad, ctx.size, ctx.std), None, None, None, None

    return library_upsample, lambda x, size, mean, std, dtype=None: Upsample.apply(x, size, mean, std, dtype)
