# SPDX-License-Identifier: Apache-2.0
"""`fastattn.flash_attn` in the place of the package flash_attn.

A finder, first on sys.meta_path, makes the modules that `MODULES` lists when they are imported, and
tells importlib.metadata of the distribution flash_attn.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from fastattn.flash_attn._lacking import lacking

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator, Sequence
    from types import TracebackType

NAME = "flash_attn"
VERSION = "2.8.4"  # of flash-attn, whose names these are
PLACE = "<fastattn.flash_attn>"  # begins a package's __path__: there is no such folder

PARALLEL = "fastattn has no tensor parallelism: use the layer that is not parallel"
MODELS = "build the model with transformers, whose attn_implementation='fastattn' is this kernel"
TRITON = "it is a kernel of Triton for GPUs: use torch's operators"
SPARSE = "there is no block-sparse kernel: give fastattn.attention a mask"
BENCHMARK = "use torch.utils.benchmark"


class Part(NamedTuple):
    """What a module of flash_attn has here.

    source is the module of fastattn that has the names. The missing names raise
    NotImplementedError, which says why, when they are called.
    """

    source: str = ""
    names: str = ""
    missing: str = ""
    why: str = ""


FUNCTIONS = (
    "flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func flash_attn_varlen_func "
    "flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func flash_attn_with_kvcache"
)
HERE = "fastattn.flash_attn._"
MODULES = {
    "": Part("fastattn.flash_attn", FUNCTIONS),
    "flash_attn_interface": Part(
        HERE + "forward_backward",
        f"{FUNCTIONS} _flash_attn_forward _flash_attn_backward _flash_attn_varlen_forward "
        "_flash_attn_varlen_backward _wrapped_flash_attn_forward _wrapped_flash_attn_backward "
        "_wrapped_flash_attn_varlen_forward _wrapped_flash_attn_varlen_backward FlashAttnFunc "
        "FlashAttnKVPackedFunc FlashAttnQKVPackedFunc FlashAttnVarlenFunc "
        "FlashAttnVarlenKVPackedFunc FlashAttnVarlenQKVPackedFunc maybe_contiguous round_multiple",
    ),
    "bert_padding": Part(
        HERE + "padding",
        "index_first_axis index_put_first_axis index_first_axis_residual IndexFirstAxis "
        "IndexPutFirstAxis IndexFirstAxisResidual unpad_input "
        "unpad_input_for_concatenated_sequences pad_input rearrange repeat",
    ),
    "layers": Part(),
    "layers.rotary": Part(
        HERE + "rotary",
        "rotate_half apply_rotary_emb_torch apply_rotary apply_rotary_emb apply_rotary_emb_func "
        "ApplyRotaryEmb apply_rotary_emb_qkv_ apply_rotary_emb_kv_ RotaryEmbedding",
    ),
    "layers.patch_embed": Part(HERE + "patch_embed", "PatchEmbed"),
    "losses": Part(),
    "losses.cross_entropy": Part(HERE + "losses", "CrossEntropyLoss cross_entropy_loss"),
    "modules": Part(),
    "modules.mha": Part(
        HERE + "mha",
        "MHA FlashSelfAttention FlashCrossAttention SelfAttention CrossAttention get_alibi_slopes "
        "RotaryEmbedding",
        "ParallelMHA",
        PARALLEL,
    ),
    "modules.mlp": Part(
        HERE + "feed_forward",
        "Mlp GatedMlp FusedMLP",
        "ParallelMLP ParallelGatedMlp ParallelFusedMLP",
        PARALLEL,
    ),
    "modules.block": Part(missing="Block ParallelBlock", why=MODELS),
    "modules.embedding": Part(
        missing="GPT2Embeddings BertEmbeddings ParallelGPT2Embeddings VocabParallelEmbedding "
        "ColumnParallelEmbedding",
        why=MODELS,
    ),
    "ops": Part(),
    "ops.activations": Part(
        HERE + "activations",
        "gelu_fwd gelu_bwd bias_gelu bias_gelu_back bias_gelu_impl fast_gelu_impl relu_bwd "
        "sqrelu_fwd sqrelu_bwd swiglu swiglu_fwd swiglu_bwd",
    ),
    "ops.fused_dense": Part(
        HERE + "feed_forward",
        "FusedDense fused_dense_func FusedMLP fused_mlp_func",
        "ColumnParallelLinear RowParallelLinear ParallelFusedMLP",
        PARALLEL,
    ),
    "ops.layer_norm": Part(
        HERE + "norms",
        "layer_norm dropout_add_layer_norm DropoutAddLayerNorm",
        "dropout_add_layer_norm_subset dropout_add_layer_norm_parallel_residual",
        "use flash_attn.ops.triton.layer_norm.layer_norm_fn, whose x1 and weight1 do that",
    ),
    "ops.rms_norm": Part(
        HERE + "norms",
        "rms_norm RMSNorm dropout_add_rms_norm DropoutAddRMSNorm",
        "dropout_add_rms_norm_subset dropout_add_rms_norm_parallel_residual",
        "use flash_attn.ops.triton.layer_norm.rms_norm_fn, whose x1 and weight1 do that",
    ),
    "ops.triton": Part(),
    "ops.triton.cross_entropy": Part(HERE + "losses", "cross_entropy_loss"),
    "ops.triton.layer_norm": Part(
        HERE + "norms",
        "layer_norm_fn rms_norm_fn RMSNorm",
        "layer_norm_linear_fn",
        "use layer_norm_fn, and torch.nn.functional.linear",
    ),
    "ops.triton.linear": Part(missing="triton_linear_act triton_dgrad_act", why=TRITON),
    "ops.triton.mlp": Part(missing="FusedDenseSqreluDense", why=TRITON),
    "ops.triton.rotary": Part(HERE + "rotary", "apply_rotary"),
    "utils": Part(),
    "utils.benchmark": Part(
        missing="benchmark_forward benchmark_backward benchmark_combined benchmark_fwd_bwd "
        "benchmark_all benchmark_memory pytorch_profiler",
        why=BENCHMARK,
    ),
    "utils.distributed": Part(
        HERE + "collectives",
        "all_gather all_reduce reduce_scatter get_dim_for_local_rank",
        "all_gather_raw all_reduce_raw reduce_scatter_raw sync_shared_params "
        "allreduce_sequence_parallel_grad",
        "use torch.distributed",
    ),
    "utils.generation": Part(
        HERE + "mha",
        "InferenceParams",
        "GenerationMixin decode decode_speculative sample update_graph_cache",
        MODELS,
    ),
    "utils.pretrained": Part(missing="state_dict_from_pretrained", why=MODELS),
    "models": Part(),
    "models.gpt": Part(
        missing="GPTLMHeadModel GPTModel GPTPreTrainedModel create_mixer_cls create_mlp_cls "
        "create_block combine_state_dicts_tp shard_state_dict_tp remap_state_dict_hf_gpt2",
        why=MODELS,
    ),
    "models.bert": Part(
        missing="BertModel BertEncoder BertForPreTraining BertPreTrainedModel BertPooler "
        "BertPreTrainingHeads create_mixer_cls create_mlp_cls create_block remap_state_dict "
        "inv_remap_state_dict",
        why=MODELS,
    ),
    "models.llama": Part(
        missing="llama_config_to_gpt2_config remap_state_dict_hf_llama "
        "inv_remap_state_dict_hf_llama remap_state_dict_meta_llama config_from_checkpoint "
        "state_dicts_from_checkpoint",
        why=MODELS,
    ),
    "models.vit": Part(missing="VisionTransformer vit_base_patch16_224", why=MODELS),
    "models.opt": Part(missing="opt_config_to_gpt2_config remap_state_dict_hf_opt", why=MODELS),
    "models.gptj": Part(missing="gptj_config_to_gpt2_config remap_state_dict_hf_gptj", why=MODELS),
    "models.gpt_neox": Part(
        missing="gpt_neox_config_to_gpt2_config remap_state_dict_hf_gpt_neox", why=MODELS
    ),
    "models.falcon": Part(
        missing="falcon_config_to_gpt2_config remap_state_dict_hf_falcon", why=MODELS
    ),
    "models.bigcode": Part(
        missing="bigcode_config_to_gpt2_config remap_state_dict_hf_bigcode", why=MODELS
    ),
    "flash_blocksparse_attention": Part(
        missing="FlashBlocksparseAttention FlashBlocksparseMHA", why=SPARSE
    ),
    "flash_blocksparse_attn_interface": Part(
        missing="flash_blocksparse_attn_func convert_blockmask", why=SPARSE
    ),
}

# The files of the distribution that importlib.metadata reads.
FILES = {
    "METADATA": f"""Metadata-Version: 2.1
