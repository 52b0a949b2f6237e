"""Every executor of every operator against the reference in float64, on the same calls."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import CASES
from contract import packed, tolerance
from emblas import _op, use_backend
from emblas.attention import deberta_buckets, varlen_attention
from emblas.attention.op import Shaping
from emblas.pooling import reference
from emblas.pooling.reference import Mode
from executors import EXECUTORS as IMPLEMENTATIONS
from executors import executors

EXECUTORS = {(name, executor): run for name in CASES for executor, run in executors(name).items()}
CELLS = [(*cell, case) for cell in EXECUTORS for case in CASES[cell[0]]]


def wide(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()


def results(case, run, args):
    value = run(*args)
    if case.changed:
        assert value is None
        return tuple(args[place] for place in case.changed)
    found = value if isinstance(value, tuple) else (value,)
    if case.counted:
        *rows, count = found
        found = (*(some[: int(count)] for some in rows), count)
    return found


def cuda_serves(name, executor, args):
    """Tell whether the CUDA C++ kernel serves a call, whose last arguments it may not know."""
    op = _op.ops()[name]
    library = torch.ops.emblas if executor == "cuda" else torch.ops.emblas_simt
    arity = len(getattr(library, f"{name}_cuda").default._schema.arguments)
    for value, argument in zip(args[arity:], op.overload._schema.arguments[arity:], strict=False):
        if isinstance(value, torch.Tensor) or value != argument.default_value:
            return False
    return op.cuda_supports is None or op.cuda_supports(*args[:arity])


@pytest.mark.parametrize(("name", "executor", "case"), CELLS)
def test_equals_oracle(name, executor, case):
    made = CASES[name][case]()
    if executor in ("simt", "cuda") and not cuda_serves(name, executor, made.args):
        pytest.skip("left to Triton")
    expected = results(made, _op.ops()[name].reference, [*map(wide, made.args)])
    actual = results(made, EXECUTORS[name, executor], made.args)
    assert len(actual) == len(expected)
    dtypes = [a.dtype for a in made.args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for a, e in zip(actual, expected, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, e)
            continue
        # A result may be stored in another dtype than the first argument.
        dtype = max((dtypes or [torch.float64])[0], a.dtype, key=lambda d: torch.finfo(d).eps)
        limit = tolerance(dtype, made.length)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=4 * limit["rtol"], atol=8 * limit["atol"], equal_nan=True
        )


GPU = ("simt", "triton-interpreted", "cuda", "triton")


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "rotary" and e in GPU])
@pytest.mark.parametrize("interleaved", [False, True])
def test_wrong_positions_stay_in_bounds(executor, interleaved):
    """Kernels for GPUs check no values: wrong ones take the first or the last row."""
    x, cos, sin = torch.randn(4, 2, 16), torch.randn(9, 8), torch.randn(9, 8)
    wrong, clamped = torch.tensor([-1, 9, -(2**40), 2**40]), torch.tensor([0, 8, 0, 8])
    run = EXECUTORS["rotary", executor]
    expected = run(x, cos, sin, clamped, interleaved)
    assert torch.equal(run(x, cos, sin, wrong, interleaved), expected)


POOLING = [e for n, e in EXECUTORS if n == "segment_pool_backward"]


def _pool_wrongly(run, name, starts, ends=None, skip=None):
    """Call an operator of pooling, and its backward, whatever its arguments hold."""
    x, weights, backward = torch.rand(140, 5), torch.rand(140), run.get(f"{name}_backward")
    if name == "attention_pool":
        queries, rest = torch.randn(2, 5), (starts, 0.6, weights, ends)
        out, lse = run[name](x, queries, *rest)
        backward(out, x, queries, out, lse, *rest)
    elif name == "vocab_max":
        words = torch.randn(6, 5)
        out, argmax = run[name](x, words, None, starts, weights, ends)
        argmax = torch.randint(-2, 143, argmax.shape, dtype=torch.int32)
        argmax[:, :4] = torch.tensor([139, 140, -1, 2**31 - 1])
        backward(out, x, words, argmax, starts, ends, True, True)
    elif name == "lexical_index":
        run[name](torch.arange(140) % 9, weights, starts, [])
    else:
        index = torch.randint(-2, 143, (140,), dtype=torch.int32)
        for rest in ((ends, skip, None), (None, None, index)):  # lists share no position
            if name == "segment_pool_modes":
                modes = [6, Mode.last]
                out, argmax = run[name](x, starts, weights, modes, *rest, False)
                argmax = torch.randint(-2, 143, argmax.shape, dtype=torch.int32)
                needs = (True, rest[2] is None)
                args = (out, x, out, argmax, starts, weights, modes, *needs, *rest, False)
                backward(*args)
            elif name == "segment_max":
                run[name](x, starts, weights, *rest)
            elif name == "segment_gem":
                options = starts, weights, torch.tensor([3.0]), 0.25, *rest
                out = run[name](x, *options)
                backward(out, x, out, *options)
            else:
                for mode in Mode:
                    out, norm = run[name](x, starts, weights, True, mode, *rest)
                    options = starts, weights, True, True, rest[2] is None, mode, *rest
                    backward(out, x, out, norm, *options)


_POOLING = (
    "attention_pool", "lexical_index", "segment_gem", "segment_max", "segment_pool",
    "segment_pool_modes", "vocab_max",
)  # fmt: skip


@pytest.mark.parametrize("executor", [e for e in POOLING if e in GPU])
@pytest.mark.parametrize("name", _POOLING)
def test_wrong_segments_stay_in_bounds(executor, name):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    run = {n: function for (n, e), function in EXECUTORS.items() if e == executor}
    for wrong in ([-3, 2, 9, 200], [150, 160, 2**31 - 1], [9, 4, 140], [-(2**31), -5, 0]):
        starts = torch.tensor(wrong, dtype=torch.int32)
        _pool_wrongly(run, name, starts)
        if name != "lexical_index":
            _pool_wrongly(run, name, starts, starts + 3)
        if name not in ("lexical_index", "attention_pool"):  # they know no spans that overlap
            _pool_wrongly(run, name, starts, starts.flip(0), -starts)


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "lexical_index" and e in GPU])
def test_tokens_outside_of_sequences(executor):
    ids, weights = torch.tensor([3, 1, 1, 2, 4, 0, 3]), torch.ones(7)
    for first, last in ((2, 7), (0, 5), (1, 4), (3, 3)):
        starts = torch.tensor([first, last], dtype=torch.int32)
        crow, columns, at = EXECUTORS["lexical_index", executor](ids, weights, starts, [])
        count = int(crow[-1])
        assert columns[:count].tolist() == sorted(set(ids[first:last].tolist()))
        assert ((at[:count] >= first) & (at[:count] < last)).all()


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "vocab_max"])
def test_largest_logit_of_the_first_token(executor):
    """Nothing later replaces it."""
    x, weight = torch.rand(200, 3), torch.rand(5, 3)
    x[0] = 2
    out, argmax = EXECUTORS["vocab_max", executor](
        x, weight, None, torch.tensor([0, 200]).int(), None, None
    )
    assert not argmax.any()
    torch.testing.assert_close(out[0], weight @ x[0], **tolerance(torch.float32, 3))


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "attention_pool"])
@pytest.mark.parametrize("score", [-300.0, 300.0])
def test_scores_beyond_exponentials(executor, score):
    x, queries, starts = torch.rand(270, 3) + 0.5, torch.full((2, 3), score), torch.tensor([0, 270])
    out, lse = EXECUTORS["attention_pool", executor](x, queries, starts.int(), 1.0, None, None)
    expected, expected_lse = _op.ops()["attention_pool"].reference(
        x.double(), queries.double(), starts.int(), 1.0, None, None
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "finish"])
def test_noise_to_the_last_bits(executor):
    """Doubles that are right to their last bits round to the same float."""
    run = EXECUTORS["finish", executor]
    noise = run(torch.zeros(300, 40), [40], False, 1.0, 11, 0, torch.float32, None)
    assert torch.equal(noise, reference.normal_noise(300, 40, 0, 11).float())


@pytest.mark.parametrize("executor", POOLING)
def test_rows_outside_of_segments(executor):
    """They may hold anything, and so may weights of tokens that are not the first one."""
    run, backward = (EXECUTORS[f"segment_pool{name}", executor] for name in ("", "_backward"))
    x, starts, ends = torch.rand(6, 40), torch.tensor([1, 3]).int(), torch.tensor([3, 5]).int()
    x[[0, 5]] = torch.nan
    options = starts, torch.full((6,), 49.0)  # 49 / 49 is less than 1 when made by a reciprocal
    out, _ = run(x, *options, False, Mode.cls, ends)
    assert torch.equal(out, x[starts])
    out, norm = run(x, *options, False, Mode.mean, ends)
    grads = backward(out, x, out, norm, *options, False, True, True, Mode.mean, ends)
    for grad in grads:
        assert not grad.isnan().any()
        assert not grad[[0, 5]].any()


@pytest.mark.parametrize("executor", [e for e in POOLING if e != "reference"])
def test_gradients_of_spans_in_any_order(executor):
    """The same bits, though spans of one range differ in what they contribute, or in origin."""
    x, weights, spans = torch.rand(9, 300), torch.rand(9), 12
    starts = torch.tensor([0, 2] * 6, dtype=torch.int32)
    skip = torch.tensor([3, 1] * 3 + [2, 0] * 3, dtype=torch.int32)  # two origins of one range
    ends, grad = torch.full_like(starts, 8), torch.randn(spans, 300)
    grad[::3, :299] = 0  # these differ in one column
    power = torch.tensor([2.5])
    pool, gem = (EXECUTORS[f"segment_{name}_backward", executor] for name in ("pool", "gem"))
    reversed_order = torch.arange(spans).flip(0)
    results = []
    for order in (torch.arange(spans), reversed_order, torch.arange(spans).roll(5)):
        g, s, e, k = grad[order], starts[order], ends[order], skip[order]
        out, norm = g.cos(), torch.ones(spans)
        grads = [
            *pool(g, x, out, norm, s, weights, True, True, True, Mode.weighted_mean, e, k),
            gem(g, x, out.abs() + 0.1, s, weights, power, 0.25, e, k)[0],
        ]
        results.append(grads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def attention_dtype(executor):
    """CUDA C++ multiplies 16 bits only."""
    return torch.float16 if executor in ("simt", "cuda") else torch.float32


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "varlen_attention_backward"])
def test_attention_trains(executor):
    """The public function reaches the kernels of an executor, forward and backward."""
    dtype = attention_dtype(executor)
    x, cu = torch.randn(43, 3, 2, 16).to(dtype), packed((3, 0, 40))
    names = ("varlen_attention", "varlen_attention_backward")
    grads = []
    for run, leaf in ((executor, x.clone()), ("reference", x.double())):
        with IMPLEMENTATIONS[run](names) if run in IMPLEMENTATIONS else use_backend(run):
            leaf.requires_grad_()
            attend = partial(varlen_attention, *leaf.unbind(1), cu, cu, 40, 40)
            out, lse = attend(window_size=(9, 30), return_lse=True)
            (out.square().sum() + lse.sum()).backward()
        grads.append(leaf.grad.double())
    error = 4e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(*grads, rtol=error, atol=error)


def attention_gradients(executor):
    """Attention's gradients where queries, keys, values and results are the same vectors."""
    run = EXECUTORS["varlen_attention_backward", executor]

    def gradients(q, grad, cu, longest, window=(-1, -1), cu_k=None):
        numbers = (cu, cu if cu_k is None else cu_k, longest, longest, None, *window)
        lse = torch.zeros(q.shape[1], q.shape[0])
        return run(grad, None, q, q, q, q, lse, *numbers)[:3]

    return gradients


