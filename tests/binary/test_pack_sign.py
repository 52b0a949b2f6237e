from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    layouts,
    only_kernels,
    tolerance,
)
from emblas import _op, use_backend
from emblas.binary import (
    HadamardRotation,
    SignBinarizer,
    arrays,
    fit_itq,
    fit_threshold,
    formats,
    pack_sign,
    sign_ste,
    unpack_planes,
    unpack_sign,
)
from hypothesis import given
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pack_sign(isa, dtype):
    for dim in (1, 7, 8, 63, 64, 65, 130, 384):
        x = torch.randn(9, dim).to(dtype)
        x[0, ::3] = 0
        x[1, ::2] = torch.nan
        x[2] = -0.0
        expected = np.packbits((x > 0).numpy(), axis=1)
        for name, view in layouts(x).items():
            np.testing.assert_array_equal(pack_sign(view).numpy(), expected, err_msg=name)


def test_pack_sign_shapes():
    x = torch.randn(2, 3, 11)
    assert pack_sign(x).shape == (2, 3, 2)
    assert torch.equal(pack_sign(x)[1, 2], pack_sign(x[1, 2]))
    assert pack_sign(torch.empty(0, 5)).shape == (0, 1)
    assert pack_sign(torch.empty(3, 0)).shape == (3, 0)


@given(dim=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_unpack_sign(dim, seed):
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_sign(pack_sign(x), dim), torch.where(x > 0, 1.0, -1.0))


