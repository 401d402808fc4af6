"""The functions that the exercises ask for, and how an answer replaces the library's function.

    library()       {name: function} of the repository
    answers(folder) {name: function} of a folder of ex*.py files
    plug(chosen)    replaces library functions by the given ones, in every module that imported them
"""
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # read when Triton is imported

import discriminator  # noqa: E402
import lora  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import solver  # noqa: E402
from support import engine  # noqa: E402

LIBRARY = (discriminator, engine, lora, losses, model, sampler, solver)


def upsample_backward(grad, size, std):
    """grad [n 3 H W] -> grad_x [n 3 h w]. The library has no such function of its own: autograd calls the
    backward pass of upsample_normalize."""
    with torch.enable_grad():
        x = grad.new_zeros(len(grad), 3, *size, requires_grad=True)
        out = discriminator.upsample_normalize(x, grad.shape[2:], (0, 0, 0), std)
        return torch.autograd.grad(out, x, grad)[0]


def upsample_backward_triton(grad, size, std):
    return upsample_backward(grad, size, std)


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


def library():
    return {name: getattr(module, name) for module, *names in EXERCISES.values() for name in names}


def answers(folder):
    """Imports FOLDER/ex*.py. If a file cannot be imported, or an answer is the library's own function, the
    error is raised when that answer is used, so that one broken file does not hide the others."""
    found = {}
    for file, (_, *names) in EXERCISES.items():
        path = Path(folder).resolve() / f"{file}.py"
        spec = importlib.util.spec_from_file_location(f"{file}_of_{path.parent.name}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            sys.modules[spec.name] = module         # Triton and inspect look for the source there
            spec.loader.exec_module(module)
            for name in names:
                found[name] = getattr(module, name)
                if found[name].__module__ != spec.name:
                    raise ImportError(f"{path.name}: {name} is imported, not written")
        except (Exception, SystemExit) as error:
            found |= {name: broken(error) for name in names}
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
    names += [vars(sys.modules[function.__module__]) for function in chosen.values()]
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
