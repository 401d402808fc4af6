"""Measures whether the shapes of toy clips stay whole, keep their look, and move as asked.

    inspect     clips with their scenes and motion buckets -> which clips have which defect
    segment     the pixels that have the colour of a shape
    outlines    the distance of each pixel to the outline of a shape
    fit         the centre of each shape
    damages     clips that are damaged in eight ways, to test this and other measures

The renderer knows what every clip must show: the kind, colour and size of its shapes, and how they roll. Only
the centre of a shape is free, because a first frame has many futures. So each shape is found by its colour,
its outline is drawn around the centre that is found, and the two sets of pixels are compared.

A shape is judged in the frames where at least VISIBLE of it is in front. Its defects:

    parts       more than 1/8 of the pixels of its colour lie away from its outline: it has split, left a
                ghost, or melted into another shape
    size        the pixels of its colour cover less than 4/5 or more than 5/4 of its outline
    kind        they overlap with its outline by less than 0.85 (intersection over union)
    colour      the mean colour inside of its outline has another hue
    astray      its centre moves more than 2 units too far in one step, or too little in three steps

The limits are for clips of 128x128: 3 of 2,048 from the renderer fail. The VAE alone makes 1 in 10 fail.

Letters in shape comments: b clips, f frames, n shapes, k colours, c colour channels, h w pixels.
"""
import math

import torch
from torch.nn import functional as F

from toy.world import COLOURS, ROLL, WORLD, Scene, constants, outline_distance, painting, per_frame, per_pixel

VISIBLE = 0.7                                   # fraction of a shape
NEAR = 3.0                                      # world units: within this distance, pixels mix colours
CHUNK = 2**20                                   # pixels inspected at a time; a CPU's caches hold them
DEFECTS = "parts", "size", "kind", "colour"     # of a shape; "astray" is a defect of its motion
DAMAGES = "kind", "squash", "melt", "split", "ghost", "drift", "freeze", "jump"


def chroma(rgb):
    """Colours [.. c] without their grey: zero-mean over the channels."""
    return rgb - rgb.mean(dim=-1, keepdim=True)


def segment(pixels, start):
    """The pixels whose colour is nearest to that of a shape: [b f c h w] in [0, 1] -> bool [b f n h w].
    start: the Scene of the clips.

    A shape's texture is its colour times 0.3 to 1. A background is one of eight mixtures of its ground and
    its hue, some of them in a shadow. All colours are compared without their grey. Single pixels, in which
    two colours mix, are removed by a majority of 3x3.
    """
    palette, dark, light = constants(pixels.device)[4:]                                     # 8 c, c, c
    n = start.present.shape[1]
    ground = torch.where(start.dark, dark, light)[:, None]                                  # b 1 c
    share = torch.linspace(0.12, 0.42, 4, device=pixels.device)[:, None]                    # 4 1
    grounds = chroma(ground + share * (palette[start.backdrop][:, None] - ground))          # b 4 c
    shapes = chroma(palette[start.colour])                                                  # b n c
    lengths = shapes.norm(dim=-1, keepdim=True)                                             # b n 1
    colours = torch.cat((shapes / lengths, grounds, 0.7 * grounds), dim=1)                  # b k c
    along = (colours[:, None] @ pixels.flatten(3)).unflatten(3, pixels.shape[3:])           # b f k h w
    # |pixel - colour|^2 without |pixel|^2, which is the same for all colours. For a shape, the colour is the
    # nearest one on the line of its texture.
    length, square = (per_pixel(x)[:, None] for x in (lengths[..., 0], colours.square().sum(-1)))
    nearest = along[:, :, :n].clamp(0.3 * length, 1.05 * length)                            # b f n h w
    shapes = nearest * (nearest - 2 * along[:, :, :n])
    shapes = shapes.where(per_pixel(start.present)[:, None], torch.inf)
    best = torch.minimum((square - 2 * along)[:, :, n:].amin(2), shapes.amin(2))            # b f h w
    masks = (shapes == best[:, :, None]).float()
    return F.avg_pool2d(masks.flatten(0, 1), 3, stride=1, padding=1).view(masks.shape) > 0.5


