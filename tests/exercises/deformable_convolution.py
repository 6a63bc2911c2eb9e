"""Checkers of chapter deformable_convolution, "Deformable convolution"."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from deformable_detr.exercises import checks, expect
from deformable_detr.layers.sampling import bilinear_sample, pixel_to_normalised


def _taps(by_column=False):
    return torch.tensor(
        [(y, x) if by_column else (x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    ).float()


def _sample(image, pixels):
    return bilinear_sample(image, pixel_to_normalised(pixels, image.shape[-2:]))


@checks("deformable_convolution.1")
def check_tap_points(tap_points):
    centre, still = torch.tensor([4.0, 7.0]), torch.zeros(9, 2)
    yield "the middle tap reads at the centre plus its own offset"
    offset = torch.arange(18.0).reshape(9, 2) / 10
    expect(tap_points(centre, offset, 1)[4], centre + offset[4])
    yield "taps run row by row, and dilation spreads them but not the offsets"
    expect(tap_points(centre, still, 2)[1], torch.tensor([4.0, 5.0]), "tap 1 is straight above")
    expect(tap_points(centre, still, 2)[3], torch.tensor([2.0, 7.0]), "tap 3 is straight left")
    expect(tap_points(centre, offset, 3), centre + 3 * _taps() + offset, "offsets are in pixels")


@checks("deformable_convolution.2")
def check_sample_in_groups(sample_in_groups):
    image, points = torch.randn(6, 3, 5), torch.rand(4, 2) * torch.tensor([4.0, 2.0])
    yield "with the same points in both groups nothing is special"
    expect(sample_in_groups(image, torch.stack([points, points])), _sample(image, points))
    yield "each half of the channels reads at its own points"
    other = points.flip(0) + 0.3
    wanted = torch.cat([_sample(image[:3], points), _sample(image[3:], other)], -1)
    expect(sample_in_groups(image, torch.stack([points, other])), wanted, "first half, then second")


@checks("deformable_convolution.3")
def check_deformable_layer(layer):
    x = torch.randn(2, 4, 5, 7)
    yield "it starts as the ordinary convolution of its weight"
    module = layer(4, 6)
    expect(tuple(module.weight.shape), (6, 4, 3, 3), "outputs, inputs, 3, 3")
    expect(module(x), F.conv2d(x, module.weight, padding=1), "zeros, weight and bias; 2 * sigmoid")
    yield "with any offsets and modulations it is torchvision's operation"
    with torch.no_grad():
        for parameter in module.offset.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    offset, score = module.offset(x).split([18, 9], 1)
    wanted = deform_conv2d(x, offset, module.weight, padding=1, mask=2 * score.sigmoid())
    expect(module(x), wanted, "18 channels of offsets, then 9 scores", atol=1e-4)
    yield "the gradient reaches the weight, the offsets and the scores"
    module(x).square().sum().backward()
    for name, parameter, channels in (
        ("the weight", module.weight, slice(None)),
        ("the offsets", module.offset.weight, slice(18)),
        ("the scores", module.offset.weight, slice(18, 27)),
    ):
        reached = parameter.grad is not None and bool(parameter.grad[channels].any())
        expect(reached, True, f"{name} cannot be trained")


@checks("deformable_convolution.4")
def check_offset_gradient(offset_gradient):
    ramp = torch.arange(5.0, -1, -1).expand(1, 4, 6).contiguous()
    yield "on a ramp that falls to the right, a darker target lies to the right"
    gradient = offset_gradient(ramp, ramp - 1, 0.3)
    expect(gradient < 0, True, "the error must fall as dx grows")
    yield "any picture and offset, by finite differences"
    generator = torch.Generator().manual_seed(4)
    picture = torch.randn(1, 5, 9, generator=generator)
    target = torch.randn(1, 5, 9, generator=generator)

    def error(dx):
        offset = torch.zeros(1, 2, 5, 9, dtype=torch.float64)
        offset[:, 1] = dx
        read = deform_conv2d(picture.double()[None], offset, torch.ones(1, 1, 1, 1).double())
        return (read[0] - target).square().mean().item()

    for dx in (0.3, 1.6):
        wanted = (error(dx + 1e-5) - error(dx - 1e-5)) / 2e-5
        expect(offset_gradient(picture, target, dx), wanted, "mean, and x only", atol=1e-3)


class _Layer(nn.Module):
    """The layer, with a mistake: in its start, its modulation, its channels or its gradient."""

    def __init__(self, inputs, outputs, start=0.0, factor=2, scores_first=False, cut=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.offset = nn.Conv2d(inputs, 27, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.constant_(self.offset.bias, start)
        self.factor, self.scores_first, self.cut = factor, scores_first, cut

    def forward(self, x):
        parts = self.offset(x)
        offset, score = parts.split([18, 9], 1)
        if self.scores_first:
            score, offset = parts.split([9, 18], 1)
        offset = offset.detach() if self.cut == "offsets" else offset
        score = score.detach() if self.cut == "scores" else score
        mask = self.factor * score.sigmoid() if self.factor else score * 0 + 1
        return deform_conv2d(x, offset.contiguous(), self.weight, padding=1, mask=mask)


def _gradient(picture, target, dx, axis=1, reduce=torch.mean, sign=1):
    offset = torch.tensor(float(dx), requires_grad=True)
    still = torch.zeros(())
    pair = [still, offset] if axis == 1 else [offset, still]
    places = torch.stack(pair).view(1, 2, 1, 1).expand(1, 2, *picture.shape[1:]).contiguous()
    read = deform_conv2d(picture[None], places, torch.ones(1, 1, 1, 1))[0]
    (gradient,) = torch.autograd.grad(reduce((read - target).square()), offset)
    return sign * gradient.item()


WRONG = {
    "deformable_convolution.1": [
        ("offsets dilated too", lambda c, o, d: c + d * (_taps() + o)),
        ("column by column", lambda c, o, d: c + d * _taps(by_column=True) + o),
        ("dilation forgotten", lambda c, o, d: c + _taps() + o),
    ],
    "deformable_convolution.2": [
        ("the same points for both", lambda image, p: _sample(image, p[0])),
        (
            "groups swapped",
            lambda image, p: torch.cat([_sample(image[:3], p[1]), _sample(image[3:], p[0])], -1),
        ),
        (
            "interleaved channels",
            lambda image, p: torch.cat([_sample(image[::2], p[0]), _sample(image[1::2], p[1])], -1),
        ),
    ],
    "deformable_convolution.3": [
        ("the sigmoid alone", lambda i, o: _Layer(i, o, factor=1)),
        ("no modulation", lambda i, o: _Layer(i, o, factor=0)),
        ("scores before offsets", lambda i, o: _Layer(i, o, scores_first=True)),
        ("offsets detached", lambda i, o: _Layer(i, o, cut="offsets")),
        ("scores detached", lambda i, o: _Layer(i, o, cut="scores")),
        ("a start that is not zero", lambda i, o: _Layer(i, o, start=0.5)),
    ],
    "deformable_convolution.4": [
        ("y moved instead of x", lambda a, b, dx: _gradient(a, b, dx, axis=0)),
        ("the sum instead of the mean", lambda a, b, dx: _gradient(a, b, dx, reduce=torch.sum)),
        ("the wrong sign", lambda a, b, dx: _gradient(a, b, dx, sign=-1)),
    ],
}
