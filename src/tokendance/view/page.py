"""The page that shows runs: its parts, and one file that holds all of it.

`web/` has its source; what is built of that is beside this file, in `assets/`, and part of the
package. Nothing is ever loaded from another host: the policies below say so to the browser.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template

from tokendance.view.document import Json

# For a page whose parts come from the same server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>TokenDance: a run</title>
$head
</head>
<body>
<div id="view"></div>
<noscript>This page draws a run with JavaScript, which is switched off here.</noscript>
$data
</body>
</html>
""")


@dataclass(frozen=True, slots=True)
class Asset:
    """A part of the page: its type and its content."""

    media_type: str
    content: bytes


HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_MEDIA_TYPES = {
    "view.js": "text/javascript; charset=utf-8",
    "view.css": "text/css; charset=utf-8",
}


@cache
def asset(name: str) -> Asset | None:
    """A part of the page that is served beside it; None if there is none of that name."""
    if name not in _MEDIA_TYPES:
        return None
    content = files("tokendance.view").joinpath("assets", name).read_bytes()
    return Asset(_MEDIA_TYPES[name], content)


def page(source: str, parts: str = "") -> str:
    """The page as it is served.

    Args:
        source: path from which it takes the document; one that ends with "events" is of one that
            grows.
        parts: path of its other parts, with a slash at its end if there is any.
    """
    head = (
        f'<meta name="tokendance-source" content="{source}">\n'
        '<link rel="icon" href="data:,">\n'
        f'<link rel="stylesheet" href="{parts}view.css">\n'
        f'<script src="{parts}view.js" defer></script>'
    )
    return _PAGE.substitute(head=head, data="")


def whole_page(document: Json) -> str:
    """The page with a run in it, in one text that needs no server and no network."""
    script, style = _text("view.js"), _text("view.css")
    policy = (
        f"default-src 'none'; script-src '{_source_of(script)}'; style-src '{_source_of(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>"
    )
    data = (
        f'<script type="application/json" id="run">{_embedded(document)}</script>\n'
        f"<script>{script}</script>"
    )
    return _PAGE.substitute(head=head, data=data)


def _text(name: str) -> str:
    part = asset(name)
    assert part is not None
    return part.content.decode()


def _source_of(text: str) -> str:
    """How a policy names an inline script or style: by its hash."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embedded(document: Json) -> str:
    """JSON that no HTML parser takes for markup, whatever texts are in it."""
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
