"""The methods that DCFT is compared with, each against its equation; and what holds for all."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.quality.errors import QualityError
from benchmarks.quality.methods.adapted import Adapted
from benchmarks.quality.methods.table import METHODS, by_name
from dcft_kernels import DCFTLinear, constraint_loss, orthogonality_loss
from tests.small_models import build_small_model, logits, small_inputs

NAMES = [method.name for method in METHODS]
BERT_LAYERS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 6


@functools.cache
def _pristine() -> nn.Module:
    """A classifier whose every size 8 divides; nobody changes it."""
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        # The usual 0.02 would leave layers this narrow with next to no influence on the output.
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.BertForSequenceClassification(config)
    return model.eval().requires_grad_(False)


def _bert() -> nn.Module:
    return copy.deepcopy(_pristine())


def _layers(model: nn.Module, endings: Iterable[str] = BERT_LAYERS) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and "pooler" not in name
        and any(name.endswith(f".{ending}") for ending in endings)
    ]


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 61, (6, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(6) % 3}


def _adapted_bert(name: str, **options) -> tuple[Adapted, list[str]]:
    model = _bert()
    layers = _layers(model)
    return by_name(name).adapt(model, layers, STEPS, **options), layers


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _randomize(parameters: Iterable[nn.Parameter]) -> None:
    """Values that no method starts with, of both signs."""
    for parameter in parameters:
        parameter.normal_(std=0.7)


# ---- the table ------------------------------------------------------------------------------


def test_the_table_describes_every_method():
    assert len(set(NAMES)) == len(NAMES)
    for method in METHODS:
        assert by_name(method.name) is method
        assert method.description
        assert list(method.learning_rates) == sorted(set(method.learning_rates))
        json.dumps(method.options)  # they are stored with the results


def test_options_have_the_defaults_that_the_table_tells():
    options = by_name("lora").options
    assert options == {"r": 1, "alpha": None}
    assert by_name("ssb_dcft").options == by_name("dcft").options
    assert by_name("head").options == {}
    torch.manual_seed(0)
    implicit = _trainable(_adapted_bert("lora")[0].model)
    torch.manual_seed(0)
    explicit = _trainable(_adapted_bert("lora", **options)[0].model)
    assert all(torch.equal(implicit[name], explicit[name]) for name in implicit)


def test_an_unknown_name_lists_the_known_ones_and_near_misses():
    with pytest.raises(QualityError, match=r"--method: expected one of head, .*got 'hulsby'; did"):
        by_name("hulsby")


# ---- what holds for all ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_the_base_model(name):
    expected = logits(_bert(), _batch())
    adapted, _ = _adapted_bert(name)
    assert torch.equal(logits(adapted.model, _batch()), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bitfit"])
def test_the_start_is_the_base_model_without_biases_and_at_ragged_sizes(name):
    model = build_small_model("llama").requires_grad_(False)
    inputs = small_inputs("llama")
    expected = logits(model, inputs)
    layers = _layers(model, LLAMA_LAYERS)
    assert len(layers) == 14
    adapted = by_name(name).adapt(model, layers, STEPS)
    assert torch.equal(logits(adapted.model, inputs), expected)


def _every_layer(**shapes: Callable[[int, int], tuple[int, ...]]):
    """Parameters of every layer by ending, each with its shape from `n` and `m`."""

    def expected(layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.{ending.replace('__', '.')}": shape(n, m)
            for name, (n, m) in layers.items()
            for ending, shape in shapes.items()
        }

    return expected


def _of_layers(wanted: Callable[[str], bool], expected):
    return lambda layers: expected({name: nm for name, nm in layers.items() if wanted(name)})


def _ia3(layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (n, m) in layers.items():
        if name.endswith(("self.key", "self.value")):
            shapes[f"{name}.ia3_l.default"] = (m, 1)
        elif _is_feed_forward_output(name):
            shapes[f"{name}.ia3_l.default"] = (1, n)
    return shapes


def _is_feed_forward_output(name: str) -> bool:
    return name.endswith("output.dense") and "attention" not in name


_DCFT = {
    "dcft_A": lambda n, m: (1, n // 8),
    "dcft_B": lambda n, m: (m // 8, 1),
    "dcft_C": lambda n, m: (8, 8),
}
_LORA = {
    "lora_A__default__weight": lambda n, m: (1, n),
    "lora_B__default__weight": lambda n, m: (m, 1),
}
TRAINED = {
    "head": lambda layers: {},
    "full": lambda layers: {name: tuple(p.shape) for name, p in _pristine().named_parameters()},
    "bitfit": lambda layers: {
        name: tuple(p.shape) for name, p in _pristine().named_parameters() if name.endswith("bias")
    },
    "dcft": _every_layer(**_DCFT),
    "ssb_dcft": _every_layer(
        d1=lambda n, m: (n,),
        d2=lambda n, m: (m,),
        **{f"dcft__{factor}": shape for factor, shape in _DCFT.items()},
    ),
    "lora": _every_layer(**_LORA),
    "lora_fa": _every_layer(B=lambda n, m: (m, 1)),
    "dora": _every_layer(**_LORA, lora_magnitude_vector__default__weight=lambda n, m: (m,)),
    "adalora": _every_layer(
        lora_A__default=lambda n, m: (2, n),
        lora_B__default=lambda n, m: (m, 2),
        lora_E__default=lambda n, m: (2, 1),
    ),
    "sora": _every_layer(
        A=lambda n, m: (8, n),
        B=lambda n, m: (m, 8),
        g=lambda n, m: (8,),
    ),
    "trilora": _every_layer(
        A=lambda n, m: (2, n),
        B=lambda n, m: (m, 2),
        D=lambda n, m: (2,),
    ),
    "flora": _every_layer(
        A=lambda n, m: (2, n),
        B=lambda n, m: (m, 2),
        G=lambda n, m: (2, 2),
    ),
    "lokr": _every_layer(
        lokr_w1__default=lambda n, m: (8, 8),
        lokr_w2_a__default=lambda n, m: (m // 8, 1),
        lokr_w2_b__default=lambda n, m: (1, n // 8),
    ),
    "vera": _every_layer(
        vera_lambda_b__default=lambda n, m: (m,),
        vera_lambda_d__default=lambda n, m: (256,),
    ),
    "ia3": _ia3,
    "ssl": _every_layer(d1=lambda n, m: (n,)),
    "ssb": _every_layer(d1=lambda n, m: (n,), d2=lambda n, m: (m,)),
    "sam_parser": _every_layer(sigma=lambda n, m: (min(n, m),)),
    "houlsby": _of_layers(
        lambda name: name.endswith("output.dense"),
        _every_layer(A=lambda n, m: (8, m), B=lambda n, m: (m, 8)),
    ),
    "pfeiffer": _of_layers(
        _is_feed_forward_output,
        _every_layer(A=lambda n, m: (16, m), B=lambda n, m: (m, 16)),
    ),
    "parallel_adapter": _every_layer(A=lambda n, m: (1, n), B=lambda n, m: (m, 1)),
}


@pytest.mark.parametrize("name", NAMES)
def test_exactly_its_parameters_are_trained_and_gradients_reach_them_all(name):
    base = _bert()
    sizes = {
        layer: (base.get_submodule(layer).in_features, base.get_submodule(layer).out_features)
        for layer in _layers(base)
    }
    adapted, _ = _adapted_bert(name)
    trainable = _trainable(adapted.model)
    assert {key: tuple(p.shape) for key, p in trainable.items()} == TRAINED[name](sizes)
    if not trainable:
        return
    _randomize(trainable.values())
    adapted.model(**_batch()).loss.backward()
    for key, parameter in trainable.items():
        # All keys shifted by the same vector: a softmax does not see it.
        if not key.endswith("self.key.bias"):
            assert parameter.grad is not None, key
            assert torch.count_nonzero(parameter.grad) > 0, key


# The formulas for layers n -> m: what a comparison by budget rests on.
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("dcft", {}, lambda n, m: n // 8 + m // 8 + 64),
        ("lokr", {}, lambda n, m: n // 8 + m // 8 + 64),
        ("ssb_dcft", {"rank": 2}, lambda n, m: 2 * (n // 8 + m // 8) + 64 + n + m),
        ("lora", {"r": 3}, lambda n, m: 3 * (n + m)),
        ("dora", {"r": 3}, lambda n, m: 3 * (n + m) + m),
        ("lora_fa", {"r": 3}, lambda n, m: 3 * m),
        ("adalora", {"init_r": 3}, lambda n, m: 3 * (n + m + 1)),
        ("sora", {"r": 3}, lambda n, m: 3 * (n + m + 1)),
        ("trilora", {"r": 3}, lambda n, m: 3 * (n + m + 1)),
        ("flora", {"r": 3}, lambda n, m: 3 * (n + m + 3)),
        ("vera", {"r": 5}, lambda n, m: m + 5),
        ("ssl", {}, lambda n, m: n),
        ("ssb", {}, lambda n, m: n + m),
        ("sam_parser", {}, lambda n, m: min(n, m)),
        ("parallel_adapter", {"r": 3}, lambda n, m: 3 * (n + m)),
    ],
)
def test_the_number_of_parameters(name, options, count):
    adapted, layers = _adapted_bert(name, **options)
    sizes = [
        (layer.in_features, layer.out_features) for layer in map(_bert().get_submodule, layers)
    ]
    assert sum(p.numel() for p in _trainable(adapted.model).values()) == sum(
        count(n, m) for n, m in sizes
    )


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_what_is_trained_and_nothing_else(name):
    adapted, _ = _adapted_bert(name)
    model = adapted.model.train()
    for parameter in model.get_submodule("classifier").parameters():
        parameter.requires_grad_(True)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    trained = set(_trainable(model))
    optimizer = torch.optim.AdamW(
        _trainable(model).values(), lr=min(by_name(name).learning_rates[-2:]), weight_decay=0.0
    )
    losses = []
    for step in range(3):
        loss = model(**_batch()).loss
        losses.append(loss.item())
        if adapted.penalty is not None:
            loss = loss + adapted.penalty()
        loss.backward()
        optimizer.step()
        if adapted.after_step is not None:
            adapted.after_step(step + 1)
        optimizer.zero_grad()
    losses.append(model(**_batch()).loss.item())

    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved <= trained
    assert moved - {"classifier.weight", "classifier.bias"} or name == "head"
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())


def test_the_same_seed_draws_the_same_parameters():
    for name in NAMES:
        drawn = []
        for _ in range(2):
            torch.manual_seed(5)
            adapted, _ = _adapted_bert(name)
            drawn.append(adapted.model.state_dict())
        assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0]), name


# ---- each against its equation --------------------------------------------------------------

N, M, R = 24, 16, 3


def _one_layer(name: str, bias: bool = True, **options) -> tuple[nn.Module, nn.Linear]:
    """A layer that the method has adapted, in float64 and with random values, and its base."""
    base = nn.Linear(N, M, bias, dtype=torch.float64).requires_grad_(False)
    model = nn.ModuleDict({"output": nn.ModuleDict({"dense": copy.deepcopy(base)})})
    layers = ["output.dense"]
    if name == "houlsby":
        model["attention"] = copy.deepcopy(model)
        layers.append("attention.output.dense")
    adapted = by_name(name).adapt(model, layers, STEPS, **options)
    _randomize(_trainable(adapted.model).values())
    return adapted.model.get_submodule(layers[-1]), base


def _kron(p: dict[str, Tensor]) -> Tensor:
    return torch.kron(p["dcft_B"] @ p["dcft_A"], p["dcft_C"])


def _svd_scaled(W: Tensor, sigma: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    return U @ torch.diag(sigma) @ V


# The weight `[m, n]` that stands for the layer, from the base's and the trained values. Right of
# the equals signs are the papers' equations, with `A` and `B` transposed to nn.Linear's layout.
WEIGHTS = [
    ("lora_fa", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["B"] @ p["A"]),
    ("sora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["B"] @ p["g"].diag() @ p["A"]),
    ("sora", {"r": R}, lambda W, p: W + p["B"] @ p["g"].diag() @ p["A"]),
    ("trilora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["B"] @ p["D"].diag() @ p["A"]),
    # (A G B)^T for A = p["A"]^T and B = p["B"]^T.
    ("flora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * (p["A"].T @ p["G"] @ p["B"].T).T),
    ("ssl", {}, lambda W, p: (p["d1"].diag() @ W.T).T),
    ("ssb", {}, lambda W, p: (p["d1"].diag() @ W.T @ p["d2"].diag()).T),
    ("sam_parser", {}, lambda W, p: _svd_scaled(W, p["sigma"])),
    ("dcft", {"rank": 2, "alpha": 6.0}, lambda W, p: W + 3.0 * _kron(p)),
    (
        "dcft",
        {"kernel_size": [4, 8], "alpha": 1.0, "adapter_dtype": "float64"},
        lambda W, p: W + _kron(p),
    ),
    (
        "ssb_dcft",
        {"rank": 2, "alpha": 6.0},
        lambda W, p: p["d2"].diag() @ W @ p["d1"].diag() + 3.0 * _kron(p),
    ),
    ("lora", {"r": R, "alpha": 6.0}, lambda W, p: W + 2.0 * p["lora_B"] @ p["lora_A"]),
    ("adalora", {"init_r": 2, "alpha": 6.0}, lambda W, p: W + _adalora(p)),
    ("dora", {"r": R, "alpha": 6.0}, lambda W, p: _dora(W, p)),
    ("lokr", {"alpha": 2.0}, lambda W, p: W + 2.0 * torch.kron(p["lokr_w1"], _lokr_w2(p))),
]


def _adalora(p: dict[str, Tensor]) -> Tensor:
    # peft divides by the rank plus 1e-5.
    return 6.0 / (2 + 1e-5) * p["lora_B"] @ p["lora_E"].flatten().diag() @ p["lora_A"]


def _dora(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    V = W + 2.0 * p["lora_B"] @ p["lora_A"]
    return p["lora_magnitude_vector"][:, None] * V / V.norm(dim=1, keepdim=True)


def _lokr_w2(p: dict[str, Tensor]) -> Tensor:
    return p["lokr_w2_a"] @ p["lokr_w2_b"]


def _values(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters by the first part of their name that is not a container's."""
    return {
        key.removeprefix("dcft.").split(".")[0]: p.detach()
        for key, p in layer.named_parameters()
        if not key.startswith(("base.", "base_layer."))
    }


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("name", "options", "weight"), WEIGHTS)
def test_a_layer_is_its_equation(name, options, weight, bias):
    layer, base = _one_layer(name, bias, **options)
    x = torch.randn(2, 5, N, dtype=torch.float64)
    expected = F.linear(x, weight(base.weight, _values(layer)), base.bias)
    assert not torch.allclose(expected, base(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "activation", "h"),
    [
        ("houlsby", "gelu", lambda z: z * torch.special.ndtr(z)),
        ("pfeiffer", "relu", lambda z: z.clamp(min=0.0)),
        ("pfeiffer", "silu", lambda z: z / (1.0 + torch.exp(-z))),
        ("houlsby", "tanh", torch.tanh),
    ],
)
def test_a_serial_adapter_is_equation_22(name, activation, h):
    layer, base = _one_layer(name, r=R, activation=activation)
    A, B = layer.A.T, layer.B.T
    assert A.shape == (M, R)
    x = torch.randn(4, N, dtype=torch.float64)
    z = base(x)
    torch.testing.assert_close(layer(x), z + h(z @ A) @ B, rtol=1e-9, atol=1e-9)


