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
# - **work out** valid ratios for a padded batch, and say why one divides by one and multiplies by another,
# - **draw** the star-shaped initialisation, and explain what each level sees of it.
#
# You should know: deformable attention on one scale ({{chapter deformable_attention}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Small objects need a fine map, large ones a coarse one. Multi-scale deformable attention
# {cite}`zhu2021deformable` lets each query sample $K$ points on **each** of $L$ maps, with one
# softmax over all $LK$ of them:
#
# $$\text{MSDeformAttn}(z_q, \hat p_q, \{x^l\}) = \sum_{m=1}^{M} W_m \Big[ \sum_{l=1}^{L}
# \sum_{k=1}^{K} A_{mlqk} \cdot W'_m \, x^l\big(\phi_l(\hat p_q) + \Delta p_{mlqk}\big) \Big]$$
#
# $\hat p_q \in [0, 1]^2$ is one point for all levels; $\phi_l$ turns it into pixels of level $l$.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from deformable_detr import Batch, MSDeformAttn, ms_deform_attn
from deformable_detr.data.images import read_image
from deformable_detr.data.transforms import TO_TENSOR
from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample
from deformable_detr.models.tokens import token_centres, valid_ratio
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 Three maps, one sequence
#
# Transformers take sequences. Each map is flattened row by row, and the maps follow one another,
# the finest first. Odd and unequal sizes, so that mistakes show:

# %%
shapes = [(5, 7), (3, 4), (2, 2)]  # (H, W) of each level
maps = [torch.randn(1, 6, height, width) for height, width in shapes]
sequence = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, S, C)
starts = [sum(h * w for h, w in shapes[:level]) for level in range(3)]
print(tuple(sequence.shape), "levels start at", starts)
assert starts == [0, 35, 47] and sequence.shape[1] == 51

# %% [markdown]
# Before you run: which token is row 2, column 1 of level 1, whose map is 3 x 4?

# %%
token = starts[1] + 2 * 4 + 1
print(token)
assert token == 44 and torch.equal(sequence[0, token], maps[1][0, :, 2, 1])

# %% [markdown]
# A token does not know its level: row 2 of level 0 and row 1 of level 1 are both the middle row, and have
# the same position encoding in y. So a learned vector per level, the *level embedding*, is added (chapter
# 8).

# %% [markdown]
# ## {{n}}.2 Equation 3, as a loop
#
# Cut the sequence back into maps, sample each, weigh, add. Locations are normalised, so the same
# number means the same place on every level.


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
print(tuple(result.shape))
torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## {{n}}.3 One softmax, not one per level
#
# The weights of a head sum to one over **all levels together**. That lets a query ignore a level. A
# softmax per level cannot: each level would keep a full share.

# %%
scores = torch.tensor([[4.0, 4.0], [0.0, 0.0], [-2.0, -2.0]])  # L=3, K=2: level 0 wanted
jointly = scores.flatten().softmax(0).view(3, 2)
separately = scores.softmax(-1)
print([round(x, 2) for x in jointly.sum(1).tolist()], separately.sum(1).tolist())
assert jointly.sum(1)[0] > 0.95 and (separately.sum(1) == 1).all()

# %% [markdown]
# ## Exercise {{n}}.1  Scores to weights
#
# *difficulty ●○○ · 6 minutes · 2 lines*
#
# Turn the raw output of the linear layer `attention_weights` into weights.


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
# Split off the heads first, then softmax, then split levels and points.
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
# Your weights sum to one over the points of each level: the softmax came after levels and points
# had been separated.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 The module
#
# As in {{chapter deformable_attention}}, with $L$ times as many offsets and weights. Offsets are in pixels **of their
# level**: one pixel on a coarse map is a long way.


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
        widths = torch.tensor([(width, height) for height, width in shapes])  # (L, 2)
        locations = references[:, :, None, :, None] + offsets / widths[:, None]
        value = self.value_proj(sequence).unflatten(-1, (heads, -1))
        return self.output_proj(attention_loop(value, shapes, locations, weights))


# %%
library = MSDeformAttn(embed_dim=6, num_levels=3, num_heads=2, num_points=4)
with torch.no_grad():
    for parameter in library.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
mine = MyMSDeformAttn(6, 3, 2, 4)
mine.load_state_dict(library.state_dict())
query, references = torch.randn(1, 9, 6), torch.rand(1, 9, 3, 2)
torch.testing.assert_close(
    mine(query, references, sequence, shapes),
    library(query, references, sequence, shapes),
    atol=1e-5,
    rtol=1e-5,
)
print("the reader's module equals the library's")

