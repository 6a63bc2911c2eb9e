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
# # {{n}}. Deformable convolution
#
# You will be able to
# - **rewrite** a convolution as sampling on a grid, and then **move** the grid's points,
# - **implement** deformable convolution and its modulated second version, and check both against
#   torchvision,
# - **train** offsets on data and predict what they must become,
# - **say** what is still missing before this is attention.
#
# You should know: bilinear sampling and its gradient ({{chapter sampling}}), convolutions in PyTorch.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A convolution looks at a fixed pattern: 3 x 3 neighbours, always. Objects come in other shapes.
# Deformable convolution {cite}`dai2017deformable` keeps the weights of the pattern and lets the
# network move its points, by amounts that it computes from the image itself.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample, pixel_to_normalised

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)


# %%
def sample(feature_map, pixels):
    """{{chapter sampling}} in one line. feature_map: (C, H, W). pixels: (..., 2). Returns (..., C)."""
    return bilinear_sample(feature_map, pixel_to_normalised(pixels, feature_map.shape[-2:]))


# %% [markdown]
# ## {{n}}.1 A convolution is sampling with fixed points
#
# One output of a 3 x 3 convolution at place $p_0$ is a sum over nine *taps*:
#
# $$y(p_0) = \sum_{k=1}^{9} w_k \, x(p_0 + p_k), \qquad p_k \in \{(-1,-1), (0,-1), \dots, (1,1)\}.$$
#
# By hand, on a map with two channels, four rows and six columns, at x = 2, y = 1:

# %%
image = torch.randn(2, 4, 6)
weight = torch.randn(3, 2, 3, 3)  # 3 outputs, 2 inputs
x0, y0 = 2, 1
patch = image[:, y0 - 1 : y0 + 2, x0 - 1 : x0 + 2]  # (2, 3, 3)
by_hand = (weight * patch).sum((1, 2, 3))
by_torch = F.conv2d(image[None], weight, padding=1)[0, :, y0, x0]
print(by_hand.shape)
torch.testing.assert_close(by_hand, by_torch)

# %% [markdown]
# Now the same by sampling. The taps as points (x, y), in the order in which the weights lie in
# memory: row by row.

# %%
taps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], dtype=torch.float32)
print(taps[:4].tolist())
values = sample(image, torch.tensor([x0, y0]) + taps)  # (9, 2): tap, channel
by_sampling = torch.einsum("kc,ock->o", values, weight.flatten(2))
torch.testing.assert_close(by_sampling, by_torch)

# %% [markdown]
# Points outside the map sample zeros ({{chapter sampling}}). That is zero padding, for free.

# %% [markdown]
# ## {{n}}.2 Moving the points
#
# Give each tap its own offset $\Delta p_k$, a real number of pixels in each direction:
#
# $$y(p_0) = \sum_{k} w_k \, x(p_0 + p_k + \Delta p_k).$$
#
# The offsets differ from place to place: for a map of $H \times W$ there are $H \cdot W \cdot 9$
# of them. First as a loop.


# %%
def deform_conv_loop(image, offset, weight):
    """image: (C, H, W). offset: (H, W, 9, 2) as (dx, dy). weight: (O, C, 3, 3).

    Returns (O, H, W).
    """
    _, height, width = image.shape
    output = torch.zeros(len(weight), height, width)
    for y in range(height):
        for x in range(width):
            points = torch.tensor([x, y]) + taps + offset[y, x]
            values = sample(image, points)
            output[:, y, x] = torch.einsum("kc,ock->o", values, weight.flatten(2))
    return output


# %% [markdown]
# With no offsets it must be the ordinary convolution, everywhere, borders included.

# %%
still = torch.zeros(4, 6, 9, 2)
expected = F.conv2d(image[None], weight, padding=1)[0]
torch.testing.assert_close(deform_conv_loop(image, still, weight), expected)
print("no offsets: an ordinary convolution")

# %% [markdown]
# With all offsets equal to whole pixels it must be the convolution of a shifted image. Before you
# run: an offset of dx = 1 reads one pixel to the right. Does the picture move left or right?

# %%
right = still.clone()
right[..., 0] = 1
shifted = F.pad(image, (0, 1))[:, :, 1:]  # every pixel takes its right neighbour's value
expected_shifted = F.conv2d(F.pad(shifted, (1, 1, 1, 1))[None], weight)[0]
moved = deform_conv_loop(image, right, weight)
torch.testing.assert_close(moved[:, :, 1:-1], expected_shifted[:, :, 1:-1])
print("reading to the right moves the picture to the left")

