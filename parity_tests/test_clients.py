"""Programs of others that load our checkpoints: they greedily write the same words, and we train what they save.

What they need is the extra `clients`; without a part of it, its tests are skipped.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tinygrad_impl.train
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.testing import call, write_stories
from data.text.sampling import Sampler
from data.text.tokenizer import EOT, VOCAB_SIZE, gpt2
from tinygrad_impl.generate import Generator, continue_texts
from tinygrad_impl.model import GPT2
from tinygrad_impl.tests.support import save_sure_model

pytestmark = pytest.mark.slow
PROMPT, NEW = "Once upon a time", 12
OPSET = 18  # of ONNX


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of as many tokens as its tokenizer has: CTranslate2 takes no padded vocabulary."""
    config, arrays = load(save_sure_model(tmp_path_factory.mktemp("padded"), 3))
    folder = tmp_path_factory.mktemp("clients")
    own = arrays | {"wte.weight": arrays["wte.weight"][:VOCAB_SIZE]}
    save(folder, replace(config, vocab_size=VOCAB_SIZE), own, gpt2())
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> str:
    """What the port writes greedily; a text that does not end at once."""
    config, arrays = load(folder)
    generator = Generator(GPT2(config, arrays), V=VOCAB_SIZE, eot=EOT)
    [text] = continue_texts(generator, gpt2(), [PROMPT], NEW, Sampler(0))
    assert len(gpt2().encode(text)) > len(gpt2().encode(PROMPT)) + 3
    return text


def test_the_pipeline_of_transformers(folder: Path, words: str) -> None:
    write = transformers.pipeline("text-generation", model=str(folder))
    [found] = write(PROMPT, max_new_tokens=NEW, do_sample=False)
    assert found["generated_text"] == words


def test_ctranslate2(folder: Path, words: str, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2 (run `make extras`)")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = tokenizer.convert_ids_to_tokens(tokenizer.encode(PROMPT))
    most = len(start) - 1 + NEW  # it counts the prompt but for its last token
    [found] = generator.generate_batch([start], max_length=most, sampling_topk=1, include_prompt_in_result=True)
    assert tokenizer.decode(found.sequences_ids[0]) == words


def test_onnx(folder: Path, words: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs onnx (run `make extras`)")
    pytest.importorskip("onnxscript", reason="needs onnxscript (run `make extras`)")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (run `make extras`)")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=tokens, use_cache=False).logits

    sizes = ({1: torch.export.Dim("length", min=2, max=32)},)
    path, example = tmp_path / "model.onnx", (torch.arange(7)[None],)
    torch.onnx.export(
        Logits(), example, path, dynamo=True, opset_version=OPSET, input_names=["tokens"], dynamic_shapes=sizes
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    row = gpt2().encode(PROMPT)
    for _ in range(NEW):
        [logits] = session.run(None, {"tokens": np.array([row], np.int64)})
        if (token := int(logits[0, -1, :VOCAB_SIZE].argmax())) == EOT:
            break
        row.append(token)
    assert gpt2().decode(row) == words


def test_the_trainer_of_transformers_and_back(folder: Path, tmp_path: Path) -> None:
    """Two steps there, and its model is what --init begins with here."""
    pytest.importorskip("accelerate", reason="needs accelerate (run `make extras`)")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).reshape(4, 16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    config, arrays = load(tmp_path / "trained")
    assert isinstance(config, GPT2Config)
    assert not np.array_equal(arrays["wte.weight"], load(folder)[1]["wte.weight"])
    np.testing.assert_array_equal(arrays["wte.weight"], model.transformer.wte.weight.detach().numpy())
    write_stories(tmp_path / "texts.txt", 40)
    options: tuple[object, ...] = (
        "--init",
        "trained",
        "--data",
        "texts.txt",
        "--steps",
        1,
        "--batch-size",
        1,
        "--seq-len",
        8,
    )
    options += ("--eval-tokens", 16, "--device", "CPU", "--parity", "off", "--out", "run")
    result = call(tinygrad_impl.train.main, *options, cwd=tmp_path)
    assert result.code == 0, result
    np.testing.assert_array_equal(
        load(tmp_path / "run" / "checkpoints" / "step-0")[1]["wte.weight"], arrays["wte.weight"]
    )
