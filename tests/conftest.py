"""A small COCO-format data set, made afresh for each test that asks, and a browser."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from deformable_detr.models import DeformableDETRConfig, DETRConfig

TINY = DeformableDETRConfig(
    num_classes=3,
    num_queries=6,
    backbone="small",
    num_levels=2,
    embed_dim=32,
    num_heads=2,
    num_points=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    dropout=0.1,
    refine=True,
)
TINY_DETR = DETRConfig(
    num_classes=3,
    num_queries=6,
    backbone="small",
    embed_dim=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    dropout=0.1,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",  # its own sandbox needs rights that a container does not give
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_addoption(parser):
    parser.addoption("--kernel", help="a file for tests/test_own_kernel.py: your CUDA kernel")


def write_coco(root, split="train", images=6, side=48):
    """Coloured squares on grey; category ids 3, 7 and 20; the last image has no box."""
    rng = np.random.default_rng(0)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": 20, "name": "blue"},
            {"id": 3, "name": "red"},
            {"id": 7, "name": "green"},
        ],
    }
    for i in range(images):
        pixels = np.full((side, side + 16, 3), 128, np.uint8)
        key = 100 + i
        content["images"].append(
            {"id": key, "file_name": f"{key}.png", "width": side + 16, "height": side}
        )
        if i < images - 1:
            x, y, label = rng.integers(0, 28), rng.integers(0, 28), i % 3
            pixels[y : y + 16, x : x + 20] = np.eye(3)[label] * 255
            content["annotations"].append(
                {
                    "id": 1000 + i,
                    "image_id": key,
                    "category_id": [3, 7, 20][label],
                    "bbox": [int(x), int(y), 20, 16],
                    "area": 320,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / split / f"{key}.png")
    save_annotations(root, content, split)
    return content


def save_annotations(root, content, split="train"):
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    """The folder of a data set with train and val."""
    root = tmp_path / "coco"
    write_coco(root)
    write_coco(root, "val", images=4)
    return root


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def chromium():
    """Headless Chromium: the machine's, installed from Debian where that is allowed. Playwright's
    loop runs until the module ends, and no second one can start beside it: use this one."""
    from playwright.sync_api import Error, sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not find_browser() and root and shutil.which("apt-get"):
        for command in ("update", "install -y --no-install-recommends chromium"):
            subprocess.run(["apt-get", *command.split()], capture_output=True, check=False)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        except Error as error:
            pytest.skip(f"no Chromium here to open a page with: {error.message.splitlines()[0]}")
        yield browser
        browser.close()