def test_a_parallel_adapter_is_equation_25():
    layer, base = _one_layer("parallel_adapter", r=R, activation="relu")
    A, B = layer.A.T, layer.B.T
    x = torch.randn(4, N, dtype=torch.float64)
    expected = x @ base.weight.T + base.bias + (x @ A).clamp(min=0.0) @ B
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_ia3_scales_keys_values_and_the_inside_of_the_feed_forward():
    adapted, layers = _adapted_bert("ia3")
    _randomize(_trainable(adapted.model).values())
    key, output = layers[1], layers[5]
    assert (key.rsplit(".", 1)[-1], output[-12:]) == ("key", "output.dense")
    base = _bert()
    x, inside = torch.randn(4, 32), torch.randn(4, 64)
    scales = adapted.model.get_submodule(key).ia3_l["default"].flatten()
    torch.testing.assert_close(
        adapted.model.get_submodule(key)(x), base.get_submodule(key)(x) * scales
    )
    scales = adapted.model.get_submodule(output).ia3_l["default"].flatten()
    torch.testing.assert_close(
        adapted.model.get_submodule(output)(inside), base.get_submodule(output)(inside * scales)
    )


def test_vera_shares_its_factors_over_layers_of_all_shapes():
    adapted, layers = _adapted_bert("vera", r=5)
    modules = [adapted.model.get_submodule(name) for name in layers]
    assert {(module.in_features, module.out_features) for module in modules} == {
        (32, 32),
        (32, 64),
        (64, 32),
    }
    A, B = modules[0].vera_A["default"], modules[0].vera_B["default"]
    assert (A.shape, B.shape) == ((5, 64), (64, 5))
    _randomize(_trainable(adapted.model).values())
    for name, module in zip(layers, modules, strict=True):
        assert module.vera_A["default"] is A
        b, d = module.vera_lambda_b["default"], module.vera_lambda_d["default"]
        base = _bert().get_submodule(name)
        n, m = base.in_features, base.out_features
        x = torch.randn(4, n)
        DW = b.diag() @ B[:m] @ d.diag() @ A[:, :n]
        expected = base(x) + x @ DW.T
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_lora_fa_keeps_a_that_is_drawn():
    layer, _ = _one_layer("lora_fa", r=R)
    assert not layer.A.requires_grad
    assert 0.0 < layer.A.abs().max() <= N**-0.5


