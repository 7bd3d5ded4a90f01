"""The layering of ARCHITECTURE.md, read from the sources: who may import whom, and what nobody may do."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "preftune"
FILES = sorted(SOURCE.rglob("*.py"))

# What each room may import of preftune, besides itself. What is OPEN is open to all.
LEAVES = ["functional", "config", "rundir", "sums", "version"]
CHAIN = ["data", "models", "rollout", "algorithms", "training", "evaluation", "runs", "measure"]
SIDE_BY_SIDE = [
    "audit",
    "verify",
    "selftest",
    "study",
    "label",
    "inspection",
    "chat",
    "export",
]  # they use what the chain offers, never each other
ALLOWED = {name: set[str]() for name in LEAVES} | {
    "report": {"rundir", "config", "sums", "version", "records"},
    "sums": {"rundir"},
    "world": {"data"},
    "records": {"rundir", "sums"},
    "judges": set(),
}
ALLOWED |= {name: {*LEAVES, *CHAIN[:place]} for place, name in enumerate(CHAIN)}
ALLOWED |= {name: {*LEAVES, *CHAIN} for name in SIDE_BY_SIDE}
ALLOWED["selftest"] -= {"runs", "measure"}  # it compares what computes
for name in ("runs", "measure", "study"):
    ALLOWED[name] |= {"world"}
ALLOWED["runs"] |= {"judges"}  # the language model that is asked
for name in ("evaluation", "runs", "measure", "study", "label", "inspection"):
    ALLOWED[name] |= {"records"}
for name in ("measure", "study", "label", "inspection"):
    ALLOWED[name] |= {"report"}
ALLOWED["watch"] = {*LEAVES, "records", "report", "runs"}
ALLOWED["api"] = {*LEAVES, *CHAIN, "audit", "watch"}
ALLOWED["cli"] = {*LEAVES, *CHAIN, *SIDE_BY_SIDE, "api", "report", "records", "watch"}
ALLOWED["exits"] = set()
ALLOWED["cli"] |= {"exits"}
OPEN = {"errors", "kinds", "seeding", "untrusted", "faults", "stops", "isolated", "hashing"}
TOP = {"__init__", "__main__"}  # the package itself and `python -m preftune`
FAST = ("models/", "rollout/sample.py", "runs/provenance.py")  # who may know how passes are made cheap

# Third-party packages that may appear in one place only.
HOMES: dict[str, str | tuple[str, ...]] = {"accelerate": ("training/learner.py", "training/track.py")}
HOMES |= {"peft": "models/adapter.py", "bitsandbytes": "models/quantised.py", "datasets": "data/"}
HOMES |= {"starlette": "label/", "uvicorn": "label/"}
HOMES |= {"submitit": "study/on_slurm.py", "ray": "study/on_ray.py"}
PICKLES = {"pickle", "_pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "torch.jit.load"),
    *("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"),
    *("jinja2.Template", "Template.from_string", "Markup", "markupsafe.Markup", "extractall", "input"),
}
LIGHT = {"matplotlib", "jinja2"}  # what the report may use besides the standard library


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, those inside functions included, with their lines."""
    package = ("preftune", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from preftune import rundir` names a file in its second half.
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if module == "preftune" or is_module(inner) else module), node.lineno


def is_module(dotted: str) -> bool:
    path = SOURCE.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def module(path: Path) -> str:
    """The dotted name of a file; of a room's `__init__`, the room's."""
    dotted = ".".join(("preftune", *path.relative_to(SOURCE).with_suffix("").parts))
    return dotted.removesuffix(".__init__")


def arrows(trees: dict[str, tuple[Path, ast.AST]]) -> dict[str, set[str]]:
    """Which module imports which, function-level and type-checking imports included."""
    found: dict[str, set[str]] = {}
    for name, (_, tree) in trees.items():
        wanted = set[str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted |= {each if each in trees else node.module for each in inner}
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        found[name] = (wanted & trees.keys()) - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which a way leads back to themselves, in no order; empty if there is none."""
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_there_is_no_circle_anywhere() -> None:
    trees = {module(path): (path, parsed(path)) for path in FILES}
    assert circle(arrows(trees)) == []


def test_a_circle_is_found() -> None:
    sources = {
        "preftune.a": "from preftune.b import x",
        "preftune.b": "def f():\n    from preftune import c",
        "preftune.c": "import preftune.a",
        "preftune.d": "import preftune.c",
    }
    trees = {name: (SOURCE, ast.parse(code)) for name, code in sources.items()}
    assert circle(arrows(trees)) == ["preftune.a", "preftune.b", "preftune.c", "preftune.d"]
    del trees["preftune.c"]
    assert circle(arrows(trees)) == []


def part(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


def where(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def owner(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def forbidden_imports(path: Path, tree: ast.AST) -> Iterator[str]:
    mine = owner(path)
    for name, line in imports(path, tree):
        place = f"{where(path)}:{line}: imports {name}"
        root = name.split(".")[0]
        if root == "preftune" and mine not in TOP:
            other = part(name)
            if mine in OPEN and other not in OPEN:
                yield f"{place}, but {mine} stands below everything"
            if mine not in OPEN and other not in {mine, *OPEN, *ALLOWED[mine]}:
                yield f"{place}, which {mine} may not"
            if name.startswith("preftune.models.fast") and not where(path).startswith(FAST):
                yield f"{place}, which is private to models and the sampler"
            if name == f"preftune.{mine}" and path != SOURCE / mine / "__init__.py":
                yield f"{place}, the face of its own room: import from the file that has the name"
        if root in HOMES and not where(path).startswith(HOMES[root]):
            yield f"{place}, which belongs in {HOMES[root]}"
        if root in PICKLES:
            yield f"{place}: a pickle can run code"


def light_parts_stay_light(path: Path, tree: ast.AST) -> Iterator[str]:
    """Report, records, run directory, settings and errors work without torch."""
    allowed = {
        "report": LIGHT,
        "records": {"pydantic"},
        "config": {"pydantic", "annotated_types"},
        "rundir": set(),
        "errors": set(),
        "kinds": set(),
    }
    mine = owner(path)
    if mine not in allowed:
        return
    for name, line in imports(path, tree):
        root = name.split(".")[0]
        if root != "preftune" and root not in sys.stdlib_module_names and root not in allowed[mine]:
            yield f"{where(path)}:{line}: imports {name}, which {mine} may not"


def dangerous_calls(path: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            if not off:
                yield f"{where(path)}:{node.value.lineno}: {node.arg} must be False"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        last = called.rpartition(".")[2]
        if called in RUNS_CODE or last in ("extractall", "from_string", "unpack_archive"):
            yield f"{where(path)}:{node.lineno}: calls {called}"
        if "shell" in given:
            yield f"{where(path)}:{node.lineno}: gives a shell something to run"
        # Without it the library asks the user, who may say yes.
        if called.endswith(".from_pretrained") and "trust_remote_code" not in given:
            yield f"{where(path)}:{node.lineno}: {called} without trust_remote_code=False"
        if last == "Environment" and ast.unparse(given.get("autoescape", node)) != "True":
            yield f"{where(path)}:{node.lineno}: a template environment without autoescape=True"


def test_file_keeps_its_place() -> None:
    rules = (forbidden_imports, light_parts_stay_light, dangerous_calls)
    found = [line for path in FILES for rule in rules for line in rule(path, parsed(path))]
    assert not found, "\n".join(found)


def clocks(tree: ast.AST) -> list[str]:
    """Calls that ask for the time of day, which may jump: durations and orders must not hang on it."""
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        name for name in called if name in ("time.time", "time.time_ns", "os.path.getmtime", "datetime.now")
    ]


def test_nothing_hangs_on_the_time_of_day() -> None:
    """The console's log lines carry it, for people; the list of runs begins with the one written last."""
    found = {where(path): calls for path in FILES if (calls := clocks(parsed(path)))}
    assert found == {"runs/console.py": ["datetime.now"]}
    dated = {where(path) for path in FILES if "st_mtime" in path.read_text(encoding="utf-8")}
    assert dated <= {"runs/overview.py"}


def unescaped(text: str) -> list[str]:
    """What lets text into a page as it is."""
    return re.findall(
        r"\|\s*safe\b|autoescape\s+false|\{%-?\s*raw\b|\bjavascript:|https?://(?!www\.w3\.org/)", text
    )


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/templates/*")), ids=lambda path: path.name)
def test_templates_escape_everything_and_fetch_nothing(path: Path) -> None:
    assert not unescaped(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["{{ x|safe }}", "{{ x | safe }}", "{% autoescape false %}", "{% raw %}"])
def test_the_rule_for_templates_can_fail(text: str) -> None:
    assert unescaped(text)


def test_file_is_about_one_thing() -> None:
    lines = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {file: count for file, count in lines.items() if count > 420} == {}


def test_every_part_has_a_place() -> None:
    parts = {owner(path) for path in FILES}
    assert parts <= {*ALLOWED, *OPEN, *TOP}


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("functional/x.py", "from preftune.data import Turn"),
        ("data/x.py", "def f():\n    import preftune.models"),
        ("models/x.py", "from preftune import rollout"),
        ("models/x.py", "from ..rollout import sample"),
        ("algorithms/x.py", "from preftune.training.learner import Learner"),
        ("training/loop.py", "import accelerate"),
        ("models/roles.py", "from peft import LoraConfig"),
        ("runs/x.py", "from preftune.selftest import run"),
        ("functional/x.py", "from preftune import selftest"),
        ("selftest/x.py", "from preftune.cli import main"),
        ("report/x.py", "import torch"),
        ("study/x.py", "import uvicorn"),
        ("study/launch.py", "import ray"),
        ("label/x.py", "from preftune.study.design import Request"),
        ("report/x.py", "from preftune.evaluation import stats"),
        ("runs/x.py", "from preftune.report import build"),
        ("runs/x.py", "from preftune.measure.evaluate import evaluate_run"),
        ("study/x.py", "from preftune.audit import audit_directory"),
        ("study/x.py", "from preftune.api import run"),
        ("data/x.py", "from preftune.world.gold import gold"),
        ("data/x.py", "from preftune.data import Dialogue"),
        ("evaluation/x.py", "from preftune.models.fast.head import states"),
        ("runs/x.py", "from preftune import run"),
        ("rundir.py", "from preftune.config import RunConfig"),
        ("errors.py", "from preftune.rundir import RunDir"),
        ("kinds.py", "import torch"),
        ("config/x.py", "import torch"),
        ("models/x.py", "import pickle"),
        ("models/x.py", "torch.load(path, weights_only=True)"),
        ("models/x.py", "eval('1')"),
        ("models/x.py", "from pickle import loads"),
        ("models/x.py", "AutoModel.from_pretrained(name)"),
        ("models/x.py", "numpy.load(path, allow_pickle=True)"),
        ("runs/x.py", "subprocess.run(words, shell=True)"),
        ("runs/x.py", "yaml.load(text, yaml.Loader)"),
        ("runs/x.py", "tarfile.open(path).extractall(target)"),
        ("report/x.py", "environment.from_string(text)"),
        ("report/x.py", "Markup(text)"),
        ("report/x.py", "jinja2.Environment(loader=loader)"),
        ("report/x.py", "Environment(autoescape=select_autoescape())"),
        ("models/x.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        ("models/x.py", "AutoModel.from_pretrained(name, trust_remote_code=flag)"),
    ],
)
def test_the_rules_can_fail(file: str, code: str) -> None:
    path, tree = SOURCE / file, ast.parse(code)
    assert [*forbidden_imports(path, tree), *light_parts_stay_light(path, tree), *dangerous_calls(path, tree)]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("training/learner.py", "import accelerate"),
        ("data/hub.py", "from datasets import dataset_of"),
        ("models/x.py", "model.eval()"),
        ("cli.py", "from preftune import api, report"),
        ("measure/x.py", "from preftune.report import build"),
        ("selftest/x.py", "from preftune.evaluation import stats"),
        ("cli.py", "from preftune import selftest"),
    ],
)
def test_the_rules_let_pass_what_is_right(file: str, code: str) -> None:
    path, tree = SOURCE / file, ast.parse(code)
    assert not [*forbidden_imports(path, tree), *dangerous_calls(path, tree)]
