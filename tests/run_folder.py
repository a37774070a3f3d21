"""A made-up run folder in the layout that training and certification write, for tests of everything that reads one.

Verdicts are drawn from a seeded difficulty of each image, so that the networks agree on which images are hard, as
real ones do; the numbers are plausible and mean nothing.
"""

import json
import math
import random
from pathlib import Path

import yaml

from certifiers.verdict import Ledger, Status, Verdict

LAYERS = (("conv1", 256), ("conv2", 8192), ("fc1", 156800), ("fc2", 1000))
METHODS = ("ibp", "crown-ibp", "crown")
SKILL = {
    "dense": 0.88,
    "score-erk-0.95": 0.87,
    "score-erk-0.99": 0.80,
    "magnitude-erk-0.95": 0.855,
    "magnitude-erk-0.99": 0.70,
}


def config_of(name: str = "demo", seed: int = 0, eps: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15)) -> dict:
    variants = [{"dense": True, "name": "dense"}]
    for criterion in ("score", "magnitude"):
        for sparsity in (0.95, 0.99):
            name_ = f"{criterion}-erk-{sparsity:g}"
            variants.append({"criterion": criterion, "sparsity": sparsity, "budget": "erk", "name": name_})
    stage = {"batch_size": 128, "optimizer": {"name": "adam", "lr": 1e-3}, "schedule": {"name": "cosine"}}
    return {
        "name": name,
        "seed": seed,
        "output": f"runs/{name}",
        "device": "auto",
        "threads": 2,
        "data": {"name": "mnist-5k", "validation": 0.1},
        "model": {"name": "cnn_small"},
        "objective": {"name": "crown_ibp", "eps": 0.1},
        "initialisation": "ibp",
        "pretrain": {"epochs": 12, "ramp": True, **stage},
        "prune": {"epochs": 4, **stage},
        "finetune": {"epochs": 6, **stage},
        "variants": variants,
        "certify": {"methods": list(METHODS), "eps": list(eps), "split": "test", "count": 500},
    }


def write_run(folder: Path, *, name: str = "demo", seed: int = 0, count: int = 500, **config) -> Path:
    """Write a finished run to ``folder``; ``config`` is passed to :func:`config_of`."""
    config = config_of(name, seed, **config)
    config["certify"]["count"] = count
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "provenance.json").write_text(json.dumps(_provenance(config)))
    dice = random.Random(seed)
    write_stage(folder / "pretrain", None, 12, 0.85, dice, ramp=True)
    for plan in config["variants"]:
        variant, skill = plan["name"], SKILL[plan["name"]] + dice.uniform(-0.01, 0.01)
        sparsity = plan.get("sparsity", 0.0)
        trained = plan.get("criterion") == "score"
        if trained:
            write_stage(folder / variant / "prune", sparsity, 4, skill - 0.1, dice)
        write_stage(folder / variant / "finetune", sparsity, 6 if trained else 10, skill, dice)
        for eps in config["certify"]["eps"]:
            verdicts = _verdicts(skill, eps, count, seed)
            write_ledger(folder, variant, eps, verdicts, sparsity=sparsity, seed=seed)
    return folder


