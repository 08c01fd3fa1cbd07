"""The cases: each scheme with its config and the writer of its modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import numpy as np
import torch

from tests.quantized import packers
from tests.quantized.folders import Tensors, Writer, tensors
from tests.quantized.packers import F32

SKIP_MLP = ("lm_head", "embed_tokens", "mlp")  # its 172 inputs are no multiple of what some formats need


class Case(NamedTuple):
    """One way to write a checkpoint."""

    config: dict[str, Any]
    writer: Writer
    skip: tuple[str, ...] = ("lm_head", "embed_tokens")  # parts of names of linears that stay floats


def _order(inputs: int, name: str, same: bool) -> packers.Ints:
    seed = sum(map(ord, name.rpartition(".")[0] if same else name))
    return np.random.default_rng(seed).permutation(inputs)


def gptq(
    bits: int, group: int, *, sym: bool, v2: bool = False, act: str = "", scale: str = "f16"
) -> Case:  # act: "" | "same" (q, k and v share an order) | "own"
    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        size = weights.shape[1] if group == -1 else group
        order = _order(weights.shape[1], name, act == "same") if act else None
        codes, scales, zeros = packers.round_to(weights, bits, size, symmetric=sym, kind=scale, order=order)
        zeros = np.maximum(zeros, 1)  # v1 cannot say 0
        arrays = packers.gptq(codes, scales, zeros, bits, size, v1=not v2, order=order)
        return tensors(arrays, scale), packers.values(codes, scales, zeros, size, order)

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": bool(act), "lm_head": False,
        "damp_percent": 0.01, "true_sequential": True, "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    return Case(config, write)


def awq(group: int, version: str) -> Case:
    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        size = weights.shape[1] if group == -1 else group
        codes, scales, zeros = packers.round_to(weights, 4, size, symmetric=False, kind="f16")
        if version == "gemm":
            arrays = packers.awq_gemm(codes, scales, zeros)
        else:
            arrays = packers.awq_gemv(codes, scales, zeros, size)
        return tensors(arrays), packers.values(codes, scales, zeros, size)

    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version,
        "modules_to_not_convert": ["mlp"],
    }  # fmt: skip
    return Case(config, write, SKIP_MLP)


def compressed_config(
    format_: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": ["lm_head"], "version": "0.13.0",
        "sparsity_config": {}, "transform_config": {},
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations,
                        "output_activations": None, "format": format_},
        },
    }  # fmt: skip


def packed(bits: int, group: int, *, sym: bool, act: bool = False, scale: str = "bf16") -> Case:
    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        size = group or weights.shape[1]
        order = _order(weights.shape[1], name, False) if act else None
        codes, scales, zeros = packers.round_to(weights, bits, size, symmetric=sym, kind=scale, order=order)
        arrays = packers.compressed(codes, scales, None if sym else zeros, bits, order, size)
        return tensors(arrays, scale), packers.values(codes, scales, zeros, size, order)

    weights = {
        "num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group" if group else "channel",
        "group_size": group or None, "dynamic": False, "actorder": "group" if act else None, "observer": "minmax",
    }  # fmt: skip
    return Case(compressed_config("pack-quantized", weights), write)


def w8a8(scale: str = "bf16") -> Case:
    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        codes, scales, zeros = packers.round_to(weights, 8, weights.shape[1], symmetric=True, kind=scale)
        whole = packers.values(codes, scales, zeros, weights.shape[1])
        arrays: dict[str, Any] = {"weight": (codes - 128).astype(np.int8), "weight_scale": scales}
        return tensors(arrays, scale), whole

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return Case(compressed_config("int-quantized", weights, activations), write)


def float8(granularity: str, *, method: str = "fp8", kind: torch.dtype = torch.float8_e4m3fn) -> Case:
    """`granularity`: tensor, channel or block (16 x 32 in a 128 x 128 file would be one block here)."""
    block = (16, 32)

    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        tensor = torch.from_numpy(weights)
        top = torch.finfo(kind).max
        if granularity == "block":
            rows, columns = (-(-n // size) for n, size in zip(weights.shape, block, strict=True))
            scale = torch.empty(rows, columns)
            for i in range(rows):
                for j in range(columns):
                    part = tensor[block[0] * i : block[0] * (i + 1), block[1] * j : block[1] * (j + 1)]
                    scale[i, j] = part.abs().max() / top
            spread = scale.repeat_interleave(block[0], 0)[: len(tensor)]
            spread = spread.repeat_interleave(block[1], 1)[:, : tensor.shape[1]]
        else:
            scale = tensor.abs().amax(1, keepdim=True) / top if granularity == "channel" else tensor.abs().max() / top
            spread = scale.expand_as(tensor)
        codes = (tensor / spread).to(kind)
        suffix = "weight_scale_inv" if method == "fp8" and granularity == "block" else "weight_scale"
        stored = scale.reshape(1) if granularity == "tensor" else scale
        state = {"weight": codes, suffix: stored.clone()}
        if granularity == "tensor":
            state["input_scale"] = torch.tensor([0.1])
        return state, (codes.float() * spread).numpy()

    if method == "fp8":
        config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": None}
        config["weight_block_size"] = list(block) if granularity == "block" else None
        return Case(config, write)
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": granularity, "dynamic": False,
        "block_structure": list(block) if granularity == "block" else None,
    }  # fmt: skip
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return Case(compressed_config("float-quantized", weights, activations), write)


def float4(kind: str) -> Case:
    """NVFP4 or MXFP4 as compressed-tensors writes them: its own compressor is the writer and the oracle."""

    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        rng = np.random.default_rng(len(name))
        group = 16 if kind == "nvfp4" else 32
        codes = rng.integers(0, 16, weights.shape, dtype=np.uint8)
        low, high = codes[:, 0::2], codes[:, 1::2]
        levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        numbers = np.where(codes & 8, -levels[codes & 7], levels[codes & 7])
        state = {"weight_packed": torch.from_numpy(low | (high << 4))}
        shape = (weights.shape[0], weights.shape[1] // group)
        if kind == "nvfp4":
            scale = torch.from_numpy(rng.random(shape).astype(np.float32) * 400).to(torch.float8_e4m3fn)
            state |= {"weight_scale": scale, "weight_global_scale": torch.tensor([4096.0])}  # a divisor
            spread = np.repeat(scale.float().numpy() / np.float32(4096), group, 1)
        else:
            exponents = rng.integers(118, 124, shape, dtype=np.uint8)
            state["weight_scale"] = torch.from_numpy(exponents)
            spread = np.repeat(np.ldexp(np.float32(1), exponents.astype(int) - 127).astype(np.float32), group, 1)
        return state, numbers * spread

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    if kind == "mxfp4":
        weights |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return Case(compressed_config(f"{kind}-pack-quantized", weights), write, SKIP_MLP)


def bnb4(kind: str, *, nested: bool) -> Case:
    """bitsandbytes' own quantiser and dequantiser, on the CPU."""

    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        codes, state = bnb.quantize_4bit(
            torch.from_numpy(weights.copy()), blocksize=64, compress_statistics=nested, quant_type=kind
        )
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        # Its dequantiser on the CPU multiplies as the format says: level times scale, in f32.
        levels, scales = state.code.numpy(), state.absmax
        if nested:
            scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        numbers = codes.numpy().reshape(-1)
        pairs = np.stack([numbers >> 4, numbers & 15], 1).reshape(-1, 64)
        whole = levels[pairs] * scales.numpy().reshape(-1, 1)
        near = bnb.dequantize_4bit(codes, state).float().numpy()
        assert np.allclose(whole.reshape(weights.shape), near, rtol=1e-6, atol=1e-9)
        return {"weight": codes, **parts}, whole.reshape(weights.shape)

    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "float16", "llm_int8_threshold": 6.0,
        "_load_in_4bit": True, "llm_int8_skip_modules": ["mlp"], "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    return Case(config, write, SKIP_MLP)


