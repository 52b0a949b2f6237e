"""Optimized models give what the untouched ones give, in every way that they are used."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import emblas
import pytest
import torch
from emblas import packed

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")
st = pytest.importorskip("sentence_transformers", reason="needs emblas[hf]")

from emblas.integrations import transformers as hf  # noqa: E402
from emblas.integrations.optimize import UnsupportedModelError  # noqa: E402
from integrations.models import (  # noqa: E402
    CONFIGS,
    REPLACED,
    TEXTS,
    make_tokenizer,
    sharpen,
    tiny,
    tiny_replaced,
)
from sentence_transformers.sentence_transformer import losses  # noqa: E402

LENGTHS = (7, 1, 30, 12)
PAIRS = list(zip(TEXTS[:4], TEXTS[4:8], strict=True))


def make(name):
    return tiny_replaced(name) if name in REPLACED else tiny(name)


def padded(side="right", pad=0):
    ids = torch.full((len(LENGTHS), max(LENGTHS)), pad)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(LENGTHS):
        at = slice(max(LENGTHS) - length, None) if side == "left" else slice(length)
        ids[b, at], mask[b, at] = torch.randint(5, 90, (length,)), 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model, batch, **options):
    """Last hidden states where there are tokens, and gradients of the parameters."""
    model.zero_grad()
    hidden = model(**batch, **options).last_hidden_state[batch["attention_mask"].bool()]
    hidden.sin().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **copy.deepcopy(grads)}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        # The bias of keys has the gradient 0, but for rounding.
        torch.testing.assert_close(
            actual[name], value, rtol=1e-3, atol=1e-4 * scale + 2e-5, msg=name
        )


def state(model):
    """Everything that optimize() could change."""
    return (
        {name: (type(m), m.training, set(vars(m)),
                len(m._forward_hooks), len(m._forward_pre_hooks))
         for name, m in model.named_modules()},
        [(m.config.to_dict(), m.config._attn_implementation)
         for m in model.modules() if isinstance(m, transformers.PreTrainedModel)],
        {name: value.clone() for name, value in model.state_dict().items()},
    )  # fmt: skip


def assert_untouched(model, before):
    after = state(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*CONFIGS, *REPLACED])
def test_transformers(name, side):
    model = make(name)
    batch = padded(side, model.config.pad_token_id or 0)
    before = state(model)
    expected = run(model, batch)
    with emblas.optimize(model) as optimized:
        assert "runs packed" in repr(optimized)
        assert_same(run(model, batch), expected)
        shapes = []
        # The first one of a layer: position vectors have projections, too.
        first = "query_proj" if "deberta" in name else ""
        handle = next(
            module
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and path.endswith(first)
        )
        handle = handle.register_forward_hook(lambda m, i, o: shapes.append(i[0].shape))
        model(**batch)
        handle.remove()
        assert shapes[0][:2] == (1, sum(LENGTHS))  # no padding where the work is done
    model.zero_grad()
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v2, convolution", "t5"])
def test_all_outputs_and_ways_to_call(kind):
    model = make(kind)
    batch = padded(pad=model.config.pad_token_id)
    types = torch.randint(0, 2, batch["input_ids"].shape)
    calls = {
        "positional": lambda: model(batch["input_ids"], batch["attention_mask"]),
        "types": lambda: model(**batch, token_type_ids=types),
        "positions": lambda: model(**batch, position_ids=torch.arange(30)[None] + 2),
        "vectors": lambda: model(
            inputs_embeds=model.get_input_embeddings()(batch["input_ids"]),
            attention_mask=batch["attention_mask"],
        ),
        "layers": lambda: model(**batch, output_hidden_states=True),
        "no mask": lambda: model(batch["input_ids"]),
        "tuple": lambda: model(**batch, return_dict=False),
    }
    if kind != "bert":
        del calls["types"], calls["positions"]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = {name: call() for name, call in calls.items()}
        with emblas.optimize(model):
            for name, call in calls.items():
                actual, wanted = call(), expected[name]
                for i in range(len(wanted)):
                    one, other = actual[i], wanted[i]
                    one, other = (x if isinstance(x, tuple) else (x,) for x in (one, other))
                    for a, b in zip(one, other, strict=True):
                        if b is None:  # no pooler
                            assert a is None
                            continue
                        if b.dim() == 3 and name != "no mask":
                            a, b = a[mask], b[mask]
                        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "head", ["SequenceClassification", "MaskedLM", "TokenClassification", "CausalLM"]
)
def test_heads(head):
    """A model under a head: the head sees a padded batch, as ever."""
    torch.manual_seed(0)
    name = "qwen3" if head == "CausalLM" else "bert"
    model = getattr(transformers, f"AutoModelFor{head}").from_config(CONFIGS[name]()).eval()
    batch = padded()
    with torch.no_grad():
        expected = model(**batch).logits
        with emblas.optimize(model):
            actual = model(**batch).logits
            if head == "CausalLM":
                generated = model.generate(**padded("left"), max_new_tokens=3, do_sample=False)
                assert generated.shape == (4, 33)
    if expected.shape[:2] == batch["attention_mask"].shape:
        mask = batch["attention_mask"].bool()
        actual, expected = actual[mask], expected[mask]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v3", "t5"])
def test_texts_without_tokens(name):
    model = make(name)
    batch = padded()
    batch["attention_mask"][1] = 0
    with torch.no_grad():
        expected = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        with emblas.optimize(model):
            out = model(**batch).last_hidden_state
            assert out[1].eq(0).all()
            torch.testing.assert_close(
                out[batch["attention_mask"].bool()], expected, rtol=1e-4, atol=2e-5
            )
            batch["attention_mask"][:] = 0
            assert model(**batch).last_hidden_state.isfinite().all()


def test_masks_with_holes():
    model = tiny("bert")
    batch = padded()
    batch["attention_mask"][2, 4:7] = 0
    with torch.no_grad():
        expected = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        with emblas.optimize(model):
            out = model(**batch).last_hidden_state
            torch.testing.assert_close(
                out[batch["attention_mask"].bool()], expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", ["modernbert", "mpnet", "deberta-v3", "t5"])
def test_masks_with_holes_change_distances(name):
    model = make(name)
    batch = padded()
    batch["attention_mask"][2, 4:7] = 0
    with emblas.optimize(model), pytest.raises(ValueError, match="without holes"):
        model(**batch)


@torch.no_grad()
def test_positions_count_what_is_no_padding():
    """Masked tokens count, those that are padding by their number don't."""
    model = tiny("xlm-roberta")
    batch = padded()
    batch["attention_mask"][2, 4:7] = 0
    batch["input_ids"][2, 9] = batch["input_ids"][3, 0] = 0
    mask = batch["attention_mask"].bool()
    expected = model(**batch).last_hidden_state[mask]
    with emblas.optimize(model):
        actual = model(**batch).last_hidden_state[mask]
        texts = [torch.tensor([5, 0, 7, 0, 0, 9]), torch.tensor([0]), torch.tensor([6, 8])]
        together = hf.forward_packed(model, *packed.pack(texts))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    alone = [model(text[None], torch.ones_like(text[None])).last_hidden_state[0] for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v3", "t5"])
def test_training_mode_autocast_and_checkpointing(name):
    model = make(name).train()
    batch = padded()
    with emblas.optimize(model):
        assert model.training
        if model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).last_hidden_state.float().square().mean()
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_optimized(copier, name, tmp_path):
    model = sentence_transformer(tmp_path, name)
    expected = model.encode(TEXTS)
    with emblas.optimize(model):
        twin = copier(model)
    assert twin[0].model.config._attn_implementation == "emblas"
    # Nothing of the copy belongs to the original.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin.encode(TEXTS), expected, rtol=1e-5, atol=2e-6)