# %% [markdown]
# ## {{n}}.5 Boxes as references
#
# A decoder that refines boxes passes $(c_x, c_y, w, h)$ as references. Then offsets are measured in
# the box instead of pixels: $\hat p + \frac{\Delta p}{K} \cdot \frac{(w, h)}{2}$. An offset of $K$
# reaches from the centre to the edge, whatever the size of the box.

# %%
box = torch.tensor([0.5, 0.4, 0.3, 0.2]).expand(1, 1, 3, 4)
start = MSDeformAttn(embed_dim=16, num_levels=3, num_heads=8, num_points=4)
points = start.sampling(torch.randn(1, 1, 16), box, shapes).locations.flatten(0, -2)
low, high = points.amin(0), points.amax(0)
print([round(v, 2) for v in (*low.tolist(), *high.tolist())])
assert torch.allclose(low, torch.tensor([0.35, 0.3]), atol=1e-6)
assert torch.allclose(high, torch.tensor([0.65, 0.5]), atol=1e-6)

# %% [markdown]
# That is what the factor does that so many readers ask about: at the start the points fill the box
# exactly.

# %% [markdown]
# ## {{n}}.6 The star
#
# At the start the weights of the offset layer are zero, so only its bias speaks: head $m$ looks in
# direction $2\pi m / M$, and its point $k$ lies $k$ pixels away, **on every level**.

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
        axis.plot(x, y, "o", color=f"C{head % 7}", markersize=4, alpha=1 - 0.5 * (head > 6))
    axis.plot(0.53, 0.48, "k+", markersize=12)
    axis.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="0.4", linewidth=1)
    axis.set(xlim=(-0.05, 1.05), ylim=(1.25, -0.25), aspect=2 / 3)
    axis.set_title(f"level {level}: {height} x {width}")
outside = (sampling.locations[0, 0, :, 1] - 0.5).abs().amax(-1) > 0.5
assert outside.sum() == 9
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: eight heads, four points each, around one reference (black cross), drawn
# on the grids of two levels. The star has the same size in pixels of its level, so in the image the
# coarse one reaches four times as far: nine of its points lie outside the map (frame), where they read
# zeros. Near and far are covered before anything is learned.*

# %%
farthest = sampling.locations[0, 0].detach().amax((0, 2))  # (L, 2)
reach = [place - centre[0, 0, 0] for place in farthest]
print([[round(v, 3) for v in r.tolist()] for r in reach])
assert torch.allclose(reach[1], 4 * reach[0], atol=1e-6)
assert torch.allclose(sampling.weights, torch.tensor(1 / 8))

# %% [markdown]
# ## Exercise {{n}}.2  Draw your own star
#
# *difficulty ●●○ · 12 minutes · 5 lines*
#
# Compute the offsets: directions at equal angles, put onto a **square** (divide by the larger of
# the two absolute values), times 1, 2, ..., K.


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
# ## {{n}}.7 Padding, and what valid ratios are
#
# Two images of different size in one batch: the smaller is padded on the right and at the bottom,
# and a mask says where. The maps are padded too. Let us follow it with numbers.

