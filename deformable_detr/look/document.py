"""The frame of an HTML page that needs no scripts and no other files. Chapter looking."""

from collections.abc import Iterable


def document(title: str, style: str, sections: Iterable[str]) -> str:
    """A page in English; title: without what HTML would take for tags. style: CSS."""
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )
