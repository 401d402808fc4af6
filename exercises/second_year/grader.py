"""Grades the second year's variants of exercises 2, 5 and 9.

    $ python exercises/second_year/grader.py                            # the stubs beside this file
    $ python exercises/second_year/grader.py ex05 --answers FOLDER      # one of them, elsewhere

The properties are those of tests/test_exercises.py, with other numbers: no answer is stored here. Each answer
runs in this process, without limits of time and memory: grade strangers' answers in a container.
"""
import argparse
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "exercises"), str(ROOT / "tests"), str(ROOT)]

import pytest  # noqa: E402
import test_exercises as graders  # noqa: E402
import torch  # noqa: E402
from test_exercises import STDS, S, expect, gaussian_teacher, make_cond, require  # noqa: E402

# ---- 2. Other targets -----------------------------------------------------------------------------------


def pair(answer, sigma, std):
    found = answer(sigma, std)
    require("two values are returned", isinstance(found, (tuple, list)) and len(found) == 2, "a, b")
    return [float(value) for value in found]


def gives_back_the_data(answer, target):
    x0, noise = torch.randn(2, 50).double()
    for sigma, std in [*STDS, (0.0, 1.0)]:
        c_skip, c_out = pair(answer, sigma, std)
        expect(f"f at sigma = {sigma:g} for data of std {std:g}, which is x0,",
               c_skip * (std * x0 + sigma * noise) + c_out * target(x0, noise), std * x0,
               "put x = x0 + sigma noise in, and compare the coefficients of x0 and of noise", 1e-4)


def test_ex02_noise(noise_target):
    gives_back_the_data(noise_target, lambda x0, noise: noise)


def test_ex02_data(data_target):
    gives_back_the_data(data_target, lambda x0, noise: x0)


def test_ex02_amplification(amplification):
    """|c_out| of a target of unit variance is the std of x0 - c_skip x. It is found by search."""
    for sigma, std in STDS:
        skips = torch.linspace(-0.5, 1.5, 200_001).double()
        size = lambda skip, sigma=sigma, std=std: ((1 - skip) ** 2 * std ** 2 + skip ** 2 * sigma ** 2) ** 0.5
        least = size(skips).min()
        expect(f"the amplification by (noise, data) at sigma = {sigma:g} for data of std {std:g}",
               pair(amplification, sigma, std), [size(1) / least, size(0) / least],
               "|c_out| of each target over the |c_out| of exercise 2", 1e-3, floor=0)


# ---- 5. Heun's method -----------------------------------------------------------------------------------


def test_ex05_half_the_step_a_quarter_of_the_error(solve):
    cond, errors = make_cond(), []
    mu, noise = graders.mean_of(cond), 2 * torch.randn(2, 3, 4, 4, 5).double()
    exact = mu + noise * ((S ** 2 + 0.25) / (S ** 2 + 4)) ** 0.5
    for m in (16, 32):
        x_s = solve(gaussian_teacher(), (mu + noise).float(), torch.linspace(2.0, 0.5, m + 1), cond)
        errors.append((x_s - exact).abs().mean())
    expect("the ratio of the errors of 16 and 32 steps", errors[0] / errors[1], 4.0,
           "the mean of two slopes, the second one at the end of the Euler step", 0.1)


def test_ex05_evaluations(solve):
    for grid, times in (([10.0, 5.0, 2.0, 1.0], 6), ([10.0, 5.0, 0.0], 3), ([5.0, 0.0], 1)):
        net = gaussian_teacher()
        solve(net, torch.randn(2, 3, 4, 4, 5), torch.tensor(grid), make_cond())
        expect(f"the network evaluations of the grid {grid}", len(net.calls), times,
               "two for a step, one for a step to 0", 0)


def test_ex05_step_to_zero(solve):
    cond, x = make_cond(), torch.randn(2, 3, 4, 4, 5)
    expect("the end of a step from 2 to 0", solve(gaussian_teacher(), x, torch.tensor([2.0, 0.0]), cond),
           (S ** 2 * x + 4 * graders.mean_of(cond)) / (S ** 2 + 4), "an Euler step: the estimate", 1e-4)


def test_ex05_no_graph(solve):
    x = torch.randn(2, 3, 4, 4, 5).requires_grad_()
    x_s = solve(gaussian_teacher(), x, torch.tensor([5.0, 1.0]), make_cond(), 2.0)
    require("the teacher's result has no graph", not x_s.requires_grad, "torch.no_grad")


