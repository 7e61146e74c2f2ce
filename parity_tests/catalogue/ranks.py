"""Bugs on several ranks: what they compute together, and what they tell each other."""

from parity_tests.catalogue import Row

REFERENCE = "torch_ref/trainer.py"
OF_REFERENCE = "torch_ref/tests/test_ranks.py::test_"
SHARED_OUT = OF_REFERENCE + "two_ranks_are_one_process[variant0]"  # ZeRO-1, three micro-batches
ON_ALL = OF_REFERENCE + "two_ranks_are_one_process[variant1]"  # every rank does all of AdamW, one micro-batch

SENT = "[self.ranks.average(gradient, self.reduce_dtype) for gradient in gradients]"
ACCUMULATED = """        self._accumulate_own(batches)
        if self.ranks.size > 1:
            self._average()
        return self.loss
"""
# the last micro-batch's gradient of each rank stays its own, though the loss is the mean
BEFORE_THE_LAST = """        self._accumulate_own(batches)
        whole = [p.grad.clone() for p in self.parameters.values()]
        self._accumulate_own(batches[-1:])
        last = [p.grad / len(batches) for p in self.parameters.values()]
        for p, total, own in zip(self.parameters.values(), whole, last, strict=True):
            p.grad.copy_(total - own)
        if self.ranks.size > 1:
            self._average()
        for p, own in zip(self.parameters.values(), last, strict=True):
            p.grad += own
        return self.loss
"""

PLANTED: list[Row] = [
    ("the reference: gradients are not averaged over ranks", REFERENCE, SENT, "[]", SHARED_OUT),
    ("the reference: gradients are not averaged over ranks, without ZeRO-1", REFERENCE, SENT, "[]", ON_ALL),
    (
        "the reference: the sum over ranks for the mean",
        REFERENCE,
        "            work.wait()\n\n    def finite(",
        "            work.wait()\n        torch._foreach_mul_(gradients, self.ranks.size)\n\n    def finite(",
        SHARED_OUT,
    ),
    ("the reference: averaged before the last micro-batch only", REFERENCE, ACCUMULATED, BEFORE_THE_LAST, SHARED_OUT),
    (
        "the reference: clipped by the norm of the rank's own gradient",
        REFERENCE,
        "        if self.ranks.size > 1:\n",
        "        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)\n        if self.ranks.size > 1:\n",
        SHARED_OUT,
    ),
    (
        "the reference: the norm of the gradients whose AdamW the rank has",
        REFERENCE,
        "clip_grad_norm_(self.model.parameters(), self.clip)",
        "clip_grad_norm_(self.own.values(), self.clip)",
        SHARED_OUT,
    ),
    (
        "the reference: weights are not gathered for one step",
        REFERENCE,
        "            self._share({name: p.data for name, p in self.parameters.items()})",
        "            if self.steps != 3:\n"
        "                self._share({name: p.data for name, p in self.parameters.items()})",
        SHARED_OUT,
    ),
    (
        "the reference: gradients of parameters whose AdamW is elsewhere go on from the last step's",
        REFERENCE,
        "self.model.zero_grad()",
        "self.optimizer.zero_grad()",
        SHARED_OUT,
    ),
    (
        "the reference: moments are gathered in the wrong order",
        REFERENCE,
        "self._share({name: tensor})",
        "self._share({list(self.parameters)[-1 - list(self.parameters).index(name)]: tensor})",
        SHARED_OUT,
    ),
    (
        "the reference: moments that were gathered are lost where a run goes on",
        REFERENCE,
        "        for name, p in self.own.items():\n            self.optimizer.state[p] = {",
        "        for name, p in list(self.own.items())[1:]:\n            self.optimizer.state[p] = {",
        OF_REFERENCE + "two_jobs_have_the_same_bits_and_a_run_of_one_process_goes_on_in_two",
    ),
    (
        "the reference: where a run goes on, every rank holds all moments",
        REFERENCE,
        "        for name, p in self.own.items():\n            self.optimizer.state[p] = {",
        "        for name, p in self.parameters.items():\n            self.optimizer.state[p] = {",
        OF_REFERENCE + "two_jobs_have_the_same_bits_and_a_run_of_one_process_goes_on_in_two",
    ),
    (
        "the reference: every rank holds all moments",
        REFERENCE,
        "if not self.zero or self.owners[n] == ranks.rank}",
        "}",
        OF_REFERENCE + "what_a_ranks_adamw_holds[variant0]",
    ),
    (
        "the reference: the loss of rank 0 for all",
        REFERENCE,
        "float(self.ranks.numbers(self.loss).mean())",
        "float(self.ranks.numbers(self.loss)[0, 0])",
        SHARED_OUT,
    ),
    (
        "the reference: a rank's loss that is not a number is left out of the mean",
        REFERENCE,
        "float(self.ranks.numbers(self.loss).mean())",
        "float(np.nanmean(self.ranks.numbers(self.loss)))",
        OF_REFERENCE + "what_is_not_finite_on_one_rank_updates_none",
    ),
    (
        "the reference: what is not finite on one rank is told of all",
        REFERENCE,
        "        self._accumulate_own(batches)\n        norm",
        "        self.accumulate(batches)\n        norm",
        OF_REFERENCE + "what_is_not_finite_on_one_rank_updates_none",
    ),
    (
        "the reference: gradients are sent in float32 though bfloat16 was asked for",
        REFERENCE,
        "self.ranks.average(gradient, self.reduce_dtype)",
        "self.ranks.average(gradient)",
        OF_REFERENCE + "gradients_that_are_sent_in_bfloat16",
    ),
    (
        "the reference: ranks have equally many parameters, of whatever size",
        REFERENCE,
        "held[owner[name]] += sizes[name]",
        "held[owner[name]] += 1",
        OF_REFERENCE + "owners_have_about_as_many_elements_each",
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
        LOOP,
        "(REPEATED if ranks.size > 1 else 0.0)",
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
        '{"source code": source_digest()}',
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
]