# ---- what goes on beside the gradient -------------------------------------------------------


def test_sora_thresholds_its_gates_softly_after_every_step():
    adapted, layers = _adapted_bert("sora", r=4, threshold=0.5)
    gates = [adapted.model.get_submodule(name).g for name in layers]
    drawn = torch.cat([gate.detach() for gate in gates])
    assert 0.5 < drawn.std() < 1.5
    for gate in gates:
        gate.data.copy_(torch.tensor([0.9, -0.9, 0.4, -0.5]))
    adapted.after_step(1)
    for gate in gates:
        torch.testing.assert_close(gate.data, torch.tensor([0.4, -0.4, 0.0, 0.0]))
    adapted.after_step(2)
    assert all(torch.count_nonzero(gate) == 0 for gate in gates)
    assert all(gate.requires_grad for gate in gates)


def test_sora_without_a_threshold_leaves_its_gates():
    adapted, layers = _adapted_bert("sora", threshold=0.0)
    gate = adapted.model.get_submodule(layers[0]).g
    before = gate.detach().clone()
    adapted.after_step(1)
    assert torch.equal(gate, before)


def test_adalora_cuts_ranks_to_its_budget():
    steps = 12
    model = _bert()
    layers = _layers(model)
    adapted = by_name("adalora").adapt(model, layers, steps, target_r=1, init_r=3)
    values = [p for name, p in adapted.model.named_parameters() if ".lora_E." in name]
    assert len(values) == len(layers) == 12
    optimizer = torch.optim.AdamW(_trainable(adapted.model).values(), lr=1e-2)
    ranks = []
    for step in range(steps):
        loss = adapted.model(**_batch()).loss + adapted.penalty()
        loss.backward()
        optimizer.step()
        adapted.after_step(step + 1)
        optimizer.zero_grad()
        ranks.append(sum(int(torch.count_nonzero(value)) for value in values))
    # A tenth of the steps with all ranks, a cubic descent, then the target to the end.
    assert ranks[0] == 3 * 12
    assert 12 < ranks[2] < 3 * 12
    assert ranks[6:] == [12] * 6
    assert ranks == sorted(ranks, reverse=True)
    counts = [int(torch.count_nonzero(value)) for value in values]
    assert len(set(counts)) > 1, "the budget is spread by importance"