def write_stage(folder: Path, sparsity: float | None, epochs: int, skill: float, dice, ramp: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows, best = [], math.inf
    for epoch in range(1, epochs + 1):
        left = math.exp(-3.0 * epoch / epochs)
        eps = 0.1 * min(1.0, epoch / (0.7 * epochs)) if ramp else 0.1
        certified = max(0.0, skill - 0.08 - 0.5 * left + dice.uniform(-0.01, 0.01))
        loss = 0.45 + 1.6 * left + (0.88 - skill) + dice.uniform(-0.02, 0.02)
        best, selected = min(best, loss), loss <= best
        clean = skill + 0.06 - 0.2 * left
        rows.append(
            {
                "epoch": epoch,
                "step": 32 * epoch,
                "lr": 1e-3,
                "train": {"loss": loss * (0.7 + 0.3 * eps / 0.1), "clean_loss": 0.5 * loss, "eps": eps},
                "validation": {"loss": loss, "clean_accuracy": clean, "certified_accuracy": certified},
                "seconds": 2.1,
                "selected": selected,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = [row for row in rows if row["selected"]][-1]
    record = {
        "stage": folder.name,
        "variant": folder.parent.name,
        "epochs": epochs,
        "selected_epoch": chosen["epoch"],
        "seconds": 2.1 * epochs,
        "sparsity": sparsity_record(sparsity or 0.0),
        "validation": chosen["validation"],
    }
    (folder / "stage.json").write_text(json.dumps(record))


def sparsity_record(sparsity: float) -> dict:
    """Kept weights per layer: dense, or small layers denser than large ones as ERK does."""
    weights = sum(size for _, size in LAYERS)
    kept = {name: size for name, size in LAYERS}
    if sparsity:
        total = round((1 - sparsity) * weights)
        kept = {"conv1": 256, "conv2": min(8192, total // 5), "fc2": min(1000, total // 8)}
        kept["conv1"] = min(256, total // 10)
        kept["fc1"] = total - sum(kept.values())
    layers = [{"name": name, "weights": size, "kept": kept[name]} for name, size in LAYERS]
    held = sum(kept.values())
    return {"total": 1 - held / weights, "kept": held, "weights": weights, "layers": layers}


def write_ledger(folder: Path, variant: str, eps: float, verdicts: list[Verdict], **notes) -> Path:
    header = {
        "model": f"{variant}-{notes.get('seed', 0)}".ljust(64, "0"),
        "data": "mnist-5k",
        "split": "test",
        "eps": eps,
        "norm": "linf",
    }
    header |= {"method": "+".join(METHODS), "attack_steps": 40, "attack_restarts": 1, "variant": variant, **notes}
    path = folder / "certificates" / variant / f"eps-{eps:g}.jsonl"
    with Ledger(path, header) as ledger:
        ledger.append(verdicts)
    return path


def verdict(index: int, status: Status | str, eps: float, method: str, norm: str = "linf") -> Verdict:
    status = Status(status)
    prediction = 1 if status is Status.misclassified else 0
    margin = 0.5 if status is Status.certified else None
    return Verdict(index, 0, prediction, status, eps, norm, method, margin, 0.01)


def _verdicts(skill: float, eps: float, count: int, seed: int) -> list[Verdict]:
    images = random.Random(7)
    noise = random.Random(f"{seed} {skill}")
    found = []
    for index in range(count):
        ease = 0.8 * images.random() + 0.2 * noise.random()  # small: easy
        clean, broken, proven = skill + 0.08, skill + 0.06 - 0.9 * eps, skill + 0.05 - 1.6 * eps
        if ease > clean:
            found.append(verdict(index, Status.misclassified, eps, "clean"))
        elif ease > broken:
            found.append(verdict(index, Status.falsified, eps, "attack"))
        elif ease > proven:
            found.append(verdict(index, Status.unknown, eps, "crown"))
        else:
            slack = (proven - ease) / (0.3 * (1 + 10 * eps) * proven)
            method = METHODS[0] if slack > 1 else METHODS[1] if slack > 0.12 else METHODS[2]
            found.append(verdict(index, Status.certified, eps, method))
    return found


def _provenance(config: dict) -> dict:
    stages = {"pretrain": {"seconds": 25.2, "epochs": 12}}
    for plan in config["variants"]:
        stages[f"{plan['name']}/finetune"] = {"seconds": 21.0, "epochs": 10}
    return {
        "started": "2025-01-01T12:00:00+00:00",
        "command": "python run.py run configs/demo.yaml",
        "seed": config["seed"],
        "python": "3.12.3",
        "torch": "2.13.0",
        "packages": {"certprune": "0.1.0", "torch": "2.13.0", "numpy": "2.3.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": {"system": "Linux x86_64", "processor": "made-up processor", "cores": 2, "memory_gb": 7.8},
        "threads": 2,
        "device": "cpu",
        "stages": stages,
        "resumed": [{"time": "2025-01-01T12:30:00+00:00", "command": "python run.py run configs/demo.yaml"}],
    }
