"""Draws the three figures of the pages: the method, the samplers on the noise axis, a block of the UNet.

    $ python -m tools.figures

Writes method.png, noise_axis.png and unet_block.png to docs/. Noise levels, class names, kernel sizes and the
places of LoRA come from the code. All other names are typed; tests/test_figures.py checks that the code
has them. It also checks that nothing overlaps and that the pictures in docs/ are up to date.

A length of 1 is 100 pixels; the origin is at the lower left.
"""
import ast
import math
import re
from types import SimpleNamespace

import torch

import lora
import model
from discriminator import SpatialHead, TemporalHead
from solver import NUM_SIGMAS, SIGMA_MAX, SIGMA_MIN, karras_sigmas, strided
from support.engine import command_line
from tools.plot import new_figure, save_figure
from tools.tables import ROOT

WIDTH = 18
# A colour has the same meaning in all figures; "plain" has none.
COLOURS = {"student": "#1f5fa8", "teacher": "#d9730d", "ema": "#7a4fc0", "disc": "#b3263a",
           "frozen": "#6b6b6b", "data": "#2f8a4c", "plain": "#222222"}

# ---------------------------------------------------------------------------------------------------------
# Boxes, arrows and text


class Sheet:
    """An empty figure of WIDTH x height, and methods that draw on it. kind: a key of COLOURS."""

    def __init__(self, height):
        self.figure = new_figure(WIDTH, height)
        self.figure.set_layout_engine("none")                   # everything is placed by hand
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        self.axes.axis("off")

    def write(self, x, y, text, kind="plain", align="left", size=15.5):
        """Writes lines around the height y. A line in backticks is code, a line that begins with * is bold.
        In all other lines, a name in backticks is code."""
        lines = text.split("\n")                                # size / 50: distance of lines
        for i, line in enumerate(lines):
            is_code, is_bold = re.fullmatch("`[^`]+`", line), line.startswith("*")
            line = line.strip("`") if is_code else line.removeprefix("*")
            line = re.sub(r"`(\w+)`", lambda name: rf"$\mathtt{{{name[1]}}}$".replace("_", r"\_"), line)
            self.axes.text(x, y + ((len(lines) - 1) / 2 - i) * size / 50, line, color=COLOURS[kind], ha=align,
                           va="center_baseline", size=size, family="monospace" if is_code else None,
                           weight="bold" if is_bold else None)

    def box(self, x, y, width, height, text="", kind="plain"):
        """Draws a box around (x, y) -> the middles of its sides, where arrows start and end."""
        from matplotlib.patches import FancyBboxPatch
        self.axes.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.1", lw=2,
            ec=COLOURS[kind], fc="white" if kind == "plain" else COLOURS[kind] + "22"))
        self.write(x, y, text, align="center")
        return SimpleNamespace(left=(x - width / 2, y), right=(x + width / 2, y),
                               top=(x, y + height / 2), bottom=(x, y - height / 2))

    def arrow(self, *points, kind="plain", gradient=False):
        """Draws an arrow through the points: solid if gradients flow back along it, dashed if not."""
        self.axes.plot(*zip(*points), color=COLOURS[kind], lw=2.2, ls="-" if gradient else (0, (3, 1.6)),
                       solid_capstyle="butt", dash_capstyle="butt")
        self.axes.annotate("", points[-1], points[-2], arrowprops=dict(
            arrowstyle="-|>", mutation_scale=22, lw=0, color=COLOURS[kind], shrinkA=0, shrinkB=0))

    def chain(self, *boxes, **style):
        """Draws an arrow from each box to the next one on its right."""
        for one, other in zip(boxes, boxes[1:]):
            self.arrow(one.right, other.left, **style)

    def panel(self, bottom, top, title):
        """Draws the frame of a part of the figure, with a bold title."""
        self.axes.axhspan(bottom, top, 0.1 / WIDTH, 1 - 0.1 / WIDTH, fc="#f7f8fa", ec="#c9ced6", zorder=-1)
        self.write(0.3, top - 0.38, "*" + title, size=18)

    def legend(self, y, **meanings):
        """Explains colours in a row, {kind: words}."""
        x = 0.3
        for kind, words in meanings.items():
            self.box(x + 0.15, y, 0.3, 0.3, kind=kind)
            self.write(x + 0.45, y, words)
            x += 0.85 + 0.118 * len(words)


