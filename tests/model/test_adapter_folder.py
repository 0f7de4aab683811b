"""The folder of an adapter: concurrent saves and loads, damaged configs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcft_kernels import adapter_folder, load_adapter
from tests.numbered_adapters import check_folder, load, save

DATA = Path(__file__).parent / "data"
CONFIG = "dcft_config.json"


@pytest.fixture
def paused_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A thread saves 9 over 1 and waits before it renames its config; a call lets it finish."""
    reached, go_on, replace = threading.Event(), threading.Event(), os.replace
    thread = threading.Thread(target=save, args=(9, tmp_path))

    def pausing(source: Path, target: Path) -> None:
        if threading.current_thread() is thread and target.name == CONFIG:
            reached.set()
            go_on.wait(60)
        replace(source, target)

    def finish() -> None:
        go_on.set()
        thread.join()

    save(1, tmp_path)
    monkeypatch.setattr(os, "replace", pausing)
    thread.start()
    assert reached.wait(60)
    yield finish
    finish()


def test_a_save_under_way_keeps_its_files(tmp_path, paused_save):
    """Another save of the same adapter, and one that replaces that one, delete none of them."""
    for number in (9, 3):
        save(number, tmp_path)
        check_folder(tmp_path, [number], files=4)
    paused_save()
    check_folder(tmp_path, [9])


def test_a_save_that_is_overtaken_deletes_its_own_weights(tmp_path, paused_save, monkeypatch):
    """The other save cannot: when it looks, the lock is not released yet."""
    flush = adapter_folder._flush_directory

    def overtaken(folder: Path) -> None:
        flush(folder)
        if threading.current_thread() is threading.main_thread() and load(folder)[0] == 3:
            paused_save()
            check_folder(folder, [9], files=3)

    monkeypatch.setattr(adapter_folder, "_flush_directory", overtaken)
    save(3, tmp_path)
    check_folder(tmp_path, [9])


def test_a_temporary_file_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = adapter_folder._lock, []

    def too_late(file: Any, **options: Any) -> bool:
        if len(swept) < 3:
            swept.append(os.unlink(file.name))
        return lock(file, **options)

    monkeypatch.setattr(adapter_folder, "_lock", too_late)
    save(1, tmp_path)
    check_folder(tmp_path, [1])


def test_a_load_that_is_overtaken_starts_again(tmp_path, monkeypatch):
    parse, numbers = adapter_folder._parse_config, [3, 2]

    def overtaken(path: Path, content: bytes) -> dict[str, Any]:
        config = parse(path, content)
        if numbers:
            save(numbers.pop(), tmp_path)
        return config

    save(1, tmp_path)
    monkeypatch.setattr(adapter_folder, "_parse_config", overtaken)
    check_folder(tmp_path, [3])


def test_without_locks_a_save_deletes_only_what_it_replaces(tmp_path, paused_save, monkeypatch):
    monkeypatch.setattr(adapter_folder, "_lock", lambda *_, **__: False)
    for number in (2, 3):
        save(number, tmp_path)
        check_folder(tmp_path, [number], files=4)
    paused_save()
    check_folder(tmp_path, [9], files=3)


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
    assert config.items() <= read.items()
    assert list(read)[-1] == "sha256"
    assert torch.equal(values.pop("head.weight"), tensors["head.weight"])
    assert not values
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
    "infinite": "1e400",
    **{f"nested-{depth}": "[" * depth + "]" * depth for depth in (900, 100_000)},
}
PLACES = {
    "setting": lambda config, value: config["layers"]["query"].update(alpha=value),
    "size": lambda config, value: config["layers"]["query"].update(rank=value),
    "record": lambda config, value: config["layers"].update(query=value),
    "version": lambda config, value: config.update(format_version=value),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_long_numbers_and_deep_nesting_are_refused(tmp_path, put, value):
    """In a file of an earlier version, where no checksum finds them."""
    folder = shutil.copytree(DATA / "adapter_5f5390c", tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    put(config, "@")
    (folder / CONFIG).write_text(json.dumps(config).replace('"@"', value))
    model = nn.ModuleDict({"query": nn.Linear(6, 4), "dense": nn.Linear(4, 6)})
    with pytest.raises(ValueError, match=CONFIG) as caught:
        load_adapter(model, folder)
    assert len(str(caught.value)) < 500 + len(str(folder))
