"""Which tasks --tasks means: the harness's own by name, files of them, and `stories`, which is made here.

Nothing of the harness is imported here: what names tasks badly is refused before that, which takes long.
"""

import contextlib
import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.cli import InputError
from data.text.stories import pick, stories

QUESTIONS = 200  # of the task `stories`
STORIES_SEED = 2  # 0 and 1 are those of the training and validation text
CHOICES = 4


@dataclass(frozen=True)
class Spec:
    """One task: its name, or a file; `documents` are its questions, where they are given."""

    name: str
    file: Path | None = None
    documents: list[dict[str, Any]] | None = None


def require_harness() -> None:
    """Raises `InputError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"evaluation needs lm_eval; install it with `{sys.executable} -m pip install lm-eval` "
            "(or with the project: `pip install '.[evaluate]'`)"
        )


def specs_of(tasks: str, data_file: Path | None = None) -> list[Spec]:
    """The tasks of a list like `stories,mine/task.yaml,hellaswag`. Raises `InputError` where one cannot be."""
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise InputError(f"--tasks {tasks!r} has an empty name; give names with commas between, such as stories")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--tasks names {twice[0]} twice; name it once")
    if data_file is not None and (len(names) > 1 or names[0] == "stories" or is_file(names[0])):
        raise InputError(
            "--data-file has the questions of one task of the harness; name it alone, as --tasks hellaswag"
        )
    found = []
    for name in names:
        if name == "stories":
            found.append(Spec(name, documents=story_questions(QUESTIONS)))
        elif is_file(name):
            if not Path(name).is_file():
                raise InputError(f"there is no task file {name}; give the path of a .yaml, with its data beside it")
            found.append(Spec(name, file=Path(name)))
        else:
            found.append(Spec(name, documents=None if data_file is None else read_documents(data_file)))
    return found


def is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def story_questions(count: int) -> list[dict[str, Any]]:
    """Which paragraph ends a story: its own, or that of one of three other stories."""
    told = [text.rpartition("\n\n") for text in islice(stories(STORIES_SEED), count * CHOICES)]
    rng, found = random.Random(STORIES_SEED), []
    for first in range(0, len(told), CHOICES):
        (beginning, _, own), *others = told[first : first + CHOICES]
        label, endings = pick(rng, range(CHOICES)), [ending for _, _, ending in others]
        found.append({"query": beginning, "choices": [*endings[:label], own, *endings[label:]], "label": label})
    return found


STORIES_TASK: dict[str, Any] = {
    "task": "stories",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "\n\n",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
    "metadata": {"version": 1.0},
}


def read_documents(file: Path) -> list[dict[str, Any]]:
    """A .jsonl file of questions, gzip-packed or not. HellaSwag's may have a context as a whole, `ctx`, without the
    parts `ctx_a` and `ctx_b` that the hub's data has too; then the second part is empty.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}; give a .jsonl, or a .jsonl.gz, with a question a line")
    found = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise InputError(f"line {number} of {file} is no JSON object; give a question a line")
                if "ctx" in document and "ctx_a" not in document:
                    document |= {"ctx_a": document["ctx"], "ctx_b": ""}
                found.append(document)
    except (ValueError, EOFError, OSError) as e:
        raise InputError(
            f"{file} cannot be read after {len(found)} lines ({e}); give a .jsonl, or a .jsonl.gz"
        ) from None
    if not found:
        raise InputError(f"{file} is empty; give a .jsonl with a question a line")
    return found


def load_tasks(manager: Any, specs: Sequence[Spec]) -> dict[str, Any]:
    """The tasks by the harness's `TaskManager`, with their data. Raises `InputError` where that is not to be had."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        for kind, found in load_task(manager, spec).items():
            if twice := sorted(loaded[kind].keys() & found.keys()):
                raise InputError(f"{twice[0]} is in more than one of the --tasks; leave one of them out")
            loaded[kind] |= found
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own
    return loaded


def load_task(manager: Any, spec: Spec) -> dict[str, dict[str, Any]]:
    """What the harness makes of one of --tasks, which may be a group of tasks."""
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    if spec.documents is None and spec.file is None and spec.name not in known:
        near = ", ".join(sorted(name for name in known if spec.name[:5] in name)[:5])
        raise InputError(
            f"there is no task {spec.name!r}; give stories, the path of a .yaml, or a name that the harness knows"
            + (f", such as {near}" if near else "")
        )
    try:
        if spec.documents is not None:
            config = STORIES_TASK if spec.name == "stories" else config_of(manager, spec.name)
            given = {"custom_dataset": lambda **_: {"validation": as_dataset(spec)}}
            return dict(manager.load([config | given]))
        with beside(spec.file), quietly():
            return dict(manager.load([spec.name if spec.file is None else spec.file.name]))
    except InputError:
        raise
    except Exception as e:
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        if spec.file is not None:
            raise InputError(f"the task file {spec.file} cannot be loaded ({reason}); correct it") from None
        if spec.documents is not None:
            raise InputError(
                f"these are no questions of the task {spec.name} ({reason}); give another --data-file"
            ) from None
        raise InputError(
            f"the data of the task {spec.name} cannot be had from the Hugging Face hub ({reason}); run this where the "
            f"hub can be reached, or give a local file of it with --tasks {spec.name} --data-file FILE"
        ) from None


def config_of(manager: Any, name: str) -> dict[str, Any]:
    """What the harness's own file says of a task, but for its data: its questions are the split `validation`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None or entry.yaml_path is None or "task" not in (config := load_yaml(entry.yaml_path)):
        raise InputError(f"--data-file goes with a single task of the harness, which {name!r} is not; name one")
    splits = {"training_split": None, "test_split": None, "fewshot_split": None, "validation_split": "validation"}
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "dataset_kwargs")}
    return config | splits


def as_dataset(spec: Spec) -> Any:
    from datasets import Dataset

    return Dataset.from_list(spec.documents)


@contextlib.contextmanager
def beside(file: Path | None) -> Iterator[None]:
    """In the folder of a task's file, so that the data it names is found beside it."""
    with contextlib.chdir(file.parent if file else Path()):
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars of `datasets`."""
    import datasets

    before = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before:
            datasets.enable_progress_bars()
