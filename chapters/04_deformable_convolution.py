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
# - **train** offsets on a task whose answer you know, and **explain** why an ordinary convolution
#   fails at it,
# - **say** what is still missing before this is attention.
#
# You should know: bilinear sampling and its gradient ({{chapter sampling}}), convolutions in
# PyTorch.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A convolution always looks at the same pattern: a square of 3 x 3 neighbours. Objects have other
# shapes. The green seven that this book follows is taller than it is wide, and slanted, so a square
# that holds all of it also holds a lot of wood.
#
# Deformable convolution {cite}`dai2017deformable` keeps the nine weights of the pattern but moves
# the nine points at which it reads. The network itself computes, from the image, how far to move
# each of them.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four close-ups of the green seven, each with nine orange points. First a regular 3 by 3 grid; then the same grid spread out to twice its width; then turned and spread; then with each point moved on its own, so that all nine lie on the seven. Arrows lead from the regular grid, drawn as rings, to the moved points."}}
import matplotlib.pyplot as plt
from schematics.deformable_convolution import moved_taps

plt.style.use("book.mplstyle")
moved_taps()

# %% [markdown]
# *Figure {{n}}.1. Where a convolution reads for one output. Rings are the fixed grid, orange discs
# the points after they were moved. If every point has an offset of its own, then spreading, turning
# and following a shape are all the same operation with different numbers. These offsets were chosen
# by hand; below, a gradient finds them.*

# %%
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample, pixel_to_normalised

_ = torch.manual_seed(0)

# %% [markdown]
# The tool for reading between pixels comes from {{chapter sampling}}. In this chapter points are in
# pixels, so one line converts them first.


# %%
def sample(feature_map, pixels):
    """feature_map: (C, H, W). pixels: (..., 2) as (x, y). Returns (..., C)."""
    return bilinear_sample(feature_map, pixel_to_normalised(pixels, feature_map.shape[-2:]))


# %% [markdown]
# ## {{n}}.1 A convolution is sampling with fixed points
#
# The output of a 3 x 3 convolution at place $p_0$ is a sum over nine *taps*, one for each place of
# the pattern. Here $x(p)$ are the channels of the map at place $p$, and $w_k$ is the weight of tap
# $k$, a matrix with one row per output channel and one column per input channel:
#
# $$y(p_0) = \sum_{k=1}^{9} w_k \, x(p_0 + p_k), \qquad p_k \in \{(-1,-1), (0,-1), \dots, (1,1)\}.$$
#
# Let us compute one output by hand, on a map with two channels, four rows and six columns, at
# x = 2, y = 1. The patch is cut out, multiplied by the weights and summed.

# %%
image = torch.randn(2, 4, 6)
weight = torch.randn(3, 2, 3, 3)  # 3 outputs, 2 inputs
x0, y0 = 2, 1
patch = image[:, y0 - 1 : y0 + 2, x0 - 1 : x0 + 2]  # (2, 3, 3)
by_hand = (weight * patch).sum((1, 2, 3))
by_torch = F.conv2d(image[None], weight, padding=1)[0, :, y0, x0]
torch.testing.assert_close(by_hand, by_torch)
print(tuple(by_hand.shape), "outputs at one place, equal to F.conv2d")

# %% [markdown]
# Now the same by sampling. We list the taps as points (x, y), row by row, because that is the order
# in which the weights lie in memory.

# %%
taps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], dtype=torch.float32)
print("the first four taps:", taps[:4].int().tolist())
values = sample(image, torch.tensor([x0, y0]) + taps)  # (9, 2): tap, channel
by_sampling = torch.einsum("kc,ock->o", values, weight.flatten(2))
torch.testing.assert_close(by_sampling, by_torch)
print("sampled at nine points: the same outputs")

# %% [markdown]
# At the border some taps lie outside the map. There our `sample` reads zeros, so it does what zero
# padding does, and we need no padding of our own.

