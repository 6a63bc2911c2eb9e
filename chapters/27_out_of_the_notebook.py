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
# # {{n}}. Out of the notebook
#
# You will be able to
# - **say** what must travel with a detector's weights, and what it costs when a part of it is lost,
# - **export** a detector as a graph, and find a size that the export froze,
# - **check** an exported file at sizes at which it was not traced, and run it without PyTorch,
# - **measure** what smaller numbers gain and what they cost,
# - **put** the operator into somebody else's model, and a detector behind an address.
#
# You should know: {{chapter deformable_attention}}, {{chapter matching_and_loss}} and {{chapter your_own_data}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A detector that is to be of use must leave the notebook in which it was trained: for a colleague's script, a server, a
# phone. Three things go wrong on the way, and none of them raises an error. The picture is prepared in another way than in training.
# The exported graph is right only for the size at which it was made. Or the numbers were made smaller, and nobody measured what
# that cost. This chapter takes the shipped detector of digits out of the notebook in four ways, and checks each: as a file with all
# that belongs to it, as a graph for another program, as an operator in somebody else's model, and as a service behind an address.

# %% tags=["hide-input"]
import http.client
import io
import json
import tempfile
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.transforms import MEAN, STD
from deformable_detr.evaluation.coco import score
from deformable_detr.exercises import check
from deformable_detr.export.onnx import to_onnx
from deformable_detr.inference.detector import load_detector
from deformable_detr.inference.predict import predict
from deformable_detr.inference.prediction import Prediction
from deformable_detr.structures import Detections

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)
torch.set_num_threads(1)

# %% tags=["hide-input"]
temporary = tempfile.TemporaryDirectory()
WORK = Path(temporary.name)

# %% [markdown]
# ## {{n}}.1 What must travel
#
# On its way from a picture to the sentence "a seven, here" the data passes six stations, and the network is only one of them.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six boxes in a row: picture; turn, resize, scale to 0..1; normalise, mask padding; network; scores, top k, pixel boxes; threshold, names. Bars below: the weights cover the network alone, an ONNX file everything from normalising to pixel boxes, our file or a detector in Python all but the picture."}}
from schematics.out_of_the_notebook import frozen, travels

travels()

# %% [markdown]
# *Figure {{n}}.1. The stations from a picture to names, and what travels by itself in each form. What a bar does not cover
# must be programmed again by whoever receives the file. (An ONNX file's metadata can at least say how: names, threshold and
# preparation are in it as text.)*
#
# Weights alone (`model.state_dict()`) say nothing of the other stations. So this library's files carry a **card** with them: how
# pictures were prepared, at which size, from which score a detection is shown, and what the classes are called. `load_detector`
# reads the card, and so the detector can say it.

# %%
detector = load_detector("../data/checkpoints/digits.safetensors")
print(detector)

# %% [markdown]
# What if the card is lost? Then somebody guesses. The next cell measures four usual guesses on the 24 sample pictures, which are 128
# pixels wide and high: the channels in the order of OpenCV (blue first), pixels from 0 to 1 that were not normalised, pictures that were
# squeezed into another shape, and pictures that were enlarged to twice the size. (Boxes are always given in pixels of the original
# picture, so enlarging by itself costs nothing in the comparison.) The weights are the same, and no guess raises an error.
#
# Before you run: which guess costs this detector nothing, and which one costs it nearly everything?

# %%
samples = CocoDataset("../data/samples", "../data/samples/annotations.json")
prepare = detector.eval_transform()
mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
guesses = {
    "as in training": prepare,
    "blue first": lambda image: prepare(Image.fromarray(np.asarray(image)[..., ::-1].copy())),
    "not normalised": lambda image: prepare(image) * std + mean,
    "squeezed to 128 x 96": lambda image: prepare(image.resize((128, 96))),
    "enlarged to 256 x 256": lambda image: prepare(image.resize((256, 256))),
}


def ap_of(detect):
    """AP on the samples of a function from a picture to a prediction."""
    results = []
    for image_id in samples.image_ids:
        results += detect(samples.load_image(image_id)).to_coco(image_id)
    return score(results, samples).ap


best_20 = {"threshold": 0.0, "top_k": 20}
found = {
    name: ap_of(lambda image, way=way: predict(detector, image, transform=way, **best_20)[0])
    for name, way in guesses.items()
}
for name, ap in found.items():
    print(f"{name:22} AP {ap:.2f}")

