"""Draws docs/recipes.svg: character error rates of the recipes, from their logs under results/.

    python -m pip install matplotlib
    python docs/plot_recipes.py

docs/recipes.md explains what is seen.
"""

import json
import tarfile
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
ADAMW, MUON, NO_MASKS, LATE = "#d55e00", "#0072b2", "#999999", "#000000"  # Okabe and Ito's
RECIPES = {
    ADAMW: "AdamW, augmented from epoch 1 on",
    MUON: "Muon, augmented from epoch 1 on",
    NO_MASKS: "Muon, no masks",
    LATE: "Muon, augmented from epoch 6 on",
}
CURVES = {  # panel: logs in read-speech.tar.xz, and the recipe of each
    "2.5 h, 5 x 256, batch 16": {
        "2.5h_10_epochs_adamw_seed_1": ADAMW,
        "2.5h_10_epochs_adamw_seed_2": ADAMW,
        "2.5h_10_epochs_muon_seed_1": MUON,
        "2.5h_10_epochs_muon_seed_2": MUON,
        "2.5h_10_epochs_muon_no_masks_seed_2": NO_MASKS,
        "2.5h_10_epochs_muon_masks_from_6_seed_2": LATE,
        "2.5h_10_epochs_muon_all_augmentation_from_6_seed_1": LATE,
    },
    "5 h, 5 x 256, batch 16": {
        "5h_muon_seed_1": MUON,
        "5h_muon_no_masks_seed_1": NO_MASKS,
        "5h_mini_seed_1": LATE,
    },
    "10 h, 5 x 800, batch 32": {"adamw_seed_1": ADAMW, "muon_seed_1": MUON},
}
CHANGES = {  # one change at a time, all with seed 2
    "2.5h_muon_seed_2": "Muon, augmented from epoch 1 on",
    "2.5h_10_epochs_muon_no_masks_seed_2": "no masks, cosine of 10 epochs",
    "2.5h_muon-warmup-200_seed_2": "warm-up of 200 steps, not 100",
    "2.5h_muon-shuffled_seed_2": "epoch 1 in random order",
    "2.5h_muon-lr075_seed_2": "learning rate 7.5e-4, not 1.5e-3",
    "2.5h_muon-lr3_seed_2": "learning rate 3e-3",
    "2.5h_muon-b32_seed_2": "batch 32, warm-up of 50 steps",
    "2.5h_muon-no-ema_seed_2": "no EMA",
    "2.5h_adamw-ema_seed_2": "AdamW with the EMA",
    "2.5h_adamw_seed_2": "AdamW",
    "2.5h_sgd2018_seed_2": "SGD of librispeech-2018, no masks",
    "2.5h_muon-no-blank_seed_2": "blank not likely at the beginning",
}


def read_cers() -> dict[str, dict[int, float]]:
    """Return the validation set's CER in percent after each epoch, by the log's name."""
    cers: dict[str, dict[int, float]] = {}
    for archive in ("2-cores-zen4", "1-h200"):
        with tarfile.open(ROOT / "results" / archive / "read-speech.tar.xz") as logs:
            for member in logs:
                lines = logs.extractfile(member).read().decode().splitlines()
                events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
                cers[Path(member.name).stem] = {
                    event["metadata"]["epoch_num"]: event["metadata"]["cer"]
                    for event in events
                    if event["key"] == "validation_errors" and event["value"] == "all"
                }
    return cers


def draw_curves(panel: Axes, title: str, logs: dict[str, str], cers: dict[str, dict[int, float]]) -> None:
    for name, color in logs.items():
        panel.plot(cers[name].keys(), cers[name].values(), color=color, marker="o", markersize=3)
    panel.set(title=title, xlabel="epoch", xticks=range(1, 11), xlim=(0.5, 10.5), ylim=(40, 80))
    panel.grid(axis="y", color="#dddddd")


def draw_changes(panel: Axes, cers: dict[str, dict[int, float]]) -> None:
    values = [cers[name][3] for name in CHANGES]
    panel.plot(values, list(CHANGES.values()), "o", color=MUON)
    for change, value in zip(CHANGES.values(), values, strict=True):
        panel.annotate(f"{value:.1f}", (value, change), (6, 0), textcoords="offset points", va="center")
    panel.axvline(values[0], color="#000000", linestyle=":", zorder=0)
    panel.grid(axis="y", color="#dddddd")
    panel.set(title="One change at a time: CER after 3 epochs of 2.5 h", xlabel="CER, %", xlim=(50, 80))
    panel.invert_yaxis()


def main() -> None:
    plt.rcParams |= {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "recipes",  # the same file each time
    }
    cers = read_cers()
    figure = plt.figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    for panel, (title, logs) in zip(top.subplots(1, len(CURVES), sharey=True), CURVES.items(), strict=True):
        draw_curves(panel, title, logs, cers)
    top.axes[0].set_ylabel("CER, %")
    lines = [plt.Line2D([], [], color=color, label=recipe) for color, recipe in RECIPES.items()]
    top.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
    draw_changes(bottom.subplots(), cers)
    figure.savefig(ROOT / "docs" / "recipes.svg", bbox_inches="tight", pad_inches=0.2, metadata={"Date": None})


if __name__ == "__main__":
    main()
