"""What a kernel says to begin while the one before it ends (graph.py; programmatic dependent launch)."""

import triton
import triton.language as tl


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel before this one has ended, and so all before that. What they wrote is read after this."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin_next(EARLY: tl.constexpr):
    """Lets the next kernel begin, once all programs of this one have come here or ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
