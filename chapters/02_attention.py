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
# # {{n}}. Attention
#
# You will be able to
# - **compute** attention by hand, for one query, for many, and for several heads,
# - **match** the paper's Eq. 1 with the matrices inside `torch.nn.MultiheadAttention`,
# - **predict** how evenly attention is spread before training, and what that does to gradients,
# - **count** the work and the memory of attention on a feature map, at any stride,
# - **say** why small objects suffer first, and what can be done about it.
#
# You should know: PyTorch tensors, `softmax`, matrix products, autograd.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# {{chapter sampling}} read a feature map at one place that somebody named. Attention
# {cite}`vaswani2017attention` reads **every** place and decides afterwards how much each one
# counts. That is its strength. On images it is also its cost, and this chapter measures both.
#
# DETR {cite}`carion2020detr`, the first detector made of attention, needed 500 epochs to train and
# was weak on small objects. Deformable DETR {cite}`zhu2021deformable` blames two properties of
# dense attention for it. We find both of them here with numbers of our own.

# %%
import itertools
import json
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from deformable_detr.exercises import check

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 One query, three keys, by hand
#
# A **query** is a vector that asks. **Keys** are vectors that may answer; each key has a **value**,
# which is what the query takes home. Here keys have 4 numbers and values have 2.

# %%
query = torch.tensor([1.0, 2.0, 0.0, 1.0])
keys = torch.tensor([[2.0, 1.0, 3.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, -1.0, 0.0, 1.0]])
values = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])

# %% [markdown]
# Three steps. First, a **score** for each key: its dot product with the query, divided by the root
# of the width, $\sqrt{4} = 2$. Do it in your head: $1 \cdot 2 + 2 \cdot 1 + 0 \cdot 3 + 1 \cdot 0$
# is 4, and half of that is 2.

# %%
scores = [(query @ key).item() / math.sqrt(4) for key in keys]
print(scores)
assert scores == [2.0, 1.0, 0.0]

# %% [markdown]
# Second, **weights**: the exponential of each score, divided by their sum. That is a softmax. All
# weights are positive and together they make 1.

# %%
exponentials = [math.exp(score) for score in scores]
weights = [e / sum(exponentials) for e in exponentials]
print([round(weight, 3) for weight in weights])
assert math.isclose(sum(weights), 1)

# %% [markdown]
# Third, the **output**: the average of the values under these weights.
#
# **Before you run**: the first value is (10, 0), and the first key has the largest weight. Is the
# first number of the output above or below 6.65?

# %%
output = sum(weight * value for weight, value in zip(weights, values, strict=True))
print([round(number, 3) for number in output.tolist()])
assert output[0] < 6.65  # the third value pulls it down by 0.9

# %% [markdown]
# Attention never picks a key. It *mixes*, and every key has its part, however small. Remember that
# for section {{n}}.6.
#
# ## {{n}}.2 Many queries: a loop, then matrices
#
# Now 2 queries, 5 keys, width 3, values of width 4. No two sizes are the same, so that a mistake in
# the axes cannot hide.


# %%
def attend_loop(queries, keys, values):
    """queries: (Q, D). keys: (N, D). values: (N, E). Returns (Q, E)."""
    rows = []
    for query in queries:
        scores = [query @ key / math.sqrt(len(query)) for key in keys]
        weights = torch.stack(scores).exp()
        weights = weights / weights.sum()
        rows.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return torch.stack(rows)


# %% [markdown]
# All scores at once are one matrix product. The softmax runs along the keys, the **last** axis:
# each query shares out its own 1.


