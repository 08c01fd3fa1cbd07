"""Element and block types of tensors on disk: their byte sizes, GGUF numbers and where their scales lie.

Knows sizes and the fields that can hold a NaN; does not know how to turn codes into floats (that is
`runtime.packed`). Source: the safetensors format page; ggml's `ggml-common.h` block structures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Bytes of one element, in the order in which safetensors ranks its types (the writer sorts by it).
PLAIN_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E5M2": 1,
        "F8_E4M3": 1,
        "F8_E8M0": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "C64": 8,
        "F64": 8,
        "I64": 8,
        "U64": 8,
    }
)
PLAIN_RANK: Mapping[str, int] = MappingProxyType({name: rank for rank, name in enumerate(PLAIN_BYTES)})


@dataclass(frozen=True, slots=True)
class BlockType:
    """One ggml type: `block` elements stored in `nbytes` bytes.

    `half_fields` are the byte offsets, inside a block, of its float16 scales and minimums;
    `e8m0_fields` those of its power-of-two scales (0xFF means NaN).
    """

    number: int
    block: int
    nbytes: int
    half_fields: tuple[int, ...] = ()
    e8m0_fields: tuple[int, ...] = ()


GGML_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "F32": BlockType(0, 1, 4),
        "F16": BlockType(1, 1, 2),
        "Q4_0": BlockType(2, 32, 18, (0,)),
        "Q4_1": BlockType(3, 32, 20, (0, 2)),
        "Q5_0": BlockType(6, 32, 22, (0,)),
        "Q5_1": BlockType(7, 32, 24, (0, 2)),
        "Q8_0": BlockType(8, 32, 34, (0,)),
        "Q2_K": BlockType(10, 256, 84, (80, 82)),
        "Q3_K": BlockType(11, 256, 110, (108,)),
        "Q4_K": BlockType(12, 256, 144, (0, 2)),
        "Q5_K": BlockType(13, 256, 176, (0, 2)),
        "Q6_K": BlockType(14, 256, 210, (208,)),
        "IQ4_NL": BlockType(20, 32, 18, (0,)),
        "IQ4_XS": BlockType(23, 256, 136, (0,)),
        "I8": BlockType(24, 1, 1),
        "I16": BlockType(25, 1, 2),
        "I32": BlockType(26, 1, 4),
        "I64": BlockType(27, 1, 8),
        "F64": BlockType(28, 1, 8),
        "BF16": BlockType(30, 1, 2),
        "TQ1_0": BlockType(34, 256, 54, (52,)),
        "TQ2_0": BlockType(35, 256, 66, (64,)),
        "MXFP4": BlockType(39, 32, 17, (), (0,)),
        "NVFP4": BlockType(40, 64, 36),
    }
)
GGML_NAMES: Mapping[int, str] = MappingProxyType({kind.number: name for name, kind in GGML_TYPES.items()})

# Types that ggml defines, or once defined, and that we do not read: named so that the error can name them.
GGML_UNREAD: Mapping[int, str] = MappingProxyType(
    {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
    | {21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
    | {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 41: "Q1_0"}
)