# %% [markdown]
# ## Exercise {{n}}.1  The points of one place
#
# *difficulty ●○○ · 6 minutes · 2 lines*
#
# Return the nine points at which a dilated, deformable 3 x 3 convolution reads for place `centre`:
# dilation multiplies the taps, not the offsets.


# %% tags=["exercise"]
def tap_points(centre, offset, dilation):
    """centre: (2,) as (x, y). offset: (9, 2) as (dx, dy). dilation: int. Returns (9, 2)."""
    # BEGIN SOLUTION
    grid = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    return centre + dilation * grid + offset
    # END SOLUTION


check("deformable_convolution.1", tap_points)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The taps are listed row by row: y in the outer loop, x in the inner one.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Three things are added: the centre, the taps times the dilation, the offsets as they are.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With a single dilation of 1 many mistakes are invisible. Either the offsets are multiplied too, or
# the taps run column by column.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 Vectorised, and against torchvision
#
# All places and taps at once; `sample` takes any number of leading axes.


# %%
def deform_conv(image, offset, weight, mask=None):
    """As deform_conv_loop. mask: (H, W, 9) in [0, 1] or None. Returns (O, H, W)."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], -1)[:, :, None]  # (H, W, 1, 2)
    values = sample(image, places + taps + offset)  # (H, W, 9, C)
    if mask is not None:
        values = values * mask.unsqueeze(-1)
    return torch.einsum("hwkc,ock->ohw", values, weight.flatten(2))


# %%
offset = torch.randn(4, 6, 9, 2) * 2
ours = deform_conv(image, offset, weight)
torch.testing.assert_close(ours, deform_conv_loop(image, offset, weight), atol=1e-5, rtol=1e-5)

# %% [markdown]
# torchvision's `deform_conv2d` does the same, with another layout: offsets are channels, (dy, dx)
# for each tap, **y first**. Swapped axes are this operation's classic bug.


# %%
def to_torchvision(offset):
    """(H, W, 9, 2) as (dx, dy) to (1, 18, H, W) as (dy, dx) for each tap."""
    return offset.flip(-1).flatten(2).permute(2, 0, 1)[None]


theirs = deform_conv2d(image[None], to_torchvision(offset), weight, padding=1)[0]
torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
wrong = deform_conv2d(image[None], to_torchvision(offset.flip(-1)), weight, padding=1)[0]
assert (ours - wrong).abs().max() > 0.5
print("equal to torchvision; with dx and dy swapped it is not")

# %% [markdown]
# The second version {cite}`zhu2019deformable2` multiplies each sample by a *modulation* in [0, 1],
# so that a tap can be switched off. torchvision calls it `mask`. Keep it in mind: it is the
# beginning of an attention weight.

# %%
mask = torch.rand(4, 6, 9)
theirs = deform_conv2d(
    image[None], to_torchvision(offset), weight, padding=1, mask=mask.permute(2, 0, 1)[None]
)[0]
torch.testing.assert_close(deform_conv(image, offset, weight, mask), theirs, atol=1e-5, rtol=1e-5)
print("modulated: equal too")

# %% [markdown]
# ## Exercise {{n}}.2  Groups of channels
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# Channels may be split into groups, each with offsets of its own. (Multi-head attention will do the
# same and call the groups heads.) Sample two groups and return the values side by side. The
# function `sample` is given.


# %% tags=["exercise"]
def sample_in_groups(image, points):
    """image: (C, H, W), C even. points: (2, N, 2): for each of two groups, N pixels (x, y).

    Returns (N, C): the first half of the channels sampled at points[0], the second at points[1].
    """
    # BEGIN SOLUTION
    first, second = image.chunk(2)
    parts = [sample(first, points[0]), sample(second, points[1])]
    return torch.cat(parts, dim=-1)
    # END SOLUTION


check("deformable_convolution.2", sample_in_groups)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `image.chunk(2)` splits the channels in two halves.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Each half is sampled at its own points, (N, C/2); then concatenate along the channels.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Both groups read at the same points, or the channels are interleaved instead of halved. The first
# check uses equal points, where the first mistake does not show.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 Where the offsets come from
#
# The offsets are themselves the output of a small convolution on the same map. Nobody supervises
# them. The loss reaches them only through the derivative of the samples ({{chapter sampling}}).
#
# To see that this works we need a task of which we know the answer. Here is one. A map has two
# channels: a smooth random picture and a flag, -1 on one side and +1 on the other. The target is the
# picture, read **three pixels to the left where the flag is -1 and three to the right where it is
# +1**.

# %%
SHIFT = 3.0
BLUR = torch.exp(-(torch.arange(-6.0, 7) ** 2) / (2 * 2.5**2))
BLUR = BLUR / BLUR.sum()


def make_batch(size=4, height=14, width=22):
    """(size, 2, H, W) inputs and (size, 1, H, W) targets."""
    noise = torch.randn(size, 1, height + 12, width + 12)
    picture = F.conv2d(F.conv2d(noise, BLUR.view(1, 1, 1, -1)), BLUR.view(1, 1, -1, 1))
    picture = picture / picture.std()
    border = torch.randint(6, width - 6, (size, 1, 1, 1))
    flag = torch.where(torch.arange(width) < border, -1.0, 1.0).expand(size, 1, height, width)
    places = torch.arange(width) + SHIFT * flag[:, 0, 0]  # (size, W)
    inside = (places >= 0) & (places < width)
    index = places.clamp(0, width - 1).long()[:, None, None].expand(size, 1, height, width)
    target = picture.gather(3, index) * inside[:, None, None]
    return torch.cat([picture, flag], 1), target


inputs, targets = make_batch()
print(tuple(inputs.shape), tuple(targets.shape))

# %% [markdown]
# Before you run: which of these two can solve it, and which offsets must the second one learn?
#
# - a plain 3 x 3 convolution on both channels, and
# - a deformable 1 x 1 convolution on the picture, whose offsets are a linear function of the flag.


# %%
class DeformableReader(nn.Module):
    """One tap; its offset (dy, dx) is a linear function of both channels, zero at first."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Conv2d(2, 2, 1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.weight = nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, inputs):
        """(B, 2, H, W) to (B, 1, H, W)."""
        return deform_conv2d(inputs[:, :1].contiguous(), self.offset(inputs), self.weight)


