# SPDX-License-Identifier: Apache-2.0
"""Calls of the kernels of `fastattn.cuda.kernels.simt` in Numba's simulator, on NumPy arrays.

The simulator is chosen by an environment variable when numba is imported, so these functions run in
processes of their own: test_cuda_simt.py sends them to a pool whose workers begin with `start`.
"""

import os
import warnings

import numpy as np

UNLIMITED = 2**62


def start():
    """Make this process one that simulates; before numba is imported."""
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    warnings.simplefilter("ignore")  # inf - inf and the like, which NumPy's scalars warn of


def launch(kernel, blocks, *arguments):
    """Run a kernel on the arrays themselves: the simulator would copy them, and their strides."""
    from numba import cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    assert len(arguments) == len(kernel.signature)
    if blocks == 0:
        return
    cuda.jit(kernel.function)[blocks, kernel.threads](
        *(FakeCUDAArray(x) if isinstance(x, np.ndarray) else x for x in arguments)
    )


class Call:
    """The arguments of a call of attention in the form that the kernels take."""

    def __init__(
        self,
        query,
        key,
        value,
        *,
        mask=None,
        bias=None,
        scale=None,
        is_causal=False,
        query_offset=None,
        window=None,
        softcap=None,
        alibi_slopes=None,
        sinks=None,
        kv_lengths=None,
        dropout_p=0.0,
        seed=0,
    ):
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.q_len, head_dim = query.shape
        self.kv_heads, self.kv_len = key.shape[1:3]
        pairs = (self.batch, self.heads, self.q_len, self.kv_len)
        self.bias_shape = None if bias is None else np.shape(bias)
        self.mask = None if mask is None else np.broadcast_to(mask, pairs)
        self.bias = None if bias is None else np.broadcast_to(bias, pairs)
        self.slopes = alibi_slopes
        if alibi_slopes is not None:
            self.slopes = np.broadcast_to(alibi_slopes, (self.batch, self.heads))
        self.sinks = sinks
        number = np.float64 if query.dtype == np.float64 else np.float32
        self.number = number
        self.scale = number(head_dim**-0.5 if scale is None else scale)
        self.softcap = None if softcap is None else number(softcap)
        left, right = (UNLIMITED if side is None else side for side in window or (None, None))
        self.window = (left, min(right, 0) if is_causal else right)
        self.lengths, self.length = self.each_or_all(kv_lengths, self.kv_len)
        self.offsets, self.offset = self.each_or_all(query_offset, 0)
        self.dropout = dropout_p != 0
        self.dropped = round(dropout_p * 2**32)
        self.seed = (np.uint32(seed % 2**32), np.uint32(seed >> 32))
        self.kept_scale = number(1 / (1 - dropout_p) if dropout_p < 1 else 1)

    def each_or_all(self, x, usual):
        """Return an array with one for each batch element, or one for all."""
        if x is None or np.ndim(x) == 0:
            return None, usual if x is None else int(x)
        return np.asarray(x, np.int64), usual

    @property
    def dtypes(self):
        return self.query.dtype.name, self.key.dtype.name

    def options(self, *without):
        """Return what a factory is told."""
        options = {
            "mask": self.mask,
            "bias": self.bias,
            "alibi_slopes": self.slopes,
            "sinks": self.sinks,
        }
        options = {k: None if x is None else x.dtype.name for k, x in options.items()}
        options |= {
            "softcap": self.softcap is not None,
            "dropout": self.dropout,
            "lengths": self.lengths is not None,
            "offsets": self.offsets is not None,
        }
        return {k: x for k, x in options.items() if k not in without}

    @property
    def scalars(self):
        """Return the arguments from `length` on."""
        return (
            self.length,
            self.offset,
            *self.window,
            self.scale,
            self.softcap,
            self.dropped,
            *self.seed,
            self.kept_scale,
        )


def attention(operands, options, out=None, lse=None, flags=None, rows_per_flag=1):
    """Return out and lse; those given, with the rows that are not finite replaced, if flagged."""
    from fastattn.cuda.kernels import simt

    call = Call(*operands, **options)
    value_head_dim = call.value.shape[-1]
    if flags is None:
        out = np.full((*call.query.shape[:-1], value_head_dim), 7, call.query.dtype)
        lse = np.full(out.shape[:-1], 7, call.number)
    kernel = simt.forward(*call.dtypes, value_head_dim, flags=flags is not None, **call.options())
    launch(
        kernel,
        simt.forward_blocks(call.dtypes[0], call.batch, call.heads, call.q_len),
        out,
        lse,
        *operands,
        call.mask,
        call.bias,
        call.slopes,
        call.sinks,
        call.lengths,
        call.offsets,
        flags,
        rows_per_flag,
        *call.scalars,
    )
    return out, lse