def test_adaloras_penalty_is_the_mean_distance_from_orthonormal():
    adapted, layers = _adapted_bert("adalora", orthogonality=0.25)
    _randomize(_trainable(adapted.model).values())
    distances = []
    for name in layers:
        layer = adapted.model.get_submodule(name)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        distances.append((A @ A.T - torch.eye(2)).square().sum().sqrt())
        distances.append((B.T @ B - torch.eye(2)).square().sum().sqrt())
    expected = 0.25 * torch.stack(distances).mean()
    torch.testing.assert_close(adapted.penalty(), expected)
    adapted.penalty().backward()
    assert adapted.model.get_submodule(layers[0]).lora_A["default"].grad is not None
    assert _adapted_bert("adalora", orthogonality=0.0)[0].penalty is None


@pytest.mark.parametrize("steps", [2, 3, 4, 1000])
def test_adaloras_schedule_fits_any_number_of_steps(steps):
    model = _bert()
    adapted = by_name("adalora").adapt(model, _layers(model), steps)
    for step in range(min(steps, 4)):
        adapted.model(**_batch()).loss.backward()
        adapted.after_step(step + 1)
        adapted.model.zero_grad()


@pytest.mark.parametrize("name", ["dcft", "ssb_dcft"])
def test_dcft_adds_the_orthogonality_term_when_it_is_asked_for(name):
    assert _adapted_bert(name)[0].penalty is None
    adapted, _ = _adapted_bert(name, orthogonality=0.1, orthogonality_form="paper")
    expected = 0.1 * orthogonality_loss(adapted.model, form="paper")
    torch.testing.assert_close(adapted.penalty(), expected)
    adapted, _ = _adapted_bert(name, orthogonality=0.1)
    expected = 0.1 * orthogonality_loss(adapted.model, form="published_code")
    torch.testing.assert_close(adapted.penalty(), expected)