def test_another_process_takes_a_pickled_model(tmp_path):
    """As those of sentence-transformers' pools do: they import nothing of emblas themselves."""
    model = tiny("bert")
    batch = padded()
    code = (
        "import pickle, sys, torch\n"
        "model, batch = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.save(model(**batch).last_hidden_state.detach(), sys.argv[2])"
    )
    source, result = tmp_path / "model.pkl", tmp_path / "hidden.pt"
    with emblas.optimize(model):
        source.write_bytes(pickle.dumps((model, batch)))
        expected = model(**batch).last_hidden_state
    subprocess.run([sys.executable, "-c", code, source, result], check=True, timeout=240)
    torch.testing.assert_close(torch.load(result), expected, rtol=1e-5, atol=1e-5)


def test_models_are_let_go():
    model = tiny("bert")
    emblas.optimize(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_undone_twice():
    model = tiny("bert")
    first = emblas.optimize(model)
    first.undo()
    emblas.optimize(model)
    first.undo()
    assert emblas.verify(model, TEXTS[:2], tokenizer=make_tokenizer()) < 1e-5


# --- sentence-transformers -----------------------------------------------------------------------


def sentence_transformer(folder: Path, name="bert", mode="mean", **options):
    modules = st.sentence_transformer.modules
    make(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    transformer = modules.Transformer(str(folder))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), mode, **options)
    normalize = st.base.modules.Normalize()
    return st.SentenceTransformer(modules=[transformer, pooling, normalize], device="cpu").eval()


