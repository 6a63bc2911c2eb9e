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
# # {{n}}. Sampling between pixels
#
# You will be able to
# - **compute** by hand the value of an image between its pixels,
# - **derive** how that value changes when the point moves, which is why a network can learn where to
#   look,
# - **convert** between the four coordinate conventions that are in use, without losing half a pixel,
# - **recognise** the bugs that mixed conventions cause, from a picture or from a number,
# - **cut out** any box of a picture, at any angle and any size.
#
# You should know: PyTorch tensors, indexing and autograd.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A detector such as Deformable DETR {cite}`zhu2021deformable` does not look at every pixel of an
# image. It *chooses* a few places and reads the image there. A neural network makes that choice, and
# the output of a neural network is a real number: "look at x = 51.25, y = 61.5". But an image has
# pixels at 51 and at 52, and none in between. So before anything else, we must say what value an
# image has between its pixels. That is the subject of this chapter, and everything later in the book
# rests on it.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from deformable_detr.exercises import check
from deformable_detr.layers.sampling import (
    bilinear_sample,
    normalised_to_pixel,
    pixel_to_normalised,
)

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: a photograph of wood with a green seven, and a small white frame at the seven's upper left end. Right: the 8 by 6 pixels in the frame, each with its green value written in it, from 121 on the wood to 240 on the digit. An orange point lies between columns 51 and 52 and between rows 61 and 62, with a question mark."}}
from schematics.sampling import between_pixels

between_pixels()

# %% [markdown]
# *Figure {{n}}.1. What to see: our running example, a green seven on wood, which comes back throughout
# the book. The white frame is enlarged on the right. The orange point lies at x = 51.25, y = 61.5,
# where there is no pixel. How green is the picture there?*

# %% [markdown]
# ## {{n}}.1 Four pixels, by hand
#
# To answer this, we start with the smallest map in which a point can lie between pixels along both
# axes: two rows and two columns. Pixel centres have whole coordinates. x counts columns and y
# counts rows, both from 0.

# %%
corners = torch.tensor([[10.0, 20.0], [50.0, 80.0]])  # rows are y, columns are x
print("the value at x=1, y=0 is", corners[0, 1].item())

# %% [markdown]
# What is the value at x = 0.25, y = 0.5? Here is a picture of the answer, before any formula. Put a
# frame of the size of one pixel around the point. The frame covers a part of each of the four
# pixels. **The area that it covers is the pixel's weight**, and the value at the point is the sum of
# the four pixels, each times its weight.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: four pixels with the values 10, 20, 50 and 80. An orange frame of one pixel around the point x = 0.25, y = 0.5 covers 0.375 of each of the two left pixels and 0.125 of each of the two right ones. Right: the four areas times the four values, 3.75, 2.50, 18.75 and 10.00, add up to 35."}}
from schematics.sampling import four_pixels

four_pixels(x=0.25, y=0.5)

# %% [markdown]
# *Figure {{n}}.2. What to see: the point is near the left column, so the frame covers more of the left
# pixels than of the right ones, and they count for more. The four areas always add up to 1, because
# together they are the frame.*

# %% [markdown]
# The same in arithmetic. A blend of two numbers along x comes first: once along the top edge, once
# along the bottom edge. Then the two results are blended along y. Because the result is linear in x
# and linear in y, this is called **bilinear** interpolation.
#
# Before you run: what is the blend along the top edge, a quarter of the way from 10 to 20? And along
# the bottom edge, from 50 to 80?

# %%
x, y = 0.25, 0.5
top = (1 - x) * 10 + x * 20
bottom = (1 - x) * 50 + x * 80
value = (1 - y) * top + y * bottom
print("top", top, "bottom", bottom, "value", value)
assert (top, bottom, value) == (12.5, 57.5, 35.0)

# %% [markdown]
# If we multiply this out, each pixel gets one factor. For the upper left pixel it is (1 - y)(1 - x):
# the nearer the point, the larger. In the picture, 1 - x = 0.75 and 1 - y = 0.5 are the sides of the
# part of this pixel that the frame covers. So their product is the area of that part.

# %%
weights = torch.tensor([[(1 - y) * (1 - x), (1 - y) * x], [y * (1 - x), y * x]])
print(weights, "sum", weights.sum().item(), "value", (weights * corners).sum().item())
assert weights.sum() == 1
assert (weights * corners).sum() == value

# %% [markdown]
# No weight is negative and together they make 1. So the value is an average: it is never larger than
# the largest of the four pixels, and never smaller than the smallest.
#
# The paper on deformable convolution {cite}`dai2017deformable` writes the same as a sum over *all*
# pixels $q$ of the map, for a point $p$. In its formula $x$ is the map, not a coordinate: $x(q)$ is
# the value of pixel $q$, and $q_x$ and $q_y$ are its column and row.
#
# $$x(p) = \sum_q G(q, p)\, x(q), \qquad
# G(q, p) = \max(0, 1 - |q_x - p_x|) \cdot \max(0, 1 - |q_y - p_y|).$$
#
# $G(q, p)$ is the area of pixel $q$ that the frame around $p$ covers. It is 1 when the point lies on
# the pixel's centre, and 0 as soon as the point is one pixel away or more, along x or along y. That
# is why only four pixels count.

