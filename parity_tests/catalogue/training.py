"""Bugs in options, the training loop, the run folder and the two training programs."""

from parity_tests.catalogue import Row

TRAINING_LOOP = "data/runs/loop.py"
TRAINING_OPTIONS = "data/runs/options.py"
START = "data/runs/start.py"
RECORDER = "data/runs/recorder.py"
LEARNING_RATES = "data/runs/find_lr.py"
PLOTS = "data/runs/plots.py"
RUN_FOLDER = "data/runs/run_folder.py"

LOOP = "data/runs/tests/test_loop.py::"
OPTIONS = "data/runs/tests/test_options.py::"
RESUME = "data/runs/tests/test_resume.py::"
FIND_LR = "data/runs/tests/test_find_lr.py::"
FOLDER = "data/runs/tests/test_run_folder.py::"
PORT = "tinygrad_impl/tests/test_train.py::"
REFERENCE = "torch_ref/tests/test_train.py::"
BOTH = "parity_tests/test_interchange.py::"
TRAINERS = "tinygrad_impl/tests/test_trainer.py::"

PLANTED: list[Row] = [
    (
        "training validates on the split that it trains on",
        TRAINING_LOOP,
        'windows(start.folder, "valid", B, T',
        'windows(start.folder, "train", B, T',
        LOOP + "test_validation_is_on_the_first_tokens_of_the_other_split",
    ),
    (
        "validation on the whole split whatever --eval-tokens says",
        TRAINING_LOOP,
        "options.eval_tokens or None",
        "None",
        LOOP + "test_validation_is_on_the_first_tokens_of_the_other_split",
    ),
    (
        "seconds are those of the step, not of the run",
        TRAINING_LOOP,
        "tokens, seconds = tokens + tokens_a_step, seconds + elapsed",
        "tokens, seconds = tokens + tokens_a_step, elapsed",
        LOOP + "test_metrics",
    ),
    (
        "tokens of a step without accumulation",
        TRAINING_LOOP,
        "tokens_a_step = options.grad_accum * B * T",
        "tokens_a_step = B * T",
        LOOP + "test_metrics",
    ),
    (
        "the rate of tokens is a mean of the whole run",
        TRAINING_LOOP,
        "rate = tokens_a_step / elapsed",
        "rate = tokens / seconds",
        LOOP + "test_metrics",
    ),
    (
        "the schedule is one step late",
        TRAINING_LOOP,
        "by.learning_rate(trainer.steps, options.steps,",
        "by.learning_rate(trainer.steps + 1, options.steps,",
        LOOP + "test_the_schedule_is_asked_for_the_rate_of_each_step",
    ),
    (
        "micro-batches are the windows in turns",
        "data/text/loader.py",
        "return list(zip(np.split(x, count), np.split(y, count), strict=True))",
        "return [(x[i::count], y[i::count]) for i in range(count)]",
        LOOP + "test_the_steps_see_the_training_text",
    ),
    (
        "the best checkpoint is the last measured",
        RECORDER,
        'best = min((row for row in folder.metrics if "val_loss" in row), key=lambda row: row["val_loss"])["step"]',
        'best = [row for row in folder.metrics if "val_loss" in row][-1]["step"]',
        LOOP + "test_checkpoints",
    ),
    (
        "of equally good checkpoints the last is best",
        RECORDER,
        "best = min((row for row in folder.metrics if",
        "best = min((row for row in reversed(folder.metrics) if",
        LOOP + "test_of_equally_good_ones_the_first_is_best",
    ),
    (
        "a new best is not saved off schedule",
        TRAINING_LOOP,
        "if ends or lowest or trainer.steps % options.save_every == 0",
        "if ends or trainer.steps % options.save_every == 0",
        LOOP + "test_checkpoints",
    ),
    (
        "--keep keeps the oldest",
        RECORDER,
        "*scheduled[-(options.keep or len(there)) :]",
        "*scheduled[: options.keep or len(there)]",
        LOOP + "test_keep_is_of_the_newest_by_number",
    ),
    (
        "--keep sorts steps as text",
        RECORDER,
        'for path in checkpoints(folder.path / "checkpoints")]',
        'for path in sorted(checkpoints(folder.path / "checkpoints"), key=str)]',
        LOOP + "test_keep_is_of_the_newest_by_number",
    ),
    (
        "--keep removes the first checkpoint",
        RECORDER,
        "folder.prune({0, best, step,",
        "folder.prune({best, step,",
        LOOP + "test_keep_while_the_run_goes_on",
    ),
    (
        "samples are drawn with a seed of their own",
        RECORDER,
        "Sampler(0.6, top_k=40, seed=self.options.seed)",
        "Sampler(0.6, top_k=40)",
        LOOP + "test_samples",
    ),
    (
        "samples and checkpoints swap their schedules",
        TRAINING_LOOP,
        "if ends or trainer.steps % options.sample_every == 0",
        "if ends or trainer.steps % options.save_every == 0",
        LOOP + "test_samples",
    ),
    (
        "the bar shows the validation loss of the beginning",
        TRAINING_LOOP,
        'row["val_loss"] = val_loss = validation_loss()',
        'row["val_loss"] = validation_loss()\n                val_loss = min(val_loss, row["val_loss"])',
        LOOP + "test_the_last_validation_stands_in_the_bar_until_the_next",
    ),
    (
        "MFU is of all positions, not of a window",
        TRAINING_LOOP,
        "flops_a_token(config, T) * rate",
        "flops_a_token(config, config.n_positions) * rate",
        LOOP + "test_progress",
    ),
    (
        "the closing line has the best validation loss for the last",
        TRAINING_LOOP,
        "for row in (run.metrics[0], run.metrics[-1]))",
        'for row in (run.metrics[0], min(run.metrics, key=lambda row: row.get("val_loss", 99.0))))',
        LOOP + "test_what_is_printed",
    ),
    (
        "a spike is judged with itself in the mean",
        TRAINING_LOOP,
        "spike = self.count >= 20 and loss - self.value > 8 * usual",
        (
            "spike = self.count >= 20 and loss - (self._sum * 0.98 + 0.02 * loss) / (1 - 0.98 ** (self.count "
            "+ 1)) > 8 * usual"
        ),
        LOOP + "test_a_spike_is_eight_times_the_usual_distance",
    ),
    (
        "a sudden fall is a spike too",
        TRAINING_LOOP,
        "loss - self.value > 8 * usual",
        "abs(loss - self.value) > 8 * usual",
        LOOP + "test_a_spike_is_eight_times_the_usual_distance",
    ),
    (
        "the smoothed loss is not corrected for its beginning",
        TRAINING_LOOP,
        "return self._sum / (1 - 0.98**self.count) if self.count else math.nan",
        "return self._sum / 1 if self.count else math.nan",
        LOOP + "test_the_smoothed_loss",
    ),
    (
        "only a loss that is not finite ends training",
        TRAINING_LOOP,
        "if not math.isfinite(loss + grad_norm):",
        "if not math.isfinite(loss):",
        LOOP + "test_what_is_not_finite_ends_training",
    ),
    (
        "the error names the windows after those of the step",
        TRAINING_LOOP,
        (
            "            loss, grad_norm = trainer.step(loader.next_micro_batches(options.grad_accum), lr)\n"
            "            start.verification.check()\n"
        ),
        (
            "            loss, grad_norm = trainer.step(loader.next_micro_batches(options.grad_accum), lr)\n"
            '            place = f"windows {loader.position} to {loader.position + options.grad_accum * B - 1} of '
            'the data"\n'
            "            start.verification.check()\n"
        ),
        LOOP + "test_what_is_not_finite_ends_training",
    ),
    (
        "TensorBoard gets no validation loss",
        RECORDER,
        'for name in row.keys() - {"step", "tokens", "seconds"}',
        'for name in row.keys() - {"step", "tokens", "seconds", "val_loss"}',
        LOOP + "test_tensorboard",
    ),
    (
        "TensorBoard shows what a resumed run cut off",
        RECORDER,
        'purge_step=start.state["step"] + 1',
        "purge_step=self.options.steps + 1",
        LOOP + "test_tensorboard",
    ),
    (
        "given weights train at the rate of random ones",
        START,
        "recipe.finetune_lr if arrays else recipe.lr",
        "recipe.lr",
        OPTIONS + "test_defaults_of_given_weights",
    ),
    (
        "gpt2-large has gpt2-medium's batch",
        TRAINING_OPTIONS,
        '"gpt2-large": Recipe(2, 1024',
        '"gpt2-large": Recipe(4, 1024',
        OPTIONS + "test_defaults_of_a_preset",
    ),
    (
        "betas of a preset are not its own",
        START,
        '"betas": recipe.betas,',
        '"betas": (0.9, 0.95),',
        OPTIONS + "test_defaults_of_a_preset",
    ),
    (
        "a default takes the place of a given 0",
        START,
        "(defaults | given | {",
        "(defaults | {name: value for name, value in given.items() if value or name not in defaults} | {",
        OPTIONS + "test_what_is_given_is_not_replaced",
    ),
    (
        "warmup as long as a fifth of the run, however long that is",
        START,
        "min(recipe.warmup, steps // 5)",
        "steps // 5",
        OPTIONS + "test_what_follows_from_the_steps",
    ),
    (
        "--config forgets the second of two values",
        TRAINING_OPTIONS,
        "values = value if isinstance(value, list | tuple) else [value]",
        "values = value[:1] * 2 if isinstance(value, list | tuple) else [value]",
        RESUME + "test_a_configuration_carries_every_option",
    ),
    (
        "--config wins over what is given",
        TRAINING_OPTIONS,
        "(options | given).items()",
        "(given | options).items()",
        RESUME + "test_a_configuration_with_other_options",
    ),
    (
        "another seed's weights are taken for changed ones",
        START,
        'for name in ("init", "preset", "seed"))',
        'for name in ("init", "preset"))',
        RESUME + "test_a_configuration_with_another_seed",
    ),
    (
        "a resumed run counts its seconds from 0",
        TRAINING_LOOP,
        'tokens, seconds = start.state["tokens"], start.state["seconds"]',
        'tokens, seconds = start.state["tokens"], 0.0',
        RESUME + "test_a_resumed_run_is_the_run_that_went_through",
    ),
    (
        "a resumed run forgets the losses before",
        TRAINING_LOOP,
        "for row in run.metrics[1:])",
        'for row in run.metrics[1:][: start.state["step"] - options.steps])',
        RESUME + "test_a_resumed_run_is_the_run_that_went_through",
    ),
    (
        "a resumed run begins with the first batch again",
        START,
        'loader.restore(state["loader"])',
        'loader.restore(state["loader"] | {"position": 0})',
        RESUME + "test_a_resumed_run_is_the_run_that_went_through",
    ),
    (
        "the exit code of a stop is the signal's number",
        TRAINING_LOOP,
        "sys.exit(128 + stops[0])",
        "sys.exit(stops[0])",
        RESUME + "test_a_request_to_stop_saves_first",
    ),
    (
        "a second request to stop is collected too",
        TRAINING_LOOP,
        "        for other, handler in previous.items():\n            signal.signal(other, handler)\n\n",
        "\n",
        RESUME + "test_a_second_request_stops_at_once",
    ),
    (
        "the source of a continued run is not reported",
        RECORDER,
        '{"step": start.state["step"], **origin}',
        '{"step": start.state["step"]} | {k: v for k, v in origin.items() if k != "source"}',
        RESUME + "test_a_resumed_run_is_the_run_that_went_through",
    ),
    (
        "find-lr proposes the rate of the lowest loss",
        LEARNING_RATES,
        "rates[int(np.argmin(slopes))]",
        "rates[lowest]",
        FIND_LR + "test_what_it_proposes",
    ),
    (
        "find-lr stops where one batch is bad",
        LEARNING_RATES,
        "if means[-1] > 1.5 * min(means):",
        "if losses[-1] > 1.5 * min(losses):",
        FIND_LR + "test_what_it_proposes",
    ),
    (
        "find-lr smooths without correction",
        LEARNING_RATES,
        "means.append(mean / (1 - 0.9**i))",
        "means.append(mean / (1 - 0.9 ** (i + 1)))",
        FIND_LR + "test_what_it_proposes",
    ),
    (
        "loss.png draws the gradient's norm",
        PLOTS,
        '[r["loss"] for r in trained], lw=1',
        '[r.get("grad_norm", r["loss"] + 1) for r in trained], lw=1',
        LOOP + "test_loss_png",
    ),
    (
        "loss.png swaps the labels of its axes",
        PLOTS,
        'xlabel="step", ylabel="loss (nats a token)"',
        'ylabel="step", xlabel="loss (nats a token)"',
        "data/runs/tests/test_plots.py::test_losses",
    ),
    (
        "metrics keep a line too many when a run is resumed",
        RUN_FOLDER,
        '.splitlines(keepends=True)[: state["step"] + 1]',
        '.splitlines(keepends=True)[: state["step"] + 2]',
        FOLDER + "test_resuming_forgets_what_came_after_the_checkpoint",
    ),
    (
        "samples of the checkpoint's own step are cut off",
        RUN_FOLDER,
        'if state and sample[0] <= state["step"]]',
        'if state and sample[0] < state["step"]]',
        FOLDER + "test_resuming_forgets_what_came_after_the_checkpoint",
    ),
    (
        "checkpoints after the one resumed from stay",
        RUN_FOLDER,
        'folder.prune(range(state["step"] + 1))',
        "folder.prune(range(10**9))",
        FOLDER + "test_steps_are_numbers",
    ),
    (
        "a line's checksum is not looked at",
        RUN_FOLDER,
        "or checked_line(row).encode() != line:",
        "or not checked_line(row):",
        FOLDER + "test_a_line_after_the_checkpoint_is_vouched_for_by_itself",
    ),
    (
        "what it was continued with replaces what was there",
        RUN_FOLDER,
        '[*run.get("continued", []), origin]',
        "[origin]",
        RESUME + "test_a_resumed_run_records_where_it_did_so",
    ),
    (
        "half of a first checkpoint is taken for one",
        START,
        'checkpoints(path / "checkpoints") or (path / "checkpoints" / "latest").exists()',
        'any((path / "checkpoints").glob("[ls]*"))',
        RESUME + "test_a_run_killed_before_its_first_checkpoint_begins_anew",
    ),
    (
        "the bar of a resumed run begins with the validation loss before training",
        TRAINING_LOOP,
        'for row in reversed(run.metrics) if "val_loss" in row)',
        'for row in run.metrics if "val_loss" in row)',
        RESUME + "test_the_bar_of_a_resumed_run_begins_with_the_last_validation",
    ),
    (
        "the last step does not count among those to keep",
        RECORDER,
        "(n % options.save_every == 0 or n == options.steps)",
        "n % options.save_every == 0",
        LOOP + "test_the_last_step_counts_among_the_newest",
    ),
    (
        "run.json has the commit without whether the tree was clean",
        RECORDER,
        '"source": revision(),',
        '"source": {"commit": revision()["commit"]},',
        LOOP + "test_run_json",
    ),
    (
        "the reference: the schedule begins at 0",
        "torch_ref/trainer.py",
        "return peak * (step + 1) / warmup",
        "return peak * step / warmup",
        BOTH + "test_the_schedule",
    ),
    (
        "the port: the schedule ends one step early",
        "tinygrad_impl/trainer.py",
        "(step - warmup) / max(1, steps - warmup)",
        "(step - warmup) / max(1, steps - warmup - 1)",
        BOTH + "test_the_schedule",
    ),
    (
        "the reference: betas are not passed on",
        "torch_ref/train.py",
        "        betas=options.betas,\n",
        "",
        REFERENCE + "test_the_options_arrive_in_what_trains",
    ),
    (
        "the reference: clip is not passed on",
        "torch_ref/train.py",
        "        clip=options.clip,\n",
        "",
        REFERENCE + "test_the_options_arrive_in_what_trains",
    ),
    (
        "the reference: bfloat16 is not passed on",
        "torch_ref/train.py",
        'autocast=torch.bfloat16 if options.dtype == "bfloat16" else None',
        "autocast=None",
        REFERENCE + "test_the_options_arrive_in_what_trains",
    ),
    (
        "the reference: a resumed trainer begins with step 0's corrections",
        "torch_ref/train.py",
        'start.moments, start.state["step"])',
        "start.moments, 0)",
        REFERENCE + "test_a_resumed_trainer_has_the_state_of_the_checkpoint",
    ),
    (
        "the port: betas are not passed on",
        "tinygrad_impl/train.py",
        "        betas=options.betas,\n",
        "",
        PORT + "test_the_options_arrive_in_what_trains",
    ),
    (
        "the port: weight decay is not passed on",
        "tinygrad_impl/train.py",
        "        weight_decay=options.weight_decay,\n",
        "",
        PORT + "test_the_options_arrive_in_what_trains",
    ),
    (
        "the port: bfloat16 does not reach the validation",
        "tinygrad_impl/train.py",
        "Evaluator(trainer.model, trainer.backend)",
        "Evaluator(trainer.model)",
        PORT + "test_the_options_arrive_in_what_trains",
    ),
    (
        "the port: --kernels is not asked for",
        "tinygrad_impl/train.py",
        'choose(given["kernels"], start.config',
        'choose("auto", start.config',
        PORT + "test_the_kernels_are_chosen_by_what_was_asked_for",
    ),
    (
        "the port: the peak is always bfloat16's",
        "tinygrad_impl/train.py",
        'peak_flops(name, options.dtype == "bfloat16")',
        "peak_flops(name, True)",
        PORT + "test_the_peak_is_that_of_the_dtype",
    ),
    (
        "the port: batches weigh alike in a validation loss",
        "tinygrad_impl/evaluate.py",
        ".item() * count\n            tokens += count",
        ".item()\n            tokens += 1",
        TRAINERS + "test_evaluation_counts_every_token_once[tinygrad]",
    ),
    (
        "the reference: batches weigh alike in a validation loss",
        "torch_ref/trainer.py",
        "            total += loss.item() * count\n            tokens += count",
        "            total += loss.item()\n            tokens += 1",
        TRAINERS + "test_evaluation_counts_every_token_once[torch]",
    ),
    (
        "the reference: an infinite norm is no reason to leave the weights",
        "torch_ref/trainer.py",
        "if math.isfinite(self.loss + norm):",
        "if math.isfinite(self.loss):",
        TRAINERS + "test_what_is_not_finite_changes_nothing[torch-1-None-inf]",
    ),
    (
        "the port: an infinite loss is no reason to leave the weights",
        "tinygrad_impl/trainer.py",
        "if not math.isfinite(loss + norm):",
        "if not math.isfinite(norm):",
        TRAINERS + "test_what_is_not_finite_changes_nothing[tinygrad-1-inf-None]",
    ),
    (
        "the reference: vectors decay",
        "torch_ref/trainer.py",
        'if p.ndim != 2], "weight_decay": 0.0}',
        'if p.ndim != 2], "weight_decay": weight_decay}',
        REFERENCE + "test_the_options_arrive_in_what_trains",
    ),
    (
        "gradients of biases are one running sum in float32",
        "tinygrad_impl/formulas.py",
        "p.dtype.itemsize < 4",
        "p.dtype.itemsize < 5",
        "tinygrad_impl/tests/test_formulas.py::test_gradients_of_biases_are_sums_in_blocks_of_rows",
    ),
]
