# SPDX-License-Identifier: Apache-2.0
"""What fastattn promises, by the part that promises it; docs/contract.md has the list.

api           arguments, arrays of other libraries, errors, what is said of calls and the contract
attention     results, gradients, dropout, merging, packed sequences: against the definition
cache         the key-value caches
torch, flash_attn, transformers, jax    the drop-ins, each in the folder of its name
distributed   attention over ranks: of threads, of mpi4py and of torch.distributed
adoptions     packages of others in which ours is a line or two
cuda          the kernels of GPUs, in emulators and compiled, and a GPU that is none
models        models, and the readers of their checkpoints
maps          maps of where heads look: words, links, pages, pictures
docs          pages: their examples, from the installed package alone, and their links
machine       what was built, threads, memory, imports
docs          the tutorial: what its cells print, in both languages
programs      commands, benchmark, examples, fuzzers, the GPU's first visit: whatever is run
fuzz, sweeps, sanitizers.py    programs that run for as long as one likes
support       what tests of several folders share
"""