# %%
def attend(queries, keys, values):
    """The same with matrices; leading axes (batch, heads) are carried along."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])  # (..., Q, N)
    return scores.softmax(-1) @ values


# %%
queries, keys, values = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 4)
by_loop, by_matrix = attend_loop(queries, keys, values), attend(queries, keys, values)
by_torch = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
assert torch.allclose(by_loop, by_matrix, atol=1e-6)
assert torch.allclose(by_torch, by_matrix, atol=1e-6)
print(tuple(by_matrix.shape))

# %% [markdown]
# ### Why divide by $\sqrt{D}$?
#
# A dot product of two random vectors is a sum of $D$ terms, so its spread grows like $\sqrt{D}$.
# Dividing brings it back to 1, whatever the width.

# %%
for D in (4, 64, 256):
    products = (torch.randn(20_000, D) * torch.randn(20_000, D)).sum(-1)
    print(D, "spread", round(products.std().item() / math.sqrt(D), 1), "times the root of D")
    assert math.isclose(products.std().item(), math.sqrt(D), rel_tol=0.03)

# %% [markdown]
# Without the division the softmax would be almost a hard choice before anything has been learned.

# %% mystnb={"image": {"alt": "Two bar charts of the attention weights of ten keys. Without the division two keys share five sixths of the weight. With it, eight of the ten keys have a visible part, the largest a fifth."}}
D = 64
wide_query, wide_keys = torch.randn(D), torch.randn(10, D)
raw = wide_keys @ wide_query
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 2.6))
for axis, scale, title in zip(axes, (1, math.sqrt(D)), ("undivided", "divided by 8"), strict=True):
    axis.bar(range(10), (raw / scale).softmax(0))
    axis.set(xlabel="key", xticks=range(10), title=f"scores {title}")
axes[0].set(ylabel="weight", ylim=(0, 1))
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: the same ten keys of width 64. Undivided scores let two random keys take
# five sixths of the weight (left); divided by $\sqrt{64}$ they leave the choice open (right).*

# %%
top_two = [(raw / scale).softmax(0).topk(2).values.sum() for scale in (1, math.sqrt(D))]
assert top_two[0] > 0.8 and top_two[1] < 0.5
many = torch.randn(500, D) @ wide_keys.T  # and on average over 500 queries
largest_undivided = many.softmax(-1).amax(-1).mean()
largest_divided = (many / math.sqrt(D)).softmax(-1).amax(-1).mean()
print(f"largest of ten weights: {largest_undivided:.2f} undivided, {largest_divided:.2f} divided")
assert largest_undivided > 0.85 and largest_divided < 0.45

# %% [markdown]
# ## Exercise {{n}}.1  Keys that are not there
#
# *difficulty ●○○ · 8 minutes · 3 lines*
#
# Images of different size are padded to one size, and nobody may look at the padding. Write
# attention that gives padded keys **no** weight. In this book a mask is True on padding.
#
# Take care with the library: `F.scaled_dot_product_attention` wants a boolean mask that is True
# where one *may* look, `nn.MultiheadAttention` wants one that is True where one may *not*.


# %% tags=["exercise"]
def masked_attention(queries, keys, values, padding):
    """queries: (Q, D). keys: (N, D). values: (N, E). padding: (N,), True on padding.

    Returns (Q, E).
    """
    # BEGIN SOLUTION
    scores = queries @ keys.T / math.sqrt(queries.shape[-1])
    scores = scores.masked_fill(padding, -math.inf)
    return scores.softmax(-1) @ values
    # END SOLUTION


check("attention.1", masked_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The weights that are left must still add up to 1, and what stands in the padding must not matter,
# however large. The safe place for the mask is before the softmax.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Which score $s$ has $e^s = 0$? Fill it in with `masked_fill`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has no padding. If the second fails, you either set the *weights* to zero after
# the softmax, so that they no longer add up to 1, or the *scores* to zero. A score of zero is not
# "no": $e^0 = 1$.
#
# </details>
#
# {{solution}}

# %% [markdown]
# The two conventions of the library, side by side, on the vectors from above:

# %%
padding = torch.tensor([False, True, False, False, True])
expected = attend(queries, keys[~padding], values[~padding])  # as if they did not exist
fused = F.scaled_dot_product_attention(
    queries[None], keys[None], values[None], attn_mask=~padding[None]
)
assert torch.allclose(fused[0], expected, atol=1e-6)

layer = nn.MultiheadAttention(3, 1, batch_first=True)
masked, _ = layer(queries[None], keys[None], keys[None], key_padding_mask=padding[None])
shorter, _ = layer(queries[None], keys[None, ~padding], keys[None, ~padding])
assert torch.allclose(masked, shorter, atol=1e-6)

# %% [markdown]
# ## {{n}}.3 Several heads, and the paper's Eq. 1
#
# So far the vectors themselves were query, key and value. In a network each of the three is a
# *learned projection* of the features: one matrix says what to ask for, one what to be found by,
# one what to hand over. And there are several sets of such matrices, the **heads**, so that a query
# can ask several questions at once. The paper writes it so:
#
# $$
# \text{MultiHeadAttn}(z_q, x) = \sum_{m=1}^{M} W_m \Big[ \sum_{k \in \Omega_k} A_{mqk} \cdot
# W'_m x_k \Big], \qquad
# A_{mqk} \propto \exp\Big\{ \frac{z_q^\top U_m^\top V_m x_k}{\sqrt{C_v}} \Big\}
# $$
#
# with $\sum_k A_{mqk} = 1$. Read it from the inside:
#
# | symbol | what it does | shape |
# |:--|:--|:--|
# | $U_m z_q$ | what head $m$ of query $q$ asks | $U_m$ is $D \times C$ |
# | $V_m x_k$ | what key $k$ is found by | $V_m$ is $D \times C$ |
# | $A_{mqk}$ | the weight, softmax over $k$ | a number |
# | $W'_m x_k$ | what key $k$ hands over | $W'_m$ is $D \times C$ |
# | $W_m$ | back to the full width | $W_m$ is $C \times D$ |
#
# $\Omega_k$ is the set of all keys, $N_k$ of them. $C_v$ is the width of one head; this book calls
# it $D = C / M$.


# %%
def equation_1(z_q, x, U, V, W_prime, W):
    """z_q: (C,). x: (N_k, C). U, V, W_prime: (M, D, C). W: (M, C, D). Returns (C,)."""
    output = torch.zeros_like(z_q)
    for m in range(len(U)):
        scores = torch.stack([(U[m] @ z_q) @ (V[m] @ x_k) for x_k in x])
        A = (scores / math.sqrt(U.shape[1])).softmax(0)
        gathered = sum(A[k] * (W_prime[m] @ x[k]) for k in range(len(x)))
        output = output + W[m] @ gathered
    return output


# %% [markdown]
# PyTorch's module holds the same four sets of matrices, packed. `in_proj_weight` stacks all $U_m$,
# then all $V_m$, then all $W'_m$; head $m$ owns $D$ rows of each. `out_proj.weight` has the $W_m$
# side by side, $D$ columns each.

# %%
C, M = 12, 3
D, num_queries, num_keys = C // M, 5, 7
module = nn.MultiheadAttention(C, M, bias=False, batch_first=True)
U, V, W_prime = module.in_proj_weight.detach().view(3, M, D, C)
W = module.out_proj.weight.detach().view(C, M, D).permute(1, 0, 2)  # (M, C, D)

# %%
z, x = torch.randn(num_queries, C), torch.randn(num_keys, C)
by_hand = torch.stack([equation_1(z_q, x, U, V, W_prime, W) for z_q in z])
by_module, _ = module(z[None], x[None], x[None])  # query, key, value
assert torch.allclose(by_module[0], by_hand, atol=1e-6)
print(tuple(by_hand.shape))

# %% [markdown]
# Eq. 1 has no bias vectors; the module has them unless told otherwise, and they start at zero.
#
# ## Exercise {{n}}.2  Split the heads
#
# *difficulty ●○○ · 6 minutes · 2 lines*
#
# Vectorised, all heads are projected by one $C \times C$ matrix: the rows of head 0 on top, those
# of head 1 below, and so on. Its output must be cut into heads. Head $m$ gets the channels from
# $mD$ to $(m + 1)D$ of **every** token.


# %% tags=["exercise"]
def split_heads(x, num_heads):
    """x: (B, N, C). Returns (B, M, N, D), with M heads of D = C / M channels."""
    # BEGIN SOLUTION
    B, N, C = x.shape
    return x.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)
    # END SOLUTION


check("attention.2", split_heads)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Cutting $C$ channels into $M$ groups of $D$ touches only the last axis. Moving the heads to the
# front is a second step.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# First $(B, N, M, D)$ with `reshape`, then exchange axes 1 and 2.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The shape is right but the numbers are not: you reshaped to $(B, M, N, D)$ at once. `reshape`
# keeps the order in memory, so "head 0" then holds all channels of the first few *tokens*. Nothing
# crashes, and a network even trains like this, just badly.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Now the module in full, in our own code. It returns the weights too, since we want to look at
# them.


# %%
class Attention(nn.Module):
    """Multi-head attention, Eq. 1. z: (B, Q, C), x: (B, N, C) -> (B, Q, C) and (B, M, Q, N)."""

    def __init__(self, C, M):
        super().__init__()
        self.num_heads = M
        self.U, self.V, self.W_prime, self.W = (nn.Linear(C, C, bias=False) for _ in range(4))
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)  # variance 1 / C

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, M, N, D)

    def forward(self, z, x):
        q, k, v = self.heads(self.U(z)), self.heads(self.V(x)), self.heads(self.W_prime(x))
        A = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.W((A @ v).transpose(1, 2).flatten(2)), A


# %%
attention = Attention(C, M)
with torch.no_grad():  # copy the weights of the module: U, V, W' and W
    packed = module.in_proj_weight.chunk(3)
    for linear, weight in zip(attention.children(), (*packed, module.out_proj.weight), strict=True):
        linear.weight.copy_(weight)
    ours, A = attention(z[None], x[None])
    theirs, A_theirs = module(z[None], x[None], x[None], average_attn_weights=False)
assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(A, A_theirs, atol=1e-6)
assert torch.allclose(ours[0], by_hand, atol=1e-6)
print("weights", tuple(A.shape), "= (B, M, Q, N_k)")

# %% [markdown]
# Four rungs, one result: hand, loop, matrices, module. When queries come from somewhere else than
# the keys, this is **cross-attention**; when $z$ and $x$ are the same tokens, **self-attention**.
#
# ## {{n}}.4 A feature map is a list of cells
#
# An image network gives a map $(C, H, W)$. Attention wants a list. So the map is flattened, row
# after row: cell $(i, j)$ becomes token $iW + j$, and there are $H \cdot W$ tokens.

# %%
height, width = 3, 5
feature_map = torch.randn(C, height, width)
tokens = feature_map.flatten(1).T  # (H * W, C)
assert torch.equal(tokens[2 * width + 1], feature_map[:, 2, 1])  # row 2, column 1
print(tuple(feature_map.shape), "->", tuple(tokens.shape))

# %% [markdown]
# **Before you run**: we shuffle the cells of the map, as if the image had been cut up and thrown on
# the table. What happens to the output of self-attention?

# %%
order = torch.randperm(height * width)
with torch.no_grad():
    straight, _ = attention(tokens[None], tokens[None])
    shuffled, _ = attention(tokens[order][None], tokens[order][None])
assert torch.allclose(shuffled[0], straight[0, order], atol=1e-6)

# %% [markdown]
# It is shuffled in the same way, and nothing else. To attention a map is a *bag* of cells: left,
# right, near and far do not exist. A convolution could not have survived this.
#
# So each cell must carry its place. DETR adds a code made of sines and cosines, for $y$ and for
# $x$, at many wavelengths. For one cell, by hand, in Deformable DETR's form:


# %%
def place_code(row, column, height, width, num_features, temperature=10_000):
    """The code of one cell: num_features numbers for y, then as many for x."""
    code = []
    for index, size in ((row, height), (column, width)):
        phase = (index + 0.5) / size * 2 * math.pi  # the cell's centre; once round for the map
        for j in range(num_features // 2):
            period = temperature ** (2 * j / num_features)
            code += [math.sin(phase / period), math.cos(phase / period)]
    return torch.tensor(code)


# %% [markdown]
# The library's encoding does this for all cells at once. Its argument is a mask, because only cells
# that are not padding count.

# %%
from deformable_detr.layers.position import SinePositionEncoding

no_padding = torch.zeros(1, 4, 7, dtype=torch.bool)
codes = SinePositionEncoding(num_features=6)(no_padding)  # (B, 2 * num_features, H, W)
assert torch.allclose(codes[0, :, 1, 5], place_code(1, 5, 4, 7, num_features=6), atol=1e-5)
print(tuple(codes.shape))

# %% mystnb={"image": {"alt": "Four maps of 14 by 22 cells. The first changes from top to bottom like one sine wave, the second from left to right like one cosine wave, the third hardly from top to bottom. The fourth is a hill of similarity with its peak in the marked cell."}}
codes = SinePositionEncoding(128)(torch.zeros(1, 14, 22, dtype=torch.bool))[0]  # (256, 14, 22)
similarity = torch.einsum("chw,c->hw", codes, codes[:, 4, 15]) / 128
figure, axes = plt.subplots(1, 4, figsize=(9, 2.2))
titles = ("0: sin, y", "129: cos, x", "32: sin, y, 10 times slower")
for axis, channel, title in zip(axes, (0, 129, 32), titles, strict=False):
    axis.imshow(codes[channel], cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(title=title)
axes[3].imshow(similarity)
axes[3].plot(15, 4, "x", color="white")
axes[3].set(title="similarity to the cross")
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: three channels of the code (red positive, blue negative) and, on the
# right, the dot product of one cell's code with every other. It is largest at home and falls with
# distance: with codes, near and far exist.*

# %%
assert similarity.argmax() == 4 * 22 + 15 and math.isclose(similarity[4, 15], 1, rel_tol=1e-4)
assert torch.allclose(codes[0, :, 0], codes[0, :, 21])  # channel 0 knows nothing of x
assert similarity[4, 14] > 0.98  # ... but the neighbour's code is nearly the same

# %% [markdown]
# Look at the last line: the similarity of next-door cells is above 0.98. The code makes it
# *possible* to look at one exact cell, but $U$ and $V$ must grow large before attention is that
# sharp.
#
# With places, shuffling the contents is no longer harmless:

# %%
no_padding = torch.zeros(1, height, width, dtype=torch.bool)
place = SinePositionEncoding(num_features=C // 2)(no_padding)[0].flatten(1).T  # (H * W, C)
with torch.no_grad():
    straight, _ = attention((tokens + place)[None], (tokens + place)[None])
    moved = tokens[order] + place
    shuffled, _ = attention(moved[None], moved[None])
assert not torch.allclose(shuffled[0], straight[0, order], atol=0.01)

# %% [markdown]
# ## Exercise {{n}}.3  Look one cell further
#
# *difficulty ●●● · 20 minutes · 7 lines*
#
# Sines and cosines were not chosen for their looks: **moving by a fixed distance is a matrix**.
# Write the matrix $R$ that turns the code of a phase $\varphi$ into the code of $\varphi + \delta$,
# whatever $\varphi$ is. With $U_m = \beta R$, $V_m = \beta I$ and a large $\beta$, head $m$ of
# every cell looks at the cell $\delta$ further on. This is how attention *can* act like a
# convolution.
#
# The code is that of one axis:
# $\sin(\varphi/p_0), \cos(\varphi/p_0), \sin(\varphi/p_1), \cos(\varphi/p_1), \dots$ with
# $p_j = 10000^{2j/F}$.


# %% tags=["exercise"]
def shift_matrix(delta, num_features):
    """delta: radians. num_features: F, even. Returns (F, F): R @ code(phi) = code(phi + delta)."""
    # BEGIN SOLUTION
    R = torch.zeros(num_features, num_features)
    for j in range(num_features // 2):
        angle = delta / 10_000 ** (2 * j / num_features)
        sin, cos = math.sin(angle), math.cos(angle)
        R[2 * j, 2 * j : 2 * j + 2] = torch.tensor([cos, sin])
        R[2 * j + 1, 2 * j : 2 * j + 2] = torch.tensor([-sin, cos])
    return R
    # END SOLUTION


check("attention.3", shift_matrix)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# $\sin(a + b) = \sin a \cos b + \cos a \sin b$ and $\cos(a + b) = \cos a \cos b - \sin a \sin b$.
# So each pair of numbers is turned by itself: $R$ consists of $2 \times 2$ blocks on the diagonal.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The block of pair $j$ has the angle $a = \delta / p_j$ and reads
# $\begin{pmatrix} \cos a & \sin a \\ -\sin a & \cos a \end{pmatrix}$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A shift by zero is the identity for every sign and every period. If the shift by a quarter turn
# fails, look at the signs: this is the block above, not its transpose.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 Before training, every key gets $1/N_k$
#
# Take features of mean 0 and variance 1. Xavier's initialisation gives a $C \times C$ matrix
# entries of variance $1/C$, so the numbers in $U_m z_q$ and $V_m x_k$ have mean 0 and variance 1 as
# well. Then scores have variance 1. This is the situation that the paper describes.

# %%
C, M = 256, 8
attention = Attention(C, M)
z, x = torch.randn(1, 40, C), torch.randn(1, 3000, C)
with torch.no_grad():
    asked, found_by = attention.U(z), attention.V(x)
    scores = attention.heads(asked) @ attention.heads(found_by).transpose(-1, -2) / math.sqrt(C / M)
for numbers in (asked, found_by, scores):
    assert abs(numbers.mean()) < 0.05 and math.isclose(numbers.var(), 1, rel_tol=0.1)

# %% [markdown]
# How evenly does a query spread its attention then? **Entropy** measures it: $-\sum_k A_k \ln A_k$.
# If all keys are equal it is $\ln N_k$; if one key has everything it is 0. Its exponential is the
# *effective number of keys*.
#
# For scores of variance $\sigma^2$ theory gives $\ln N_k - \sigma^2/2$ when there are many keys.
# (The sum of $e^s$ over the keys is about $N_k e^{\sigma^2/2}$, and the average of $s$ under the
# weights is $\sigma^2$.)
#
# **Before you run**: at 4,096 keys, how many does a query effectively look at? Ten? A hundred?

# %%
packed = nn.MultiheadAttention(C, M, batch_first=True)  # PyTorch's own initialisation
sizes = [16, 64, 256, 1024, 4096]
measured = {"Eq. 1, each matrix by Xavier": [], "nn.MultiheadAttention": []}
with torch.no_grad():
    for num_keys in sizes:
        x = torch.randn(1, num_keys, C)
        _, A = attention(z, x)
        _, A_packed = packed(z, x, x, average_attn_weights=False)
        for found, weights in zip(measured.values(), (A, A_packed), strict=True):
            found.append(-(weights * weights.log()).sum(-1).mean().item())

# %% mystnb={"image": {"alt": "Entropy of the attention weights against the number of keys. Both measured curves run parallel to the line of equal weights, half a unit and an eighth of a unit below it."}}
figure, axis = plt.subplots()
axis.plot(sizes, np.log(sizes), "k--", label=r"all equal: $\ln N_k$")
for (name, found), marker in zip(measured.items(), "os", strict=True):
    axis.plot(sizes, found, marker, label=name)
axis.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="number of keys $N_k$")
axis.set(ylabel="entropy of the weights")
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What to see: before training the entropy stays just below that of equal weights,
# however many keys there are. Attention starts as an average over the whole map.*

# %%
for (name, found), variance in zip(measured.items(), (1, 1 / 4), strict=True):
    for num_keys, entropy in zip(sizes[2:], found[2:], strict=True):
        assert math.isclose(entropy, math.log(num_keys) - variance / 2, abs_tol=0.04)
    print(f"{name}: {math.exp(found[-1]) / 4096:.1f} times the 4,096 keys in effect")

# %% [markdown]
# About 2,500 of 4,096, or six tenths. And what people really train starts even flatter: PyTorch
# keeps $U$, $V$ and $W'$ in one $3C \times C$ matrix, Xavier's formula looks at that shape, and
# each variance becomes $1/(2C)$. Queries and keys shrink, scores have variance $\tfrac14$, and nine
# tenths of all keys take part.

# %%
third = packed.in_proj_weight.detach().var().item() * C
print("variance of the entries, times C:", round(third, 2))
assert math.isclose(third, 0.5, rel_tol=0.02)

# %% [markdown]
# ## Exercise {{n}}.4  What a score is told
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# What does this evenness do to learning? Follow the gradient back. For one query with weights $A_k$
# and output $o = \sum_k A_k v_k$, let $g$ be the gradient of the loss by $o$. Write the gradient of
# the loss by the scores, without autograd.


# %% tags=["exercise"]
def score_gradient(scores, values, grad_output):
    """scores: (N,). values: (N, E). grad_output: (E,), the loss by the output. Returns (N,)."""
    # BEGIN SOLUTION
    A = scores.softmax(0)
    along = values @ grad_output
    return A * (along - A @ along)
    # END SOLUTION


check("attention.4", score_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# If the weights were free, the gradient by $A_k$ would be $g \cdot v_k$. But raising one weight
# lowers all the others.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $\partial A_j / \partial s_k = A_j (\delta_{jk} - A_k)$. Multiply by $g \cdot v_j$ and sum over
# $j$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With two keys of equal weight, many formulas agree. When weights differ, the value to compare with
# is the *weighted* average, which is the output $o$ itself, not the plain mean of the values.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 What that does to gradients
#
# The chain rule gives two lines, and both begin with $A_k$:
#
# $$
# \frac{\partial \mathcal{L}}{\partial v_k} = A_k \, g, \qquad
# \frac{\partial \mathcal{L}}{\partial s_k} = A_k \; g \cdot (v_k - o)
# $$
#
# At the start $A_k \approx 1/N_k$. So on a map of 4,096 cells the one cell that matters is told a
# 4,096th of what the output is told. Let us measure it: 300 random queries, and a loss that is low
# when the output points along the value of **key 0**, the right key. The query hears all keys at
# once, $\partial \mathcal{L} / \partial q = \sum_k (\partial \mathcal{L} / \partial s_k) \, k_k / \sqrt D$, and
# the term of $k = 0$ is the right key's.


# %%
def gradients(num_keys, draws=50, D=32):
    """Sizes, (draws, 4): what the right key's value and score hear, and the query's two parts."""
    q, k, v = (torch.randn(draws, n, D) for n in (1, num_keys, num_keys))
    scores = (q @ k.transpose(1, 2) / math.sqrt(D)).requires_grad_()  # (draws, 1, N_k)
    output = scores.softmax(-1) @ v.requires_grad_()
    loss = -(output[:, 0] * v[:, 0].detach()).sum()
    by_scores, by_values = torch.autograd.grad(loss, (scores, v))
    right = by_scores[:, 0, :1] * k[:, 0]  # what key 0 tells the query
    others = (by_scores @ k)[:, 0] - right  # what all the other keys tell it
    heard = (by_values[:, 0], by_scores[:, 0, :1], right, others)
    return torch.stack([gradient.norm(dim=-1) for gradient in heard], -1)


# %%
torch.manual_seed(1)
told = np.array([torch.cat([gradients(n) for _ in range(6)]).mean(0).tolist() for n in sizes])
told = np.stack([told[:, 0], told[:, 1], told[:, 2] / told[:, 3]], 1)  # the query's: a ratio
slopes = np.polyfit(np.log(sizes), np.log(told), 1)[0]
print("slopes", slopes.round(1))
assert np.allclose(slopes, [-1, -1, -0.5], atol=0.1)

# %% mystnb={"image": {"alt": "Two charts with logarithmic axes. Left: the gradients of the right key's value and score fall along lines of slope minus one from 16 to 4096 keys. Right: the ratio of the right key's pull to that of all others falls along a line of slope minus one half, from about 1 to about 0.05."}}
figure, axes = plt.subplots(1, 2)
names = ("gradient of its value", "gradient of its score", "right key / all others")
for i, (axis, name) in enumerate(zip((axes[0], axes[0], axes[1]), names, strict=True)):
    slope = -0.5 if i == 2 else -1
    line = told[2, i] * (np.array(sizes) / sizes[2]) ** slope
    axis.plot(sizes, line, color="0.7", label=f"slope {slope}" if i else None, zorder=0)
    axis.plot(sizes, told[:, i], "os^"[i], color=f"C{i}", label=name)
for axis, title in zip(axes, ("what reaches the right key", "what reaches the query"), strict=True):
    axis.set(xscale="log", yscale="log", xlabel="number of keys $N_k$", title=title)
    axis.set(xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
    axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.4. What to see: four times the keys, a quarter of the gradient for the one that matters
# (left, slope $-1$). The query hears it in a crowd that gets louder (right, slope $-\frac12$).*
#
# The right-hand picture matters more. A small gradient by itself would do no harm: AdamW
# {cite}`loshchilov2019adamw` divides every gradient by its usual size. But the query learns from
# the sum over all keys. The right key's part of it is of size $1/N_k$. The others have random
# signs, and a sum of $N_k$ random terms of size $1/N_k$ has the size $1/\sqrt{N_k}$. Their ratio is
# $1/\sqrt{N_k}$, and no optimiser can repair that. It can only average over many steps.

# %%
print("at 4,096 keys the right key's part is", round(told[-1, 2], 2), "of the others'")
assert told[-1, 2] < 0.07 < 0.7 < told[0, 2]

# %% [markdown]
# The paper says it in two words: "ambiguous gradients".
#
# ## {{n}}.7 A task whose answer we know
#
# If that is right, one should *see* learning slow down when a map has more cells, although the task
# stays the same. Here is a task for which we know where attention must look.
#
# Every cell of a map holds a **shape** (8 kinds) and a **colour** (5 kinds). Shapes 0, 1 and 2 are
# the marks: each stands in exactly one cell. All other cells are clutter. Query $i$ must name the
# colour of mark $i$. Nobody tells it where the mark is, nor even what it looks like.

# %%
SHAPES, MARKS, COLOURS, WIDTH = 8, 3, 5, 32


def draw_maps(num_cells, generator, count=32):
    """Random maps: content (count, N), which is shape * COLOURS + colour; places (count, 3)."""
    shape = torch.randint(MARKS, SHAPES, (count, num_cells), generator=generator)
    places = torch.rand(count, num_cells, generator=generator).topk(MARKS).indices
    shape.scatter_(1, places, torch.arange(MARKS).expand(count, -1))
    colour = torch.randint(COLOURS, (count, num_cells), generator=generator)
    return shape * COLOURS + colour, places


# %% mystnb={"image": {"alt": "A map of 4 rows and 16 columns. Each cell holds a symbol in one of five colours. A star, a plus and a cross, each present once, are circled; all other symbols are squares, triangles, diamonds and hexagons."}}
rows, columns = 4, 16
contents, places = draw_maps(rows * columns, torch.Generator().manual_seed(3), count=1)
figure, axis = plt.subplots(figsize=(7, 2))
for cell, content in enumerate(contents[0].tolist()):
    marker, colour = "*PXs^vDh"[content // COLOURS], f"C{content % COLOURS}"
    axis.plot(cell % columns, cell // columns, marker, color=colour, ms=9)
for place in places[0].tolist():
    axis.plot(place % columns, place // columns, "o", ms=19, mfc="none", mec="k", mew=1.5)
axis.set(xlim=(-0.7, columns - 0.3), ylim=(rows - 0.3, -0.7), xticks=[], yticks=[], aspect="equal")
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What to see: a map of 64 cells. The three queries must find the star, the plus and
# the cross (circled for us, not for them) and name their colours.*

# %%
for mark, place in enumerate(places[0].tolist()):
    assert contents[0, place] // COLOURS == mark
    assert (contents[0] // COLOURS == mark).sum() == 1  # exactly once

# %% [markdown]
# The model is one head of Eq. 1 with three learned queries, then a linear layer to the colours. A
# cell's feature is a fixed random vector for its shape plus one for its colour.
#
# With three queries and many cells it is cheaper to carry each query over to the keys than to
# project every key: $(U z)^\top (V x) = (V^\top U z)^\top x$. Same numbers, less work.


# %%
class Finder(nn.Module):
    """Three queries look for three marks. content: (B, N) -> (B, 3, COLOURS), A: (B, 3, N)."""

    def __init__(self):
        super().__init__()
        features = torch.randn(SHAPES, 1, WIDTH) + torch.randn(COLOURS, WIDTH)
        self.register_buffer("features", features.flatten(0, 1) / math.sqrt(2))  # variance 1
        self.queries = nn.Parameter(torch.randn(MARKS, WIDTH))
        self.attention = Attention(WIDTH, 1)
        self.name_colour = nn.Linear(WIDTH, COLOURS)

    def forward(self, content):
        x, head = self.features[content], self.attention  # (B, N, WIDTH)
        carried = head.U(self.queries) @ head.V.weight  # (3, WIDTH)
        A = (carried @ x.transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1)
        return self.name_colour(head.W(head.W_prime(A @ x))), A


# %%
finder = Finder()
contents, places = draw_maps(64, torch.Generator().manual_seed(3), count=2)
with torch.no_grad():
    _, A = finder(contents)
    _, A_full = finder.attention(finder.queries.expand(2, -1, -1), finder.features[contents])
assert torch.allclose(A, A_full[:, 0], atol=1e-6)  # carrying the query changes nothing


# %% [markdown]
# Training: 32 fresh maps a step, AdamW, cross-entropy on the colour. At each step we note how much
# weight the right cells get, and how many colours are right.


# %%
def train_finder(num_cells, seed, steps=400, watch=None):
    """Returns the finder and (steps, 2): weight on the right cells, share of right colours."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    finder, history = Finder(), []
    optimizer = torch.optim.AdamW(finder.parameters(), lr=4e-3)
    for step in range(steps):
        if watch:
            watch(step, finder)
        contents, places = draw_maps(num_cells, generator)
        wanted = contents.gather(1, places) % COLOURS  # (B, 3)
        logits, A = finder(contents)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_mark = A.detach().gather(2, places[..., None]).mean()
        history.append((on_mark.item(), (logits.argmax(-1) == wanted).float().mean().item()))
    return finder, torch.tensor(history)


