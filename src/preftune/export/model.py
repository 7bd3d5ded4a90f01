"""What a model directory of a run is to others: its files, and the commands that measure or convert it."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preftune.config import load_recipe
from preftune.errors import BackendMissing, InputMissing, StorageError, UsageError, in_a_directory, one_of
from preftune.rundir import BASE
from preftune.runs.inputs import existing
from preftune.sums import check, check_own, read_sealed
from preftune.untrusted import holds_credential

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0")
TASKS = "arc_easy,hellaswag,winogrande"
READ = (".safetensors", ".json", ".txt", ".md", ".model", ".jinja")  # what goes up: no pickles
_TEXT = (".json", ".txt", ".md", ".jinja")
_LONGEST = 1 << 20  # bytes of a text file that are looked through; a vocabulary is longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of a run: its directory, whether it scores, and the reference of a policy that does so by sums
    of log-probabilities, as RewardBench takes them.
    """

    name: str
    directory: Path
    scores: bool
    chat: bool
    reference: Path | None


def find(path: str, model: str) -> Model:
    """A stage's model by the stage's name or the directory's, a member of an ensemble by "STAGE/member-0".
    UsageError for none, InputMissing if it is not finished, DataError if it is not what was written.
    """
    run = existing(path)
    check_own(run, run.config)
    config = load_recipe(str(run.config)).config
    stages = {name: stage for name, stage in config.stage.items() if stage.makes == "model"}
    paths = {name: run.model_dir(name, trains_policy=stage.trains_policy) for name, stage in stages.items()}
    paths |= {BASE: run.model_dir(BASE)} if config.model.scratch is not None else {}
    names = {path.name: name for name, path in paths.items()}
    name = names.get(model, model)
    for several in [name_of for name_of, settings in stages.items() if settings.models > 1]:
        names_of = stages[several].member_names(several)
        members = {member: paths[several] / member.removeprefix(f"{several}/") for member in names_of}
        paths |= members
        if name == several:
            hint = f"one of: {', '.join(members)}"
            raise UsageError(f"{several} is an ensemble, which only preftune reads", hint)
    if name not in paths:
        raise UsageError(f"no model {model!r}", one_of(model, paths))
    if not paths[name].is_dir():
        raise InputMissing(
            f"{name} is not trained yet in {run.path}", "preftune train RECIPE STAGE trains it"
        )
    trained, _, _ = name.partition("/")
    under = f"{paths[name].relative_to(run.path).as_posix()}/"
    check(run, read_sealed(run.stage_json(trained)), f"train stage {trained} again", under)
    stage, reference = stages.get(trained), None
    if stage is not None and stage.implicit_beta() is not None and not stage.implicit_average:
        reference = paths.get(stage.reference_stage) or _known_to_others(config.model.base)
    return Model(
        name=name,
        directory=paths[name],
        scores=stage is not None and stage.scores,
        chat=config.data.form == "chat",
        reference=reference,
    )


def _known_to_others(base: str) -> Path | None:
    """The base as other programs name it: a directory, or a hub id; None for what only preftune reads."""
    path = Path(os.path.expanduser(base))
    if path.is_dir():
        return path
    is_hub_id = not base.startswith((".", "/", "~")) and base.count("/") < 2 and path.suffix != ".gguf"
    return path if is_hub_id and base != "smollm2" else None


def harness_commands(model: Model) -> Iterator[tuple[str, str]]:
    """What to install, and the command, of each harness that can read the model."""
    directory = str(model.directory.resolve())
    template = [] if model.chat else ["--chat_template=raw"]
    if model.scores:
        yield (
            "pip install rewardbench",
            shlex.join(["rewardbench", f"--model={directory}", "--batch_size=8", *template]),
        )
        return
    words = [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={directory},dtype=float32",
        "--tasks",
        TASKS,
    ]
    words += ["--batch_size", "8", *(["--apply_chat_template"] if model.chat else [])]
    yield "pip install 'lm_eval[hf]'", shlex.join([*words, "--output_path", f"lm_eval-{model.name}"])
    if model.reference is not None:
        reference = model.reference.resolve() if model.reference.is_dir() else model.reference
        words = [
            "rewardbench",
            f"--model={directory}",
            f"--ref_model={reference}",
            "--batch_size=8",
            *template,
        ]
        yield "pip install rewardbench", shlex.join(words)


def converter() -> Path | None:
    """llama.cpp's converter: in $LLAMA_CPP, or on the path."""
    declared = Path(os.environ["LLAMA_CPP"]) / CONVERTER if os.environ.get("LLAMA_CPP") else None
    if declared is not None and declared.is_file():
        return declared
    on_path = shutil.which(CONVERTER)
    return Path(on_path) if on_path else None


def to_gguf(model: Model, target: Path, kind: str) -> None:
    """Have llama.cpp convert the model. BackendMissing without it, UsageError for what it cannot do."""
    if model.scores:
        raise UsageError("a reward model has no GGUF form", "convert a policy")
    if kind not in TYPES:
        raise UsageError(f"--type {kind}", f"one of: {', '.join(TYPES)}")
    if target.suffix != ".gguf":
        raise UsageError(f"{target} does not end in .gguf", "give the name of a file: --gguf NAME.gguf")
    in_a_directory(str(target))
    script = converter()
    if script is None:
        raise BackendMissing(
            f"llama.cpp's {CONVERTER} was not found",
            "get its sources, then LLAMA_CPP=DIRECTORY preftune export ...; it wants the package gguf",
        )
    partial = target.with_name(f".{target.stem}.tmp-{os.getpid()}.gguf")
    words = [sys.executable, str(script), str(model.directory), "--outfile", str(partial), "--outtype", kind]
    try:
        process = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
        if process.returncode or not partial.is_file():
            last = (process.stderr.strip() or process.stdout.strip() or "it wrote nothing").splitlines()[-1]
            raise StorageError(f"{script} failed: {last[:300]}", f"to see all: {shlex.join(words)}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What would go up: files with their sizes; files that stay, and what to look at before."""

    files: dict[str, int]
    staying: tuple[str, ...]
    warnings: tuple[str, ...]


def what_goes_up(model: Model) -> Upload:
    """Weights, configuration, tokenizer, card. UsageError if a text among them holds a credential."""
    files, staying, warnings = dict[str, int](), list[str](), list[str]()
    home = str(Path.home())
    for path in sorted(model.directory.rglob("*")):
        name = path.relative_to(model.directory).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or path.is_symlink() or path.suffix not in READ:
            staying.append(name)
            continue
        files[name] = path.stat().st_size
        if path.suffix in _TEXT and files[name] <= _LONGEST:
            text = path.read_text(encoding="utf-8", errors="replace")
            if holds_credential(text):
                raise UsageError(f"{path} holds what looks like a password or token", "take it out first")
            if len(home) > 1 and home in text:
                warnings.append(f"{name} names a path of this machine ({home})")
    return Upload(files=files, staying=tuple(staying), warnings=tuple(warnings))
