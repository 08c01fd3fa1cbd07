"""What a sentence-transformers folder says beyond its transformer: pooling, dense layers, prompts, the longest text.

Knows `modules.json` and the files that it names; reads no tensors but their headers. A module or setting that would
change the vectors and is not honoured is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError
from inhouse.core.tensors import TensorSource
from inhouse.model.build import Spec
from inhouse.model.encoder import EncoderSpec
from inhouse.model.families.encoder_names import DENSE
from inhouse.model.pooling import Dense, Pooling
from inhouse.model.spec import ModelSpec
from inhouse.store.joined import JoinedSource
from inhouse.store.source import open_source, read_json, read_json_list

MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_BYTES = 4 << 20  # of any of these files
_MODES: Mapping[str, str] = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last",
                             "cls": "cls", "mean": "mean", "max": "max"}  # fmt: skip
_ACTIVATIONS: Mapping[str, str] = {"Identity": "", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu",
                                   "Sigmoid": "sigmoid"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sentence:
    """The folder's own words."""

    pooling: Pooling
    folders: tuple[str, ...] = ()  # of the dense layers' weights, in order
    max_length: int = 0  # tokens of a text; 0: the model's context
    prompts: Mapping[str, str] = field(default_factory=dict)  # name -> what stands before the text
    default_prompt: str = ""  # the name of the one that is used unasked; "": none


def read_sentence(folder: Path) -> Sentence | None:
    """The words of a folder; None where it has no modules.json. Raises FormatError, UnsupportedError."""
    try:
        modules = read_json_list(folder / MODULES, _BYTES)
    except NotFoundError:
        return None
    return _with_prompts(_with_settings(_from_modules(folder, modules), folder), folder)


def _from_modules(folder: Path, modules: list[Any]) -> Sentence:
    if not all(isinstance(module, Mapping) for module in modules):
        raise FormatError(f"{MODULES} is not a list of modules")
    mode, normalize, dense, folders = "", False, [], []
    for module in modules:
        kind, path = str(module.get("type", "")).rsplit(".", 1)[-1], str(module.get("path", ""))
        if normalize:
            raise UnsupportedError(f"{MODULES}: a {kind} module follows Normalize", param=MODULES)
        if kind == "Transformer" and not mode and not path:
            continue
        if kind == "Pooling" and not mode:
            mode = _mode(_module(folder, path))
        elif kind == "Dense" and mode:
            dense.append(_dense(_module(folder, path)))
            folders.append(path)
        elif kind == "Normalize" and mode:
            normalize = True
        else:
            where = f" in {path!r}" if path else ""
            raise UnsupportedError(f"{MODULES} has a {kind} module{where}, which we cannot honour", param=MODULES)
    if not mode:
        raise UnsupportedError(f"{MODULES} names no Pooling module", param=MODULES)
    if mode == "mean_sqrt_len_tokens":
        if dense or not normalize:
            raise UnsupportedError("pooling mean_sqrt_len_tokens without Normalize cannot be honoured", param=MODULES)
        mode = "mean"  # a multiple of the mean: the same vector once its length is 1
    return Sentence(Pooling(mode, normalize, tuple(dense)), tuple(folders))


def _module(folder: Path, path: str) -> Mapping[str, Any]:
    if not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise FormatError(f"{MODULES} names the path {path!r}")
    config: Mapping[str, Any] = read_json(folder / path / "config.json", _BYTES)
    return config


def _mode(config: Mapping[str, Any]) -> str:
    stem = "pooling_mode_"
    named = config.get("pooling_mode")
    chosen = [key.removeprefix(stem) for key, value in config.items() if key.startswith(stem) and value is True]
    if named is not None:
        chosen = [str(name) for name in (named if isinstance(named, list) else [named])]
    if config.get("include_prompt") is False:
        raise UnsupportedError("pooling without the prompt's tokens (include_prompt: false) cannot be honoured")
    if len(chosen) != 1 or chosen[0] not in (*_MODES, "mean_sqrt_len_tokens"):
        raise UnsupportedError(f"pooling {' + '.join(chosen) or 'none'} cannot be honoured", param="pooling_mode")
    return _MODES.get(chosen[0], chosen[0])


def _dense(config: Mapping[str, Any]) -> Dense:
    inputs, outputs, bias = config.get("in_features"), config.get("out_features"), config.get("bias", True)
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    sizes = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 20 for n in (inputs, outputs))
    if not sizes or not isinstance(bias, bool):
        raise FormatError("the config of a Dense module lacks its sizes", param="in_features")
    if name not in _ACTIVATIONS or config.get("use_residual"):
        raise UnsupportedError(f"a Dense module with the activation {name} cannot be honoured", param=MODULES)
    assert isinstance(inputs, int)
    assert isinstance(outputs, int)
    return Dense(inputs, outputs, bias, _ACTIVATIONS[name])


def _with_settings(sentence: Sentence, folder: Path) -> Sentence:
    try:
        settings = read_json(folder / SETTINGS, _BYTES)
    except NotFoundError:
        return sentence
    longest = settings.get("max_seq_length")
    if settings.get("do_lower_case") is True:
        raise UnsupportedError(f"{SETTINGS}: do_lower_case cannot be honoured", param="do_lower_case")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise FormatError(f"{SETTINGS}: max_seq_length is {longest!r}", param="max_seq_length")
    return replace(sentence, max_length=longest or 0)


def _with_prompts(sentence: Sentence, folder: Path) -> Sentence:
    try:
        config = read_json(folder / PROMPTS, _BYTES)
    except NotFoundError:
        return sentence
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise FormatError(f"{PROMPTS}: prompts are not a mapping of texts", param="prompts")
    default = config.get("default_prompt_name") or ""
    if default and default not in prompts:
        raise FormatError(f"{PROMPTS}: there is no prompt {default!r}", param="default_prompt_name")
    return replace(sentence, prompts=dict(prompts), default_prompt=str(default))


def apply(sentence: Sentence, spec: Spec) -> Spec:
    """The spec that pools as the folder says, for texts as long as it says. A classifier has no use for pooling."""
    if isinstance(spec, EncoderSpec):
        spec = spec if spec.classifier is not None else replace(spec, pooling=sentence.pooling)
    elif isinstance(spec, ModelSpec):
        if sentence.pooling.dense:
            raise UnsupportedError("a Dense module over a decoder cannot be honoured", param=MODULES)
        spec = replace(spec, pooling=sentence.pooling)
    else:
        raise UnsupportedError("sentence vectors of an encoder-decoder cannot be honoured", param=MODULES)
    hidden = spec.hidden
    for dense in sentence.pooling.dense:
        if dense.inputs != hidden:
            raise FormatError(f"a Dense module takes {dense.inputs} numbers and gets {hidden}", param=MODULES)
        hidden = dense.outputs
    longest = sentence.max_length or spec.context_length
    return replace(spec, context_length=min(spec.context_length, longest))


def joined(sentence: Sentence, source: TensorSource, folder: Path) -> TensorSource:
    """The tensors of a folder with those of its dense layers, which are called `sentence.dense.{k}.linear.weight`.
    The source that is given is `source` itself, or owns it."""
    if not sentence.folders:
        return source
    return JoinedSource(
        source, {f"{DENSE}.{k}.": open_source(folder / name) for k, name in enumerate(sentence.folders)}
    )
