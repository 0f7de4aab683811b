"""Runs Gluon kernels for Hopper on CPU tensors, and checks how they synchronise.

`Interpreter(kernel)[grid](*arguments)` calls the kernel's Python function with a language whose
blocks are tensors, one program after the other. Asynchronous operations are as late as they may be:

- A TMA load arrives when its barrier is waited for. Until then its buffer is NaN and must not be
  used. When it is issued, no product and no TMA store that reads its buffer may be outstanding.
- A product is outstanding until `warpgroup_mma_wait` leaves only younger ones. Until then its
  operands must not be written, and its result is only for `warpgroup_mma` and the wait.
- A TMA store reads its buffer until `store_wait`. It and products need `fence_async_shared` after
  ordinary stores into what they read.
- Warps wait for their own part of a product. Ordinary stores into its operands therefore need a
  `thread_barrier` after the wait; so do stores into memory that is allocated after products, which
  the compiler may place where their operands were. It adds such a barrier itself, but not where
  another barrier came between the product and the wait.
- A barrier's phase completes when all arrivals and exactly the expected bytes are there; waiting
  for one that cannot complete is a deadlock. Nothing may be outstanding when a program ends.

- A launch that may start before the one before it has ended (`launch_pdl`) loads the arguments that
  are named `late`, and stores anything, only after `gdc_wait`.

What breaks a rule raises an AssertionError that names the buffer. Shared memory starts as NaN.

Not modelled: layouts, registers, several CTAs, integer overflow, programs that run at the same
time, and warps that do. Except for the rule above, no two buffers share an address.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import KernelInterface

NAN = float("nan")


class Block(Tensor):
    """A block of values or, without dimensions, a scalar. It is never changed in place."""

    __iadd__, __isub__, __imul__ = Tensor.__add__, Tensor.__sub__, Tensor.__mul__
    __itruediv__, __iand__, __ior__ = Tensor.__truediv__, Tensor.__and__, Tensor.__or__

    # Quotients are truncated, and the compiler may assume that nothing is divided by zero.
    def __floordiv__(self, other: Any) -> Any:
        assert bool(torch.as_tensor(other).all()), "division by zero"
        return torch.div(self, other, rounding_mode="trunc")

    def __mod__(self, other: Any) -> Any:
        return self - self // other * other

    def __rfloordiv__(self, other: Any) -> Any:
        return _block(other) // self

    def __rmod__(self, other: Any) -> Any:
        return _block(other) % self

    __ifloordiv__, __imod__ = __floordiv__, __mod__


class Accumulator(Tensor):
    """The result of outstanding products."""

    value: Tensor
    operands: list[Shared]  # of the youngest; none once it has been waited for

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError(
            "the accumulator is used while its product is outstanding: pass it through "
            "warpgroup_mma_wait first"
        )


# What must not be going on in shared memory when certain operations use it.
HAZARDS = {
    "loads": "a TMA load into it has not been waited for",
    "products": "an outstanding product reads it",
    "stores": "a TMA store still reads it",
    "unfenced": "fence_async_shared has not followed the last ordinary store into it",
    "unsynchronised": "thread_barrier has not followed the wait for a product that may read it",
}


class Shared:
    """A view of shared memory: its values, and counts of the hazards on each element."""

    def __init__(self, name: str, data: Tensor, counts: dict[str, Tensor]) -> None:
        self.name, self.data, self.counts = name, data, counts
        self.dtype, self.shape = data.dtype, list(data.shape)

    def _view(self, name: str, view: Callable[[Tensor], Tensor]) -> Shared:
        counts = {hazard: view(count) for hazard, count in self.counts.items()}
        return Shared(name, view(self.data), counts)

    def index(self, index: Any) -> Shared:
        assert 0 <= index < self.shape[0], f"{self.name}: index {index} of {self.shape[0]}"
        return self._view(f"{self.name}[{int(index)}]", lambda each: each[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        name = f"{self.name}.slice({start}, {length}, {dim})"
        return self._view(name, lambda each: each.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self._view(self.name, lambda each: each.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self._view(self.name, lambda each: each.view(*shape))

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        """A matrix as its column blocks, in the order that the 128-byte swizzle stores them."""
        parts, rows, columns = shape
        assert (dtype, [rows, parts * columns]) == (self.dtype, self.shape), self.name
        assert columns * dtype.itemsize % 128 == 0, f"{self.name}: parts of less than 128 bytes"
        return self._view(self.name, lambda each: each.unflatten(1, (parts, columns)).movedim(1, 0))

    def check(self, action: str, *hazards: str) -> None:
        for hazard in hazards:
            free = not self.counts[hazard].any()
            assert free, f"{self.name}: {action}, but {HAZARDS[hazard]}"

    def load(self, layout: Any = None) -> Tensor:
        self.check("it is loaded", "loads")
        return _block(self.data.clone())

    def store(self, value: Tensor) -> None:
        self.check("it is stored into", "loads", "products", "stores", "unsynchronised")
        received, expected = (value.dtype, list(value.shape)), (self.dtype, self.shape)
        assert received == expected, f"{self.name}: expected {expected}, got {received}"
        self.data.copy_(value)
        self.counts["unfenced"].fill_(1)


class Barrier:
    """An mbarrier: how many arrivals and bytes its current phase still waits for."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.phase = name, count, 0
        self._start()

    def _start(self) -> None:
        self.missing, self.expected = self.count, 0
        self.loads: list[tuple[Shared, Tensor]] = []

    def arrive(self, count: int, expected: int = 0) -> None:
        early = f"{self.name}: arrival in a phase that is complete but has not been waited for"
        assert count <= self.missing, early
        self.missing -= count
        self.expected += expected
        if self.missing == 0 and self.expected == 0 and not self.loads:
            self.phase ^= 1
            self._start()

    def wait(self, phase: int) -> None:
        assert phase in (0, 1), f"{self.name}: expected a phase of 0 or 1, got {phase}"
        if phase != self.phase:
            return  # complete
        deadlock = f"{self.name}: deadlock, {self.missing} arrivals are missing"
        assert self.missing == 0, deadlock
        arriving = sum(block.nbytes for _, block in self.loads)
        wrong = f"{self.name}: expects {self.expected} bytes, but {arriving} are loaded"
        assert arriving == self.expected, wrong
        for target, block in self.loads:
            target.data.copy_(block)
            target.counts["loads"].zero_()
        self.phase ^= 1
        self._start()


