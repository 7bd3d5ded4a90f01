"""The layering of ARCHITECTURE.md, read from the sources: who may import whom, and what nobody may do."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "preftune"
FILES = sorted(SOURCE.rglob("*.py"))

# What each part may import of preftune, besides itself. What is OPEN is open to all.
LEAVES = ["functional", "config", "rundir"]
CHAIN = ["data", "models", "rollout", "algorithms", "training", "evaluation", "pipeline", "cli"]
ALLOWED = {name: set[str]() for name in LEAVES} | {"report": {"rundir", "config"}}
ALLOWED |= {name: {*LEAVES, *CHAIN[:place]} for place, name in enumerate(CHAIN)}
ALLOWED["pipeline"] |= {"report"}
ALLOWED["selftest"] = {*LEAVES, *CHAIN[:-2]}  # compares all that computes; only the command line may use it
ALLOWED["cli"] |= {"report", "selftest"}
OPEN = {"errors", "seeding", "untrusted", "faults", "stops"}
TOP = {"__init__", "__main__"}  # the package itself and `python -m preftune`

# Third-party packages that may appear in one place only.
HOMES = {"accelerate": "training/learner.py", "peft": "models/load.py", "datasets": "data/"}
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
            # `from preftune import rundir` names the part in its second half.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "preftune" else [module]
            yield from ((name, node.lineno) for name in names)


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
            if mine not in OPEN and other not in {mine, *OPEN, *ALLOWED[mine], "__version__"}:
                yield f"{place}, which {mine} may not"
        if root in HOMES and not where(path).startswith(HOMES[root]):
            yield f"{place}, which belongs in {HOMES[root]}"
        if root in PICKLES:
            yield f"{place}: a pickle can run code"


def light_parts_stay_light(path: Path, tree: ast.AST) -> Iterator[str]:
    """Report, run directory, settings and errors work without torch."""
    allowed = {"report": LIGHT, "config": {"pydantic", "annotated_types"}, "rundir": set(), "errors": set()}
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


@pytest.mark.parametrize("path", FILES, ids=where)
def test_file_keeps_its_place(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        *forbidden_imports(path, tree),
        *light_parts_stay_light(path, tree),
        *dangerous_calls(path, tree),
    ]
    assert not found, "\n".join(found)


def clocks(tree: ast.AST) -> list[str]:
    """Calls that ask for the time of day, which may jump: durations and orders must not hang on it."""
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        name for name in called if name in ("time.time", "time.time_ns", "os.path.getmtime", "datetime.now")
    ]


@pytest.mark.parametrize("path", FILES, ids=where)
def test_nothing_hangs_on_the_time_of_day(path: Path) -> None:
    """The console's log lines carry it, for people."""
    allowed = ["datetime.now"] if where(path) == "pipeline/console.py" else []
    assert clocks(ast.parse(path.read_text(encoding="utf-8"))) == allowed
    assert "st_mtime" not in path.read_text(encoding="utf-8")


def unescaped(text: str) -> list[str]:
    """What lets text into a page as it is."""
    return re.findall(
        r"\|\s*safe\b|autoescape\s+false|\{%-?\s*raw\b|\bjavascript:|https?://(?!www\.w3\.org/)", text
    )


@pytest.mark.parametrize("path", sorted((SOURCE / "report/templates").iterdir()), ids=lambda path: path.name)
def test_templates_escape_everything_and_fetch_nothing(path: Path) -> None:
    assert not unescaped(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["{{ x|safe }}", "{{ x | safe }}", "{% autoescape false %}", "{% raw %}"])
def test_the_rule_for_templates_can_fail(text: str) -> None:
    assert unescaped(text)


@pytest.mark.parametrize("path", FILES, ids=where)
def test_file_is_about_one_thing(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


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
        ("pipeline/x.py", "from preftune.selftest import run"),
        ("functional/x.py", "from preftune import selftest"),
        ("selftest/x.py", "from preftune.cli import main"),
        ("report/x.py", "import torch"),
        ("report/x.py", "from preftune.evaluation import stats"),
        ("rundir.py", "from preftune.config import RunConfig"),
        ("errors.py", "from preftune.rundir import RunDir"),
        ("config/x.py", "import torch"),
        ("models/x.py", "import pickle"),
        ("models/x.py", "torch.load(path, weights_only=True)"),
        ("models/x.py", "eval('1')"),
        ("models/x.py", "from pickle import loads"),
        ("models/x.py", "AutoModel.from_pretrained(name)"),
        ("models/x.py", "numpy.load(path, allow_pickle=True)"),
        ("pipeline/x.py", "subprocess.run(words, shell=True)"),
        ("pipeline/x.py", "yaml.load(text, yaml.Loader)"),
        ("pipeline/x.py", "tarfile.open(path).extractall(target)"),
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
        ("data/hub.py", "from datasets import load_dataset"),
        ("models/x.py", "model.eval()"),
        ("cli.py", "from preftune import __version__, report"),
        ("pipeline/x.py", "from preftune.report import build"),
        ("selftest/x.py", "from preftune.evaluation import stats"),
        ("cli.py", "from preftune import selftest"),
    ],
)
def test_the_rules_let_pass_what_is_right(file: str, code: str) -> None:
    path, tree = SOURCE / file, ast.parse(code)
    assert not [*forbidden_imports(path, tree), *dangerous_calls(path, tree)]
