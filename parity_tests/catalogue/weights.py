"""Weights as others have and use them: variants of GPT-2, pickles, names, checkpoints that were edited."""

from parity_tests.catalogue import Row
from parity_tests.catalogue.data import CHECKPOINT, CONFIG

CONVERT = "torch_ref/tests/test_convert.py::"
VARIANTS = "parity_tests/test_variants.py::"
RESUME = "data/runs/tests/test_resume.py::"

PLANTED: list[Row] = [
    (
        "an untied head is read as the tied one",
        "tinygrad_impl/model.py",
        "(self.lm_head or self.wte).weight",
        "self.wte.weight",
        VARIANTS + "test_logits_and_gradients",
    ),
    (
        "GELU with erf without the second term of its derivative",
        "tinygrad_impl/formulas.py",
        "x * phi, phi + x * density",
        "x * phi, phi",
        "tinygrad_impl/tests/test_formulas.py::test_gelu_with_erf_and_its_derivative",
    ),
    (
        "ReLU hides NaN",
        "tinygrad_impl/formulas.py",
        "(x > 0).where(x, x.isnan().where(x, 0))",
        "(x > 0).where(x, 0)",
        "tinygrad_impl/tests/test_formulas.py::test_relu_and_its_derivative",
    ),
    (
        "FLOPs of an untied token table, which is looked up",
        "data/checkpoints/config.py",
        "(0 if config.tie_word_embeddings else config.vocab_size)",
        "0",
        CONFIG + "test_variants_have_the_tensors_of_transformers",
    ),
    (
        "nanoGPT's matrices as they lie",
        "torch_ref/convert.py",
        "a.T if LINEAR.search(name) else a",
        "a",
        CONVERT + "test_nano_gpt",
    ),
    (
        "nanoGPT's GELU taken for the tanh form",
        "torch_ref/convert.py",
        '"gelu" if "bias" in model_args else "gelu_new"',
        '"gelu_new"',
        CONVERT + "test_nano_gpt",
    ),
    (
        "a pickle that runs code",
        "torch_ref/convert.py",
        "weights_only=True, mmap",
        "weights_only=False, mmap",
        CONVERT + "test_a_pickle_that_would_run_code_runs_none",
    ),
    (
        "PyTorch's advice to run the code in a file is passed on",
        "torch_ref/convert.py",
        "or not what torch.save writes; download",
        "or not what torch.save writes ({e}); download",
        CONVERT + "test_what_is_refused",
    ),
    (
        "a head that differs from the tied table is left aside",
        "data/checkpoints/checkpoint.py",
        'if not np.array_equal(head, weights.setdefault("wte.weight", head), equal_nan=True):',
        'if weights.setdefault("wte.weight", head) is None:',
        CHECKPOINT + "test_tensors_that_are_not_the_models",
    ),
    (
        "a pickle of the hub before its safetensors",
        "data/checkpoints/hub.py",
        "for patterns in (SAFETENSORS, PICKLES):",
        "for patterns in (PICKLES, SAFETENSORS):",
        CHECKPOINT + "test_what_the_hub_is_asked_for",
    ),
    (
        "padding of a vocabulary may be drawn",
        "data/checkpoints/checkpoint.py",
        '({"suppress_tokens": padding} if padding else {})',
        "{}",
        "data/checkpoints/tests/test_pipeline.py::test_a_pipeline_writes_until_the_context_is_full[50304-8]",
    ),
    (
        "an edit is accepted though the moments do not fit",
        "data/runs/accept.py",
        'read_checkpoint(folder) if (folder / "trainer.json").exists() else read_model(folder)',
        "read_model(folder)",
        RESUME + "test_a_checkpoint_that_was_edited_on_purpose",
    ),
    (
        "best is the latest",
        "data/checkpoints/checkpoint.py",
        "return named_checkpoint(path)\n",
        "return latest_checkpoint(path.parent.parent)\n",
        CHECKPOINT + "test_the_files_of_a_run_that_name_a_checkpoint",
    ),
]
