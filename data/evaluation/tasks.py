"""Which tasks --tasks means: the harness's own by name, files of them, and `stories`, which is made here.

Nothing of the harness is imported here: what names tasks badly is refused before that, which takes long.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import json
import logging
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from data.cli import InputError, missing_extra
from data.text.stories import pick, stories

QUESTIONS = 200  # of the task `stories`
STORIES_SEED = 2  # 0 and 1 are those of the training and validation text
PARTS = 12  # words and punctuation marks of a sentence, at most: two of them fit in a context of 32 tokens
NEEDED = {"hellaswag": "activity_label, ctx (or ctx_a and ctx_b), endings and label"}
SENTENCE = re.compile(r'[^.!?\s][^.!?]*[.!?]+"?')


@dataclass(frozen=True)
class Spec:
    """One of --tasks: its name, or a file of tasks; `documents` are its questions, where they are given; those of
    the user come from these `lines` of `data_file`. `prefix` is what the command's options of tasks begin with.
    """

    name: str
    file: Path | None = None
    documents: list[dict[str, Any]] | None = None
    data_file: Path | None = None
    lines: Sequence[int] = ()
    prefix: str = "--"

    def own_file(self) -> dict[str, str | None]:
        """The name and SHA-256 of the user's own file of the task, or of its questions: these are not what the name of
        the task may say.
        """
        file = self.file or self.data_file
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file else None
        return {"file": file.name if file else None, "file_sha256": digest}


Load = Callable[[Sequence[dict[str, Any]]], dict[str, dict[str, Any]]]  # a task with these questions


def require_harness() -> None:
    """Raises `InputError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("evaluation", "lm_eval", "evaluate")


def specs_of(tasks: str, data_file: Path | None = None, prefix: str = "--") -> list[Spec]:
    """The tasks of a list like `stories,mine/task.yaml,hellaswag`. Raises `InputError` where one cannot be. `prefix`
    is what the command's options of them begin with: --, as in --tasks, or --eval-.
    """
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise InputError(f"{prefix}tasks {tasks!r} has an empty name; give names with commas between, such as stories")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{prefix}tasks names {twice[0]} twice; name it once")
    if data_file is not None and (len(names) > 1 or names[0] == "stories" or is_file(names[0])):
        raise InputError(
            f"{prefix}data-file has the questions of one task of the harness; name it alone, as {prefix}tasks hellaswag"
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
            read = read_documents(data_file) if data_file else {}
            found.append(Spec(name, None, [*read.values()] or None, data_file, [*read], prefix))
    return found


def is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def story_questions(count: int) -> list[dict[str, Any]]:
    """Which sentence follows one of a story: its own, one of another story, or its own with two neighbouring words
    exchanged (twice). Word order alone tells the last two from the others, and so gives half of the answers.
    """
    rng = random.Random(STORIES_SEED)
    told = islice(filter(None, (following(text, rng) for text in stories(STORIES_SEED))), count + 1)
    found = []
    for (before, own), (_, other) in pairwise(told):
        wrong = [other, *exchanged(own, rng)]
        label = pick(rng, range(len(wrong) + 1))
        found.append({"query": before, "choices": [*wrong[:label], own, *wrong[label:]], "label": label})
    return found


def following(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Two sentences of a story that follow one another, and are short; None where there are none."""
    sizes = {sentence: len(re.findall(r"\w+|[^\w\s]", sentence)) for sentence in SENTENCE.findall(text)}
    pairs = [
        (before, after)
        for before, after in pairwise(SENTENCE.findall(text))
        if max(sizes[before], sizes[after]) <= PARTS and len(after.split()) > 4
    ]
    return pick(rng, pairs) if pairs else None


def exchanged(sentence: str, rng: random.Random) -> list[str]:
    """The sentence with two neighbouring words exchanged, in two ways."""
    words = sentence.split()
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    first = pick(rng, places)
    second = pick(rng, [i for i in places if i != first])
    return [" ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in (first, second)]


STORIES_TASK: dict[str, Any] = {
    "task": "stories",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
    "metadata": {"version": 2.0},  # 1: which paragraph ends a story,
}


def read_documents(file: Path) -> dict[int, dict[str, Any]]:
    """The questions of a .jsonl file, gzip-packed or not, by their lines. HellaSwag's may have a context as a whole,
    `ctx`, without the parts `ctx_a` and `ctx_b` that the hub's data has too; then the second part is empty.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}; give a .jsonl, or a .jsonl.gz, with a question a line")
    found: dict[int, dict[str, Any]] = {}
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise InputError(f"line {number} of {file} is no JSON object; give a question a line")
                if "ctx" in document and "ctx_a" not in document:
                    document |= {"ctx_a": document["ctx"], "ctx_b": ""}
                found[number] = document
    except (ValueError, EOFError, OSError, zlib.error, RecursionError) as e:
        raise InputError(
            f"{file} cannot be read after {len(found)} questions ({e}); give a .jsonl, or a .jsonl.gz"
        ) from None
    if not found:
        raise InputError(f"{file} is empty; give a .jsonl with a question a line")
    return found


def load_tasks(manager: Any, specs: Sequence[Spec]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tasks by the harness's `TaskManager`, with their data; and by task what `own_file` says of it. Raises
    `InputError` where that is not to be had.
    """
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    files: dict[str, Any] = {}
    for spec in specs:
        for kind, found in load_task(manager, spec).items():
            if twice := sorted(loaded[kind].keys() & found.keys()):
                raise InputError(f"{twice[0]} is in more than one of the --tasks; leave one of them out")
            loaded[kind] |= found
            files |= dict.fromkeys(found, spec.own_file())
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own
    return loaded, files


def load_task(manager: Any, spec: Spec) -> dict[str, dict[str, Any]]:
    """What the harness makes of one of --tasks, which may be a group of tasks."""
    several = {*manager.all_groups, *manager.all_tags}
    known = {*manager.all_tasks, *several}
    if spec.documents is None and spec.file is None and spec.name not in known:
        near = ", ".join(get_close_matches(spec.name, ["stories", *sorted(known)]))
        meant = f"did you mean {near}? Give" if near else "give"
        raise InputError(
            f"there is no task {spec.name!r}; {meant} stories, the path of a .yaml, or a name that the harness knows"
        )
    try:
        if spec.documents is not None:
            config = STORIES_TASK if spec.name == "stories" else config_of(manager, spec.name)

            def loaded(documents: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
                given = {"custom_dataset": lambda **_: {"validation": as_dataset(documents)}}
                with quietly():
                    return dict(manager.load([config | given]))

            refuse_incomplete(spec, loaded, config.get("dataset_path"))
            return loaded(spec.documents)
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
                f"{spec.data_file} has no questions of the task {spec.name} ({reason}); give another file with "
                f"{spec.prefix}data-file"
            ) from None
        own = f", or give its questions with {spec.prefix}tasks {spec.name} {spec.prefix}data-file FILE"
        raise InputError(
            f"the data of the task {spec.name} cannot be had from the Hugging Face hub ({reason}); run this where the "
            f"hub can be reached{'' if spec.name in several else own}"
        ) from None


def config_of(manager: Any, name: str) -> dict[str, Any]:
    """What the harness's own file says of a task, but for its data: its questions are the split `validation`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None or entry.yaml_path is None or "task" not in (config := load_yaml(entry.yaml_path)):
        raise InputError(f"a file of questions goes with a single task of the harness, which {name!r} is not; name one")
    splits = {"training_split": None, "test_split": None, "fewshot_split": None, "validation_split": "validation"}
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "dataset_kwargs")}
    return config | splits


def refuse_incomplete(spec: Spec, load: Load, dataset: str | None) -> None:
    """Raises `InputError` where a question of the user's file lacks a key that the task reads; `dataset` is the task's
    own on the hub. Questions are loaded alone, one of each set of keys: beside others that have the key, one that lacks
    it would get None for it, which some tasks score as the text "None".
    """
    seen = set()
    for line, document in zip(spec.lines, spec.documents or (), strict=False):  # `stories` has no lines
        if (keys := frozenset(document)) in seen:
            continue
        seen.add(keys)
        if (key := missing_key(load, document)) is not None:
            needed = NEEDED.get(spec.name, f"each key that the task reads of those in {dataset} on the hub")
            raise InputError(
                f"line {line} of {spec.data_file} has no {key!r}, and a question of {spec.name} needs {needed}; "
                f"correct that line, or give another file with {spec.prefix}data-file"
            )


def missing_key(load: Load, document: dict[str, Any]) -> str | None:
    """The key that a task reads and a question lacks, or None. What the task fails to find elsewhere, as in a table of
    its own, it does not find either where the question has that key.
    """
    key = key_not_found(load, document)
    if key is None or key in document or key_not_found(load, document | {key: None}) == key:
        return None
    return key


def key_not_found(load: Load, document: dict[str, Any]) -> str | None:
    """The key for which a task does not take a question, be it one that only its functions, its templates, or its
    configuration name. None where it takes it, or fails otherwise.
    """
    from jinja2 import UndefinedError

    try:
        with undefined_is_refused():
            loaded = load([document])
    except KeyError as e:
        return str(e.args[0]) if e.args else None
    except UndefinedError as e:
        named = re.fullmatch(r"'(.+)' is undefined", str(e))
        return named[1] if named else None
    except Exception:  # loading all questions will tell
        return None
    for task in loaded["tasks"].values():
        for part in (task.config.doc_to_text, task.config.doc_to_choice, task.config.doc_to_target):
            if isinstance(part, str) and part.isidentifier() and part not in task.features:
                return part  # the harness takes it for a text, the same in each question
    return None


@contextlib.contextmanager
def undefined_is_refused() -> Iterator[None]:
    """Meanwhile a template of the harness that names what is not there fails in a list too, as [one, other] does not
    by itself.
    """
    from jinja2 import StrictUndefined
    from lm_eval.utils import env

    class Refused(StrictUndefined):
        __repr__ = StrictUndefined.__str__

    before, env.undefined = env.undefined, Refused
    try:
        yield
    finally:
        env.undefined = before


def as_dataset(documents: Sequence[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(documents))


@contextlib.contextmanager
def beside(file: Path | None) -> Iterator[None]:
    """In the folder of a task's file, so that the data it names is found beside it."""
    with contextlib.chdir(file.parent if file else Path()):
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars of `datasets`, and without a line for each time that the hub could not be reached."""
    import datasets

    before, logger = datasets.is_progress_bar_enabled(), logging.getLogger("huggingface_hub")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before:
            datasets.enable_progress_bars()
