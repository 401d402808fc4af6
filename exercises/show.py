"""Draws what an answer does: one picture for each exercise, from the answer's own functions.

    $ python exercises/show.py ex05                     # your answer, into out/ex05.png
    $ python exercises/show.py ex05 --library           # the library's functions: the picture to compare with
    $ python exercises/show.py --figures                # for instructors: all pictures of exercises/README.md

Most pictures use latents of one number, [b 1 1 1 1], and data whose estimate f is known: clips that are
either -1 or 1, or any other function of x and sigma. Needs matplotlib (requirements-dev.txt).
"""
from pathlib import Path
from types import SimpleNamespace

import plug
import torch
from torch import nn

import discriminator
import model
import sampler
from solver import SIGMA_MAX, Precondition, karras_sigmas
from support.checkpoint import ModelError, check_writable
from support.engine import command_line
from tools.plot import new_figure, save_figure
from toy.world import toy_clips

HERE = Path(__file__).resolve().parent
COLOURS = ["#1f5fa8", "#d9730d", "#2f8a4c", "#a83279", "#777777"]

# ---------------------------------------------------------------------------------------------------------
# Worlds of one number


def network(estimate, calls=None):
    """A network whose f is estimate(x, sigma, cond). calls: a list, to which each call appends
    (sigma, x, f)."""
    def net(x, c_noise, image_embeds, time_ids):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
        x, cond = x.chunk(2, dim=2)
        x = x * (sigma ** 2 + 1).sqrt()
        f = estimate(x, sigma, cond)
        if calls is not None:
            calls.append((sigma.flatten()[0].item(), x.flatten(), f.flatten()))
        return ((x - f) / sigma - sigma * f) / (sigma ** 2 + 1).sqrt()
    return net


def two_points(x, sigma, cond):
    """The mean of all data that x may come from, if half of the data is -1 and half is 1."""
    return (x / sigma ** 2).tanh()


def clips(values):
    """Latents b 1 1 1 1 with these values, and a condition of ones."""
    x = torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    return x, model.Cond(torch.zeros(len(x), 1, 8), torch.ones_like(x), torch.zeros(len(x), 3))


def level_axis(panel, sigmas):
    """Names the levels on an x axis that shows sigma^(1/7), with noise at the left."""
    panel.set_xticks([sigma ** (1 / 7) for sigma in sigmas], [f"{sigma:g}" for sigma in sigmas])
    panel.set_xlabel("noise level sigma, spaced as sigma^(1/7)")
    panel.invert_xaxis()


# ---------------------------------------------------------------------------------------------------------
# The pictures. answer.name are the functions.


def ex01(figure, answer):
    panels, place = figure.subplots(1, 2), torch.linspace(0, 1, 25)
    for rho, colour in ((1.0, COLOURS[4]), (3.0, COLOURS[1]), (7.0, COLOURS[0])):
        sigmas = answer.karras_sigmas(25, rho=rho)[:-1]
        panels[0].semilogy(place, sigmas, "o-", color=colour, ms=3, lw=0.8, label=f"rho = {rho:g}")
        panels[1].plot(place, sigmas ** (1 / rho) / sigmas[0] ** (1 / rho), "o-", color=colour, ms=3, lw=0.8)
    panels[0].set(title="25 levels", xlabel="i / (n - 1)", ylabel="sigma")
    panels[0].legend()
    panels[1].set(title="even in sigma^(1/rho)", xlabel="i / (n - 1)", ylabel="sigma^(1/rho), first = 1")


def ex02(figure, answer):
    panels, sigmas = figure.subplots(1, 2), torch.logspace(-3, 3, 200)
    found = answer.precondition(sigmas)._asdict()
    for name, colour in zip(Precondition._fields[:3], COLOURS):
        panels[0].semilogx(sigmas, found[name], color=colour, label=name)
    panels[0].set(title="scalings of input and output", xlabel="sigma")
    panels[0].legend()
    panels[1].semilogx(sigmas, found["c_noise"], color=COLOURS[3])
    panels[1].set(title="c_noise: the level that the network sees", xlabel="sigma")


