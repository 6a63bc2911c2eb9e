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
# # {{n}}. Published weights
#
# You will be able to
# - **read** a state dict as a map of the model,
# - **translate** names between this library, the official code and Hugging Face, strictly,
# - **compare** two implementations layer by layer with hooks, and find where they part,
# - **change** the number of classes, and say which tensors survive,
# - **refuse** a file that would run code, and know what was published and how to repeat it.
#
# You should know: {{chapter pixels_to_boxes}} and {{chapter refinement}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Training Deformable DETR on COCO takes over three hundred GPU hours. Nobody should do that twice, so
# weights are published. A file of weights is names and numbers; whether it *fits* is a question of
# names, and whether it is *right* a question of every detail of the forward pass.

# %%
import logging
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path

# a library asks for ipywidgets, which this chapter does without
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from transformers import DeformableDetrForObjectDetection
from transformers.utils import logging as transformers_logging

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig
from deformable_detr.exercises import check
from deformable_detr.weights.formats import to_huggingface, to_official
from deformable_detr.weights.published import load_pretrained, save_pretrained

plt.style.use("book.mplstyle")
transformers_logging.disable_progress_bar()
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 The state dict as a map
#
# The paper's base model has 40 million numbers. Where are they? On PyTorch's `meta` device a model
# has names and shapes and no memory.

# %%
with torch.device("meta"):
    base = DeformableDETR(DeformableDETRConfig())
sizes = Counter()
for name, parameter in base.named_parameters():
    sizes[name.split(".")[0]] += parameter.numel()
for part, size in sizes.most_common():
    print(f"{part:>17} {size:>11,}")
print(f"{'all':>17} {sizes.total():>11,}")

# %% [markdown]
# The official models have exactly as many, and as many tensors in their files. Frozen batch norm has
# no parameters, only buffers; heads that layers share are stored once for each:

# %%
published = {"base": 40_069_665, "refinement": 40_849_660, "two stages": 41_181_529}
options = {
    "base": {},
    "refinement": {"refine": True},
    "two stages": {"refine": True, "two_stage": True},
}
for name, option in options.items():
    with torch.device("meta"):
        variant = DeformableDETR(DeformableDETRConfig(**option))
    count = sum(p.numel() for p in variant.parameters())
    print(f"{name:>10} {count:,}", len(to_official(variant)), "tensors")
    assert count == published[name]

# %% mystnb={"image": {"alt": "Horizontal bars of the number of parameters by part of the model: the backbone has more than half; the neck (the projections of its maps), the rest of encoder and decoder, and deformable attention follow; heads and queries are thin lines."}}
attention = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
bars = Counter()
for name, parameter in base.named_parameters():
    part = "deformable attention" if any(a in name for a in attention) else name.split(".")[0]
    bars[part] += parameter.numel()
share_of_attention = bars["deformable attention"] / sum(bars.values())
assert 0.06 < share_of_attention < 0.08
figure, axis = plt.subplots(figsize=(7, 2.6))
parts = bars.most_common(7)[::-1]
axis.barh([name for name, _ in parts], [size / 1e6 for _, size in parts])
axis.set(xlabel="million parameters")
plt.show()

# %% [markdown]
# *Figure {{n}}.1. Deformable attention, taken out of encoder and decoder, has 7 in a hundred of the numbers;
# most are the ResNet's.*
#
# Where to look takes a linear layer from $C$ numbers to $2 M L K$: with $C = 256$, $M = 8$ heads and
# $L = K = 4$ that is $(C + 1) \cdot 2 M L K = 65{,}792$ numbers in each of twelve layers.

# %%
share = (
    sum(p.numel() for n, p in base.named_parameters() if "sampling_offsets" in n) / sizes.total()
)
print(f"all sampling offsets together: {share:.1%}")
assert sizes["backbone"] / sizes.total() > 0.5 and share < 0.03
assert round(share * sizes.total()) == 12 * (256 + 1) * 2 * 8 * 4 * 4 == 12 * 65_792

