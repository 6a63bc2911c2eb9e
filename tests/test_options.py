"""Options are said once: recipes, --set, flags and help derive from configurations' fields."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from deformable_detr import DeformableDETRConfig, cli
from deformable_detr.cli import main
from deformable_detr.cli.commands import COMMANDS, build_parser
from deformable_detr.cli.starting import chosen_recipe
from deformable_detr.data.preparation import PREPARATIONS, preparation_of
from deformable_detr.inference.detector import load_detector, read_card
from deformable_detr.models import MODELS, model_name
from deformable_detr.options import checked, help_of, parse_settings, parse_value, types_of
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.recipe import Recipe, load_recipe
from deformable_detr.training.recipes import FOLDER, NAMES

LIBRARY = Path(cli.__file__).parents[1]


def parsed(*arguments):
    """What `train` is told by these arguments."""
    args = build_parser().parse_args(["train", "DATA", "--output", "x", *arguments])
    return chosen_recipe(args)


def other(value, name):
    """Another value than this one that the option can have, as --set takes it, and as it is."""
    words = {"schedule": "cosine", "mixed_precision": "bf16", "backbone": "small"}
    words |= {"position": "learned", "scoring": "focal"}
    if name in words:
        return words[name], words[name]
    if value is None:
        return '["conv1", "bn1"]', ("conv1", "bn1")
    if isinstance(value, bool):
        return json.dumps(not value), not value
    if isinstance(value, float):
        return str(value / 2 + 0.01), value / 2 + 0.01
    return str(value + 1), value + 1


# Every option, everywhere


def options_of(command):
    """The arguments of a command's parser, by flag."""
    commands = build_parser()._subparsers._group_actions[0].choices
    return {flag: action for action in commands[command]._actions for flag in action.option_strings}


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_option_of_training_has_a_flag_and_a_setting(field):
    text, value = other(field.default, field.name)
    flag = f"--{field.name.replace('_', '-')}"
    given = [] if value is True else value if isinstance(value, tuple) else [text]
    assert getattr(parsed(flag, *given).train, field.name) == value
    assert getattr(parsed("--set", f"train.{field.name}={text}").train, field.name) == value
    assert options_of("train")[flag].help.replace("%%", "%") == field.metadata["help"] != ""


@pytest.mark.parametrize("name", MODELS)
def test_every_option_of_a_model_has_a_setting(name):
    defaults = MODELS[name][0]()
    for field in dataclasses.fields(defaults):
        if field.name == "num_classes":  # the data's
            continue
        text, value = other(field.default, field.name)
        settings = [f"model.name={name}", f"model.{field.name}={text}"]
        settings += ["model.refine=true"] * (field.name == "two_stage")
        config = parsed("--set", *settings).model_config(3)
        assert getattr(config, field.name) == value and config.num_classes == 3
        assert model_name(config) == name


