"""The oracle: the paper's equations as they are written, materialised, in any float dtype."""

from dcft_kernels.reference.gradients import Gradients, closed_form_gradients
from dcft_kernels.reference.materialised import delta_weight, linear, update

__all__ = ["Gradients", "closed_form_gradients", "delta_weight", "linear", "update"]
