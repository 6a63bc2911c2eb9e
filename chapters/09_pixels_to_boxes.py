# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # {{n}}. From pixels to boxes
#
# You will be able to
# - **follow** one image through Deformable DETR and say the shape of every tensor on the way,
# - **explain** what a query is, where its reference point comes from, and why boxes are predicted
#   through an inverse sigmoid,
# - **compute** by hand the focal loss, the GIoU, the matching and the total loss,
# - **say** where the background class went, why scores start at 0.01, and why there is no NMS,
# - **assemble** the detector from its parts and prove that it equals the library's.
#
# You should know: multi-scale deformable attention, valid ratios and padding ({{chapter many_scales}}), and dense
# attention ({{chapter attention}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A detector turns an image into a list: this class, this box, this sure. Deformable DETR
# {cite}`zhu2021deformable` does so in seven steps. We take them one at a time, with real images and
# random weights; {{chapter training}} trains.
#
# | step | out comes | shape |
# |:--|:--|:--|
# | batch | images and mask | $(B, 3, H, W)$ and $(B, H, W)$ |
# | backbone | feature maps at three strides | $(B, \cdot, H_l, W_l)$ |
# | projection | $L$ levels of one width $C$, flattened | $(B, S, C)$ |
# | encoder | every token after asking around itself: the *memory* | $(B, S, C)$ |
# | decoder | $Q$ queries after asking the memory | $(B, Q, C)$ |
# | heads | a logit for each class, a box | $(B, Q, \text{classes})$ and $(B, Q, 4)$ |
# | matching and loss, or post-processing | a number to train on, or detections | |

# %%
import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from deformable_detr.exercises import check

plt.style.use("book.mplstyle")

# %% [markdown]
# ## {{n}}.1 A batch: two images of different size
#
# Two of the committed pictures: handwritten digits in scenes, 128 × 128 pixels. Their annotations
# are in COCO's format {cite}`lin2014coco`, as a JSON file.

# %%
samples = Path("../data/samples")
coco = json.loads((samples / "annotations.json").read_text(encoding="utf-8"))
file_of = {image["id"]: image["file_name"] for image in coco["images"]}
print([(category["id"], category["name"]) for category in coco["categories"]])

# %% [markdown]
# The file's category ids are names, not numbers to count with. Here they start at 1; COCO's own run
# from 1 to 90 with ten gaps. Inside the model a class is its **position** in the sorted list, from
# 0, without gaps.

# %%
categories = sorted(category["id"] for category in coco["categories"])
class_of = {category_id: index for index, category_id in enumerate(categories)}
digits = [category["name"] for category in sorted(coco["categories"], key=lambda c: c["id"])]
num_classes = len(categories)
assert class_of[1] == 0 and class_of[10] == 9 and num_classes == 10

# %% [markdown]
# We cut the pictures to two different sizes, neither of them square, so that no mix-up of height
# and width can hide. Pixels are normalised by ImageNet's mean and standard deviation, boxes become
# `cxcywh`, relative to the image.

