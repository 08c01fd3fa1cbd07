"""What a checkpoint says about generating: generation_config.json, for older ones config.json, or GGUF keys.

Knows names and ranges. What an encoder-decoder must have to begin and end (`decoder_start_token_id`, forced tokens, bad
words) is read for those alone; how many beams to use is the request's to say.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inhouse.core.errors import FormatError, NotFoundError
from inhouse.store.source import read_json

CONFIG_BYTES = 16 << 20
LARGEST_ID = 1 << 31

# Sampling defaults that are taken over: name -> (lowest, highest).
_SAMPLING: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (-1.0, 1e9),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "max_new_tokens": (0.0, 1e9),
}
_GGUF_SAMPLING: Mapping[str, str] = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_WHOLE = ("top_k", "max_new_tokens")
_IDS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
_COUNTS = ("no_repeat_ngram_size", "min_length")


def from_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults of a model folder; of an encoder-decoder (by `config`, its config.json) also what its
    decoder begins and ends with. Raises FormatError for values out of range."""
    try:
        found, where = read_json(folder / "generation_config.json", CONFIG_BYTES), "generation_config.json"
    except NotFoundError:
        found, where = {}, "config.json"
    out = _checked({name: found[name] for name in _SAMPLING if found.get(name) is not None}, where)
    if isinstance(found.get("do_sample"), bool):
        out["do_sample"] = found["do_sample"]
    if config.get("is_encoder_decoder") is True:
        out |= _decoder(found or config, where)
    return out


def from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults of a GGUF file."""
    return _checked({ours: metadata[key] for key, ours in _GGUF_SAMPLING.items() if key in metadata}, "GGUF metadata")


def _decoder(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in (*_IDS, *_COUNTS):
        value = config.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_ID:
                raise FormatError(f"{where}: {name} is {str(value)[:40]!r}, not a whole number", param=name)
            out[name] = value
    words = config.get("bad_words_ids")
    if words:
        good = isinstance(words, list) and all(
            isinstance(word, list) and word and all(type(i) is int and 0 <= i < LARGEST_ID for i in word)
            for word in words
        )
        if not good:
            raise FormatError(f"{where}: bad_words_ids is no list of lists of ids", param="bad_words_ids")
        out["bad_words_ids"] = words
    return out


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    for name, value in values.items():
        low, high = _SAMPLING[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{where}: {name} is {str(value)[:40]!r}, not a number", param=name)
        if not low <= value <= high:
            raise FormatError(f"{where}: {name} is {value}, allowed {low:g}..{high:g}", param=name)
        if name in _WHOLE:
            if value != int(value):
                raise FormatError(f"{where}: {name} is {value}, not a whole number", param=name)
            values[name] = int(value)
    return values