# %% tags=["hide-input"]
right = found["as in training"]
assert right > 0.8 and abs(found["blue first"] - right) < 0.03
assert found["enlarged to 256 x 256"] < 0.1
assert 0.1 < right - found["not normalised"] < right - found["squeezed to 128 x 96"] < 0.6
print(f"from {right:.2f} to {found['enlarged to 256 x 256']:.2f} by the size alone")

# %% [markdown]
# Blue first costs nothing, because this detector was trained with colours changed at random. That is luck: a detector
# that has learned that grass is green would suffer. Without normalising it still finds most digits, so nobody will
# look for the fault. In pictures of twice the size it finds almost nothing, although to our eyes they are the same pictures: it was
# trained at 128 x 128 pixels only, where every map has one size. So nobody can tell beforehand which guess is harmless, and the
# preparation belongs in the file. For every format that this library writes, a test checks that the preparation is still there when the
# file is read again (`tests/test_preparation_travels.py`).
#
# ## {{n}}.2 A graph
#
# The network itself is Python code, and where there is no Python it must become data: a **graph**, which is a list of
# operations on tensors. `torch.export` makes one. It runs the code once with tensors that have shapes but no numbers, and notes
# each operation {cite}`ansel2024pytorch2`. In `dynamic_shapes` we say which axes may have another length later; let us call those
# axes **free**.
#
# The module of the next cell is the heart of deformable attention ({{chapter deformable_attention}}) for one level, one head and one point.
# A reference $p$ in [0, 1] is moved by an offset $(\Delta x, \Delta y)$ in pixels, and `grid_sample` wants the place in units from -1 to 1:
# $2 \, (p + (\Delta x / W, \Delta y / H)) - 1$. So the sizes W and H are part of the computation. Free are the
# number of images, the height and the width of the features (axes 0, 2 and 3), and the numbers of images and of queries (axes 0 and 1)
# of references and offsets.


# %%
class Sample(nn.Module):
    """One sample per query: (B, C, H, W), (B, Q, 2) in [0, 1], (B, Q, 2) in pixels to (B, C, Q)."""

    def forward(self, features, references, offsets):
        H, W = features.shape[-2:]
        moved = torch.stack([offsets[..., 0] / W, offsets[..., 1] / H], -1)
        grid = 2 * (references + moved)[:, :, None] - 1
        return F.grid_sample(features, grid, align_corners=False)[..., 0]


def inputs(B, Q, H, W):
    generator = torch.Generator().manual_seed(H)
    features = torch.rand(B, 4, H, W, generator=generator)
    references = torch.rand(B, Q, 2, generator=generator)
    return features, references, 2 * torch.randn(B, Q, 2, generator=generator)


free = torch.export.Dim.DYNAMIC
shapes = {0: free, 2: free, 3: free}, {0: free, 1: free}, {0: free, 1: free}
program = torch.export.export(Sample(), inputs(2, 5, 8, 12), dynamic_shapes=shapes)
operations = [n.target.__name__ for n in program.graph.nodes if n.op == "call_function"]
print(*operations, sep="\n")

# %% [markdown]
# All that is not computing is gone: the class, the docstring, the names of variables. An `if` is decided while
# the graph is made, and only the branch that was taken is in it. A loop becomes as many copies as it had rounds. That is no
# loss for a detector, whose layers are the same for every picture. But one thing may differ from picture to picture: the
# size. The first two lines of the graph show what became of it. Each `sym_size.int` stands for one of H and W, as a *name*
# (a symbol) for a number that is read when the graph runs.
#
# ## {{n}}.3 A size that freezes
#
# Now the same module as many people write it. It makes a tensor of W and H, and divides both coordinates by it at once.


# %%
class Naive(nn.Module):
    def forward(self, features, references, offsets):
        H, W = features.shape[-2:]
        locations = references + offsets / torch.tensor([W, H])
        grid = 2 * locations[:, :, None] - 1
        return F.grid_sample(features, grid, align_corners=False)[..., 0]


same = torch.equal(Naive()(*inputs(3, 7, 6, 9)), Sample()(*inputs(3, 7, 6, 9)))
print("in Python, the two are the same:", same)