# %% [markdown]
# ## Exercise {{n}}.1  Four corners
#
# *difficulty ●○○ · 5 minutes · 3 lines*
#
# Write the blend for any four corner values. `fx` and `fy` in [0, 1] say how far to the right and how
# far down the point lies between the corners.


# %% tags=["exercise"]
def blend(values, fx, fy):
    """values: (2, 2), rows are y. fx, fy: floats in [0, 1]. Returns a scalar tensor."""
    # BEGIN SOLUTION
    top = (1 - fx) * values[0, 0] + fx * values[0, 1]
    bottom = (1 - fx) * values[1, 0] + fx * values[1, 1]
    return (1 - fy) * top + fy * bottom
    # END SOLUTION


check("sampling.1", blend)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Blend along x twice, then along y once.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `values[0, 1]` is the top **right** corner: row 0, column 1.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The corners are right, but between them you round to the nearest pixel, or forget a factor: each
# pixel's weight is a product of two distances.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.2 A whole map, with a loop
#
# On a larger map we must find the four pixels first. The left column is the whole part of x (its
# floor), and the top row is the floor of y. The other two pixels are one column further and one row
# further.
#
# What if one of the four lies outside the map? Then it counts as zero, as if the map were surrounded
# by zeros.


# %%
def sample_by_loop(feature_map, px, py):
    """feature_map: (H, W). px, py: pixel coordinates. Returns a float."""
    height, width = feature_map.shape
    left, top = int(px // 1), int(py // 1)
    total = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                weight = (1 - abs(px - column)) * (1 - abs(py - row))
                total += weight * feature_map[row, column].item()
    return total


# %% [markdown]
# Now the question of Figure {{n}}.1 can be answered. Before you run: the four pixels around the
# point are 127 and 133 (above), 195 and 229 (below). The point is a quarter of the way to the right,
# and half way down. Which value do you expect?

# %%
picture = torch.tensor(plt.imread("../data/samples/000010.png")[..., :3]).permute(2, 0, 1)
green = (255 * picture[1]).round()  # (128, 128)
print("green at (51.25, 61.5):", sample_by_loop(green, 51.25, 61.5))
assert sample_by_loop(green, 51.25, 61.5) == 166.0

# %% [markdown]
# And what happens at the borders? We try it on a map whose values are simply its pixels' numbers: 0
# to 4 in the top row, 5 to 9 in the middle, 10 to 14 at the bottom. It is 3 high and 5 wide. (Never
# test on a square map: height and width could be swapped, and you would not notice.)

# %%
small = torch.arange(15.0).reshape(3, 5)  # H=3, W=5
for point in [(1.0, 2.0), (1.5, 0.5), (-0.5, 1.0), (4.75, 1.0), (9.0, 1.0)]:
    print(point, sample_by_loop(small, *point))
assert sample_by_loop(small, 1.5, 0.5) == (1 + 2 + 6 + 7) / 4
assert sample_by_loop(small, 4.75, 1.0) == 0.25 * 9

# %% [markdown]
# The third point, x = -0.5, lies exactly on the left edge of the map. So half of its frame is
# outside, and it gets half of the pixel there, 2.5 of 5. The last two points lie beyond the right
# edge, which is at x = 4.5. At x = 4.75 three quarters of the frame are outside, so a quarter of the
# 9 is left. At x = 9 nothing is left. So the value never jumps at a border: it *fades out* over one
# pixel.

# %% [markdown]
# ## {{n}}.3 Vectorised
#
# A detector samples thousands of points with hundreds of channels, so the loop over points must go.
# The loop over the four pixels can stay. Two things need care:
# - The index of a pixel outside the map must still be a legal index, or indexing fails. So we
#   clamp it to the nearest row and column that exist.
# - What is read at the clamped index is wrong, so its weight must be zero. (This works as long as
#   all values of the map are finite, because zero times infinity is not zero.)


# %%
def sample(feature_map, pixels):
    """feature_map: (C, H, W). pixels: (N, 2) as (x, y). Returns (N, C)."""
    _, height, width = feature_map.shape
    corner = pixels.floor()
    fx, fy = (pixels - corner).unbind(-1)  # how far right and down in the cell, in [0, 1)
    result = 0
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = (fx if right else 1 - fx) * (fy if below else 1 - fy)
        column, row = corner[:, 0] + right, corner[:, 1] + below
        exists = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        rows, columns = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
        result = result + feature_map[:, rows, columns].T * (weight * exists).unsqueeze(-1)
    return result


# %% [markdown]
# Does it agree with the loop? We compare the two at 50 random points of a map with 4 channels. Some
# of the points lie outside.

# %%
feature_map = torch.randn(4, 3, 5)
pixels = torch.rand(50, 2) * torch.tensor([8.0, 6.0]) - 1.5
sampled = sample(feature_map, pixels)
by_loop = torch.tensor([[sample_by_loop(c, *p) for c in feature_map] for p in pixels.tolist()])
torch.testing.assert_close(sampled, by_loop, atol=1e-5, rtol=1e-5)
print(tuple(sampled.shape), "as by the loop")

# %% [markdown]
# ## {{n}}.4 How the value changes when the point moves
#
# If a network is to *learn* where to look, it must know what would happen if it looked a little
# further to the right. In other words, we need the derivative of the value with respect to the
# point's coordinates.
#
# Take the square between four pixel centres, with the values $a$ and $b$ above, $c$ and $d$ below.
# The point lies $u$ to the right of $a$ and $v$ below it. Then
#
# $$x(u, v) = (1-v)\big[(1-u)a + u b\big] + v\big[(1-u)c + u d\big]$$
#
# $$\frac{\partial x}{\partial u} = (1-v)(b-a) + v(d-c), \qquad
# \frac{\partial x}{\partial v} = (1-u)(c-a) + u(d-b).$$
#
# In words: the derivative along x is the right pixel minus the left pixel, blended over the two
# rows. The derivative along y is the lower minus the upper, blended over the two columns. So if we
# want a larger value, we move the point towards the brighter pixels. These two numbers are what a
# network follows when it learns where to look.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the frame around the point x = 0.25, y = 0.5 over four pixels with the values 10, 20, 50 and 80. Right: the value everywhere between the four pixel centres as a colour, dark at the upper left and bright at the lower right, with the point and an arrow that points down and a little to the right. The title gives the value 35.0 and the slopes 20 along x and 45 along y."}}
# NBVAL_IGNORE_OUTPUT
from schematics import slider
from schematics.sampling import point_and_gradient

slider(point_and_gradient, x=(0.0, 1.0, 0.25), y=(0.0, 1.0, 0.5))

# %% [markdown]
# *Figure {{n}}.3. What to see: the four weights on the left; the value between the four pixel centres on
# the right, with an arrow in the direction in which it rises fastest. In JupyterLab, run the cell and
# move x and y with the sliders: as the point moves down, the slope along x grows from 10 (the top two
# pixels) to 30 (the bottom two).*

# %% [markdown]
# Autograd finds the same two numbers as the formulas:

# %%
point = torch.tensor([[0.25, 0.5]], requires_grad=True)
sample(corners[None], point).sum().backward()
by_hand = [(1 - 0.5) * (20 - 10) + 0.5 * (80 - 50), (1 - 0.25) * (50 - 10) + 0.25 * (80 - 20)]
print("by autograd", point.grad.tolist(), "by hand", by_hand)
assert point.grad.tolist() == [by_hand] == [[20.0, 45.0]]

# %% [markdown]
# Training needs one more gradient, with respect to the values of the pixels, because the feature
# map is computed by a network which learns too. This gradient is simpler. The sampled value is a
# weighted sum, so its derivative with respect to a pixel is the weight of that pixel. In a backward
# pass the gradient of one sample is therefore split among the four pixels, and each of them
# receives its weight times that gradient.
#
# `gradcheck` compares both derivatives with finite differences:

# %%
doubles = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
places = torch.rand(6, 2, dtype=torch.float64) * 2 + 0.1
assert torch.autograd.gradcheck(sample, (doubles, places.requires_grad_()))
print("both gradients agree with finite differences")

# %% [markdown]
# How do value and slope look along a whole row? Here is a row of five pixels, sampled at 900 places
# from two pixels before it to two pixels after it.

# %% mystnb={"image": {"alt": "Left: the sampled value along one row of five pixels, a line with corners at the pixel centres that falls to zero one pixel from the outermost centres. Right: its slope, a staircase that jumps at every pixel centre and is zero more than one pixel from the outermost centres."}}
row = torch.tensor([[[2.0, 5.0, 1.0, 1.0, 4.0]]])
xs = torch.linspace(-2.495, 6.495, 900, requires_grad=True)  # never quite on a pixel
values = sample(row, torch.stack([xs, torch.zeros_like(xs)], -1))[:, 0]
(slopes,) = torch.autograd.grad(values.sum(), xs)
figure, (left_axis, right_axis) = plt.subplots(1, 2)
left_axis.plot(xs.detach(), values.detach(), color="C4")
left_axis.plot(range(5), row[0, 0], "o", color="C2", label="pixels")
left_axis.set(xlabel="x in pixels", ylabel="sampled value")
left_axis.legend()
right_axis.plot(xs.detach(), slopes, color="C4")
right_axis.set(xlabel="x in pixels", ylabel="slope of the value")
plt.show()

# %% [markdown]
# *Figure {{n}}.4. What to see: the value is continuous, with corners at the pixel centres. Its
# slope is constant between two pixels, jumps at their centres, and is exactly zero where the point
# is more than one pixel away from the centres of the first and the last pixel.*

# %% tags=["hide-input"]
outside = (xs.detach() < -1.01) | (xs.detach() > 5.01)
assert (slopes[outside] == 0).all() and (values.detach()[outside] == 0).all()
between = (xs.detach() > 0.01) & (xs.detach() < 0.99)
assert torch.allclose(slopes[between], torch.tensor(3.0), atol=1e-4)  # from 2 to 5
print("slope between pixels 0 and 1: 3 (from 2 to 5); outside: 0")

# %% [markdown]
# Exactly *on* a pixel's centre there are two slopes, one to the left and one to the right. Code has
# to take one of them. Ours takes the one to the right (and below), because of the `floor`; PyTorch's
# own `F.grid_sample`, which we meet below, does the same.
#
# The gradient on a pixel's centre needs some care. Had we written the weight as in the formula for
# $G$, `1 - (x - column).abs()`, the values would be the same, but not the gradients: at 0 autograd
# takes the derivative of `abs` to be 0, so one of the two terms is lost. The gradient would be
# wrong for every point that is exactly on a pixel's centre, and before training the points of
# deformable attention often are. Pixel 1 of the row above is 5 and pixel 2 is 1, so the slope
# should be -4:

# %%
centre = torch.tensor([[1.0, 0.0]], requires_grad=True)
(ours,) = torch.autograd.grad(sample(row, centre).sum(), centre)
tent = (1 - (centre[0, 0] - 1).abs()) * 5 + (1 - (centre[0, 0] - 2).abs()) * 1
(with_abs,) = torch.autograd.grad(tent, centre)
print("ours", ours[0, 0].item(), "with abs", with_abs[0, 0].item())
assert ours[0, 0] == -4 and with_abs[0, 0] == 1

# %% [markdown]
# ## Exercise {{n}}.2  The slope, without autograd
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# Return both derivatives of the blend of exercise {{n}}.1, from the formulas above. A CUDA kernel has no
# autograd, so its backward pass needs exactly this.


# %% tags=["exercise"]
def blend_slope(values, fx, fy):
    """values: (2, 2). fx, fy: floats in [0, 1]. Returns (d/dfx, d/dfy), scalar tensors."""
    # BEGIN SOLUTION
    by_x = (1 - fy) * (values[0, 1] - values[0, 0]) + fy * (values[1, 1] - values[1, 0])
    by_y = (1 - fx) * (values[1, 0] - values[0, 0]) + fx * (values[1, 1] - values[0, 1])
    return by_x, by_y
    # END SOLUTION


check("sampling.2", blend_slope)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The derivative along x is a difference along x, blended along y.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# At `fy = 0` the derivative along x is the difference of the two **top** corners.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You blend the differences with the wrong fraction: differences along x are blended with `fy`,
# those along y with `fx`.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 A point that walks to the light
#
# Since a place has a gradient, we can optimise a place like any weight of a network. Here is a bright
# spot on a dark map of 20 rows and 30 columns. It fades out with distance, and further than 9 pixels
# from its centre the map is completely dark.

# %%
height, width = 20, 30
grid_y, grid_x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
spot = torch.exp(-((grid_x - 21) ** 2 + (grid_y - 7) ** 2) / (2 * 3.0**2))
spot = torch.where(spot > 0.01, spot, 0.0)

# %% [markdown]
# We put a point somewhere on the map and follow the gradient of the sampled value uphill, in steps
# of about 0.2 pixels. (Optimisers minimise, so the loss is the value with a minus sign.)


# %%
def walk(start, steps=150):
    """Follow the gradient of the sampled value uphill; returns the path, (steps + 1, 2)."""
    place = torch.tensor([start], requires_grad=True)
    optimiser = torch.optim.Adam([place], lr=0.2)
    path = [place.detach().clone()]
    for _ in range(steps):
        optimiser.zero_grad()
        (-sample(spot[None], place)).sum().backward()
        optimiser.step()
        path.append(place.detach().clone())
    return torch.cat(path)


# %% [markdown]
# Before you run: three points start at distances of about 5, 8 and 18 pixels from the centre of the
# spot at (21, 7). Which of them will arrive there?

# %%
starts = [(24.0, 11.0), (14.0, 4.0), (5.0, 15.0)]
paths = [walk(start) for start in starts]
distances = [(path[-1] - torch.tensor([21.0, 7.0])).norm().item() for path in paths]
print("distances at the end:", [round(d) for d in distances])
assert distances[0] < 0.5 and distances[1] < 0.5
assert torch.equal(paths[2][0], paths[2][-1])

# %% mystnb={"image": {"alt": "A dark map with a bright round spot. Two paths lead from starting points near the spot to its centre; the third start, far from it, has no path."}}
figure, axis = plt.subplots()
axis.imshow(spot)
for path, colour in zip(paths, ("C1", "C4", "C3"), strict=True):
    axis.plot(*path.T, color=colour)
    axis.plot(*path[0], "o", color=colour)
    axis.plot(*path[-1], "*", color=colour, markersize=12, mec="black")
axis.set(xlabel="x in pixels", ylabel="y in pixels")
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What to see: circles are starts and stars are ends. Two points feel the slope of the
# spot and climb to its centre. (They overshoot a little, because Adam has momentum.) The third (its star covers its circle) lies where the map is flat.
# Its gradient is exactly zero, so it never moves.*

# %% tags=["hide-input"]
for path in paths[:2]:
    brightness = sample(spot[None], path)[:, 0]
    assert (brightness[1:6] > brightness[:5]).all()
print("the first five steps of both walks go uphill")

# %% [markdown]
# A gradient knows about the four pixels around the point and about nothing else. How far away a
# target may be and still be found is called the *capture range*. Here it is about 9 pixels, because
# further out the map is flat. The capture range explains three choices of deformable attention that
# we shall meet:
# - it takes **several** points per query, since one alone may lie where the map is flat;
# - it starts them **spread out**, as a star ({{chapter many_scales}});
# - it also looks at **coarse maps**, where one pixel covers a large part of the image, so that even
#   the four pixels around a point cover a lot.
#
# The idea of learning where to sample is older than deformable attention: it comes from spatial
# transformers {cite}`jaderberg2015stn`.

# %% [markdown]
# ## Exercise {{n}}.3  How far does it see?
#
# *difficulty ●●○ · 10 minutes · 4 lines*
#
# Shrink a map by averaging blocks of `factor x factor` pixels. Then return whether a point on the
# shrunk map feels a slope, that is, whether the gradient of the sampled value with respect to the
# point is different from zero. The point is given as `pixel`, in pixels of the **full** map. On the
# shrunk map, the same place in the scene has the coordinate $(p + 0.5)/\text{factor} - 0.5$.
# (Section {{n}}.6 says why; you need no more than the formula here.)


# %% tags=["exercise"]
def has_gradient(full_map, pixel, factor):
    """full_map: (H, W). pixel: (x, y). factor: int that divides H and W. Returns a bool."""
    # BEGIN SOLUTION
    coarse = F.avg_pool2d(full_map[None], factor)
    place = ((torch.tensor([pixel]) + 0.5) / factor - 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(sample(coarse, place).sum(), place)
    return bool(gradient.abs().sum() > 0)
    # END SOLUTION


check("sampling.3", has_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `F.avg_pool2d` wants (C, H, W): add an axis with `full_map[None]`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Convert the place first, then call `.requires_grad_()`, then take `torch.autograd.grad` of the
# sampled value with respect to the place.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You divide the coordinate by the factor without the half pixels. The shift is small on one map and
# grows with the factor; section {{n}}.6 is about nothing else.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 Four conventions for one point
#
# So far, coordinates were pixels. They change with the size of the map: the middle of a map of 5
# pixels is at 2, and of a map of 50 at 24.5. A network that looks at maps of many sizes needs
# coordinates that do not change, so it speaks in *normalised* ones. Unfortunately there are three
# ways to normalise, and all three are in use.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A row of five pixels and four rulers below it. Pixel coordinates: 0 and W minus 1 at the centres of the first and last pixel. This book: 0 and 1 at the outer edges, with the centres at 0.5 / W and 1 - 0.5 / W. align_corners=False: -1 and 1 at the outer edges, with the centres at -1 + 1 / W and 1 - 1 / W. align_corners=True: -1 and 1 at the centres of the first and last pixel."}}
from schematics.sampling import rulers

rulers()

# %% [markdown]
# *Figure {{n}}.6. What to see: where each convention begins and ends. This book and
# `align_corners=False` measure from the outer **edge** of the first pixel to the outer edge of the
# last. Pixels and `align_corners=True` measure from **centre** to centre.*

# %% [markdown]
# | convention | centre of the first pixel | centre of the last pixel | the whole map, edge to edge |
# |:--|:--|:--|:--|
# | pixel, centres at integers | 0 | W - 1 | -0.5 to W - 0.5 |
# | normalised to [0, 1], **this book** | 0.5 / W | 1 - 0.5 / W | 0 to 1 |
# | `grid_sample(align_corners=False)` | -1 + 1 / W | 1 - 1 / W | -1 to 1 |
# | `grid_sample(align_corners=True)` | -1 | 1 | -1 - 1/(W-1) to 1 + 1/(W-1) |
#
# The third row is the second, stretched: $g = 2 n - 1$. The first two are linked by the formula that
# this book uses most:
#
# $$p = n W - 0.5, \qquad n = \frac{p + 0.5}{W}.$$
#
# Why the half? In normalised coordinates 0 is the left *edge* of the first pixel. In pixel coordinates
# 0 is its *centre*, half a pixel further to the right. So after stretching by $W$ we must step back by
# half a pixel.


# %%
def to_pixel(points, size):
    """points: (..., 2) as (x, y) in [0, 1]. size: (H, W). Returns pixel coordinates."""
    height, width = size
    return points * torch.tensor([width, height]) - 0.5


points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.1, 0.5]])
print(to_pixel(points, (3, 5)))

