"""A run begun by one implementation can be continued by the other, and `transformers` loads any checkpoint of it."""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tinygrad import Tensor

import data.runs.recorder
import tinygrad_impl.train
import tinygrad_impl.trainer
import torch_ref.train
import torch_ref.trainer
from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config
from data.runs.options import PORTS, SIZES
from data.runs.run_folder import RunFolder, load_checkpoint, read_metrics, read_sealed
from data.testing import call, refused, save_model, write_tokens
from data.text.loader import windows
from data.text.sampling import SAMPLING
from data.text.tokenizer import EOT_TEXT, tokenizer
from parity_tests.assertions import assert_passed
from parity_tests.bounds import judge
from parity_tests.setting import Setting, random_batches
from parity_tests.weights import random_weights
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.model import GPT2
from torch_ref.testing import hugging_face

CONFIG = GPT2Config(vocab_size=199, n_positions=16, n_embd=32, n_layer=2, n_head=4)
STEPS = 20


@pytest.mark.slow  # test_either_goes_on_with_a_run_of_either has it of few steps
@pytest.mark.parametrize("first", ["torch_ref", "tinygrad_impl"])
def test_ten_steps_here_and_ten_there_are_twenty(first: str, tmp_path: Path) -> None:
    """Through a checkpoint on disk, in float64: to the bound of ten free-running steps, twice."""
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float64", "CPU")
    batches = random_batches(CONFIG, 2, 12, seed=3, count=STEPS)
    whole, reference = setting.references()
    begun: Any = reference
    gone_on: Any = setting.trainer()
    if first == "tinygrad_impl":
        begun, gone_on = gone_on, begun
    for i, batch in enumerate(batches):
        rate = torch_ref.trainer.learning_rate(i, STEPS, 1e-3, 1e-4, 2)
        whole.step([batch], rate)
        if i == STEPS // 2:
            state = {"step": i, "tokens": 0, "seconds": 0.0, "loader": {}, "options": {}}
            moments = {name: np.asarray(t) for name, t in begun.moments().items()}
            out = RunFolder.create(tmp_path / "run", {})
            folder = out.save_checkpoint(CONFIG, begun.model.arrays(), moments, state)
            _, arrays, moments, read = load_checkpoint(folder)
            gone_on.restore(arrays, moments, read["step"])
        (begun if i < STEPS // 2 else gone_on).step([batch], rate)
    assert begun.steps == STEPS // 2
    assert whole.steps == gone_on.steps == STEPS
    expected, found = ({**t.model.arrays(), **t.moments()} for t in (whole, gone_on))
    assert_passed(judge("training", "float64", [(expected, found, expected)], None, setting.exact))


MAINS = {"torch_ref": torch_ref.train.main, "tinygrad_impl": tinygrad_impl.train.main}
B, T, ACCUM, TOKENS = 2, 16, 3, 20 * 16 + 9
# Every option that decides what is computed, at a value that is no default. There are 20 windows, so that six steps see
# nearly two epochs; the validation ends within its second batch.
OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": B, "seq_len": T, "grad_accum": ACCUM, "lr": 0.013, "min_lr": 0.004}
OPTIONS |= {"warmup": 2, "weight_decay": 0.25, "betas": (0.7, 0.9), "clip": 0.45, "dtype": "float32", "seed": 5}
OPTIONS |= {"eval_every": 4, "eval_tokens": 40, "sample_every": 99, "save_every": 2, "keep": 2}


def words(**changed: object) -> list[object]:
    """The options as words of a command line."""
    values = OPTIONS | {"init": "init", "data": "data", "device": "CPU"} | changed
    given = {f"--{n.replace('_', '-')}": v if isinstance(v, tuple) else (v,) for n, v in values.items()}
    return [word for name, parts in given.items() for word in (name, *parts)]


def ungated(package: str) -> tuple[str, ...]:
    return ("--parity", "off") * (package == "tinygrad_impl")


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Iterator[None]:
    """And one thread for PyTorch: with tensors as small as these a second one only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.runs.recorder, "SAMPLING", SAMPLING | {"max_new_tokens": 6})
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, short_samples: None) -> Path:
    """A folder with the same run by each implementation, `torch_ref` and `tinygrad_impl`."""
    folder = tmp_path_factory.mktemp("runs")
    save_model(folder / "init")
    random = np.random.default_rng(3)
    write_tokens(folder / "data", random.integers(0, 50257, TOKENS), random.integers(0, 50257, 60))
    for package, main in MAINS.items():
        result = call(main, *words(out=package), *ungated(package), cwd=folder)
        assert result.code == 0, result
    return folder


@pytest.mark.parametrize("module", [torch_ref.trainer, tinygrad_impl.trainer])
def test_the_schedule(module: Any) -> None:
    """Linear warmup to the highest rate, then half a cosine down to the lowest, one step after the end."""
    rates = [module.learning_rate(step, 10, 0.5, 0.1, 4) for step in range(10)]
    down = [0.3 + 0.2 * math.cos(math.pi * i / 6) for i in range(6)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, *down], rel=1e-12)
    assert rates[7] == pytest.approx(0.3, rel=1e-12)
    assert [module.learning_rate(step, 3, 0.6, 0.0, 3) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert module.learning_rate(0, 2, 0.5, 0.1, 0) == 0.5
    assert module.learning_rate(1, 2, 0.5, 0.1, 0) == pytest.approx(0.3, rel=1e-12)


def test_what_the_trainers_do_unless_told_otherwise() -> None:
    """The same: betas of 0.9 and 0.95, eps of 1e-8, decay of 0.1, gradients of norm 1."""
    arrays = random_weights(CONFIG, 0, 0.2)
    port, reference = tinygrad_impl.trainer.Trainer(CONFIG, arrays), torch_ref.trainer.Trainer(CONFIG, arrays)
    assert (port.betas, port.eps, port.weight_decay, port.clip) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    groups = [(g["betas"], g["eps"], g["weight_decay"]) for g in reference.optimizer.param_groups]
    assert groups == [((0.9, 0.95), 1e-8, 0.1), ((0.9, 0.95), 1e-8, 0.0)]
    assert (reference.clip, reference.autocast, port.backend.dtype) == (1.0, None, None)
    zeros = {name: np.asarray(t) for name, t in reference.moments().items()}
    assert zeros.keys() == port.moments().keys()
    assert not any(array.any() for array in (*zeros.values(), *port.moments().values()))


@dataclass
class Course:
    """What a run has to arrive at."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    validation: dict[int, float]
    parameters: dict[str, np.ndarray]


def tokens_of(folder: Path, split: str) -> np.ndarray:
    """Read as the format is documented: a header of 64 bytes, and then two bytes a token."""
    return np.fromfile(folder / "data" / f"{split}-00000.bin", "<u2", offset=64).astype(np.int64)


def recomputed(folder: Path, **changed: Any) -> Course:
    """The run by Hugging Face's model in float64 and PyTorch's AdamW, with no line of either implementation or of the
    loop: from what README and --help say of the options.
    """
    o = SimpleNamespace(**(OPTIONS | changed))
    model = hugging_face(folder / "init", torch.float64)
    parameters = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    matrices = [p for p in parameters.values() if p.ndim == 2]
    vectors = [p for p in parameters.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=o.betas,
        eps=1e-8,
    )

    def loss_of(row: np.ndarray, targets: np.ndarray) -> torch.Tensor:
        logits = model(torch.tensor(row)).logits
        return -logits.log_softmax(-1).gather(-1, torch.tensor(targets)[..., None])[..., 0]

    def validation() -> float:
        valid = tokens_of(folder, "valid")
        losses = []
        with torch.no_grad():
            for at in range(0, o.eval_tokens, o.seq_len):
                n = min(o.seq_len, o.eval_tokens - at)
                losses += loss_of(valid[None, at : at + n], valid[None, at + 1 : at + n + 1])[0].tolist()
        return float(np.mean(losses))

    train = tokens_of(folder, "train")
    count = (len(train) - 1) // o.seq_len
    order = [int(i) for epoch in range(9) for i in np.random.default_rng((o.seed, epoch)).permutation(count)]
    course = Course([], [], [], {0: validation()}, {})
    for step in range(o.steps):
        if step < o.warmup:
            rate = o.lr * (step + 1) / o.warmup
        else:
            turned = math.pi * (step - o.warmup) / (o.steps - o.warmup)
            rate = o.min_lr + (o.lr - o.min_lr) * (1 + math.cos(turned)) / 2
        mine = order[step * o.batch_size * o.grad_accum :][: o.batch_size * o.grad_accum]
        rows = np.stack([train[i * o.seq_len :][: o.seq_len + 1] for i in mine])
        optimizer.zero_grad()
        loss = loss_of(rows[:, :-1], rows[:, 1:]).mean()
        loss.backward()
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for g in gradients:
            g *= min(1.0, o.clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        course.losses.append(loss.item())
        course.norms.append(norm)
        course.rates.append(rate)
        if (step + 1) % o.eval_every == 0 or step + 1 == o.steps:
            course.validation[step + 1] = validation()
    course.parameters = {name: p.detach().numpy() for name, p in parameters.items()}
    return course


@pytest.fixture(scope="module")
def reference_course(runs: Path) -> Course:
    return recomputed(runs)


def difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], began: Path) -> float:
    """The norm of the difference over that of the weights' movement since the start, without keys' biases: softmax
    ignores those, and Adam makes steps of their gradients' roundings.
    """
    apart = way = 0.0
    for name, start in load(began)[1].items():
        kept = np.ones(start.shape, bool)
        if name.endswith("c_attn.bias"):
            kept[len(start) // 3 : 2 * len(start) // 3] = False
        apart += float(np.square((found[name] - expected[name])[kept], dtype=np.float64).sum())
        way += float(np.square((expected[name] - start)[kept], dtype=np.float64).sum())
    return math.sqrt(apart / way)


WEIGHTS = {"torch_ref": 1e-4, "tinygrad_impl": 5e-6}  # `difference` from float64; PyTorch clips by its own norm


@pytest.mark.parametrize("package", list(MAINS))
def test_every_option_arrives(package: str, runs: Path, reference_course: Course) -> None:
    """The whole run, against a third implementation, which reads the same options."""
    rows = read_metrics(runs / package)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["tokens"] for row in rows] == [ACCUM * B * T * step for step in range(7)]
    assert [row["lr"] for row in rows[1:]] == pytest.approx(reference_course.rates, rel=1e-12)
    assert [row["loss"] for row in rows[1:]] == pytest.approx(reference_course.losses, rel=1e-6)
    # PyTorch's own float32 norm of as many numbers as the vocabulary's gradients have is 2e-4 off
    rel = 1e-5 if package == "tinygrad_impl" else 1e-3
    assert [row["grad_norm"] for row in rows[1:]] == pytest.approx(reference_course.norms, rel=rel)
    assert min(reference_course.norms) < OPTIONS["clip"] < max(reference_course.norms)
    found = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert found.keys() == reference_course.validation.keys() == {0, 4, 6}
    assert list(found.values()) == pytest.approx(list(reference_course.validation.values()), rel=1e-6)
    apart = difference(load(runs / package)[1], reference_course.parameters, runs / "init")
    print(f"difference over movement: {apart:.1e}")
    assert apart < WEIGHTS[package]
    kept = {path.name for path in (runs / package / "checkpoints").glob("step-*")}
    best = min(reference_course.validation, key=reference_course.validation.__getitem__)
    assert kept == {"step-0", "step-4", "step-6", f"step-{best}"}


