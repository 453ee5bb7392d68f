"""Draws the pictures of the documentation: python docs/figures.py

Each is written twice into docs/_static, for light and for dark pages. Takes about half a minute.
"""

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm

matplotlib.use("svg")
import matplotlib.pyplot as plt

STATIC = Path(__file__).parent / "_static"
CLASSES = {"light": ("#0b6e99", "#d1495b"), "dark": ("#6cc4ee", "#ff8a9a")}
INK = {"light": "#33363b", "dark": "#d5d8dc"}
ACCENT = {"light": "#2f7d4f", "dark": "#7fd6a2"}


def annuli(n, generator):
    """Draws n points of a disc inside a ring, and their classes."""
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    y = (torch.arange(n) % 2).long()
    radius = torch.where(
        y == 0, torch.rand(n, generator=generator) * 0.5, 1 + 0.35 * torch.rand(n, generator=generator)
    )
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def train(weight, iterations, seed=2):
    """Trains a field in three dimensions (one of them added) on the ring and the disc, by eq. (13)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, y = annuli(256, generator)
    x = torch.cat([x, torch.zeros(len(x), 1)], 1)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3))
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 26), bounds=(0.04, 1.0))
    span.t_f.requires_grad_(weight > 0)
    optimizer = torch.optim.Adam(tm.parameter_groups(span, lr=0.02, span_lr=0.004))
    for _ in range(iterations):
        _, sol = span(x)
        loss = F.cross_entropy(sol[-1][:, :2], y) + weight * span.duration
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        span.clip_()
    with torch.no_grad():
        fine = torch.linspace(0, 1, 201)
        sol = span.node(x, fine)[1]
        profile = torch.stack([F.cross_entropy(z[:, :2], y) for z in sol])
    return span.t_f.item(), fine, sol, profile, y


def depth(theme):
    """Draws the idea of the paper's figure 2: the interval is the depth, and there are two ways to find it."""
    ink, accent, colours = INK[theme], ACCENT[theme], CLASSES[theme]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), width_ratios=[1, 1, 1.35])
    for axis, run, title in zip(
        axes, (VANILLA, SHORT), ("trained over [0, 1]", "trained with a price on time"), strict=False
    ):
        t_f, times, sol, _, y = run
        last = int((times <= t_f + 1e-6).sum())
        for i in range(40):
            path = sol[:last, i]
            axis.plot(path[:, 0], path[:, 1], color=colours[y[i]], lw=0.9, alpha=0.75)
            axis.plot(*path[0, :2], ".", ms=3, color=ink, alpha=0.7)
            axis.plot(*path[-1, :2], "o", ms=3.5, color=colours[y[i]])
        axis.set_title(f"{title}\n$t_f$ = {t_f:.2f}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("state $z(t)$, first two dimensions", fontsize=8.5)
    axis = axes[2]
    for run, style, name in ((VANILLA, "--", "trained over [0, 1]"), (SHORT, "-", "with a price on time")):
        t_f, times, _, profile, _ = run
        inside = times <= t_f + 1e-6
        axis.semilogy(times[inside], profile[inside], style, color=colours[0], label=name)
        axis.plot(times[inside][-1], profile[inside][-1], "o", color=colours[0], ms=5)
    threshold, t_f = 2e-2, SHORT[0]
    axis.axhline(threshold, color=ink, lw=0.8, ls=":")
    axis.text(1.0, threshold * 1.15, "good enough", fontsize=8, color=ink, ha="right", va="bottom")
    axis.annotate("", (t_f + 0.03, 4.2), (0.97, 4.2), arrowprops={"arrowstyle": "->", "color": accent, "lw": 1.6})
    axis.text(0.56, 5.0, "approach 1: start long, put a price on time", fontsize=8, color=accent, ha="center")
    axis.annotate("", (t_f - 0.01, 1.7), (0.0, 1.7), arrowprops={"arrowstyle": "->", "color": accent, "lw": 1.6})
    axis.text(t_f + 0.03, 1.7, "approach 2: start short, grow", fontsize=8, color=accent, ha="left", va="center")
    axis.set_ylim(top=10)
    axis.set_xlabel("time $t$, the depth of the model", fontsize=8.5)
    axis.set_title("loss of the state at time $t$", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def rescaling(theme):
    """Draws (f, t_f) and (c f, t_f / c) on one path, of which equal steps in time cover different lengths."""
    ink, accent, colours = INK[theme], ACCENT[theme], CLASSES[theme]
    rotation = torch.tensor([[-0.35, -4.0], [4.0, -0.35]], dtype=torch.float64)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def exact(t):
        return torch.stack([torch.linalg.matrix_exp(rotation * s) @ x for s in t])

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3))
    true = exact(torch.linspace(0, 1, 200, dtype=torch.float64))
    for axis, (c, steps) in zip(axes, ((1, 20), (5, 4), (10, 2)), strict=True):
        z, points, h = x, [x], 0.05  # the same step size in time for all three
        for _ in range(steps):
            f = lambda y: c * rotation @ y  # noqa: B023, E731
            k1 = f(z)
            k2 = f(z + h / 2 * k1)
            k3 = f(z + h / 2 * k2)
            k4 = f(z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            points.append(z)
        points = torch.stack(points)
        error = ((points[-1] - true[-1]).norm() / true[-1].norm()).item()
        axis.plot(true[:, 0], true[:, 1], color=ink, lw=0.9, alpha=0.6)
        axis.plot(points[:, 0], points[:, 1], "o", color=colours[0], ms=4)
        axis.plot(*true[-1], "x", color=accent, ms=9, mew=2)
        name = "f" if c == 1 else f"{c} f"
        axis.set_title(f"field ${name}$, $t_f$ = {1 / c:g}\n{4 * steps} evaluations, error {error:.0e}", fontsize=10)
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def save(name, draw):
    """Draws a picture for light and for dark pages, and writes both."""
    for theme in ("light", "dark"):
        ink = INK[theme]
        settings = {
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "axes.titlecolor": ink,
            "xtick.color": ink, "ytick.color": ink, "xtick.labelsize": 8, "ytick.labelsize": 8,
            "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
            "axes.spines.top": False, "axes.spines.right": False,
            "svg.hashsalt": "torchdyn_mintime", "font.size": 9.5,
        }  # fmt: skip
        with plt.rc_context(settings):
            figure = draw(theme)
            figure.tight_layout()
            figure.savefig(STATIC / f"{name}-{theme}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    STATIC.mkdir(exist_ok=True)
    VANILLA = train(weight=0.0, iterations=150)
    SHORT = train(weight=0.5, iterations=400)
    print(
        f"t_f {VANILLA[0]:.2f} and {SHORT[0]:.2f}, losses {VANILLA[3][-1]:.3f} and {SHORT[3][int(SHORT[0] * 200)]:.3f}"
    )
    save("depth", depth)
    save("rescaling", rescaling)