ATTENTION = [e for n, e in EXECUTORS if n == "varlen_attention_backward" and e in GPU]


@pytest.mark.parametrize("executor", ATTENTION)
@pytest.mark.parametrize(
    "offsets", [[5, 900, -3, 2], [-7, 2**31 - 1, 2**31 - 1, -(2**31)], [80, 70, 60, 3]]
)
def test_attention_gradients_stay_in_bounds(executor, offsets):
    """Whatever the offsets hold; results are whatever they are. No two sequences overlap."""
    cu, right = torch.tensor(offsets, dtype=torch.int32), packed((3, 0, 40))
    q, grad = torch.randn(2, 43, 1, 16).to(attention_dtype(executor))
    gradients = attention_gradients(executor)
    for cu_q, cu_k in ((cu, cu), (cu, right), (right, cu)):
        gradients(q, grad, cu_q, 43, cu_k=cu_k)


BIASES = [e for n, e in EXECUTORS if n == "varlen_attention_biases_backward"]


@pytest.mark.parametrize("executor", [e for e in BIASES if e in GPU])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "offsets", [[5, 900, -3, 2], [-7, 2**31 - 1, 2**31 - 1, -(2**31)], [80, 70, 60, 3]]
)
def test_shaped_attention_stays_in_bounds(executor, offsets, padded):
    """Whatever offsets, prefixes and lookups hold; pairs may be fewer than they should be."""
    cu, ids = torch.tensor(offsets, dtype=torch.int32), torch.randint(-1, 2, (43,)).int()
    wrong = torch.tensor([9, 0, 2**31 - 1, -1, 3]).int()
    shaping = Shaping(
        0.5, torch.rand(3, 1), torch.randn(1, 7), torch.tensor([2**31 - 1, -(2**31), 5]).int(),
        ids, ids, torch.randn(4, 1, 16), torch.randn(4, 1, 16), wrong,
        torch.randn(3, 1, 40, 43) if padded else torch.randn(1, 1450), 0.1, torch.arange(3),
    )  # fmt: skip
    q, lse, numbers = torch.randn(43, 1, 16), torch.zeros(1, 43), (cu, cu, 43, 43, None, -1, 0)
    EXECUTORS["varlen_attention", executor](q, q, q, *numbers, True, *shaping)
    run = EXECUTORS["varlen_attention_biases_backward", executor]
    run(q, lse, q, q, q, q, lse, *numbers, *shaping, True, True, True)


