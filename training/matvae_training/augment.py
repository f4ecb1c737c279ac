"""Views of images for objectives that compare two of them: a batch at a time, uint8 in and uint8 out.

What may change without changing what an image shows differs from data to data: a flipped 2 is no digit, a sheared coat
looks like a dress. So there are three recipes, each as mild as its data wants it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far images may move, each within its bounds at random.

    degrees  of rotation, both ways
    zoom     least and largest factor of the part that is seen: below 1 is nearer
    shift    of the image's side, both ways
    shear    both ways
    flip     left and right, each image or not at even odds
    jitter   of brightness and contrast, both ways
    tint     of the strength of each colour by itself, both ways
    grey     how often colours are taken away
    """

    degrees: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    shear: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    tint: float = 0.0
    grey: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, height, width, channels) -> another view of each, of the same shape."""
        n, device = len(images), images.device

        def within(bound: float, *shape: int) -> Tensor:
            return (2 * torch.rand(n, *shape, device=device) - 1) * bound

        angle = within(math.radians(self.degrees))
        zoom = self.zoom[0] + torch.rand(n, device=device) * (self.zoom[1] - self.zoom[0])
        mirror = 1.0 - 2.0 * (torch.rand(n, device=device) < 0.5) if self.flip else torch.ones(n, device=device)
        move = within(2 * self.shift, 2)  # in the units of the grid, whose side is 2
        top = torch.stack([angle.cos() * zoom * mirror, -angle.sin() * zoom + within(self.shear), move[:, 0]], 1)
        bottom = torch.stack([angle.sin() * zoom * mirror, angle.cos() * zoom, move[:, 1]], 1)
        pixels = images.permute(0, 3, 1, 2).float()
        grid = affine_grid(torch.stack([top, bottom], 1), list(pixels.shape), align_corners=False)
        # Behind the edge of a photo lies more of the same, behind that of a drawing nothing.
        edge = "reflection" if images.shape[3] == 3 else "zeros"
        pixels = grid_sample(pixels, grid, padding_mode=edge, align_corners=False)
        if self.tint:
            pixels = pixels * (1 + within(self.tint, pixels.shape[1], 1, 1))
        if self.grey:
            gone = (torch.rand(n, 1, 1, 1, device=device) < self.grey).float()
            pixels = torch.lerp(pixels, pixels.mean(1, keepdim=True), gone)
        if self.jitter:
            mean = pixels.mean((1, 2, 3), keepdim=True)
            pixels = (
                (pixels - mean) * (1 + within(self.jitter, 1, 1, 1)) + mean + 255 * within(self.jitter / 2, 1, 1, 1)
            )
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


AUGMENTATIONS: dict[str, Augmentation] = {
    "digits": Augmentation(degrees=12, zoom=(0.85, 1.2), shift=0.08, shear=0.2),
    "garments": Augmentation(zoom=(0.9, 1.1), shift=0.07, flip=True, jitter=0.2),
    "photos": Augmentation(zoom=(0.5, 1.0), shift=0.2, flip=True, jitter=0.4, tint=0.3, grey=0.2),
}
