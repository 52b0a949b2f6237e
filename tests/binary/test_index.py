from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emblas.binary import (
    BinaryIndex,
    CorruptIndexError,
    HadamardRotation,
    Int8Quantizer,
    asymmetric_topk,
    dense_topk,
    hamming_topk,
    pack_rabitq,
    pack_sign,
    range_search_csr,
    rescored_topk,
    storage,
)

DIM = 44


def vectors(rows, seed=0):
    x = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


def filled(second_level="none", parts=(50, 1, 70), **options):
    index = BinaryIndex(DIM, second_level=second_level, **options)
    x = vectors(sum(parts))
    for part in x.split(list(parts)):
        index.add(part)
    return index, x


def same(a, b):
    assert len(a) == len(b)
    queries = vectors(7, seed=1)
    for one, other in zip(a.search(queries, 9), b.search(queries, 9), strict=True):
        assert torch.equal(one, other)


# --- search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_level", ["none", "float32", "float16", "int8"])
def test_search(second_level):
    """The same answers as the functions on the undivided arrays."""
    index, x = filled(second_level)
    queries = vectors(6, seed=1)
    documents = {"none": None, "float32": x, "float16": x.half()}.get(second_level)
    quantizer = None
    if second_level == "int8":
        quantizer = index.quantizer
        documents = quantizer.quantize(x)
    expected = rescored_topk(
        queries, pack_sign(x), 8, documents=documents, quantizer=quantizer, multiplier=3
    )
    scores, ids = index.search(queries, 8, multiplier=3)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(scores, expected[0])
    scores, ids = index.search(queries, 200)
    assert (ids[:, :121].sort(1).values == torch.arange(121)).all()
    assert (ids[:, 121:] == -1).all()
    assert (scores[:, 121:] == -torch.inf).all()


@pytest.mark.parametrize("second_level", ["none", "float32"])
def test_correction(second_level):
    """Estimates of cosines from codes and one float; candidates by them if there are vectors."""
    index, x = filled(second_level, correction="rabitq")
    queries = vectors(6, seed=1) * 3
    codes, scale, error = pack_rabitq(index.rotation(x))
    unit = torch.nn.functional.normalize(queries, dim=1)
    expected = asymmetric_topk(index.rotation(unit), codes, 12, scale=scale)
    exact = dense_topk(queries, x, 121, metric="cosine")
    cosines = torch.zeros(6, 121).scatter(1, exact[1], exact[0])
    scores, ids = index.search(queries, 4, multiplier=3)
    if second_level == "none":
        assert torch.equal(ids, expected[1][:, :4])
        torch.testing.assert_close(scores, expected[0][:, :4])
        assert ((scores - cosines.gather(1, ids)).abs() < 5 * error[ids]).all()
    else:
        best = cosines.gather(1, expected[1]).topk(4, 1).values
        torch.testing.assert_close(scores, best)
    index.update(torch.tensor([9]), x[:1])
    index.remove(torch.tensor([0]))
    assert index.search(x[:1], 1)[1].item() == 9
    assert index.search(x[:2], 200)[1].sort(1).values[:, 80:].unique(dim=1).shape[1] == 120
    allowed = torch.tensor([5, 9, 70])
    assert index.search(x[:1], 5, filter=allowed)[1][0, :3].sort().values.tolist() == [5, 9, 70]
    counts = index.range_search(x[1:3], 0)[0].diff()
    assert (counts >= 1).all()
    zero = BinaryIndex(DIM, correction="rabitq")
    zero.add(torch.zeros(2, DIM))
    assert zero.search(x[:1], 3)[1].tolist() == [[0, 1, -1]]
    assert zero.search(x[:1], 3)[0][0, :2].abs().max() < 1e-30


