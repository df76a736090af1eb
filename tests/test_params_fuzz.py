"""Mutated parameter files: each is read, or refused in one line that names the file and what is wrong in it."""

import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass

import pytest
import yaml

from focuslib.errors import UserError
from focuslib.evaluation.settings import methods_file
from focuslib.experiments.paper import CELLS, plan
from focuslib.experiments.params import EXPERIMENTS, read_params
from focuslib.experiments.published import PublishedCost, published_cost
from focuslib.experiments.tuning import Tuning, read_tuning
from focuslib.methods import METHODS
from focuslib.methods.base import Method
from focuslib.methods.settings import make_method
from focuslib.paths import project_root

SEED, COUNT = 20260, 1200
ROOT = project_root()
SOURCES = sorted((ROOT / "params").rglob("*.yaml"))
FIELDS = {name: model.model_fields for name, model in {**EXPERIMENTS, "cost": PublishedCost, "tuning": Tuning}.items()}
SNIPPETS = [
    "&a [*a]", "*b", "!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!set {a, b}", "!!timestamp x",
    "!!int x", "!!bool maybe", "2026-02-30", "2026-02-03", "? [1, 2]\n: 3", "---", "...", "%YAML 9.9", "<<: {limit: 2}",
    "{[", "\t", "\0", "\x85", "\ufeff", "\u2028", "\ud7ff", "|\n  text", ">-", "- x", "key: value", "9" * 5000,
    "0x" + "f" * 5000,
    "1:2:3", ".nan", "-.inf", '"\\ud800"', '"\\n"', "@", "`", "'", '"', "#", ": ",
    "[" * 3000, "{a: " * 100 + "1" + "}" * 100,
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 10**9, 2**31, 2**63 - 1, 2**64, -(10**400), 10**4000, 0.5, 1.0, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "ten", "none", "null", "1,2", "(1, 3)", "2x3x3", "x" * 10_000, "a\nb",
    "\ud800", "\0", "é", "../up", "/", "..", "focus", "tiny_onevision", "tinyvideo_motion", "[]", b"bytes",
    [], {}, [[]], [{}], [None],
    [1, "a"], [True], {"a": 1}, {1: 2}, {None: None}, {"dataset": 1, "values": 2}, {"dataset": "mlvu", "values": []},
    [["x"] * 3] * 3, {"a": {"b": {"c": {}}}}, {"datasets": "mlvu", "models": [3]}, [{"models": ["x"]}],
    [{"threshold": "x"}],
]  # fmt: skip
NAMES = ["modles", "profile", "limits", "a b", "", "é", "a\nb", 3, None, True, 1.5, "results", "matched", "m_tile"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of our own, so that its methods.yaml is the one that is read."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_text(rng: random.Random, text: bytes) -> bytes:
    """One mutation of bytes, lines or indentation."""
    lines = text.splitlines(keepends=True)
    at, line = rng.randrange(len(text)), rng.randrange(len(lines))
    kind = rng.randrange(11)
    if kind == 0:
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at + rng.randrange(1, 30) :]
    if kind == 2:
        return text[:at]
    if kind == 3:
        return text[:at] + rng.choice(SNIPPETS).encode("utf-8") + text[at:]
    if kind == 4:
        lines[line] = rng.choice([b" ", b"    ", b"\t", b"- "]) + lines[line]
    if kind == 5:
        lines[line] = lines[line].lstrip()
    if kind == 6:
        del lines[line]
    if kind == 7:
        lines.insert(rng.randrange(len(lines)), lines[line])
    if kind == 8:
        rng.shuffle(lines)
    if kind == 9:  # another value
        lines[line] = lines[line].partition(b":")[0] + b": " + rng.choice(SNIPPETS).encode("utf-8") + b"\n"
    if kind == 10:
        return text.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "cp037"]), errors="replace")
    return b"".join(lines)