# %% [markdown]
# The library has this function and its inverse. And PyTorch has a whole sampler, `F.grid_sample`. All
# must agree with ours, inside the map, at its border and outside:

# %%
assert torch.allclose(to_pixel(points, (3, 5)), normalised_to_pixel(points, (3, 5)))
assert torch.allclose(pixel_to_normalised(to_pixel(points, (3, 5)), (3, 5)), points)

points = torch.rand(200, 2) * 1.6 - 0.3
ours = sample(feature_map, to_pixel(points, (3, 5)))
library = bilinear_sample(feature_map, points)
grid = (2 * points - 1)[None, None]  # (1, 1, N, 2): a picture of 1 x N samples
torchs = F.grid_sample(feature_map[None], grid, align_corners=False)[0, :, 0].T
torch.testing.assert_close(ours, library)
torch.testing.assert_close(ours, torchs)
print(tuple(torchs.shape), "ours, the library's and PyTorch's agree")

# %% [markdown]
# And on a pixel's centre, does `F.grid_sample` take the slope to the right as well? We ask at the
# middle of the three pixels 2, 5 and 1. (They span $g$ from -1 to 1, which is 1.5 pixels per unit.)

# %%
middle = torch.zeros(1, 1, 1, 2, requires_grad=True)
F.grid_sample(row[None, :, :, :3], middle, align_corners=False).sum().backward()
print("slope per pixel:", middle.grad[0, 0, 0, 0].item() / 1.5)
assert middle.grad[0, 0, 0, 0] / 1.5 == -4

