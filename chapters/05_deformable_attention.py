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
# - **prove** that it becomes a deformable convolution in one limit and dense attention in the other,
# - **explain** where the keys went, and what that costs,
# - **count** its operations, and say when it is cheaper than dense attention,
# - **watch** a module learn where to look, on a task with a known answer.
#
# You should know: bilinear sampling ({{chapter sampling}}), dense attention ({{chapter attention}}), deformable
# convolution ({{chapter deformable_convolution}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Dense attention lets a query look at all $HW$ places of a map and weigh each. Deformable
# convolution lets a place look at a few moved points, with fixed weights. Deformable attention
# {cite}`zhu2021deformable` takes the few points from one and the weights from the other: **each
# query says where its $K$ points are and how much each counts**.

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from deformable_detr import DeformAttn, ms_deform_attn
from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 Equation 2, one term at a time
#
# $$\text{DeformAttn}(z_q, p_q, x) = \sum_{m=1}^{M} W_m \Big[ \sum_{k=1}^{K} A_{mqk} \cdot
# W'_m \, x(p_q + \Delta p_{mqk}) \Big]$$
#
# | symbol | what it is | where it comes from |
# |:--|:--|:--|
# | $z_q$ | the query, $C$ numbers | given |
# | $p_q$ | its reference point | given |
# | $\Delta p_{mqk}$ | offset of point $k$ of head $m$ | linear in $z_q$ |
# | $A_{mqk}$ | attention weight, $\sum_k A_{mqk} = 1$ | softmax of something linear in $z_q$ |
# | $W'_m, W_m$ | value and output projection of a head | learned |
#
# One query, one head, $K = 3$, a map of one channel, identity projections. Reference at pixel
# (2, 1); the offsets and the scores are what a query might have said.

# %%
height, width = 4, 6
feature_map = torch.arange(24.0).reshape(1, height, width)  # value = 6 y + x
reference = torch.tensor([2.0, 1.0])  # pixels, for the moment
offsets = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 2.0]])
scores = torch.tensor([0.0, math.log(2), math.log(5)])
weights = scores.softmax(0)
print(weights)
assert torch.allclose(weights, torch.tensor([1, 2, 5]) / 8)

# %% [markdown]
# Before you run: the map is $6y + x$, so you can sample it in your head. The three values are 8,
# 9.5 and 20. What is their weighted sum?

# %%
points = (reference + offsets + 0.5) / torch.tensor([width, height])  # normalised
values = bilinear_sample(feature_map, points)[:, 0]
print(values, round((weights * values).sum().item(), 3))
assert torch.allclose(values, torch.tensor([8.0, 9.5, 20.0]))
assert math.isclose((weights * values).sum(), (8 + 2 * 9.5 + 5 * 20) / 8, rel_tol=1e-6)

# %% [markdown]
# ## {{n}}.2 All queries and heads, with loops
#
# The map comes as a sequence of $HW$ tokens, as transformers like it. Head $m$ reads channels
# $mD$ to $(m+1)D$ of the projected values, $D = C/M$.


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
# The library's operator does the same for many maps at once; here there is one level, so an axis of
# length 1 is added. Sizes are all different, so that no two axes can be confused.