def bnb8() -> Case:
    def write(weights: F32, name: str) -> tuple[Tensors, F32]:
        codes, stats, _ = bnb.int8_vectorwise_quant(torch.from_numpy(weights).half())
        whole = codes.float().numpy() * (stats.float().numpy() * np.float32(7.874015718698502e-3))[:, None]
        near = bnb.int8_vectorwise_dequant(codes, stats).float().numpy()
        assert np.allclose(whole, near, rtol=1e-6, atol=0)
        return {"weight": codes, "SCB": stats.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}, whole

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    return Case(config, write)


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"gptq-{bits}bit-g{group}-{'sym' if sym else 'asym'}": lambda b=bits, g=group, s=sym: gptq(b, g, sym=s)  # type: ignore[misc]
        for bits in (2, 3, 4, 8)
        for group, sym in ((32, False), (64, True), (128, False), (-1, True), (48, False))
    },
    "gptq-v2-4bit-g32": lambda: gptq(4, 32, sym=False, v2=True),
    "gptq-v2-3bit-g64": lambda: gptq(3, 64, sym=False, v2=True),
    "gptq-bf16": lambda: gptq(4, 64, sym=False, scale="bf16"),
    "gptq-4bit-g32-act": lambda: gptq(4, 32, sym=False, act="same"),
    "gptq-3bit-g32-act-unlike": lambda: gptq(3, 32, sym=True, act="own"),
    "gptq-8bit-g32-act": lambda: gptq(8, 32, sym=True, act="own"),
    "awq-gemm-g32": lambda: awq(4, "gemm"),
    "awq-gemm-row": lambda: awq(-1, "gemm"),
    "awq-gemv-row": lambda: awq(-1, "gemv"),
    **{
        f"ct-{bits}bit-g{group}-{'sym' if sym else 'asym'}": lambda b=bits, g=group, s=sym: packed(b, g, sym=s)  # type: ignore[misc]
        for bits in (3, 4, 5, 8)
        for group, sym in ((32, True), (64, False), (0, True))
    },
    "ct-4bit-f32": lambda: packed(4, 32, sym=False, scale="f32"),
    "ct-4bit-act": lambda: packed(4, 32, sym=True, act=True),
    "ct-w8a8": lambda: w8a8(),
    "ct-w8a8-f32": lambda: w8a8("f32"),
    "ct-fp8-channel": lambda: float8("channel", method="ct"),
    "ct-fp8-tensor": lambda: float8("tensor", method="ct"),
    "ct-fp8-block": lambda: float8("block", method="ct"),
    "fp8-block": lambda: float8("block"),
    "fp8-tensor": lambda: float8("tensor"),
    "ct-nvfp4": lambda: float4("nvfp4"),
    "ct-mxfp4": lambda: float4("mxfp4"),
    "bnb-nf4": lambda: bnb4("nf4", nested=False),
    "bnb-nf4-nested": lambda: bnb4("nf4", nested=True),
    "bnb-fp4-nested": lambda: bnb4("fp4", nested=True),
    "bnb-int8": lambda: bnb8(),
    "fp8-channel-e5m2": lambda: float8("channel", kind=torch.float8_e5m2),
}
