"""Another version of a package, which lacks what emblas uses of it, is named."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import emblas
import pytest
from emblas.integrations import versions
from emblas.integrations.versions import UnsupportedVersionError

# Modules of emblas: the package that they need, and a module of it that they import.
USERS = {
    "transformers": ("transformers", "transformers"),
    "transformers_modules": ("transformers", "transformers.modeling_outputs"),
    "last_layer": ("transformers", "transformers.models.bert.modeling_bert"),
    "linear_layers": ("transformers", "transformers.activations"),
    "optimize": ("transformers", "transformers.utils.generic"),
    "sentence_transformers_pooling": (
        "sentence-transformers", "sentence_transformers.base.modules.normalize"),
    "spacy": ("thinc", "thinc.api"),
}  # fmt: skip


@pytest.mark.parametrize("name", USERS)
def test_imports(name, monkeypatch):
    """A module that has moved, and a package that isn't there."""
    package, home = USERS[name]
    pytest.importorskip(home)
    module = f"emblas.integrations.{name}"
    importlib.import_module(module)  # and what it imports itself
    monkeypatch.setitem(sys.modules, home, None)
    spec = importlib.util.find_spec(module)
    needs = re.escape(f"{module} needs {package} {versions.KNOWN[package][0]}, ")
    with pytest.raises(ImportError, match=needs + r".* is installed, where import of "):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    monkeypatch.setattr(metadata, "version", not_there)
    with pytest.raises(ImportError, match=needs + r"there is none .*: pip install '"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def not_there(name):
    raise metadata.PackageNotFoundError(name)


class Lacks:
    """Passes everything on to another object but one name."""

    def __init__(self, of, name):
        self._of, self._name = of, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._of, name)


def test_attention_of_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")
    from emblas.integrations import transformers as hf
    from integrations.models import tiny

    model = tiny("bert")
    text = f"Lacks has no _attn_implementation in transformers {transformers.__version__}"
    config = Lacks(model.config, "_attn_implementation")
    with pytest.raises(UnsupportedVersionError, match=re.escape(text)):
        hf.implementation(config)
    monkeypatch.setattr(model, "config", config)
    with pytest.raises(emblas.integrations.optimize.UnsupportedModelError, match=text) as caught:
        emblas.optimize(model)
    assert caught.value.reason == "transformers_version"
    assert "forward" not in vars(model)
    monkeypatch.setattr(hf, "PreTrainedModel", Lacks)
    with pytest.raises(UnsupportedVersionError, match="_can_record_outputs"):
        hf.routers(Lacks(model, "_can_record_outputs"))


def test_layers_of_transformers(monkeypatch):
    """A last layer that has other parts than it had is found out before anything is encoded."""
    pytest.importorskip("transformers", reason="needs emblas[hf]")
    from integrations.models import tiny
    from transformers.models.bert.modeling_bert import BertLayer

    model = tiny("bert")
    monkeypatch.delattr(BertLayer, "feed_forward_chunk")
    monkeypatch.setattr(BertLayer, "forward", lambda self, x, *args, **kwargs: x)
    with pytest.raises(emblas.integrations.optimize.UnsupportedModelError, match="no attribute 'f"):
        emblas.optimize(model)
    assert "forward" not in vars(model)


def test_models_of_thinc():
    thinc = pytest.importorskip("thinc.api", reason="thinc is not installed")
    from emblas.integrations import spacy

    class Moved(thinc.Model):
        def walk(self):
            return [Lacks(self, "_func")]

    with pytest.raises(UnsupportedVersionError, match=r"no _func in thinc 8.* knows thinc >= 8\.3"):
        spacy.accelerate(Moved("hashembed", lambda *args: None))


def test_private_names_are_asked_for_in_one_place():
    """Nothing else of the integrations reads a private name of an object that isn't its own."""
    package = Path(emblas.__file__).parent
    own = {"emblas", "self", "cls", "_op", "optimized", "active"}
    for path in [*(package / "integrations").glob("*.py"), *(package / "encoder").glob("*.py")]:
        code = re.sub(r'"""(?s:.*?)"""', "", path.read_text())
        for holder, name in re.findall(r"(\w+)\.(_[a-z]\w*)(?!\w*\s*=[^=])", code):
            public = name in ("_asdict", "_replace")  # of named tuples
            assert public or holder in own, f"{path.name}: {holder}.{name}"
