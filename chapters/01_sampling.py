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
# - **derive** how that value changes when the point moves, and why offsets can be learned at all,
# - **convert** between three coordinate conventions without losing half a pixel,
# - **recognise** the bugs that mixed conventions cause, from a picture or from a number.
#
# You should know: PyTorch tensors, indexing and autograd.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Everything in this book rests on one operation: reading a feature map at a place that is not a
# pixel. Deformable attention {cite}`zhu2021deformable` asks a network *where* to look, the network
# answers with real numbers, and so somebody must say what stands at (1.3, 0.6).

# %%
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

# %% [markdown]
# ## {{n}}.1 Four pixels, by hand
#
# Take the smallest map that has a between: two rows, two columns. For now pixel centres have whole
# coordinates: x counts columns, y counts rows.

# %%
corners = torch.tensor([[10.0, 20.0], [50.0, 80.0]])  # rows are y, columns are x
print("at x=1, y=0 stands", corners[0, 1].item())

# %% [markdown]
# What stands at x = 0.25, y = 0.5? Go along the top edge first, then along the bottom edge, then
# from one to the other. Before you run: do it in your head.

# %%
x, y = 0.25, 0.5
top = (1 - x) * 10 + x * 20
bottom = (1 - x) * 50 + x * 80
value = (1 - y) * top + y * bottom
print(top, bottom, value)
assert (top, bottom, value) == (12.5, 57.5, 35.0)

# %% [markdown]
# Multiply out and each pixel has one weight, the product of two distances. The weights are positive
# and sum to one: the value is an average, never more than the largest of its four pixels.

# %%
weights = torch.tensor([[(1 - y) * (1 - x), (1 - y) * x], [y * (1 - x), y * x]])
print(weights)
assert weights.sum() == 1
assert (weights * corners).sum() == value

# %% [markdown]
# In the notation of deformable convolution {cite}`dai2017deformable`, for a point $p$ and pixels $q$,
#
# $$x(p) = \sum_q G(q, p)\, x(q), \qquad
# G(q, p) = \max(0, 1 - |q_x - p_x|) \cdot \max(0, 1 - |q_y - p_y|).$$
#
# $G$ is a tent over each pixel: 1 at its centre, 0 one pixel away.

# %% [markdown]
# ## Exercise {{n}}.1  Four corners
#
# *difficulty ●○○ · 5 minutes · 3 lines*
#
# Write the blend for any four corner values. `fx` and `fy` in [0, 1] say how far right and how far
# down the point lies between the corners.


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
# On a larger map the four pixels around a point start at the floor of its coordinates. What if one
# of them does not exist? Then it counts as zero: the map is surrounded by zeros.


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


# %%
small = torch.arange(15.0).reshape(3, 5)  # H=3, W=5: never test on a square
for point in [(1.0, 2.0), (1.5, 0.5), (-0.5, 1.0), (4.75, 1.0), (9.0, 1.0)]:
    print(point, round(sample_by_loop(small, *point), 3))
assert sample_by_loop(small, 1.5, 0.5) == (1 + 2 + 6 + 7) / 4
assert sample_by_loop(small, 4.75, 1.0) == 0.25 * 9

# %% [markdown]
# The last two points lie over the right border. At 4.75 three quarters of the average are zeros; at
# 9 nothing is left. The value fades out over one pixel. It does not jump.

# %% [markdown]
# ## {{n}}.3 Vectorised
#
# The loop over four corners stays, the loop over points goes. Two things need care. The index of a
# pixel that does not exist must still be a legal index, so it is clamped; and its weight must be
# zero, so that what is read there does not matter (as long as it is finite: zero times infinity is not
# zero).


# %%
def sample(feature_map, pixels):
    """feature_map: (C, H, W). pixels: (N, 2) as (x, y). Returns (N, C)."""
    _, height, width = feature_map.shape
    x, y = pixels.unbind(-1)
    left, top = x.floor(), y.floor()
    result = 0
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        exists = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        rows, columns = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
        result = result + feature_map[:, rows, columns].T * (weight * exists).unsqueeze(-1)
    return result


