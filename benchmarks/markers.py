"""Documents whose tables are written by scripts, each between two markers of its name."""


def between_markers(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of ``name`` exchanged."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    if not found:
        raise SystemExit(f"there is no marker {begin}")
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"
