"""What the chapters on sampling and attention say and cannot test in a cell of their own."""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import chapters as tool
from deformable_detr.exercises import verdicts
from deformable_detr.layers.sampling import bilinear_sample, pixel_to_normalised

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"


def typed_out(chapter, *names):
    """What the chapter's cells that bind these names bind, run by themselves."""
    namespace = {"torch": torch, "F": F, "nn": nn, "math": math}
    for cell in tool.read_source(CHAPTERS / chapter).cells:
        if cell.cell_type == "code" and any(
            re.search(rf"^(?:(?:def|class) {name}\b|{name}\b.*=)", cell.source, re.M)
            for name in names
        ):
            exec(cell.source, namespace)
    return [namespace[name] for name in names]


def test_the_readers_sampler_has_the_librarys_gradient_on_pixel_centres():
    """With weights of the form 1 - |x - column| autograd loses half of it there, and a point that
    starts on a pixel walks away from the light."""
    (sample,) = typed_out("01_sampling.py", "sample")
    feature_map = torch.randn(3, 4, 7, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(-1, 5), torch.arange(-1, 8), indexing="ij")
    pixels = torch.stack([columns, rows], -1).reshape(-1, 2).double().requires_grad_()
    ours = sample(feature_map, pixels)
    library = bilinear_sample(feature_map, pixel_to_normalised(pixels, (4, 7)))
    torch.testing.assert_close(ours, library)
    mix = torch.randn(ours.shape, dtype=torch.float64)
    (by_reader,) = torch.autograd.grad((ours * mix).sum(), pixels)
    exact = slopes_to_the_right_and_below(feature_map, pixels.detach(), mix)
    torch.testing.assert_close(by_reader, exact)


def slopes_to_the_right_and_below(feature_map, pixels, mix):
    """Differences of pixels, with zeros around the map."""
    wide = F.pad(feature_map, (2, 2, 2, 2))
    x, y = (pixels.long() + 2).unbind(-1)
    here, right, below = wide[:, y, x], wide[:, y, x + 1], wide[:, y + 1, x]
    return torch.stack([((right - here).T * mix).sum(1), ((below - here).T * mix).sum(1)], -1)


def test_heads_may_be_split_by_view():
    """To split one axis never needs a copy, so `view` is no mistake; to merge them again may."""

    def split_heads(x, num_heads):
        return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)

    found = verdicts("attention.2", split_heads)
    assert all(verdict.passed for verdict in found), found


def test_adding_weights_by_kind_of_cell_is_attention_over_all_cells():
    chapter = "03_attention_on_images.py"
    _, draw_maps, make_finder = typed_out(chapter, "SHAPES", "draw_maps", "Finder")
    finder = make_finder()
    content, _ = draw_maps(50, torch.Generator().manual_seed(0), count=4)
    x, queries = finder.kinds[content], finder.queries.expand(4, -1, -1)
    plain = F.scaled_dot_product_attention(finder.U(queries), finder.V(x), finder.W_prime(x))
    torch.testing.assert_close(finder(content)[0], finder.name_colour(finder.W(plain)))
