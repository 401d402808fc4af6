"""The toy world: procedural clips, 14 frames of 128x128 at 7 fps, on which the whole paper runs in minutes.

One or two textured shapes move over a textured background, roll and bounce off the borders. Their speed is
the clip's motion bucket. **The first frame does not show the direction of motion**, so one image has many
futures: one step of the teacher returns their blurred mean, 25 steps return one sharp future. Closing that
gap is the subject of the paper.

    toy_clips       (seed, indices) -> ToyClips; calls the four functions below
    scene           which shapes and colours a clip has, and where the shapes are in frame 0
    paths           how the shapes move: bouncing at the borders, rolling
    labels          scene and motion as 0/1 attributes, for classifiers
    painting        the pixels of all frames: background, then shapes with texture, rim and shadow

A clip is a pure function of (seed, index): no state, the same scene on every device and in every batch. To
look at the first eight clips:

    import pathlib, support.media, toy.world
    support.media.save_sheet(toy.world.toy_clips(0, range(8)).frames, pathlib.Path("toy.png"))

Letters in shape comments: b clips, f frames, n shapes, k kinds, c colour channels, h w pixels.
"""
import math
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from support.engine import uniforms

# The world is 128 units wide, whatever the size of the picture in pixels.
WORLD = 128.0
# name: (corners, notch, scale, pair). The outline alternates between outer corners at radius 1 and inner
# corners at radius `notch`, with straight lines between them. The inner corners of a regular polygon lie on
# its edges; a disc is a polygon of many sides.
# Each kind has its own pair of colours, and the shapes of a clip differ in kind. So a patch of colour tells
# which shape it belongs to. Without this rule, a network trained for minutes lets shapes change their kind.
KINDS = {"disc": (32, 1.0, 0.95, 3), "square": (4, math.cos(math.pi / 4), 1.15, 1),
         "triangle": (3, math.cos(math.pi / 3), 1.25, 0), "star": (5, 0.5, 1.3, 2)}
COLOURS = ((0.93, 0.26, 0.27), (0.98, 0.53, 0.16), (0.98, 0.80, 0.22), (0.42, 0.75, 0.31),
           (0.10, 0.68, 0.66), (0.22, 0.50, 0.93), (0.54, 0.33, 0.85), (0.93, 0.38, 0.66))
DARK, LIGHT = (0.07, 0.08, 0.15), (1.00, 0.97, 0.90)        # a background mixes its hue with one of these
MAX_SHAPES, LAYOUTS = 2, 8                          # shapes per clip; random placements to choose from
ROLL = 80.0                                         # units of motion to the right per radian of rotation
CHUNK = 2**24                                       # pixels rendered at a time; bounds the memory

CELLS, HEADINGS, SPEEDS = 4, 8, 8                   # bins of the attributes; a position has CELLS x CELLS
NUM_STATIC = len(COLOURS) + len(KINDS) * CELLS * CELLS + len(COLOURS)
NUM_ATTRIBUTES = NUM_STATIC + len(KINDS) * HEADINGS + SPEEDS


class ToyClips(NamedTuple):
    frames: Tensor                  # b f c h w  in [-1, 1]
    motion_bucket_id: Tensor        # b          1 to 255; bucket / 127 * 4 pixels per frame at 128x128
    attributes: Tensor              # b k        0 or 1; frame 0 shows the first NUM_STATIC of them
    centres: Tensor                 # b f n 2    (x, y) in pixels
    present: Tensor                 # b n        bool: whether the clip has an n-th shape
    kind_map: Tensor                # b f h w    int8: 0 is background, else 1 + the kind of the front shape


class Scene(NamedTuple):
    """Everything that frame 0 shows. Lengths are in world units, phases in turns."""

    present: Tensor                 # b n    bool
    kind: Tensor                    # b n    index into KINDS
    colour: Tensor                  # b n    index into COLOURS
    radius: Tensor                  # b n
    place: Tensor                   # b n 2  centres (x, y)
    turn: Tensor                    # b n    rotation in turns
    checked: Tensor                 # b n    bool: checks instead of stripes
    period: Tensor                  # b n    of the texture
    phase: Tensor                   # b n 2  of the texture
    backdrop: Tensor                # b      index into COLOURS
    dark: Tensor                    # b 1    bool: the background mixes with DARK instead of LIGHT
    waves: Tensor                   # b 4    tilt, wavelength and two phases of the background, in [0, 1)


