"""Bugs of several ranks: in what they send each other, in what each has of AdamW, and in the gate on them."""

from parity_tests.catalogue import Row

TRAINER, FLAT, SENDING = "tinygrad_impl/trainer.py", "tinygrad_impl/flat.py", "data/distributed.py"
GATE, AVERAGING = "parity_tests/gate.py", "parity_tests/averaging.py"
ADAMW = 'self._adamw(self._input("scalars", np.array(scalars, self.dtype)))'
TRAINING = "parity_tests/test_ranks.py::test_two_ranks_are_one_process"
SENT = "data/tests/test_ranks.py::test_what_ranks_tell_each_other"
IN_AVERAGING = "parity_tests/test_averaging.py::test_"

PLANTED: list[Row] = [
    (
        "ranks: gradients are not averaged",
        TRAINER,
        "        if send:\n            for bucket",
        "        if False:\n            for bucket",
        TRAINING,
    ),
    (
        "ranks: the sum of gradients for their mean, of parts",
        SENDING,
        "scatter(own, sent, op=dist.ReduceOp.AVG",
        "scatter(own, sent, op=dist.ReduceOp.SUM",
        SENT,
    ),
    (
        "ranks: the sum of gradients for their mean",
        SENDING,
        "dist.all_reduce(sent, op=dist.ReduceOp.AVG",
        "dist.all_reduce(sent, op=dist.ReduceOp.SUM",
        SENT,
    ),
    (
        "ranks: gradients are averaged before the last micro-batch only",
        TRAINER,
        "and i == len(batches):",
        "and i == 1:",
        TRAINING,
    ),
    (
        "ranks: the norm of the part of a rank",
        TRAINER,
        "squares[: self.shards, 1:].sum()",
        "squares[self.rank, 1:].sum()",
        TRAINING,
    ),
    (
        "ranks: the loss of rank 0 is reported for all",
        TRAINER,
        "loss = float(squares[:, 0].mean())",
        "loss = float(squares[0, 0])",
        TRAINING,
    ),
    (
        "ranks: a part of AdamW begins one element late",
        FLAT,
        "begin = rank * size",
        "begin = rank * size + (rank > 0)",
        TRAINING,
    ),
    (
        "ranks: moments are gathered in the wrong order",
        TRAINER,
        "self.ranks.gather_parts(memory_of(kept), keep)",
        "np.roll(self.ranks.gather_parts(memory_of(kept), keep), bucket.size // 2)",
        TRAINING,
    ),
    (
        "ranks: weights are not gathered after one of the steps",
        TRAINER,
        f"        {ADAMW}\n",
        "        weights = self.exchange.weights\n"
        '        self.exchange.weights = __import__("copy").deepcopy(weights) if self.steps == 3 else weights\n'
        f"        {ADAMW}\n        self.exchange.weights = weights\n",
        TRAINING,
    ),
    (
        "ranks: gradients are sent in float32 whatever was asked for",
        "tinygrad_impl/exchange.py",
        "send(self.gradients[bucket], self.dtype)",
        "send(self.gradients[bucket])",
        "parity_tests/test_ranks.py::test_gradients_sent_as_bfloat16",
    ),
    (
        "ranks: the gate does not look at the ranks' windows",
        GATE,
        "wrong_windows(start)]",
        "None]",
        "parity_tests/test_ranks.py::test_the_gate_looks_at_the_windows",
    ),
    (
        "ranks: a run that goes on is not proven again",
        GATE,
        "if attempt() else None",
        "if True else None",
        "parity_tests/test_ranks.py::test_the_gate",
    ),
    (
        "ranks: any certificate will do for ranks that are started again",
        GATE,
        "if any(found.get(name) != value for name, value in same.items()):",
        "if False:",
        "parity_tests/test_ranks.py::test_ranks_that_are_started_again_were_proven",
    ),
    (
        "ranks: the gate proves what each rank has by itself",
        GATE,
        "            if ranks.size == 1:\n                gradients",
        "            if ranks.size > 0:\n                gradients",
        "parity_tests/test_ranks.py::test_the_gate",
    ),
    (
        "ranks: only the first rank's rows count",
        AVERAGING,
        "for found in by_rank if name in found])",
        "for found in by_rank[:1] if name in found] or [by_rank[1][name]])",
        f"{IN_AVERAGING}the_worst_rank_counts",
    ),
    (
        "ranks: bfloat16 rounds one bit more",
        AVERAGING,
        "SENT = 2.0**-8",
        "SENT = 2.0**-7",
        f"{IN_AVERAGING}what_roundings_of_what_is_sent_may_do",
    ),
    (
        "ranks: the mean's size in place of the sizes of what is sent",
        AVERAGING,
        "(norms[name] / self.size) ** 2",
        "float(torch.as_tensor(value).norm()) ** 2",
        f"{IN_AVERAGING}what_roundings_of_what_is_sent_may_do",
    ),
]