# %% [markdown]
# The oldest way to export is tracing (`torch.jit.trace`, on which ONNX's older exporter stands). It runs the code once with real
# numbers, and notes what happens to tensors; whatever else Python computed meanwhile goes in as a constant. The next cell traces
# both modules with maps of 8 x 12 and runs the traces at this size, and then with maps of 6 x 9 and other numbers of images and
# queries.
#
# Before you run: the values lie between 0 and 1. How wrong can a frozen size be, and will anything complain?

# %%
wrong = {}
for module in (Naive(), Sample()):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, inputs(2, 5, 8, 12))
    for size in ((2, 5, 8, 12), (3, 7, 6, 9)):
        given, expected = traced(*inputs(*size)), module(*inputs(*size))
        wrong[type(module).__name__, size[2]] = (given - expected).abs().max().item()
        print(
            f"{type(module).__name__:7} {size[2]} x {size[3]}: wrong by {given.sub(expected).abs().max():.2f}"
        )

# %% tags=["hide-input"] mystnb={"image": {"alt": "The line offsets / torch.tensor([W, H]), run once with W = 12, goes two ways. torch.jit.trace notes the number, offset / 12, which at width 9 is wrong, without an error. torch.export notes where it came from, offset / width, which at width 9 is right."}}
assert wrong["Naive", 6] > 0.3 and not any(w for k, w in wrong.items() if k != ("Naive", 6))
frozen()

# %% [markdown]
# *Figure {{n}}.2. The line of `Naive`, run once while it is exported. Whether a number was noted or where it came from shows only
# at another size.*
#
# At the size of the trace all is well, and that is the size at which people test. At the other size `Naive`'s trace is wrong by more
# than half of the values' range. Nothing complains, because every shape still fits: only the offsets are divided by the wrong
# width and height. (While it traces, PyTorch warns that "torch.tensor results are registered as constants", and adds that one can
# often ignore this; the cell hides the warning.) `Sample` divides by H and W themselves, and these a trace follows.
#
# `torch.export` gets `Naive` right, too:

# %%
program = torch.export.export(Naive(), inputs(2, 5, 8, 12), dynamic_shapes=shapes)
given, expected = program.module()(*inputs(3, 7, 6, 9)), Naive()(*inputs(3, 7, 6, 9))
print(f"Naive by torch.export, 6 x 9: wrong by {given.sub(expected).abs().max():.2f}")

# %% tags=["hide-input"]
assert torch.allclose(given, expected, atol=1e-6)

# %% [markdown]
# And where the code turns a free axis into a fixed number, here with `int`, it refuses:


# %%
class Asks(nn.Module):
    def forward(self, features, references, offsets):
        H, W = (int(n) for n in features.shape[-2:])  # numbers instead of names
        grid = 2 * (references + offsets / torch.tensor([W, H]))[:, :, None] - 1
        return F.grid_sample(features, grid, align_corners=False)[..., 0]


try:
    torch.export.export(Asks(), inputs(2, 5, 8, 12), dynamic_shapes=shapes)
    print("exported")
except torch._dynamo.exc.UserError as error:
    lines = [line for line in str(error).splitlines() if "specialized" in line]
    print(lines[0].split(" If you")[0].strip(" -"))

# %% [markdown]
# So there are two rules. Say which axes are free, so that the exporter can refuse. And compare at a size other than that of the
# export, because not everything is refused.
#
# Where do sizes hide in a detector? In the normaliser of the offsets, as here; in the reference points of the encoder, one per
# cell; in sine positions; in the start index of each level; and in the padding mask. Each of these must be computed from
# the shapes of the maps.
#
# ## Exercise {{n}}.1  Mend a frozen size
#
# *difficulty ●●○ · 15 minutes · 5 lines*
#
# Write the reference points of an encoder's level so that they survive every exporter: the centres of all cells of a map,
# `(x, y)` in [0, 1], row by row. The check traces your function at one size and runs it at another, and then does the same with
# `torch.export`. So compute with H and W as they come: no `int`, no `torch.tensor` of them and no `linspace`.