# %%
feature_map = torch.randn(4, 3, 5)
pixels = torch.rand(50, 2) * torch.tensor([8.0, 6.0]) - 1.5  # some of them outside
sampled = sample(feature_map, pixels)
by_loop = torch.tensor([[sample_by_loop(c, *p) for c in feature_map] for p in pixels.tolist()])
print(tuple(sampled.shape))
torch.testing.assert_close(sampled, by_loop, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## {{n}}.4 How the value changes when the point moves
#
# Inside one cell, between four pixels $a, b$ (top) and $c, d$ (bottom), with $u, v$ the distances
# from the top left:
#
# $$x(u, v) = (1-v)\big[(1-u)a + u b\big] + v\big[(1-u)c + u d\big]$$
#
# $$\frac{\partial x}{\partial u} = (1-v)(b-a) + v(d-c), \qquad
# \frac{\partial x}{\partial v} = (1-u)(c-a) + u(d-b).$$
#
# The derivative by $u$ is the difference between right and left. If a point moves towards what is
# brighter, its value rises: that is all that learning an offset needs.

# %%
point = torch.tensor([[0.25, 0.5]], requires_grad=True)
sample(corners[None], point).sum().backward()
by_hand = [(1 - 0.5) * (20 - 10) + 0.5 * (80 - 50), (1 - 0.25) * (50 - 10) + 0.25 * (80 - 20)]
print(point.grad.tolist(), by_hand)
assert point.grad.tolist() == [by_hand] == [[20.0, 45.0]]

# %% [markdown]
# And the derivative by a pixel's value is that pixel's weight. So the gradient of a sample lands on
# four pixels, in the shares in which they were read. `gradcheck` compares both derivatives with
# finite differences.

# %%
doubles = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
places = torch.rand(6, 2, dtype=torch.float64) * 2 + 0.1
assert torch.autograd.gradcheck(sample, (doubles, places.requires_grad_()))
print("both gradients agree with finite differences")

# %% mystnb={"image": {"alt": "Left: the sampled value along one row of five pixels, a line with corners at the pixel centres that falls to zero one pixel outside. Right: its slope, a staircase that jumps at every pixel centre and is zero more than one pixel outside."}}
row = torch.tensor([[[2.0, 5.0, 1.0, 1.0, 4.0]]])
xs = torch.linspace(-2.495, 6.495, 900, requires_grad=True)  # never quite on a pixel
values = sample(row, torch.stack([xs, torch.zeros_like(xs)], -1))[:, 0]
(slopes,) = torch.autograd.grad(values.sum(), xs)
figure, (left_axis, right_axis) = plt.subplots(1, 2)
left_axis.plot(xs.detach(), values.detach())
left_axis.plot(range(5), row[0, 0], "o", label="pixels")
left_axis.set(xlabel="x in pixels", ylabel="sampled value")
left_axis.legend()
right_axis.plot(xs.detach(), slopes, color="C1")
right_axis.set(xlabel="x in pixels", ylabel="slope")
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: the value is continuous, with corners at the pixel centres; the slope is
# constant between two pixels, jumps at their centres, and is exactly zero further than one pixel
# outside.*

# %%
outside = (xs.detach() < -1.01) | (xs.detach() > 5.01)
assert (slopes[outside] == 0).all() and (values.detach()[outside] == 0).all()
between = (xs.detach() > 0.01) & (xs.detach() < 0.99)
assert torch.allclose(slopes[between], torch.tensor(3.0), atol=1e-4)  # from 2 to 5
print("slope between pixels 0 and 1: 3; outside: 0")

# %% [markdown]
# ## Exercise {{n}}.2  The slope, without autograd
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# Return both derivatives of the blend of exercise {{n}}.1, from the formulas above. A CUDA kernel needs
# exactly this in its backward pass.


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
# If the coordinate has a gradient, a point can be optimised like any weight. Here is a bright spot
# on a dark map of 20 rows and 30 columns. We start next to it and follow the gradient of the
# sampled value uphill.

# %%
height, width = 20, 30
grid_y, grid_x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
spot = torch.exp(-((grid_x - 21) ** 2 + (grid_y - 7) ** 2) / (2 * 3.0**2))
spot = torch.where(spot > 0.01, spot, 0.0)  # beyond 9 pixels it is quite dark


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
# spot at (21, 7). Which of them arrive?

# %%
starts = [(24.0, 11.0), (14.0, 4.0), (5.0, 15.0)]
paths = [walk(start) for start in starts]
distances = [(path[-1] - torch.tensor([21.0, 7.0])).norm().item() for path in paths]
print([round(d, 0) for d in distances])
assert distances[0] < 0.5 and distances[1] < 0.5
assert torch.equal(paths[2][0], paths[2][-1])

# %% mystnb={"image": {"alt": "A dark map with a bright round spot. Two paths lead from starting points near the spot to its centre; the third start, far from it, has no path."}}
figure, axis = plt.subplots()
axis.imshow(spot)
for number, path in enumerate(paths):
    axis.plot(*path.T, color=f"C{number + 1}")
    axis.plot(*path[0], "o", color=f"C{number + 1}")
    axis.plot(*path[-1], "*", color=f"C{number + 1}", markersize=12)
axis.set(xlabel="x in pixels", ylabel="y in pixels")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: circles are starts, stars are ends (the third star covers its circle). Two points feel the spot's slope and
# climb to its centre. The third stands where the map is flat: its gradient is exactly zero, and it
# never moves.*
#
# This is the *capture range* of a sample. A gradient sees one pixel around the point and nothing
# else. It explains three choices that we shall meet: deformable attention takes **several** points,
# starts them **spread out** as a star ({{chapter many_scales}}), and looks on **coarse maps** too, where one
# pixel covers a lot of image. The idea of learning where to sample is older than all of them
# {cite}`jaderberg2015stn`.

# %% [markdown]
# ## Exercise {{n}}.3  How far does it see?
#
# *difficulty ●●○ · 10 minutes · 4 lines*
#
# Shrink the spot's map by averaging cells of `factor x factor` pixels, and return whether a point
# at `pixel` (in pixels of the **full** map) has a gradient on the shrunk map. Pixel centres stay
# where they are in the scene: full-map pixel $p$ lies at $(p + 0.5)/\text{factor} - 0.5$.


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
# Convert the place first, then call `.requires_grad_()`, then `torch.autograd.grad` of the sampled
# value by the place.
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
# Pixel coordinates change with the size of the map, so networks speak in normalised ones. There are
# three ways to normalise, and all are in use.
#
# | convention | centre of the first pixel | centre of the last pixel | range of the whole map |
# |:--|:--|:--|:--|
# | pixel, centres at integers | 0 | W - 1 | -0.5 to W - 0.5 |
# | normalised to [0, 1], **this book** | 0.5 / W | 1 - 0.5 / W | 0 to 1 |
# | `grid_sample(align_corners=False)` | -1 + 1 / W | 1 - 1 / W | -1 to 1 |
# | `grid_sample(align_corners=True)` | -1 | 1 | -1 - 1/(W-1) to 1 + 1/(W-1) |
#
# The third is the second, stretched: $g = 2 n - 1$. The fourth is another thing altogether: there,
# -1 and 1 are pixel **centres**. The first two are linked by
#
# $$p = n W - 0.5, \qquad n = \frac{p + 0.5}{W}.$$


# %%
def to_pixel(points, size):
    """points: (..., 2) as (x, y) in [0, 1]. size: (H, W). Returns pixel coordinates."""
    height, width = size
    return points * torch.tensor([width, height]) - 0.5


points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.1, 0.5]])
print(to_pixel(points, (3, 5)))
assert torch.allclose(to_pixel(points, (3, 5)), normalised_to_pixel(points, (3, 5)))
assert torch.allclose(pixel_to_normalised(to_pixel(points, (3, 5)), (3, 5)), points)

