# SPDX-License-Identifier: Apache-2.0
"""What users of flash-attn call: its functions, signatures and meaning, on tensors on the CPU.

`install` puts them, and what the other modules here have beside them, in the place of the package
flash_attn: `_install.py` lists which module of flash_attn is which one here, and what is missing.

Differences from flash-attn 2: docs/flash_attn.md.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"fastattn.flash_attn needs PyTorch ({error}): pip install torch") from error

from fastattn.flash_attn._functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fastattn.flash_attn._install import Installed, install
from fastattn.flash_attn._padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

__all__ = [
    "Installed",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "install",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]
