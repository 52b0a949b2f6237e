"""Vocabulary pooling by the sum, its largest entries, DupMAE; the rest is in test_learned.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contract import check_compiled, check_gradients, check_op, packed, peak_memory, tolerance
from emblas import use_backend
from emblas.pooling import LexicalWeights, SpladePooling, lexical_weights, op_vocab_sum, vocab_pool

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (0, 5, 1, 30, 0, 4)
CU = packed(LENGTHS)
BOUNDS = list(pairwise(CU.tolist()))
ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "log1p_relu": lambda x: x.relu().log1p(),
    "log1p_log1p_relu": lambda x: x.relu().log1p().log1p(),
}
NAMES = ("vocab_sum", "vocab_sum_backward")


def oracle(x, weight, bias, bounds, mode, activation="log1p_relu", skip=0):
    out = torch.zeros(len(bounds), len(weight), dtype=torch.float64)
    for b, (begin, end) in enumerate(bounds):
        logits = x[begin + skip : end].double() @ weight.double().T + bias.double()
        if len(logits):
            values = ACTIVATIONS[activation](logits)
            out[b] = values.sum(0) if mode == "sum" else values.amax(0)
    return out


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in either direction, with sequences across their borders."""
    monkeypatch.setattr(op_vocab_sum, "_TILE_TOKENS", 7)
    monkeypatch.setattr(op_vocab_sum, "_TILE_WORDS", 16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sum_equals_oracle(dtype, activation, small_tiles):
    for vocab in (1, 50):
        x, weight = torch.randn(40, 24).to(dtype), torch.randn(vocab, 24).to(dtype)
        bias = torch.randn(vocab)
        expected = oracle(x, weight, bias, BOUNDS, "sum", activation)
        limit = {k: 30 * 8 * v for k, v in tolerance(torch.float32, 24).items()}
        for backend in ("auto", "reference"):
            with use_backend(backend):
                actual = vocab_pool(x, weight, bias, CU, mode="sum", activation=activation)
            assert actual.dtype == (dtype if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(actual.double(), expected, **limit)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sum_gradients(activation, small_tiles):
    x, weight, bias = torch.randn(15, 3), torch.randn(20, 3), torch.randn(20)
    cu = packed((0, 5, 1, 9))
    check_gradients(
        lambda x, w, b: vocab_pool(x, w, b, cu, mode="sum", activation=activation, skip_prefix=1),
        [x, weight, bias],
        NAMES,
    )
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    check_gradients(
        lambda x, w: vocab_pool(x, w, mask=mask, mode="sum", activation=activation),
        [torch.randn(3, 5, 3), weight],
        NAMES,
    )


@pytest.mark.parametrize("mode", ["max", "sum"])
def test_padding_is_not_read(mode, small_tiles):
    x, weight, bias = torch.randn(40, 6), torch.randn(50, 6), torch.randn(50)
    mask = torch.arange(30)[None] >= 30 - torch.tensor(LENGTHS)[:, None]
    padded = torch.full((6, 30, 6), torch.nan)
    padded[mask] = x
    for skip in (None, 2, torch.tensor([0, 1, 9, 5, 3, 4])):
        results = []
        for tokens, where in ((x, {"cu_seqlens": CU}), (padded, {"mask": 3 * mask})):
            leaves = [t.clone().requires_grad_() for t in (tokens, weight, bias)]
            out = vocab_pool(*leaves, **where, mode=mode, skip_prefix=skip)
            out.sum().backward()
            grad_x = leaves[0].grad if tokens is x else leaves[0].grad[mask]
            results.append([out.detach(), grad_x, leaves[1].grad, leaves[2].grad])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        assert leaves[0].grad[~mask].count_nonzero() == 0


def test_sum_backward_equals_reference(small_tiles):
    for dtype in FLOATS:
        x, weight = torch.randn(40, 24).to(dtype), torch.randn(20, 24).to(dtype)
        bias, grad, results = torch.randn(20), torch.randn(6, 20), []
        for backend in ("auto", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            with use_backend(backend):
                out = vocab_pool(*leaves, CU, mode="sum")
            out.backward(grad.to(out.dtype))
            results.append([leaf.grad for leaf in leaves])
        limit = {k: 64 * v for k, v in tolerance(dtype, 40).items()}
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, **limit)


def test_sum_contract():
    x, weight, bias = torch.randn(40, 6), torch.randn(9, 6), torch.randn(9)
    present, starts, ends = torch.ones(40), CU[:-1].contiguous(), CU[1:].contiguous()
    out = torch.ops.emblas.vocab_sum(x, weight, bias, CU, 2)
    check_op("vocab_sum", x, weight, bias, CU, 2)
    check_op("vocab_sum", x, weight, None, starts, 3, present, ends)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        check_op("vocab_sum_backward", out, x, weight, bias, CU, 2, None, None, *needs)
    for actual, expected in zip(
        torch.ops.emblas.vocab_sum_backward(out, x, weight, bias, CU, 2, None, None, *[True] * 3),
        op_vocab_sum._backward_reference(out, x, weight, bias, CU, 2, None, None, *[True] * 3),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    calls = [
        (torch.randn(sum(n), 24), torch.randn(30, 24), torch.randn(30), packed(n))
        for n in ((3, 4), (5, 0, 9))
    ]
    check_compiled(
        lambda x, w, b, cu: vocab_pool(x, w, b, cu, mode="sum"), calls, backward=True
    )  # fmt: skip
    for mode in ("max", "sum"):
        none = vocab_pool(x[:0], weight, bias, packed((0, 0)), mode=mode)
        assert torch.equal(none, torch.zeros(2, 9))
        assert vocab_pool(x[:0], weight, bias, packed(()), mode=mode).shape == (0, 9)


def test_sum_beside_sentence_transformers():
    peer = pytest.importorskip("sentence_transformers.sparse_encoder.modules").SpladePooling
    x, weight, bias = torch.randn(4, 9, 6), torch.randn(50, 6), torch.randn(50)
    mask = (torch.rand(4, 9) < 0.7).long()
    features = {"token_embeddings": x @ weight.T + bias, "attention_mask": mask}
    for theirs, ours in (("relu", "log1p_relu"), ("log1p_relu", "log1p_log1p_relu")):
        pooling = peer("sum", activation_function=theirs)
        expected = pooling({k: v.clone() for k, v in features.items()})["sentence_embedding"]
        actual = vocab_pool(x, weight, bias, mask=mask, mode="sum", activation=ours)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["max", "sum"])
def test_largest_entries(mode):
    x, weight, bias = torch.randn(40, 3), torch.randn(60, 3), torch.randn(60)
    weight[7] = weight[40]
    bias[7] = bias[40]  # a tie
    weight = weight.requires_grad_()
    for activation in (None, "log1p_relu"):
        dense = vocab_pool(x, weight, bias, CU, mode=mode, activation=activation)
        for n in (1, 5, 59, 60):
            rows = vocab_pool(x, weight, bias, CU, mode=mode, activation=activation, top_n=n)
            assert rows.crow_indices.tolist() == [n * b for b in range(7)]
            for b, values in enumerate(dense.tolist()):
                best = sorted(range(60), key=lambda v, values=values: (-values[v], v))[:n]
                assert rows.col_indices[b * n : (b + 1) * n].tolist() == sorted(best)
            values = dense.gather(1, rows.col_indices.view(6, n)).flatten()
            assert torch.equal(rows.values, values)
    rows.values.sum().backward()
    assert weight.grad is not None
    x[0] = torch.nan  # of the second sequence; sizes stay
    rows = vocab_pool(x, weight, bias, CU, mode=mode, top_n=2)
    assert rows.values.isnan().tolist() == [False] * 2 + [True] * 2 + [False] * 8


def test_dupmae():
    """The largest logits of all tokens but the first, as they are (arXiv 2211.08769)."""
    x, weight, bias = torch.randn(40, 6), torch.randn(50, 6), torch.randn(50)
    expected = oracle(x, weight, bias, BOUNDS, "max", None, skip=1)
    actual = vocab_pool(x, weight, bias, CU, activation=None, skip_prefix=1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[2], torch.zeros(50))  # nothing but a first token
    check_gradients(
        lambda x, w, b: vocab_pool(x, w, b, CU, activation=None, skip_prefix=1),
        [torch.randn(40, 3), torch.randn(7, 3), torch.randn(7)],
        ("vocab_max", "vocab_max_backward"),
    )


def test_peak_memory_at_a_vocabulary_of_250_000():
    vocab, tokens, batch = 250_000, 512, 2
    x = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    cu = packed((tokens // batch,) * batch)

    def pool(weight, **options):
        x.grad = None
        out = vocab_pool(x, weight, None, cu, **options)
        (out.values if "top_n" in options else out).sum().backward()

    logits = tokens * vocab * 4  # 512 MB
    for options in ({"mode": "sum"}, {"top_n": 64}):
        pool(weight[:100], **options)
        weight.grad = None
        assert peak_memory(lambda options=options: pool(weight, **options)) < logits / 10


def test_modules():
    x, ids, decoder = torch.randn(40, 6), torch.randint(0, 9, (40,)), torch.nn.Linear(6, 9)
    rows = SpladePooling(decoder, mode="sum", top_n=4)(x, CU, skip_prefix=1)
    expected = vocab_pool(
        x, decoder.weight, decoder.bias, CU, mode="sum", skip_prefix=1, top_n=4
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    # Lexical weights of a padded batch, whose padding holds anything.
    mask = torch.arange(30)[None] < torch.tensor(LENGTHS)[:, None]
    padded, padded_ids = torch.full((6, 30, 6), torch.nan), torch.full((6, 30), 3)
    padded[mask], padded_ids[mask] = x, ids
    module, results = LexicalWeights(6, ignored_ids=[0]), []
    for rows in (module(x, ids, CU), module(padded, padded_ids, mask=mask)):
        module.zero_grad()
        rows.values.sum().backward()
        results.append([t.detach() for t in rows])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, W, FOUR = torch.zeros(4, 3), torch.zeros(5, 3), packed((4,))
ARGS = X, W, None, FOUR
IDS, NAN = torch.arange(4), torch.full((4,), torch.nan)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "mode must be one of", lambda: vocab_pool(*ARGS, mode="mean")),
        (ValueError, "top_n must be between 1 and 5", lambda: vocab_pool(*ARGS, top_n=6)),
        (ValueError, "top_n must be between 1 and 5", lambda: vocab_pool(*ARGS, top_n=0)),
        (ValueError, "skip_prefix must have", lambda: vocab_pool(*ARGS, skip_prefix=FOUR)),
        (ValueError, "skip_prefix must not be", lambda: vocab_pool(
            X, W, None, FOUR, skip_prefix=-FOUR[1:])),
        (ValueError, "cu_seqlens must start", lambda: vocab_pool(X, W, None, FOUR + 1, mode="sum")),
        (ValueError, "cu_seqlens must start", lambda: vocab_pool(
            X, W, None, packed((3, -2, 3)), skip_prefix=1)),
        (ValueError, "mask must have the shape", lambda: vocab_pool(
            X[None], W, mask=torch.ones(1, 3))),
        (ValueError, "weights must not hold NaN", lambda: lexical_weights(IDS, NAN, FOUR)),
        (ValueError, "mask must have the shape", lambda: lexical_weights(
            IDS[None], NAN[None], mask=torch.ones(1, 3))),
        (ValueError, "either cu_seqlens", lambda: lexical_weights(IDS, X[:, 0])),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
