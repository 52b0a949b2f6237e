"""Embeddings of files: every format, stopping and going on."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas import __main__ as command
from emblas.encoder import Encoder, Ragged, encode_file, files, load_embeddings, read_texts
from integrations.models import TEXTS, make_tokenizer, tiny


@pytest.fixture
def encoder():
    return Encoder(tiny("bert"), make_tokenizer(), token_budget=64, prompts={"query": "the "})


def test_read_texts(tmp_path):
    texts = ["one, two", "", 'a "quote"', "ümläut\u2028 line"]
    lines = tmp_path / "a.txt"
    lines.write_text("\n".join(texts) + "\n", encoding="utf-8", newline="")
    assert list(read_texts(lines)) == texts
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8", newline="") as file:
        file.write("\r\n".join(texts))
    assert list(read_texts(tmp_path / "a.txt.gz")) == texts
    objects = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(texts))
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(objects)
    assert list(read_texts(tmp_path / "a.jsonl.xz", "body")) == texts
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"7\t{t}\n" for t in texts[2:3] * 2))
    assert list(read_texts(tmp_path / "a.tsv")) == texts[2:3] * 2
    (tmp_path / "a.csv").write_text('text,id\n"one, two",1\nthree,2\n')
    assert list(read_texts(tmp_path / "a.csv")) == ["one, two", "three"]
    (tmp_path / "b.csv").write_text("text\nrain\n", encoding="utf-8-sig")
    assert list(read_texts(tmp_path / "b.csv")) == ["rain"]
    (tmp_path / "b.jsonl").write_text('{"text": "rain"}\n\n{"text": "snow"}\n\n')
    assert list(read_texts(tmp_path / "b.jsonl")) == ["rain", "snow"]
    (tmp_path / "c.jsonl").write_text('{"text": "rain"}\n{"text": "snow"\n')
    (tmp_path / "c.txt").write_bytes(b"na\xefve\n")
    for path, field, message in (
        ("c.jsonl", None, "c.jsonl, line 2 must be JSON"),
        ("c.txt", None, "c.txt must be UTF-8"),
        ("a.txt", "text", "field is for jsonl"),
        ("a.jsonl.xz", None, "line 1 must have a text in field 'text'"),
        ("a.csv", "body", "must have a column 'body'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_texts(tmp_path / path, field))


@pytest.mark.parametrize("part", ["end", "middle", "begin"])
@pytest.mark.parametrize(("ending", "module"), [("gz", gzip), ("xz", lzma), ("bz2", bz2)])
def test_damaged_files(tmp_path, ending, module, part):
    data = bytearray(module.compress(np.random.default_rng(0).bytes(2000).hex().encode()))
    if part == "end":
        del data[-20:]
    elif part == "middle":
        data[500:900] = bytes(400)
    else:
        data[:4] = b"text"
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.txt\.{ending} is damaged: "):
        list(read_texts(path))


def test_tables_that_csv_refuses(tmp_path, monkeypatch):
    """Which ones depends on the version of Python: up to 3.10 those with a zero byte."""

    def refuse(self):
        raise csv.Error("line contains NUL")

    (tmp_path / "a.csv").write_text("text\nrain\n")
    monkeypatch.setattr(csv.DictReader, "__next__", refuse)
    with pytest.raises(ValueError, match=r"a\.csv is damaged: line contains NUL"):
        list(read_texts(tmp_path / "a.csv"))


def test_errors_of_the_system_stay(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_texts(tmp_path / "nowhere.txt"))


def test_shards_and_going_on(tmp_path, encoder):
    outputs = ["dense", "matryoshka", "int8", "bits", "tokens", "chunks"]
    settings = {"outputs": outputs, "dims": [8], "shard_size": 4, "chunk_size": 5}
    report = encode_file(encoder, TEXTS, tmp_path, **settings)
    expected = encoder.embed(TEXTS, [o for o in outputs if o != "int8"], dims=[8], chunk_size=5)
    assert report == {"texts": 9, "encoded": 9, "cut": 0, "tokens": expected.num_tokens.sum()}
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(load_embeddings(tmp_path), expected.dense, **close)
    np.testing.assert_allclose(
        load_embeddings(tmp_path, "matryoshka")[8], expected.matryoshka[8], **close
    )
    assert load_embeddings(tmp_path, "int8").shape == expected.dense.shape
    for name in ("tokens", "chunks", "chunk_spans"):
        actual, wanted = load_embeddings(tmp_path, name), getattr(expected, name)
        assert isinstance(actual, Ragged)
        np.testing.assert_array_equal(actual.offsets, wanted.offsets)
        np.testing.assert_allclose(actual.values, wanted.values, **close)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    (tmp_path / "shard-000001.npz").unlink()
    (tmp_path / "shard-000009.npz.part").write_bytes(b"half")
    again = encode_file(encoder, iter(TEXTS), tmp_path, **settings)
    assert again == {**report, "encoded": 4}
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert [name for name in before if after[name] != before[name]] == ["shard-000001.npz"]
    assert not list(tmp_path.glob("*.part"))
    np.testing.assert_allclose(load_embeddings(tmp_path), expected.dense, **close)


def test_other_texts_models_or_settings_are_refused(tmp_path, encoder):
    encode_file(encoder, TEXTS, tmp_path, shard_size=4)
    with pytest.raises(ValueError, match="texts 4 to 7 are not those that"):
        encode_file(encoder, [*TEXTS[:5], "snow", *TEXTS[6:]], tmp_path, shard_size=4)
    with pytest.raises(ValueError, match="more texts than there are"):
        encode_file(encoder, TEXTS[:8], tmp_path, shard_size=4)
    with pytest.raises(ValueError, match="shard_size = 4, not 5"):
        encode_file(encoder, TEXTS, tmp_path, shard_size=5)
    with pytest.raises(ValueError, match="prompt = '', not 'the '"):
        encode_file(encoder, TEXTS, tmp_path, shard_size=4, prompt="query")
    with pytest.raises(ValueError, match="model ="):
        encode_file(
            Encoder(tiny("bert"), make_tokenizer(), pooling="cls"), TEXTS, tmp_path, shard_size=4
        )
    for name in ("bits", "matryoshka"):
        with pytest.raises(ValueError, match=f"no output '{name}'; it was made with"):
            load_embeddings(tmp_path, name)
    with pytest.raises(ValueError, match="not finished"):
        load_embeddings(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        encode_file(encoder, TEXTS, tmp_path, shard_size=0)

    def texts():
        with pytest.raises(RuntimeError, match="another process"):
            encode_file(encoder, TEXTS, tmp_path / "locked")
        yield from TEXTS

    encode_file(encoder, texts(), tmp_path / "locked")


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "dims and the output 'matryoshka' go together", {"outputs": ["matryoshka"]}),
        # Options of `embed` that would change or replace what shards hold.
        (TypeError, "as_numpy", {"as_numpy": False}),
        (TypeError, "truncation", {"truncation": "error"}),
        (TypeError, "quantizer", {"outputs": ["int8"], "quantizer": None}),
        (TypeError, "texts must be a list or an iterator of str, got a single str", {"texts": "a"}),
        (TypeError, "texts must be a list or an iterator of str, got .* int", {"texts": 7}),
    ],
)
def test_settings_that_fit_nothing_leave_nothing(tmp_path, encoder, error, message, settings):
    with pytest.raises(error, match=message):
        encode_file(encoder, **{"texts": TEXTS, "folder": tmp_path / "out", **settings})
    assert not (tmp_path / "out").exists()


def test_errors_number_texts_from_the_first_of_all(tmp_path, encoder):
    with pytest.raises(TypeError, match=r"texts\[4\] must be a str, got NoneType"):
        encode_file(encoder, [*TEXTS[:4], None], tmp_path, shard_size=3)
    with pytest.raises(ValueError, match=r"texts\[4\] must hold whole characters.*'\\ud800', at 2"):
        encode_file(encoder, [*TEXTS[:4], "a \ud800"], tmp_path, shard_size=3)
    assert encode_file(encoder, TEXTS[:5], tmp_path, shard_size=3)["encoded"] == 2


def test_settings_are_compared_as_the_manifest_holds_them(tmp_path):
    encoder = Encoder(tiny("qwen3"), make_tokenizer(), pooling="last")
    settings = {"outputs": ("branches", "matryoshka"), "branches": ("rain",), "dims": range(8, 9)}
    encode_file(encoder, TEXTS, tmp_path, **settings)
    lists = {name: list(value) for name, value in settings.items()}
    for same in (settings, {**lists, "chunk_size": 128, "chunk_overlap": 0}):
        assert encode_file(encoder, TEXTS, tmp_path, **same)["encoded"] == 0


def test_a_range_without_shards_is_not_used(tmp_path, encoder, monkeypatch):
    """A run may be killed when the range of its first shard is stored and the shard isn't."""
    write = files._write

    def stopped(path, arrays):
        if path.name.startswith("shard-"):
            raise KeyboardInterrupt
        write(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            encode_file(encoder, TEXTS[2:3], tmp_path / "stopped", outputs=["int8"])
    assert (tmp_path / "stopped" / files.QUANTIZER).exists()
    for folder in ("stopped", "fresh"):
        encode_file(encoder, TEXTS, tmp_path / folder, outputs=["int8"])
    np.testing.assert_array_equal(
        load_embeddings(tmp_path / "stopped", "int8"), load_embeddings(tmp_path / "fresh", "int8")
    )


def test_no_texts(tmp_path, encoder):
    outputs = ["dense", "matryoshka", "int8", "bits", "tokens", "chunks"]
    settings = {"outputs": outputs, "dims": [8]}
    assert encode_file(encoder, [], tmp_path, **settings)["texts"] == 0
    expected = encoder.embed([], **settings)
    for name in (*outputs, "num_tokens", "chunk_spans"):
        actual, wanted = load_embeddings(tmp_path, name), getattr(expected, name)
        if name == "matryoshka":
            assert actual.keys() == wanted.keys()
            actual, wanted = actual[8], wanted[8]
        elif isinstance(wanted, Ragged):
            np.testing.assert_array_equal(actual.offsets, [0])
            actual, wanted = actual.values, wanted.values
        assert actual.shape == wanted.shape
        assert actual.dtype == wanted.dtype
    with pytest.raises(ValueError, match="no output 'lexical_ids'"):
        load_embeddings(tmp_path, "lexical_ids")
    assert encode_file(encoder, TEXTS, tmp_path, **settings)["encoded"] == 9
    assert len(load_embeddings(tmp_path)) == 9
    with pytest.raises(ValueError, match="more texts than there are"):
        encode_file(encoder, [], tmp_path, **settings)


def test_command(tmp_path, monkeypatch, capsys):
    tiny("bert").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"t": text}) for text in TEXTS))
    line = f"emblas encode {tmp_path}/texts.jsonl {tmp_path}/out --model {tmp_path}/model --field t"
    line += " --outputs dense bits --shard-size 5 --quiet"
    monkeypatch.setattr(sys, "argv", line.split())
    command.main()
    command.main()
    first, second = capsys.readouterr().out.splitlines()
    assert "9 texts in" in first
    assert ", 9 of them encoded now" in first
    assert ", 0 of them encoded now" in second
    assert load_embeddings(tmp_path / "out", "bits").shape == (9, 4)
    chunks = f" {tmp_path}/chunks --outputs chunks --max-length 8 --chunk-size 3 --chunk-overlap 1"
    chunks = line.replace(f" {tmp_path}/out", chunks).replace(" --outputs dense bits", "")
    monkeypatch.setattr(sys, "argv", chunks.split())
    command.main()
    assert "3 were cut to 8 tokens" in capsys.readouterr().out
    spans = load_embeddings(tmp_path / "chunks", "chunk_spans").values
    assert spans[:3].tolist() == [[0, 3], [2, 5], [4, 6]]
    monkeypatch.setattr(sys, "argv", [*line.split(), "--prompt", "x"])
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 1
    assert "choose another folder" in capsys.readouterr().err
    packed = gzip.compress((tmp_path / "texts.jsonl").read_bytes())
    (tmp_path / "texts.jsonl.gz").write_bytes(packed[:-20])
    damaged = line.replace("texts.jsonl", "texts.jsonl.gz").replace(
        f"{tmp_path}/out", f"{tmp_path}/x"
    )
    monkeypatch.setattr(sys, "argv", damaged.split())
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 1
    assert "texts.jsonl.gz is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_runs(tmp_path):
    """Nothing is lost, whenever a run is killed, and nothing is half there."""
    script = Path(__file__).with_name("killed_encode.py")
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert run.returncode == 0, run.stderr
    assert "runs were killed" in run.stdout
