from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    packed,
    peak_memory,
    tolerance,
)
from emblas import use_backend
from emblas.pooling import (
    AttentionPooling,
    LexicalWeights,
    SpladePooling,
    attention_pool,
    lexical_weights,
    vocab_pool,
)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (0, 5, 1, 30, 0, 4)
CU = packed(LENGTHS)
BOUNDS = list(pairwise(CU.tolist()))


def attention_oracle(x, queries, bounds, scale):
    out = torch.zeros(len(bounds), *queries.shape, dtype=torch.float64)
    for b, (begin, end) in enumerate(bounds):
        tokens = x[begin:end].double()
        if len(tokens):
            out[b] = (scale * queries.double() @ tokens.T).softmax(1) @ tokens
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_equals_oracle(isa, dtype):
    for dim, heads in ((1, 1), (33, 3), (128, 2)):
        x, queries = torch.randn(40, dim).to(dtype), 3 * torch.randn(heads, dim)
        expected = attention_oracle(x, queries, BOUNDS, dim**-0.5)
        limit = {k: 16 * v for k, v in tolerance(dtype, dim).items()}
        actual = attention_pool(x, queries, CU)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, **limit)
    huge = attention_pool(1e4 * torch.ones(40, 4), 1e4 * torch.ones(1, 4), CU)
    assert torch.isfinite(huge).all()


def test_attention_gradients(isa):
    names = ("attention_pool", "attention_pool_backward")
    x, queries = torch.randn(40, 3), torch.randn(2, 3)
    check_gradients(lambda x, q: attention_pool(x, q, CU), [x, queries], names)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    check_gradients(
        lambda x, q: attention_pool(x, q, mask=mask), [torch.randn(3, 5, 3), queries], names
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_backward_equals_reference(dtype):
    x, queries = torch.randn(40, 37).to(dtype), torch.randn(2, 37)
    grad, results = torch.randn(len(LENGTHS), 2, 37).to(dtype), []
    for backend in ("auto", "reference"):
        leaves = x.clone().requires_grad_(), queries.clone().requires_grad_()
        with use_backend(backend):
            out = attention_pool(*leaves, CU)
        out.backward(grad)
        results.append([out.detach(), leaves[0].grad, leaves[1].grad])
    limit = {k: 32 * v for k, v in tolerance(dtype, 37).items()}
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **limit)


def test_attention_contract():
    x, queries = torch.randn(40, 6), torch.randn(2, 6)
    out, lse = torch.ops.emblas.attention_pool(x, queries, CU, 0.5)
    check_op("attention_pool", x, queries, CU, 0.5)
    check_op("attention_pool_backward", out, x, queries, out, lse, CU, 0.5)
    padded = torch.full((6, 30, 6), torch.nan)
    mask = torch.arange(30)[None] >= 30 - torch.tensor(LENGTHS)[:, None]
    padded[mask] = x
    assert torch.equal(attention_pool(padded, queries, mask=mask), attention_pool(x, queries, CU))
    alone = attention_pool(x[6:36], queries, packed((30,)))
    assert torch.equal(alone[0], attention_pool(x, queries, CU)[3])
    calls = [(torch.randn(sum(n), 24), torch.randn(2, 24), packed(n)) for n in ((3, 4), (5, 0, 9))]
    check_compiled(attention_pool, calls, backward=True)
    x = torch.randn(3000, 64, requires_grad=True)

    def run():
        x.grad = None
        out = attention_pool(x, queries.repeat(1, 11)[:, :64], packed((1000, 500, 1500)))
        out.pow(2).sum().backward()
        return out.detach(), x.grad

    check_threads(run)


