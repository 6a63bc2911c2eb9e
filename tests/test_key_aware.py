"""Key-aware attention: products with samples that no tensor holds, against plain loops."""

import math

import pytest
import torch

from deformable_detr.evaluation.complexity import LiveTensors
from deformable_detr.layers.key_aware_attention import KeyAwareAttention
from deformable_detr.look.sampling import record_sampling
from deformable_detr.ops import ms_deform_attn, products, sampled_products, use_backend
from deformable_detr.ops.dispatch import backends

SHAPES = [(5, 3), (2, 4)]
B, Q, M, L, K, D = 2, 5, 3, 2, 4, 6
S = 5 * 3 + 2 * 4
BACKENDS = [name for name, state in backends().items() if state == "available" and name != "cuda"]


def make(dtype=torch.float64):
    """Queries, keys and places, of which some are outside."""
    torch.manual_seed(0)
    query, keys = torch.randn(B, Q, M * D, dtype=dtype), torch.randn(B, S, M, D, dtype=dtype)
    return query, keys, torch.rand(B, Q, M, L, K, 2, dtype=dtype) * 1.6 - 0.3


def sample(keys, b, m, level, x, y):
    """The key of image b and head m at (x, y), as a list, from the four cells around it."""
    (height, width), start = SHAPES[level], (0, 15)[level]
    x, y = x * width - 0.5, y * height - 0.5
    total = [0.0] * D
    for column in (math.floor(x), math.floor(x) + 1):
        for row in (math.floor(y), math.floor(y) + 1):
            if 0 <= column < width and 0 <= row < height:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                key = keys[b, start + row * width + column, m].tolist()
                total = [t + share * k for t, k in zip(total, key, strict=True)]
    return total


def by_loops(query, keys, places):
    result = torch.zeros(places.shape[:-1], dtype=torch.float64)
    for b, q, m, level, k in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        key = sample(keys, b, m, level, *places[b, q, m, level, k].tolist())
        asked = query[b, q, m * D : (m + 1) * D].tolist()
        result[b, q, m, level, k] = sum(x * y for x, y in zip(asked, key, strict=True))
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_those_of_plain_loops(backend, monkeypatch):
    """Kernels run where they are asked for, and only there."""
    ran, original = [], products.by_kernel
    monkeypatch.setattr(products, "by_kernel", lambda *a: ran.append(backend) or original(*a))
    query, keys, places = make()
    with use_backend(backend):
        found = sampled_products(query, keys, SHAPES, places)
    torch.testing.assert_close(found, by_loops(query, keys, places))
    assert ran == (["cpu"] if backend == "cpu" else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_once_and_twice(backend):
    inputs = [x.requires_grad_() for x in make()]

    def function(query, keys, places):
        return sampled_products(query, keys, SHAPES, places)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs)
        if backend != "reference":
            assert torch.autograd.gradgradcheck(function, inputs)


def test_nan_and_infinite_places_are_outside():
    query, keys, places = make()
    for value in (math.nan, math.inf, -math.inf):
        places[0, 0, 0, 0, 0, 0] = value
        found = sampled_products(query, keys, SHAPES, places)
        assert found.isfinite().all() and found[0, 0, 0, 0, 0] == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, on its way to jvp
def test_torchs_transforms_and_forward_derivatives():
    """By plain operations, which have them."""
    query, keys, places = make()

    def function(query):
        return sampled_products(query, keys, SHAPES, places)

    _, tangent = torch.func.jvp(function, (query,), (query,))
    torch.testing.assert_close(tangent, function(query))  # it is linear
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query)
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(tangent, function(query))


