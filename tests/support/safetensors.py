# SPDX-License-Identifier: Apache-2.0
"""A second writer of safetensors files, which writes wrong ones as well."""

import json


def file_of(header, data=b""):
    """Return the bytes of a file with a header, which may be bytes that are none."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype, shape, begin, end):
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def checkpoint(arrays, metadata=None):
    """Return the bytes of a file of arrays by name, each behind what the format calls its dtype."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (kind, x) in arrays.items():
        header[name] = entry(kind, x.shape, len(data), len(data) + x.nbytes)
        data += x.tobytes()
    return file_of(header, data)