def outlines(centres, start, size):
    """Signed distances of all pixels to the outlines of the shapes around `centres` [b f n 2] -> [b f n h w],
    in world units, negative inside; far away for shapes that the clip does not have."""
    pixel = (torch.arange(size, device=centres.device) + 0.5) * (WORLD / size)
    angles = start.turn[:, None] * 2 * math.pi + (centres - start.place[:, None])[..., 0] / ROLL    # b f n
    shapes = zip(centres.unbind(2), angles.unbind(2), start.kind.unbind(1), start.radius.unbind(1))
    distances = torch.stack([outline_distance(pixel, *shape)[0] for shape in shapes], dim=2)    # b f n h w
    return distances.where(per_pixel(start.present[:, None]), WORLD)


def in_front(distances):
    """The pixels inside of each outline that no later shape covers: bool [b f n h w]."""
    inside, n = distances < 0, distances.shape[2]
    return torch.stack([inside[:, :, i] & ~inside[:, :, i + 1:].any(2) for i in range(n)], dim=2)


def mean_place(masks):
    """The mean position of the pixels of each mask [.. h w] -> [.. 2] in world units."""
    pixel = (torch.arange(masks.shape[-1], device=masks.device) + 0.5) * (WORLD / masks.shape[-1])
    columns, rows = masks.float().sum(-2), masks.float().sum(-1)                            # .. w, .. h
    return torch.stack((columns @ pixel, rows @ pixel), dim=-1) / rows.sum(-1).clamp(min=1)[..., None]


def fit(masks, start):
    """The centres of the shapes [b f n 2], such that the visible part of each outline has the same mean
    position as the pixels of its colour."""
    found = centres = mean_place(masks)
    for _ in range(4):
        centres = centres + found - mean_place(in_front(outlines(centres, start, masks.shape[-1])))
    return centres


def motion_of(centres, judged, bucket):
    """How the shapes of clips move: centres [b f n 2], judged bool [b f n] -> "moved" [b], the mean step in
    units, and "astray" bool [b], whether a shape moves too far or too little. Too little is judged over three
    steps, because a step in which a shape bounces is shorter."""
    asked = 4 * (bucket / 127)[:, None, None]                                               # b 1 1, units
    steps, both = centres.diff(dim=1).norm(dim=-1), judged[:, 1:] & judged[:, :-1]          # b f-1 n
    path = steps[:, 2:] + steps[:, 1:-1] + steps[:, :-2]                                    # b f-3 n
    all_four = both[:, 2:] & both[:, 1:-1] & both[:, :-2]
    far, slow = both & (steps > asked + 2), all_four & (path < 1.5 * asked - 1)
    return {"moved": (steps * both).sum((1, 2)) / both.sum((1, 2)).clamp(min=1),
            "astray": far.flatten(1).any(1) | slow.flatten(1).any(1)}


