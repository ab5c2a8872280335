# SPDX-License-Identifier: MIT
"""`chainrule train` on scikit-learn's own tables, beside scikit-learn's MLP.

How the scores are computed. For each data set and each of the seeds 0 … 4 the command holds out 20 % of
the rows (its default); its score there, accuracy in percent or 100 R², is read from what it prints. The peer
is the same network (64, 64, ReLU, Adam at 0.001, batches of 32, no penalty) behind the same preprocessing,
trained on all the other rows and scored on the same rows held out: once with early stopping (15 % for
validation, patience 20, as the command does) and once with scikit-learn's own rule. The means over the seeds
are compared: ours may lie at most 2 points below the better of the two.
"""

import csv
import re
import warnings

import numpy as np
import pytest

from chainrule.__main__ import main
from chainrule.data import Preprocessor, infer_task, split_rows
from chainrule.tables import as_text, read_table

pytest.importorskip("sklearn")
from sklearn import datasets
from sklearn.neural_network import MLPClassifier, MLPRegressor

SEEDS = range(5)
NAMES = ["breast_cancer", "wine", "iris", "diabetes"]


def write_table(name, path):
    """The data set as CSV: iris with its classes' names, wine with a twentieth of its cells empty."""
    data = getattr(datasets, f"load_{name}")()
    cells = data.data.astype(object)
    if name == "wine":
        cells[np.random.default_rng(0).random(cells.shape) < 0.05] = ""
    target = data.target_names[data.target] if name == "iris" else data.target
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*data.feature_names, "target"])
        writer.writerows([*row, y] for row, y in zip(cells, target, strict=True))


def our_score(seed, capsys):
    assert main(["train", "table.csv", "--target", "target", "--seed", str(seed), "--quiet"]) == 0
    out = capsys.readouterr().out
    accuracy = re.search(r"accuracy +([\d.]+) %", out)
    return float(accuracy.group(1)) if accuracy else 100 * float(re.search(r"R² +(-?[\d.]+)", out).group(1))


def peer_score(seed, early_stopping):
    table = read_table("table.csv")
    column = table.column("target")
    task = infer_task(column)
    labels = as_text(column) if task == "classification" else None
    held_out, others = (table.take(rows) for rows in split_rows(len(table), [0.2], seed, labels))
    p = Preprocessor.fit(others, "target", task)
    options = {"hidden_layer_sizes": (64, 64), "alpha": 0.0, "batch_size": 32, "random_state": seed}
    if early_stopping:
        options |= {
            "early_stopping": True,
            "validation_fraction": 0.15,
            "n_iter_no_change": 20,
            "max_iter": 500,
        }
    net = (MLPClassifier if task == "classification" else MLPRegressor)(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 200 epochs were not enough by its own rule
        net.fit(p.transform(others), p.targets(others))
    return 100 * net.score(p.transform(held_out), p.targets(held_out))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_held_out_scores_are_within_two_points_of_scikit_learn(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table(name, "table.csv")
    ours = np.mean([our_score(seed, capsys) for seed in SEEDS])
    peers = [np.mean([peer_score(seed, stop) for seed in SEEDS]) for stop in (True, False)]
    print(f"{name}: ours {ours:.2f}, scikit-learn {peers[0]:.2f} with early stopping, {peers[1]:.2f} without")
    assert ours >= max(peers) - 2
