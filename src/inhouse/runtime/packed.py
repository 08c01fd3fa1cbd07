"""Packed weight layouts: the door. Everything that the rest of the house may know of bit positions is named here.

A matrix [out, in] is kept in tiles of 16 output rows, so that one layout serves every instruction set. Formats are
rows of one table, `FORMATS`; the native library has the same table (native/src/formats.h). The bytes are described
in packed_layout; docs/decisions/001-packed-layout.md says why they lie so.
"""

from inhouse.runtime.packed_formats import WHOLE_ROW
from inhouse.runtime.packed_gguf import gguf_format, gguf_types, pack_gguf
from inhouse.runtime.packed_layout import (
    FORMATS,
    LAYOUT_VERSION,
    Codes,
    Format,
    Packed,
    activation_group,
    activation_powers,
    aligned_empty,
    bits_per_weight,
    is_float,
    narrow_inputs,
    packed_nbytes,
)
from inhouse.runtime.packed_pack import CodeRows, pack_codes, pack_float, pack_rows, runs
from inhouse.runtime.packed_quantize import QUANTIZED_FORMAT, quantize, quantize_rows_reference
from inhouse.runtime.packed_sparse import pack_vectors

__all__ = [
    "FORMATS",
    "LAYOUT_VERSION",
    "QUANTIZED_FORMAT",
    "WHOLE_ROW",
    "CodeRows",
    "Codes",
    "Format",
    "Packed",
    "activation_group",
    "activation_powers",
    "aligned_empty",
    "bits_per_weight",
    "gguf_format",
    "gguf_types",
    "is_float",
    "narrow_inputs",
    "pack_codes",
    "pack_float",
    "pack_gguf",
    "pack_rows",
    "pack_vectors",
    "packed_nbytes",
    "quantize",
    "quantize_rows_reference",
    "runs",
]