# %% [markdown]
# ## {{n}}.2 Moving the points
#
# Now each tap gets an offset $\Delta p_k$, a real number of pixels in each direction:
#
# $$y(p_0) = \sum_{k} w_k \, x(p_0 + p_k + \Delta p_k).$$
#
# The weights are the same at every place, but the offsets are not: each of the $H \times W$ places
# has nine offsets of its own. So offsets are themselves a kind of image, and a second, ordinary
# convolution makes it.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Block diagram. The feature map, C by H by W, goes two ways: into a small convolution that gives offsets, H by W by 9 by 2, and into a block that reads nine points for each place. The samples, H by W by 9 by C, are then weighed and added to the output, O by H by W."}}
from schematics.deformable_convolution import one_layer

one_layer()

# %% [markdown]
# *Figure {{n}}.2. One deformable layer. The small convolution (blue) says where to read; the
# weights $w_k$ say how much each sample counts. The same feature map serves twice: the offsets are
# computed from it, and the moved points read it.*
#
# How to get good offsets is the question of sections {{n}}.4 and {{n}}.5. First we take the offsets as
# given and write the sampling, as a loop over places.


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
# With offsets of zero the result must be the ordinary convolution, everywhere, the border included.

# %%
still = torch.zeros(4, 6, 9, 2)
expected = F.conv2d(image[None], weight, padding=1)[0]
torch.testing.assert_close(deform_conv_loop(image, still, weight), expected)
print("offsets of zero: an ordinary convolution")

# %% [markdown]
# If all offsets are the same whole number of pixels, the result must be the convolution of a shifted
# image.
#
# Before you run: with dx = 1 every tap reads one pixel further to the right. Does the picture that
# comes out move to the left or to the right?

# %%
right = still.clone()
right[..., 0] = 1
shifted = F.pad(image, (0, 1))[:, :, 1:]  # every pixel takes its right neighbour's value
expected_shifted = F.conv2d(shifted[None], weight, padding=1)[0]
moved = deform_conv_loop(image, right, weight)
torch.testing.assert_close(moved[:, :, 1:], expected_shifted[:, :, 1:])
print("reading to the right moves the picture to the left")

# %% [markdown]
# It moves to the left, because each place now shows what stood one pixel to its right. (The first
# column is left out of the comparison: there the moved taps still read column 0 of the image, and the
# shifted image has lost that column.)

# %% [markdown]
# ## Exercise {{n}}.1  The points of one place
#
# *difficulty ●○○ · 6 minutes · 2 lines*
#
# Return the nine points at which a *dilated*, deformable 3 x 3 convolution reads for the place
# `centre`. Dilation multiplies the taps, as in the second panel of Figure {{n}}.1. It does not
# multiply the offsets, which are in pixels already. List the points row by row.


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
# The first check looks at the middle tap, which is (0, 0), so dilation and order cannot be seen
# there. Either you multiply the offsets too, or your taps run column by column.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 Vectorised, and against torchvision
#
# Both loops can go. Since `sample` takes any number of leading axes, we hand it the points of all
# places and taps at once.


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
print("vectorised: equal to the loop")

# %% [markdown]
# torchvision has the same operation, `deform_conv2d`, in another layout. There the offsets are
# channels: for each tap first dy, then dx, so **y comes first**. Our points are (x, y). If one swaps
# the two by mistake, no error is raised and the result is simply wrong, so we check both ways round.


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
# The second version of deformable convolution {cite}`zhu2019deformable2` also multiplies each
# sample by a *modulation* between 0 and 1. With it a tap that finds nothing useful can be switched
# off. torchvision calls the modulation `mask`. Remember the modulation, because in the next chapter
# an attention weight takes its place.

# %%
mask = torch.rand(4, 6, 9)
theirs = deform_conv2d(
    image[None], to_torchvision(offset), weight, padding=1, mask=mask.permute(2, 0, 1)[None]
)[0]
torch.testing.assert_close(deform_conv(image, offset, weight, mask), theirs, atol=1e-5, rtol=1e-5)
print("modulated: equal to torchvision too")