# %% tags=["exercise"]
def cell_centres(features):
    """features: (B, C, H, W). Returns (H * W, 2), the first (0.5 / W, 0.5 / H)."""
    # BEGIN SOLUTION
    H, W = features.shape[-2:]
    ys = (torch.arange(H) + 0.5) / H
    xs = (torch.arange(W) + 0.5) / W
    grid = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([grid[1], grid[0]], -1).flatten(0, 1)
    # END SOLUTION


check("out_of_the_notebook.1", cell_centres)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `torch.arange(H)` follows a size. A centre lies half a cell behind the cell's edge.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.meshgrid(ys, xs, indexing="ij")` gives two maps of (H, W). Stack x before y, and flatten the first two axes.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Your numbers are right, but one of them was noted as a number. Look for `int(...)`, `range(...)`, `torch.tensor(...)`,
# `torch.linspace(...)` and for a Python list made of sizes.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 The whole detector as one file
#
# ONNX is a file format for graphs, and many programs run it: onnxruntime, for example, on servers, on phones and in a browser.
# The command is
#
# ```
# deformable-detr export data/checkpoints/digits.safetensors --output digits.onnx --size 128 128 --top-k 20
# ```
#
# and the function behind it is `to_onnx`. It goes the safe way: first `torch.export`, with number, height and width of the images
# free, and then each operation is translated into ONNX's. Before the file is put in place, onnxruntime runs it at three sizes, of
# which only the first is the one of the export, and all numbers are compared with PyTorch's. If they were more than 0.001 apart,
# no file would be written. (All this takes about half a minute on one core.)

# %%
# NBVAL_IGNORE_OUTPUT
path = WORK / "digits.onnx"
checks = to_onnx(detector, path, size=(128, 128), top_k=20)
print(*checks, sep="\n")

# %% [markdown]
# The other two sizes are neither square nor divisible by 32, and their batches hold images of several sizes, so that there is
# padding. All three differ only by rounding. What is inside?

# %%
graph = onnx.load(path)
kinds = Counter(node.op_type for node in graph.graph.node)
config = detector.model.config
layers = config.encoder_layers + config.decoder_layers
print("version of ONNX's operations:", graph.opset_import[0].version)
print("GridSample:", kinds["GridSample"], "=", config.num_levels, "levels x", layers, "layers")
print("from other vendors:", sum(node.domain not in ("", "ai.onnx") for node in graph.graph.node))

# %% tags=["hide-input"]
assert kinds["GridSample"] == config.num_levels * layers and kinds["TopK"] >= 2
oldest = onnx.defs.get_schema("GridSample").since_version
assert oldest >= 16 and graph.opset_import[0].version >= 16
print("TopK:", kinds["TopK"], "(the first stage's choice of proposals, and the best 20)")

# %% [markdown]
# There is no deformable attention in ONNX's list of operations. A file could name an operation of its own, but then everyone
# who runs it would need a plug-in. So the operator is written out in plain operations: one `GridSample` per level, a product with the
# weights and a sum, just as in {{chapter many_scales}}. `GridSample` has been in ONNX since version 16 of its operations (2022);
# older programs cannot run the file. (Within `with use_backend("gather"):` the export writes plain gathers instead, for programs whose
# `GridSample` is missing or at fault.)
#
# Two things are lost. The file can only detect: it cannot be trained, and it has no hooks through which one could look at attention
# weights ({{chapter looking}}). And a sample takes more steps than in our kernel, because plain operations write to memory what
# the kernel keeps in registers ({{chapter making_it_fast}}). For a detector as small as this one the section on smaller numbers
# measures what that costs.
#
# The card travels too, as JSON in the file's metadata:

# %%
card = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
names = [category["name"] for category in card["categories"]]
print(card["transforms"], card["threshold"], names[:3], "...")

# %% [markdown]
# ## {{n}}.5 Without PyTorch
#
# Whoever receives the file needs onnxruntime, NumPy and something that reads pictures. The next cell is a whole client. It gives RGB from 0 to
# 1 and the picture's size; the file normalises the pixels and masks the padding by itself. (This card says `digits`, which means that
# pictures go in as large as they are. Where a card names a size, the client must resize first, as in training.)


# %%
one_core = onnxruntime.SessionOptions()
one_core.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, one_core, providers=["CPUExecutionProvider"])


def run(session, picture):
    """All outputs for one RGB picture, by name."""
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    sizes = np.array([[picture.height, picture.width]])
    outputs = session.run(None, {"images": pixels, "sizes": sizes})
    return {entry.name: x for entry, x in zip(session.get_outputs(), outputs, strict=True)}


