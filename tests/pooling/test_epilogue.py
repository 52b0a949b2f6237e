from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import check_compiled, check_gradients, check_op, check_threads, packed, tolerance
from emblas import use_backend
from emblas._philox import philox4x32
from emblas.pooling import Epilogue, Matryoshka, int8_ranges, segment_pool
from emblas.pooling.reference import normal_noise
from torch.nn.functional import normalize

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_philox_known_answers():
    """The known answers of Random123 1.14 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        words = philox4x32([torch.tensor(word) for word in counter], key[0] | key[1] << 32)
        assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dims_and_normalize(isa, dtype):
    x = torch.randn(30, 50).to(dtype)
    cu = packed((7, 0, 23))
    mean = torch.stack([x[:7].double().mean(0), torch.zeros(50), x[7:].double().mean(0)])
    limit = tolerance(dtype, 50)
    for k, part in zip((3, 17, 50), segment_pool(x, cu, dims=(3, 17, 50), normalize=True)):  # noqa: B905
        assert part.dtype == dtype
        torch.testing.assert_close(part.double(), normalize(mean[:, :k].double()), **limit)
    one = segment_pool(x, cu, dims=17)
    torch.testing.assert_close(one.double(), mean[:, :17].double(), **limit)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8", "binary"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(isa, quantize, normalized, dtype):
    pooled = torch.randn(9, 37).to(dtype)
    pooled[4] = 0
    ranges = torch.stack([-torch.rand(47), torch.rand(47)]) if quantize == "int8" else None
    epilogue = Epilogue(dims=(10, 37), normalize=normalized, noise=0.3, seed=2**62 + 5,
                        quantize=quantize, ranges=ranges)  # fmt: skip
    actual = epilogue(pooled)
    with use_backend("reference"):
        expected = epilogue(pooled)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        if quantize == "int8":
            assert (a.int() - e.int()).abs().max() <= 1  # a rounding on the edge
        elif quantize == "binary":
            assert torch.equal(a, e)
        else:
            torch.testing.assert_close(a, e, **tolerance(dtype, 37))


def test_whitening():
    """PCA-whitening makes the covariance of the training vectors the identity."""
    base = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    mean = base.mean(0)
    values, vectors = torch.linalg.eigh((base - mean).T.cov())
    projection = vectors.T[2:] / values[2:, None].sqrt()
    white = Epilogue(mean=mean, projection=projection)(base)
    torch.testing.assert_close(white.T.cov(), torch.eye(4).double())
    x = torch.randn(8, 6, dtype=torch.float64)
    each = Epilogue(mean=mean, projection=projection)(x)
    at_once = segment_pool(x, packed((8,)), epilogue=Epilogue(mean=mean, projection=projection))
    torch.testing.assert_close(at_once[0], each.mean(0))


def test_binary_is_packbits():
    x, cu = torch.randn(12, 21), packed((5, 7))
    codes = segment_pool(x, cu, epilogue=Epilogue(quantize="binary"))
    expected = np.packbits(segment_pool(x, cu).numpy() > 0, axis=1)
    np.testing.assert_array_equal(codes.numpy(), expected)


def test_int8_levels():
    ranges = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 10.0, 2.0]])
    x = torch.tensor([[-1.0, 10.0, 2.0], [1.0, -7.0, 3.0], [0.0, 99.0, torch.nan]])
    codes = Epilogue(quantize="int8", ranges=ranges)(x)
    assert codes.tolist() == [[-128, 127, -128], [127, -128, -128], [0, 127, -128]]
    x = torch.randn(50, 8)
    assert torch.equal(
        Epilogue(quantize="int8")(x), Epilogue(quantize="int8", ranges=int8_ranges(x))(x)
    )
    low, high = int8_ranges(x)
    back = (Epilogue(quantize="int8")(x).float() + 128) * (high - low) / 255 + low
    assert ((back - x).abs() <= (high - low) / 255 / 2 * 1.001).all()


def test_int8_beside_sentence_transformers():
    quantize = pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings
    x = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    ranges = np.stack([x.min(0), x.max(0)])
    peer = quantize(x, "int8", ranges=ranges).astype(int)
    ours = Epilogue(quantize="int8", ranges=torch.from_numpy(ranges))(torch.from_numpy(x))
    assert np.abs(ours.numpy().astype(int) - peer).max() <= 1  # theirs cuts, ours rounds


def test_noise_is_normal_and_independent():
    zeros = torch.zeros(400, 64)
    a, b = Epilogue(dims=(64, 64), noise=2.0, seed=1)(zeros)
    for noise in (a, b):
        assert abs(float(noise.mean())) < 0.06
        assert abs(float(noise.std()) - 2) < 0.06
    for other in (b, Epilogue(noise=2.0, seed=2)(zeros), a.roll(1, 0), a.roll(1, 1)):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1])) < 0.03
    assert torch.equal(Epilogue(noise=2.0, seed=1)(zeros), a)
    assert not torch.equal(Epilogue(noise=1.0)(zeros), Epilogue(noise=1.0)(zeros))
    torch.testing.assert_close(a.double() / 2, normal_noise(400, 64, 0, 1), rtol=1e-5, atol=1e-6)


def test_gradients(isa):
    names = ("segment_pool", "segment_pool_backward", "finish", "finish_backward")
    cu, x = packed((3, 0, 6)), torch.randn(9, 7)
    for epilogue in (
        Epilogue(dims=(2, 7), normalize=True),
        Epilogue(dims=(3, 5)),
        Epilogue(torch.randn(7), torch.randn(4, 7), normalize=True, noise=1, seed=1),
    ):
        check_gradients(lambda x, e=epilogue: segment_pool(x, cu, epilogue=e), [x], names)
    zero = torch.zeros(2, 4, requires_grad=True)
    Matryoshka([2, 4])(zero)[0].sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_contract():
    x = torch.randn(5, 11)
    ranges = torch.stack([-torch.ones(15), torch.ones(15)])
    for kind in (0, 1, 2):
        check_op("finish", x, [4, 11], True, 0.1, 7, kind, torch.bfloat16, ranges)
    check_op("finish_backward", torch.randn(5, 15), x, [4, 11], True)
    calls = [(torch.randn(n, 24), packed((n,) * 1 + (0,) * k)) for n, k in ((7, 2), (9, 3), (4, 4))]
    check_compiled(
        lambda x, cu: segment_pool(x, cu, epilogue=Epilogue(dims=(8, 24), normalize=True)),
        calls,
        backward=True,
    )
    check_threads(lambda: Epilogue(normalize=True, noise=0.5, seed=3)(torch.ones(2000, 100)))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "quantize must be one of", lambda: Epilogue(quantize="int4")),
        (ValueError, "noise must be a finite", lambda: Epilogue(noise=-1.0)),
        (ValueError, "ranges are for", lambda: Epilogue(ranges=X)),
        (TypeError, "dtype must be a floating", lambda: Epilogue(dtype=torch.int8)),
        (ValueError, "dims must be between 1 and 3", lambda: Epilogue(dims=4)(X)),
        (ValueError, "mean must have the pooled dim", lambda: Epilogue(mean=X[0, :2])(X)),
        (ValueError, "projection must have the sh", lambda: Epilogue(projection=X[:, :2])(X)),
        (
            ValueError,
            r"ranges must have the shape \(2, 3\)",
            lambda: Epilogue(quantize="int8", ranges=X[:, :2])(X),
        ),
        (
            ValueError,
            "dims either to the function",
            lambda: segment_pool(X, packed((2,)), dims=2, epilogue=Epilogue()),
        ),
        (ValueError, "dims must be between 1 and 3", lambda: Matryoshka([9])(X)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    finish, backward = torch.ops.emblas.finish, torch.ops.emblas.finish_backward
    for call in (
        lambda: finish(X, [], False, 0, 0, 0, torch.float32, None),
        lambda: finish(X, [4], False, 0, 0, 0, torch.float32, None),
        lambda: finish(X, [3], False, 0, 0, 3, torch.float32, None),
        lambda: finish(X, [3], False, 0, 0, 0, torch.float64, None),
        lambda: finish(X, [3], False, 0, 0, 1, torch.float32, X[:, :2]),
        lambda: finish(X.half(), [3], False, 0, 0, 0, torch.float16, None),
        lambda: backward(X, X, [2], False),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            call()
