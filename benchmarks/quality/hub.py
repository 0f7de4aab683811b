"""Datasets of the Hugging Face hub, through the package `datasets` where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.quality.errors import QualityError
from benchmarks.quality.tasks import Task


def loader(task: Task, files: str) -> Callable[[str], Any]:
    """What reads a split of a task from the hub, by the hub's name of the split.

    `files` says which files do instead.

    Raises:
        QualityError: the task is not on the hub, or `datasets` is missing; and, from the function
            that is returned, the hub cannot be read.
    """
    if task.hub is None:
        raise QualityError(f"--data: {task.name} is not on the hub; pass its folder")
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError:
        raise QualityError(
            f"--data: expected the folder with {files}, got nothing; to read {task.name} "
            "from the Hugging Face hub instead: pip install datasets"
        ) from None
    path, configuration = task.hub

    def load(split: str) -> Any:
        try:
            return load_dataset(path, configuration, split=split)
        except Exception as error:
            raise QualityError(
                f"--data: {task.name} could not be read from the hub: {error}; pass a folder with "
                f"{files}"
            ) from error

    return load