def test_dcft_adds_the_diagonal_constraint_when_it_is_asked_for():
    options = {"rank": 3, "init": "paper", "orthogonality": 0.1}
    adapted, _ = _adapted_bert("dcft", **options, constraint="diagonal")
    expected = 0.1 * constraint_loss(adapted.model, "diagonal", "published_code")
    torch.testing.assert_close(adapted.penalty(), expected)
    orthogonal, _ = _adapted_bert("dcft", **options)
    assert abs(orthogonal.penalty().item() - expected.item()) > 1e-3


def test_gains_multiply_what_dcft_draws():
    factors = ("dcft_A", "dcft_B", "dcft_C")
    torch.manual_seed(6)
    plain, layers = _adapted_bert("dcft", init="paper")
    torch.manual_seed(6)
    scaled, _ = _adapted_bert("dcft", init="paper", A_gain=2.0, B_gain=0.5, C_gain=-3.0)
    for name in layers:
        for factor, gain in zip(factors, (2.0, 0.5, -3.0), strict=True):
            expected = gain * plain.model.get_submodule(name).get_parameter(factor)
            assert torch.equal(scaled.model.get_submodule(name).get_parameter(factor), expected)


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}, {"rank": 2, "init": "zero"}], ids=str)
def test_the_scaling_gain_multiplies_each_layers_own_scaling(options):
    plain, layers = _adapted_bert("dcft", **options)
    scaled, _ = _adapted_bert("dcft", **options, scaling_gain=2.5)
    for name in layers:
        expected = 2.5 * plain.model.get_submodule(name).scaling
        assert scaled.model.get_submodule(name).scaling == pytest.approx(expected, rel=1e-12)


