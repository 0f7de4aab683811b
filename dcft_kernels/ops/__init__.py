"""The layer as PyTorch operators: fake kernels for tracing, autograd, autocast safety.

Operators in the namespace `dcft_kernels`, opaque to the compiler and clean under
`torch.library.opcheck`:

    linear(x, weight, bias, A, B, C, seed, ..., strategy)  -> (y, U)
    update(y, x, A, B, C, seed, ..., strategy)             -> (y + dropout(x) DW^T, U)
    backward(g, x, U, weight, A, B, C, seed, ..., needs)   -> six gradients
    linear_group(x, weights, biases, has_bias, As, Bs, Cs, seed, ...) -> (every y, U), kernels
    linear_group_backward(gs, x, U, weights, ..., needs)   -> all their gradients
    expand(A, B, C, ..., n, m)                             -> scaling * DW, by the kernels
    expand_backward(G, A, B, C, ..., n, m, needs)          -> its three gradients
    merge(W, A, B, C, seed, ...)                           -> W + scaling * DW, by the kernels
    merge_(W, A, B, C, seed, ...)                          -> the same in place
    drop(x, seed, dropout_p)                               -> x with elements dropped, not scaled

`U [T, k, d_in]` is an output only because the backward pass needs it.

A layer with a nonlinearity between its factors has no operator of its own: it is made of PyTorch's
(`ops.nonlinear`), and only its dropout is one of these.

Under `create_graph=True` the backward passes run as ordinary differentiable operations on the same
saved tensors instead of through the opaque operators, so double backward works. The transforms of
`torch.func` (vmap, grad, jvp) have no rule for these operators: `dispatch` says so, and functions
transformed with them use `backend="reference"`.
"""

from dcft_kernels.ops.expand import delta_weight, merge, merge_
from dcft_kernels.ops.group import linear_group
from dcft_kernels.ops.layer import linear, update
from dcft_kernels.ops.library import KERNELS
from dcft_kernels.ops.nonlinear import nonlinear_linear, nonlinear_update

__all__ = [
    "KERNELS",
    "delta_weight",
    "linear",
    "linear_group",
    "merge",
    "merge_",
    "nonlinear_linear",
    "nonlinear_update",
    "update",
]
