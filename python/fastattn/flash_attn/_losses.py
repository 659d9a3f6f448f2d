# SPDX-License-Identifier: Apache-2.0
"""flash_attn.losses.cross_entropy and flash_attn.ops.triton.cross_entropy, by torch's operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross entropy of each row.

    Parameters
    ----------
    logits : tensor of shape (rows, classes)
    labels : tensor of int, shape (rows,)
    precomputed_lse : tensor of shape (rows,), optional
        Not needed here, and not read.
    label_smoothing : float
        The part of a row's weight that all classes share.
    logit_scale : float
        What logits are multiplied by first; > 0.
    lse_square_scale : float
        Adds ``lse_square_scale * lse**2``, the z-loss.
    ignore_index : int
        Rows with this label give 0.
    inplace_backward : bool
        Changes nothing: logits stay as they are.
    process_group : optional
        Not supported, unless it is of one process.

    Returns
    -------
    losses, z_losses : tensor of shape (rows,)
        float32, or float64 if logits are. z_losses, the part that lse_square_scale adds, have no
        gradient.

    Raises
    ------
    NotImplementedError
        process_group has several processes.
    ValueError
        An argument breaks a rule.
    """
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        raise NotImplementedError(
            "process_group is not supported: gather the logits of all processes before the call"
        )
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits must have shape (rows, classes) and labels (rows,), got "
            f"logits.shape={tuple(logits.shape)}, labels.shape={tuple(labels.shape)}"
        )
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be > 0, got {logit_scale}")
    ignored = labels == ignore_index
    wrong = labels[~ignored & ((labels < 0) | (labels >= logits.shape[1]))]
    if len(wrong):
        raise ValueError(
            f"labels must be within 0..{logits.shape[1] - 1} or {ignore_index}, got {int(wrong[0])}"
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    lse = scores.logsumexp(-1)
    picked = scores.gather(1, labels.masked_fill(ignored, 0)[:, None].long())[:, 0]
    losses = lse - (1 - label_smoothing) * picked
    if label_smoothing > 0:
        losses = losses - label_smoothing * scores.mean(-1)
    z_losses = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
    return losses.masked_fill(ignored, 0.0) + z_losses, z_losses.detach()


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy_loss`, and the mean or the sum of the rows.

    Parameters
    ----------
    reduction : "mean", "sum" or "none"
        The mean is over the rows that are not ignored.
    return_z_loss : bool
        Return the part that lse_square_scale adds, too.
    ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward, process_group
        As for `cross_entropy_loss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise NotImplementedError(
                f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}"
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """Compute the loss of logits of shape (rows, classes) and labels of shape (rows,)."""
        both = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        if self.reduction != "none":
            both = (both[0].sum(), both[1].sum())
        if self.reduction == "mean":
            rows = (target != self.ignore_index).sum()
            both = (both[0] / rows, both[1] / rows)
        return both if self.return_z_loss else both[0]
