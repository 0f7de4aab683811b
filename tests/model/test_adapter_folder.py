"""The folder of an adapter: saves and loads at once, what killed saves leave, damaged configs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcft_kernels import adapter_folder, load_adapter, save_adapter, swap_linear

DATA = Path(__file__).parent / "data"
CONFIG = "dcft_config.json"


def _save(number: int, folder: Path) -> None:
    """Save an adapter that has this number for every value, and for its scaling."""
    model = nn.Sequential(nn.Linear(8, 8))
    swap_linear(model, kernel_size=4, alpha=number)
    for factor in (model[0].dcft_A, model[0].dcft_B, model[0].dcft_C):
        nn.init.constant_(factor, number)
    save_adapter(model, folder)


def _load(folder: Path) -> int:
    """Load, check that both files are of the same save, and say of which."""
    model = nn.Sequential(nn.Linear(8, 8))
    load_adapter(model, folder)
    layer = model[0]
    values = {layer.scaling, *torch.cat([f.flatten() for f in layer.adapter[:3]]).tolist()}
    assert len(values) == 1, values
    return int(values.pop())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saves_and_loads_at_once(tmp_path):
    """Every load gives one whole adapter, and the last save to look leaves nothing but its own."""
    _save(1, tmp_path)
    savers = [range(first, 61, 4) for first in (1, 2, 3, 4)]
    with ThreadPoolExecutor(5) as pool:
        saves = [
            pool.submit(lambda n: [_save(i, tmp_path) for i in n], numbers) for numbers in savers
        ]
        while not all(save.done() for save in saves):
            assert _load(tmp_path) in range(1, 61)
        for save in saves:
            save.result()
    assert _load(tmp_path) in range(57, 61)
    assert len(_names(tmp_path)) == 2


class _Pause:
    """Saves in a thread that waits before it renames its config."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.thread: threading.Thread | None = None
        self.reached, self.go_on = threading.Event(), threading.Event()
        replace = os.replace

        def pausing(source: Any, target: Any) -> None:
            if threading.current_thread() is self.thread and Path(target).name == CONFIG:
                self.reached.set()
                assert self.go_on.wait(60)
            replace(source, target)

        monkeypatch.setattr(os, "replace", pausing)

    def start(self, number: int, folder: Path) -> None:
        self.thread = threading.Thread(target=_save, args=(number, folder))
        self.thread.start()
        assert self.reached.wait(60)

    def finish(self) -> None:
        self.go_on.set()
        assert self.thread is not None
        self.thread.join()


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Pause]:
    pause = _Pause(monkeypatch)
    yield pause
    pause.go_on.set()


def test_a_save_under_way_keeps_its_files(tmp_path, paused):
    """Another save of the same adapter, and one that replaces that one, delete none of them."""
    _save(1, tmp_path)
    paused.start(2, tmp_path)
    under_way = set(_names(tmp_path))
    for number in (2, 3):
        _save(number, tmp_path)
        assert _load(tmp_path) == number
        assert len(_names(tmp_path)) == 4  # with the paused save's weights and temporary config
        assert len(under_way & set(_names(tmp_path))) == 3
    paused.finish()
    assert _load(tmp_path) == 2
    assert len(_names(tmp_path)) == 2


def test_a_save_that_is_overtaken_deletes_its_own_weights(tmp_path, paused, monkeypatch):
    """The other save cannot: when it looks, the lock is not released yet."""
    _save(1, tmp_path)
    paused.start(2, tmp_path)
    flush = adapter_folder._flush_directory

    def overtaken(folder: Path) -> None:
        flush(folder)
        if threading.current_thread() is threading.main_thread() and _load(folder) == 3:
            paused.finish()
            assert len(_names(folder)) == 3

    monkeypatch.setattr(adapter_folder, "_flush_directory", overtaken)
    _save(3, tmp_path)
    assert _load(tmp_path) == 2
    assert len(_names(tmp_path)) == 2