picture = Image.open("../data/samples/000010.png").convert("RGB")
given = run(session, picture)
for kept, label, box in zip(
    given["scores"][0], given["labels"][0], given["pixel_boxes"][0], strict=True
):
    if kept >= card["threshold"]:
        print(names[label], f"{kept:.2f}", box.round().astype(int).tolist())

# %% tags=["hide-input"]
(expected,) = predict(detector, picture)
shown = given["scores"][0] >= card["threshold"]
assert [names[label] for label in given["labels"][0][shown]] == expected.names
assert np.allclose(given["pixel_boxes"][0][shown], expected.boxes, atol=0.1)
print("PyTorch finds the same:", ", ".join(expected.names))

# %% [markdown]
# The running example's seven is found, in the same place as by PyTorch. But a single picture proves little. On the 24
# samples the AP of the file must be that of the detector, which was measured in the first section with its 20 best detections as well.
# (`ap_of` is the function of that section, and `Prediction` is what the library's `predict` returns.)


# %%
def predict_with(session):
    """A function from a picture to a prediction."""

    def detect(image):
        outputs = run(session, image)
        columns = (outputs[name][0] for name in ("scores", "labels", "pixel_boxes"))
        kept, labels, boxes = map(torch.from_numpy, columns)
        found = Detections(kept, labels, boxes, torch.zeros_like(labels))
        return Prediction.of(found, 1.0, card["categories"], image)

    return detect


whole = ap_of(predict_with(session))
print(f"the file: AP {whole:.3f}")

# %% tags=["hide-input"]
assert abs(whole - right) < 0.002
print(f"PyTorch:  AP {right:.3f}")

# %% [markdown]
# ## Exercise {{n}}.2  The last station, in NumPy
#
# *difficulty ●●○ · 20 minutes · 7 lines*
#
# Not every file has `scores` and `pixel_boxes` in it: exported without `--top-k`, it ends with logits and relative boxes. Write what is
# missing in NumPy alone, for one image and a detector that was trained with the focal loss, where each class has a sigmoid of its own
# ({{chapter matching_and_loss}}). Choose the `top_k` pairs of a query and a class with the highest scores, best first. Return their
# scores, their classes, and their queries' boxes as corners in pixels. If there are fewer pairs than `top_k`, return all.


# %% tags=["exercise"]
def best_boxes(logits, boxes, size, top_k):
    """logits: (Q, classes). boxes: (Q, 4) cxcywh in [0, 1]. size: (H, W) in pixels.

    Returns scores (N,), classes (N,) and boxes (N, 4) x0, y0, x1, y1.
    """
    # BEGIN SOLUTION
    scores = 1 / (1 + np.exp(-logits))
    order = np.argsort(-scores, axis=None)[:top_k]
    queries, classes = np.unravel_index(order, scores.shape)
    x, y, w, h = boxes[queries].T
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    height, width = size
    return scores.ravel()[order], classes, corners * [width, height, width, height]
    # END SOLUTION


