"""Checkers of chapter looking, "What does it look at?"."""

from contextlib import nullcontext

import torch

from deformable_detr.exercises import checks, expect
from deformable_detr.look.gradients import FollowReferences


@checks("looking.1")
def check_share_inside(share_inside):
    points = torch.tensor([[0.2, 0.6], [0.7, 0.6], [0.3, 0.9]]).view(1, 1, 3, 2)
    weights = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 3)
    yield "one head, one level, three points"
    hint = "sum the weights of the points inside, do not count points"
    expect(float(share_inside(points, weights, (0.1, 0.1, 0.65, 0.65))), 0.5, hint)
    yield "x is compared with left and right, y with top and bottom"
    hint = "boxes are (left, top, right, bottom), points (x, y)"
    expect(float(share_inside(points, weights, (0.1, 0.5, 0.4, 1.0))), 0.7, hint)
    expect(float(share_inside(points, weights, (0.5, 0.1, 0.8, 0.4))), 0.0, hint)
    yield "edges are inside"
    corner = torch.tensor([0.25, 0.75]).view(1, 1, 1, 2)
    for box in ((0.25, 0.5, 0.5, 1.0), (0.0, 0.5, 0.25, 0.75)):
        expect(float(share_inside(corner, torch.ones(1, 1, 1), box)), 1.0, "at least, and at most")
    yield "a share of the whole: heads together have the weight M"
    locations = torch.rand(3, 2, 5, 2) * 1.4 - 0.2
    logits = torch.randn(3, 10).softmax(-1).view(3, 2, 5)
    box = (0.2, -0.1, 0.9, 0.7)
    low, high = torch.tensor(box).split(2)
    inside = ((locations >= low) & (locations <= high)).all(-1)
    hint = "weights sum to one in each head, so to M in all"
    expect(float(share_inside(locations, logits, box)), (logits * inside).sum().item() / 3, hint)
    expect(float(share_inside(locations, logits, (-9, -9, 9, 9))), 1.0, hint)


@checks("looking.2")
def check_gradient_picture(gradient_picture):
    yield "the norm over colours"
    weights = torch.randn(3, 4, 6)
    image = torch.randn(3, 4, 6)
    before = image.clone()
    norm, _ = gradient_picture(lambda x: (weights * x).sum(), image, 0.5)
    expect(
        norm, weights.norm(dim=0), "the gradient of a sum of w * pixel is w: its norm over axis 0"
    )
    yield "the fewest pixels that hold the share of the energy"
    amounts = torch.tensor([[1.0, 3.0, 0.0], [2**0.5, 0.0, 2.0]])  # energies 1, 9, 0, 2, 0, 4
    for share, count in ((0.5, 1), (0.6, 2), (0.9, 3), (1.0, 4)):
        _, mask = gradient_picture(lambda x: (amounts * x[1]).sum(), torch.zeros(3, 2, 3), share)
        hint = f"for a share of {share} of energies 9, 4, 2 and 1 one needs {count} pixels"
        expect(mask.double(), (amounts**2 > (4.5, 3, 1.5, 0.5)[count - 1]).double(), hint)
    yield "references are followed"
    norm, _ = gradient_picture(lambda x: x.detach().sum() + x[0].sum(), torch.zeros(3, 2, 5), 0.5)
    expect(norm, torch.full((2, 5), 6**0.5), "detach must do nothing while item_of runs")
    yield "the image is as it was"
    expect(bool(torch.equal(image, before)) and not image.requires_grad, True, "work on a clone")


@checks("looking.3")
def check_smooth_gradient(smooth_gradient):
    yield "without noise it is the gradient's norm"
    image = torch.randn(3, 2, 5)
    hint = "the gradient of half the sum of squares is the image itself"
    expect(smooth_gradient(lambda x: x.square().sum() / 2, image, 0.0, 3), image.norm(dim=0), hint)
    yield "gradients cancel in the mean, before the norm is taken"
    given = smooth_gradient(lambda x: x.square().sum() / 2, torch.zeros(3, 2, 5), 0.5, 2000)
    hint = "each copy has noise of its own, and the mean is of gradients, not of norms"
    expect(given, torch.zeros(2, 5), hint, atol=0.1)
    yield "the noise is in the image, and as large as asked"
    given = smooth_gradient(lambda x: (x[0] ** 3).sum() / 3, torch.zeros(3, 2, 5), 0.5, 4000)
    expect(given, torch.full((2, 5), 0.25), "the mean of noise squared is 0.5 squared", atol=0.04)
    yield "references are followed"
    given = smooth_gradient(lambda x: x.detach().sum(), torch.zeros(3, 2, 5), 0.5, 2)
    expect(given, torch.full((2, 5), 3**0.5), "detach must do nothing while item_of runs")