def test_all_options_of_the_library_reach_dcft():
    adapted, layers = _adapted_bert(
        "dcft",
        kernel_size=[4, 8],
        stride=[2, 8],
        rank=2,
        init="zero",
        alpha=3.0,
        dropout=0.25,
        backend="torch",
        strategy="row_block",
        adapter_dtype="float64",
        exclude=["query"],
    )
    swapped = {n: m for n, m in adapted.model.named_modules() if isinstance(m, DCFTLinear)}
    assert list(swapped) == [name for name in layers if not name.endswith("query")]
    for layer in swapped.values():
        assert (layer.kernel_size, layer.stride) == ((4, 8), (2, 8))
        assert (layer.rank, layer.init, layer.scaling, layer.dropout) == (2, "zero", 1.5, 0.25)
        assert (layer.backend, layer.strategy) == ("torch", "row_block")
        assert layer.dcft_A.dtype == torch.float64


def test_a_nonlinearity_reaches_dcft_over_a_scaled_base_too():
    layer, base = _one_layer("ssb_dcft", rank=2, alpha=6.0, nonlinearity="tanh")
    assert layer.dcft.nonlinearity == "tanh"
    x = torch.randn(4, N, dtype=torch.float64)
    scaled = F.linear(x * layer.d1, base.weight) * layer.d2 + base.bias
    expected = scaled + layer.dcft(x) - base(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_the_increment_alone_and_in_training_alone(training):
    layer, base = _one_layer("ssb_dcft", dropout=0.5)
    layer.train(training)
    x = torch.randn(4, N, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x)) is not training
    with torch.no_grad():
        layer.dcft.dcft_B.zero_()
    expected = F.linear(x * layer.d1, base.weight) * layer.d2 + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dcft", "ssb_dcft", "lora", "adalora", "lokr", "vera", "ssl"])
