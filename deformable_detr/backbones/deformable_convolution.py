"""Modulated deformable convolution, as a layer that finds its own offsets.
Chapter deformable_convolution."""

from torch import Tensor, nn
from torchvision.ops import DeformConv2d


class ModulatedDeformConv2d(DeformConv2d):
    """A deformable convolution that finds its own offsets and modulation (Zhu et al., "Deformable
    ConvNets v2", Eq. 1); the operator is torchvision's.

    It starts as the plain convolution of the same weight, so that pretrained weights carry over:
    offsets of zero, and modulations of one. For that a modulation is twice a sigmoid, in (0, 2);
    Eq. 1 has it in [0, 1], where it starts at one half.
    """

    def __init__(self, *arguments: int | tuple[int, int], **options: object) -> None:
        super().__init__(*arguments, **options)
        height, width = self.kernel_size
        self.offset = nn.Conv2d(
            self.in_channels,
            3 * height * width,  # y, x of each sample, then its modulation
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    @classmethod
    def like(cls, convolution: nn.Conv2d) -> "ModulatedDeformConv2d":
        """One with a plain convolution's sizes and weights."""
        deformable = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
            bias=convolution.bias is not None,
        )
        deformable.weight, deformable.bias = convolution.weight, convolution.bias
        return deformable

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'), as the plain convolution."""
        samples = self.kernel_size[0] * self.kernel_size[1]
        offsets, modulation = self.offset(x).split([2 * samples, samples], dim=1)
        return super().forward(x, offsets, 2 * modulation.sigmoid())