def ex03(figure, answer):
    panel, (x, cond) = figure.subplots(), clips(torch.linspace(-3, 3, 200))
    net = lambda x, *_, **__: (4 * x[:, :, :1]).sin()
    for sigma, colour in zip((5.0, 1.0, 0.3, 0.1), COLOURS):
        f = answer.consistency(net, x, sigma, cond)
        panel.plot(x.flatten(), f.flatten(), color=colour, label=f"sigma = {sigma:g}")
    panel.plot(x.flatten(), answer.consistency(net, x, 0.0, cond).flatten(), "k", lw=2, label="sigma = 0")
    panel.set(title="f(x, sigma) of a network that says sin(4 c_in x)", xlabel="x", ylabel="f")
    panel.legend()


def ex04(figure, answer):
    panels, (x, cond) = figure.subplots(1, 2), clips(torch.linspace(-4, 4, 9))
    for sigma_s, colour in zip((2.0, 1.0, 0.0), COLOURS):
        x_s = answer.euler_step(x, two_points(x, 3.0, cond), 3.0, sigma_s)
        panels[0].plot((3.0, sigma_s), torch.stack([x.flatten(), x_s.flatten()]), color="#cccccc", lw=0.8)
        panels[0].plot([sigma_s] * 9, x_s.flatten(), "o", color=colour, ms=4, label=f"to {sigma_s:g}")
    panels[0].plot([3.0] * 9, x.flatten(), "k.", ms=4)
    panels[0].legend()
    panels[0].set(title="one step from sigma = 3; the data is -1 or 1", xlabel="sigma", ylabel="x")
    panels[0].invert_xaxis()
    x, cond = clips(torch.linspace(-3, 3, 100))
    seen = lambda x, sigma, cond: torch.where(cond != 0, 1 + 0 * x, two_points(x, sigma, cond))
    for w, colour in zip((0.0, 1.0, 2.0, 3.0), COLOURS):
        f = answer.guided(network(seen), x, 1.0, cond, w)
        panels[1].plot(x.flatten(), f.flatten(), color=colour, label=f"w = {w:g}")
    panels[1].set(title="guidance: the image says 1", xlabel="x at sigma = 1", ylabel="guided f")
    panels[1].legend()


def ex05(figure, answer):
    panels, (x, cond) = figure.subplots(1, 3, sharey=True), clips(80 * torch.linspace(-1.6, 1.6, 10))
    for panel, m in zip(panels, (2, 5, 40)):
        grid = karras_sigmas(m, sigma_max=80.0)
        points = torch.stack([answer.solve(network(two_points), x, grid[:i + 1], cond).flatten()
                              for i in range(m + 1)])
        panel.plot(grid ** (1 / 7), points / (grid ** 2 + 1)[:, None].sqrt(), ".-", ms=2 + 6 / m, lw=0.8)
        panel.set_title(f"{m} steps to 0")
        level_axis(panel, (80, 10, 1, 0.01, 0))
    panels[1].set_xlabel("noise level sigma")
    panels[0].set(xlabel="", ylabel="x / sqrt(sigma^2 + 1)")
    panels[2].set_xlabel("")


def ex06(figure, answer):
    panels, x = figure.subplots(1, 2), torch.linspace(-2, 2, 201)
    for c, colour in zip((0.001, 0.3, 1.0), COLOURS):
        d = [float(answer.pseudo_huber(one.view(1, 1), torch.zeros(1, 1), c)) for one in x]
        panels[0].plot(x, d, color=colour, label=f"c = {c:g}")
    panels[0].set(title="distance d", xlabel="x - y")
    panels[0].legend()
    grid = karras_sigmas(100)
    for exponent, colour in zip((0.1, 0.5, 1.0), COLOURS):
        weight = answer.consistency_weight(grid[:-1], grid[1:], exponent)
        panels[1].loglog(grid[:-1], weight / weight.max(), color=colour, label=f"exponent {exponent:g}")
    panels[1].set(title="weight, relative to the largest", xlabel="sigma_t")
    panels[1].legend()


