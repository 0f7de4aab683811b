"""The fine-tuning methods, each against its equation, and what holds for all of them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.quality.errors import QualityError
from benchmarks.quality.methods import Adapted
from benchmarks.quality.methods.table import METHODS, by_name
from benchmarks.quality.models import find_layers
from dcft_kernels import DCFTLinear, constraint_loss
from tests.benchmarks.quality import small_data

STEPS = 6


@functools.cache
def _pristine() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.BertForSequenceClassification(small_data.bert_config(num_labels=3))
    return model.eval().requires_grad_(False)


def bert() -> Any:
    return copy.deepcopy(_pristine())


def batch() -> dict[str, Tensor]:
    ids = torch.randint(4, 40, (6, 7), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "labels": torch.arange(6) % 3}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def adapted_bert(name: str, **options: Any) -> tuple[Adapted, list[str]]:
    model = bert()
    layers = find_layers(model, "ALL")
    return by_name(name).adapt(model, layers, STEPS, **options), layers


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def randomize(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.normal_(std=0.7)


# All methods

# How many parameters a method trains in a layer n -> m with its default options.
COUNTS: dict[str, Callable[[int, int], int]] = {
    "dcft": lambda n, m: n // 8 + m // 8 + 64,
    "ssb_dcft": lambda n, m: n // 8 + m // 8 + 64 + n + m,
    "lora": lambda n, m: n + m,
    "lora_fa": lambda n, m: m,
    "dora": lambda n, m: n + 2 * m,
    "adalora": lambda n, m: 2 * (n + m + 1),
    "sora": lambda n, m: 8 * (n + m + 1),
    "trilora": lambda n, m: 2 * (n + m + 1),
    "flora": lambda n, m: 2 * (n + m + 2),
    "lokr": lambda n, m: n // 8 + m // 8 + 64,
    "vera": lambda n, m: m + 256,
    "miss": lambda n, m: 16 * 32,
    "ssl": lambda n, m: n,
    "ssb": lambda n, m: n + m,
    "sam_parser": lambda n, m: min(n, m),
    "houlsby": lambda n, m: 8 * 2 * m,
    "pfeiffer": lambda n, m: 16 * 2 * m,
    "parallel_adapter": lambda n, m: n + m,
}


def expected_counts(name: str) -> dict[str, int]:
    """By layer, or for methods without layers by parameter."""
    base = _pristine()
    if name in ("head", "full", "bitfit"):
        ending = {"head": "nothing", "full": "", "bitfit": "bias"}[name]
        return {key: p.numel() for key, p in base.named_parameters() if key.endswith(ending)}
    counts = {}
    if name == "unilora":
        return {find_layers(base, "ALL")[0]: 16_384}
    for layer in find_layers(base, "ALL"):
        n, m = base.get_submodule(layer).in_features, base.get_submodule(layer).out_features
        inside = layer.endswith("output.dense") and "attention" not in layer
        if name == "ia3":
            counts[layer] = m if layer.endswith(("key", "value")) else n * inside
        elif name == "houlsby":
            counts[layer] = COUNTS[name](n, m) * layer.endswith("output.dense")
        else:
            counts[layer] = COUNTS[name](n, m) * (inside or name != "pfeiffer")
    return {layer: count for layer, count in counts.items() if count}


@pytest.mark.parametrize("name", METHODS)
def test_the_start_is_the_base_model(name: str) -> None:
    adapted, _ = adapted_bert(name)
    near = 1e-2 if name == "unilora" else 0.0  # whose factors share values, none of them zero
    torch.testing.assert_close(logits(adapted.model), logits(bert()), rtol=0.0, atol=near)


@pytest.mark.parametrize("name", METHODS)
def test_exactly_its_parameters_are_trained(name: str) -> None:
    torch.manual_seed(5)
    adapted, _ = adapted_bert(name)
    model = adapted.model.train()
    trained = trainable(model)
    expected = expected_counts(name)
    found = dict.fromkeys(expected, 0)
    for key, parameter in trained.items():
        found[max((owner for owner in expected if key.startswith(owner)), key=len)] += (
            parameter.numel()
        )
    assert found == expected
    torch.manual_seed(5)
    again = trainable(adapted_bert(name)[0].model)
    assert all(torch.equal(p, again[key]) for key, p in trained.items())  # seeds determine it
    if name == "head":
        return
    randomize(trained.values())
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    loss = model(**batch()).loss + (adapted.penalty() if adapted.penalty else 0.0)
    loss.backward()
    # A shift of all keys by the same vector does not change a softmax.
    without = [key for key, p in trained.items() if not p.grad.any() and "key.bias" not in key]
    assert not without
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    if adapted.after_step:
        adapted.after_step(1)
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == set(trained)


def test_the_table_describes_every_method() -> None:
    lora = {"r": 1, "alpha": None, "last_blocks": None}
    assert METHODS["lora"].options == {**lora, "use_dora": False}
    assert METHODS["dora"].options == {**lora, "use_dora": True}
    assert METHODS["sora"].options == {"r": 8, "alpha": None, "threshold": 3e-4}
    assert METHODS["ssb_dcft"].options == METHODS["dcft"].options
    assert METHODS["dcft"].options["init"] == "balanced"
    for method in METHODS.values():
        assert list(method.learning_rates) == sorted(set(method.learning_rates))
        json.dumps(method.options)  # they are stored with the results
    with pytest.raises(QualityError, match=r"--option of sora: expected one of .*, got 'treshold'"):
        METHODS["sora"].check_options("sora", {"treshold": 1.0})
    with pytest.raises(QualityError, match=r"--option of head: expected one of none, got 'r'"):
        METHODS["head"].check_options("head", {"r": 1})
    with pytest.raises(QualityError, match=r"--method: expected one of head, .*; did you mean hou"):
        by_name("hulsby")


# Equations

N, M, R = 24, 16, 3


def one_layer(name: str, bias: bool = True, **options: Any) -> tuple[nn.Module, nn.Linear]:
    """An adapted layer in float64 with random values, and its base."""
    base = nn.Linear(N, M, bias, dtype=torch.float64).requires_grad_(False)
    model = nn.ModuleDict({"output": nn.ModuleDict({"dense": copy.deepcopy(base)})})
    layers = ["output.dense"]
    if name == "houlsby":
        model["attention"] = copy.deepcopy(model)
        layers.append("attention.output.dense")
    adapted = by_name(name).adapt(model, layers, STEPS, **options)
    randomize(trainable(adapted.model).values())
    return adapted.model.get_submodule(layers[-1]), base


def kron(p: dict[str, Tensor]) -> Tensor:
    return torch.kron(p["dcft_B"] @ p["dcft_A"], p["dcft_C"])


def svd_scaled(W: Tensor, sigma: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    return U @ torch.diag(sigma) @ V


def dora(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    V = W + 2.0 * p["lora_B"] @ p["lora_A"]
    return p["lora_magnitude_vector"][:, None] * V / V.norm(dim=1, keepdim=True)


# The layer's weight `[m, n]`, from the base's and the trained values: the papers' equations, with
# `A` and `B` transposed to nn.Linear's layout. peft's AdaLoRA divides by the rank plus 1e-5.
WEIGHTS = [
    ("lora_fa", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["B"] @ p["A"]),
    ("sora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["B"] @ p["g"].diag() @ p["A"]),
    ("sora", {"r": R}, lambda W, p: W + p["B"] @ p["g"].diag() @ p["A"]),
    ("trilora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["B"] @ p["D"].diag() @ p["A"]),
    ("flora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * (p["A"].T @ p["G"] @ p["B"].T).T),
    ("ssl", {}, lambda W, p: (p["d1"].diag() @ W.T).T),
    ("ssb", {}, lambda W, p: (p["d1"].diag() @ W.T @ p["d2"].diag()).T),
    ("sam_parser", {}, lambda W, p: svd_scaled(W, p["sigma"])),
    ("dcft", {"rank": 2, "alpha": 6.0}, lambda W, p: W + 3.0 * kron(p)),
    ("dcft", {"kernel_size": [4, 8], "alpha": 1.0}, lambda W, p: W + kron(p)),
    ("dcft", {"alpha": 2.0, "scaling_gain": 1.5}, lambda W, p: W + 3.0 * kron(p)),
    (
        "ssb_dcft",
        {"rank": 2, "alpha": 6.0},
        lambda W, p: p["d2"].diag() @ W @ p["d1"].diag() + 3.0 * kron(p),
    ),
    ("miss", {"r": 4, "mini_r": 8}, lambda W, p: W + torch.tile(p["miss_block"].T, (2, 6))),
    ("miss", {"r": 4, "mini_r": None}, lambda W, p: W + torch.tile(p["miss_block"].T, (1, 6))),
    ("lora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["lora_B"] @ p["lora_A"]),
    ("dora", {"r": R, "alpha": 6.0}, dora),
    (
        "adalora",
        {"init_r": 2, "alpha": 6.0},
        lambda W, p: (
            W + 6.0 / (2 + 1e-5) * p["lora_B"] @ p["lora_E"].flatten().diag() @ p["lora_A"]
        ),
    ),
    (
        "lokr",
        {"alpha": 2.0},
        lambda W, p: W + 2.0 * torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
    ),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("name", "options", "weight"), WEIGHTS)
def test_a_layer_matches_its_equation(name: str, options: Any, weight: Any, bias: bool) -> None:
    layer, base = one_layer(name, bias, **options)
    values = {
        key.removeprefix("dcft.").split(".")[0]: p.detach()
        for key, p in layer.named_parameters()
        if not key.startswith(("base.", "base_layer."))
    }
    x = torch.randn(2, 5, N, dtype=torch.float64)
    expected = F.linear(x, weight(base.weight, values), base.bias)
    assert not torch.allclose(expected, base(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "activation", "h"),
    [
        ("houlsby", "gelu", lambda z: z * torch.special.ndtr(z)),
        ("pfeiffer", "relu", lambda z: z.clamp(min=0.0)),
        ("parallel_adapter", "silu", lambda z: z / (1.0 + torch.exp(-z))),
        ("houlsby", "tanh", torch.tanh),
    ],
)
def test_bottlenecks_match_equations_22_and_25(name: str, activation: str, h: Any) -> None:
    layer, base = one_layer(name, r=R, activation=activation)
    x = torch.randn(4, N, dtype=torch.float64)
    y = base(x)
    z = x if name == "parallel_adapter" else y
    torch.testing.assert_close(layer(x), y + h(z @ layer.A.T) @ layer.B.T, rtol=1e-9, atol=1e-9)


def test_ia3_scales_keys_values_and_the_inside_of_the_feed_forward() -> None:
    adapted, layers = adapted_bert("ia3")
    randomize(trainable(adapted.model).values())
    key, output = layers[1], layers[5]
    assert (key[-3:], output[-12:]) == ("key", "output.dense")
    for name, x, side in ((key, torch.randn(4, 32), "out"), (output, torch.randn(4, 64), "in")):
        layer, base = adapted.model.get_submodule(name), _pristine().get_submodule(name)
        scales = layer.ia3_l["default"].flatten()
        expected = base(x) * scales if side == "out" else base(x * scales)
        torch.testing.assert_close(layer(x), expected)


def test_vera_shares_its_factors() -> None:
    adapted, layers = adapted_bert("vera", r=5)
    randomize(trainable(adapted.model).values())
    first = adapted.model.get_submodule(layers[0])
    A, B = first.vera_A["default"], first.vera_B["default"]
    assert (A.shape, B.shape) == ((5, 64), (64, 5))
    for name in layers:
        layer, base = adapted.model.get_submodule(name), _pristine().get_submodule(name)
        b, d = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        x = torch.randn(4, base.in_features)
        DW = b.diag() @ B[: base.out_features] @ d.diag() @ A[:, : base.in_features]
        torch.testing.assert_close(layer(x), base(x) + x @ DW.T, rtol=1e-4, atol=1e-4)


def test_unilora_takes_its_factors_from_one_vector() -> None:
    adapted, layers = adapted_bert("unilora", r=3, length=50)
    (values,) = trainable(adapted.model).values()
    uses = torch.zeros(50)
    for name in layers:
        layer, base = adapted.model.get_submodule(name), _pristine().get_submodule(name)
        A, B = layer.unilora_indices_A["default"], layer.unilora_indices_B["default"]
        uses += torch.bincount(torch.cat([A.flatten(), B.flatten()]), minlength=50)
    for name in layers:
        layer, base = adapted.model.get_submodule(name), _pristine().get_submodule(name)
        A, B = layer.unilora_indices_A["default"], layer.unilora_indices_B["default"]
        shared = values / uses.sqrt()
        x = torch.randn(4, base.in_features)
        torch.testing.assert_close(layer(x), base(x) + x @ (shared[B] @ shared[A]).T)


def test_lora_in_the_last_blocks_only() -> None:
    adapted, layers = adapted_bert("lora", last_blocks=1)
    found = {key.split(".lora_")[0] for key in trainable(adapted.model)}
    assert found == {name for name in layers if "layer.1." in name}


# Penalties and steps


def test_sora_thresholds_its_gates_after_every_step() -> None:
    adapted, layers = adapted_bert("sora", r=4, threshold=0.5)
    gates = [adapted.model.get_parameter(f"{name}.g") for name in layers]
    assert 0.5 < torch.cat([gate.detach() for gate in gates]).std() < 1.5
    for gate in gates:
        gate.data.copy_(torch.tensor([0.9, -0.9, 0.4, -0.5]))
    adapted.after_step(1)
    for gate in gates:
        torch.testing.assert_close(gate.data, torch.tensor([0.4, -0.4, 0.0, 0.0]))


def test_adalora_cuts_ranks_to_its_budget() -> None:
    steps, model = 12, bert()
    layers = find_layers(model, "ALL")
    adapted = by_name("adalora").adapt(model, layers, steps, target_r=1, init_r=3)
    values = [p for name, p in adapted.model.named_parameters() if ".lora_E." in name]
    optimizer = torch.optim.AdamW(trainable(adapted.model).values(), lr=1e-2)
    ranks = []
    for step in range(steps):
        (adapted.model(**batch()).loss + adapted.penalty()).backward()
        optimizer.step()
        adapted.after_step(step + 1)
        optimizer.zero_grad()
        ranks.append(sum(int(torch.count_nonzero(value)) for value in values))
    # All ranks for a tenth of the steps, a cubic descent, then the target to the end.
    assert ranks[0] == 3 * 12
    assert 12 < ranks[2] < 3 * 12
    assert ranks[6:] == [12] * 6
    for few in (2, 3):
        by_name("adalora").adapt(bert(), layers, few)
    for arguments in ({"target_r": 2, "init_r": 2}, {"r": 1}):
        with pytest.raises((ValueError, TypeError), match=r"target_r: expected less|'r'"):
            by_name("adalora").adapt(bert(), layers, steps, **arguments)


def test_adaloras_penalty_is_the_mean_distance_from_orthonormal() -> None:
    adapted, layers = adapted_bert("adalora", orthogonality=0.25)
    randomize(trainable(adapted.model).values())
    distances = []
    for name in layers:
        layer = adapted.model.get_submodule(name)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        distances += [(A @ A.T - torch.eye(2)).norm(), (B.T @ B - torch.eye(2)).norm()]
    torch.testing.assert_close(adapted.penalty(), 0.25 * torch.stack(distances).mean())


@pytest.mark.parametrize("name", ["dcft", "ssb_dcft"])
def test_dcft_adds_a_weighted_constraint(name: str) -> None:
    assert adapted_bert(name)[0].penalty is None
    options = {"rank": 3, "init": "paper", "orthogonality": 0.1}
    for constraint, form in (("orthogonal", "paper"), ("diagonal", "published_code")):
        given = {"constraint": constraint, "orthogonality_form": form}
        adapted, _ = adapted_bert(name, **options, **given)
        expected = 0.1 * constraint_loss(adapted.model, constraint, form)
        torch.testing.assert_close(adapted.penalty(), expected)
    for wrong in ({"constraint": "x"}, {"orthogonality_form": "x"}):
        with pytest.raises(ValueError, match=r"(constraint|form): expected"):
            adapted_bert(name, **options, **wrong)
    with pytest.raises(ValueError, match=r"constraint: 'diagonal' needs a weight"):
        adapted_bert(name, constraint="diagonal")


def test_options_of_the_library_reach_dcft() -> None:
    options = {"kernel_size": [4, 8], "stride": [2, 8], "rank": 2, "init": "zero", "alpha": 3.0}
    options |= {"dropout": 0.25, "backend": "torch", "adapter_dtype": "float64"}
    adapted, layers = adapted_bert("dcft", **options, exclude=["query"])
    swapped = {n: m for n, m in adapted.model.named_modules() if isinstance(m, DCFTLinear)}
    assert list(swapped) == [name for name in layers if not name.endswith("query")]
    for layer in swapped.values():
        assert (layer.kernel_size, layer.stride) == ((4, 8), (2, 8))
        assert (layer.rank, layer.init, layer.scaling, layer.dropout) == (2, "zero", 1.5, 0.25)
        assert (layer.backend, layer.dcft_A.dtype) == ("torch", torch.float64)
    with pytest.raises(TypeError, match=r"adapter_dtype: expected a torch.dtype, got .half8."):
        adapted_bert("dcft", adapter_dtype="half8")


@pytest.mark.parametrize("training", [True, False])
def test_ssb_dcft_has_dropout_and_nonlinearity_on_the_increment_only(training: bool) -> None:
    layer, base = one_layer("ssb_dcft", rank=2, dropout=0.5, nonlinearity="tanh")
    layer.train(training)
    x = torch.randn(4, N, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x)) is not training
    scaled = F.linear(x * layer.d1, base.weight) * layer.d2 + base.bias
    if not training:
        torch.testing.assert_close(layer(x), scaled + layer.dcft(x) - base(x))
    with torch.no_grad():
        layer.dcft.dcft_B.zero_()
    torch.testing.assert_close(layer(x), scaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dcft", "lora", "adalora", "lokr", "vera", "ssl"])
def test_layers_are_adapted_by_their_full_names(name: str) -> None:
    model = nn.ModuleDict({"dense": nn.Linear(8, 8), "output": nn.ModuleDict()})
    model["output"]["dense"] = nn.Linear(8, 8)
    model.requires_grad_(False)
    trained = trainable(by_name(name).adapt(model, ["dense"], STEPS).model)
    assert trained
    assert all(key.startswith("dense.") for key in trained)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("houlsby", {"activation": "swish"}, "expected one of 'relu'"),
        ("flora", {"alpha": "one"}, "alpha: expected a number"),
        ("trilora", {"r": 0}, "r: expected a positive int, got 0"),
        ("lora", {"r": 0}, "positive"),
        ("dcft", {"kernel_size": 0}, "kernel_size"),
        ("dcft", {"init": "ones"}, "init: expected one of"),
    ],
)
def test_bad_options_are_reported(name: str, options: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        adapted_bert(name, **options)
