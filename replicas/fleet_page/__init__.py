"""The fleet page: one self-contained HTML document that draws the JSON of `/fleet` live. No build step, no CDN.

Markup, style and script lie beside this file and are put together when the page is first asked for.
"""

from functools import cache
from importlib.resources import files


@cache
def fleet_page() -> bytes:
    """The whole page, UTF-8."""
    folder = files(__name__)
    style, script = (folder.joinpath(name).read_text("utf-8") for name in ("fleet.css", "fleet.js"))
    page = folder.joinpath("fleet.html").read_text("utf-8")
    return page.replace("/* fleet.css */", style).replace("/* fleet.js */", script).encode()