def test_layers_are_adapted_by_their_full_names_only(name):
    """`dense` is also how the name of another layer ends."""
    model = nn.ModuleDict(
        {"dense": nn.Linear(8, 8), "output": nn.ModuleDict({"dense": nn.Linear(8, 8)})}
    ).requires_grad_(False)
    other = model["output"]["dense"]
    adapted = by_name(name).adapt(model, ["dense"], STEPS).model
    assert adapted["output"]["dense"] is other
    assert _trainable(adapted)
    assert all(key.startswith("dense.") for key in _trainable(adapted))


@pytest.mark.parametrize(
    ("architecture", "endings", "attention", "feed_forward"),
    [
        ("bert", BERT_LAYERS, "attention.output.dense", ".output.dense"),
        ("roberta", BERT_LAYERS, "attention.output.dense", ".output.dense"),
        (
            "deberta",
            ("query_proj", "key_proj", "value_proj", *BERT_LAYERS),
            "attention.output.dense",
            ".output.dense",
        ),
        ("llama", LLAMA_LAYERS, "o_proj", "down_proj"),
    ],
)
def test_roles_are_found_by_name(architecture, endings, attention, feed_forward):
    def adapted_by(name: str) -> set[str]:
        model = build_small_model(architecture).requires_grad_(False)
        adapted = by_name(name).adapt(model, _layers(model, endings), STEPS).model
        return {key.rsplit(".", 1)[0] for key in _trainable(adapted)}

    names = _layers(build_small_model(architecture), endings)
    outputs = {name for name in names if name.endswith((attention, feed_forward))}
    attentions = {name for name in outputs if name.endswith(attention)}
    assert (len(outputs), len(attentions)) == (4, 2)
    assert adapted_by("houlsby") == outputs
    assert adapted_by("pfeiffer") == outputs - attentions
    scaled = {name.removesuffix(".ia3_l") for name in adapted_by("ia3")}
    assert len(scaled) == 6
    assert {name for name in scaled if name in outputs} == outputs - attentions


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("lora", {"rank": 2}, TypeError, r"rank: no option of lora; expected one of r, alpha"),
        ("sora", {"treshold": 1.0}, TypeError, r"treshold: .*did you mean threshold\?"),
        ("head", {"r": 2}, TypeError, r"r: no option of head; expected one of none"),
        ("ssb_dcft", {"kernel": 2}, TypeError, r"kernel: .*did you mean kernel_size\?"),
        ("lora", {"r": 0}, ValueError, r"r: expected a positive int, got 0"),
        ("dora", {"r": 1.5}, TypeError, r"r: expected a positive int, got 1.5"),
        ("lora_fa", {"alpha": -1.0}, ValueError, r"alpha: expected a number above 0, got -1.0"),
        ("flora", {"alpha": "one"}, TypeError, r"alpha: expected a number, got str 'one'"),
        ("trilora", {"r": True}, TypeError, r"r: expected a positive int, got True"),
        ("sora", {"threshold": -0.1}, ValueError, r"threshold: expected a number of at least 0"),
        ("adalora", {"target_r": 2}, ValueError, r"target_r: expected less than init_r=2, got 2"),
        ("adalora", {"beta1": 1.0}, ValueError, r"beta1: expected a number in \(0, 1\), got 1.0"),
        ("adalora", {"init_share": 1}, ValueError, r"init_share: expected a share in \[0, 1\)"),
        ("adalora", {"orthogonality": -1}, ValueError, r"orthogonality: expected a number of"),
        ("lokr", {"decompose_factor": 0}, ValueError, r"decompose_factor: expected a positive int"),
        ("lokr", {"decompose_both": 1}, TypeError, r"decompose_both: expected True or False"),
        ("vera", {"d_initial": None}, TypeError, r"d_initial: expected a number, got NoneType"),
        (
            "houlsby",
            {"activation": "swish"},
            ValueError,
            r"activation: expected one of relu, gelu, .*got",
        ),
        ("parallel_adapter", {"r": -1}, ValueError, r"r: expected a positive int, got -1"),
        ("dcft", {"kernel_size": 0}, ValueError, r"kernel_size"),
        ("dcft", {"init": "ones"}, ValueError, r"init: expected one of"),
        ("dcft", {"orthogonality": -0.1}, ValueError, r"orthogonality: expected a number of"),
        ("dcft", {"orthogonality_form": "x"}, ValueError, r"orthogonality_form: expected one of"),
        ("dcft", {"constraint": "x"}, ValueError, r"constraint: expected one of"),
        ("dcft", {"constraint": "diagonal"}, ValueError, r"constraint: 'diagonal' has no weight"),
        ("dcft", {"scaling_gain": 0}, ValueError, r"scaling_gain: expected a number other than 0"),
        ("dcft", {"scaling_gain": "2"}, TypeError, r"scaling_gain: expected a number"),
        ("dcft", {"A_gain": "2"}, TypeError, r"A_gain: expected a number"),
        ("dcft", {"adapter_dtype": "int64"}, TypeError, r"adapter_dtype: expected one of float32"),
        ("dcft", {"adapter_dtype": "half8"}, ValueError, r"adapter_dtype: .* name .*got 'half8'"),
    ],
)
def test_bad_options_are_named_and_the_model_is_as_it_was(name, options, error, text):
    model = _bert()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=text):
        by_name(name).adapt(model, _layers(model), STEPS, **options)
    assert dict(model.named_modules()) == modules
    assert not _trainable(model)