# %% [markdown]
# Maps of 2 × 8, 4 × 16, 8 × 32 and 16 × 64 cells, five seeds each. Every step shows the same number
# of maps and asks as many questions, 96. Only the amount of clutter differs.
#
# **Before you run**: with 64 times the cells, how many times longer does it take to learn? And how
# good is a query that has not found its mark?

# %%
finders, histories = {}, {}
for num_cells in (16, 64, 256, 1024):
    finders[num_cells], curves = zip(*(train_finder(num_cells, s) for s in range(5)), strict=True)
    histories[num_cells] = torch.stack(curves)  # (5 seeds, steps, 2)

# %% mystnb={"image": {"alt": "Two charts against the training step, with a band over five seeds for each map size. With 16 cells the right weight and the right colours reach one within a few dozen steps, with 64 and 256 cells later each time; with 1024 cells they stay at zero and at chance for more than a hundred steps, and some leave it only near the end."}}
figure, axes = plt.subplots(1, 2, sharex=True)
for i, (num_cells, history) in enumerate(histories.items()):
    smooth = F.avg_pool1d(history.transpose(1, 2), 10, stride=5)  # (5, 2, steps / 5)
    step = 5 + 5 * np.arange(smooth.shape[-1])
    for axis, curves in zip(axes, smooth.unbind(1), strict=True):
        axis.fill_between(step, curves.amin(0), curves.amax(0), color=f"C{i}", alpha=0.25, lw=0)
        axis.plot(step, curves.median(0).values, color=f"C{i}", label=f"{num_cells} cells")
