"""What a run leaves behind: json, predictions, and one self-contained page."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bayescal.predictive import Categorical
from bayescal.types import Estimate


class Table(NamedTuple):
    """A table of a report: the first column names the rows. Cells are words or `Estimate`s; words may wrap."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Picture(NamedTuple):
    """A figure of a report: what it shows in a few words, and its png."""

    name: str
    png: bytes


class Section(NamedTuple):
    """A part of a report: heading, a paragraph of plain text, and `Table`s and `Picture`s in order."""

    title: str
    text: str
    parts: Sequence[Any] = ()


def plain(value: Any) -> Any:
    """`value` with every `Estimate` as `{"value": x, ...}` and every numpy number as Python's, ready for json.

    What json cannot say is a word: "inf", "-inf", "nan".
    """
    if isinstance(value, Estimate):
        return plain(value.json())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 else value
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def save_json(path: Path, value: Any) -> None:
    """Writes `plain(value)`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def save_predictions(path: Path, pred: Categorical, labels) -> None:
    """npz with `logits` (member, n, classes), `labels` (n,), and `member_weights` where members do not weigh the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"logits": np.asarray(pred.logits), "labels": np.asarray(labels)}
    weights = pred.member_weights
    if weights is not None and np.ptp(np.asarray(weights)) > 0:
        arrays["member_weights"] = np.asarray(weights)
    np.savez_compressed(path, **arrays)


def figure_png(figure) -> bytes:
    """A matplotlib figure as png."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def number(value: Any) -> str:
    """A cell in words: an Estimate as value and interval, three or four significant digits."""
    if isinstance(value, Estimate):
        if value.low is None:
            return short(value.value)
        return f"{short(value.value)} [{short(value.low)}, {short(value.high)}]"
    return short(value) if isinstance(value, float) else str(value)


def short(value: float | None) -> str:
    """Four decimals for what is near one, three significant digits elsewhere."""
    if value is None:
        return ""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.3g}"


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """One html file without anything outside it: figures are inside as png.

    Args:
        path: where to write.
        title: heading of the page.
        lead: first paragraph.
        sections: in order.
    """
    body = [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"]
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body.extend(f"<p>{html.escape(line)}</p>" for line in section.text.split("\n") if line)
        body.extend(_part(part) for part in section.parts)
        body.append("</section>")
    page = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"{page}<title>{html.escape(title)}</title><style>{_STYLE}</style><main>{''.join(body)}</main></html>"
    )


def _part(part) -> str:
    if isinstance(part, Table):
        words = [all(isinstance(row[i], str) for row in part.rows) for i in range(len(part.columns))]
        head = "".join(
            f"<th{' class=words' if left else ''}>{html.escape(c)}</th>"
            for c, left in zip(part.columns, words, strict=True)
        )
        rows = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in part.rows)
        return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    data = base64.b64encode(part.png).decode()
    return f"<img alt='{html.escape(part.name, quote=True)}' src='data:image/png;base64,{data}'>"


def _cell(value) -> str:
    if isinstance(value, Estimate) and value.low is not None:
        interval = f"{short(value.low)} – {short(value.high)}"
        return f"<td>{short(value.value)}<small>{interval}</small></td>"
    words = " class=words" if isinstance(value, str) else ""
    return f"<td{words}>{html.escape(number(value))}</td>"


_STYLE = """
:root{color-scheme:light}body{margin:0;background:#f5f6f7;color:#1d2329;font:16px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 32px 64px;background:#fff}
h1{font-size:28px;margin:8px 0}h2{font-size:20px;margin:36px 0 4px}.lead{color:#4c5a67;margin-top:0}
p{max-width:80ch;margin:6px 0}img{max-width:100%;height:auto;display:block;margin:12px 0}
.wide{overflow-x:auto;margin:12px 0}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 11px 5px 0;text-align:right;border-bottom:1px solid #e3e6e9;white-space:nowrap;vertical-align:top}
th{font-weight:600;color:#4c5a67;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child,.words{text-align:left}td.words{white-space:normal}
td small{display:block;color:#6c7783;font-size:11.5px}
"""