Name: {NAME}
Version: {VERSION}
Summary: fastattn.flash_attn, installed in the place of flash-attn
Requires-Dist: torch
Requires-Dist: einops
""",
    "top_level.txt": f"{NAME}\n",
    "INSTALLER": "fastattn.flash_attn.install\n",
}
ANY_DISTRIBUTION = importlib.metadata.DistributionFinder.Context()

_lock = threading.Lock()


def install() -> Installed:
    """Let ``import flash_attn`` find the functions of `fastattn.flash_attn`, until it is undone.

    Never done by itself. flash_attn and its modules can then be imported, and importlib.metadata
    knows the distribution flash_attn, version 2.8.4. What each module has, and what it says is
    missing: docs/flash_attn.md.

    Returns
    -------
    Installed
        Undone by its ``close()``, or at the end of a ``with`` statement. What was imported before
        keeps the functions.

    Raises
    ------
    RuntimeError
        flash_attn was imported already, or this was called before.

    Examples
    --------
    >>> import fastattn.flash_attn
    >>> with fastattn.flash_attn.install():
    ...     from flash_attn import flash_attn_func
    >>> flash_attn_func is fastattn.flash_attn.flash_attn_func
    True
    """
    return Installed()


class Installed:
    """What `install` returns; it is in force from then on."""

    def __init__(self) -> None:
        self._finder = _Finder()
        with _lock:
            if any(isinstance(finder, _Finder) for finder in sys.meta_path):
                raise RuntimeError("flash_attn must not be imported yet, it is already, by install")
            there = sorted(name for name in sys.modules if name.partition(".")[0] == NAME)
            if there:
                where = getattr(sys.modules[there[0]], "__file__", None)
                raise RuntimeError(
                    f"flash_attn must not be imported yet, it is already, from {where}"
                )
            sys.meta_path.insert(0, self._finder)
            sys.path_hooks.append(_Lister)

    def close(self) -> None:
        """Take the modules away; those that something else has put there stay.

        More than once does nothing.
        """
        with _lock:
            if self._finder not in sys.meta_path:
                return
            sys.meta_path.remove(self._finder)
            sys.path_hooks.remove(_Lister)
            for place in [x for x in sys.path_importer_cache if x.startswith(PLACE)]:
                del sys.path_importer_cache[place]
            for name, module in list(sys.modules.items()):
                if getattr(getattr(module, "__spec__", None), "loader", None) is self._finder:
                    del sys.modules[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "what install() returns cannot be copied or pickled: it undoes what was done to this "
            "process; call install() in each process"
        )


class _Finder(importlib.abc.Loader, importlib.metadata.DistributionFinder):
    """Finds and makes the modules, and finds the distribution."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module that the table has."""
        root, _, name = fullname.partition(".")
        if root != NAME or name not in MODULES:
            return None
        spec = importlib.machinery.ModuleSpec(
            fullname, self, origin=__file__, is_package=bool(_children(name))
        )
        spec.has_location = True  # so that the module has a __file__: programs print it
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(f"{PLACE}/{fullname}")
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to Python to make the module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill a module with its names."""
        name = module.__name__.partition(".")[2]
        part = MODULES[name]
        names: dict[str, Any] = {
            missing: lacking(module.__name__, missing, part.why) for missing in part.missing.split()
        }
        if part.source:
            source = importlib.import_module(part.source)
            names |= {x: getattr(source, x) for x in part.names.split()}
        if not name:
            names["__version__"] = VERSION
        module.__doc__ = f"fastattn.flash_attn in the place of {module.__name__}."
        module.__dict__.update(names)
        if not name:  # as with flash-attn, this one is there without being imported
            importlib.import_module(f"{NAME}.flash_attn_interface")

    def find_distributions(
        self,
        context: importlib.metadata.DistributionFinder.Context = ANY_DISTRIBUTION,
    ) -> Iterator[importlib.metadata.Distribution]:
        """Return the distribution, if it is asked for by any spelling of its name, or by none."""
        if context.name is None or re.sub(r"[-_.]+", "_", context.name).lower() == NAME:
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata tells of flash_attn."""

    def read_text(self, filename: str) -> str | None:
        """Return what a file of the distribution holds; None if there is none."""
        return FILES.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Return where a file of the distribution would be."""
        return Path(__file__).parent / path


class _Lister(importlib.abc.PathEntryFinder):
    """Lists the modules of a package for pkgutil, by the package's __path__."""

    def __init__(self, place: str) -> None:
        if not place.startswith(f"{PLACE}/"):
            raise ImportError(f"fastattn.flash_attn has nothing at {place!r}")
        self._name = place.removeprefix(f"{PLACE}/").partition(".")[2]

    def find_spec(self, fullname: str, target: types.ModuleType | None = None) -> None:
        """Find nothing: what there is, `_Finder` has found before."""

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """Return the name of each module, and whether it is a package."""
        for name in _children(self._name):
            yield prefix + name.rpartition(".")[2], bool(_children(name))


def _children(name: str) -> list[str]:
    """Return the modules of a package; none if it is no package."""
    return [child for child in MODULES if child and child.rpartition(".")[0] == name]
