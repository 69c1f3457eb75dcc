"""One HTML page of all results, which needs nothing but itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from fusedres.analysis.results import Result

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Why residual connections work</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.7rem; }}
h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }}
img {{ max-width: 100%; height: auto; }}
.about, nav {{ color: #666; font-size: 0.9rem; }}
</style>
</head>
<body>
<h1>Why residual connections work</h1>
<p class="about">{about}</p>
<nav><ul>
{contents}
</ul></nav>
{sections}
</body>
</html>
"""

_SECTION = """<section id="{name}">
<h2>{title}</h2>
<p>{conclusion}</p>
<img src="data:image/png;base64,{picture}" alt="{title}">
</section>"""


def page(pictures: Sequence[tuple[Result, bytes]], made_by: Mapping[str, Any]) -> str:
    """Return an HTML page with the conclusion and the picture of each result, and what made them."""
    sections, contents = [], []
    for result, png in pictures:
        title = html.escape(result.title)
        picture = base64.b64encode(png).decode()
        conclusion = html.escape(result.conclusion())
        sections.append(_SECTION.format(name=result.name, title=title, conclusion=conclusion, picture=picture))
        contents.append(f'<li><a href="#{result.name}">{title}</a></li>')
    about = html.escape("; ".join(f"{name} {value}" for name, value in made_by.items()))
    return _PAGE.format(about=about, contents="\n".join(contents), sections="\n".join(sections))
