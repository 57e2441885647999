"""Templates, and how numbers and instants read: with units, never longer than they need to be."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from app.dashboard.assets import Assets

_UNITS = ("B", "kB", "MB", "GB", "TB")
# 'none' first: what is not named here no page may load. Charts and htmx style elements by script, which is no inline style
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def open_templates(assets: Assets) -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals |= {"asset": assets.url, "icon": assets.icon}
    made.filters |= {
        "count": count,
        "bytes": size,
        "duration": duration,
        "instant": instant,
        "number": number,
        "percent": percent,
        "money": money,
        "short": short,
    }
    return made


def render(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page, or a part of one."""
    visitor = getattr(request.state, "visitor", None)
    always = {
        "visitor": visitor,
        "csrf_token": getattr(request.state, "csrf_token", ""),
        "path": request.url.path,
        "version": request.app.version,
    }
    page = request.app.state.templates.get_template(template).render(always | values)
    return HTMLResponse(page, status_code=status, headers=HEADERS)


def count(value: float | None) -> str:
    """1234 → 1,234; 12345678 → 12.3 M."""
    if value is None:
        return "–"
    for unit, of in (("G", 1e9), ("M", 1e6)):
        if value >= of:
            return f"{value / of:.3g} {unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """In powers of 1000, as disks are sold."""
    if value is None:
        return "–"
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """The two largest units: 2 h 5 min, 3 min 20 s, 12.3 s."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def instant(at: datetime | int | str | None) -> Markup | str:
    """Readable without a script, which makes “4 min ago” of it in the browser."""
    match at:
        case None:
            return "–"
        case int():
            moment = datetime.fromtimestamp(at, UTC)
        case str():
            moment = datetime.fromisoformat(at).astimezone(UTC)
        case _:
            moment = at.astimezone(UTC)
    return Markup('<time datetime="{}">{:%Y-%m-%d %H:%M} UTC</time>').format(moment.isoformat(), moment)


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, and no exponent where it can be helped."""
    if value is None:
        return "–"
    told = f"{value:.{digits}g}"
    return f"{value:.1e}" if "e" in told else told


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def short(model: str) -> str:
    """Of a tuned model's name what was given to it, and enough of the rest to tell two apart; a base's is short enough."""
    kind, *parts = model.split(":")
    if kind != "ft" or len(parts) < 4:
        return model
    base, _, suffix, run, *checkpoint = parts
    return " · ".join([suffix or base, run, *(step.replace("ckpt-step-", "step ") for step in checkpoint)])


def money(amount: float | None, currency: str = "USD") -> str:
    return "–" if amount is None else f"{amount:,.2f} {currency}"
