"""The folder of a study: one JSON line a result, and what they were made with.

A line is written whole or not at all: one that an interruption tore is dropped when the folder is
opened again, and so is what a full disk left of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ttt_fast.study.grid import Setting

CONFIGURATION = "study.json"
Key = tuple[str, Setting, int]


class ResultsError(RuntimeError):
    """The folder cannot be used or written to; what is in it is safe."""


def line_of(prompt: str, setting: Setting, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """A result."""
    return {"prompt": prompt, "setting": setting.as_dict(), "step": step, **values}


def key_of(line: Mapping[str, Any]) -> Key:
    """What a result is of."""
    return line["prompt"], Setting.of(line["setting"]), int(line["step"])


class Results:
    """Appends lines to one file of the folder, and knows those of all its files.

    Args:
        folder: it exists.
        shard: number of this process and how many there are; each has a file of its own.

    Raises:
        ResultsError: another process writes to the file, or a line in it is damaged.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        rank, world = shard
        self.path = folder / ("results.jsonl" if world == 1 else f"results-{rank}.jsonl")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._drop_torn_line()
            # Of others' files: a study may have begun with other numbers of processes.
            self.lines: dict[Key, dict[str, Any]] = {
                key_of(line): line for line in read_lines(folder)
            }
        except BaseException:
            self.close()
            raise

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines, flushed to the disk.

        Raises:
            ResultsError: they could not be written; the file ends with the last line before them.
        """
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        end = os.fstat(self._file).st_size
        try:
            _write(self._file, data)
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, end)
            raise ResultsError(
                f"{self.path}: {error.strerror}. The {len(self.lines)} results before are safe;"
                " put it right and give the same command again, which goes on from there."
            ) from error
        self.lines.update({key_of(line): dict(line) for line in lines})

    def close(self) -> None:
        """Let another process write. Again, it does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultsError(
                f"{self.path}: another process is writing to it. Wait for it, or give another"
                " folder."
            ) from None

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """All whole results of a folder.

    Raises:
        ResultsError: a line that ends is damaged; names it.
    """
    for path in sorted(folder.glob("results*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                result = json.loads(line)
                key_of(result)
            except (ValueError, KeyError, TypeError) as error:
                raise ResultsError(
                    f"{path}: line {number} is damaged ({type(error).__name__}). Delete that line"
                    " and give the same command again: it is made anew."
                ) from error
            yield result


# ---------------------------------------------------------------------------- the configuration


def open_configuration(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder's results were made with: as it is there, or now written.

    Args:
        folder: made if need be.
        wanted: "identity" has to be what it is there; "prompts" may only have grown, and "skipped"
            with it. All else is kept as it was at first.

    Raises:
        ResultsError: the folder belongs to another study; names what differs.
    """
    path = folder / CONFIGURATION
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{folder}: {error.strerror}. Give another folder.") from error
    found = read_configuration(folder) if path.exists() else None
    wanted = json.loads(json.dumps(wanted))
    if found is None:
        if any(folder.glob("results*.jsonl")):
            raise ResultsError(
                f"{folder}: there are results without a {CONFIGURATION}, so what they were made"
                " with cannot be told. Give another folder."
            )
        return _save(path, wanted)
    for name, value in wanted["identity"].items():
        before = found["identity"].get(name)
        if before != value:
            raise ResultsError(
                f"{folder}: its results were made with {name}={_short(before)}, and now it is"
                f" {_short(value)}. Give the settings of before to go on, or another folder."
            )
    if wanted["prompts"] < found["prompts"]:
        raise ResultsError(
            f"{folder}: it is a study of {found['prompts']} prompts, and now it is to be of"
            f" {wanted['prompts']}. There may be more later, not fewer; give another folder."
        )
    if wanted["prompts"] > found["prompts"]:
        return _save(path, found | {name: wanted[name] for name in ("prompts", "skipped")})
    return found


def read_configuration(folder: Path) -> dict[str, Any]:
    """What a folder's results were made with.

    Raises:
        ResultsError: it cannot be read.
    """
    path = folder / CONFIGURATION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path}: cannot be read ({error}). Give the folder of a study, or a new one."
        ) from error
    parts = {"identity": dict, "prompts": int, "portions": list, "about": dict}
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), kind) for name, kind in parts.items()
    ):
        raise ResultsError(
            f"{path}: no configuration of a study, which has {', '.join(parts)}. Give the folder of"
            " a study, or a new one."
        )
    return found


def require_shared(folder: Path, agreed: Mapping[str, Any]) -> None:
    """Whether this process sees the folder that the first one opened.

    Raises:
        ResultsError: it does not, as on machines without a common file system.
    """
    path = folder / CONFIGURATION
    if not path.exists() or read_configuration(folder)["identity"] != agreed["identity"]:
        raise ResultsError(
            f"{folder}: this process does not see the {CONFIGURATION} that the first one wrote."
            " Give a folder that all machines share."
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file when everything is written.

    Raises:
        ResultsError: it could not be written; the file is what it was.
    """
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise ResultsError(
            f"{path}: {error.strerror}. No result is lost; put it right and give the same command"
            " again."
        ) from error


def _save(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any]:
    write_atomically(path, json.dumps(configuration, indent=2) + "\n")
    return dict(configuration)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