check("out_of_the_notebook.2", best_boxes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `np.argsort(-scores, axis=None)` sorts the flattened array. `np.unravel_index` turns its indices back into queries and classes.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A query may be among the best with two classes; then its box appears twice. `array[:top_k]` is the whole array where it is short.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The scores are right, so the order is. A flat index is `query * classes + class`: the class is its remainder.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 Smaller numbers
#
# Weights in float32 take four bytes each. Two smaller forms are usual. **bfloat16** keeps float32's range and seven bits of its
# fraction; it needs two bytes. **int8** has 256 steps and needs one byte: a tensor is stored as whole numbers from -128 to 127 and one
# scale {cite}`jacob2018quantization`. Activations get such a scale, too; in *dynamic* quantisation it is computed while the model
# runs. By hand, for four weights:

# %%
weights = torch.tensor([0.31, -0.52, 0.04, 0.89])
scale = weights.abs().max() / 127
whole_numbers = (weights / scale).round().to(torch.int8)
print(whole_numbers.tolist(), "x", f"{scale:.4f}")
print(
    "wrong by at most",
    f"{(whole_numbers * scale - weights).abs().max():.4f}",
    "= half a step or less",
)

# %% [markdown]
# What do smaller numbers gain for this detector, and what do they cost? For bfloat16 there is `--precision bf16` of
# `evaluate`, `predict` and `explain`, and `in_precision` in Python ({{chapter training_at_every_size}}). For int8 we apply onnxruntime's own
# tool to our file. It replaces the products of matrices, and leaves convolutions and sampling as they are. First the file in int8, and
# two functions, one for the time and one for the size:

# %%
# NBVAL_IGNORE_OUTPUT
import logging
import time

from onnxruntime.quantization import QuantType, quantize_dynamic

logging.getLogger().setLevel(logging.ERROR)  # its advice on how to prepare a file
small = WORK / "int8.onnx"
quantize_dynamic(path, small, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
small_session = onnxruntime.InferenceSession(small, one_core, providers=["CPUExecutionProvider"])


def milliseconds(run_once, times=10):
    """The median of some runs, of a core's time."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        run_once()
        spent.append(1000 * (time.process_time() - start))
    return float(np.median(spent))


def weigh(model):
    """MiB of a model's tensors."""
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 2**20


# %% [markdown]
# Before you run: will the file in int8 be a quarter as large as the one in float32? And which of the four forms will be the fastest here?

# %%
# NBVAL_IGNORE_OUTPUT
narrow = detector.in_precision("bf16")
ways = {
    "PyTorch float32": (
        weigh(detector.model),
        lambda image: predict(detector, image, **best_20)[0],
    ),
    "PyTorch bf16": (weigh(narrow.model), lambda image: predict(narrow, image, **best_20)[0]),
    "ONNX float32": (path.stat().st_size / 2**20, predict_with(session)),
    "ONNX int8": (small.stat().st_size / 2**20, predict_with(small_session)),
}
table = {
    name: (mib, ap_of(detect), milliseconds(lambda detect=detect: detect(picture)))
    for name, (mib, detect) in ways.items()
}
print(f"{'':16} {'MiB':>5} {'AP':>6} {'ms':>5}")
for name, (mib, ap, ms) in table.items():
    print(f"{name:16} {mib:5.1f} {ap:6.3f} {ms:5.0f}")

# %% tags=["hide-input"]
mib, aps, _ = (
    dict(zip(table, column, strict=True)) for column in zip(*table.values(), strict=True)
)
assert (
    mib["PyTorch bf16"] < 0.75 * mib["PyTorch float32"] and mib["ONNX int8"] < mib["ONNX float32"]
)
assert max(aps.values()) - min(aps.values()) < 0.03
print("largest difference of AP below 0.03:", max(aps.values()) - min(aps.values()) < 0.03)

# %% [markdown]
# The AP hardly moves, though 24 pictures are too few to tell small differences. The sizes shrink by less than the
# numbers' widths promise, because not all is weights (an ONNX file also holds the graph, written out layer by layer) and
# because not every layer is narrowed. Do not expect much time to be saved here, either. A processor without instructions for such
# numbers must widen them again, and in a small model the products of matrices are not what takes the time. On another processor this
# may differ, so measure on the machine that will run it.
#
# Two warnings. Scores move a little, so choose the threshold again. And coordinates bear less rounding than features do. An offset
# of a few pixels may be rounded, and both smaller forms round it. But a *location* between 0.5 and 1 has steps of 1/256 in bfloat16, and in
# an image of 1,000 pixels that is a step of four pixels. So the library keeps boxes and sampling locations in float32, whatever the precision.
#
# One form is not run here, because compiling takes minutes: AOTInductor turns a program of `torch.export` into machine code, in
# a package that runs without the model's Python code. Such a package calls our operator by its name, so `import deformable_detr.ops` must
# come before it is loaded.
#
# ```python
# from deformable_detr.export.program import make_graph, to_program
#
# program = to_program(make_graph(detector.model, top_k=20), size=(128, 128))
# torch._inductor.aoti_compile_and_package(program, package_path="digits.pt2")
# run = torch._inductor.aoti_load_package("digits.pt2")  # run(images, sizes)
# ```
#
# ## {{n}}.7 The operator in somebody else's model
#
# Sometimes it is not the detector that is to travel but the operator: somebody else's model, with its own weights, is to run on our
# kernel. For Hugging Face's models this is one line. The next cell makes a small one with random weights, and runs it with its own
# operator and then with ours.

# %%
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.utils import logging as transformers_logging

from deformable_detr.integrations import use_in_transformers

transformers_logging.disable_progress_bar()
width = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 20}
layers = {"encoder_layers": 2, "decoder_layers": 2}
heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
theirs = DeformableDetrForObjectDetection(
    DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, **width, **layers, **heads
    )
).eval()
pixels = torch.randn(1, 3, 96, 128)
with torch.no_grad():
    before = theirs(pixel_values=pixels)
    with use_in_transformers(theirs) as done:
        count, after = done.count, theirs(pixel_values=pixels)
