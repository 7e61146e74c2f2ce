"""Draws overview.png, the README's picture: the losses of curves.png, and the speeds that FIGURES.md has."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
SPEEDS = {  # thousand tokens a second; FIGURES.md, "Training speed", 32 x 1024 tokens
    "H200": {"tinygrad": 532.709, "torch.compile": 496.007, "PyTorch, eager": 392.848},
}
COLOURS = {"tinygrad": "tab:orange", "torch.compile": "tab:blue", "PyTorch, eager": "tab:gray"}

losses = plt.imread(HERE / "curves.png")[:, :490]  # its left half
height, width, _ = losses.shape
figure = plt.figure(figsize=((width + 510) / 100, height / 100), dpi=100)
figure.figimage(losses, 0, 0)
axes = figure.add_axes((0.65, 0.16, 0.335, 0.8))
labels, y = [], 0.0
for gpu, speeds in SPEEDS.items():
    for name, speed in speeds.items():
        axes.barh(-y, speed, 0.8, color=COLOURS[name])
        axes.text(speed - 8, -y, f"{speed:.0f}", ha="right", va="center", color="white")
        labels.append((-y, f"{name}, {gpu}"))
        y += 1
    y += 0.5
axes.set_yticks(*zip(*labels, strict=True), fontsize=8)
axes.set_xlabel("thousand tokens a second, GPT-2 124M, bfloat16")
axes.set_xticks(np.arange(0, 601, 100))
axes.grid(axis="x", alpha=0.3)
axes.set_axisbelow(True)
figure.savefig(HERE / "overview.png")
