"""The oracle: the paper's equations as they are written, materialised, in any float dtype."""

from dcft_kernels.reference.gradients import closed_form_gradients
from dcft_kernels.reference.materialised import delta_weight, linear, merge, merge_, update

__all__ = ["closed_form_gradients", "delta_weight", "linear", "merge", "merge_", "update"]
