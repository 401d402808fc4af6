"""Exercise 10: latents to tokens to a temporal head.                    difficulty 4 of 5, about 16 lines

DinoFeatures.forward: latents [b f c h w] -> a list of maps [(b f) d h' w'], one per depth in self.levels.
1. Frames become a batch, (b f) c h w; self.to_rgb maps them to 3 channels.
2. discriminator.upsample_normalize(x, size, mean, std) resizes to self.size_for(h, w) and normalises. Take
   the 3 channels to be in [-1, 1]; IMAGENET_MEAN and IMAGENET_STD are for pixels in [0, 1]: convert them.
3. self.backbone(pixel_values=..., output_hidden_states=True).hidden_states[depth] is n (1 + patches) d: the
   CLS token, then the patches row by row. A patch is self.patch pixels wide.
4. The patches become a map n d h' w'; the CLS token is added to each patch.

TemporalHead.forward: maps [(b f) c h w] -> the history of each place, (b h w) c 1 f -> super().forward, which
maps n c 1 f to n 1 1 f -> logits [b (f h w)]. OSV Fig. 4. Mirrors discriminator.py.
Read before: OSV section 4.1, Figs. 3 and 4; the first page of einops.rocks.
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
