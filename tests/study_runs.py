"""Made-up runs for the tests of studies: of each network, how many of 60 images are certified is said outright."""

from __future__ import annotations

import json
import random

import yaml

from certprune.reports import read_run
from tests.run_folder import config_of, sparsity_record, verdict, write_ledger

IMAGES = 60
PLANS = {
    "dense": {"dense": True},
    "score": {"criterion": "score", "budget": "uniform", "sparsity": 0.99},
    "score-erk": {"criterion": "score", "budget": "erk", "sparsity": 0.99},
    "magnitude": {"criterion": "magnitude", "budget": "uniform", "sparsity": 0.99},
    "global": {"criterion": "magnitude", "budget": "global", "sparsity": 0.99, "schedule": "gradual"},
    "joint": {"criterion": "joint", "budget": "global", "sparsity": 0.99, "schedule": "gradual"},
}
CERTIFIED = {"dense": 50, "score": 20, "score-erk": 40, "magnitude": 15, "global": 38, "joint": 45}


def write(folder, nets, seed=0, *, plans=None, name="study", validation=None, kept=None, stop=None, **config):
    """A run; ``nets``: how many of the 60 images each network certifies, ``validation``: in % there.

    ``kept``: its weights, if others than its sparsity says. ``stop``: a network that is certified on ten images only.
    """
    plans = {key: {**plan, "name": key} for key, plan in (plans or PLANS).items()}
    config = {**config_of(name, seed, eps=(0.1,)), "variants": list(plans.values()), **config}
    config["certify"]["count"] = IMAGES
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"stages": {"pretrain": {"seconds": 36.0}}}))
    _stage(folder / "pretrain", 0.0, 0.5)
    dice = random.Random(seed)
    for key, certified in nets.items():
        size = sparsity_record(plans[key].get("sparsity", 0.0))
        size = {**size, "kept": kept, "weights": kept} if kept else size
        _stage(folder / key / "finetune", size, (validation or {}).get(key, certified) / 100)
        order = list(range(IMAGES))
        dice.shuffle(order)
        words = ["certified"] * certified + ["falsified"] * 3 + ["misclassified"] * IMAGES
        rows = [verdict(i, word, 0.1, "ibp") for i, word in zip(order, words, strict=False)]
        write_ledger(folder, key, 0.1, rows[: 10 if key == stop else None], seed=seed)
    return read_run(folder)


def _stage(folder, size, certified):
    folder.mkdir(parents=True)
    record = {"epochs": 4, "selected_epoch": 2, "seconds": 60.0, "sparsity": size or sparsity_record(0.0)}
    (folder / "stage.json").write_text(json.dumps(record))
    epochs = [{"epoch": epoch, "validation": {"certified_accuracy": certified * (epoch == 2)}} for epoch in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))


def three_seeds(folder):
    """Seeds 0 to 2 of all networks, each seed a bit better than the last."""
    return [write(folder / f"s{seed}", {key: n + seed for key, n in CERTIFIED.items()}, seed) for seed in range(3)]