@pytest.mark.parametrize(
    "changed",
    [
        *({"lr": 0.01304}, {"min_lr": 0.00404}, {"weight_decay": 0.26}),
        *({"betas": (0.71, 0.9)}, {"betas": (0.7, 0.91)}, {"clip": 0.46}),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_option_tells(changed: dict[str, Any], runs: Path, reference_course: Course) -> None:
    """A small change of any option moves the run further than the test above tolerates."""
    other = recomputed(runs, **changed)
    apart = difference(other.parameters, reference_course.parameters, runs / "init")
    print(f"{changed}: {apart:.1e}")
    assert apart > 2 * max(WEIGHTS.values())


@pytest.mark.slow  # of a whole run; tinygrad_impl/tests/test_trainer.py has the same of both evaluations
@pytest.mark.parametrize("package", list(MAINS))
def test_validation_weighs_tokens_and_not_batches(package: str, tmp_path: Path) -> None:
    """Over batches of 24 and 6 tokens, whose losses differ: the mean of their means would be another number."""
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    port, reference = Evaluator(setting.trainer().model), setting.references()[1]

    def evaluate(batches: Iterable[Any]) -> float:
        if package == "tinygrad_impl":
            return port(batches)
        total, count = reference.evaluate(batches)
        return total / count

    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 60)
    batches = list(windows(write_tokens(tmp_path / "data", tokens, tokens), "valid", 2, 12, 30))
    one, other = (evaluate([batch]) for batch in batches)
    assert abs(one - other) > 1e-2
    assert evaluate(batches) == pytest.approx((24 * one + 6 * other) / 30, rel=1e-6)
    assert evaluate(reversed(batches)) == pytest.approx((24 * one + 6 * other) / 30, rel=1e-6)


# of the port, its own test sees in a second that the dtype arrives
@pytest.mark.parametrize("package", ["torch_ref", pytest.param("tinygrad_impl", marks=pytest.mark.slow)])
def test_bfloat16_arrives(package: str, runs: Path, tmp_path: Path) -> None:
    """Matmuls with 8 bits of precision: losses differ from float32's by no more than that; weights stay float32."""
    changed = {"out": tmp_path / "run", "dtype": "bfloat16", "steps": 1, "warmup": 1, "eval_every": 1}
    result = call(MAINS[package], *words(**changed), *ungated(package), cwd=runs)
    assert result.code == 0, result
    assert ", bfloat16" in result.out
    exact = recomputed(runs, steps=1, warmup=1)
    rows = read_metrics(tmp_path / "run")
    for found, expected in (
        (rows[0]["val_loss"], exact.validation[0]),
        (rows[1]["loss"], exact.losses[0]),
        (rows[1]["val_loss"], exact.validation[1]),
    ):
        print(f"{abs(found - expected) / expected:.1e}")
        assert 1e-6 < abs(found - expected) / expected < 2**-8
    assert {array.dtype for array in load(tmp_path / "run")[1].values()} == {np.dtype(np.float32)}
    assert 1e-3 < difference(load(tmp_path / "run")[1], exact.parameters, runs / "init") < 0.3


def assert_close(found: Path, expected: Path) -> None:
    """For runs in float32, which drift apart by their rounding."""
    rows = [read_metrics(run) for run in (found, expected)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["tokens"], ours.get("lr")) == (theirs["tokens"], theirs.get("lr"))
        for name in ours.keys() & {"loss", "val_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_the_two_commands_train_the_same(runs: Path) -> None:
    assert_close(runs / "tinygrad_impl", runs / "torch_ref")
    options = [read_sealed(runs / package / "run.json")["options"] for package in MAINS]
    assert options[0] == {name: value for name, value in options[1].items() if name not in PORTS}
    expected = OPTIONS | {"betas": [0.7, 0.9], "init": "init", "data": "data", "device": "CPU", "preset": None}
    texts = {"valid": None, "field": "text", "errors": "strict"}
    assert options[0] == expected | texts | dict.fromkeys((*SIZES, "schedule")) | {"tensorboard": False}


def course(run: Path) -> list[dict[str, Any]]:
    """The metrics but for the times, which no two runs share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in read_metrics(run)]


@pytest.mark.parametrize("second", list(MAINS))
@pytest.mark.parametrize("first", list(MAINS))
def test_either_goes_on_with_a_run_of_either(first: str, second: str, runs: Path, tmp_path: Path) -> None:
    """A run that the same implementation continues is the same bit for bit; by the other, to float32's rounding."""
    shutil.copytree(runs / first, tmp_path / "run")
    whole = tmp_path / "run" / "checkpoints" / "step-4"
    result = call(MAINS[second], "--resume", whole, *ungated(second), cwd=runs)
    assert result.code == 0, result
    assert "continuing after step 4" in result.out
    assert read_metrics(tmp_path / "run")[:5] == read_metrics(runs / first)[:5]
    assert_close(tmp_path / "run", runs / first)
    (continued,) = read_sealed(tmp_path / "run" / "run.json")["continued"]
    assert continued["command"][2] == f"{second}.train"
    if first == second:
        assert course(tmp_path / "run") == course(runs / first)
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (run / "checkpoints" / "step-6" / file for run in (tmp_path / "run", runs / first))
            assert ours.read_bytes() == theirs.read_bytes()


def test_the_reference_refuses_a_device_it_has_not(runs: Path) -> None:
    refused(call(torch_ref.train.main, "--device", "METAL", cwd=runs), "PyTorch has no device 'METAL' here")


@pytest.mark.parametrize("package", list(MAINS))
def test_any_checkpoint_is_a_folder_for_transformers(package: str, runs: Path) -> None:
    """Logits to float32's rounding, and the tokenizer that is written beside the weights."""
    folder = runs / package / "checkpoints" / "step-6"
    text = "Once upon a time, naïve 日本 🙂 don't"
    ids = tokenizer().encode_ordinary(text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token == EOT_TEXT
    assert transformers.GPT2Tokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    with torch.no_grad():
        expected = hugging_face(folder, torch.float32)(torch.tensor([ids])).logits.numpy()
    found = GPT2(*load(folder))(Tensor([ids]))[0].numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_text_generation_pipeline_takes_a_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = transformers.pipeline("text-generation", str(runs / "tinygrad_impl" / "checkpoints" / "step-6"))
    (written,) = pipeline("Once upon a time", max_new_tokens=5, do_sample=False)
    assert written["generated_text"].startswith("Once upon a time")
    assert len(tokenizer().encode_ordinary(written["generated_text"])) > 4


def poisoned(arrays: Mapping[str, np.ndarray], unseen: int, target: int) -> dict[str, dict[str, np.ndarray]]:
    """Weights whose loss, or whose gradient's norm, or both are beyond float32, given a token that no input is and one
    that only the last target is.
    """
    wte = arrays["wte.weight"]
    # the loss: logits of nearly +-3.4e38, whose difference is beyond; gradients are of the size of their square root
    root = np.float32(math.sqrt(3.3e38 / wte.shape[1]))
    apart = wte.copy()
    apart[unseen], apart[target] = root, -root
    silent = {"ln_f.weight": 0 * arrays["ln_f.weight"], "ln_f.bias": 0 * arrays["ln_f.bias"] + root}
    # the norm: the logit of an ordinary size comes from a weight of 1e24, and so does another's gradient
    large = wte.copy()
    large[unseen] = 1e24
    quiet = {"ln_f.weight": arrays["ln_f.weight"] * np.float32(1e-24), "ln_f.bias": 0 * arrays["ln_f.bias"]}
    return {
        "loss": {**arrays, **silent, "wte.weight": apart},
        "norm": {**arrays, **quiet, "wte.weight": large},
        "both": {**arrays, "ln_f.bias": arrays["ln_f.bias"] + np.float32(3e38)},
    }


@pytest.mark.slow  # out of weights that overflow; test_trainer.py has it of both trainers, for every kind of number
@pytest.mark.parametrize("package", list(MAINS))
def test_what_is_not_finite_updates_nothing(package: str) -> None:
    """The loss alone, the norm alone, or both: nothing of parameters, moments and steps may move."""
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    trainer: Any = setting.trainer() if package == "tinygrad_impl" else setting.references()[1]
    batches = random_batches(CONFIG, 2, 12, seed=0, count=4)
    for batch in batches[:3]:  # the third is replayed
        trainer.step([batch], 1e-3)
    arrays, moments = trainer.model.arrays(), {n: np.asarray(t).copy() for n, t in trainer.moments().items()}
    unseen, target = 197, 198
    x = np.where(batches[3][0] >= unseen, 0, batches[3][0]).astype(np.int32)
    y = np.full_like(x, unseen)
    y[-1, -1] = target
    for what, weights in poisoned(arrays, unseen, target).items():
        trainer.restore(weights, moments, 3)
        loss, norm = trainer.step([(x, y)], 1e-3)
        assert (np.isfinite(loss), np.isfinite(norm)) == (what == "norm", what == "loss"), (what, loss, norm)
        assert trainer.steps == 3
        for name, array in trainer.model.arrays().items():
            np.testing.assert_array_equal(array, weights[name])
        for name, array in trainer.moments().items():
            np.testing.assert_array_equal(np.asarray(array), moments[name])
    trainer.restore(arrays, moments, 3)
    assert np.isfinite(trainer.step([batches[3]], 1e-3)).all()
    assert trainer.steps == 4