# %% [markdown]
# ## {{n}}.2 Three dialects
#
# The official code, Hugging Face and this library named the same things. One tensor, three names:

# %%
official = list(to_official(base))
hub = list(to_huggingface(base)[0])
ours = list(base.state_dict())
end = "encoder.layers.2.self_attn.value_proj.weight"
print("ours        ", next(x for x in ours if x.endswith("layers.2.attention.value_proj.weight")))
print("official    ", next(x for x in official if x.endswith(end)))
print("Hugging Face", next(x for x in hub if x.endswith(end)))

# %% [markdown]
# The names inside the attention module, `sampling_offsets`, `attention_weights`, `value_proj` and
# `output_proj`, are the same everywhere, because everybody copied the first code. All the rest is a
# table of beginnings, but for the decoder's self-attention: its `in_proj`, one tensor of $3C$ rows, is
# three tensors in Hugging Face's files.
#
# ## Exercise {{n}}.1  Translate
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Translate official names of encoder layers into ours: `transformer.` goes away, `self_attn` is
# `attention`, `norm1` is `norm`, `linear1`, `linear2` and `norm2` live in `ffn` (there `norm2` is
# called `norm`). A name of anything else is an error, never a guess: ValueError.


# %% tags=["exercise"]
def our_name(official):
    """For example transformer.encoder.layers.3.linear1.bias -> encoder.layers.3.ffn.linear1.bias."""
    # BEGIN SOLUTION
    parts = {"self_attn": "attention", "norm1": "norm", "norm2": "ffn.norm"}
    parts |= {"linear1": "ffn.linear1", "linear2": "ffn.linear2"}
    match official.split("."):
        case ["transformer", "encoder", "layers", layer, part, *rest] if part in parts:
            return ".".join(["encoder", "layers", layer, parts[part], *rest])
    raise ValueError(f"not a tensor of an encoder layer: {official}")
    # END SOLUTION


check("published_weights.1", our_name)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Split at the dots. The fifth part decides.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A dict from `norm1` to `norm`, `norm2` to `ffn.norm` and so on. What is not in it is refused.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A chain of `str.replace` also changes names that it should not know, and lets strangers through.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Strict in both directions: a tensor that is missing, left over or of another shape is an error with
# its name. `load_state_dict(strict=False)`, which so many scripts use, would train on with random
# numbers in the gap.

# %%
small = DeformableDETRConfig(
    num_classes=5, num_queries=7, backbone="resnet18", embed_dim=32, num_heads=4, num_points=2,
    num_levels=3, encoder_layers=3, decoder_layers=2, ffn_dim=48, dropout=0.0,
)  # fmt: skip
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)


def randomised(model):
    """Random numbers in all parameters: zeros and ones would hide mistakes."""
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


model = randomised(DeformableDETR(small))
path = folder / "official.pth"
save_pretrained(model, path, format="official")
content = torch.load(path, weights_only=True)
content["model"]["transformer.encoder.layers.1.linear9.weight"] = torch.zeros(3)
torch.save(content, folder / "strange.pth")
try:
    load_pretrained(folder / "strange.pth")
except ValueError as error:
    print(str(error).replace(f"{folder}/", ""))

# %% [markdown]
# And there and back, bit for bit:

# %%
for kind, place in (("official", path), ("huggingface", folder / "hub"), ("ours", folder / "own")):
    save_pretrained(model, place, format=kind)
    again = load_pretrained(place).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    print(f"{kind:>11}: the same bits")

# %% [markdown]
# ## {{n}}.3 Is it the same model?
#
# Names can match while numbers go wrong: an axis swapped, a norm in another place. So run both. Here
# is Hugging Face's own detector, loaded from the folder that we just wrote:

# %%
theirs = DeformableDetrForObjectDetection.from_pretrained(folder / "hub").eval()
images = [torch.randn(3, 96, 128), torch.randn(3, 80, 112)]  # two sizes: padding must be right too
batch = Batch.from_images(images)
with torch.no_grad():
    mine = model(batch)
    other = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