# %%
from deformable_detr.structures import Batch, Target

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def load(image_id, top, left, height, width):
    """A cut of an image, (3, height, width), and its Target."""
    pixels = Image.open(samples / file_of[image_id]).convert("RGB")
    pixels = pixels.crop((left, top, left + width, top + height))
    image = pil_to_tensor(pixels) / 255
    boxes, labels = [], []
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]  # left, top, width, height in pixels
        x, y = x - left, y - top
        if annotation["image_id"] == image_id and min(x, y, width - x - w, height - y - h) >= 0:
            boxes.append([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
            labels.append(class_of[annotation["category_id"]])
    # image_id, labels, boxes (cx, cy, w, h) as parts of the image, its size before any change
    target = Target(image_id, torch.tensor(labels), torch.tensor(boxes), (height, width))
    return (image - MEAN) / STD, target


# %%
first, first_target = load(3, top=10, left=0, height=88, width=104)
second, second_target = load(2, top=0, left=0, height=72, width=120)
print("images ", tuple(first.shape), tuple(second.shape))
print("digits ", *[[digits[i] for i in t.labels] for t in (first_target, second_target)])
print("boxes  ", tuple(first_target.boxes.shape), tuple(second_target.boxes.shape))

# %% [markdown]
# **Before you run**: the two images are 88 × 104 and 72 × 120 (height × width). One tensor must
# hold both. What is its size?

# %%
height, width = max(first.shape[1], second.shape[1]), max(first.shape[2], second.shape[2])
images = torch.zeros(2, 3, height, width)
mask = torch.ones(2, height, width, dtype=torch.bool)  # True on padding
for i, image in enumerate((first, second)):
    h, w = image.shape[1:]
    images[i, :, :h, :w] = image
    mask[i, :h, :w] = False
print(tuple(images.shape), tuple(mask.shape))
assert images.shape == (2, 3, 88, 120)  # the size of neither image

# %% [markdown]
# Padding goes to the right and to the bottom, so that pixel (0, 0) stays where it was. The mask
# remembers what is padding. In the library:

# %%
batch = Batch.from_images([first, second], [first_target, second_target])
assert torch.equal(batch.images, images) and torch.equal(batch.mask, mask)
print(batch.sizes.tolist())


# %%
def picture(image):
    """(3, H, W) normalised to (H, W, 3) in [0, 1], as matplotlib wants it."""
    return (image * STD + MEAN).clamp(0, 1).permute(1, 2, 0)


def draw_boxes(axis, boxes, size, color, style="-"):
    """Boxes (N, 4) cxcywh, normalised, on an image of size (H, W)."""
    for cx, cy, w, h in boxes.tolist():
        x, y = (cx - w / 2) * size[1], (cy - h / 2) * size[0]
        shape = (size[1] * w, size[0] * h)
        axis.add_patch(Rectangle((x, y), *shape, fill=False, ec=color, ls=style, lw=1.8))


def show(axis, i):
    """Image i of the batch with its padding, in pixel coordinates."""
    padded = torch.where(mask[i, ..., None], torch.tensor(0.75), picture(images[i]))
    axis.imshow(padded.numpy(), extent=(0, width, height, 0))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[0, 40, 80, 120], yticks=[0, 40, 80])


# %% mystnb={"image": {"alt": "Two pictures with handwritten digits, each with a rectangle around every digit. The first fills its frame to the bottom but not to the right, the second fills it to the right but not to the bottom; the rest is grey padding."}}
figure, axes = plt.subplots(1, 2)
for i, (axis, target) in enumerate(zip(axes, batch.targets, strict=True)):
    show(axis, i)
    draw_boxes(axis, target.boxes, target.original_size, "C4")
    axis.set_title(f"image {i}: {len(target.boxes)} digits, {mask[i].float().mean():.0%} padding")
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: one batch, two images. The first lacks columns, the second lacks rows;
# where the mask is True we painted grey (the tensor holds zeros there). Boxes are relative to the
# image without padding.*

# %%
for i, target in enumerate(batch.targets):  # no padding inside a box
    for cx, cy, w, h in target.boxes.tolist():
        H, W = target.original_size
        box = (slice(int((cy - h / 2) * H), int((cy + h / 2) * H)), int((cx + w / 2) * W) - 1)
        assert not mask[i][box].any()
assert mask[0, 0, -1] and not mask[0, -1, 0] and mask[1, -1, 0] and not mask[1, 0, -1]

# %% [markdown]
# ## {{n}}.2 Feature maps from the backbone
#
# A small model, so that everything runs at once. $(B, Q, M, L, K, C) = (2, 25, 6, 4, 3, 96)$, all
# different, so that a mix-up would show. The paper's model is the same with other numbers.

# %%
from deformable_detr import DeformableDETR, DeformableDETRConfig

config = DeformableDETRConfig(
    num_classes=num_classes, num_queries=25, backbone="small", num_levels=4, embed_dim=96,
    num_heads=6, num_points=3, encoder_layers=2, decoder_layers=3, ffn_dim=160, dropout=0.0,
)  # fmt: skip
torch.manual_seed(8)
model = DeformableDETR(config).eval()
B, Q, L, C = len(batch), config.num_queries, config.num_levels, config.embed_dim
_ = torch.set_grad_enabled(False)  # we look; training comes at the end

# %% [markdown]
# `model` is here to lend us its parts: `backbone`, `neck` (sections {{n}}.3 to 8.5), `encoder`, `decoder`
# and heads. We call each part ourselves, and in the end put them together again.
#
# **Before you run**: a convolution of stride 2 halves a map and rounds up. Strides of 4, 8 and 16
# on 88 × 120 give which sizes?

# %%
maps = model.backbone(images)
for stride, feature_map in zip(model.backbone.strides, maps, strict=True):
    print("stride", stride, tuple(feature_map.shape))
    assert feature_map.shape[2:] == (math.ceil(88 / stride), math.ceil(120 / stride))

# %% [markdown]
# Three maps of three widths: 32, 64 and 96 channels. (In a ResNet-50 {cite}`he2016resnet` the
# strides are 8, 16 and 32, and the widths 512, 1024 and 2048; our digits are small, so our small
# backbone ends one halving earlier.) Attention across levels needs **one** width.
#
# ## {{n}}.3 One width, and one level more
#
# A 1 × 1 convolution is a matrix applied to every cell. By hand for one cell, row 4, column 7 of
# image 1:

# %%
convolution, normalisation = model.neck.input_proj[0]
by_hand = convolution.weight[:, :, 0, 0] @ maps[0][1, :, 4, 7] + convolution.bias
projected = convolution(maps[0])
assert torch.allclose(by_hand, projected[1, :, 4, 7], atol=1e-5)
print(tuple(maps[0].shape), "->", tuple(projected.shape))

# %% [markdown]
# Group norm follows: 32 groups of channels, each with mean 0 and variance 1 over its channels and
# all places of one image. With 96 channels a group has three. Group 5 of image 1 by hand:

# %%
group = projected[1, 15:18]
by_hand = (group - group.mean()) / (group.var(unbiased=False) + 1e-5).sqrt()
assert torch.allclose(by_hand, normalisation(projected)[1, 15:18], atol=1e-5)

# %% [markdown]
# The fourth level comes from a 3 × 3 convolution of stride 2 on the backbone's **last map**, before
# that map was projected (Appendix A.2). There is no feature pyramid (a path down
# that adds coarse maps to fine ones): multi-scale attention carries
# information between levels itself.


# %%
def project(maps, projections):
    """Backbone maps to L levels (B, C, H_l, W_l); projections beyond the maps halve the last."""
    levels = [p(m) for p, m in zip(projections[: len(maps)], maps, strict=True)]
    last = maps[-1]
    for projection in projections[len(maps) :]:
        last = projection(last)
        levels.append(last)
    return levels


# %%
levels = project(maps, model.neck.input_proj)
shapes = [tuple(level.shape[-2:]) for level in levels]
S = sum(height * width for height, width in shapes)
print(shapes, "S =", S)
assert shapes == [(22, 30), (11, 15), (6, 8), (3, 4)] and S == 660 + 165 + 48 + 12

# %% [markdown]
# ## {{n}}.4 The mask on every level
#
# A level needs its own mask. Each cell takes the mask of one pixel (nearest neighbour): cell $i$ of
# $n$ takes pixel $\lfloor i \cdot H / n \rfloor$.


# %%
def shrink(mask, shape):
    """The full mask (B, H, W) at a level's size; always from the full one, not level from level."""
    rows = torch.arange(shape[0]) * mask.shape[1] // shape[0]
    columns = torch.arange(shape[1]) * mask.shape[2] // shape[1]
    return mask[:, rows][:, :, columns]


masks = [shrink(mask, shape) for shape in shapes]
for level_mask, shape in zip(masks, shapes, strict=True):
    assert torch.equal(level_mask, F.interpolate(mask[None].float(), size=shape)[0].bool())

# %% [markdown]
# Cells are coarse, so the share of a level that is image is a little different on each level. This
# share is the **valid ratio** of {{chapter many_scales}}, as (x, y).

# %%
ratios = torch.stack(
    [torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1) for m in masks], 1
)
print("true share of image 0:", round(104 / 120, 3), "of the width")
print("on the levels:        ", [round(x, 3) for x in ratios[0, :, 0].tolist()])
assert ratios.shape == (B, L, 2)

