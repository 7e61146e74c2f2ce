"""What is saved, as others use it: transformers' pipeline without any arguments, and llama.cpp's converter."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from data.checkpoints.checkpoint import save
from data.checkpoints.config import GPT2Config, to_hf
from data.checkpoints.initialize import initial_weights
from data.text.tokenizer import EOT, VOCAB_SIZE, gpt2

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("vocabulary", "context"),
    [
        (50304, 8),
        (50257, 32),
        *(pytest.param(*sizes, marks=slow) for sizes in ((50257, 8), (50304, 32), (50257, 1024), (50304, 1024))),
    ],
)
def test_a_pipeline_writes_until_the_context_is_full(vocabulary: int, context: int, tmp_path: Path) -> None:
    """The padding's logits are the largest, and none of them may be drawn."""
    config = GPT2Config(vocabulary, context, n_embd=4, n_layer=1, n_head=1)
    arrays = initial_weights(config, 0)
    arrays["ln_f.weight"][0] = 0  # what follows is the same whatever was written
    arrays["ln_f.bias"][0], arrays["wte.weight"][:VOCAB_SIZE, 0], arrays["wte.weight"][VOCAB_SIZE:, 0] = 1, 0, 9
    arrays["wte.weight"][EOT, 0] = -99  # so that it does not end before
    save(tmp_path, config, arrays, gpt2())
    pipe = transformers.pipeline("text-generation", str(tmp_path))
    texts = [["Once upon a time", "A dog"], ["One"]][context > 32]
    for [text] in pipe(texts, batch_size=len(texts), return_tensors=True):
        tokens = np.array(text["generated_token_ids"])
        assert len(tokens) == context
        assert tokens.max() < VOCAB_SIZE
    assert len(pipe.tokenizer) == VOCAB_SIZE
    assert pipe.tokenizer.model_max_length == context
    assert (
        pipe.tokenizer.pad_token_id == pipe.tokenizer.eos_token_id == pipe.model.generation_config.pad_token_id == EOT
    )


def test_what_llama_cpps_converter_asks_of_a_config_json(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=61, n_positions=24, n_embd=8, n_layer=3, n_head=2)
    save(tmp_path, config, initial_weights(config, 0))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == to_hf(config)
    assert {name: written[name] for name in ("n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon")} == {
        **{"n_layer": 3, "n_ctx": 24, "n_embd": 8, "n_head": 2, "layer_norm_epsilon": 1e-5}
    }
    assert written["architectures"] == ["GPT2LMHeadModel"]