# %% [markdown]
# ## {{n}}.7 Four bugs
#
# None of the following bugs raises an error. Gradients flow as before, so a network can be
# trained with any of them. That is why they can live for a long time before somebody
# notices, and it pays to know what they look like.
#
# **1. The half is forgotten.** Somebody writes $p = nW$. Every point, wherever it is, is read half a
# pixel too far to the right and half a pixel too far down. The maps of a detector are coarse: on one of
# **stride** 32, a cell of the map covers 32 x 32 pixels of the image. There, half a cell is 16 pixels of
# the image.
#
# **2. `align_corners=True`.** Somebody sets the wrong flag. The effect is different: the points are
# drawn towards the middle of the map. Before you run: take five pixels in a row, and read each at
# its centre. Which of them does the first bug read at the right place? Which does the second?

# %%
centres = pixel_to_normalised(torch.stack([torch.arange(5.0), torch.ones(5)], -1), (3, 5))[:, 0]
half_forgotten = centres * 5 - torch.arange(5.0)
g = 2 * centres - 1  # right for align_corners=False; what does the other flag make of it?
wrong_flag = (g + 1) / 2 * (5 - 1) - torch.arange(5.0)
print("half forgotten:    ", [round(shift, 1) for shift in half_forgotten.tolist()])
print("align_corners=True:", [round(shift, 1) + 0.0 for shift in wrong_flag.tolist()])
assert torch.allclose(half_forgotten, torch.full((5,), 0.5))
assert torch.allclose(wrong_flag, torch.tensor([0.4, 0.2, 0.0, -0.2, -0.4]), atol=1e-6)

