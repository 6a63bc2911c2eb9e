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
# - **explain** what a query is, and where its reference point comes from,
# - **build** a decoder layer from attention, norms and a feed-forward network,
# - **explain** why boxes are predicted through an inverse sigmoid, and why an edge can still leave the image,
# - **assemble** the detector from its parts and prove that it equals the library's.
#
# You should know: multi-scale deformable attention, valid ratios and padding
# ({{chapter many_scales}}), and dense attention ({{chapter attention}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A detector turns an image into a list of objects: what each one is, where it is, and how sure the
# detector is. Deformable DETR {cite}`zhu2021deformable` does so with the attention of the last
# chapters, and with surprisingly few other parts. Here they are, on the picture that we have
# followed since {{chapter sampling}}:

# %% tags=["hide-input"] mystnb={"image": {"alt": "A flow chart in two rows. Above: a picture of a green seven goes through a backbone, becomes maps of three sizes, then one column of tokens in four shades, then passes an encoder of six layers and is called memory. Below: a column of queries enters a decoder of six layers, which also samples the memory; a class head and a box head follow; last the picture with a box around the seven."}}
import matplotlib.pyplot as plt
from schematics import pixels_to_boxes as draw

plt.style.use("book.mplstyle")
draw.whole_detector()

# %% [markdown]
# *Figure {{n}}.1. What to see: the whole detector. The upper row looks at the image: its result, the
# memory (green), has one vector per place. (The fourth, palest shade is a coarser level that section {{n}}.2
# adds to the three maps. Six layers are the paper's number; our small model has fewer.) The lower row
# answers: each query (blue) samples the memory and becomes one class and one box.*
#
# | step | what comes out | shape |
# |:--|:--|:--|
# | batch | images and mask | $(B, 3, H, W)$ and $(B, H, W)$ |
# | backbone | feature maps at three strides | $(B, \cdot, H_l, W_l)$ |
# | tokens | $L$ levels of one width $C$, as one sequence | $(B, S, C)$ |
# | encoder | the *memory*: every token after it has looked around itself | $(B, S, C)$ |
# | decoder | $Q$ queries after they have looked at the memory | $(B, Q, C)$ |
# | heads | one logit per class, and one box | $(B, Q, \text{classes})$ and $(B, Q, 4)$ |
#
# We take these steps one at a time, with real images and random weights. How the answers are judged
# is the subject of {{chapter matching_and_loss}}, and the model is trained in {{chapter training}}.

# %% tags=["hide-input"]
import copy
import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from schematics import slider
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from deformable_detr.exercises import check

_ = torch.set_grad_enabled(False)  # nothing is trained in this chapter

# %% [markdown]
# ## {{n}}.1 A batch: two images of different size
#
# Our data are handwritten digits in scenes of 128 × 128 pixels, with annotations in COCO's format
# {cite}`lin2014coco`. Inside the model a class is a **position** in the sorted list of categories,
# from 0 and without gaps; the ids in the file are only names.

# %%
samples = Path("../data/samples")
coco = json.loads((samples / "annotations.json").read_text(encoding="utf-8"))
categories = sorted(coco["categories"], key=lambda category: category["id"])
class_of = {category["id"]: index for index, category in enumerate(categories)}
digits = [category["name"] for category in categories]
print("ids", list(class_of), "-> classes", list(class_of.values()))

# %% [markdown]
# We cut two pictures to two different sizes, neither of them square. If height and width were ever
# mixed up, the shapes would not fit, and we would notice. Pixels are normalised by ImageNet's mean
# and standard deviation. Boxes become `cxcywh`: centre and size, as fractions of the
# image's width and height. Objects that the cut goes through are left out.