def containers(value, found=None) -> list:
    """Every list and mapping in a value that is not empty."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)) and value and not any(value is known for known in found):
        found.append(value)
        for part in value.values() if isinstance(value, dict) else value:
            containers(part, found)
    return found


def change_value(rng: random.Random, text: bytes) -> tuple[bytes, list[str]]:
    """One mutation of a name or value, and the names of which a refusal must say one."""
    content = yaml.safe_load(text)
    top = rng.choice(list(content))
    inside = rng.choice([content, *containers(content[top])])
    place = top if inside is content else rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    name = rng.choice(NAMES)
    kind = rng.randrange(5)
    if kind == 0:
        del inside[place]
    elif kind == 1 and isinstance(inside, dict):
        inside[name] = inside.pop(place)
    elif kind == 2 and isinstance(inside, dict):
        inside[name] = rng.choice(VALUES)
    elif kind == 3:
        inside[place] = [inside[place]] * rng.choice([1, 2, 3])  # written with references
    else:
        inside[place] = rng.choice(VALUES)
    written = yaml.dump(content, allow_unicode=True, sort_keys=False, default_flow_style=None)
    return written.encode(), [top, repr(name).strip("'")]


def read_and_plan(path):
    """Read a file as its kind is read. Returns a function that goes on to make cells of it."""
    if path.stem == "methods" and path.parent.name == "params":  # the settings; a profile has a notebook of that name
        methods_file(path)
        return lambda: plan("baselines", "laptop")
    if path.stem == "cost":
        published_cost()
        return lambda: None
    if path.stem == "tuning":
        read_tuning(path)
        return lambda: None
    params = read_params(path)
    return lambda: CELLS[path.stem](params)


def names_in(text: bytes) -> list[str]:
    """All names of a text that is a YAML mapping, else none."""
    try:
        content = yaml.safe_load(text.decode())
    except Exception:
        return []
    if not isinstance(content, dict):
        return []
    return [repr(name).strip("'") for part in containers(content) if isinstance(part, dict) for name in part]


def test_mutated_parameter_files(project):
    rng = random.Random(SEED)
    ends = Counter()
    for number in range(COUNT):
        source = SOURCES[number % len(SOURCES)]
        text, path = source.read_bytes(), project / source.relative_to(ROOT)
        if rng.random() < 0.5:
            mutated = change_text(rng, text)
            found = names_in(mutated)
            names = [*found, *FIELDS.get(path.stem, ())] if found else []
        else:
            mutated, names = change_value(rng, text)
        path.write_bytes(mutated)
        try:
            go_on, step = None, "refused"
            go_on = read_and_plan(path)
            step = "not planned"
            go_on()
            step = "planned"
        except UserError as error:
            line = str(error)
            assert len(line.splitlines()) == 1 and len(line) < 1000, (number, line)
            assert path.name in line or go_on, (number, line)
            assert not names or go_on or any(name in line for name in names), (number, line, names)
        except Exception as error:
            raise AssertionError(f"{number}: {path.name}: {mutated[:2000]!r}") from error
        finally:
            path.write_bytes(text)
        ends[step] += 1
    print(dict(ends))
    assert min(ends["refused"], ends["planned"]) > COUNT // 10 and ends["not planned"] > 10


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("limit: 3\nlimit: 4", "line 2: 'limit' is given twice; keep one of them"),
        ("workers: true", "workers is True; it must be int"),
        ("limit: 2026-02-30", "limit is '2026-02-30'; it must be int or null"),
        ("seed: -1", "seed is -1; it must be at least 0"),
        ("seed: 0x" + "f" * 5000, "seed holds a huge int; write a smaller number"),
        ("datasets: []", "datasets is []; it must be longer; give at least one"),
        ("datasets: [mlvu, 3]", "datasets[1] is 3; it must be str"),
        ("datasets: &a [*a]", "datasets is nested too deeply; write it flat"),
        ("results: ../x", "results is '../x'; it must be the name of a folder in results/, such as dev"),
        ("3: 4", "name 3 is not a word"),
        ("profile: laptop", "unknown parameter 'profile'"),
        ("limit: !!binary aGk=", "limit holds b'hi'; write a number"),
        ("limit: !!int x", "line 1: 'x': invalid literal"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n", "d holds more than 10000 values"),
    ],
)  # fmt: skip
def test_what_a_parameter_file_may_not_hold(tmp_path, text, line):
    path = tmp_path / "main.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"main\.yaml") as error:
        read_params(path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "dse.yaml").mkdir()
    (tmp_path / "int8.yaml").write_text("limit: 3", encoding="utf-16")
    (tmp_path / "mian.yaml").write_text("limit: 3")
    for name, line in (
        ("main", "no such parameter file"), ("dse", "cannot be read (Is a directory)"),
        ("int8", "not UTF-8 text (byte 0); save it as UTF-8"), ("mian", "did you mean main?"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(line)):
            read_params(tmp_path / f"{name}.yaml")


def test_changes_are_checked_as_the_file_is():
    assert plan("main", "laptop", {"limit": 6, "results": "dev"})[0]["results"] == "dev"
    for changes, line in (
        ({"limt": 6}, "changes of params/laptop/main.yaml: unknown parameter 'limt'; did you mean limit?"),
        ({"limit": "6"}, "changes of params/laptop/main.yaml: limit is '6'; it must be int or null"),
        ([6], "changes is [6]; write a mapping"),
        ({"checkpoints": {"tiny": "x"}}, "params/laptop/main.yaml: unknown model 'tiny'"),
        ({"datasets": ["tinyvideo"]}, "params/laptop/main.yaml: unknown dataset 'tinyvideo'"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            plan("main", "laptop", changes)
    with pytest.raises(UserError, match=r"hardware\.yaml: unknown accelerator 'focsu'; did you mean focus\?"):
        plan("hardware", "laptop", {"accelerators": ["focsu"]})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("focus: [{m_tiles: 3}]", "focus: entry 1: unknown setting of focus 'm_tiles'; did you mean m_tile?"),
        ("cmc: [{}, {interval: true}]", "cmc: entry 2: interval=True is not int"),
        ("cmc: [{interval: [1]}]", "interval=[1] is not int"),
        ("dense: [{interval: 1}]", "unknown setting of dense 'interval'; there is none"),
        ("focus: {m_tile: 3}", "focus: settings {'m_tile': 3} must be a list of entries"),
        ("focus: [{models: [3]}]", "focus: entry 1: models[0] is 3; it must be str"),
    ],
)
def test_what_the_methods_file_may_not_hold(tmp_path, text, line):
    path = tmp_path / "methods.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"methods\.yaml: ") as error:
        methods_file(path)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("method", "written", "value"),
    [
        ("focus", {"selected_layers": "1,3,5", "retention": "(.6, .4, .2)"}, {"selected_layers": (1, 3, 5)}),
        ("focus", {"selected_layers": "1:3", "retention": [0.5, "0.2"]}, {"retention": (0.5, 0.2)}),
        ("focus", {"selected_layers": 2, "retention": 1}, {"selected_layers": (2,), "retention": (1.0,)}),
        ("focus", {"sec_only": "true", "full_resolution": "0", "m_tile": "64.0"}, {"sec_only": True, "m_tile": 64}),
        ("cmc", {"skip_score_layers": "", "score_threshold": "5e-5"}, {"skip_score_layers": ()}),
    ],
)
def test_settings_as_a_user_writes_them(method, written, value):
    made = make_method(method, written).settings()
    assert {name: made[name] for name in value} == value
    assert all(type(made[name]) is type(value[name]) for name in value)


def test_a_setting_that_may_be_none(monkeypatch):
    @dataclass(frozen=True)
    class Own(Method):
        """A user's method."""

        layers: tuple[int, ...] | None = (1,)
        share: float | None = 0.5

    monkeypatch.setitem(METHODS, "own", Own)
    assert make_method("own", {"layers": "none", "share": None}) == Own(None, None)
    assert make_method("own", {"layers": "2,4", "share": "1"}) == Own((2, 4), 1.0)
    for bad in ({"layers": "a"}, {"share": True}, {"layers": [True]}):
        with pytest.raises(UserError, match=r"own: .* is not"):
            make_method("own", bad)
