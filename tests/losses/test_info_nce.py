from __future__ import annotations

import math

import pytest
import torch
from contract import check_compiled, tolerance
from emblas import use_backend
from emblas.losses import InfoNCE, info_nce, mix_negatives
from hypothesis import given
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cosine(a, b):
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def one_loss(positive, negative, how, focal):
    """The loss of one query (or document), from lists of scores."""
    if not positive:
        return 0.0

    def log_sum(scores):
        top = max(scores)
        return top + math.log(sum(math.exp(s - top) for s in scores))

    if how == "sum":
        loss = log_sum(positive + negative) - log_sum(positive)
    else:
        rest = {"each": [], "mean": positive}[how]
        losses = [log_sum((rest or [p]) + negative) - p for p in positive]
        loss = sum(losses) / len(losses)
    return (1 - math.exp(-loss)) ** focal * loss if focal else loss


def oracle(
    queries, documents, *, temperature=0.05, targets=None, negatives=None, positives="each",
    query_ids=None, document_ids=None, mask=None, margin=None, guide=None, guide_margin=0.0,
    symmetric=False, similarity="cosine", weights=None, focal=0.0, reduction="mean",
):  # fmt: skip
    """The definition, one pair at a time, in float64."""
    compare = cosine if similarity == "cosine" else lambda a, b: float(a @ b)
    q, d = queries.double(), documents.double()
    n, m = len(q), len(d)
    targets = torch.arange(n) if targets is None else targets
    targets = targets[:, None] if targets.dim() == 1 else targets
    wanted = [[t for t in row if t >= 0] for row in targets.tolist()]
    sims = [[compare(a, b) for b in d] for a in q]
    weight = [1.0] * n if weights is None else weights.tolist()

    def is_negative(i, j):
        if j in wanted[i]:
            return False
        if query_ids is not None and query_ids[i] == document_ids[j]:
            return False
        if mask is not None and not mask[i, j]:
            return False
        if margin is not None and wanted[i]:
            best = max(sims[i][t] for t in wanted[i])
            if sims[i][j] > best + margin:
                return False
        if guide is not None and wanted[i]:
            found = [cosine(guide[0][i].double(), g) for g in guide[1].double()]
            if found[j] > max(found[t] for t in wanted[i]) - guide_margin:
                return False
        return True

    losses, shares = [], []
    for i in range(n):
        negative = [sims[i][j] for j in range(m) if is_negative(i, j)]
        if negatives is not None:
            own = [compare(q[i], h) for h in negatives[i].double()]
            if margin is not None and wanted[i]:
                own = [s for s in own if s <= max(sims[i][t] for t in wanted[i]) + margin]
            negative += own
        positive = [sims[i][t] / temperature for t in wanted[i]]
        negative = [s / temperature for s in negative]
        losses.append(one_loss(positive, negative, positives, focal))
        shares.append(weight[i] if positive else 0.0)
    if reduction == "none":
        return torch.tensor([loss * s for loss, s in zip(losses, shares, strict=True)]).double()

    def total(losses, shares):
        value = sum(loss * s for loss, s in zip(losses, shares, strict=True))
        return value / (sum(shares) or 1) if reduction == "mean" else value

    result = total(losses, shares)
    if symmetric:
        losses, shares = [], []
        for j in range(m):
            own = [i for i in range(n) if j in wanted[i]]
            negative = [sims[i][j] / temperature for i in range(n) if is_negative(i, j)]
            positive = [sims[i][j] / temperature for i in own]
            losses.append(one_loss(positive, negative, positives, focal))
            shares.append(sum(weight[i] for i in own) / len(own) if own else 0.0)
        result = (result + total(losses, shares)) / 2
    return torch.tensor(result, dtype=torch.float64)


def problem(n=9, m=13, dim=6, seed=0):
    """Vectors, and settings that use every option."""
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g}
    targets = torch.stack([torch.randperm(m, **draw)[:3] for _ in range(n)])
    targets[torch.rand(n, 3, **draw) < 0.4] = -1
    everything = {
        "targets": targets,
        "negatives": torch.randn(n, 2, dim, **draw),
        "query_ids": torch.randint(0, 4, (n,), **draw),
        "document_ids": torch.randint(0, 9, (m,), **draw),
        "mask": torch.rand(n, m, **draw) < 0.8,
        "margin": 0.3,
        "guide": (torch.randn(n, 4, **draw), torch.randn(m, 4, **draw)),
        "guide_margin": 0.05,
        "weights": torch.rand(n, **draw),
        "focal": 0.5,
        "temperature": 0.2,
    }
    return torch.randn(n, dim, **draw), torch.randn(m, dim, **draw), everything