assert torch.allclose(before.logits, after.logits, atol=1e-5)
assert torch.allclose(before.pred_boxes, after.pred_boxes, atol=1e-5)
print(count, "modules replaced; the outputs are the same")

# %% [markdown]
# At the end of the `with` their operator is back. The official code, DINO and Mask2Former import a compiled extension by its name; for
# them `install_official_names()` puts ours under that name, before their code is imported. mmcv's module has the same parameter names as
# `MSDeformAttn`, so that `load_state_dict` takes its weights. The lines for each project are on the book's page of recipes
# (`book/recipes.md`), and each is tested.
#
# ## {{n}}.8 Behind an address
#
# Most people will use a detector through a page or a program that sends a picture and gets JSON. Python's own `http.server` is enough to
# see all that matters, in about forty lines. `predict` takes a file's bytes, and raises a `ValueError` of one line where they are not a
# picture. The handler turns that into an answer with status 400, because the one who sent a broken file should learn what was wrong.

# %%
PAGE = """<!doctype html><title>Digits</title><input type=file accept="image/*"><pre></pre><script>
document.querySelector("input").onchange = async event => {
  const answer = await fetch("/", {method: "POST", body: event.target.files[0]})
  document.querySelector("pre").textContent = JSON.stringify(await answer.json(), null, 1)
}</script>"""
LIMIT = 10_000_000  # bytes of a picture


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, PAGE, "text/html; charset=utf-8")

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if length > LIMIT:
            return self.reply(413, json.dumps({"error": f"more than {LIMIT} bytes"}))
        try:
            (found,) = predict(detector, self.rfile.read(length))
        except ValueError as error:
            return self.reply(400, json.dumps({"error": str(error)}))
        columns = zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        entries = [
            {"name": n, "score": round(s, 3), "box": [round(x, 1) for x in b]}
            for n, s, b in columns
        ]
        self.reply(200, json.dumps({"detections": entries}))

    def reply(self, status, text, kind="application/json"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):  # no line per request in the notebook
        pass


# %% [markdown]
# The next cell starts the server on a free port of this machine, makes three requests (the page, the running example, and a
# file that is not a picture), and shuts it down. The detector was loaded once, before the first request. Requests are answered one after
# the other: two at a time would only fight for the same cores.

# %%
server = HTTPServer(("127.0.0.1", 0), Handler)
Thread(target=server.serve_forever, daemon=True).start()


