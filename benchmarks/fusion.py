"""How tight CROWN-IBP's two losses are: the fused one (one backward row) beside the one of all K-1 rows.

    python benchmarks/fusion.py [results/fusion.md]

Neither is below the other by theorem; both are at least the loss that an attack reaches. Mean losses on MNIST-5k test
images at eps 0.1: of untrained networks, and of networks trained by the fused loss for a few epochs. A minute or two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers import LinfBall, fused_cross_entropy, margin_lower_bounds, pgd  # noqa: E402
from certifiers.bounds import worst_case_cross_entropy  # noqa: E402
from certprune import build_model, build_objective, load_data  # noqa: E402
from certprune.initialisation import initialise  # noqa: E402

NOTE = """
Mean losses on 200 MNIST-5k test images at eps 0.1. Neither bound is below the other by theorem; both are at least
what an attack (PGD, 40 steps, 2 restarts) reaches.
"""
EPS, IMAGES, EPOCHS, BATCH = 0.1, 200, 8, 128


def train(model, data) -> None:
    objective = build_objective({"name": "crown_ibp", "eps": EPS, "beta": {"end": 1.0}, "ramp": {"end": 0.5}})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = len(data.train.y) // BATCH
    for epoch in range(EPOCHS):
        order = torch.randperm(len(data.train.y))
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            progress = (epoch * steps + step) / (EPOCHS * steps)
            objective(model, data.train.x[chosen], data.train.y[chosen], progress)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 8.0)
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    data = load_data("mnist-5k")
    x, y, threat = data.test.x[:IMAGES], data.test.y[:IMAGES], LinfBall(EPS)
    headings = ("Network", "First weights", "Epochs", "Attacked", "Fused", "K-1 rows", "Images where fused is lower")
    table, lines = Table(*headings), [" | ".join(headings), " | ".join(["---"] * len(headings))]
    for name, start, trained in (
        ("cnn_small", "default", False),
        ("cnn_small", "ibp", False),
        ("cnn_small", "ibp", True),
        ("cnn_large", "default", False),
        ("cnn_large", "ibp", False),
    ):
        model = build_model(name, data.shape, data.classes)
        initialise(model, start, 0)
        if trained:
            train(model, data)
        model.eval()
        attacked = pgd(model, x, y, threat, steps=40, restarts=2)
        with torch.no_grad():
            reached = F.cross_entropy(model(attacked), y)
            fused = fused_cross_entropy(model, x, y, threat)
            rows = worst_case_cross_entropy(margin_lower_bounds(model, x, y, threat, "crown-ibp"), y)
        figures = [f"{v.mean().item():.4g}" for v in (reached, fused, rows)]
        row = (name, start, str(EPOCHS if trained else 0), *figures, f"{(fused < rows).sum().item()} / {IMAGES}")
        table.add_row(*row)
        lines.append(" | ".join(row))
    Console().print(table)
    if len(sys.argv) > 1:
        title = "# CROWN-IBP's fused loss beside its K-1 rows"
        body = "\n".join(f"| {line} |" for line in lines)
        Path(sys.argv[1]).write_text(f"{title}\n\nMade by `python {' '.join(sys.argv)}`.\n{NOTE}\n{body}\n")


if __name__ == "__main__":
    main()
