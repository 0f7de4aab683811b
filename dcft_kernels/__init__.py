"""Deconvolution fine-tuning (DCFT, arXiv 2503.01419) that never materialises its weight update."""

from dcft_kernels import constraints, recipes
from dcft_kernels.adapter_files import load_adapter, save_adapter
from dcft_kernels.constraints import constraint_loss, orthogonality_loss
from dcft_kernels.explanation import explain
from dcft_kernels.functional import add_delta_weight_, dcft_linear, dcft_update, delta_weight
from dcft_kernels.linear import DCFTLinear
from dcft_kernels.model import (
    freeze_base,
    merge_model,
    parameter_counts,
    swap_linear,
    unmerge_model,
)
from dcft_kernels.trained_state import small_checkpoints

__all__ = [
    "DCFTLinear",
    "add_delta_weight_",
    "constraint_loss",
    "constraints",
    "dcft_linear",
    "dcft_update",
    "delta_weight",
    "explain",
    "freeze_base",
    "load_adapter",
    "merge_model",
    "orthogonality_loss",
    "parameter_counts",
    "recipes",
    "save_adapter",
    "small_checkpoints",
    "swap_linear",
    "unmerge_model",
]