differences = {
    "logits": (mine.logits - other.logits).abs().max().item(),
    "boxes": (mine.boxes - other.pred_boxes).abs().max().item(),
}
print({name: x < 1e-4 for name, x in differences.items()})
assert max(differences.values()) < 1e-4

# %% [markdown]
# ## {{n}}.4 Layer by layer, with hooks
#
# Had they differed, where? A **hook** is a function that a module calls with its output. Hang one on
# every encoder and decoder layer of both, and compare.


# %%
def outputs_of(model, layers, run):
    """The first output of each of these modules while run() goes through the model."""
    kept = []

    def keep(module, arguments, output):
        kept.append((output[0] if isinstance(output, tuple) else output).detach())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return kept


def compare(mine, other):
    """The largest difference after each encoder and decoder layer."""
    layers = [*mine.encoder.layers, *mine.decoder.layers]
    first = outputs_of(mine, layers, lambda: mine(batch))
    layers = [*other.model.encoder.layers, *other.model.decoder.layers]
    mask = (~batch.mask).long()
    second = outputs_of(other, layers, lambda: other(pixel_values=batch.images, pixel_mask=mask))
    return [(a - b).abs().max().item() for a, b in zip(first, second, strict=True)]


agreement = compare(model, theirs)
print([x < 1e-4 for x in agreement])

# %% [markdown]
# Now somebody's conversion script has swapped x and y in the offsets of the second encoder layer.
# Shapes fit, names fit, nothing complains. Before you run: at which of the five layers will the two
# part?