OPTIONS = [
    ("temperature",),
    ("targets",),
    ("negatives",),
    ("query_ids", "document_ids"),
    ("mask",),
    ("margin", "negatives"),
    ("guide", "guide_margin"),
    ("weights",),
    ("focal",),
    tuple(problem()[2]),
]


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_oracle(names, symmetric):
    queries, documents, everything = problem()
    options = {name: everything[name] for name in names}
    for positives in ("each", "mean", "sum") if "targets" in names else ("each",):
        for reduction in ("mean", "sum") if symmetric else ("mean", "sum", "none"):
            more = {"symmetric": symmetric, "positives": positives, "reduction": reduction}
            expected = oracle(queries, documents, **options, **more)
            actual = info_nce(queries, documents, chunk_size=4, **options, **more)
            torch.testing.assert_close(
                actual.double(), expected, rtol=2e-5, atol=2e-5, msg=str(more)
            )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(similarity, dtype):
    queries, documents = torch.randn(20, 33).to(dtype), torch.randn(25, 33).to(dtype)
    for symmetric in (False, True):
        options = {"temperature": 0.5, "similarity": similarity, "symmetric": symmetric}
        actual = info_nce(queries, documents, **options)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = oracle(queries, documents, **options)
        # The inputs are exact: the error is that of float32 sums (float64 ones), for any dtype.
        torch.testing.assert_close(actual.double(), expected, **tolerance(actual.dtype, 33 * 25))


@given(
    n=st.integers(0, 12), extra=st.integers(0, 5), dim=st.integers(1, 9),
    chunk=st.integers(1, 14), seed=st.integers(0, 2**31), symmetric=st.booleans(),
    strided=st.booleans(),
)  # fmt: skip
def test_any_shape(n, extra, dim, chunk, seed, symmetric, strided):
    g = torch.Generator().manual_seed(seed)
    queries, documents = (torch.randn(r, 2 * dim, generator=g) for r in (n, n + extra))
    queries, documents = (x[:, ::2] if strided else x[:, :dim] for x in (queries, documents))
    q, d = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    actual = info_nce(q, d, symmetric=symmetric, chunk_size=chunk)
    expected = oracle(queries, documents, symmetric=symmetric)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=2e-5, atol=2e-5)
    plain = info_nce(queries, documents, symmetric=symmetric)
    torch.testing.assert_close(plain.double(), expected, rtol=2e-5, atol=2e-5)
    actual.backward()
    assert torch.isfinite(q.grad).all()
    assert torch.isfinite(d.grad).all()


def leaves(queries, documents, options):
    """Float64 copies that require grad, and a function of them."""
    options = dict(options)
    inputs = [queries, documents, torch.tensor(options.pop("temperature", 0.1))]
    if "negatives" in options:
        inputs.append(options.pop("negatives"))
    inputs = [x.detach().double().clone().requires_grad_() for x in inputs]

    def run(q, d, temperature, *negatives, **more):
        extra = {"negatives": negatives[0]} if negatives else {}
        return info_nce(q, d, temperature=temperature, **extra, **options, **more)

    return inputs, run


@pytest.mark.parametrize(
    ("names", "similarity"), [*((names, "cosine") for names in OPTIONS), (OPTIONS[-1], "dot")]
)
def test_gradients(names, similarity):
    """Finite differences, through the gradients of the forward pass and those of the backward."""
    queries, documents, everything = problem(n=5, m=7, dim=3)
    options = {name: everything[name] for name in names}
    options.pop("margin", None)  # which negatives are in is a step function
    inputs, run = leaves(queries, documents, {**options, "similarity": similarity})
    for positives in ("mean", "sum", "each")[: 3 if "targets" in names else 1]:
        for more in ({}, {"symmetric": True}, {"reduction": "none"}):
            more = {**more, "positives": positives, "chunk_size": 3}
            assert torch.autograd.gradcheck(
                lambda *x, more=more: run(*x, **more), inputs, fast_mode=True
            )


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_equal_reference(symmetric):
    queries, documents, everything = problem()
    results = []
    for backend in ("reference", "auto"):
        inputs, run = leaves(queries, documents, everything)
        with use_backend(backend):
            (run(*inputs, symmetric=symmetric) * 3).backward()
        results.append([x.grad for x in inputs])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_only_what_is_needed():
    """Frozen documents (a memory bank) get no gradient, and don't change that of the queries."""
    queries, documents, _ = problem()
    both = [x.clone().requires_grad_() for x in (queries, documents)]
    info_nce(*both).backward()
    q = queries.clone().requires_grad_()
    info_nce(q, documents).backward()
    assert torch.equal(q.grad, both[0].grad)
    d = documents.clone().requires_grad_()
    info_nce(queries, d).backward()
    assert torch.equal(d.grad, both[1].grad)


