"""Text from outside on its way to a person or a file: hidden characters made visible, credentials taken out.

A response, a row of data, a file name or a library's message may hold terminal escapes, right-to-left
overrides or half of a surrogate pair; a command line or an address may hold a token. Standard library only.
"""

import os
import re

MAX_QUOTE = 1200  # characters of one prompt or response in a report; the files keep the whole text
REDACTED = "[redacted]"

# Controls other than newline and tab, the bidi controls (Trojan Source, CVE-2021-42574), the byte-order mark,
# line and paragraph separators, invisible tag characters, lone surrogates and noncharacters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)

# Credentials by their form, as their issuers make them: hf_smollm2_instruct_v2 is a name. What identifies
# them stays, so that a person sees what was taken out. Looks ahead have limits: a text may be long. What is
# random has capitals within words, or digits in more places than one, where words have a year or a date.
_RANDOM = (
    r"(?:(?=[A-Za-z0-9]{0,99}[a-z])(?=[A-Za-z0-9]{0,99}[A-Z])(?=[A-Za-z0-9]{0,99}(?:[0-9]|[A-Z][a-z]?[A-Z]))"
    r"|(?=(?:[0-9]{0,99}[A-Za-z]{1,99}[0-9]){2})|(?=(?:[A-Za-z]{0,99}[0-9]){9}))[A-Za-z0-9]{20,}"
)
_UUID = r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?P<kind>hf_|api_org_|gh[pousr]_)[A-Za-z0-9]{30,}"
    rf"|(?P<kind_sk>sk-(?:[A-Za-z0-9]{{2,10}}-){{0,2}})(?:{_UUID}|{_RANDOM})"
    r"|(?P<kind_of>sk-(?:proj|ant|svcacct|admin)-)(?=[\w-]{0,99}[0-9])(?=[\w-]{0,99}[a-z])(?=[\w-]{0,99}[A-Z])[\w-]{20,}"
    r"|(?P<kind_up>A[KS]IA)[A-Z0-9]{16}(?![a-z])"
    r"|(?P<kind_any>github_pat_|glpat-|xox[abprs]-|AIza|eyJ)[A-Za-z0-9_\-.]{16,}"
    r")[A-Za-z0-9_\-.]*",
    re.ASCII,
)
_ADDRESS = re.compile(r"(?P<kind>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,20}://)[^\s/@'\"]+@", re.IGNORECASE)
# `api_key=...`, `"hf_token": "..."`, `Authorization: Bearer ...`; not `eos_token=`, not `max_new_tokens=`.
_NAMES = (
    r"(?:(?:api|access|secret|private|auth|bearer|hf|hub|wandb)[_-]?(?:key|token)"
    r"|secret|passw(?:or)?d|passphrase|bearer)"
)
_NAMED = re.compile(
    rf"(?P<kind>(?<![a-z0-9]){_NAMES}[\"']?(?:\s*=\s*|\s*:\s*(?=[\"']|\S{{16}})|\s+(?=\S{{16}}))[\"']?)"
    r"[^\s\"',;}]+",
    re.IGNORECASE,
)
# What an address hands over with itself: `?token=...`, a signed link of a cloud store.
_QUERY = re.compile(
    r"(?P<kind>[?&](?:[a-z0-9_-]*(?:token|secret|signature|credential|password|passwd|api[_-]?key|access[_-]?key)|sig|key)=)"
    r"[^\s&#\"']+",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(rf"(?:{_NAMES}|_token|_key)$", re.IGNORECASE)
_SHORTEST = 12  # characters of a variable's value that is looked for: shorter ones are words


def clean(text: object, limit: int | None = MAX_QUOTE) -> str:
    """`text` with every hidden character written out as ⟨U+XXXX⟩, cut at `limit` characters with a note."""
    raw = str(text).replace("\r\n", "\n")
    cut = 0 if limit is None else max(0, len(raw) - limit)
    visible = _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", raw[: len(raw) - cut])
    return f"{visible} … ({cut} more characters)" if cut else visible


def redact(text: str) -> str:
    """`text` without credentials: what `holds_credential` finds, and values named as keys or passwords."""
    return _NAMED.sub(_marked, _without_known(text))


def holds_credential(text: str) -> bool:
    """Whether a token of a known form stands in `text`, `user:password@` in an address, or the value of one
    of this process's variables that are named as secrets (HF_TOKEN).
    """
    return _without_known(text) != text


def passes_credential(word: str) -> bool:
    """Whether a setting or a word of a command line, `key=value` too, holds one. What is there as a file or a
    directory is a path, whatever it is called.
    """
    key, _, value = word.partition("=")
    suspect = key if value and _exists(value) else word
    return holds_credential(suspect) and not _exists(word)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def printable(text: object) -> str:
    """What may go to a terminal or a log: `redact` and `clean`, at any length."""
    return clean(redact(str(text)), None)


def _without_known(text: str) -> str:
    for value in _secret_values():
        text = text.replace(value, REDACTED)
    for pattern in (_ADDRESS, _QUERY, _TOKEN):
        text = pattern.sub(_marked, text)
    return text


def _marked(match: re.Match[str]) -> str:
    """What says of which kind it was stays: the one group of a pattern that matched."""
    return match[str(match.lastgroup)] + REDACTED + "@" * match[0].endswith("@")


def _secret_values() -> list[str]:
    """Longest first, so that a value inside another does not leave the rest of it."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
