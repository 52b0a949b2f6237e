"""What every module of a vocabulary owes: bags, padding, empty input, state, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.tables import (
    AdaptiveEmbedding,
    AutoDimEmbedding,
    AutoSrhEmbedding,
    ClusteredCompositionalEmbedding,
    DeduplicatedEmbedding,
    DeepLightEmbedding,
    LearnedStepEmbedding,
    MemComEmbedding,
    MixedDimensionEmbedding,
    MultiGranularQuantizedEmbedding,
    OptEmbedding,
    PepEmbedding,
    ProductQuantizedEmbedding,
    QuantizedEmbedding,
    SparseEmbedding,
    SubspaceEmbedding,
    TensorTrainEmbedding,
)

N, DIM = 30, 4
# name: the module, and another one that a state dict must not fit
MODULES = {
    "adaptive": (lambda **k: AdaptiveEmbedding(N, DIM, 5, 6, **k),
                 lambda: AdaptiveEmbedding(N, DIM, 5, 6, seed=1)),
    "auto_dim": (lambda **k: AutoDimEmbedding([10, 20], DIM, [1, 2], **k),
                 lambda: AutoDimEmbedding([20, 10], DIM, [1, 2])),
    "auto_srh": (lambda **k: AutoSrhEmbedding(N, DIM, **k),
                 lambda: AutoSrhEmbedding(N, DIM, num_groups=5)),
    "clustered": (lambda **k: ClusteredCompositionalEmbedding(N, DIM, 5, num_chunks=2, **k),
                  lambda: ClusteredCompositionalEmbedding(N, DIM, 5, num_chunks=2, seed=1)),
    "deduplicated": (lambda **k: DeduplicatedEmbedding(N, DIM, 2, 9, **k),
                     lambda: DeduplicatedEmbedding(N, DIM, 2, 8)),
    "deep_light": (lambda **k: DeepLightEmbedding(N, DIM, 0.5, **k),
                   lambda: DeepLightEmbedding(N, DIM, 0.6)),
    "learned_step": (lambda **k: LearnedStepEmbedding(N, DIM, 4, **k),
                     lambda: LearnedStepEmbedding(N, DIM, 8)),
    "memcom": (lambda **k: MemComEmbedding(N, DIM, 7, **k),
               lambda: MemComEmbedding(N, DIM, 7, bias=True)),
    "mixed": (lambda **k: MixedDimensionEmbedding([10, 20], DIM, [4, 2], **k),
              lambda: MixedDimensionEmbedding([10, 20], DIM, [2, 2])),
    "granular": (lambda **k: MultiGranularQuantizedEmbedding(N, DIM, 2, 8, **k),
                 lambda: MultiGranularQuantizedEmbedding(N, DIM, 2, 8, num_frequent=4)),
    "opt": (lambda **k: OptEmbedding([10, 20], DIM, **k).eval(),
            lambda: OptEmbedding([20, 10], DIM)),
    "pep": (lambda **k: PepEmbedding(N, DIM, **k),
            lambda: PepEmbedding(N, DIM, granularity="row")),
    "vq": (lambda **k: ProductQuantizedEmbedding(N, DIM, 2, 8, **k),
           lambda: ProductQuantizedEmbedding(N, DIM, 2, 8, kind="sx")),
    "sx": (lambda **k: ProductQuantizedEmbedding(N, DIM, 2, 8, kind="sx", **k),
           lambda: ProductQuantizedEmbedding(N, DIM, 2, 8)),
    "quantized": (lambda **k: QuantizedEmbedding(N, DIM, 4, **k),
                  lambda: QuantizedEmbedding(N, 2, 8)),
    "sparse": (lambda **k: SparseEmbedding.from_table(torch.randn(N, DIM).relu(), **k),
               lambda: SparseEmbedding(N, 2 * DIM, 50)),
    "subspace": (lambda **k: SubspaceEmbedding(N, DIM, 2, 8, **k),
                 lambda: SubspaceEmbedding(N, DIM, 2, 7)),
    "tensor_train": (lambda **k: TensorTrainEmbedding((2, 5, 3), (2, 1, 2), 3, **k),
                     lambda: TensorTrainEmbedding((2, 5, 3), (2, 1, 2), 4)),
}  # fmt: skip
# Their resize() repeats something for a larger vocabulary.
GROWING = ("clustered", "granular", "vq", "sx", "quantized", "subspace", "tensor_train")


@pytest.mark.parametrize("name", MODULES)
def test_lookups(name):
    module = MODULES[name][0](padding_id=7).eval()
    table = module.table().detach()
    assert table.shape == (N, DIM)
    ids = torch.tensor([[3, 29, 7], [0, 3, 3]])
    expected = table[ids] * (ids != 7)[..., None]
    out = module(ids)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(module(ids.view(torch.uint64)), expected)
    assert module(ids[:0]).shape == (0, 3, DIM)
    flat, offsets = ids.flatten(), packed((3, 0, 3))
    bags = module(flat, offsets, torch.arange(6.0))
    weighted = expected.flatten(0, 1) * torch.arange(6.0)[:, None]
    torch.testing.assert_close(
        bags, torch.stack([weighted[:3].sum(0), torch.zeros(DIM), weighted[3:].sum(0)])
    )
    mean = module(flat, offsets, mode="mean")  # the padding id is not counted
    torch.testing.assert_close(mean[0], (table[3] + table[29]) / 2)
    assert module(flat[:0], packed((0, 0))).tolist() == [[0.0] * DIM] * 2
    with pytest.raises(ValueError, match=r"ids must be 0 to 29, got (0 to )?30"):
        module(torch.tensor([0, 30]))
    with pytest.raises(TypeError, match="ids must have dtype"):
        module(torch.tensor([0], dtype=torch.int32))
    assert module.num_bytes == sum(
        t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()]
    )
    assert module.num_parameters > 0


@pytest.mark.parametrize("name", MODULES)
def test_state(name):
    make, other = MODULES[name]
    module = make().eval()
    twin = make().eval()
    if name == "sparse":
        twin = SparseEmbedding(N, DIM, module.num_elements)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.table(), module.table())
    with pytest.raises((ValueError, RuntimeError), match=r"holds a table of|size mismatch|Missing"):
        other().load_state_dict(module.state_dict())


@pytest.mark.parametrize(
    "name",
    ["adaptive", "auto_srh", "clustered", "deduplicated", "deep_light", "memcom", "mixed", "pep",
     "tensor_train"],
)  # fmt: skip
def test_gradients(name):
    """Finite differences; the modules with straight-through gradients have tests of their own."""
    module = MODULES[name][0](padding_id=7, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters(), strict=True)
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([3, 7, 29, 3, 12])

    def function(*values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, state, (ids, packed((2, 0, 3))))

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_padding_sends_no_gradient():
    module = AdaptiveEmbedding(N, DIM, N, 1, padding_id=7)
    module(torch.tensor([7, 3])).sum().backward()
    assert module.weight.grad[7].count_nonzero() == 0
    assert module.weight.grad[3].tolist() == [1.0] * DIM


@pytest.mark.parametrize("name", GROWING)
def test_larger_vocabulary(name):
    module = MODULES[name][0](padding_id=7)
    if name == "clustered":
        module.cluster()
    grown = module.resize(3)
    assert grown.num_embeddings == 3 * N
    assert grown.padding_id == 7
    assert torch.equal(grown.table()[:N], module.table())
    if name != "granular":  # there, new ids are rare ones
        assert torch.equal(grown.table(), module.table().repeat(3, 1))
    assert torch.equal(module.resize(1).table(), module.table())
    with pytest.raises(ValueError, match="factor must be at least 1"):
        module.resize(0)


def test_no_larger_form():
    with pytest.raises(TypeError, match=r"PepEmbedding has no larger form .* fit_rows"):
        MODULES["pep"][0]().resize(2)
    frozen = MODULES["granular"][0]().freeze()
    with pytest.raises(ValueError, match="num_frequent must be num_embeddings = 30 to repeat"):
        frozen.resize(2)
    assert torch.equal(frozen.resize(1).table(), frozen.table())
    asymmetric = QuantizedEmbedding.from_table(torch.randn(3, 4), 4, asymmetric=True)
    assert torch.equal(asymmetric.resize(2).table(), asymmetric.table().repeat(2, 1))


def test_largest_budget():
    huge = SubspaceEmbedding.from_budget(10**9, num_embeddings=9, embedding_dim=4, num_parts=2)
    assert huge.num_centroids == 2**16