def train(model, seed, steps=250):
    """The losses of every step, on fresh batches."""
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        inputs, targets = make_batch()
        loss = (model(inputs) - targets).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


# %%
seeds = range(3)
plain, deformable, readers = [], [], []
for seed in seeds:
    torch.manual_seed(seed)
    plain.append(train(nn.Conv2d(2, 1, 3, padding=1), seed))
    readers.append(DeformableReader())
    deformable.append(train(readers[-1], seed))
plain, deformable = torch.stack(plain), torch.stack(deformable)
ends = [losses[:, -50:].mean().item() for losses in (plain, deformable)]
print([round(end, 1) for end in ends])
assert ends[0] > 5 * ends[1]

# %% mystnb={"image": {"alt": "Training loss over 250 steps for three seeds each. The plain convolution soon levels off, hardly below where it started; the deformable reader falls close to zero within about 120 steps."}}
figure, axis = plt.subplots()
for losses, name in ((plain, "plain 3 x 3"), (deformable, "deformable 1 x 1")):
    smooth = losses.unfold(1, 15, 1).mean(-1)
    steps = torch.arange(smooth.shape[1]) + 15
    axis.plot(steps, smooth.mean(0), label=name)
    axis.fill_between(steps, smooth.amin(0), smooth.amax(0), alpha=0.25)
axis.set(xlabel="step", ylabel="squared error", ylim=(0, None))
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: the mean over three seeds, and the range between the best and the worst.
# The plain convolution, which sees one pixel to each side and cannot choose by the flag, soon stops
# improving. The deformable one learns where to read.*
#
# And where does it read? The known answer: dx = 3 times the flag, dy = 0.

# %%
learned = torch.stack([reader.offset.weight[:, :, 0, 0] for reader in readers])  # (3, 2, 2)
flag_to_dy, flag_to_dx = learned[:, 0, 1], learned[:, 1, 1]
print([round(dx, 0) for dx in flag_to_dx.tolist()])
assert (flag_to_dx - SHIFT).abs().max() < 0.3 and flag_to_dy.abs().max() < 0.3

# %% mystnb={"image": {"alt": "A smooth random picture with a vertical border. Arrows left of the border point three pixels to the left, arrows right of it three pixels to the right."}}
inputs, targets = make_batch(1)
with torch.no_grad():
    dy, dx = readers[0].offset(inputs)[0]
figure, axis = plt.subplots()
axis.imshow(inputs[0, 0])
rows, columns = torch.meshgrid(torch.arange(1, 14, 3), torch.arange(3, 19, 5), indexing="ij")
axis.quiver(
    columns, rows, dx[rows, columns], dy[rows, columns],
    angles="xy", scale_units="xy", scale=1, color="white", width=0.005,
)  # fmt: skip
border = (inputs[0, 1, 0] < 0).sum() - 0.5
axis.axvline(border, color="C1", linestyle="--")
axis.set(xlabel="x in pixels", ylabel="y in pixels")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: the learned offsets of one reader as arrows from where an output stands
# to where it reads. They turn at the dashed border, where the flag changes sign: the same weights
# look elsewhere, depending on what is there.*

