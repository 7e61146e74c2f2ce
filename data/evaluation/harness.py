"""lm-evaluation-harness (Gao et al. 2021) on the project's models. Only here it is imported: it imports PyTorch."""

import logging
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from data.cli import InputError, Progress
from data.evaluation.packing import Request, score
from data.evaluation.subject import Subject
from data.evaluation.tasks import Spec, load_tasks, quietly
from data.text.sampling import Sampler

lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # its bar of a moment's work, whatever stderr is
# it compiles a task's few templates anew for each question and each answer, which took most of an evaluation's time
lm_eval.utils.env.from_string = cache(lm_eval.utils.env.from_string)
ROWS = 16  # texts written at once
PIECE = 32  # tokens written before it is looked whether a text may stop
RESAMPLES = 1000  # of a score whose standard error has no formula


def bootstrap_stderr(score: Callable[[Sequence[Any]], float], answers: Sequence[Any], iters: int) -> float:
    """The standard error of a score, from scores of as many answers drawn with replacement. In this process alone: the
    harness's own function forks one that has signal handlers, threads and a GPU.
    """
    rng = random.Random(0)
    draws = Progress(iterable=range(min(iters, RESAMPLES)), desc="standard error", unit="sample", part=True)
    return statistics.stdev([score(rng.choices(answers, k=len(answers))) for _ in draws])


lm_eval.api.metrics.bootstrap_stderr = bootstrap_stderr


class Harness(TemplateLM):
    """A model as the harness wants it. Texts become tokens, and requests answers, as in its own `hf` model."""

    def __init__(self, subject: Subject, show: Mapping[str, Any]):
        super().__init__()
        self.subject, self.show = subject, dict(show)

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eot

    @property
    def max_length(self) -> int:
        return self.subject.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """What spells a special token is that token, as `transformers` has it; none are added."""
        return self.subject.tokenizer.encode(string, special_tokens=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability of the continuation, and whether it is greedy's."""
        return super().loglikelihood(requests, disable_tqdm=True)  # its bar is of the tokenizer alone

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._score([(before, continuation) for _, before, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, from its first token on, which comes after the end of another text."""
        texts = [([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        return [value for value, _ in self._score(texts)]

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        s = self.subject
        windows = sum(-(-len(continuation) // s.context) for _, continuation in requests)
        with Progress(total=windows, desc="scoring", unit="text", **self.show) as progress:

            def shown(places: list[int]) -> None:
                progress.update(min(len(places) * s.ranks.size, windows - progress.n))

            return score(s.losses, requests, s.context, s.batch_tokens, s.ranks, shown)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each (context, settings) continued until one of the settings' stop strings, or for their most tokens."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):  # those of equal settings are written together
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with Progress(total=len(requests), desc="writing", unit="text", **self.show) as progress:
            for group in groups.values():
                settings = normalize_gen_kwargs(requests[group[0]].args[1], 256)
                rows = {i: self.tok_encode(requests[i].args[0]) or [self.eot_token_id] for i in group}
                order = sorted(group, key=lambda i: -len(rows[i]))
                sampler = sampler_of(settings)
                for start in range(0, len(order), ROWS):
                    batch = order[start : start + ROWS]
                    texts = self._write([rows[i] for i in batch], settings["until"], settings["max_gen_toks"], sampler)
                    for i, text in zip(batch, texts, strict=True):
                        found[i] = text
                    progress.update(len(batch))
        return found

    def _write(self, rows: list[list[int]], until: Sequence[str], most: int, sampler: Sampler) -> list[str]:
        """The rows continued: piece by piece, until all of them have stopped. They are always as many, padded."""
        if most >= self.max_length:
            raise InputError(
                f"a task asks for {most} new tokens, and the model's context is {self.max_length}; leave that task out"
            )
        rows = [row[-(self.max_length - most) :] for row in rows]
        new: list[list[int]] = [[] for _ in rows]
        done = [False] * len(rows)
        for start in range(0, most, PIECE):
            fed = [[self.eot_token_id] if done[i] else row + new[i] for i, row in enumerate(rows)]
            fed += [[self.eot_token_id]] * (ROWS - len(rows))
            size = min(PIECE, most - start)
            for i, piece in enumerate(self.subject.generate(fed, size, sampler)[: len(rows)]):
                if not done[i]:
                    new[i] += piece
                    text = self.subject.tokenizer.decode(new[i])
                    done[i] = len(piece) < size or any(stop in text for stop in until if stop)
            if all(done):
                break
        return [until_stop(self.subject.tokenizer.decode(tokens), until) for tokens in new]


def sampler_of(settings: Mapping[str, Any]) -> Sampler:
    """How a task wants its texts drawn: greedily, unless it says otherwise."""
    if not settings["do_sample"]:
        return Sampler(temperature=0)
    top_k = settings.get("top_k") or None
    return Sampler(settings.get("temperature") or 1.0, top_k, settings.get("top_p"))


def until_stop(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text


class Tasks:
    """Tasks of the harness, loaded once: of several ranks every one loads them."""

    def __init__(self, specs: Sequence[Spec]):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of each step
        self.loaded, self.own_files = load_tasks(TaskManager(), specs)

    def __call__(self, subject: Subject, limit: int | None, stderr: bool = True, **show: Any) -> dict[str, Any]:
        """The harness's results of the first `limit` documents of each task (None: of all), with `choices` and `files`
        by task. Standard errors are left out unless `stderr`: some take long. `show`: of `Progress`.
        """
        return self.by(Harness(subject, show), limit, stderr)

    def by(self, model: Any, limit: int | None, stderr: bool = True) -> dict[str, Any]:
        """The same of a model of the harness's."""
        for task in self.loaded["tasks"].values():
            task._instances = None  # those of the time before have answers
        iterations = 100_000 if stderr else 0  # the harness's own default, and none
        with quietly():
            found = lm_eval.evaluator.evaluate(model, task_dict=self.loaded, limit=limit, bootstrap_iters=iterations)
        assert found is not None
        choices = {name: self._choices(name, rows) for name, rows in found["samples"].items()}
        return {**found, "choices": choices, "files": self.own_files}

    def _choices(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """How many choices each question has; None where they are no choices of which one is right."""
        task = self.loaded["tasks"][name]
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_target:
            return None
        return [len(task.doc_to_choice(row["doc"])) for row in rows]


def table(results: dict[str, Any]) -> str:
    """As the harness prints its results, groups after tasks."""
    said: str = lm_eval.utils.make_table(results)
    return said + ("\n" + lm_eval.utils.make_table(results, "groups") if results.get("groups") else "")


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model answered, by task: of each document, in order, the harness's responses to its requests."""
    return {
        task: [[response for responses in sample["resps"] for response in responses] for sample in samples]
        for task, samples in results.get("samples", {}).items()
    }


def harness_own(folder: str | Path, **settings: Any) -> Any:
    """The harness's own model of the same folder, by `transformers`: what answers are compared with."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), **settings)