# %%
B, Q, M, K, D = 2, 5, 3, 4, 7
value = torch.randn(B, height * width, M, D)
locations = torch.rand(B, Q, M, K, 2) * 1.4 - 0.2  # some of them outside
weights = torch.rand(B, Q, M, K)
by_loop = attention_loop(value, (height, width), locations, weights)
by_library = ms_deform_attn(value, [(height, width)], locations.unsqueeze(3), weights.unsqueeze(3))
print(tuple(by_loop.shape))
torch.testing.assert_close(by_loop, by_library, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## Exercise {{n}}.1  Without loops
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Write the sum with `nn.functional.grid_sample`. Heads can share the batch axis: fold $M$ into $B$.


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
# `grid_sample` wants maps (N, D, H, W) and a grid (N, Q, K, 2) in [-1, 1]; take N = B * M.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `value.permute(0, 2, 3, 1)` brings heads and channels before the tokens. Locations and weights
# have heads on axis 2: `transpose(1, 2)` before folding.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Heads or queries are mixed up: a `reshape` without the `transpose` before it gives
# the right shape with the wrong contents.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 The module
#
# Four linear layers. Offsets come out in **pixels** of the map and are divided by its width and
# height, because reference points are normalised.


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
# Same weights, same result as the library's `DeformAttn`? Its initialisation has zero weights for
# offsets and scores, so randomise them first: zeros would hide mistakes.


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
# The first release of the official code divided by (H, W) instead of (W, H). On square maps nobody
# could see it. On ours:

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
# Write the part before the sampling for one query: normalised locations and weights, from the raw
# outputs of the two linear layers.


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
# In dense attention a weight is a product of a query and a key: the query *compares*. Here weights
# and offsets are linear in the query alone. Nothing is compared. The query must know beforehand
# where to look; what stands there changes the result, but not the weights.
#
# Before you run: all pixels that no sample touches are replaced by noise. Does the output change?

# %%
size, few, places = (12, 18), query[:, :1], references[:, :1]
wide = torch.randn(2, 12 * 18, 12)
before, sampling = library(few, places, wide, size, return_sampling=True)
pixels = sampling.locations[:, :, :, 0] * torch.tensor([18, 12]) - 0.5  # (B, 1, M, K, 2)
touched = torch.zeros(2, *size, dtype=torch.bool)
for b in range(2):
    for x, y in pixels[b].reshape(-1, 2).floor().long().tolist():
        touched[b, max(y, 0) : max(y + 2, 0), max(x, 0) : max(x + 2, 0)] = True
noisy = torch.where(touched.flatten(1).unsqueeze(-1), wide, torch.randn_like(wide) * 100)
after = library(few, places, noisy, size)
print("untouched pixels:", int((~touched).sum()), "of", touched.numel())
assert (~touched).sum() > 300 and torch.allclose(after, before, atol=1e-4)

# %% [markdown]
# It does not: unlike a softmax over all places, this operation does not know that they exist. That
# is the price. The gain is in sections {{n}}.7 and 4.8.

# %% [markdown]
# ## {{n}}.5 One limit: deformable convolution
#
# Take $K = 1$. Then the softmax over one point is 1, and weights say nothing. Take one head for each
# of nine taps, $W'_m$ the identity (each head reads all $C$ channels here, not $C/M$), and let $W_m$ be
# the weight of tap $m$. What is left is {{chapter deformable_convolution}}. (The offsets are given here. Where they come from
# differs: there a convolution makes them, here a linear layer on the query.)

# %%
C, outputs = 5, 7
image = torch.randn(1, C, height, width)
kernel = torch.randn(outputs, C, 3, 3)
moves = torch.randn(1, 18, height, width)  # torchvision: (dy, dx) for each of nine taps
convolved = deform_conv2d(image, moves, kernel, padding=1)

# %%
y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
places = torch.stack([x, y], -1).reshape(-1, 1, 2)  # a query at each pixel
taps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
pixels = places + taps + moves.reshape(9, 2, -1).permute(2, 0, 1).flip(-1)  # (Q, M=9, 2)
locations = ((pixels + 0.5) / torch.tensor([width, height]))[None, :, :, None, None]
value = image.flatten(2).transpose(1, 2).unsqueeze(2).expand(-1, -1, 9, -1)  # W' = identity
ones = torch.ones(1, height * width, 9, 1, 1)
samples = ms_deform_attn(value, [(height, width)], locations, ones)  # (1, Q, 9 * C)
attended = samples @ kernel.permute(2, 3, 1, 0).reshape(9 * C, outputs)  # W_m, side by side
attended = attended.transpose(1, 2).reshape(convolved.shape)
torch.testing.assert_close(attended, convolved, atol=1e-4, rtol=1e-4)
print("K = 1, identity values: a deformable convolution")

# %% [markdown]
# ## {{n}}.6 The other limit: dense attention
#
# Take $K = HW$, put the points on all pixel centres, and take as weights those of a dense softmax.
# Then each query reads everything once, with any weights we like. (These are given: the module's own
# linear layer could not produce them for every image, since it does not see what it compares.)

# %%
dense = nn.MultiheadAttention(12, 3, batch_first=True, bias=False)
expected, dense_weights = dense(query, feature, feature, average_attn_weights=False)
centres = (places[:, 0] + 0.5) / torch.tensor([width, height])  # (HW, 2)
locations = centres.expand(2, 5, 3, 1, -1, -1)  # (B, Q, M, L=1, K=HW, 2)
weights = dense_weights.transpose(1, 2).unsqueeze(3)  # (B, Q, M, 1, HW)
w_query, w_key, w_value = dense.in_proj_weight.chunk(3)
value = (feature @ w_value.T).view(2, -1, 3, 4)
attended = ms_deform_attn(value, [(height, width)], locations, weights) @ dense.out_proj.weight.T
torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
print("K = HW, all pixel centres: dense attention")

# %% [markdown]
# So it lies between the two. Dense attention pays for $HW$ points; a few learned ones are a bet
# that most of them are not needed.

# %% [markdown]
# ## {{n}}.7 Weights at the start
#
# {{chapter attention}} found that a dense softmax starts at about $1/N_k$ everywhere, so that a single pixel
# gets next to no gradient. Here the start is $1/K$, whatever the size of the map.

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
# The paper's Appendix A.1, which takes the cheaper of projecting all $HW$ values before sampling and
# projecting the $N_q K$ samples after it:
#
# $$O\big(2 N_q C^2 + \min(HWC^2, N_q K C^2)\big),$$
#
# against $O(N_q C^2 + N_k C^2 + N_q N_k C)$ for dense attention. Our module, like the official one, always
# projects first, so its second term is $HWC^2$. In the encoder every pixel is a
# query, $N_q = N_k = HW$: dense attention is quadratic in the number of pixels, deformable linear.
# Count, rather than believe. PyTorch's counter sees matrix products; the sampling (four reads and a
# weighted sum for each point, $N_q M K \cdot 5 D$ multiply-adds) is added by formula.


# %%
def count(call):
    """Floating-point operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        call()
    return counter.get_total_flops()


def flops(tokens, C=256, M=8, K=4):
    """(deformable, dense) self-attention over a map of `tokens` pixels."""
    with torch.device("meta"):
        deformable = DeformAttn(C, M, K)
        dense = nn.MultiheadAttention(C, M, batch_first=True)
        x = torch.empty(1, tokens, C)
        parts = (deformable.sampling_offsets, deformable.attention_weights)
        parts += (deformable.value_proj, deformable.output_proj)
    sampling = 2 * 5 * tokens * M * K * (C // M)
    linear = count(lambda: [part(x) for part in parts])
    return linear + sampling, count(lambda: dense(x, x, x))


# %%
C, M, K, N = 256, 8, 4, 1000
linear = 2 * N * C * (2 * C + 3 * M * K)
assert flops(N)[0] == linear + 10 * N * C * K  # by hand: four linear layers, and the sampling
assert flops(N)[1] == 2 * N * C * 4 * C + 2 * 2 * N * N * C
tokens = [100, 300, 1000, 3000, 10_000, 13_400]
counted = torch.tensor([flops(n) for n in tokens], dtype=torch.float64)
print([round(x / 1e9, 1) for x in counted[-1].tolist()], "GFLOPs at 100 x 134")

# %% mystnb={"image": {"alt": "Operations against number of pixels on logarithmic axes. Deformable attention is a straight line of slope one. Dense attention starts somewhat above it and bends to slope two, more than forty times above it at 13,400 pixels."}}
figure, axis = plt.subplots()
axis.loglog(tokens, counted[:, 1], "o-", label="dense")
axis.loglog(tokens, counted[:, 0], "s-", label="deformable, K = 4")
axis.set(xlabel="pixels of the map (all of them queries)", ylabel="floating-point operations")
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: with ten times the pixels, deformable attention costs ten times as much;
# dense attention approaches a hundred times once the pixels are many more than 2C = 512 ({{chapter attention}}). The
# last points are a map of 100 x 134, stride 8 of an 800 x 1066 image.*

# %%
slopes = (counted[-1] / counted[2]).log() / math.log(tokens[-1] / tokens[2])
print("slopes from 1,000 pixels on:", [round(s, 1) for s in slopes.tolist()])
assert math.isclose(slopes[0], 1, abs_tol=0.01) and slopes[1] > 1.7
assert counted[-1, 1] > 40 * counted[-1, 0]

# %% [markdown]
# ## {{n}}.9 Learning where to look
#
# A task with a known answer. The map is a smooth random picture. Each query carries a direction
# (up, down, left or right, as one of four vectors), and must return the picture's value **four
# pixels** from its reference in that direction. Nobody tells it where; it gets the value only.

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
# Before you run: at the start the two points lie one and two pixels to the right, with equal
# weights, for every query. Where will they be at the end?

# %%
trained = [learn(seed) for seed in range(3)]
ends = [sum(losses[-25:]) / 25 for _, losses in trained]
assert all(end < 0.1 * losses[0] for end, (_, losses) in zip(ends, trained, strict=True))


def mean_offset(module):
    """The weighted mean offset in pixels for each of the four directions, (4, 2)."""
    query, centre = torch.eye(4)[None], torch.full((1, 4, 2), 0.5)
    sampling = module.sampling(query, centre, (20, 26))
    offsets = (sampling.locations - 0.5)[0, :, 0, 0] * torch.tensor([26, 20])
    return (offsets * sampling.weights[0, :, 0, 0, :, None]).sum(1).detach()


errors = [(mean_offset(module) - DIRECTIONS).norm(dim=-1).max().item() for module, _ in trained]
print("all within a pixel and a half of the answer:", all(error < 1.5 for error in errors))
assert all(error < 1.5 for error in errors)

# %% mystnb={"image": {"alt": "Left: training loss of three seeds falling towards zero. Right: learned sampling points around the reference for each of four directions, lying close to the crosses that mark the known answers four pixels up, down, left and right."}}
figure, (left_axis, right_axis) = plt.subplots(1, 2)
curves = torch.tensor([losses for _, losses in trained]).unfold(1, 10, 1).mean(-1)
left_axis.plot(curves.mean(0))
left_axis.fill_between(range(curves.shape[1]), curves.amin(0), curves.amax(0), alpha=0.25)
left_axis.set(xlabel="step", ylabel="squared error", ylim=(0, None))
sampling = trained[0][0].sampling(torch.eye(4)[None], torch.full((1, 4, 2), 0.5), (20, 26))
offsets = (sampling.locations[0, :, 0, 0].detach() - 0.5) * torch.tensor([26, 20])
for number, name in enumerate(("up", "down", "left", "right")):
    size = 150 * sampling.weights[0, number, 0, 0].detach()
    right_axis.scatter(*offsets[number].T, s=size, color=f"C{number}", alpha=0.7, label=name)
    right_axis.plot(*DIRECTIONS[number], "+", color=f"C{number}", markersize=14)
right_axis.plot(0, 0, "k.")
right_axis.set(xlabel="dx in pixels", ylabel="dy in pixels", xlim=(-6.5, 6.5), ylim=(6.5, -6.5))
right_axis.legend(loc="upper right", fontsize=7)
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: left, the mean of three seeds and their range. Right, where the two
# points of one trained head lie for each kind of query (disc area is the attention weight); the
# crosses are the known answers. Both points started to the right. For each direction one of them has gone to
# the answer, and the softmax has nearly switched the other off (small discs).*

# %% [markdown]
# ## Exercise {{n}}.3  Cheaper or not?
#
# *difficulty ●○○ · 8 minutes · 3 lines*
#
# In the decoder few queries look at many pixels. Return the operations of the **matrix products** of both
# kinds of cross-attention, as our modules do them: values (and keys) are projected once for every pixel.
# Multiply-adds count as two operations, biases as none.


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
# With as many queries as pixels it does not matter which is which. Only keys and values are
# projected for every pixel.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## Summary
#
# - Each query says where its $K$ points lie and how much each counts, both linear in the query.
# - There are no keys: unlike dense attention, it does not compare, and pixels that it does not
#   sample do not exist for it.
# - $K = 1$ is a deformable convolution; $K = HW$ on all pixels, with the weights of a dense softmax, is
#   dense attention.
# - It starts at weight $1/K$ instead of $1/HW$, and in an encoder its operations grow
#   linearly with the pixels, not with their square.
# - Offsets are pixels of the map: divide x by W and y by H.
#
# > **Differs from the paper.** Eq. 2 has reference points in pixels; this module takes normalised
# > ones, as Eq. 3 does. **Differs from the official code.** There is no module for one scale there;
# > it is the multi-scale module with one level, and so is ours.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: section {{n}}.1 and Appendix A.1.
# - {cite}`vaswani2017attention`: what it replaces.
# - {cite}`dai2017deformable` and {cite}`zhu2019deformable2`: where the offsets come from.