# %% [markdown]
# With the first bug all five are off by half a pixel, the middle one too. With the second, the
# middle is right, and the error grows towards the borders to nearly half a pixel. All points but the
# middle one are read too near to the middle, so the picture comes out a little enlarged.

# %% [markdown]
# **3. Swapped axes.** Points are (x, y), shapes are (H, W), and indices are [y, x]. Sooner or later
# someone multiplies x by H. On a square map this changes nothing, so no test on square maps finds
# it. The first release of Deformable DETR had such a swap ([its issue
# 6](https://github.com/fundamentalvision/Deformable-DETR/issues/6)).


# %%
def to_pixel_swapped(points, size):
    """The bug: width and height the wrong way round."""
    width, height = size
    return points * torch.tensor([width, height]) - 0.5


points = torch.rand(8, 2)
on_square = (to_pixel_swapped(points, (4, 4)) - to_pixel(points, (4, 4))).abs().max().item()
on_oblong = (to_pixel_swapped(points, (3, 5)) - to_pixel(points, (3, 5))).abs().max().item()
print("largest error on 4 x 4:", on_square, " on 3 x 5:", round(on_oblong, 1))
assert on_square == 0 and on_oblong > 1

# %% [markdown]
# What do these three look like? We take the running example at stride 4: a crop around the seven,
# averaged over cells of 4 x 4 pixels, which makes a map of 18 rows and 13 columns. Then we sample that
# map at the centres of its own cells, so a correct sampler must give back the map.

