"""The toy world's substitute for I3D, whose features FVD compares: a small 3-D convolutional network."""
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class VideoClassifier(nn.Module):
    """Multi-label classifier of clips. Its convolutions halve height and width four times, time twice."""

    class_name, file_stem = "VideoClassifier", "model"                          # of its files

    def __init__(self, num_classes: int, channels=(32, 64, 96, 128), size: int = 128):
        super().__init__()
        self.config = {"num_classes": num_classes, "channels": list(channels), "size": size}
        c1, c2, c3, c4 = channels

        def conv(c_in, c, stride, kernel=(3, 3, 3)):
            conv = nn.Conv3d(c_in, c, kernel, stride, padding=[k // 2 for k in kernel], bias=False)
            return nn.Sequential(conv, nn.GroupNorm(8, c), nn.SiLU())

        self.stem = conv(3, c1, (1, 2, 2), (3, 5, 5))
        self.stages = nn.Sequential(conv(c1, c2, (1, 2, 2)), conv(c2, c3, (2, 2, 2)), conv(c3, c4, (2, 2, 2)))
        self.mix = conv(c4, c4 // 2, 1)
        self.head = nn.Linear(c4 // 2 * 4 * 4, num_classes)         # on a 4x4 map, to keep positions

    def forward(self, x: Tensor, rescale=True, resize=True, return_features=True) -> Tensor:
        """x [b 3 f H W] -> logits [b k]. I3D's script has the same arguments; return_features does nothing.

        rescale: x is in [0, 255] instead of [-1, 1]. resize: frames are resized to config["size"].
        """
        x = x / 127.5 - 1 if rescale else x
        size = self.config["size"], self.config["size"]
        if resize and x.shape[-2:] != size:
            frames = rearrange(x, "b c f h w -> (b f) c h w")
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
            x = rearrange(frames, "(b f) c h w -> b c f h w", b=len(x))
        x = self.mix(self.stages(self.stem(x.to(self.head.weight.dtype)))).mean(dim=2)      # b c h w
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))                            # b k