# ---------------------------------------------------------------------------------------------------------
# The method


def stage(sheet, number, y, equations, real, weight=""):
    """Draws what both stages share: the panel, and all from x0 and from x_target to the losses.

    y: height of x_target; the student is 2.9 higher. equations: of loss_d and loss_g. real: kind of x_target.
    weight: of the distance. Returns the boxes of x0, x_t, the student and x_target.
    """
    box, arrow, high, middle, file = sheet.box, sheet.arrow, y + 2.9, y + 1.5, f"train_stage{number}.py"
    title = ast.get_docstring(ast.parse((ROOT / file).read_text())).partition(".")[0]      # first sentence
    sheet.panel(y - 1, y + 4.2, f"{title} ({file})")
    x0 = box(0.9, high, 1.2, 0.9, "`x0`\nb f c h w", "data")
    x_t = box(4.3, high, 0.8, 0.7, "`x_t`", "data")
    student = box(6.75, high, 3.05, 1.2, "*student $f_θ$, Eq. 4\n`consistency(net, x_t,`\n`sigma_t, cond)`",
                  "student")
    x0_pred = box(9.25, high, 1.3, 0.9, "`x0_pred`\nfake", "student")
    x_target = box(9.25, y, 1.3, 0.9, "`x_target`\nreal", real)
    sheet.chain(x0, x_t, kind="data")
    sheet.write(2.7, high + 0.27, "`+ sigma_t * noise`", "data", align="center")
    sheet.chain(x_t, student)
    # G step: x0_pred goes through the frozen discriminator, and its distance to x_target is measured.
    disc = box(11.95, high, 1.6, 0.9, "`disc`\nψ is frozen", "disc")
    hinge = box(13.75, high, 1.2, 0.9, "`hinge_g`")
    huber = box(12.75, middle, 3.2, 1.1, "distance d\n`pseudo_huber`" + f"\n`* {weight}`" * bool(weight))
    box(16.25, y + 2.3, 2.9, 2, f"*G step trains θ\n`loss_g`, Eq. {equations[1]}:\n`adv_weight` times\n"
        f"relu(1 - D(fake))\n+ {'weighted ' * bool(weight)}d(fake, real)")
    sheet.chain(student, x0_pred, disc, hinge, gradient=True)
    arrow(hinge.right, (14.8, high), gradient=True)
    arrow(huber.right, (14.8, middle), gradient=True)
    arrow((10.75, high), (10.75, middle + 0.2), (11.15, middle + 0.2), gradient=True)
    arrow((10.75, y), (10.75, middle - 0.2), (11.15, middle - 0.2))
    # D step: x_target, and x0_pred without its gradient, go through the discriminator, which trains.
    disc = box(11.95, y, 1.6, 0.9, "`disc`\nψ trains", "disc")
    hinge = box(13.75, y, 1.2, 0.9, "`hinge_d`")
    loss_d = box(16.25, y, 2.9, 1.6, f"*D step trains ψ\n`loss_d`, Eq. {equations[0]}:\nrelu(1 - D(real))\n"
                 "+ relu(1 + D(fake))")
    arrow((10.25, high), (10.25, y + 0.25), (11.15, y + 0.25))
    sheet.write(10.15, middle, "`detach`", align="right")
    sheet.chain(x_target, disc)
    sheet.chain(disc, hinge, loss_d, gradient=True)
    return x0, x_t, student, x_target