# %% [markdown]
# ## Exercise {{n}}.2  Groups of channels
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# The channels may be split into groups, each of which reads at points of its own. (Multi-head
# attention does the same, and calls the groups heads.) Split the channels into a first and a second
# half, sample the first half at `points[0]` and the second half at `points[1]`, and return the
# values side by side. The function `sample` is given.


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
# Each half is sampled at its own points and gives (N, C/2); then concatenate along the channels.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check uses the same points for both groups, so it cannot see which group read where.
# Either both of your groups read at the same points, or the channels are interleaved instead of
# halved.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 Offsets that a gradient finds
#
# Nobody tells a network where its taps should go. The loss reaches an offset only through the slope
# of the sampled values ({{chapter sampling}}): if a tap moves a little and the loss falls, it moves
# further that way.
#
# We can watch this on the running example. Take a single place on the seven, let its nine offsets be
# free numbers, and ask for one thing: each of the nine samples should be green. The map is the
# picture's greenness in cells of 4 x 4 pixels, blurred a little so that its slope reaches further. A
# sample above 0.4 is green enough: it adds nothing to the loss, so its tap is no longer pulled. The
# grid starts with 3.5 cells between its taps, so wide that four of the nine stand on wood.

# %%
from schematics import running_example

picture = torch.from_numpy(running_example().copy()).float().permute(2, 0, 1) / 255
greenness = (picture[1] - (picture[0] + picture[2]) / 2)[None]
green = F.avg_pool2d(greenness, 4)  # (1, 32, 32)
green = F.avg_pool2d(green, 5, stride=1, padding=2)
centre = torch.tensor([14.0, 20.5])  # on the seven, in cells
free = torch.zeros(9, 2, requires_grad=True)  # nine offsets
optimiser = torch.optim.Adam([free], lr=0.1)
path = [centre + 3.5 * taps]
for _ in range(80):
    optimiser.zero_grad()
    samples = sample(green, centre + 3.5 * taps + free)
    loss = (0.4 - samples).relu().sum()
    loss.backward()
    optimiser.step()
    path.append((centre + 3.5 * taps + free).detach())
path = torch.stack(path)  # (81, 9, 2)

# %% mystnb={"image": {"alt": "The green seven with nine paths. They start at rings on a regular grid that is wider than the seven, and end at orange discs, all of which lie on the seven."}}
from schematics.deformable_convolution import ALONG_THE_SEVEN, pale_picture

figure, axis = plt.subplots(figsize=(3.6, 3.6))
pale_picture(axis)
in_image = (path + 0.5) * 4 - 0.5  # from cells of 4 x 4 pixels to pixels
for tap in range(9):
    axis.plot(*in_image[:, tap].T, color="black", linewidth=1)
axis.plot(*in_image[0].T, "o", color="black", fillstyle="none")
axis.plot(*in_image[-1].T, "o", color="C4", markeredgecolor="black", markersize=7)
plt.show()

# %% [markdown]
# *Figure {{n}}.3. Nine taps of one place, moved by a gradient. Rings are the starts, discs the
# ends. Two taps of the middle column stay where they are; the others move until they are on the
# green. (The one at the top walks too, although it starts on green: the map is blurred, and near
# the edge of the seven it is below 0.4.) The loss knows nothing about the shape of the seven. The
# taps find it because the slope of the map leads them there.*

# %% tags=["hide-input"]
on_green = [int((sample(greenness, (p + 0.5) * 4 - 0.5)[:, 0] > 0.2).sum()) for p in path[[0, -1]]]
print(f"taps on the seven: {on_green[0]} of 9 before, {on_green[1]} of 9 after")
assert on_green[0] < 6 and on_green[1] == 9
by_hand = torch.from_numpy(ALONG_THE_SEVEN).float()  # the first figure's last panel
assert (sample(greenness, by_hand) > 0.2).all()

