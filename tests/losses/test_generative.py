"""Likelihoods of tokens behind embeddings, and AutoRegEmbed's objectives made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract import check_compiled, tolerance
from emblas import use_backend
from emblas.losses import info_nce, likelihood_alignment, token_log_probs

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IDS = torch.tensor([[3, 7, 1], [9, -1, -1], [-1, -1, -1], [0, 19, -1], [5, 6, 2]])


def problem(dtype=torch.float64):
    return torch.randn(5, 6, dtype=dtype), torch.randn(20, 6, dtype=dtype)


def oracle(x, vocabulary, ids, temperature=1.0):
    logits = (x.double() @ vocabulary.double().t() / temperature).log_softmax(1)
    return torch.where(ids >= 0, logits.gather(1, ids.clamp_min(0)), 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_token_log_probs(dtype):
    x, vocabulary = problem(dtype)
    for ids in (IDS, IDS[:, 0]):
        for chunk in (None, 2):
            actual = token_log_probs(x, vocabulary, ids, temperature=0.7, chunk_size=chunk)
            expected = oracle(x, vocabulary, ids.view(5, -1), 0.7).view(ids.shape)
            assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(actual.double(), expected, **tolerance(actual.dtype, 120))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_log_probs(x, vocabulary, IDS), token_log_probs(x, vocabulary, IDS))


def test_gradients():
    inputs = [x.requires_grad_() for x in problem()]
    assert torch.autograd.gradcheck(lambda x, v: token_log_probs(x, v, IDS, chunk_size=2), inputs)
    grads = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            total = (token_log_probs(*inputs, IDS) * torch.arange(3)).sum()
            grads.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(*grads)


def test_no_rows_and_one_token():
    x, vocabulary = problem()
    assert token_log_probs(x[:0], vocabulary, IDS[:0]).shape == (0, 3)
    leaf = x.clone().requires_grad_()
    alone = token_log_probs(leaf, vocabulary[:1], torch.tensor([0, -1, 0, 0, -1]))
    alone.sum().backward()
    assert not alone.any()
    assert not leaf.grad.any()


def test_what_is_made_of_it():
    """Cross-entropy, and a distribution over words as a target: the divergence up to a constant."""
    x, vocabulary = problem()
    ids = torch.randint(20, (5,))
    options = {"similarity": "dot", "temperature": 1.0}
    torch.testing.assert_close(
        -token_log_probs(x, vocabulary, ids).mean(), info_nce(x, vocabulary, targets=ids, **options)
    )
    words = torch.stack([torch.randperm(20)[:4] for _ in range(5)])
    weights = torch.rand(5, 4).double().softmax(1)
    target = torch.zeros(5, 20).double().scatter(1, words, weights)
    expected = torch.nn.functional.kl_div(
        (x @ vocabulary.t()).log_softmax(1), target, reduction="batchmean"
    )
    actual = -(weights * token_log_probs(x, vocabulary, words)).sum(1).mean()
    torch.testing.assert_close(actual + (weights * weights.log()).sum(1).mean(), expected)


def test_compiled():
    calls = [(torch.randn(n, 8), torch.randn(m, 8), torch.randint(m, (n,))) for n, m in
             ((4, 6), (7, 9), (12, 30))]  # fmt: skip
    check_compiled(lambda x, v, ids: token_log_probs(x * 2, v, ids), calls, backward=True)


def alignment_oracle(positive, itself, negatives, reference=None, beta=0.1, temperature=0.1):
    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    found = []
    for i in range(len(positive)):
        near = math.exp(-sigmoid(beta * abs(positive[i] - itself[i])) / temperature)
        for j in range(len(negatives[i])):
            gap = positive[i] - negatives[i][j]
            if reference is not None:
                gap += reference[0][i] - reference[1][i][j]
            found.append(-math.log(near / (near + math.exp(-sigmoid(beta * gap) / temperature))))
    return np.mean(found) if found else 0.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (4, 0), (0, 2)])
def test_likelihood_alignment(dtype, shape):
    n, _ = shape
    draws = (-9 * torch.rand(s) for s in ((n,), (n,), shape, (n,), shape))
    positive, itself, negatives, *reference = (x.to(dtype) for x in draws)
    for known in (None, tuple(reference)):
        options = {"beta": 0.3, "temperature": 0.5}
        actual = likelihood_alignment(positive, itself, negatives, reference=known, **options)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        lists = [x.double().tolist() for x in (positive, itself, negatives)]
        expected = alignment_oracle(
            *lists, known and [x.double().tolist() for x in known], **options
        )
        assert actual.item() == pytest.approx(expected, rel=1e-5)
    if dtype == torch.float64:
        inputs = [x.requires_grad_() for x in (positive, itself, negatives)]
        assert torch.autograd.gradcheck(
            lambda *x: likelihood_alignment(*x, reference=tuple(reference)), inputs
        )


X, V = torch.ones(2, 3), torch.ones(4, 3)
L = torch.ones(2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "vocabulary must have vectors", lambda: token_log_probs(X, V[:, :2], L)),
        (ValueError, "vocabulary must have at least 1 row, got none",
         lambda: token_log_probs(X, V[:0], torch.tensor([-1, -1]))),
        (TypeError, "token_ids must be a torch.Tensor, got NoneType",
         lambda: token_log_probs(X, V, None)),
        (TypeError, "token_ids must have dtype int64", lambda: token_log_probs(X, V, L)),
        (ValueError, "token_ids must lie between -1 and 3",
         lambda: token_log_probs(X, V, torch.tensor([0, 4]))),
        (ValueError, "token_ids must name a row once",
         lambda: token_log_probs(X, V, torch.tensor([[0, 1], [2, 2]]))),
        (ValueError, r"token_ids must have shape \(2,\)",
         lambda: token_log_probs(X, V, torch.tensor([0]))),
        (ValueError, "temperature must be positive",
         lambda: token_log_probs(X, V, torch.tensor([0, 1]), temperature=0)),
        (ValueError, "chunk_size must be at least 1",
         lambda: token_log_probs(X, V, torch.tensor([0, 1]), chunk_size=0)),
        (ValueError, "positive must have 1 dim", lambda: likelihood_alignment(X, L, X)),
        (ValueError, r"itself must have shape \(2,\)", lambda: likelihood_alignment(L, X, X)),
        (ValueError, r"negatives must have shape \(2, 3\)", lambda: likelihood_alignment(L, L, V)),
        (ValueError, r"reference\[1\] must have shape",
         lambda: likelihood_alignment(L, L, X, reference=(L, L))),
        (ValueError, "beta must be positive", lambda: likelihood_alignment(L, L, X, beta=0)),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