def inspect(frames, start, bucket):
    """Whether a shape has a defect in a frame -> {"parts", "size", "kind", "colour", "astray": bool [b],
    "moved": the mean step of the shapes [b], in units}. frames: uint8 [b f 3 h w]; start: the Scene of the
    clips; bucket: their motion buckets [b]."""
    chunk = max(1, CHUNK // frames[0, :, 0].numel())
    if len(frames) > chunk:
        numbers = torch.arange(len(frames), device=frames.device).split(chunk)
        parts = [inspect(frames[i], Scene(*(x[i] for x in start)), bucket[i]) for i in numbers]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    pixels = frames.float() / 255
    masks = segment(pixels, start)                                                          # b f n h w
    centres = fit(masks, start)                                                             # b f n 2
    distances = outlines(centres, start, frames.shape[-1])
    visible = in_front(distances)
    area = lambda mask: mask.float().sum((-2, -1))                                          # b f n
    judged = (area(visible) >= VISIBLE * area(distances < 0)) & start.present[:, None]
    # Pixels near the other one of the two shapes are left out, because two colours mix there.
    other = distances.flip(2)
    masks = masks & (visible | (other > NEAR))
    overlap = area(masks & visible) / area(masks | visible).clamp(min=1)
    ratio = area(masks) / area(visible).clamp(min=1)
    mean = chroma(visible.flatten(3).float() @ pixels.flatten(3).mT)                        # b f n c
    hue = F.cosine_similarity(mean, chroma(constants(frames.device)[4][start.colour])[:, None], dim=-1)
    defects = {"parts": area(masks & (distances > NEAR)) > area(masks) / 8,
               "size": (ratio < 0.8) | (ratio > 1.25), "kind": overlap < 0.85, "colour": hue < 0.97}
    found = {name: (defect & judged).flatten(1).any(1) for name, defect in defects.items()}
    return found | motion_of(centres, judged, bucket)


# ---- Damaged clips --------------------------------------------------------------------------------------


def damages(start, motion, other, size):
    """Clips of a Scene in Motion, damaged in the ways DAMAGES -> {name: frames [b f 3 h w] in [-1, 1]}.
    other: another Motion of the same Scene.

    kind        from the middle of the clip on, the shapes are others: a disc is a square, and so on
    squash      the picture shrinks vertically towards the centre of the first shape, to 2/3 at the end
    melt        from the middle on, both shapes have one colour and lie nearly over one another
    split       from the middle on, the first shape is two smaller ones, which part
    ghost       the mean of two futures
    drift       the colours of the shapes slowly turn into others
    freeze      from the middle on, nothing moves
    jump        in the middle, the shapes jump by 24 units
    """
    centres, f = motion.centres, motion.centres.shape[1]                                    # b f n 2
    time = torch.linspace(0, 1, f, device=centres.device)[:, None, None]                    # f 1 1
    late = (time >= 0.5)[..., None]                                                         # f 1 1 1
    along_x = torch.tensor([1.0, 0.0], device=centres.device)                               # 2

    def draw(centres=centres, **changes):
        angle = motion.angle + (centres - motion.centres)[..., 0] / ROLL
        moved = motion._replace(centres=centres, angle=angle)
        return painting(start._replace(**changes), moved, size)                # b f 3 h w, kind_map b f h w

    frames, _ = draw()
    scale = constants(centres.device)[2]                                                    # k
    kind = (start.kind + 1) % len(scale)                                                    # b n
    others, _ = draw(kind=kind, radius=start.radius * scale[kind] / scale[start.kind])
    near, one = centres.mean(2, keepdim=True).lerp(centres, 0.2), start.colour[:, :1].expand(-1, 2)
    melted, _ = draw(near, colour=one)
    turned, _ = draw(colour=(start.colour + 2) % len(COLOURS))

    # affine_grid maps places of the new frame to those of the old one, in [-1, 1].
    shrink, y = 1 + time[:, 0, 0] / 2, centres[:, :, 0, 1] / WORLD * 2 - 1                  # f, b f
    theta = torch.eye(2, 3, device=centres.device).repeat(*y.shape, 1, 1)                   # b f 2 3
    theta[..., 1, 1], theta[..., 1, 2] = shrink, (1 - shrink) * y
    grid = F.affine_grid(theta.flatten(0, 1), frames.flatten(0, 1).shape, align_corners=False)
    squashed = F.grid_sample(frames.flatten(0, 1), grid, padding_mode="border", align_corners=False)

    first = torch.tensor([[1.0], [0.0]], device=centres.device) * along_x                   # n 2
    smaller = start.radius * torch.tensor([0.7, 1.0], device=centres.device)                # b n
    (left, kind_map), (right, _) = (draw(centres + 16 * x * time * first, radius=smaller) for x in (-1, 1))
    split = left.where((kind_map == 1 + per_frame(start.kind[:, 0]))[:, :, None], right)
    inwards = (WORLD / 2 - centres[:, f // 2, None]).sign() * along_x                       # b 1 n 2

    jumped, _ = draw(centres + 24 * late[..., 0] * inwards)
    ghost = (frames + painting(start, other, size)[0]) / 2
    return {"kind": others.where(late, frames), "squash": squashed.view(frames.shape),
            "melt": melted.where(late, frames), "split": split.where(late, frames), "ghost": ghost,
            "drift": frames.lerp(turned, time[..., None]),
            "freeze": frames[:, torch.arange(f).clamp(max=f // 2)], "jump": jumped}