NEED_LAYERS = [name for name in NAMES if name not in ("head", "full", "bitfit")]


@pytest.mark.parametrize("name", NEED_LAYERS)
@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        ([], ValueError, r"layers: expected the name of at least one linear layer"),
        (["bert.encoder.query"], ValueError, r"layers: expected full names .*'bert.encoder.query'"),
        ("classifier", TypeError, r"layers: expected a sequence of names, got 'classifier'"),
        (["dropout"], TypeError, r"layers: expected nn.Linear, got Dropout for 'dropout'"),
        (["classifier"] * 2, ValueError, r"layers: expected every name once, got 'classifier'"),
    ],
)
def test_bad_layers_are_named(name, layers, error, text):
    with pytest.raises(error, match=text):
        by_name(name).adapt(_bert(), layers, STEPS)


@pytest.mark.parametrize(
    ("name", "endings", "text"),
    [
        (
            "houlsby",
            ("query",),
            r"houlsby expected at least one attention output, .*o_proj.* query",
        ),
        ("pfeiffer", ("attention.output.dense",), r"pfeiffer expected at least one feed-forward"),
        ("ia3", ("query", "intermediate.dense"), r"ia3 expected keys, values or .* got .*dense, q"),
    ],
)
def test_layers_without_the_role_that_a_method_needs(name, endings, text):
    model = _bert()
    layers = _layers(model, endings)
    with pytest.raises(ValueError, match=text):
        by_name(name).adapt(model, layers, STEPS)
    assert not _trainable(model)


def test_steps_and_models_that_do_not_fit():
    layers = _layers(_pristine())
    with pytest.raises(ValueError, match=r"steps: adalora expected at least 2, got 1"):
        by_name("adalora").adapt(_bert(), layers, 1)
    with pytest.raises(ValueError, match=r"steps: expected a positive int, got 0"):
        by_name("head").adapt(_bert(), layers, 0)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        by_name("ssl").adapt({}, layers, STEPS)
    llama = build_small_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: expected one with biases, got LlamaForCausalLM"):
        by_name("bitfit").adapt(llama, _layers(llama, LLAMA_LAYERS), STEPS)


def test_scales_are_no_part_of_a_merged_weight():
    adapted, layers = _adapted_bert("ssb_dcft")
    adapted.model.get_submodule(layers[0]).dcft.merge()
    with pytest.raises(RuntimeError, match=r"ScaledDCFT: .*unmerge"):
        logits(adapted.model, _batch())