# %% [markdown]
# Now both the library's function and PyTorch's own must agree with ours, inside, at the border and
# outside.

# %%
points = torch.rand(200, 2) * 1.6 - 0.3
ours = sample(feature_map, to_pixel(points, (3, 5)))
library = bilinear_sample(feature_map, points)
grid = (2 * points - 1)[None, None]  # (1, 1, N, 2): a picture of 1 x N samples
torchs = F.grid_sample(feature_map[None], grid, align_corners=False)[0, :, 0].T
torch.testing.assert_close(ours, library)
torch.testing.assert_close(ours, torchs)
print(tuple(torchs.shape), "all three agree")

# %% [markdown]
# ## {{n}}.7 The bugs
#
# **Half a pixel.** Somebody forgets the -0.5 or sets `align_corners=True`. Nothing crashes, and nearly
# every sample is a little off. How far off, on a map of width 5?

# %%
centres = pixel_to_normalised(torch.stack([torch.arange(5.0), torch.ones(5)], -1), (3, 5))
wrong = (2 * centres[:, 0] - 1 + 1) / 2 * (5 - 1)  # where align_corners=True would look
shift = wrong - torch.arange(5.0)
print(shift)
assert torch.allclose(shift, torch.tensor([0.4, 0.2, 0.0, -0.2, -0.4]), atol=1e-6)