@pytest.mark.parametrize("executor", BIASES)
def test_biases_train(executor):
    """The public function reaches the kernels of an executor, forward and backward."""
    cu, names = packed((3, 0, 20)), ("varlen_attention", "varlen_attention_biases_backward")
    given = torch.randn(23, 3, 2, 16), torch.randn(2, 5), torch.randn(1, 1, 20, 20)
    given += torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    grads = []
    for run, dtype in ((executor, torch.float32), ("reference", torch.float64)):
        with IMPLEMENTATIONS[run](names) if run in IMPLEMENTATIONS else use_backend(run):
            leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in given]
            x, table, bias, *vectors = leaves
            out = varlen_attention(
                *x.unbind(1), cu, cu, 20, 20, 0.2, relative_bias=(table, torch.arange(9) % 5),
                disentangled=(*vectors, deberta_buckets(4, 9)), attn_bias=bias,
                dropout_seeds=torch.arange(3),
            )  # fmt: skip
            out.square().sum().backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=4e-5)


@pytest.mark.parametrize("executor", ATTENTION)
def test_attention_gradients_depend_on_the_own_sequence_only(executor):
    q, grad = torch.randn(2, 43, 2, 16).to(attention_dtype(executor))
    gradients = attention_gradients(executor)
    cu, window = packed((3, 0, 40)), (9, 9)
    whole = gradients(q, grad, cu, 43, window)
    again = gradients(q, grad, cu, 43, window)  # programs in another order
    alone = gradients(q[3:], grad[3:], packed((40,)), 40, window)
    for x, y, z in zip(whole, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[3:], z)


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        (n, e)
        for n, e in EXECUTORS
        if n.startswith("vocab_sum") and e in GPU
        and (n, e) != ("vocab_sum", "simt")  # reads what nobody wrote: test_vocab_sum_cuda.py
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "wrong", [[2**31 - 1, -5, 3, -(2**31), 9], [0, 90, 2**31 - 1, 5, 30], [-(2**31), 73, 70, 1, 0]]
)
def test_wrong_offsets_of_summed_vocabularies_stay_in_bounds(name, executor, wrong):
    """Emulator and interpreter would notice; results are whatever they are."""
    x, weight, bias = torch.randn(73, 9), torch.randn(70, 9), torch.randn(70)
    wrong = torch.tensor(wrong, dtype=torch.int32)
    for starts, ends, batch in ((wrong, None, 4), (wrong, wrong.flip(0), 5)):
        args = x, weight, bias, starts, 2, torch.ones(73), ends
        if name == "vocab_sum":
            found = (EXECUTORS[name, executor](*args),)
        else:
            found = EXECUTORS[name, executor](torch.randn(batch, 70), *args, True, True, True)
        assert all(result.isfinite().all() for result in found)
