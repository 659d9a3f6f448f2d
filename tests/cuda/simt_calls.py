# SPDX-License-Identifier: Apache-2.0
"""Calls of the kernels of `fastattn.cuda.kernels.simt` in Numba's simulator, on NumPy arrays.

The simulator is chosen by an environment variable when numba is imported, so these functions run in
processes of their own: test_simt.py sends them to a pool whose workers begin with `start`.
"""

import contextlib
import os
import threading
import warnings

import numpy as np

from fastattn._options import Options

UNLIMITED = 2**62


def start(rows=None):
    """Make this process one that simulates, before it imports numba; rows: of tiles, if fewer."""
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    warnings.simplefilter("ignore")  # inf - inf and the like, which NumPy's scalars warn of
    if rows is not None:
        from fastattn.cuda.kernels import simt_tiles

        simt_tiles.ROWS.update(dict.fromkeys(simt_tiles.ROWS, rows))


@contextlib.contextmanager
def in_turn():
    """Let the simulator run the threads of a block in turn, each to the next barrier.

    Its own way, all at once and waiting by looking again and again, takes several times as long. In
    turn, what is read across threads before a barrier is wrong whenever it can be.
    """
    from numba.cuda.simulator import kernel as simulator

    class Thread(simulator.BlockThread):
        def run(self):
            self.turn.acquire()
            super().run()
            ring = self._manager.ring
            place = ring.index(self)
            del ring[place]
            if ring:
                ring[place % len(ring)].turn.release()

        def syncthreads(self):
            ring = self._manager.ring
            ring[(ring.index(self) + 1) % len(ring)].turn.release()
            self.turn.acquire()

    class Manager(simulator.BlockManager):
        def run(self, block, *arguments):
            def call():
                self._f(*arguments)

            indices = np.ndindex(*self._block_dim)
            threads = [Thread(call, self, block, index, self._debug) for index in indices]
            self.ring = list(threads)
            for thread in threads:
                thread.turn = threading.Lock()
                thread.turn.acquire()
                thread.start()
            threads[0].turn.release()
            for thread in threads:
                thread.join()
            for thread in threads:
                if thread.exception:
                    raise thread.exception[0].with_traceback(thread.exception[1])

    usual = simulator.BlockManager
    simulator.BlockManager = Manager
    try:
        yield
    finally:
        simulator.BlockManager = usual


def launch(kernel, blocks, *arguments, threads=in_turn):
    """Run a kernel on the arrays themselves: the simulator would copy them, and their strides."""
    from numba import cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    assert len(arguments) == len(kernel.signature)
    if blocks == 0:
        return
    with threads():
        cuda.jit(kernel.function)[blocks, kernel.threads](
            *(FakeCUDAArray(x) if isinstance(x, np.ndarray) else x for x in arguments)
        )


class Problem:
    """The arguments of a call of attention in the form that the kernels take."""

    def __init__(self, query, key, value, **options):
        options = Options(**{"seed": 0} | options)
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.q_len, head_dim = query.shape
        self.kv_heads, self.kv_len = key.shape[1:3]
        pairs = (self.batch, self.heads, self.q_len, self.kv_len)
        self.bias_shape = None if options.bias is None else np.shape(options.bias)
        self.mask = None if options.mask is None else np.broadcast_to(options.mask, pairs)
        self.bias = None if options.bias is None else np.broadcast_to(options.bias, pairs)
        self.slopes = options.alibi_slopes
        if options.alibi_slopes is not None:
            self.slopes = np.broadcast_to(options.alibi_slopes, (self.batch, self.heads))
        self.sinks = options.sinks
        number = np.float64 if query.dtype == np.float64 else np.float32
        self.number = number
        self.scale = number(head_dim**-0.5 if options.scale is None else options.scale)
        self.softcap = None if options.softcap is None else number(options.softcap)
        sides = options.window or (None, None)
        left, right = (UNLIMITED if side is None else side for side in sides)
        self.window = (left, min(right, 0) if options.is_causal else right)
        self.lengths, self.length = self.each_or_all(options.kv_lengths, self.kv_len)
        first_keys, first_queries = options.key_offset, options.query_offset
        relative = np.asarray(first_queries or 0 if np.ndim(first_queries) == 0 else first_queries)
        self.offsets, self.offset = self.each_or_all(relative - first_keys, 0)
        self.key_offsets, self.key_offset = self.each_or_all(first_keys, 0)
        self.counters = options.head_offset, options.batch_offset
        self.dropout = options.dropout_p != 0
        self.dropped = round(options.dropout_p * 2**32)
        self.seed = (options.seed % 2**32, options.seed >> 32)
        self.kept_scale = number(1 / (1 - options.dropout_p) if options.dropout_p < 1 else 1)

    def each_or_all(self, x, usual):
        """Return an array with one for each batch element, or one for all."""
        if x is None or np.ndim(x) == 0:
            return None, usual if x is None else int(x)
        return np.asarray(x, np.int64), usual

    @property
    def given(self):
        """Return what a factory is told."""
        from fastattn.cuda.kernels.simt_tiles import Given

        arrays = {
            "query": self.query,
            "key": self.key,
            "mask": self.mask,
            "bias": self.bias,
            "alibi_slopes": self.slopes,
        }
        return Given(
            **{name: name_of(x) for name, x in arrays.items()},
            softcap=self.softcap is not None,
            dropout=self.dropout,
            lengths=self.lengths is not None,
            offsets=self.offsets is not None,
            key_offsets=self.key_offsets is not None,
        )

    @property
    def call(self):
        """Return the argument that every kernel ends with."""
        from fastattn.cuda.kernels.simt_tiles import Call

        return Call(
            self.mask,
            self.bias,
            self.slopes,
            self.lengths,
            self.offsets,
            self.key_offsets,
            self.length,
            self.offset,
            self.key_offset,
            *self.window,
            self.scale,
            self.softcap,
            self.dropped,
            *self.seed,
            self.kept_scale,
            *self.counters,
        )


