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
# # {{n}}. Deformable attention on one scale
#
# You will be able to
# - **compute** Eq. 2 of Deformable DETR by hand, and **build** it as a module,
# - **show** that it becomes a deformable convolution in one limit and dense attention in the other,
# - **explain** where the keys went, and what that costs,
# - **count** its operations, in encoder and decoder, in two orders of work,
# - **watch** a module learn where to look, on a task with a known answer.
#
# You should know: bilinear sampling ({{chapter sampling}}), dense attention ({{chapter attention}}),
# deformable convolution ({{chapter deformable_convolution}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Dense attention lets a query weigh all $HW$ places of a map. That is flexible but expensive.
# Deformable convolution reads a few moved points with fixed weights. That is cheap, but its outputs
# belong to the cells of the map: it has no queries of any other kind. Deformable attention
# {cite}`zhu2021deformable` joins the two. It reads a few points, as the convolution does, and
# weighs them for any query, as attention does: **each query says where its $K$ points are, and how
# much each of them counts**.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the green seven on wood with a blue cross and four numbered orange discs around it, two on the seven and two on wood. Right: the four sampled colours as squares, brown, green, brown and green, their weights 0.1, 0.5, 0.1 and 0.3, and arrows to one larger square of the mixed colour, mostly green."}}
import matplotlib.pyplot as plt
from schematics.deformable_attention import one_query

plt.style.use("book.mplstyle")
one_query()

# %% [markdown]
# *Figure {{n}}.1. One query with K = 4 points, on the running example. The blue cross is its reference
# point. It reads the picture's colour at four points (a larger disc has a larger weight) and returns
# the weighted sum. (The picture is drawn paler than it is, so that the points stand out.) Points and
# weights were set by hand here; this chapter is about a query that chooses them itself.*
#
# This operation is used in two places of the detector. In the encoder the queries are the cells of
# the map; in the decoder they are candidates for objects.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The stages of the detector in a row: image, backbone, tokens, encoder, queries, decoder, boxes and classes. Encoder and decoder are filled."}}
from schematics import where_in_the_detector

where_in_the_detector("encoder", "decoder")

# %% [markdown]
# *Figure {{n}}.2. Where this chapter's operation works in the whole detector.*

# %%
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from deformable_detr import DeformAttn, ms_deform_attn
from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample

_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 Equation 2, one term at a time
#
# $$\text{DeformAttn}(z_q, p_q, x) = \sum_{m=1}^{M} W_m \Big[ \sum_{k=1}^{K} A_{mqk} \cdot
# W'_m \, x(p_q + \Delta p_{mqk}) \Big]$$
#
# Read the formula from the inside out. A head $m$ looks at the map $x$ at the reference point plus
# an offset. It projects what it finds, from $C$ channels to its own $D = C/M$, weighs it, and sums
# over its $K$ points. The heads' results are projected once more, back to $C$ channels, and added.
#
# | symbol | what it is | where it comes from |
# |:--|:--|:--|
# | $z_q$ | the query, $C$ numbers | given |
# | $p_q$ | its reference point | given |
# | $\Delta p_{mqk}$ | offset of point $k$ of head $m$ | a linear layer on $z_q$ |
# | $A_{mqk}$ | attention weight, $\sum_k A_{mqk} = 1$ | a linear layer on $z_q$, then a softmax |
# | $W'_m, W_m$ | value projection ($D \times C$) and output projection ($C \times D$) of a head | learned |
#
# We begin with one query, one head, $K = 3$, a map of one channel and no projections. The reference
# is pixel (2, 1). The offsets and the scores (what goes into the softmax) are what a query might have
# said.

# %%
height, width = 4, 6
feature_map = torch.arange(24.0).reshape(1, height, width)  # value = 6 y + x
reference = torch.tensor([2.0, 1.0])  # pixels, for the moment
offsets = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 2.0]])
scores = torch.tensor([0.0, math.log(2), math.log(5)])
weights = scores.softmax(0)
print("weights:", [round(w, 3) for w in weights.tolist()])
assert torch.allclose(weights, torch.tensor([1, 2, 5]) / 8)

# %% [markdown]
# Before you run: the value at (x, y) is $6y + x$, so you can sample this map in your head. What are
# the values at the three points, and what is the weighted sum?

# %%
points = (reference + offsets + 0.5) / torch.tensor([width, height])  # normalised
values = bilinear_sample(feature_map, points)[:, 0]
print("samples:", values.tolist(), "sum:", round((weights * values).sum().item(), 3))
assert torch.allclose(values, torch.tensor([8.0, 9.5, 20.0]))
assert math.isclose((weights * values).sum(), (8 + 2 * 9.5 + 5 * 20) / 8, rel_tol=1e-6)

# %% [markdown]
# ## {{n}}.2 All queries and heads, with loops
#
# Transformers take sequences, so the map comes as $HW$ tokens, row after row. The heads share the
# channels: counted from 0, head $m$ reads channels $mD$ to $(m+1)D$ of the projected values. The
# function below gets values that $W'$ has already projected, with points and weights. It samples,
# weighs and adds; the output projection $W$ comes later.


