"""The table of hyperparameters in docs/hyperparameters.md.

python -m tools.hyperparameters
"""

import dataclasses

from pytorch.config import CONFIGS, HYPERPARAMETERS, Config


def hyperparameter_table() -> str:
    """Return the table of docs/hyperparameters.md: constraint, and default of each configuration."""
    rows = [f"| hyperparameter | constraint | {' | '.join(CONFIGS)} |", "|" + "---|" * (len(CONFIGS) + 2)]
    for field in dataclasses.fields(Config):
        if field.name in HYPERPARAMETERS:
            values = [getattr(config, field.name) for config in CONFIGS.values()]
            shown = " | ".join("none" if value is None else f"{value}" for value in values)
            rows.append(f"| `--{field.name.replace('_', '-')}` | {field.metadata['constraint'].text} | {shown} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(hyperparameter_table())