# %% [markdown]
# The middle is right, and the error grows to nearly half a pixel at the borders: the sampling points are
# drawn towards the centre, so the picture comes out a little enlarged. On a map of stride 32, half a pixel is 16 pixels of the image.

# %% [markdown]
# **Swapped axes.** Points are (x, y), shapes are (H, W), and indices are [y, x]. On a square map a
# swap of the sizes changes nothing, so no test on square maps finds it. The first release of
# Deformable DETR had such a swap.


# %%
def to_pixel_swapped(points, size):
    """The bug: width and height the wrong way round."""
    width, height = size
    return points * torch.tensor([width, height]) - 0.5


points = torch.rand(8, 2)
on_square = (to_pixel_swapped(points, (4, 4)) - to_pixel(points, (4, 4))).abs().max().item()
on_oblong = (to_pixel_swapped(points, (3, 5)) - to_pixel(points, (3, 5))).abs().max().item()
print(on_square, round(on_oblong, 1))
assert on_square == 0 and on_oblong > 1

# %% [markdown]
# **Drift over scales.** A point is carried from a fine map to coarser ones by scaling its pixel
# coordinate, without the halves. It lands further off on each. (Carried back, the error cancels, so a
# round trip does not find it.)

# %%
fine = torch.tensor(10.0)  # a pixel centre on the finest of five maps
drift = []
for level in range(5):
    right = (fine + 0.5) / 2**level - 0.5
    careless = fine / 2**level
    drift.append(((careless - right) * 2**level).item())  # in pixels of the finest map
print(drift)
assert drift == [0.0, 0.5, 1.5, 3.5, 7.5]

# %% mystnb={"image": {"alt": "Three panels. Left: a tilted stripe sampled correctly. Middle: sampled with align_corners=True, the stripe is a little enlarged. Right: sampled with height and width swapped, the picture is cut off on one side and black below."}}
scene = torch.exp(-((grid_x - 1.3 * grid_y - 2) ** 2) / 8)  # H=20, W=30
dense = torch.stack(torch.meshgrid(torch.arange(30.0), torch.arange(20.0), indexing="xy"), -1)
normalised = pixel_to_normalised(dense, (20, 30))
right = bilinear_sample(scene[None], normalised)[..., 0]
enlarged = F.grid_sample(scene[None, None], 2 * normalised[None] - 1, align_corners=True)[0, 0]
swapped = sample(scene[None], to_pixel_swapped(normalised, (20, 30)).reshape(-1, 2))
figure, axes = plt.subplots(1, 3)
titles = ("right", "align_corners=True", "H and W swapped")
for axis, picture, title in zip(
    axes, (right, enlarged, swapped.reshape(20, 30)), titles, strict=True
):
    axis.imshow(picture, vmin=0, vmax=1)
    axis.contour(scene, levels=[0.5], colors="white", linewidths=1)
    axis.set(title=title)
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What to see: each panel samples the scene at its own pixel centres, so it should give
# back the scene, whose outline is drawn in white. Left, it does. In the middle it is off by up to
# half a pixel at the borders, which the eye hardly sees. On the right it is stretched, and runs out
# of the map.*

# %%
errors = [(p - scene).abs().max().item() for p in (right, enlarged, swapped.reshape(20, 30))]
print([round(error, 2) for error in errors])
assert errors[0] < 1e-5 and 0.01 < errors[1] < 0.3 and errors[2] > 0.9

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
# ## Summary
#
# - A value between pixels is an average of four, with weights that are products of distances.
# - Pixels outside count as zero; the value fades out over one pixel.
# - The value's gradient by the point is a difference of neighbours, so places can be learned, but
#   only within one pixel's sight.
# - This book: (x, y) in [0, 1], pixel centres at $(i + 0.5)/W$, so $p = nW - 0.5$; that is
#   `align_corners=False`.
# - Test on maps with H != W, at borders and outside.
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
