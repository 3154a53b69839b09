"""Choices that were measured before on the same machine, in one JSON file of the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import secrets

import torch

from liveweight import __version__, _library
from liveweight.compress.benchmark import processor

# Folder of the cache, or "off".
VARIABLE = "LIVEWEIGHT_CACHE"
_VERSION = 1
_MOST = 4000  # entries that are kept, the newest


def cache_folder() -> pathlib.Path | None:
    """Return the folder of what is remembered; None where LIVEWEIGHT_CACHE is "off"."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in ("off", "0", "none"):
        return None
    if wanted:
        return pathlib.Path(wanted)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "liveweight"


def cache_path() -> pathlib.Path | None:
    """Return the file of the choices; None where LIVEWEIGHT_CACHE is "off"."""
    folder = cache_folder()
    return None if folder is None else folder / "choices.json"


def machine_key(threads: int, device: torch.device) -> str:
    """Return what a measured time depends on beside the layer: processors, threads, builds."""
    library = pathlib.Path(_library.__file__).with_name("_cpu.so")
    build = ""
    if library.exists():
        facts = library.stat()
        build = f"{facts.st_size}-{facts.st_mtime_ns}"
    parts = (processor(), _library.cpu_isa(), threads, torch.__version__, __version__, build)
    if device.type == "cuda":
        gpu = (torch.cuda.get_device_name(device), torch.version.cuda, _library.status()["triton"])
        parts = (*parts, *gpu)
    return " | ".join(map(str, parts))


class ChoiceCache:
    """Entries by key; read once, written once. A file that is damaged or foreign counts as empty.

    Without a path it remembers as long as it lives: equal layers of one model are measured once.

    An entry is a JSON object; a key is any JSON value, told apart by its digest.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self.path = path
        self._entries = _read(path) if path is not None else {}
        self._new: dict[str, dict] = {}

    def get(self, key: object) -> dict | None:
        """Return the entry of a key, None where there is none."""
        entry = self._entries.get(_digest(key))
        return entry if isinstance(entry, dict) else None

    def put(self, key: object, entry: dict) -> None:
        """Note an entry; write() makes it last."""
        self._entries[_digest(key)] = self._new[_digest(key)] = entry

    def write(self) -> str:
        """Add the new entries to the file; return why it could not be written, "" if it could."""
        if not self._new or self.path is None:
            return ""
        entries = _read(self.path)  # another process may have written meanwhile
        for digest, entry in self._new.items():
            entries.pop(digest, None)
            entries[digest] = entry
        entries = dict(list(entries.items())[-_MOST:])
        text = json.dumps({"liveweight": _VERSION, "entries": entries})
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return f"the cache {self.path} was not written: {error.strerror or error}"
        self._new = {}
        return ""


def _digest(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: pathlib.Path) -> dict[str, dict]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("liveweight") != _VERSION:
        return {}
    entries = content.get("entries")
    return entries if isinstance(entries, dict) else {}
