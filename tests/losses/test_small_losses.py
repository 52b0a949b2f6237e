"""Losses of pairs, of lists, of teachers, and the spread-out regularizer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from emblas import losses
from emblas.losses import distill, listwise_rank, self_distill, spread_out
from scipy import stats

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cosine(a, b):
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# --- oracles: the formulas of the docstrings, on float64 arrays, a pair at a time ----------------


def cosine_oracle(c, y):
    return mean((a - b) ** 2 for a, b in zip(c, y, strict=True))


def contrastive_oracle(c, y, margin=0.5):
    return mean(t * (1 - s) ** 2 + (1 - t) * max(0, margin - (1 - s)) ** 2
                for s, t in zip(c, y, strict=True)) / 2  # fmt: skip


def pearson_oracle(c, y):
    return 1 - stats.pearsonr(c, y).statistic


def cosent_oracle(c, y, temperature=0.05, weighted=False):
    pairs = [(i, j) for i in range(len(c)) for j in range(len(c)) if y[i] > y[j]]
    if not pairs:
        return 0.0
    typical = mean(y[i] - y[j] for i, j in pairs)
    total = 1.0
    for i, j in pairs:
        weight = min(5, (y[i] - y[j]) / typical) if weighted else 1
        total += weight * math.exp((c[j] - c[i]) / temperature)
    return math.log(total)


def rank_kl_oracle(c, y, temperature=0.05):
    ranks = (stats.rankdata(y) - 1) / (len(y) - 1)
    return stats.entropy(softmax(ranks / temperature), softmax(np.asarray(c) / temperature))


def preference_oracle(c, y, temperature=0.05):
    found = []
    for k in range(len(c)):
        lower = [j for j in range(len(c)) if y[j] < y[k]]
        if lower:
            own = max(y[k] - y[j] for j in lower) * c[k] / temperature
            others = [(y[k] - y[j]) * c[j] / temperature for j in lower]
            found.append(-math.log(softmax([own, *others])[0]))
    return mean(found)


PAIRS = {
    "cosine_loss": (cosine_oracle, {}),
    "contrastive_loss": (contrastive_oracle, {"margin": 0.8}),
    "pearson_loss": (pearson_oracle, {}),
    "cosent_loss": (cosent_oracle, {"temperature": 0.2}),
    "cosent_loss, weighted": (cosent_oracle, {"temperature": 0.2, "weighted": True}),
    "rank_kl_loss": (rank_kl_oracle, {"temperature": 0.1}),
    "preference_loss": (preference_oracle, {"temperature": 0.3}),
}


def pair_loss(name):
    oracle, options = PAIRS[name]
    function = getattr(losses, name.split(",")[0])
    return oracle, lambda a, b, y: function(a, b, y, **options), options


@pytest.fixture(params=[1, 8 << 20], ids=["rows by themselves", "one block"])
def blocks(request, monkeypatch):
    """Losses over all pairs by blocks of this many bytes."""
    monkeypatch.setattr("emblas.losses.blocks.BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pairs_equal_oracle(name, dtype):
    oracle, function, options = pair_loss(name)
    a, b = torch.randn(11, 7).to(dtype), torch.randn(11, 7).to(dtype)
    labels = (torch.randint(0, 6, (11,)) / 5).clamp(max=1)
    if name == "contrastive_loss":
        labels = labels.round()
    actual = function(a, b, labels)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    c = [cosine(x, y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    assert actual.item() == pytest.approx(oracle(c, labels.tolist(), **options), rel=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(a, b, labels), actual)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_gradients(name):
    _, function, _ = pair_loss(name)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.2, 0.6], dtype=torch.float64)
    inputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: function(a, b, labels), inputs)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_degenerate(name):
    """No pairs, one pair, equal labels, zero vectors: finite, with finite gradients."""
    _, function, _ = pair_loss(name)
    for rows, labels in ((0, []), (1, [0.5]), (4, [1.0] * 4), (4, [0, 1, 1, 0])):
        for a in (torch.zeros(rows, 3), torch.randn(rows, 3), torch.ones(rows, 3)):
            a = a.requires_grad_()
            loss = function(a, torch.ones(rows, 3), torch.tensor(labels))
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(a.grad).all()
            if rows == 0:
                assert loss.item() == 0


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_triplet(distance):
    x = [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    far = {"cosine": lambda a, b: 1 - cosine(a, b),
           "euclidean": lambda a, b: np.linalg.norm(a - b)}[distance]  # fmt: skip
    rows = zip(*(t.detach().numpy() for t in x), strict=True)
    expected = mean(max(0, far(a, p) - far(a, n) + 0.3) for a, p, n in rows)
    actual = losses.triplet_loss(*x, margin=0.3, distance=distance)
    assert actual.item() == pytest.approx(expected)

    def run(*x):
        return losses.triplet_loss(*x, margin=0.3, distance=distance)

    assert torch.autograd.gradcheck(run, x)
    same = torch.ones(2, 3, requires_grad=True)
    run(same, same, same).backward()
    assert torch.isfinite(same.grad).all()


def list_oracle(scores, relevance, mask, method):
    found = []
    for s, y, m in zip(scores.double().numpy(), relevance.double().numpy(), mask, strict=True):
        s, y = s[m], y[m]
        if method == "ranknet":
            orders = itertools.permutations(range(len(s)), 2)
            pairs = [math.log1p(math.exp(s[j] - s[i])) for i, j in orders if y[i] > y[j]]
            found += [mean(pairs)] if pairs else []
        elif len(s) and method == "listmle":
            s = s[np.argsort(-y, kind="stable")]
            found.append(sum(-math.log(softmax(s[k:])[0]) for k in range(len(s))))
        elif len(s):
            found.append(-(softmax(y) * np.log(softmax(s))).sum())
    return mean(found)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("method", ["ranknet", "listmle", "listnet"])
def test_listwise_rank(method):
    relevance = torch.randint(0, 4, (5, 6)).float()
    mask = torch.rand(5, 6) < 0.7
    mask[1], mask[2, 1:] = False, False
    for dtype in FLOATS:
        scores = torch.randn(5, 6).to(dtype)
        for m in (mask, torch.ones_like(mask)):
            expected = list_oracle(scores / 0.5, relevance, m.numpy(), method)
            actual = listwise_rank(scores, relevance, method, mask=m, temperature=0.5)
            assert actual.item() == pytest.approx(expected, rel=1e-5)
    scores = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: listwise_rank(s, relevance, method, mask=mask), [scores]
    )
    for shape in ((0, 3), (2, 0), (2, 1)):
        empty = torch.zeros(shape, requires_grad=True)
        loss = listwise_rank(empty, torch.zeros(shape), method)
        loss.backward()
        assert loss.item() == 0
        assert torch.isfinite(empty.grad).all()


def distill_oracle(
    s, t, method, a=None, b=None, temperature=None, margin=0.015, similarity="cosine"
):
    n = len(s)
    like = cosine if similarity == "cosine" else np.dot
    if method == "cosine":
        return mean(1 - cosine(s[i], t[i]) for i in range(n))
    if method == "euclidean":
        return mean(np.linalg.norm(s[i] - t[i]) ** 2 for i in range(n))
    others = range(n) if a is None else range(len(a))
    S = [[like(s[i], (s if a is None else a)[j]) for j in others] for i in range(n)]
    T = [[like(t[i], (t if b is None else b)[j]) for j in others] for i in range(n)]
    keep = [[j for j in others if a is not None or j != i] for i in range(n)]
    if method == "relative":
        return mean(max(0, S[i][k] - S[i][j] + margin) for i in range(n)
                    for j in keep[i] for k in keep[i] if T[i][j] > T[i][k])  # fmt: skip
    if temperature is None:
        return mean((S[i][j] - T[i][j]) ** 2 for i in range(n) for j in keep[i])
    return mean(stats.entropy(softmax([T[i][j] / temperature for j in keep[i]]),
                              softmax([S[i][j] / temperature for j in keep[i]]))
                for i in range(n) if keep[i])  # fmt: skip


DISTILL = [
    ("cosine", False, {}),
    ("euclidean", False, {}),
    ("similarity", False, {}),
    ("similarity", False, {"temperature": 0.2}),
    ("relative", False, {"margin": 0.1}),
    ("anchor", True, {}),
    ("anchor", True, {"temperature": 0.2}),
    ("anchor", True, {"temperature": 1.0, "similarity": "dot"}),
    ("similarity", False, {"similarity": "dot"}),
    ("relative", False, {"margin": 0.1, "similarity": "dot"}),
]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("method", "anchored", "options"), DISTILL)
def test_distill(method, anchored, options):
    d = torch.float64
    teacher_dim = 4 if method in ("cosine", "euclidean") else 5
    s, t = torch.randn(6, 4, dtype=d), torch.randn(6, teacher_dim, dtype=d)
    anchors = (torch.randn(3, 4, dtype=d), torch.randn(3, 5, dtype=d)) if anchored else None
    a, b = (x.numpy() for x in anchors) if anchors else (None, None)
    expected = distill_oracle(s.numpy(), t.numpy(), method, a, b, **options)
    actual = distill(s, t, method, anchors=anchors, **options)
    assert actual.item() == pytest.approx(expected)
    small = distill(s.bfloat16(), t.float(), method,
                    anchors=anchors and tuple(x.float() for x in anchors), **options)  # fmt: skip
    assert small.dtype == torch.float32
    assert small.item() == pytest.approx(expected, rel=0.1)

    def run(s, *own):
        return distill(s, t, method, anchors=(own[0], anchors[1]) if own else None, **options)

    inputs = [s.requires_grad_()] + ([anchors[0].requires_grad_()] if anchored else [])
    assert torch.autograd.gradcheck(run, inputs)
    for rows in (0, 1):
        few = s[:rows].detach().requires_grad_()
        loss = distill(few, t[:rows], method, anchors=anchors, **options)
        loss.backward()
        assert torch.isfinite(few.grad).all()
        assert loss.item() == pytest.approx(distill_oracle(
            few.detach().numpy(), t[:rows].numpy(), method, a, b, **options))  # fmt: skip


def test_distributions_over_a_vocabulary_take_little_memory():
    """No logits of n x vocabulary are kept for the backward pass, nor ever held at once."""
    n, vocabulary = 512, 30_000
    student, teacher = torch.randn(n, 16, requires_grad=True), torch.randn(n, 24)
    tables = torch.randn(vocabulary, 16), torch.randn(vocabulary, 24)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (held.append(x.numel()), x)[1],
                                                  lambda x: x):  # fmt: skip
        loss = distill(student, teacher, "anchor", anchors=tables, temperature=1.0,
                       similarity="dot")  # fmt: skip
    assert max(held) <= vocabulary * 24
    loss.backward()
    rows = slice(0, 3)
    few = distill(student[rows], teacher[rows], "anchor", anchors=tables, temperature=1.0,
                  similarity="dot")  # fmt: skip
    logits = [x[rows].detach().double() @ table.double().T
              for x, table in zip((student, teacher), tables, strict=True)]  # fmt: skip
    expected = torch.nn.functional.kl_div(
        logits[0].log_softmax(1), logits[1].log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert few.item() == pytest.approx(expected.item(), rel=1e-4)


def test_self_distill():
    scores = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = {"teacher_weights": (1, 0.3, 1), "weights": (1, 0.1, 1), "temperature": 0.5}
    x = [s.detach().numpy() / 0.5 for s in scores]
    teacher = [softmax(row) for row in x[0] + 0.3 * x[1] + x[2]]
    expected = mean(mean(-w * (teacher[i] * np.log(softmax(s[i]))).sum() for i in range(4))
                    for s, w in zip(x, (1, 0.1, 1), strict=True))  # fmt: skip
    assert self_distill(scores, **options).item() == pytest.approx(expected)
    # Against the teacher held fixed: it receives no gradient.
    self_distill(scores, **options).backward()
    fixed = torch.tensor(np.stack(teacher))
    for s, w in zip(scores, (1, 0.1, 1), strict=True):
        expected = w * ((s.detach() / 0.5).softmax(1) - fixed) / 0.5 / 12
        torch.testing.assert_close(s.grad, expected)


def test_spread_out():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = x.detach().numpy()
    expected = mean(cosine(a, b) ** 2 for a, b in itertools.permutations(rows, 2))
    assert spread_out(x).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(spread_out, [x])
    many = spread_out(torch.randn(4000, 64)).item()
    assert many == pytest.approx(1 / 64, rel=0.02)
    for few in (torch.zeros(0, 3), torch.ones(1, 3), torch.zeros(4, 3)):
        few.requires_grad_()
        loss = spread_out(few)
        loss.backward()
        assert loss.item() == 0
        assert not few.grad.any()
    low = torch.randn(50, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert spread_out(low).item() == pytest.approx(spread_out(low.double()).item(), rel=1e-4)


def test_compiled():
    def run(a, b, y):
        return (
            losses.cosent_loss(a, b, y) + losses.pearson_loss(a, b, y) + spread_out(a)
            + losses.rank_kl_loss(a, b, y) + distill(a, b, "similarity")
        )  # fmt: skip

    a, b, y = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4), torch.rand(9)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(run(a, b, y), a)
    (actual,) = torch.autograd.grad(compiled(a, b, y), a)
    torch.testing.assert_close(actual, expected)


X, Y = torch.ones(2, 3), torch.ones(2)
BAD = X / 0


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "a must be finite, got inf", lambda: losses.cosine_loss(BAD, X, Y)),
        (ValueError, "b must have 2 rows", lambda: losses.pearson_loss(X, X[:1], Y)),
        (ValueError, "labels must be finite", lambda: losses.cosent_loss(X, X, Y / 0)),
        (ValueError, r"labels must have shape \(2,\)", lambda: losses.rank_kl_loss(X, X, X)),
        (ValueError, "temperature must be positive",
         lambda: losses.preference_loss(X, X, Y, temperature=-1)),
        (ValueError, "margin must be positive", lambda: losses.contrastive_loss(X, X, Y, margin=0)),
        (ValueError, "distance must be one of",
         lambda: losses.triplet_loss(X, X, X, distance="l1")),
        (ValueError, "negatives must have vectors", lambda: losses.triplet_loss(X, X, X[:, :2])),
        (ValueError, "method must be one of", lambda: listwise_rank(X, X, "mle")),
        (ValueError, "scores must be finite", lambda: listwise_rank(BAD, X)),
        (ValueError, "relevance must have shape", lambda: listwise_rank(X, Y)),
        (TypeError, "mask must have dtype bool", lambda: listwise_rank(X, X, mask=X)),
        (ValueError, "teacher must have 2 rows", lambda: distill(X, X[:1])),
        (ValueError, "teacher must be another", lambda: distill(X, X)),
        (ValueError, "teacher must have vectors of dim", lambda: distill(X, X[:, :2])),
        (ValueError, "teacher must be finite", lambda: distill(X, BAD)),
        (ValueError, "anchors belong to", lambda: distill(X, X + 1, "anchor")),
        (ValueError, "similarity has no meaning", lambda: distill(X, X + 1, similarity="dot")),
        (ValueError, "similarity has no meaning",
         lambda: distill(X, X + 1, "euclidean", similarity="dot")),
        (ValueError, "teacher must have vectors of dim",
         lambda: distill(X, X[:, :2], "euclidean")),
        (ValueError, "temperature has no meaning", lambda: distill(X, X + 1, temperature=1.0)),
        (ValueError, r"anchors\[1\] must have 1 rows",
         lambda: distill(X, X + 1, "anchor", anchors=(X[:1], X))),
        (ValueError, "scores must hold", lambda: self_distill([])),
        (ValueError, r"scores\[1\] must have shape", lambda: self_distill([X, X[:1]])),
        (ValueError, "weights must have 2 values", lambda: self_distill([X, X], weights=[1])),
        (ValueError, "x must be finite", lambda: spread_out(BAD)),
        (TypeError, "x must have dtype", lambda: spread_out(X.long())),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