def test_backward_twice():
    queries, documents, _ = problem()
    q = queries.clone().requires_grad_()
    loss = info_nce(q, documents)
    (first,) = torch.autograd.grad(loss, q, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, q)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("symmetric", [False, True])
def test_second_derivative_is_refused(symmetric):
    """Terms of it would be missing, whether or not what comes from behind requires grad."""
    x, documents, _ = problem()
    for power in (1, 2):  # the gradient of the loss is a constant, and is none
        weight = torch.eye(6).requires_grad_()
        loss = info_nce((x @ weight).sin(), documents, symmetric=symmetric) ** power
        (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        torch.testing.assert_close(gradient, first)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()
    with use_backend("reference"):
        loss = info_nce((x @ weight).sin(), documents, symmetric=symmetric)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        gradient.square().sum().backward()
        assert weight.grad.any()


def test_loss_scale_reaches_float16():
    """A gradient too small for float16 is there once a GradScaler's factor has made it larger."""
    vectors = [torch.randn(shape) * 300 for shape in ((64, 32), (80, 32), (64, 3, 32))]
    vectors = [x.half().requires_grad_() for x in vectors]
    exact = [x.detach().float().requires_grad_() for x in vectors]

    def loss(q, d, negatives):
        return info_nce(q, d, negatives=negatives, chunk_size=30)

    scale = 65536
    expected = torch.autograd.grad(loss(*exact) * scale, exact)
    value = loss(*vectors) * scale
    for _ in range(2):
        for x, g in zip(torch.autograd.grad(value, vectors, retain_graph=True), expected,
                        strict=True):  # fmt: skip
            assert x.dtype == torch.float16
            torch.testing.assert_close(x.float(), g, rtol=1e-3, atol=1e-6)


def test_chunks_change_nothing():
    queries, documents, everything = problem()
    whole = info_nce(queries, documents, symmetric=True, **everything)
    for chunk in (1, 4, 8, 100):
        actual = info_nce(queries, documents, symmetric=True, chunk_size=chunk, **everything)
        torch.testing.assert_close(actual, whole)


def test_nothing_to_learn_from():
    """No positives, no negatives, zero vectors: zero loss, zero gradients, never NaN."""
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    nothing = torch.full((3, 2), -1)
    for symmetric in (False, True):
        for positives in ("each", "mean", "sum"):
            more = {"symmetric": symmetric, "positives": positives}
            q, d = x.clone().requires_grad_(), y.clone().requires_grad_()
            for options in (
                {"targets": nothing},
                {"mask": torch.zeros(3, 3, dtype=torch.bool)},
                {"weights": torch.zeros(3)},
                {"query_ids": torch.ones(3).long(), "document_ids": torch.ones(3).long()},
            ):
                loss = info_nce(q, d, **options, **more)
                assert loss.item() == 0
                q.grad = d.grad = None
                loss.backward()
                assert not q.grad.any()
                assert not d.grad.any()
            zero = torch.zeros(3, 4, requires_grad=True)
            loss = info_nce(zero, d, **more)
            loss.backward()
            assert loss.item() == pytest.approx(math.log(3))
            assert not zero.grad.any()


def test_bag_of_words():
    """The vocabulary as documents: cross-entropy against the tokens of each text."""
    x, vocabulary = torch.randn(4, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    tokens = torch.tensor([[3, 7, 1], [9, -1, -1], [0, 49, -1], [5, 6, 2]])
    logits = (x @ vocabulary.t()).log_softmax(1)
    expected = torch.stack([-row[t[t >= 0]].mean() for row, t in zip(logits, tokens, strict=True)])
    options = {"similarity": "dot", "temperature": 1.0, "positives": "mean"}
    actual = info_nce(x, vocabulary, targets=tokens, **options)
    torch.testing.assert_close(actual, expected.mean())
    for a, b in zip(*(torch.autograd.grad(loss, (x, vocabulary))
                      for loss in (actual, expected.mean())), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_extreme_scores():
    """Temperatures at which exp(score) overflows float32."""
    x = torch.eye(4).requires_grad_()
    loss = info_nce(x, x.detach().flip(0), temperature=1e-3, symmetric=True)
    loss.backward()
    assert loss.item() == pytest.approx(1000)
    assert torch.isfinite(x.grad).all()


def test_autocast():
    queries, documents, everything = problem(n=30, m=40, dim=64)
    grads = []
    for enabled in (False, True):
        q = queries.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for symmetric in (False, True):
                info_nce(q, documents, symmetric=symmetric, **everything).backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_compiled():
    """Forward to the bit; eager gradients come from the forward pass and sum in another order."""
    calls = [(torch.randn(n, 8), torch.randn(m, 8)) for n, m in ((4, 6), (7, 7), (12, 30))]

    def run(q, d):
        return info_nce(q * 2, d, focal=0.5) + info_nce(q, d, symmetric=True)

    check_compiled(run, calls, backward=False)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, d in calls[:2]:
        grads = []
        for function in (run, compiled):
            leaf = q.clone().requires_grad_()
            function(leaf, d).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_operator_contract():
    queries, documents, everything = problem()
    targets = everything["targets"]
    arguments = (
        queries, documents, everything["negatives"], torch.tensor(5.0), targets,
        everything["query_ids"], everything["document_ids"], everything["mask"], torch.tensor(0.3),
        *everything["guide"], torch.tensor(0.1), True, True, 4,
    )  # fmt: skip
    ops = torch.ops.emblas
    torch.library.opcheck(ops.info_nce_scores.default, arguments)
    known, lse, columns = ops.info_nce_scores(*arguments)
    grads = [torch.randn_like(x) for x in (known, lse, columns)]
    torch.library.opcheck(ops.info_nce_scores_backward.default, (*grads, columns, True, *arguments))


def test_module():
    queries, documents, everything = problem()
    loss = InfoNCE(0.1, margin=0.2, symmetric=True)
    expected = info_nce(queries, documents, temperature=0.1, margin=0.2, symmetric=True)
    assert torch.equal(loss(queries, documents), expected)
    assert list(loss.parameters()) == []
    assert "temperature=0.1, symmetric=True, margin=0.2" in repr(loss)
    learned = InfoNCE(0.1, learn_temperature=True)
    learned(queries, documents, negatives=everything["negatives"]).backward()
    assert learned.log_temperature.grad != 0
    assert learned.temperature.item() == pytest.approx(0.1)
    again = InfoNCE(0.5, learn_temperature=True)
    again.load_state_dict(learned.state_dict())
    assert torch.equal(again.temperature, learned.temperature)


def test_mix_negatives():
    queries, negatives = torch.randn(5, 8), torch.randn(5, 4, 8)
    for method in ("pair", "list"):
        draws = [
            mix_negatives(
                queries, negatives, 6, method=method, generator=torch.Generator().manual_seed(1)
            )
            for _ in range(2)
        ]
        assert torch.equal(*draws)
        torch.testing.assert_close(draws[0].norm(dim=-1), torch.ones(5, 6))
        # Every mixture lies in the cone of the query's own negatives: weights >= 0, two for pairs.
        hard = torch.nn.functional.normalize(negatives, dim=-1)
        shares = torch.linalg.lstsq(hard.mT, draws[0].mT).solution
        assert (shares > -1e-4).all()
        if method == "pair":
            assert ((shares > 1e-3).sum(1) <= 2).all()
        # A small temperature chooses the hardest.
        cold = mix_negatives(queries, negatives, 50, method=method, temperature=1e-4)
        cosines = (hard * torch.nn.functional.normalize(queries)[:, None]).sum(-1)
        best = hard[torch.arange(5), cosines.argmax(1)]
        assert (cold * best[:, None]).sum(-1).mean() > (0.5 if method == "pair" else 0.999)
    unit = torch.nn.functional.normalize
    queries, negatives = queries.double(), negatives.double().requires_grad_()
    for method in ("pair", "list"):
        mixed = mix_negatives(queries, negatives, 3, method=method)
        hard = unit(negatives, dim=-1)
        # Weights are constants, and their sum makes no difference.
        shares = torch.linalg.lstsq(hard.detach().mT, mixed.detach().mT).solution.mT
        expected = unit(shares @ hard, dim=-1)
        torch.testing.assert_close(mixed, expected)
        gradients = [torch.autograd.grad(x.sin().sum(), negatives)[0] for x in (mixed, expected)]
        torch.testing.assert_close(*gradients)

    def mix(x):  # the weights of pairs don't change with the vectors
        generator = torch.Generator().manual_seed(1)
        return mix_negatives(queries, x, 3, generator=generator)

    assert torch.autograd.gradcheck(mix, [negatives])


Q, D = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "queries must be a torch.Tensor", lambda: info_nce([1.0], D)),
        (TypeError, "queries must have dtype", lambda: info_nce(Q.long(), D)),
        (ValueError, "documents must have 2 dim", lambda: info_nce(Q, D[0])),
        (ValueError, "documents must have vectors of dimension 3", lambda: info_nce(Q, D[:, :2])),
        (ValueError, "documents must have at least 2 rows", lambda: info_nce(Q, D[:1])),
        (ValueError, "documents must be on device", lambda: info_nce(Q, D.to("meta"))),
        (ValueError, r"queries must be finite, got nan at \[1, 2\]",
         lambda: info_nce(Q.clone().index_put_((torch.tensor(1), torch.tensor(2)),
                                               torch.tensor(torch.nan)), D)),
        (ValueError, "documents must be finite, got inf", lambda: info_nce(Q, D / 0)),
        (ValueError, "negatives must be finite", lambda: info_nce(Q, D, negatives=Q[:, None] / 0)),
        (ValueError, "negatives must have 3 dim", lambda: info_nce(Q, D, negatives=D)),
        (ValueError, "negatives must have 2 rows", lambda: info_nce(Q, D, negatives=D[:, None])),
        (ValueError, "temperature must be positive", lambda: info_nce(Q, D, temperature=0)),
        (ValueError, "temperature must be positive", lambda: info_nce(
            Q, D, temperature=torch.tensor(-0.1))),
        (ValueError, "temperature must have one element", lambda: info_nce(Q, D, temperature=Q)),
        (ValueError, "targets must lie between -1 and 3", lambda: info_nce(
            Q, D, targets=torch.tensor([0, 4]))),
        (ValueError, "targets must name a row once", lambda: info_nce(
            Q, D, targets=torch.tensor([[0, 1], [2, 2]]))),
        (ValueError, r"targets must have shape \(2,\)", lambda: info_nce(
            Q, D, targets=torch.tensor([0]))),
        (ValueError, "documents must have at least 1 row, got none", lambda: info_nce(
            Q, D[:0], targets=torch.tensor([-1, -1]))),
        (TypeError, "targets must have dtype int64", lambda: info_nce(Q, D, targets=Q[:, 0])),
        (ValueError, "query_ids and document_ids go together", lambda: info_nce(
            Q, D, query_ids=torch.arange(2))),
        (ValueError, r"document_ids must have shape \(4,\)", lambda: info_nce(
            Q, D, query_ids=torch.arange(2), document_ids=torch.arange(2))),
        (TypeError, "mask must have dtype bool", lambda: info_nce(Q, D, mask=torch.ones(2, 4))),
        (ValueError, r"mask must have shape \(2, 4\)", lambda: info_nce(
            Q, D, mask=torch.ones(2, 3) > 0)),
        (ValueError, r"guide\[1\] must have 4 rows", lambda: info_nce(Q, D, guide=(Q, Q))),
        (ValueError, "positives must be one of", lambda: info_nce(Q, D, positives="all")),
        (ValueError, "similarity must be one of", lambda: info_nce(Q, D, similarity="l2")),
        (ValueError, "reduction must be one of", lambda: info_nce(Q, D, reduction="max")),
        (ValueError, "reduction must be 'mean' or 'sum'", lambda: info_nce(
            Q, D, symmetric=True, reduction="none")),
        (ValueError, "focal must not be negative", lambda: info_nce(Q, D, focal=-1)),
        (ValueError, r"weights must have shape \(2,\)", lambda: info_nce(Q, D, weights=D[:, 0])),
        (ValueError, "chunk_size must be at least 1", lambda: info_nce(Q, D, chunk_size=0)),
        (ValueError, "method must be one of", lambda: mix_negatives(Q, Q[:, None], 1, method="x")),
        (ValueError, "negatives must hold at least 2", lambda: mix_negatives(Q, Q[:, None], 1)),
        (ValueError, "count must be", lambda: mix_negatives(Q, Q[:, None], 0, method="list")),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