axes[0].set(xlabel="step", ylabel="weight on the right cell", ylim=(0, 1.03))
axes[1].axhline(1 / COLOURS, color="k", ls=":", lw=1)
axes[1].set(xlabel="step", ylabel="right colours", ylim=(0, 1.03))
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# *Figure {{n}}.6. What to see: median of five seeds, band from the worst to the best. More cells, later
# learning. With 1,024 cells the queries guess (dotted: chance) for a long time, and in 400 steps most
# seeds do not find all three marks.*

# %%
# NBVAL_IGNORE_OUTPUT
half_way = {}
for num_cells, history in histories.items():
    found = [(curve > 0.5).nonzero() for curve in history[..., 0]]
    steps = [int(hit[0]) if len(hit) else 400 for hit in found]  # 400: not yet
    half_way[num_cells] = sorted(steps)[2]
    shown = [step if step < 400 else "-" for step in sorted(steps)]
    print(f"{num_cells:5} cells: step", *shown, "median", half_way[num_cells])

# %%
assert half_way[16] < half_way[64] < half_way[256] < half_way[1024]
assert half_way[1024] > 4 * half_way[16]
assert histories[16][:, -20:, 1].mean() > 0.98  # all right in the end
assert histories[1024][:, :40, 1].mean() < 0.25  # chance is 0.2