@checks("looking.4")
def check_borrow(borrow):
    points, boxes = torch.randn(4, 5, 2), torch.tensor([[0.0, 0, 2, 4]]).repeat(4, 1)
    yield "from oneself: nothing changes"
    expect(borrow(points, boxes, torch.arange(4)), points)
    yield "from a box of another size"
    points = torch.tensor([[[1.0, 1.0]], [[30.0, 60.0]]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 4.0], [20.0, 60.0, 40.0, 90.0]])
    given = borrow(points, boxes, torch.tensor([1, 0]))
    hint = "(1, 1) is the middle in x and a quarter down: in the other box this is (30, 67.5)"
    expect(given, torch.tensor([[[1.0, 0.0]], [[30.0, 67.5]]]), hint)
    yield "row i borrows from lender[i], also when three go round"
    low = torch.rand(3, 2)
    boxes = torch.cat([low, low + 0.5 + torch.rand(3, 2)], 1)
    points, lender = torch.randn(3, 2, 2), torch.tensor([1, 2, 0])
    hint = "the points of lender[i], in the box of i"
    expect(borrow(points, boxes, lender), _borrowed(points, boxes, lender), hint)


def _borrowed(points, boxes, lender):
    low, high = boxes[:, None].split(2, -1)
    return low + ((points - low) / (high - low))[lender] * (high - low)


def _moved_only(points, boxes, lender):
    low = boxes[:, None, :2]
    return low + (points - low)[lender]


def _width_for_both(points, boxes, lender):
    low, width = boxes[:, None, :2], (boxes[:, 2] - boxes[:, 0])[:, None, None]
    return low + ((points - low) / width)[lender] * width


def _gradient(item_of, image, follow=True):
    pixels = image.clone().requires_grad_(True)
    with FollowReferences() if follow else nullcontext():
        item = item_of(pixels)
    return torch.autograd.grad(item, pixels)[0] if item.requires_grad else torch.zeros_like(image)


def _picture(item_of, image, share, amount=torch.square, follow=True, over=torch.norm):
    norm = over(_gradient(item_of, image, follow), dim=0)
    energy, order = amount(norm).flatten().sort(descending=True)
    mask = torch.zeros(norm.numel(), dtype=torch.bool)
    mask[order[: int((energy.cumsum(0) < share * energy.sum()).sum()) + 1]] = True
    return norm, mask.view(norm.shape)


def _above_share_of_largest(item_of, image, share):
    norm = _gradient(item_of, image).norm(dim=0)
    return norm, norm >= share * norm.max()


def _changes_the_image(item_of, image, share):
    found = _picture(item_of, image, share)
    image.requires_grad_(True)
    return found


def _smooth(item_of, image, noise, copies, follow=True, same=False, norms=False):
    gradients, added = [], torch.randn_like(image)
    for _ in range(copies):
        added = added if same else torch.randn_like(image)
        gradients.append(_gradient(item_of, image + noise * added, follow))
    gradients = torch.stack(gradients)
    return gradients.norm(dim=1).mean(0) if norms else gradients.mean(0).norm(dim=0)


def _noise_on_the_gradient(item_of, image, noise, copies):
    gradient = _gradient(item_of, image)
    return (gradient + noise * torch.randn(copies, *image.shape).mean(0)).norm(dim=0)


def _strictly(points, box):
    low, high = torch.tensor(box).split(2)
    return ((points > low) & (points < high)).all(-1)


def _inside(locations, box, swapped=False):
    low, high = torch.tensor(box).float().split(2)
    places = locations.flip(-1) if swapped else locations
    return ((places >= low) & (places <= high)).all(-1)


WRONG = {
    "looking.1": [
        ("points counted", lambda x, a, box: _inside(x, box).float().mean()),
        ("heads summed", lambda x, a, box: (a * _inside(x, box)).sum()),
        ("x and y swapped", lambda x, a, box: (a * _inside(x, box, True)).sum() / len(a)),
        ("edges are outside", lambda x, a, box: (a * _strictly(x, box)).sum() / len(a)),
    ],
    "looking.2": [
        ("summed over colours", lambda f, x, s: _picture(f, x, s, over=torch.sum)),
        ("share of the norm", lambda f, x, s: _picture(f, x, s, amount=lambda norm: norm)),
        ("share of the largest", _above_share_of_largest),
        ("the gradient is cut", lambda f, x, s: _picture(f, x, s, follow=False)),
        ("the image is changed", _changes_the_image),
    ],
    "looking.3": [
        ("mean of norms", lambda f, x, n, c: _smooth(f, x, n, c, norms=True)),
        ("the same noise for all", lambda f, x, n, c: _smooth(f, x, n, c, same=True)),
        ("noise on the gradient", _noise_on_the_gradient),
        ("a variance", lambda f, x, n, c: _smooth(f, x, n**2, c)),
        ("the gradient is cut", lambda f, x, n, c: _smooth(f, x, n, c, follow=False)),
    ],
    "looking.4": [
        ("only moved", _moved_only),
        ("the width for both", _width_for_both),
        ("lent to, not from", lambda p, b, lender: _borrowed(p, b, lender.argsort())),
        ("nothing borrowed", lambda p, b, lender: p),
    ],
}