class Descriptor:
    """A kernel's view of a TensorDescriptor. Outside the tensor, loads give zeros, stores clip."""

    def __init__(self, name: str, host: Any) -> None:
        host.__post_init__()  # its constructor's checks, which launchers may bypass
        self.name, self.layout, self.shape = name, host.layout, list(host.shape)
        self.tensor = host.base.as_strided(tuple(host.shape), tuple(host.strides))
        self.dtype, self.block_shape = self.tensor.dtype, list(host.block_shape)
        nbytes = torch.Size(self.block_shape).numel() * self.dtype.itemsize
        self.block_type = SimpleNamespace(
            shape=self.block_shape, nbytes=nbytes, element_ty=self.dtype
        )

    def windows(self, coordinates: Any, shared: Shared) -> tuple[Any, Any]:
        """What is inside the tensor: its window there, and in the block."""
        received, expected = (shared.dtype, shared.shape), (self.dtype, self.block_shape)
        assert received == expected, f"{shared.name}: {self.name} has {expected}, got {received}"
        there, here = [], []
        for start, block, size in zip(map(int, coordinates), shared.shape, self.shape, strict=True):
            first = min(max(start, 0), size)
            last = max(min(start + block, size), first)
            there.append(slice(first, last))
            here.append(slice(first - start, last - start))
        return tuple(there), tuple(here)