@pytest.mark.parametrize("name", MODELS)
def test_options_lists_every_one_as_set_takes_it(name, capsys):
    assert main(["options", "--recipe", "paper", "--set", f"model.name={name}"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for table, config in (("train", TrainConfig), ("model", MODELS[name][0])):
        for option, help in help_of(config).items():
            assert (help and option != "num_classes") or table == "model"
            assert (help in words) == (f"{table}.{option}=" in text) == (option != "num_classes")
    settings = [line.split("  ")[0] for line in text.splitlines()[1:] if not line.startswith(" ")]
    assert parsed("--set", *settings) == dataclasses.replace(
        load_recipe("paper"), model=parse_settings(settings, ("train", "model"))["model"]
    )
    assert parsed("--set", *settings).model_config(91) == MODELS[name][0]()


@pytest.mark.parametrize("name", NAMES)
def test_options_shows_a_recipes_values(name, capsys):
    assert main(["options", "--recipe", name]) == 0
    recipe, text = load_recipe(name), capsys.readouterr().out
    assert f"recipe {name}: {recipe.about}\n" in text
    assert f"train.epochs={recipe.train.epochs} " in text
    assert f"model.dropout={recipe.model_config(3).dropout} " in text


def test_no_command_lists_an_option_by_hand():
    """A flag of training is made by `add_train_options`, an option of a model is none at all, and
    no file of the command line spells their names."""
    flags = options_of("train")
    derived = {f"--{name.replace('_', '-')}" for name in help_of(TrainConfig)}
    made = {flag for flag, action in flags.items() if action.dest in help_of(TrainConfig)}
    assert made - {"--no-gradient-checkpointing"} == derived
    models = {name for kind, _ in MODELS.values() for name in help_of(kind)}
    assert not {f"--{name.replace('_', '-')}" for name in models} & flags.keys()
    names = models | set(help_of(TrainConfig)) | set(NAMES) | set(PREPARATIONS) | set(MODELS)
    # other commands have arguments of these names; num_classes is the data's, num_queries may be
    # others than those of loaded weights, and paper is the default
    names -= {"batch_size", "top_k", "seed", "num_classes", "num_queries", "paper"}
    for path in (LIBRARY / "cli").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        spelt = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not {word for word in spelt if isinstance(word, str)} & names, path


def test_no_code_branches_on_the_name_of_a_preparation_or_a_backbone():
    words = {"small", *PREPARATIONS}
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                spelt = {x.value for x in sides if isinstance(x, ast.Constant)}
                assert not spelt & words, f"{path}:{node.lineno}"


def test_every_command_has_one_file():
    files = {path.stem for path in (LIBRARY / "cli").glob("*.py")}
    commands = build_parser()._subparsers._group_actions[0].choices
    assert set(commands) == {module.__name__.rpartition(".")[2] for module in COMMANDS}
    assert set(commands) <= files


# What is wrong is said with what exists


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train.epoch=3",
            r"train has no 'epoch' \(did you mean epochs\?\); it has epochs, .*checkpointing$",
        ),
        (
            "model.levels=3",
            r"model deformable_detr has no 'levels' .*; it has num_queries, backbone",
        ),
        (
            "model.name=dert",
            r"there is no model 'dert' .*detr\?\); there are deformable_detr, detr",
        ),
        ("model.name=4", r"there is no model 4; there are deformable_detr, detr"),
        ("model.num_classes=4", "num_classes is the data's: leave it out"),
        ("train.epochs=many", "epochs must be a whole number, got 'many'"),
        ("train.epochs=2.0", "epochs must be a whole number, got 2.0"),
        ("train.epochs=true", "epochs must be a whole number, got True"),
        ("train.epochs=none", "epochs must be a whole number, got 'none'"),
        ("train.epochs=0", "epochs must be at least 1, got 0"),
        ("train.lr=fast", "lr must be a number, got 'fast'"),
        ("train.lr=true", "lr must be a number, got True"),
        ("train.lr=nan", "lr must be positive, got nan"),
        ("train.frozen=conv1", "frozen must be a list of texts, got 'conv1'"),
        ("train.frozen=[1]", r"frozen must be a list of texts, got \[1\]"),
        ("train.schedule=3", "schedule must be text, got 3"),
        ("train.schedule=poly", r"schedule must be one of step, cosine, got 'poly'"),
        ("model.refine=True", "refine must be true or false, got 'True'"),
        ("model.refine=1", "refine must be true or false, got 1"),
        ("model.two_stage=true", "two_stage needs refine"),
        ("epochs=3", r"--set takes train.NAME=VALUE or model.NAME=VALUE, got 'epochs=3'"),
        ("train.epochs", r"--set takes train.NAME=VALUE or model.NAME=VALUE, got 'train.epochs'"),
        ("data.x=3", r"--set takes train.NAME=VALUE or model.NAME=VALUE, got 'data.x=3'"),
    ],
)
def test_a_wrong_setting_is_one_line(setting, message, capsys):
    assert main(["options", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        parsed("--set", setting)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[model]\nname = "dert"', "there is no model 'dert' .*; there are deformable_detr, detr"),
        (
            '[model]\nname = "detr"\nnum_levels = 2',
            "model detr has no 'num_levels' .*; it has num_q",
        ),
        ("[model]\nrefine = 1", "refine must be true or false, got 1"),
        ("[model]\nnum_classes = 1", "num_classes is the data's"),
        ("train = 3", "train must be a table, got 3"),
        ("short_side = true", "short_side must be a whole number, got True"),
        ('transforms = "digits"\nshort_side = 64', "leave images as they are: no short_side"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(f'about = "x"\n{text}' if "[" in text else f'{text}\nabout = "x"')
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_flags_have_one_spelling(capsys):
    for flag in ("--epoch", "--workers", "--levels", "--refine", "--num-queries"):
        with pytest.raises(SystemExit):
            parsed(flag, "3")
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("true", True),
        ("cosine", "cosine"),
        ("no", "no"),
        ('"3"', "3"),
        ("007", "007"),
        ('["conv1"]', ["conv1"]),
        ("3\nmore = 4", "3\nmore = 4"),
        ("", ""),
    ],
)
def test_values_are_tomls(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_values_become_what_a_configuration_takes():
    given = {"lr": 1, "frozen": ["conv1"], "epochs": 3}
    values = checked(given, types_of(TrainConfig), "train")
    assert values == {"lr": 1.0, "frozen": ("conv1",), "epochs": 3}
    assert type(values["lr"]) is float
    assert checked({"frozen": "none"}, types_of(TrainConfig), "train") == {"frozen": None}


def test_the_last_value_counts_however_it_is_given():
    assert parsed("--epochs", "3", "--set", "train.epochs=4").train.epochs == 4
    assert parsed("--set", "train.epochs=4", "train.seed=1", "--epochs", "3").train.epochs == 3
    both = ("--gradient-checkpointing", "--no-gradient-checkpointing")
    assert not parsed(*both).train.gradient_checkpointing
    assert parsed(*both[::-1]).train.gradient_checkpointing
    assert parsed("--recipe", "modern", "--frozen").train.frozen == ()
    assert parsed("--recipe", "modern", "--set", "train.frozen=none").train.frozen is None


def test_the_backbones_rate_keeps_its_ratio_unless_it_is_given():
    assert parsed("--lr", "1e-3").train.backbone_lr == pytest.approx(1e-4)
    assert parsed("--recipe", "digits", "--lr", "2e-3").train.backbone_lr == 2e-3
    train = parsed("--backbone-lr", "3e-6", "--lr", "1e-3").train
    assert (train.lr, train.backbone_lr) == (1e-3, 3e-6)
    assert parsed("--backbone-lr", "3e-6").train.lr == 2e-4


# Recipes, and how they prepare images


def test_the_names_of_recipes_are_the_folders(capsys):
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.toml"))) == NAMES and "paper" in NAMES
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines may end at a hyphen
    for name in NAMES:
        assert "".join(f"{name}: {load_recipe(name).about}".split()) in text


def test_detrs_recipes():
    recipe = load_recipe("detr")
    assert recipe.model_config(91) == MODELS["detr"][0]()
    train = recipe.train
    assert (train.lr, train.backbone_lr, train.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert (train.clip_norm, train.epochs, train.drop_epoch) == (0.1, 300, 200)
    assert 16 * train.batch_size * train.accumulate == 64
    small, digits = load_recipe("digits-detr"), load_recipe("digits")
    assert model_name(small.model_config(10)) == "detr" and small.transforms == digits.transforms
    for name in ("backbone", "num_queries", "embed_dim", "encoder_layers", "decoder_layers"):
        assert small.model[name] == digits.model[name]
    assert type(digits.model_config(10)) is DeformableDETRConfig


def test_detr_trains_is_evaluated_and_predicts(coco, tmp_path, capsys):
    """On the command line, as any other model."""
    run = tmp_path / "run"
    arguments = ["train", str(coco), "--output", str(run), "--recipe", "digits-detr"]
    arguments += ["--epochs", "1", "--batch-size", "2", "--set", "model.embed_dim=32"]
    assert main([*arguments, "model.num_queries=7", "model.decoder_layers=2"]) == 0
    assert "AP50" in capsys.readouterr().out
    path = run / "best.safetensors"
    config = load_detector(path).model.config
    assert model_name(config) == "detr" and (config.embed_dim, config.num_queries) == (32, 7)
    assert read_card(path)["transforms"] == "digits"
    assert main(["evaluate", str(coco), "--model", str(path)]) == 0
    found = tmp_path / "found.json"
    image, threshold = str(coco / "val" / "100.png"), ["--threshold", "0"]
    assert main(["predict", image, "--model", str(path), "--json", str(found), *threshold]) == 0
    assert len(json.loads(found.read_text())) == 7  # softmax: one class for each query
    capsys.readouterr()
    assert main(["info", "--model", str(path), "--size", "48", "64", "--repeats", "0"]) == 0
    assert "model               detr\n" in capsys.readouterr().out


def test_what_is_no_transforms_is_refused():
    with pytest.raises(ValueError, match="transforms must be one of coco, strong, digits,"):
        Recipe("x", "y", transforms="none")
    assert (preparation_of("small"), preparation_of("resnet50")) == ("digits", "coco")


@pytest.mark.parametrize("name", PREPARATIONS)
def test_preparations_do_what_they_say(name):
    prepare, picture = PREPARATIONS[name], torch.zeros(3, 48, 64, dtype=torch.uint8)
    picture[:, :, :8] = 255  # a bright edge on the left
    size = (96, 128) if prepare.resizes else (48, 64)
    assert prepare.eval_transform(96)(picture).shape == (3, *size)
    mirrored = set()
    for seed in range(30):
        torch.manual_seed(seed)
        seen = prepare.train_transform(96)(picture).mean(0)
        left, right = seen[:, 1].mean(), seen[:, -2].mean()
        if abs(left - right) > 0.5:
            middle = seen[:, seen.shape[1] // 2].mean()
            edge = left if abs(left - middle) > abs(right - middle) else right
            mirrored.add(bool(edge == right))
    assert (True in mirrored) == prepare.mirrors