def method():
    """The two stages, and the inside of the discriminator."""
    sheet = Sheet(15.9)
    box, arrow, write = sheet.box, sheet.arrow, sheet.write

    x0, _, _, x_target = stage(sheet, 1, 11.6, (6, 7), "data")
    arrow(x0.bottom, (0.9, 11.6), x_target.left, kind="data")
    write(1.4, 12.7, "Real is the data itself.\nθ trains: LoRA. The other weights of SVD's UNet are frozen.")

    _, x_t, student, x_target = stage(sheet, 2, 6.2, (9, 10), "ema", "consistency_weight")
    teacher = box(2.45, 6.2, 4.2, 1.6, "*teacher φ, Eq. 8\n`solve(net, x_t, grid,`\n`cond, guidance)`\n"
                  "m = `num_solver_steps` Euler steps", "teacher")
    x_s = box(5.25, 6.2, 0.7, 0.7, "`x_s`", "teacher")
    ema = box(7.1, 6.2, 2.4, 1.2, "*EMA $f_{θ^-}$, Eq. 4\n`consistency(net,`\n`x_s, ..., cond)`", "ema")
    arrow(x_t.bottom, (4.3, 7), kind="teacher")
    sheet.chain(teacher, x_s, kind="teacher")
    sheet.chain(x_s, ema, x_target, kind="ema")
    arrow((7.1, student.bottom[1]), ema.top, kind="ema")
    write(7, 7.7, "`update_ema`", "ema", align="right")
    write(0.3, 7.75, "θ and ψ start from stage 1.\nθ trains: LoRA and all of\n`temporal_transformer_blocks`.")

    sheet.panel(1.4, 5, "Discriminator: disc(latents) -> logits, positive means real (discriminator.py)")
    latents = box(1.2, 2.95, 1.6, 1.2, "`latents`\nb f c h w", "data")
    to_rgb = box(3.85, 2.95, 2.3, 1.4, "`to_rgb`\n1x1 map from 4\nto 3 channels", "disc")
    upsample = box(7.05, 2.95, 2.7, 1.4, "`upsample_normalize`\nbilinear resize,\nImageNet statistics")
    backbone = box(10.25, 2.95, 2.3, 1.4, "`backbone`\nDINOv2, frozen:\nmaps at 5 depths", "frozen")
    logits = box(16.95, 2.95, 1.2, 1.2, "`logits`\nb k", "data")
    sheet.chain(latents, to_rgb, upsample, backbone, gradient=True)
    for y, kind, view in (3.6, SpatialHead, "frame: (b f) c h w"), (2.3, TemporalHead, "place: (b h w) c f"):
        head = box(13.9, y, 3, 1, f"*{kind.__name__}\none {view}", "disc")
        arrow(backbone.right, (11.85, 2.95), (11.85, y), head.left, gradient=True)
        arrow(head.right, (15.85, y), (15.85, 2.95), logits.left, gradient=True)
    write(0.4, 1.85, "Two heads per depth. A spatial head sees no motion. A temporal head does not see how "
          "places fit together.")

    sheet.legend(1, data="data and noise", student="student θ", ema="EMA of the student θ⁻",
                 teacher="teacher φ, frozen", disc="discriminator ψ", frozen="other frozen weights")
    for x, words, gradient in (0.3, "gradients flow back", True), (4.6, "no gradient", False):
        arrow((x, 0.45), (x + 0.9, 0.45), gradient=gradient)
        write(x + 1.1, 0.45, words)
    write(8, 0.45, "D is `disc`. `cond`: first frame, frame rate and motion")
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------
# The noise axis


def place(sigma):
    """The x of a noise level, on a logarithmic axis with the noise on the left. 0 is apart on the right."""
    return 5.4 + 10.6 * math.log(SIGMA_MAX / sigma, SIGMA_MAX / SIGMA_MIN) if sigma else 17.3


def jumps(sheet, y, sigmas, noise="fresh noise", names=None):
    """Draws a student's jumps to 0 and, from 0, the noise that leads to the next level, one line lower."""
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        here, end = (place(sigma), y - 0.55 * i), (place(0), y - 0.55 * i)
        sheet.axes.plot(*here, "o", color=COLOURS["student"], ms=9)
        sheet.write(here[0] - 0.2, here[1], names[i] if names else f"{sigma:.3g}", align="right")
        sheet.arrow(here, end, kind="student", gradient=True)
        if after:
            sheet.arrow(end, (place(after), end[1] - 0.55), kind="data")
            sheet.write(9.05, end[1] - 0.22, "" if i else noise, "data")