# %% [markdown]
# In our runs, 64 times the cells took about twenty times as many steps (the medians). Note the
# shape of the slow curves, too: a long flat piece, then stairs. Each stair is one query that finds
# its mark, by itself and rather suddenly.
#
# Now look *inside*, at a run with 256 cells: where do the queries look at steps 0, 180 and 399? We
# test on 200 maps that were never trained on, and draw one on which all three marks are found.

# %%
test_contents, test_places = draw_maps(256, torch.Generator().manual_seed(5), count=200)
looks = {}


def watch(step, finder):
    if step in (0, 180, 399):
        with torch.no_grad():
            looks[step] = finder(test_contents)[1]  # (200, 3, 256)


_ = train_finder(256, seed=4, watch=watch)
found = {step: A.argmax(-1) == test_places for step, A in looks.items()}  # (200, 3)
shown = int(found[399].all(1).nonzero()[0])

# %% mystnb={"image": {"alt": "Nine maps of 8 by 32 cells: three queries at steps 0, 180 and 399. At step 0 the weight is spread over the whole map, later it gathers in fewer cells, and at step 399 it stands in a single cell, the one that is circled."}}
figure, axes = plt.subplots(3, 3, figsize=(9, 3.4))
for row, (step, A) in zip(axes, looks.items(), strict=True):
    for i, axis in enumerate(row):
        axis.imshow(A[shown, i].view(8, 32), vmin=0)
        place = int(test_places[shown, i])
        axis.plot(place % 32, place // 32, "o", ms=10, mfc="none", mec="C1", mew=1.8)
        weight = A[shown, i, place]
        axis.set(xticks=[], yticks=[], title=f"step {step}, query {i}: {weight:.3f}")
plt.show()

# %% [markdown]
# *Figure {{n}}.7. What to see: the weights of three queries on one map (each panel has its own scale;
# the number is the weight in the right cell, circled). Noise becomes a point, and the point is
# right.*

# %%
weight = {step: A.gather(2, test_places[..., None]).mean() for step, A in looks.items()}
assert weight[0] < 3 / 256 and found[0].float().mean() < 0.1  # about one part in 256
assert weight[0] < weight[180] < weight[399] and weight[399] > 0.5
assert found[399].float().mean() > 0.85  # of 600 lookups

# %% [markdown]
# **A right answer is not a right look.** All runs with 256 cells ended with (nearly) all colours
# right. Did they all look at the right cell? For the run with the worst gap we sort the lookups by
# mark and by the colour that the mark had.

# %%
gaps, wanted = [], test_contents.gather(1, test_places) % COLOURS  # (200, 3)
for finder in finders[256]:
    with torch.no_grad():
        logits, A = finder(test_contents)
    on_mark = A.gather(2, test_places[..., None])[..., 0]
    table = [[on_mark[wanted[:, i] == c, i].mean() for c in range(COLOURS)] for i in range(MARKS)]
    right = (logits.argmax(-1) == wanted).float().mean()
    gaps.append((np.array(table), right.item()))
assert all(right > 0.95 for _, right in gaps)
table, right = min(gaps, key=lambda gap: gap[0].min())

# %% mystnb={"image": {"alt": "A table of three marks by five colours. Nearly all entries, the weight on the right cell, are close to one; one entry is close to zero."}}
figure, axis = plt.subplots(figsize=(4.5, 2.3))
axis.imshow(table, vmin=0, vmax=1)
for (i, colour), number in np.ndenumerate(table):
    ink = "k" if number > 0.5 else "w"
    axis.text(colour, i, f"{number:.2f}", ha="center", va="center", color=ink)
axis.set(xlabel="colour of the mark", ylabel="mark", xticks=range(5), yticks=range(3))
axis.set_title(f"weight on the right cell; {right:.0%} of the colours right")
plt.show()

# %% [markdown]
# *Figure {{n}}.8. What to see: for one mark in one colour the query sees nothing at all, and yet its
# answer is right.*

# %%
assert table.min() < 0.2 and np.median(table) > 0.9

# %% [markdown]
# How can it be right? By elimination: it finds the mark in all colours but one, and so "found
# nothing" *means* that colour. Keep this in mind when an attention map is shown as an explanation.

