"""Runs one after the other: data read once, stored results reused, learning rates chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import answers, errors, language, sentences, tasks, text_files, training
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.found import best_of
from benchmarks.quality.layers import TARGETS
from benchmarks.quality.methods.table import by_name
from benchmarks.quality.prepared import Prepared, spread
from benchmarks.quality.pretrained import Source
from benchmarks.quality.progress import Bars
from benchmarks.quality.results import Store
from benchmarks.quality.runs import SLICE, Result, Run
from benchmarks.quality.studies import Study, Variant
from benchmarks.quality.tasks import Task

_SLICE_SIZE = 600
"""Examples on which learning rates are compared, at most."""


class Session:
    """What runs share: the folder of the data, the stored results, the progress bars."""

    def __init__(self, data: Path | None, store: Store, bars: Bars) -> None:
        self._data = data
        self._store = store
        self._bars = bars
        self._prepared: dict[tuple[object, ...], Prepared] = {}
        self._tokenizers: dict[str, Any] = {}

    def study(self, study: Study) -> list[Result]:
        """All results of a study, line by line: the learning rate first, then every seed."""
        self._check(study)
        lines = [(task, variant) for task in study.tasks for variant in study.variants]
        with self._bars.runs(len(lines) * study.seeds, study.name) as bar:
            results = []
            for task, variant in lines:
                # A line is whole before the next begins: what is cut short has whole lines.
                runs = self._seeds(study, task, variant)
                bar.passed_over(study.seeds - len(runs))
                for run in runs:
                    results.append(self.result(run, study.name))
                    bar.done(results[-1])
        return results

    def _check(self, study: Study) -> None:
        """What is wrong with the last line is told before the first is trained: names, options,
        data."""
        for variant in study.variants:
            method = by_name(variant.method)
            try:
                method.check_options(variant.options)
            except TypeError as error:
                raise QualityError(f"--option: {variant.method}: {error}") from error
            if variant.targets not in TARGETS:
                raise errors.unknown("--targets", variant.targets, TARGETS)
        for name in study.tasks:
            task = self._task(name)
            for variant in study.variants:
                self._prepare(study.run(name, variant), task)

    def _seeds(self, study: Study, task: str, variant: Variant) -> list[Run]:
        """One run a seed, at the learning rate that suits the task best; none where training
        diverges at each."""
        run = study.run(task, variant)
        rates = variant.rates or by_name(variant.method).learning_rates
        chosen: float | None = rates[0]
        if len(rates) > 1:
            chosen = self.choose_learning_rate(run, study.name, rates)
        if chosen is None:
            return []
        return [
            dataclasses.replace(run, learning_rate=chosen, seed=seed) for seed in range(study.seeds)
        ]

    def result(self, run: Run, study: str) -> Result:
        """The stored result of a run, or a new one; one that diverges is stored with its error."""
        task, method = self._task(run.task), by_name(run.method)
        prepared = self._prepare(run, task)
        stored = self._store.find(run)
        if stored is not None and stored.data == prepared.digest:
            return stored
        try:
            with self._bars.steps(run) as progress:
                result = training.train(run, task, method, prepared, study, progress=progress)
        except DivergedError as error:
            result = training.failed(run, task, prepared, study, str(error))
        self._store.add(result)
        return result

    def choose_learning_rate(self, run: Run, study: str, rates: Sequence[float]) -> float | None:
        """The rate that does best on a slice of the training split, which those trials leave out;
        the dev split is not looked at. None if training diverges at every rate.
        """
        trials = [
            dataclasses.replace(
                run, learning_rate=rate, scored=SLICE, scored_size=_SLICE_SIZE, evaluations=1
            )
            for rate in rates
        ]
        results = []
        with self._bars.runs(len(trials), f"{study}: learning rates of {run.method}") as bar:
            for trial in trials:
                result = self.result(trial, study)
                bar.done(result)
                results.append(result)
        best = best_of(results)
        return None if best is None else best.run.learning_rate

    def steps_of_epoch(self, run: Run) -> int:
        """Steps in which every training example is seen once."""
        prepared = self._prepare(run, self._task(run.task))
        return math.ceil(len(spread(prepared.train, run.train_size)) / run.batch_size)

    def _task(self, name: str) -> Task:
        """The task of that name, or the one that a folder is."""
        if name not in tasks.TASKS and Path(name).is_dir():
            return text_files.own_task(Path(name))
        return tasks.by_name(name)

    def _prepare(self, run: Run, task: Task) -> Prepared:
        key = (run.task, run.scored, run.scored_size, run.model, run.max_tokens)
        if key not in self._prepared:
            self._prepared[key] = self._read(run, task)
        return self._prepared[key]

    def _read(self, run: Run, task: Task) -> Prepared:
        if run.model not in self._tokenizers:
            self._tokenizers[run.model] = Source.of(run.model).tokenizer()
        tokenizer = self._tokenizers[run.model]
        in_slice, size = run.scored == SLICE, run.scored_size
        longest = tokenizer.model_max_length  # where it is not known, astronomically large
        max_tokens = min(run.max_tokens or longest, task.max_tokens)
        if max_tokens > longest:
            raise QualityError(
                f"--max-tokens: {run.model} reads at most {longest} tokens, got {run.max_tokens}"
            )
        if task.kind == "language":
            text = language.read_text(self._data)
            return language.prepare(text, tokenizer, max_tokens, size, slice_of_train=in_slice)
        if task.kind == "answers":
            asked = answers.read(task, self._data)
            digest = asked.digest()
            asked = answers.slice_of_train(asked) if in_slice else asked
            asked = dataclasses.replace(asked, dev=spread(asked.dev, size))
            return answers.prepare(task, asked, tokenizer, max_tokens, digest)
        if run.task not in tasks.TASKS:
            splits = text_files.read_folder(task, Path(run.task))
        elif self._data is None:
            splits = text_files.read_hub(task)
        else:
            splits = text_files.read_folder(task, self._data)
        digest = splits.digest()
        splits = sentences.slice_of_train(splits) if in_slice else splits
        splits = dataclasses.replace(splits, dev=spread(splits.dev, size))
        return sentences.prepare(task, splits, tokenizer, max_tokens, digest)