def noise_axis():
    """The grid of noise levels, and the samplers on it."""
    sheet, grid = Sheet(11.2), karras_sigmas(NUM_SIGMAS)
    sheet.panel(0.9, 11.1, f"The noise axis, from noise (sigma = {SIGMA_MAX:g}) to data (sigma = 0)")
    for sigma in grid.tolist():
        sheet.axes.plot([place(sigma)] * 2, (9.75, 10.05), color=COLOURS["plain"], lw=1.5)
    for sigma in (SIGMA_MAX, 100, 10, 1, 0.1, 0.01, SIGMA_MIN, 0):
        sheet.axes.plot([place(sigma)] * 2, (9.62, 9.75), color=COLOURS["plain"], lw=3)
        sheet.write(place(sigma), 9.4, f"{sigma:g}", align="center")
    for y, text in {
            9.75: f"*Training grid\n`karras_sigmas({NUM_SIGMAS})`",
            8.5: "*Teacher, 25 Euler steps\n`sample_teacher`\n`karras_sigmas(25)`",
            7.25: "*Student, 1 step\n`sample`\n`strided(grid, 1)`",
            6: "*Student, 2 steps\n`sample`\n`strided(grid, 2)`",
            4.1: "*Student, 4 steps\n`sample`\n`strided(grid, 4)`",
            1.85: "*Time Travel Sampler\n`time_travel`\nmixed: mean of fresh noise\nand noise just removed",
    }.items():
        sheet.write(0.3, y, text)
    # An arc for each step of the teacher.
    x = [place(sigma) for sigma in karras_sigmas(25).tolist()]
    turn = torch.linspace(0, math.pi, 30)
    for start, end in zip(x, x[1:]):
        across, height = start + (end - start) * (1 - turn.cos()) / 2, min(0.4, end - start) * turn.sin()
        sheet.axes.plot(across, 8.4 + height, color=COLOURS["teacher"], lw=2)
    sheet.axes.plot(x, [8.4] * len(x), "o", color=COLOURS["teacher"], ms=5)
    for y, k in (7.25, 1), (6.3, 2), (4.95, 4):
        jumps(sheet, y, strided(grid, k).tolist())
    jumps(sheet, 2.1, strided(grid, 2).tolist(), "mixed noise", ("`sigma_t`", "`sigma_s`"))
    sheet.write(12.9, 1.28, "The look-ahead level is `sigma_s`. The readout is the end of the second jump.",
                align="center")
    sheet.legend(0.5, teacher="teacher: one Euler step", student="student: `consistency` jumps to 0",
                 data="noise is added")
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------
# A block of the UNet


def transformer_block(sheet, x, y, block, name, kind, rows):
    """Draws a transformer block. rows: what is added to x, and on what it works; LoRA is marked."""
    top = y + 0.55 + 0.425 * len(rows)
    outline = sheet.box(x, y, 4.2, 2 * (top - y), kind=kind)
    sheet.write(x, top - 0.5, f"*{type(block).__name__}\n`{name}`", align="center")
    for i, (branch, meaning) in enumerate(rows):
        middle = top - 1.4 - 0.85 * i
        sheet.box(x, middle, 4, 0.75)
        sheet.write(x - 1.88, middle, f"`x + {branch}`\n{meaning}")
        if lora.lora_layers(getattr(block, branch.partition("(")[0])):
            sheet.box(x + 1.53, middle + 0.14, 0.75, 0.36, "LoRA", "student")
    return outline


def two_ways(sheet, above, before, spatial, temporal, mixer, after):
    """Draws the arrows of a layer: spatial part, temporal part and a way past it, mixer. above: the box of an
    input of both parts. before, after: lists of boxes before and after the spatial part."""
    for part, side in (spatial, above.left), (temporal, above.right):
        sheet.arrow(side, (part.top[0], side[1]), part.top, kind="data")
    (x, y), low = spatial.right, temporal.bottom[1] - 0.6
    sheet.arrow((x + 0.25, y), (x + 0.25, low), (mixer.bottom[0], low), mixer.bottom, gradient=True)
    sheet.write(11, low + 0.28, "spatial result", align="center")
    sheet.chain(*before, spatial, *after, temporal, mixer, gradient=True)


