"""Stores that earlier code has written are opened, read and gone on with.

`data/store-1.zip` is a store of format 1, written on the tiny model by the code before the rooms
`disk` and `tier` were made, and `data/store-1.json` is what that code read of it. Two agents talk
for four rounds in the session "town", two rounds in float32 and two in a byte per number; a chat of
another tenant has left its KV under the name "chat". Neither file is ever written anew: a later
format gets files of its own beside them.
"""

import hashlib
import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokendance import LLM, SamplingParams
from tokendance.disk.records import CacheRecord, FileId, SessionKey
from tokendance.disk.store import DiskStore
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions

DATA = Path(__file__).parent / "data"
EXPECTED: dict[str, Any] = json.loads((DATA / "store-1.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with zipfile.ZipFile(DATA / "store-1.zip") as archive:
        archive.extractall(tmp_path / "store")
    return tmp_path / "store"


def test_everything_is_read_as_it_was(folder: Path) -> None:
    with DiskStore(folder, None) as disk:
        assert disk.num_leftovers == 0
        assert disk.verify() == []
        disk.check_integrity()

        def describe(cache: CacheRecord) -> dict[str, Any]:
            return {
                "token_ids": cache.token_ids.tolist(),
                "num_exact": cache.num_exact,
                "num_prompt": cache.num_prompt,
                "extents": [
                    [disk.index.file(FileId(file)).name, first, count]
                    for file, first, count in cache.extents.tolist()
                ],
            }

        sessions = []
        for key in sorted(disk.index.session_keys(), key=lambda key: key.name):
            session = disk.session(key)
            assert session is not None
            sessions.append(
                {
                    "tenant": key.tenant,
                    "name": key.name,
                    "round": session.round,
                    "ttl_s": session.ttl_s,
                    "state": session.state.decode(),
                    "caches": {agent: describe(cache) for agent, cache in session.caches.items()},
                    "segments": [
                        describe(segment.cache)
                        | {"run": segment.run, "index": segment.index, "rounds": segment.num_rounds}
                        for segment in session.segments
                    ],
                }
            )
        assert sessions == EXPECTED["sessions"]
        files = {}
        for file in disk.index.file_ids():
            written = disk.index.file(file)
            rows = disk.read(written)
            digest = hashlib.blake2b(digest_size=16)
            for array in (rows.positions, rows.keys, rows.values):
                digest.update(np.ascontiguousarray(array).tobytes())
            files[written.name] = {
                "num_rows": written.num_rows,
                "num_bytes": written.num_bytes,
                "dtype": str(rows.keys.dtype),
                "rows": digest.hexdigest(),
            }
        assert files == EXPECTED["files"]


def test_its_sessions_go_on(
    folder: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sqlite3.connect(folder / "index.sqlite")
    (identity,) = index.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
    index.close()
    # Another version of torch may draw other weights; which tokens are read and computed depends
    # on none of them.
    monkeypatch.setattr("tokendance.llm.identity_of", lambda _: json.loads(identity))
    model = load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")
    page_bytes = model.shape.kv_bytes_per_token(model.dtype) * 16
    options = EngineOptions(kv_budget=2000 * page_bytes, correction="edges:3+1")
    llm = LLM.from_loaded(model, options)
    llm.open_store(folder)
    session = llm.session("town", params=SamplingParams(max_tokens=4, ignore_eos=True))
    assert [agent.name for agent in session.agents] == ["Ann", "Bo"]
    wanted = EXPECTED["goes_on"]
    restored = session.restore(always=True)
    assert restored is not None
    assert [restored.rows, restored.num_bytes, restored.computed, restored.problems] == [
        wanted["rows"], wanted["num_bytes"], 0, (),
    ]  # fmt: skip
    result = session.run("4")
    result.raise_for_errors()
    assert [output.prompt_tokens for output in result.outputs] == wanted["prompt_tokens"]
    assert [output.computed_tokens for output in result.outputs] == wanted["computed_tokens"]
    assert llm.tier is not None
    chat = llm.tier.disk.session(SessionKey("tenant", "chat"))
    assert chat is not None
    restored = llm.tier.restore(chat, llm.encoder.salt, always=True)
    assert [restored.rows, restored.computed] == [
        EXPECTED["chat"]["rows"],
        EXPECTED["chat"]["computed"],
    ]
    llm.tier.disk.check_integrity()
    llm.close()