@pytest.mark.parametrize("mode", ["mean", "cls", ("max", "lasttoken")])
@pytest.mark.parametrize(
    "name", ["bert", "xlm-roberta", "modernbert", "qwen3", "mpnet", "deberta-v3", "t5"]
)
def test_encode(tmp_path, name, mode):
    model = sentence_transformer(tmp_path, name, mode)
    before = state(model)
    rows = []
    linear = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    handle = linear.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    calls = {
        "batches": lambda: model.encode(TEXTS, batch_size=3),
        "one": lambda: model.encode(TEXTS[0]),
        "tokens": lambda: model.encode(TEXTS, output_value="token_embeddings", batch_size=4),
        "truncated": lambda: model.encode(TEXTS, truncate_dim=8),
        "prompt": lambda: model.encode(TEXTS, prompt="the old "),
    }
    expected = {name: call() for name, call in calls.items()}
    with emblas.optimize(model) as optimized:
        assert len(optimized.changes) >= 3
        for what, call in calls.items():
            actual, wanted = call(), expected[what]
            if what == "tokens":
                actual, wanted = torch.cat(list(actual)), torch.cat(list(wanted))
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5, msg=what)
        rows.clear()
        model.encode(TEXTS)
        assert rows[0] == sum(map(len, expected["tokens"]))  # no padding where the work is done
    handle.remove()
    assert_untouched(model, before)
    assert (model.encode(TEXTS, batch_size=3) == expected["batches"]).all()


def test_prompts_left_out_of_the_mean(tmp_path):
    model = sentence_transformer(tmp_path, include_prompt=False)
    expected = model.encode(TEXTS, prompt="the old ")
    with emblas.optimize(model):
        torch.testing.assert_close(
            model.encode(TEXTS, prompt="the old "), expected, rtol=1e-5, atol=2e-6
        )


def test_saved_folder_is_that_of_the_untouched_model(tmp_path):
    model = sentence_transformer(tmp_path / "model")
    model.encode(TEXTS)  # changes the tokenizer's settings, by itself
    model.save(str(tmp_path / "plain"))
    with emblas.optimize(model):
        model.save(str(tmp_path / "optimized"))
    for file in sorted((tmp_path / "plain").rglob("*.json")):
        other = tmp_path / "optimized" / file.relative_to(tmp_path / "plain")
        assert json.loads(other.read_text()) == json.loads(file.read_text()), file.name


@pytest.mark.parametrize("kind", ["", "Cached"])
def test_training_loop(tmp_path, kind):
    """Losses of sentence-transformers, in a loop of one's own."""
    model = sentence_transformer(tmp_path)  # without dropout: gradients are compared
    options = {"mini_batch_size": 3} if kind else {}
    criterion = getattr(losses, f"{kind}MultipleNegativesRankingLoss")(model, **options)

    def step():
        model.zero_grad()
        features = [model.preprocess([pair[i] for pair in PAIRS]) for i in range(2)]
        criterion(features, None).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = step()
    with emblas.optimize(model):
        assert_same(step(), expected)