# %%
batch = Batch.from_images([torch.rand(3, 64, 96), torch.rand(3, 40, 60)])
print(
    tuple(batch.images.shape),
    "padding:",
    [round(x, 3) for x in batch.mask.float().mean((1, 2)).tolist()],
)
ratios, masks = [], []
for stride in (8, 16, 32):
    mask = F.interpolate(batch.mask[None].float(), size=(64 // stride, 96 // stride))[0].bool()
    masks.append(mask)
    ratios.append(valid_ratio(mask))
ratios = torch.stack(ratios, 1)  # (B, L, 2) as (x, y)
print([[round(x, 3) for x in ratio] for ratio in ratios[1].tolist()])

# %% [markdown]
# The exact shares of the second image are 60/96 = 0.625 and 40/64 = 0.625. But a map has whole
# cells, so each level rounds in its own way: 0.667, 0.667 and 0.667 of the width, 0.625, 0.75 and 1
# of the height. The image ends in a different place on each level.

# %%
assert torch.allclose(ratios[0], torch.ones(3, 2))
assert torch.allclose(ratios[1, :, 0], torch.tensor([8 / 12, 4 / 6, 2 / 3]))
assert torch.allclose(ratios[1, :, 1], torch.tensor([5 / 8, 3 / 4, 2 / 2]))

# %% [markdown]
# A token's reference point takes two steps. First **divide** by the ratio of its own level: that says
# where it lies in the *image*, from 0 to 1, without padding. Then **multiply** by the ratio of the
# level that is sampled: that says where it lies on that *padded* map.
#
# $$\hat p \;\xrightarrow{\;/\, r_{\text{own}}\;}\; \text{place in the image}
# \;\xrightarrow{\;\cdot\, r_l\;}\; \text{place on level } l$$
#
# Boxes, and so the decoder's references, are measured in the image without padding; times $r_l$ they
# become places on the padded level $l$. The encoder follows the same convention. With exact ratios its two
# steps would cancel on every level, which is why they look like a bug to many readers. But the masks round, so they
# cancel only on the token's own level; elsewhere the point moves by less than a coarse cell. Published
# weights were trained with that.

# %%
shapes = [(8, 12), (4, 6), (2, 3)]
centres = token_centres(shapes, ratios)  # (B, S, 2): divided
references = centres[:, :, None] * ratios[:, None]  # (B, S, L, 2): multiplied
token = 4 * 12 + 7  # row 4, column 7 of level 0: the last valid cell of image 1
print([round(v, 3) for v in centres[1, token].tolist()])
print([[round(v, 3) for v in r] for r in references[1, token].tolist()])
assert torch.allclose(references[1, token, 0], torch.tensor([7.5 / 12, 4.5 / 8]))
assert not torch.allclose(references[1, token, 0, 1], references[1, token, 2, 1], atol=0.2)

# %% mystnb={"image": {"alt": "Three maps, one for each level, with padded cells grey. A cross marks the same place of the image on each: it lies in the last valid row each time, at a height of 0.56, 0.68 and 0.9 of the map. A circle stays at 0.56, the same pixel of the image."}}
figure, axes = plt.subplots(1, 3)
for level, (axis, (height, width)) in enumerate(zip(axes, shapes, strict=True)):
    axis.imshow(~masks[level][1], extent=(0, 1, 1, 0), cmap="gray", vmin=-1, aspect=2 / 3)
    axis.plot(*references[1, token, level], "+", color="C1", markersize=14, markeredgewidth=2.5)
    axis.plot(*references[1, token, 0], "o", color="C0", fillstyle="none", markersize=10)
    axis.set(title=f"level {level}: {height} x {width}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: grey cells are padding. The cross keeps its share of the* valid cells*, here
# nine tenths of their height. The circle is the same pixel of the image, row 36 of 40, on each level. They
# part only because the masks round: on level 2 the cross stands for row 57.6, below the image's end.*

# %%
rows = references[1, token, :, 1] * 64  # where the crosses are, in pixels
print([round(row, 1) for row in rows.tolist()])
assert torch.allclose(rows, torch.tensor([36.0, 43.2, 57.6]))

# %% [markdown]
# ## Exercise {{n}}.3  References for a padded level
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# Do it yourself for one token.


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
# First the centre of the cell, normalised to its own padded map. Half a cell!
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
# Without padding all ratios are 1 and cannot be wrong. Did you leave out one of the two, or swap
# them?
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.8 Padding must not be seen
#
# Values on padding are set to zero after the value projection (whose bias would otherwise give them
# a life of their own). So what stands there cannot matter.

# %%
attention = MSDeformAttn(embed_dim=6, num_levels=3, num_heads=2, num_points=4)
with torch.no_grad():
    for parameter in attention.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
padding = torch.cat([mask.flatten(1) for mask in masks], 1)  # (B, S)
features = torch.randn(2, 8 * 12 + 4 * 6 + 2 * 3, 6)
nonsense = torch.where(padding.unsqueeze(-1), 1000.0, features)
query = torch.randn(2, 5, 6)
places = torch.rand(2, 5, 1, 2) * ratios[:, None]
clean = attention(query, places, features, shapes, padding)
torch.testing.assert_close(attention(query, places, nonsense, shapes, padding), clean)
assert not torch.allclose(attention(query, places, nonsense, shapes), clean)  # without the mask
print("what stands on padding cannot be seen")

# %% [markdown]
# Is the result for an image then independent of the padding that its batch adds? Nearly. The
# rounding of the masks remains. And alone, every convolution of the backbone sees zeros beyond the
# border; in a batch only the first one does, since later ones see what the earlier ones made of the
# padding. Measure it with the detector of {{chapter training}}, whose weights are here already: where are the digits that it
# finds in an image alone, when the image comes in a batch with a larger one?

# %%
model, _ = load_model("../data/checkpoints/digits.safetensors")
model.eval()
image = TO_TENSOR(read_image("../data/samples/000012.png"))  # (3, 128, 128)


@torch.no_grad()
def boxes_of(batch):
    """All boxes of the first image, in its pixels, and their scores."""
    output = model(batch)
    valid = (~batch.mask[0]).nonzero().amax(0) + 1  # (height, width)
    boxes = output.boxes[0] * valid.flip(0).repeat(2)
    return boxes, output.logits[0].sigmoid().amax(-1)


boxes, scores = boxes_of(Batch.from_images([image]))
alone = boxes[scores > 0.4]
print(len(alone), "digits found")

# %%
torch.manual_seed(0)
twice = Batch.from_images([image, torch.randn(3, 256, 256)])
odd = Batch.from_images([image, torch.randn(3, 153, 165)])
unmasked = replace(twice, mask=torch.zeros_like(twice.mask))
moved = {}
for name, batch in (("256 x 256", twice), ("153 x 165", odd), ("mask ignored", unmasked)):
    boxes, scores = boxes_of(batch)
    moved[name] = (alone[:, None] - boxes).abs().amax(-1).amin(1).max().item()  # to the nearest box
    print(f"{name:>12}: {(scores > 0.4).sum()} found; boxes within {moved[name]:.1f} pixels")

# %%
assert moved["256 x 256"] < 1 < moved["153 x 165"] < 5 < moved["mask ignored"]

# %% [markdown]
# With the mask they hardly move, least where the padded size leaves no rest: nearly, but not exactly,
# invariant. Without it nothing is found.

# %% [markdown]
# ## {{n}}.9 What it takes to remember
#
# The official pure-PyTorch form samples all levels, stacks the results, and multiplies by the
# weights. The library adds up level by level. Count the largest tensors, for an encoder layer at
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
# A kernel that adds up while it samples needs neither: {{chapter cuda_kernel}}.

# %% [markdown]
# ## {{n}}.10 Does it choose the right level?
#
# A task with a known answer. Two levels show two different random pictures; each query carries a flag that says whether its answer stands on level 0 or on level 1, at its
# reference. Which level gets the weight?


# %%
def make_batch(batch=8, queries=20):
    """Queries (B, Q, 2), references (B, Q, 2, 2), sequence (B, S, 2), targets (B, Q)."""
    fine = F.interpolate(torch.randn(batch, 1, 6, 8), size=(12, 16), mode="bilinear")
    coarse = torch.randn(batch, 1, 6, 8)
    pictures = [fine, coarse]
    flag = torch.randint(2, (batch, queries))
    place = torch.rand(batch, queries, 2) * 0.7 + 0.15
    answers = torch.stack(
        [
            torch.stack([bilinear_sample(p[b], place[b])[:, 0] for p in pictures])
            for b in range(batch)
        ]
    )  # (B, L, Q)
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


# %%
shares = torch.stack([learn(seed) for seed in range(3)])  # (seed, flag, level)
right = shares[:, [0, 1], [0, 1]]
print("share on the right level above 0.8 in all seeds:", bool((right > 0.8).all()))
assert (right > 0.8).all()

# %% mystnb={"image": {"alt": "Bars of the share of attention weight on each level. Queries flagged for level 0 put almost all weight on level 0, queries flagged for level 1 on level 1; small error bars over three seeds."}}
figure, axis = plt.subplots(figsize=(5, 3))
for level in range(2):
    mean = shares[:, :, level].mean(0)
    spread = [mean - shares[:, :, level].amin(0), shares[:, :, level].amax(0) - mean]
    place = torch.arange(2) + 0.36 * level - 0.18
    axis.bar(place, mean, 0.34, yerr=torch.stack(spread).clamp(min=0), label=f"on level {level}")
axis.set(xticks=[0, 1], xticklabels=["asked for level 0", "asked for level 1"])
axis.set(ylabel="share of the weights", ylim=(0, 1.05))
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What to see: with one softmax over both levels a query can give nearly all its weight
# to the level that it needs. Bars are means of three seeds, whiskers their range.*

# %% [markdown]
# ## Summary
#
# - $L$ maps become one sequence, the finest first, row by row.
# - Each query samples $K$ points on each level, with one softmax over all $LK$.
# - Offsets are pixels of their level, or with box references parts of the box.
# - At the start a head looks in one direction, $k$ pixels far on each level: a star on every scale.
# - Valid ratios: divide by the own level's for the place in the image without padding, multiply by
#   another's for the place on its padded map.
#
# > **Differs from the paper.** Appendix A.4 lists the heads' directions in another order than the
# > code; the set is the same. The paper multiplies the initial offsets by $1/(2K)$ for boxes; the
# > code divides in the forward pass, so learned offsets are scaled too, and so are ours.
# > **Differs from the official code.** There all levels' samples are stacked; here they are added
# > up one by one.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: section 4.1, Appendices A.2 and A.4.
# - {cite}`lin2017fpn`: feature pyramids, which multi-scale attention replaces.