# %%
crop = picture[:, 52:124, 34:86]
scene = F.avg_pool2d(crop[1:2] - crop[0:1], 4)[0]  # how much more green than red, (18, 13)
rows, columns = scene.shape
cells = torch.stack(torch.meshgrid(torch.arange(13.0), torch.arange(18.0), indexing="xy"), -1)
normalised = pixel_to_normalised(cells, (rows, columns))
grid = (2 * normalised - 1)[None]
looks = {
    "correct": bilinear_sample(scene[None], normalised)[..., 0],
    "1. half forgotten": sample(scene[None], (cells + 0.5).reshape(-1, 2)).reshape(rows, columns),
    "2. align_corners=True": F.grid_sample(scene[None, None], grid, align_corners=True)[0, 0],
    "3. H and W swapped": sample(
        scene[None], to_pixel_swapped(normalised, (rows, columns)).reshape(-1, 2)
    ).reshape(rows, columns),
}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four panels with a coarse seven and its true outline in white. Correct: the seven fills its outline. Half forgotten: it is shifted up and to the left by half a cell. align_corners=True: it is a little larger than its outline. H and W swapped: it is stretched in height and squeezed in width, and a strip at the right is empty."}}
figure, axes = plt.subplots(1, 4, figsize=(8, 2.9))
for axis, (title, look) in zip(axes, looks.items(), strict=True):
    axis.imshow(look, vmin=-0.3, vmax=0.5)
    axis.contour(scene, levels=[0.1], colors="white", linewidths=1.5)
    axis.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *Figure {{n}}.7. What to see: the white line is where the seven really is. With the half