# %% mystnb={"image": {"alt": "Four small grids for image 0, from 22 by 30 cells to 3 by 4. The dark right-hand columns are padding: 4 of 30, 2 of 15, 1 of 8 and none of 4."}}
figure, axes = plt.subplots(1, L, figsize=(7, 2.2), width_ratios=[3, 2.4, 1.8, 1.2])
for level, axis in enumerate(axes):
    axis.pcolormesh(~masks[level][0].numpy(), cmap="cividis", vmin=0, vmax=1, ec="white", lw=0.6)
    axis.set(aspect="equal", ylim=(shapes[level][0], 0), xticks=[], yticks=[])
    axis.set_title(f"level {level}\n{shapes[level][0]} × {shapes[level][1]}")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: the mask of image 0 on the four levels, padding dark. The same 16 pixels
# of padding are 4 columns of 30, 2 of 15, 1 of 8, and none of the coarse cells: every level rounds
# for itself.*

# %%
assert [int(m[0, 0].sum()) for m in masks] == [4, 2, 1, 0]

# %% [markdown]
# ## {{n}}.5 From maps to tokens
#
# The levels become one long sequence: row by row, the finest level first. The channel axis must go
# last **before** anything is joined; a bare `reshape` would mix channels and places.


# %%
def flatten(maps):
    """L maps (B, C, H_l, W_l) to one sequence (B, S, C)."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


features = flatten(levels)
print(tuple(features.shape))
assert features.shape == (B, S, C)
example = 660 + 165 + 2 * 8 + 5  # level 2, row 2, column 5
assert torch.equal(features[1, example], levels[2][1, :, 2, 5])

# %% [markdown]
# ## Exercise {{n}}.1  Which place is token $i$?
#
# *difficulty ●○○ · 8 minutes · 6 lines*
#
# To draw what a token looks at, one needs the way back: from the index in the sequence to the level
# and the place. Return `(level, x, y)`, with the centre of the token's cell normalised to [0, 1].
# Nothing is padded here.


# %% tags=["exercise"]
def token_place(index, shapes):
    """index: int in [0, S). shapes: L pairs (H, W). Returns (level, x, y)."""
    # BEGIN SOLUTION
    for level, (height, width) in enumerate(shapes):
        if index < height * width:
            row, column = divmod(index, width)
            return level, (column + 0.5) / width, (row + 0.5) / height
        index -= height * width
    raise IndexError("no such token")
    # END SOLUTION


check("pixels_to_boxes.1", token_place)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Walk through the levels and take off the tokens of each level that you pass.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Inside a level, `divmod(index, width)` gives row and column. A cell's centre is half a cell from
# its edge.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You divide by the height. A row ends after `width` tokens. On square maps nobody would notice; the
# first release of Deformable DETR had a swap of this kind in the sampling offsets.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Attention does not see order, so each token carries its place: a sine code of (y, x), which counts
# only what is not padding, plus a learned vector of its level. Why the second? Two cells at the
# same place on different levels have the **same** sine code:

# %%
from deformable_detr.layers.position import SinePositionEncoding

sine = SinePositionEncoding(C // 2)
fine = sine(torch.zeros(1, 3, 5, dtype=torch.bool))[0, :, 1, 2]  # the middle of 3 × 5 cells
coarse = sine(torch.zeros(1, 1, 1, dtype=torch.bool))[0, :, 0, 0]  # the middle of 1 × 1
assert torch.allclose(fine, coarse, atol=1e-4)


# %%
def positions(masks, encode, level_embed):
    """Sine code of the place plus learned vector of the level, (B, S, C)."""
    return flatten(
        [encode(m) + vector[:, None, None] for m, vector in zip(masks, level_embed, strict=True)]
    )


position = positions(masks, sine, model.neck.level_embed)
print(tuple(position.shape))

# %% [markdown]
# All of it together, as the object that the library passes on. Ours equals what the model computes:


# %%
from deformable_detr.structures import Tokens

padding = torch.cat([m.flatten(1) for m in masks], 1)  # (B, S)
tokens = Tokens(features, position, padding, shapes, ratios)
theirs = model.tokens(batch)
for name in ("features", "position", "padding_mask", "valid_ratios"):
    ours = getattr(tokens, name)
    assert torch.allclose(ours, getattr(theirs, name), atol=1e-5), name
    print(f"{name:13s}", tuple(ours.shape))

# %% [markdown]
# ## {{n}}.6 The encoder: every token asks around itself
#
# The encoder's queries are the tokens. A token's reference point is its own centre, found in two
# steps: relative to the image without padding, then on each level that it asks. For the token in
# row 2, column 5 of level 2, image 0:

# %%
row, column, level = 2, 5, 2
height_2, width_2 = shapes[level]
x = (column + 0.5) / (width_2 * ratios[0, level, 0])  # relative to the image
y = (row + 0.5) / (height_2 * ratios[0, level, 1])
by_hand = torch.stack([x, y]) * ratios[0]  # relative to each padded level
print([[round(v, 3) for v in point] for point in by_hand.tolist()])
assert math.isclose(by_hand[level, 0], (column + 0.5) / width_2, rel_tol=1e-6)

# %% [markdown]
# On its own level this is the cell's centre, 5.5 / 8: the ratio cancels. On the other levels it
# does not, because they round their padding differently (figure {{n}}.2). One token, four reference
# points. For all tokens:

# %%
from deformable_detr.models.tokens import token_centres

centres = token_centres(shapes, ratios)  # (B, S, 2), relative to the image
references = centres[:, :, None] * ratios[:, None]  # (B, S, L, 2)
print(tuple(references.shape))
assert torch.allclose(references[0, example], by_hand)

# %% [markdown]
# Where does a token look? The attention module tells, on request: $M L K = 72$ points each.

# %%
attention = model.encoder.layers[0].attention
query, asked = features + position, 9 * 30 + 13  # row 9, column 13 of level 0
_, sampling = attention(query, references, features, shapes, padding, return_sampling=True)
print("locations", tuple(sampling.locations.shape), "weights", tuple(sampling.weights.shape))

# %% mystnb={"image": {"alt": "Left: image 1 with a dot at the centre of every cell of four levels, dots on padding lie below the image. Right: one token of level 0 and its sampling points at initialisation, rays of points in six directions, short on level 0 and far apart on level 3."}}
figure, axes = plt.subplots(1, 2, figsize=(7, 3.9))
size = torch.tensor([width, height])
for axis in axes:
    show(axis, 1)
for level, part in enumerate(references[1].split([h * w for h, w in shapes])):
    points = part[:, level] * size
    axes[0].plot(*points.T, "o", ms=1 + 2 * level, c=f"C{level}", label=f"level {level}")
figure.legend(loc="outside lower center", ncols=4)
axes[0].set_title("the reference points of all tokens")

for level in range(L):
    points = sampling.locations[1, asked, :, level].flatten(0, 1) * size
    axes[1].plot(*points.T, "o", ms=3, c=f"C{level}")
axes[1].plot(*(references[1, asked, 0] * size), "P", c="C6", ms=8, mec="white")
axes[1].set(title="where one token looks", xlim=(-30, width + 30), ylim=(height + 30, -30))
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What to see. Left: each level lays its own grid of reference points over image 1.
# Right: one token of level 0 (black cross) samples all four levels; before training each head looks
# in its own direction, k pixels of that level away. So coarse levels are asked far out, even
# outside the image; the farthest points do not fit into the figure. Level 3's star hangs lower: its
# valid ratio rounds to 1, which moves its reference point.*

# %%
across = sampling.locations[1, asked, ..., 0]  # (M, L, K)
spread = across.amax((0, 2)) - across.amin((0, 2))
print("share of the width that is asked:", [round(v, 2) for v in spread.tolist()])
assert references[1, asked, 3, 1] - references[1, asked, 0, 1] > 0.05  # level 3's reference
assert spread.diff().gt(0).all()  # each coarser level is asked over a wider part of the image
assert torch.allclose(sampling.weights.sum((-1, -2)), torch.ones(B, S, config.num_heads))

# %% [markdown]
# One encoder layer: attention, add, norm; feed-forward, add, norm. The position is added to the
# **query** only. What is sampled are the features without it.


# %%
def encode_layer(layer, x, tokens, references):
    """(B, S, C) to (B, S, C)."""
    query = x + tokens.position
    update = layer.attention(query, references, x, tokens.spatial_shapes, tokens.padding_mask)
    x = layer.norm(x + update)
    update = layer.ffn.linear2(layer.ffn.linear1(x).relu())
    return layer.ffn.norm(x + update)


memory = tokens.features
for layer in model.encoder.layers:
    memory = encode_layer(layer, memory, tokens, references)
print(tuple(memory.shape))
assert torch.allclose(memory, model.encoder(tokens).features, atol=1e-5)

# %% [markdown]
# The library's encoder returns the same `Tokens` with other features.
#
# **Before you run**: we write nonsense into the features of all padded tokens. Which tokens of the
# memory change?

# %%
nonsense = torch.where(padding[..., None], torch.tensor(1000.0), features)
changed = model.encoder(dataclasses.replace(tokens, features=nonsense)).features
same = (changed - memory).abs().amax(-1) < 1e-4  # (B, S)
print("unchanged: tokens of the image", same[~padding].all().item())
print("unchanged: tokens on padding  ", same[padding].all().item())
assert same[~padding].all()

# %% [markdown]
# Padded tokens ask, and their answers are worthless; but nobody reads them, because their values
# are set to zero before sampling.
#
# ## {{n}}.7 Queries: the slots of the answer
#
# The decoder starts from $Q$ learned vectors, the same for every image. Each is stored as
# `[position | content]`, $2C$ numbers. From its position comes its reference point:
# $\hat{p}_q = \sigma(W \cdot \text{position} + b)$.

# %%
table = model.query_embed.weight
query_position, content = table[:, :C], table[:, C:]  # position first
reference = model.reference_points(query_position).sigmoid()  # (Q, 2) as (x, y)
print(tuple(table.shape), "->", tuple(query_position.shape), tuple(content.shape))
print(tuple(reference.shape), "from", *[round(v.item(), 2) for v in reference.aminmax()])
queries, query_position, reference = (
    x.expand(B, -1, -1) for x in (content, query_position, reference)
)

# %% mystnb={"image": {"alt": "The two images of the batch with the same 25 numbered points on each, spread over the image without its padding."}}
figure, axes = plt.subplots(1, 2)
for i, axis in enumerate(axes):
    show(axis, i)
    H, W = batch.sizes[i].tolist()
    points = reference[i] * torch.tensor([W, H])
    axis.plot(*points.T, "o", c="C0", ms=9, mec="white", mew=0.6)
    for q, (x, y) in enumerate(points.tolist()):
        axis.text(x, y, q, color="white", size=6, ha="center", va="center")
    axis.set_title(f"image {i}: 25 reference points")
plt.show()

# %% [markdown]
# *Figure {{n}}.4. What to see: a query has the same relative place on every image, and none lies on
# padding. Before training the places are random. Training moves them; in DETR each query then comes
# to answer for a region and for boxes of a certain size {cite}`carion2020detr`.*

# %%
assert torch.equal(reference[0], reference[1])
assert reference.min() > 0 and reference.max() < 1  # relative to the image without padding

# %% [markdown]
# ## {{n}}.8 The decoder: queries talk, then look, then think
#
# A decoder layer has three parts, each followed by add and norm:
# 1. **self-attention** among the queries: dense, as in {{chapter attention}}; $Q$ is small. Position is added
#    to query and key, not to the value.
# 2. **cross-attention** from the queries to the memory: multi-scale deformable attention around
#    each query's reference.
# 3. **feed-forward**.


# %%
def decode_layer(layer, queries, position, references, memory, tokens):
    """queries, position: (B, Q, C). references: (B, Q, L, 2). Returns (B, Q, C)."""
    located = queries + position
    update, _ = layer.self_attention(located, located, queries)
    queries = layer.self_norm(queries + update)
    sampled = (memory, tokens.spatial_shapes, tokens.padding_mask)
    update = layer.cross_attention(queries + position, references, *sampled)
    queries = layer.cross_norm(queries + update)
    update = layer.ffn.linear2(layer.ffn.linear1(queries).relu())
    return layer.ffn.norm(queries + update)


# %% [markdown]
# The library's layer is given two objects: who asks, as `Queries`, and what is asked, as `Tokens`. It
# multiplies by the valid ratios itself.

# %%
from deformable_detr.structures import Queries

on_levels = reference[:, :, None] * ratios[:, None]  # (B, Q, L, 2): the valid ratio again
layer = model.decoder.layers[0]
out = decode_layer(layer, queries, query_position, on_levels, memory, tokens)
asked_of = dataclasses.replace(tokens, features=memory)
theirs = layer(Queries(queries, query_position, reference), asked_of)
print(tuple(out.shape))
assert torch.allclose(out, theirs, atol=1e-5)

# %% [markdown]
# In the official weights the norms are numbered by another order: `norm2` follows self-attention,
# which runs first, and `norm1` follows cross-attention. Whoever loads those weights by number gets
# a model that runs, and is wrong.
#
# **Before you run**: we shuffle the 25 queries. What happens to the answers? And if we change query
# 3 alone: does the answer of query 20 change?

# %%
shuffled = torch.randperm(Q)
parts = (queries, query_position, on_levels)
out_shuffled = decode_layer(layer, *(x[:, shuffled] for x in parts), memory, tokens)
assert torch.allclose(out_shuffled, out[:, shuffled], atol=1e-5)  # a set: order means nothing

pushed = queries.clone()
pushed[:, 3] += 1
out_pushed = decode_layer(layer, pushed, query_position, on_levels, memory, tokens)
assert (out_pushed - out)[:, 20].abs().max() > 1e-4  # they talk

# %% [markdown]
# Queries form a *set*, and they know of each other. Through self-attention and nothing else: in
# cross-attention each is alone.

# %%
args = (on_levels, memory, shapes, padding)
loose = copy.deepcopy(layer.cross_attention)  # fresh, it would not depend on the query at all
for parameter in loose.parameters():
    parameter.add_(0.1 * torch.randn_like(parameter))
looked, looked_pushed = (loose(q + query_position, *args) for q in (queries, pushed))
moved = (looked_pushed - looked).abs().amax((0, 2)) > 1e-6  # (Q,)
print("changed:", moved.nonzero().flatten().tolist())
assert moved.nonzero().flatten().tolist() == [3]

# %% [markdown]
# This talk is how a query can learn that another one has already taken an object.
#
# ## {{n}}.9 Boxes: why the inverse sigmoid
#
# The box head is three linear layers. It does not predict a box but a **delta** from the reference.
# Both meet before the sigmoid (Appendix A.3):
#
# $$
# \hat b_x = \sigma\bigl(\delta_x + \sigma^{-1}(\hat p_x)\bigr), \qquad
# \hat b_w = \sigma(\delta_w), \qquad
# \sigma^{-1}(p) = \ln\frac{p}{1 - p}
# $$
#
# and the same for $y$ and $h$.
#
# By hand, with reference 0.3 and delta 1:


# %%
def sigmoid(z):
    return 1 / (1 + math.exp(-z))


start = math.log(0.3 / (1 - 0.3))
print(round(start, 3), "->", round(start + 1, 3), "->", round(sigmoid(start + 1), 3))
assert math.isclose(sigmoid(start + 0), 0.3)  # no delta: the box stays on its reference


# %%
from deformable_detr.boxes import inverse_sigmoid


def decode_boxes(delta, reference):
    """delta: (..., 4). reference: (..., 2) as (x, y). Returns (..., 4) cxcywh in (0, 1)."""
    centre = delta[..., :2] + inverse_sigmoid(reference)
    return torch.cat([centre, delta[..., 2:]], -1).sigmoid()


one = decode_boxes(torch.tensor([1.0, 0.0, -2.0, -2.0]), torch.tensor([0.3, 0.6]))
print([round(v, 3) for v in one.tolist()])

# %% mystnb={"image": {"alt": "Two panels over delta from minus 6 to 6. Left, with the inverse sigmoid: three S-shaped curves that pass through their references 0.05, 0.3 and 0.8 at delta 0 and stay between 0 and 1. Right: sigmoid of delta plus reference, three curves that leave the range between 0 and 1."}}
delta = torch.linspace(-6, 6, 121)
figure, axes = plt.subplots(1, 2, sharey=True)
for i, start in enumerate((0.05, 0.3, 0.8)):
    through = (delta + inverse_sigmoid(torch.tensor(start))).sigmoid()
    beside = start + delta.sigmoid() - 0.5
    for axis, centre in zip(axes, (through, beside), strict=True):
        axis.plot(delta, centre, label=f"reference {start}")
        axis.plot(0, start, "o", c=f"C{i}")
    assert through.min() > 0 and through.max() < 1
    assert beside.min() < 0 or beside.max() > 1
for axis in axes:
    axis.axhspan(1, 1.3, color="0.9")
    axis.axhspan(-0.45, 0, color="0.9")
    axis.set(xlabel="delta", ylim=(-0.45, 1.3))
axes[0].set(ylabel="centre of the box", title="σ(delta + σ⁻¹(reference))")
axes[1].set(title="reference + σ(delta) − ½")
axes[0].legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What to see: added inside the sigmoid (left), delta 0 gives the reference, any delta
# gives a centre inside the image, and every centre can be reached. Added outside (right), boxes
# leave the image (grey).*
#
# The last layer of the box head starts with zero weights; its bias is 0 for the centre and −2 for
# the size. So before training every box sits on its reference, with sides of $\sigma(-2) = 0.119$
# of the image:

# %%
class_head, box_head = model.class_heads[0], model.box_heads[0]  # one of each, for all layers
logits = class_head(out)
boxes = decode_boxes(box_head(out), reference)
print(tuple(logits.shape), tuple(boxes.shape))
assert torch.allclose(boxes[..., :2], reference, atol=1e-5)
assert torch.allclose(boxes[..., 2:], torch.tensor(0.1192), atol=1e-4)

# %% [markdown]
# Why must a box be tied to the reference at all? The query samples *around its reference*. What it
# sees there says how far off the object is, and not where in the image it all happens.
#
# ## Exercise {{n}}.2  What the head must say
#
# *difficulty ●●○ · 8 minutes · 2 lines*
#
# Turn it round: given an object's box and a query's reference point, which delta would hit the box
# exactly? Sizes start from no reference. The answer must stay finite for boxes that touch the
# border.


# %% tags=["exercise"]
def needed_delta(box, reference):
    """box: (..., 4) cxcywh in [0, 1]. reference: (..., 2). Returns the delta, (..., 4)."""
    # BEGIN SOLUTION
    start = torch.cat([inverse_sigmoid(reference), torch.zeros_like(reference)], -1)
    return inverse_sigmoid(box) - start
    # END SOLUTION


check("pixels_to_boxes.2", needed_delta)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Solve $b = \sigma(\delta + \sigma^{-1}(p))$ for $\delta$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $\delta = \sigma^{-1}(b) - \sigma^{-1}(p)$ for the centre, $\delta = \sigma^{-1}(b)$ for the size.
# `inverse_sigmoid` clamps at both ends.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You subtract the two centres as they are. Where box and reference coincide that makes no
# difference, and elsewhere it does: a difference of coordinates is not a difference of logits.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.10 Classes: sigmoid, and no background
#
# The first DETR {cite}`carion2020detr` has a softmax over classes plus one for "no object".
# Deformable DETR has one **sigmoid for each class**: every logit answers its own yes-or-no
# question, and "no object" is simply no to all of them. There is no column for background.
#
# > **91 classes, or 80, or 90?** COCO has 80 categories with ids from 1 to 90. The official code
# > uses the ids themselves as columns, so it needs columns 0 to 90: 91 in all. Column 0 and those
# > of the ten missing ids are never positive. This is *not* 90 + 1 for background. Here columns are
# > positions in the sorted list of ids: 10 digits, 10 columns, and the ids return when results are
# > written.

# %%
digit = torch.tensor([2.0, -3.0, 1.5])
print("sigmoid", [round(v, 2) for v in digit.sigmoid().tolist()], "each for itself")
print("softmax", [round(v, 2) for v in digit.softmax(0).tolist()], "must share 1")
nothing = torch.full((3,), -5.0)
assert nothing.sigmoid().max() < 0.01  # sigmoid can say: nothing here
assert math.isclose(nothing.softmax(0).max(), 1 / 3, rel_tol=1e-5)  # softmax cannot

# %% [markdown]
# ## Exercise {{n}}.3  The wanted classes
#
# *difficulty ●○○ · 6 minutes · 4 lines*
#
# Matching (section 8.13) has given object $i$, of COCO category `category_ids[i]`, to query
# `queries[i]`. Build what the class logits should become: a 1 where a query should say yes to a
# class, 0 elsewhere.


# %% tags=["exercise"]
def class_targets(category_ids, queries, num_queries, categories):
    """category_ids, queries: lists of N ints. categories: sorted list of the data set's ids.

    Returns (num_queries, number of classes), float, 0 or 1.
    """
    # BEGIN SOLUTION
    wanted = torch.zeros(num_queries, len(categories))
    for query, category_id in zip(queries, category_ids, strict=True):
        wanted[query, categories.index(category_id)] = 1
    return wanted
    # END SOLUTION


check("pixels_to_boxes.3", class_targets)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How many columns? As many as there are categories.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `categories.index(category_id)` is the column; `queries[i]`, and not `i`, is the row.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The shape is right but a 1 stands in the wrong place. `category_id - 1` is right only when ids
# have no gaps; in COCO it would call every stop sign (13) a parking meter, and id 90 would lie
# beyond the 80 columns: an index error, which a GPU reports long after and elsewhere.
#
# </details>
#
# {{solution}}