def ex07(figure, answer):
    panels, logits = figure.subplots(1, 2), torch.linspace(-3, 3, 301)
    losses = {"D, real": lambda one: answer.hinge_d(one, torch.full_like(one, -9)),
              "D, fake": lambda one: answer.hinge_d(torch.full_like(one, 9), one),
              "G, hinge": answer.hinge_g, "G, linear": lambda one: answer.hinge_g(one, linear=True)}
    for (name, loss), colour, line in zip(losses.items(), COLOURS, ("-", "-", "--", ":")):
        x = logits.clone().requires_grad_()
        values = torch.stack([loss(one) for one in x.split(1)])
        slopes, = torch.autograd.grad(values.sum(), x)
        panels[0].plot(logits, values.detach(), line, color=colour, lw=2, label=name)
        panels[1].plot(logits, slopes, line, color=colour, lw=2)
    panels[0].set(title="losses", xlabel="logit")
    panels[0].legend()
    panels[1].set(title="slopes: what is learned from", xlabel="logit")


def ex08(figure, answer):
    panel, linear = figure.subplots(), nn.Linear(64, 64)
    weight = linear.weight.detach().clone()
    panel.semilogy(range(1, 65), torch.linalg.svdvals(weight), ".", color=COLOURS[4], label="W")
    for rank, colour in zip((2, 8, 32), COLOURS):
        layer = answer.LoRALinear(nn.Linear(64, 64), rank, rank)
        layer.weight.data.copy_(weight)
        nn.init.normal_(layer.lora_B.weight)
        change = answer.merge_lora(nn.Sequential(layer))[0].weight.detach() - weight
        panel.semilogy(range(1, 65), torch.linalg.svdvals(change), ".-", color=colour, lw=0.8,
                       label=f"update of rank {rank}")
    panel.set(title="singular values of W and of what merging adds", xlabel="number")
    panel.legend()


def ex09(figure, answer):
    panel, steps = figure.subplots(), 300
    weights = torch.linspace(0, 3, steps).clamp(max=2) + 0.3 * torch.randn(steps)
    panel.plot(weights, ".", color="#bbbbbb", ms=3, label="weight")
    for decay, colour in zip((0.5, 0.95, 0.99), COLOURS):
        ema, averages = {"w": weights[:1].clone()}, []
        for weight in weights.split(1):
            answer.update_ema(ema, {"w": weight}, decay)
            averages.append(ema["w"].item())
        panel.plot(averages, color=colour, label=f"average, decay {decay}")
    panel.set(title="less noise, more delay", xlabel="step")
    panel.legend()


def ex10(figure, answer):
    vae, dino = model.load_vae(sampler.TOY), discriminator.load_dino(sampler.TOY / "dinov2")
    frames, last = toy_clips(0, torch.arange(1)).frames, 13
    with torch.no_grad():
        latents = (vae.encode(frames[0]) * vae.config["scaling_factor"])[None]          # 1 f 4 h w
        maps = answer.DinoFeatures(dino)(latents)                                       # f d h' w' each
        logits = answer.TemporalHead(dino.config.hidden_size, 32)(maps[2], num_frames=14)
        logits = logits.view(14, *maps[2].shape[2:])                                    # f h' w'
    pictures = {"frame 14": (frames[0, last].permute(1, 2, 0) + 1) / 2}
    for depth, features in zip((0, 3, 6, 9, 12), maps):
        tokens = features[last].flatten(1).T                                            # p d
        colours = torch.pca_lowrank(tokens, 3)[0]                                       # p 3
        low, high = colours.amin(0), colours.amax(0)
        pictures[f"depth {depth}"] = ((colours - low) / (high - low)).view(*features.shape[2:], 3)
    pictures["temporal head"] = logits[last]
    for panel, (name, picture) in zip(figure.subplots(1, 7), pictures.items()):
        panel.imshow(picture)
        panel.set_title(name)
        panel.set_axis_off()
    figure.suptitle("tokens of a frame, their three main directions as red, green, blue", fontsize=9)


def ex11(figure, answer):
    (h, w), (H, W) = (6, 8), (24, 32)
    grad = torch.eye(H * W).view(H * W, 1, H, W).expand(-1, 3, -1, -1)
    grad_x = answer.upsample_backward(grad, (h, w), (1.0, 1.0, 1.0))                    # (H W) 3 h w
    for panel, (i, j) in zip(figure.subplots(1, 3), ((0, 0), (2, 3), (5, 4))):
        panel.imshow(grad_x[:, 0, i, j].view(H, W), cmap="magma", vmin=0, vmax=1)
        panel.set_title(f"input pixel ({i}, {j})")
    figure.suptitle("outputs that an input pixel gathers from, and their weights", fontsize=9)