# %%
left, right_side = dx[:, : int(border)], dx[:, int(border) + 2 :]
assert (left < -2).all() and (right_side > 2).all()
print("left of the border it reads to the left, right of it to the right")

# %% [markdown]
# ## Exercise {{n}}.3  Too rough to learn
#
# *difficulty ●●● · 15 minutes · 7 lines*
#
# The picture was smooth on purpose. On white noise the gradient of a sample says nothing about a
# pixel three steps away ({{chapter sampling}}: capture range). To see it, write the gradient of the squared error
# by the offset `dx`, for one picture and a reader that reads everywhere at `x + dx`.


# %% tags=["exercise"]
def offset_gradient(picture, target, dx):
    """picture, target: (1, H, W). dx: float. Returns d(mean squared error)/d(dx), a float."""
    # BEGIN SOLUTION
    offset = torch.tensor(dx, requires_grad=True)
    places = (
        torch.stack([torch.zeros(()), offset]).view(1, 2, 1, 1).expand(1, 2, *picture.shape[1:])
    )
    read = deform_conv2d(picture[None], places.contiguous(), torch.ones(1, 1, 1, 1))[0]
    (gradient,) = torch.autograd.grad((read - target).square().mean(), offset)
    return gradient.item()
    # END SOLUTION


check("deformable_convolution.3", offset_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Make `offset` a scalar tensor that requires a gradient, and build from it the (1, 2, H, W) offsets
# of `deform_conv2d` with a 1 x 1 weight of one.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# (dy, dx): zeros first, then your offset. `expand` keeps the connection to the scalar; then
# `torch.autograd.grad(loss, offset)`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You return the sum instead of the mean. (An offset that moves y fails the first check already.)
#
# </details>
#
# {{solution}}

# %% [markdown]
# Now let the target lie three pixels to the right. Between two pixels a reader reads
# $(1 - dx)\,x_0 + dx\,x_1$, so the gradient is easy to write for 200 pictures at once. In how many does it
# point to the right, at dx = 0.5?


# %%
def share_to_the_right(blur):
    """The share of 200 pictures, noise blurred over so many pixels, whose error falls with dx."""
    pictures = F.avg_pool2d(torch.randn(200, 1, 24, 40), blur, stride=1)
    here, right, target = pictures[..., :-3], pictures[..., 1:-2], pictures[..., 3:]
    slope = ((0.5 * (here + right) - target) * (right - here)).mean((1, 2, 3))
    return (slope < 0).float().mean().item()


torch.manual_seed(0)
smooth, noise = share_to_the_right(9), share_to_the_right(1)
print(f"smooth {smooth:.2f}, noise {noise:.2f}")
assert smooth > 0.95 and noise < 0.7

# %% [markdown]
# On noise the gradient is no better than a coin: what it feels ends at the next pixel.

# %% [markdown]
# ## {{n}}.5 What is missing before this is attention
#
# - **Weights that are shared out.** In the first version $w_k$ is the same at every place. The second
#   version's modulation differs from place to place, but each tap has its own; nothing makes them share
#   out one total, as the softmax of attention does.
# - **Places only look at their own map.** A query from elsewhere, such as an object, has no seat in
#   a convolution.
# - **One scale.** Each layer reads one map.
#
# {{chapter deformable_attention}} changes the first two, {{chapter many_scales}} the third. In return {{chapter deformable_attention}} shows that a head with
# one point and fixed weights *is* one tap of this chapter.

# %% [markdown]
# ## Summary
#
# - A convolution samples nine fixed points; a deformable one adds an offset to each.
# - Offsets are computed from the map by a small convolution that starts at zero.
# - The loss reaches them through the slope of bilinear sampling, within its capture range.
# - torchvision's layout is (dy, dx) for each tap; this book's points are (x, y).
#
# > **Differs from the paper.** The paper's convolutions have many taps and channels; our reader has
# > one, so that its answer is known. **Differs from the official code.** `deform_conv2d` of
# > torchvision implements both versions of the paper's operation; we checked against it.
#
# ## Further reading
#
# - {cite}`dai2017deformable`: offsets, section 2.1.
# - {cite}`zhu2019deformable2`: modulation, and how to train offsets well.
# - {cite}`zhu2021deformable`: section 4.1 compares deformable attention with both.