def test_a_temporary_file_that_is_swept_before_it_is_locked(tmp_path, monkeypatch):
    lock, swept = adapter_folder._lock, []

    def too_late(file: Any, **options: Any) -> bool:
        if len(swept) < 3:
            swept.append(os.unlink(file.name))
        return lock(file, **options)

    monkeypatch.setattr(adapter_folder, "_lock", too_late)
    _save(1, tmp_path)
    assert _load(tmp_path) == 1
    assert len(_names(tmp_path)) == 2


def test_a_load_that_is_overtaken_starts_again(tmp_path, monkeypatch):
    _save(1, tmp_path)
    parse, numbers = adapter_folder._parse_config, iter((2, 3))

    def overtaken(path: Path, content: bytes) -> dict[str, Any]:
        config = parse(path, content)
        for number in numbers:
            _save(number, tmp_path)
            break
        return config

    monkeypatch.setattr(adapter_folder, "_parse_config", overtaken)
    assert _load(tmp_path) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_without_locks_a_save_deletes_only_what_it_replaces(tmp_path, paused, monkeypatch):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    paused.start(1, tmp_path)
    for number in (2, 3):
        _save(number, tmp_path)
        assert len(_names(tmp_path)) == 4
    paused.finish()
    assert _load(tmp_path) == 1
    _save(4, tmp_path)
    # The third save's weights stay: the first one did not see that it replaced them.
    assert len(_names(tmp_path)) == 3


def test_every_changed_bit_of_a_config_is_noticed(tmp_path):
    tensors = {"0.weight": torch.ones(1)}
    config = {"format_version": 1, "layers": {"0": {"alpha": 0.75, "init": "paper"}}}
    adapter_folder.write(tmp_path, config, tensors)
    expected, _ = adapter_folder.read(tmp_path)
    content = (tmp_path / CONFIG).read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(ValueError):
            assert adapter_folder._parse_config(tmp_path / CONFIG, changed) == expected, changed


def test_other_tensors_need_a_checksum(tmp_path):
    tensors = {"head.weight": torch.arange(6.0).view(2, 3)}
    layers = {"0": {"alpha": 0.75}}
    config = {"format_version": 2, "layers": layers, "modules_to_save": ["head.weight"]}
    adapter_folder.write(tmp_path, config, tensors)
    read, values = adapter_folder.read(tmp_path)
    assert list(read) == [
        "format",
        "format_version",
        "weights",
        "layers",
        "modules_to_save",
        "sha256",
    ]
    assert config.items() <= read.items()
    assert values.keys() == tensors.keys()
    assert torch.equal(values["head.weight"], tensors["head.weight"])
    for change in ({"sha256": None}, {"layers": {"0": {"alpha": 0.5}}}, {"sha257": "0"}):
        changed = {name: value for name, value in (read | change).items() if value is not None}
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"changed since it was saved: .*copy the folder"):
            adapter_folder.read(tmp_path)
    adapter_folder.write(tmp_path, config | {"modules_to_save": "head.weight"}, tensors)
    with pytest.raises(ValueError, match='expected "modules_to_save" to be a list of names'):
        adapter_folder.read(tmp_path)


VALUES = {
    "400-digits": "1" + "0" * 400,
    "5000-digits": "7" * 5000,
    "infinite": "1e400",
    **{f"nested-{depth}": "[" * depth + "]" * depth for depth in (99, 900, 100_000)},
}
PLACES = {
    "setting": lambda config, value: config["layers"]["query"].update(alpha=value),
    "size": lambda config, value: config["layers"]["query"].update(rank=value),
    "record": lambda config, value: config["layers"].update(query=value),
    "version": lambda config, value: config.update(format_version=value),
    "file": lambda config, value: config["weights"].update(file=value),
    "entry": lambda config, value: config.update(other=value),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_numbers_and_nesting_beyond_reason(tmp_path, put, value):
    """In a file of an earlier version, where no checksum finds them."""
    folder = shutil.copytree(DATA / "adapter_5f5390c", tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    put(config, "@")
    (folder / CONFIG).write_text(json.dumps(config).replace('"@"', value))
    model = nn.ModuleDict({"query": nn.Linear(6, 4), "dense": nn.Linear(4, 6)})
    with pytest.raises(ValueError, match=CONFIG) as caught:
        load_adapter(model, folder)
    assert len(str(caught.value)) < 500 + len(str(folder))