class Pointer:
    """A tensor's memory from its first element to its last, and offsets in elements."""

    def __init__(self, name: str, memory: Tensor, offsets: Any = 0) -> None:
        self.name, self.memory, self.offsets = name, memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.name, self.memory, self.offsets + offsets)

    __radd__ = __add__

    def lanes(self, mask: Any) -> tuple[Tensor, Tensor]:
        """The mask, and the offsets where it holds."""
        offsets, mask = torch.broadcast_tensors(
            _block(self.offsets), _block(True if mask is None else mask)
        )
        inside = offsets[mask]
        outside = inside[(inside < 0) | (inside >= self.memory.numel())]
        size = f"{self.memory.numel()} elements"
        assert outside.numel() == 0, f"{self.name}: offset {int(outside[0])}, it has {size}"
        return mask, inside


class Namespace(SimpleNamespace):
    """Part of the language."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"the Gluon interpreter does not know {self.title}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the Gluon interpreter does not know {self.title}")


class Layout:
    """Stands for every layout."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def get_default_for(*_: Any, **__: Any) -> Layout:
        return Layout()


class Program:
    """One program of a launch: its memory, what it has outstanding, and its language."""

    def __init__(
        self, index: Sequence[int], grid: Sequence[int], warps: int, late: Collection[str] = ()
    ) -> None:
        self.late = late  # until gdc_wait
        self.memory: list[Shared] = []
        self.products: list[list[Shared]] = []  # the operands of outstanding ones
        self.stores: list[Shared] = []  # what outstanding TMA stores read
        self.barriers: dict[int, Barrier] = {}  # by address
        self.unsynchronised = False  # since a product
        language = Namespace(
            title="gl",
            program_id=lambda axis: _block(index[axis]),
            num_programs=lambda axis: _block(grid[axis]),
            num_warps=lambda: warps,
            allocate_shared_memory=self.allocate,
            thread_barrier=self.synchronise,
            barrier=self.synchronise,
            **LANGUAGE | {"store": self.store},
        )
        barriers = Namespace(
            title="mbarrier",
            MBarrierLayout=Layout,
            init=self.initialise,
            expect=lambda bar, nbytes, pred=True: pred and self.barrier(bar).arrive(1, nbytes),
            arrive=lambda bar, count=1, pred=True: pred and self.barrier(bar).arrive(count),
            wait=lambda bar, phase, pred=True, deps=(): pred and self.barrier(bar).wait(phase),
        )
        copies = Namespace(
            title="tma",
            async_copy_global_to_shared=self.tma_load,
            async_copy_shared_to_global=self.tma_store,
            async_load=self.tma_load,
            async_store=self.tma_store,
            store_wait=self.store_wait,
        )
        operations = {
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiply_wait,
        }
        whole = Namespace(title="hopper", mbarrier=barriers, tma=copies, **operations)
        self.replacements: dict[int, Any] = {  # by the identity of what is replaced
            **{
                id(getattr(module, name)): each
                for module, known in ((gl, language), (hopper.tma, copies))
                for name, each in vars(known).items()
                if hasattr(module, name)
            },
            id(tl): language,
            id(gl): language,
            id(hopper): whole,
            id(hopper.mbarrier): barriers,
            id(hopper.tma): copies,
            **{id(getattr(hopper, name)): each for name, each in operations.items()},
            id(gdc_wait): self.dependency_wait,
            id(gdc_launch_dependents): lambda: None,
            id(getattr(gl, "barrier", None) or gl.thread_barrier): self.synchronise,
            **{
                id(each): Shared.reinterpret
                for name, each in vars(gl.shared_memory_descriptor).items()
                if name.endswith("reinterpret")
            },
        }

    def dependency_wait(self) -> None:
        self.late = ()

    def store(self, pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
        assert not self.late, f"{pointer.name}: it is stored before gdc_wait"
        LANGUAGE["store"](pointer, value, mask)

    def function(self, jit: Any) -> FunctionType:
        """A jitted function's Python function, with this program's language."""
        if id(jit) not in self.replacements:
            code, names = jit.fn.__code__, jit.fn.__globals__
            function = FunctionType(code, {}, None, jit.fn.__defaults__, jit.fn.__closure__)
            function.__kwdefaults__ = jit.fn.__kwdefaults__
            self.replacements[id(jit)] = function
            for name in {*code.co_names} & {*names}:
                function.__globals__[name] = self.replace(name, names[name])
            function.__globals__["range"] = _range
        return self.replacements[id(jit)]

    def replace(self, name: str, value: Any) -> Any:
        if id(value) in self.replacements:
            return self.replacements[id(value)]
        if isinstance(value, KernelInterface):
            return self.function(value)
        if isinstance(value, gl.constexpr):
            return value.value
        module = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        return Namespace(title=name) if str(module).startswith("triton.") else value

    def end(self) -> None:
        for shared in self.memory:
            shared.check("the program ends", "loads", "products", "stores")

    # Shared memory

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any = None) -> Shared:
        caller = sys._getframe(1)
        following = (
            each for each in dis.get_instructions(caller.f_code) if each.offset > caller.f_lasti
        )
        names = (str(each.argval) for each in following if each.opname.startswith("STORE"))
        name = next(names, caller.f_code.co_name)
        data = torch.full(shape, NAN if dtype.is_floating_point else 0, dtype=dtype)
        counts = {hazard: torch.zeros(shape, dtype=torch.int8) for hazard in HAZARDS}
        counts["unsynchronised"].fill_(self.unsynchronised)
        self.memory.append(Shared(name, data, counts))
        return self.memory[-1]

    def fence(self, cluster: bool = False) -> None:
        for shared in self.memory:
            shared.counts["unfenced"].zero_()

    def synchronise(self, **_: Any) -> None:
        self.unsynchronised = bool(self.products)
        for shared in self.memory:
            shared.counts["unsynchronised"].zero_()

    # Barriers and TMA

    def initialise(self, shared: Shared, count: int) -> None:
        assert shared.data.numel() == 1, f"{shared.name}: expected one barrier"
        self.barriers[shared.data.data_ptr()] = Barrier(shared.name, count)

    def barrier(self, shared: Shared) -> Barrier:
        address = shared.data.data_ptr()
        assert address in self.barriers, f"{shared.name}: not initialised as an mbarrier"
        return self.barriers[address]

    def tma_load(
        self, source: Descriptor, coordinates: Any, bar: Shared, target: Shared, pred: Any = True
    ) -> None:
        if not pred:
            return
        assert source.name not in self.late, f"{source.name}: it is loaded before gdc_wait"
        target.check("a TMA load into it is issued", "loads", "products", "stores", "unfenced")
        there, here = source.windows(coordinates, target)
        block = torch.zeros(target.shape, dtype=target.dtype)
        block[here] = source.tensor[there]
        target.data.fill_(NAN)
        target.counts["loads"].fill_(1)
        self.barrier(bar).loads.append((target, block))

    def tma_store(self, target: Descriptor, coordinates: Any, source: Shared) -> None:
        assert not self.late, f"{target.name}: it is stored before gdc_wait"
        source.check("a TMA store of it is issued", "loads", "unfenced")
        there, here = target.windows(coordinates, source)
        target.tensor[there] = source.data[here]
        source.counts["stores"] += 1
        self.stores.append(source)

    def store_wait(self, pendings: int) -> None:
        while len(self.stores) > pendings:
            self.stores.pop(0).counts["stores"] -= 1

    # Products

    def multiply(
        self, a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
    ) -> Any:
        operands = [each for each in (a, b) if isinstance(each, Shared)]
        for each in operands:
            each.check("a product reads it", "loads", "unfenced")
            each.counts["products"] += 1
        left, right = (each.data if isinstance(each, Shared) else each for each in (a, b))
        total = acc.value if isinstance(acc, Accumulator) else acc
        assert left.dtype == right.dtype, f"product of {left.dtype} and {right.dtype}"
        value = left.float() @ right.float()
        expected, received = list(value.shape), list(total.shape)
        assert received == expected, f"accumulator: expected shape {expected}, got {received}"
        result = torch.empty(()).as_subclass(Accumulator)
        result.value = _block(total + value if use_acc else value)
        result.operands = operands
        self.products.append(operands)
        self.unsynchronised = True
        return result if is_async else self.multiply_wait(0, (result,))

    def multiply_wait(self, num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
        while len(self.products) > num_outstanding:
            operands = self.products.pop(0)
            while operands:
                operand = operands.pop()
                operand.counts["products"] -= 1
                operand.counts["unsynchronised"].fill_(1)
        finished = [isinstance(each, Accumulator) and not each.operands for each in deps]
        results = [each.value if ok else each for each, ok in zip(deps, finished, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)


class Interpreter:
    """Stands for a `gluon.jit` kernel: `Interpreter(kernel)[grid](*arguments, **constants)`."""

    def __init__(self, kernel: Any, late: Collection[str] = ()) -> None:
        self.kernel, self.arg_names, self.late = kernel, kernel.arg_names, late

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid: Sequence[int], arguments: Any, keywords: dict[str, Any]) -> None:
        options = {"num_warps", "num_stages", "launch_pdl", "num_ctas", "maxnreg"}
        options -= {*self.arg_names}
        others = {name: value for name, value in keywords.items() if name not in options}
        values = inspect.signature(self.kernel.fn).bind(*arguments, **others).arguments
        constants = {each.name for each in self.kernel.params if each.is_constexpr}
        grid = (*grid, 1, 1)[:3]
        for index in itertools.product(*map(range, reversed(grid))):
            late = self.late if keywords.get("launch_pdl") else ()
            program = Program(index[::-1], grid, keywords.get("num_warps", 4), late)
            prepared = {
                name: (program.replace if name in constants else _argument)(name, value)
                for name, value in values.items()
            }
            program.function(self.kernel)(**prepared)
            program.end()


def _argument(name: str, value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return Descriptor(name, value)
    if isinstance(value, Tensor):
        steps = zip(value.shape, value.stride(), strict=True)
        size = 1 + sum((size - 1) * stride for size, stride in steps) if value.numel() else 0
        return Pointer(name, value.as_strided((size,), (1,)))
    return _block(value) if isinstance(value, int) else value


def _block(value: Any) -> Any:
    return torch.as_tensor(value).as_subclass(Block)


def _range(*bounds: Any) -> Iterator[Any]:
    return map(_block, range(*bounds))


def _load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
    mask, inside = pointer.lanes(mask)
    values = torch.full(mask.shape, NAN if other is None else other, dtype=pointer.memory.dtype)
    values[mask] = pointer.memory[inside]
    return _block(values)


def _store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    mask, inside = pointer.lanes(mask)
    values = torch.as_tensor(value).to(pointer.memory.dtype)
    pointer.memory[inside] = values.expand(mask.shape)[mask].as_subclass(Tensor)


def _full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Any:
    return _block(torch.full(shape, value, dtype=dtype))


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


LANGUAGE: dict[str, Any] = {
    "arange": lambda start, end, layout=None: _block(torch.arange(start, end)),
    "cdiv": lambda a, b: (a + b - 1) // b,
    "constexpr": lambda value: value,
    "convert_layout": lambda value, layout, **_: value,
    "expand_dims": torch.unsqueeze,
    "full": _full,
    "join": lambda a, b: torch.stack((a, b), dim=-1),
    "load": _load,
    "maximum": lambda a, b: torch.maximum(_block(a), _block(b)),
    "minimum": lambda a, b: torch.minimum(_block(a), _block(b)),
    "permute": torch.permute,
    "reshape": torch.reshape,
    "static_assert": _static_assert,
    "static_range": range,
    "store": _store,
    "sum": torch.sum,
    "where": torch.where,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
    "zeros_like": torch.zeros_like,
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")},
    **{name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "uint8")},
    "int1": torch.bool,
    **{name: Layout for name in dir(gl) if name.endswith("Layout")},
}
