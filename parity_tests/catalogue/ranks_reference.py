"""Bugs of the reference on several ranks: what they compute together."""

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