# %% [markdown]
# With several layers the samples multiply. An output of the third layer reads nine places of the
# second layer. Each of these has read nine places of the first, and each of those nine places of the
# image. So one output depends on $9^3 = 729$ samples. With fixed taps most of them fall onto one
# another. With moved taps they can gather on the object. Figure 6 of {cite}`dai2017deformable` shows
# this for photographs; here it is for our seven.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two close-ups of the seven. Left: the samples of three ordinary convolutions form a square grid of 49 places, many of them on wood. Right: the samples of three deformable ones, several hundred places, nearly all of them on the seven."}}
from schematics.deformable_convolution import three_layers

three_layers()

# %% [markdown]
# *Figure {{n}}.4. The 729 samples behind one output (cross) of three layers, whose taps are nine pixels
# of the image apart. Left, fixed taps: 49 different places on a square, and half of the samples lie on
# wood. Right, taps that each move a few pixels to where the picture is greener: nearly all samples lie
# on the seven. (We wrote this rule by hand. A trained network has to learn its offsets.)*

# %% [markdown]
# ## {{n}}.5 Offsets that a network computes
#
# Free offsets work for one picture only. In a network, a small convolution computes them, so that
# they suit each new picture. Can such a convolution learn to do so? To judge that, we need a task whose
# answer we know.
#
# A map has two channels: a smooth random picture, and a flag that is -1 to the left of some border
# and +1 to the right of it. The target is the picture again, but read from elsewhere: **three
# pixels to the left where the flag is -1, three pixels to the right where it is +1**. So the
# correct offset is dx = 3 times the flag. (The picture is noise blurred by a Gaussian with a
# standard deviation of 2.5 pixels, then brought to a standard deviation of 1. Where the place to
# read lies outside the picture, the target is 0.)

# %%
SHIFT = 3.0
BLUR = torch.exp(-(torch.arange(-6.0, 7) ** 2) / (2 * 2.5**2))
BLUR = BLUR / BLUR.sum()


def make_batch(size=4, height=14, width=22):
    """(size, 2, H, W) inputs and (size, 1, H, W) targets."""
    noise = torch.randn(size, 1, height + 12, width + 12)  # the blur takes 6 from each side
    picture = F.conv2d(F.conv2d(noise, BLUR.view(1, 1, 1, -1)), BLUR.view(1, 1, -1, 1))
    picture = picture / picture.std()
    border = torch.randint(6, width - 6, (size, 1, 1, 1))
    flag = torch.where(torch.arange(width) < border, -1.0, 1.0).expand(size, 1, height, width)
    places = torch.arange(width) + SHIFT * flag[:, 0, 0]  # (size, W): where to read, in each column
    inside = (places >= 0) & (places < width)
    index = places.clamp(0, width - 1).long()[:, None, None].expand(size, 1, height, width)
    target = picture.gather(3, index) * inside[:, None, None]
    return torch.cat([picture, flag], 1), target


inputs, targets = make_batch()
print("inputs", tuple(inputs.shape), "targets", tuple(targets.shape))

# %% [markdown]
# Two layers compete:
# - an ordinary **7 x 7** convolution on both channels. It reaches three pixels to each side, so it
#   sees everything that it needs;
# - a deformable **1 x 1** convolution. It has a single tap on the picture, and that tap's offset is a
#   linear function of both channels.


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


# %% [markdown]
# Before you run: which of the two will solve the task, and why will the other one not?

# %%
plain, deformable, convolutions, readers = [], [], [], []
for seed in range(3):
    torch.manual_seed(seed)
    convolutions.append(nn.Conv2d(2, 1, 7, padding=3))
    plain.append(train(convolutions[-1], seed))
    readers.append(DeformableReader())
    deformable.append(train(readers[-1], seed))
plain, deformable = torch.stack(plain), torch.stack(deformable)
ends = [losses[:, -50:].mean().item() for losses in (plain, deformable)]
print(f"squared error at the end: plain {ends[0]:.1f}, deformable {ends[1]:.1f}")
assert ends[0] > 5 * ends[1]