def name_of(array):
    """Return the name of the array's dtype, if there is an array."""
    return None if array is None else array.dtype.name


def attention(operands, options, out=None, lse=None, flags=None, rows_per_flag=1, threads=in_turn):
    """Return out and lse; those given, with the rows that are not finite replaced, if flagged."""
    from fastattn.cuda.kernels import simt

    problem = Problem(*operands, **options)
    value_head_dim = problem.value.shape[-1]
    if flags is None:
        out = np.full((*problem.query.shape[:-1], value_head_dim), 7, problem.query.dtype)
        lse = np.full(out.shape[:-1], 7, problem.number)
    kernel = simt.forward(
        problem.given, value_head_dim, sinks=name_of(problem.sinks), flags=flags is not None
    )
    sizes = (problem.batch, problem.heads, problem.q_len)
    blocks = simt.forward_blocks(problem.given.query, *sizes, value_head_dim)
    written = (out, lse, flags, rows_per_flag)
    launch(kernel, blocks, *written, problem.sinks, *operands, problem.call, threads=threads)
    return out, lse


def attention_backward(
    grad_out, operands, out, lse, options, grad_lse=None, given=None, flags=None, rows_per_flag=1
):
    """Return dq, dk, dv, and dbias and dsinks if there are bias and sinks.

    given: dq, dk and dv whose rows that are not finite are replaced; flags: for dq, and for the
    other two.
    """
    from fastattn.cuda.kernels import padded, simt, simt_backward

    problem = Problem(*operands, **options)
    dtype = problem.given.query
    sinks = name_of(problem.sinks)
    rows = (problem.batch, problem.heads, padded(problem.q_len))
    delta, lse2, terms = (np.full(rows, 7, problem.number) for _ in range(3))
    terms = None if sinks is None else terms
    kernel = simt_backward.prepare(
        dtype, sinks=sinks, grad_lse=grad_lse is not None, dsinks=terms is not None
    )
    blocks = simt_backward.prepare_blocks(problem.batch, problem.heads, problem.q_len)
    launch(kernel, blocks, delta, lse2, terms, out, grad_out, lse, grad_lse, problem.sinks)

    read = (simt_backward.Inputs(*operands, grad_out, delta, lse2), problem.call)
    dq, dk, dv = given or (np.full(x.shape, 7, x.dtype) for x in operands)
    row_flags, key_flags = flags or (None, None)
    kernel = simt_backward.query_gradient(problem.given, dq.shape[-1], flags=flags is not None)
    sizes = (problem.batch, problem.heads, problem.q_len)
    blocks = simt.forward_blocks(dtype, *sizes, dq.shape[-1])
    launch(kernel, blocks, dq, row_flags, rows_per_flag, *read)
    kernel = simt_backward.key_value_gradients(
        problem.given, dk.shape[-1], dv.shape[-1], flags=flags is not None
    )
    blocks = simt_backward.key_blocks(problem.batch, problem.kv_heads, problem.kv_len)
    launch(kernel, blocks, dk, dv, key_flags, rows_per_flag, *read)
    grads = [dq, dk, dv]
    if problem.bias is not None:
        dbias = np.full(problem.bias_shape, 7, problem.bias.dtype)
        shape = (*(1,) * (4 - dbias.ndim), *dbias.shape)
        kernel = simt_backward.bias_gradient(problem.given)
        launch(kernel, simt_backward.bias_blocks(dtype, shape), dbias.reshape(shape), *read)
        grads.append(dbias)
    if sinks is not None:
        dsinks = np.full(problem.sinks.shape, 7, problem.sinks.dtype)
        launch(simt_backward.sinks_gradient(dtype, sinks), problem.heads, dsinks, terms)
        grads.append(dsinks)
    return grads


def everything(operands, options, other_strides=False):
    """Return out, lse and the gradients for grad_out = out.

    other_strides: of arrays laid out in other ways, keys whose rows are all the same with a stride
    of 0. These do not survive the way to another process.
    """
    if other_strides:
        query, key, value = operands
        key = np.broadcast_to(key[:, :1, :1], key.shape)
        operands = (relaid(query), key, relaid(value))
        options = {name: relaid(x) for name, x in options.items()}
    out, lse = attention(operands, options)
    grad_out = relaid(out) if other_strides else out
    return [out, lse, *attention_backward(grad_out, operands, out, lse, options)]


def relaid(x):
    """Return an equal array, its axes in the other order, with gaps, the last one backwards."""
    memory = np.zeros((*x.shape[::-1], 2), x.dtype)
    memory[::-1, ..., 0] = x.T
    return memory[::-1, ..., 0].T
