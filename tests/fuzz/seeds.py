"""Valid small files to begin from, of every form that the readers know; written without torch.

Torch files are assembled by hand: a few opcodes, as torch.save writes them.
"""

import io
import json
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inhouse.runtime.form import Form
from inhouse.runtime.packed import CodeRows, pack_codes, pack_float, pack_rows
from inhouse.runtime.packed_sparse import pack_vectors, to_sparse
from inhouse.store.dtypes import GGML_TYPES
from inhouse.store.gguf_write import write_gguf
from inhouse.store.safetensors import write_safetensors
from inhouse.store.stored_model import TABLE, WEIGHTS, write_stored
from inhouse.store.writing import from_array, from_bytes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 512,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
}
LLAMA = CONFIG | {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
}
MISTRAL = CONFIG | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
QWEN3 = CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}
CONFIGS = (LLAMA, MISTRAL, QWEN3)
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 36},
    "weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"},
}


def _written(write: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "seed"))
        return Path(folder, "seed").read_bytes()


def safetensors_files() -> list[bytes]:
    kinds = ("f4", "f2", "i8", "u1", "?", "f8")
    arrays = [from_array(f"layer.{kind}", np.arange(6).reshape(2, 3).astype(kind)) for kind in kinds]
    arrays += [from_array("scalar", np.array(1.5, np.float32)), from_array("empty", np.zeros((0, 3), np.float16))]
    brain = from_bytes("bf16", "BF16", (4,), np.arange(8, dtype=np.uint8))
    return [
        _written(lambda path: write_safetensors(path, [*arrays, brain], {"format": "pt"})),
        _written(lambda path: write_safetensors(path, arrays[:1])),
        _written(lambda path: write_safetensors(path, [])),
    ]


def shards() -> dict[str, bytes]:
    """The files that INDEX names."""
    first = [from_array("a", np.ones(3, np.float32)), from_array("b", np.ones((2, 2), np.float32))]
    second = [from_array("c", np.ones(2, np.float32))]
    return {
        "m-1.safetensors": _written(lambda path: write_safetensors(path, first)),
        "m-2.safetensors": _written(lambda path: write_safetensors(path, second)),
    }


def gguf_files() -> list[bytes]:
    rng = np.random.default_rng(0)
    blocks = [
        from_bytes(f"blk.{name}", name, (2, kind.block), rng.integers(0, 60, 2 * kind.nbytes, np.uint8))
        for name, kind in GGML_TYPES.items()
    ]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": np.uint32(64),
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 5,
        "llama.feed_forward_length": 172,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
        "flag": True,
        "f64": np.float64(0.5),
        "i64": np.int64(-5),
        "u8": np.uint8(5),
        "tokenizer.ggml.tokens": ["<s>", "é", "", "token"],
        "tokenizer.ggml.scores": np.array([0.5, -1.0, 0.0, 2.0], np.float32),
        "flags": [True, False],
        "nest": [[1, 2], [3]],
        "words": [["a", "b"], ["c"]],
    }
    split = {"split.no": np.uint16(0), "split.count": np.uint16(1), "split.tensors.count": np.int32(1)}
    return [
        _written(lambda path: write_gguf(path, metadata, blocks)),
        _written(lambda path: write_gguf(path, {"a": "b"}, blocks[:2])),
        _written(lambda path: write_gguf(path, split, blocks[3:4])),
        _written(lambda path: write_gguf(path, metadata, [])),
    ]


def _value(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _tensor(storage: str, key: str, count: int, shape: tuple[int, ...], stride: tuple[int, ...], last: bytes) -> bytes:
    saved = b"(" + _value("storage") + f"ctorch\n{storage}\n".encode() + _value(key) + _value("cpu") + _value(count)
    saved += last + b"tQ"
    rest = _value(1) + _value(shape) + _value(stride) + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + saved + rest + b"ccollections\nOrderedDict\n)RtR"


def state_pickle(legacy: bool) -> bytes:
    """{"a": float (2, 3), "b": its transpose, "h": half, "epoch": 3} with a module's `_metadata`."""
    last = b"N" if legacy else b""
    items = (
        _value("a")
        + _tensor("FloatStorage", "0", 7, (2, 3), (3, 1), last)
        + _value("b")
        + _tensor("FloatStorage", "0", 7, (3, 2), (1, 3), last)
        + _value("h")
        + _tensor("HalfStorage", "1", 5, (4,), (1,), last)
        + _value("epoch")
        + _value(3)
    )
    metadata = b"}" + _value("_metadata") + b"}sb"
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"."


STORAGES = {"0": np.arange(7, dtype=np.float32).tobytes(), "1": np.ones(5, np.float16).tobytes()}


def torch_zip(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in STORAGES.items():
            archive.writestr(f"archive/data/{key}", data)
    return buffer.getvalue()


def torch_legacy(pickled: bytes) -> bytes:
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    keys = pickle.dumps(list(STORAGES), 2)
    sizes = {"0": 7, "1": 5}
    data = b"".join(struct.pack("<Q", sizes[key]) + data for key, data in STORAGES.items())
    return b"".join(head) + pickled + keys + data


def torch_files() -> list[bytes]:
    return [torch_zip(state_pickle(legacy=False)), torch_legacy(state_pickle(legacy=True))]


def config_files() -> list[bytes]:
    return [json.dumps(config).encode() for config in CONFIGS]


def stored_model() -> dict[str, bytes]:
    """Table and tensors of a checkpoint of our own: codes of two formats, an order of columns, side branches."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 64), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (4, 2)).astype(np.float16)
    points = rng.integers(0, 16, (4, 2), dtype=np.uint8)
    coded = pack_codes("u4_g32", codes, scales, zeros=points)
    subs = rng.integers(0, 64, (4, 8)).astype(np.int8)
    supers = rng.uniform(0.01, 0.1, (4, 1)).astype(np.float16)
    wide = rng.integers(0, 32, (4, 256), dtype=np.uint8)
    two_level = pack_rows("q5_k", (4, 256), [CodeRows(wide, supers, supers, subs, subs)])
    a, b = (pack_float(rng.standard_normal(shape).astype(np.float32), "f16") for shape in ((2, 64), (4, 2)))
    sparse = np.where(rng.random((20, 64)) < 0.4, rng.integers(1, 255, (20, 64)), 128).astype(np.uint8)
    halves = rng.uniform(0.01, 0.1, (20, 2)).astype(np.float16)
    masked = to_sparse(pack_codes("i8_g32", sparse, halves), "s8_g32")
    row = to_sparse(pack_codes("i8_row", sparse, halves[:, :1].copy()), "csr_i8")
    index = rng.integers(0, 256, (1, 4, 8), dtype=np.uint8)
    vectors = pack_vectors(
        "vq1_g32", index, rng.integers(-100, 100, (1, 256, 8), dtype=np.int8), scales.astype(np.float32)
    )
    forms = [
        ("s.weight", Form(masked)),
        ("c.weight", Form(row)),
        ("v.weight", Form(vectors)),
        ("x.weight", Form(coded, (a, b), rng.permutation(64).astype(np.int64))),
        ("y.weight", Form(two_level)),
        ("z.weight", Form(None, (a, b))),
    ]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        write_stored(target, {}, forms, [("norm", np.ones(64, np.float32))], {"recipe": "none"}, {})
        return {name: (target / name).read_bytes() for name in (TABLE, WEIGHTS)}