def test_unpack_sign_shapes_and_dtypes(isa):
    x = torch.randn(2, 3, 11)
    codes = pack_sign(x)
    signs = torch.where(x > 0, 1, -1)
    for dtype in (*FLOATS, torch.int8):
        assert torch.equal(unpack_sign(codes, 11, dtype=dtype), signs.to(dtype))
    assert torch.equal(unpack_sign(codes[1, 2], 11), signs[1, 2].float())
    assert torch.equal(unpack_sign(codes.transpose(0, 1), 11), signs.transpose(0, 1).float())
    assert unpack_sign(codes[:0], 11).shape == (0, 3, 11)
    assert unpack_sign(pack_sign(torch.empty(3, 0)), 0).shape == (3, 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unpack_planes(isa, dtype):
    """Sums of signed powers of two, to the last bit, and the same from 1 to 7 threads."""
    for planes, dim in ((1, 64), (2, 65), (3, 200), (8, 7)):
        codes = torch.randint(0, 256, (9, planes * ((dim + 7) // 8)), dtype=torch.uint8)
        bits = np.unpackbits(codes.reshape(9, planes, -1).numpy(), axis=2)[:, :, :dim]
        expected = ((bits * 2.0 - 1) * 0.5 ** np.arange(planes)[:, None]).sum(1)
        actual = unpack_planes(codes, dim, dtype=dtype)
        assert torch.equal(actual, torch.from_numpy(expected).to(dtype))
        with use_backend("reference"):
            assert torch.equal(unpack_planes(codes, dim, dtype=dtype), actual)
    codes = torch.randint(0, 256, (5000, 9), dtype=torch.uint8)
    check_threads(lambda: unpack_planes(codes, 72, dtype=dtype))


def test_unpack_planes_contract():
    codes = torch.randint(0, 256, (5, 4), dtype=torch.uint8)
    check_op("unpack_planes", codes, 11, torch.float32)
    check_compiled(
        lambda codes: unpack_planes(codes, 11) * 2,
        [(codes.repeat(rows, 1),) for rows in (2, 3, 5)],
        backward=False,
    )
    with pytest.raises(ValueError, match="1 to 24 planes"):
        _op.ops()["unpack_planes"](codes.repeat(1, 10), 8, torch.float32)
    for dim, dtype in ((33, torch.float32), (0, torch.float32), (8, torch.int8)):
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.unpack_planes(codes, dim, dtype)


def test_straight_through():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    y = sign_ste(x)
    y.backward(torch.arange(1.0, 8.0))
    assert y.tolist() == [-1, -1, -1, -1, 1, 1, 1]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_module():
    module, x = SignBinarizer(), torch.randn(3, 20, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(module.eval()(x.detach()), pack_sign(x.detach()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threshold(isa, dtype):
    for dim in (1, 9, 64, 200):
        x = torch.randn(9, dim).to(dtype)
        x[1, ::2] = torch.nan
        threshold = torch.randn(dim).to(dtype)
        threshold[-1] = torch.nan
        x[2, :-1] = threshold[:-1]  # equal is not above
        expected = np.packbits((x > threshold).numpy(), axis=1)
        for name, view in layouts(x).items():
            actual = pack_sign(view, threshold=threshold)
            np.testing.assert_array_equal(actual.numpy(), expected, err_msg=name)
        with use_backend("reference"):
            np.testing.assert_array_equal(pack_sign(x, threshold=threshold).numpy(), expected)


def test_threshold_is_compared_in_float32():
    """bfloat16 values against a mean that bfloat16 can't hold."""
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    assert pack_sign(x, threshold=torch.tensor([1.001, 0.999])).tolist() == [[0b01000000]]


def test_prefix_and_rotation():
    x, rotation = torch.randn(5, 48), HadamardRotation(20)
    assert torch.equal(pack_sign(x, dims=20), pack_sign(x[:, :20].clone()))
    assert torch.equal(pack_sign(x, dims=20, rotation=rotation), pack_sign(rotation(x[:, :20])))


def test_fit_threshold():
    x = torch.randn(501, 8) + torch.arange(8)
    assert torch.equal(fit_threshold(x), x.mean(0))
    median = fit_threshold(x, "median")
    assert torch.equal(median, x.sort(0).values[250])
    bits = unpack_sign(pack_sign(x, threshold=median), 8)
    assert (bits.sum(0).abs() == 1).all()  # halves
    with pytest.raises(ValueError, match="must not contain NaN"):
        fit_threshold(torch.tensor([[torch.nan]]))
    with pytest.raises(ValueError, match="at least one row"):
        fit_threshold(torch.empty(0, 3))


def rotation_matrix(rotation, dim):
    return torch.stack([rotation(row) for row in torch.eye(dim, dtype=torch.float64)])


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 37, 96, 384])
def test_rotation_is_orthogonal_and_mixes(isa, dim):
    rotation = HadamardRotation(dim, seed=3)
    matrix = rotation_matrix(rotation, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, **tolerance(torch.float64, dim))
    x = torch.randn(6, dim, dtype=torch.float64)
    torch.testing.assert_close(rotation(x), x @ matrix, **tolerance(torch.float64, dim))
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, **tolerance(torch.float64, dim))
    if dim > 30:
        assert matrix.abs().max() < 8 / dim**0.5  # no dimension stays alone


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotation_equals_reference(isa, dtype):
    x, rotation = torch.randn(9, 100).to(dtype), HadamardRotation(100)
    with use_backend("reference"):
        expected, back = rotation(x.double()), rotation.inverse(x.double())
        torch.testing.assert_close(rotation(x).double(), expected, **tolerance(dtype, 100))
    for view in layouts(x).values():
        torch.testing.assert_close(rotation(view).double(), expected, **tolerance(dtype, 100))
        torch.testing.assert_close(rotation.inverse(view).double(), back, **tolerance(dtype, 100))
    assert rotation(torch.empty(0, 100, dtype=dtype)).shape == (0, 100)


def test_rotation_gradients(isa):
    rotation = HadamardRotation(13)
    names = ("hadamard_rotate", "hadamard_unrotate")
    check_gradients(rotation, (torch.randn(3, 13),), names)
    check_gradients(rotation.inverse, (torch.randn(3, 13),), names)


def test_itq():
    """Of all rotations tried, the learned one leaves vectors closest to their signs."""
    x = torch.randn(2000, 16, dtype=torch.float64) * torch.logspace(0, -1.5, 16) + 5
    itq = fit_itq(x, 8)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(itq.weight.T @ itq.weight, eye, atol=1e-10, rtol=0)

    def error(rotated):
        signs = torch.where(rotated > 0, 1.0, -1.0)
        return float((signs - rotated).square().mean())

    learned = error(itq(x))
    projected = fit_itq(x, 8, iterations=0)(x)
    assert learned < error(projected)
    assert pack_sign(x, rotation=itq).shape == (2000, 1)
    assert fit_itq(x.float()).weight.dtype == torch.float32
    with pytest.raises(ValueError, match="bits must be between 1 and dim = 16, got 17"):
        fit_itq(x, 17)
    with pytest.raises(ValueError, match="at least bits = 8 rows, got 5"):
        fit_itq(x[:5], 8)


def test_smooth_estimators():
    x = torch.randn(500, dtype=torch.float64)
    for estimator, scale in (("tanh", 0.3), ("gumbel", 0.6)):
        leaf, smooth = x.clone().requires_grad_(), x.clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        y = sign_ste(leaf, estimator, temperature=0.3, generator=generator)
        y.sum().backward()
        noise = torch.zeros(500, dtype=torch.float64)
        if estimator == "gumbel":
            uniform = torch.empty(500).uniform_(
                1e-6, 1 - 1e-6, generator=torch.Generator().manual_seed(1)
            )
            noise = uniform.logit().double()
        relaxed = torch.tanh((smooth + noise) / scale)
        relaxed.sum().backward()
        assert torch.equal(y, torch.where(relaxed > 0, 1.0, -1.0).double())
        torch.testing.assert_close(leaf.grad, smooth.grad)
    assert not torch.equal(sign_ste(x, "gumbel"), sign_ste(x, "gumbel"))


def test_formats():
    x = torch.randn(7, 40)
    x[0] = 0
    codes, bits = pack_sign(x), (x > 0).numpy()
    little = np.packbits(bits, axis=1, bitorder="little")
    np.testing.assert_array_equal(formats.to_faiss(codes).numpy(), little)
    assert torch.equal(formats.from_faiss(torch.from_numpy(little)), codes)
    text = formats.to_pgvector(pack_sign(x[:, :37]), 37)
    assert text == ["".join("01"[bit] for bit in row[:37]) for row in bits.astype(int)]
    assert torch.equal(formats.from_pgvector(text), pack_sign(x[:, :37]))
    assert formats.from_pgvector([]).shape == (0, 0)
    for bad in (["01", "0"], ["02"]):
        with pytest.raises(ValueError, match="characters 0 or 1"):
            formats.from_pgvector(bad)
    with pytest.raises(ValueError, match="5 bytes wide for dim=37, got 4"):
        formats.to_pgvector(codes[:, :4], 37)
    with pytest.raises(TypeError, match="codes must have dtype int8, uint8"):
        formats.from_sentence_transformers(codes.int())


def test_formats_equal_those_of_sentence_transformers_and_faiss():
    quantization = pytest.importorskip("sentence_transformers.quantization")
    x = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    codes = pack_sign(torch.from_numpy(x))
    ubinary = quantization.quantize_embeddings(x, "ubinary")
    binary = torch.from_numpy(quantization.quantize_embeddings(x, "binary"))
    np.testing.assert_array_equal(codes.numpy(), ubinary)
    assert torch.equal(formats.to_sentence_transformers(codes), binary)
    assert torch.equal(formats.from_sentence_transformers(binary), codes)
    assert torch.equal(formats.from_sentence_transformers(codes), codes)
    faiss = pytest.importorskip("faiss", reason="needs emblas[bench]")
    packed = np.zeros((6, 8), np.uint8)
    faiss.fvecs2bitvecs(faiss.swig_ptr(x), faiss.swig_ptr(packed), 64, 6)
    np.testing.assert_array_equal(formats.to_faiss(codes).numpy(), packed)


def test_same_bits_for_any_thread_count(isa):
    x, rotation = torch.randn(3000, 100), HadamardRotation(100)
    check_threads(lambda: pack_sign(x, threshold=x[0]))
    check_threads(lambda: rotation(x))


def test_operator_contract():
    x, signs = torch.randn(5, 21), HadamardRotation(21).signs
    check_op("pack_sign", x)
    check_op("pack_sign", x, x[0].clone())
    check_op("hadamard_rotate", x, signs)
    check_op("hadamard_unrotate", x, signs)
    with only_kernels("pack_sign", "hadamard_rotate"):
        pack_sign(x, rotation=HadamardRotation(21), threshold=x[0])


def test_compiled():
    rotation = HadamardRotation(40)

    def binarize(x, threshold):
        return pack_sign(x * 2, rotation=rotation, threshold=threshold)

    threshold = torch.randn(40)
    calls = [(torch.randn(n, 40), threshold) for n in (2, 50, 7)]
    check_compiled(binarize, calls, backward=False)
    check_compiled(lambda x: sign_ste(rotation(x)), [call[:1] for call in calls], backward=True)
    check_compiled(
        lambda x: sign_ste(x, "tanh", temperature=0.5), [call[:1] for call in calls], backward=True
    )


def test_numpy_door(isa):
    x = np.random.default_rng(0).normal(size=(60, 45))
    for values in (x, x.astype(np.float32)):
        tensor = torch.from_numpy(values)
        np.testing.assert_array_equal(arrays.pack_sign(values), pack_sign(tensor).numpy())
        np.testing.assert_array_equal(
            arrays.pack_sign(values, values[0]), pack_sign(tensor, threshold=tensor[0]).numpy()
        )
    with pytest.raises(TypeError, match="threshold must be a C-contiguous array of float64"):
        arrays.pack_sign(x, x[0].astype(np.float32))
    with pytest.raises(ValueError, match="one value per dimension"):
        arrays.pack_sign(x, x[0, :9].copy())


X, CODES = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: pack_sign([1.0])),
        (TypeError, "x must have dtype", lambda: pack_sign(CODES)),
        (ValueError, "x must have at least 1 dim", lambda: pack_sign(torch.tensor(1.0))),
        (ValueError, "dims must be between 1 and 4, got 5", lambda: pack_sign(X, dims=5)),
        (TypeError, "threshold must be a torch.Tensor", lambda: pack_sign(X, threshold=0.5)),
        (ValueError, "threshold must have one value", lambda: pack_sign(X, threshold=X[0, :3])),
        (TypeError, "x must have dtype", lambda: sign_ste(CODES)),
        (ValueError, "estimator must be one of", lambda: sign_ste(X, "soft")),
        (ValueError, "estimator must be one of", lambda: SignBinarizer("soft")),
        (ValueError, "above 0, got 0", lambda: sign_ste(X, "tanh", temperature=0)),
        (TypeError, "codes must have dtype uint8", lambda: unpack_sign(CODES.int(), 32)),
        (ValueError, "codes must end in .* 5 bytes", lambda: unpack_sign(CODES, 33)),
        (ValueError, "dim and rounds must be at least 1", lambda: HadamardRotation(0)),
        (ValueError, "x must end in 5 dim", lambda: HadamardRotation(5)(X)),
        (ValueError, "kind must be one of", lambda: fit_threshold(X, "mode")),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    ops = torch.ops.emblas
    signs = HadamardRotation(4).signs
    for op, args in (
        (ops.pack_sign, (X, X[0, :3])),
        (ops.pack_sign, (X, X[0].double())),
        (ops.hadamard_rotate, (X, signs[:, :3])),
        (ops.hadamard_rotate, (X, signs.float())),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*args)
