"""torch's element types under the names that numpy, safetensors and DLPack have for them."""

from __future__ import annotations

from typing import NamedTuple, Optional


class ElementType(NamedTuple):
    """One element type.  ``numpy``: with a dot where ml_dtypes has it."""

    itemsize: int  # bytes
    numpy: Optional[str]
    # As in the header of a safetensors file (safetensors 0.6, `safetensors/src/tensor.rs`).
    safetensors: Optional[str]
    # DLDataTypeCode and bits (dlpack.h, DLPack 1.1).
    dlpack: Optional[tuple[int, int]]


_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6

ELEMENT_TYPES: dict[str, ElementType] = {
    "torch.bool": ElementType(1, "bool", "BOOL", (_BOOL, 8)),
    "torch.uint8": ElementType(1, "uint8", "U8", (_UINT, 8)),
    "torch.int8": ElementType(1, "int8", "I8", (_INT, 8)),
    "torch.uint16": ElementType(2, "uint16", "U16", (_UINT, 16)),
    "torch.int16": ElementType(2, "int16", "I16", (_INT, 16)),
    "torch.uint32": ElementType(4, "uint32", "U32", (_UINT, 32)),
    "torch.int32": ElementType(4, "int32", "I32", (_INT, 32)),
    "torch.uint64": ElementType(8, "uint64", "U64", (_UINT, 64)),
    "torch.int64": ElementType(8, "int64", "I64", (_INT, 64)),
    "torch.float16": ElementType(2, "float16", "F16", (_FLOAT, 16)),
    "torch.bfloat16": ElementType(2, "ml_dtypes.bfloat16", "BF16", (_BFLOAT, 16)),
    "torch.float32": ElementType(4, "float32", "F32", (_FLOAT, 32)),
    "torch.float64": ElementType(8, "float64", "F64", (_FLOAT, 64)),
    "torch.complex64": ElementType(8, "complex64", "C64", (_COMPLEX, 64)),
    "torch.complex128": ElementType(16, "complex128", None, (_COMPLEX, 128)),
    # DLPack 1.1 has codes for 8-bit floats, which torch takes from 2.10 on: see `dlpack`.
    "torch.float8_e4m3fn": ElementType(1, "ml_dtypes.float8_e4m3fn", "F8_E4M3", None),
    "torch.float8_e5m2": ElementType(1, "ml_dtypes.float8_e5m2", "F8_E5M2", None),
    "torch.float8_e4m3fnuz": ElementType(1, "ml_dtypes.float8_e4m3fnuz", "F8_E4M3FNUZ", None),
    "torch.float8_e5m2fnuz": ElementType(1, "ml_dtypes.float8_e5m2fnuz", "F8_E5M2FNUZ", None),
    "torch.float8_e8m0fnu": ElementType(1, "ml_dtypes.float8_e8m0fnu", "F8_E8M0", None),
    # Two elements a byte; torch counts shape and stride in bytes.
    "torch.float4_e2m1fn_x2": ElementType(1, "uint8", None, None),
}
