"""What lies beside the weights of a checkpoint of our own: its config and side files, from the model it was made of."""

from collections.abc import Collection
from typing import Any

from inhouse.load.describe import Described, read_tokenizer
from inhouse.model.build import Spec, weight_specs
from inhouse.model.families.config_change import changed_config
from inhouse.model.tokens.write import hf_tokenizer
from inhouse.store.source import side_files
from inhouse.store.stored_model import RESERVED, Side

_NOT_KEPT = (*RESERVED, "quantize_config.json", "quant_config.json", "hf_quant_config.json", "adapter_config.json")


def stored_config(
    described: Described, spec: Spec | None = None, kept_layers: Collection[int] | None = None
) -> dict[str, Any]:
    """config.json for `store.stored_model.write_stored`.

    Args:
        spec: the model as it is now; None: as it was.
        kept_layers: numbers of the layers that are left, where some are gone.

    Raises UnsupportedError naming what config.json cannot say of the model.
    """
    now = spec or described.spec
    names = set(weight_specs(now))
    hints = names | ({"lm_head.weight"} if "head.weight" in names else set())
    hints |= {"final_logits_bias"} if "head.bias" in names else set()
    config = {} if described.source.format == "gguf" else described.config
    return changed_config(config, now, described.family, hints, kept_layers)


def stored_sides(described: Described) -> dict[str, Side]:
    """Tokenizer, templates, sampling defaults, licence: path inside the folder -> file or text."""
    if described.source.format == "gguf":
        return dict(hf_tokenizer(read_tokenizer(described)))
    folder = described.path if described.path.is_dir() else described.path.parent
    files = {file.relative_to(folder).as_posix(): file for file in side_files(folder)}
    return {name: file for name, file in files.items() if name not in _NOT_KEPT}
