"""`tandem kv clear`, `pin` and `unpin`, and what else asks a gateway's operators' endpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

UrlOption = Annotated[str, typer.Option(metavar="URL", help="The gateway.")]
KeyOption = Annotated[
    str, typer.Option("--admin-key", envvar="TANDEM_ADMIN_KEY", help="One of gateway.admin_keys, where there are any.")
]
# typer evaluates these at run time: Optional, not "| None", keeps the help's types readable.
TenantOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="SALT", help="The cache_salt of the tenant's requests."),
]
PromptOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The prompt's text, as in /v1/completions."),
]
TokensOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="The prompt's token ids instead: a file with a JSON list."),
]
DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 30.0

kv_app = typer.Typer(no_args_is_help=True, help="Clear or pin cached KV at a running gateway, in all its workers.")


@kv_app.command()
def clear(tenant: TenantOption = None, url: UrlOption = DEFAULT_URL, admin_key: KeyOption = "") -> None:
    """Forget a tenant's cached KV, or everybody's, in prefix caches and tiers; pins of it end.

    Requests that run go on, and what they compute from now on is cached as ever.
    """
    body = {} if tenant is None else {"tenant": tenant}
    _tell("cleared", post(url, "/admin/kv/clear", body, admin_key).json())


@kv_app.command()
def pin(
    tenant: TenantOption = None,
    prompt: PromptOption = None,
    tokens: TokensOption = None,
    ttl_s: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.001, help="For so long. Default: until unpin, or the worker's end."),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    admin_key: KeyOption = "",
) -> None:
    """Keep the KV of a prompt: what is cached of it by now, and what is computed of it later."""
    body: dict[str, Any] = {"tenant": tenant or "", "prompt": _prompt(prompt, tokens)}
    if body["prompt"] is None:
        raise typer.BadParameter("give --prompt or --tokens")
    _tell("pinned", post(url, "/admin/kv/pin", body | ({} if ttl_s is None else {"ttl_s": ttl_s}), admin_key).json())


@kv_app.command()
def unpin(
    tenant: TenantOption = None,
    prompt: PromptOption = None,
    tokens: TokensOption = None,
    url: UrlOption = DEFAULT_URL,
    admin_key: KeyOption = "",
) -> None:
    """Undo the pin of a prompt, all of a tenant's, or all."""
    body: dict[str, Any] = {"tenant": tenant, "prompt": _prompt(prompt, tokens)}
    given = {name: value for name, value in body.items() if value is not None}
    _tell("unpinned", post(url, "/admin/kv/unpin", given, admin_key).json())


def post(url: str, path: str, body: dict[str, Any], admin_key: str) -> Any:
    """POST to a gateway; returns httpx's response. Blocks.

    Raises:
        WorkerError: the gateway cannot be reached, or refuses; with its reason.
    """
    import httpx

    from ...core.errors import WorkerError

    headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        answer = httpx.post(url.rstrip("/") + path, json=body, headers=headers, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise WorkerError(f"{url}: cannot be reached: {error}", fix="give the gateway's address with --url") from None
    if answer.is_error and "error" in (told := _json(answer)):
        raise WorkerError(f"{url}: {told['error']['message']}")
    return answer


def _json(answer: Any) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        found = None
    return (
        found if isinstance(found, dict) else {"error": {"message": f"answers with HTTP status {answer.status_code}"}}
    )


def _prompt(text: str | None, tokens: Path | None) -> Any:
    import json

    if text is not None and tokens is not None:
        raise typer.BadParameter("give either --prompt or --tokens")
    if tokens is None:
        return text
    try:
        return json.loads(tokens.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{tokens}: no JSON list of token ids: {error}") from None


def _tell(done: str, answer: dict[str, Any]) -> None:
    for worker, blocks in answer["blocks"].items():
        typer.echo(f"{worker}: " + ("no answer" if blocks is None else f"{blocks} blocks {done}"))
    if answer["unanswered"]:
        raise typer.Exit(1)
