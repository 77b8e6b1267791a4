"""What the KV of a model depends on: stored KV is read only where all of it is the same."""

import hashlib
from pathlib import Path

import numpy as np
from transformers.utils.hub import cached_file

from tokendance.models.loader import LoadedModel, checkpoint_source

_READ_BYTES = 2**22
_DIGEST_BYTES = 16


def identity_of(model: LoadedModel) -> dict[str, str]:
    """Describe a model: weights by their hash, dtype, tokenizer, rotation, and shape of the KV.

    The model's name is not among what must be the same: a copy in another folder is the same model.
    Hashing reads the weights once, about a second for each gigabyte.
    """
    tokenizer = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    tokenizer.update(model.tokenizer.backend_tokenizer.to_str().encode())
    tokenizer.update(str(model.tokenizer.chat_template).encode())
    rotation = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for layer in model.layers:
        rotation.update(layer.rope.layout.value.encode())
        rotation.update(layer.rope.inv_freq.cpu().numpy().astype(np.float32).tobytes())
        rotation.update(str(layer.window).encode())
    shape = model.shape
    return {
        "weights": _weights_hash(checkpoint_source(model.name)),
        "dtype": model.precision,
        "tokenizer": tokenizer.hexdigest(),
        "rotation": rotation.hexdigest(),
        "shape": f"{shape.num_layers} layers, {shape.num_kv_heads} heads of {shape.head_dim}",
    }


def _weights_hash(source: str) -> str:
    config = cached_file(source, "config.json")
    assert config is not None, "a model that is loaded has a configuration"
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for path in sorted(Path(config).parent.glob("*.safetensors")):
        with path.open("rb") as file:
            while content := file.read(_READ_BYTES):
                digest.update(content)
    return digest.hexdigest()
