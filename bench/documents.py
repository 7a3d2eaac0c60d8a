"""Tables that are generated, in the places of documents that are marked for them.

    python -m bench.documents          # docs/benchmarks.md: what needs no measurement

A place is between ``<!-- name:start -->`` and ``<!-- name:end -->``.
"""

from __future__ import annotations

from pathlib import Path

from bench import gpu_floors, peer_table

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks.md"


def replace_block(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the marks of ``name``.

    Raises:
        ValueError: a mark is missing.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text or end not in text:
        raise ValueError(f"replace_block: the document has no {start} and {end}; put them in.")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def write_block(path: Path, name: str, content: str) -> None:
    """Replace a block of a file."""
    text = replace_block(path.read_text(encoding="utf-8"), name, content)
    path.write_text(text, encoding="utf-8")


def computed() -> dict[str, str]:
    """The blocks of docs/benchmarks.md that need no measurement."""
    return {"peers": peer_table.table(), "floors": gpu_floors.table()}


def main() -> None:
    """Write them."""
    for name, content in computed().items():
        write_block(BENCHMARKS, name, content)
    print(f"wrote {', '.join(computed())} in {BENCHMARKS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