# forgotten, all of it moves up and to the left by half a cell (each cell shows what lies half a
# cell further down and to the right). With `align_corners=True` it is right in the middle and off
# at the borders. With H and W swapped it is out of shape. The grey strips at the edges were read
# outside the map. The numbers below are the largest error of each panel; the colours run from -0.3 to
# 0.5.*

# %% tags=["hide-input"]
errors = {title: (look - scene).abs().max().item() for title, look in looks.items()}
print({title: round(error, 2) for title, error in errors.items()})
assert errors["correct"] < 1e-5 and all(error > 0.05 for error in list(errors.values())[1:])

# %% [markdown]
# **4. Drift over scales.** A point is carried from a fine map to coarser maps by halving its *pixel*
# coordinate again and again, and the half pixels are forgotten. On each map it lands a little
# further from the right place. Before you run: the point is pixel 10 of the finest map. By how many
# pixels of that finest map is it off on the coarsest of five?

# %%
fine = torch.tensor(10.0)  # a pixel centre on the finest of five maps
drift = []
for level in range(5):
    right = (fine + 0.5) / 2**level - 0.5
    careless = fine / 2**level
    drift.append(((careless - right) * 2**level).item())  # in pixels of the finest map
print(drift)
assert drift == [0.0, 0.5, 1.5, 3.5, 7.5]

# %% [markdown]
# When the point is carried back the same careless way, the error cancels. So a test of the round trip
# does not find this bug either.

# %% [markdown]
# ## Exercise {{n}}.4  Repair a loader
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# A colleague stores points in the `align_corners=True` convention, as $g \in [-1, 1]$ with -1 and 1
# at the centres of the first and last pixel. Convert them to this book's [0, 1].


# %% tags=["exercise"]
def from_align_corners(points, size):
    """points: (..., 2) as (x, y), align_corners=True. size: (H, W), each at least 2.

    Returns (..., 2) as (x, y), normalised with (0, 0) and (1, 1) at the map's outer corners.
    """
    # BEGIN SOLUTION
    wide = torch.tensor([size[1], size[0]])
    pixels = (points + 1) / 2 * (wide - 1)
    return (pixels + 0.5) / wide
    # END SOLUTION