def vocab_oracle(x, weight, bias, bounds):
    out = torch.zeros(len(bounds), len(weight), dtype=torch.float64)
    for b, (begin, end) in enumerate(bounds):
        if end > begin:
            logits = x[begin:end].double() @ weight.double().T + bias.double()
            out[b] = logits.relu().log1p().max(0).values
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_vocab_equals_oracle(isa, dtype):
    for vocab in (1, 50, 1500):
        x, weight = torch.randn(40, 24).to(dtype), torch.randn(vocab, 24).to(dtype)
        bias = torch.randn(vocab)
        actual = vocab_pool(x, weight, bias, CU)
        # 16-bit matrix products round the logits, which are of the order of sqrt(24).
        limit = {k: 8 * v for k, v in tolerance(dtype, 24).items()}
        expected = vocab_oracle(x, weight, bias, BOUNDS)
        torch.testing.assert_close(actual.double(), expected, **limit)
    x, cu = torch.randn(2500, 8).to(dtype), packed((900, 300, 0, 1300))  # several tiles of tokens
    weight, bias = torch.randn(20, 8).to(dtype), torch.zeros(20)
    expected = vocab_oracle(x, weight, bias, list(pairwise(cu.tolist())))
    torch.testing.assert_close(vocab_pool(x, weight, bias, cu).double(), expected, **limit)


@pytest.mark.parametrize("activation", [None, "relu", "log1p_relu", "log1p_log1p_relu"])
def test_vocab_gradients(activation):
    names = ("vocab_max", "vocab_max_backward")
    x, weight, bias = torch.randn(40, 3), torch.randn(7, 3), torch.randn(7)
    check_gradients(
        lambda x, w, b: vocab_pool(x, w, b, CU, activation=activation), [x, weight, bias], names
    )
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    check_gradients(
        lambda x, w: vocab_pool(x, w, mask=mask, activation=activation),
        [torch.randn(3, 5, 3), weight],
        names,
    )


def test_vocab_contract():
    x, weight, bias = torch.randn(40, 6), torch.randn(9, 6), torch.randn(9)
    out, argmax = torch.ops.emblas.vocab_max(x, weight, bias, CU)
    check_op("vocab_max", x, weight, bias, CU)
    check_op("vocab_max_backward", out, x, weight, argmax, CU, None, True, True)
    calls = [
        (torch.randn(sum(n), 24), torch.randn(30, 24), torch.randn(30), packed(n))
        for n in ((3, 4), (5, 0, 9))
    ]
    check_compiled(vocab_pool, calls, backward=True)


