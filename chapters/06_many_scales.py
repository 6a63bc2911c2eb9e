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
# # {{n}}. Many scales at once
#
# You will be able to
# - **flatten** several maps into one sequence and find any pixel in it again,
# - **build** multi-scale deformable attention, Eq. 3, from a loop to the library's module,
# - **explain** why one layer can serve all levels, and what its first, star-shaped offsets see,
# - **work out** valid ratios for a padded batch, and say why a reference is divided by the ratio of
#   one level and multiplied by that of another,
# - **draw** where a trained detector looks, on all levels, over the picture.
#
# You should know: deformable attention on one scale ({{chapter deformable_attention}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A backbone makes several maps of the same image. A fine map has small cells, so it can tell small
# objects apart, but each cell has seen little of its surroundings. A coarse map is the opposite. On a
# single map one must choose. Multi-scale deformable attention {cite}`zhu2021deformable` does not: each
# query samples $K$ points on **each** of $L$ maps, and one softmax over all $LK$ points decides how
# much each of them counts.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The running example in cells of three sizes. On each of the three levels the same place is marked by a blue cross, with two orange points around it; on coarser levels the points are further away. A bar chart on the right shows the six weights, two for each level, which sum to one."}}
import matplotlib.pyplot as plt
from schematics.many_scales import points_on_levels

plt.style.use("book.mplstyle")
points_on_levels()

# %% [markdown]
# *Figure {{n}}.1. One query with K = 2 points on each of L = 3 levels of the running example. The cross
# is the same place on all levels. A larger disc has a larger weight; all six weights share one total.
# (Points and weights were set by hand. Section {{n}}.10 draws those of a trained detector.)*
#
# As a formula this is Eq. 2 with one more sum, over the levels:
#
# $$\text{MSDeformAttn}(z_q, \hat p_q, \{x^l\}) = \sum_{m=1}^{M} W_m \Big[ \sum_{l=1}^{L}
# \sum_{k=1}^{K} A_{mlqk} \cdot W'_m \, x^l\big(\phi_l(\hat p_q) + \Delta p_{mlqk}\big) \Big]$$
#
# The reference point $\hat p_q \in [0, 1]^2$ is normalised, so it is one point for all levels;
# $\phi_l$ turns it into pixels of level $l$.

# %%
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from deformable_detr import Batch, MSDeformAttn, ms_deform_attn
from deformable_detr.data.images import read_image
from deformable_detr.data.transforms import TO_TENSOR
from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample
from deformable_detr.look.sampling import record_sampling
from deformable_detr.models.tokens import token_centres, valid_ratio
from deformable_detr.weights.ours import load_model

_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 Three maps, one sequence
#
# Transformers take one sequence. So each map is flattened row by row, and the maps follow one another,
# the finest first.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above, the running example in 16 by 16, 8 by 8 and 4 by 4 cells, framed in three greens. Below, one long strip with the cells of all three one after another, starting at 0, 256 and 320, 336 in all."}}
from schematics.many_scales import one_sequence

one_sequence()

# %% [markdown]
# *Figure {{n}}.2. Three levels of the running example and the sequence that they become. The green
# stripes are rows of the seven: the sequence still holds the picture, but neighbours above and below
# are far apart in it.*
#
# To find a cell again, one needs the size of each map and the place where each level starts. From here
# on we use odd and unequal sizes, so that mistakes show.

# %%
shapes = [(5, 7), (3, 4), (2, 2)]  # (H, W) of each level
maps = [torch.randn(1, 6, height, width) for height, width in shapes]
sequence = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, S, C)
starts = [sum(h * w for h, w in shapes[:level]) for level in range(3)]
print(tuple(sequence.shape), "levels start at", starts)
assert starts == [0, 35, 47] and sequence.shape[1] == 51

# %% [markdown]
# Before you run: which token of the sequence is row 2, column 1 of level 1, whose map is 3 x 4?

# %%
token = starts[1] + 2 * 4 + 1
print(token)
assert token == 44 and torch.equal(sequence[0, token], maps[1][0, :, 2, 1])

# %% [markdown]
# ## {{n}}.2 Equation 3, as a loop
#
# The loop goes over levels, images and heads. It cuts the sequence back into maps, samples each of
# them, weighs the samples and adds them up. Locations are normalised, so the same numbers mean the
# same place on every level.


# %%
def attention_loop(value, shapes, locations, weights):
    """value: (B, S, M, D). locations: (B, Q, M, L, K, 2). weights: (B, Q, M, L, K)."""
    B, _, M, D = value.shape
    output = torch.zeros(B, locations.shape[1], M, D)
    start = 0
    for level, (height, width) in enumerate(shapes):
        tokens = value[:, start : start + height * width]
        start += height * width
        for b in range(B):
            for m in range(M):
                head = tokens[b, :, m].T.reshape(D, height, width)
                sampled = bilinear_sample(head, locations[b, :, m, level])  # (Q, K, D)
                output[b, :, m] += (weights[b, :, m, level].unsqueeze(-1) * sampled).sum(1)
    return output.flatten(2)