# %%
from deformable_detr.structures import Batch, Target

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def load(image_id, top, height, width):
    """The left part of an image, (3, height, width), and its Target."""
    picture = Image.open(samples / f"{image_id:06}.png").convert("RGB")
    image = pil_to_tensor(picture.crop((0, top, width, top + height))) / 255
    boxes, labels = [], []
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]  # left, top, width, height in pixels
        y = y - top
        if annotation["image_id"] == image_id and min(y, width - x - w, height - y - h) >= 0:
            boxes.append([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
            labels.append(class_of[annotation["category_id"]])
    target = Target(image_id, torch.tensor(labels), torch.tensor(boxes), (height, width))
    return (image - MEAN) / STD, target


# %%
first, first_target = load(10, top=30, height=88, width=104)  # the seven
second, second_target = load(2, top=0, height=72, width=120)
print("images", tuple(first.shape), tuple(second.shape))
print("digits", *[[digits[i] for i in t.labels] for t in (first_target, second_target)])
print("boxes ", tuple(first_target.boxes.shape), tuple(second_target.boxes.shape))

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

# %% [markdown]
# The batch has the larger height and the larger width, which is the size of neither image. Padding
# goes to the right and to the bottom, so pixel (0, 0) stays where it was, and the mask remembers
# which pixels are padding. The library does the same:

# %%
batch = Batch.from_images([first, second], [first_target, second_target])
assert torch.equal(batch.images, images) and torch.equal(batch.mask, mask)
print("the library's batch is the same; sizes", batch.sizes.tolist())


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two pictures with handwritten digits, each with a rectangle around every digit: a green seven, and three digits on another ground. The first fills its frame to the bottom but not to the right, the second fills it to the right but not to the bottom; the rest is grey padding."}}
draw.batch_with_boxes(batch)

# %% [markdown]
# *Figure {{n}}.2. What to see: one batch, two images. The first lacks columns, the second lacks rows.
# Where the mask is True we painted grey (the tensor holds zeros there). Boxes are relative to the
# image without its padding.*

# %% [markdown]
# ## {{n}}.2 From maps to levels of one width
#
# We use a small model, so that everything runs at once. It has $Q = 25$ queries, $M = 6$ heads, $L = 4$
# levels, $K = 3$ points per head and level, and $C = 96$ channels; the batch has $B = 2$ images. All these
# sizes differ, so that a mix-up would show. The paper's model is the same with
# larger numbers.

# %%
from deformable_detr import DeformableDETR, DeformableDETRConfig

config = DeformableDETRConfig(
    num_classes=len(digits), num_queries=25, backbone="small", num_levels=4, embed_dim=96,
    num_heads=6, num_points=3, encoder_layers=2, decoder_layers=3, ffn_dim=160, dropout=0.0,
)  # fmt: skip
torch.manual_seed(8)
model = DeformableDETR(config).eval()
B, Q, L, C = len(batch), config.num_queries, config.num_levels, config.embed_dim

# %% [markdown]
# This model lends us its parts. With them we compute each step ourselves, compare our result with the
# model's, and at the end build a detector of our own.
#
# **Before you run**: a convolution of stride 2 halves a map and rounds up. Strides of 4, 8 and 16
# make maps of which sizes from 88 × 120?

# %%
maps = model.backbone(images)
for stride, feature_map in zip(model.backbone.strides, maps, strict=True):
    print("stride", stride, tuple(feature_map.shape))

# %% [markdown]
# The three maps have three widths: 32, 64 and 96 channels. (In a ResNet-50 {cite}`he2016resnet` the
# strides are 8, 16 and 32, and the widths 512, 1024 and 2048. Our digits are small, so our backbone
# ends one halving earlier.) But multi-scale attention adds up samples of all levels in one sum, so all
# levels need **one** width. The *neck* of the detector sees to this: it projects each map, and adds one
# coarser level:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three grids of falling size on the left, at stride 4, 8 and 16 with 32, 64 and 96 channels. Arrows labelled 1 by 1, group norm, lead to levels 0, 1 and 2; an arrow labelled 3 by 3, stride 2, leads from the last grid to level 3. All four levels run into one column of tokens."}}
draw.maps_to_tokens()

# %% [markdown]
# *Figure {{n}}.3. What to see: a 1 × 1 convolution gives each map the same width. The fourth level
# comes from the backbone's last map itself, not from level 2 (the paper's Appendix A.2). Then all levels become
# one sequence.*
#
# A 1 × 1 convolution is a matrix that is applied to every cell. Group norm follows: it splits the
# channels into 32 groups, and gives each group mean 0 and variance 1 over its channels and all places
# of one image.
#
# There is no feature pyramid, which would add coarse maps to fine ones, because multi-scale
# attention already carries information between levels. So `project` is all that the neck does to the
# maps:


# %%
def project(maps, projections):
    """Backbone maps to L levels (B, C, H_l, W_l); projections beyond the maps halve the last."""
    levels = [p(m) for p, m in zip(projections[: len(maps)], maps, strict=True)]
    last = maps[-1]
    for projection in projections[len(maps) :]:
        last = projection(last)
        levels.append(last)
    return levels


levels = project(maps, model.neck.input_proj)
shapes = [tuple(level.shape[-2:]) for level in levels]
S = sum(height * width for height, width in shapes)
print(shapes, "S = 660 + 165 + 48 + 12 =", S)

# %% [markdown]
# ## {{n}}.3 The mask on every level
#
# Each level needs a mask of its own size. A cell takes the mask of one pixel: cell $i$ of $n$ takes
# pixel $\lfloor i \cdot H / n \rfloor$ (this is nearest-neighbour resizing).


# %%
def shrink(mask, shape):
    """The full mask (B, H, W) at a level's size; always from the full one, not level from level."""
    rows = torch.arange(shape[0]) * mask.shape[1] // shape[0]
    columns = torch.arange(shape[1]) * mask.shape[2] // shape[1]
    return mask[:, rows][:, :, columns]


masks = [shrink(mask, shape) for shape in shapes]
for level_mask, shape in zip(masks, shapes, strict=True):
    assert torch.equal(level_mask, F.interpolate(mask[None].float(), size=shape)[0].bool())
print("padded columns of image 0, by level:", [int(m[0, 0].sum()) for m in masks])

# %% [markdown]
# The share of a level that the image covers is its **valid ratio** ({{chapter many_scales}}). Cells are
# coarse, so every level rounds this share in its own way:


# %%
def valid_ratios(masks):
    """(B, L, 2): the part of each level that is image, as (x, y)."""
    across = [(~m[:, 0]).float().mean(1) for m in masks]
    down = [(~m[:, :, 0]).float().mean(1) for m in masks]
    return torch.stack([torch.stack(across, 1), torch.stack(down, 1)], -1)


ratios = valid_ratios(masks)
print("image 0, true part of the width: ", round(104 / 120, 3))
print("image 0, on the levels:          ", [round(x, 3) for x in ratios[0, :, 0].tolist()])
print("image 1, true part of the height:", round(72 / 88, 3))
print("image 1, on the levels:          ", [round(y, 3) for y in ratios[1, :, 1].tolist()])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four small grids for image 0, from 22 by 30 cells to 3 by 4. The dark right-hand columns are padding: 4 of 30, 2 of 15, 1 of 8 and none of 4."}}
draw.masks_of_levels([mask[0] for mask in masks])

# %% [markdown]
# *Figure {{n}}.4. What to see: the mask of image 0 on the four levels, padding dark. The same 16
# pixels of padding are 4 columns of 30, 2 of 15, 1 of 8, and none of the coarse cells. On level 3 the
# model treats the whole map as image, although its right edge covers padding.*

# %% [markdown]
# ## {{n}}.4 From levels to tokens
#
# The levels become one long sequence: row by row, the finest level first. Attention expects the
# channels last, so the channel axis moves to the end **before** the maps are joined.


# %%
def flatten(levels):
    """Maps (B, C, H_l, W_l) to one sequence (B, S, C)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)


features = flatten(levels)
row, column, level = 2, 5, 2
example = 660 + 165 + row * shapes[level][1] + column
assert torch.equal(features[0, example], levels[level][0, :, row, column])
print(tuple(features.shape), f"; row {row}, column {column} of level {level} is token {example}")

# %% [markdown]
# ## Exercise {{n}}.1  Where is a token?
#
# *difficulty ●○○ · 8 minutes · 6 lines*
#
# Above we went from a place to a token. Go the other way: from a token's index to its level and to the
# centre of its cell, x first, as fractions of the padded map's width and height.


# %% tags=["exercise"]
def token_place(index, shapes):
    """index: 0 to S - 1. shapes: (H, W) of each level. Returns level, x, y."""
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
# Attention does not see order. So each token carries its place, as a vector that is added: a sine
# code of (y, x) ({{chapter attention}}), measured on the part of the level that is not padding, plus a
# learned vector of its level. The level's vector is needed because two cells at the same place on different levels have the
# **same** sine code:

# %%
from deformable_detr.layers.position import SinePositionEncoding

sine = SinePositionEncoding(C // 2)
fine = sine(torch.zeros(1, 3, 5, dtype=torch.bool))[0, :, 1, 2]  # the middle of 3 × 5 cells
coarse = sine(torch.zeros(1, 1, 1, dtype=torch.bool))[0, :, 0, 0]  # the middle of 1 × 1
print("the same code:", torch.allclose(fine, coarse, atol=1e-4))


# %%
def positions(masks, encode, level_embed):
    """Sine code of the place plus learned vector of the level, (B, S, C)."""
    return flatten(
        [encode(m) + vector[:, None, None] for m, vector in zip(masks, level_embed, strict=True)]
    )


position = positions(masks, sine, model.neck.level_embed)

# %% [markdown]
# The library passes features, positions, masks and ratios on as one object, `Tokens`. Ours equals
# what the model computes:

# %%
from deformable_detr.structures import Queries, Tokens

padding = torch.cat([m.flatten(1) for m in masks], 1)  # (B, S)
tokens = Tokens(features, position, padding, shapes, ratios)
theirs = model.tokens(batch)
for name in ("features", "position", "padding_mask", "valid_ratios"):
    ours = getattr(tokens, name)
    assert torch.allclose(ours, getattr(theirs, name), atol=1e-5), name
    print(f"{name:13s}", tuple(ours.shape), "as the library's")

# %% [markdown]
# ## {{n}}.5 The encoder: every token looks around itself
#
# Encoder and decoder use the same attention. What differs is who asks:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two pairs of grids, a fine and a coarse one. Left, the encoder: arrows run from one filled cell to places around it on the fine grid and on the coarse one. Right, the decoder: a box labelled query points to a cross on the fine grid, from which arrows run to places around it on both grids."}}
draw.encoder_and_decoder()

# %% [markdown]
# *Figure {{n}}.5. What to see: in the encoder each token is itself a query, and samples around its own
# centre on all levels. In the decoder a query comes from outside, with a reference point, and samples
# around that. (Only the two finest levels are drawn.)*
#
# A token's reference point is the centre of its cell. It is found in two steps: first relative to the
# image without padding, then on each level that it samples. For the token in row 2, column 5 of level
# 2, image 0:

# %%
height_2, width_2 = shapes[level]
x = (column + 0.5) / (width_2 * ratios[0, level, 0])  # relative to the image
y = (row + 0.5) / (height_2 * ratios[0, level, 1])
by_hand = torch.stack([x, y]) * ratios[0]  # relative to each padded level
print([[round(v, 3) for v in point] for point in by_hand.tolist()])

# %% [markdown]
# On its own level this is the cell's centre, 5.5 / 8 = 0.688, because the ratio cancels. On the other
# levels it does not, because they round their padding differently. So one token has four reference
# points. For all tokens:

# %%
from deformable_detr.models.tokens import token_centres

centres = token_centres(shapes, ratios)  # (B, S, 2), relative to the image
references = centres[:, :, None] * ratios[:, None]  # (B, S, L, 2)
assert torch.allclose(references[0, example], by_hand)
print("references", tuple(references.shape))

# %% [markdown]
# Where does a token look? The attention module returns its sampling points when asked: $M L K = 72$ per token.

# %%
attention = model.encoder.layers[0].attention
asked = 9 * 30 + 13  # row 9, column 13 of level 0
_, sampling = attention(
    features + position, references, features, shapes, padding, return_sampling=True
)
print("locations", tuple(sampling.locations.shape), "weights", tuple(sampling.weights.shape))
across = sampling.locations[0, asked, ..., 0]  # (M, L, K)
spread = across.amax((0, 2)) - across.amin((0, 2))
print("spread of its points over the width, by level:", [round(v, 2) for v in spread.tolist()])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: image 1 with a dot at the centre of every cell of four levels; dots on padding lie below the image. Right: image 0, one token of level 0 and its sampling points at initialisation, rays of points in six directions, short on level 0 and far apart on level 3."}}
draw.where_tokens_look(
    batch, shapes, references[1], references[0, asked], sampling.locations[0, asked]
)

# %% [markdown]
# *Figure {{n}}.6. What to see. Left: each level lays its own grid of reference points over the image.
# Right: one token of level 0 (black cross) samples all four levels. Before training each head looks in
# its own direction, one, two and three cells of that level away. So on coarse levels it looks far
# out, even outside the image, where it reads zeros.*
#
# One encoder layer has two halves: attention, add, norm; then feed-forward, add, norm. The position is
# added to the **query** only, because it should decide where to look. What is sampled are the features
# without it.


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
assert torch.allclose(memory, model.encoder(tokens).features, atol=1e-5)
memory_tokens = dataclasses.replace(tokens, features=memory)  # what the library's encoder returns
print("memory", tuple(memory.shape), "as the library's")

# %% [markdown]
# **Before you run**: we write nonsense into the features of all padded tokens. Which tokens of the
# memory change?

# %%
nonsense = torch.where(padding[..., None], torch.tensor(1000.0), features)
changed = model.encoder(dataclasses.replace(tokens, features=nonsense)).features
same = (changed - memory).abs().amax(-1) < 1e-4  # (B, S)
print("unchanged: tokens of the image", same[~padding].all().item())
print("unchanged: tokens on padding  ", same[padding].all().item())

# %% [markdown]
# Padded tokens are queries too, and what comes out for them is worthless. It does no harm, because the
# values of padded tokens are set to zero before any other token samples them.
#
# ## {{n}}.6 Queries: places for answers
#
# The decoder starts from $Q$ learned vectors, which are the same for every image. Each has two halves:
# a *position* and a *content*, of $C$ numbers each. A small linear layer turns the position into a
# reference point: $\hat{p}_q = \sigma(W \cdot \text{position} + b)$.

# %%
table = model.query_embed.weight
query_position, content = table[:, :C], table[:, C:]  # position first
reference = model.reference_points(query_position).sigmoid()  # (Q, 2) as (x, y)
print("table", tuple(table.shape), "references", tuple(reference.shape))
queries, query_position, reference = (
    x.expand(B, -1, -1) for x in (content, query_position, reference)
)

# %% [markdown]
# Like a token's, this reference point is relative to the image without padding, and is multiplied by
# the valid ratio of each level that is sampled:

# %%
on_levels = reference[:, :, None] * ratios[:, None]  # (B, Q, L, 2)
on_image = (reference > 0).all() and (reference < 1).all()
print("on the image:", bool(on_image))
print("of 25 points on image 1, below its true lower edge at 72 / 88:")
print("by level", (on_levels[1, :, :, 1] > 72 / 88).sum(0).tolist())

# %% [markdown]
# As a fraction of the image a reference point never lies outside. But level 3 treats the whole map of
# image 1 as image, as we saw in section {{n}}.3, so on that level a few points slip onto padding.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The two images of the batch with the same 25 numbered points on each, spread over the image without its padding."}}
draw.reference_points(batch, reference)

# %% [markdown]
# *Figure {{n}}.7. What to see: a query has the same relative place on every image. Before training the
# places are random; they come from weights, so training can move them. In DETR, whose queries have no reference
# points, each query comes to answer for a region and for boxes of certain sizes {cite}`carion2020detr`.*

# %% [markdown]
# ## {{n}}.7 The decoder: queries talk, then look, then think
#
# A decoder layer has three parts. In **self-attention** the queries see each other; it is dense, as in
# {{chapter attention}}, because $Q$ is small. In **cross-attention** each query samples the memory around
# its reference point. The **feed-forward** network then treats each query by itself.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A decoder layer from left to right: content enters self-attention among queries, then add and norm, then cross-attention to the memory, add and norm, then feed-forward, add and norm. Around each part a line leads past it to its add. The query's position enters self-attention, to query and key but not to value, and cross-attention, to the query. Reference point and memory enter cross-attention."}}
draw.decoder_layer()

# %% [markdown]
# *Figure {{n}}.8. What to see: three parts, each with a skip connection (grey) and a norm behind it. The
# position (dashed) goes into queries and keys, so it helps to decide who attends to whom and where to look. It
# never goes into the values, so it is not part of what is added up.*
#
# The library's layer takes two objects: `Queries` (content, position and reference points) and `Tokens` (here
# the memory, which the queries sample). It multiplies the references by the valid ratios itself.

# %%
layer = model.decoder.layers[0]


def ask(queries, position, reference):
    """One decoder layer of the library: (B, Q, C)."""
    return layer(Queries(queries, position, reference), memory_tokens)


out = ask(queries, query_position, reference)
print(tuple(out.shape))

# %% [markdown]
# **Before you run**: we shuffle the 25 queries. What happens to the answers? And if we change query 3
# alone, does the answer of query 20 change?

# %%
order = torch.randperm(Q)
shuffled = ask(queries[:, order], query_position[:, order], reference[:, order])
pushed = queries.clone()
pushed[:, 3] += 1
moved = (ask(pushed, query_position, reference) - out).abs().amax((0, 2))  # (Q,)
print("shuffled queries give shuffled answers:", torch.allclose(shuffled, out[:, order], atol=1e-5))
print("query 20 noticed the change of query 3:", bool(moved[20] > 1e-4))

# %% [markdown]
# So queries form a *set*, in which order means nothing, and they know of each other. This happens
# through self-attention and nothing else. To see it, we repeat the change with cross-attention alone.
# (In a fresh module the two layers that compute offsets and attention weights have zero weights, so their
# result would not depend on the query. We give our copy random weights.)

# %%
loose = copy.deepcopy(layer.cross_attention)
for parameter in loose.parameters():
    parameter.add_(0.1 * torch.randn_like(parameter))
args = (on_levels, memory, shapes, padding)
before, after = (loose(q + query_position, *args) for q in (queries, pushed))
changed = (after - before).abs().amax((0, 2)) > 1e-6  # (Q,)
print("changed by cross-attention alone:", changed.nonzero().flatten().tolist())

# %% [markdown]
# In cross-attention each query is alone. Self-attention is where a query can learn that another one has
# already taken an object.
#
# ## Exercise {{n}}.2  A decoder layer
#
# *difficulty ●●● · 30 minutes · 7 lines*
#
# Build the layer of figure {{n}}.8. `layer` lends you its parts, which have weights but no order:
# - `layer.self_attention(query, key, value)` returns a pair, of which the first is the update,
# - `layer.cross_attention(query, references, memory, shapes, padding)`,
# - `layer.ffn.linear1` and `layer.ffn.linear2`, with a ReLU between them,
# - the norms `layer.self_norm`, `layer.cross_norm` and `layer.ffn.norm`.
#
# The checks compare with the library's layer under random weights. They try positions that are zero
# first, and then the general case.


# %% tags=["exercise"]
def decode_layer(layer, queries, position, references, memory, shapes, padding):
    """queries, position: (B, Q, C). references: (B, Q, L, 2). memory: (B, S, C).

    Returns the updated queries, (B, Q, C).
    """
    # BEGIN SOLUTION
    located = queries + position
    update, _ = layer.self_attention(located, located, queries)
    queries = layer.self_norm(queries + update)
    update = layer.cross_attention(queries + position, references, memory, shapes, padding)
    queries = layer.cross_norm(queries + update)
    update = layer.ffn.linear2(layer.ffn.linear1(queries).relu())
    return layer.ffn.norm(queries + update)
    # END SOLUTION


check("pixels_to_boxes.2", decode_layer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three times the same pattern: `update = part(...)`, then `queries = norm(queries + update)`. The order of
# the parts is that of the figure.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# In self-attention, query and key are `queries + position`, the value is `queries`. In cross-attention the
# query is `queries + position`, with the queries as self-attention has left them; the memory stays as it
# is.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Order and norms are right, and the position is not. Either it is missing in one of the two attentions, or
# it is part of the value, or you added it to the queries for good, so that it is in the sum behind the
# attention as well.
#
# </details>
#
# {{solution}}

# %% [markdown]
# > **A trap in published weights.** In the official weights these norms have numbers, and not in the order
# > in which they are used: `norm2` follows self-attention, which runs first, and `norm1` follows
# > cross-attention. Whoever loads the weights by number gets a model that runs, and is wrong.
#
# ## {{n}}.8 Boxes: why the inverse sigmoid
#
# The box head is three linear layers. It does not predict the centre of a box but a **delta**: how far the
# centre is from the reference point. Why? The query has sampled *around its reference*. What it saw there
# says how far off the object is, but not where in the image it all happens. (A point has no size, so width
# and height are predicted outright.)
#
# Reference and delta are added before the sigmoid (Appendix A.3):
#
# $$
# \hat b_x = \sigma\bigl(\delta_x + \sigma^{-1}(\hat p_x)\bigr), \qquad
# \hat b_w = \sigma(\delta_w), \qquad
# \sigma^{-1}(p) = \ln\frac{p}{1 - p}
# $$
#
# and the same for $y$ and $h$. Here it is on the running example; in JupyterLab each of the two numbers has a
# slider.

# %% mystnb={"image": {"alt": "Left, the picture of the seven with an orange cross at x = 0.3 and a small blue box at x = 0.54. Right, the sigmoid: the cross lies on it at minus 0.85, the box's centre on it one unit further right, with an arrow between them labelled delta plus 1.0."}}
# NBVAL_IGNORE_OUTPUT
slider(draw.box_on_example, reference=(0.05, 0.95, 0.3), delta=(-4.0, 4.0, 1.0))

# %% [markdown]
# *Figure {{n}}.9. What to see: the reference (orange) and the box (blue), on the image and on the sigmoid.
# Delta is a step along the lower axis. In the middle of the image it moves the box far; near the border
# the same step moves it little, and no step moves its centre out of the image. (The size of the box stays at
# 0.119, where training starts.) Try it.*
#
# By hand, with reference 0.3 and delta 1:


# %%
def sigmoid(z):
    return 1 / (1 + math.exp(-z))


start = math.log(0.3 / (1 - 0.3))
print("0.3 is", round(start, 3), "before the sigmoid; plus 1 is", round(start + 1, 3))
print("the centre:", round(sigmoid(start + 1), 3), "and without delta:", round(sigmoid(start), 3))

# %%
from deformable_detr.boxes import inverse_sigmoid  # finite at 0 and 1 too


def decode_boxes(delta, reference):
    """delta: (..., 4). reference: (..., 2) as (x, y). Returns (..., 4) cxcywh in (0, 1)."""
    centre = delta[..., :2] + inverse_sigmoid(reference)
    return torch.cat([centre, delta[..., 2:]], -1).sigmoid()


one = decode_boxes(torch.tensor([1.0, 0.0, -2.0, -2.0]), torch.tensor([0.3, 0.6]))
print("cx, cy, w, h:", [round(v, 3) for v in one.tolist()])

# %% [markdown]
# The alternative would be to add outside the sigmoid: $p + \sigma(\delta) - \tfrac12$, which is the
# reference plus a step of at most one half. Compare the two:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels over delta from minus 6 to 6. Left, with the inverse sigmoid: three S-shaped curves that pass through their references 0.05, 0.3 and 0.8 at delta 0 and stay between 0 and 1. Right: sigmoid of delta plus reference, three curves that leave the range between 0 and 1."}}
draw.inside_or_outside(inverse_sigmoid)

# %% [markdown]
# *Figure {{n}}.10. What to see: added inside the sigmoid (left), a delta of 0 gives the reference, any
# delta gives a centre inside the image, and every centre can be reached. Added outside (right), centres
# leave the image (grey), and not every centre can be reached.*
#
# All four numbers lie between 0 and 1. That keeps the *centre* inside the image, but not the edges.
#
# **Before you run**: a box has its centre at x = 0.9 and a width of 0.4. Where is its right edge?

# %%
from deformable_detr.boxes import cxcywh_to_xyxy

left, top, right, bottom = cxcywh_to_xyxy(torch.tensor([0.9, 0.5, 0.4, 0.2])).tolist()
print(f"from {left:.1f} to {right:.1f} along x")

# %% [markdown]
# It sticks out, and nothing in the model forbids that. {{chapter refinement}} counts how often the boxes of a
# trained detector do.
#
# Now the heads of our model. The last layer of the box head starts with zero weights, and its bias is 0
# for the centre and −2 for the size. So before training every box sits on its reference point, with sides
# of $\sigma(-2) = 0.119$ of the image. The class head is one linear layer, with one logit per class; what
# these mean is the subject of {{chapter matching_and_loss}}.

# %%
class_head, box_head = model.class_heads[0], model.box_heads[0]  # one of each, for all layers
logits = class_head(out)
boxes = decode_boxes(box_head(out), reference)
assert torch.allclose(boxes[..., :2], reference, atol=1e-5)
print("logits", tuple(logits.shape), "boxes", tuple(boxes.shape))
print("every side:", *{round(side, 3) for side in boxes[..., 2:].flatten().tolist()})

# %% [markdown]
# ## Exercise {{n}}.3  What the head must say
#
# *difficulty ●●○ · 8 minutes · 2 lines*
#
# Now the other way round: given an object's box and a query's reference point, which delta would hit the box
# exactly? The reference is a point, so the sizes have nothing to start from. The answer must stay finite for boxes
# that touch the border.


# %% tags=["exercise"]
def needed_delta(box, reference):
    """box: (..., 4) cxcywh in [0, 1]. reference: (..., 2). Returns the delta, (..., 4)."""
    # BEGIN SOLUTION
    start = torch.cat([inverse_sigmoid(reference), torch.zeros_like(reference)], -1)
    return inverse_sigmoid(box) - start
    # END SOLUTION


check("pixels_to_boxes.3", needed_delta)

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
# You subtract the two centres as they are. Where box and reference coincide that makes no difference, and
# elsewhere it does: a difference of coordinates is not a difference of logits.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.9 Assembled
#
# All steps exist. The detector is a list of parts and one path through them. First the parts, which hold
# all weights. An encoder or decoder layer is given its attention as a module, so that other detectors can
# use another kind of attention.

# %%
from deformable_detr import MSDeformAttn
from deformable_detr.backbones import build_backbone
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.models.decoder import DecoderLayer
from deformable_detr.models.encoder import EncoderLayer
from deformable_detr.models.heads import BoxHead
from deformable_detr.models.tokens import build_input_projections


def make_layer(c, decoder):
    """A layer of the encoder or of the decoder, with fresh weights."""
    deformable = MSDeformAttn(c.embed_dim, c.num_levels, c.num_heads, c.num_points)
    if decoder:
        dense = DenseAttention(c.embed_dim, c.num_heads)
        return DecoderLayer(dense, deformable, c.embed_dim, c.ffn_dim, dropout=0.0)
    return EncoderLayer(deformable, c.embed_dim, c.ffn_dim, dropout=0.0)


# %%
class Parts(nn.Module):
    """Everything in the detector that has weights."""

    def __init__(self, c):
        super().__init__()
        self.backbone = build_backbone(c.backbone)
        self.input_proj = build_input_projections(self.backbone.channels, c.num_levels, c.embed_dim)
        self.sine = SinePositionEncoding(c.embed_dim // 2)
        self.level_embed = nn.Parameter(torch.randn(c.num_levels, c.embed_dim))
        self.encoder = nn.ModuleList(make_layer(c, False) for _ in range(c.encoder_layers))
        self.decoder = nn.ModuleList(make_layer(c, True) for _ in range(c.decoder_layers))
        self.query_embed = nn.Embedding(c.num_queries, 2 * c.embed_dim)
        self.reference_points = nn.Linear(c.embed_dim, 2)
        self.class_head = nn.Linear(c.embed_dim, c.num_classes)
        self.box_head = BoxHead(c.embed_dim)


# %% [markdown]
# Then the path: sections {{n}}.2 to {{n}}.5 lead to the memory, sections {{n}}.6 to {{n}}.8 to the answers.
# Every decoder layer gives an answer of its own, from the same reference points and through the same heads.


# %%
class Detector(Parts):
    """Deformable DETR, the base model."""

    def tokens(self, batch):
        levels = project(self.backbone(batch.images), self.input_proj)
        shapes = [tuple(level.shape[-2:]) for level in levels]
        masks = [shrink(batch.mask, shape) for shape in shapes]
        position = positions(masks, self.sine, self.level_embed)
        padding = torch.cat([m.flatten(1) for m in masks], 1)
        return Tokens(flatten(levels), position, padding, shapes, valid_ratios(masks))

    def encode(self, tokens):
        centres = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
        references = centres[:, :, None] * tokens.valid_ratios[:, None]
        memory = tokens.features
        for layer in self.encoder:
            memory = encode_layer(layer, memory, tokens, references)
        return dataclasses.replace(tokens, features=memory)

    def forward(self, batch):
        """Logits and boxes of every decoder layer."""
        memory = self.encode(self.tokens(batch))
        position, content = self.query_embed.weight.expand(len(batch), -1, -1).chunk(2, -1)
        reference = self.reference_points(position).sigmoid()
        answers = []
        for layer in self.decoder:
            content = layer(Queries(content, position, reference), memory)
            boxes = decode_boxes(self.box_head(content), reference)
            answers.append((self.class_head(content), boxes))
        return answers


# %% [markdown]
# Is it the library's? With fresh weights the question would be too easy: offsets and boxes start from zero
# weights, and a bug that is multiplied by zero cannot be seen. So both get the same **random** weights. Names are
# translated, and `strict=True` makes sure that every name fits. Then we compare all layers.

# %%
torch.manual_seed(80)
for parameter in model.parameters():
    parameter.add_(0.1 * torch.randn_like(parameter))
names = {"neck.": "", "encoder.layers.": "encoder.", "decoder.layers.": "decoder.",
         "class_heads.0.": "class_head.", "box_heads.0.": "box_head."}  # fmt: skip
state = model.state_dict()
for theirs, ours in names.items():
    state = {key.replace(theirs, ours): value for key, value in state.items()}
detector = Detector(config).eval()
_ = detector.load_state_dict(state, strict=True)

# %%
output = model(batch)
assert output.boxes[..., 2:].std() > 0.01  # not the boxes of a fresh model
answers = detector(batch)
for (logits, boxes), theirs in zip(answers, [*output.auxiliary, output], strict=True):
    assert torch.allclose(logits, theirs.logits, atol=1e-4)
    assert torch.allclose(boxes, theirs.boxes, atol=1e-5)
print("the same logits and boxes in", len(answers), "decoder layers")

# %% [markdown]
# This class and the functions above compute what the library's base model computes. (They leave out dropout, which
# acts in training only. That the library in turn computes what the published models compute is checked in
# {{chapter published_weights}}.) Refinement and the two-stage model come in {{chapter refinement}}.

# %% [markdown]
# **Before you run**: padding is masked everywhere. Does image 1 alone give the same boxes as in the batch?

# %%
alone = model(Batch.from_images([second]))
difference = (alone.boxes[0] - output.boxes[1]).abs().max().item()
print("the same to five digits:", difference < 1e-5)
print(f"largest change of a coordinate: {difference:.3f}")

# %% [markdown]
# Not quite. Attention does not read padding, but padding still leaks in elsewhere: through convolutions near
# the border, through group norm, which takes its mean over all places, and through coarse cells that lie partly on
# padding but count as image, which also shifts the reference points. (This run does not tell how much is due to each.)
# So the boxes of an image change a little with the other images in its batch. The official model has the same property.
#
# ## {{n}}.10 Where the parameters are
#
# **Before you run**: the paper's base model has 40 million parameters. Which part has the most: backbone,
# encoder, decoder, or queries and heads?


# %%
def count(model):
    """Parameters by part."""
    parts = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


base = DeformableDETR(DeformableDETRConfig())  # ResNet-50, 300 queries, 91 logits per query
small_parts, base_parts = count(model), count(base)
del base
print(f"{'':17s}{'ours':>12s}{'the paper’s':>14s}")
for part, number in base_parts.items():
    print(f"{part:17s}{small_parts[part]:12,}{number:14,}")
assert sum(base_parts.values()) == 40_069_665  # the official model's
print(f"{'all':17s}{sum(small_parts.values()):12,}{sum(base_parts.values()):14,}")

# %% [markdown]
# In the paper's model more than half is the backbone, and in ours, with its small backbone, the decoder is the
# largest part. The paper's neck is larger than its encoder, because the 3 × 3 convolution
# of the extra level alone has $9 \cdot 2048 \cdot 256 = 4.7$ million.

# %% [markdown]
# ## Summary
#
# - Images are padded to one size, with a mask. Maps of several strides become one sequence of $S$ tokens of
#   width $C$, each with a vector for its place and level.
# - In the encoder each token samples around itself. In the decoder $Q$ learned queries see each other, then
#   sample around their reference points.
# - Positions are added to queries and keys, which decide where to look; never to the values, which are summed.
# - A box is $\sigma(\delta + \sigma^{-1}(\text{reference}))$: its centre stays inside the image, its edges
#   need not.
#
# > **Differs from the paper.** Appendix A.4, on refinement, lets boxes start with sides of 0.1 of the image. In the
# > code they start with $\sigma(-2) = 0.119$.
# >
# > **Differs from the official code.** There, norms are numbered `norm2`, `norm1`, `norm3` in order of use;
# > here they have names. The official model trains with dropout 0.1; this chapter's model has none, so that
# > results can be compared.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`, section 4.1 and Appendices A.2 and A.3: the detector of this chapter.
# - {cite}`carion2020detr`: queries and the decoder layer, with dense attention.