def ask(method, body=None):
    """Status and content of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, "/", body)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


try:
    status, page = ask("GET")
    print(status, page[:36])
    status, text = ask("POST", Path("../data/samples/000010.png").read_bytes())
    print(status, text)
    status, refused = ask("POST", b"no picture")
    print(status, json.loads(refused)["error"].split(":")[0])  # the reason follows
finally:
    server.shutdown()
    server.server_close()

# %% mystnb={"image": {"alt": "The running example, a green seven on wood, with the box that the server's answer names drawn around the seven, and its name and score above."}}
figure, axis = plt.subplots(figsize=(3.2, 3.2))
axis.imshow(picture)
for each in json.loads(text)["detections"]:
    x0, y0, x1, y1 = each["box"]
    axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="C4", lw=2))
    axis.text(
        x0, y0 - 3, f"{each['name']} {each['score']:.2f}", color="white", backgroundcolor="C4"
    )
axis.set_axis_off()
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What a client can draw from the answer: it knows the box, the name and the score, and needs nothing of this library.*
#
# `http.server` is for learning and for your own machine; its documentation itself advises against using it in production. A real service
# puts the same three steps (bytes in, `predict`, JSON out) behind a web framework. Sometimes no server is needed, because a page holds
# everything in one file: `deformable-detr explain IMAGE --output explained.html` shows what the detector looked at, and
# `deformable-detr evaluate DATA --report report.html` what it gets wrong. And a detector can run *in* a page: with the ONNX file from
# above and onnxruntime's build for browsers. That build has to be fetched from the network, so it is not run here. If you let it compute on
# WebGPU, compare its outputs with those of a CPU first: its `GridSample` has been reported wrong
# ([onnxruntime 32275](https://github.com/microsoft/onnxruntime/issues/32275)).
#
# ## Exercise {{n}}.3  An answer that does not break
#
# *difficulty ●●○ · 25 minutes · 8 lines*
#
# Write the function that you will want to keep between any framework and any detector. It gets a request's bytes, a function `detect`
# from an RGB picture to a list, and a limit in bytes, and returns a status and a dict:
# - more bytes than the limit: 413 and `{"error": ...}`, before anything is opened,
# - not a picture, or one that is cut short: 400 and `{"error": ...}`; `detect` is not called,
# - an error that `detect` itself raises goes through, whatever it is: it is no fault of the picture,
# - else 200 and `{"detections": detect(picture)}`, where the picture is RGB and turned as its EXIF says (telephones store
#   pictures lying on their side, with a note of how to turn them).


# %% tags=["exercise"]
def answer(body, detect, limit=10_000_000):
    """body: bytes. Returns (status, dict)."""
    # BEGIN SOLUTION
    if len(body) > limit:
        return 413, {"error": f"more than {limit} bytes"}
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
        picture = picture.convert("RGB")
    except OSError:
        return 400, {"error": "no picture that can be read"}
    return 200, {"detections": detect(picture)}
    # END SOLUTION


check("out_of_the_notebook.3", answer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `Image.open(io.BytesIO(body))` raises an `OSError` for what is no picture. It reads only the header; the pixels are read by
# `convert`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `ImageOps.exif_transpose` returns the picture as it is meant to be seen. Put it and `convert` inside the `try`, but `detect`
# outside, so that an error of the detector is not reported as a fault of the picture.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# An empty body is not a picture either, and PIL's `UnidentifiedImageError` is an `OSError`. The answer has the one key "error".
#
# </details>
#
# {{solution}}

# %% tags=["hide-input"]
temporary.cleanup()

# %% [markdown]
# ## {{n}}.9 Before it goes out
#
# | question | how to check |
# |:--|:--|
# | Does the receiver prepare pictures as in training? | one picture through both, *pixels* compared before the network |
# | Are all sizes free that will vary? | run it at a size, a batch and a padding that were not traced |
# | Does the file say the same as PyTorch? | the largest difference of all outputs, and AP on a data set |
# | Was the threshold chosen for this form? | choose it again on the validation split, with this form's scores (for bf16: `evaluate --precision bf16 --keep-threshold`) |
# | Do names and ids travel? | read them from the file's metadata, not from a list in a script |
# | What does a broken picture do? | send one: the answer is one line, and the next request works |
# | How long, how much memory, on *that* machine? | measure there, median of several, largest picture allowed |
# | Which version is it? | name weights, library and data in a note beside the file, as `data/checkpoints/digits.json` does |
#
# ## Summary
#
# - The weights cover one of six stations from picture to names. When the preparation is lost, no error says so.
# - A trace may note a number where `torch.export` notes where it came from. Say which axes are free, and check at other sizes.
# - In ONNX the operator is one GridSample per level, with no plug-in; the file is compared with PyTorch before it is put in place.
# - Smaller numbers cost this detector hardly any AP. What they gain depends on the processor; places stay in float32.
# - A service is bytes in, one line of `predict`, JSON out, and a clear answer where the bytes are not a picture.
#
# > **Differs from the paper.** The paper ends with AP and images per second on one GPU. **Differs from the official code.** Its module calls
# > a compiled extension, which exporters do not know, so it cannot be exported as it stands.
#
# ## Further reading
#
# - {cite}`ansel2024pytorch2`: how PyTorch captures a graph, with sizes as symbols.
# - {cite}`jacob2018quantization`: whole numbers instead of floats, and training that expects them.
# - {cite}`paszke2019pytorch`: why PyTorch's models are plain Python code in the first place.