def unet_block():
    """The two kinds of layers in a UNetBlock, and where they have LoRA."""
    with torch.device("meta"):                                  # parameters without memory
        block = lora.add_lora(model.UNetBlock([640], 320, 1280, [(5, 1, 1024)]), 1)
    resnet, transformer = block.resnets[0], block.attentions[0]
    mixer_name = f"*{type(resnet.time_mixer).__name__}\n`time_mixer`"
    sheet = Sheet(15.6)
    box, write = sheet.box, sheet.write

    # ---- Residual blocks
    sheet.panel(10.6, 15.5, f"{type(resnet).__name__}: resnets[i] of each {type(block).__name__}")
    x, parts = box(1.2, 12.6, 1.8, 1, "`x`\n(b f) c h w", "data"), []
    for middle, name in (4.9, "spatial_res_block"), (10.7, "temporal_res_block"):
        layer = getattr(resnet, name)
        conv = "x".join(map(str, layer.conv1.kernel_size))
        text = f"*{type(layer).__name__}\n`{name}`\n`norm1`, SiLU, `conv1` {conv}\n+ `time_emb_proj`\n"
        text += f"`norm2`, SiLU, `conv2` {conv}\n+ `conv_shortcut`"
        parts.append(box(middle, 12.6, 4.1, 2.3, text, "frozen"))
    emb = box(7.8, 14.3, 4.6, 0.6, "`emb` (b d): noise level and time ids", "data")
    weights = "spatial: sigmoid\nof `mix_factor`,\ntemporal: the rest"
    mixer = box(14.75, 12.6, 2.7, 1.9, f"{mixer_name}\n{weights}", "frozen")
    two_ways(sheet, emb, [x], *parts, mixer, [])
    write(7.95, 12.85, "b c f h w", align="center")
    sheet.chain(mixer, box(17.1, 12.6, 1.1, 1, "(b f)\nc h w", "data"), gradient=True)

    # ---- Transformer blocks
    y = 5.7
    sheet.panel(2.1, 10.4, f"{type(transformer).__name__}: attentions[i], after resnets[i]")
    spatial, temporal = transformer.transformer_blocks[0], transformer.temporal_transformer_blocks[0]
    among = [attention.split_heads.split(" -> ")[1] for attention in (spatial.attn1, temporal.attn1)]
    rows = [("attn2(context)", "the image embedding"), ("ff(norm3(x))", "each place alone")]
    left = transformer_block(sheet, 5.8, y, spatial, "transformer_blocks", "frozen", [
        ("attn1(norm1(x))", f"among pixels: {among[0]}"), *rows])
    right = transformer_block(sheet, 11.5, y, temporal, "temporal_transformer_blocks", "student", [
        ("ff_in(norm_in(x))", "each place alone"), ("attn1(norm1(x))", f"among frames: {among[1]}"), *rows])
    x = box(0.85, y, 1.1, 1.2, "`x`\n(b f)\nc h w", "data")
    proj_in = box(2.6, y, 1.4, 1.2, "`norm`\n`proj_in`\nb f s c", "frozen")
    context = box(8.65, 9.4, 4.6, 0.6, "`context` (b 1 d): image embedding", "data")
    position = box(8.65, 8.45, 2.4, 0.7, "`time_pos_embed`\nframe number", "frozen")
    plus = box(8.65, y, 0.4, 0.4, "+")
    mixer = box(14.9, y, 1.9, 1.2, mixer_name, "frozen")
    proj_out = box(16.95, y, 1.4, 1.2, "`proj_out`\n+ `x`\n(b f) c h w", "frozen")
    two_ways(sheet, context, [x, proj_in], left, right, mixer, [plus])
    sheet.chain(mixer, proj_out, gradient=True)
    sheet.arrow(position.bottom, plus.top, kind="frozen")
    sheet.arrow(x.bottom, (0.85, 2.45), (16.95, 2.45), proj_out.bottom, gradient=True)

    write(0.3, 1.4, "LoRA trains in both stages, all of `temporal_transformer_blocks` in stage 2 only.\n"
          "With `lora_convs`, the convolutions and projections have LoRA as well.\n"
          "b clips, f frames, c d channels, h w size, s = h w places, a attention heads")
    sheet.legend(0.5, data="data", student="student θ: trains", frozen="frozen weights of SVD")
    return sheet.figure


FIGURES = {"method": method, "noise_axis": noise_axis, "unet_block": unet_block}


def main(folder=ROOT / "docs"):
    for name, draw in FIGURES.items():
        save_figure(draw(), folder / f"{name}.png", colours=128)


if __name__ == "__main__":
    command_line("Draw the figures of the pages into docs/.").parse_args()
    main()
