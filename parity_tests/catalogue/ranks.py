"""Bugs of several ranks: in what they send each other, in what each has of AdamW, and in the gate on them."""

from parity_tests.catalogue import Row

TRAINER, FLAT, SENDING = "tinygrad_impl/trainer.py", "tinygrad_impl/flat.py", "data/distributed.py"
GATE, AVERAGING = "parity_tests/gate.py", "parity_tests/averaging.py"
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
        "self.ranks.whole(memory_of(kept), keep)",
        "np.roll(self.ranks.whole(memory_of(kept), keep), bucket.size // 2)",
        TRAINING,
    ),
    (
        "ranks: weights are not gathered after one of the steps",
        TRAINER,
        "        if self.shards == 1:\n            return\n",
        "        if self.shards == 1 or self.steps == 3:\n            return\n",
        TRAINING,
    ),
    (
        "ranks: gradients are sent in float32 whatever was asked for",
        TRAINER,
        "send(self._sent[bucket], self.reduce_dtype)",
        "send(self._sent[bucket])",
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