@pytest.mark.parametrize("second_level", ["none", "float32"])
@pytest.mark.parametrize("size", [1, 3, 200])
def test_parts(tmp_path, second_level, size):
    """Every row is in one part, in memory and on disk, and only its bytes are touched."""
    index, _ = filled(second_level)
    index.remove(torch.tensor([4, 100]))
    index.save(tmp_path)
    queries = vectors(3, seed=1)
    for whole in (index, BinaryIndex.open(tmp_path)):
        found = []
        for rank in range(size):
            part = whole.shard(rank, size)
            found_here = part.search(queries, max(len(part), 1))
            scores, ids = (values[:, : len(part)] for values in found_here)
            assert (ids >= 0).all()
            assert part.add(vectors(1)).item() == 121  # a part is an index of its own
            found.append((scores, ids))
        assert len(whole) == 119
        scores, ids = (torch.cat(values, 1) for values in zip(*found, strict=True))
        expected = whole.search(queries, 119)
        order = ids.sort(1)
        assert torch.equal(order.values, expected[1].sort(1).values)
        torch.testing.assert_close(
            scores.gather(1, order.indices), expected[0].gather(1, expected[1].sort(1).indices)
        )


def test_empty():
    index, queries = BinaryIndex(DIM), vectors(2)
    assert len(index) == 0
    assert index.search(queries, 3)[1].tolist() == [[-1] * 3] * 2
    assert [part.tolist() for part in index.range_search(queries, 3)] == [[0, 0, 0], [], []]
    index.add(vectors(0))
    assert len(index) == 0


def test_ids_and_filters():
    index, x = BinaryIndex(DIM, second_level="float32"), vectors(60)
    index.add(x[:20], torch.arange(100, 120))
    assert index.add(x[20:40]).tolist() == list(range(120, 140))
    index.add(x[40:], torch.arange(20, dtype=torch.int32))
    assert index.search(x[[0, 25, 45]], 1)[1].tolist() == [[100], [125], [5]]
    allowed = torch.tensor([3, 7, 101, 139])
    scores, ids = index.search(x[:5], 4, filter=allowed)
    rows = torch.tensor([43, 47, 1, 39])
    expected = dense_topk(x[:5], x, 4, metric="cosine", filter=rows)
    assert torch.equal(rows[torch.searchsorted(allowed, ids)], expected[1])
    torch.testing.assert_close(scores, expected[0])


