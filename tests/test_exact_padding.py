"""The option exact_padding: an image is seen alike, whatever it shares a batch with."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from deformable_detr import Batch, DeformableDETR
from deformable_detr.models.exact_tokens import ExactTokens, norm_inside
from deformable_detr.weights.formats import to_huggingface, to_official
from deformable_detr.weights.ours import load_model, save_model
from tests.conftest import TINY

EXACT = dataclasses.replace(TINY, exact_padding=True)


def padded(x, height, width, value=7.0):
    """x, (..., H, W), at the top left of a larger one."""
    h, w = x.shape[-2:]
    return torch.nn.functional.pad(x, (0, width - w, 0, height - h), value=value)


def test_the_norm_is_that_of_the_image_alone():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 8).double()
    torch.nn.init.normal_(norm.weight)
    image = torch.randn(1, 8, 5, 7).double() * 3 + 40
    mask = padded(torch.zeros(1, 5, 7), 9, 8, 1.0).bool()
    found = norm_inside(norm, padded(image, 9, 8), mask)
    # computed in float32, from numbers around 40
    torch.testing.assert_close(found[..., :5, :7], norm(image), atol=2e-5, rtol=0)
    alone = norm_inside(norm, image, torch.zeros(1, 5, 7, dtype=torch.bool))
    torch.testing.assert_close(alone, norm(image), atol=2e-5, rtol=0)


def test_the_projections_are_those_of_the_image_alone():
    """Of one map, level by level; by default padding has its part in them."""
    torch.manual_seed(0)
    mask = padded(torch.zeros(1, 32, 48), 48, 80, 1.0).bool()
    maps = [torch.randn(1, c, 32 // s, 48 // s) for c, s in ((64, 8), (96, 16))]
    larger = [padded(maps[0], 6, 10), padded(maps[1], 3, 5)]
    for config, same in ((EXACT, True), (TINY, False)):
        neck = DeformableDETR(config).neck
        for level in range(2):
            shape = maps[level].shape[-2:]
            alone = neck.project(level, maps[level], torch.zeros(1, 32, 48, dtype=torch.bool))
            found = neck.project(level, larger[level], mask)[..., : shape[0], : shape[1]]
            assert torch.allclose(found, alone, atol=1e-5) == same


def test_places_are_reckoned_in_pixels():
    """57 x 33 pixels at strides 8, 16 and 32: 8, 4, 2 cells across and 5, 3, 2 down."""
    config = dataclasses.replace(EXACT, num_levels=4)
    neck = DeformableDETR(config).neck
    assert isinstance(neck, ExactTokens) and neck.strides == [4, 8, 16, 32]
    mask = padded(torch.zeros(1, 33, 57), 40, 100, 1.0).bool()
    maps = [torch.randn(1, c, -(-40 // s), -(-100 // s)) for c, s in ((32, 4), (64, 8), (96, 16))]
    tokens = neck(maps, mask)
    assert tokens.spatial_shapes == [(10, 25), (5, 13), (3, 7), (2, 4)]
    expected = [[57 / (25 * 4), 33 / 40], [57 / 104, 33 / 40], [57 / 112, 33 / 48]]
    expected.append([57 / 128, 33 / 64])
    torch.testing.assert_close(tokens.valid_ratios[0], torch.tensor(expected))


def test_how_much_of_a_map_an_image_takes_up_does_not_depend_on_the_batch():
    """Of 57 x 45 pixels, alone or beside a larger picture: as many cells; by default up to one more
    or less, which moves every box in it."""
    image, other = torch.randn(3, 45, 57), torch.randn(3, 98, 114)
    differences = []
    for config in (TINY, EXACT):
        model = DeformableDETR(dataclasses.replace(config, num_levels=3)).eval()
        cells = []
        for images in ([image], [image, other]):
            tokens = model.tokens(Batch.from_images(images))
            sizes = torch.tensor([(w, h) for h, w in tokens.spatial_shapes])
            cells.append(tokens.valid_ratios[0] * sizes)
        differences.append((cells[0] - cells[1]).abs().max().item())
    assert differences[0] >= 1 and differences[1] < 1e-5


def test_it_has_the_same_tensors_and_travels_in_our_file_alone(tmp_path):
    model = DeformableDETR(EXACT)
    assert model.state_dict().keys() == DeformableDETR(TINY).state_dict().keys()
    save_model(model, tmp_path / "a.safetensors", [{"id": i, "name": str(i)} for i in range(3)])
    assert load_model(tmp_path / "a.safetensors")[0].config.exact_padding
    published = DeformableDETR(dataclasses.replace(EXACT, backbone="resnet18", num_levels=4))
    for export in (to_official, to_huggingface):
        with pytest.raises(ValueError, match="exact_padding must be False to be exported"):
            export(published)


def test_it_learns():
    model = DeformableDETR(EXACT).train()
    batch = Batch.from_images([torch.randn(3, 45, 57), torch.randn(3, 64, 40)])
    output = model(batch)
    (output.logits.sum() + output.boxes.sum()).backward()
    for convolution, norm in model.neck.input_proj:
        assert convolution.weight.grad.abs().sum() > 0 and norm.weight.grad.isfinite().all()


def test_stored_figures():
    """Measured by benchmarks/mixed_sizes.py, and told in the README."""
    root = Path(__file__).parents[1]
    ap = json.loads((root / "data" / "results" / "mixed_sizes.json").read_text())["ap"]
    trained, exact = ap["as trained"], ap["exact_padding"]
    assert trained["one by one"] == trained["8 of one size"]
    assert trained["one by one"] > trained["8 as they come, padded"] + 0.05
    assert min(exact.values()) > max(trained.values()) + 0.1
    assert max(exact.values()) - min(exact.values()) < 0.01
    readme = (root / "README.md").read_text("utf-8")
    told = trained["one by one"], trained["8 as they come, padded"], exact["one by one"]
    assert all(f"{value:.3f}" in readme for value in told)
