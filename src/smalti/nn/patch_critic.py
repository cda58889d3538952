"""A critic of pictures that judges patches: strided convolutions down to a map of scores.

Each score sees a patch of 70 pixels at the default depth of three halvings. GroupNorm stands where the paper has batch
norm, so that a picture's scores do not depend on its neighbours in the batch or on the number of processes.

Source: PatchGAN of pix2pix (arXiv 1611.07004), section 3.2.2 and appendix 6.1.2.
"""

from torch import Tensor, nn


class PatchCritic(nn.Module):
    """Pixels (B, 3, H, W) -> scores (B, 1, h, w), high for what looks real.

    Args:
        width: channels of the first layer, a multiple of 8.
        halvings: strided layers; the patch is about `2 ** halvings` * 9 pixels wide.
    """

    def __init__(self, width: int = 64, halvings: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, halvings + 1):
            wider = width * min(2**index, 8)
            stride = 2 if index < halvings else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)
            ]  # fmt: skip
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)
