"""The page at /: what this is, and where the documents are. It runs and loads nothing."""

import base64
import hashlib
from html import escape

from fastapi.responses import HTMLResponse

from tokendance import __version__

_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem;"
    "color:#222;background:#fff}h1{font-size:1.5rem}code{background:#f2f2f2;padding:0 .2em}"
    "li{margin:.3rem 0}@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}"
    "code{background:#2a2a2a}a{color:#8ab4f8}}"
)
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PATHS = (
    ("POST /v1/chat/completions", "answers a conversation"),
    ("POST /v1/responses", "answers a conversation, as OpenAI's newer API has it"),
    ("POST /v1/completions", "goes on with texts, or with token ids"),
    ("POST /v1/rounds", "answers all agents of a round, and keeps their session"),
    ("POST /v1/embeddings", "makes vectors of texts"),
    ("POST /tokenize, /detokenize", "tokens of a text, and back"),
    ("GET /v1/models", "what is served"),
    ("GET /dashboard", "draws the rounds of agents while they happen"),
    ("GET /metrics, /health, /ready, /version", "for operators"),
)


def home_page(model_name: str | None) -> HTMLResponse:
    """The page; it names the model unless only those with a key may know it."""
    served = f"It serves <code>{escape(model_name)}</code>" if model_name else "It wants an API key"
    rows = "\n".join(f"<li><code>{path}</code> {what}</li>" for path, what in _PATHS)
    return HTMLResponse(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TokenDance</title>
<style>{_STYLE}</style>
<h1>TokenDance {escape(__version__)}</h1>
<p>This is the API of a language model, for agents that talk in rounds: what several of them read
is computed once, wherever it stands in their prompts. {served}. Any client of OpenAI's API can
use it: its <code>base_url</code> is this address with <code>/v1</code>.</p>
<ul>
{rows}
</ul>
<p>All fields: <a href="/docs">/docs</a>, or as a file <a href="/openapi.json">/openapi.json</a>.
How clients are used, and what is promised of safety: <code>README.md</code>,
<code>docs/clients.md</code> and <code>docs/security.md</code> in TokenDance's folder. All options:
<code>tokendance serve --help</code>.</p>
</html>
""",
        headers=_HEADERS,
    )