# %%
def attention_loop(value, size, locations, weights):
    """value: (B, H*W, M, D). size: (H, W). locations: (B, Q, M, K, 2). weights: (B, Q, M, K).

    Returns (B, Q, M * D).
    """
    B, _, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[3]
    output = torch.zeros(B, Q, M, D)
    for b in range(B):
        for m in range(M):
            head = value[b, :, m].T.reshape(D, *size)
            for q in range(Q):
                for k in range(K):
                    sampled = bilinear_sample(head, locations[b, q, m, k])
                    output[b, q, m] += weights[b, q, m, k] * sampled
    return output.flatten(2)


# %% [markdown]
# The library's operator does this for several maps at once. Here there is only one, so we add an
# axis of length 1 for it. We choose B, Q, M, K and D all different, so that a confusion of two of
# these axes is likely to raise an error.

# %%
B, Q, M, K, D = 2, 5, 3, 4, 7
value = torch.randn(B, height * width, M, D)
locations = torch.rand(B, Q, M, K, 2) * 1.4 - 0.2  # some of them outside
weights = torch.rand(B, Q, M, K)
by_loop = attention_loop(value, (height, width), locations, weights)
by_library = ms_deform_attn(value, [(height, width)], locations.unsqueeze(3), weights.unsqueeze(3))
torch.testing.assert_close(by_loop, by_library, atol=1e-5, rtol=1e-5)
print(tuple(by_loop.shape), "equal to the library")

# %% [markdown]
# ## Exercise {{n}}.1  Without loops
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Compute the same with `nn.functional.grid_sample`. It takes one batch axis, so fold the heads into
# it: $B \cdot M$ maps of $D$ channels.


# %% tags=["exercise"]
def attention_vectorised(value, size, locations, weights):
    """The arguments and result of attention_loop. Use torch.nn.functional.grid_sample."""
    # BEGIN SOLUTION
    B, _, M, D = value.shape
    maps = value.permute(0, 2, 3, 1).reshape(B * M, D, *size)
    grid = 2 * locations.transpose(1, 2).flatten(0, 1) - 1  # (B*M, Q, K, 2)
    samples = nn.functional.grid_sample(maps, grid, align_corners=False)  # (B*M, D, Q, K)
    weighted = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return weighted.reshape(B, M * D, -1).transpose(1, 2)
    # END SOLUTION


check("deformable_attention.1", attention_vectorised)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `grid_sample` wants maps (N, D, H, W) and a grid (N, Q, K, 2) in [-1, 1], with
# `align_corners=False`; take N = B * M.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `value.permute(0, 2, 3, 1)` brings heads and channels before the tokens. Locations and weights
# have heads on axis 2, so `transpose(1, 2)` before folding.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one query and one head. With several, a `reshape` without the `transpose` before
# it gives the right shape with the wrong contents.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 The module
#
# To make this a module, we add four linear layers: two on the query (offsets and scores) and two on
# the values ($W'$ before the sampling, $W$ after it).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Block diagram. The query, Q by C, goes through a linear layer to offsets, Q by M by K by 2, and through a linear layer with softmax to weights, Q by M by K. The feature map, HW by C, goes through the linear layer W prime to values, HW by M by D. Offsets plus reference points say where the values are sampled; samples are Q by M by K by D. They are weighed and added over k, and a last linear layer W gives Q by C."}}
from schematics.deformable_attention import the_module

the_module()

# %% [markdown]
# *Figure {{n}}.3. The module, with the shape of what flows at each arrow (without the batch axis).
# Blue depends on the query only, green on the map only. They meet where the values are sampled and
# weighed (orange). The output (grey) depends on both.*
#
# One detail needs care. Offsets come out of their layer in **pixels** of the map, but reference
# points are normalised to [0, 1]. So an offset's x is divided by the width and its y by the height.
# Nothing limits an offset: a point may leave the map, where it reads zero.


