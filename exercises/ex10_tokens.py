"""Exercise 10: latents to tokens to a temporal head.         difficulty 4 of 5, 45 minutes, about 12 lines

Features: latents b f c h w -> self.to_rgb: (b f) 3 h w -> upsample_normalize(x, size, mean, std) with size
self.size_for(h, w) -> self.backbone(pixel_values=..., output_hidden_states=True).hidden_states[depth], each
n (1 + patches) d: CLS, then patches row by row, each self.patch pixels wide -> for the depths self.levels a
map n d h' w', CLS added to each patch. Latents are in [-1, 1]; the backbone wants
((x + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD. Head: maps (b f) c h w -> the history of each place
(b h w) c 1 f -> super().forward, n c 1 f to n 1 1 f -> b (f h w). OSV Fig. 4. Mirrors discriminator.py.
"""
import discriminator


class DinoFeatures(discriminator.DinoFeatures):
    def forward(self, latents, cond=None):
        raise NotImplementedError


class TemporalHead(discriminator.Head):
    def __init__(self, c, width):
        super().__init__(c, width, kernel=(1, 7))           # given: a Conv1d along f

    def forward(self, x, num_frames):
        raise NotImplementedError
