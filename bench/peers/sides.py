"""The engines: on which form of a model, by which command, with which precision. Knows nothing of plans and results.

A form names the precision of weights and of activations in linears; `kv` that of the cache, each peer's own default:
OpenVINO's CPU plugin says `KV_CACHE_PRECISION` u8 (and bf16 arithmetic where the processor has it), llama.cpp's tools
say f16, the inputs of ONNX Runtime's exported graph are f32.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = ("qwen2.5-0.5b", "llama-3.2-1b")
PEERS = ("openvino", "llama", "ort")


@dataclass(frozen=True)
class Side:
    """One engine on one form of a model."""

    key: str  # openvino, llama, ort or `ours KV`
    engine: str
    form: str  # what weights and activations are, in words
    kv: str
    command: list[str]
    needs: list[Path]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is Inhouse."""
        return self.engine == "inhouse"

    def lacking(self) -> list[str]:
        """What it needs and is not there."""
        return [str(path) for path in self.needs if not path.exists()]

    def run_environment(self) -> dict[str, str]:
        """The environment of its processes."""
        return {**os.environ, **self.environment}


OUR_FORMS = {
    "4.5": ("q4", "q4_0, embedding and head q6_0; int8 activations"),
    "8.5": ("q8", "q8_0; int8 activations"),
    "16": ("", "bf16"),
}
OV_FORMS = {
    "4.5": ("int4", "int4 symmetric, groups of 128, embedding and head int8; int8 activations per 32"),
    "8.5": ("int8", "int8 per channel; int8 activations per 32"),
}
LLAMA_FORMS = {
    "4.5": ("Q4_0", "Q4_0, embedding and head Q8_0 or Q6_K; int8 activations per 32"),
    "8.5": ("Q8_0", "Q8_0; int8 activations per 32"),
    "16": ("BF16", "BF16; bf16 activations"),
}
AVX2 = " AVX2"  # ends `bits` where both sides are kept to AVX2


def ours(kits: Path, model: str, bits: str, kv: str) -> Side:
    """Inhouse on a model, its cache in `kv`."""
    folder = kits / "models" / model
    wish, form = OUR_FORMS[bits.removesuffix(AVX2)]
    command = [sys.executable, str(HERE / "inhouse_engine.py"), str(folder), "--kv", kv]
    level = {"INHOUSE_ISA": "avx2"} if bits.endswith(AVX2) else {}
    return Side(f"ours {kv}", "inhouse", form, kv, [*command, "--quantize", wish] if wish else command, [folder], level)


def peer(kits: Path, model: str, bits: str, name: str) -> Side:
    """One of PEERS on a model. Raises KeyError where it has no such form."""
    models = kits / "models"
    if name == "llama":
        build = kits / ("build-lc-avx2" if bits.endswith(AVX2) else "build-lc") / "bin"
        kind, form = LLAMA_FORMS[bits.removesuffix(AVX2)]
        file = models / f"{model}-{kind}.gguf"
        engine = "llama.cpp (AVX2)" if bits.endswith(AVX2) else "llama.cpp"
        command = [sys.executable, str(HERE / "llama_cpp.py"), str(file), "--bin", str(build)]
        return Side(name, engine, form, "f16", command, [file, build])
    if name == "openvino":
        kind, form = OV_FORMS[bits]
        return _python(kits, name, "openvino-genai", "v-ov", models / f"{model}-ov-{kind}", form, "u8")
    forms = {"4.5": "int4 groups of 32, embedding and head too; int8 activations (accuracy level 4)"}
    return _python(kits, name, "onnxruntime-genai", "v-ort", models / f"{model}-ort-int4", forms[bits], "f32")


def _python(kits: Path, name: str, engine: str, kit: str, folder: Path, form: str, kv: str) -> Side:
    script = {"openvino": "openvino_engine.py", "ort": "onnxruntime_engine.py"}[name]
    marker = {"openvino": "openvino_model.bin", "ort": "genai_config.json"}[name]
    binary = kits / kit / "bin" / "python"
    command = [str(binary), str(HERE / script), str(folder)]
    return Side(name, engine, form, kv, command, [binary, folder / marker], {"PYTHONPATH": ""})


def output_of(words: Sequence[str], environment: Mapping[str, str] | None, seconds: float) -> str:
    """What a command prints. Raises RuntimeError where it fails, TimeoutExpired where it takes longer; nothing that it
    started runs on then, beside the engine that comes next."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        printed, error = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(error.strip()[-400:])
    return printed