check("sampling.4", from_align_corners)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Go through pixel coordinates: from $g$ to pixels, from pixels to $n$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# With `align_corners=True`, $g = -1$ is pixel 0 and $g = 1$ is pixel $W - 1$. Then $n = (p+0.5)/W$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check asks for the middle of the map, which is the same in every convention. You may
# have written $(g + 1)/2$, or swapped (H, W) for (x, y).
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.8 A tool to keep
#
# With `sample` we can do more than read single points. If we read a whole grid of points that lies
# in a box, we have cut the box out of the picture, at any angle and any size. Image editors do
# this, spatial transformers {cite}`jaderberg2015stn` do it inside a network, and many detectors do
# it with upright boxes on feature maps, under the name RoIAlign. It is the last exercise of this
# chapter.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the running example with a white box around the seven, turned by 20 degrees clockwise, and a grid of 8 rows of 5 orange sampling points in it. Right: the part of the picture in the box, upright and enlarged to 93 rows of 54 pixels, in which the seven leans to the left."}}
from schematics.sampling import turned_box

turned_box()

# %% [markdown]
# *Figure {{n}}.8. What to see: the box is turned clockwise by 20 degrees, so in the result the
# seven leans the other way. The orange points show where an output of 8 rows and 5 columns would
# read the picture; the result on the right has 93 rows and 54 columns.*

# %% [markdown]
# ## Exercise {{n}}.5  Cut out anything
#
# *difficulty ●●● · 30 minutes · 9 lines*
#
# Write the function that made the right half of Figure {{n}}.8, with the help of `sample`.
# - `centre` is the middle of the box, in pixel coordinates (x, y); `size` is its width and height, in
#   pixels of the picture.
# - The box is turned by `angle`, in radians, clockwise around its centre. Since y points down, that
#   takes $(u, v)$ to $(u \cos\alpha - v \sin\alpha,\; u \sin\alpha + v \cos\alpha)$.
# - The result has `shape` (rows, columns). Its pixels divide the box evenly, and each is read at its own
#   centre. Outside the picture everything is zero.
#
# The checker asks for five things: the whole picture comes back unchanged; a part comes back
# enlarged; a box larger than the picture has zeros around it; a quarter turn gives the same as
# `torch.rot90`; and an upright box gives the same as torchvision's `roi_align`.


# %% tags=["exercise"]
def cut_out(picture, centre, size, angle, shape):
    """picture: (C, H, W). centre, size: (x, y) and (w, h) in pixels. shape: (rows, columns).

    Returns (C, rows, columns).
    """
    # BEGIN SOLUTION
    rows, columns = shape
    u = ((torch.arange(columns) + 0.5) / columns - 0.5) * size[0]
    v = ((torch.arange(rows) + 0.5) / rows - 0.5) * size[1]
    v, u = torch.meshgrid(v, u, indexing="ij")
    cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    x = centre[0] + u * cos - v * sin
    y = centre[1] + u * sin + v * cos
    points = torch.stack([x, y], -1).reshape(-1, 2)
    return sample(picture, points).T.reshape(-1, rows, columns)
    # END SOLUTION


check("sampling.5", cut_out)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Make the points in the box first, as if it were upright with its centre at (0, 0): $u$ from $-w/2$ to
# $w/2$ and $v$ from $-h/2$ to $h/2$. Then turn them, then add the centre.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The centre of column $j$ is at $u = ((j + 0.5) / \text{columns} - 0.5) \cdot w$. At the end,
# `sample` returns (N, C), and (C, rows, columns) is wanted: transpose, then reshape.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Your points run from the centre of the box's first pixel to the centre of its last, for example with
# `torch.linspace(-(w - 1) / 2, (w - 1) / 2, columns)`. As long as the result has as many pixels as the
# box, that is right. It is the convention of `align_corners=True`, and goes wrong as soon as the size
# changes: the result's pixels must divide the box from *edge* to edge.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## Summary
#
# - A value between pixels is an average of four. Each weight is an area, a product of two distances.
# - Pixels outside the map count as zero, and the value fades out over one pixel.
# - The derivative with respect to the place is a difference of neighbours. So places can be learned,
#   but a point feels only the four pixels around it.
# - This book: (x, y) in [0, 1], pixel centres at $(i + 0.5)/W$, so $p = nW - 0.5$; that is
#   `align_corners=False`.
# - Test on maps with H != W, at borders, outside, and on pixel centres.
#
# > **Differs from the paper.** The paper leaves the convention open: its $\phi_l$, which turns a
# > normalised point into pixels of a map ({{chapter many_scales}}), only "re-scales".
# > **Differs from the official code.** Nothing: it calls `grid_sample` with `align_corners=False`
# > in its PyTorch form, and its kernel subtracts 0.5 likewise. The Deformable
# > Attention Transformer (DAT) uses `align_corners=True`.
#
# ## Further reading
#
# - {cite}`jaderberg2015stn`: learning where to sample, with the same gradient.
# - {cite}`dai2017deformable`: $G(q, p)$ in its section 2.1, and {{chapter deformable_convolution}} here.
# - {cite}`zhu2021deformable`: section 4.1, where the samples become attention.
