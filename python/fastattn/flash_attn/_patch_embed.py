# SPDX-License-Identifier: Apache-2.0
"""flash_attn.layers.patch_embed: images as sequences of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Identity, Linear, Module

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class PatchEmbed(Module):
    """A linear layer over the patches of an image.

    Parameters
    ----------
    img_size, patch_size : int, or (height, width)
    in_chans, embed_dim : int
    norm_layer : callable, optional
        Makes a norm of embed_dim numbers.
    flatten : bool
        Patches are one axis, row by row; not two.
    bias : bool
    fused_bias_fc : bool
        Changes nothing.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], Any] | None = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = (
            (x, x) if isinstance(x, int) else tuple(x) for x in (img_size, patch_size)
        )
        self.grid_size = tuple(x // y for x, y in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        numbers = in_chans * self.patch_size[0] * self.patch_size[1]
        self.proj = Linear(numbers, embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else Identity()

    def forward(self, x: Tensor) -> Any:
        """Embed images of shape (batch, in_chans, *img_size)."""
        if x.ndim != 4 or tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"x must have shape (batch, in_chans, *{self.img_size}), got {tuple(x.shape)}"
            )
        (rows, columns), (high, wide) = self.grid_size, self.patch_size
        x = x[:, :, : rows * high, : columns * wide]
        patches = x.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        y = self.proj(patches)
        return self.norm(y.flatten(1, 2) if self.flatten else y)
