"""Bugs in the use of a model's own tokenizer."""

from parity_tests.catalogue import Row

MODEL = "data/text/tests/test_model_tokenizer.py::"
OWN = "parity_tests/test_own_tokenizers.py::"

PLANTED: list[Row] = [
    (
        "a prompt's special tokens are always tokens",
        "data/text/model_tokenizer.py",
        "self._text.encode_special_tokens = True",
        "self._text.encode_special_tokens = False",
        MODEL + "test_text_and_back",
    ),
    (
        "texts are cut off where the tokenizer's training cut them",
        "data/text/model_tokenizer.py",
        'description["truncation"] = description["padding"] = model["dropout"] = None',
        'description["padding"] = model["dropout"] = None',
        MODEL + "test_what_would_cut_or_fill_texts_is_ignored",
    ),
    (
        "GPT-2's vocabulary with other merges is GPT-2's tokenizer",
        "data/text/model_tokenizer.py",
        "json.dumps([tokens, pairs])",
        "json.dumps([tokens, sorted(pairs)])",
        MODEL + "test_what_is_not_gpt2s",
    ),
    (
        "a model of any vocabulary without a tokenizer has GPT-2's",
        "data/text/tokenizer.py",
        "VOCAB_SIZE <= rows <= PADDED_SIZE",
        "VOCAB_SIZE <= rows",
        MODEL + "test_a_model_without_a_tokenizer",
    ),
    (
        "the end of text is config.json's number, though text gives it too",
        "data/text/model_tokenizer.py",
        "and number not in self.encode(spelled)",
        "",
        MODEL + "test_what_ends_a_text",
    ),
    (
        "a tokenizer of more tokens than the model has",
        "data/text/tokenizer.py",
        "found.vocab_size > rows",
        "found.vocab_size > rows + 1",
        MODEL + "test_what_is_refused",
    ),
    (
        "other merges, the same hash",
        "data/text/model_tokenizer.py",
        'whole["pre_tokenizer"], whole["model"], ordinary',
        'whole["pre_tokenizer"], ordinary',
        MODEL + "test_equal_hashes_mean_equal_tokens",
    ),
    (
        "a checkpoint is written with GPT-2's tokenizer",
        "data/runs/recorder.py",
        "self.start.tokenizer\n",
        "__import__('data.text.tokenizer').text.tokenizer.gpt2()\n",
        OWN + "test_a_checkpoint_keeps_the_tokenizer",
    ),
    (
        "training on tokens of another tokenizer",
        "data/runs/start.py",
        "if not made_with(meta, tokenizer):",
        "if not meta:",
        OWN + "test_training_on_data_of_another_tokenizer",
    ),
    (
        "both models are given one's tokens",
        "tinygrad_impl/compare.py",
        "if made_with(meta, tokenizer):",
        "if True:",
        OWN + "test_compare_measures_the_same_text",
    ),
    (
        "bits per byte by the tokens of one tokenizer",
        "tinygrad_impl/compare.py",
        "bits = loss * count /",
        "bits = loss * measured /",
        OWN + "test_compare_measures_the_same_text",
    ),
    (
        "one folder for one text, whatever the tokenizer",
        "data/text/prepare.py",
        'identity += f" {tokenizer.sha256} {tokenizer.vocab_size}"',
        "identity += ''",
        MODEL + "test_a_tokenizer_is_part_of_what_is_prepared",
    ),
]