class Motion(NamedTuple):
    bucket: Tensor                  # b        1 to 255
    heading: Tensor                 # b n      direction of motion at frame 0, radians
    centres: Tensor                 # b f n 2  (x, y) in world units
    angle: Tensor                   # b f n    rotation, radians


def toy_clips(seed: int, indices: Tensor, num_frames: int = 14, size: int = 128, device="cpu",
              motion_seed: int | None = None) -> ToyClips:
    """Renders clips `indices` [b] of the world `seed`. With a `motion_seed`, the first frames and the speeds
    stay and the directions change: the clips are other futures of the same pictures."""
    indices = torch.as_tensor(indices, dtype=torch.int64, device=device)                # b
    chunk = max(1, CHUNK // (num_frames * size * size))
    if len(indices) > chunk:
        parts = (toy_clips(seed, i, num_frames, size, device, motion_seed) for i in indices.split(chunk))
        return ToyClips(*map(torch.cat, zip(*parts)))
    start = scene(seed, indices)
    motion = paths(start, seed, indices, num_frames, motion_seed)
    frames, kind_map = painting(start, motion, size)
    return ToyClips(frames, motion.bucket, labels(start, motion), motion.centres * (size / WORLD),
                    start.present, kind_map)


@cache
def constants(device):
    """The tables above as tensors: corners, notch, scale and pair [k each], palette [8 c], dark and light [c
    each]. Cached per device, because each copy to a GPU waits for the GPU."""
    return [torch.tensor(table, device=device) for table in (*zip(*KINDS.values()), COLOURS, DARK, LIGHT)]


# ---- Scene ----------------------------------------------------------------------------------------------


def scene(seed, indices):
    """Draws the scenes of clips `indices` [b] -> Scene."""
    n, k, device = MAX_SHAPES, len(KINDS), indices.device
    # How many random numbers of a clip each choice takes.
    widths = {"count": 1, "backdrop": 1, "tone": 1, "waves": 4, "kind": k, "colour": n, "radius": n,
              "turn": n, "checked": n, "period": n, "phase": 2 * n, "layouts": 2 * n * LAYOUTS}
    table = uniforms(seed, indices, 0, sum(widths.values()))                            # b sum(widths)
    u = dict(zip(widths, table.split(list(widths.values()), dim=1)))                    # each b width
    _, _, scale, pair, *_ = constants(device)                                           # k each

    present = torch.arange(n, device=device) < 1 + (u["count"] * n).long()              # b n
    kind = u["kind"].argsort(dim=1)[:, :n]                                              # b n, all different
    backdrop = (u["backdrop"] * len(COLOURS)).long()                                    # b 1
    colour = 2 * pair[kind].long() + (u["colour"] * 2).long()                           # b n
    # A shape in the background's colour would be invisible: it gets the other colour of its pair.
    colour = torch.where(colour == backdrop, colour ^ 1, colour)                        # b n
    radius = (15 + 8 * u["radius"]) * scale[kind]                                       # b n

    # Of LAYOUTS random placements, keep the one with the largest distance between the two shapes: frame 0
    # should show both.
    margin = radius[:, None, :, None]                                                   # b 1 n 1
    layouts = rearrange(u["layouts"], "b (l n xy) -> b l n xy", n=n, xy=2) * (WORLD - 2 * margin) + margin
    gaps = (layouts[:, :, 0] - layouts[:, :, 1]).norm(dim=-1).clamp(max=WORLD)          # b l
    best = (gaps * present[:, 1:]).argmax(1)                                            # b, any if one shape
    place = layouts[torch.arange(len(layouts), device=device), best]                    # b n 2

    return Scene(present, kind, colour, radius, place, u["turn"], u["checked"] >= 0.5, 20 + 10 * u["period"],
                 u["phase"].unflatten(1, (n, 2)), backdrop[:, 0], u["tone"] < 0.6, u["waves"])


# ---- Paths ----------------------------------------------------------------------------------------------


def paths(start, seed, indices, num_frames, motion_seed=None):
    """Moves the shapes of a Scene through `num_frames` frames -> Motion."""
    # Frame 0 must not depend on the motion, so these numbers come from a second random stream.
    bucket, heading = uniforms(seed, indices, 1, 1 + MAX_SHAPES).split([1, MAX_SHAPES], dim=1)      # b 1, b n
    if motion_seed is not None:
        heading = uniforms(motion_seed, indices, 1, MAX_SHAPES)                         # b n
    bucket = 1 + (bucket * 255).long()                                                  # b 1
    heading = heading * 2 * math.pi                                                     # b n

    # Straight motion, reflected at the borders: a triangle wave, so a position needs no earlier positions.
    time = torch.arange(num_frames, device=indices.device)[:, None]                     # f 1
    step = 4 * (bucket / 127)[..., None] * torch.stack((heading.cos(), heading.sin()), dim=-1)      # b n 2
    margin = start.radius[:, None, :, None]                                             # b 1 n 1
    span = WORLD - 2 * margin
    path = start.place[:, None] + step[:, None] * time[..., None] - margin              # b f n 2
    centres = margin + span - (path.remainder(2 * span) - span).abs()                   # b f n 2

    # Shapes roll: the angle depends on the horizontal position alone, whatever the path to it was.
    angle = start.turn[:, None] * 2 * math.pi + (centres - start.place[:, None])[..., 0] / ROLL     # b f n
    return Motion(bucket[:, 0], heading, centres, angle)


def labels(start, motion):
    """The attributes of clips [b NUM_ATTRIBUTES], 0 or 1: colours of the shapes, kinds with their cell at
    frame 0, colour of the background; then kinds with their heading, and the speed."""
    bins = lambda x, num: F.one_hot((x * num).long().clamp(0, num - 1), num)            # x in [0, 1)
    kinds = F.one_hot(start.kind, len(KINDS)) * start.present[..., None]                # b n k
    with_kind = lambda v: (kinds[..., None] * v[:, :, None]).amax(dim=1).flatten(1)     # b n v -> b (k v)
    x, y = bins(start.place / WORLD, CELLS).unbind(2)                                   # b n v each
    cells = rearrange(y[..., None] * x[:, :, None], "b n y x -> b n (y x)")
    headings = bins(motion.heading / (2 * math.pi), HEADINGS)                           # b n v
    speed = bins((motion.bucket - 1) / 255, SPEEDS)                                     # b v
    colours = (F.one_hot(start.colour, len(COLOURS)) * start.present[..., None]).amax(dim=1)        # b v
    backdrop = F.one_hot(start.backdrop, len(COLOURS))                                  # b v
    return torch.cat((colours, with_kind(cells), backdrop, with_kind(headings), speed), dim=1).float()


# ---- Painting -------------------------------------------------------------------------------------------

per_pixel = lambda v: v[..., None, None]            # [...] -> [... 1 1], to broadcast against h w
per_frame = lambda v: v[:, None, None, None]        # [b] -> [b 1 1 1], to broadcast against b f h w


def painting(start, motion, size):
    """Renders a Scene in Motion -> frames [b f c h w] in [-1, 1], kind_map [b f h w]."""
    *_, palette, _, _ = constants(motion.centres.device)                                # 8 c
    pixel = (torch.arange(size, device=motion.centres.device) + 0.5) * (WORLD / size)   # w, pixel centres
    y, x = pixel[:, None], pixel[None]                                                  # h 1, 1 w
    image = background(start, x, y)[:, None].repeat(1, motion.centres.shape[1], 1, 1, 1)        # b f c h w
    kind_map = torch.zeros_like(image[:, :, 0], dtype=torch.int8)                       # b f h w

    for i in range(MAX_SHAPES):                                         # later shapes are in front
        distance, u, v = outline_distance(                                              # b f h w each
            pixel, motion.centres[:, :, i], motion.angle[:, :, i], start.kind[:, i], start.radius[:, i])

        # Texture: soft stripes or checks between a light and a dark tone of the colour.
        tau = 2 * math.pi / per_frame(start.period[:, i])
        shift = 2 * math.pi * start.phase[:, i]                                         # b 2
        stripes = (u * tau + per_frame(shift[:, 0])).sin()                              # b f h w
        crossing = (v * tau + per_frame(shift[:, 1])).sin()
        texture = torch.where(per_frame(start.checked[:, i]), stripes * crossing, stripes)
        shade = 0.66 + 0.34 * (0.5 + 0.5 * (2 * texture).tanh())
        rim = 1 - 0.3 * (distance / 4).clamp(-1, 0).add(1)                             # darker at the outline
        paint = per_pixel(palette[start.colour[:, i]][:, None]) * (shade * rim)[:, :, None]     # b f c h w

        shown = per_frame(start.present[:, i])
        cover = (0.5 - distance * (size / WORLD)).clamp(0, 1) * shown       # b f h w, antialiased edge
        shadow = 1 - 0.35 * (-distance.clamp(min=0) / 2.5).exp() * shown    # b f h w, around the shape
        image = (image * shadow[:, :, None]).lerp(paint, cover[:, :, None])
        kind_map = torch.where(cover > 0.5, (1 + per_frame(start.kind[:, i])).to(torch.int8), kind_map)
    return image * 2 - 1, kind_map


def background(start, x, y):
    """Two soft waves between a darker and a lighter tone of the background's hue -> [b c h w] in [0, 1]."""
    *_, palette, dark, light = constants(x.device)                                      # 8 c, c, c
    tilt, wavelength, phase_1, phase_2 = start.waves.T                                  # b each
    cos, sin = per_pixel((2 * math.pi * tilt).cos()), per_pixel((2 * math.pi * tilt).sin())         # b 1 1
    along, across = cos * x + sin * y, cos * y - sin * x                                # b h w
    wavelength = per_pixel(50 + 50 * wavelength)
    ripple = 0.5 + 0.25 * ((along / wavelength + per_pixel(phase_1)) * 2 * math.pi).sin() \
                 + 0.25 * ((across / wavelength * 0.7 + per_pixel(phase_2)) * 2 * math.pi).sin()    # b h w
    ground = torch.where(start.dark, dark, light)                                       # b c
    return per_pixel(ground) + per_pixel(palette[start.backdrop] - ground) * (0.12 + 0.3 * ripple[:, None])


def outline_distance(pixel, centres, angle, kind, radius):
    """Signed distances of all pixels to the outline of a shape, negative inside, and their places (u, v) from
    its centre, turned with it [b f h w each].

    pixel [w]: places of the columns, and of the rows; centres [b f 2]; angle [b f]; kind, radius [b]. The
    plane is folded into the wedge between an outer and an inner corner, in which the outline is one straight
    line. Exact except outside of corners, where only the soft shadow depends on it."""
    dx, dy = pixel - per_pixel(centres[..., 0]), pixel[:, None] - per_pixel(centres[..., 1])
    cos, sin = per_pixel(angle.cos()), per_pixel(angle.sin())                           # b f 1 1
    u, v = cos * dx + sin * dy, cos * dy - sin * dx         # b f h w
    corners, notch = (per_frame(table[kind]) for table in constants(u.device)[:2])      # b 1 1 1 each
    half = math.pi / corners                                                            # of the wedge
    # The line from (1, 0) to notch (cos half, sin half) has this normal.
    nx, ny = notch * half.sin(), 1 - notch * half.cos()                                 # b 1 1 1 each
    length = torch.hypot(nx, ny)
    # Polar coordinates, folded to one wedge. Then the place relative to the outer corner of this wedge.
    fold = (torch.atan2(v, u) + half).remainder(2 * half) - half                        # b f h w, radians
    r = torch.hypot(u, v)
    along, across = r * fold.cos() - per_frame(radius), r * fold.abs().sin()            # b f h w
    return along * (nx / length) + across * (ny / length), u, v