# These hold for every solver.
test_ex05_straight_lines = graders.test_ex05_straight_lines
test_ex05_grid_per_clip_and_padding = graders.test_ex05_grid_per_clip_and_padding
test_ex05_guidance_moves_the_end = graders.test_ex05_guidance_moves_the_end
test_ex05_progress = graders.test_ex05_progress
test_ex05_precision = graders.test_ex05_precision

# ---- 9. A power-function average ------------------------------------------------------------------------


def average(decay_of, steps):
    """Slowly: the average of weights that are 1 in step 1, 2 in step 2, and so on. It starts at -1000."""
    mean = -1000.0
    for step in range(1, steps + 1):
        decay = float(decay_of(step))
        mean = decay * mean + (1 - decay) * step
    return mean


def test_ex09_first_weights_are_forgotten(power_decay):
    for gamma in (0.0, 0.5, 7.0):
        expect(f"the decay of step 1, gamma = {gamma:g}", float(power_decay(1, gamma)), 0.0,
               "(1 - 1 / n) is 0 for n = 1")


def test_ex09_gamma_of_zero(power_decay):
    expect("the average of 1 to 100 for gamma = 0", average(lambda step: power_decay(step, 0), 100), 50.5,
           "a plain mean: k^0 is the same share for all")


def test_ex09_profile(power_decay):
    """The share of the middle step over that of the last one: the later decays multiply it."""
    for gamma in (0.0, 1.0, 3.0):
        decays = torch.tensor([float(power_decay(step, gamma)) for step in range(1, 4001)]).double()
        shares = (1 - decays) * decays.flip(0).cumprod(0).flip(0) / decays.clamp(min=1e-30)
        expect(f"the share of step 2000 over that of step 4000, gamma = {gamma:g}", shares[1999] / shares[-1],
               0.5 ** gamma, "the exponent is gamma + 1", 0.01, floor=0)


def test_ex09_mean_age(power_decay, gamma_for):
    for share in (0.5, 0.3, 0.1, 0.02):
        gamma = float(gamma_for(share))
        for steps in (4000, 8000):
            age = (steps - average(lambda step, gamma=gamma: power_decay(step, gamma), steps)) / steps
            expect(f"the mean age of the weights after {steps} steps, as a share of them,", age, share,
                   "integrate the age n - k with the shares k^gamma, over the integral of the shares",
                   0.02, floor=0)


# ---- Command line ---------------------------------------------------------------------------------------

VARIANTS = {"ex02_targets": ("noise_target", "data_target", "amplification"), "ex05_heun": ("solve",),
            "ex09_power": ("power_decay", "gamma_for")}


def verdicts(name, answers):
    """{test: an exception, or None} of the variant `name`. answers: {function's name: function}."""
    found = {}
    for key, test in list(globals().items()):
        if key.startswith(f"test_{name[:4]}_"):
            wanted = inspect.signature(test).parameters
            torch.manual_seed(0)
            try:
                test(**{word: graders.careful(word, answers[word]) for word in wanted})
                found[key] = None
            except (Exception, pytest.fail.Exception) as error:
                found[key] = error
    return found


def answers_of(file):
    """{name: function} of a file with answers."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def main():
    parser = argparse.ArgumentParser(description="Grade the variants for a second year.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"grader.py: {message}\n")
    parser.add_argument("variants", nargs="*", metavar="ex05", help="ex02, ex05, ex09 (default: all)")
    parser.add_argument("--answers", type=Path, default=HERE, help="folder of ex*.py (default: the stubs)")
    args = parser.parse_args()
    for word in args.variants:
        if not any(word in (name, name[:4]) for name in VARIANTS):
            parser.error(f"{word}: no such variant; they are {', '.join(VARIANTS)}")
    for name in VARIANTS:
        if args.variants and not {name, name[:4]} & {*args.variants}:
            continue
        try:
            answers = answers_of(args.answers / f"{name}.py")
        except OSError as error:
            parser.error(f"{error.filename}: {error.strerror}")
        found = verdicts(name, answers)
        passed = sum(error is None for error in found.values())
        print(f"{name:20}{'#' * passed + '.' * (len(found) - passed):12}{passed} of {len(found)}")
        wrong = next((error for error in found.values() if error), None)
        if isinstance(wrong, NotImplementedError):
            last = traceback.extract_tb(wrong.__traceback__)[-1]
            print(f"next, {name}.py: to be written ({last.name}, line {last.lineno})")
        elif isinstance(wrong, pytest.fail.Exception):
            print(f"next, {name}.py: {wrong}")
        elif wrong:
            print(f"next, {name}.py:\n{''.join(traceback.format_exception(wrong))}")


if __name__ == "__main__":
    main()