# %%
B, Q, M, L, K, D = 2, 9, 3, 3, 4, 5
value = torch.randn(B, 51, M, D)
locations = torch.rand(B, Q, M, L, K, 2) * 1.4 - 0.2
weights = torch.rand(B, Q, M, L, K)
expected = attention_loop(value, shapes, locations, weights)
result = ms_deform_attn(value, shapes, locations, weights)
torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
print(tuple(result.shape), "equal to the library")

# %% [markdown]
# ## {{n}}.3 One softmax, not one per level
#
# The weights of a head sum to one over **all levels together**. That lets a query ignore a level that
# does not help it. With one softmax per level it could not, because each level would keep a full share.

# %%
scores = torch.tensor([[4.0, 4.0], [0.0, 0.0], [-2.0, -2.0]])  # L=3, K=2: level 0 wanted
jointly = scores.flatten().softmax(0).view(3, 2)
separately = scores.softmax(-1)
print("share of each level, one softmax: ", [round(x, 2) for x in jointly.sum(1).tolist()])
print("share of each level, three of them:", separately.sum(1).tolist())
assert jointly.sum(1)[0] > 0.95 and (separately.sum(1) == 1).all()

# %% [markdown]
# ## Exercise {{n}}.1  Scores to weights
#
# *difficulty ●○○ · 6 minutes · 2 lines*
#
# Turn the raw output of the linear layer `attention_weights` into weights, so that those of each head
# sum to one over all levels and points. In the raw output the heads come first, then the levels, then
# the points.


# %% tags=["exercise"]
def level_weights(raw, heads, levels, points):
    """raw: (B, Q, heads * levels * points). Returns (B, Q, heads, levels, points)."""
    # BEGIN SOLUTION
    flat = raw.unflatten(-1, (heads, levels * points)).softmax(-1)
    return flat.unflatten(-1, (levels, points))
    # END SOLUTION


check("many_scales.1", level_weights)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Split off the heads first, then take the softmax, then split levels and points.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `raw.unflatten(-1, (heads, levels * points))` gives one row for each head.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Your weights sum to one over the points of each level. The softmax came after levels and points had
# been separated.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 The module
#
# The module is that of {{chapter deformable_attention}} with $L$ times as many offsets and scores.
# Offsets are in pixels **of their level**. So the same offset is a short way on a fine map and a long
# way on a coarse one.

# %% mystnb={"image": {"alt": "Two panels of the running example, in cells of 8 and of 32 pixels. From the same cross, an orange point is moved by the same number of cells: a short way on the fine level, four times as far on the coarse one."}}
# NBVAL_IGNORE_OUTPUT
from schematics import slider
from schematics.many_scales import two_levels

slider(two_levels, dx=(-4.0, 4.0, 1.5), dy=(-4.0, 4.0, -2.5))

# %% [markdown]
# *Figure {{n}}.3. One offset on two levels; in JupyterLab, move it with the sliders. Up to which
# offset does the point on the coarse level stay on the picture? (Near the edge its neighbours
# outside count as zeros. Once the point is half a cell or more beyond the edge, it reads only
# zeros.)*
#
# The module takes one reference per level, (B, Q, L, 2). In most cases all $L$ are the same point, as in
# the formula; in a padded batch they differ a little, for reasons that section {{n}}.8 explains.


# %%
class MyMSDeformAttn(nn.Module):
    """Eq. 3, with the official parameter names."""

    def __init__(self, embed_dim, levels, heads, points):
        super().__init__()
        self.sizes = heads, levels, points
        self.sampling_offsets = nn.Linear(embed_dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(embed_dim, heads * levels * points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query, references, sequence, shapes):
        """query: (B, Q, C). references: (B, Q, L, 2). sequence: (B, S, C)."""
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.sizes, 2))
        heads, levels, points = self.sizes
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points))
        weights = weights.softmax(-1).unflatten(-1, (levels, points))
        sizes = torch.tensor([(width, height) for height, width in shapes])  # (L, 2)
        locations = references[:, :, None, :, None] + offsets / sizes[:, None]
        value = self.value_proj(sequence).unflatten(-1, (heads, -1))
        return self.output_proj(attention_loop(value, shapes, locations, weights))


# %% [markdown]
# We compare it with the library's module, both filled with the same random parameters.


