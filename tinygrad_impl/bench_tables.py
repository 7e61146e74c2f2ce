"""What tinygrad_impl.bench prints of its figures, as tables."""

from typing import Any

SHOWN = 25  # kernels of a profile


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they have to be; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def tera(value: float) -> str:
    return f"{value / 1e12:.3g}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def comparison(found: dict[str, Any], warm_up: int) -> str:
    """Every contender's figures, a row each."""
    rows = [["", "tok/s", "ms a step", "(10-90 %)", "TFLOP/s", "of ceiling", "GB allocated", "GB held", "s to step 1"]]
    rows[0] += [f"to {warm_up}", "compiled", "loss", "tinygrad is"]
    for name, row in found["contenders"].items():
        ms, low, high = (row[f"step_seconds{which}"] * 1e3 for which in ("", "_10th", "_90th"))
        rows.append([name, f"{row['tokens_per_second']:,.0f}", f"{ms:.2f}", f"{low:.2f}-{high:.2f}"])
        rows[-1] += [tera(row["flops"]), percent(row["share_of_ceiling"])]
        rows[-1] += [f"{row[k] / 1e9:.2f}" if k in row else "-" for k in ("allocated_bytes", "held_bytes")]
        rows[-1] += [f"{row['first_step_seconds']:.1f}", f"{row['first_steps_seconds']:.1f}", str(row["compiled"])]
        rows[-1] += [f"{row['first_loss']:.4f}", f"{found['ratios'].get(name, 1.0):.3f} x"]
    return table(rows)


def profile(found: dict[str, Any]) -> str:
    kernels = found["profile"]
    rows = [["kernel", "count", "ms", "share", "TFLOP/s", "GB/s", "of roofline"]]
    for row in kernels[:SHOWN]:
        rates = [tera(row["flops"] / row["seconds"]), f"{row['bytes'] / row['seconds'] / 1e9:,.0f}"]
        ms = f"{row['seconds'] * 1e3:.3f}"
        rows.append([row["name"][:48], str(row["count"]), ms, percent(row["share"]), *rates])
        rows[-1].append(percent(row["share_of_roofline"]))
    rest, total = kernels[SHOWN:], sum(row["seconds"] for row in kernels)
    if rest:
        seconds = sum(row["seconds"] for row in rest)
        count = str(sum(row["count"] for row in rest))
        rows.append([f"{len(rest)} others", count, f"{seconds * 1e3:.3f}", percent(seconds / total), "", "", ""])
    count, step = sum(row["count"] for row in kernels), found["contenders"]["tinygrad"]["step_seconds"]
    return f"{table(rows)}\n{count} kernels, {total * 1e3:.2f} ms one by one; a whole step takes {step * 1e3:.2f} ms"


def scaling(found: dict[str, Any]) -> str:
    """What several GPUs (on CPUs: processes) reach beside one, and the memory that each of them takes."""
    units = f"{found['ranks']} {'GPUs' if found['device'] == 'CUDA' else 'processes'}"
    rows = [["", f"tok/s on {units}", "on 1", f"of {found['ranks']} x 1", "tinygrad is", "on 1 it is"]]
    rows[0] += ["GB allocated on rank 0", "at most", "on 1", "of that"]
    one = found["one"]
    for name, row in found["contenders"].items():
        alone, share = one["contenders"][name], found["scaling"][name]
        rows.append([name, f"{row['tokens_per_second']:,.0f}", f"{alone['tokens_per_second']:,.0f}"])
        rows[-1] += [f"{share['rate']:.3f}", *(f"{f['ratios'].get(name, 1.0):.3f} x" for f in (found, one))]
        if "memory" in share:
            sizes = row["allocated_bytes"], row["allocated_bytes_largest"], alone["allocated_bytes"]
            rows[-1] += [*(f"{size / 1e9:.2f}" for size in sizes), f"{share['memory']:.2f}"]
        else:
            rows[-1] += ["-"] * 4
    return table(rows)