# Training on several ranks: data/runs
START, LOOP = "data/runs/start.py", "data/runs/loop.py"
OF_RUNS = "data/runs/tests/test_ranks.py::test_"

PLANTED += [
    (
        "rank 0's validation loss counts for all",
        LOOP,
        "total, tokens = ranks.numbers(*own).sum(axis=0).tolist()",
        "total, tokens = ranks.numbers(*own)[0].tolist()",
        OF_RUNS + "the_files_are_those_of_one_process",
    ),
    (
        "every rank validates on all batches",
        "data/text/loader.py",
        "range(rank * step, targets, world_size * step)",
        "range(0, targets, step)",
        OF_RUNS + "validation_is_shared_out",
    ),
    (
        "all ranks train on the windows of the first",
        "data/text/loader.py",
        "first = self.position + self.rank * self.batch_size",
        "first = self.position",
        OF_RUNS + "ranks_share_what_one_process_would_read",
    ),
    (
        "one rank's order of the data is shifted",
        "data/text/loader.py",
        "first = self.position + self.rank * self.batch_size",
        "first = self.position + self.rank * (self.batch_size + 1)",
        OF_RUNS + "ranks_share_what_one_process_would_read",
    ),
    (
        "each rank takes the whole update's windows",
        START,
        "share = share_of_a_rank(options, ranks.size)",
        "share = options.grad_accum * options.batch_size",
        OF_RUNS + "ranks_share_what_one_process_would_read",
    ),
    (
        "another rank draws its order of data from another seed",
        START,
        "share, options.seq_len, options.seed, ranks.rank",
        "share, options.seq_len, options.seed + ranks.rank, ranks.rank",
        OF_RUNS + "ranks_share_what_one_process_would_read",
    ),
    (
        "what stops one rank is not told to the others",
        LOOP,
        "asked, damaged, unsaved = said.max(axis=0)",
        "asked, damaged, unsaved = said[0]",
        OF_RUNS + "all_stop_after_the_same_step_and_go_on",
    ),
    (
        "a signal that torchrun passes on is a second request",
        "data/runs/stopping.py",
        "(REPEATED if requests.several else 0.0)",
        "0.0",
        OF_RUNS + "all_stop_after_the_same_step_and_go_on",
    ),
    (
        "a rank whose loss is a number is named as the culprit",
        LOOP,
        "in enumerate(rows) if not right]",
        "in enumerate(rows) if right]",
        OF_RUNS + "the_rank_that_is_not_finite_is_named",
    ),
    (
        "ranks' weights are not compared",
        "data/runs/sameness.py",
        'refuse_differences(ranks, sums, "copy',
        'refuse_differences(ranks, {}, "copy',
        OF_RUNS + "what_one_rank_has_ends_all[weights]",
    ),
    (
        "ranks' options are not compared",
        "data/runs/sameness.py",
        'refuse_differences(ranks, options, "give all ranks the same options")',
        "pass",
        OF_RUNS + "what_one_rank_has_ends_all[seed]",
    ),
    (
        "ranks' versions are not compared",
        "data/runs/sameness.py",
        'refuse_differences(ranks, versions(), "install',
        'refuse_differences(ranks, {}, "install',
        OF_RUNS + "what_one_rank_has_ends_all[versions]",
    ),
    (
        "ranks' source code is not compared",
        "data/runs/sameness.py",
        '{"the source code": source_digest()}',
        "{}",
        OF_RUNS + "what_one_rank_has_ends_all[source]",
    ),
    (
        "run.json does not tell of ranks",
        "data/runs/recorder.py",
        "            **start.machines,\n",
        "",
        OF_RUNS + "run_json_tells_of_ranks",
    ),
    (
        "every rank writes a sample",
        "data/runs/recorder.py",
        "        if not self.writes:\n            return\n        step, settings",
        "        step, settings",
        OF_RUNS + "rank_0_alone_speaks_and_samples",
    ),
    (
        "damage that another rank has found is overlooked",
        LOOP,
        "            if damaged:\n                start.verification.check_all()\n",
        "",
        OF_RUNS + "damaged_data_ends_all",
    ),
    (
        "micro-batches that do not share equally are rounded down",
        "data/runs/global_batch.py",
        "if windows % size == 0:",
        "if windows >= size:",
        OF_RUNS + "ranks_that_cannot_share_equally",
    ),
    (
        "bench: the peer's ranks train each by itself",
        "torch_ref/bench_worker.py",
        "        if ranks:  #",
        "        if ranks and compile:  #",
        "torch_ref/tests/test_bench_worker.py::test_two_ranks_do_the_work_of_one_process",
    ),
]