def test_trainer(tmp_path):
    datasets = pytest.importorskip("datasets")  # of the extra "dev", with pyarrow
    pyarrow = pytest.importorskip("pyarrow")
    states = []
    for optimized in (False, True):
        model = sentence_transformer(tmp_path / "model")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if optimized:
            emblas.optimize(model)
        rows = {"anchor": [a for a, _ in PAIRS], "positive": [b for _, b in PAIRS]}
        arguments = st.SentenceTransformerTrainingArguments(
            str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, use_cpu=True,
            report_to="none", save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        st.SentenceTransformerTrainer(
            model, arguments, datasets.Dataset(pyarrow.table(rows), fingerprint="pairs"),
            loss=losses.MultipleNegativesRankingLoss(model),
        ).train()  # fmt: skip
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
    start = dict(sentence_transformer(tmp_path / "model").named_parameters())
    assert any((states[0][n] - start[n]).abs().max() > 1e-3 for n in start)
    for name, value in states[0].items():
        # Adam turns rounding into whole steps where a gradient is 0 but for rounding.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-4, msg=name)


def test_sparse_and_cross_encoders(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path)
    sparse = st.SparseEncoder(str(tmp_path), device="cpu")
    expected = sparse.encode(TEXTS, convert_to_sparse_tensor=False)
    with emblas.optimize(sparse) as optimized:
        assert any("Splade" in change for change in optimized.changes)
        actual = sparse.encode(TEXTS, convert_to_sparse_tensor=False)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    cross = st.CrossEncoder(str(tmp_path), num_labels=1, device="cpu")
    expected = cross.predict(PAIRS)
    with emblas.optimize(cross):
        torch.testing.assert_close(cross.predict(PAIRS), expected, rtol=1e-5, atol=2e-6)


# --- proof and refusal ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mpnet", "deberta-v3", "t5"])
def test_verify_of_replaced_modules(tmp_path, name):
    model = sentence_transformer(tmp_path, name)
    before = state(model)
    optimized = emblas.optimize(model)
    assert emblas.verify(model, TEXTS, batch_size=4) < 1e-5
    with pytest.raises(UnsupportedModelError, match="already_optimized"):
        emblas.optimize(model)
    optimized.undo()
    assert_untouched(model, before)


def test_verify(tmp_path, monkeypatch):
    from emblas.integrations import transformers as hf

    model = sentence_transformer(tmp_path).train()
    sharpen(model)
    before = state(model)
    assert emblas.verify(model, TEXTS) < 1e-5
    assert_untouched(model, before)
    optimized = emblas.optimize(model)
    changes, during = list(optimized.changes), state(model)[1]
    assert emblas.verify(model, TEXTS, batch_size=4) < 1e-5
    assert optimized.changes == changes
    assert state(model)[1] == during
    optimized.undo()
    optimized.undo()
    assert_untouched(model, before)
    bare = model[0].model
    assert emblas.verify(bare, TEXTS, tokenizer=model.tokenizer) < 1e-5
    for arguments, message in (
        (((model, [])), "at least one text"),
        (((model, "text")), "as a list"),
        (((bare, TEXTS)), "tokenizer must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            emblas.verify(*arguments)

    attend = hf.varlen_attention

    def leak(q, k, v, cu_q, cu_k, *rest, **biases):
        return attend(q, k, v, cu_q[[0, -1]], cu_k[[0, -1]], len(q), len(k), *rest[2:], **biases)

    monkeypatch.setattr(hf, "varlen_attention", leak)
    with pytest.raises(UnsupportedModelError, match="differ by") as caught:
        emblas.verify(model, TEXTS)
    assert caught.value.reason == "outputs_differ"
    assert_untouched(model, before)


def refused(name):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}  # fmt: skip
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return {
        "no_transformer": lambda: torch.nn.Linear(2, 2),
        "attention_interface": lambda: transformers.DebertaModel(
            transformers.DebertaConfig(**sizes)),
        "encoder_decoder": lambda: transformers.T5Model(transformers.T5Config(**t5)),
        "forward": lambda: transformers.ViTModel(transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            image_size=32)),
    }[name]().eval()  # fmt: skip


@pytest.mark.parametrize(
    "reason", ["no_transformer", "attention_interface", "encoder_decoder", "forward"]
)
def test_refused(reason):
    model = refused(reason)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        emblas.optimize(model)
    assert caught.value.reason == reason
    assert_untouched(model, before)


def test_refused_twice_old_or_no_module(monkeypatch):
    from emblas.integrations import optimize as module

    model = tiny("bert")
    with emblas.optimize(model), pytest.raises(UnsupportedModelError, match="already_optimized"):
        emblas.optimize(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        emblas.optimize([])
    model.forward = model.forward
    with pytest.raises(UnsupportedModelError, match="has been replaced by another library"):
        emblas.optimize(model)
    del model.forward
    monkeypatch.setattr(module, "__version__", "4.57.1")
    with pytest.raises(UnsupportedModelError, match=r"transformers >= 5 is needed, this is 4\.57"):
        emblas.optimize(model)


def test_packed_input_passes_through():
    """What is packed already, as by forward_packed, is left to the attention."""
    from emblas.integrations import transformers as hf

    model = tiny("bert")
    texts = [torch.randint(5, 90, (n,)) for n in LENGTHS]
    with torch.no_grad():
        expected = torch.cat([model(text[None]).last_hidden_state[0] for text in texts])
        with emblas.optimize(model):
            actual = hf.forward_packed(model, *packed.pack(texts))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