def test_half_precision_is_exact_inside():
    query, keys, places = make(torch.float32)
    found = sampled_products(query.bfloat16(), keys.bfloat16(), SHAPES, places)
    wide = [x.bfloat16().double() for x in (query, keys)]
    assert found.dtype == torch.float32
    expected = sampled_products(*wide, SHAPES, places.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the kernel holds no samples; it is not here")
def test_no_tensor_holds_all_samples():
    query, keys, places = make(torch.float32)
    places = places.repeat(1, 40, 1, 1, 1, 1).requires_grad_()
    query, keys = query.repeat(1, 40, 1).requires_grad_(), keys.requires_grad_()
    samples = places[..., 0].numel() * D * 4  # bytes
    with LiveTensors([query, keys, places]) as live:
        before = live.now
        sampled_products(query, keys, SHAPES, places).sum().backward()
    assert live.peak - before < samples
    with LiveTensors([query, keys, places]) as live, use_backend("gather"):
        before = live.now
        sampled_products(query, keys, SHAPES, places).sum().backward()
    assert live.peak - before > samples


def test_bad_input_is_refused_in_one_line():
    query, keys, places = make()
    with pytest.raises(ValueError, match=r"^query must be \(B=2, Q=5, C=18\), got \(2, 5, 17\)$"):
        sampled_products(query[..., 1:], keys, SHAPES, places)
    with pytest.raises(ValueError, match="hold 15 tokens, but value has S=23"):
        sampled_products(query, keys, SHAPES[:1], places)
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads, got 10 and 4"):
        KeyAwareAttention(10, 2, 4)
    with pytest.raises(ValueError, match=r"expected 3 levels, got spatial_shapes \[\(5, 3\)"):
        attention = KeyAwareAttention(18, 3, 3)
        attention(torch.rand(1, 5, 18), torch.rand(1, 5, 3, 2), torch.rand(1, S, 18), SHAPES)
    attention = KeyAwareAttention(18, L, 3)
    given = torch.rand(1, 5, 18), torch.rand(1, 5, L, 2), torch.rand(1, S, 18), SHAPES
    for i, wrong, message in (
        (0, torch.rand(1, 5, 17), r"query must be \(B, Q, C=18\), got \(1, 5, 17\)"),
        (1, torch.rand(1, 4, L, 2), r"reference_points must be \(B=1, Q=5, .*got \(1, 4, "),
        (2, torch.rand(2, S, 18), r"input_flatten must be \(B=1, S, C=18\), got \(2, "),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*given[:i], wrong, *given[i + 1 :])


# The module


def module(seed=0):
    """One whose offsets depend on the query."""
    torch.manual_seed(seed)
    attention = KeyAwareAttention(M * D, L, M, K).double()
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    return attention


@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_module_is_that_of_plain_loops(coordinates):
    attention = module()
    query, features = torch.randn(1, Q, M * D).double(), torch.randn(1, S, M * D).double()
    references = torch.rand(1, Q, L, coordinates).double()
    padding = torch.zeros(1, S, dtype=torch.bool)
    padding[0, [2, 5, 8, 11, 14]] = True  # the last column of the finer level
    found = attention(query, references, features, SHAPES, padding)
    value = attention.value_proj(features).masked_fill(padding.unsqueeze(-1), 0)
    value = value.view(1, S, M, D)
    offsets = attention.sampling_offsets(query).view(Q, M, L, K, 2)
    asked = attention.query_proj(query).view(Q, M, D)
    expected = torch.zeros(1, Q, M * D, dtype=torch.float64)
    for q in range(Q):
        for m in range(M):
            keys = []
            for level, (height, width) in enumerate(SHAPES):
                reference = references[0, q, level].tolist()
                for k in range(K):
                    x, y = offsets[q, m, level, k].tolist()
                    if coordinates == 2:
                        x, y = reference[0] + x / width, reference[1] + y / height
                    else:
                        x = reference[0] + x / K * reference[2] * 0.5
                        y = reference[1] + y / K * reference[3] * 0.5
                    keys.append(sample(value, 0, m, level, x, y))
            keys = torch.tensor(keys, dtype=torch.float64)  # (L * K, D), which are the values too
            weights = (keys @ asked[q, m] / math.sqrt(D)).softmax(0)
            expected[0, q, m * D : (m + 1) * D] = weights @ keys
    torch.testing.assert_close(found, attention.output_proj(expected))


def test_weights_are_recorded_and_sum_to_one():
    attention = module()
    query, features = torch.randn(2, Q, M * D).double(), torch.randn(2, S, M * D).double()
    with record_sampling(torch.nn.ModuleDict({"one": attention})) as record:
        output = attention(query, torch.rand(2, Q, 1, 2).double(), features, SHAPES)
    sampling = record["one"]
    assert sampling.weights.shape == (2, Q, M, L, K) and (sampling.weights > 0).all()
    torch.testing.assert_close(sampling.weights.sum((3, 4)), torch.ones(2, Q, M).double())
    assert sampling.weights.std() > 0.01
    value = attention.value_proj(features).view(2, S, M, D)
    again = ms_deform_attn(value, SHAPES, sampling.locations, sampling.weights)
    torch.testing.assert_close(attention.output_proj(again), output)


def test_one_query_alone_weighs_as_among_others():
    """Weights come of a query and what it samples, of nothing else."""
    attention = module()
    query, features = torch.randn(1, Q, M * D).double(), torch.randn(1, S, M * D).double()
    references = torch.rand(1, Q, 1, 4).double()
    whole = attention(query, references, features, SHAPES)
    alone = attention(query[:, 2:3], references[:, 2:3], features, SHAPES)
    torch.testing.assert_close(alone, whole[:, 2:3])


def test_it_starts_from_the_star_of_deformable_attention():
    from deformable_detr import MSDeformAttn

    attention, plain = KeyAwareAttention(32, 3, 4, 2), MSDeformAttn(32, 3, 4, 2)
    assert torch.equal(attention.sampling_offsets.bias, plain.sampling_offsets.bias)
    assert not attention.sampling_offsets.weight.any() and not attention.query_proj.bias.any()


def test_it_compiles():
    attention = module().float()
    arguments = torch.randn(1, Q, 18), torch.rand(1, Q, L, 4), torch.randn(1, S, 18), SHAPES
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    plain = attention(*arguments)
    torch.testing.assert_close(compiled(*arguments), plain)
    compiled(*arguments).sum().backward()
    compiled_grad = attention.query_proj.weight.grad
    attention.zero_grad()
    plain.sum().backward()
    torch.testing.assert_close(compiled_grad, attention.query_proj.weight.grad)
