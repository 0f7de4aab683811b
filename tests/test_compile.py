"""`torch.compile(fullgraph=True)`, autocast and activation checkpointing give what eager gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dcft_kernels import DCFTLinear, dcft_update

MODES = ["fp32", "balanced", "dropout", "bf16-base", "update", "ragged", "overlap"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class UpdateOnly(nn.Module):
    """A base layer that is no dense weight, with the adapter added by `dcft_update`."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = DCFTLinear(48, 64, init="paper")

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        y = x.repeat_interleave(2, -1)[..., :64].tanh()
        return dcft_update(y, x, adapter.dcft_A, adapter.dcft_B, adapter.dcft_C)


def build(mode: str) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module
    if mode == "update":
        layer = UpdateOnly()
    elif mode == "ragged":
        layer = DCFTLinear(45, 61, rank=2, init="paper")
    elif mode == "overlap":
        layer = DCFTLinear(48, 64, stride=4, init="paper")
    else:
        layer = DCFTLinear(
            48,
            64,
            init="balanced" if mode == "balanced" else "paper",
            dropout=0.3 if mode == "dropout" else 0.0,
            dtype=torch.bfloat16 if mode == "bf16-base" else None,
        )
    for name, parameter in layer.named_parameters():
        if "dcft" in name:
            nn.init.normal_(parameter)
    return layer


def step(run, layer: nn.Module, tokens: int, **kwargs) -> list[Tensor]:
    """Output and all gradients of one training step, from the same seed every time."""
    torch.manual_seed(tokens)
    dtype = next(layer.parameters()).dtype
    width = 45 if getattr(layer, "in_features", 48) == 45 else 48
    x = torch.randn(2, tokens, width).to(dtype).requires_grad_()
    layer.zero_grad()
    y = run(x, **kwargs)
    y.float().square().mean().backward()
    factors = [p for n, p in layer.named_parameters() if "dcft" in n]
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors)]


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode: str) -> None:
    layer = build(mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(step(compiled, layer, 5), step(layer, layer, 5), strict=True):
        torch.testing.assert_close(actual, expected)


def test_new_token_counts_do_not_recompile() -> None:
    layer = build("fp32")
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for tokens in (5, 6, 7, 33, 128):
        for actual, expected in zip(
            step(compiled, layer, tokens), step(layer, layer, tokens), strict=True
        ):
            torch.testing.assert_close(actual, expected)
        counts.append(graphs.frame_count)
    assert counts == counts[:1] * 5


@pytest.mark.slow
def test_default_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor, where it has a C++ compiler to call."""
    layer = nn.Sequential(build("fp32"), nn.GELU(), DCFTLinear(64, 16, init="paper"))
    # The disk cache knows graphs of other versions of the operators.
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    compiled = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(step(compiled, layer, 5), step(layer, layer, 5), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["fp32", "dropout", "update"])
def test_autocast_is_the_cast_layer(mode: str, dtype: torch.dtype) -> None:
    """Autocast gives what a 16-bit base with float32 adapters gives, and float32 gradients."""
    layer = build(mode)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    y, x_grad, *factor_grads = step(under_autocast, layer, 5)
    assert y.dtype == dtype
    assert x_grad.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in factor_grads)
    if mode == "update":
        return

    def by_hand(x: Tensor) -> Tensor:
        half = DCFTLinear.from_linear(
            nn.Linear(48, 64).to(dtype),
            init="paper",
            dropout=layer.dropout,
            adapter_dtype=torch.float32,
        )
        half.weight.data, half.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)
        half.dcft_A, half.dcft_B, half.dcft_C = layer.dcft_A, layer.dcft_B, layer.dcft_C
        torch.manual_seed(1)
        return half(x.to(dtype))

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return under_autocast(x)

    for actual, expected in zip(step(seeded, layer, 5), step(by_hand, layer, 5), strict=True):
        assert torch.equal(actual, expected)


def test_backward_inside_autocast() -> None:
    """A backward pass that runs under autocast computes what one outside of it computes."""
    layer = build("fp32")

    def loss_inside(inside: bool) -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(0)
        x = torch.randn(5, 48, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [x.grad, layer.dcft_A.grad, layer.dcft_B.grad, layer.dcft_C.grad]

    for actual, expected in zip(loss_inside(True), loss_inside(False), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_under_autocast() -> None:
    layer = build("fp32")

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        step(compiled, layer, 5), step(under_autocast, layer, 5), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "dropout"])
def test_checkpointing(mode: str, use_reentrant: bool) -> None:
    """The recomputed forward draws the same dropout mask, so the gradients are the same bits."""
    layer = nn.Sequential(build(mode), nn.GELU(), DCFTLinear(64, 48, dropout=0.2, init="paper"))

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    for actual, expected in zip(step(checkpointed, layer, 5), step(layer, layer, 5), strict=True):
        assert torch.equal(actual, expected)


def test_checkpointing_compiled() -> None:
    layer = build("fp32")

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(step(compiled, layer, 5), step(layer, layer, 5), strict=True):
        torch.testing.assert_close(actual, expected)
