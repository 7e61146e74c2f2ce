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


def how_many(device: str, count: int, apart: bool) -> str:
    """What is measured: one GPU (on CPUs: process) by itself, all by themselves at once, or together."""
    unit = "GPU" if device == "CUDA" else "process"
    if count == 1:
        return f"one {unit} by itself"
    return f"{count} {unit}{'s' if device == 'CUDA' else 'es'} {'by themselves, all at once' if apart else 'together'}"


def unfinished(found: dict[str, Any]) -> str:
    """Which turns there are, where it is not all of them."""
    done = {name: row["turns"] for name, row in found["contenders"].items()}
    if all(turns == found["turns"] for turns in done.values()):
        return ""
    return f": cut off after {', '.join(f'{n} turns of {name}' for name, n in done.items())}, of {found['turns']} each"


def rates(what: str, found: dict[str, Any]) -> str:
    said = (f"{name} {row['tokens_per_second']:,.0f} tokens/s" for name, row in found["contenders"].items())
    return f"{what}: {', '.join(said)}"


def comparison(found: dict[str, Any], warm_up: int) -> str:
    """Every contender's figures, a column each."""
    rows = [
        ["", "tokens/s", "ms a step", "single steps, 10-90 %", "TFLOP/s", "of ceiling", "GB allocated", "GB held"],
        ["s to step 1", f"s to step {warm_up}", "kernels compiled", "loss of step 1", "tinygrad is"],
    ]
    columns = [rows[0] + rows[1]]
    for name, row in found["contenders"].items():
        ms, low, high = (row[f"step_seconds{which}"] * 1e3 for which in ("", "_10th", "_90th"))
        column = [name, f"{row['tokens_per_second']:,.0f}", f"{ms:.2f}", f"{low:.2f}-{high:.2f}"]
        column += [tera(row["flops"]), percent(row["share_of_ceiling"])]
        column += [f"{row[k] / 1e9:.2f}" if k in row else "-" for k in ("allocated_bytes", "held_bytes")]
        column += [f"{row['first_step_seconds']:.1f}", f"{row['first_steps_seconds']:.1f}", str(row["compiled"])]
        column += [f"{row['first_loss']:.4f}", f"{found['ratios'][name]:.3f} x" if name in found["ratios"] else ""]
        columns.append(column)
    return table([list(row) for row in zip(*columns, strict=True)])


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
    size, one = found["ranks"], found["one"]
    single, apart, together = (how_many(found["device"], n, a) for n, a in ((1, True), (size, True), (size, False)))
    columns = [["tokens/s", single, apart, f"  of {size} x one", together, f"  of {size} x one"]]
    columns[0] += ["  of by themselves", "GB allocated by one", "  together, at most", "  of one's"]
    for name, alone in one.get("contenders", {}).items():
        share = found["scaling"][name]
        all_at_once, row = (f.get("contenders", {}).get(name, {}) for f in (found.get("at_once", {}), found))
        figures = [f"{f['tokens_per_second']:,.0f}" if f else "-" for f in (alone, all_at_once, row)]
        shares = [f"{share[key]:.3f}" if key in share else "-" for key in ("at_once", "rate", "of_at_once", "memory")]
        sizes = [alone.get("allocated_bytes"), row.get("allocated_bytes_largest")]
        gb = ["-" if taken is None else f"{taken / 1e9:.2f}" for taken in sizes]
        column = [name, figures[0], figures[1], shares[0], figures[2], shares[1], shares[2], *gb, shares[3]]
        columns.append(column)
    return table([list(row) for row in zip(*columns, strict=True)])
