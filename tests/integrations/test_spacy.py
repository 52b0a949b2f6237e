"""Layers of thinc on emblas' kernels: same vectors, same gradients, same bytes."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

thinc = pytest.importorskip("thinc.api", reason="thinc is not installed")

from emblas.integrations import spacy  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64)
IDS[:5] = [0, 1, 2**63, 2**64 - 1, 1]


def step(model, ids):
    """Output and gradient of the table, with the same dropout."""
    thinc.fix_random_seed(0)
    out, backprop = model.begin_update(ids)
    out = out.copy()
    backprop(np.random.default_rng(1).normal(size=out.shape).astype(np.float32))
    grads = [node.get_grad("E").copy() for node in model.walk() if node.has_param("E")]
    return out, grads


@pytest.mark.parametrize("dropout", [None, 0.4])
@pytest.mark.parametrize("column", [None, 1])
def test_layer(column, dropout):
    ids = IDS if column is None else np.stack([IDS[::-1], IDS], 1)
    options = {"seed": 8, "column": column, "dropout": dropout}
    ours, theirs = spacy.HashEmbed(24, 50, **options), thinc.HashEmbed(24, 50, **options)
    theirs.initialize()
    assert spacy.HashEmbed(24, 50, **options).from_bytes(theirs.to_bytes()).predict(ids).any()
    ours.from_bytes(theirs.to_bytes())
    np.testing.assert_array_equal(ours.predict(ids), theirs.predict(ids))
    assert ours.to_bytes() == theirs.to_bytes()
    theirs.from_bytes(ours.to_bytes())
    (out, grads), (expected, expected_grads) = step(ours, ids), step(theirs, ids)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-4, atol=1e-5)
    assert ours.predict(ids[:0]).shape == (0, 24)


def test_tables_side_by_side():
    """As spaCy builds its MultiHashEmbed."""
    rows, ids = [50, 10, 20, 20], np.stack([np.roll(IDS, i) for i in range(4)], 1)
    theirs = thinc.concatenate(*[
        thinc.HashEmbed(8, n, column=i, seed=8 + i, dropout=None) for i, n in enumerate(rows)
    ])  # fmt: skip
    theirs.initialize()
    expected, bytes_before = step(theirs, ids), theirs.to_bytes()
    ours = spacy.MultiHashEmbed(8, rows)
    ours.initialize()
    ours.from_bytes(bytes_before)
    out, grads = step(ours, ids)
    np.testing.assert_allclose(out, expected[0], rtol=1e-6, atol=1e-7)
    for gradient, wanted in zip(grads, expected[1], strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    pipeline = thinc.chain(theirs, thinc.Linear(3, 32))
    pipeline.initialize()
    before = pipeline.predict(ids)
    assert spacy.accelerate(pipeline) == 4
    np.testing.assert_array_equal(pipeline.predict(ids), before)
    assert spacy.accelerate(thinc.Linear(2, 2)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [False, True])
def test_spawned_processes(accelerated):
    """What ``nlp.pipe(n_process=2)`` does with a component: it sends the model to new processes."""
    model = thinc.chain(
        (thinc.HashEmbed if accelerated else spacy.HashEmbed)(8, 50, column=0, dropout=None),
        thinc.Linear(3, 8),
    )
    model.initialize()
    if accelerated:
        assert spacy.accelerate(model) == 1
    ids = np.stack([IDS, IDS], 1)
    expected = model.predict(ids)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for actual in pool.map(model.predict, [ids, ids]):
            np.testing.assert_array_equal(actual, expected)


def test_training_lowers_the_loss():
    thinc.fix_random_seed(0)
    model = thinc.chain(spacy.MultiHashEmbed(8, [30, 30]), thinc.Softmax(2, 16))
    ids = np.stack([IDS, IDS], 1)
    labels = thinc.to_categorical((IDS % 2).astype("i"), n_classes=2)
    model.initialize(ids, labels)
    optimizer, losses = thinc.Adam(0.05), []
    for _ in range(20):
        predicted, backprop = model.begin_update(ids)
        backprop((predicted - labels) / len(ids))
        model.finish_update(optimizer)
        losses.append(float(-(labels * np.log(predicted)).sum(1).mean()))
    assert losses[-1] < 0.8 * losses[0]


def test_from_a_config():
    config = {"model": {"@layers": "emblas.MultiHashEmbed.v1", "width": 4, "rows": [9, 7]}}
    model = thinc.registry.resolve(config)["model"]
    model.initialize()
    assert model.predict(np.stack([IDS, IDS], 1)).shape == (200, 8)
    with pytest.raises(ValueError, match="at least one table"):
        spacy.MultiHashEmbed(4, [])
