"""The library's rooms: who may import whom, how long a file is, and that members stay apart."""

import ast
import re
from pathlib import Path

import pytest

from deformable_detr.models import MODELS

LIBRARY = Path(__file__).resolve().parents[1] / "deformable_detr"
FILES = {path.relative_to(LIBRARY).as_posix(): path for path in LIBRARY.rglob("*.py")}
ROOMS = [  # from the ground up: a room imports from those before it
    "structures boxes files options interrupts evaluation_mode provenance",
    "ops",
    "layers",
    "backbones",
    "losses",
    "models",
    "data",
    "weights",
    "look",
    "inference",
    "export",
    "evaluation",
    "training",
    "integrations",
    "cli",
]
FLOOR = {name: i for i, names in enumerate(ROOMS) for name in names.split()}
# a model's two methods that read and write files, opened when they are called
DOORS = {("models", "weights")}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """The modules of the library that a file imports, each with whether at once or when called."""
    tree = parse(path)
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deformable_detr"):
            base = node.module.split(".")[1:]
            for alias in node.names:
                yield ".".join([*base, alias.name]), id(node) in at_once
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("deformable_detr."):
                    yield alias.name.partition(".")[2], id(node) in at_once


def room(name):
    return name.split("/")[0].split(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name in FILES} - {"__init__"} == set(FLOOR)


def test_nothing_imports_upwards():
    wrong = [
        f"{name} imports {target}"
        for name, path in FILES.items()
        for target, at_once in imports(path)
        if room(name) != "__init__"
        and FLOOR[room(target)] > FLOOR[room(name)]
        and (at_once or (room(name), room(target)) not in DOORS)
    ]
    assert not wrong


def test_no_file_imports_itself_by_way_of_others():
    names = {name.removesuffix(".py").replace("/", "."): name for name in FILES}

    def file_of(target):
        while target:
            for candidate in (target, f"{target}.__init__"):
                if candidate in names:
                    return candidate
            target = target.rpartition(".")[0]
        return None

    graph = {
        module: {file_of(t) for t, _ in imports(FILES[name])} - {None, module}
        for module, name in names.items()
    }
    # a model's door is opened when it is called, and the package's own when a name is asked for
    graph["models.base"] -= {"weights.published"}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(graph[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_one_idea(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text)), "what is it, and which chapter teaches it?"


def test_the_training_loop_is_read_from_top_to_bottom():
    lines = FILES["training/loop.py"].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180


def test_hardly_any_function_is_long():
    lengths = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, path in FILES.items()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef)
    }
    long = {name: length for name, length in lengths.items() if length > 60}
    assert not long
    assert sum(length > 40 for length in lengths.values()) <= 0.03 * len(lengths)


def names_in(path):
    """Classes, variables and short texts of a file, without the modules that it imports."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value) if " " not in node.value else ()


def own_names(member):
    """By what others could know a member: its name, its configuration and its class."""
    config, model = MODELS[member]
    return {member, config.__name__, model.__name__}


@pytest.mark.parametrize("member", MODELS)
def test_no_members_file_contains_another_members_name(member):
    path = Path(LIBRARY, *MODELS[member][1].__module__.split(".")[1:]).with_suffix(".py")
    others = {name for other in MODELS if other != member for name in own_names(other)}
    assert not others & set(names_in(path))


def test_the_base_knows_no_member():
    """Neither does anything else that all members share."""
    members = {model.__module__.rpartition(".")[2] for _, model in MODELS.values()}
    every = {name for member in MODELS for name in own_names(member)}
    shared = [
        path
        for name, path in FILES.items()
        if room(name) in ("structures", "layers", "backbones", "losses", "models")
        and path.stem not in {*members, "__init__"}
    ]
    assert len(shared) > 10
    for path in shared:
        assert not every & set(names_in(path)), path.name


def test_nothing_above_the_models_asks_which_one_it_has():
    """Only the tables of published names are of one member each."""
    every = {name for member in MODELS for name in own_names(member)} - {"deformable_detr"}
    for name, path in FILES.items():
        if room(name) in ("training", "evaluation", "inference", "cli", "data", "look"):
            conditions = [
                ast.unparse(node.test)
                for node in ast.walk(parse(path))
                if isinstance(node, ast.If | ast.IfExp)
            ]
            asked = [c for c in conditions if every & set(re.findall(r"\w+", c))]
            assert not asked, name


def test_chapters_are_named_as_they_are():
    chapters = {path.stem[3:] for path in (LIBRARY.parent / "chapters").glob("[0-9]*.py")}
    named = re.compile(r"\bChapter (\w+)|\bChapters (\w+)(?:,| and| to) (\w+)")
    for name, path in FILES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for match in named.finditer(text.replace("\n", " ")):
            assert set(filter(None, match.groups())) <= chapters, f"{name}: {match[0]}"