def test_range_search():
    index, x = filled()
    index.remove(torch.tensor([0, 60]))
    queries = vectors(5, seed=2)
    mask = torch.ones(121, dtype=torch.bool)
    mask[[0, 60]] = False
    expected = range_search_csr(pack_sign(queries), pack_sign(x), 18, filter=mask)
    for actual, wanted in zip(index.range_search(queries, 18), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_remove_and_update():
    index, x = filled("float32")
    index.remove(torch.tensor([3, 50, 120]))
    assert len(index) == 118
    keep = torch.ones(121, dtype=torch.bool)
    keep[[3, 50, 120]] = False
    queries = vectors(6, seed=1)
    expected = dense_topk(queries, x, 118, metric="cosine", filter=keep)
    assert torch.equal(index.search(queries, 118)[1], expected[1])
    index.update(torch.tensor([7]), vectors(1, seed=9))
    assert len(index) == 118
    assert index.search(vectors(1, seed=9), 1)[1].item() == 7
    assert index.search(x[7:8], 118)[0][0, 0] < 0.999
    index.add(x[3:4], torch.tensor([3]))  # a removed id is free again
    assert index.search(x[3:4], 1)[1].item() == 3


def test_threshold_and_batches():
    pytest.importorskip("tqdm", reason="shows a progress bar")
    x = vectors(90) + 0.3
    index = BinaryIndex(DIM, threshold=x.mean(0))
    index.add_batches(x.split(32), progress=True)
    expected = hamming_topk(
        pack_sign(x[:4], threshold=x.mean(0)), pack_sign(x, threshold=x.mean(0)), 5
    )
    assert torch.equal(index._nearest(x[:4], 5, None)[1], expected[1])


def test_faiss(tmp_path):
    faiss = pytest.importorskip("faiss", reason="needs emblas[bench]")
    x = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    theirs = faiss.IndexBinaryFlat(64)
    theirs.add(np.packbits(x > 0, axis=1, bitorder="little"))
    index = BinaryIndex.from_faiss(theirs)
    queries = torch.from_numpy(x[:9])
    assert torch.equal(
        index._nearest(queries, 5, None)[1],
        hamming_topk(pack_sign(queries), pack_sign(torch.from_numpy(x)), 5)[1],
    )
    back = index.to_faiss()
    np.testing.assert_array_equal(faiss.vector_to_array(back.xb), faiss.vector_to_array(theirs.xb))
    with pytest.raises(ValueError, match="divisible by 8"):
        BinaryIndex(DIM).to_faiss()


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_level", ["none", "float32", "float16", "int8"])
@pytest.mark.parametrize(("verify", "correction"), [("lazy", "none"), ("full", "rabitq")])
def test_save_and_open(tmp_path, second_level, verify, correction):
    threshold = torch.randn(DIM) * 0.05 if correction == "none" else None
    index, _ = filled(second_level, threshold=threshold, correction=correction)
    if index.rotation is not None:  # the signs in the file count, not those of a seed
        index = BinaryIndex(DIM, second_level=second_level, correction=correction)
        index.rotation = HadamardRotation(DIM, seed=5)
        for part in vectors(121).split([50, 1, 70]):
            index.add(part)
    index.remove(torch.tensor([5, 77]))
    index.save(tmp_path)
    opened = BinaryIndex.open(tmp_path, verify=verify)
    same(index, opened)
    # What is opened can grow, shrink and be saved again, without rewriting what is there.
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    for one in (index, opened):
        assert one.add(vectors(30, seed=4)).tolist() == list(range(121, 151))
        one.remove(torch.tensor([6, 130]))
    opened.save(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    same(index, BinaryIndex.open(tmp_path, verify=verify))
    opened.save(tmp_path / "copy")
    same(index, BinaryIndex.open(tmp_path / "copy"))


def test_shards_are_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    index, x = filled("float16", parts=(121,))
    index.save(tmp_path)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    tensors = safetensors.load_file(shard)
    assert torch.equal(tensors["codes"], pack_sign(x))
    assert torch.equal(tensors["vectors"], x.half())
    assert torch.equal(tensors["ids"], torch.arange(121))


def test_reader_is_safe_while_another_process_appends(tmp_path):
    index, _ = filled("float32")
    index.save(tmp_path)
    reader = BinaryIndex.open(tmp_path)
    before = reader.search(vectors(4, seed=3), 5)
    index.add(vectors(40, seed=8))
    index.remove(torch.arange(10))
    index.save(tmp_path)
    for one, other in zip(reader.search(vectors(4, seed=3), 5), before, strict=True):
        assert torch.equal(one, other)
    same(BinaryIndex.open(tmp_path), index)


def damage(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_found_before_an_answer(tmp_path):
    index, _ = filled("float32", parts=(121,))
    index.save(tmp_path / "good")
    queries = vectors(2)

    def copy():
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        (shard,) = (tmp_path / "bad").glob("shard-*")
        return tmp_path / "bad", shard

    for at in (0, 9, 100, 5000, -1):  # length, header, padding, data, last byte
        folder, shard = copy()
        damage(shard, at)
        with pytest.raises(CorruptIndexError, match=r"shard-.* damaged"):
            BinaryIndex.open(folder).search(queries, 3)
        with pytest.raises(CorruptIndexError, match=r"shard-.* damaged"):
            BinaryIndex.open(folder, verify="full")
    for change in (lambda data: data[:-1], lambda data: data + b"x", lambda data: b""):
        folder, shard = copy()
        shard.write_bytes(change(shard.read_bytes()))
        with pytest.raises(CorruptIndexError, match=r"must have .* bytes"):
            BinaryIndex.open(folder)
    folder, shard = copy()
    shard.unlink()
    with pytest.raises(CorruptIndexError, match="No such file"):
        BinaryIndex.open(folder)
    folder, _ = copy()
    manifest = folder / storage.MANIFEST
    for at in range(0, manifest.stat().st_size, 37):
        damage(manifest, at)
        with pytest.raises(CorruptIndexError, match="manifest"):
            BinaryIndex.open(folder)
        damage(manifest, at)  # back
    for text in ("", "{}", "[1]", '{"index": {"format": "other", "version": 1}, "crc32": 0}'):
        manifest.write_text(text)
        with pytest.raises(CorruptIndexError, match="manifest"):
            BinaryIndex.open(folder)
    with pytest.raises(FileNotFoundError, match="holds no index"):
        BinaryIndex.open(tmp_path)


def test_newer_version(tmp_path, monkeypatch):
    filled()[0].save(tmp_path)
    monkeypatch.setattr(storage, "VERSION", 0)
    with pytest.raises(CorruptIndexError, match="version 1, this library reads up to 0"):
        BinaryIndex.open(tmp_path)


def test_only_used_chunks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 1000)
    index, x = filled("float32", parts=(121,))
    index.save(tmp_path)
    opened = BinaryIndex.open(tmp_path)
    (segment,) = opened._segments
    assert not segment.shard._checked.any()
    opened.search(x[:1], 2, multiplier=1)
    assert 0 < segment.shard._checked.sum() < len(segment.shard._checked)
    same(index, opened)
    (shard,) = tmp_path.glob("shard-*")
    for at in range(4096, shard.stat().st_size, 999):  # no chunk escapes a full search
        damage(shard, at)
        with pytest.raises(CorruptIndexError, match="is damaged: bytes"):
            BinaryIndex.open(tmp_path).search(x[:1], 121)
        damage(shard, at)


class Killed(BaseException):
    """The process ends here."""


def test_killed_at_any_step_of_a_save(tmp_path, monkeypatch):
    """Whatever write is the last, the old or the new index opens."""
    old, _ = filled("float32")
    old.save(tmp_path / "start")
    steps = 0
    while True:
        folder = tmp_path / f"run{steps}"
        shutil.copytree(tmp_path / "start", folder)
        new = BinaryIndex.open(folder)
        new.add(vectors(25, seed=5))
        new.remove(torch.arange(4))
        left = steps

        def dying(function):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(os.fsync))
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(storage, "remove_leftovers", dying(storage.remove_leftovers))
            try:
                new.save(folder)
                finished = True
            except Killed:
                finished = False
        opened = BinaryIndex.open(folder, verify="full")
        assert len(opened) in ((142,) if finished else (121, 142))
        same(opened, old if len(opened) == 121 else new)
        opened.save(folder)  # and the next save clears away what was left
        names = {path.name for path in folder.iterdir()}
        assert len(names) == len(opened._segments) + 1
        if finished:
            break
        steps += 1
    assert steps >= 5


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked after torch has run")
def test_processes_killed_while_saving(tmp_path):
    """Real processes, ended at random moments, while another reads."""
    script = str(Path(__file__).with_name("killed_saves.py"))
    result = subprocess.run([sys.executable, script, str(tmp_path)], check=False,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.replace("RuntimeError", "").count("Error") == 0, result.stderr


def test_changes_of_others_are_not_lost(tmp_path):
    index, _ = filled()
    index.save(tmp_path)
    other = BinaryIndex.open(tmp_path)
    other.add(vectors(2))
    other.save(tmp_path)
    index.add(vectors(1))
    with pytest.raises(RuntimeError, match="open it again"):
        index.save(tmp_path)
    same(BinaryIndex.open(tmp_path), other)
    other.add(vectors(3))
    other.save(tmp_path)  # its own changes are no others'
    filled()[0].save(tmp_path)  # a new index takes the place of what is there
    assert len(BinaryIndex.open(tmp_path)) == 121
    shutil.rmtree(tmp_path)
    index.save(tmp_path)  # and files that were deleted are written again
    same(BinaryIndex.open(tmp_path, verify="full"), index)


def test_index_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """Files that vanish because another index came are no damage."""
    filled()[0].save(tmp_path)
    new = BinaryIndex(DIM)
    new.add(vectors(5))
    read = storage.read_manifest

    def read_and_replace(folder):
        manifest = read(folder)
        monkeypatch.setattr(storage, "read_manifest", read)
        new.save(tmp_path)
        return manifest

    monkeypatch.setattr(storage, "read_manifest", read_and_replace)
    same(BinaryIndex.open(tmp_path), new)


def test_manifest_is_readable(tmp_path):
    filled()[0].save(tmp_path)
    index = json.loads((tmp_path / storage.MANIFEST).read_text())["index"]
    assert index["format"] == "emblas binary index"
    assert index["dim"] == DIM
    assert index["bit_order"] == "big"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "dim must be at least 1", lambda index: BinaryIndex(0)),
        (ValueError, "second_level must be", lambda index: BinaryIndex(8, second_level="int4")),
        (
            ValueError,
            "quantizer must be left out",
            lambda index: BinaryIndex(8, quantizer=Int8Quantizer(torch.zeros(8), torch.ones(8))),
        ),
        (ValueError, "threshold must have", lambda index: BinaryIndex(8, threshold=torch.ones(7))),
        (ValueError, "correction must be", lambda index: BinaryIndex(8, correction="pq")),
        (
            ValueError,
            "threshold must be left out",
            lambda index: BinaryIndex(8, threshold=torch.ones(8), correction="rabitq"),
        ),
        (ValueError, "must be finite", lambda index: CORRECTED.add(torch.ones(2, DIM) / 0)),
        (ValueError, "where there is a corr", lambda index: CORRECTED.add_codes(CODES)),
        (ValueError, "44 dimensions, got 5", lambda index: index.add(torch.ones(2, 5))),
        (ValueError, "must not contain NaN", lambda index: index.add(torch.ones(2, DIM) / 0 * 0)),
        (ValueError, "one entry for each of 1 rows", lambda index: index.add(vectors(1), IDS)),
        (ValueError, "different", lambda index: index.add(vectors(3), IDS.clamp_max(200))),
        (ValueError, "ids must be new, but 3", lambda index: index.add(vectors(3), IDS - 197)),
        (ValueError, "6 bytes wide, got 2", lambda index: index.add_codes(CODES[:, :2])),
        (ValueError, "zeros after bit 44", lambda index: index.add_codes(CODES)),
        (KeyError, "id 200 is not in the index", lambda index: index.remove(IDS)),
        (KeyError, "id 200 is not in the index", lambda index: index.update(IDS, vectors(3))),
        (KeyError, "id 200 is not", lambda index: index.search(vectors(1), 1, filter=IDS)),
        (ValueError, "44 dimensions, got 5", lambda index: index.search(torch.ones(2, 5), 1)),
        (ValueError, "must be finite", lambda index: index.search(torch.ones(2, DIM) / 0, 1)),
        (ValueError, "k must be at least 1, got 0", lambda index: index.search(vectors(1), 0)),
        (ValueError, "multiplier must be", lambda index: index.search(vectors(1), 1, multiplier=0)),
        (ValueError, "rank must lie", lambda index: index.shard(2, 2)),
        (ValueError, "rank must lie", lambda index: index.shard(0, 0)),
        (ValueError, "verify must be", lambda index: BinaryIndex.open(".", verify="none")),
    ],
)
def test_bad_arguments(error, message, call):
    index, _ = filled()
    with pytest.raises(error, match=message):
        call(index)
    same(index, filled()[0])  # and nothing has changed


CORRECTED = BinaryIndex(DIM, correction="rabitq")
IDS, CODES = torch.tensor([200, 201, 202]), torch.full((1, 6), 255, dtype=torch.uint8)
