"""Draws overview.png, the README's picture: curves.png (losses and their differences) over the speeds of FIGURES.md."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
# thousand tokens a second on an H200; FIGURES.md, "Training speed", 32 x 1024 tokens
SPEEDS = {"tinygrad": 566.963, "torch.compile": 490.280}
COLOURS = {"tinygrad": "tab:orange", "torch.compile": "tab:blue"}
BARS = 150  # pixels of the lower part

curves = plt.imread(HERE / "curves.png")
height, width, _ = curves.shape
figure = plt.figure(figsize=(width / 100, (height + BARS) / 100), dpi=100)
figure.figimage(curves, 0, BARS)
axes = figure.add_axes((0.13, 50 / (height + BARS), 0.855, (BARS - 60) / (height + BARS)))
for y, (name, speed) in enumerate(SPEEDS.items()):
    axes.barh(-y, speed, 0.8, color=COLOURS[name])
    axes.text(speed + 5, -y, f"{speed:.0f}", va="center", weight="bold")
axes.set_yticks(-np.arange(len(SPEEDS)), SPEEDS)
axes.set_xlabel("thousand tokens a second in training, GPT-2 124M, bfloat16, one H200")
axes.set_xticks(np.arange(0, 601, 100))
axes.grid(axis="x", alpha=0.3)
axes.set_axisbelow(True)
figure.savefig(HERE / "overview.png")
