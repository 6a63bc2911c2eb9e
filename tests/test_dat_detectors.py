"""DAT as a backbone: of every detector here, by the ordinary command, and of torchvision's."""

import json

import pytest
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.backbones import BACKBONES
from deformable_detr.backbones.dat import CONFIGS, DATConfig
from deformable_detr.backbones.dat_fpn import dat_fpn
from deformable_detr.cli import main
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import MODELS, build_model
from deformable_detr.training.optimiser import freeze
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.recipes import NAMES
from deformable_detr.weights.ours import load_model
from tests.conftest import write_coco
from tests.members import make_batch, tiny

# windows of 2 pixels, and tables for an image of 64, whose stages have 16, 8, 4 and 2
SMALL = DATConfig(8, ("WS", "WS", "WD", "WD"), (1, 2, 4, 8), (1, 1, 2, 4), 2, 64)


@pytest.fixture
def small_backbone(monkeypatch):
    """SMALL in the place of dat_tiny."""
    monkeypatch.setitem(CONFIGS, "dat_tiny", SMALL)


# The library's


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_backbone")
def test_every_detector_trains_on_it(name):
    """On images of unlike sizes; what is computed again gives the same gradients, and what is
    frozen gets none."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(tiny(name, backbone="dat_tiny")).train()
        model.set_gradient_checkpointing(checkpointing)
        freeze(model.backbone, ("stem", "stage1"))
        batch = make_batch(2, 1)
        sum(SetCriterion()(model(batch), batch.targets).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    learned = {name.split(".")[2] for name in gradients[0] if name.startswith("backbone.body.")}
    assert learned == {"stage2", "stage3", "stage4"}
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_backbone")
def test_every_detector_detects_with_it(name):
    torch.manual_seed(0)
    model = build_model(tiny(name, backbone="dat_tiny")).eval()
    assert model.backbone.strides == [8, 16, 32] and model.backbone.channels == [16, 32, 64]
    with torch.no_grad():
        output = model(make_batch(2, 1, 0))
    logits, boxes = output.logits, output.boxes
    assert logits.shape[:2] == boxes.shape[:2] == (3, model.config.num_queries)
    assert logits.isfinite().all() and ((boxes >= 0) & (boxes <= 1)).all()


@pytest.mark.usefixtures("small_backbone")
def test_a_training_by_the_command(tmp_path):
    root, out = tmp_path / "data", tmp_path / "run"
    write_coco(root, images=8, side=64)
    arguments = ["train", str(root), "--output", str(out), "--recipe", "digits", "--epochs", "1"]
    changes = 'model.backbone="dat_tiny"', 'train.frozen=["stem", "stage1"]'
    for change in (*changes, "train.gradient_checkpointing=true"):
        arguments += ["--set", change]
    assert main(arguments) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in log)
    model, _ = load_model(out / "last.safetensors")
    assert model.config.backbone == "dat_tiny" and model.backbone.config == SMALL


@pytest.mark.parametrize("recipe", [name for name in NAMES if not name.startswith("digits")])
def test_every_recipe_can_have_it(recipe):
    changed = load_recipe(recipe).changed(['model.backbone="dat_tiny"'])
    with torch.device("meta"):
        model = build_model(changed.model_config(3))
    assert model.backbone.config == CONFIGS["dat_tiny"]


def test_every_dat_is_a_backbone_of_detectors():
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            model = DeformableDETR(DeformableDETRConfig(backbone=name))
        assert name in BACKBONES and model.backbone.strides == [8, 16, 32]
        assert model.backbone.channels == [config.embed_dim * n for n in (2, 4, 8)]
    with pytest.raises(ValueError, match=r"has no \['conv1'\] to freeze; it has \['stem', 'stage1"):
        freeze(model.backbone, ("conv1",))


# torchvision's


def torchvisions(kind):
    """A small one of its detectors, with three classes."""
    torch.manual_seed(0)
    if kind is RetinaNet:
        backbone = dat_fpn(SMALL, 3, LastLevelP6P7(256, 256))
        options = {"anchor_generator": _default_anchorgen()}
    else:
        backbone = dat_fpn(SMALL)
        options = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
    return kind(backbone, num_classes=3, min_size=64, max_size=96, **options)


@pytest.mark.parametrize("frozen", [(), ("stem", "stage1", "stage2")])
@pytest.mark.parametrize("kind", [RetinaNet, FasterRCNN, MaskRCNN])
def test_torchvisions_detectors(kind, frozen):
    """A training step and a forward, on images of unlike sizes that no stride divides."""
    model = torchvisions(kind)
    freeze(model.backbone.backbone, frozen)
    images = [torch.rand(3, 61, 70), torch.rand(3, 64, 51)]
    box = torch.tensor([[4.0, 4, 40, 44]])
    mask = torch.zeros(2, 1, 70, 70, dtype=torch.uint8)
    target = [
        {"boxes": box, "labels": torch.tensor([1]), "masks": m[:, : x.shape[1], : x.shape[2]]}
        for m, x in zip(mask, images, strict=True)
    ]
    sum(model(images, target).values()).backward()
    still = {n for n, p in model.backbone.backbone.body.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in still} == set(frozen)
    found = model.eval()([*images, torch.rand(3, 200, 97)])
    assert len(found) == 3
    for image, each in zip([*images, torch.rand(3, 200, 97)], found, strict=True):
        assert each["boxes"].shape[1] == 4 and len(each["scores"]) == len(each["boxes"])
        if kind is MaskRCNN:
            assert each["masks"].shape[1:] == (1, *image.shape[1:])


def test_strides_of_the_pyramid():
    maps = dat_fpn(SMALL)(torch.rand(1, 3, 65, 96))
    sizes = {name: tuple(x.shape[1:]) for name, x in maps.items()}
    assert sizes.pop("pool") == (256, 2, 2)
    assert sizes == {
        "0": (256, 17, 24),
        "1": (256, 9, 12),
        "2": (256, 5, 6),
        "3": (256, 3, 3),
    }
