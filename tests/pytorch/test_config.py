import dataclasses
import re
from pathlib import Path

import docstring_parser
import pytest

from pytorch.config import CONFIGS, Config, parse_config
from pytorch.errors import RunError
from tools.hyperparameters import hyperparameter_table
from tools.mlperf.runlog import with_current_names

ROOT = Path(__file__).resolve().parents[2]


def parse(*arguments: str) -> Config:
    return parse_config(arguments, program="train", description="")


def test_the_command_line_wins_over_the_named_configuration() -> None:
    assert parse("--config", "an4", "--learning-rate", "0.5") == dataclasses.replace(CONFIGS["an4"], learning_rate=0.5)


def test_every_field_can_be_changed_on_the_command_line() -> None:
    for field in dataclasses.fields(Config):
        if field.name not in ("config", "resume", "resume_with_changes", "tensorboard"):
            value = getattr(CONFIGS["mini"], field.name)
            given = "3" if value is None else str(value)
            assert getattr(parse("--config=an4", f"--{field.name.replace('_', '-')}", given), field.name) is not None


def test_another_batch_size_scales_what_depends_on_it_and_the_command_line_wins() -> None:
    config = parse("--config", "librispeech", "--scale-to-batch-size", "512", "--beta2", "0.95")
    assert config.learning_rate == pytest.approx(2 * 1.5e-3)
    assert config.ema_decay == pytest.approx(0.99**4)
    assert (config.batch_size, config.warmup_steps, config.beta2) == (512, 500, 0.95)
    assert parse("--config", "librispeech", "--scale-to-batch-size", "128") == CONFIGS["librispeech"]
    with pytest.raises(RunError, match="--scale-to-batch-size is 0"):
        parse("--scale-to-batch-size", "0")


def test_help_is_one_line_for_each_field() -> None:
    """tyro would keep the line breaks, so that help breaks inside of a sentence."""
    groups = [docstring_parser.parse_from_object(group).params for group in Config.__bases__]
    documented = [each for group in groups for each in group if each.description]
    assert len(documented) >= len(dataclasses.fields(Config)) - 1
    assert [each.arg_name for each in documented if "\n" in (each.description or "")] == []


def test_help_has_each_hyperparameter_once_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--config", "an4", "--help")
    _, *groups = re.split(r"(\w+) options\W*\n", capsys.readouterr().out)
    assert groups[::2] == ["run", "model", "optimization", "augmentation"]
    shown = [re.findall(r"^\W? (--[a-z][a-z0-9-]+)", text, re.MULTILINE) for text in groups[1::2]]
    assert [each[0] for each in shown] == ["--dataset-dir", "--hidden-size", "--batch-size", "--augment-from-epoch"]
    assert sum(map(len, shown)) == len(dataclasses.fields(Config)) - 1


def test_the_reference_of_2018_is_a_configuration() -> None:
    config = parse("--config", "librispeech-2018")
    assert (config.optimizer, config.learning_rate, config.beta1) == ("sgd", 3e-4, 0.9)
    assert (config.schedule, config.lr_gamma, config.gradient_clip_norm) == ("anneal", 1.1, 200)
    assert (config.tempo_min, config.tempo_max, config.gain_min_db, config.gain_max_db) == (0.85, 1.15, -6, 8)
    assert config.frequency_masks == config.time_masks == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", "0"),
        ("--learning-rate", "-1"),
        ("--learning-rate", "nan"),
        ("--gradient-clip-norm", "inf"),
        ("--beta1", "1"),
        ("--tempo-min", "0.1"),
        ("--tempo-min", "1.2"),  # more than --tempo-max
        ("--frequency-mask-bins", "162"),
        ("--max-steps", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--batch-size", "99999999999999999999"),
        ("--dist-timeout-seconds", "1e30"),
        ("--target-wer", "nan"),
    ],
)
def test_a_value_that_breaks_its_constraint_is_refused_by_name(option: str, value: str) -> None:
    with pytest.raises(RunError, match=rf"{option} .*(must be|is above --tempo-max 1\.15)"):
        parse(option, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hiden-size", "3"], "--hiden-size"),
        (["--batch-size", "2.5"], "--batch-size"),
        (["--optimizer", "adam"], "--optimizer"),
        (["--config"], "--config"),
        (["--config", "nonsense"], "librispeech-100"),  # the known ones
    ],
)
def test_unknown_names_and_wrong_types_end_with_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_configuration_of_an_earlier_version_is_read_under_todays_names() -> None:
    saved = {"config": "librispeech", "recipe": "reference", "averaging_decay": 0.5, "schedule_epochs": 3}
    assert with_current_names(saved) == {"config": "librispeech-2018", "ema_decay": 0.5, "lr_decay_epochs": 3}
    assert with_current_names({"config": "an4", "recipe": "modern", "seed": 2}) == {"config": "an4", "seed": 2}


def test_the_documents_hold_the_table_of_hyperparameters() -> None:
    assert hyperparameter_table() in (ROOT / "docs" / "hyperparameters.md").read_text()