# %%
def randomise(module):
    """Random numbers everywhere; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


library = randomise(MSDeformAttn(embed_dim=6, num_levels=3, num_heads=2, num_points=4))
mine = MyMSDeformAttn(6, 3, 2, 4)
mine.load_state_dict(library.state_dict())
query, references = torch.randn(1, 9, 6), torch.rand(1, 9, 3, 2)
theirs = library(query, references, sequence, shapes)
torch.testing.assert_close(mine(query, references, sequence, shapes), theirs, atol=1e-5, rtol=1e-5)
print(tuple(theirs.shape), "the reader's module equals the library's")

# %% [markdown]
# ## {{n}}.5 One layer for the queries of all levels
#
# In the encoder the tokens of all levels are queries. They all go through the **same** layer: there is
# one set of parameters, not one per level. How can that work, when a cell of level 2 covers sixteen
# times the area of a cell of level 0?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three tokens, of levels 0, 1 and 2, each with the embedding of its level added, lead into one block, the same layer with offsets and weights, from which arrows lead to K points on each of the three levels."}}
from schematics.many_scales import every_query

every_query()

# %% [markdown]
# *Figure {{n}}.4. The tokens of all levels ask through one layer. The layer has separate outputs for each
# level that is **read**, but only the token itself can tell it which level is **asking**.*
#
# Three things make it possible:
# - all maps are projected to one width $C$ ({{chapter pixels_to_boxes}} shows how), so the same
#   matrices fit the tokens of every level;
# - offsets are counted in pixels of the level that is read, so an offset of one means the next cell on
#   every level;
# - a learned vector per level, the *level embedding*, is added to each token.
#
# Without the third, a token would not know its level. Row 2 of five rows and row 1 of three are
# both the middle row. Positions are normalised, so even the code of the position is the same. We
# can check it: two tokens with the same content get the same offsets, unless different level
# embeddings were added to them.

# %%
content, level_embedding = torch.randn(6), torch.randn(3, 6)
middle = torch.full((1, 2, 3, 2), 0.5)
for name, added in (("without", torch.zeros(2, 6)), ("with", level_embedding[[0, 2]])):
    asked = library.sampling((content + added)[None], middle, shapes)  # tokens of levels 0 and 2
    same = torch.allclose(asked.locations[:, 0], asked.locations[:, 1], atol=1e-5)
    print(f"{name} the level embedding, both levels look at the same places: {same}")
    assert same == (name == "without")

# %% [markdown]
# ## {{n}}.6 The star
#
# Before training, the weights of the offset layer are zero. So the offsets are its bias alone, and every
# query looks at the same pattern. Head $m$ looks in direction $2\pi m / M$, and its points lie on squares
# around the reference rather than on circles: point $k$ lies $k$ pixels away to the left, right, top or
# bottom, and $k\sqrt 2$ pixels away on the diagonals. (So with eight heads all first offsets are whole
# numbers of pixels.) The pattern is the same **on every level**, in pixels of that level.

# %% mystnb={"image": {"alt": "Two panels over the same oblong image. Left: on the fine level eight rays of four points each form a small star around the reference. Right: on the coarse level the same star is four times as large. Heads have different colours."}}
wide = [(24, 36), (6, 9)]
star = MSDeformAttn(embed_dim=16, num_levels=2, num_heads=8, num_points=4)
centre = torch.tensor([0.53, 0.48]).expand(1, 1, 2, 2)
sampling = star.sampling(torch.zeros(1, 1, 16), centre, wide)
figure, axes = plt.subplots(1, 2)
for level, (axis, (height, width)) in enumerate(zip(axes, wide, strict=True)):
    axis.set_xticks([x / width for x in range(width + 1)], minor=True)
    axis.set_yticks([y / height for y in range(height + 1)], minor=True)
    axis.grid(which="minor", color="0.85", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    for head in range(8):
        x, y = sampling.locations[0, 0, head, level].detach().T
        axis.plot(x, y, "o", color=f"C{head}" if head < 7 else "0.55", markersize=4)
    axis.plot(0.53, 0.48, "k+", markersize=12)
    axis.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="0.4", linewidth=1)
    axis.set(xlim=(-0.05, 1.05), ylim=(1.25, -0.25), aspect=2 / 3, xticks=[], yticks=[])
    axis.set_title(f"level {level}: {height} x {width}")
plt.show()

# %% [markdown]
# *Figure {{n}}.5. Eight heads, four points each, around one reference (black cross), on the grids of two
# levels. The star has the same size in pixels of its level. So in the image the coarse one reaches four
# times as far, and nine of its points lie outside the map (frame). Six of them read zeros; the three just
# above the frame still catch a part of the first row. Near and far are covered before anything is
# learned.*

# %%
away = sampling.locations[0, 0].detach() - centre[0, 0, 0]  # (M, L, K, 2)
in_pixels = away * torch.tensor([(36, 24), (9, 6)])[:, None]
for head, name in ((0, "head 0, to the right:"), (1, "head 1, diagonal:     ")):
    for level in (0, 1):
        distances = in_pixels[head, level].norm(dim=-1)
        print(name, f"level {level}, pixels away:", [round(d, 2) for d in distances.tolist()])

# %% tags=["hide-input"]
steps = torch.arange(1, 5).float()
lengths = in_pixels.norm(dim=-1)  # (M, L, K)
torch.testing.assert_close(lengths[::2], steps.expand(4, 2, 4), atol=1e-5, rtol=1e-5)
torch.testing.assert_close(lengths[1::2], 2**0.5 * steps.expand(4, 2, 4), atol=1e-5, rtol=1e-5)
coarse = (sampling.locations[0, 0, :, 1] - 0.5).abs()
assert (coarse.amax(-1) > 0.5).sum() == 9
assert (coarse > 0.5 + 0.5 / torch.tensor([9, 6])).any(-1).sum() == 6  # no pixel of the map near
assert torch.allclose(sampling.weights, torch.tensor(1 / 8))

# %% [markdown]
# ## Exercise {{n}}.2  Draw your own star
#
# *difficulty ●●○ · 12 minutes · 5 lines*
#
# Compute these offsets: directions at equal angles, beginning to the right; put onto a **square** (divide
# each direction by the larger of its two absolute values); times the distances 1, 2, ..., K.


# %% tags=["exercise"]
def star_offsets(heads, points):
    """Returns (heads, points, 2), offsets in pixels as (dx, dy)."""
    # BEGIN SOLUTION
    angles = torch.arange(heads) * 2 * torch.pi / heads
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    distances = torch.arange(1, points + 1)
    return directions[:, None] * distances[:, None]
    # END SOLUTION


check("many_scales.2", star_offsets)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# cos and sin of $2\pi m/M$ are on a circle. On a square the larger of |dx| and |dy| is 1.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `amax(-1, keepdim=True)`, and distances that begin at 1, not at 0.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You are still on the circle: for four heads circle and square agree, for eight they do not.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.7 Boxes as references
#
# A decoder that refines boxes passes on not just a point but a whole box $(c_x, c_y, w, h)$ as the
# reference. Then offsets are measured in parts of the box instead of pixels. With
# $\hat p = (c_x, c_y)$, the centre of the box, a point lies at
#
# $$\hat p + \frac{\Delta p}{K} \cdot \frac{(w, h)}{2}.$$

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three blue boxes of different shapes, each with a cross at its centre and rays of four points in eight directions. In each box the outermost point of every ray lies on the box's edge."}}
from schematics.many_scales import in_the_box

in_the_box()

# %% [markdown]
# *Figure {{n}}.6. The offsets of the star in three boxes, those of head 0 (to the right) in full colour.
# Point 4 of K = 4 lies on the edge of each box.*
#
# From the centre of the box to its edge is half of its width or height. Dividing by $K$ makes an offset
# of $K$ go exactly that far. In the star, point $k$ has an offset of $k$, so the outermost points land on
# the edge of the box. We check this with an untrained module and a box from 0.35 to 0.65 in x and from
# 0.3 to 0.5 in y.

# %%
box = torch.tensor([0.5, 0.4, 0.3, 0.2]).expand(1, 1, 3, 4)
start = MSDeformAttn(embed_dim=16, num_levels=3, num_heads=8, num_points=4)
points = start.sampling(torch.randn(1, 1, 16), box, shapes).locations.flatten(0, -2)
low, high = points.amin(0), points.amax(0)
print(
    "points from", [round(v, 2) for v in low.tolist()], "to", [round(v, 2) for v in high.tolist()]
)
assert torch.allclose(low, torch.tensor([0.35, 0.3]), atol=1e-6)
assert torch.allclose(high, torch.tensor([0.65, 0.5]), atol=1e-6)

# %% [markdown]
# ## {{n}}.8 Padding, and what valid ratios are
#
# If two images of different sizes are in one batch, the smaller one is padded on the right and at the
# bottom, and a mask says where. Its maps are padded too. The *valid ratio* of a level is the part of
# its width and of its height that is image and not padding. Let us follow it with numbers: an image of
# 40 x 60 beside one of 64 x 96.

# %%
batch = Batch.from_images([torch.rand(3, 64, 96), torch.rand(3, 40, 60)])
ratios, masks = [], []
for stride in (8, 16, 32):
    mask = F.interpolate(batch.mask[None].float(), size=(64 // stride, 96 // stride))[0].bool()
    masks.append(mask)
    ratios.append(valid_ratio(mask))
ratios = torch.stack(ratios, 1)  # (B, L, 2) as (x, y)
for level, (x, y) in enumerate(ratios[1].tolist()):
    print(f"level {level}: valid ratio x {x:.3f}, y {y:.3f}")

# %% tags=["hide-input"]
assert torch.allclose(ratios[0], torch.ones(3, 2))
assert torch.allclose(ratios[1, :, 0], torch.tensor([8 / 12, 4 / 6, 2 / 3]))
assert torch.allclose(ratios[1, :, 1], torch.tensor([5 / 8, 3 / 4, 2 / 2]))

# %% [markdown]
# The exact share is 60/96 = 40/64 = 0.625 in both directions. But a map has whole cells, and the mask is
# shrunk by taking one pixel for each cell, its first one. So a cell counts as image if its *first* pixel
# is image, and a cell that is only begun counts in full. In other words the number of valid cells is
# always rounded **up**: 60/8 = 7.5 becomes 8, 40/16 = 2.5 becomes 3, 40/32 = 1.25 becomes 2. We check
# this for all widths up to 96 pixels. (Where a stride does not divide the padded size, the count can be
# one more, never one less.)

# %%
for stride in (8, 16, 32):
    begun = [-(-valid // stride) for valid in range(1, 97)]  # rounded up
    columns = torch.arange(96) >= torch.arange(1, 97)[:, None]  # masks of 1, 2, ..., 96 pixels
    shrunk = F.interpolate(columns[:, None].float(), size=96 // stride)[:, 0].bool()
    assert (~shrunk).sum(1).tolist() == begun
print("widths 1 to 96, three strides: the number of valid cells is always rounded up")

# %% [markdown]
# So each level puts the end of the image at a slightly different place. That matters when a token of one
# level looks at another level. Its reference point is computed in two steps. First **divide** by the
# ratio of its own level. This gives its place in the *image* without padding, from 0 to 1. Then
# **multiply** by the ratio of the level that is read. This gives its place on that *padded* map.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A padded map of 8 by 12 cells with a cross in the last valid cell; an arrow, divided by the own ratio, to a rectangle for the image without padding, where the cross is near the lower right corner; an arrow, times the ratio of level l, to a padded map of 2 by 3 cells with the cross in the last valid cell."}}
from schematics.many_scales import divide_then_multiply

divide_then_multiply()

# %% [markdown]
# *Figure {{n}}.7. From a cell to its reference on another level: divide by the valid ratio of its own
# level, $r_{own}$, and multiply by that of the other level, $r_l$. Grey cells are padding.*
#
# Why not stay on the padded map, and skip both steps? Boxes are measured in the image without padding, so
# the decoder's references are too, and the decoder needs the second step. The encoder follows the same
# convention, and so it needs the first step as well.
#
# With exact ratios the encoder's two steps would cancel, so to many readers they look like a mistake. But
# the ratios are rounded, so the steps cancel only on the token's own level. On another level the point
# drifts. Both levels round the same end of the image up to whole cells. So the two ends, and with them
# the point, differ by less than one cell of the coarser level. Published weights were trained with this
# drift, so it stays.

# %%
shapes = [(8, 12), (4, 6), (2, 3)]
centres = token_centres(shapes, ratios)  # (B, S, 2): divided
references = centres[:, :, None] * ratios[:, None]  # (B, S, L, 2): multiplied
token = 4 * 12 + 7  # row 4, column 7 of level 0: the last valid cell of image 1
print("in the image:", [round(v, 3) for v in centres[1, token].tolist()])
for level, place in enumerate(references[1, token].tolist()):
    print(f"on padded level {level}:", [round(v, 3) for v in place])

# %% mystnb={"image": {"alt": "Three maps, one for each level, with padded cells grey. A cross marks the same place of the image on each: it lies in the last valid row each time, at a height of 0.56, 0.68 and 0.9 of the map. A circle stays at 0.56, the same pixel of the image."}}
figure, axes = plt.subplots(1, 3, figsize=(7, 2.2))
for level, (axis, (height, width)) in enumerate(zip(axes, shapes, strict=True)):
    axis.imshow(~masks[level][1], extent=(0, 1, 1, 0), cmap="gray", vmin=-5, aspect=2 / 3)
    axis.vlines([x / width for x in range(1, width)], 0, 1, color="0.6", linewidth=0.6)
    axis.hlines([y / height for y in range(1, height)], 0, 1, color="0.6", linewidth=0.6)
    axis.plot(*references[1, token, level], "+", color="C1", markersize=14, markeredgewidth=2.5)
    axis.plot(*references[1, token, 0], "o", color="C0", fillstyle="none", markersize=10)
    axis.set(title=f"level {level}: {height} x {width}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *Figure {{n}}.8. The reference of one token (cross) and the pixel of the image from which it came
# (circle, row 36 of 40). The cross keeps its share of the valid cells, here nine tenths of their height.
# Because that height is rounded up, the cross drifts: on level 2 it stands for row 57.6, below the end
# of the image.*

# %% tags=["hide-input"]
rows = references[1, token, :, 1] * 64  # where the crosses are, in pixels
assert torch.allclose(rows, torch.tensor([36.0, 43.2, 57.6]))
assert torch.allclose(references[1, token, 0], torch.tensor([7.5 / 12, 4.5 / 8]))

# %% [markdown]
# ## Exercise {{n}}.3  References for a padded level
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# Write both steps for one token: from the row and column of its cell to its place on another padded
# level, normalised to that level. A token's position is the **centre** of its cell.


# %% tags=["exercise"]
def token_reference(row, column, own_shape, own_ratio, other_ratio):
    """The token's place on another padded level.

    row, column: of its cell. own_shape: (H, W) of its level. own_ratio, other_ratio: (2,) as
    (x, y), valid ratios of both levels. Returns (2,) as (x, y), normalised to the padded level.
    """
    # BEGIN SOLUTION
    height, width = own_shape
    padded = torch.tensor([(column + 0.5) / width, (row + 0.5) / height])
    return padded / own_ratio * other_ratio
    # END SOLUTION


check("many_scales.3", token_reference)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Begin with the centre of the cell, normalised to its own padded map: half a cell beyond its corner.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Divide by your own level's ratio, multiply by the other's.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# In the first check nothing is padded, so all ratios are 1 and cannot be wrong. Did you leave out one
# of the two, or swap them?
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.9 Padding must not be seen
#
# Sampling points can land on padding. What they read there must be zero, as it is outside the map.
# So the module sets values on padding to zero. It does so *after* the value projection, because a
# projection turns zeros into its bias, which is not zero. Then it cannot matter which features the
# padding has. We test it by filling the padding with nonsense.

# %%
attention = randomise(MSDeformAttn(embed_dim=6, num_levels=3, num_heads=2, num_points=4))
padding = torch.cat([mask.flatten(1) for mask in masks], 1)  # (B, S)
features = torch.randn(2, 8 * 12 + 4 * 6 + 2 * 3, 6)
nonsense = torch.where(padding.unsqueeze(-1), 1000.0, features)
query = torch.randn(2, 5, 6)
places = torch.rand(2, 5, 1, 2) * ratios[:, None]
clean = attention(query, places, features, shapes, padding)
torch.testing.assert_close(attention(query, places, nonsense, shapes, padding), clean)
without = attention(query, places, nonsense, shapes)
assert not torch.allclose(without, clean)
print("nonsense on the padding: with the mask the output stays, without the mask it changes")

# %% [markdown]
# So does a detector find the same in an image, however much padding its batch adds? Nearly. Two
# influences remain. One is the rounding of the masks. The other is the backbone: its first
# convolutions turn the padding next to the image into numbers that are not zero, and the later ones
# read these.
#
# How large is the effect? We measure it with the detector that {{chapter training}} trains; its
# weights come with the book. First it gets an image alone, then the same image in a batch with a
# larger one. By how much do its boxes move? (Boxes with a score above 0.4 count as found.)

# %%
model, _ = load_model("../data/checkpoints/digits.safetensors")
model.eval()
image = TO_TENSOR(read_image("../data/samples/000012.png"))  # (3, 128, 128)


@torch.no_grad()
def boxes_of(batch):
    """All boxes of the first image, in its pixels, and their scores."""
    output = model(batch)
    valid = (~batch.mask[0]).nonzero().amax(0) + 1  # (height, width)
    boxes = output.boxes[0] * valid.flip(0).repeat(2)  # (cx, cy, w, h) times (W, H, W, H)
    return boxes, output.logits[0].sigmoid().amax(-1)


boxes, scores = boxes_of(Batch.from_images([image]))
alone = boxes[scores > 0.4]
print(len(alone), "digits found")

# %%
torch.manual_seed(0)
twice = Batch.from_images([image, torch.randn(3, 256, 256)])
odd = Batch.from_images([image, torch.randn(3, 153, 165)])
unmasked = replace(twice, mask=torch.zeros_like(twice.mask))
moved, found_in = {}, {}
for name, batch in (("256 x 256", twice), ("153 x 165", odd), ("mask ignored", unmasked)):
    boxes, scores = boxes_of(batch)
    moved[name] = (alone[:, None] - boxes).abs().amax(-1).amin(1).max().item()  # to the nearest box
    found_in[name] = int((scores > 0.4).sum())
    print(f"{name:>12}: {found_in[name]} found; boxes within {moved[name]:.1f} pixels")
assert moved["256 x 256"] < moved["153 x 165"] < moved["mask ignored"]
assert moved["256 x 256"] < 1 and moved["153 x 165"] < 5 < moved["mask ignored"]
assert found_in["153 x 165"] == len(alone) - 1 and found_in["mask ignored"] == 0

# %% [markdown]
# With the mask the boxes move by a few pixels at most, and least in the batch of 256 x 256, whose
# size is divisible by all strides. In the other batch one digit's score also falls below 0.4. So the detector is nearly,
# but not exactly, independent of padding. If the mask is ignored, it is not: no digit is found any more (last line).

# %% [markdown]
# ## {{n}}.10 Where a trained detector looks
#
# Figure {{n}}.1 was drawn by hand. Now the shipped detector looks at the running example. It has three
# levels, with cells of 4, 8 and 16 pixels, four heads and four points, so 48 points for each query and
# layer. `record_sampling` keeps what every attention module used. We draw the last decoder layer, for
# the query that found the seven.

# %%
seven = read_image("../data/samples/000010.png")
with torch.no_grad(), record_sampling(model) as record:
    output = model(Batch.from_images([TO_TENSOR(seven)]))
found = output.logits[0].sigmoid().amax(-1).argmax()  # the query with the highest score
sampling = record.decoder[-1]
points = sampling.locations[0, found] * 128  # (M, L, K, 2) in pixels: the image has no padding
weights = sampling.weights[0, found]  # (M, L, K)
print(tuple(points.shape), "points; share of each level:", end=" ")
print([round(share, 2) for share in (weights.sum((0, 2)) / len(weights)).tolist()])

# %% mystnb={"image": {"alt": "The running example three times, in cells of 4, 8 and 16 pixels, with a blue box around the seven and 16 orange points on each. Nearly all points lie inside the box, on the seven and around its outline; larger discs are points with larger weights."}}
from schematics.many_scales import draw_level

cx, cy, w, h = (output.boxes[0, found] * 128).tolist()
figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7))
for level, axis in enumerate(axes):
    draw_level(axis, 4 * 2**level, light=0.45)
    x, y = points[:, level].flatten(0, 1).T / 128
    axis.scatter(x, y, s=8 + 500 * weights[:, level].flatten(), color="C4", edgecolors="black")
    left, right, top, low = ((cx - w / 2), (cx + w / 2), (cy - h / 2), (cy + h / 2))
    corners = [(left, top), (right, top), (right, low), (left, low), (left, top)]
    axis.plot(*(torch.tensor(corners).T / 128), color="C0")
    axis.set_title(f"level {level}, cells of {4 * 2**level} pixels", fontsize=9)
plt.show()

# %% [markdown]
# *Figure {{n}}.9. The points of the query that found the seven, in the last decoder layer; a larger disc
# has a larger weight, the blue box is the detection. The points no longer form a star: they gather on and
# beside the seven, and all three levels are used.*

# %% tags=["hide-input"]
inside = ((points - torch.tensor([cx, cy])).abs() <= torch.tensor([w, h]) / 2).all(-1)
share = ((weights * inside).sum() / weights.sum()).item()
print(f"share of the weight inside the box: {share:.2f}")
assert share > 0.9 and (weights.sum((0, 2)) / len(weights) > 0.1).all()

# %% [markdown]
# {{chapter looking}} does this for whole data sets, and asks whether such pictures can be trusted.
#
# ## Exercise {{n}}.4  Points in pixels
#
# *difficulty ●●● · 30 minutes · 6 lines*
#
# "How do I draw the sampling points?" The official code has no function for it. Write one. It must
# work for padded images, too. Locations are normalised to the *padded* maps, so divide by the valid
# ratio of their level to get to the image, then multiply by the image's own width and height.
# Return three flat tensors, sorted by falling weight:
# - the points in pixels of the image, as (x, y),
# - the weights, divided by the number of heads, so that all of them together sum to one,
# - the level of each point.


# %% tags=["exercise"]
def points_in_pixels(locations, weights, valid_ratios, image_size):
    """locations: (M, L, K, 2), of one query. weights: (M, L, K). valid_ratios: (L, 2) as (x, y).

    image_size: (H, W) without padding. Returns (M*L*K, 2), (M*L*K,) and (M*L*K,).
    """
    # BEGIN SOLUTION
    height, width = image_size
    points = locations / valid_ratios[:, None] * torch.tensor([width, height])
    shares = weights / len(weights)
    levels = torch.arange(weights.shape[1])[:, None].expand_as(weights)
    order = shares.flatten().argsort(descending=True)
    return points.flatten(0, 2)[order], shares.flatten()[order], levels.flatten()[order]
    # END SOLUTION


check("many_scales.4", points_in_pixels)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `valid_ratios[:, None]` is (L, 1, 2) and fits locations of (M, L, K, 2). Sizes are (H, W), points
# (x, y).
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.arange(L)[:, None].expand_as(weights)` is the level of every weight. Sort once, with
# `flatten().argsort(descending=True)`, and use the same order three times.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has a square image without padding. Did you multiply x by the width, and divide by the
# ratio of the point's own level?
#
# </details>
#
# {{solution}}
#
# Try it on Figure {{n}}.9: draw the returned points with `plt.scatter` over `plt.imshow(seven)`. With
# ratios of one they must lie where they lie above.

# %% [markdown]
# ## {{n}}.11 How much memory it needs
#
# The official form in pure PyTorch samples all levels, stacks the results, and multiplies the stack by
# the weights. The library's form in pure PyTorch (its backend "reference") adds up level by level. So at
# inference it never holds more than one level's samples. (In training, autograd keeps the samples of all
# levels for the backward pass.) We count the largest tensors at inference, for an encoder layer at
# 800 x 1066 in float32:

# %%
large = [(100, 134), (50, 67), (25, 34), (13, 17)]
S = sum(height * width for height, width in large)
M, D, L, K = 8, 32, 4, 4
stacked = 2 * S * M * D * L * K * 4  # the stack, and its product with the weights
by_level = 2 * S * M * D * K * 4  # the same for one level at a time
print(S, "tokens;", stacked // 2**20, "MiB against", by_level // 2**20, "MiB")
assert stacked == 4 * by_level and stacked > 500 * 2**20

# %% [markdown]
# A kernel that adds up while it samples needs neither of these tensors, in training or at inference.
# {{chapter cuda_kernel}} shows one.

# %% [markdown]
# ## {{n}}.12 Does it choose the right level?
#
# Can a query learn to use the level that it needs? As in the chapters before, we take a task with a
# known answer. Two levels show two different random pictures. Each query carries a flag that says
# whether its answer is the value of level 0 or of level 1 at its reference. The loss compares the
# output with that value and knows nothing of levels.
#
# (The picture on the fine level is an enlarged coarse one, so that both are equally smooth in the
# image. Each picture is repeated in two channels, because the module wants as many channels as the
# query has.)


# %%
def make_batch(batch=8, queries=20):
    """Queries (B, Q, 2), references (B, Q, 2, 2), sequence (B, S, 2), targets (B, Q)."""
    fine = F.interpolate(torch.randn(batch, 1, 6, 8), size=(12, 16), mode="bilinear")
    pictures = [fine, torch.randn(batch, 1, 6, 8)]
    flag = torch.randint(2, (batch, queries))
    place = torch.rand(batch, queries, 2) * 0.7 + 0.15
    grid = 2 * place[:, None] - 1  # (B, 1, Q, 2), as grid_sample has it
    read = [F.grid_sample(p, grid, align_corners=False)[:, 0, 0] for p in pictures]
    answers = torch.stack(read, 1)  # (B, L, Q)
    targets = answers.gather(1, flag[:, None])[:, 0]
    sequence = torch.cat([p.flatten(2).transpose(1, 2) for p in pictures], 1).expand(-1, -1, 2)
    return F.one_hot(flag, 2).float(), place.unsqueeze(2).expand(-1, -1, 2, -1), sequence, targets


def level_share(module):
    """(2, 2): for each flag, the share of the weights on each level."""
    sampling = module.sampling(
        torch.eye(2)[None], torch.full((1, 2, 2, 2), 0.5), [(12, 16), (6, 8)]
    )
    return sampling.weights[0].sum(-1).mean(1).detach()


def learn(seed, steps=300):
    """Train one head with one point per level; returns the shares."""
    torch.manual_seed(seed)
    module = MSDeformAttn(embed_dim=2, num_levels=2, num_heads=1, num_points=1)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(steps):
        query, references, sequence, targets = make_batch()
        output = module(query, references, sequence, [(12, 16), (6, 8)])[..., 0]
        optimiser.zero_grad()
        (output - targets).square().mean().backward()
        optimiser.step()
    return level_share(module)


# %% [markdown]
# Before you run: where should the weights of a query go after training?

# %%
shares = torch.stack([learn(seed) for seed in range(3)])  # (seed, flag, level)
right = shares[:, [0, 1], [0, 1]]
print("share on the right level above 0.8 in all seeds:", bool((right > 0.8).all()))
assert (right > 0.8).all()

# %% mystnb={"image": {"alt": "Bars of the share of attention weight on each level, with a dot for each of three seeds. Queries that ask for level 0 put almost all weight on level 0, queries that ask for level 1 on level 1."}}
figure, axis = plt.subplots(figsize=(5, 2.8))
for level, colour in enumerate(("C2", "C5")):
    place = torch.arange(2) + 0.36 * level - 0.18
    axis.bar(place, shares[:, :, level].mean(0), 0.34, color=colour, label=f"on level {level}")
    axis.plot(place, shares[:, :, level].T, "k.")
axis.set(xticks=[0, 1], xticklabels=["asked for level 0", "asked for level 1"])
axis.set(ylabel="share of the weights", ylim=(0, 1.05))
axis.legend(loc="center")
plt.show()

# %% [markdown]
# *Figure {{n}}.10. With one softmax over both levels a query can give nearly all its weight to the level
# that it needs. Bars are means of three seeds, dots the seeds.*

# %% [markdown]
# ## {{n}}.13 What it is worth
#
# The paper's ablation (its Table 2, AP on COCO after 50 epochs) adds one thing at a time:
#
# | input | each query reads | points $K$ | AP |
# |:--|:--|:--|:--|
# | one scale | that scale | 1 | 39.7 |
# | four scales | its own scale | 1 | 41.4 |
# | four scales | its own scale | 4 | 42.3 |
# | four scales | **all four scales** | 4 | **43.8** |
# | four scales, after an FPN | all four scales | 4 | 43.8 |
#
# Several scales bring 1.7, more points 0.9, and reading across scales 1.5 (with four times as many
# points, since $K$ counts per level). An FPN (feature pyramid
# network {cite}`lin2017fpn`), which most detectors use to pass information from coarse maps to fine
# ones, brings nothing more here. Attention across levels passes that information already, so Deformable
# DETR has no FPN. (These are the paper's numbers; nobody trained on COCO for this book.)

# %% [markdown]
# ## Summary
#
# - $L$ maps become one sequence, the finest first, row by row. One layer serves the tokens of all levels;
#   the level embedding tells it which level asks.
# - Each query samples $K$ points on each level, with one softmax over all $LK$.
# - Offsets are pixels of their level, or with box references parts of the box.
# - At the start each head looks in one direction on each level, $k$ pixels far, or $k \sqrt 2$ on the
#   diagonals.
# - Valid ratios: dividing a token's place by the ratio of its own level gives its place in the
#   image without padding; multiplying that by the ratio of another level gives its place on that
#   level's padded map.
#
# > **Differs from the paper.** Appendix A.4 lists the heads' directions in another order than the
# > code; the set is the same. The paper multiplies the initial offsets by $1/(2K)$ for boxes; the
# > code divides in the forward pass, so learned offsets are scaled too, and so are ours.
# > **Differs from the official code.** There all levels' samples are stacked; here they are added
# > up one by one.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: Eq. 3, Table 2, Appendices A.2 and A.4.
# - {cite}`lin2017fpn`: feature pyramids, which multi-scale attention replaces.