# %%
offsets = theirs.model.encoder.layers[1].self_attn.sampling_offsets
with torch.no_grad():
    for tensor in (offsets.weight, offsets.bias):
        tensor.copy_(tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
parted = compare(model, theirs)
for layer, difference in enumerate(parted):
    print(f"layer {layer}: {'equal' if difference < 1e-4 else 'different'}")
assert [x < 1e-4 for x in parted] == [True, False, False, False, False]

# %% [markdown]
# ## Exercise {{n}}.2  The first that differs
#
# *difficulty ●○○ · 10 minutes · 4 lines*
#
# With hundreds of modules one wants a name. Given two dicts of outputs in the order of execution,
# return the first name at which they differ, or None.


# %% tags=["exercise"]
def first_difference(mine, theirs, tolerance=1e-4):
    """mine, theirs: dicts name -> tensor, the same names. Returns a name or None."""
    # BEGIN SOLUTION
    for name, tensor in mine.items():
        if not torch.allclose(tensor, theirs[name], atol=tolerance, rtol=tolerance):
            return name
    return None
    # END SOLUTION


check("published_weights.2", first_difference)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Dicts keep their order. Walk through one, look up the other.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.allclose` is False where one of them is NaN. That is what you want.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# `(a - b).abs().max() > tolerance` is False for NaN: a difference that is not a number is one, too.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 Other classes
#
# The file's five classes become three, its seven queries nine. Everything that fits stays; the class
# heads begin anew at the prior, and to the seven queries come two new ones. A report says so, tensor by
# tensor.

# %%
logging.getLogger("deformable_detr").setLevel(logging.ERROR)  # the report is printed below
changed = load_pretrained(path, num_classes=3, num_queries=9)
print(changed.report)
assert len(changed.report.fresh) < 0.1 * len(changed.report.kept)

# %% [markdown]
# Where the names of old and new classes are known, less is lost: a class of the same name keeps its row
# in the class heads, whatever its place and id.

# %%
animals = [{"id": i, "name": name} for i, name in enumerate(("cat", "cow", "dog", "hen", "owl"))]
save_pretrained(model, folder / "animals.safetensors", animals)
others = [{"id": 7, "name": "owl"}, {"id": 30, "name": "elk"}]
named = load_pretrained(folder / "animals.safetensors", categories=others)
print(named.report.classes())
assert torch.equal(named.model.class_heads[0].weight[0], model.class_heads[0].weight[4])

# %% [markdown]
# ## Exercise {{n}}.3  What survives
#
# *difficulty ●●○ · 10 minutes · 2 lines*
#
# Given two state dicts, return the names whose tensors can be taken over, sorted.


# %% tags=["exercise"]
def survivors(published, wanted):
    """published, wanted: dicts name -> tensor. Returns a sorted list of names."""
    # BEGIN SOLUTION
    shapes = {name: tensor.shape for name, tensor in published.items()}
    return sorted(name for name, x in wanted.items() if shapes.get(name) == x.shape)
    # END SOLUTION


check("published_weights.3", survivors)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A tensor survives where the same name has the same shape.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `dict.get` gives None for a name that is not there, and None is no shape.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The same number of elements is not enough: (4, 6) and (6, 4) have as many.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 A file that runs code
#
# `torch.load` unpickles, and a pickle can call any function while it is read. This one would make a
# folder; another would send your keys away.


# %%
class Trap:
    """Pickled, it becomes a call of os.mkdir."""

    def __reduce__(self):
        return os.mkdir, (str(folder / "trapped"),)


torch.save({"model": Trap()}, folder / "trap.pth")
try:
    load_pretrained(folder / "trap.pth")
except ValueError as error:
    print(str(error).replace(f"{folder}/", "").replace(os.mkdir.__module__, "os"))
print("trapped:", (folder / "trapped").exists())
assert not (folder / "trapped").exists()

# %%
torch.load(folder / "trap.pth", weights_only=False)  # what a careless script does
print("trapped by a plain load:", (folder / "trapped").exists())
assert (folder / "trapped").exists()

# %% [markdown]
# Read with `weights_only=True`, or in the safetensors format, nothing can run.

# %%
temporary.cleanup()

# %% [markdown]
# ## {{n}}.7 What was published, and how to repeat it
#
# From the README of the official repository {cite}`zhu2021deformable`: 50 epochs, batch 32, COCO
# val2017.
#
# | model | AP | small | medium | large | GPU hours | name on the hub, SenseTime/ |
# |:--|--:|--:|--:|--:|--:|:--|
# | single scale | 39.4 | 20.6 | 43.0 | 55.5 | 160 | deformable-detr-single-scale |
# | single scale, DC5 | 41.5 | 24.1 | 45.3 | 56.0 | 215 | deformable-detr-single-scale-dc5 |
# | multi-scale | 44.5 | 27.1 | 47.6 | 59.6 | 325 | deformable-detr |
# | + refinement | 46.2 | 28.3 | 49.2 | 61.5 | 325 | deformable-detr-with-box-refine |
# | ++ two stages | 46.9 | 29.6 | 50.1 | 61.6 | 340 | deformable-detr-with-box-refine-two-stage |
#
# On a machine with a network, COCO and a GPU, these lines would measure one of them again. **They were
# not run here.**
#
# ```python
# from deformable_detr import DeformableDETR
#
# model = DeformableDETR.from_pretrained("SenseTime/deformable-detr")
# ```
#
# ```
# deformable-detr evaluate coco --model SenseTime/deformable-detr
# accelerate launch --num_processes 8 -m deformable_detr.cli train coco --recipe paper \
#     --accumulate 2 --output runs/paper  # 8 processes x 2 batches x 2 images = 32
# ```
#
# ## Summary
#
# - A state dict is a map: half the numbers are the ResNet's, hardly any the offsets'.
# - Names are translated by a table, strictly; a gap is an error, not a random number.
# - Equal names are not enough: compare outputs, then layers, with hooks.
# - Other classes cost their rows of the class heads only, and those start at the prior.
# - Weights are data; a loader that can run code is none.
#
# > **Differs from the paper.** The published figures are the repository's; the paper's are up to 0.8
# > lower. **Differs from Hugging Face.** Its model has the right forward pass, and is an oracle for
# > that; its training loss leaves out the first stage's terms.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: the paper; its repository has the table and the files.