def test_vocab_beside_sentence_transformers():
    peer = pytest.importorskip("sentence_transformers.sparse_encoder.modules").SpladePooling
    x, weight, bias = torch.randn(4, 9, 6), torch.randn(50, 6), torch.randn(50)
    mask = (torch.rand(4, 9) < 0.7).long()
    features = {"token_embeddings": x @ weight.T + bias, "attention_mask": mask}
    for theirs, ours in (("relu", "log1p_relu"), ("log1p_relu", "log1p_log1p_relu")):
        expected = peer(activation_function=theirs)(dict(features))["sentence_embedding"]
        actual = vocab_pool(x, weight, bias, mask=mask, activation=ours)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_peak_memory_at_a_vocabulary_of_250_000():
    vocab, tokens, batch = 250_000, 512, 2
    x = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    cu = packed((tokens // batch,) * batch)
    ids, weights = torch.randint(0, vocab, (tokens,)), torch.rand(tokens, requires_grad=True)

    def splade():
        vocab_pool(x, weight, None, cu).sum().backward()

    def lexical():
        lexical_weights(ids, weights, cu).values.sum().backward()

    vocab_pool(x, weight[:100], None, cu).sum().backward()
    lexical()
    logits = tokens * vocab * 4  # 512 MB
    assert peak_memory(splade) < logits / 10  # results, gradients and the 4 MiB tile
    assert peak_memory(lexical) < vocab * 4  # not even one row of the vocabulary


def test_lexical_weights():
    ids = torch.tensor([7, 2, 7, 9, 2, 7, 7, 1])
    weights = torch.tensor([0.5, 1, 0.75, 3, 0, 0.25, 0.25, -1], requires_grad=True)
    for backend in ("auto", "reference"):
        weights.grad = None
        with use_backend(backend):
            rows = lexical_weights(ids, weights, packed((4, 0, 4)), ignored_ids=[9])
        assert rows.crow_indices.tolist() == [0, 2, 2, 3]
        assert rows.col_indices.tolist() == [2, 7, 7]
        assert rows.values.tolist() == [1, 0.75, 0.25]
        rows.values.backward(torch.tensor([1.0, 2, 3]))
        assert weights.grad.tolist() == [0, 1, 2, 0, 0, 3, 0, 0]
    check_op("lexical_index", ids, weights.detach(), packed((4, 0, 4)), [9])
    assert lexical_weights(ids[:0], weights[:0], packed((0,))).values.shape == (0,)


X, Q = torch.zeros(4, 3), torch.zeros(2, 3)
FOUR = packed((4,))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "queries must have the shape", lambda: attention_pool(X, Q[:, :2], FOUR)),
        (ValueError, "queries must have the sh", lambda: attention_pool(X, Q.repeat(129, 1), FOUR)),
        (ValueError, "either cu_seqlens", lambda: attention_pool(X, Q)),
        (ValueError, "cu_seqlens must start", lambda: attention_pool(X, Q, FOUR + 1)),
        (ValueError, "weight must have the shape", lambda: vocab_pool(X, Q[:, :2], None, FOUR)),
        (TypeError, "weight must have dtype", lambda: vocab_pool(X, Q.double(), None, FOUR)),
        (ValueError, "bias must have one value", lambda: vocab_pool(X, Q, Q[0], FOUR)),
        (ValueError, "activation must be", lambda: vocab_pool(X, Q, None, FOUR, activation="exp")),
        (ValueError, "weights must have one", lambda: lexical_weights(FOUR, X[:, 0], FOUR)),
        (TypeError, "token_ids must have dtype", lambda: lexical_weights(X[:, 0], X[:, 0], FOUR)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    ops = torch.ops.emblas
    at = torch.full((1, 2), 4, dtype=torch.int32)
    for call in (
        lambda: ops.attention_pool(X, Q.double(), FOUR, 1.0),
        lambda: ops.vocab_max(X, Q[:, :2], None, FOUR),
        lambda: ops.vocab_max_backward(torch.ones(1, 2), X, Q, at, FOUR, None, True, True),
        lambda: ops.lexical_index(FOUR, X[0], FOUR, []),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            call()


@pytest.mark.parametrize("ln", [False, True])
def test_attention_pooling_is_pma(ln):
    """The folded projections against the module as published, step by step."""
    module = AttentionPooling(12, 4, num_seeds=2, compress_dim=8, ln=ln).double()
    x = torch.randn(40, 12).double()
    actual = module(x, CU)
    for b, (begin, end) in enumerate(BOUNDS):
        if begin == end:
            assert torch.equal(actual[b], torch.zeros(2, 8).double())
            continue
        inputs = (
            (module.fc_q, module.S[0]),
            (module.fc_k, x[begin:end]),
            (module.fc_v, x[begin:end]),
        )
        q, k, v = (layer(rows).unflatten(1, (4, 2)).transpose(0, 1) for layer, rows in inputs)
        heads = (q @ k.mT / 8**0.5).softmax(2) @ v
        out = module.ln0(module.S[0] + heads.transpose(0, 1).flatten(1))
        torch.testing.assert_close(actual[b], module.ln1(out + module.fc_o(out).relu()))
    actual.sum().backward()
    assert module.S.grad is not None
    assert module.fc_k.weight.grad is not None
    with pytest.raises(ValueError, match="num_heads must divide"):
        AttentionPooling(8, 3)


def test_vocabulary_modules():
    x, ids = torch.randn(40, 6), torch.randint(0, 9, (40,))
    decoder = torch.nn.Linear(6, 9)
    expected = vocab_pool(x, decoder.weight, decoder.bias, CU)
    assert torch.equal(SpladePooling(decoder)(x, CU), expected)
    module = LexicalWeights(6, ignored_ids=[0])
    rows = module(x, ids, CU)
    rows.values.sum().backward()
    assert module.sparse_linear.weight.grad is not None
    assert 0 not in rows.col_indices
