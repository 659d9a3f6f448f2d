# SPDX-License-Identifier: Apache-2.0
"""What instructions are in a cubin? For the tests that look at machine code.

Calls nvdisasm, of CUDA's toolkit or of the PyPI package nvidia-cuda-nvdisasm; a test that needs it
is skipped where it is not found.
"""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)


@functools.cache
def nvdisasm() -> str | None:
    """Return where nvdisasm is."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    folders = [os.environ.get("PATH", ""), *map(str, packages.glob("*/bin")), str(toolkit)]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


def disassemble(cubin: bytes, folder: Path) -> str:
    """Return the machine code of a cubin in words; the folder is for a temporary file."""
    program = nvdisasm()
    if program is None:
        pytest.skip("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run(
        [program, "-c", path], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def counts(sass: str) -> Counter[str]:
    """Return how often each instruction is there: by its whole name, and by that up to a dot."""
    names = INSTRUCTION.findall(sass)
    return Counter(names) + Counter(name.split(".")[0] for name in names if "." in name)