def ex12(figure, answer):
    panels, (_, cond) = figure.subplots(1, 3, sharey=True), clips(torch.zeros(3))
    student = lambda x, sigma, cond: (1.5 * x / sigma).tanh()
    for panel, (name, grid, tts) in zip(panels, (("one step", (SIGMA_MAX, 0), False),
                                                 ("four steps", (SIGMA_MAX, 71, 14.8, 2.3, 0), False),
                                                 ("Time Travel", (SIGMA_MAX, 14.8, 0), True))):
        calls, generators = [], [torch.Generator().manual_seed(i) for i in range(3)]
        answer.sample(network(student, calls), cond, torch.tensor(grid), generators, tts)
        for clip in range(3):
            path = [(level ** (1 / 7), value[clip] / (level ** 2 + 1) ** 0.5)
                    for sigma, x, f in calls for level, value in ((sigma, x), (0.0, f))]
            for i, pair in enumerate(zip(path, path[1:])):
                panel.plot(*zip(*pair), ":" if i % 2 else "-", color=COLOURS[clip], lw=1.1)
            panel.plot(*path[0], "k.", ms=3)
            panel.plot(*path[-1], "ko", ms=4)
        panel.set_title(name)
        level_axis(panel, (700, 71, 14.8, 2.3, 0))
        panel.set_xlabel("")
    panels[0].set_ylabel("x / sqrt(sigma^2 + 1)")
    panels[1].set_xlabel("noise level sigma; full line: jump to f, dotted: noise added")


# ---------------------------------------------------------------------------------------------------------
# Files and the command line

HEIGHTS = {"ex10_tokens": 1.6, "ex11_gather": 2.2}       # in units of 100 pixels, if not 2.9
PICTURES = {file: globals()[file[:4]] for file in plug.EXERCISES}


def show(name, functions, file, colours=None):
    """Draws the picture of the exercise `name` (ex05_solve) from `functions` {name: function} to `file`
    (Path, .png). colours: as for save_figure. Raises ModelError if matplotlib is missing or a function is
    not written yet, OSError if the file cannot be written; an error inside an answer keeps its traceback."""
    torch.manual_seed(0)
    figure = new_figure(7.2, HEIGHTS.get(name, 2.9))
    check_writable(file)
    answer = SimpleNamespace(**plug.library() | functions)
    if "LoRALinear" in functions:
        answer.LoRALinear = plug.lora_layer(answer.LoRALinear)
    try:
        PICTURES[name](figure, answer)
    except NotImplementedError as error:
        raise ModelError(f"{name}: to be written") from error
    for panel in figure.axes:
        panel.title.set_fontsize(8)
        panel.xaxis.label.set_fontsize(8)
        panel.yaxis.label.set_fontsize(8)
        panel.tick_params(labelsize=7)
        if panel.get_legend():
            panel.legend(fontsize=7)
    save_figure(figure, file, colours)


def answers_of(folder, name):
    """{name: function} that a folder's file of the exercise must have; those of the exercise alone."""
    found = plug.answers(folder)
    return {key: found[key] for key in plug.EXERCISES[name][1:]}


def main():
    parser = command_line("Draw what an answer does.")
    parser.add_argument("exercise", nargs="?", metavar="ex05", help="whose picture to draw")
    parser.add_argument("--answers", type=Path, default=HERE, help="folder of ex*.py")
    parser.add_argument("--library", action="store_true", help="draw the library's functions")
    parser.add_argument("--out", type=Path, help="picture to write (default: out/ex05.png)")
    parser.add_argument("--figures", action="store_true", help="draw all figures of exercises/README.md")
    args = parser.parse_args()
    if args.figures:
        if args.exercise or args.out:
            parser.error("--figures draws all figures: leave the exercise and --out out")
        for name in PICTURES:
            show(name, {}, HERE / "figures" / f"{name[:4]}.png", colours=128)
        return
    chosen = [name for name in PICTURES if args.exercise in (name, name[:4], f"{name}.py")]
    if not chosen:
        parser.error(f"{args.exercise or 'no exercise'}: the exercises are ex01 to ex12")
    if not args.answers.is_dir():
        parser.error(f"{args.answers}: not a folder; give one with {chosen[0]}.py in it")
    out = args.out or Path("out") / f"{chosen[0][:4]}.png"
    show(chosen[0], {} if args.library else answers_of(args.answers, chosen[0]), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