# %%
class MyDeformAttn(nn.Module):
    """Eq. 2, with the official parameter names."""

    def __init__(self, embed_dim, num_heads, num_points):
        super().__init__()
        self.M, self.K = num_heads, num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query, reference_points, feature, size):
        """query: (B, Q, C). reference_points: (B, Q, 2). feature: (B, H*W, C). size: (H, W)."""
        B, Q, C = query.shape
        height, width = size
        offsets = self.sampling_offsets(query).view(B, Q, self.M, self.K, 2)
        weights = self.attention_weights(query).view(B, Q, self.M, self.K).softmax(-1)
        value = self.value_proj(feature).view(B, -1, self.M, C // self.M)
        locations = reference_points[:, :, None, None] + offsets / torch.tensor([width, height])
        return self.output_proj(attention_loop(value, size, locations, weights))


# %% [markdown]
# Does it agree with the library's `DeformAttn`, given the same parameters? In that module the weights
# of the layers for offsets and scores start at zero. Zeros would hide mistakes, so we first fill all
# layers with random numbers.


# %%
def randomise(module, scale=0.5):
    """Random numbers everywhere; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return module


library = randomise(DeformAttn(embed_dim=12, num_heads=3, num_points=4))
mine = MyDeformAttn(12, 3, 4)
mine.load_state_dict(library.state_dict())
query, feature = torch.randn(2, 5, 12), torch.randn(2, height * width, 12)
references = torch.rand(2, 5, 2)
result = library(query, references, feature, (height, width))
torch.testing.assert_close(
    mine(query, references, feature, (height, width)), result, atol=1e-5, rtol=1e-5
)
print(tuple(result.shape), "equal")

# %% [markdown]
# The first release of the official code divided x by the height and y by the width (its issue 6). On
# square maps that makes no difference, so a test on square maps cannot find it. On our map of 4 x 6 it
# shows at once.
#
# To see the points we call the library's method `sampling`. It returns only where the module looks,
# `locations` (B, Q, M, L, K, 2), and how much each point counts, `weights` (B, Q, M, L, K). The axis of
# $L$ levels has length 1 in this chapter; the next chapter puts it to use.

# %%
sampling = library.sampling(query, references, (height, width))
offsets = (sampling.locations - references[:, :, None, None, None]) * torch.tensor([width, height])
swapped = references[:, :, None, None, None] + offsets / torch.tensor([height, width])
shift = ((swapped - sampling.locations) * torch.tensor([width, height])).abs().amax()
print("the swap moves a sample by up to", round(shift.item(), 1), "pixels")
assert shift > 1

# %% [markdown]
# ## Exercise {{n}}.2  From scores to locations
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# Write the blue part of Figure {{n}}.3 for one query: from the raw outputs of its two linear layers to
# normalised locations and to weights.


# %% tags=["exercise"]
def where_and_how_much(raw_offsets, raw_scores, reference, size):
    """raw_offsets: (M, K, 2), pixels, (x, y). raw_scores: (M, K). reference: (2,). size: (H, W).

    Returns locations (M, K, 2), normalised, and weights (M, K).
    """
    # BEGIN SOLUTION
    height, width = size
    locations = reference + raw_offsets / torch.tensor([width, height])
    return locations, raw_scores.softmax(-1)
    # END SOLUTION


check("deformable_attention.2", where_and_how_much)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# An offset of (1, 0) is one pixel to the right, which is $1/W$ in normalised units.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `size` is (H, W), points are (x, y): divide by `torch.tensor([width, height])`. Each head has a
# softmax of its own.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first map is square. Which of width and height did you divide x by?
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 Where are the keys?
#
# In dense attention a weight comes from a product of a query and a key, so the query is *compared*
# with the content of each place. Deformable attention has no keys. Offsets and weights are computed
# from the query alone.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two diagrams. In dense attention, an arrow named keys leads from the content of the map to where and how much, beside the arrow from the query; values lead to the output. In deformable attention the keys' arrow is dashed and red, named no keys; the rest is the same."}}
from schematics.deformable_attention import who_decides

who_decides()

# %% [markdown]
# *Figure {{n}}.4. What decides where to look, and how much each place counts. In dense attention both
# the query and the map do; in deformable attention only the query does.*
#
# Two experiments show what that means, with one query for each of two images. With
# `return_sampling=True` the module also returns where it looked. From this we mark the four pixels
# around each sample as `touched`. In the first experiment we leave these pixels alone and replace all
# **others** by noise.
#
# Before you run: does the output change?

# %%
size, asking, places = (12, 18), query[:, :1], references[:, :1]
wide = torch.randn(2, 12 * 18, 12)
before, sampling = library(asking, places, wide, size, return_sampling=True)
pixels = sampling.locations[:, :, :, 0] * torch.tensor([18, 12]) - 0.5  # (B, 1, M, K, 2)
touched = torch.zeros(2, *size, dtype=torch.bool)  # for each pixel of both images
for b in range(2):
    for x, y in pixels[b].reshape(-1, 2).floor().long().tolist():
        touched[b, max(y, 0) : max(y + 2, 0), max(x, 0) : max(x + 2, 0)] = True
touched = touched.flatten(1).unsqueeze(-1)
noise = torch.randn_like(wide) * 100
after = library(asking, places, torch.where(touched, wide, noise), size)
print(f"{int((~touched).sum())} of {touched.numel()} pixels replaced, output moved by", end=" ")
print(f"{(after - before).abs().max():.1f}")
assert (~touched).sum() > 300 and torch.allclose(after, before, atol=1e-4)

# %% [markdown]
# It does not change. This is *sparsity*: the operation does not know that the other pixels exist. But
# it says nothing about keys yet, because a query could still compare the pixels that it does sample.
# So in the second experiment we replace just **those**.
#
# Before you run: what will change now, the output, the points, or the weights?

# %%
changed = torch.where(touched, noise, wide)
after, sampling_after = library(asking, places, changed, size, return_sampling=True)
print("output moved:", bool((after - before).abs().max() > 1))
print("points moved:", not torch.equal(sampling.locations, sampling_after.locations))
print("weights moved:", not torch.equal(sampling.weights, sampling_after.weights))

# %% tags=["hide-input"]
assert (after - before).abs().max() > 1
assert torch.equal(sampling.locations, sampling_after.locations)
assert torch.equal(sampling.weights, sampling_after.weights)

# %% [markdown]
# The output moves, but points and weights stay as they were, because they do not depend on the
# content of the map at the points. The same replacement does move the weights of dense attention,
# since it changes the keys:

# %%
dense = nn.MultiheadAttention(12, 3, batch_first=True, bias=False)
weights_before = dense(asking, wide, wide)[1]
weights_after = dense(asking, changed, changed)[1]
print("weights of dense attention moved:", bool((weights_after - weights_before).abs().max() > 0.1))
assert (weights_after - weights_before).abs().max() > 0.1

# %% [markdown]
# Then how can deformable attention find anything? It can because the **query** itself has seen
# something. In an encoder the query *is* the content of its own cell (plus a code of its position),
# as the layers before have left it. So there the offsets and weights do depend on the picture, but
# within one layer only on the query's own cell. (The offsets of a deformable 1 x 1 convolution depend on the picture in the same way.)
# In a decoder the query has gathered its content in the layers before.
#
# We can see this for the encoder. We change the content of one cell of a map whose cells are the
# queries, and check whose weights move.

# %%
own = torch.randn(1, 12 * 18, 12)  # in an encoder: the map's cells are the queries
centres = torch.rand(1, 12 * 18, 2)
poked = own.clone()
poked[0, 40] += 1.0  # another content in cell 40
asked, poked_asked = (library.sampling(x, centres, size).weights for x in (own, poked))
moved = (poked_asked - asked).abs().flatten(2).amax(-1)[0]  # (Q,)
print("cells whose weights moved:", (moved > 1e-5).nonzero().flatten().tolist())
assert moved.argmax() == 40 and moved[40] > 0.01

# %% [markdown]
# Few points and no keys may also have a price. Table 1 of the paper compares DETR, trained for 500
# epochs, with Deformable DETR, trained for 50. On small objects the average precision rose from
# 20.5 to 26.4, probably thanks to finer maps that dense attention could not afford. On **large**
# objects it *fell*, from 61.1 to 58.0. (The two models differ in more than the attention, and in
# the length of training, so this is a hint rather than a proof.) Sections {{n}}.7 and {{n}}.8 show
# what one gains in return.

# %% [markdown]
# ## {{n}}.5 One limit: deformable convolution
#
# Two special cases show how this operation relates to what we know. The first: take **one head, one
# point, and the identity for $W'$**. A softmax over a single point is always 1, so the weights drop out.
# What is left is to read one moved point and to multiply by $W$. That is a deformable 1 x 1 convolution.
# With the cells of a map as queries the whole modules agree, offsets included, since a linear layer on
# each cell is a 1 x 1 convolution:

# %%
C = 5
single = randomise(DeformAttn(embed_dim=C, num_heads=1, num_points=1))
with torch.no_grad():
    single.value_proj.weight.copy_(torch.eye(C))
    single.value_proj.bias.zero_()
image = torch.randn(1, C, height, width)
cells = image.flatten(2).transpose(1, 2)  # queries and map at once
y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
places = torch.stack([x, y], -1).reshape(-1, 2)  # the pixels, (HW, 2)
centres = ((places + 0.5) / torch.tensor([width, height]))[None]
attended = single(cells, centres, cells, (height, width))

# %%
offsets = nn.functional.conv2d(
    image,
    single.sampling_offsets.weight.flip(0)[:, :, None, None],  # torchvision: (dy, dx)
    single.sampling_offsets.bias.flip(0),
)
kernel, bias = single.output_proj.weight[:, :, None, None], single.output_proj.bias
convolved = deform_conv2d(image, offsets, kernel, bias)
attended = attended.transpose(1, 2).reshape(convolved.shape)
torch.testing.assert_close(attended, convolved, atol=1e-4, rtol=1e-4)
print("M = 1, K = 1, W' = I: a deformable 1 x 1 convolution")

# %% [markdown]
# A 3 x 3 kernel has nine taps, so it takes nine heads, one for each tap, and $W_m$ is the weight of
# tap $m$. Each of these heads must read all $C$ channels. The module cannot do that, because its heads
# share the channels out among themselves ($D = C/M$), but the operator can. Each head gets one
# point per pixel: the pixel itself, plus the step to the head's tap, plus the tap's own offset.

# %%
outputs = 7
kernel = torch.randn(outputs, C, 3, 3)
moves = torch.randn(1, 18, height, width)  # torchvision: (dy, dx) for each of nine taps
convolved = deform_conv2d(image, moves, kernel, padding=1)
taps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
pixels = places[:, None] + taps + moves.reshape(9, 2, -1).permute(2, 0, 1).flip(-1)  # (Q, M=9, 2)
locations = ((pixels + 0.5) / torch.tensor([width, height]))[None, :, :, None, None]
value = cells.unsqueeze(2).expand(-1, -1, 9, -1)  # W' = identity, all channels for each head
ones = torch.ones(1, height * width, 9, 1, 1)
samples = ms_deform_attn(value, [(height, width)], locations, ones)  # (1, Q, 9 * C)
attended = samples @ kernel.permute(2, 3, 1, 0).reshape(9 * C, outputs)  # W_m, side by side
attended = attended.transpose(1, 2).reshape(convolved.shape)
torch.testing.assert_close(attended, convolved, atol=1e-4, rtol=1e-4)
print("M = 9, K = 1, W' = I: a deformable 3 x 3 convolution")

# %% [markdown]
# ## {{n}}.6 The other limit: dense attention
#
# The second special case: take $K = HW$, put the points on all pixel centres, and use as weights
# those of a dense softmax. Then each query reads every pixel once, with the weights of dense
# attention. (We must hand these weights in. The module's own linear layer could not produce them for
# every picture, since it sees the query only, and no keys to compare it with.) We reuse the five
# queries and the map of 24 pixels from section {{n}}.3, and the dense attention from section {{n}}.4.

# %%
expected, dense_weights = dense(query, feature, feature, average_attn_weights=False)
locations = centres[0].expand(2, 5, 3, 1, -1, -1)  # (B, Q, M, L=1, K=HW, 2)
weights = dense_weights.transpose(1, 2).unsqueeze(3)  # (B, Q, M, 1, HW)
w_query, w_key, w_value = dense.in_proj_weight.chunk(3)
value = (feature @ w_value.T).unflatten(-1, (3, 4))  # M = 3 heads of D = 4 channels
attended = ms_deform_attn(value, [(height, width)], locations, weights) @ dense.out_proj.weight.T
torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
print("K = HW, all pixel centres, weights of a dense softmax: dense attention")

# %% [markdown]
# So deformable attention lies between the two. Dense attention pays for all $HW$ points. Deformable
# attention reads a few learned ones, and relies on most of the others not being needed.

# %% [markdown]
# ## {{n}}.7 Weights at the start
#
# {{chapter attention}} found that a dense softmax starts at about $1/N_k$ everywhere, so that a single
# pixel gets next to no gradient. Here the weights start at $1/K$, whatever the size of the map. We ask
# an untrained module, and print $1/HW$ beside it.

# %%
start = DeformAttn(embed_dim=12, num_heads=3, num_points=4)
for side in (4, 16, 64):
    size = (side, side + 2)
    sampling = start.sampling(query, references, size)
    low, high = sampling.weights.amin().item(), sampling.weights.amax().item()
    pixels = size[0] * size[1]
    print(f"{pixels:5} pixels: dense {1 / pixels:.4f}, deformable {low:.2f} to {high:.2f}")
    assert torch.allclose(sampling.weights, torch.tensor(1 / 4))

# %% [markdown]
# ## {{n}}.8 What it costs
#
# Values can be projected by $W'$ before the sampling or after it. If $W'$ has no bias, both give the
# same result, because projecting is then linear. But they cost differently.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels with the same grid of 6 by 8 pixels and four orange points. Left: all pixels are green, so HW products with W prime, and then four samples are taken. Right: the pixels are white; four samples are taken and only these are green, so Q K products."}}
from schematics.deformable_attention import two_orders

two_orders()

# %% [markdown]
# *Figure {{n}}.5. Two orders of work; filled green is what gets multiplied by $W'$. Left, the cost grows with the map,
# right, with the number of queries.*
#
# The paper's Appendix A.1 counts multiply-adds, for $N_q$ queries (our $Q$):
#
# | step | multiply-adds | why |
# |:--|:--|:--|
# | offsets and scores | $3 N_q C M K$ | a linear layer from $C$ to $3MK$ numbers |
# | project all pixels first | $H W C^2$ | a $C \times C$ matrix for each pixel |
# | *or* project the samples | $N_q K C^2$ | $M$ heads, $K$ samples, from $C$ to $C/M$ |
# | read and weigh | $5 N_q K C$ | four pixels for a sample, and one product with its weight |
# | output projection | $N_q C^2$ | a $C \times C$ matrix for each query |
#
# The **5** counts four products to interpolate and one to weigh, for each of the
# $N_q \cdot MK \cdot C/M$ numbers read. (If the samples are projected afterwards, each head must read all
# $C$ channels, not only its own $C/M$. Then this step costs $5 N_q M K C$. The paper's count leaves that
# out; ours below does not.) The paper's total is
#
# $$N_q C^2 + \min(HWC^2, N_q K C^2) + 5 N_q K C + 3 N_q C M K.$$
#
# With the paper's $M = 8$, $K = 4$ and $C = 256$ the last two terms together are less than
# $N_q C^2$, because $5K + 3MK < C$. So the paper shortens the sum to
# $O(2 N_q C^2 + \min(HWC^2, N_q K C^2))$. This step holds on **one** scale only. The detector reads
# four scales with 4 points each, which makes 16 points per head:

# %%
for points in (4, 16):
    small = 5 * points + 3 * 8 * points
    print(f"{points:2} points per head: 5K + 3MK = {small}, C = 256")
assert 5 * 4 + 3 * 8 * 4 == 116 < 256 < 464 == 5 * 16 + 3 * 8 * 16

# %% [markdown]
# So on four scales the two terms may not be dropped: together they outweigh the output projection. Most
# of the 464, namely $3MK = 384$, are the layers for offsets and scores.
#
# **In the encoder** every pixel is a query, so $N_q = HW$, and everything grows in proportion to
# $HW$. Dense attention costs $O(N_q C^2 + N_k C^2 + N_q N_k C)$, whose last term grows with the square
# of $HW$. We check this by counting. PyTorch's counter sees the matrix products (it counts a
# multiply-add as two operations); the sampling is added by formula.


# %%
def count(call):
    """Floating-point operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        call()
    return counter.get_total_flops()


def flops(queries, pixels, C=256, M=8, K=4):
    """(deformable, dense) attention from `queries` to a map of `pixels`."""
    with torch.device("meta"):
        ours, dense = DeformAttn(C, M, K), nn.MultiheadAttention(C, M, batch_first=True)
        query, memory = torch.empty(1, queries, C), torch.empty(1, pixels, C)
        on_query = (ours.sampling_offsets, ours.attention_weights, ours.output_proj)
    sampling = 2 * 5 * queries * K * C
    linear = count(lambda: [ours.value_proj(memory), *[layer(query) for layer in on_query]])
    return linear + sampling, count(lambda: dense(query, memory, memory))


# %%
C, M, K, N = 256, 8, 4, 1000
assert flops(N, N)[0] == 2 * N * C * (2 * C + 3 * M * K + 5 * K)  # the table, N pixels and queries
assert flops(N, N)[1] == 2 * N * C * 4 * C + 2 * 2 * N * N * C
tokens = [100, 300, 1000, 3000, 10_000, 13_400]
encoder = torch.tensor([flops(n, n) for n in tokens], dtype=torch.float64)
deformable, dense_cost = (encoder[-1] / 1e9).round(decimals=1).tolist()
print(f"encoder at 100 x 134: {deformable} GFLOPs deformable, {dense_cost} dense")

# %% [markdown]
# **In the decoder** 300 queries look at the same map. Projecting the samples would cost
# $N_q K C^2$, so the paper says that the decoder's cost does not depend on the map's size. But the
# official code, like our module, always projects all values first. So its cost does grow with the map.

# %%
decoder = torch.tensor([flops(300, n) for n in tokens], dtype=torch.float64)
late = 2 * 300 * C * (C + 3 * M * K + K * C + 5 * M * K)  # each head reads all C channels: 5MK
print("decoder, 100 to 13,400 pixels, in GFLOPs")
for name, (low, high) in (
    ("  as in the code", decoder[[0, -1], 0]),
    ("  dense", decoder[[0, -1], 1]),
):
    print(f"{name}: {low / 1e9:.1f} to {high / 1e9:.1f}")
print(f"  project the samples: {late / 1e9:.1f} for any map")

# %% mystnb={"image": {"alt": "Two panels of operations against the number of pixels on logarithmic axes. Encoder: deformable attention is a straight line of slope one; dense attention starts near it and bends to slope two, forty times above at 13,400 pixels. Decoder with 300 queries: dense attention and deformable attention as in the code both grow with the pixels; projecting the samples is a horizontal line."}}
figure, axes = plt.subplots(1, 2, sharey=True)
for axis, counted, name in zip(axes, (encoder, decoder), ("encoder", "decoder"), strict=True):
    axis.loglog(tokens, counted[:, 1], "o-", color="C1", label="dense")
    axis.loglog(tokens, counted[:, 0], "s-", color="C0", label="deformable, as in the code")
    axis.set(xlabel="pixels of the map", title=name)
axes[1].axhline(late, color="C2", label="deformable, project the samples")
axes[0].set_ylabel("floating-point operations")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# *Figure {{n}}.6. In the encoder (left) the pixels are also the queries: deformable attention is
# linear in their number, dense attention becomes quadratic. In the decoder (right) there are 300
# queries. Only projecting the samples, which the code does not do, has a cost that does not depend
# on the map. It pays on large maps; below about 1,400 pixels the code's order is the cheaper one.
# The last points are a map of 100 x 134, stride 8 of an 800 x 1066 image.*

# %% tags=["hide-input"]
slopes = (encoder[-1] / encoder[2]).log() / math.log(tokens[-1] / tokens[2])
assert math.isclose(slopes[0], 1, abs_tol=0.01) and slopes[1] > 1.7
assert encoder[-1, 1] > 40 * encoder[-1, 0]
assert decoder[-1, 0] > 10 * decoder[0, 0] and flops(300, 1300)[0] < late < flops(300, 1400)[0]

# %% [markdown]
# ## Exercise {{n}}.3  Cheaper or not?
#
# *difficulty ●○○ · 8 minutes · 3 lines*
#
# Write down the formulas behind the decoder's curves: the operations of the **matrix products** of
# cross-attention, deformable and dense, when values (and keys) are projected once for every pixel. As
# in PyTorch's counter, a multiply-add is two operations, and a bias none. Leave the sampling out.


# %% tags=["exercise"]
def cross_attention_flops(queries, pixels, C, M, K):
    """Returns (deformable, dense) operations; deformable without its sampling."""
    # BEGIN SOLUTION
    deformable = 2 * queries * C * (3 * M * K + C) + 2 * pixels * C * C
    projections = 2 * (2 * queries + 2 * pixels) * C * C
    return deformable, projections + 2 * 2 * queries * pixels * C
    # END SOLUTION


check("deformable_attention.3", cross_attention_flops)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A linear layer from $a$ to $b$ on $n$ rows costs $2nab$. Deformable: offsets ($2MK$ outputs),
# weights ($MK$) and output projection on the queries, value projection on the pixels.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Dense: query and output projections on the queries, key and value projections on the pixels, then
# two products of $N_q \times N_k$ with $C$ channels in all heads together.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has as many queries as pixels, so it does not matter which is which. Only keys and
# values are projected for every pixel.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## Exercise {{n}}.4  Project last
#
# *difficulty ●●● · 30 minutes · 7 lines*
#
# Here you build the order that the code does not use: project after sampling. It can save even more
# than the paper says. Since everything is linear, you can sample, **weigh, add over the K points**,
# and only then project: one product with $W'_m$ per query and head, $N_q C^2$ in all instead of
# $N_q K C^2$.
#
# Each head now reads all $C$ channels at its own points, because its projection comes later. (So
# reading costs $5 N_q M K C$, as said above.) The result must be that of
# `output_proj(attention(value_proj(feature)))` without biases, and no matrix product may have $HW$ rows.
# Keep the function for detectors with few queries and large maps.


# %% tags=["exercise"]
def project_last(feature, size, locations, weights, value_weight, output_weight):
    """feature: (B, H*W, C), not projected. locations: (B, Q, M, K, 2). weights: (B, Q, M, K).

    value_weight, output_weight: (C, C), as in nn.Linear. Returns (B, Q, C). You may call
    ms_deform_attn(value, [size], locations.unsqueeze(3), weights.unsqueeze(3)).
    """
    # BEGIN SOLUTION
    B, Q, M, _ = weights.shape
    C = feature.shape[-1]
    everything = feature.unsqueeze(2).expand(-1, -1, M, -1)  # each head sees all channels
    read = ms_deform_attn(everything, [size], locations.unsqueeze(3), weights.unsqueeze(3))
    per_head = value_weight.view(M, C // M, C)
    heads = torch.einsum("bqmc,mdc->bqmd", read.view(B, Q, M, C), per_head)
    return heads.flatten(2) @ output_weight.T
    # END SOLUTION


check("deformable_attention.4", project_last)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Repeat the feature map for every head: `feature.unsqueeze(2).expand(-1, -1, M, -1)`. The operator
# then returns (B, Q, M * C).
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `value_weight.view(M, C // M, C)` are the heads' own $W'_m$: head $m$ makes outputs $mD$ to
# $(m+1)D$. An `einsum` over the channels gives (B, Q, M, D).
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one head. With several, head $m$ has rows $mD$ to $(m+1)D$ of `value_weight`,
# not columns, and not every $M$-th row. If you fail the last check, some product still runs over all
# pixels.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.9 Learning where to look
#
# Can a query learn where its points belong if the loss only compares what it found with what it
# should have found? Again we take a task with a known answer. The map is a smooth random picture.
# Each query carries a direction (up, down, left or right, as one of four vectors), and it must
# return the picture's value **four pixels** away from its reference in that direction. The module
# wants as many channels in the map as in the query, so the picture is repeated in all four channels
# of the map; the answer is the first channel of the output.

# %%
DIRECTIONS = torch.tensor([[0.0, -4.0], [0.0, 4.0], [-4.0, 0.0], [4.0, 0.0]])  # (dx, dy)
BLUR = torch.exp(-(torch.arange(-8.0, 9) ** 2) / (2 * 3.0**2))


def make_batch(batch=8, queries=24, height=20, width=26):
    """Queries (B, Q, 4), references (B, Q, 2), features (B, H*W, 4), targets (B, Q)."""
    noise = torch.randn(batch, 1, height + 16, width + 16)
    picture = nn.functional.conv2d(noise, BLUR.view(1, 1, 1, -1))
    picture = nn.functional.conv2d(picture, BLUR.view(1, 1, -1, 1))
    picture = picture / picture.std()
    kind = torch.randint(4, (batch, queries))
    size = torch.tensor([width, height])
    references = (torch.rand(batch, queries, 2) * (size - 12) + 6) / size
    places = references + DIRECTIONS[kind] / size
    targets = torch.stack(
        [bilinear_sample(p, place)[:, 0] for p, place in zip(picture, places, strict=True)]
    )
    features = picture.flatten(2).transpose(1, 2).expand(-1, -1, 4)
    return nn.functional.one_hot(kind, 4).float(), references, features, targets


def learn(seed, steps=250):
    """Train one head with two points; returns the module and its losses."""
    torch.manual_seed(seed)
    module = DeformAttn(embed_dim=4, num_heads=1, num_points=2)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        query, references, features, targets = make_batch()
        loss = (module(query, references, features, (20, 26))[..., 0] - targets).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return module, losses


# %% [markdown]
# Where do the two points lie before training?


# %%
def learned_points(module):
    """Offsets in pixels (4, K, 2) and weights (4, K) for each of the four directions."""
    sampling = module.sampling(torch.eye(4)[None], torch.full((1, 4, 2), 0.5), (20, 26))
    offsets = (sampling.locations[0, :, 0, 0] - 0.5) * torch.tensor([26, 20])
    return offsets.detach(), sampling.weights[0, :, 0, 0].detach()


offsets, weights = learned_points(DeformAttn(embed_dim=4, num_heads=1, num_points=2))
print("offsets of each query:", offsets[0].round(decimals=1).tolist())
print("weights of each query:", weights[0].tolist())
assert torch.allclose(offsets, torch.tensor([[1.0, 0.0], [2.0, 0.0]]), atol=1e-5)

# %% [markdown]
# All four kinds of query start alike: with one point one pixel to the right of the reference, one point
# two pixels to the right, and equal weights. (The next chapter draws these first offsets.)
#
# Before you run: one point would be enough for each direction. Where will the two be at the end, and
# with what weights?

# %%
trained = [learn(seed) for seed in range(3)]
for seed, (module, _) in enumerate(trained):
    offsets, weights = learned_points(module)
    heavy = offsets[torch.arange(4), weights.argmax(-1)]  # the point with the larger weight
    error, least = (heavy - DIRECTIONS).norm(dim=-1).max(), weights.amax(-1).min()
    print(
        f"seed {seed}: the heavier point is within half a pixel of the answer:", bool(error < 0.5)
    )
    assert error < 0.5 and least > 0.7

# %% mystnb={"image": {"alt": "Left: three training losses, one line per seed, falling to zero. Right: learned points around the reference for each of four directions. A large disc lies on each of the four crosses that mark the answers, and a small disc lies elsewhere."}}
figure, (left_axis, right_axis) = plt.subplots(1, 2)
for seed, (_, losses) in enumerate(trained):
    curve = torch.tensor(losses).unfold(0, 10, 1).mean(-1)
    line = ("-", "--", ":")[seed]
    left_axis.plot(range(10, 251), curve, line, color="0.3", linewidth=1.2, label=f"seed {seed}")
left_axis.set(xlabel="step", ylabel="squared error, mean of 10 steps", ylim=(0, None))
left_axis.legend()
offsets, weights = learned_points(trained[0][0])
for number, name in enumerate(("up", "down", "left", "right")):
    colour = f"C{number}"
    right_axis.scatter(
        *offsets[number].T, s=150 * weights[number], color=colour, alpha=0.7, label=name
    )
    right_axis.plot(*DIRECTIONS[number], "+", color=colour, markersize=14)
right_axis.plot(0, 0, "k.")
right_axis.set(xlabel="dx in pixels", ylabel="dy in pixels", xlim=(-6.5, 6.5), ylim=(6.5, -6.5))
right_axis.legend(loc="upper right", fontsize=7)
plt.show()

# %% [markdown]
# *Figure {{n}}.7. Left, the loss of three seeds. Right, the two points of one trained head for each kind
# of query; a disc's area is its weight, crosses are the known answers. For each direction one point
# has moved to the answer, and the softmax has nearly switched off the other one (the small disc).*

# %% [markdown]
# ## Summary
#
# - Each query says where its $K$ points lie (linear in the query) and how much each counts (a softmax
#   of something linear in the query).
# - There are no keys: the content of the map at a point changes the output, but neither points nor
#   weights. Pixels that are not sampled have no influence at all.
# - One head with one point and $W' = I$ is a deformable 1 x 1 convolution; $K = HW$ on all pixels, with
#   the weights of a dense softmax, is dense attention.
# - In an encoder its cost is linear in the pixels. In a decoder it could be independent of them; as
#   coded it is not.
# - Offsets are pixels of the map: divide x by W and y by H.
#
# > **Differs from the paper.** Eq. 2 has reference points in pixels; this module takes normalised
# > ones, as Eq. 3 does. Appendix A.1 takes the cheaper of two orders of work; the code always projects
# > first. **Differs from the official code.** There is no module for one scale there; it is the
# > multi-scale module with one level, and so is ours.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: Eq. 2, Table 1 and Appendix A.1.
# - {cite}`vaswani2017attention`: dense attention, which it replaces.
# - {cite}`dai2017deformable` and {cite}`zhu2019deformable2`: deformable convolution, from which it
#   takes the offsets.