# %% mystnb={"image": {"alt": "Training loss over 250 steps, three lines for each of two layers. The three lines of the plain convolution level off near 0.4; the three lines of the deformable one fall to zero within about 120 steps."}}
figure, axis = plt.subplots()
for losses, name, colour in ((plain, "plain 7 x 7", "C1"), (deformable, "deformable 1 x 1", "C0")):
    for seed, curve in enumerate(losses.unfold(1, 15, 1).mean(-1)):
        axis.plot(range(15, 251), curve, color=colour, label=None if seed else name, linewidth=1.2)
axis.set(xlabel="step", ylabel="squared error, mean of 15 steps", ylim=(0, None))
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.5. One line per seed. The plain convolution has 99 parameters (2 x 7 x 7 weights and a
# bias) and sees all that matters, yet it stops at about 0.4. The deformable one has 7 (six for the
# offset, one weight for the tap) and solves the task.*
#
# The plain convolution does not fail for lack of reach. It fails because it is **linear**: its output
# is one sum over the picture plus another sum over the flag. A sum cannot let the flag *choose*
# between two parts of the picture, because choosing is a product of the two. We can see this directly
# by turning the flag from -1 to +1 everywhere: a linear layer changes its output by the same amount,
# whatever the picture shows.

# %%
first, second = torch.randn(2, 1, 1, 14, 22)
plus = torch.ones(1, 1, 14, 22)


def change(model, picture):
    """By how much the output changes when the flag turns from -1 to +1 everywhere."""
    with torch.no_grad():
        return model(torch.cat([picture, plus], 1)) - model(torch.cat([picture, -plus], 1))


for name, model in (("plain", convolutions[0]), ("deformable", readers[0])):
    apart = (change(model, first) - change(model, second)).abs().max()
    print(f"{name}: the change depends on the picture: {bool(apart > 1e-4)}")

# %% tags=["hide-input"]
torch.testing.assert_close(change(convolutions[0], first), change(convolutions[0], second))
assert (change(readers[0], first) - change(readers[0], second)).abs().max() > 1

# %% [markdown]
# A layer that cannot choose can still mix both candidates, half and half, since it does not know
# which of them is wanted. How far off is that?

# %%
inputs, targets = make_batch(200)
picture = inputs[:, :1]
mixed = (picture[..., :-6] + picture[..., 6:]) / 2  # what lies 3 to the left, and 3 to the right
error = (mixed - targets[..., 3:-3]).square().mean().item()
print(f"mean of both candidates: squared error {error:.1f}")
assert abs(error - ends[0]) < 0.1

# %% [markdown]
# That is the 0.4 at which the plain convolution stopped. So it does about as well as this mixture,
# and no better. To choose, a layer needs something that is not linear. A ReLU is enough: for
# pictures whose values lie between $-b$ and $b$,
#
# $$\text{relu}(x + b \cdot \text{flag}) - b \cdot \text{relu}(\text{flag})$$
#
# is $x$ where the flag is +1, and 0 where it is -1. So a network of two ordinary layers *can* solve
# this task. But built like this, it needs one such branch for each displacement that might ever occur,
# while an offset is a single number that can take any value.

# %%
x, flag, b = torch.randn(1000).clamp(-4, 4), torch.randn(1000).sign(), 4.0
gated = (x + b * flag).relu() - b * flag.relu()
torch.testing.assert_close(gated, torch.where(flag > 0, x, 0.0), atol=1e-6, rtol=0)
print("with a ReLU, the flag gates the picture")

# %% [markdown]
# And what did the deformable layer learn? The answer should be dx = 3 times the flag, and dy = 0.

# %%
learned = torch.stack([reader.offset.weight[:, :, 0, 0] for reader in readers])  # (3, 2, 2)
flag_to_dy, flag_to_dx = learned[:, 0, 1], learned[:, 1, 1]
print("dx per unit of the flag, three seeds:", [f"{dx:.1f}" for dx in flag_to_dx.tolist()])
assert (flag_to_dx - SHIFT).abs().max() < 0.05 and flag_to_dy.abs().max() < 0.05

# %% mystnb={"image": {"alt": "A smooth random picture with a vertical dashed border. White arrows left of the border point three pixels to the left, arrows right of it three pixels to the right."}}
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
# *Figure {{n}}.6. The learned offsets of one reader, as arrows from where an output stands to where
# it reads. Their direction changes at the dashed border, where the flag changes its sign. The
# parameters are the same everywhere; the input at a place (here its flag) decides where that place
# reads.*

# %% tags=["hide-input"]
left, right_side = dx[:, : int(border)], dx[:, int(border) + 2 :]
assert (left < -2).all() and (right_side > 2).all()

# %% [markdown]
# ## Exercise {{n}}.3  A layer to keep
#
# *difficulty ●●● · 30 minutes · 8 lines*
#
# Write the whole modulated layer. You can put it in place of any 3 x 3 convolution that has stride
# 1, padding 1 and no bias (like most of those in a ResNet):
# - one ordinary 3 x 3 convolution with 27 outputs computes, from the layer's own input, the offsets
#   (channels 0 to 17, in torchvision's layout) and nine scores (channels 18 to 26);
# - a modulation is **twice** the sigmoid of its score;
# - the 27-channel convolution starts at zero, weights and bias. Then all offsets are 0, all
#   modulations 1, and the new layer starts as the ordinary convolution that it replaces.
#
# Keep the weight, without a bias, in `self.weight` (outputs, inputs, 3, 3) and the convolution in
# `self.offset`. The spatial size must not change.


# %% tags=["exercise"]
class DeformableLayer(nn.Module):
    """A modulated deformable 3 x 3 convolution that finds its own offsets."""

    def __init__(self, inputs, outputs):
        super().__init__()
        # BEGIN SOLUTION
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        nn.init.kaiming_uniform_(self.weight)
        self.offset = nn.Conv2d(inputs, 27, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        # END SOLUTION

    def forward(self, x):
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        # BEGIN SOLUTION
        offset, score = self.offset(x).split([18, 9], dim=1)
        mask = 2 * score.sigmoid()
        return deform_conv2d(x, offset, self.weight, padding=1, mask=mask)
        # END SOLUTION


check("deformable_convolution.3", DeformableLayer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `self.offset(x).split([18, 9], dim=1)` gives offsets and scores. `deform_conv2d` takes both as they
# are, with `mask=` for the modulations.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Both convolutions need `padding=1` to keep the size. `nn.init.zeros_` on the weight **and** on the
# bias of `self.offset`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# At the start all offsets are zero, so the first check sees neither their order nor the modulation's
# form. Is your modulation twice a sigmoid, and do the offsets come before the scores?
#
# </details>
#
# {{solution}}

# %% [markdown]
# The library has this layer for ResNets, as `ModulatedDeformConv2d` in
# `deformable_detr.backbones.deformable_convolution`. (The paper's modulation is the sigmoid alone,
# which starts at one half. The factor of two lets pretrained weights carry over.)

# %% [markdown]
# ## {{n}}.6 Offsets need a slope to follow
#
# The random picture was smooth on purpose. A gradient feels only the pixels next to the point
# ({{chapter sampling}} calls this the capture range), so a target three pixels away can pull only if
# the picture leads there smoothly.
#
# We measure this on many random pictures. Let the target lie three pixels to the right, and let a
# reader with one dx for the whole picture stand at dx = 0.5, so that it reads halfway between two
# pixels: $r = (\text{here} + \text{right}) / 2$. If dx grows, $r$ changes by
# $\text{right} - \text{here}$. So, up to a factor of 2, the derivative of the squared error by dx is
# the mean of $(r - \text{target})(\text{right} - \text{here})$ over all places. Gradient descent
# steps *against* the derivative, so the reader moves to the right, as it should, if the derivative is
# **negative**.


# %%
def share_moving_right(blur, pictures=2000):
    """The share of random pictures, blurred over `blur` pixels, whose error falls as dx grows."""
    noise = torch.randn(pictures, 1, 24, 40)
    smooth = F.avg_pool2d(noise, blur, stride=1)
    here, right, target = smooth[..., :-3], smooth[..., 1:-2], smooth[..., 3:]
    derivative = ((0.5 * (here + right) - target) * (right - here)).mean((1, 2, 3))
    return (derivative < 0).float().mean().item()


# %% [markdown]
# Before you run: what share do you expect on smooth pictures, and what share on white noise?

# %%
torch.manual_seed(0)
smooth, noise = share_moving_right(9), share_moving_right(1)
print(f"moves the right way: smooth {smooth:.1f}, noise {noise:.1f}")
assert smooth > 0.95 and abs(noise - 0.5) < 0.05

# %% [markdown]
# On smooth pictures the reader practically always sets out in the right direction. On noise it does
# so half of the time, as if it tossed a coin, because neighbouring pixels say nothing about pixels
# further away.
#
# ## Exercise {{n}}.4  The derivative by an offset
#
# *difficulty ●●○ · 15 minutes · 7 lines*
#
# Get the derivative of the squared error from autograd instead, for any dx. A reader reads
# everywhere at `x + dx` (use `deform_conv2d` with a 1 x 1 weight of one). Return the derivative of
# the mean squared error between what it reads and the target, by `dx`, as a float.


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


check("deformable_convolution.4", offset_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Make `offset` a scalar tensor that requires a gradient, and build from it the (1, 2, H, W) offsets
# of `deform_conv2d`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The order is (dy, dx): zeros first, then your offset. `expand` keeps the connection to the scalar;
# then `torch.autograd.grad(loss, offset)`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check looks only at the sign. You probably return the derivative of the summed error
# instead of the mean.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.7 What is missing before this is attention
#
# In a deformable convolution the content of the image decides where to read. Two things still separate
# it from the attention of {{chapter attention}}, and a third from what a detector needs:
#
# - **Weights that compete.** In the first version $w_k$ is the same at every place. The second
#   version's modulations differ from place to place, but each tap has its own: nothing makes them
#   share one total, as a softmax does.
# - **A query from elsewhere.** In a convolution the query is always a place of the map, and its
#   question is made from the features at that place. But a detector also has questions that belong
#   to no place, such as "where is the seven?". A convolution has no input for them.
# - **Several scales.** Each layer reads one map, although a detector has several.
#
# {{chapter deformable_attention}} brings the first two, and {{chapter many_scales}} the third. Nothing
# from this chapter is lost on the way: the next one shows that deformable attention with one head, one
# point and no value projection *is* a deformable 1 x 1 convolution, and that nine heads with one point
# each make a 3 x 3 one.

# %% [markdown]
# ## Summary
#
# - A convolution samples nine fixed points; a deformable one adds an offset to each.
# - A small convolution computes the offsets from the map. Its parameters start at zero, so the
#   layer starts as an ordinary convolution.
# - The loss reaches an offset through the slope of bilinear sampling, within its capture range.
# - One linear layer cannot let one channel choose where another is read. An offset can.
# - torchvision's layout is (dy, dx) for each tap; this book's points are (x, y).
#
# > **Differs from the paper.** The paper's convolutions have many taps and channels; our reader has
# > one tap, so that its answer is known. Modulation in the paper lies between 0 and 1; in our layer
# > between 0 and 2. **Differs from the official code.** `deform_conv2d` of torchvision implements
# > both versions of the paper's operation; we checked against it.
#
# ## Further reading
#
# - {cite}`dai2017deformable`: offsets, section 2.1; the 729 samples, Figure 6.
# - {cite}`zhu2019deformable2`: modulation, and how to train offsets well.
# - {cite}`zhu2021deformable`: the paragraphs after its Eq. 2 compare deformable attention with
#   deformable convolution.
